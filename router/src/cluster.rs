//! What all parts of a router share: who owns which shard, the workers, links to gateways and other routers, answers awaited.

pub mod arrivals;
mod owners;

pub use owners::Owners;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use im_proto::{ConversationId, Epoch, InstanceId, ShardId, UserId, environment::Environment, token::Verifier, v1};
use im_registry::{Role, View};
use im_storage::{Hot, MemoryHot};
use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};

use crate::{
    audience::{AudiencePush, Audiences},
    config::RouterConfig,
    gateway_link::GatewayLink,
    message::{Answer, AnswerValue, AudienceDelivery, Delivery, ReplyTo, ShardMessage, unavailable},
    metrics::Metrics,
    peer_link::PeerLink,
    placement::Load,
    user_limits::UserLimits,
    watches::Watches,
    worker::{
        Worker,
        input::{GatewayInput, Input},
        presence::Turns,
    },
};

/// Why a router ended by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Another router fenced this one, or the generation was raised. Start again under a new instance id.
    Fenced,
    /// The registry says that the lease is dead. Start again under a new instance id.
    LeaseLost,
    /// The store has stopped; a restart recovers what it acknowledged.
    StoreStopped(String),
}

/// Messages of gateways that wait for this router's workers. Beyond it links are not read, so that gateways keep what their clients
/// send (256 a session) and then answer `overloaded`.
const GATEWAY_BACKLOG_MAX: usize = 65_536;

/// An inbox within one router. It has no bound of its own, because its senders must not wait for each other: what fills it is bounded
/// where it enters (the backlog of gateways, calls a session, queues of peer links) and by what is under way (batches, opens).
#[allow(clippy::disallowed_methods, reason = "bounded where it is filled; see above")]
pub fn inbox<T>() -> (mpsc::UnboundedSender<T>, mpsc::UnboundedReceiver<T>) {
    mpsc::unbounded_channel()
}

struct Awaited {
    reply_to: ReplyTo,
    router: InstanceId,
    deadline: Instant,
}

/// The shared part of a router.
pub struct Cluster {
    pub config: RouterConfig,
    pub environment: Environment,
    pub verifier: Verifier,
    pub metrics: Metrics,
    /// Hints that may vanish at any time: presence, counts for limits.
    pub hot: Hot,
    pub user_limits: UserLimits,
    owners: RwLock<Arc<Owners>>,
    /// For placement: the newest view.
    view: RwLock<Arc<View>>,
    workers: Vec<mpsc::UnboundedSender<Input>>,
    /// Who at this router follows which large conversation.
    pub audiences: Audiences,
    /// Who at this router watches the presence of whom.
    pub watches: Watches,
    /// Bounds the lists that are read to decide who may know of whom.
    pub turns: Turns,
    pub links: RwLock<BTreeMap<InstanceId, Arc<GatewayLink>>>,
    pub peers: RwLock<BTreeMap<InstanceId, Arc<PeerLink>>>,
    /// Links that other routers have dialled: their requests come in and our answers go out on these.
    pub incoming_peers: Mutex<BTreeMap<InstanceId, Arc<PeerLink>>>,
    awaited: Mutex<BTreeMap<u64, Awaited>>,
    next_request: AtomicU64,
    /// The claim under which live pushes were last sent to a shard's owner, `None` if there was no owner to send them to.
    pushed_under: Mutex<BTreeMap<ShardId, Option<Epoch>>>,
    gateway_backlog: AtomicUsize,
    gateway_room: Notify,
    ended: watch::Sender<Option<Ended>>,
}

