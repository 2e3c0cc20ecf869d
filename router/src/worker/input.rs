//! What a worker is told.

use std::sync::Arc;

use im_proto::{ConversationId, InstanceId, ShardId, token::Unverified, v1};
use im_storage::StoreError;

use crate::{
    caller::Caller,
    gateway_link::GatewayLink,
    message::{ReplyTo, ShardMessage},
    worker::Worker,
};

/// A step that runs on the worker after some task has ended.
pub type Step = Box<dyn FnOnce(&mut Worker) + Send>;

/// An input of a worker. The frequent ones have a name, the others are steps.
pub enum Input {
    Gateway(Vec<GatewayInput>),
    Shard {
        shard: ShardId,
        message: ShardMessage,
        reply_to: ReplyTo,
    },
    /// Outcomes of submitted batches, by token.
    Appended(Vec<(u64, Result<(), StoreError>)>),
    /// A clean fence read that began after this ticket was handed in.
    FenceClean(u64),
    EffectAnswered {
        origin: ConversationId,
        target: ConversationId,
        origin_seq: u64,
        done: bool,
    },
    GatewayGone(InstanceId),
    Run(Step),
    Stop,
}

/// A message of a gateway, with the identity that the link knows.
pub enum GatewayInput {
    /// `self_id` by the token's own word: only to find the worker, which verifies.
    Open {
        link: Arc<GatewayLink>,
        open: v1::SessionOpen,
        token: Box<Unverified>,
        self_id: ConversationId,
    },
    Announce {
        link: Arc<GatewayLink>,
        caller: Arc<Caller>,
    },
    Renew {
        link: Arc<GatewayLink>,
        caller: Arc<Caller>,
        token: String,
    },
    Close {
        caller: Arc<Caller>,
    },
    Send {
        caller: Arc<Caller>,
        conversation: ConversationId,
        /// The gateway's number of this try.
        attempt: u64,
        send: v1::Send,
    },
    Signal {
        caller: Arc<Caller>,
        conversation: ConversationId,
        signal: v1::Signal,
    },
    Received {
        caller: Arc<Caller>,
        conversation: ConversationId,
        seq: u64,
    },
}

impl GatewayInput {
    /// A receipt of a session that the link knows.
    pub fn received(caller: Option<Arc<Caller>>, received: &v1::SessionReceived) -> Option<Self> {
        let received = received.received.as_ref()?;
        let conversation = ConversationId::from_slice(&received.conversation_id).ok()?;
        Some(GatewayInput::Received { caller: caller?, conversation, seq: received.seq })
    }

    /// The conversation whose owner acts on it.
    pub fn conversation(&self) -> ConversationId {
        match self {
            GatewayInput::Open { self_id, .. } => *self_id,
            GatewayInput::Announce { caller, .. }
            | GatewayInput::Renew { caller, .. }
            | GatewayInput::Close { caller } => caller.self_id,
            GatewayInput::Send { conversation, .. }
            | GatewayInput::Signal { conversation, .. }
            | GatewayInput::Received { conversation, .. } => *conversation,
        }
    }
}
