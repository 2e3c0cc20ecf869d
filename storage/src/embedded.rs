//! The embedded store: one copy, in one process, durable before it answers.
//!
//! One writer thread commits everything that waits as one fjall batch with one `fdatasync`, while the next group gathers; there is no
//! timer. A group is answered only after the sync returned, each submitter once. Whatever fails in a commit stops the store for good:
//! after a failed sync nobody knows what the disk holds, so every write, outstanding or later, is answered [`StoreError::Stopped`],
//! and the process is expected to exit ([`Embedded::stopped`]). Reads go on.
//!
//! Does not replicate, does not serve two processes, does not erase bodies yet.

mod engine;
mod group;
mod journal;
mod memtables;
mod metrics;
mod queue;
mod reader;
mod record;
mod writer;

use std::{collections::BTreeSet, fmt, path::Path, sync::Arc, thread, time::Duration};

use bytes::Bytes;
use im_proto::{ConversationId, InstanceId};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot, watch};

use self::{
    engine::Engine,
    queue::{Waiter, Work},
    reader::Bound,
    writer::Core,
};
use crate::{
    Directory, Inventory, MessageLog, TAIL_ROWS_MAX,
    model::{
        AppendDone, AppendRequest, BucketId, Fence, Page, RowKey, StateRow, StateWrite, StoreError, StoredRow, Table,
    },
    place,
};

/// Rows up to which a read is tried by the calling task itself, within [`Bound::SHORT`]; longer ones go to a thread for blocking work.
const INLINE_ROWS_MAX: u64 = 512;
/// Long reads at once: each has a thread, and a start reads what is busy in each of a thousand shards.
const LONG_READS_MAX: usize = 32;

/// What can be chosen about an embedded store.
#[derive(Clone, Debug)]
pub struct EmbeddedOptions {
    /// Blocks kept in memory for reads.
    pub cache_bytes: u64,
    /// The part of the log that is in memory and in the journal only. Some five times as much is in use at a time: the engine takes no
    /// write while four full ones wait to be written out. Fixed at creation.
    pub memtable_bytes: u64,
    /// Writes that may wait. Beyond it a submitter is told `Unconfirmed` at once and repeats later.
    pub queue_bytes: usize,
    /// Where a commit stops collecting. 8 MiB are about 60,000 messages, and some 10 ms of a disk that writes 1 GB/s.
    pub group_bytes: usize,
    /// Runs from this size are kept in blob files beside the tree, so that compaction need not move them. Fixed at creation. Off,
    /// because fjall 3.1 does not sync the directory of its blob files: a file system that does not make the name of a synced file
    /// durable by itself may lose one with the power, and acknowledged messages with it (ADR 0002).
    pub blob_threshold_bytes: Option<u32>,
    /// Threads that flush and compact, two at least: with one a memtable grows for as long as a compaction takes, and requests to write
    /// it out fill the queue that only this thread empties. The first of them does not compact: fjall 3.1 lets it hand every request to
    /// compact back to the queue without a pause, so that it burns a core as long as all others are busy. With two that is every
    /// compaction; with four it was not seen (ADR 0002).
    pub worker_threads: usize,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
            memtable_bytes: 64 << 20,
            queue_bytes: 256 << 20,
            group_bytes: 8 << 20,
            blob_threshold_bytes: None,
            worker_threads: 4,
        }
    }
}

/// The backend. Clones share the store; when the last one is gone it is closed.
#[derive(Clone)]
pub struct Embedded {
    handle: Arc<Handle>,
}

