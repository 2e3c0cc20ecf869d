//! What a conversation can be asked, and the slot of one that is not open yet.

use std::{collections::VecDeque, sync::Arc};

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

/// The conversations that want to be opened, by haste. One that became more urgent may be in it twice.
#[derive(Default)]
pub struct OpenQueue {
    sends: VecDeque<ConversationId>,
    calls: VecDeque<ConversationId>,
    others: VecDeque<ConversationId>,
    pub running: usize,
}

impl OpenQueue {
    /// Queues a conversation.
    pub fn push(&mut self, id: ConversationId, haste: Haste) {
        let queue = match haste {
            Haste::Send => &mut self.sends,
            Haste::Call => &mut self.calls,
            Haste::None => &mut self.others,
        };
        queue.push_back(id);
    }

    /// The next one.
    pub fn pop(&mut self) -> Option<ConversationId> {
        self.sends.pop_front().or_else(|| self.calls.pop_front()).or_else(|| self.others.pop_front())
    }

    /// How many wait that nobody waits for.
    pub fn unhurried(&self) -> usize {
        self.others.len()
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.sends.len() + self.calls.len() + self.others.len()
    }
}
