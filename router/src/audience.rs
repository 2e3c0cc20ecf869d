//! Who at this router follows which large conversation: the sessions of its users, by gateway.
//!
//! The owner of a large conversation sends one message to each registered router. From there it goes on as one message to each
//! gateway: where many sessions of a gateway follow, the gateway keeps them as a named set, which is changed by deltas before the
//! next message. Workers say who follows; whoever receives an entry (a peer link's task, or the owner's worker) passes it on at once.
//!
//! A version is given out once and never again, so a gateway that missed a change cannot take an old set for the present one.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use im_proto::{
    ConversationId, InstanceId, UserId,
    v1::{self, router_message::Message as ToGateway},
};
use parking_lot::Mutex;

use crate::{caller::SessionKey, cluster::Cluster};

/// Parts with a lock each: workers that change different conversations rarely meet.
const PARTS: usize = 16;
/// A delta of more sessions than this is sent as the whole set.
const DELTA_SESSIONS_MAX: usize = 256;

/// The large conversations that somebody follows here.
pub struct Audiences {
    parts: [Mutex<Part>; PARTS],
}

#[derive(Default)]
struct Part {
    audiences: BTreeMap<ConversationId, Audience>,
    /// Times the number of parts plus the index of the part: a version of its own for each change.
    changes: u64,
}

/// Those who follow one conversation. Never without a session.
#[derive(Default)]
struct Audience {
    gateways: BTreeMap<InstanceId, AtGateway>,
    users: BTreeMap<UserId, BTreeSet<SessionKey>>,
    pushed_through: u64,
}

#[derive(Default)]
struct AtGateway {
    sessions: BTreeSet<u64>,
    named: Option<Named>,
}

/// What the gateway keeps.
struct Named {
    version: u64,
    joined: BTreeSet<u64>,
    left: BTreeSet<u64>,
}

/// Frames for all who follow a conversation.
pub struct AudiencePush<'a> {
    pub conversation: ConversationId,
    pub frames: &'a Bytes,
    /// 0 for what is not an entry.
    pub last_seq: u64,
    pub except: Option<&'a SessionKey>,
}

impl Audiences {
    pub fn new() -> Self {
        Self { parts: std::array::from_fn(|index| Mutex::new(Part { changes: index as u64, ..Part::default() })) }
    }

    fn part(&self, id: &ConversationId) -> &Mutex<Part> {
        &self.parts[usize::from(id.as_bytes()[0]) % PARTS]
    }

    /// A session follows a conversation from now on.
    pub fn add(&self, id: &ConversationId, user: &UserId, key: &SessionKey) {
        let mut part = self.part(id).lock();
        let audience = part.audiences.entry(*id).or_default();
        audience.users.entry(user.clone()).or_default().insert(key.clone());
        let gateway = audience.gateways.entry(key.gateway.clone()).or_default();
        if gateway.sessions.insert(key.session.0)
            && let Some(named) = &mut gateway.named
            && !named.left.remove(&key.session.0)
        {
            named.joined.insert(key.session.0);
        }
    }

    /// A session follows it no longer, or has ended.
    pub fn remove(&self, cluster: &Cluster, id: &ConversationId, user: &UserId, key: &SessionKey) {
        let mut part = self.part(id).lock();
        let Part { audiences, changes } = &mut *part;
        let Some(audience) = audiences.get_mut(id) else { return };
        if let Some(sessions) = audience.users.get_mut(user) {
            sessions.remove(key);
            if sessions.is_empty() {
                audience.users.remove(user);
            }
        }
        audience.remove(cluster, id, key, changes);
        if audience.gateways.is_empty() {
            audiences.remove(id);
        }
    }

    /// A user is no member any more: what is pushed from now on reaches none of its sessions.
    pub fn remove_user(&self, cluster: &Cluster, id: &ConversationId, user: &UserId) {
        let mut part = self.part(id).lock();
        let Part { audiences, changes } = &mut *part;
        let Some(audience) = audiences.get_mut(id) else { return };
        for key in audience.users.remove(user).unwrap_or_default() {
            audience.remove(cluster, id, &key, changes);
        }
        if audience.gateways.is_empty() {
            audiences.remove(id);
        }
    }

    /// Up to which seq a conversation was pushed to those who follow it here; `None` if nobody does.
    pub fn pushed_through(&self, id: &ConversationId) -> Option<u64> {
        self.part(id).lock().audiences.get(id).map(|audience| audience.pushed_through)
    }

    /// Pushes frames to all who follow. If nobody does, `nobody` is called before anybody can begin to.
    pub fn push(&self, cluster: &Cluster, push: &AudiencePush<'_>, nobody: impl FnOnce()) {
        let mut part = self.part(&push.conversation).lock();
        let Part { audiences, changes } = &mut *part;
        let Some(audience) = audiences.get_mut(&push.conversation) else { return nobody() };
        audience.pushed_through = audience.pushed_through.max(push.last_seq);
        let links = cluster.links.read();
        for (instance, gateway) in &mut audience.gateways {
            let Some(link) = links.get(instance) else { continue };
            let except = push.except.filter(|key| key.gateway == *instance).map_or(0, |key| key.session.0);
            let messages = gateway.messages(push, except, changes, cluster.config.named_sessions_min);
            if !messages.is_empty() {
                cluster.metrics.deliveries.increment(gateway.sessions.len() as u64);
                link.send(messages);
            }
        }
    }

