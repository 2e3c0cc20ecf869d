//! A user's devices: which there are, which are connected, and the end of the session of one of them.
//!
//! Who is connected the owner of the user's sessions knows from memory. What outlives a session is a row for each device ([`rows`]). Rows
//! are written behind, and never at the rate at which clients come and go: what was seen waits in memory, once for each device, and each
//! worker reads and writes the rows of at most [`USERS_A_BATCH`] users at a time, one batch in a tick of half a second at most. A row that
//! says nothing new is written once in ten minutes at most. So a storm of connections is a trickle of writes; what the list shows does not
//! wait for it.

mod rows;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use im_proto::{ConversationId, DeviceId, ShardId, StatusCode, Timestamp, UserId, limits, method::Method, v1};
use im_storage::{StateRow, StoreError, Table};
use prost::Message as _;
use tokio::time::Instant;

use self::rows::{CONNECTED_FOR, LEFT_FOR, Rows, Sighting, is_old};
use super::{Context, presence::Departure, sessions::Live};
use crate::{
    caller::{Caller, SessionKey},
    deadline::StoreCalls,
    message::{AnswerValue, Call, ReplyTo},
};

/// Users whose rows are read and written at a time: 256 a second for each worker.
const USERS_A_BATCH: usize = 128;
/// Users of whom something waits that are looked at for one batch; some may be of shards that are gone.
const LOOKED_AT_MAX: usize = 1_024;
/// Partitions that are read at a time.
const READS_AT_A_TIME: usize = 8;
/// Users of whom something waits. Beyond it what is seen is not noted: a device that stays connected is noticed in the next round, only
/// without the name of its client.
const WAITING_MAX: usize = 65_536;
/// In so many ticks the rows of everybody who is connected are looked at for their age: six minutes.
const TICKS_A_ROUND: usize = 720;
/// After a batch that could not be read or stored.
const PAUSE: Duration = Duration::from_secs(5);
/// A session of a device that was kicked is not let in by announcement for so long: it was opened before, and its gateway's word that it
/// is there crossed ours that it is not.
const KICK_HOLDS: Duration = Duration::from_secs(600);
/// Kicks that are remembered. Beyond it one is not: a session that is announced later stays.
const KICKS_MAX: usize = 4_096;

/// What was seen of the devices of one user. Nearly always it is one, and a storm of connects leaves one for each user: the first leaf of a
/// map would have room for eleven.
type Seen = Vec<(DeviceId, Sighting)>;

/// What a worker knows of devices besides their sessions and their rows.
#[derive(Default)]
pub struct Devices {
    /// What was seen and is not stored.
    waiting: BTreeMap<UserId, Seen>,
    /// The same users, in the order in which they came.
    queue: VecDeque<UserId>,
    /// What is being stored.
    writing: BTreeMap<UserId, Seen>,
    /// The store failed: not before this.
    not_before: Option<Instant>,
    /// Where the round goes on.
    after: Option<UserId>,
    kicks: BTreeMap<(UserId, DeviceId), Kick>,
}

struct Kick {
    shard: ShardId,
    until: Instant,
}

/// A user whose rows are read.
struct Job {
    user: UserId,
    self_id: ConversationId,
    seen: Seen,
    connected: BTreeSet<DeviceId>,
}

/// When the devices of users were seen last, as their rows say now.
type Stored = Vec<(UserId, BTreeMap<DeviceId, Timestamp>)>;

impl Devices {
    /// A client has said Hello and is let in.
    pub fn opened(&mut self, caller: &Caller, open: &v1::SessionOpen, now: Timestamp) {
        if !self.kicks.is_empty() {
            self.kicks.remove(&(caller.user.clone(), caller.device.clone()));
        }
        let text =
            |text: &str| if text.len() > limits::CLIENT_TEXT_BYTES_MAX { String::new() } else { text.to_owned() };
        let client = Some((text(&open.client_name), text(&open.client_version)));
        let sighting = Sighting { client, ..Sighting::at(caller.platform.clone(), now) };
        self.seen(&caller.user, &caller.device, sighting);
    }

