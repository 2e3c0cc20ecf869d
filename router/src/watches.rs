//! Who at this router watches whom: the sessions that want to know when users come and go.
//!
//! The owner of a user's sessions knows whether the user is there. This router tells it which users are watched here, once for all
//! sessions together, again within every [`RENEW`], and at once when a shard has another owner. The owner answers how it is now and
//! tells what changes. So whatever is lost between the two is made good by the next renewal; what is lost on the way to a client ends
//! in a `Resync`, after which it subscribes again. Sessions are told only what differs from what they were told before.
//!
//! What an owner answers and what it tells come on different links, in any order: its count says which was said later. A subscription is
//! answered under the lock and in the order of what is told, so that what a session hears last is what is known last. Of two subscriptions
//! of a session the one that was asked for later stands, whichever is decided first.
//!
//! Nobody watches without a session at this router: what is known here goes with the session, and with the user's shard. Whether
//! somebody may watch is decided before.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    ops::Bound,
    time::Duration,
};

use bytes::Bytes;
use im_proto::{
    Epoch, InstanceId, ShardId, UserId, frame,
    v1::{self, router_message::Message as ToGateway},
};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::time::Instant;

use crate::{
    caller::SessionKey,
    cluster::Cluster,
    message::{Answer, AnswerValue, ReplyTo, ShardMessage, WATCH_USERS_MAX, Watch, overloaded},
};

/// The owner is told again who is watched before this has passed. It forgets who is watched after three times as long.
pub const RENEW: Duration = Duration::from_secs(30);
/// The owner did not know of everybody: it may have taken the shard over just now.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// There was no answer.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// After so long it is asked again whether a session may still watch whom it watches.
const CHECK: Duration = Duration::from_secs(600);
/// Users that owners are told again in one go. At the bound of who may be watched here the round takes 16 s; an owner remembers for 90.
const RENEW_USERS_MAX: usize = 32_768;
/// Sessions that are checked in one go.
const CHECKS_MAX: usize = 64;

/// What watchers know of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub online: bool,
    /// 0 if that is not known.
    pub last_seen_ms: i64,
}

impl Seen {
    /// On the wire. Nothing but what everybody may know who watches the user.
    pub fn to_wire(self, user: &UserId) -> v1::UserPresence {
        let Self { online, last_seen_ms } = self;
        v1::UserPresence { user_id: user.to_string(), online, last_seen_ms, invisible: false }
    }
}

/// What a session asks for.
pub struct Subscription {
    pub key: SessionKey,
    pub watcher: UserId,
    /// Grows with each subscription of a session.
    pub number: u64,
    /// Whom the session may watch, each with what hot state says.
    pub users: Vec<(ShardId, UserId, Option<Seen>)>,
    /// How it is with the watcher, if that was asked for.
    pub own: Option<v1::UserPresence>,
}

/// A session of which it is time to ask whether its user may still watch these users.
pub struct Check {
    pub key: SessionKey,
    pub watcher: UserId,
    /// Of the subscription that is checked.
    number: u64,
    pub users: Vec<UserId>,
}

/// The sessions of this router that watch, and whom.
#[derive(Default)]
pub struct Watches {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the shard of who is watched. None is empty.
    shards: BTreeMap<ShardId, OfShard>,
    sessions: BTreeMap<SessionKey, Watching>,
    /// Users, counted for each session that watches them.
    count: usize,
    /// When sessions are checked again: one moment for each.
    checks: BTreeSet<(Instant, SessionKey)>,
    /// Some are being checked.
    checking: bool,
    /// Where renewing goes on.
    renew_from: Option<ShardId>,
}

/// Whom a session watches.
struct Watching {
    watcher: UserId,
    /// Of its last subscription.
    number: u64,
    users: Vec<(ShardId, UserId)>,
    check_at: Instant,
}

struct OfShard {
    users: BTreeMap<UserId, Watched>,
    /// Who was asked last, and under which claim.
    asked: Option<(InstanceId, Epoch)>,
    ask_at: Instant,
    /// The owner was told only of users up to this one; the others come next.
    renewed_through: Option<UserId>,
    /// Whose count the users' orders are of.
    heard: Option<InstanceId>,
}

/// A user whom somebody watches.
#[derive(Default)]
struct Watched {
    sessions: BTreeSet<SessionKey>,
    known: Option<Seen>,
    /// When the owner said so, by its count.
    order: u64,
}

