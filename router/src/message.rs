//! What the owners of two shards say to each other, on one router or two. On one router these values move as they are; between
//! routers they travel as [`v1::PeerMessage`].

use std::sync::Arc;

use bytes::Bytes;
use im_proto::{
    ConversationId, InstanceId, SessionId, ShardId, StatusCode, UserId, key::ClusterSecret, method::Method, v1,
};
use tokio::sync::oneshot;

use crate::caller::{Caller, SessionKey};

/// A request to the owner of a shard.
#[derive(Clone, Debug)]
pub enum ShardMessage {
    Deliver(Delivery),
    /// Live pushes for the shard's users may have been lost.
    ResyncShard,
    Effect(Effect),
    Heads(HeadsQuery),
    Call(Call),
}

/// Whole wire frames for the live sessions of some users of one shard.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub frames: Bytes,
    pub users: Arc<[UserId]>,
    /// The shards of the users, if they are not all of the shard that the message is sent to.
    pub shards: Arc<[ShardId]>,
    /// The session that got a `SendAck` instead.
    pub except: Option<SessionKey>,
}

/// What one entry of a log does to another log: one entry there, appended once however often it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    pub target: ConversationId,
    /// Whose self log the target is.
    pub target_user: UserId,
    pub origin: ConversationId,
    pub origin_seq: u64,
    /// An encoded `Body` with a `SystemEvent`.
    pub body: Bytes,
}

/// Which heads a user wants to know.
#[derive(Clone, Debug)]
pub struct HeadsQuery {
    pub user: UserId,
    pub conversations: Vec<ConversationId>,
}

/// An api call on its way to the shard that answers it.
#[derive(Clone, Debug)]
pub struct Call {
    pub caller: Arc<Caller>,
    pub method: Method,
    pub request: Bytes,
}

/// The outcome of a request.
pub type Answer = Result<AnswerValue, v1::Status>;

/// A successful outcome.
#[derive(Clone, Debug)]
pub enum AnswerValue {
    Reply(Bytes),
    Heads(Vec<v1::Head>),
    EffectDone(u64),
    Nothing,
}

/// Where an answer goes.
#[derive(Debug)]
pub enum ReplyTo {
    Nobody,
    /// A `CallReply` to a gateway's session.
    Session {
        key: SessionKey,
        request_id: u32,
    },
    /// A task of this router.
    Task(oneshot::Sender<Answer>),
    /// A router that asked over a peer link.
    Peer {
        router: InstanceId,
        request_id: u64,
    },
    /// The outbox of a conversation on this router.
    Outbox {
        origin: ConversationId,
        target: ConversationId,
        origin_seq: u64,
    },
}

impl ShardMessage {
    /// For a peer link. `request_id` 0 wants no answer.
    pub fn to_peer(&self, shard: ShardId, request_id: u64) -> v1::PeerMessage {
        use v1::peer_message::Message;
        let message = match self {
            ShardMessage::Deliver(delivery) => Message::Deliver(v1::PeerDeliver {
                frame: delivery.frames.clone(),
                user_ids: delivery.users.iter().map(UserId::to_string).collect(),
                except_gateway_id: delivery.except.as_ref().map(|key| key.gateway.to_string()).unwrap_or_default(),
                except_session_id: delivery.except.as_ref().map_or(0, |key| key.session.0),
            }),
            ShardMessage::ResyncShard => Message::ResyncShard(v1::PeerResyncShard {}),
            ShardMessage::Effect(effect) => Message::Effect(v1::PeerEffect {
                target: effect.target.to_bytes(),
                origin: effect.origin.to_bytes(),
                origin_seq: effect.origin_seq,
                target_user_id: effect.target_user.to_string(),
                body: effect.body.clone(),
            }),
            ShardMessage::Heads(query) => Message::Heads(v1::PeerHeads {
                user_id: query.user.to_string(),
                conversation_ids: query.conversations.iter().map(|id| id.to_bytes()).collect(),
            }),
            ShardMessage::Call(call) => Message::Call(v1::PeerCall {
                identity: Some(call.caller.to_identity()),
                method: call.method.number(),
                request: call.request.clone(),
            }),
        };
        v1::PeerMessage { shard: shard.0, request_id, message: Some(message) }
    }

