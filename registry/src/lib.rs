//! Who is where: instances under leases, watches, shard claims with epochs and predecessor lists.
//!
//! The rules are those of ARCHITECTURE.md ("Ownership"). A claim is one transaction: only if the shard's claim is absent and its
//! predecessor list is as read, the claim is created (bound to the lease) and the claimer is appended to the predecessor list, which
//! outlives leases.

pub mod any;
pub mod channel;
#[cfg(feature = "test-util")]
pub mod conformance;
pub mod etcd;
pub mod in_process;
pub mod model;

pub use any::AnyRegistry;
pub use channel::{BalancedChannel, ChannelOptions, Idempotent, LongLived};
pub use etcd::{
    ClusterRecord, ConnectError, EtcdMember, EtcdMemberState, EtcdOptions, EtcdRegistry, EtcdTls, EtcdUser,
};
pub use in_process::{InProcessHandle, InProcessRegistry, Reach};
pub use model::{Claim, ClaimOutcome, Endpoint, Instance, Lease, RegistryError, Role, View};

use std::{future::Future, sync::Arc, time::Duration};

use im_proto::ShardId;
use tokio::sync::watch;

/// A registry as one process sees it.
pub trait Registry: Send + Sync {
    /// Registers this process under a lease that the backend keeps alive, until it is revoked or cannot be renewed in time.
    fn register(&self, instance: Instance, ttl: Duration) -> impl Future<Output = Result<Lease, RegistryError>> + Send;

    /// Replaces what is registered under a lease (draining, endpoints).
    fn update(&self, lease: &Lease, instance: Instance) -> impl Future<Output = Result<(), RegistryError>> + Send;

    /// Ends a lease and with it the registration and all claims bound to it.
    fn revoke(&self, lease: &Lease) -> impl Future<Output = Result<(), RegistryError>> + Send;

    /// All instances and claims, always the newest known. It may lag behind the registry by any time.
    fn view(&self) -> watch::Receiver<Arc<View>>;

    /// Claims shards, at most [`CLAIMS_PER_CALL_MAX`]. Each for itself succeeds or is taken. A shard that this very lease holds
    /// already is answered as claimed, with its present epoch: so a call whose answer was lost can be repeated.
    fn claim(
        &self,
        lease: &Lease,
        shards: &[ShardId],
    ) -> impl Future<Output = Result<Vec<ClaimOutcome>, RegistryError>> + Send;

    /// Cuts the predecessor lists to the claimer alone, each only if its claim is unchanged; `false` for a claim that is lost.
    fn cut_predecessors(&self, claims: &[Claim]) -> impl Future<Output = Result<Vec<bool>, RegistryError>> + Send;

    /// Gives shards up: deletes each claim and takes the claimer off the predecessor list, if the claim is unchanged. The caller commits
    /// nothing under them any more. If this fails the claims may stand: [`Self::claim`] answers them under their old epoch then, under
    /// which the caller must not serve them again ([`Self::raise_epoch`]).
    fn release(&self, claims: &[Claim]) -> impl Future<Output = Result<(), RegistryError>> + Send;

    /// Puts a claim again under a greater epoch, if it is unchanged; `None` if it is lost or an earlier call whose answer was lost
    /// has raised it ([`Self::claim`] tells which).
    fn raise_epoch(&self, claim: &Claim) -> impl Future<Output = Result<Option<Claim>, RegistryError>> + Send;
}

/// Shards of one `claim`, `cut_predecessors` or `release` (etcd allows 128 operations a transaction).
pub const CLAIMS_PER_CALL_MAX: usize = 64;