    /// The session of a device is over.
    pub fn left(&mut self, user: &UserId, live: &Live, now: Timestamp) {
        if is_old(live.stored_at, now, LEFT_FOR) {
            self.seen(user, &live.device, Sighting::at(live.platform.clone(), now));
        }
    }

    /// Whether the sessions that a device had are over, although somebody may announce one.
    pub fn is_kicked(&self, user: &UserId, device: &DeviceId) -> bool {
        !self.kicks.is_empty() && self.kicks.contains_key(&(user.clone(), device.clone()))
    }

    /// A shard's users are another owner's now.
    pub fn forget(&mut self, shard: ShardId) {
        // What waits is dropped when its turn comes.
        self.kicks.retain(|_, kick| kick.shard != shard);
    }

    fn seen(&mut self, user: &UserId, device: &DeviceId, sighting: Sighting) {
        if let Some(seen) = self.waiting.get_mut(user) {
            add(seen, device, sighting);
        } else if self.waiting.len() < WAITING_MAX {
            self.queue.push_back(user.clone());
            self.waiting.insert(user.clone(), vec![(device.clone(), sighting)]);
        }
    }

    /// What could not be stored waits again, under what was seen since.
    fn seen_before(&mut self, user: &UserId, seen: Seen) {
        let later = self.waiting.get_mut(user).map(std::mem::take).unwrap_or_default();
        for (device, sighting) in seen.into_iter().chain(later) {
            self.seen(user, &device, sighting);
        }
    }

    /// What was seen of a user's devices and is not stored, the older first.
    fn unstored(&self, user: &UserId) -> impl Iterator<Item = (&DeviceId, &Sighting)> {
        let lists = [self.writing.get(user), self.waiting.get(user)];
        lists.into_iter().flatten().flatten().map(|(device, sighting)| (device, sighting))
    }
}

fn add(seen: &mut Seen, device: &DeviceId, sighting: Sighting) {
    if let Some((_, known)) = seen.iter_mut().find(|(known, _)| known == device) {
        known.merge(sighting);
    } else if seen.len() < limits::DEVICES_MAX {
        seen.push((device.clone(), sighting));
    }
}

impl Context {
    /// Notices devices whose rows are old, and stores some of what waits.
    pub fn look_after_devices(&mut self) {
        let now = self.now();
        self.users.devices.kicks.retain(|_, kick| kick.until > now);
        self.notice_old_rows();
        self.write_devices(now);
    }

    fn notice_old_rows(&mut self) {
        let now = self.cluster.environment.clock.now();
        let count = self.users.count().div_ceil(TICKS_A_ROUND);
        let after = self.users.devices.after.take();
        let (mut last, mut old) = (None, Vec::new());
        for (user, sessions) in self.users.live_after(after.as_ref()).take(count) {
            let of_old_rows = sessions.iter().filter(|live| is_old(live.stored_at, now, CONNECTED_FOR));
            old.extend(of_old_rows.map(|live| (user.clone(), live.device.clone(), live.platform.clone())));
            last = Some(user);
        }
        self.users.devices.after = last.cloned();
        for (user, device, platform) in old {
            self.users.devices.seen(&user, &device, Sighting::at(platform, now));
        }
    }

