//! Numbering and replay of a link, one direction at a time, without I/O.
//!
//! The sender numbers its messages per boot id and keeps batches until the other side acknowledged them. After a reconnect the two
//! sides exchange [`LinkHello`](crate::v1::LinkHello): the sender replays what was not received. Only when the buffer had to drop
//! something, or the other side restarted, is anything lost; then the sessions concerned must be told to `Resync`.

pub mod channel;

use std::collections::VecDeque;

use crate::v1;

/// A batch that can be kept and replayed.
pub trait Batch {
    /// Messages in it.
    fn messages(&self) -> usize;
    /// Bytes it holds, for the bound of the buffer.
    fn bytes(&self) -> usize;
}

/// The sending half: gives numbers, keeps what is not acknowledged.
#[derive(Debug)]
pub struct Outgoing<B> {
    next_number: u64,
    kept: VecDeque<(u64, B)>,
    kept_bytes: usize,
    limit_bytes: usize,
    dropped: bool,
}

impl<B: Batch + Clone> Outgoing<B> {
    /// Keeps at most `limit_bytes` of unacknowledged batches; beyond that the oldest are dropped and [`Self::replay`] reports it.
    pub fn new(limit_bytes: usize) -> Self {
        Self { next_number: 1, kept: VecDeque::new(), kept_bytes: 0, limit_bytes, dropped: false }
    }

    /// Numbers a batch and keeps a copy; returns the number of its first message.
    pub fn push(&mut self, batch: B) -> u64 {
        let first = self.next_number;
        self.next_number += batch.messages() as u64;
        self.kept_bytes += batch.bytes();
        self.kept.push_back((first, batch));
        while self.kept_bytes > self.limit_bytes && self.kept.len() > 1 {
            if let Some((_, batch)) = self.kept.pop_front() {
                self.kept_bytes -= batch.bytes();
                self.dropped = true;
            }
        }
        first
    }

    /// Forgets what the other side has received.
    pub fn acknowledge(&mut self, through: u64) {
        while let Some((first, batch)) = self.kept.front() {
            if first + batch.messages() as u64 - 1 > through {
                break;
            }
            self.kept_bytes -= batch.bytes();
            self.kept.pop_front();
        }
    }

    /// What to send again after a reconnect, or `None` if something that was not received is no longer kept: then everything
    /// kept is forgotten too and the caller starts afresh (resync on the other side).
    pub fn replay(&mut self, received_through: u64) -> Option<Vec<(u64, B)>> {
        self.acknowledge(received_through);
        let first_kept = self.kept.front().map_or(self.next_number, |(first, _)| *first);
        self.dropped = false;
        if first_kept > received_through + 1 {
            self.kept.clear();
            self.kept_bytes = 0;
            return None;
        }
        Some(self.kept.iter().cloned().collect())
    }

    /// The number that the next message gets.
    pub fn next_number(&self) -> u64 {
        self.next_number
    }
}

/// What to do with an arrived batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Skip this many messages at the front, they were received before; handle the rest.
    Handle { skip: usize },
    /// Numbers are missing: the link must be reset and what was lost resynced.
    Gap,
}

/// The receiving half: knows what arrived.
#[derive(Debug, Default)]
pub struct Incoming {
    received_through: u64,
}

impl Incoming {
    /// Judges a batch of `count` messages that begins with number `first`.
    pub fn arrive(&mut self, first: u64, count: usize) -> Arrival {
        if first > self.received_through + 1 || first == 0 {
            return Arrival::Gap;
        }
        let skip = usize::try_from(self.received_through + 1 - first).unwrap_or(usize::MAX).min(count);
        self.received_through = self.received_through.max(first + count as u64 - 1);
        Arrival::Handle { skip }
    }

    /// Everything up to this number arrived.
    pub fn received_through(&self) -> u64 {
        self.received_through
    }

    /// Starts afresh at a number that the other side names after it lost something.
    pub fn reset(&mut self, received_through: u64) {
        self.received_through = received_through;
    }
}

/// What a message costs in a replay buffer beside its bytes.
const MESSAGE_OVERHEAD_BYTES: usize = 96;

macro_rules! batches {
    ($($batch:ident, |$message:ident| $bytes:expr;)*) => {
        $(
            impl Batch for std::sync::Arc<v1::$batch> {
                fn messages(&self) -> usize {
                    self.messages.len()
                }

                fn bytes(&self) -> usize {
                    self.messages.iter().map(|$message| MESSAGE_OVERHEAD_BYTES + $bytes).sum()
                }
            }
        )*
    };
}

// Only what can be large is counted: exact lengths would cost an encoding pass a batch.
batches! {
    GatewayBatch, |message| match &message.message {
        Some(v1::gateway_message::Message::Send(send)) => send.send.as_ref().map_or(0, |send| send.body.len()),
        Some(v1::gateway_message::Message::Call(call)) => call.call.as_ref().map_or(0, |call| call.request.len()),
        _ => 0,
    };
    RouterBatch, |message| match &message.message {
        Some(v1::router_message::Message::Deliver(deliver)) => deliver.frame.len() + 8 * deliver.session_ids.len(),
        Some(v1::router_message::Message::CallReply(reply)) => reply.reply.len(),
        _ => 0,
    };
    PeerBatch, |message| match &message.message {
        Some(v1::peer_message::Message::Deliver(deliver)) => deliver.frame.len() + 32 * deliver.user_ids.len(),
        Some(v1::peer_message::Message::Call(call)) => call.request.len(),
        Some(v1::peer_message::Message::Effect(effect)) => effect.body.len(),
        _ => 0,
    };
}
