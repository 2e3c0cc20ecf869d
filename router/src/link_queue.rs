//! What the links to gateways and to other routers have in common: a queue that gives batches of bounded size, and when to
//! acknowledge what has arrived.

use std::{collections::VecDeque, time::Duration};

use im_proto::{
    link::Incoming,
    v1::{self, peer_message::Message as ToPeer, router_message::Message as ToGateway},
};

/// Messages of one batch on a link.
const BATCH_MESSAGES_MAX: usize = 4096;
/// A batch is closed once it holds as many bytes.
const BATCH_BYTES_MAX: usize = 1024 * 1024;
/// Messages received after which the other side is told so at once, so that its replay buffer stays small.
const ACKNOWLEDGE_MESSAGES: u64 = 1024;
/// Bytes received after which it is told.
const ACKNOWLEDGE_BYTES: usize = 1024 * 1024;
/// The other side is told at least this often, if there is something to tell.
pub const ACKNOWLEDGE_EVERY: Duration = Duration::from_millis(500);

/// A message that waits for a link.
pub trait Weighed {
    /// Bytes it holds, roughly: only what can be large is counted.
    fn bytes(&self) -> usize;
}

impl Weighed for v1::RouterMessage {
    fn bytes(&self) -> usize {
        match &self.message {
            Some(ToGateway::Deliver(deliver)) => 64 + deliver.frame.len() + 8 * deliver.session_ids.len(),
            Some(ToGateway::AudienceDeliver(deliver)) => 96 + deliver.frame.len(),
            Some(ToGateway::AudienceSet(set)) => 96 + 8 * (set.joined.len() + set.left.len()),
            Some(ToGateway::Move(sessions)) => 96 + 8 * sessions.session_ids.len(),
            Some(ToGateway::CallReply(reply)) => 64 + reply.reply.len(),
            Some(ToGateway::Resync(resync)) => 64 + 8 * resync.session_ids.len(),
            _ => 96,
        }
    }
}

impl Weighed for v1::PeerMessage {
    fn bytes(&self) -> usize {
        match &self.message {
            Some(ToPeer::Deliver(deliver)) => 64 + deliver.frame.len() + 32 * deliver.user_ids.len(),
            Some(ToPeer::AudienceDeliver(deliver)) => 128 + deliver.frame.len(),
            Some(ToPeer::Follow(follow)) => 64 + 32 * follow.user_ids.len(),
            Some(ToPeer::Effect(effect)) => 128 + effect.body.len(),
            Some(ToPeer::Heads(heads)) => 64 + 16 * heads.conversation_ids.len(),
            Some(ToPeer::Call(call)) => 256 + call.request.len(),
            Some(ToPeer::Answer(answer)) => match &answer.answer {
                Some(v1::peer_answer::Answer::Reply(reply)) => 64 + reply.len(),
                Some(v1::peer_answer::Answer::Heads(list)) => 64 + 48 * list.heads.len(),
                _ => 64,
            },
            _ => 64,
        }
    }
}

/// A queue with room for so many times what it had is made smaller,
const SPARSE: usize = 16;
/// but not smaller than this: bursts and pauses take turns all the time.
const ROOM_KEPT: usize = 512;

/// Messages that wait for a link, in order. Who fills it keeps its bound.
#[derive(Debug)]
pub struct LinkQueue<M> {
    messages: VecDeque<M>,
    bytes: usize,
}

impl<M> Default for LinkQueue<M> {
    fn default() -> Self {
        Self { messages: VecDeque::new(), bytes: 0 }
    }
}

impl<M: Weighed> LinkQueue<M> {
    pub fn push(&mut self, message: M) {
        self.bytes += message.bytes();
        self.messages.push_back(message);
    }

    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Bytes of all that waits.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The messages of the next batch.
    pub fn take_batch(&mut self) -> Vec<M> {
        let (mut batch, mut bytes) = (Vec::with_capacity(self.messages.len().min(BATCH_MESSAGES_MAX)), 0);
        while batch.len() < BATCH_MESSAGES_MAX && bytes < BATCH_BYTES_MAX {
            let Some(message) = self.messages.pop_front() else { break };
            bytes += message.bytes();
            batch.push(message);
        }
        self.bytes -= bytes.min(self.bytes);
        let room = self.messages.capacity();
        if self.messages.is_empty() && !batch.is_empty() && room > ROOM_KEPT && batch.len() < room / SPARSE {
            // What a storm took is given back when it is over.
            self.messages.shrink_to(ROOM_KEPT);
        }
        batch
    }
}

/// How much of what arrived the other side knows to have arrived.
#[derive(Debug, Default)]
pub struct Acknowledged {
    through: u64,
    bytes: usize,
    due: bool,
}

impl Acknowledged {
    /// A batch has arrived.
    pub fn arrived(&mut self, incoming: &Incoming, bytes: usize) {
        self.bytes += bytes;
        self.due |= self.bytes >= ACKNOWLEDGE_BYTES || self.waiting(incoming) >= ACKNOWLEDGE_MESSAGES;
    }

    /// Time has passed; `true` if there is something to tell.
    pub fn tick(&mut self, incoming: &Incoming) -> bool {
        self.due |= self.waiting(incoming) > 0;
        self.due
    }

    /// Whether a batch without messages is worth sending.
    pub fn is_due(&self) -> bool {
        self.due
    }

    /// A batch leaves that tells it.
    pub fn told(&mut self, incoming: &Incoming) -> u64 {
        *self = Self { through: incoming.received_through(), bytes: 0, due: false };
        self.through
    }

    fn waiting(&self, incoming: &Incoming) -> u64 {
        incoming.received_through().saturating_sub(self.through)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_gives_back_what_a_storm_took_and_keeps_the_order() {
        let mut queue = LinkQueue::<v1::RouterMessage>::default();
        let refused = |session_id| v1::SessionRefused { session_id, status: None };
        let message =
            |session_id| v1::RouterMessage { message: Some(v1::router_message::Message::Refused(refused(session_id))) };
        let many = 3 * BATCH_MESSAGES_MAX as u64;
        (0..many).for_each(|number| queue.push(message(number)));
        let taken: Vec<_> =
            std::iter::from_fn(|| Some(queue.take_batch()).filter(|batch| !batch.is_empty())).flatten().collect();
        assert_eq!(taken, (0..many).map(message).collect::<Vec<_>>());
        assert!(queue.messages.capacity() >= BATCH_MESSAGES_MAX, "nothing is given back for an empty look");
        queue.push(message(0));
        assert_eq!(queue.take_batch(), [message(0)]);
        let room = queue.messages.capacity();
        assert!((ROOM_KEPT..2 * ROOM_KEPT).contains(&room), "room for {room}");
        assert_eq!((queue.len(), queue.bytes()), (0, 0));
    }
}
