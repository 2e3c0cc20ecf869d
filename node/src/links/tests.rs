//! Links over real connections on loopback.

mod balance;

use std::{path::Path, sync::Arc, time::Duration};

use im_client::{Client, ClientConfig, Endpoint as ClientEndpoint, Event, FollowAll, Target, Transport, Trust};
use im_gateway::{Gateway, GatewayConfig, listener::tcp};
use im_proto::{
    BootId, InstanceId, ShardCount, body,
    environment::Environment,
    key::{ClusterSecret, RouterSecret},
    link::channel::{Connector, GatewayEnd, LinkItem, PeerEnd, RouterEnd},
    token::{Claims, SigningKey},
    v1,
};
use im_registry::{AnyRegistry, Endpoint, InProcessRegistry, Instance, Lease, Registry as _, Role};
use im_router::{Router, RouterConfig};
use im_storage::{Memory, Store};
use ring::{rand::SystemRandom, signature::Ed25519KeyPair};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1 as reflection;

use super::{
    BATCHES_WAITING_MAX, Dialler, ITEM_BYTES_MAX, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT,
    serve::{AcceptLinks, LINK_SERVICE, serve_links},
    tls::ServiceTls,
};
use crate::{data_directory::DataLock, environment::Tasks};

const PATIENCE: Duration = Duration::from_secs(20);
const CLUSTER: &str = "linked";

async fn in_time<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it happens in time")
}

fn name(text: &str) -> InstanceId {
    InstanceId::parse(text).unwrap()
}

/// Keeps the ends that arrive.
struct Kept {
    gateways: mpsc::Sender<RouterEnd>,
    peers: mpsc::Sender<PeerEnd>,
}

impl AcceptLinks for Kept {
    fn gateway(&self, end: RouterEnd) {
        self.gateways.try_send(end).unwrap();
    }

    fn peer(&self, end: PeerEnd) {
        self.peers.try_send(end).unwrap();
    }
}

/// Something that accepts links and does nothing with them.
struct Listening {
    address: String,
    gateways: mpsc::Receiver<RouterEnd>,
    peers: mpsc::Receiver<PeerEnd>,
    tasks: Tasks,
}

impl Listening {
    async fn start(tls: Option<&ServiceTls>) -> Self {
        let tasks = Tasks::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (gateways, arrived_gateways) = mpsc::channel(8);
        let (peers, arrived_peers) = mpsc::channel(8);
        let environment = tasks.environment();
        let kept = Kept { gateways, peers };
        let serving =
            serve_links(listener, Routes::default(), kept, tls, &environment, CancellationToken::new()).unwrap();
        environment.spawn(async move { serving.await.unwrap() });
        Self { address, gateways: arrived_gateways, peers: arrived_peers, tasks }
    }

    async fn link(&mut self, tls: Option<ServiceTls>) -> (GatewayEnd, RouterEnd) {
        let dialler = Dialler::new(tls, false, self.tasks.environment());
        let near = in_time(Connector::<GatewayEnd>::connect(&dialler, &name("r"), &self.address)).await.unwrap();
        (near, in_time(self.gateways.recv()).await.unwrap())
    }
}

fn hello(of: &str) -> v1::LinkHello {
    v1::LinkHello { instance_id: of.to_owned(), ..v1::LinkHello::default() }
}

/// A batch of one send with so large a body.
fn batch(first_number: u64, body_bytes: usize) -> Arc<v1::GatewayBatch> {
    let send = v1::Send { body: vec![7; body_bytes].into(), ..v1::Send::default() };
    let send = v1::SessionSend { send: Some(send), ..v1::SessionSend::default() };
    let message = v1::GatewayMessage { message: Some(v1::gateway_message::Message::Send(send)) };
    Arc::new(v1::GatewayBatch { first_number, acknowledged_through: 0, messages: vec![message] })
}

