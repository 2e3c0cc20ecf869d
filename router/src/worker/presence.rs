//! Presence: what others see of the users whose sessions this worker has. Mirrored to hot state for whoever asks, and told to the
//! routers where somebody watches.
//!
//! Who leaves is said to be gone after a grace, so that a reconnect is no going and coming, and with the moment at which the last
//! session ended. The sessions of a gateway that has died have had its lease to come back elsewhere: they get no grace. Whoever is
//! invisible is to everybody else like somebody who has left just then, grace included, and comes and goes without a word from then
//! on. Before it is known whether a user is invisible, nothing is said.
//!
//! A word in hot state holds for 60 s and is said again every 20 s for whoever is seen online. Nothing waits for hot state: what
//! cannot be stored is said again, and what is not there is *unknown* to who asks, never *offline*. To watchers each change is told
//! once; what is lost of that comes with the answer to the next renewal ([`crate::watches`]). Both are counted, so that a watcher that gets
//! them in another order knows which was said later. Who is watched is soft state: it goes
//! with the shard, and unless it is said again.

mod calls;
mod sharing;
mod visibility;

pub use self::sharing::Turns;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use im_proto::{InstanceId, ShardId, Timestamp, UserId, v1};
use im_storage::{HotState as _, Presence};
use tokio::time::Instant;

use super::{Context, Worker};
use crate::{
    cluster::Cluster,
    message::{AnswerValue, ReplyTo, WATCH_USERS_MAX, Watch},
    watches::{RENEW, Seen},
};

/// How long a word that somebody is online holds: three times as long as until it is said again, so that two may be lost.
const HOLDS: Duration = Duration::from_secs(60);
/// In so many ticks of half a second everybody is said to be online again, and all watched users are looked through once.
const TICKS_A_ROUND: usize = 40;
/// Whoever is back within this was not away: a client that lost its connection is back after a second or two.
const GRACE: Duration = Duration::from_secs(5);
/// Who took a shard over waits for so long for its sessions to be announced before it says of anybody that there is none.
const SETTLES: Duration = Duration::from_secs(10);
/// A user is watched for so long after a router has said so.
const WATCH_HOLDS: Duration = Duration::from_secs(3 * RENEW.as_secs());

/// What this worker remembers of presence, besides the sessions.
#[derive(Default)]
pub struct Presences {
    /// Users with sessions who came, or became visible, since the last tick.
    came: BTreeSet<UserId>,
    /// Users with sessions of whom is not known whether they are invisible.
    unread: BTreeSet<UserId>,
    /// That is being read of some.
    reading: bool,
    /// Who has left, or become invisible, and is still seen online.
    leaving: BTreeMap<UserId, Leaving>,
    /// Where to go on saying that users are still online.
    after: Option<UserId>,
    watched: BTreeMap<ShardId, BTreeMap<UserId, Watched>>,
    watched_count: usize,
    /// Shards that were taken over a moment ago.
    settling: BTreeMap<ShardId, Instant>,
    ticks: usize,
    /// Subscriptions that were asked for.
    pub subscriptions: u64,
    /// What was said to watchers: answers, and what was told in a tick.
    said: u64,
}

/// What others see of a user with sessions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sight {
    /// `None` until it is read.
    invisible: Option<bool>,
    /// Others see the user online.
    shown: bool,
}

/// How a user's last session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Its client may be back in a moment.
    Left,
    /// Its gateway died, longer ago than its lease.
    Lost,
    /// The user is another owner's now.
    Moved,
}

#[derive(Clone, Copy, Debug)]
struct Leaving {
    seen: Timestamp,
    due: Instant,
}

/// Who is watched from where.
#[derive(Default)]
struct Watched {
    routers: BTreeMap<InstanceId, Instant>,
    /// When the user was last seen, if that was told here.
    last_seen_ms: i64,
}

/// What is told to routers, at the end of a tick.
type Told = BTreeMap<InstanceId, Vec<v1::UserPresence>>;

impl Presences {
    /// A user has a session more.
    pub fn came(&mut self, user: &UserId) {
        self.came.insert(user.clone());
    }

    /// A user has sessions again, and may be invisible by now.
    pub fn begins(&mut self, user: &UserId) {
        self.unread.insert(user.clone());
    }

    /// A user's last session has ended.
    pub fn left(&mut self, user: &UserId, sight: Sight, how: Departure, now: Timestamp) {
        self.unread.remove(user);
        // One that was there for less than a tick has still been seen.
        let came = self.came.remove(user) && sight.invisible == Some(false);
        if (sight.shown || came) && how != Departure::Moved {
            let due = Instant::now() + if how == Departure::Left { GRACE } else { Duration::ZERO };
            self.leaving.insert(user.clone(), Leaving { seen: now, due });
        }
    }

