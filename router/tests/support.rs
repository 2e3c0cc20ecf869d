//! A router with in-memory store and registry, and a scripted gateway on the other end of its link.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use im_proto::{
    BootId, ConversationId, InstanceId, ShardCount, Timestamp, UserId, body,
    environment::{Clock, Environment, Random, Spawn, Task},
    key::{ClusterSecret, RouterSecret},
    link::channel::{Connecting, Connector, GatewayEnd, LinkError, LinkItem, PeerEnd, pair},
    method::Method,
    token::{Claims, SigningKey},
    v1::{self, gateway_message::Message as Up, router_message::Message as Down},
};
use im_registry::{AnyRegistry, InProcessRegistry, Instance, Registry as _, Role};
use im_router::{Router, RouterConfig};
use im_storage::Store;
use prost::Message as _;

pub const CLUSTER: ClusterSecret = ClusterSecret::new([7; 32]);

/// Wall clock that follows the runtime's paused time.
struct TestClock(tokio::time::Instant);

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1_700_000_000_000).saturating_add(self.0.elapsed())
    }

    fn since_boot(&self) -> Duration {
        self.0.elapsed()
    }
}

struct TestRandom(AtomicU64);

impl Random for TestRandom {
    fn next_u64(&self) -> u64 {
        self.0.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed).wrapping_mul(0xBF58_476D_1CE4_E5B9)
    }
}

struct TestSpawn;

impl Spawn for TestSpawn {
    #[allow(clippy::disallowed_methods, reason = "this is where the tasks of the environment run")]
    fn spawn(&self, task: Task) {
        tokio::spawn(task);
    }
}

/// No other router is dialled.
struct NoPeers;

impl Connector<PeerEnd> for NoPeers {
    fn connect(&self, to: &InstanceId, _address: &str) -> Connecting<PeerEnd> {
        let to = to.clone();
        Box::pin(async move { Err(LinkError { to, reason: "this test has no peer links".to_owned() }) })
    }
}

pub fn environment() -> Environment {
    Environment {
        clock: Arc::new(TestClock(tokio::time::Instant::now())),
        random: Arc::new(TestRandom(AtomicU64::new(1))),
        tasks: Arc::new(TestSpawn),
    }
}

pub fn user(name: &str) -> UserId {
    UserId::parse(name).unwrap()
}

pub const SHARDS: u32 = 4;

/// Links between the routers of a test, with a count of what travels on them.
#[derive(Clone, Default)]
pub struct Mesh(Arc<Mutex<MeshState>>, Arc<tokio::sync::watch::Sender<Option<InstanceId>>>);

/// The mesh as one router dials into it.
struct MeshOf {
    mesh: Mesh,
    from: InstanceId,
}

#[derive(Default)]
struct MeshState {
    routers: BTreeMap<InstanceId, Router>,
    /// Messages by kind.
    sent: BTreeMap<&'static str, usize>,
    bytes: usize,
    /// Nothing passes between these.
    cut: Vec<[InstanceId; 2]>,
    /// Messages of this kind say nothing when they arrive.
    lost: Option<&'static str>,
}

impl Mesh {
    /// How a router dials others.
    pub fn of(&self, name: &str) -> Arc<dyn Connector<PeerEnd>> {
        Arc::new(MeshOf { mesh: self.clone(), from: InstanceId::parse(name).unwrap() })
    }

    /// From now on nothing passes between two routers, in either direction.
    pub fn cut(&self, one: &str, other: &str) {
        let ids = [one, other].map(|name| InstanceId::parse(name).unwrap());
        self.0.lock().unwrap().cut.push(ids);
    }

    /// Everything passes again.
    pub fn mend(&self) {
        self.0.lock().unwrap().cut.clear();
    }

    /// From now on messages of a kind get lost.
    pub fn lose(&self, kind: &'static str) {
        self.0.lock().unwrap().lost = Some(kind);
    }

    /// From now on nothing gets lost.
    pub fn lose_nothing(&self) {
        self.0.lock().unwrap().lost = None;
    }

    /// From now on the answers to a router wait, until they are let go.
    pub fn hold_answers_to(&self, name: Option<&str>) {
        self.1.send_replace(name.map(|name| InstanceId::parse(name).unwrap()));
    }

    fn is_cut(&self, one: &InstanceId, other: &InstanceId) -> bool {
        self.0.lock().unwrap().cut.iter().any(|pair| pair.contains(one) && pair.contains(other))
    }

