//! MQTT 3.1.1: a topic for each flow, QoS 1 in both directions.

use super::{body_bytes, id_of, put_body};
use crate::{
    bench::{Part, Seen, Wire},
    crowd::MessageId,
};

const CONNACK: u8 = 0x20;
const PUBLISH: u8 = 0x30;
const PUBACK: u8 = 0x40;
const SUBACK: u8 = 0x90;
/// PUBLISH with QoS 1.
const PUBLISH_QOS_1: u8 = 0x32;
const KIND: u8 = 0xf0;

pub(super) struct Mosquitto {
    body_bytes: usize,
}

impl Mosquitto {
    pub(super) fn new(body_bytes: usize) -> Self {
        Self { body_bytes }
    }
}

fn put_length(out: &mut Vec<u8>, mut length: usize) {
    loop {
        let low = u8::try_from(length % 128).unwrap_or(0);
        length /= 128;
        out.push(if length > 0 { low | 0x80 } else { low });
        if length == 0 {
            return;
        }
    }
}

/// The remaining length at the beginning, and how many bytes it takes; nothing: it is not whole yet.
fn length(bytes: &[u8]) -> Result<Option<(usize, usize)>, usize> {
    let mut value = 0;
    for (place, byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Ok(Some((value, place + 1)));
        }
    }
    if bytes.len() >= 4 { Err(value) } else { Ok(None) }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Packet identifiers of one connection: never 0, and far more than a window.
fn packet(number: u32) -> u16 {
    u16::try_from(number % 65_535).unwrap_or(0) + 1
}

impl Wire for Mosquitto {
    fn greet(&mut self, connection: usize, part: Part, out: &mut Vec<u8>) {
        let mut rest = Vec::new();
        put_string(&mut rest, "MQTT");
        // Level 4, a clean session, no keep alive.
        rest.extend_from_slice(&[4, 2, 0, 0]);
        put_string(&mut rest, &format!("c{connection}"));
        out.push(0x10);
        put_length(out, rest.len());
        out.append(&mut rest);
        if let Part::Receiver(flow) = part {
            rest.extend_from_slice(&1u16.to_be_bytes());
            put_string(&mut rest, &format!("f{flow}"));
            rest.push(1);
            out.push(0x82);
            put_length(out, rest.len());
            out.append(&mut rest);
        }
    }

    fn send(&mut self, part: Part, id: MessageId, out: &mut Vec<u8>) {
        let flow = if let Part::Sender(flow) = part { flow } else { 0 };
        let topic = format!("f{flow}");
        out.push(PUBLISH_QOS_1);
        put_length(out, 2 + topic.len() + 2 + body_bytes(self.body_bytes));
        put_string(out, &topic);
        out.extend_from_slice(&packet(id.number).to_be_bytes());
        put_body(out, id, self.body_bytes);
    }

    fn take(
        &mut self,
        _: usize,
        part: Part,
        bytes: &[u8],
        seen: &mut Vec<Seen>,
        out: &mut Vec<u8>,
    ) -> Result<usize, usize> {
        let mut used = 0;
        while let Some(&first) = bytes.get(used) {
            let Some((length, prefix)) = length(&bytes[used + 1..])? else { break };
            let start = used + 1 + prefix;
            let Some(rest) = bytes.get(start..start + length) else { break };
            let receiver = matches!(part, Part::Receiver(_));
            match first & KIND {
                CONNACK if rest.get(1) != Some(&0) => return Err(usize::from(CONNACK)),
                CONNACK if !receiver => seen.push(Seen::Ready),
                SUBACK => seen.push(Seen::Ready),
                PUBACK => seen.push(Seen::AckOfOldest),
                PUBLISH => {
                    let topic = rest.first_chunk::<2>().map_or(0, |two| usize::from(u16::from_be_bytes(*two)));
                    let packet = rest.get(2 + topic..4 + topic).ok_or(length)?;
                    out.extend_from_slice(&[PUBACK, 2]);
                    out.extend_from_slice(packet);
                    seen.extend(id_of(&rest[4 + topic..]).map(Seen::Message));
                }
                _ => {}
            }
            used = start + length;
        }
        Ok(used)
    }
}