    fn write_devices(&mut self, now: Instant) {
        let devices = &self.users.devices;
        if !devices.writing.is_empty() || devices.not_before.is_some_and(|at| at > now) {
            return;
        }
        let mut batch = Vec::new();
        for _ in 0..LOOKED_AT_MAX {
            let Some(user) = self.users.devices.queue.pop_front() else { break };
            let Some(seen) = self.users.devices.waiting.remove(&user) else { continue };
            let self_id = self.cluster.config.cluster_secret.self_id(&user);
            // Of a user whose shard went elsewhere the new owner writes.
            if self.shards.is_active(self.cluster.shard_of(&self_id)) {
                let connected = self.users.live(&user).iter().map(|live| live.device.clone()).collect();
                batch.push(Job { user, self_id, seen, connected });
            }
            if batch.len() == USERS_A_BATCH {
                break;
            }
        }
        let queue = &mut self.users.devices.queue;
        if queue.is_empty() {
            // What a storm of connects took is given back.
            queue.shrink_to_fit();
        }
        if batch.is_empty() {
            return;
        }
        self.users.devices.writing = batch.iter().map(|job| (job.user.clone(), job.seen.clone())).collect();
        let written = self.cluster.metrics.devices_written.clone();
        let task = store_devices(self.store.clone(), batch);
        self.then(task, move |worker, outcome| {
            let outcome = outcome.map(|(stored, rows)| {
                written.increment(rows);
                stored
            });
            worker.context.devices_stored(outcome);
        });
    }

    fn devices_stored(&mut self, outcome: Result<Stored, StoreError>) {
        let writing = std::mem::take(&mut self.users.devices.writing);
        match outcome {
            Ok(stored) => {
                for (user, devices) in stored {
                    for live in self.users.live_mut(&user) {
                        live.stored_at = devices.get(&live.device).copied().unwrap_or(live.stored_at);
                    }
                }
            }
            Err(error) => {
                tracing::warn!(%error, users = writing.len(), "devices could not be stored; they are tried again");
                self.users.devices.not_before = Some(self.now() + PAUSE);
                for (user, seen) in writing {
                    self.users.devices.seen_before(&user, seen);
                }
            }
        }
    }

    /// A call about the caller's own devices. It needs none of the user's conversations.
    pub fn device_call(&mut self, call: Call, reply_to: ReplyTo) {
        self.cluster.metrics.calls.increment(1);
        let to_kick = match call.method {
            Method::DeviceKick => v1::DeviceKickRequest::decode(call.request.clone())
                .ok()
                .and_then(|request| DeviceId::parse(&request.device_id).ok())
                .map(Some),
            _ => v1::DeviceListRequest::decode(call.request.clone()).ok().map(|_| None),
        };
        let Some(to_kick) = to_kick else {
            self.cluster.metrics.calls_refused.increment(1);
            return self.cluster.answer(reply_to, Err(StatusCode::Malformed.to_status()));
        };
        let (store, caller) = (self.store.clone(), call.caller);
        let is_known = to_kick.as_ref().is_some_and(|device| self.knows_device(&caller.user, device));
        let (fence, self_id) = (self.past_lease().then(|| self.fence.clone()), caller.self_id);
        let read = async move {
            if let Some(fence) = fence
                && !fence.clean().await
            {
                return None;
            }
            // A session ends also while the tables cannot be read.
            if is_known { Some(Vec::new()) } else { read_rows(&store, &self_id).await.ok() }
        };
        self.then(read, move |worker, rows| {
            let context = &mut worker.context;
            let is_owner = context.shards.is_active(context.cluster.shard_of(&self_id));
            let Some(rows) = rows.filter(|_| is_owner) else { return context.refuse(reply_to) };
            let rows = Rows::of(&rows);
            match to_kick {
                None => {
                    let devices = context.list_devices(&caller, &rows);
                    let reply = v1::DeviceListReply { devices }.encode_to_vec();
                    context.cluster.answer(reply_to, Ok(AnswerValue::Reply(reply.into())));
                }
                Some(device) if is_known || rows.has(&device) || context.knows_device(&caller.user, &device) => {
                    context.kick_device(&caller, device, reply_to);
                }
                Some(_) => context.cluster.answer(reply_to, Err(StatusCode::NotFound.to_status())),
            }
        });
    }

    /// Whether a user has a device, as far as memory tells.
    fn knows_device(&self, user: &UserId, device: &DeviceId) -> bool {
        let is_live = self.users.live(user).iter().any(|live| live.device == *device);
        is_live || self.users.devices.unstored(user).any(|(seen, _)| seen == device)
    }

