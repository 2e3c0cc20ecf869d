//! A gateway, the routers it dials and the clients it serves, all in the hands of the test.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use im_gateway::{Gateway, GatewayConfig, PeerInfo, Transport};
use im_proto::{
    BootId, ConversationId, Epoch, InstanceId, ShardCount, StatusCode, Timestamp, UserId, body,
    environment::{Clock, Environment, Random, Spawn, Task},
    frame::{self, Decoded},
    key::ClusterSecret,
    link::channel::{self, Connecting, Connector, GatewayEnd, LinkError, LinkItem, RouterEnd},
    token::{Claims, SigningKey},
    v1,
};
use im_registry::{Claim, Endpoint, Instance, Role, View};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream},
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
pub use v1::{
    client_frame::Frame as ClientFrame, gateway_message::Message as FromGateway, router_message::Message as FromRouter,
    server_frame::Frame as ServerFrame,
};

/// 2026-01-01.
const EPOCH_MS: i64 = 1_767_225_600_000;
pub const CLUSTER: &str = "test";
/// Longer than anything takes that happens at all.
pub const PATIENCE: Duration = Duration::from_secs(300);

struct Surroundings {
    started: Instant,
    random: AtomicU64,
}

impl Clock for Surroundings {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(EPOCH_MS).saturating_add(self.started.elapsed())
    }

    fn since_boot(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Random for Surroundings {
    /// SplitMix64.
    fn next_u64(&self) -> u64 {
        let mut mixed = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

impl Spawn for Surroundings {
    fn spawn(&self, task: Task) {
        tokio::spawn(task);
    }
}

pub fn environment() -> Environment {
    let surroundings = Arc::new(Surroundings { started: Instant::now(), random: AtomicU64::new(1) });
    Environment { clock: surroundings.clone(), random: surroundings.clone(), tasks: surroundings }
}

/// Hands the router's end of each link to the test.
struct Dialled {
    ends: mpsc::UnboundedSender<(InstanceId, RouterEnd)>,
    capacity: usize,
}

impl Connector<GatewayEnd> for Dialled {
    fn connect(&self, to: &InstanceId, _address: &str) -> Connecting<GatewayEnd> {
        let (gateway, router) = channel::pair(self.capacity);
        let sent = self.ends.send((to.clone(), router));
        let to = to.clone();
        Box::pin(async move { sent.map(|()| gateway).map_err(|_| LinkError { to, reason: "no test".to_owned() }) })
    }
}

/// The counters of one gateway, by name and labels.
#[derive(Clone, Default)]
pub struct Counts(Arc<std::sync::Mutex<BTreeMap<String, Arc<AtomicU64>>>>);

impl Counts {
    fn handle(&self, key: &metrics::Key) -> Arc<AtomicU64> {
        let labels: Vec<_> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        let name =
            if labels.is_empty() { key.name().to_owned() } else { format!("{}{{{}}}", key.name(), labels.join(",")) };
        self.0.lock().expect("not poisoned").entry(name).or_default().clone()
    }

    /// The value of `name` or `name{label=value}`, which must exist.
    pub fn of(&self, name: &str) -> u64 {
        let counts = self.0.lock().expect("not poisoned");
        counts.get(name).unwrap_or_else(|| panic!("no metric {name}")).load(Ordering::Relaxed)
    }
}

impl metrics::Recorder for Counts {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        metrics::Counter::from_arc(self.handle(key))
    }

    fn register_gauge(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        metrics::Gauge::noop()
    }

    fn register_histogram(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        metrics::Histogram::noop()
    }
}

/// A gateway under test.
pub struct Bench {
    pub counts: Counts,
    pub gateway: Gateway,
    pub environment: Environment,
    pub secret: ClusterSecret,
    pub shards: ShardCount,
    signing_key: SigningKey,
    view: watch::Sender<Arc<View>>,
    dialled: mpsc::UnboundedReceiver<(InstanceId, RouterEnd)>,
}

pub fn config() -> GatewayConfig {
    GatewayConfig::new(CLUSTER)
}

pub fn id(name: &str) -> InstanceId {
    InstanceId::parse(name).expect("an instance id")
}

pub fn user(name: &str) -> UserId {
    UserId::parse(name).expect("a user id")
}

impl Bench {
    pub fn new(config: GatewayConfig) -> Self {
        let environment = environment();
        let secret = ClusterSecret::new([7; 32]);
        let shards = ShardCount::new(16).expect("a shard count");
        let (view, seen) = watch::channel(Arc::new(View::default()));
        let (ends, dialled) = mpsc::unbounded_channel();
        let counts = Counts::default();
        let gateway = metrics::with_local_recorder(&counts, || {
            Gateway::start(
                config,
                environment.clone(),
                id("g1"),
                BootId(11),
                secret.clone(),
                shards,
                seen,
                Arc::new(Dialled { ends, capacity: 64 }),
            )
        });
        let pkcs8 = ring::signature::Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).expect("a key");
        let signing_key = SigningKey::from_pkcs8(pkcs8.as_ref()).expect("a signing key");
        Self { counts, gateway, environment, secret, shards, signing_key, view, dialled }
    }

    /// A gateway with one router, `r1`, that owns everything and whose link is up.
    pub async fn with_router(config: GatewayConfig) -> (Self, Router) {
        let mut bench = Self::new(config);
        bench.owner("r1");
        let router = bench.router().await;
        (bench, router)
    }

    /// From now on one router owns all shards.
    pub fn owner(&self, router: &str) {
        self.owners(|_| Some(router.to_owned()));
    }

    /// From now on each shard has this owner.
    pub fn owners(&self, owner: impl Fn(u32) -> Option<String>) {
        let mut view = View { revision: self.view.borrow().revision + 1, ..View::default() };
        view.instances = self.view.borrow().instances.clone();
        for shard in self.shards.shards() {
            let Some(owner) = owner(shard.0) else { continue };
            // A claim that stands keeps its epoch.
            let before = self.view.borrow().claims.get(&shard).filter(|claim| claim.owner == id(&owner)).cloned();
            let claim = before.unwrap_or_else(|| Claim {
                shard,
                owner: id(&owner),
                epoch: Epoch(view.revision),
                predecessors: Vec::new(),
            });
            view.claims.insert(shard, claim);
            view.instances.entry(id(&owner)).or_insert_with(|| router_instance(&owner));
        }
        self.view.send_replace(Arc::new(view));
    }

    /// The registry shows more gateways: `g1` is the one under test.
    pub fn gateways(&self, gateways: &[(&str, &str, bool)]) {
        let mut view = View::clone(&self.view.borrow());
        view.revision += 1;
        for (name, zone, draining) in gateways {
            let endpoint = |transport: &str| Endpoint {
                transport: transport.to_owned(),
                address: format!("{name}.{transport}:1"),
            };
            let endpoints = ["tcp", "tls", "quic", "http"].map(endpoint).into();
            let instance = Instance {
                role: Role::Gateway,
                endpoints,
                zone: (*zone).to_owned(),
                draining: *draining,
                ..router_instance(name)
            };
            view.instances.insert(id(name), instance);
        }
        self.view.send_replace(Arc::new(view));
    }

    /// The router is gone from the registry, with its claims.
    pub fn remove_router(&self, router: &str) {
        let mut view = View::clone(&self.view.borrow());
        view.revision += 1;
        view.instances.remove(&id(router));
        view.claims.retain(|_, claim| claim.owner != id(router));
        self.view.send_replace(Arc::new(view));
    }

    /// The next link that the gateway dials, hellos exchanged as a router of boot 21.
    pub async fn router(&mut self) -> Router {
        self.router_of_boot(21, 0).await
    }

    pub async fn router_of_boot(&mut self, boot: u64, received_through: u64) -> Router {
        let mut router = self.dialled().await;
        router.hello(boot, received_through).await;
        router
    }

    /// The next link that the gateway dials, before the hellos.
    pub async fn dialled(&mut self) -> Router {
        let (name, end) = timeout(PATIENCE, self.dialled.recv()).await.expect("the gateway dials").expect("it lives");
        Router { name, end, next_number: 1, received: BTreeMap::new(), received_through: 0, peer: None }
    }

    pub fn claims(&self, user: &str) -> Claims {
        let now = self.environment.clock.now().as_millis() / 1000;
        Claims {
            sub: user.to_owned(),
            device: "d".to_owned(),
            platform: "terminal".to_owned(),
            iss: CLUSTER.to_owned(),
            aud: CLUSTER.to_owned(),
            iat: now,
            exp: now + 24 * 3600,
        }
    }

    pub fn sign(&self, claims: &Claims) -> String {
        self.signing_key.sign(claims).expect("a token")
    }

    pub fn token(&self, user: &str) -> String {
        self.sign(&self.claims(user))
    }

    pub fn hello(&self, user: &str) -> ClientFrame {
        hello(self.token(user))
    }

    /// A connection of a client that has said nothing yet, with room for this much between the two.
    pub fn connect_with_room(&self, room: usize) -> Client<DuplexStream> {
        self.connect_as(room, Transport::Memory, [127, 0, 0, 1])
    }

    /// The same from some address, said to come by some transport.
    pub fn connect_as(&self, room: usize, transport: Transport, address: [u8; 4]) -> Client<DuplexStream> {
        let (ours, theirs) = tokio::io::duplex(room);
        let peer = PeerInfo { transport, remote_address: SocketAddr::from((address, 1)) };
        tokio::spawn(self.gateway.serve_stream(theirs, peer));
        Client::new(ours)
    }

    pub fn connect(&self) -> Client<DuplexStream> {
        self.connect_with_room(64 * 1024)
    }

    /// A welcomed client and its session id.
    pub async fn login(&self, router: &mut Router, user: &str) -> (Client<DuplexStream>, u64) {
        let mut client = self.connect();
        let session = self.login_over(router, &mut client, user).await;
        (client, session)
    }

    pub async fn login_over<S>(&self, router: &mut Router, client: &mut Client<S>, user: &str) -> u64
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        client.send(self.hello(user)).await;
        let FromGateway::Open(open) = router.next().await else { panic!("a session is opened first") };
        router.say(self.opened(&open, user)).await;
        let welcome = client.welcome().await;
        assert_eq!(welcome.session_id, open.session_id);
        open.session_id
    }

    /// What the user's owner answers to an open that it accepts.
    pub fn opened(&self, open: &v1::SessionOpen, user: &str) -> FromRouter {
        let claims = self.claims(user);
        let identity = v1::Identity {
            user_id: user.to_owned(),
            device_id: claims.device,
            platform: claims.platform,
            gateway_id: "g1".to_owned(),
            gateway_boot_id: 11,
            session_id: open.session_id,
            expires_at_ms: im_proto::token::inspect(&open.token, self.environment.clock.now())
                .expect("a good token")
                .expires_at
                .as_millis(),
            ..v1::Identity::default()
        };
        FromRouter::Opened(v1::SessionOpened {
            session_id: open.session_id,
            identity: Some(identity),
            capability: Some(capability(user)),
            sync_version: 5,
        })
    }

    /// A conversation whose shard has this number modulo `modulo`.
    pub fn conversation_in(&self, modulo: u32, remainder: u32) -> ConversationId {
        let ids = (0..=u8::MAX).map(|byte| ConversationId::from_bytes([byte; 16]));
        ids.into_iter().find(|id| self.shards.shard_of(id).0 % modulo == remainder).expect("one of 256")
    }

    pub fn user_shard(&self, name: &str) -> u32 {
        self.shards.shard_of(&self.secret.self_id(&user(name))).0
    }
}