impl Watches {
    /// A session watches these users and no others from now on, unless it has asked for others since. Answers it, and tells of whom the
    /// owners are to be asked.
    pub fn subscribe(
        &self,
        cluster: &Cluster,
        subscription: Subscription,
        reply_to: ReplyTo,
    ) -> BTreeMap<ShardId, Vec<UserId>> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let watching = state.sessions.get(&subscription.key);
        let before = watching.map_or(0, |watching| watching.users.len());
        let is_outdated = watching.is_some_and(|watching| watching.number > subscription.number);
        if !is_outdated && state.count - before + subscription.users.len() > cluster.config.presence_watches_max {
            cluster.answer(reply_to, Err(overloaded()));
            return BTreeMap::new();
        }
        let own = subscription.own.clone();
        let (mut users, ask) = match is_outdated {
            // As if it had been decided before the one that has taken its place.
            true => (state.known(subscription.users), BTreeMap::new()),
            false => state.replace(cluster, subscription),
        };
        users.extend(own);
        cluster.metrics.presence_watches.set(state.count as f64);
        let reply = v1::PresenceSubscribeReply { users }.encode_to_vec();
        // Under the lock, so that what is learnt from now on is told after it.
        cluster.answer(reply_to, Ok(AnswerValue::ReplyInOrder(reply.into())));
        ask
    }

    /// A session has ended.
    pub fn forget(&self, cluster: &Cluster, key: &SessionKey) {
        let mut state = self.state.lock();
        for (shard, user) in state.end(key) {
            leave(&mut state.shards, shard, &user, key);
        }
        cluster.metrics.presence_watches.set(state.count as f64);
    }

    /// Tells the owner of a shard that users are watched here. Its answer comes to [`Self::answered`].
    pub fn ask(&self, cluster: &Cluster, shard: ShardId, users: &[UserId]) {
        for users in users.chunks(WATCH_USERS_MAX) {
            let watch = Watch { router: cluster.config.instance.clone(), users: users.into() };
            let owner = cluster.owners().get(shard).cloned();
            let reply_to = ReplyTo::Watch { shard, users: users.len(), owner };
            cluster.send(shard, ShardMessage::Watch(watch), reply_to);
        }
    }

    /// Asks again where it is time to, or where another owner is to be asked: of so many users at most, of the others the next time.
    pub fn renew(&self, cluster: &Cluster) {
        let owners = cluster.owners();
        let pause = || RENEW / 2 + cluster.environment.jitter(RENEW / 2);
        let due = self.state.lock().due(|shard| owners.get(shard), Instant::now(), pause, RENEW_USERS_MAX);
        for (shard, users) in due {
            self.ask(cluster, shard, &users);
        }
    }

    /// The owner of a shard has answered, or could not be reached. What was asked under another claim than the present one may be older
    /// than what the next owner said.
    pub fn answered(
        &self,
        cluster: &Cluster,
        shard: ShardId,
        asked: usize,
        owner: Option<&(InstanceId, Epoch)>,
        answer: Answer,
    ) {
        let again = match answer {
            Ok(AnswerValue::Presence(list)) if owner.is_some() && cluster.owners().get(shard) == owner => {
                self.take(cluster, owner.map(|(owner, _)| owner), list.order, &list.users);
                (list.users.len() < asked).then_some(ASK_AGAIN)
            }
            _ => Some(TRY_AGAIN),
        };
        if let Some(again) = again
            && let Some(of_shard) = self.state.lock().shards.get_mut(&shard)
        {
            of_shard.ask_at = of_shard.ask_at.min(Instant::now() + again);
        }
    }

    /// A router tells that users came or went. Of users whose shard it does not own it knows nothing (any more).
    pub fn told(&self, cluster: &Cluster, from: &InstanceId, told: &v1::PeerPresence) {
        self.take(cluster, Some(from), told.order, &told.users);
    }

    /// Sessions that are to be checked now, none while others are.
    pub fn begin_checks(&self) -> Vec<Check> {
        let (now, mut checks) = (Instant::now(), Vec::new());
        let mut state = self.state.lock();
        let state = &mut *state;
        while !state.checking && checks.len() < CHECKS_MAX {
            let Some((at, key)) = state.checks.pop_first() else { break };
            if at > now {
                state.checks.insert((at, key));
                break;
            }
            let Some(watching) = state.sessions.get_mut(&key) else { continue };
            watching.check_at = now + CHECK;
            state.checks.insert((watching.check_at, key.clone()));
            let users = watching.users.iter().map(|(_, user)| user.clone()).collect();
            checks.push(Check { key, watcher: watching.watcher.clone(), number: watching.number, users });
        }
        state.checking |= !checks.is_empty();
        checks
    }

    /// All that were to be checked are.
    pub fn end_checks(&self) {
        self.state.lock().checking = false;
    }

    /// A session may not watch some users any more. It is told that they are offline, and nothing else of them. What it has asked for since
    /// was decided on newer lists.
    pub fn restrict(&self, cluster: &Cluster, check: &Check, gone: &BTreeSet<UserId>) {
        let key = &check.key;
        let mut state = self.state.lock();
        let state = &mut *state;
        let Some(watching) = state.sessions.get_mut(key).filter(|watching| watching.number == check.number) else {
            return;
        };
        let (stay, go): (Vec<_>, Vec<_>) =
            std::mem::take(&mut watching.users).into_iter().partition(|(_, user)| !gone.contains(user));
        watching.users = stay;
        state.count -= go.len();
        let mut messages = Vec::with_capacity(go.len());
        for (shard, user) in &go {
            leave(&mut state.shards, *shard, user, key);
            let frame = encode(user, Seen { online: false, last_seen_ms: 0 });
            let deliver = v1::Deliver { frame, session_ids: vec![key.session.0] };
            messages.push(v1::RouterMessage { message: Some(ToGateway::Deliver(deliver)) });
        }
        cluster.metrics.presence_watches.set(state.count as f64);
        if let Some(link) = cluster.links.read().get(&key.gateway) {
            link.send(messages);
        }
    }

    fn take(&self, cluster: &Cluster, from: Option<&InstanceId>, order: u64, users: &[v1::UserPresence]) {
        let mut to_gateways: BTreeMap<InstanceId, Vec<v1::RouterMessage>> = BTreeMap::new();
        let mut state = self.state.lock();
        // Not before the lock: what an owner says is not to be taken for its successor's.
        let owners = cluster.owners();
        for told in users {
            let Ok(user) = UserId::parse(&told.user_id) else { continue };
            let shard = cluster.shard_of_user(&user);
            if owners.get(shard).is_none_or(|(owner, _)| Some(owner) != from) {
                continue;
            }
            let Some(of_shard) = state.shards.get_mut(&shard) else { continue };
            if of_shard.heard.as_ref() != from {
                of_shard.heard = from.cloned();
                of_shard.users.values_mut().for_each(|watched| watched.order = 0);
            }
            let Some(watched) = of_shard.users.get_mut(&user) else { continue };
            if order != 0 && order < watched.order {
                // Said before what is known.
                continue;
            }
            watched.order = order;
            if let Some(seen) = watched.learn(told) {
                watched.push(cluster, &user, seen, &mut to_gateways);
            }
        }
        // Under the lock, so that what was learnt last is said last.
        let links = cluster.links.read();
        for (gateway, messages) in to_gateways {
            if let Some(link) = links.get(&gateway) {
                link.send(messages);
            }
        }
    }
}

