//! NATS: a subject for each flow; PUB in verbose mode, so that each is answered by +OK.

use std::io::Write as _;

use super::{id_of, line, number, put_body};
use crate::{
    bench::{Part, Seen, Wire},
    crowd::MessageId,
};

pub(super) struct Nats {
    body_bytes: usize,
    /// Connections whose greeting is answered: what is acknowledged after that is a message.
    ready: Vec<bool>,
}

impl Nats {
    pub(super) fn new(body_bytes: usize) -> Self {
        Self { body_bytes, ready: Vec::new() }
    }
}

impl Wire for Nats {
    fn greet(&mut self, connection: usize, part: Part, out: &mut Vec<u8>) {
        if self.ready.len() <= connection {
            self.ready.resize(connection + 1, false);
        }
        out.extend_from_slice(b"CONNECT {\"verbose\":true,\"pedantic\":false}\r\n");
        if let Part::Receiver(flow) = part {
            let _ = write!(out, "SUB f{flow} 1\r\n");
        }
        out.extend_from_slice(b"PING\r\n");
    }

    fn send(&mut self, part: Part, id: MessageId, out: &mut Vec<u8>) {
        let flow = if let Part::Sender(flow) = part { flow } else { 0 };
        let _ = write!(out, "PUB f{flow} {}\r\n", super::body_bytes(self.body_bytes));
        put_body(out, id, self.body_bytes);
        out.extend_from_slice(b"\r\n");
    }

    fn take(
        &mut self,
        connection: usize,
        _: Part,
        bytes: &[u8],
        seen: &mut Vec<Seen>,
        out: &mut Vec<u8>,
    ) -> Result<usize, usize> {
        let mut used = 0;
        while let Some((text, next)) = line(bytes, used) {
            used = match text {
                b"+OK" => {
                    if self.ready[connection] {
                        seen.push(Seen::AckOfOldest);
                    }
                    next
                }
                b"PONG" => {
                    if !std::mem::replace(&mut self.ready[connection], true) {
                        seen.push(Seen::Ready);
                    }
                    next
                }
                b"PING" => {
                    out.extend_from_slice(b"PONG\r\n");
                    next
                }
                text if text.starts_with(b"MSG ") => {
                    let length = text.rsplit(|&byte| byte == b' ').next().and_then(number).ok_or(used)?;
                    let Some(body) = bytes.get(next..next + length + 2) else { break };
                    seen.extend(id_of(body).map(Seen::Message));
                    next + length + 2
                }
                text if text.starts_with(b"INFO ") => next,
                _ => return Err(used),
            };
        }
        Ok(used)
    }
}