    /// A shard is served from now on.
    pub fn shard_begins(&mut self, shard: ShardId) {
        self.settling.insert(shard, Instant::now() + SETTLES);
    }

    /// A shard's users are another owner's now, who is told by the watchers whom they watch.
    pub fn shard_ends(&mut self, shard: ShardId) {
        self.settling.remove(&shard);
        self.watched_count -= self.watched.remove(&shard).map_or(0, |users| users.len());
    }

    /// Takes note that a user is watched; `false` if too many are.
    fn watch(&mut self, shard: ShardId, user: &UserId, router: &InstanceId, until: Instant, max: usize) -> bool {
        let of_shard = self.watched.entry(shard).or_default();
        if !of_shard.contains_key(user) {
            if self.watched_count >= max {
                return false;
            }
            self.watched_count += 1;
        }
        of_shard.entry(user.clone()).or_default().routers.insert(router.clone(), until);
        true
    }

    /// A change that the routers are to be told where somebody watches.
    fn tell(&mut self, shard: ShardId, user: &UserId, seen: Seen, now: Instant, told: &mut Told) {
        let Some(watched) = self.watched.get_mut(&shard).and_then(|users| users.get_mut(user)) else { return };
        watched.last_seen_ms = seen.last_seen_ms;
        for (router, _) in watched.routers.iter().filter(|(_, until)| **until > now) {
            told.entry(router.clone()).or_default().push(seen.to_wire(user));
        }
    }

    /// Forgets who is watched no longer, a part of the shards each time. A worker has each `workers`th shard.
    fn sweep(&mut self, now: Instant, workers: usize) {
        self.ticks += 1;
        let turn = self.ticks % TICKS_A_ROUND;
        self.settling.retain(|_, until| *until > now);
        for (_, users) in
            self.watched.iter_mut().filter(|(shard, _)| shard.0 as usize / workers % TICKS_A_ROUND == turn)
        {
            let before = users.len();
            users.retain(|_, watched| {
                watched.routers.retain(|_, until| *until > now);
                !watched.routers.is_empty()
            });
            self.watched_count -= before - users.len();
        }
        self.watched.retain(|_, users| !users.is_empty());
    }
}

impl Worker {
    /// What is to be said is gathered for half a second.
    pub fn tick_presence(&mut self) {
        self.read_visibility();
        self.context.say_presence();
        if self.context.index == 0 {
            self.context.cluster.watches.renew(&self.context.cluster);
            self.context.check_watches();
        }
    }
}

impl Context {
    /// Says who came and went since the last tick, and of some of the others that they are still there.
    fn say_presence(&mut self) {
        let (now, at) = (self.cluster.environment.clock.now(), self.now());
        let online = Presence { online_until: now.saturating_add(HOLDS), last_seen: now };
        let (mut words, mut told) = (Vec::new(), Told::new());
        for user in std::mem::take(&mut self.users.presence.came) {
            let shard = self.cluster.shard_of_user(&user);
            let Some(sight) = self.users.sight(&user).filter(|sight| sight.invisible == Some(false)) else { continue };
            let was_shown = std::mem::replace(&mut sight.shown, true);
            let is_back = self.users.presence.leaving.remove(&user).is_some();
            words.push((user.clone(), online));
            if !was_shown && !is_back {
                let seen = Seen { online: true, last_seen_ms: now.as_millis() };
                self.users.presence.tell(shard, &user, seen, at, &mut told);
            }
        }
        let leaving = self.users.presence.leaving.iter().filter(|(_, leaving)| leaving.due <= at);
        for user in leaving.map(|(user, _)| user.clone()).collect::<Vec<_>>() {
            // Whoever is back may be invisible; that is known in a moment.
            if self.users.sight(&user).is_some_and(|sight| sight.invisible.is_none()) {
                continue;
            }
            let Some(Leaving { seen, .. }) = self.users.presence.leaving.remove(&user) else { continue };
            let shard = self.cluster.shard_of_user(&user);
            // Of a user whose shard went elsewhere the new owner speaks.
            if self.shards.is_active(shard) {
                words.push((user.clone(), Presence { online_until: seen, last_seen: seen }));
                let seen = Seen { online: false, last_seen_ms: seen.as_millis() };
                self.users.presence.tell(shard, &user, seen, at, &mut told);
            }
        }
        words.extend(self.still_online().into_iter().map(|user| (user, online)));
        // Past the lease another router may own these users and know better; what was said holds for a while.
        if !words.is_empty() && !self.past_lease() {
            self.cluster.metrics.presence_words.increment(words.len() as u64);
            self.cluster.hot.put_presence(now, words);
        }
        self.users.presence.said += 1;
        for (router, users) in told {
            tell(&self.cluster, &router, self.users.presence.said, users);
        }
        self.users.presence.sweep(at, self.cluster.config.workers.max(1));
    }

