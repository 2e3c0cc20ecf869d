//! Links between routers. A router dials every other one for its own requests; answers come back on the same link.
//!
//! What waits for a peer is bounded: beyond the bound requests are refused (the asker answers `unavailable` and retries) and live
//! pushes are dropped with a note that the shard's next resync must cover them.

mod arrived;

use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use im_proto::{
    ConversationId, InstanceId, ShardId,
    link::{
        Arrival, Batch, Incoming, Outgoing,
        channel::{Connector, LinkItem, PeerEnd},
    },
    v1,
    v1::peer_message::Message,
};
use im_registry::{Role, View};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, MissedTickBehavior},
};

use self::arrived::Arrived;
use crate::{
    cluster::Cluster,
    link_queue::{ACKNOWLEDGE_EVERY, Acknowledged, LinkQueue},
    message::{Answer, AudienceDelivery, ReplyTo, ShardMessage, answer_from_peer, answer_to_peer, unavailable},
};

/// Messages that wait for one peer.
const QUEUE_MESSAGES_MAX: usize = 65_536;
/// Bytes of these.
const QUEUE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Replay buffer of one direction.
const REPLAY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Another router.
pub struct PeerLink {
    pub instance: InstanceId,
    boot: u64,
    queue: Mutex<LinkQueue<v1::PeerMessage>>,
    wake: Notify,
    numbering: Mutex<Numbering>,
    connection: AtomicU64,
    /// Something was refused for a full queue; pushes may be among it.
    overflowed: AtomicBool,
    /// When the last word of lost pushes was queued.
    resync_queued_at: Mutex<Option<Instant>>,
    gone: watch::Sender<bool>,
}

struct Numbering {
    outgoing: Outgoing<Arc<v1::PeerBatch>>,
    incoming: Incoming,
    /// The boot of the other side that `incoming` counts.
    boot: u64,
    acknowledged: Acknowledged,
    arrived: Arrived,
}

impl PeerLink {
    fn new(instance: InstanceId, boot: u64) -> Self {
        Self {
            instance,
            boot,
            queue: Mutex::default(),
            wake: Notify::new(),
            numbering: Mutex::new(Numbering {
                outgoing: Outgoing::new(REPLAY_BYTES_MAX),
                incoming: Incoming::default(),
                boot: 0,
                acknowledged: Acknowledged::default(),
                arrived: Arrived::new(Instant::now()),
            }),
            connection: AtomicU64::new(0),
            overflowed: AtomicBool::new(false),
            resync_queued_at: Mutex::default(),
            gone: watch::Sender::new(false),
        }
    }

    /// Queues a message; `false` if the queue is full.
    pub fn send(&self, message: v1::PeerMessage) -> bool {
        let is_resync = matches!(message.message, Some(Message::ResyncShard(_) | Message::AudienceResync(_)));
        {
            let mut queue = self.queue.lock();
            if queue.len() >= QUEUE_MESSAGES_MAX || queue.bytes() >= QUEUE_BYTES_MAX {
                self.overflowed.store(true, Ordering::Release);
                return false;
            }
            queue.push(message);
        }
        if is_resync {
            *self.resync_queued_at.lock() = Some(Instant::now());
        }
        self.wake.notify_one();
        true
    }

    /// The moment before which all that was queued has arrived at the other router, or the resync in its place; `None` as long as a
    /// resync is on its way there.
    pub fn arrived_until(&self) -> Option<Instant> {
        // Before it is seen what was refused: what is refused later was pushed later, too.
        let now = Instant::now();
        let numbering = &mut *self.numbering.lock();
        let Numbering { outgoing, arrived, .. } = numbering;
        if self.overflowed.load(Ordering::Acquire) {
            arrived.lost();
        }
        let last = outgoing.next_number() - 1 + self.queue.lock().len() as u64;
        let until = arrived.look(now, last, outgoing.acknowledged_through());
        self.resync_queued_at.lock().is_none_or(|at| until > at).then_some(until)
    }

    /// Queues an answer. Answers are bounded by the requests that the other side may have open.
    pub fn answer(&self, request_id: u64, answer: Answer) {
        let message = Some(Message::Answer(answer_to_peer(answer)));
        self.queue.lock().push(v1::PeerMessage { shard: 0, request_id, message });
        self.wake.notify_one();
    }

