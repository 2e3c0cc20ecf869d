//! Rate limits of users in the whole cluster.
//!
//! A send or a call is decided on at once, by what this router knows: nothing ever waits for hot state. What was let in is added to the
//! counts in hot state afterwards, a few times a second, and if these say that the user has had too much in the cluster, this router lets
//! nothing more of the user in until the window allows it. Only what is a 64th of a limit or more is brought there: most users never
//! come near, and hot state hears nothing of them. So
//!
//! - one router alone keeps the limit exactly, over a sliding window;
//! - several keep it together but for a 64th each, and for what they let in until the counts came back (a quarter of a second and a
//!   round trip);
//! - without hot state (gone, slow, flushed) each keeps it for itself: a user who reaches several routers gets at most as many times
//!   the limit, for as long as it is away and until the end of the window in which it came back.
//!
//! What is refused is not counted: whoever waits as long as told is let in. A message is counted where it gets its number: a repeat, one
//! that is refused and one that a gateway sends again are not, and one that was dropped with its number is taken out again.

use std::{collections::HashMap, sync::Arc, time::Duration};

use foldhash::quality::FixedState;
use futures::future::join_all;
use im_proto::{StatusCode, Timestamp, UserId, v1};
use im_storage::{Charge, HotState as _, Limit};
use parking_lot::Mutex;
use tokio::time::{MissedTickBehavior, interval};
use xxhash_rust::xxh3::xxh3_64;

use crate::cluster::Cluster;

/// The window of all limits: long enough for a burst of a person who pastes, short enough that waiting is bearable.
const WINDOW: Duration = Duration::from_secs(10);
/// How often counts are brought to hot state.
const ACCOUNT: Duration = Duration::from_millis(250);
/// Charges under way at a time.
const CHARGES: usize = 256;
/// Parts with a lock each: workers and links that count different users rarely meet.
const PARTS: usize = 16;
/// Users that are counted at a time in each part, 131,072 in all (150 bytes each). Of more than that the newcomers are let in uncounted
/// until others are forgotten, within two windows: nobody sends for a hundred thousand users within twenty seconds on one router whom the
/// gateways have not let in.
const USERS_MAX: usize = 131_072 / PARTS;
/// A part with room for so many times its users is made smaller.
const SPARSE: usize = 8;
/// What is less than this part of a limit is not brought to hot state.
const ACCOUNTED_PART: u32 = 64;

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Limited {
    Sends,
    Calls,
}

impl Limited {
    fn subject(self, user: &UserId) -> String {
        match self {
            Limited::Sends => format!("s:{user}"),
            Limited::Calls => format!("c:{user}"),
        }
    }
}

/// What a user has used.
#[derive(Debug, Default)]
struct Used {
    window: u64,
    current: u64,
    previous: u64,
    /// Not yet added to the counts in hot state.
    unaccounted: u32,
    /// The cluster's counts were above the limit.
    refused_until: Timestamp,
}

impl Used {
    fn is_alive(&self, limit: Limit, now: Timestamp) -> bool {
        self.refused_until > now || limit.window_of(now).abs_diff(self.window) <= 1
    }

    /// What is to be brought to hot state now.
    fn take_unaccounted(&mut self, limit: Limit) -> Option<u32> {
        (self.unaccounted >= accounted_min(limit)).then(|| std::mem::take(&mut self.unaccounted))
    }

    /// When so much is let in, if nothing else is meanwhile.
    fn retry_after(&self, limit: Limit, asked: u64, now: Timestamp) -> Duration {
        let mut wait = Duration::ZERO;
        // Within this window what is carried over shrinks, in the next what was used in this one.
        for _ in 0..4 {
            let then = now.saturating_add(wait);
            let verdict = match limit.window_of(then).wrapping_sub(self.window) {
                0 => limit.judge(then, self.current + asked, self.previous),
                1 => limit.judge(then, asked, self.current),
                _ => break,
            };
            match verdict {
                Charge::Exceeded { retry_after } => wait += retry_after,
                Charge::Allowed | Charge::Unknown => break,
            }
        }
        wait
    }
}

