//! Moving sessions off a gateway that has more than its share: this worker's part of a step of [`crate::balance`].
//!
//! Only users of this worker's shards are moved, and of what a gateway has too much only the part that this worker's sessions are of the
//! gateway's. First go those whom placement sends to a gateway with room; only when a whole round has found too few does anybody else.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use im_proto::{
    InstanceId, SessionId, StatusCode, UserId,
    v1::{self, router_message::Message as ToGateway},
};
use im_registry::Instance;
use tokio::time::Instant;

use super::Context;
use crate::{
    balance::{Moves, Shed},
    caller::SessionKey,
    placement::{Who, client_endpoints},
};

/// Users looked at in one step, times the gateways that each is weighed for: about a millisecond of hashing.
const WEIGHED_MAX: usize = 32_768;
/// Whoever was told to go and has not gone after this long may be told again.
const GOING: Duration = Duration::from_secs(30);
/// For so long a gateway may still count a session that has gone: the second of its report, that of the step, and one for the way.
const COUNTED: Duration = Duration::from_secs(3);
/// Over this long those of one step go.
const SPREAD: Duration = Duration::from_secs(1);
/// Into so many parts they are divided for that.
const PARTS: usize = 8;

/// What a worker remembers between steps.
#[derive(Default)]
pub struct Shedding {
    /// Who was told to go, and when.
    told: BTreeMap<SessionKey, Instant>,
    /// Which gateways those have left who were told to, lately, and when: the loads do not say so yet.
    left: VecDeque<(Instant, InstanceId)>,
    /// Where to go on.
    after: Option<UserId>,
    /// A whole round found too few who belong elsewhere.
    anybody: bool,
}

impl Shedding {
    /// A session is gone.
    pub fn forget(&mut self, key: &SessionKey, now: Instant) {
        if self.told.remove(key).is_some() {
            self.left.push_back((now, key.gateway.clone()));
        }
    }

    /// Forgets who was told long ago, and who has left for long.
    fn sweep(&mut self, now: Instant) {
        self.told.retain(|_, at| now.duration_since(*at) < GOING);
        while self.left.front().is_some_and(|(at, _)| now.duration_since(*at) >= COUNTED) {
            self.left.pop_front();
        }
    }

    /// Sessions that a gateway's load still counts, and that go or have gone.
    fn told_of(&self, gateway: &InstanceId) -> u64 {
        let going = self.told.keys().map(|key| &key.gateway);
        let left = self.left.iter().map(|(_, gateway)| gateway);
        going.chain(left).filter(|of| *of == gateway).count() as u64
    }
}

/// Sessions that go from one gateway to others.
type Going = BTreeMap<(InstanceId, usize), Vec<SessionId>>;

impl Context {
    /// Tells some sessions to go elsewhere.
    pub fn shed(&mut self, moves: &Moves) {
        let now = self.now();
        self.users.shedding.sweep(now);
        let mut quotas: BTreeMap<InstanceId, u64> = BTreeMap::new();
        for (gateway, shed) in &moves.sheds {
            let quota = self.quota(gateway, shed);
            if quota > 0 {
                quotas.insert(gateway.clone(), quota);
            }
        }
        if quotas.is_empty() || moves.gateways.is_empty() {
            return;
        }
        let going = self.choose(moves, &mut quotas);
        for ((gateway, target), sessions) in going {
            self.cluster.metrics.sessions_moved.increment(sessions.len() as u64);
            self.tell_to_go(&gateway, &moves.gateways[target].0, &sessions);
        }
    }

    /// This worker's part of what a gateway sheds now. Parts of a session are a matter of luck, so that many workers with a small
    /// part each move as many as they should together.
    fn quota(&self, gateway: &InstanceId, shed: &Shed) -> u64 {
        let own = self.users.on_gateway(gateway);
        let part = |of: u64| {
            let product = u128::from(of) * u128::from(own.min(shed.connections));
            let connections = u128::from(shed.connections.max(1));
            let luck = u128::from(self.cluster.environment.random.next_u64()) % connections;
            u64::try_from((product + luck) / connections).unwrap_or(u64::MAX)
        };
        let excess = part(shed.excess).saturating_sub(self.users.shedding.told_of(gateway));
        part(shed.now).min(excess)
    }