impl State {
    /// Of whom the owners are to be told again now, at most `max`. Shards take turns.
    fn due<'a>(
        &mut self,
        owner: impl Fn(ShardId) -> Option<&'a (InstanceId, Epoch)>,
        now: Instant,
        pause: impl Fn() -> Duration,
        max: usize,
    ) -> Vec<(ShardId, Vec<UserId>)> {
        let (mut due, mut room) = (Vec::new(), max);
        let from = self.renew_from.unwrap_or(ShardId(0));
        let shards = self.shards.range(from..).chain(self.shards.range(..from)).map(|(shard, _)| *shard);
        for shard in shards.collect::<Vec<_>>() {
            let (Some(of_shard), Some(owner)) = (self.shards.get_mut(&shard), owner(shard)) else { continue };
            let is_new = of_shard.asked.as_ref() != Some(owner);
            if is_new || (of_shard.renewed_through.is_none() && of_shard.ask_at <= now) {
                of_shard.asked = Some(owner.clone());
                of_shard.ask_at = now + pause();
                of_shard.renewed_through = None;
            } else if of_shard.renewed_through.is_none() {
                continue;
            }
            let after = of_shard.renewed_through.take().map_or(Bound::Unbounded, Bound::Excluded);
            let mut left = of_shard.users.range((after, Bound::Unbounded)).map(|(user, _)| user);
            let users: Vec<UserId> = left.by_ref().take(room).cloned().collect();
            let is_cut = left.next().is_some();
            room -= users.len();
            if is_cut {
                // A shard is begun with room for one at least.
                of_shard.renewed_through = users.last().cloned();
            }
            due.push((shard, users));
            self.renew_from = Some(if is_cut { shard } else { ShardId(shard.0 + 1) });
            if room == 0 {
                break;
            }
        }
        due
    }

    /// What is known of users, besides what hot state says.
    fn known(&self, users: Vec<(ShardId, UserId, Option<Seen>)>) -> Vec<v1::UserPresence> {
        let known = |(shard, user, hot): (ShardId, UserId, Option<Seen>)| {
            let watched = self.shards.get(&shard).and_then(|of_shard| of_shard.users.get(&user));
            let seen = watched.and_then(|watched| watched.known).or(hot)?;
            Some(seen.to_wire(&user))
        };
        users.into_iter().filter_map(known).collect()
    }

    /// A session watches others than before. What is known of them, and of whom the owners are to be asked.
    fn replace(
        &mut self,
        cluster: &Cluster,
        subscription: Subscription,
    ) -> (Vec<v1::UserPresence>, BTreeMap<ShardId, Vec<UserId>>) {
        let Subscription { key, watcher, number, users, .. } = subscription;
        let (owners, former) = (cluster.owners(), self.end(&key));
        let mut known = Vec::with_capacity(users.len());
        let (mut watching, mut ask) = (Vec::with_capacity(users.len()), BTreeMap::<_, Vec<_>>::new());
        let (ask_at, check_at) = (Instant::now() + cluster.environment.jitter(RENEW), Instant::now() + CHECK);
        for (shard, user, hot) in users {
            let of_shard = self.shards.entry(shard).or_insert_with(|| {
                let asked = owners.get(shard).cloned();
                OfShard { users: BTreeMap::new(), asked, ask_at, renewed_through: None, heard: None }
            });
            let watched = match of_shard.users.entry(user.clone()) {
                Entry::Occupied(occupied) => occupied.into_mut(),
                Entry::Vacant(vacant) => {
                    ask.entry(shard).or_default().push(user.clone());
                    vacant.insert(Watched { known: hot, ..Watched::default() })
                }
            };
            watched.sessions.insert(key.clone());
            // What the owner says counts for more. What hot state says to one session, others have not been told: for them the owner's
            // word is still to be news.
            known.extend(watched.known.or(hot).map(|seen| seen.to_wire(&user)));
            watching.push((shard, user));
        }
        let watches: BTreeSet<&UserId> = watching.iter().map(|(_, user)| user).collect();
        for (shard, user) in former.iter().filter(|(_, user)| !watches.contains(user)) {
            leave(&mut self.shards, *shard, user, &key);
        }
        self.count += watching.len();
        if !watching.is_empty() {
            self.checks.insert((check_at, key.clone()));
        }
        // Also of one that watches nobody: an older subscription may still be decided.
        self.sessions.insert(key, Watching { watcher, number, users: watching, check_at });
        (known, ask)
    }

    /// A session watches nobody any more; gives back whom it did.
    fn end(&mut self, key: &SessionKey) -> Vec<(ShardId, UserId)> {
        let Some(Watching { users, check_at, .. }) = self.sessions.remove(key) else { return Vec::new() };
        self.checks.remove(&(check_at, key.clone()));
        self.count -= users.len();
        users
    }
}