struct Handle {
    core: Arc<Core>,
    /// One permit for each long read under way.
    long_reads: Arc<Semaphore>,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

/// Fences and the generation, as committed. Every commit of a router asks for them, so they are kept in memory.
#[derive(Default)]
struct FenceTable {
    fenced: BTreeSet<InstanceId>,
    generation: u64,
}

impl Embedded {
    /// Opens the store in a directory and creates it if there is none. Blocks for as long as it takes to check and replay the
    /// journals. Errors: [`StoreError::InUse`], [`StoreError::Damaged`], [`StoreError::Open`].
    pub fn open(directory: &Path, options: EmbeddedOptions) -> Result<Self, StoreError> {
        let engine = Engine::open(directory, &options)?;
        let fences = FenceTable { fenced: engine.fences()?.into_iter().collect(), generation: engine.generation()? };
        let core = Arc::new(Core::new(engine, fences, &options));
        let spawn = |name: &str, run: fn(&Core)| {
            let core = core.clone();
            thread::Builder::new().name(name.into()).spawn(move || run(&core))
        };
        let threads = spawn("im-store-writer", writer::run)
            .and_then(|first| Ok(vec![first, spawn("im-store-watchdog", writer::watch)?]))
            .map_err(|error| engine::cannot_open(directory, &error))?;
        let long_reads = Arc::new(Semaphore::new(LONG_READS_MAX));
        Ok(Self { handle: Arc::new(Handle { core, long_reads, threads: Mutex::new(threads) }) })
    }

    /// Why the store has stopped taking writes, as soon as it has. A process that sees a reason here exits with an error.
    pub fn stopped(&self) -> watch::Receiver<Option<String>> {
        self.handle.core.stopped.subscribe()
    }

    /// Commits what waits, refuses what comes later, and ends the threads. The directory stays locked until the last clone is gone.
    /// Blocks for one commit.
    pub fn close(&self) {
        self.handle.close();
    }

    fn core(&self) -> &Core {
        &self.handle.core
    }

    async fn confirmed(&self, work: impl FnOnce(Waiter) -> Work) -> Result<(), StoreError> {
        let (waiter, outcome) = oneshot::channel();
        self.core().queue.put(work(waiter));
        outcome.await.unwrap_or_else(|_| Err(StoreError::Stopped("the writer has gone".into())))
    }

    /// Reads with the engine: short reads here, long ones where they hold nobody up. What turns out to be long is begun again there.
    async fn engine<T: Send + 'static>(
        &self,
        rows: u64,
        read: impl Fn(&Engine, Bound) -> Result<Option<T>, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        if rows <= INLINE_ROWS_MAX
            && let Some(found) = read(&self.core().engine, Bound::SHORT)?
        {
            return Ok(found);
        }
        let core = self.handle.core.clone();
        let stopped = |_| StoreError::Stopped("long reads have ended".into());
        let permit = self.handle.long_reads.clone().acquire_owned().await.map_err(stopped)?;
        let reading = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            read(&core.engine, Bound::NONE)
        });
        let found = reading.await.unwrap_or(Ok(None))?;
        found.ok_or_else(|| StoreError::Unconfirmed("the read was cut short".into()))
    }
}

impl Handle {
    fn close(&self) {
        self.core.queue.close(StoreError::Stopped("the store was closed".into()));
        let join = |thread: thread::JoinHandle<()>| {
            // The last handle may be dropped by a callback, on one of the threads itself.
            if thread.thread().id() != thread::current().id() {
                // A thread that panicked has stopped the store and said so.
                let _ = thread.join();
            }
        };
        // The writer first: what waits is committed under the eyes of the watchdog.
        let mut threads = std::mem::take(&mut *self.threads.lock()).into_iter();
        threads.next().map(join);
        self.core.end_watch();
        threads.for_each(join);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Embedded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Embedded").finish_non_exhaustive()
    }
}

impl MessageLog for Embedded {
    /// `done` is called on the writer thread: it must not block.
    fn submit(&self, requests: Vec<AppendRequest>, done: AppendDone) {
        if !requests.is_empty() {
            self.core().queue.put(Work::Append { requests, done });
        }
    }

    async fn read_tail(&self, conversation: ConversationId, bucket: BucketId) -> Result<Vec<StoredRow>, StoreError> {
        let read = move |engine: &Engine, bound| reader::tail(engine, conversation, bucket, bound);
        self.engine(TAIL_ROWS_MAX as u64, read).await
    }