    fn choose(&mut self, moves: &Moves, quotas: &mut BTreeMap<InstanceId, u64>) -> Going {
        let now = self.now();
        let looked_at = (WEIGHED_MAX / moves.gateways.len()).max(1);
        let mut going = Going::new();
        let mut chosen: Vec<SessionKey> = Vec::new();
        let (after, anybody) = (self.users.shedding.after.clone(), self.users.shedding.anybody);
        let mut last = None;
        for (user, sessions) in self.users.after(after.as_ref()).take(looked_at) {
            last = Some(user);
            for key in sessions {
                let Some(quota) = quotas.get_mut(&key.gateway).filter(|quota| **quota > 0) else { continue };
                if self.users.shedding.told.contains_key(key) {
                    continue;
                }
                if let Some(target) = target(user, &key.gateway, moves, anybody) {
                    *quota -= 1;
                    going.entry((key.gateway.clone(), target)).or_default().push(key.session);
                    chosen.push(key.clone());
                }
            }
            if quotas.values().all(|quota| *quota == 0) {
                break;
            }
        }
        let last = last.cloned();
        let shedding = &mut self.users.shedding;
        // At the end of a round that found too few, the next one takes anybody; at the end of one that did, only those again.
        shedding.anybody = if last.is_none() { quotas.values().any(|quota| *quota > 0) && !anybody } else { anybody };
        shedding.after = last;
        shedding.told.extend(chosen.into_iter().map(|key| (key, now)));
        going
    }

    fn tell_to_go(&mut self, gateway: &InstanceId, target: &Instance, sessions: &[SessionId]) {
        let endpoints: Vec<String> =
            client_endpoints(target).map(|endpoint| format!("{}://{}", endpoint.transport, endpoint.address)).collect();
        for sessions in sessions.chunks(sessions.len().div_ceil(PARTS).max(1)) {
            let after = self.cluster.environment.jitter(SPREAD);
            let go_away = v1::GoAway {
                reason: Some(StatusCode::Overloaded.to_status()),
                reconnect_after_ms: u32::try_from(after.as_millis()).unwrap_or(u32::MAX),
                endpoints: endpoints.clone(),
            };
            let session_ids = sessions.iter().map(|session| session.0).collect();
            let message = ToGateway::Move(v1::SessionsMove { session_ids, go_away: Some(go_away) });
            self.outgoing.entry(gateway.clone()).or_default().push(v1::RouterMessage { message: Some(message) });
        }
    }
}

/// The gateway that a user on another one should go to: the first in the user's order, if that has room, or whichever has room. One in
/// the zone of the gateway that it leaves is preferred.
fn target(user: &UserId, from: &InstanceId, moves: &Moves, anybody: bool) -> Option<usize> {
    let zone = moves.gateways.iter().find(|(instance, ..)| instance.id == *from).map(|(instance, ..)| &instance.zone);
    let candidates = moves.gateways.iter().enumerate().filter(|(_, (_, _, has_room))| *has_room || !anybody);
    let best = candidates.max_by(|(_, (one, one_capacity, _)), (_, (other, other_capacity, _))| {
        let is_near = |instance: &Instance| zone.is_none_or(|zone| *zone == instance.zone);
        let score = |instance: &Instance, capacity| Who::User(user).score(&instance.id, capacity);
        let by_zone = is_near(one).cmp(&is_near(other));
        by_zone.then_with(|| score(one, *one_capacity).total_cmp(&score(other, *other_capacity)))
    });
    best.filter(|(_, (_, _, has_room))| *has_room).map(|(place, _)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_has_just_gone_still_counts_until_the_loads_can_say_so() {
        let gateway = |name: &str| InstanceId::parse(name).unwrap();
        let key = |session| SessionKey { gateway: gateway("g1"), session: SessionId(session) };
        let (mut shedding, now) = (Shedding::default(), Instant::now());
        shedding.told.extend((1..=4).map(|session| (key(session), now)));
        // Who was not told to go is no part of what was to go.
        shedding.forget(&key(9), now);
        (1..=2).for_each(|session| shedding.forget(&key(session), now));
        assert_eq!((shedding.told_of(&gateway("g1")), shedding.told_of(&gateway("g2"))), (4, 0));
        shedding.sweep(now + Duration::from_millis(2_999));
        assert_eq!(shedding.told_of(&gateway("g1")), 4);
        shedding.sweep(now + COUNTED);
        assert_eq!(shedding.told_of(&gateway("g1")), 2);
        shedding.sweep(now + GOING);
        assert_eq!(shedding.told_of(&gateway("g1")), 0);
    }
}
