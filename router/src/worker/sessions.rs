//! The live sessions of the users whose shards this worker owns: registration, device policy, pushes.

mod platforms;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
};

use im_proto::{
    DeviceId, InstanceId, Platform, SessionId, ShardId, StatusCode, Timestamp, UserId,
    token::{TokenError, Unverified},
    v1::{self, router_message::Message as ToGateway},
};
use tokio::{sync::oneshot, time::Instant};

use self::platforms::Platforms;
use super::{
    Context, Worker,
    devices::Devices,
    following::Following,
    presence::{Departure, Presences, Sight},
    shedding::Shedding,
};
use crate::{
    caller::{Caller, SessionKey},
    cluster::Cluster,
    config::EXCLUSIVE_PLATFORMS,
    gateway_link::GatewayLink,
    message::{AnswerValue, Delivery, HeadsQuery, ReplyTo, unavailable},
};

/// A live session.
#[derive(Debug)]
pub struct Live {
    pub key: SessionKey,
    pub device: DeviceId,
    pub platform: Platform,
    opened_at: Timestamp,
    /// When its device was seen last as the row of it says; 0: not known.
    pub stored_at: Timestamp,
}

/// How an owner learns of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    /// Its client has just said Hello.
    Opened,
    /// Another owner let it in before.
    Announced,
}

/// What became of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recorded {
    Kept,
    /// A later session of the same device is recorded.
    Outdated,
    /// A later session of another device of the same exclusive platform is recorded.
    Displaced,
    /// The user has too many.
    Refused,
}

/// The users with live sessions.
#[derive(Default)]
pub struct Users {
    /// Ordered, so that a pass over it is the same in every run of a simulation.
    users: BTreeMap<UserId, UserSessions>,
    /// The same users, so that losing one shard costs nothing for the others.
    by_shard: BTreeMap<ShardId, BTreeSet<UserId>>,
    /// Shards whose sessions must sync.
    to_resync: BTreeSet<ShardId>,
    /// Sessions by gateway.
    on_gateways: BTreeMap<InstanceId, u64>,
    pub shedding: Shedding,
    pub presence: Presences,
    pub devices: Devices,
    platforms: Platforms,
}

struct UserSessions {
    shard: ShardId,
    sessions: Vec<Live>,
    sight: Sight,
    /// The large conversations that these sessions follow.
    following: Following,
}

impl Users {
    fn entry(&mut self, user: &UserId, shard: ShardId) -> &mut UserSessions {
        self.users.entry(user.clone()).or_insert_with(|| {
            self.by_shard.entry(shard).or_default().insert(user.clone());
            self.presence.begins(user);
            UserSessions { shard, sessions: Vec::new(), sight: Sight::default(), following: Following::new() }
        })
    }

    /// What a user with sessions follows, and the sessions.
    pub fn following(&mut self, user: &UserId) -> Option<(&mut Following, impl Iterator<Item = &SessionKey>)> {
        let user = self.users.get_mut(user)?;
        Some((&mut user.following, user.sessions.iter().map(|live| &live.key)))
    }

    /// Removes sessions of a user and returns them.
    fn remove(&mut self, cluster: &Cluster, user: &UserId, how: Departure, gone: impl Fn(&Live) -> bool) -> Vec<Live> {
        let Some(entry) = self.users.get_mut(user) else { return Vec::new() };
        let removed: Vec<Live> = entry.sessions.extract_if(.., |live| gone(live)).collect();
        for live in &removed {
            one_less(&mut self.on_gateways, &live.key.gateway);
            self.shedding.forget(&live.key, Instant::now());
            entry.following.keys().for_each(|id| cluster.audiences.remove(cluster, id, user, &live.key));
            cluster.watches.forget(cluster, &live.key);
        }
        if entry.sessions.is_empty() {
            let (shard, sight) = (entry.shard, entry.sight);
            self.users.remove(user);
            self.presence.left(user, sight, how, cluster.environment.clock.now());
            if let Some(users) = self.by_shard.get_mut(&shard) {
                users.remove(user);
                if users.is_empty() {
                    self.by_shard.remove(&shard);
                }
            }
        }
        removed
    }

    /// Users with a session.
    pub fn count(&self) -> usize {
        self.users.len()
    }

    /// Whether a user has this session.
    pub fn has_session(&self, user: &UserId, key: &SessionKey) -> bool {
        self.users.get(user).is_some_and(|user| user.sessions.iter().any(|live| live.key == *key))
    }

