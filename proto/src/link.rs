//! Numbering and replay of a link, one direction at a time, without I/O.
//!
//! The sender numbers its messages per boot id and keeps batches until the other side acknowledged them. After a reconnect the two
//! sides exchange [`LinkHello`](crate::v1::LinkHello): the sender replays what was not received. Only when the buffer had to drop
//! something, or the other side restarted, is anything lost; then the sessions concerned must be told to `Resync`.
//!
//! Numbering never starts again while a process lives: after a loss the sender goes on with its next number, and the receiver
//! takes the first batch after the two hellos at whatever higher number it has. A fresh [`Outgoing`] for a receiver that knows
//! this boot would be taken for a repetition, and its messages skipped.
//!
//! Not here: who must be resynced after a loss. The sender knows what its messages were about.

pub mod channel;
pub mod wire;

use std::collections::VecDeque;

use prost::Message as _;

use crate::{id::BootId, limits, v1};

/// A batch that can be kept and replayed.
pub trait Batch {
    /// Messages in it.
    fn messages(&self) -> usize;
    /// Bytes it holds, for the bound of the buffer.
    fn bytes(&self) -> usize;
}

/// The last number of ours that the other side has, by its hello: what it says of an earlier boot says nothing of this one.
pub fn received_of_boot(hello: &v1::LinkHello, own: BootId) -> u64 {
    if hello.peer_boot_id == own.0 { hello.received_through } else { 0 }
}

/// The sending half: gives numbers, keeps what is not acknowledged.
#[derive(Debug)]
pub struct Outgoing<B> {
    next_number: u64,
    kept: VecDeque<Kept<B>>,
    kept_bytes: usize,
    limit_bytes: usize,
    acknowledged_through: u64,
}

#[derive(Debug)]
struct Kept<B> {
    first: u64,
    last: u64,
    bytes: usize,
    batch: B,
}

impl<B: Batch + Clone> Outgoing<B> {
    /// Keeps at most `limit_bytes` of unacknowledged batches, and always the newest; beyond that the oldest are dropped and
    /// [`Self::replay`] reports it.
    pub fn new(limit_bytes: usize) -> Self {
        Self { next_number: 1, kept: VecDeque::new(), kept_bytes: 0, limit_bytes, acknowledged_through: 0 }
    }

    /// Numbers a batch and keeps a copy; returns the number of its first message. A batch without messages (an acknowledgement
    /// alone) takes no number and is not kept.
    pub fn push(&mut self, batch: B) -> u64 {
        let first = self.next_number;
        let count = u64::try_from(batch.messages()).unwrap_or(u64::MAX);
        if count == 0 {
            return first;
        }
        self.next_number = first.saturating_add(count);
        let bytes = batch.bytes();
        self.kept_bytes += bytes;
        self.kept.push_back(Kept { first, last: self.next_number - 1, bytes, batch });
        while self.kept_bytes > self.limit_bytes && self.kept.len() > 1 {
            self.forget_oldest();
        }
        first
    }

    /// Forgets what the other side has received.
    pub fn acknowledge(&mut self, through: u64) {
        // More than was sent is not known to be received.
        self.acknowledged_through = self.acknowledged_through.max(through.min(self.next_number - 1));
        while self.kept.front().is_some_and(|oldest| oldest.last <= through) {
            self.forget_oldest();
        }
    }

    /// What to send again after a reconnect, or `None` if something that was not received is no longer kept: then everything
    /// kept is forgotten too and the caller starts afresh with its next number (resync on the other side).
    ///
    /// The first batch may begin with messages that were received; the receiver skips them. A receiver that claims numbers which
    /// were never sent does not speak of this boot: that is a loss too, and numbering goes on above its claim.
    pub fn replay(&mut self, received_through: u64) -> Option<Vec<(u64, B)>> {
        self.acknowledge(received_through);
        let first_kept = self.kept.front().map_or(self.next_number, |oldest| oldest.first);
        let wanted = received_through.saturating_add(1);
        if first_kept > wanted || wanted > self.next_number {
            self.next_number = self.next_number.max(wanted);
            self.kept.clear();
            self.kept_bytes = 0;
            // Of what was lost nothing more will be heard.
            self.acknowledged_through = self.next_number - 1;
            return None;
        }
        Some(self.kept.iter().map(|kept| (kept.first, kept.batch.clone())).collect())
    }

    /// The number that the next message gets.
    pub fn next_number(&self) -> u64 {
        self.next_number
    }

    /// The last number that the other side is known to have received. What was dropped for the bound counts as not received, until
    /// [`Self::replay`] has reported it as lost.
    pub fn acknowledged_through(&self) -> u64 {
        self.acknowledged_through
    }

    /// Bytes of what is kept for a replay.
    pub fn kept_bytes(&self) -> usize {
        self.kept_bytes
    }

    fn forget_oldest(&mut self) {
        if let Some(oldest) = self.kept.pop_front() {
            self.kept_bytes -= oldest.bytes;
        }
    }
}

/// What to do with an arrived batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Skip this many messages at the front, they were received before; handle the rest.
    Handle { skip: usize },
    /// Numbers are missing in the middle of a connection: the link must be reset. The next connection brings a replay.
    Gap,
}