#[tokio::test]
async fn items_arrive_whole_and_in_order_both_ways() {
    let mut listening = Listening::start(None).await;
    let (mut near, mut far) = listening.link(None).await;
    near.sender.send(LinkItem::Hello(hello("g"))).await.unwrap();
    far.sender.send(LinkItem::Hello(hello("r"))).await.unwrap();
    assert!(matches!(in_time(far.receiver.recv()).await, Some(LinkItem::Hello(found)) if found == hello("g")));
    assert!(matches!(in_time(near.receiver.recv()).await, Some(LinkItem::Hello(found)) if found == hello("r")));
    let sizes = [0, 1, 100, 70_000, 1 << 20, 4 << 20, 8 << 20];
    for (number, bytes) in (1..).zip(sizes) {
        near.sender.send(LinkItem::Batch(batch(number, bytes))).await.unwrap();
        let Some(LinkItem::Batch(arrived)) = in_time(far.receiver.recv()).await else { panic!("no batch") };
        assert_eq!(arrived, batch(number, bytes), "{bytes} bytes");
    }
}

#[tokio::test]
async fn an_end_that_is_given_up_closes_the_other_one() {
    let mut listening = Listening::start(None).await;
    let (mut near, far) = listening.link(None).await;
    drop(far);
    assert!(in_time(near.receiver.recv()).await.is_none());
    in_time(near.sender.closed()).await;
    let (near, mut far) = listening.link(None).await;
    drop(near);
    assert!(in_time(far.receiver.recv()).await.is_none());
    in_time(far.sender.closed()).await;
}

#[tokio::test]
async fn an_item_over_the_limit_breaks_the_link_and_nothing_else() {
    let mut listening = Listening::start(None).await;
    let (near, mut far) = listening.link(None).await;
    near.sender.send(LinkItem::Batch(batch(1, ITEM_BYTES_MAX))).await.unwrap();
    assert!(in_time(far.receiver.recv()).await.is_none());
    let (near, mut far) = listening.link(None).await;
    near.sender.send(LinkItem::Batch(batch(1, 1))).await.unwrap();
    assert!(matches!(in_time(far.receiver.recv()).await, Some(LinkItem::Batch(_))));
}

#[tokio::test]
async fn whoever_is_not_read_has_to_wait() {
    let mut listening = Listening::start(None).await;
    let (near, mut far) = listening.link(None).await;
    const BYTES: usize = 1 << 20;
    let mut sent = 0;
    while timeout(Duration::from_millis(500), near.sender.send(LinkItem::Batch(batch(sent + 1, BYTES)))).await.is_ok() {
        sent += 1;
        assert!(sent < 100, "nothing holds the sender back");
    }
    let in_channels = 2 * BATCHES_WAITING_MAX as u64;
    assert!(sent >= in_channels, "only {sent}");
    // Windows, socket buffers and what is being encoded or decoded.
    assert!(sent <= in_channels + 24, "{sent} batches of 1 MiB wait");
    for number in 1..=sent {
        let Some(LinkItem::Batch(arrived)) = in_time(far.receiver.recv()).await else { panic!("no batch {number}") };
        assert_eq!(arrived.first_number, number);
    }
}

/// Forwards to an address until frozen: then it keeps both connections and moves nothing.
async fn proxy(to: String, mut frozen: watch::Receiver<bool>, environment: &Environment) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    environment.spawn(async move {
        let (mut from, _) = listener.accept().await.unwrap();
        let mut onward = TcpStream::connect(to).await.unwrap();
        tokio::select! {
            biased;
            () = async { let _ = frozen.wait_for(|frozen| *frozen).await; } => std::future::pending().await,
            _ = copy_bidirectional(&mut from, &mut onward) => {}
        }
    });
    address
}

#[tokio::test]
async fn a_peer_that_falls_silent_is_noticed_on_both_sides() {
    let mut listening = Listening::start(None).await;
    let (freeze, frozen) = watch::channel(false);
    listening.address = proxy(listening.address, frozen, &listening.tasks.environment()).await;
    let (mut near, mut far) = listening.link(None).await;
    near.sender.send(LinkItem::Hello(hello("g"))).await.unwrap();
    assert!(in_time(far.receiver.recv()).await.is_some());
    freeze.send_replace(true);
    let since = Instant::now();
    assert!(in_time(near.receiver.recv()).await.is_none() && in_time(far.receiver.recv()).await.is_none());
    let noticed = since.elapsed();
    assert!(noticed < KEEPALIVE_INTERVAL + KEEPALIVE_TIMEOUT + Duration::from_secs(2), "after {noticed:?}");
}

