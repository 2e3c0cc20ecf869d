//! What the owners of two shards say to each other, on one router or two. On one router these values move as they are; between
//! routers they travel as [`v1::PeerMessage`].

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use im_proto::{
    ConversationId, Epoch, InstanceId, SessionId, ShardId, StatusCode, UserId, id::IdError, key::ClusterSecret,
    method::Method, v1,
};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    audience::AudiencePush,
    caller::{Caller, SessionKey},
    metrics::Metrics,
};

/// Users of one [`Watch`].
pub const WATCH_USERS_MAX: usize = 1024;

/// A request to the owner of a shard.
#[derive(Clone, Debug)]
pub enum ShardMessage {
    Deliver(Delivery),
    /// Live pushes for the shard's users may have been lost.
    ResyncShard,
    Effect(Effect),
    Heads(HeadsQuery),
    Call(Call),
    /// Users of the shard are members of a large conversation.
    Follow(Follow),
    /// They are members no longer.
    Unfollow(Follow),
    /// Nobody follows a large conversation at a router, as a push up to `seq` found.
    AudienceGone {
        conversation: ConversationId,
        router: InstanceId,
        seq: u64,
    },
    /// Sessions at a router want to know when users of the shard come and go.
    Watch(Watch),
}

/// Whole wire frames for the live sessions of some users of one shard.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub frames: Bytes,
    /// In the order of their shards.
    pub users: Arc<[UserId]>,
    /// How many of the users are of which shard.
    pub spans: Arc<[(ShardId, u32)]>,
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

/// Some users and a large conversation.
#[derive(Clone, Debug)]
pub struct Follow {
    pub conversation: ConversationId,
    pub users: Arc<[UserId]>,
}

/// Users who are watched at a router.
#[derive(Clone, Debug)]
pub struct Watch {
    pub router: InstanceId,
    pub users: Arc<[UserId]>,
}

/// Frames for all who follow a large conversation at another router.
#[derive(Clone, Debug)]
pub struct AudienceDelivery {
    pub conversation: ConversationId,
    pub frames: Bytes,
    pub last_seq: u64,
    pub except: Option<SessionKey>,
}

/// Which heads a user wants to know.
#[derive(Clone, Debug)]
pub struct HeadsQuery {
    pub user: UserId,
    pub conversations: Vec<ConversationId>,
    /// With what a list shows of them.
    pub details: bool,
    /// The user subscribes to the channels among them: the cursor begins at the head.
    pub subscribe: bool,
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
    /// The same, which nothing that is told to the session later may overtake.
    ReplyInOrder(Bytes),
    Heads(Vec<v1::Head>),
    EffectDone(u64),
    /// Whether anybody follows a large conversation at a router, and up to which seq it was pushed there.
    Following {
        router: InstanceId,
        registered: bool,
        pushed_through: u64,
    },
    /// How it is with users who are watched.
    Presence(v1::PresenceList),
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
    /// The owner of a large conversation, which has asked about members of a shard.
    Follow {
        conversation: ConversationId,
        shard: ShardId,
        ask: u64,
    },
    /// Those at this router who watch users of a shard; so many were asked for, of whoever owned the shard then.
    Watch {
        shard: ShardId,
        users: usize,
        owner: Option<(InstanceId, Epoch)>,
    },
    /// To a caller of the api; the time that the answer took is counted.
    Timed(Box<TimedReply>),
}

impl ReplyTo {
    /// Whether the answer goes to the caller by the link of its own session.
    pub fn is_own_session(&self) -> bool {
        match self {
            ReplyTo::Session { .. } => true,
            ReplyTo::Timed(timed) => timed.to.is_own_session(),
            _ => false,
        }
    }
}

/// An answer to a call of the api that is timed.
#[derive(Debug)]
pub struct TimedReply {
    pub method: Method,
    pub since: Instant,
    pub to: ReplyTo,
}

impl TimedReply {
    /// Where the answer goes, after its time was counted.
    pub fn counted(self, metrics: &Metrics) -> ReplyTo {
        metrics.called(self.method, self.since.elapsed());
        self.to
    }
}