    /// What others see of a user with sessions.
    pub fn sight(&mut self, user: &UserId) -> Option<&mut Sight> {
        self.users.get_mut(user).map(|user| &mut user.sight)
    }

    /// Sessions at a gateway.
    pub fn on_gateway(&self, gateway: &InstanceId) -> u64 {
        self.on_gateways.get(gateway).copied().unwrap_or(0)
    }

    /// The sessions of a user.
    pub fn live(&self, user: &UserId) -> &[Live] {
        self.users.get(user).map_or(&[], |entry| &entry.sessions)
    }

    /// The sessions of a user, to note something of them.
    pub fn live_mut(&mut self, user: &UserId) -> &mut [Live] {
        self.users.get_mut(user).map_or(&mut [], |entry| &mut entry.sessions)
    }

    /// Users with their sessions, in order, behind one of them.
    pub fn live_after(&self, after: Option<&UserId>) -> impl Iterator<Item = (&UserId, &[Live])> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.users.range::<UserId, _>((from, Bound::Unbounded)).map(|(user, entry)| (user, &entry.sessions[..]))
    }

    /// The same, of each session how routers name it.
    pub fn after(&self, after: Option<&UserId>) -> impl Iterator<Item = (&UserId, impl Iterator<Item = &SessionKey>)> {
        self.live_after(after).map(|(user, sessions)| (user, sessions.iter().map(|live| &live.key)))
    }

    fn of_shard(&self, shard: ShardId) -> impl Iterator<Item = &UserSessions> {
        self.by_shard.get(&shard).into_iter().flatten().filter_map(|user| self.users.get(user))
    }
}

fn one_less(on_gateways: &mut BTreeMap<InstanceId, u64>, gateway: &InstanceId) {
    if let Some(count) = on_gateways.get_mut(gateway) {
        *count -= 1;
        if *count == 0 {
            on_gateways.remove(gateway);
        }
    }
}

impl Worker {
    /// A client has presented a token: verify it, apply the device policy, record the session, then let it in.
    pub fn open_session(&mut self, link: Arc<GatewayLink>, open: &v1::SessionOpen, token: &Unverified) {
        let context = &mut self.context;
        let now = context.cluster.environment.clock.now();
        let caller = context.cluster.verifier.verify_read(token, now).map(|verified| Caller {
            self_id: context.cluster.config.cluster_secret.self_id(&verified.user),
            user: verified.user,
            device: verified.device,
            platform: verified.platform,
            session: Some(SessionKey { gateway: link.instance.clone(), session: SessionId(open.session_id) }),
            gateway_boot: link.boot,
            expires_at: verified.expires_at,
            opened_at: Timestamp::from_millis(open.opened_at_ms),
        });
        let caller = match caller {
            Ok(caller) => Arc::new(Caller { platform: context.users.platforms.shared(caller.platform), ..caller }),
            Err(error) => return refuse(&link, open.session_id, &error),
        };
        if !link.admit_session(caller.clone()) {
            // Its client is gone already; the gateway wants no answer.
            return;
        }
        let recorded = context.record(&caller, Arrival::Opened);
        if recorded != Recorded::Kept {
            link.forget_opened(&caller);
            // One that is outdated belongs to a connection that its client has left, unless a clock was set back: then it may try again.
            let outdated = recorded == Recorded::Outdated;
            let status = if outdated { unavailable() } else { StatusCode::Overloaded.to_status() };
            let refused = v1::SessionRefused { session_id: open.session_id, status: Some(status) };
            return link.send(vec![v1::RouterMessage { message: Some(ToGateway::Refused(refused)) }]);
        }
        context.users.devices.opened(&caller, open, now);
        // The session is recorded: whatever is committed from now on is pushed to it, so the version may be read afterwards.
        let (sender, receiver) = oneshot::channel();
        let query = HeadsQuery {
            user: caller.user.clone(),
            conversations: vec![caller.self_id],
            details: false,
            subscribe: false,
        };
        self.heads(query, ReplyTo::Task(sender));
        self.context.then(receiver, move |worker, answer| {
            let head = match answer {
                Ok(Ok(AnswerValue::Heads(heads))) => heads.into_iter().find(|head| !head.unavailable),
                _ => None,
            };
            match head {
                // The user's shard has moved during the handshake: the session was closed here, and perhaps opened or announced again.
                // That is not this open's affair.
                _ if !link.is_as_opened(&caller) => {}
                Some(head) => worker.context.let_in(&caller, head.head),
                None => worker.context.turn_away(&link, &caller),
            }
        });
    }
}

