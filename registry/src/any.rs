//! The closed set of backends. Roles hold an [`AnyRegistry`], never a type parameter.

use std::{sync::Arc, time::Duration};

use im_proto::ShardId;
use tokio::sync::watch;

use crate::{Claim, ClaimOutcome, EtcdRegistry, InProcessHandle, Instance, Lease, Registry, RegistryError, View};

/// A registry of any backend, cheap to clone.
#[derive(Clone)]
pub enum AnyRegistry {
    /// All processes of the cluster live in this one.
    InProcess(InProcessHandle),
    /// The processes of a cluster meet in etcd.
    Etcd(EtcdRegistry),
}

impl From<EtcdRegistry> for AnyRegistry {
    fn from(registry: EtcdRegistry) -> Self {
        AnyRegistry::Etcd(registry)
    }
}

impl From<InProcessHandle> for AnyRegistry {
    fn from(handle: InProcessHandle) -> Self {
        AnyRegistry::InProcess(handle)
    }
}

impl Registry for AnyRegistry {
    async fn register(&self, instance: Instance, ttl: Duration) -> Result<Lease, RegistryError> {
        match self {
            AnyRegistry::InProcess(registry) => registry.register(instance, ttl).await,
            AnyRegistry::Etcd(registry) => registry.register(instance, ttl).await,
        }
    }

    async fn update(&self, lease: &Lease, instance: Instance) -> Result<(), RegistryError> {
        match self {
            AnyRegistry::InProcess(registry) => registry.update(lease, instance).await,
            AnyRegistry::Etcd(registry) => registry.update(lease, instance).await,
        }
    }

    async fn revoke(&self, lease: &Lease) -> Result<(), RegistryError> {
        match self {
            AnyRegistry::InProcess(registry) => registry.revoke(lease).await,
            AnyRegistry::Etcd(registry) => registry.revoke(lease).await,
        }
    }

    fn view(&self) -> watch::Receiver<Arc<View>> {
        match self {
            AnyRegistry::InProcess(registry) => registry.view(),
            AnyRegistry::Etcd(registry) => registry.view(),
        }
    }

    async fn claim(&self, lease: &Lease, shards: &[ShardId]) -> Result<Vec<ClaimOutcome>, RegistryError> {
        match self {
            AnyRegistry::InProcess(registry) => registry.claim(lease, shards).await,
            AnyRegistry::Etcd(registry) => registry.claim(lease, shards).await,
        }
    }

    async fn cut_predecessors(&self, claims: &[Claim]) -> Result<Vec<bool>, RegistryError> {
        match self {
            AnyRegistry::InProcess(registry) => registry.cut_predecessors(claims).await,
            AnyRegistry::Etcd(registry) => registry.cut_predecessors(claims).await,
        }
    }

    async fn release(&self, claims: &[Claim]) -> Result<(), RegistryError> {
        match self {
            AnyRegistry::InProcess(registry) => registry.release(claims).await,
            AnyRegistry::Etcd(registry) => registry.release(claims).await,
        }
    }

    async fn raise_epoch(&self, claim: &Claim) -> Result<Option<Claim>, RegistryError> {
        match self {
            AnyRegistry::InProcess(registry) => registry.raise_epoch(claim).await,
            AnyRegistry::Etcd(registry) => registry.raise_epoch(claim).await,
        }
    }
}
