//! Who at this router follows which large conversation: the sessions of its users, by gateway.
//!
//! The owner of a large conversation sends one message to each registered router. From there it goes on as one message to each
//! gateway: where many sessions of a gateway follow, the gateway keeps them as a named set, which is changed by deltas before the
//! next message. Workers say who follows; whoever receives an entry (a peer link's task, or the owner's worker) passes it on at once.
//!
//! A version is given out once and never again, so a gateway that missed a change cannot take an old set for the present one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::AtomicBool,
};

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
    /// This router has sent entries of channels to whatever routers it could reach.
    pub sent_to_all: AtomicBool,
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
        let parts = std::array::from_fn(|index| Mutex::new(Part { changes: index as u64, ..Part::default() }));
        Self { parts, sent_to_all: AtomicBool::new(false) }
    }

    fn part(&self, id: &ConversationId) -> &Mutex<Part> {
        &self.parts[usize::from(id.as_bytes()[0]) % PARTS]
    }

    /// A session follows a conversation from now on.
    pub fn add(&self, id: &ConversationId, user: &UserId, key: &SessionKey) {
        let mut part = self.part(id).lock();
        let audience = part.audiences.entry(*id).or_default();
        audience.users.entry(user.clone()).or_default().insert(key.clone());
        audience.gateways.entry(key.gateway.clone()).or_default().join(key.session.0);
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
        let mut sessions = BTreeMap::new();
        if let Some(audience) = self.part(id).lock().audiences.get(id) {
            audience.gather(&mut sessions);
        }
        resync_sessions(cluster, sessions);
    }

    /// Entries of any conversation may not have reached those who follow.
    pub fn resync_all(&self, cluster: &Cluster) {
        let mut sessions = BTreeMap::new();
        for part in &self.parts {
            part.lock().audiences.values().for_each(|audience| audience.gather(&mut sessions));
        }
        resync_sessions(cluster, sessions);
    }
}

type SessionsByGateway = BTreeMap<InstanceId, BTreeSet<u64>>;

fn resync_sessions(cluster: &Cluster, sessions: SessionsByGateway) {
    let spread_ms = u32::try_from(cluster.config.resync_spread.as_millis()).unwrap_or(u32::MAX);
    let resync = v1::Resync { reason: v1::ResyncReason::OwnerMoved.into(), spread_ms };
    let links = cluster.links.read();
    for (gateway, sessions) in sessions {
        if let Some(link) = links.get(&gateway) {
            let session_ids = sessions.into_iter().collect();
            let resync = v1::SessionsResync { session_ids, resync: Some(resync) };
            link.send(vec![to_gateway(ToGateway::Resync(resync))]);
        }
    }
}

impl Audience {
    fn gather(&self, sessions: &mut SessionsByGateway) {
        for (gateway, at_gateway) in &self.gateways {
            sessions.entry(gateway.clone()).or_default().extend(&at_gateway.sessions);
        }
    }

    fn remove(&mut self, cluster: &Cluster, id: &ConversationId, key: &SessionKey, changes: &mut u64) {
        if let Some(empty) = self.leave(id, key, changes)
            && let Some(link) = cluster.links.read().get(&key.gateway)
        {
            link.send(vec![to_gateway(ToGateway::AudienceSet(empty))]);
        }
    }

    /// Takes a session out. If it was the last one of a gateway that keeps a set, that gets the empty one.
    fn leave(&mut self, id: &ConversationId, key: &SessionKey, changes: &mut u64) -> Option<v1::AudienceSet> {
        let gateway = self.gateways.get_mut(&key.gateway)?;
        gateway.leave(key.session.0);
        if !gateway.sessions.is_empty() {
            return None;
        }
        let gateway = self.gateways.remove(&key.gateway)?;
        let empty = || v1::AudienceSet { conversation_id: id.to_bytes(), version: next(changes), ..Default::default() };
        gateway.named.is_some().then(empty)
    }
}

impl AtGateway {
    fn join(&mut self, session: u64) {
        if self.sessions.insert(session)
            && let Some(named) = &mut self.named
            && !named.left.remove(&session)
        {
            named.joined.insert(session);
        }
    }

    fn leave(&mut self, session: u64) {
        if self.sessions.remove(&session)
            && let Some(named) = &mut self.named
            && !named.joined.remove(&session)
        {
            named.left.insert(session);
        }
    }

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

#[cfg(test)]
mod tests {
    use im_proto::SessionId;
    use proptest::prelude::*;

    use super::*;

    /// Sessions of a gateway beyond which they are a named set here.
    const NAMED_MIN: usize = 3;