    /// What is stored, what is not stored yet, and who is connected now.
    fn list_devices(&self, caller: &Caller, rows: &Rows) -> Vec<v1::Device> {
        let now = self.cluster.environment.clock.now().as_millis();
        let mut devices = rows.show();
        for (device, sighting) in self.users.devices.unstored(&caller.user) {
            sighting.show(devices.entry(device.clone()).or_default());
        }
        for live in self.users.live(&caller.user) {
            let device = devices.entry(live.device.clone()).or_default();
            device.platform = live.platform.to_string();
            (device.connected, device.last_seen_ms) = (true, now);
        }
        let mut list: Vec<v1::Device> = devices
            .into_iter()
            .map(|(id, device)| v1::Device {
                device_id: id.to_string(),
                last_seen_ms: device.last_seen_ms.min(now),
                current: id == caller.device,
                ..device
            })
            .collect();
        list.sort_by_key(|device| std::cmp::Reverse((device.connected, device.last_seen_ms)));
        list.truncate(limits::DEVICES_MAX);
        list
    }

    fn kick_device(&mut self, caller: &Caller, device: DeviceId, reply_to: ReplyTo) {
        let user = &caller.user;
        let of_device = self.users.live(user).iter().filter(|live| live.device == device);
        let keys: Vec<SessionKey> = of_device.map(|live| live.key.clone()).collect();
        // First the answer: it may be for the very session that ends.
        let reply = v1::DeviceKickReply { was_connected: !keys.is_empty() }.encode_to_vec();
        self.cluster.answer(reply_to, Ok(AnswerValue::Reply(reply.into())));
        self.end_sessions(user, Departure::Left, |live| live.device == device);
        self.cluster.metrics.devices_kicked.increment(keys.len() as u64);
        for key in keys {
            self.kick(&key, StatusCode::KickedByAnotherDevice);
        }
        let kick = Kick { shard: self.cluster.shard_of(&caller.self_id), until: self.now() + KICK_HOLDS };
        let kicks = &mut self.users.devices.kicks;
        let named = (user.clone(), device);
        if kicks.len() < KICKS_MAX || kicks.contains_key(&named) {
            kicks.insert(named, kick);
        }
    }
}

async fn read_rows(store: &StoreCalls, self_id: &ConversationId) -> Result<Vec<StateRow>, StoreError> {
    store.scan(Table::Devices, self_id.as_bytes(), None, limits::DEVICES_MAX).await
}

/// Reads the rows of some users, and writes those that are called for. How many these were.
async fn store_devices(store: StoreCalls, batch: Vec<Job>) -> Result<(Stored, u64), StoreError> {
    let plan = |job: Job| {
        let store = &store;
        async move {
            let rows = match read_rows(store, &job.self_id).await {
                // One user's damage must not keep the others waiting for ever.
                Err(StoreError::Damaged(error)) => {
                    tracing::error!(user = %job.user, error, "the devices of a user cannot be read");
                    return Ok(((job.user, BTreeMap::new()), Vec::new()));
                }
                rows => rows?,
            };
            let mut rows = Rows::of(&rows);
            let see = |(device, seen): &(DeviceId, Sighting)| rows.see(&job.self_id, device, seen, &job.connected);
            let writes: Vec<_> = job.seen.iter().filter_map(see).collect();
            let last_seen = |device: &DeviceId| Some((device.clone(), rows.last_seen(device)?));
            let stored: BTreeMap<DeviceId, Timestamp> =
                job.seen.iter().map(|(device, _)| device).filter_map(last_seen).collect();
            Ok::<_, StoreError>(((job.user, stored), writes))
        }
    };
    let plans: Vec<_> = stream::iter(batch.into_iter().map(plan)).buffered(READS_AT_A_TIME).try_collect().await?;
    let (stored, writes): (Stored, Vec<_>) = plans.into_iter().unzip();
    let writes: Vec<_> = writes.into_iter().flatten().collect();
    let count = writes.len() as u64;
    if count > 0 {
        store.write(writes).await?;
    }
    Ok((stored, count))
}