    /// There is a way to the router now. For want of one, entries of channels may not have gone there: their owners do not know who reads
    /// them. Whoever is known to be there is told to resync by name.
    fn reached(&self) {
        let message = Some(Message::AudienceResync(v1::PeerAudienceResync::default()));
        self.send(v1::PeerMessage { shard: 0, request_id: 0, message });
    }

    /// Ends the connection that pumps, as that of a link on which answers no longer find their way. A router that lives after all dials
    /// again and is admitted again.
    pub fn retire(&self) {
        self.connection.fetch_add(1, Ordering::AcqRel);
        self.wake.notify_one();
    }
}

/// Keeps a link to every other router in the view.
pub async fn maintain(
    cluster: Arc<Cluster>,
    connector: Arc<dyn Connector<PeerEnd>>,
    mut view: watch::Receiver<Arc<View>>,
) {
    loop {
        let now = view.borrow_and_update().clone();
        let routers: BTreeMap<InstanceId, (u64, String)> = now
            .of_role(Role::Router)
            .filter(|instance| instance.id != cluster.config.instance)
            .map(|instance| {
                let address = instance.endpoints.iter().find(|endpoint| endpoint.transport == "link");
                (
                    instance.id.clone(),
                    (instance.boot.0, address.map(|endpoint| endpoint.address.clone()).unwrap_or_default()),
                )
            })
            .collect();
        let mut started = Vec::new();
        {
            let mut peers = cluster.peers.write();
            peers.retain(|instance, peer| {
                let stays = routers.contains_key(instance);
                if !stays {
                    peer.gone.send_replace(true);
                }
                stays
            });
            for (instance, (boot, address)) in routers {
                if let Entry::Vacant(vacant) = peers.entry(instance) {
                    let peer = Arc::new(PeerLink::new(vacant.key().clone(), boot));
                    vacant.insert(peer.clone());
                    started.push((peer, address));
                }
            }
        }
        if !started.is_empty() {
            cluster.peers_added();
            if cluster.audiences.sent_to_all.load(Ordering::Acquire) {
                started.iter().for_each(|(peer, _)| peer.reached());
            }
        }
        for (peer, address) in started {
            cluster.environment.spawn(dial(cluster.clone(), connector.clone(), peer, address));
        }
        if view.changed().await.is_err() {
            return;
        }
    }
}