pub fn capability(user: &str) -> v1::Capability {
    v1::Capability { identity: Bytes::copy_from_slice(user.as_bytes()), mac: Bytes::from_static(&[9; 32]) }
}

fn router_instance(name: &str) -> Instance {
    Instance {
        id: id(name),
        boot: BootId(21),
        role: Role::Router,
        endpoints: vec![Endpoint { transport: "link".to_owned(), address: format!("{name}:1") }],
        zone: String::new(),
        version: String::new(),
        draining: false,
    }
}

pub fn hello(token: String) -> ClientFrame {
    ClientFrame::Hello(v1::Hello {
        version_min: 1,
        version_max: 1,
        token,
        client_name: "test".to_owned(),
        client_version: "0".to_owned(),
        ..v1::Hello::default()
    })
}

/// A text message to a conversation.
pub fn send(conversation: ConversationId, client_message_id: &str) -> v1::Send {
    v1::Send {
        target: Some(v1::send::Target::ConversationId(conversation.to_bytes())),
        client_message_id: Bytes::copy_from_slice(client_message_id.as_bytes()),
        body: body::text("hello"),
        after: Bytes::new(),
        known_seq: 0,
    }
}

/// The router's end of a link.
pub struct Router {
    pub name: InstanceId,
    end: RouterEnd,
    next_number: u64,
    received: BTreeMap<u64, FromGateway>,
    pub received_through: u64,
    pub peer: Option<v1::LinkHello>,
}