/// The receiving half: knows what arrived.
#[derive(Debug)]
pub struct Incoming {
    received_through: u64,
    /// The next batch is the first of a connection. Its sender replays from `received_through + 1` on if it can, so a higher
    /// number means that what lies between is lost and the sender has taken care of that.
    first_of_connection: bool,
}

impl Default for Incoming {
    /// Nothing received from this boot.
    fn default() -> Self {
        Self { received_through: 0, first_of_connection: true }
    }
}

impl Incoming {
    /// A new connection of the same boot begins: the hellos were exchanged, the next batch is the first one.
    pub fn reconnected(&mut self) {
        self.first_of_connection = true;
    }

    /// Judges a batch of `count` messages that begins with number `first`. One without messages is always in order.
    pub fn arrive(&mut self, first: u64, count: usize) -> Arrival {
        let Ok(count_wide) = u64::try_from(count) else { return Arrival::Gap };
        if count_wide == 0 {
            return Arrival::Handle { skip: 0 };
        }
        let Some(last) = first.checked_add(count_wide - 1).filter(|_| first > 0) else { return Arrival::Gap };
        // A gap resets the link, so what arrives after it is the first of a connection again.
        let first_of_connection = std::mem::replace(&mut self.first_of_connection, false);
        if first - 1 > self.received_through {
            if !first_of_connection {
                self.first_of_connection = true;
                return Arrival::Gap;
            }
            self.received_through = last;
            return Arrival::Handle { skip: 0 };
        }
        let known = self.received_through - (first - 1);
        self.received_through = self.received_through.max(last);
        Arrival::Handle { skip: usize::try_from(known).unwrap_or(usize::MAX).min(count) }
    }

    /// Everything up to this number arrived, or is lost and was declared so.
    pub fn received_through(&self) -> u64 {
        self.received_through
    }

    /// Starts afresh at a number that the other side names after it lost something.
    pub fn reset(&mut self, received_through: u64) {
        self.received_through = received_through;
        self.first_of_connection = true;
    }
}

/// What a message costs in a replay buffer beside its bytes.
const MESSAGE_OVERHEAD_BYTES: usize = 96;

/// A message of a link.
pub trait Weighed {
    /// What it weighs in a queue, in a batch and in a replay buffer: hardly less than its bytes on the wire, whatever a client put into
    /// it, for a batch that is longer than the other side takes breaks its link for ever.
    fn weight(&self) -> usize;
}

// The usual ones without a pass over all fields: the rest of them are numbers and short ids.

impl Weighed for v1::GatewayMessage {
    fn weight(&self) -> usize {
        use v1::gateway_message::Message;
        MESSAGE_OVERHEAD_BYTES
            + match &self.message {
                Some(Message::Send(v1::SessionSend { send: Some(send), .. })) => {
                    2 * limits::ID_BYTES_MAX + send.body.len() + send.client_message_id.len() + send.after.len()
                }
                Some(Message::Call(v1::SessionCall { call: Some(call), .. })) => call.request.len(),
                _ => self.encoded_len(),
            }
    }
}

impl Weighed for v1::RouterMessage {
    fn weight(&self) -> usize {
        use v1::router_message::Message;
        MESSAGE_OVERHEAD_BYTES
            + match &self.message {
                Some(Message::SendResult(v1::SendResult { ack: Some(ack), .. })) => {
                    ack.client_message_id.len() + ack.status.as_ref().map_or(0, |status| status.text.len())
                }
                Some(Message::Deliver(deliver)) => deliver.frame.len() + 8 * deliver.session_ids.len(),
                Some(Message::AudienceSet(audience)) => 8 * (audience.joined.len() + audience.left.len()),
                Some(Message::AudienceDeliver(deliver)) => deliver.frame.len(),
                Some(Message::Move(sessions)) => 8 * sessions.session_ids.len(),
                Some(Message::CallReply(reply)) => reply.reply.len(),
                Some(Message::Resync(resync)) => 8 * resync.session_ids.len(),
                _ => self.encoded_len(),
            }
    }
}

impl Weighed for v1::PeerMessage {
    fn weight(&self) -> usize {
        use v1::peer_message::Message;
        MESSAGE_OVERHEAD_BYTES
            + match &self.message {
                Some(Message::Deliver(deliver)) => deliver.frame.len() + 32 * deliver.user_ids.len(),
                Some(Message::AudienceDeliver(deliver)) => deliver.frame.len(),
                Some(Message::Follow(follow)) => 32 * follow.user_ids.len(),
                Some(Message::Unfollow(unfollow)) => 32 * unfollow.user_ids.len(),
                Some(Message::Call(call)) => call.request.len(),
                _ => self.encoded_len(),
            }
    }
}

macro_rules! batches {
    ($($batch:ident)*) => {
        $(
            impl Batch for std::sync::Arc<v1::$batch> {
                fn messages(&self) -> usize {
                    self.messages.len()
                }

                fn bytes(&self) -> usize {
                    self.messages.iter().map(Weighed::weight).sum()
                }
            }
        )*
    };
}

batches! { GatewayBatch RouterBatch PeerBatch }

#[cfg(test)]
mod tests;