fn refuse(link: &GatewayLink, session_id: u64, error: &TokenError) {
    tracing::debug!(%error, "a token was refused");
    link.forget_opening(SessionId(session_id));
    let refused = v1::SessionRefused { session_id, status: Some(error.status().to_status()) };
    link.send(vec![v1::RouterMessage { message: Some(ToGateway::Refused(refused)) }]);
}

impl Context {
    /// Records a session and ends those that it takes the place of. A session of the same device that was opened later stays: a
    /// Hello may be slow on its way, and after a move the gateways announce in any order, among them sessions whose clients have
    /// long come back elsewhere. The same holds for two devices of an exclusive platform of which one is announced.
    fn record(&mut self, caller: &Caller, arrival: Arrival) -> Recorded {
        let Some(key) = caller.session.clone() else { return Recorded::Refused };
        let gateway = key.gateway.clone();
        let shard = self.cluster.shard_of(&caller.self_id);
        let user = self.users.entry(&caller.user, shard);
        let exclusive = EXCLUSIVE_PLATFORMS.contains(&caller.platform.as_str());
        let is_newer = |live: &&Live| live.key != key && live.opened_at > caller.opened_at;
        let has_place = |live: &&Live| {
            let is_same = exclusive && arrival == Arrival::Announced && live.platform == caller.platform;
            live.device == caller.device || is_same
        };
        if let Some(newer) = user.sessions.iter().filter(has_place).find(is_newer) {
            return if newer.device == caller.device { Recorded::Outdated } else { Recorded::Displaced };
        }
        let replaces =
            |live: &mut Live| live.device == caller.device || (exclusive && live.platform == caller.platform);
        let replaced: Vec<Live> = user.sessions.extract_if(.., replaces).collect();
        for live in &replaced {
            let audiences = &self.cluster.audiences;
            user.following.keys().for_each(|id| audiences.remove(&self.cluster, id, &caller.user, &live.key));
        }
        let room = user.sessions.len() < self.cluster.config.sessions_per_user_max;
        if room {
            user.following.keys().for_each(|id| self.cluster.audiences.add(id, &caller.user, &key));
            let (device, platform, opened_at) = (caller.device.clone(), caller.platform.clone(), caller.opened_at);
            let before = replaced.iter().find(|live| live.device == device);
            let stored_at = before.map_or(Timestamp::default(), |live| live.stored_at);
            // Nearly everybody has one: a list that grows by itself would begin with four.
            user.sessions.reserve_exact(1);
            user.sessions.push(Live { key, device, platform, opened_at, stored_at });
            self.cluster.metrics.sessions.increment(1.0);
        }
        self.cluster.metrics.sessions.decrement(replaced.len() as f64);
        let now = self.cluster.environment.clock.now();
        for live in &replaced {
            if caller.session.as_ref() != Some(&live.key) {
                self.cluster.watches.forget(&self.cluster, &live.key);
            }
            one_less(&mut self.users.on_gateways, &live.key.gateway);
            self.users.shedding.forget(&live.key, Instant::now());
            if live.device != caller.device {
                self.users.devices.left(&caller.user, live, now);
            }
        }
        if room {
            self.users.presence.came(&caller.user);
            *self.users.on_gateways.entry(gateway).or_insert(0) += 1;
        }
        // One that is announced again has taken its own place.
        for live in replaced.iter().filter(|live| caller.session.as_ref() != Some(&live.key)) {
            // Which of two announced sessions of one device its client has left only clocks tell: whoever is wronged may come back.
            let may_come_back = live.device == caller.device && arrival == Arrival::Announced;
            self.kick(&live.key, if may_come_back { StatusCode::TimedOut } else { StatusCode::KickedByAnotherDevice });
        }
        if room { Recorded::Kept } else { Recorded::Refused }
    }

    fn let_in(&mut self, caller: &Caller, sync_version: u64) {
        let Some(key) = &caller.session else { return };
        let identity = caller.to_identity();
        let capability = Some(self.cluster.config.router_secret.capability(&identity));
        let opened = v1::SessionOpened {
            session_id: key.session.0,
            identity: Some(identity),
            capability,
            sync_version,
            user_sends_per_ten_seconds: self.cluster.config.user_sends_max,
            user_call_cost_per_ten_seconds: self.cluster.config.user_call_cost_max,
        };
        self.tell_session(key, ToGateway::Opened(opened));
    }

