//! Messages and state tables at rest.
//!
//! Two traits, a closed enum of backends ([`Store`]), one conformance suite. The rules that make them safe for several owners are
//! those of ARCHITECTURE.md ("Ownership"): the epoch is the write timestamp, a batch is applied whole or not at all by a replica, and
//! no answer but success says whether a write took effect.

mod cells;
pub mod cluster;
mod coalesce;
#[cfg(feature = "test-util")]
pub mod conformance;
mod dice;
pub mod embedded;
pub mod faulty;
pub mod hot;
pub mod insistent;
mod memory;
pub mod model;
mod order;
mod place;
pub mod scylla;
pub mod sim;
mod store;
pub mod transfer;

pub use self::scylla::{Scylla, ScyllaCredentials, ScyllaOptions};
pub use cluster::{ClusterError, ClusterRow, note_claim, noted_claim};
pub use embedded::{Embedded, EmbeddedOptions};
pub use faulty::{FaultPlan, Faulty};
pub use hot::{Charge, Hot, HotHead, HotState, Limit, MemoryHot, Presence, RedisHot, RedisOptions};
pub use insistent::Insistent;
pub use memory::Memory;
pub use sim::{SimFaults, SimHandle, SimStore};
pub use store::Store;

pub use model::{
    AppendDone, AppendOutcome, AppendRequest, Batch, BucketId, Fence, Page, Row, RowKey, StateRow, StateWrite,
    StoreError, StoredRow, Table,
};

use std::future::Future;

use bytes::Bytes;
use im_proto::{ConversationId, InstanceId};

/// The message log: rows `((conversation, bucket), seq)`, written with the owner's epoch as timestamp, plus the fence rows.
///
/// At one seq the row with the greater epoch wins, however late it arrives. Reads and writes are quorum operations where there are
/// replicas: a read sees every write that was confirmed before the read began, and may or may not see others.
pub trait MessageLog: Send + Sync {
    /// Writes batches, each whole or not at all, durably, and reports each one's outcome through `done`, in any order, several to a
    /// call. Never blocks. An error leaves the outcome unknown: repeat the identical batch, or give up the conversation.
    ///
    /// A backend bounds what it accepts by its callers: an owner has one batch in flight a conversation.
    fn submit(&self, requests: Vec<AppendRequest>, done: AppendDone);

    /// The newest rows of a bucket, descending by seq, at most [`TAIL_ROWS_MAX`], by one request. The only read that may touch rows
    /// above the committed head: read repair copies just the rows that a read returned.
    fn read_tail(
        &self,
        conversation: ConversationId,
        bucket: BucketId,
    ) -> impl Future<Output = Result<Vec<StoredRow>, StoreError>> + Send;

    /// Rows `from..=to` in ascending order, at most `limit`, over as many buckets as needed. Never ask beyond the committed head: a
    /// backend may give the answer of an equal read that began before this one, since nothing below the head changes. Begin at the
    /// first seq that is kept: a backend may end a range behind 16 buckets without a row.
    fn read_range(
        &self,
        conversation: ConversationId,
        from: u64,
        to: u64,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<StoredRow>, StoreError>> + Send;

    /// Who sent `from..=to` under which client message id, ascending, without bodies. Never ask beyond the committed head.
    fn read_keys(
        &self,
        conversation: ConversationId,
        from: u64,
        to: u64,
    ) -> impl Future<Output = Result<Vec<RowKey>, StoreError>> + Send;

    /// Writes a fence row for each instance, confirmed when this returns. Never deleted.
    fn write_fences(&self, instances: &[InstanceId]) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Whether an instance is fenced, and the generation of the cluster, as of some moment after the call.
    fn read_fence(&self, instance: &InstanceId) -> impl Future<Output = Result<Fence, StoreError>> + Send;

    /// Raises the generation, which fences every router that was started with a lower one. Lower values are ignored.
    fn raise_generation(&self, generation: u64) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// The state tables: what appliers make of the logs. Every row is one value with an explicit timestamp; the greater timestamp wins,
/// at the same timestamp a deletion, then the greater value. Deletions are remembered, but see [`Table::Busy`].
pub trait Directory: Send + Sync {
    /// Writes rows, durably. Each row for itself is applied whole; the set is not atomic. An error leaves the outcome unknown.
    fn write(&self, writes: Vec<StateWrite>) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// One row.
    fn read(
        &self,
        table: Table,
        partition: &[u8],
        key: &[u8],
    ) -> impl Future<Output = Result<Option<StateRow>, StoreError>> + Send;

    /// Rows of a partition in ascending order of their keys, beginning behind `after`, at most `limit`.
    fn scan(
        &self,
        table: Table,
        partition: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<StateRow>, StoreError>> + Send;
}

/// What there is in a store, for tools that go through all of it: export, import, checks. Each page costs a look at a part of every
/// copy, so nothing that serves users comes here.
///
/// What is there from the first page to the last is listed once; what comes or goes meanwhile may be listed or not.
pub trait Inventory: Send + Sync {
    /// Partitions of the log that have rows, in an order of the store's own, at most `limit` (at least 2).
    fn list_buckets(
        &self,
        from: Option<Bytes>,
        limit: usize,
    ) -> impl Future<Output = Result<Page<(ConversationId, BucketId)>, StoreError>> + Send;

    /// Partitions of state tables that have rows or had some, in an order of the store's own, at most `limit` (at least 2).
    fn list_partitions(
        &self,
        from: Option<Bytes>,
        limit: usize,
    ) -> impl Future<Output = Result<Page<(Table, Bytes)>, StoreError>> + Send;
}

/// Rows of a tail read: two batches and one row.
pub const TAIL_ROWS_MAX: usize = 2 * im_proto::limits::BATCH_ROWS_MAX + 1;

/// Bytes of a state row's partition, and of its key.
pub const STATE_KEY_BYTES_MAX: usize = 1024;

/// Bytes of a state row's value.
pub const STATE_VALUE_BYTES_MAX: usize = 1024 * 1024;

/// Bytes of a batch that consists of one row; larger batches are bounded by [`im_proto::limits::BATCH_BYTES_MAX`].
pub const ROW_BYTES_MAX: usize = 4 * 1024 * 1024;