impl Router {
    /// Says hello as this boot of the router, having received that much of the gateway's boot.
    pub async fn hello(&mut self, boot: u64, received_through: u64) {
        self.hello_of_cluster(CLUSTER, boot, received_through).await;
    }

    pub async fn hello_of_cluster(&mut self, cluster: &str, boot: u64, received_through: u64) {
        let Some(LinkItem::Hello(hello)) = self.end.receiver.recv().await else {
            panic!("the gateway says hello first")
        };
        let answer = v1::LinkHello {
            instance_id: self.name.as_str().to_owned(),
            boot_id: boot,
            peer_boot_id: hello.boot_id,
            received_through,
            cluster_id: cluster.to_owned(),
            shards: hello.shards,
            to_instance_id: String::new(),
        };
        self.received_through = received_through;
        self.peer = Some(hello);
        self.end.sender.send(LinkItem::Hello(answer)).await.expect("the gateway listens");
    }

    /// The next message of the gateway, loads left out.
    pub async fn next(&mut self) -> FromGateway {
        timeout(PATIENCE, self.next_or_end()).await.expect("a message in time").expect("the link lives")
    }

    /// The next load.
    pub async fn next_load(&mut self) -> v1::GatewayLoad {
        match self.next_of_all().await.expect("the link lives") {
            FromGateway::Load(load) => load,
            other => panic!("expected a load, found {other:?}"),
        }
    }