    fn turn_away(&mut self, link: &GatewayLink, caller: &Arc<Caller>) {
        let Some(key) = caller.session.as_ref().filter(|_| link.forget_opened(caller)) else { return };
        self.close_session(caller);
        let refused = v1::SessionRefused { session_id: key.session.0, status: Some(unavailable()) };
        self.tell_session(key, ToGateway::Refused(refused));
    }

    /// A session ended. Removal is by session, so a slow disconnect cannot remove its successor.
    pub fn close_session(&mut self, caller: &Caller) {
        let Some(key) = &caller.session else { return };
        self.end_sessions(&caller.user, Departure::Left, |live| live.key == *key);
    }

    /// Sessions of a user are over.
    pub fn end_sessions(&mut self, user: &UserId, how: Departure, over: impl Fn(&Live) -> bool) {
        let removed = self.users.remove(&self.cluster, user, how, over);
        self.cluster.metrics.sessions.decrement(removed.len() as f64);
        if how != Departure::Moved {
            let now = self.cluster.environment.clock.now();
            removed.iter().for_each(|live| self.users.devices.left(user, live, now));
        }
    }

    /// A session that another owner registered before the shard moved here. Pushes may have been lost on the way.
    pub fn announce_session(&mut self, caller: Arc<Caller>) {
        let Some(key) = &caller.session else { return };
        if self.users.devices.is_kicked(&caller.user, &caller.device) {
            // It was on its way here when another device of the user ended it.
            return self.kick(key, StatusCode::KickedByAnotherDevice);
        }
        match self.record(&caller, Arrival::Announced) {
            Recorded::Kept => self.resync(&key.gateway.clone(), vec![key.session.0]),
            // It gets no pushes here: its client, if there still is one, has to come again.
            Recorded::Outdated | Recorded::Refused => self.come_again(&caller),
            Recorded::Displaced => self.kick(key, StatusCode::KickedByAnotherDevice),
        }
    }

    /// Ends a session that is not recorded; its client may connect again.
    pub fn come_again(&mut self, caller: &Caller) {
        if let Some(key) = &caller.session {
            self.kick(key, StatusCode::TimedOut);
        }
    }

    /// Ends a session.
    pub fn kick(&mut self, key: &SessionKey, why: StatusCode) {
        let status = Some(why.to_status());
        self.tell_session(key, ToGateway::Kick(v1::SessionKick { session_id: key.session.0, status }));
    }

    /// A token for a session that lives: same user and device, a later expiry.
    pub fn renew_session(&mut self, link: &Arc<GatewayLink>, caller: &Caller, token: &str) {
        let Some(key) = &caller.session else { return };
        let verified = self.cluster.verifier.verify(token, self.cluster.environment.clock.now());
        let (status, caller) = match verified {
            Ok(verified) if verified.user == caller.user && verified.device == caller.device => {
                (None, Caller { expires_at: verified.expires_at, ..caller.clone() })
            }
            Ok(_) => (Some(StatusCode::Forbidden.to_status()), caller.clone()),
            Err(error) => (Some(error.status().to_status()), caller.clone()),
        };
        let identity = caller.to_identity();
        let capability = Some(self.cluster.config.router_secret.capability(&identity));
        let renewed = v1::SessionRenewed { session_id: key.session.0, status, identity: Some(identity), capability };
        self.tell_session(key, ToGateway::Renewed(renewed));
        link.renew_session(Arc::new(caller));
    }

    /// Pushes frames to live sessions. What cannot reach its users any more, because their shard has moved, ends in a resync.
    pub fn take_delivery(&mut self, delivery: &Delivery) {
        for (shard, _) in delivery.spans.iter().filter(|(shard, _)| !self.shards.takes_pushes(*shard)) {
            self.cluster.push_lost(*shard);
        }
        self.deliver(delivery);
    }