    pub fn add(&self, name: &str, router: &Router) {
        self.0.lock().unwrap().routers.insert(InstanceId::parse(name).unwrap(), router.clone());
    }

    /// Messages by kind, and bytes of all, since the last time.
    pub fn take(&self) -> (BTreeMap<&'static str, usize>, usize) {
        let state = &mut *self.0.lock().unwrap();
        (std::mem::take(&mut state.sent), std::mem::take(&mut state.bytes))
    }

    /// Counts what a batch has, and takes out what gets lost.
    fn pass(&self, item: LinkItem<v1::PeerBatch>) -> LinkItem<v1::PeerBatch> {
        let LinkItem::Batch(batch) = item else { return item };
        let state = &mut *self.0.lock().unwrap();
        for message in &batch.messages {
            *state.sent.entry(kind(message)).or_default() += 1;
            state.bytes += message.encoded_len();
        }
        if state.lost.is_none() {
            return LinkItem::Batch(batch);
        }
        let mut batch = (*batch).clone();
        for message in &mut batch.messages {
            if state.lost == Some(kind(message)) {
                message.message = None;
            }
        }
        LinkItem::Batch(Arc::new(batch))
    }

    #[allow(clippy::disallowed_methods, reason = "the wires between the routers of a test belong to the test")]
    fn wire(
        &self,
        ends: [InstanceId; 2],
        has_answers: bool,
        mut from: tokio::sync::mpsc::Receiver<LinkItem<v1::PeerBatch>>,
        to: tokio::sync::mpsc::Sender<LinkItem<v1::PeerBatch>>,
    ) {
        let mesh = self.clone();
        tokio::spawn(async move {
            while let Some(item) = from.recv().await {
                let mut held = mesh.1.subscribe();
                let goes_on = held.wait_for(|held| !has_answers || held.as_ref() != Some(&ends[0]));
                goes_on.await.unwrap();
                if mesh.is_cut(&ends[0], &ends[1]) {
                    return;
                }
                if to.send(mesh.pass(item)).await.is_err() {
                    return;
                }
            }
        });
    }
}

fn kind(message: &v1::PeerMessage) -> &'static str {
    use v1::peer_message::Message;
    match &message.message {
        Some(Message::Deliver(_)) => "deliver",
        Some(Message::AudienceDeliver(_)) => "audience deliver",
        Some(Message::Follow(_)) => "follow",
        Some(Message::Heads(_)) => "heads",
        Some(Message::ResyncShard(_)) => "resync",
        Some(Message::AudienceResync(_)) => "audience resync",
        Some(Message::Effect(_)) => "effect",
        Some(Message::Watch(_)) => "watch",
        Some(Message::Presence(_)) => "presence",
        _ => "other",
    }
}

impl Connector<PeerEnd> for MeshOf {
    fn connect(&self, to: &InstanceId, _address: &str) -> Connecting<PeerEnd> {
        let router = self.mesh.0.lock().unwrap().routers.get(to).cloned();
        let Some(router) = router.filter(|_| !self.mesh.is_cut(&self.from, to)) else {
            let to = to.clone();
            return Box::pin(async move { Err(LinkError { to, reason: "there is no way".to_owned() }) });
        };
        let ((near, first), (second, far)) = (pair(64), pair(64));
        let ends = || [self.from.clone(), to.clone()];
        self.mesh.wire(ends(), false, first.receiver, second.sender);
        self.mesh.wire(ends(), true, second.receiver, first.sender);
        router.accept_peer(far);
        Box::pin(async move { Ok(near) })
    }
}

pub struct World {
    pub environment: Environment,
    pub registry: InProcessRegistry,
    pub store: Store,
    pub key: SigningKey,
    pub peers: Arc<dyn Connector<PeerEnd>>,
    pub shards: u32,
}

impl World {
    pub fn new(store: Store) -> Self {
        let der = ring::signature::Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap();
        Self {
            environment: environment(),
            registry: InProcessRegistry::new(1, 10),
            store,
            key: SigningKey::from_pkcs8(der.as_ref()).unwrap(),
            peers: Arc::new(NoPeers),
            shards: SHARDS,
        }
    }

    pub fn config(&self, name: &str) -> RouterConfig {
        let instance = InstanceId::parse(name).unwrap();
        let mut config = RouterConfig::new(instance, BootId(1), CLUSTER.clone(), RouterSecret::new([9; 32]));
        config.shards = ShardCount::new(self.shards).unwrap();
        config.verify_keys = vec![self.key.verify_key()];
        config.workers = 2;
        config
    }

