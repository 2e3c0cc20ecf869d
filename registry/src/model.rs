//! What is registered.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use im_proto::{BootId, Epoch, InstanceId, ShardId};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// What a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Gateway,
    Router,
}

/// Where a process can be reached.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    /// `tcp`, `tls`, `quic` for clients; `link` for gateways and routers; `api` for gRPC; `http` for metrics and health.
    pub transport: String,
    /// `host:port`
    pub address: String,
}

/// A registered process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    pub id: InstanceId,
    pub boot: BootId,
    pub role: Role,
    pub endpoints: Vec<Endpoint>,
    /// Where it stands; placement prefers the same zone. Empty if zones are not used.
    pub zone: String,
    pub version: String,
    /// Takes nothing new.
    pub draining: bool,
}

/// A shard held by a router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub shard: ShardId,
    pub owner: InstanceId,
    pub epoch: Epoch,
    /// Every other instance on the predecessor list when the claim was made: to be fenced before anything is read. Empty in a view.
    pub predecessors: Vec<InstanceId>,
}

/// The outcome of one claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimOutcome {
    Claimed(Claim),
    /// Somebody else has it, or the list changed under our hands: look again.
    Taken(ShardId),
}

/// All instances and claims at some moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Grows with each change.
    pub revision: u64,
    pub instances: BTreeMap<InstanceId, Instance>,
    pub claims: BTreeMap<ShardId, Claim>,
}

impl View {
    /// The live instances of a role.
    pub fn of_role(&self, role: Role) -> impl Iterator<Item = &Instance> {
        self.instances.values().filter(move |instance| instance.role == role)
    }

    /// Who has claimed a shard.
    pub fn owner(&self, shard: ShardId) -> Option<&InstanceId> {
        self.claims.get(&shard).map(|claim| &claim.owner)
    }
}

/// A lease that its backend keeps alive.
#[derive(Clone)]
pub struct Lease {
    pub(crate) instance: InstanceId,
    /// The backend's name for it.
    pub(crate) id: u64,
    /// Milliseconds of `Clock::since_boot`: the last successful renewal's send time + TTL − margin.
    pub(crate) deadline_ms: Arc<AtomicU64>,
    pub(crate) lost: watch::Receiver<bool>,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("instance", &self.instance).finish_non_exhaustive()
    }
}

impl Lease {
    /// Whose it is.
    pub fn instance(&self) -> &InstanceId {
        &self.instance
    }

    /// Until this moment of `Clock::since_boot` nobody else can have claimed what this lease holds.
    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms.load(Ordering::Acquire))
    }

    /// Turns true once the registry says that the lease is dead (a revoked one too): the process must start again under a new
    /// instance id.
    pub fn lost(&self) -> watch::Receiver<bool> {
        self.lost.clone()
    }
}

/// The deadline, in milliseconds of `Clock::since_boot`, after a renewal that was sent at `sent_at`. The margin of a fifth of the TTL
/// covers clocks that run at different speeds.
pub(crate) fn deadline_after(sent_at: Duration, ttl: Duration) -> u64 {
    u64::try_from((sent_at + ttl - ttl / 5).as_millis()).unwrap_or(u64::MAX)
}

/// Why the registry gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// No answer: the change may or may not have been made.
    #[error("the registry did not answer: {0}")]
    Unavailable(String),
    /// The lease is dead.
    #[error("the lease of {0} is lost")]
    LeaseLost(InstanceId),
    /// More shards than [`CLAIMS_PER_CALL_MAX`](crate::CLAIMS_PER_CALL_MAX); nothing was changed.
    #[error("one call takes at most {} shards, not {found}", crate::CLAIMS_PER_CALL_MAX)]
    TooManyShards { found: usize },
    /// The registry must not be used as it is: it lost its data, was restored, or belongs to another generation. Nothing was
    /// changed. A person has to look; the text says what to do.
    #[error("the registry must not be used as it is: {0}")]
    Refused(String),
    /// Another process uses what this one wants.
    #[error("{0}")]
    InUse(String),
}
