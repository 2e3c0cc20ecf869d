//! The frames of the hot path, written and read without allocating.
//!
//! The generator's budget is under two microseconds a message, all told, so that it never is the limit. What is not `Send`,
//! `SendAck` or `Message` goes through `im_proto` like everywhere else; a test holds both codecs against each other.

use bytes::Bytes;
use im_proto::{ConversationId, frame, v1};

/// Where sends of one conversation go, encoded once: the `target` member of `Send`.
#[derive(Clone, Debug)]
pub struct Target {
    encoded: Vec<u8>,
}

impl Target {
    /// A conversation by its id.
    pub fn conversation(id: ConversationId) -> Self {
        let mut encoded = Vec::with_capacity(18);
        put_bytes(&mut encoded, 1, id.as_bytes());
        Self { encoded }
    }

    /// The direct conversation with a user.
    pub fn peer(user: &str) -> Self {
        let mut encoded = Vec::with_capacity(2 + user.len());
        put_bytes(&mut encoded, 2, user.as_bytes());
        Self { encoded }
    }
}

/// A `Send` about to be written.
#[derive(Clone, Copy, Debug)]
pub struct Send<'a> {
    pub target: &'a Target,
    pub client_message_id: &'a [u8],
    pub body: &'a [u8],
    pub after: &'a [u8],
    pub known_seq: u64,
}

const WIRE_LENGTH: u8 = 2;

fn varint_length(value: u64) -> usize {
    let bits = 64 - (value | 1).leading_zeros();
    usize::try_from(bits.div_ceil(7)).unwrap_or(10)
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

fn bytes_length(bytes: &[u8]) -> usize {
    1 + varint_length(bytes.len() as u64) + bytes.len()
}

/// A field below 16 of bytes.
fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | WIRE_LENGTH);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Appends the frame of a send, length prefix included.
pub fn put_send(out: &mut Vec<u8>, send: Send<'_>) {
    let mut length = send.target.encoded.len() + bytes_length(send.client_message_id) + bytes_length(send.body);
    if !send.after.is_empty() {
        length += bytes_length(send.after);
    }
    if send.known_seq != 0 {
        length += 1 + varint_length(send.known_seq);
    }
    let payload = 1 + varint_length(length as u64) + length;
    out.reserve(frame::PREFIX_BYTES + payload);
    out.extend_from_slice(&u32::try_from(payload).unwrap_or(u32::MAX).to_be_bytes());
    out.push(4 << 3 | WIRE_LENGTH);
    put_varint(out, length as u64);
    out.extend_from_slice(&send.target.encoded);
    put_bytes(out, 3, send.client_message_id);
    put_bytes(out, 4, send.body);
    if !send.after.is_empty() {
        put_bytes(out, 5, send.after);
    }
    if send.known_seq != 0 {
        out.push(6 << 3);
        put_varint(out, send.known_seq);
    }
}

/// Appends any frame of a client.
pub fn put_frame(out: &mut Vec<u8>, member: v1::client_frame::Frame) {
    out.extend_from_slice(&frame::frame_to_bytes(&v1::ClientFrame::from(member)));
}

/// A `SendAck` as it lies in the read buffer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ack<'a> {
    pub client_message_id: &'a [u8],
    pub conversation_id: &'a [u8],
    pub seq: u64,
    pub status: Option<v1::Status>,
}

/// A `Message` as it lies in the read buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message<'a> {
    pub conversation_id: &'a [u8],
    pub seq: u64,
    pub sender: &'a str,
    pub client_message_id: &'a [u8],
    pub body: &'a [u8],
    pub kind: u64,
}

impl<'a> From<&'a v1::Message> for Message<'a> {
    fn from(message: &'a v1::Message) -> Self {
        Self {
            conversation_id: &message.conversation_id,
            seq: message.seq,
            sender: &message.sender,
            client_message_id: &message.client_message_id,
            body: &message.body,
            kind: u64::try_from(message.kind).unwrap_or_default(),
        }
    }
}

/// A frame from the server.
#[derive(Debug)]
pub enum Incoming<'a> {
    Ack(Ack<'a>),
    Message(Message<'a>),
    Other(v1::server_frame::Frame),
    /// A member that this build does not know.
    Unknown(u32),
}

/// Reads the payload of a frame.
pub fn decode(payload: &[u8]) -> Result<Incoming<'_>, frame::FrameError> {
    let mut rest = payload;
    let hot = match rest.split_first() {
        Some((0x22, tail)) => {
            rest = tail;
            take_bytes(&mut rest).and_then(|inner| rest.is_empty().then(|| decode_ack(inner).map(Incoming::Ack))?)
        }
        Some((0x2a, tail)) => {
            rest = tail;
            take_bytes(&mut rest)
                .and_then(|inner| rest.is_empty().then(|| decode_message(inner).map(Incoming::Message))?)
        }
        _ => None,
    };
    if let Some(hot) = hot {
        return Ok(hot);
    }
    Ok(match frame::decode_server_frame(Bytes::copy_from_slice(payload))? {
        frame::Decoded::Frame(member) => Incoming::Other(member),
        frame::Decoded::Unknown(field) => Incoming::Unknown(field),
    })
}