    /// `None` when the link is closed.
    pub async fn next_or_end(&mut self) -> Option<FromGateway> {
        loop {
            match self.next_of_all().await? {
                FromGateway::Load(_) => {}
                message => return Some(message),
            }
        }
    }

    async fn next_of_all(&mut self) -> Option<FromGateway> {
        loop {
            if let Some((number, message)) = self.received.pop_first() {
                self.received_through = number;
                return Some(message);
            }
            let item = self.end.receiver.recv().await?;
            let LinkItem::Batch(batch) = item else { panic!("one hello a link") };
            for (number, message) in (batch.first_number..).zip(&batch.messages) {
                if number > self.received_through {
                    self.received.insert(number, message.message.clone().expect("a message"));
                }
            }
        }
    }

    /// Nothing but loads for a while.
    pub async fn is_silent(&mut self, time: Duration) {
        if let Ok(message) = timeout(time, self.next_or_end()).await {
            panic!("expected nothing, found {message:?}");
        }
    }

    pub async fn next_send(&mut self) -> v1::SessionSend {
        match self.next().await {
            FromGateway::Send(send) => send,
            other => panic!("expected a send, found {other:?}"),
        }
    }

    pub async fn say(&mut self, message: FromRouter) {
        self.say_all(vec![message]).await;
    }

    pub async fn say_all(&mut self, messages: Vec<FromRouter>) {
        let first_number = self.next_number;
        self.next_number += messages.len() as u64;
        self.say_numbered(first_number, messages).await;
    }

    pub async fn say_numbered(&mut self, first_number: u64, messages: Vec<FromRouter>) {
        let messages = messages.into_iter().map(|message| v1::RouterMessage { message: Some(message) }).collect();
        let batch = v1::RouterBatch { first_number, acknowledged_through: self.received_through, messages };
        timeout(PATIENCE, self.end.sender.send(LinkItem::Batch(Arc::new(batch))))
            .await
            .expect("the gateway reads")
            .expect("the link lives");
    }