/// The least that is brought to hot state.
fn accounted_min(limit: Limit) -> u32 {
    (limit.amount / ACCOUNTED_PART).max(1)
}

/// What a user has used of each limit.
#[derive(Debug, Default)]
struct UsedByKind {
    sends: Used,
    calls: Used,
}

impl UsedByKind {
    fn of(&mut self, kind: Limited) -> &mut Used {
        match kind {
            Limited::Sends => &mut self.sends,
            Limited::Calls => &mut self.calls,
        }
    }
}

type Part = HashMap<UserId, UsedByKind, FixedState>;

/// The limits of a router.
pub struct UserLimits {
    sends: Option<Limit>,
    calls: Option<Limit>,
    parts: [Mutex<Part>; PARTS],
}

impl UserLimits {
    /// 0 is no limit.
    pub fn new(sends_max: u32, call_cost_max: u32) -> Self {
        let limit = |amount| (amount > 0).then_some(Limit { amount, window: WINDOW });
        Self { sends: limit(sends_max), calls: limit(call_cost_max), parts: std::array::from_fn(|_| Mutex::default()) }
    }

    fn limit(&self, kind: Limited) -> Option<Limit> {
        match kind {
            Limited::Sends => self.sends,
            Limited::Calls => self.calls,
        }
    }

    fn part(&self, user: &UserId) -> &Mutex<Part> {
        let hash = usize::try_from(xxh3_64(user.as_str().as_bytes()) % PARTS as u64).unwrap_or(0);
        &self.parts[hash]
    }

    /// Takes a cost from a user's limit, or says when to come back.
    pub fn take(&self, cluster: &Cluster, user: &UserId, kind: Limited, cost: u32) -> Result<(), v1::Status> {
        let Some(limit) = self.limit(kind) else { return Ok(()) };
        let taken = self.take_at(user, kind, cost, limit, cluster.environment.clock.now());
        taken.map_err(|retry_after| {
            cluster.metrics.rate_limited.increment(1);
            StatusCode::RateLimited.retry_after(retry_after)
        })
    }

    fn take_at(&self, user: &UserId, kind: Limited, cost: u32, limit: Limit, now: Timestamp) -> Result<(), Duration> {
        let mut part = self.part(user).lock();
        if !part.contains_key(user) {
            if part.len() >= USERS_MAX {
                return Ok(());
            }
            part.insert(user.clone(), UsedByKind::default());
        }
        let Some(used) = part.get_mut(user) else { return Ok(()) };
        let used = used.of(kind);
        // A clock that was set back gives an earlier window: then nothing of before counts.
        let window = limit.window_of(now);
        if window != used.window {
            used.previous = if window == used.window.wrapping_add(1) { used.current } else { 0 };
            (used.window, used.current) = (window, 0);
            if used.unaccounted < accounted_min(limit) {
                used.unaccounted = 0;
            }
            if used.refused_until > now.saturating_add(2 * limit.window) {
                used.refused_until = Timestamp::default();
            }
        }
        if used.refused_until > now {
            let millis = used.refused_until.as_millis() - now.as_millis();
            return Err(Duration::from_millis(u64::try_from(millis).unwrap_or(1)));
        }
        // A call that costs more than the whole limit is let in when nothing else was.
        let asked = u64::from(cost.min(limit.amount));
        match limit.judge(now, used.current + asked, used.previous) {
            Charge::Exceeded { .. } => Err(used.retry_after(limit, asked, now)),
            Charge::Allowed | Charge::Unknown => {
                used.current += asked;
                used.unaccounted = used.unaccounted.saturating_add(cost.min(limit.amount));
                Ok(())
            }
        }
    }