    /// A gateway does not have the version that was named: it gets the whole set.
    pub fn wanted(&self, cluster: &Cluster, gateway: &InstanceId, id: &ConversationId) {
        let mut part = self.part(id).lock();
        let Part { audiences, changes } = &mut *part;
        let set = match audiences.get_mut(id).and_then(|audience| audience.gateways.get_mut(gateway)) {
            Some(gateway) => gateway.whole(id, changes),
            None => v1::AudienceSet { conversation_id: id.to_bytes(), version: next(changes), ..Default::default() },
        };
        if let Some(link) = cluster.links.read().get(gateway) {
            link.send(vec![to_gateway(ToGateway::AudienceSet(set))]);
        }
    }

    /// Entries may not have reached those who follow: they sync.
    pub fn resync(&self, cluster: &Cluster, id: &ConversationId) {
        let part = self.part(id).lock();
        let Some(audience) = part.audiences.get(id) else { return };
        let spread_ms = u32::try_from(cluster.config.resync_spread.as_millis()).unwrap_or(u32::MAX);
        let resync = v1::Resync { reason: v1::ResyncReason::OwnerMoved.into(), spread_ms };
        let links = cluster.links.read();
        for (instance, gateway) in &audience.gateways {
            if let Some(link) = links.get(instance) {
                let session_ids = gateway.sessions.iter().copied().collect();
                let resync = v1::SessionsResync { session_ids, resync: Some(resync) };
                link.send(vec![to_gateway(ToGateway::Resync(resync))]);
            }
        }
    }
}

impl Audience {
    fn remove(&mut self, cluster: &Cluster, id: &ConversationId, key: &SessionKey, changes: &mut u64) {
        let Some(gateway) = self.gateways.get_mut(&key.gateway) else { return };
        if gateway.sessions.remove(&key.session.0)
            && let Some(named) = &mut gateway.named
            && !named.joined.remove(&key.session.0)
        {
            named.left.insert(key.session.0);
        }
        if gateway.sessions.is_empty()
            && let Some(gateway) = self.gateways.remove(&key.gateway)
            && gateway.named.is_some()
            && let Some(link) = cluster.links.read().get(&key.gateway)
        {
            let empty =
                v1::AudienceSet { conversation_id: id.to_bytes(), version: next(changes), ..Default::default() };
            link.send(vec![to_gateway(ToGateway::AudienceSet(empty))]);
        }
    }
}

impl AtGateway {
    fn messages(
        &mut self,
        push: &AudiencePush<'_>,
        except: u64,
        changes: &mut u64,
        named_min: usize,
    ) -> Vec<v1::RouterMessage> {
        if self.named.is_none() && self.sessions.len() < named_min {
            let session_ids: Vec<u64> = self.sessions.iter().copied().filter(|session| *session != except).collect();
            if session_ids.is_empty() {
                return Vec::new();
            }
            let deliver = v1::Deliver { frame: push.frames.clone(), session_ids };
            return vec![to_gateway(ToGateway::Deliver(deliver))];
        }
        let set = match &mut self.named {
            Some(named) if named.joined.is_empty() && named.left.is_empty() => None,
            Some(named) if named.joined.len() + named.left.len() <= DELTA_SESSIONS_MAX => {
                let from_version = std::mem::replace(&mut named.version, next(changes));
                Some(v1::AudienceSet {
                    conversation_id: push.conversation.to_bytes(),
                    version: named.version,
                    from_version,
                    joined: std::mem::take(&mut named.joined).into_iter().collect(),
                    left: std::mem::take(&mut named.left).into_iter().collect(),
                })
            }
            _ => Some(self.whole(&push.conversation, changes)),
        };
        let deliver = v1::AudienceDeliver {
            conversation_id: push.conversation.to_bytes(),
            version: self.named.as_ref().map_or(0, |named| named.version),
            frame: push.frames.clone(),
            except_session_id: except,
        };
        set.map(ToGateway::AudienceSet)
            .into_iter()
            .chain([ToGateway::AudienceDeliver(deliver)])
            .map(to_gateway)
            .collect()
    }

    fn whole(&mut self, id: &ConversationId, changes: &mut u64) -> v1::AudienceSet {
        let version = next(changes);
        self.named = Some(Named { version, joined: BTreeSet::new(), left: BTreeSet::new() });
        let joined = self.sessions.iter().copied().collect();
        v1::AudienceSet { conversation_id: id.to_bytes(), version, from_version: 0, joined, left: Vec::new() }
    }
}

/// A version that no part has given out.
fn next(changes: &mut u64) -> u64 {
    *changes += PARTS as u64;
    *changes
}

fn to_gateway(message: ToGateway) -> v1::RouterMessage {
    v1::RouterMessage { message: Some(message) }
}