impl ShardMessage {
    /// For a peer link. `request_id` 0 wants no answer.
    pub fn to_peer(&self, shard: ShardId, request_id: u64) -> v1::PeerMessage {
        use v1::peer_message::Message;
        let message = match self {
            ShardMessage::Deliver(delivery) => Message::Deliver(v1::PeerDeliver {
                frame: delivery.frames.clone(),
                user_ids: delivery.users.iter().map(UserId::to_string).collect(),
                except_gateway_id: gateway_of(delivery.except.as_ref()),
                except_session_id: delivery.except.as_ref().map_or(0, |key| key.session.0),
                user_shards: match &delivery.spans[..] {
                    [_] => Vec::new(),
                    spans => {
                        spans.iter().flat_map(|(shard, count)| std::iter::repeat_n(shard.0, *count as usize)).collect()
                    }
                },
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
                details: query.details,
                subscribe: query.subscribe,
            }),
            ShardMessage::Call(call) => Message::Call(v1::PeerCall {
                identity: Some(call.caller.to_identity()),
                method: call.method.number(),
                request: call.request.clone(),
            }),
            ShardMessage::Follow(follow) => Message::Follow(v1::PeerFollow {
                conversation_id: follow.conversation.to_bytes(),
                user_ids: follow.users.iter().map(UserId::to_string).collect(),
            }),
            ShardMessage::Unfollow(unfollow) => Message::Unfollow(v1::PeerUnfollow {
                conversation_id: unfollow.conversation.to_bytes(),
                user_ids: unfollow.users.iter().map(UserId::to_string).collect(),
            }),
            ShardMessage::AudienceGone { conversation, seq, .. } => {
                Message::AudienceGone(v1::PeerAudienceGone { conversation_id: conversation.to_bytes(), seq: *seq })
            }
            ShardMessage::Watch(watch) => {
                Message::Watch(v1::PeerWatch { user_ids: watch.users.iter().map(UserId::to_string).collect() })
            }
        };
        v1::PeerMessage { shard: shard.0, request_id, message: Some(message) }
    }

    /// From a peer link; `None` for what this version does not know or what breaks a rule.
    pub fn from_peer(
        message: &v1::peer_message::Message,
        shard: ShardId,
        other: &InstanceId,
        secret: &ClusterSecret,
    ) -> Option<Self> {
        use v1::peer_message::Message;
        Some(match message {
            Message::Deliver(deliver) => ShardMessage::Deliver(Delivery::from_peer(deliver, shard)?),
            Message::Follow(follow) => ShardMessage::Follow(Follow {
                conversation: ConversationId::from_slice(&follow.conversation_id).ok()?,
                users: users(&follow.user_ids)?,
            }),
            Message::Unfollow(unfollow) => ShardMessage::Unfollow(Follow {
                conversation: ConversationId::from_slice(&unfollow.conversation_id).ok()?,
                users: users(&unfollow.user_ids)?,
            }),
            Message::AudienceGone(gone) => ShardMessage::AudienceGone {
                conversation: ConversationId::from_slice(&gone.conversation_id).ok()?,
                router: other.clone(),
                seq: gone.seq,
            },
            Message::Watch(watch) => {
                let known = watch.user_ids.len() <= WATCH_USERS_MAX;
                ShardMessage::Watch(Watch { router: other.clone(), users: known.then(|| users(&watch.user_ids))?? })
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
                    details: heads.details,
                    subscribe: heads.subscribe,
                })
            }
            Message::Call(call) => ShardMessage::Call(Call {
                caller: Arc::new(Caller::from_identity(call.identity.as_ref()?, secret).ok()?),
                method: Method::from_number(call.method)?,
                request: call.request.clone(),
            }),
            Message::Answer(_)
            | Message::AudienceDeliver(_)
            | Message::AudienceResync(_)
            | Message::Loads(_)
            | Message::Presence(_) => return None,
        })
    }
}

impl Delivery {
    fn from_peer(deliver: &v1::PeerDeliver, shard: ShardId) -> Option<Self> {
        let mut spans: Vec<(ShardId, u32)> = Vec::new();
        if deliver.user_shards.is_empty() {
            spans.push((shard, u32::try_from(deliver.user_ids.len()).ok()?));
        } else if deliver.user_shards.len() != deliver.user_ids.len() {
            return None;
        }
        for shard in &deliver.user_shards {
            match spans.last_mut() {
                Some((last, count)) if last.0 == *shard => *count += 1,
                _ => spans.push((ShardId(*shard), 1)),
            }
        }
        Some(Self {
            frames: deliver.frame.clone(),
            users: users(&deliver.user_ids)?,
            spans: spans.into(),
            except: except(&deliver.except_gateway_id, deliver.except_session_id).ok()?,
        })
    }