    /// From a peer link; `None` for what this version does not know or what breaks a rule.
    pub fn from_peer(message: &v1::peer_message::Message, secret: &ClusterSecret) -> Option<Self> {
        use v1::peer_message::Message;
        Some(match message {
            Message::Deliver(deliver) => {
                let users: Option<Vec<UserId>> = deliver.user_ids.iter().map(|id| UserId::parse(id).ok()).collect();
                let except = if deliver.except_gateway_id.is_empty() {
                    None
                } else {
                    let gateway = InstanceId::parse(&deliver.except_gateway_id).ok()?;
                    Some(SessionKey { gateway, session: SessionId(deliver.except_session_id) })
                };
                ShardMessage::Deliver(Delivery {
                    frames: deliver.frame.clone(),
                    users: users?.into(),
                    shards: Arc::default(),
                    except,
                })
            }
            Message::ResyncShard(_) => ShardMessage::ResyncShard,
            Message::Effect(effect) => ShardMessage::Effect(Effect {
                target: ConversationId::from_slice(&effect.target).ok()?,
                target_user: UserId::parse(&effect.target_user_id).ok()?,
                origin: ConversationId::from_slice(&effect.origin).ok()?,
                origin_seq: effect.origin_seq,
                body: effect.body.clone(),
            }),
            Message::Heads(heads) => {
                let conversations: Option<Vec<ConversationId>> =
                    heads.conversation_ids.iter().map(|id| ConversationId::from_slice(id).ok()).collect();
                ShardMessage::Heads(HeadsQuery {
                    user: UserId::parse(&heads.user_id).ok()?,
                    conversations: conversations?,
                })
            }
            Message::Call(call) => ShardMessage::Call(Call {
                caller: Arc::new(Caller::from_identity(call.identity.as_ref()?, secret).ok()?),
                method: Method::from_number(call.method)?,
                request: call.request.clone(),
            }),
            Message::Answer(_) => return None,
        })
    }
}

/// An answer for a peer link.
pub fn answer_to_peer(answer: Answer) -> v1::PeerAnswer {
    use v1::peer_answer::Answer as Wire;
    match answer {
        Err(status) => v1::PeerAnswer { status: Some(status), answer: None },
        Ok(value) => v1::PeerAnswer {
            status: None,
            answer: match value {
                AnswerValue::Reply(reply) => Some(Wire::Reply(reply)),
                AnswerValue::Heads(heads) => Some(Wire::Heads(v1::HeadList { heads })),
                AnswerValue::EffectDone(seq) => Some(Wire::EffectDone(seq)),
                AnswerValue::Nothing => None,
            },
        },
    }
}

/// An answer from a peer link.
pub fn answer_from_peer(answer: v1::PeerAnswer) -> Answer {
    use v1::peer_answer::Answer as Wire;
    if let Some(status) = answer.status {
        return Err(status);
    }
    Ok(match answer.answer {
        Some(Wire::Reply(reply)) => AnswerValue::Reply(reply),
        Some(Wire::Heads(list)) => AnswerValue::Heads(list.heads),
        Some(Wire::EffectDone(seq)) => AnswerValue::EffectDone(seq),
        None => AnswerValue::Nothing,
    })
}

/// The answer of one who does not own the shard, or cannot tell now.
pub fn unavailable() -> v1::Status {
    StatusCode::Unavailable.retry_after(std::time::Duration::from_millis(200))
}

/// The answer of one whose queue is full.
pub fn overloaded() -> v1::Status {
    StatusCode::Overloaded.retry_after(std::time::Duration::from_millis(200))
}