    #[derive(Clone, Debug)]
    enum Step {
        Join(u64),
        Leave(u64),
        Push {
            except: u64,
        },
        /// What the router says is lost until the next word, as with a gateway that starts again.
        Forget,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1..400_u64).prop_map(Step::Join),
            3 => (1..12_u64).prop_map(Step::Leave),
            3 => (1..12_u64).prop_map(Step::Join),
            4 => (0..12_u64).prop_map(|except| Step::Push { except }),
            1 => Just(Step::Forget),
        ]
    }

    /// The model of a gateway: a set under a version, as SPEC.md says.
    #[derive(Default)]
    struct Kept {
        set: Option<(u64, BTreeSet<u64>)>,
        greatest: u64,
    }

    impl Kept {
        fn take(&mut self, set: &v1::AudienceSet) {
            assert!(set.version > self.greatest, "version {} after {}", set.version, self.greatest);
            self.greatest = set.version;
            let before = match (&self.set, set.from_version) {
                (_, 0) => BTreeSet::new(),
                (Some((version, sessions)), from) if *version == from => sessions.clone(),
                // A delta of a set that it does not have.
                _ => return,
            };
            let left: BTreeSet<u64> = set.left.iter().copied().collect();
            let mut sessions: BTreeSet<u64> = before.difference(&left).copied().collect();
            sessions.extend(&set.joined);
            self.set = (!sessions.is_empty()).then_some((set.version, sessions));
        }

        /// Who gets a frame for a version; `None` if the set is to be asked for first.
        fn reached(&self, version: u64) -> Option<&BTreeSet<u64>> {
            self.set.as_ref().filter(|(kept, _)| *kept == version).map(|(_, sessions)| sessions)
        }
    }

    /// Whom the messages of a push reach at a gateway, which asks for what it does not have.
    fn deliver(
        kept: &mut Kept,
        messages: Vec<v1::RouterMessage>,
        whole: impl FnOnce() -> v1::AudienceSet,
    ) -> BTreeSet<u64> {
        let mut whole = Some(whole);
        for message in messages {
            match message.message {
                Some(ToGateway::AudienceSet(set)) => kept.take(&set),
                Some(ToGateway::Deliver(deliver)) => return deliver.session_ids.into_iter().collect(),
                Some(ToGateway::AudienceDeliver(deliver)) => {
                    if kept.reached(deliver.version).is_none()
                        && let Some(whole) = whole.take()
                    {
                        // Those of the whole set are told to sync, the excepted one too.
                        kept.take(&whole());
                        return kept.set.iter().flat_map(|(_, sessions)| sessions.clone()).collect();
                    }
                    let reached = kept.reached(deliver.version).cloned().unwrap_or_default();
                    return reached.into_iter().filter(|session| *session != deliver.except_session_id).collect();
                }
                other => panic!("{other:?}"),
            }
        }
        BTreeSet::new()
    }

    proptest! {
        /// Whatever joins, leaves and gets lost: versions only grow, a frame reaches exactly those who follow, and a gateway that has
        /// the named version has the whole set that is meant by it.
        #[test]
        fn a_push_reaches_exactly_those_who_follow(steps in prop::collection::vec(step(), 0..120)) {
            let (id, gateway) = (ConversationId::from_bytes([3; 16]), InstanceId::parse("g1").unwrap());
            let (mut audience, mut changes) = (Audience::default(), 0);
            let (mut kept, mut follow) = (Kept::default(), BTreeSet::new());
            let frames = Bytes::from_static(b"frame");
            for step in steps {
                match step {
                    Step::Join(session) => {
                        follow.insert(session);
                        audience.gateways.entry(gateway.clone()).or_default().join(session);
                    }
                    Step::Leave(session) => {
                        follow.remove(&session);
                        let key = SessionKey { gateway: gateway.clone(), session: SessionId(session) };
                        if let Some(empty) = audience.leave(&id, &key, &mut changes) {
                            prop_assert!(follow.is_empty());
                            kept.take(&empty);
                        }
                    }
                    Step::Push { except } => {
                        let push = AudiencePush { conversation: id, frames: &frames, last_seq: 1, except: None };
                        let Some(at_gateway) = audience.gateways.get_mut(&gateway) else {
                            prop_assert!(follow.is_empty());
                            continue;
                        };
                        let messages = at_gateway.messages(&push, except, &mut changes, NAMED_MIN);
                        let had_it = kept.set.is_some() || at_gateway.named.is_none();
                        let reached = deliver(&mut kept, messages, || at_gateway.whole(&id, &mut changes));
                        let but_one: BTreeSet<u64> = follow.iter().copied().filter(|session| *session != except).collect();
                        if had_it {
                            prop_assert_eq!(&reached, &but_one);
                        } else {
                            prop_assert!(but_one.is_subset(&reached) && reached.is_subset(&follow));
                        }
                    }
                    Step::Forget => kept.set = None,
                }
                if let Some((_, sessions)) = &kept.set {
                    let named = audience.gateways.get(&gateway).and_then(|gateway| gateway.named.as_ref());
                    let (joined, left) = named.map_or((BTreeSet::new(), BTreeSet::new()), |named| {
                        (named.joined.clone(), named.left.clone())
                    });
                    let told: BTreeSet<u64> = follow.difference(&joined).copied().chain(left).collect();
                    prop_assert_eq!(sessions, &told, "what is to be told makes the one the other");
                }
            }
        }

        /// Parts never give out the same version.
        #[test]
        fn versions_of_parts_differ(counts in prop::collection::vec(1..50_usize, 2..6)) {
            let audiences = Audiences::new();
            let mut seen = BTreeSet::new();
            for (part, count) in counts.iter().enumerate() {
                let mut part = audiences.parts[part].lock();
                for _ in 0..*count {
                    prop_assert!(seen.insert(next(&mut part.changes)));
                }
            }
        }
    }
}