impl Cluster {
    pub fn new(config: RouterConfig, environment: Environment, workers: Vec<mpsc::UnboundedSender<Input>>) -> Self {
        let verifier =
            Verifier::new(&config.verify_keys, &config.issuer, &config.cluster_id, config.token_lifetime_max);
        let hot = config.hot.clone().unwrap_or_else(|| MemoryHot::new(&environment).into());
        Self {
            verifier,
            metrics: Metrics::new(),
            user_limits: UserLimits::new(config.user_sends_max, config.user_call_cost_max),
            hot,
            owners: RwLock::default(),
            view: RwLock::default(),
            workers,
            audiences: Audiences::new(),
            watches: Watches::default(),
            turns: Turns::default(),
            links: RwLock::default(),
            peers: RwLock::default(),
            incoming_peers: Mutex::default(),
            awaited: Mutex::default(),
            next_request: AtomicU64::new(1),
            pushed_under: Mutex::default(),
            gateway_backlog: AtomicUsize::new(0),
            gateway_room: Notify::new(),
            ended: watch::Sender::new(None),
            config,
            environment,
        }
    }

    /// Ends this router: nothing is acknowledged from now on.
    pub fn end(&self, why: Ended) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                tracing::error!(?why, instance = %self.config.instance, "the router ends");
                *ended = Some(why);
            }
            first
        });
        self.stop_workers();
    }

    /// Workers end with their turn; what they had not committed is dropped.
    pub fn stop_workers(&self) {
        self.to_all_workers(|| Input::Stop);
    }

    /// Tells why the router ended by itself, once it has.
    pub fn ended(&self) -> watch::Receiver<Option<Ended>> {
        self.ended.subscribe()
    }

    /// Who owns the shards now.
    pub fn owners(&self) -> Arc<Owners> {
        self.owners.read().clone()
    }

    /// The newest view of the registry.
    pub fn view(&self) -> Arc<View> {
        self.view.read().clone()
    }

    /// What gateways said of themselves in the last seconds.
    pub fn gateway_loads(&self) -> BTreeMap<InstanceId, Load> {
        let links = self.links.read();
        links.iter().filter_map(|(gateway, link)| Some((gateway.clone(), link.load()?))).collect()
    }

    /// The shard of a conversation.
    pub fn shard_of(&self, conversation: &ConversationId) -> ShardId {
        self.config.shards.shard_of(conversation)
    }

    /// The shard of a user: that of the self log.
    pub fn shard_of_user(&self, user: &UserId) -> ShardId {
        self.shard_of(&self.config.cluster_secret.self_id(user))
    }

    /// The worker that owns a shard on this router.
    pub fn worker_of(&self, shard: ShardId) -> usize {
        shard.0 as usize % self.workers.len()
    }

    /// Gives an input to a worker of this router. A worker that has ended drops it, and with it any answer.
    pub fn to_worker(&self, worker: usize, input: Input) {
        if let Some(worker) = self.workers.get(worker) {
            let _ = worker.send(input);
        }
    }

    /// Gives messages of a gateway to a worker.
    pub fn gateway_to_worker(&self, worker: usize, messages: Vec<GatewayInput>) {
        self.gateway_backlog.fetch_add(messages.len(), Ordering::Relaxed);
        self.to_worker(worker, Input::Gateway(messages));
    }

    /// A worker has taken messages of a gateway.
    pub fn gateway_taken(&self, count: usize) {
        let before = self.gateway_backlog.fetch_sub(count, Ordering::Relaxed);
        if before >= GATEWAY_BACKLOG_MAX && before - count < GATEWAY_BACKLOG_MAX {
            self.gateway_room.notify_waiters();
        }
    }

    /// Waits until the workers have caught up enough to take more from gateways.
    pub async fn gateway_room(&self) {
        loop {
            let room = self.gateway_room.notified();
            if self.gateway_backlog.load(Ordering::Relaxed) < GATEWAY_BACKLOG_MAX {
                return;
            }
            room.await;
        }
    }

    /// Gives an input to all workers.
    pub fn to_all_workers(&self, input: impl Fn() -> Input) {
        for worker in &self.workers {
            let _ = worker.send(input());
        }
    }

    /// Sends a request to whoever owns a shard. The answer may be `unavailable` although the request took effect.
    pub fn send(&self, shard: ShardId, message: ShardMessage, reply_to: ReplyTo) {
        let owners = self.owners();
        match owners.get(shard) {
            Some((owner, _)) if *owner == self.config.instance => {
                self.unfollow_at_once(&message);
                self.to_worker(self.worker_of(shard), Input::Shard { shard, message, reply_to });
            }
            Some((owner, _)) => {
                if let ShardMessage::Deliver(delivery) = &message {
                    self.note_push(delivery, owner, &owners);
                }
                self.send_to_peer(owner, shard, &message, reply_to);
            }
            None => {
                if let ShardMessage::Deliver(delivery) = &message {
                    delivery.spans.iter().for_each(|(shard, _)| self.push_lost(*shard));
                }
                self.answer(reply_to, Err(unavailable()));
            }
        }
    }

    /// Remembers under which claim live pushes went to another router. Pushes to this router's own workers need no note: they are
    /// either handed to a gateway or reported by [`Self::push_lost`].
    fn note_push(&self, delivery: &Delivery, to: &InstanceId, seen: &Owners) {
        {
            let mut pushed = self.pushed_under.lock();
            for (shard, _) in delivery.spans.iter() {
                // A shard that has another owner by now is refused there, and is as good as lost here.
                let under = seen.get(*shard).filter(|(owner, _)| owner == to).map(|(_, epoch)| *epoch);
                pushed.entry(*shard).or_insert(under);
            }
        }
        let newest = self.owners();
        if newest.version != seen.version {
            // The view changed under our hands, perhaps before the note was there.
            self.resync_moved_shards(&newest);
        }
    }

    fn send_to_peer(&self, owner: &InstanceId, shard: ShardId, message: &ShardMessage, reply_to: ReplyTo) {
        let Some(peer) = self.peers.read().get(owner).cloned() else {
            let lost: &[(ShardId, u32)] = match message {
                ShardMessage::Deliver(delivery) => &delivery.spans,
                ShardMessage::ResyncShard => &[(shard, 0)],
                _ => &[],
            };
            if !lost.is_empty() {
                self.pushed_under.lock().extend(lost.iter().map(|(shard, _)| (*shard, None)));
                if self.peers.read().contains_key(owner) {
                    self.peers_added();
                }
            }
            return self.answer(reply_to, Err(unavailable()));
        };
        let request_id = match reply_to {
            ReplyTo::Nobody => 0,
            reply_to => {
                let request_id = self.next_request.fetch_add(1, Ordering::Relaxed);
                let deadline = Instant::now() + self.config.peer_timeout;
                self.awaited.lock().insert(request_id, Awaited { reply_to, router: owner.clone(), deadline });
                request_id
            }
        };
        if !peer.send(message.to_peer(shard, request_id)) {
            if let ShardMessage::Deliver(delivery) = message {
                self.metrics.deliveries_dropped.increment(delivery.users.len() as u64);
            }
            self.answered(request_id, Err(unavailable()));
        }
    }

    /// A request of another router: for one of our workers, whatever our view says. The worker refuses a shard that is not its.
    pub fn receive(&self, shard: ShardId, message: ShardMessage, reply_to: ReplyTo) {
        if shard.0 >= self.config.shards.get() {
            return self.answer(reply_to, Err(unavailable()));
        }
        self.unfollow_at_once(&message);
        if let ShardMessage::Deliver(delivery) = message {
            for (shard, delivery) in delivery.by_worker(|shard| self.worker_of(shard)) {
                let (message, reply_to) = (ShardMessage::Deliver(delivery), ReplyTo::Nobody);
                self.to_worker(self.worker_of(shard), Input::Shard { shard, message, reply_to });
            }
            return self.answer(reply_to, Ok(AnswerValue::Nothing));
        }
        self.to_worker(self.worker_of(shard), Input::Shard { shard, message, reply_to });
    }

    /// Entries of a large conversation do not go through workers: one that comes right behind this message must not reach who left.
    fn unfollow_at_once(&self, message: &ShardMessage) {
        if let ShardMessage::Unfollow(unfollow) = message {
            unfollow.users.iter().for_each(|user| self.audiences.remove_user(self, &unfollow.conversation, user));
        }
    }

    /// An answer of another router has come.
    pub fn answered(&self, request_id: u64, answer: Answer) {
        let awaited = self.awaited.lock().remove(&request_id);
        if let Some(awaited) = awaited {
            self.answer(awaited.reply_to, answer);
        }
    }

    /// Gives up on answers that are overdue, and on those of routers that are gone.
    pub fn sweep_awaited(&self) {
        let now = Instant::now();
        let overdue: Vec<Awaited> = {
            let peers = self.peers.read();
            let mut awaited = self.awaited.lock();
            let ids: Vec<u64> = awaited
                .iter()
                .filter(|(_, entry)| entry.deadline <= now || !peers.contains_key(&entry.router))
                .map(|(id, _)| *id)
                .collect();
            ids.into_iter().filter_map(|id| awaited.remove(&id)).collect()
        };
        for entry in overdue {
            self.answer(entry.reply_to, Err(unavailable()));
        }
    }

    /// Delivers an answer to whoever waits for it.
    pub fn answer(&self, reply_to: ReplyTo, answer: Answer) {
        match reply_to {
            ReplyTo::Nobody => {}
            ReplyTo::Timed(timed) => self.answer(timed.counted(&self.metrics), answer),
            ReplyTo::Task(sender) => {
                // A task that no longer waits does not want the answer.
                let _ = sender.send(answer);
            }
            ReplyTo::Session { key, request_id } => {
                if let Some(link) = self.links.read().get(&key.gateway) {
                    link.reply(key.session, request_id, answer);
                }
            }
            ReplyTo::Peer { router, request_id } => {
                let peer = self.incoming_peers.lock().get(&router).cloned();
                if let Some(peer) = peer {
                    peer.answer(request_id, answer);
                }
            }
            ReplyTo::Outbox { origin, target, origin_seq } => {
                let done = answer.is_ok();
                let worker = self.worker_of(self.shard_of(&origin));
                self.to_worker(worker, Input::EffectAnswered { origin, target, origin_seq, done });
            }
            ReplyTo::Watch { shard, users, owner } => self.watches.answered(self, shard, users, owner.as_ref(), answer),
            ReplyTo::Follow { conversation, shard, ask } => {
                let worker = self.worker_of(self.shard_of(&conversation));
                let step = move |worker: &mut Worker| worker.followed(&conversation, shard, ask, answer);
                self.to_worker(worker, Input::Run(Box::new(step)));
            }
        }
    }

    /// Sends an entry to a router that is registered with a large conversation; `false` if that router is gone.
    pub fn send_audience(&self, router: &InstanceId, shard: ShardId, delivery: &AudienceDelivery) -> bool {
        let Some(peer) = self.peers.read().get(router).cloned() else { return false };
        if !peer.send(delivery.to_peer(shard)) {
            // The link tells all its shards to resync.
            self.metrics.deliveries_dropped.increment(1);
        }
        true
    }

    /// Those who follow a large conversation at a router may have missed entries.
    pub fn resync_audience(&self, router: &InstanceId, shard: ShardId, conversation: &ConversationId) {
        if *router == self.config.instance {
            return self.audiences.resync(self, conversation);
        }
        let resync = v1::PeerAudienceResync { conversation_id: conversation.to_bytes() };
        let message = Some(v1::peer_message::Message::AudienceResync(resync));
        if let Some(peer) = self.peers.read().get(router) {
            // A full queue makes the link resync everybody there.
            peer.send(v1::PeerMessage { shard: shard.0, request_id: 0, message });
        }
    }

    /// An entry for those who follow a large conversation here, from its owner.
    pub fn receive_audience(&self, from: &InstanceId, shard: ShardId, delivery: &AudienceDelivery) {
        let AudienceDelivery { conversation, frames, last_seq, except } = delivery;
        let (conversation, last_seq) = (*conversation, *last_seq);
        let push = AudiencePush { conversation, frames, last_seq, except: except.as_ref() };
        self.audiences.push(self, &push, || {
            // Whoever begins to follow now asks for the head later than this is sent, and so is registered after it. An answer that
            // somebody follows may overtake this: it is registered after entries that the owner had sent by then.
            let gone = ShardMessage::AudienceGone { conversation, router: self.config.instance.clone(), seq: last_seq };
            if let Some(peer) = self.peers.read().get(from) {
                peer.send(gone.to_peer(shard, 0));
            }
        });
    }

    /// Takes over a new view: owners of shards, and who must be told to resync because a shard's owner changed.
    pub fn set_view(&self, view: &Arc<View>) {
        let mut owners = vec![None; self.config.shards.get() as usize];
        for (shard, claim) in &view.claims {
            if let Some(owner) = owners.get_mut(shard.0 as usize) {
                *owner = Some((claim.owner.clone(), claim.epoch));
            }
        }
        let owners = Arc::new(Owners { owners, version: view.revision });
        *self.owners.write() = owners.clone();
        *self.view.write() = view.clone();
        self.drop_dead_links(view);
        self.incoming_peers.lock().retain(|router, peer| {
            let lives = view.instances.contains_key(router);
            if !lives {
                peer.retire();
            }
            lives
        });
        self.resync_moved_shards(&owners);
    }

    fn drop_dead_links(&self, view: &View) {
        let mut dead = Vec::new();
        self.links.write().retain(|gateway, link| {
            let lives = view.instances.get(gateway).is_some_and(|instance| instance.role == Role::Gateway);
            if !lives {
                dead.push(gateway.clone());
                link.retire();
            }
            lives
        });
        for gateway in dead {
            self.to_all_workers(|| Input::GatewayGone(gateway.clone()));
        }
    }

    /// Whoever pushed to the old owner of a shard, or found none, tells the new one that pushes may have been lost.
    fn resync_moved_shards(&self, owners: &Owners) {
        let moved: Vec<ShardId> = {
            let mut pushed = self.pushed_under.lock();
            let moved: Vec<ShardId> = pushed
                .iter()
                .filter(|(shard, under)| owners.get(**shard).is_some_and(|(_, epoch)| Some(*epoch) != **under))
                .map(|(shard, _)| *shard)
                .collect();
            for shard in &moved {
                pushed.remove(shard);
            }
            moved
        };
        for shard in moved {
            self.send(shard, ShardMessage::ResyncShard, ReplyTo::Nobody);
        }
    }

    /// Pushes to a router were lost: all its users' shards must resync.
    pub fn resync_router(&self, router: &InstanceId) {
        let owners = self.owners();
        for shard in self.config.shards.shards() {
            if owners.get(shard).is_some_and(|(owner, _)| owner == router) {
                self.send(shard, ShardMessage::ResyncShard, ReplyTo::Nobody);
            }
        }
    }

    /// A live push could not be handed to the owner of a shard: the next owner must resync.
    pub fn push_lost(&self, shard: ShardId) {
        self.pushed_under.lock().insert(shard, None);
        let owners = self.owners();
        if owners.get(shard).is_some_and(|(owner, _)| *owner != self.config.instance) {
            // The next owner is known already; no view may come any more to remind us.
            self.resync_moved_shards(&owners);
        }
    }

    /// Links to more routers are there: what could not be sent for want of one is sent now.
    pub fn peers_added(&self) {
        self.resync_moved_shards(&self.owners());
    }
}
