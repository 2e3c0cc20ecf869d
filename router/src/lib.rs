//! A router: owns shards, numbers, stores and fans out messages, holds users' sessions, serves the api.
//!
//! The parts: [`Router`] puts them together; `ownership` claims shards and fences predecessors; a `worker` for each core owns the
//! conversations and users of its shards; `open` reads a conversation at take-over; `fence` checks ownership at commit;
//! `gateway_link` and `peer_link` are the links; `api` dispatches calls; `placement` answers `Locate`, `balance` keeps gateways
//! within their bounds.

mod api;
mod audience;
mod balance;
mod caller;
mod cluster;
pub mod config;
mod conversation;
mod deadline;
mod fence;
mod gateway_link;
pub mod grpc;
mod link_queue;
mod message;
mod metrics;
mod mistake;
mod open;
mod ownership;
mod peer_link;
pub mod placement;
mod state;
mod user_limits;
mod watches;
mod worker;

pub use cluster::Ended;
pub use config::RouterConfig;

use std::{sync::Arc, time::Duration};

use im_proto::{
    environment::Environment,
    link::channel::{Connector, PeerEnd, RouterEnd},
};
use im_registry::{AnyRegistry, Instance, Lease, Registry as _, RegistryError};
use im_storage::Store;
use tokio::sync::watch;

use self::{cluster::Cluster, deadline::StoreCalls, fence::FenceService, ownership::Ownership, worker::Worker};

/// A running router. Cheap to clone; it runs until [`Router::stop`], or until it ends by itself ([`Router::ended`]).
#[derive(Clone)]
pub struct Router {
    cluster: Arc<Cluster>,
    lease: Lease,
    stop: watch::Sender<bool>,
    released: watch::Receiver<bool>,
}

impl Router {
    /// Registers `instance` and begins to claim shards. `peers` dials other routers; a router that is alone never uses it.
    pub async fn start(
        config: RouterConfig,
        environment: Environment,
        store: Store,
        registry: AnyRegistry,
        instance: Instance,
        peers: Arc<dyn Connector<PeerEnd>>,
    ) -> Result<Self, RegistryError> {
        let lease: Lease = registry.register(instance, config.lease_ttl).await?;
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..config.workers.max(1)).map(|_| cluster::inbox()).unzip();
        let config = RouterConfig { workers: config.workers.max(1), ..config };
        let store = StoreCalls::new(store, config.store_timeout);
        let cluster = Arc::new(Cluster::new(config, environment.clone(), senders.clone()));
        let (fence, requests) = FenceService::new();
        environment.spawn(fence::run(cluster.clone(), store.clone(), requests));
        let (raises, raise_requests) = cluster::inbox();
        for (index, (sender, receiver)) in senders.into_iter().zip(receivers).enumerate() {
            let worker = Worker::new(
                index,
                cluster.clone(),
                store.clone(),
                raises.clone(),
                fence.clone(),
                lease.clone(),
                sender,
            );
            environment.spawn(worker.run(receiver));
        }
        let (stop, stopping) = watch::channel(false);
        let (released, is_released) = watch::channel(false);
        let ownership = Ownership::new(
            cluster.clone(),
            store,
            registry.clone(),
            lease.clone(),
            raise_requests,
            stopping.clone(),
            released,
        );
        environment.spawn(user_limits::account(cluster.clone()));
        environment.spawn(balance::run(cluster.clone(), stopping.clone()));
        environment.spawn(ownership::follow_view(cluster.clone(), registry.clone(), lease.clone(), stopping));
        environment.spawn(ownership.run());
        environment.spawn(peer_link::maintain(cluster.clone(), peers, registry.view()));
        Ok(Self { cluster, lease, stop, released: is_released })
    }

    /// Serves a link that a gateway has dialled.
    pub fn accept_gateway(&self, end: RouterEnd) {
        self.cluster.environment.spawn(gateway_link::serve(self.cluster.clone(), end));
    }

    /// Serves a link that another router has dialled.
    pub fn accept_peer(&self, end: PeerEnd) {
        self.cluster.environment.spawn(peer_link::serve(self.cluster.clone(), end));
    }

    /// Tells why the router ended by itself, once it has.
    pub fn ended(&self) -> watch::Receiver<Option<Ended>> {
        self.cluster.ended()
    }

    /// How long nobody else can have taken what this router holds, by its own clock. A router that ends by itself with some of it left
    /// was paused, and its clock does not show that.
    pub fn lease_left(&self) -> Duration {
        self.lease.deadline().saturating_sub(self.cluster.environment.clock.since_boot())
    }

    /// Gives up all shards with nothing in flight, then the lease. Returns `false` if that took longer than `deadline`.
    pub async fn stop(&self, deadline: Duration) -> bool {
        self.stop.send_replace(true);
        let mut released = self.released.clone();
        let mut ended = self.ended();
        let done = tokio::time::timeout(deadline, async {
            tokio::select! {
                biased;
                _ = ended.wait_for(Option::is_some) => {}
                _ = released.wait_for(|released| *released) => {}
            }
        })
        .await
        .is_ok();
        self.cluster.stop_workers();
        done
    }
}