fn take_varint(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, tail) = input.split_first()?;
        *input = tail;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn take_bytes<'a>(input: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(take_varint(input)?).ok()?;
    let (bytes, tail) = input.split_at_checked(length)?;
    *input = tail;
    Some(bytes)
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The next field of a message of varints and bytes; anything else is left to the full decoder.
fn take_field<'a>(input: &mut &'a [u8]) -> Option<(u64, Value<'a>)> {
    let key = take_varint(input)?;
    match key & 7 {
        0 => Some((key >> 3, Value::Number(take_varint(input)?))),
        2 => Some((key >> 3, Value::Bytes(take_bytes(input)?))),
        _ => None,
    }
}

fn decode_ack(mut input: &[u8]) -> Option<Ack<'_>> {
    let mut ack = Ack::default();
    while !input.is_empty() {
        match take_field(&mut input)? {
            (1, Value::Bytes(bytes)) => ack.client_message_id = bytes,
            (2, Value::Bytes(bytes)) => ack.conversation_id = bytes,
            (3, Value::Number(number)) => ack.seq = number,
            (5, Value::Bytes(bytes)) => ack.status = Some(prost::Message::decode(bytes).ok()?),
            _ => {}
        }
    }
    Some(ack)
}

fn decode_message(mut input: &[u8]) -> Option<Message<'_>> {
    let mut message = Message::default();
    while !input.is_empty() {
        match take_field(&mut input)? {
            (1, Value::Bytes(bytes)) => message.conversation_id = bytes,
            (2, Value::Number(number)) => message.seq = number,
            (3, Value::Bytes(bytes)) => message.sender = std::str::from_utf8(bytes).ok()?,
            (5, Value::Bytes(bytes)) => message.client_message_id = bytes,
            (6, Value::Bytes(bytes)) => message.body = bytes,
            (7, Value::Number(number)) => message.kind = number,
            _ => {}
        }
    }
    Some(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn payload(frame: v1::server_frame::Frame) -> Vec<u8> {
        frame::frame_to_bytes(&v1::ServerFrame::from(frame))[frame::PREFIX_BYTES..].to_vec()
    }

    proptest! {
        #[test]
        fn sends_are_what_the_full_codec_writes(
            id in any::<[u8; 16]>(), peer in "[a-z]{1,40}", by_id in any::<bool>(),
            client_message_id in proptest::collection::vec(any::<u8>(), 1..64),
            body in proptest::collection::vec(any::<u8>(), 1..400),
            after in proptest::collection::vec(any::<u8>(), 0..64), known_seq in any::<u64>(),
        ) {
            let target = if by_id { Target::conversation(ConversationId::from_bytes(id)) } else { Target::peer(&peer) };
            let mut light = Vec::new();
            let send = Send { target: &target, client_message_id: &client_message_id, body: &body, after: &after, known_seq };
            put_send(&mut light, send);
            let mut full = Vec::new();
            let target = if by_id {
                v1::send::Target::ConversationId(id.to_vec().into())
            } else {
                v1::send::Target::PeerUserId(peer)
            };
            put_frame(&mut full, v1::client_frame::Frame::Send(v1::Send {
                target: Some(target),
                client_message_id: client_message_id.into(),
                body: body.into(),
                after: after.into(),
                known_seq,
            }));
            prop_assert_eq!(light, full);
        }

        #[test]
        fn messages_and_acks_are_read_as_the_full_codec_reads_them(
            id in any::<[u8; 16]>(), seq in any::<u64>(), sender in "\\PC{0,20}", sent_at_ms in any::<i64>(),
            client_message_id in proptest::collection::vec(any::<u8>(), 0..64),
            body in proptest::collection::vec(any::<u8>(), 0..400), kind in 0..6i32, flags in any::<u32>(),
            status in proptest::option::of(1..30u32),
        ) {
            let message = v1::Message {
                conversation_id: id.to_vec().into(), seq, sender, sent_at_ms,
                client_message_id: client_message_id.clone().into(), body: body.into(), kind, flags,
            };
            let bytes = payload(v1::server_frame::Frame::Message(message.clone()));
            match decode(&bytes).unwrap() {
                Incoming::Message(light) => prop_assert_eq!(light, Message::from(&message)),
                other => prop_assert!(false, "{:?}", other),
            }
            let status = status.map(|code| v1::Status { code, ..v1::Status::default() });
            let bytes = payload(v1::server_frame::Frame::SendAck(v1::SendAck {
                client_message_id: client_message_id.clone().into(), conversation_id: id.to_vec().into(), seq, sent_at_ms,
                status: status.clone(),
            }));
            let expected = Ack { client_message_id: &client_message_id, conversation_id: &id, seq, status };
            match decode(&bytes).unwrap() {
                Incoming::Ack(light) => prop_assert_eq!(light, expected),
                other => prop_assert!(false, "{:?}", other),
            }
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), hot in 0..3usize) {
            let mut bytes = bytes;
            bytes.splice(0..0, [&[0x22][..], &[0x2a][..], &[][..]][hot].iter().copied());
            let _ = decode(&bytes);
        }
    }
}