fn identity(root: &Path, role: Role, file: &str) -> ServiceTls {
    let folder = root.join("services");
    let (chain, key) = (folder.join(format!("{file}.pem")), folder.join(format!("{file}.key.pem")));
    ServiceTls::read(role, &folder.join("ca.pem"), &chain, &key).unwrap()
}

fn secrets() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    DataLock::take(root.path()).unwrap().create_secrets(16, &[]).unwrap();
    root
}

#[tokio::test]
async fn a_certificate_opens_the_links_of_its_role_alone() {
    let (ours, theirs) = (secrets(), secrets());
    let router = identity(ours.path(), Role::Router, "router");
    let gateway = identity(ours.path(), Role::Gateway, "gateway");
    let mut listening = Listening::start(Some(&router)).await;
    let (near, mut far) = listening.link(Some(gateway.clone())).await;
    near.sender.send(LinkItem::Hello(hello("g"))).await.unwrap();
    assert!(matches!(in_time(far.receiver.recv()).await, Some(LinkItem::Hello(_))));

    let environment = listening.tasks.environment();
    let dialler = |tls: Option<ServiceTls>| Dialler::new(tls, false, environment.clone());
    let peer = |tls| {
        let (dialler, address) = (dialler(tls), listening.address.clone());
        async move { Connector::<PeerEnd>::connect(&dialler, &name("r"), &address).await.map(|_| ()) }
    };
    let link = |tls| {
        let (dialler, address) = (dialler(tls), listening.address.clone());
        async move { Connector::<GatewayEnd>::connect(&dialler, &name("r"), &address).await.map(|_| ()) }
    };
    assert_eq!(peer(Some(router.clone())).await, Ok(()));
    assert!(in_time(listening.peers.recv()).await.is_some());
    let refused = peer(Some(gateway)).await.unwrap_err();
    assert!(refused.reason.contains("im-router"), "{refused}");
    let refused = link(Some(router)).await.unwrap_err();
    assert!(refused.reason.contains("im-gateway"), "{refused}");
    link(None).await.unwrap_err();
    link(Some(identity(theirs.path(), Role::Gateway, "gateway"))).await.unwrap_err();
    assert!(listening.gateways.try_recv().is_err() && listening.peers.try_recv().is_err());
}

#[tokio::test]
async fn nobody_but_a_router_is_taken_for_one() {
    let root = secrets();
    let gateway = identity(root.path(), Role::Gateway, "gateway");
    // It has a certificate of the CA, and listens where a router should.
    let listening = Listening::start(Some(&gateway)).await;
    let dialler = Dialler::new(Some(gateway), false, listening.tasks.environment());
    let refused = Connector::<GatewayEnd>::connect(&dialler, &name("r"), &listening.address).await;
    assert!(refused.is_err());
}

#[test]
fn an_identity_of_another_role_or_none_is_refused_at_once() {
    let root = secrets();
    let folder = root.path().join("services");
    let read = |chain: &str, key: &str| {
        ServiceTls::read(Role::Router, &folder.join("ca.pem"), &folder.join(chain), &folder.join(key)).map(|_| ())
    };
    assert!(read("router.pem", "router.key.pem").is_ok());
    for (chain, key, says) in [
        ("gateway.pem", "gateway.key.pem", "im-router"),
        ("router.pem", "router.pem", "private key"),
        ("router.key.pem", "router.key.pem", "certificate"),
        ("nothing.pem", "router.key.pem", "cannot read"),
    ] {
        let error = read(chain, key).unwrap_err().to_string();
        assert!(error.contains(says), "{chain}, {key}: {error}");
    }
}

