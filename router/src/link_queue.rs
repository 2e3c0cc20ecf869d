//! What the links to gateways and to other routers have in common: a queue that gives batches of bounded size, and when to
//! acknowledge what has arrived.

use std::{collections::VecDeque, time::Duration};

use im_proto::link::{Incoming, Weighed};

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
        self.bytes += message.weight();
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
            bytes += message.weight();
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
    use im_proto::v1;

    use super::*;

    /// An answer to a list may have much for each conversation.
    #[test]
    fn a_batch_of_answers_is_no_longer_than_a_link_takes() {
        let head = v1::Head { name: "n".repeat(4096), ..v1::Head::default() };
        let heads = v1::HeadList { heads: vec![head; 16] };
        let answer =
            v1::PeerAnswer { answer: Some(v1::peer_answer::Answer::Heads(heads)), ..v1::PeerAnswer::default() };
        let message = v1::peer_message::Message::Answer(answer);
        let mut queue = LinkQueue::default();
        (0..1000).for_each(|_| queue.push(v1::PeerMessage { message: Some(message.clone()), ..Default::default() }));
        while queue.len() > 0 {
            let bytes: usize = queue.take_batch().iter().map(prost::Message::encoded_len).sum();
            assert!(bytes <= 2 * BATCH_BYTES_MAX, "{bytes}");
        }
    }

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
