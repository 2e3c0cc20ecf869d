//! What a conversation can be asked, and the slot of one that is not open yet.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use im_proto::{ConversationId, UserId, v1};
use tokio::sync::oneshot;

use crate::{
    caller::Caller,
    conversation::Conversation,
    message::{Call, Effect, ReplyTo},
    worker::heads::{Asker, Draft},
};

/// Something to do in a conversation. While it is being opened, requests wait in the order in which they came.
#[derive(Debug)]
pub enum Request {
    Send { caller: Arc<Caller>, send: SendRequest, answer: SendAnswer },
    Signal { caller: Arc<Caller>, signal: v1::Signal },
    Received { caller: Arc<Caller>, seq: u64 },
    Effect { effect: Effect, reply_to: ReplyTo },
    Call { call: Call, reply_to: ReplyTo },
    Head { asker: Asker, answer: oneshot::Sender<Draft> },
}

impl Request {
    /// Nobody waits for an answer, and what gets lost comes again or is worth nothing later.
    pub fn is_ephemeral(&self) -> bool {
        matches!(self, Request::Signal { .. } | Request::Received { .. })
    }

    /// Who waits for the conversation to be opened.
    pub fn haste(&self) -> Haste {
        match self {
            Request::Send { .. } => Haste::Send,
            Request::Call { .. } | Request::Head { .. } => Haste::Call,
            // The outbox of another log can wait: whoever made the entry has its answer.
            Request::Effect { .. } | Request::Signal { .. } | Request::Received { .. } => Haste::None,
        }
    }
}

/// How soon a conversation is wanted open: after a failover, when many are, messages that wait go before lists and histories, and these
/// before what nobody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Haste {
    None,
    Call,
    Send,
}

/// A message to be numbered.
#[derive(Debug)]
pub struct SendRequest {
    /// The direct conversation's other user, if the client named it so.
    pub peer: Option<UserId>,
    pub client_message_id: Bytes,
    pub body: Bytes,
    pub after: Bytes,
    pub known_seq: u64,
    /// The sender is no member, and was one before.
    pub was_member: bool,
}

/// Who gets the outcome of a send.
#[derive(Debug)]
pub enum SendAnswer {
    /// `attempt` is its gateway's number of this try.
    Session {
        attempt: u64,
    },
    Reply(ReplyTo),
}

/// A conversation in a worker.
pub enum Slot {
    /// Its log is being read. `attempt` tells the outcome of this open from that of an earlier one.
    Opening {
        attempt: u64,
        waiting: VecDeque<Request>,
    },
    Open(Box<Conversation>),
    /// Its last batch was given up; it waits for a greater epoch, then it is opened again.
    Raising {
        waiting: VecDeque<Request>,
    },
}

impl Slot {
    /// What waits for it, unless it is open.
    pub fn waiting(&self) -> Option<&VecDeque<Request>> {
        match self {
            Slot::Open(_) => None,
            Slot::Opening { waiting, .. } | Slot::Raising { waiting } => Some(waiting),
        }
    }

    /// Lets a request wait; its haste, if the open has not begun and it is the first or has more than the others. The first may find a
    /// conversation that is in no queue, because its last open failed.
    pub fn wait(&mut self, request: Request) -> Option<Haste> {
        match self {
            Slot::Open(_) => None,
            Slot::Opening { attempt, waiting } => {
                let haste = request.haste();
                let first = waiting.is_empty() && !request.is_ephemeral();
                let hastier = haste > Haste::None && waiting.iter().all(|other| other.haste() < haste);
                let sooner = *attempt == 0 && (first || hastier);
                waiting.push_back(request);
                sooner.then_some(haste)
            }
            Slot::Raising { waiting } => {
                waiting.push_back(request);
                None
            }
        }
    }
}

/// The greatest haste of requests.
pub fn hastiest(waiting: &VecDeque<Request>) -> Haste {
    waiting.iter().map(Request::haste).max().unwrap_or(Haste::None)
}

/// So many opens of more haste go before one of less that waits: enough that a message hardly waits for it, few enough that an effect
/// comes through however long others keep coming.
const GO_BEFORE: u32 = 16;

/// The conversations that want to be opened, by haste. One that became more urgent may be in it twice.
#[derive(Default)]
pub struct OpenQueue {
    /// The one of the least haste first.
    queues: [Turns; 3],
    /// The attempts that take a place.
    running: BTreeSet<u64>,
    /// The attempts that gave their place up, since the store does not answer.
    stuck: BTreeSet<u64>,
}

/// Opens without a place, for each that takes one.
const STUCK_FOR_ONE: usize = 4;

/// Those of one haste.
#[derive(Default)]
struct Turns {
    waiting: VecDeque<ConversationId>,
    /// Opens of more haste that went before the first of them.
    passed: u32,
}

impl OpenQueue {
    /// An attempt takes a place.
    pub fn started(&mut self, attempt: u64) {
        self.running.insert(attempt);
    }

    /// An attempt has ended.
    pub fn ended(&mut self, attempt: u64) {
        self.running.remove(&attempt);
        self.stuck.remove(&attempt);
    }