    /// Takes out again what was taken lately and came to nothing. What hot state has counted stays counted until its window is over.
    pub fn give_back(&self, user: &UserId, kind: Limited, cost: u32) {
        if self.limit(kind).is_some()
            && let Some(used) = self.part(user).lock().get_mut(user)
        {
            let used = used.of(kind);
            used.current = used.current.saturating_sub(u64::from(cost));
            used.unaccounted = used.unaccounted.saturating_sub(cost);
        }
    }

    /// What is to be added to the counts in hot state. Forgets who has not used anything for two windows.
    fn unaccounted(&self, now: Timestamp) -> Vec<(UserId, Limited, u32, Limit)> {
        let limits = [(Limited::Sends, self.sends), (Limited::Calls, self.calls)];
        let mut charges = Vec::new();
        for part in &self.parts {
            let mut part = part.lock();
            part.retain(|user, used| {
                let mut is_alive = false;
                for (kind, limit) in limits.iter().filter_map(|(kind, limit)| Some((*kind, (*limit)?))) {
                    let used = used.of(kind);
                    charges.extend(used.take_unaccounted(limit).map(|cost| (user.clone(), kind, cost, limit)));
                    is_alive |= used.is_alive(limit, now);
                }
                is_alive
            });
            // What a storm of users took is given back.
            if part.is_empty() || part.len() < part.capacity() / SPARSE {
                let room = 2 * part.len();
                part.shrink_to(room);
            }
        }
        // By user, so that a simulation does the same each time.
        charges.sort_by(|one, other| (&one.0, one.1).cmp(&(&other.0, other.1)));
        charges
    }

    /// The cluster's counts of a user are above the limit.
    fn exceeded(&self, user: UserId, kind: Limited, until: Timestamp) {
        if let Some(used) = self.part(&user).lock().get_mut(&user) {
            let used = used.of(kind);
            used.refused_until = used.refused_until.max(until);
        }
    }
}