impl Watched {
    /// Takes over what the owner says; what is news is given back.
    fn learn(&mut self, told: &v1::UserPresence) -> Option<Seen> {
        let known = self.known;
        let last_seen_ms = match told.last_seen_ms {
            0 => known.map_or(0, |known| known.last_seen_ms),
            last_seen_ms => last_seen_ms,
        };
        let seen = Seen { online: told.online, last_seen_ms };
        self.known = Some(seen);
        // Somebody who is still there is no news.
        let is_known = known.is_some_and(|known| known == seen || (known.online && seen.online));
        (!is_known).then_some(seen)
    }

    fn push(
        &self,
        cluster: &Cluster,
        user: &UserId,
        seen: Seen,
        to_gateways: &mut BTreeMap<InstanceId, Vec<v1::RouterMessage>>,
    ) {
        let frame = encode(user, seen);
        let mut by_gateway: BTreeMap<&InstanceId, Vec<u64>> = BTreeMap::new();
        for key in &self.sessions {
            by_gateway.entry(&key.gateway).or_default().push(key.session.0);
        }
        for (gateway, session_ids) in by_gateway {
            cluster.metrics.presence_pushes.increment(session_ids.len() as u64);
            let deliver = v1::Deliver { frame: frame.clone(), session_ids };
            let message = v1::RouterMessage { message: Some(ToGateway::Deliver(deliver)) };
            to_gateways.entry(gateway.clone()).or_default().push(message);
        }
    }
}

fn encode(user: &UserId, seen: Seen) -> Bytes {
    let Seen { online, last_seen_ms } = seen;
    let signal = v1::Signal {
        target: None,
        sender: user.to_string(),
        signal: Some(v1::signal::Signal::Presence(v1::Presence { online, last_seen_ms })),
    };
    frame::frame_to_bytes(&v1::ServerFrame { frame: Some(v1::server_frame::Frame::Signal(signal)) })
}

/// A session watches a user no longer. The owner hears nothing of it: it forgets whoever is not named again.
fn leave(shards: &mut BTreeMap<ShardId, OfShard>, shard: ShardId, user: &UserId, key: &SessionKey) {
    let Some(of_shard) = shards.get_mut(&shard) else { return };
    let Some(watched) = of_shard.users.get_mut(user) else { return };
    watched.sessions.remove(key);
    if watched.sessions.is_empty() {
        of_shard.users.remove(user);
    }
    if of_shard.users.is_empty() {
        shards.remove(&shard);
    }
}

#[cfg(test)]
mod tests;