async fn dial(cluster: Arc<Cluster>, connector: Arc<dyn Connector<PeerEnd>>, peer: Arc<PeerLink>, address: String) {
    let mut gone = peer.gone.subscribe();
    let mut pause = Duration::from_millis(20);
    loop {
        let attempt = tokio::select! {
            biased;
            _ = gone.wait_for(|gone| *gone) => return,
            attempt = connector.connect(&peer.instance, &address) => attempt,
        };
        match attempt {
            Ok(end) => {
                pause = Duration::from_millis(20);
                tokio::select! {
                    biased;
                    _ = gone.wait_for(|gone| *gone) => return,
                    () = run_dialled(&cluster, &peer, end) => {}
                }
            }
            Err(error) => tracing::debug!(%error, "a router could not be reached"),
        }
        tokio::time::sleep(pause + cluster.environment.jitter(pause)).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

/// Runs a link that this router has dialled, until it breaks.
async fn run_dialled(cluster: &Arc<Cluster>, peer: &Arc<PeerLink>, mut end: PeerEnd) {
    if end.sender.send(LinkItem::Hello(own_hello(cluster, peer))).await.is_err() {
        return;
    }
    let Some(theirs) = their_hello(cluster, &mut end).await else { return };
    if theirs.instance_id != peer.instance.as_str() {
        return tracing::debug!(router = %peer.instance, found = theirs.instance_id, "another router has its address now");
    }
    let connection = peer.connection.fetch_add(1, Ordering::AcqRel) + 1;
    run(cluster, peer, connection, &theirs, &mut end).await;
}

/// Serves a link that another router has dialled, until it breaks.
pub async fn serve(cluster: Arc<Cluster>, mut end: PeerEnd) {
    let Some(theirs) = their_hello(&cluster, &mut end).await else { return };
    let Ok(other) = InstanceId::parse(&theirs.instance_id) else { return };
    if cluster.config.is_somebody_else(&theirs) {
        return drop(end.sender.send(LinkItem::Hello(cluster.config.hello())).await);
    }
    let peer = incoming_peer(&cluster, &other, theirs.boot_id);
    if end.sender.send(LinkItem::Hello(own_hello(&cluster, &peer))).await.is_err() {
        return;
    }
    let connection = peer.connection.fetch_add(1, Ordering::AcqRel) + 1;
    // Retired between the two steps above: this connection would not be told.
    if cluster.incoming_peers.lock().get(&other).is_none_or(|known| !Arc::ptr_eq(known, &peer)) {
        return;
    }
    run(&cluster, &peer, connection, &theirs, &mut end).await;
}

fn own_hello(cluster: &Cluster, peer: &PeerLink) -> v1::LinkHello {
    let numbering = peer.numbering.lock();
    v1::LinkHello {
        peer_boot_id: numbering.boot,
        received_through: numbering.incoming.received_through(),
        to_instance_id: peer.instance.to_string(),
        ..cluster.config.hello()
    }
}

async fn their_hello(cluster: &Cluster, end: &mut PeerEnd) -> Option<v1::LinkHello> {
    match end.receiver.recv().await {
        Some(LinkItem::Hello(hello)) => {
            let config = &cluster.config;
            let same = hello.cluster_id == config.cluster_id && hello.shards == config.shards.get();
            if !same {
                let (cluster, shards) = (&hello.cluster_id, hello.shards);
                tracing::error!(cluster, shards, "a router of another cluster or number of shards was refused");
            }
            same.then_some(hello)
        }
        _ => None,
    }
}

async fn run(cluster: &Arc<Cluster>, peer: &Arc<PeerLink>, connection: u64, theirs: &v1::LinkHello, end: &mut PeerEnd) {
    let replay = resume(peer, theirs, cluster.config.boot.0).unwrap_or_else(|| {
        cluster.resync_router(&peer.instance);
        peer.numbering.lock().arrived.replaced();
        Vec::new()
    });
    let replay = replay.into_iter().map(|(_, batch)| batch).collect();
    pump(cluster, peer, connection, replay, end).await;
}

/// The state of links that a router has dialled to us lives with the links that we dial, under a name of its own.
fn incoming_peer(cluster: &Cluster, other: &InstanceId, boot: u64) -> Arc<PeerLink> {
    let mut incoming = cluster.incoming_peers.lock();
    match incoming.get(other) {
        Some(peer) if peer.boot == boot => peer.clone(),
        _ => {
            let peer = Arc::new(PeerLink::new(other.clone(), boot));
            if let Some(former) = incoming.insert(other.clone(), peer.clone()) {
                former.retire();
            }
            peer
        }
    }
}

/// What must be sent again; `None` if something is lost for good. Requests are then retried by their askers, pushes resynced.
fn resume(peer: &PeerLink, theirs: &v1::LinkHello, own_boot: u64) -> Option<Vec<(u64, Arc<v1::PeerBatch>)>> {
    let mut numbering = peer.numbering.lock();
    if numbering.boot != theirs.boot_id {
        numbering.boot = theirs.boot_id;
        numbering.incoming = Incoming::default();
    }
    let received = im_proto::link::received_of_boot(theirs, im_proto::BootId(own_boot));
    numbering.incoming.reconnected();
    // What was told on the connection before may not have come.
    numbering.acknowledged = Acknowledged::default();
    let replay = numbering.outgoing.replay(received);
    if replay.is_none() {
        numbering.arrived.lost();
    }
    replay
}

/// Sending never blocks receiving: two full directions would wait for each other for ever.
async fn pump(
    cluster: &Arc<Cluster>,
    peer: &Arc<PeerLink>,
    connection: u64,
    mut replay: VecDeque<Arc<v1::PeerBatch>>,
    end: &mut PeerEnd,
) {
    let mut waits = true;
    let mut acknowledge = tokio::time::interval(ACKNOWLEDGE_EVERY);
    acknowledge.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ended = cluster.ended();
    loop {
        tokio::select! {
            biased;
            () = async { let _ = ended.wait_for(Option::is_some).await; } => return,
            item = end.receiver.recv() => match item {
                Some(LinkItem::Batch(batch)) => {
                    if peer.connection.load(Ordering::Acquire) != connection || !take_batch(cluster, peer, &batch) {
                        return;
                    }
                    // Receiving must not starve sending.
                    waits = match end.sender.try_reserve() {
                        Ok(permit) => send_next(cluster, peer, connection, &mut replay, permit),
                        Err(_) => true,
                    };
                }
                Some(LinkItem::Hello(_)) | None => return,
            },
            permit = end.sender.reserve(), if waits => match permit {
                Ok(permit) => waits = send_next(cluster, peer, connection, &mut replay, permit),
                Err(_) => return,
            },
            () = peer.wake.notified() => {
                if peer.connection.load(Ordering::Acquire) != connection {
                    // A newer connection pumps; hand the wake on.
                    peer.wake.notify_one();
                    return;
                }
                waits = true;
            }
            _ = acknowledge.tick() => {
                let numbering = &mut *peer.numbering.lock();
                waits |= numbering.acknowledged.tick(&numbering.incoming);
            }
        }
    }
}

/// Sends one batch, what must be sent again first; `false` if nothing waits any more.
fn send_next(
    cluster: &Cluster,
    peer: &PeerLink,
    connection: u64,
    replay: &mut VecDeque<Arc<v1::PeerBatch>>,
    permit: mpsc::Permit<'_, LinkItem<v1::PeerBatch>>,
) -> bool {
    if let Some(batch) = replay.pop_front() {
        permit.send(LinkItem::Batch(batch));
        return true;
    }
    {
        let mut numbering = peer.numbering.lock();
        if peer.connection.load(Ordering::Acquire) != connection {
            // A newer connection has taken the numbers over and sends what waits.
            peer.wake.notify_one();
            return false;
        }
        let numbering = &mut *numbering;
        let messages = peer.queue.lock().take_batch();
        if messages.is_empty() && !numbering.acknowledged.is_due() {
            return false;
        }
        let acknowledged_through = numbering.acknowledged.told(&numbering.incoming);
        let first_number = numbering.outgoing.next_number();
        let batch = Arc::new(v1::PeerBatch { first_number, acknowledged_through, messages });
        numbering.outgoing.push(batch.clone());
        permit.send(LinkItem::Batch(batch));
        if !peer.overflowed.swap(false, Ordering::AcqRel) {
            return true;
        }
        numbering.arrived.lost();
    }
    cluster.resync_router(&peer.instance);
    peer.numbering.lock().arrived.replaced();
    true
}

fn take_batch(cluster: &Arc<Cluster>, peer: &Arc<PeerLink>, batch: &Arc<v1::PeerBatch>) -> bool {
    let arrival = {
        let numbering = &mut *peer.numbering.lock();
        numbering.outgoing.acknowledge(batch.acknowledged_through);
        let arrival = numbering.incoming.arrive(batch.first_number, Batch::messages(batch));
        numbering.acknowledged.arrived(&numbering.incoming, batch.bytes());
        arrival
    };
    let Arrival::Handle { skip } = arrival else {
        tracing::warn!(router = %peer.instance, "a gap in a link's numbers; the link is reset");
        return false;
    };
    for message in batch.messages.iter().skip(skip) {
        take_message(cluster, &peer.instance, message);
    }
    true
}

fn take_message(cluster: &Arc<Cluster>, other: &InstanceId, message: &v1::PeerMessage) {
    let reply_to = if message.request_id == 0 {
        ReplyTo::Nobody
    } else {
        ReplyTo::Peer { router: other.clone(), request_id: message.request_id }
    };
    match &message.message {
        Some(Message::Answer(answer)) => cluster.answered(message.request_id, answer_from_peer(answer.clone())),
        Some(Message::AudienceDeliver(deliver)) => {
            if let Some(delivery) = AudienceDelivery::from_peer(deliver) {
                cluster.receive_audience(other, ShardId(message.shard), &delivery);
            }
        }
        Some(Message::AudienceResync(resync)) if resync.conversation_id.is_empty() => {
            cluster.audiences.resync_all(cluster);
        }
        Some(Message::AudienceResync(resync)) => {
            if let Ok(id) = ConversationId::from_slice(&resync.conversation_id) {
                cluster.audiences.resync(cluster, &id);
            }
        }
        Some(Message::Presence(presence)) => cluster.watches.told(cluster, other, presence),
        Some(request) => {
            match ShardMessage::from_peer(request, ShardId(message.shard), other, &cluster.config.cluster_secret) {
                Some(request) => cluster.receive(ShardId(message.shard), request, reply_to),
                None => cluster.answer(reply_to, Err(unavailable())),
            }
        }
        None => cluster.answer(reply_to, Err(unavailable())),
    }
}
