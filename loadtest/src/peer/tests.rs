use super::{mosquitto::Mosquitto, nats::Nats, redis_stream::RedisStream, *};
use crate::{
    bench::{Part, Seen},
    crowd::MessageId,
};

const ID: MessageId = MessageId { flow: 3, number: 9, scheduled: 77 };

/// What is understood of bytes that come one by one, and what is answered.
fn fed(wire: &mut dyn Wire, part: Part, bytes: &[u8]) -> (Vec<Seen>, Vec<u8>) {
    let (mut seen, mut out, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    for byte in bytes {
        kept.push(*byte);
        let used = wire.take(0, part, &kept, &mut seen, &mut out).unwrap();
        kept.drain(..used);
    }
    assert!(kept.is_empty(), "{kept:?}");
    (seen, out)
}

fn body() -> Vec<u8> {
    let mut body = Vec::new();
    put_body(&mut body, ID, 20);
    body
}

#[test]
fn a_body_begins_with_the_id_of_its_message() {
    assert_eq!(body().len(), 20);
    assert_eq!(id_of(&body()), Some(ID));
    assert_eq!(id_of(b"short"), None);
}

#[test]
fn redis_entries_are_read_and_the_next_read_goes_on_behind_the_last() {
    let mut wire = RedisStream::new(20);
    let mut bytes = b"+PONG\r\n*1\r\n*2\r\n$1\r\n3\r\n*2\r\n".to_vec();
    for id in ["5-0", "5-1"] {
        bytes.extend_from_slice(format!("*2\r\n$3\r\n{id}\r\n*2\r\n$1\r\nm\r\n$20\r\n").as_bytes());
        bytes.extend_from_slice(&body());
        bytes.extend_from_slice(b"\r\n");
    }
    let (seen, out) = fed(&mut wire, Part::Receiver(3), &bytes);
    assert_eq!(seen, [Seen::Ready, Seen::Message(ID), Seen::Message(ID)]);
    assert!(out.ends_with(b"$7\r\nSTREAMS\r\n$1\r\n3\r\n$3\r\n5-1\r\n"), "{}", String::from_utf8_lossy(&out));
    let (seen, _) = fed(&mut wire, Part::Sender(3), b"$3\r\n5-1\r\n");
    assert_eq!(seen, [Seen::AckOfOldest]);
    assert!(wire.take(0, Part::Sender(3), b"-ERR no\r\n", &mut Vec::new(), &mut Vec::new()).is_err());
}

#[test]
fn nats_counts_as_ack_what_comes_after_the_greeting() {
    let mut wire = Nats::new(20);
    wire.greet(0, Part::Receiver(3), &mut Vec::new());
    let mut bytes = b"INFO {}\r\n+OK\r\n+OK\r\nPONG\r\n+OK\r\nPING\r\nMSG f3 1 20\r\n".to_vec();
    bytes.extend_from_slice(&body());
    bytes.extend_from_slice(b"\r\n");
    let (seen, out) = fed(&mut wire, Part::Receiver(3), &bytes);
    assert_eq!(seen, [Seen::Ready, Seen::AckOfOldest, Seen::Message(ID)]);
    assert_eq!(out, b"PONG\r\n");
}

#[test]
fn mqtt_messages_are_acknowledged_with_their_packet_identifier() {
    let mut wire = Mosquitto::new(200);
    let mut bytes = vec![0x20, 2, 0, 0, 0x90, 3, 0, 1, 1, 0x40, 2, 0, 10];
    // What it sends itself is what it gets, packet identifier included; 200 bytes need a length of two.
    wire.send(Part::Sender(3), ID, &mut bytes);
    let (seen, out) = fed(&mut wire, Part::Receiver(3), &bytes);
    assert_eq!(seen, [Seen::Ready, Seen::AckOfOldest, Seen::Message(ID)]);
    assert_eq!(out, [0x40, 2, 0, 10]);
    assert!(wire.take(0, Part::Sender(3), &[0x20, 2, 0, 5], &mut Vec::new(), &mut Vec::new()).is_err());
}