    /// An attempt gets no answer from the store: others have its place while it goes on, `places` being all there are. So a part of
    /// the log that cannot be read does not keep everything else closed, and a store that is away altogether is not asked by many.
    pub fn gets_no_answer(&mut self, attempt: u64, places: usize) {
        if self.stuck.len() < STUCK_FOR_ONE * places && self.running.remove(&attempt) {
            self.stuck.insert(attempt);
        }
    }

    /// Attempts that take a place.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Attempts without one.
    pub fn stuck(&self) -> usize {
        self.stuck.len()
    }

    /// Queues a conversation.
    pub fn push(&mut self, id: ConversationId, haste: Haste) {
        let queue = match haste {
            Haste::None => 0,
            Haste::Call => 1,
            Haste::Send => 2,
        };
        self.queues[queue].waiting.push_back(id);
    }

    /// The next one that still `waits` to be opened.
    pub fn pop(&mut self, waits: impl Fn(&ConversationId) -> bool) -> Option<ConversationId> {
        for queue in &mut self.queues {
            while queue.waiting.front().is_some_and(|id| !waits(id)) {
                queue.waiting.pop_front();
            }
            if queue.waiting.is_empty() {
                queue.passed = 0;
            }
        }
        let is_due = |queue: &Turns| queue.passed >= GO_BEFORE && !queue.waiting.is_empty();
        let hastiest = || self.queues.iter().rposition(|queue| !queue.waiting.is_empty());
        let next = self.queues.iter().position(is_due).or_else(hastiest)?;
        let (less, rest) = self.queues.split_at_mut(next);
        for queue in less.iter_mut().filter(|queue| !queue.waiting.is_empty()) {
            queue.passed += 1;
        }
        let queue = rest.first_mut()?;
        queue.passed = 0;
        queue.waiting.pop_front()
    }

    /// How many wait that nobody waits for.
    pub fn unhurried(&self) -> usize {
        self.queues[0].waiting.len()
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.queues.iter().map(|queue| queue.waiting.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8, haste: u8) -> ConversationId {
        let mut bytes = [0; 16];
        (bytes[0], bytes[1]) = (number, haste);
        ConversationId::from_bytes(bytes)
    }

    /// Under a load that never ends those of less haste come through, at a bounded distance, and take no more than their share.
    #[test]
    fn whoever_nobody_waits_for_is_opened_however_many_others_come() {
        let mut queue = OpenQueue::default();
        for number in 0..200 {
            queue.push(id(number, 0), Haste::None);
            queue.push(id(number, 1), Haste::Call);
        }
        let mut taken = [0_u32; 3];
        for turn in 0..1_000_u32 {
            queue.push(id(turn.to_le_bytes()[0], 2), Haste::Send);
            let next = queue.pop(|_| true).expect("one");
            taken[usize::from(next.as_bytes()[1])] += 1;
            for of_less in &taken[..2] {
                let (least, most) = ((turn + 1) / (GO_BEFORE + 3), (turn + 1) / GO_BEFORE);
                assert!((least..=most).contains(of_less), "turn {turn}: {taken:?}");
            }
        }
        assert!(taken[..2].iter().all(|taken| *taken >= 50), "{taken:?}");
        assert!(taken[2] >= 1_000 * (GO_BEFORE - 1) / (GO_BEFORE + 1), "{taken:?}");
    }

    /// Its last open failed and nobody waited: it is in no queue.
    #[test]
    fn the_first_that_waits_for_a_closed_conversation_opens_it_also_if_it_is_an_effect() {
        let effect = |origin_seq| {
            let target_user = UserId::parse("bob").expect("an id");
            let effect = Effect { target: id(1, 0), target_user, origin: id(2, 0), origin_seq, body: Bytes::new() };
            Request::Effect { effect, reply_to: ReplyTo::Nobody }
        };
        let mut slot = Slot::Opening { attempt: 0, waiting: VecDeque::new() };
        assert_eq!(slot.wait(effect(1)), Some(Haste::None));
        assert_eq!(slot.wait(effect(2)), None, "it is queued");
        let mut slot = Slot::Opening { attempt: 7, waiting: VecDeque::new() };
        assert_eq!(slot.wait(effect(1)), None, "it is being opened");
    }

    #[test]
    fn the_hastiest_come_first_and_what_does_not_wait_any_more_takes_no_turn() {
        let mut queue = OpenQueue::default();
        for (number, haste) in
            [(1, Haste::None), (2, Haste::Call), (3, Haste::Send), (4, Haste::Send), (5, Haste::None)]
        {
            queue.push(id(number, 0), haste);
        }
        let waits = |id: &ConversationId| ![1, 3].contains(&id.as_bytes()[0]);
        let order: Vec<u8> = std::iter::from_fn(|| queue.pop(waits)).map(|id| id.as_bytes()[0]).collect();
        assert_eq!(order, [4, 2, 5]);
        assert_eq!(queue.waiting(), 0);
    }
}