/// Two routers and two gateways, each with its own environment, on one registry and one store in memory.
struct World {
    registry: InProcessRegistry,
    store: Store,
    key: SigningKey,
    secret: ClusterSecret,
    shards: ShardCount,
    tasks: Tasks,
    tls: Option<(ServiceTls, ServiceTls)>,
}

impl World {
    fn new(tls: Option<(ServiceTls, ServiceTls)>) -> Self {
        let der = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self {
            registry: InProcessRegistry::new(1, 0),
            store: Store::from(Memory::new()),
            key: SigningKey::from_pkcs8(der.as_ref()).unwrap(),
            secret: ClusterSecret::new([1; 32]),
            shards: ShardCount::new(16).unwrap(),
            tasks: Tasks::default(),
            tls,
        }
    }

    fn environment(&self) -> Environment {
        self.tasks.environment()
    }

    fn instance(&self, id: &str, role: Role, transport: &str, address: String) -> Instance {
        Instance {
            id: name(id),
            boot: BootId(self.environment().random.next_u64()),
            role,
            endpoints: vec![Endpoint { transport: transport.to_owned(), address }],
            zone: String::new(),
            version: String::new(),
            draining: false,
        }
    }

    async fn router(&self, id: &str) -> Router {
        self.router_and_address(id).await.0
    }

    async fn router_and_address(&self, id: &str) -> (Router, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let instance = self.instance(id, Role::Router, "link", address.clone());
        let router_secret = RouterSecret::new([2; 32]);
        let config = RouterConfig {
            cluster_id: CLUSTER.to_owned(),
            shards: self.shards,
            verify_keys: vec![self.key.verify_key()],
            ..RouterConfig::new(instance.id.clone(), instance.boot, self.secret.clone(), router_secret)
        };
        let registry = AnyRegistry::from(self.registry.handle(id, self.environment()));
        let tls = self.tls.as_ref().map(|(router, _)| router);
        let peers = Arc::new(Dialler::new(tls.cloned(), false, self.environment()));
        let router = Router::start(config, self.environment(), self.store.clone(), registry, instance, peers);
        let router = router.await.unwrap();
        let around = router.health_and_reflection(&[LINK_SERVICE]).await.unwrap();
        let (accepts, never) = (router.clone(), CancellationToken::new());
        let serving = serve_links(listener, around, accepts, tls, &self.environment(), never).unwrap();
        self.environment().spawn(async move { serving.await.unwrap() });
        (router, address)
    }

    async fn gateway(&self, id: &str) -> (Gateway, Lease, String) {
        self.gateway_with(id, GatewayConfig::new(CLUSTER)).await
    }

