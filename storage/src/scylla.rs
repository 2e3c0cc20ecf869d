//! The store of a cluster: ScyllaDB, or Apache Cassandra.
//!
//! Three copies of everything, written and read by quorum. The servers keep what ARCHITECTURE.md asks for: a batch of one partition is
//! applied whole or not at all by a copy, at one seq the row with the greater write timestamp (the epoch) wins however late it
//! arrives, and a read of a quorum sees every write that a quorum confirmed before. No lightweight transactions, no clock of any
//! server, no answer but success that says anything.
//!
//! The driver is told to try an unanswered request on a second node and to try failed ones again: every statement binds its values and
//! its timestamp, so that it may run any number of times. What is still not confirmed by the deadline is `Unconfirmed`, and the owner
//! repeats it.
//!
//! Does not create or change the schema: see [`schema`].

mod equal;
mod failure;
mod lane;
mod list;
mod log;
mod metrics;
mod options;
mod query;
pub mod schema;
mod session;
mod state;
mod value;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use im_proto::{ConversationId, InstanceId, environment::Environment};
use scylla::client::session::Session;

pub use self::options::{COMPACTION, ScyllaCredentials, ScyllaOptions};
use self::{
    equal::EqualReads,
    lane::Lane,
    metrics::{ErrorKind, Metrics},
    query::Prepared,
};
use crate::{
    Directory, Inventory, MessageLog,
    model::{
        AppendDone, AppendRequest, Batch, BucketId, Fence, Page, Row, RowKey, StateRow, StateWrite, StoreError,
        StoredRow, Table,
    },
    order::check_batch,
};

/// Fence reads and writes under way at a time: one reader a router, and its opens.
const FENCES_IN_FLIGHT: usize = 64;

/// The backend. Clones share the connections; when the last one is gone they are closed.
#[derive(Clone)]
pub struct Scylla {
    inner: Arc<Inner>,
    equal: Arc<EqualReads>,
    environment: Environment,
}

struct Inner {
    session: Session,
    prepared: Prepared,
    appends: Lane,
    reads: Lane,
    states: Lane,
    fences: Lane,
    appends_waiting_bytes: AtomicUsize,
    appends_waiting_bytes_max: usize,
    metrics: Arc<Metrics>,
}

impl Scylla {
    /// Connects and looks whether the schema is what this program needs. Batches are written by tasks of `environment`. Errors:
    /// [`StoreError::Open`], with what to do.
    pub async fn connect(options: ScyllaOptions, environment: Environment) -> Result<Self, StoreError> {
        options.check()?;
        let session = session::for_store(&options).await?;
        let version = schema::check(&session, &options.keyspace).await?;
        let prepared = Prepared::new(&session, &options.keyspace).await.map_err(session::cannot)?;
        tracing::info!(keyspace = options.keyspace, schema_version = version, "connected to the store");
        let metrics = Arc::new(Metrics::new());
        let lane = |name, places, waiting| Lane::new(name, places, waiting, options.request_timeout, metrics.clone());
        let inner = Inner {
            session,
            prepared,
            // Bounded in bytes, where they are put in.
            appends: lane("append", options.appends_in_flight, usize::MAX),
            reads: lane("read", options.requests_in_flight, options.requests_waiting),
            states: lane("state", options.requests_in_flight, options.requests_waiting),
            fences: lane("fence", FENCES_IN_FLIGHT, options.requests_waiting),
            appends_waiting_bytes: AtomicUsize::new(0),
            appends_waiting_bytes_max: options.appends_waiting_bytes,
            metrics,
        };
        let equal = Arc::new(EqualReads::new(&inner.metrics));
        Ok(Self { inner: Arc::new(inner), equal, environment })
    }
}

impl fmt::Debug for Scylla {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scylla").finish_non_exhaustive()
    }
}

/// Bytes of a batch that waits or is under way; given back when this is dropped.
struct Queued {
    inner: Arc<Inner>,
    bytes: usize,
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.inner.appends_waiting_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Inner {
    /// Takes a batch in, if it is valid and there is room. One batch is always let in, however large.
    fn admit(self: &Arc<Self>, batch: &Batch) -> Result<Queued, StoreError> {
        check_batch(batch)?;
        let bytes = batch.rows.iter().map(Row::bytes).sum();
        let before = self.appends_waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        let queued = Queued { inner: self.clone(), bytes };
        if before > 0 && before.saturating_add(bytes) > self.appends_waiting_bytes_max {
            self.metrics.failed(ErrorKind::QueueFull);
            return Err(StoreError::Unconfirmed("the queue of writes is full; repeat later".into()));
        }
        Ok(queued)
    }
}

impl MessageLog for Scylla {
    /// `done` is called by tasks of the environment, and by the caller for what was refused at once.
    fn submit(&self, requests: Vec<AppendRequest>, done: AppendDone) {
        let mut refused = Vec::new();
        for AppendRequest { token, batch } in requests {
            match self.inner.admit(&batch) {
                Ok(queued) => {
                    let done = done.clone();
                    self.environment.spawn(async move {
                        let outcome = queued.inner.append(&batch).await;
                        drop(queued);
                        done(vec![(token, outcome)]);
                    });
                }
                Err(refusal) => refused.push((token, Err(refusal))),
            }
        }
        if !refused.is_empty() {
            done(refused);
        }
    }

    async fn read_tail(&self, conversation: ConversationId, bucket: BucketId) -> Result<Vec<StoredRow>, StoreError> {
        self.equal.tail(&self.inner, conversation, bucket).await
    }

    async fn read_range(
        &self,
        conversation: ConversationId,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<Vec<StoredRow>, StoreError> {
        self.equal.range(&self.inner, conversation, (from, to), limit).await
    }

    async fn read_keys(&self, conversation: ConversationId, from: u64, to: u64) -> Result<Vec<RowKey>, StoreError> {
        self.equal.keys(&self.inner, conversation, (from, to)).await
    }

    async fn write_fences(&self, instances: &[InstanceId]) -> Result<(), StoreError> {
        self.inner.fence(instances).await
    }

    async fn read_fence(&self, instance: &InstanceId) -> Result<Fence, StoreError> {
        self.inner.fence_read(instance).await
    }

    async fn raise_generation(&self, generation: u64) -> Result<(), StoreError> {
        self.inner.generation(generation).await
    }
}

impl Directory for Scylla {
    async fn write(&self, writes: Vec<StateWrite>) -> Result<(), StoreError> {
        self.inner.state_write(&writes).await
    }

    async fn read(&self, table: Table, partition: &[u8], key: &[u8]) -> Result<Option<StateRow>, StoreError> {
        self.equal.state_read(&self.inner, table, partition, key).await
    }

    async fn scan(
        &self,
        table: Table,
        partition: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<StateRow>, StoreError> {
        self.equal.state_scan(&self.inner, table, partition, after, limit).await
    }
}

impl Inventory for Scylla {
    async fn list_buckets(
        &self,
        from: Option<Bytes>,
        limit: usize,
    ) -> Result<Page<(ConversationId, BucketId)>, StoreError> {
        self.inner.list_buckets(from, limit).await
    }

    async fn list_partitions(&self, from: Option<Bytes>, limit: usize) -> Result<Page<(Table, Bytes)>, StoreError> {
        self.inner.list_partitions(from, limit).await
    }
}
