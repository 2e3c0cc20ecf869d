//! A gateway, the routers it dials and the clients it serves, all in the hands of the test.

mod client;
mod router;
mod surroundings;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use im_gateway::{Gateway, GatewayConfig, PeerInfo, Transport};
use im_proto::{
    BootId, ConversationId, Epoch, InstanceId, ShardCount, UserId, body,
    environment::Environment,
    key::ClusterSecret,
    link::channel::RouterEnd,
    token::{Claims, SigningKey},
    v1,
};
use im_registry::{Claim, Endpoint, Instance, Role, View};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream},
    sync::{mpsc, watch},
    time::timeout,
};
pub use v1::{
    client_frame::Frame as ClientFrame, gateway_message::Message as FromGateway, router_message::Message as FromRouter,
    server_frame::Frame as ServerFrame,
};

use self::surroundings::Dialled;
pub use self::{
    client::{Client, encode, status_of},
    router::{Router, deliver, refusal, result},
    surroundings::{Counts, environment},
};

pub const CLUSTER: &str = "test";
/// Longer than anything takes that happens at all.
pub const PATIENCE: Duration = Duration::from_secs(300);

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
        Router::new(name, end)
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
            user_sends_per_ten_seconds: 100_000,
            user_call_cost_per_ten_seconds: 20_000,
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