    async fn gateway_with(&self, id: &str, config: GatewayConfig) -> (Gateway, Lease, String) {
        let listener = tcp::bind(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.address().to_string();
        let instance = self.instance(id, Role::Gateway, "tcp", address.clone());
        let registry = AnyRegistry::from(self.registry.handle(id, self.environment()));
        let lease = registry.register(instance.clone(), Duration::from_secs(10)).await.unwrap();
        let tls = self.tls.as_ref().map(|(_, gateway)| gateway.clone());
        let gateway = Gateway::start(
            config,
            self.environment(),
            instance.id,
            instance.boot,
            self.secret.clone(),
            self.shards,
            registry.view(),
            Arc::new(Dialler::new(tls, false, self.environment())),
        );
        self.environment().spawn(listener.run(gateway.clone()));
        (gateway, lease, address)
    }

    async fn client(&self, user: &str, gateway: &str) -> Client {
        let now = self.environment().clock.now().as_millis() / 1000;
        let claims = Claims {
            sub: user.to_owned(),
            device: "d".to_owned(),
            platform: "terminal".to_owned(),
            iss: "im".to_owned(),
            aud: CLUSTER.to_owned(),
            iat: now,
            exp: now + 3600,
        };
        let endpoint = ClientEndpoint::new(Transport::Tcp, gateway).unwrap();
        let token = self.key.sign(&claims).unwrap();
        let mut config = ClientConfig::new(vec![endpoint], token, &Trust::SystemRoots).unwrap();
        config.follow_all = FollowAll::FromStart;
        config.environment = self.environment();
        in_time(Client::connect(config)).await.unwrap()
    }
}

async fn next_from(events: &mut mpsc::Receiver<Event>, sender: &str) -> (u64, bytes::Bytes) {
    loop {
        match in_time(events.recv()).await.expect("the client lives") {
            Event::Message(entry) if entry.sender.as_ref().is_some_and(|found| found.as_str() == sender) => {
                return (entry.seq, entry.body);
            }
            _ => {}
        }
    }
}

async fn chat(world: &World) {
    let _ = tracing_subscriber::fmt()
        .with_env_filter("im_router=debug,im_gateway=debug,im_client=debug,imd=debug")
        .with_writer(std::io::stderr)
        .try_init();
    let (one, other) = (world.router("r1").await, world.router("r2").await);
    let first = world.gateway("g1").await;
    let second = world.gateway("g2").await;
    let alice = world.client("alice", &first.2).await;
    let bob = world.client("bob", &second.2).await;
    let (mut to_alice, mut to_bob) = (alice.events().unwrap(), bob.events().unwrap());
    // Users enough that both routers own some of them and of their conversations.
    for seq in 1..=20 {
        let said = body::text(format!("{seq}"));
        let sent = in_time(alice.send(Target::peer("bob").unwrap(), said.clone())).await.unwrap();
        assert_eq!((sent.seq, next_from(&mut to_bob, "alice").await), (2 * seq - 1, (2 * seq - 1, said.clone())));
        in_time(bob.send(Target::peer("alice").unwrap(), said.clone())).await.unwrap();
        assert_eq!(next_from(&mut to_alice, "bob").await, (2 * seq, said));
    }
    let (carol, group) = (world.client("carol", &second.2).await, ["bob", "carol"]);
    let members: Vec<_> = group.iter().map(|user| im_proto::UserId::parse(user).unwrap()).collect();
    let mut to_carol = carol.events().unwrap();
    let group = in_time(alice.create_group("both routers", &members)).await.unwrap();
    let said = body::text("to all");
    in_time(alice.send(Target::Conversation(group), said.clone())).await.unwrap();
    // The creation of the group and what came before are entries too.
    for events in [&mut to_bob, &mut to_carol] {
        while next_from(events, "alice").await.1 != said {}
    }
    for router in [one, other] {
        assert!(in_time(router.stop(PATIENCE)).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_on_different_gateways_and_routers_chat() {
    let world = World::new(None);
    chat(&world).await;
    world.tasks.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_chat_over_mutual_tls_too() {
    let root = secrets();
    let router = identity(root.path(), Role::Router, "router");
    let world = World::new(Some((router, identity(root.path(), Role::Gateway, "gateway"))));
    chat(&world).await;
    world.tasks.stop().await;
}

#[tokio::test]
async fn a_router_says_at_its_links_that_it_serves_until_it_stops_and_what() {
    let world = World::new(None);
    let (router, address) = world.router_and_address("r1").await;
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    for service in ["", LINK_SERVICE] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let mut changes = in_time(health.watch(request)).await.unwrap().into_inner();
        let serving = in_time(changes.message()).await.unwrap().unwrap();
        assert_eq!(serving.status(), ServingStatus::Serving, "{service:?}");
        if service == LINK_SERVICE {
            assert!(in_time(router.stop(PATIENCE)).await);
            assert_eq!(in_time(changes.message()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
        }
    }
    let list = reflection::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = reflection::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut client = reflection::server_reflection_client::ServerReflectionClient::new(channel);
    let answers = in_time(client.server_reflection_info(tokio_stream::iter([request]))).await.unwrap();
    let answer = in_time(answers.into_inner().message()).await.unwrap().unwrap().message_response;
    let Some(reflection::server_reflection_response::MessageResponse::ListServicesResponse(list)) = answer else {
        panic!("not a list: {answer:?}");
    };
    assert!(list.service.iter().any(|service| service.name == LINK_SERVICE), "{list:?}");
    world.tasks.stop().await;
}
