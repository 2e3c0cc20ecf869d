//! A cluster of its own in a real etcd. Each process can reach it through proxies that can be cut.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime},
};

use etcd_client::Client;
use im_proto::{ShardId, environment::Clock as _};
use im_registry::{
    AnyRegistry, Claim, ClaimOutcome, ConnectError, EtcdOptions, EtcdRegistry, Lease, Registry, View, conformance,
};
use parking_lot::Mutex;
use tokio::{sync::watch, time::timeout};

use crate::{
    proxy::{Proxy, Way},
    support::Surroundings,
};

/// Longer than anything may take that a test waits for.
const PATIENCE: Duration = Duration::from_secs(40);

/// Members of the etcd that the script started, `http://host:port`.
fn members() -> Vec<String> {
    let members = std::env::var("IM_TEST_ETCD")
        .expect("IM_TEST_ETCD must name the members of an etcd (http://host:port,…): run this through deploy/test.sh");
    members.split(',').map(str::to_owned).collect()
}

/// No two tests and no two runs share a key.
fn fresh_cluster_id() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    #[allow(clippy::disallowed_methods, reason = "runs of the tests must differ")]
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    format!("test-{}-{}", now.as_nanos(), COUNT.fetch_add(1, Ordering::Relaxed))
}

pub struct Cluster {
    pub id: String,
    pub members: Vec<String>,
    surroundings: Arc<Surroundings>,
    proxies: Mutex<BTreeMap<String, Vec<Arc<Proxy>>>>,
}

impl Cluster {
    /// At generation 1, in the etcd of the environment.
    pub async fn new() -> Self {
        let cluster = Self::unrecovered().await;
        cluster.registry("first").await.recover(1).await.expect("a cluster record");
        cluster
    }

    /// Without a cluster record.
    pub async fn unrecovered() -> Self {
        Self::on(members())
    }

    pub fn on(members: Vec<String>) -> Self {
        let (id, surroundings) = (fresh_cluster_id(), Surroundings::new());
        Self { id, members, surroundings, proxies: Mutex::default() }
    }

    pub fn options(&self, endpoints: &[String]) -> EtcdOptions {
        EtcdOptions::new(endpoints.to_vec(), &self.id, Some(1))
    }

    pub async fn connect(&self, options: EtcdOptions) -> EtcdRegistry {
        self.try_connect(options).await.expect("etcd answers")
    }

    pub async fn try_connect(&self, options: EtcdOptions) -> Result<EtcdRegistry, ConnectError> {
        EtcdRegistry::connect(options, self.surroundings.environment()).await
    }

    pub async fn registry(&self, name: &str) -> EtcdRegistry {
        self.registry_of(name, &self.members).await
    }

    pub async fn registry_of(&self, name: &str, members: &[String]) -> EtcdRegistry {
        let mut proxies = Vec::new();
        for member in members {
            let target = member.strip_prefix("http://").expect("a plain http endpoint");
            proxies.push(Proxy::start(target).await);
        }
        let endpoints: Vec<String> = proxies.iter().map(|proxy| proxy.url.clone()).collect();
        self.proxies.lock().insert(name.to_owned(), proxies);
        self.connect(self.options(&endpoints)).await
    }

    pub fn proxy(&self, name: &str, index: usize) -> Arc<Proxy> {
        self.proxies.lock()[name][index].clone()
    }

    pub fn set(&self, name: &str, way: Way) {
        for proxy in &self.proxies.lock()[name] {
            proxy.set(way);
        }
    }

    /// etcd itself.
    pub async fn client(&self) -> Client {
        Client::connect(&self.members, None).await.expect("etcd answers")
    }

    /// Drops all history up to now.
    pub async fn compact(&self) {
        let mut etcd = self.client().await;
        let now = etcd.get("/", None).await.expect("get").header().expect("a header").revision();
        // Another test may have compacted further.
        let _ = etcd.compact(now, None).await;
    }
}

impl conformance::Fixture for Cluster {
    type Registry = AnyRegistry;

    async fn process(&self, name: &str) -> AnyRegistry {
        self.registry(name).await.into()
    }

    fn set_connected(&self, name: &str, connected: bool) {
        self.set(name, if connected { Way::Open } else { Way::Cut });
    }

    fn since_boot(&self) -> Duration {
        self.surroundings.since_boot()
    }
}

pub async fn claim(registry: &EtcdRegistry, lease: &Lease, shard: ShardId) -> Claim {
    match registry.claim(lease, &[shard]).await.expect("claim").remove(0) {
        ClaimOutcome::Claimed(claim) => claim,
        ClaimOutcome::Taken(shard) => panic!("shard {} is taken", shard.0),
    }
}

pub async fn eventually(view: &mut watch::Receiver<Arc<View>>, mut until: impl FnMut(&View) -> bool) {
    timeout(PATIENCE, view.wait_for(|view| until(view))).await.expect("the view shows it in time").expect("it lives");
}
