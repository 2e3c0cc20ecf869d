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

    /// Lets a request wait; `true` if it is the first one for which somebody waits and the open has not begun.
    pub fn wait(&mut self, request: Request) -> bool {
        match self {
            Slot::Open(_) => false,
            Slot::Opening { attempt, waiting } => {
                let first = *attempt == 0 && !request.is_ephemeral() && waiting.iter().all(Request::is_ephemeral);
                waiting.push_back(request);
                first
            }
            Slot::Raising { waiting } => {
                waiting.push_back(request);
                false
            }
        }
    }
}

/// A conversation that wants to be opened, in two classes: first those that somebody waits for.
#[derive(Default)]
pub struct OpenQueue {
    pub wanted: VecDeque<ConversationId>,
    pub others: VecDeque<ConversationId>,
    pub running: usize,
}