    /// Pushes frames to the live sessions of some users: one message for each gateway.
    fn deliver(&mut self, delivery: &Delivery) {
        let mut by_gateway: BTreeMap<&InstanceId, Vec<u64>> = BTreeMap::new();
        for user in delivery.users.iter() {
            let Some(user) = self.users.users.get(user) else { continue };
            for live in &user.sessions {
                if delivery.except.as_ref() != Some(&live.key) {
                    by_gateway.entry(&live.key.gateway).or_default().push(live.key.session.0);
                }
            }
        }
        for (gateway, session_ids) in by_gateway {
            self.cluster.metrics.deliveries.increment(session_ids.len() as u64);
            let deliver = v1::Deliver { frame: delivery.frames.clone(), session_ids };
            let message = v1::RouterMessage { message: Some(ToGateway::Deliver(deliver)) };
            match self.outgoing.get_mut(gateway) {
                Some(messages) => messages.push(message),
                None => {
                    self.outgoing.insert(gateway.clone(), vec![message]);
                }
            }
        }
    }

    /// Pushes for a shard's users may have been lost: all their sessions sync. Several routers may say so of several pushes: until
    /// the next tick that makes one resync.
    pub fn resync_shard(&mut self, shard: ShardId) {
        self.users.to_resync.insert(shard);
    }

    /// Tells the sessions to sync whose shards were named since the last time.
    pub fn flush_resyncs(&mut self) {
        let shards = std::mem::take(&mut self.users.to_resync);
        if shards.is_empty() {
            return;
        }
        let mut by_gateway: BTreeMap<InstanceId, Vec<u64>> = BTreeMap::new();
        for user in shards.iter().flat_map(|shard| self.users.of_shard(*shard)) {
            for live in &user.sessions {
                by_gateway.entry(live.key.gateway.clone()).or_default().push(live.key.session.0);
            }
        }
        for (gateway, session_ids) in by_gateway {
            self.resync(&gateway, session_ids);
        }
    }

    /// Tells a user's sessions to sync.
    pub fn resync_user(&mut self, user: &UserId) {
        let Some((_, sessions)) = self.users.following(user) else { return };
        let keys: Vec<SessionKey> = sessions.cloned().collect();
        for key in keys {
            self.resync(&key.gateway, vec![key.session.0]);
        }
    }

    fn resync(&mut self, gateway: &InstanceId, session_ids: Vec<u64>) {
        let spread_ms = u32::try_from(self.cluster.config.resync_spread.as_millis()).unwrap_or(u32::MAX);
        let resync = Some(v1::Resync { reason: v1::ResyncReason::OwnerMoved.into(), spread_ms });
        let message = ToGateway::Resync(v1::SessionsResync { session_ids, resync });
        self.outgoing.entry(gateway.clone()).or_default().push(v1::RouterMessage { message: Some(message) });
    }

    /// A shard's users are another owner's now.
    pub fn forget_users_of(&mut self, shard: ShardId) {
        let users: Vec<UserId> = self.users.by_shard.get(&shard).into_iter().flatten().cloned().collect();
        users.iter().for_each(|user| self.end_sessions(user, Departure::Moved, |_| true));
        self.users.presence.shard_ends(shard);
        self.users.devices.forget(shard);
    }

    /// The users with their sessions, and which of these their gateway's link does not know.
    pub fn describe_sessions(&self) -> Vec<String> {
        let links = self.cluster.links.read();
        let in_words = |live: &Live| {
            let link = links.get(&live.key.gateway);
            let is_known = link.is_some_and(|link| link.session(live.key.session).is_some());
            let (gateway, session) = (&live.key.gateway, live.key.session.0);
            format!(" {gateway}/{session}{}", if is_known { "" } else { " (not known to the link)" })
        };
        let users = self.users.users.iter();
        users.map(|(id, user)| format!("{id}:{}", user.sessions.iter().map(in_words).collect::<String>())).collect()
    }

    /// A gateway is no longer registered, or its link has lost what it said: its sessions are gone, in the latter case until it says
    /// again which live.
    pub fn gateway_gone(&mut self, gateway: &InstanceId) {
        self.outgoing.remove(gateway);
        self.shards.forget_early(|early| early.session.as_ref().is_some_and(|key| key.gateway == *gateway));
        let is_there = |live: &Live| live.key.gateway == *gateway;
        let users = self.users.users.iter().filter(|(_, user)| user.sessions.iter().any(is_there));
        let users: Vec<UserId> = users.map(|(user, _)| user.clone()).collect();
        let lives = self.cluster.links.read().contains_key(gateway);
        let how = if lives { Departure::Left } else { Departure::Lost };
        users.iter().for_each(|user| self.end_sessions(user, how, is_there));
    }
}