    pub async fn router(&self, config: RouterConfig) -> Router {
        let registry = AnyRegistry::from(self.registry.handle(config.instance.as_str(), self.environment.clone()));
        self.router_on(config, registry).await
    }

    pub async fn router_on(&self, config: RouterConfig, registry: AnyRegistry) -> Router {
        let instance = Instance {
            id: config.instance.clone(),
            boot: config.boot,
            role: Role::Router,
            endpoints: Vec::new(),
            zone: String::new(),
            version: "test".to_owned(),
            draining: false,
        };
        Router::start(config, self.environment.clone(), self.store.clone(), registry, instance, self.peers.clone())
            .await
            .unwrap()
    }

    /// A registered gateway with a link to a router.
    pub async fn gateway(&self, name: &str, router: &Router) -> TestGateway {
        self.gateway_on(name, router, self.registry.handle(name, self.environment.clone()).into()).await
    }

    pub async fn gateway_on(&self, name: &str, router: &Router, registry: AnyRegistry) -> TestGateway {
        let id = InstanceId::parse(name).unwrap();
        let instance = Instance {
            id: id.clone(),
            boot: BootId(5),
            role: Role::Gateway,
            endpoints: Vec::new(),
            zone: String::new(),
            version: "test".to_owned(),
            draining: false,
        };
        let lease = registry.register(instance, Duration::from_secs(10)).await.unwrap();
        TestGateway { _registered: Some((registry, lease)), ..self.link(name, router).await }
    }

    /// Another link of a registered gateway.
    pub async fn link(&self, name: &str, router: &Router) -> TestGateway {
        let (near, far) = pair(64);
        router.accept_gateway(far);
        let mut gateway = TestGateway { end: near, next: 1, inbox: VecDeque::new(), _registered: None };
        let hello = v1::LinkHello {
            instance_id: name.to_owned(),
            boot_id: 5,
            cluster_id: "im".to_owned(),
            shards: self.shards,
            ..v1::LinkHello::default()
        };
        gateway.end.sender.send(LinkItem::Hello(hello)).await.unwrap();
        assert!(matches!(gateway.end.receiver.recv().await, Some(LinkItem::Hello(_))));
        gateway
    }

    pub fn token(&self, user: &str, device: &str, platform: &str) -> String {
        let now = self.environment.clock.now().as_millis() / 1000;
        self.key
            .sign(&Claims {
                sub: user.to_owned(),
                device: device.to_owned(),
                platform: platform.to_owned(),
                iss: "im".to_owned(),
                aud: "im".to_owned(),
                iat: now,
                exp: now + 3600,
            })
            .unwrap()
    }
}

pub struct TestGateway {
    end: GatewayEnd,
    next: u64,
    pub inbox: VecDeque<Down>,
    _registered: Option<(AnyRegistry, im_registry::Lease)>,
}

impl TestGateway {
    /// Takes what has come into the inbox, without waiting for more.
    pub async fn gather(&mut self) {
        while let Ok(Some(item)) = tokio::time::timeout(Duration::from_millis(200), self.end.receiver.recv()).await {
            if let LinkItem::Batch(batch) = item {
                self.inbox.extend(batch.messages.iter().filter_map(|message| message.message.clone()));
            }
        }
    }

    pub async fn push(&mut self, messages: Vec<Up>) {
        let messages: Vec<_> =
            messages.into_iter().map(|message| v1::GatewayMessage { message: Some(message) }).collect();
        let batch = v1::GatewayBatch { first_number: self.next, acknowledged_through: 0, messages };
        self.next += batch.messages.len() as u64;
        self.end.sender.send(LinkItem::Batch(Arc::new(batch))).await.unwrap();
    }

