//! The etcd backend on a real etcd. `deploy/test.sh` runs these with the address in IM_TEST_ETCD.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime},
};

use im_proto::ShardId;
use im_registry::{AnyRegistry, EtcdOptions, EtcdRegistry, Registry as _, conformance};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    proxy::{Proxy, Way},
    support::{Surroundings, router},
};

/// Members of the etcd that the script started, `http://host:port`.
fn members() -> Vec<String> {
    let members = std::env::var("IM_TEST_ETCD")
        .expect("IM_TEST_ETCD must name the members of an etcd (http://host:port,…): run this through deploy/test.sh");
    members.split(',').map(str::to_owned).collect()
}

fn host_and_port(url: &str) -> &str {
    url.strip_prefix("http://").expect("a plain http endpoint")
}

/// No two tests and no two runs share a key.
fn fresh_cluster_id() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    format!("test-{}-{}", now.as_nanos(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// A cluster of its own in a shared etcd; each process reaches it through a proxy.
struct Cluster {
    id: String,
    members: Vec<String>,
    surroundings: Arc<Surroundings>,
    proxies: Mutex<BTreeMap<String, Vec<Arc<Proxy>>>>,
}

impl Cluster {
    async fn new() -> Self {
        let cluster = Self {
            id: fresh_cluster_id(),
            members: members(),
            surroundings: Surroundings::new(),
            proxies: Mutex::default(),
        };
        cluster.registry("first").await.recover(1).await.expect("a cluster record");
        cluster
    }

    async fn registry(&self, name: &str) -> EtcdRegistry {
        self.registry_of(name, &self.members).await
    }

    async fn registry_of(&self, name: &str, members: &[String]) -> EtcdRegistry {
        let mut proxies = Vec::new();
        for member in members {
            proxies.push(Proxy::start(host_and_port(member)).await);
        }
        let endpoints = proxies.iter().map(|proxy| proxy.url.clone()).collect();
        self.proxies.lock().insert(name.to_owned(), proxies);
        let options = EtcdOptions::new(endpoints, &self.id, Some(1));
        EtcdRegistry::connect(options, self.surroundings.environment()).await.expect("etcd answers")
    }
}

impl conformance::Fixture for Cluster {
    type Registry = AnyRegistry;

    async fn process(&self, name: &str) -> AnyRegistry {
        self.registry(name).await.into()
    }

    fn set_connected(&self, name: &str, connected: bool) {
        for proxy in &self.proxies.lock()[name] {
            proxy.set(if connected { Way::Open } else { Way::Cut });
        }
    }

    fn since_boot(&self) -> Duration {
        im_proto::environment::Clock::since_boot(&*self.surroundings)
    }
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn etcd_conforms() {
    conformance::all(Cluster::new).await;
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_member_that_does_not_answer_is_left_for_the_next() {
    let cluster = Cluster::new().await;
    let member = cluster.members[0].clone();
    let registry = cluster.registry_of("a", &[member.clone(), member]).await;
    cluster.proxies.lock()["a"][0].set(Way::Silent);
    let started = Instant::now();
    let lease = registry.register(router("a"), conformance::TTL).await.expect("the other member answers");
    assert!(started.elapsed() < Duration::from_secs(5), "one deadline and the answer");
    let started = Instant::now();
    registry.claim(&lease, &[ShardId(1)]).await.expect("claim");
    assert!(started.elapsed() < Duration::from_secs(1), "the silent member is not asked again");
}
