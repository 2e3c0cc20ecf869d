//! The registry of a cluster, in etcd.
//!
//! One [`EtcdRegistry`] is one process's way to it. Its parts: `keys` (what stands in etcd), `transport` (calls with deadlines, on
//! the next member if one fails), `lineage` (is this still the registry that it was?), `mirror` and `watcher` (a copy of all keys
//! and how it is kept up), `hold` (anti-flap), `leases`, `claims`, `recovery` (the cluster record) and `members` (how etcd is).
//!
//! Invariants:
//! - nothing in here waits for etcd without a deadline, and with etcd gone nothing fails but the calls themselves: views stay as
//!   they are, leases are not lost, their deadlines pass;
//! - a claim is answered only by the registry in which all earlier claims of its generation were made, as far as `lineage` can see;
//! - every call may be repeated.
//!
//! registry/README.md describes the keys for other programs, and what is guaranteed when etcd was lost or restored.

mod claims;
mod hold;
mod keys;
mod leases;
mod lineage;
mod members;
mod metrics;
mod mirror;
mod options;
mod recovery;
mod shared;
mod transport;
mod watcher;

use std::{sync::Arc, time::Duration};

use im_proto::{ShardId, environment::Environment};
use tokio::sync::watch;

pub use keys::ClusterRecord;
pub use members::{EtcdMember, EtcdMemberState};
pub use options::{EtcdOptions, EtcdTls, EtcdUser};
use shared::Shared;

use crate::{Claim, ClaimOutcome, Instance, Lease, Registry, RegistryError, View};

/// The registry as one process sees it. Clones are the same process; when the last one is dropped, nothing is renewed any more.
#[derive(Clone)]
pub struct EtcdRegistry {
    shared: Arc<Shared>,
    /// Ends the tasks when it is dropped.
    tasks: Arc<watch::Sender<()>>,
}

/// Why there is no registry.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The options cannot work, whatever etcd says.
    #[error("{0}")]
    Options(String),
    /// No member answered.
    #[error("etcd cannot be reached: {0}")]
    Unreachable(String),
}

impl EtcdRegistry {
    /// Reads the registry once and watches it from then on, in tasks of `environment`. An etcd without a cluster record, or with
    /// one of another generation, is no error here: see [`Self::check_claims`].
    pub async fn connect(options: EtcdOptions, environment: Environment) -> Result<Self, ConnectError> {
        let shared = Arc::new(Shared::new(options, environment)?);
        shared.reconcile().await.map_err(|error| ConnectError::Unreachable(error.to_string()))?;
        shared.publish();
        let tasks = watch::Sender::new(());
        shared.environment.spawn(watcher::publish(shared.clone(), tasks.subscribe()));
        shared.environment.spawn(watcher::watch(shared.clone(), tasks.subscribe()));
        Ok(Self { shared, tasks: Arc::new(tasks) })
    }
}

impl Registry for EtcdRegistry {
    async fn register(&self, instance: Instance, ttl: Duration) -> Result<Lease, RegistryError> {
        self.shared.register(instance, ttl, self.tasks.subscribe()).await
    }

    async fn update(&self, lease: &Lease, instance: Instance) -> Result<(), RegistryError> {
        self.shared.update(lease, instance).await
    }

    async fn revoke(&self, lease: &Lease) -> Result<(), RegistryError> {
        self.shared.revoke(lease).await
    }

    fn view(&self) -> watch::Receiver<Arc<View>> {
        self.shared.view()
    }

    async fn claim(&self, lease: &Lease, shards: &[ShardId]) -> Result<Vec<ClaimOutcome>, RegistryError> {
        self.shared.claim(lease, shards).await
    }

    async fn cut_predecessors(&self, claims: &[Claim]) -> Result<Vec<bool>, RegistryError> {
        self.shared.cut_predecessors(claims).await
    }

    async fn release(&self, claims: &[Claim]) -> Result<(), RegistryError> {
        self.shared.release(claims).await
    }

    async fn raise_epoch(&self, claim: &Claim) -> Result<Option<Claim>, RegistryError> {
        self.shared.raise_epoch(claim).await
    }
}