    /// The next message that a predicate picks; others stay in the inbox.
    pub async fn expect<T>(&mut self, what: &str, pick: impl Fn(&Down) -> Option<T>) -> T {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(index) = self.inbox.iter().position(|message| pick(message).is_some()) {
                let message = self.inbox.remove(index).unwrap();
                return pick(&message).unwrap();
            }
            let item = tokio::time::timeout_at(deadline, self.end.receiver.recv()).await;
            match item.unwrap_or_else(|_| panic!("no {what} came; inbox: {:?}", self.inbox)) {
                Some(LinkItem::Batch(batch)) => {
                    self.inbox.extend(batch.messages.iter().filter_map(|message| message.message.clone()));
                }
                other => panic!("the link broke while waiting for {what}: {other:?}"),
            }
        }
    }

    pub async fn open(&mut self, world: &World, session: u64, user: &str, device: &str) -> v1::SessionOpened {
        self.open_on(world, session, user, device, "terminal").await
    }

    /// A session of a device of a platform, whose client began to connect just now.
    pub async fn open_on(
        &mut self,
        world: &World,
        session: u64,
        user: &str,
        device: &str,
        platform: &str,
    ) -> v1::SessionOpened {
        let open = v1::SessionOpen {
            session_id: session,
            token: world.token(user, device, platform),
            opened_at_ms: world.environment.clock.now().as_millis(),
            ..v1::SessionOpen::default()
        };
        self.push(vec![Up::Open(open)]).await;
        self.expect("session opened", |message| match message {
            Down::Opened(opened) if opened.session_id == session => Some(opened.clone()),
            _ => None,
        })
        .await
    }

    pub async fn send(&mut self, session: u64, id: ConversationId, send: v1::Send) {
        self.attempt(session, id, send, 0).await;
    }

    /// A send with the gateway's number of the try.
    pub async fn attempt(&mut self, session: u64, id: ConversationId, send: v1::Send, attempt: u64) {
        let conversation_id = id.to_bytes();
        let send = v1::SessionSend { session_id: session, conversation_id, send: Some(send), attempt };
        self.push(vec![Up::Send(send)]).await;
    }

    pub async fn ack(&mut self, client_message_id: &'static str) -> v1::SendAck {
        self.expect("ack", |message| match message {
            Down::SendResult(v1::SendResult { ack: Some(ack), .. }) if ack.client_message_id == client_message_id => {
                Some(ack.clone())
            }
            _ => None,
        })
        .await
    }

    /// The ack of a message that has the same id in several conversations.
    pub async fn ack_of(&mut self, id: ConversationId, client_message_id: &'static str) -> v1::SendAck {
        self.expect("ack", |message| match message {
            Down::SendResult(v1::SendResult { ack: Some(ack), .. })
                if ack.client_message_id == client_message_id && ack.conversation_id == id.to_bytes() =>
            {
                Some(ack.clone())
            }
            _ => None,
        })
        .await
    }

    /// The next frames pushed, decoded, and to which sessions.
    pub async fn pushed(&mut self) -> (Vec<u64>, Vec<v1::Message>) {
        let deliver = self
            .expect("push", |message| match message {
                Down::Deliver(deliver) => Some(deliver.clone()),
                _ => None,
            })
            .await;
        (deliver.session_ids, decode(deliver.frame))
    }

    pub async fn call<A: prost::Message + Default>(
        &mut self,
        session: u64,
        method: Method,
        request: &impl prost::Message,
    ) -> Result<A, v1::Status> {
        let request_id = u32::try_from(self.next).unwrap();
        let call = v1::Call { request_id, method: method.number(), request: request.encode_to_vec().into() };
        self.push(vec![Up::Call(v1::SessionCall { session_id: session, call: Some(call) })]).await;
        let reply = self
            .expect("reply", |message| match message {
                Down::CallReply(reply) if reply.request_id == request_id => Some(reply.clone()),
                _ => None,
            })
            .await;
        match reply.status {
            Some(status) => Err(status),
            None => Ok(A::decode(reply.reply).unwrap()),
        }
    }
}

/// Whole frames, one behind the other.
pub fn decode(frames: Bytes) -> Vec<v1::Message> {
    let mut input = bytes::BytesMut::from(&frames[..]);
    let mut out = Vec::new();
    while let Some(payload) = im_proto::frame::split_frame(&mut input, 1 << 20).unwrap() {
        match v1::ServerFrame::decode(payload).unwrap().frame {
            Some(v1::server_frame::Frame::Message(message)) => out.push(message),
            other => panic!("not a message: {other:?}"),
        }
    }
    out
}

pub fn message(
    peer: &str,
    client_message_id: &'static str,
    text: &str,
    after: &'static str,
    known_seq: u64,
) -> v1::Send {
    v1::Send {
        target: Some(v1::send::Target::PeerUserId(peer.to_owned())),
        client_message_id: Bytes::from_static(client_message_id.as_bytes()),
        body: body::text(text),
        after: Bytes::from_static(after.as_bytes()),
        known_seq,
    }
}

pub fn to(conversation: ConversationId) -> Option<v1::Target> {
    Some(v1::Target { target: Some(v1::target::Target::ConversationId(conversation.to_bytes())) })
}