    /// Some of those who are seen online: all of them in one round.
    fn still_online(&mut self) -> Vec<UserId> {
        let count = self.users.count().div_ceil(TICKS_A_ROUND);
        let after = self.users.presence.after.take();
        let next: Vec<UserId> = self.users.after(after.as_ref()).take(count).map(|(user, _)| user.clone()).collect();
        self.users.presence.after = next.last().cloned();
        next.into_iter().filter(|user| self.users.sight(user).is_some_and(|sight| sight.shown)).collect()
    }

    /// Users of a shard are watched at a router from now on. The answer has those of whom is known how it is.
    pub fn watch(&mut self, shard: ShardId, watch: &Watch, reply_to: ReplyTo) {
        if self.past_lease() {
            return self.refuse(reply_to);
        }
        let (until, max) = (self.now() + WATCH_HOLDS, self.cluster.config.presence_watched_max);
        let mut known = Vec::with_capacity(watch.users.len());
        for user in watch.users.iter() {
            if self.cluster.shard_of_user(user) != shard {
                continue;
            }
            if !self.users.presence.watch(shard, user, &watch.router, until, max) {
                // Its watchers learn of changes with their renewals.
                self.cluster.metrics.presence_watches_refused.increment(1);
            }
            known.extend(self.seen(shard, user).map(|seen| seen.to_wire(user)));
        }
        self.users.presence.said += 1;
        let list = v1::PresenceList { users: known, order: self.users.presence.said };
        self.cluster.answer(reply_to, Ok(AnswerValue::Presence(list)));
    }

    /// How others see a user of this worker's; `None` if that is not known yet. Of an invisible one and of one who is not there the
    /// same is known.
    fn seen(&mut self, shard: ShardId, user: &UserId) -> Option<Seen> {
        let now = self.cluster.environment.clock.now();
        if let Some(leaving) = self.users.presence.leaving.get(user) {
            return Some(Seen { online: true, last_seen_ms: leaving.seen.as_millis() });
        }
        match self.users.sight(user) {
            Some(Sight { shown: true, .. }) => return Some(Seen { online: true, last_seen_ms: now.as_millis() }),
            // Known in a moment, and told then.
            Some(Sight { invisible: None | Some(false), .. }) => return None,
            Some(Sight { invisible: Some(true), .. }) | None => {}
        }
        if self.users.presence.settling.contains_key(&shard) {
            return None;
        }
        let watched = self.users.presence.watched.get(&shard).and_then(|users| users.get(user));
        Some(Seen { online: false, last_seen_ms: watched.map_or(0, |watched| watched.last_seen_ms) })
    }
}

/// Tells a router that users came or went whom somebody watches there. It may be lost.
fn tell(cluster: &Cluster, router: &InstanceId, order: u64, users: Vec<v1::UserPresence>) {
    if *router == cluster.config.instance {
        return cluster.watches.told(cluster, router, &v1::PeerPresence { users, order });
    }
    let Some(peer) = cluster.peers.read().get(router).cloned() else { return };
    for users in users.chunks(WATCH_USERS_MAX) {
        let presence = v1::PeerPresence { users: users.to_vec(), order };
        let message = Some(v1::peer_message::Message::Presence(presence));
        peer.send(v1::PeerMessage { shard: 0, request_id: 0, message });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker's shards are a few of all: each tick has its share of them.
    #[test]
    fn who_is_watched_no_longer_is_forgotten_in_even_steps_whatever_the_number_of_workers() {
        let router = InstanceId::parse("r1").expect("an id");
        for workers in [1, 2, 5, 8, 40] {
            let (mut presences, now) = (Presences::default(), Instant::now());
            let shards: Vec<u32> = (0..1024).filter(|shard| *shard as usize % workers == 3 % workers).collect();
            for shard in &shards {
                let user = UserId::parse(&format!("u{shard}")).expect("an id");
                assert!(presences.watch(ShardId(*shard), &user, &router, now, usize::MAX));
            }
            let most = shards.len().div_ceil(TICKS_A_ROUND);
            for _ in 0..TICKS_A_ROUND {
                let before = presences.watched_count;
                presences.sweep(now + WATCH_HOLDS, workers);
                assert!(before - presences.watched_count <= most, "{workers} workers");
            }
            assert_eq!((presences.watched_count, presences.watched.len()), (0, 0), "{workers} workers");
        }
    }
}