    async fn read_range(
        &self,
        conversation: ConversationId,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<Vec<StoredRow>, StoreError> {
        let rows = to.saturating_sub(from).min(limit as u64);
        let read = move |engine: &Engine, bound| reader::range(engine, conversation, (from, to), limit, true, bound);
        self.engine(rows, read).await
    }

    async fn read_keys(&self, conversation: ConversationId, from: u64, to: u64) -> Result<Vec<RowKey>, StoreError> {
        let read =
            move |engine: &Engine, bound| reader::range(engine, conversation, (from, to), usize::MAX, false, bound);
        let rows = self.engine(to.saturating_sub(from), read).await?;
        Ok(rows.into_iter().map(RowKey::from).collect())
    }

    async fn write_fences(&self, instances: &[InstanceId]) -> Result<(), StoreError> {
        let instances = instances.to_vec();
        self.confirmed(|waiter| Work::Fences { instances, waiter }).await
    }

    async fn read_fence(&self, instance: &InstanceId) -> Result<Fence, StoreError> {
        let fences = self.core().fences.read();
        Ok(Fence { fenced: fences.fenced.contains(instance), generation: fences.generation })
    }

    async fn raise_generation(&self, generation: u64) -> Result<(), StoreError> {
        self.confirmed(|waiter| Work::Generation { generation, waiter }).await
    }
}

impl Directory for Embedded {
    async fn write(&self, writes: Vec<StateWrite>) -> Result<(), StoreError> {
        self.confirmed(|waiter| Work::State { writes, waiter }).await
    }

    async fn read(&self, table: Table, partition: &[u8], key: &[u8]) -> Result<Option<StateRow>, StoreError> {
        let mut stored = Vec::with_capacity(record::state_prefix_bytes(partition) + key.len());
        record::put_state_key(&mut stored, table, partition, key);
        let Some(cell) = self.core().engine.state_cell(&stored)? else { return Ok(None) };
        Ok(crate::cells::state_row(&Bytes::copy_from_slice(key), &cell))
    }

    async fn scan(
        &self,
        table: Table,
        partition: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<StateRow>, StoreError> {
        let prefix = record::state_prefix_bytes(partition);
        let mut first = Vec::new();
        record::put_state_key(&mut first, table, partition, after.unwrap_or_default());
        // The least key behind `after` is `after` and a zero byte.
        first.extend(after.map(|_| 0));
        // The engine itself goes through removals that it has not forgotten yet, and nobody can count those.
        let rows = if record::forgets_deletions(&first) { u64::MAX } else { limit as u64 };
        self.engine(rows, move |engine, bound| reader::scan(engine, &first, prefix, limit, bound)).await
    }
}

impl Inventory for Embedded {
    async fn list_buckets(
        &self,
        from: Option<Bytes>,
        limit: usize,
    ) -> Result<Page<(ConversationId, BucketId)>, StoreError> {
        let from = place::bucket(from)?;
        let list = move |engine: &Engine, _| {
            let next = |last: Option<&_>| reader::bucket_behind(engine, last);
            place::page(from, limit, next, |item| place::of_bucket(*item), place::bucket_permille).map(Some)
        };
        self.engine(u64::MAX, list).await
    }

    async fn list_partitions(&self, from: Option<Bytes>, limit: usize) -> Result<Page<(Table, Bytes)>, StoreError> {
        let from = place::partition(from)?;
        let list = move |engine: &Engine, _| {
            let next = |last: Option<&_>| reader::partition_behind(engine, last);
            place::page(from.clone(), limit, next, place::of_partition, place::partition_permille).map(Some)
        };
        self.engine(u64::MAX, list).await
    }
}

/// How often the watchdog looks.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// The same while there is memory that the engine may be done with.
const FREE_INTERVAL: Duration = Duration::from_millis(50);
