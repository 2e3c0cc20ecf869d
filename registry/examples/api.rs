//! Another service sends messages through the api of a cluster: mutual TLS, whatever router lives, each message once.
//!
//! ```text
//! deploy/local/services up && deploy/local/cluster up
//! eval "$(deploy/local/cluster env)"
//! export IM_TOKEN=$(deploy/local/cluster token alice)
//! seq 1 1000 | cargo run --release -p im-registry --example api -- bob
//! ```
//!
//! One message a line of standard input; prints the seq of each. Kill a router meanwhile: the calls go on.

use std::{
    collections::hash_map::RandomState,
    env,
    error::Error,
    fs,
    hash::{BuildHasher as _, Hasher as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use im_proto::{
    Timestamp, body,
    environment::{Clock, Environment, Random, Spawn, Task},
    v1::{HistoryRequest, SendRequest, Target, message_service_client::MessageServiceClient, target},
};
use im_registry::{BalancedChannel, ChannelOptions, EtcdOptions, EtcdRegistry, Idempotent, Registry as _, Role};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, stdin},
    time::{Instant, sleep},
};
use tonic::{
    Code, Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, ClientTlsConfig, Identity},
};

/// What a service reaches a cluster with. The channel follows the registry as long as that lives.
pub struct Api {
    pub channel: BalancedChannel,
    _registry: EtcdRegistry,
}

/// `ca` is `services/ca.pem` of `imd secrets`; `identity` its `service.pem` and `service.key.pem`.
pub async fn connect(
    etcd: &str,
    cluster_id: &str,
    ca: &Path,
    identity: Option<(&Path, &Path)>,
) -> Result<Api, Box<dyn Error>> {
    let environment = Environment {
        clock: Arc::new(Surroundings(Instant::now())),
        random: Arc::new(Surroundings(Instant::now())),
        tasks: Arc::new(Surroundings(Instant::now())),
    };
    // Without a generation: it looks, and claims nothing.
    let members = etcd.split(',').map(str::to_owned).collect();
    let registry = EtcdRegistry::connect(EtcdOptions::new(members, cluster_id, None), environment.clone()).await?;
    // A router proves its role by the name in its certificate, wherever it runs.
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(fs::read(ca)?)).domain_name("im-router");
    if let Some((chain, key)) = identity {
        tls = tls.identity(Identity::from_pem(fs::read(chain)?, fs::read(key)?));
    }
    let options = ChannelOptions { tls: Some(tls), ..ChannelOptions::new(Role::Router, "api") };
    Ok(Api { channel: BalancedChannel::new(registry.view(), options, environment), _registry: registry })
}

/// Between repeats of a call that nobody could answer: the shards of a router that died have no owner until its lease is over.
const PAUSE: Duration = Duration::from_millis(200);

/// One user who writes to another.
pub struct Writer {
    messages: MessageServiceClient<BalancedChannel>,
    bearer: MetadataValue<Ascii>,
    target: Target,
    /// How far the conversation is known to go: there a router begins to look whether it has a message already.
    known_seq: u64,
}

impl Writer {
    pub async fn new(channel: BalancedChannel, token: &str, peer: &str) -> Result<Self, Status> {
        let bearer = format!("Bearer {token}").parse().map_err(|_| Status::unauthenticated("this is no token"))?;
        let target = Target { target: Some(target::Target::PeerUserId(peer.to_owned())) };
        let mut writer = Self { messages: MessageServiceClient::new(channel), bearer, target, known_seq: 0 };
        let newest = HistoryRequest { target: Some(writer.target.clone()), from: 1, to: 0, limit: 1, newest: true };
        let mut messages = writer.messages.clone();
        writer.known_seq = match writer.until_answered(newest, async |request| messages.history(request).await).await {
            Ok(reply) => reply.head,
            // Nobody has said anything yet.
            Err(status) if status.code() == Code::NotFound => 0,
            Err(status) => return Err(status),
        };
        Ok(writer)
    }

    /// Gives the seq. The same id and text have the same seq, however often they are sent.
    pub async fn send(&mut self, id: &str, text: &str) -> Result<u64, Status> {
        let message = SendRequest {
            target: Some(self.target.clone()),
            client_message_id: id.to_owned().into(),
            body: body::text(text),
            known_seq: self.known_seq,
        };
        let mut messages = self.messages.clone();
        let sent = self.until_answered(message, async |request| messages.send(request).await).await?;
        self.known_seq = sent.seq;
        Ok(sent.seq)
    }

    /// Whatever may have arrived is repeated: by the channel at another router, and here until there is an owner again.
    async fn until_answered<Q: Clone, A>(
        &self,
        message: Q,
        mut call: impl AsyncFnMut(Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Status> {
        loop {
            let mut request = Request::new(message.clone());
            request.metadata_mut().insert("authorization", self.bearer.clone());
            request.extensions_mut().insert(Idempotent);
            match call(request).await {
                Err(status) if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) => {
                    sleep(PAUSE).await
                }
                answer => return answer.map(Response::into_inner),
            }
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let peer = env::args().nth(1).ok_or("usage: api USER <LINES")?;
    let (etcd, secrets, token) = (env::var("IM_ETCD")?, env::var("IM_SECRETS")?, env::var("IM_TOKEN")?);
    let secrets = Path::new(&secrets);
    let cluster: serde_json::Value = serde_json::from_slice(&fs::read(secrets.join("cluster.json"))?)?;
    let cluster_id = cluster["cluster_id"].as_str().ok_or("cluster.json has no cluster_id")?;
    let services = secrets.join("services");
    let (chain, key) = (services.join("service.pem"), services.join("service.key.pem"));
    let api = connect(&etcd, cluster_id, &services.join("ca.pem"), Some((&chain, &key))).await?;

    // A service that may die in between keeps the ids with what it has to say, so that it can repeat them when it is back.
    let run = Surroundings(Instant::now()).next_u64();
    let mut writer = Writer::new(api.channel.clone(), &token, &peer).await?;
    let mut lines = BufReader::new(stdin()).lines();
    let mut number = 0_u64;
    while let Some(line) = lines.next_line().await? {
        number += 1;
        println!("{}", writer.send(&format!("{run:016x}-{number}"), &line).await?);
    }
    Ok(())
}

/// Time, randomness and tasks of an ordinary process. A service that uses `im-client` has them as `im_client::environment::system`.
struct Surroundings(Instant);

impl Clock for Surroundings {
    fn now(&self) -> Timestamp {
        Timestamp::default()
    }

    fn since_boot(&self) -> Duration {
        // Leases are measured with it, and this process holds none.
        self.0.elapsed()
    }
}

impl Random for Surroundings {
    fn next_u64(&self) -> u64 {
        // Each has keys of its own.
        RandomState::new().build_hasher().finish()
    }
}

impl Spawn for Surroundings {
    #[allow(clippy::disallowed_methods, reason = "this is where tasks of this process go")]
    fn spawn(&self, task: Task) {
        tokio::spawn(task);
    }
}