/// Brings counts to hot state until the router has ended.
pub async fn account(cluster: Arc<Cluster>) {
    let limits = &cluster.user_limits;
    if limits.sends.is_none() && limits.calls.is_none() {
        return;
    }
    let mut ticks = interval(ACCOUNT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ended = cluster.ended();
    loop {
        tokio::select! {
            biased;
            _ = ended.wait_for(Option::is_some) => return,
            _ = ticks.tick() => {}
        }
        let charges = limits.unaccounted(cluster.environment.clock.now());
        for charges in charges.chunks(CHARGES) {
            let charge = |(user, kind, cost, limit): &(UserId, Limited, u32, Limit)| {
                let (hot, subject, cost, limit) = (&cluster.hot, kind.subject(user), *cost, *limit);
                async move { hot.charge(&subject, cost, limit).await }
            };
            let answers = join_all(charges.iter().map(charge)).await;
            let now = cluster.environment.clock.now();
            for ((user, kind, ..), answer) in charges.iter().zip(answers) {
                // Unknown: this router's own count decides.
                if let Charge::Exceeded { retry_after } = answer {
                    limits.exceeded(user.clone(), *kind, now.saturating_add(retry_after));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: Limit = Limit { amount: 10, window: WINDOW };

    fn user(name: &str) -> UserId {
        UserId::parse(name).unwrap()
    }

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(1_700_000_000_000 + millis)
    }

    #[test]
    fn the_limit_holds_for_each_user_and_kind_and_waiting_as_long_as_told_helps() {
        let limits = UserLimits::new(10, 10);
        let take = |name: &str, kind, now| limits.take_at(&user(name), kind, 1, LIMIT, now);
        for _ in 0..10 {
            assert_eq!(take("alice", Limited::Sends, at(0)), Ok(()));
        }
        let retry_after = take("alice", Limited::Sends, at(0)).unwrap_err();
        assert!(retry_after <= 2 * WINDOW);
        assert_eq!(take("alice", Limited::Calls, at(0)), Ok(()));
        assert_eq!(take("bob", Limited::Sends, at(0)), Ok(()));
        assert_eq!(take("alice", Limited::Sends, at(0).saturating_add(retry_after)), Ok(()));
    }

    #[test]
    fn what_the_cluster_counted_refuses_here_too_until_the_window_allows_it() {
        let limits = UserLimits::new(10, 0);
        let take = |now| limits.take_at(&user("alice"), Limited::Sends, 1, LIMIT, now);
        assert_eq!(take(at(0)), Ok(()));
        assert_eq!(limits.unaccounted(at(0)).len(), 1);
        assert_eq!(limits.unaccounted(at(0)).len(), 0, "added once");
        limits.exceeded(user("alice"), Limited::Sends, at(5_000));
        assert_eq!(take(at(1_000)), Err(Duration::from_secs(4)));
        assert_eq!(take(at(5_000)), Ok(()));
    }

    #[test]
    fn who_does_nothing_is_forgotten_and_takes_no_room() {
        let limits = UserLimits::new(10, 0);
        for number in 0..1_000 {
            assert_eq!(limits.take_at(&user(&format!("u{number}")), Limited::Sends, 1, LIMIT, at(0)), Ok(()));
        }
        assert_eq!(limits.unaccounted(at(0)).len(), 1_000);
        let known = || limits.parts.iter().map(|part| part.lock().len()).sum::<usize>();
        let room = || limits.parts.iter().map(|part| part.lock().capacity()).sum::<usize>();
        assert_eq!(known(), 1_000);
        assert!(room() >= 1_000);
        limits.unaccounted(at(30_000));
        assert_eq!((known(), room()), (0, 0));
    }

    #[test]
    fn a_small_part_of_a_limit_is_not_brought_to_hot_state() {
        let limits = UserLimits::new(640, 0);
        let limit = Limit { amount: 640, window: WINDOW };
        let take = |now| limits.take_at(&user("alice"), Limited::Sends, 1, limit, now).unwrap();
        (0..9).for_each(|_| take(at(0)));
        assert_eq!(limits.unaccounted(at(0)).len(), 0);
        // What was not brought there in its window is nothing to the next.
        take(at(10_000));
        assert_eq!(limits.unaccounted(at(10_000)).len(), 0);
        (0..9).for_each(|_| take(at(10_000)));
        assert_eq!(limits.unaccounted(at(10_000)).iter().map(|(.., cost, _)| *cost).collect::<Vec<_>>(), [10]);
    }

    #[test]
    fn what_came_to_nothing_is_not_counted() {
        let limits = UserLimits::new(10, 0);
        let take = || limits.take_at(&user("alice"), Limited::Sends, 1, LIMIT, at(0));
        for _ in 0..100 {
            assert_eq!(take(), Ok(()));
            limits.give_back(&user("alice"), Limited::Sends, 1);
        }
        (0..10).for_each(|_| take().unwrap());
        assert!(take().is_err());
        limits.give_back(&user("bob"), Limited::Sends, 1);
        limits.give_back(&user("alice"), Limited::Calls, 1);
    }

    proptest! {
        /// In no ten seconds is much more let in than the limit: two fixed windows count for the sliding one, so that a burst behind
        /// an uneven window may be larger, never twice as large.
        #[test]
        fn no_window_has_twice_the_limit(pauses in prop::collection::vec(0..3_000_i64, 1..200)) {
            let limits = UserLimits::new(10, 0);
            let (mut now, mut taken) = (0, Vec::new());
            for pause in pauses {
                now += pause;
                if limits.take_at(&user("alice"), Limited::Sends, 1, LIMIT, at(now)).is_ok() {
                    taken.push(now);
                }
            }
            for from in &taken {
                let count = taken.iter().filter(|at| (*from..*from + 10_000).contains(*at)).count();
                prop_assert!(count < 20, "{count}");
            }
        }
    }
}