    /// The parts for each worker, with a shard that finds it.
    pub fn by_worker(self, worker_of: impl Fn(ShardId) -> usize) -> Vec<(ShardId, Self)> {
        let Some((first, _)) = self.spans.first().copied() else { return Vec::new() };
        if self.spans.iter().all(|(shard, _)| worker_of(*shard) == worker_of(first)) {
            return vec![(first, self)];
        }
        type Part = (Vec<UserId>, Vec<(ShardId, u32)>);
        let mut parts: BTreeMap<usize, Part> = BTreeMap::new();
        let mut rest = &self.users[..];
        for span in self.spans.iter() {
            let (own, others) = rest.split_at(rest.len().min(span.1 as usize));
            let (users, spans) = parts.entry(worker_of(span.0)).or_default();
            users.extend_from_slice(own);
            spans.push(*span);
            rest = others;
        }
        let part = |(users, spans): Part| {
            let (frames, except) = (self.frames.clone(), self.except.clone());
            let (shard, _) = *spans.first()?;
            Some((shard, Self { frames, users: users.into(), spans: spans.into(), except }))
        };
        parts.into_values().filter_map(part).collect()
    }
}

impl AudienceDelivery {
    pub fn of(push: &AudiencePush<'_>) -> Self {
        Self {
            conversation: push.conversation,
            frames: push.frames.clone(),
            last_seq: push.last_seq,
            except: push.except.cloned(),
        }
    }

    /// For a peer link.
    pub fn to_peer(&self, shard: ShardId) -> v1::PeerMessage {
        let deliver = v1::PeerAudienceDeliver {
            conversation_id: self.conversation.to_bytes(),
            frame: self.frames.clone(),
            last_seq: self.last_seq,
            except_gateway_id: gateway_of(self.except.as_ref()),
            except_session_id: self.except.as_ref().map_or(0, |key| key.session.0),
        };
        let message = Some(v1::peer_message::Message::AudienceDeliver(deliver));
        v1::PeerMessage { shard: shard.0, request_id: 0, message }
    }

    /// From a peer link; `None` if it breaks a rule.
    pub fn from_peer(deliver: &v1::PeerAudienceDeliver) -> Option<Self> {
        Some(Self {
            conversation: ConversationId::from_slice(&deliver.conversation_id).ok()?,
            frames: deliver.frame.clone(),
            last_seq: deliver.last_seq,
            except: except(&deliver.except_gateway_id, deliver.except_session_id).ok()?,
        })
    }
}

fn users(ids: &[String]) -> Option<Arc<[UserId]>> {
    ids.iter().map(|id| UserId::parse(id).ok()).collect()
}

fn gateway_of(except: Option<&SessionKey>) -> String {
    except.map(|key| key.gateway.to_string()).unwrap_or_default()
}

fn except(gateway: &str, session: u64) -> Result<Option<SessionKey>, IdError> {
    match gateway {
        "" => Ok(None),
        gateway => Ok(Some(SessionKey { gateway: InstanceId::parse(gateway)?, session: SessionId(session) })),
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
                AnswerValue::Reply(reply) | AnswerValue::ReplyInOrder(reply) => Some(Wire::Reply(reply)),
                AnswerValue::Heads(heads) => Some(Wire::Heads(v1::HeadList { heads })),
                AnswerValue::EffectDone(seq) => Some(Wire::EffectDone(seq)),
                AnswerValue::Following { router, registered, pushed_through } => {
                    let router_id = router.to_string();
                    Some(Wire::Following(v1::Following { router_id, registered, pushed_through }))
                }
                AnswerValue::Presence(list) => Some(Wire::Presence(list)),
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
        Some(Wire::Following(following)) => AnswerValue::Following {
            router: InstanceId::parse(&following.router_id).map_err(|_| unavailable())?,
            registered: following.registered,
            pushed_through: following.pushed_through,
        },
        Some(Wire::Presence(list)) => AnswerValue::Presence(list),
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
