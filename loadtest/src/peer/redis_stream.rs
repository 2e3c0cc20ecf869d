//! RESP 2: a stream for each flow; XADD is the send, its reply the ack, XREAD BLOCK the delivery.

use std::io::Write as _;

use super::{id_of, line, number, put_body};
use crate::{
    bench::{Part, Seen, Wire},
    crowd::MessageId,
};

/// Entries of one XREAD.
const READ_MAX: usize = 1000;

pub(super) struct RedisStream {
    body_bytes: usize,
}

impl RedisStream {
    pub(super) fn new(body_bytes: usize) -> Self {
        Self { body_bytes }
    }
}

fn put_command(out: &mut Vec<u8>, words: &[&[u8]]) {
    let _ = write!(out, "*{}\r\n", words.len());
    for word in words {
        put_bulk(out, word);
    }
}

fn put_bulk(out: &mut Vec<u8>, word: &[u8]) {
    let _ = write!(out, "${}\r\n", word.len());
    out.extend_from_slice(word);
    out.extend_from_slice(b"\r\n");
}

fn put_read(out: &mut Vec<u8>, flow: u32, after: &[u8]) {
    let (count, key) = (READ_MAX.to_string(), flow.to_string());
    let words: [&[u8]; 8] = [b"XREAD", b"COUNT", count.as_bytes(), b"BLOCK", b"0", b"STREAMS", key.as_bytes(), after];
    put_command(out, &words);
}

impl Wire for RedisStream {
    fn greet(&mut self, _: usize, part: Part, out: &mut Vec<u8>) {
        put_command(out, &[b"PING"]);
        if let Part::Receiver(flow) = part {
            put_read(out, flow, b"0-0");
        }
    }

    fn send(&mut self, part: Part, id: MessageId, out: &mut Vec<u8>) {
        let flow = if let Part::Sender(flow) = part { flow } else { 0 };
        let key = flow.to_string();
        let _ = write!(out, "*5\r\n$4\r\nXADD\r\n${}\r\n{key}\r\n$1\r\n*\r\n$1\r\nm\r\n", key.len());
        let _ = write!(out, "${}\r\n", super::body_bytes(self.body_bytes));
        put_body(out, id, self.body_bytes);
        out.extend_from_slice(b"\r\n");
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
        while let Some(&kind) = bytes.get(used) {
            match kind {
                b'+' => {
                    let Some((_, next)) = line(bytes, used) else { break };
                    seen.push(Seen::Ready);
                    used = next;
                }
                b'$' => {
                    let Some((_, next)) = bulk(bytes, used) else { break };
                    seen.push(Seen::AckOfOldest);
                    used = next;
                }
                b'*' => {
                    let before = seen.len();
                    let Some((last, next)) = entries(bytes, used, seen) else {
                        seen.truncate(before);
                        break;
                    };
                    if let Part::Receiver(flow) = part {
                        put_read(out, flow, last);
                    }
                    used = next;
                }
                // An error, or what nobody asked for.
                other => return Err(usize::from(other)),
            }
        }
        Ok(used)
    }
}

fn bulk(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let (head, start) = line(bytes, at)?;
    let end = start + number(head.strip_prefix(b"$")?)?;
    Some((bytes.get(start..end)?, end + 2)).filter(|_| bytes.len() >= end + 2)
}

fn array(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let (head, next) = line(bytes, at)?;
    Some((number(head.strip_prefix(b"*")?)?, next))
}

/// The messages of one XREAD reply: one stream, each entry an id and one field. The last id, and where the reply ends; nothing: it
/// is not whole yet.
fn entries<'a>(bytes: &'a [u8], at: usize, seen: &mut Vec<Seen>) -> Option<(&'a [u8], usize)> {
    let (_, at) = array(bytes, at)?;
    let (_, at) = array(bytes, at)?;
    let (_, at) = bulk(bytes, at)?;
    let (count, mut at) = array(bytes, at)?;
    let mut last: &[u8] = b"0-0";
    for _ in 0..count {
        let (_, next) = array(bytes, at)?;
        let (id, next) = bulk(bytes, next)?;
        let (_, next) = array(bytes, next)?;
        let (_, next) = bulk(bytes, next)?;
        let (body, next) = bulk(bytes, next)?;
        seen.extend(id_of(body).map(Seen::Message));
        (last, at) = (id, next);
    }
    Some((last, at))
}