    /// The next message gets this number.
    pub fn continue_at(&mut self, number: u64) {
        self.next_number = number;
    }

    pub async fn acknowledge(&mut self, send: &v1::SessionSend, seq: u64) {
        self.say(result(send, seq)).await;
    }
}

pub fn result(send: &v1::SessionSend, seq: u64) -> FromRouter {
    let inner = send.send.as_ref().expect("a send");
    let ack = v1::SendAck {
        client_message_id: inner.client_message_id.clone(),
        conversation_id: send.conversation_id.clone(),
        seq,
        sent_at_ms: 1,
        status: None,
    };
    FromRouter::SendResult(v1::SendResult { session_id: send.session_id, ack: Some(ack) })
}

/// A live message for sessions, with a body of this many bytes.
pub fn deliver(sessions: &[u64], seq: u64, body_bytes: usize) -> FromRouter {
    let message = v1::Message { seq, body: vec![0; body_bytes].into(), ..v1::Message::default() };
    let frame = frame::frame_to_bytes(&v1::ServerFrame::from(ServerFrame::Message(message)));
    FromRouter::Deliver(v1::Deliver { frame, session_ids: sessions.to_vec() })
}

/// A client that speaks frames, or whatever bytes it likes.
pub struct Client<S> {
    stream: S,
    read: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, read: BytesMut::new() }
    }

    pub async fn send(&mut self, frame: ClientFrame) {
        self.send_bytes(&encode(frame)).await;
    }

    pub async fn send_bytes(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.stream.write_all(bytes)).await.expect("the gateway reads").expect("it is connected");
        self.stream.flush().await.expect("it is connected");
    }

    /// Writes, unless the gateway has closed.
    pub async fn try_send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    /// Writes the same bytes again and again until the gateway closes.
    pub async fn flood(&mut self, bytes: &[u8]) {
        while self.stream.write_all(bytes).await.is_ok() {}
    }

    /// The next frame, or `None` at the end of the stream.
    pub async fn next_or_end(&mut self) -> Option<ServerFrame> {
        loop {
            if let Some(payload) = frame::split_frame(&mut self.read, usize::MAX).expect("well formed") {
                match frame::decode_server_frame(payload).expect("well formed") {
                    Decoded::Frame(frame) => return Some(frame),
                    Decoded::Unknown(field) => panic!("unknown server frame {field}"),
                }
            }
            let read = timeout(PATIENCE, self.stream.read_buf(&mut self.read)).await.expect("a frame in time");
            if read.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    pub async fn next(&mut self) -> ServerFrame {
        self.next_or_end().await.expect("a frame, not the end")
    }

    pub async fn welcome(&mut self) -> v1::Welcome {
        match self.next().await {
            ServerFrame::Welcome(welcome) => welcome,
            other => panic!("expected a welcome, found {other:?}"),
        }
    }

    pub async fn ack(&mut self) -> v1::SendAck {
        match self.next().await {
            ServerFrame::SendAck(ack) => ack,
            other => panic!("expected an ack, found {other:?}"),
        }
    }

    /// The connection ends with this status and nothing after it.
    pub async fn is_closed_with(&mut self, code: StatusCode) {
        match self.next().await {
            ServerFrame::Close(close) => assert_eq!(status_of(close.status.as_ref()), Some(code)),
            other => panic!("expected a close, found {other:?}"),
        }
        assert!(self.next_or_end().await.is_none(), "nothing follows a close");
    }

    /// The connection works: a ping is answered at once.
    pub async fn is_alive(&mut self) {
        self.send(ClientFrame::Ping(v1::Ping { echo: Bytes::from_static(b"alive?") })).await;
        match self.next().await {
            ServerFrame::Pong(pong) => assert_eq!(pong.echo, "alive?"),
            other => panic!("expected a pong, found {other:?}"),
        }
    }
}

pub fn encode(frame: ClientFrame) -> Bytes {
    frame::frame_to_bytes(&v1::ClientFrame::from(frame))
}

pub fn status_of(status: Option<&v1::Status>) -> Option<StatusCode> {
    status.and_then(|status| StatusCode::from_number(status.code))
}
