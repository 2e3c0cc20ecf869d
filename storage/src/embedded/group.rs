//! One commit: everything that waited, as one fjall batch, and who is to be told.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use fjall::{OwnedWriteBatch, PersistMode};
use im_proto::InstanceId;

use super::{
    engine::Engine,
    queue::{Waiter, Work},
    record,
};
use crate::{
    model::{AppendDone, AppendOutcome, AppendRequest, Batch, Row, StateWrite, StoreError},
    order::{StateCell, check_batch, check_state},
};

/// Memory that records are encoded into: one allocation serves many records, and none is copied on its way into the memtable.
const CHUNK_BYTES: usize = 1024 * 1024;

/// Encodes records into chunks.
#[derive(Default)]
pub(super) struct Encoder {
    chunk: BytesMut,
}

impl Encoder {
    /// Makes one piece of at most `bytes_max` bytes.
    fn piece(&mut self, bytes_max: usize, put: impl FnOnce(&mut BytesMut)) -> Bytes {
        if self.chunk.capacity() < bytes_max {
            self.chunk = BytesMut::with_capacity(CHUNK_BYTES.max(bytes_max));
        }
        put(&mut self.chunk);
        self.chunk.split().freeze()
    }
}

/// Who waits for a commit.
#[derive(Default)]
pub(super) struct Acks {
    appends: Vec<(AppendDone, Vec<AppendOutcome>)>,
    waiters: Vec<Waiter>,
}

impl Acks {
    /// The outcomes of one submitter; all its submissions of a group are answered by one call.
    fn outcomes(&mut self, done: AppendDone) -> &mut Vec<AppendOutcome> {
        let same = |other: &AppendDone| std::ptr::addr_eq(Arc::as_ptr(other), Arc::as_ptr(&done));
        let found = self.appends.iter().rposition(|(other, _)| same(other));
        let index = found.unwrap_or_else(|| {
            self.appends.push((done, Vec::new()));
            self.appends.len() - 1
        });
        &mut self.appends[index].1
    }

    /// Tells everybody. What was refused stays refused whatever became of the commit.
    pub(super) fn answer(self, result: &Result<(), StoreError>) {
        for (done, mut outcomes) in self.appends {
            if result.is_err() {
                outcomes.iter_mut().filter(|(_, outcome)| outcome.is_ok()).for_each(|(_, o)| o.clone_from(result));
            }
            done(outcomes);
        }
        for waiter in self.waiters {
            // A waiter that is gone does not want to know.
            let _ = waiter.send(result.clone());
        }
    }
}

/// A commit being put together.
pub(super) struct Group {
    batch: OwnedWriteBatch,
    acks: Acks,
    /// Versions of state rows that this commit writes: each key once, for fjall does not order two writes of one key in a batch.
    state: HashMap<Bytes, StateCell>,
    pub(super) fences: Vec<InstanceId>,
    pub(super) generation: Option<u64>,
    pub(super) rows: usize,
    pub(super) bytes: usize,
}

impl Group {
    pub(super) fn new(engine: &Engine, records: usize) -> Self {
        Self {
            batch: OwnedWriteBatch::with_capacity(engine.database.clone(), records)
                .durability(Some(PersistMode::SyncData)),
            acks: Acks::default(),
            state: HashMap::new(),
            fences: Vec::new(),
            generation: None,
            rows: 0,
            bytes: 0,
        }
    }

    /// Adds work. An error means that the store cannot go on; whoever submitted this work is then among the waiting already.
    pub(super) fn add(&mut self, engine: &Engine, encoder: &mut Encoder, work: Work) -> Result<(), StoreError> {
        match work {
            Work::Append { requests, done } => self.append(engine, encoder, requests, done),
            Work::State { writes, waiter } => match writes.iter().try_for_each(check_state) {
                Err(refusal) => {
                    let _ = waiter.send(Err(refusal));
                }
                Ok(()) => {
                    self.acks.waiters.push(waiter);
                    for write in writes {
                        self.merge(engine, encoder, write)?;
                    }
                }
            },
            Work::Fences { instances, waiter } => {
                instances.iter().for_each(|i| self.batch.insert(&engine.state, record::fence_key(i), Bytes::new()));
                self.fences.extend(instances);
                self.acks.waiters.push(waiter);
            }
            Work::Generation { generation, waiter } => {
                self.generation = self.generation.max(Some(generation));
                self.acks.waiters.push(waiter);
            }
        }
        Ok(())
    }

    fn append(&mut self, engine: &Engine, encoder: &mut Encoder, requests: Vec<AppendRequest>, done: AppendDone) {
        let mut outcomes = std::mem::take(self.acks.outcomes(done.clone()));
        outcomes.reserve(requests.len());
        for request in requests {
            let checked = check_batch(&request.batch);
            if checked.is_ok() {
                self.put_run(engine, encoder, &request.batch);
            }
            outcomes.push((request.token, checked));
        }
        *self.acks.outcomes(done) = outcomes;
    }

    fn put_run(&mut self, engine: &Engine, encoder: &mut Encoder, batch: &Batch) {
        let bytes_max = 64 + batch.rows.iter().map(Row::bytes).sum::<usize>();
        let key = encoder.piece(bytes_max, |buffer| record::put_run_key(buffer, batch));
        let value = encoder.piece(bytes_max, |buffer| record::put_run(buffer, batch));
        self.rows += batch.rows.len();
        self.bytes += key.len() + value.len();
        self.batch.insert(&engine.log, key, value);
    }

    fn merge(&mut self, engine: &Engine, encoder: &mut Encoder, write: StateWrite) -> Result<(), StoreError> {
        let key = encoder.piece(8 + write.partition.len() + write.key.len(), |buffer| {
            record::put_state_key(buffer, write.table, &write.partition, &write.key);
        });
        let cell = StateCell { timestamp: write.timestamp, value: write.value };
        match self.state.entry(key) {
            Entry::Occupied(mut entry) => {
                if cell.beats(entry.get()) {
                    entry.insert(cell);
                }
            }
            Entry::Vacant(entry) => {
                if engine.state_cell(entry.key())?.is_none_or(|stored| cell.beats(&stored)) {
                    entry.insert(cell);
                }
            }
        }
        Ok(())
    }

    /// The finished batch, and who waits for it.
    pub(super) fn finish(&mut self, engine: &Engine, encoder: &mut Encoder) -> (Option<OwnedWriteBatch>, Acks) {
        let mut removed = false;
        for (key, cell) in self.state.drain() {
            if cell.value.is_none() && record::forgets_deletions(&key) {
                self.bytes += key.len();
                self.batch.remove(&engine.state, key);
                removed = true;
                continue;
            }
            let bytes_max = 16 + cell.value.as_ref().map_or(0, Bytes::len);
            let value = encoder.piece(bytes_max, |buffer| record::put_state(buffer, &cell));
            self.bytes += key.len() + value.len();
            self.batch.insert(&engine.state, key, value);
        }
        if removed {
            self.batch.insert(&engine.state, record::REMOVED_KEY, Bytes::new());
        }
        if let Some(generation) = self.generation {
            self.batch.insert(&engine.state, record::GENERATION_KEY, generation.to_be_bytes());
        }
        let empty = OwnedWriteBatch::with_capacity(engine.database.clone(), 0);
        let batch = std::mem::replace(&mut self.batch, empty);
        (Some(batch).filter(|batch| !batch.is_empty()), std::mem::take(&mut self.acks))
    }
}

#[cfg(test)]
mod tests {
    use fjall::AbstractTree as _;
    use im_proto::ConversationId;

    use super::*;
    use crate::{
        Directory as _, Embedded, EmbeddedOptions,
        model::{StateRow, Table},
    };

    const SHARD: &[u8] = &[0, 0, 0, 9];

    fn busy(number: u64, is_busy: bool, timestamp: u64) -> StateWrite {
        let mut id = [0; ConversationId::BYTES];
        id[..8].copy_from_slice(&number.to_be_bytes());
        StateWrite {
            table: Table::Busy,
            partition: Bytes::from_static(SHARD),
            key: ConversationId::from_bytes(id).to_bytes(),
            value: is_busy.then(Bytes::new),
            timestamp,
        }
    }

    fn opened(directory: &tempfile::TempDir) -> Embedded {
        Embedded::open(directory.path(), EmbeddedOptions::default()).unwrap()
    }

    /// Cells of the shard that a scan goes through, whether it gives them or not.
    fn cells(store: &Embedded) -> usize {
        let mut prefix = Vec::new();
        record::put_state_key(&mut prefix, Table::Busy, SHARD, b"");
        store.core().engine.state.prefix(prefix).count()
    }

    async fn under_way(store: &Embedded) -> Vec<StateRow> {
        store.scan(Table::Busy, SHARD, None, 10_000).await.unwrap()
    }

    #[tokio::test]
    async fn bursts_that_have_ended_leave_nothing_that_a_scan_goes_through() {
        let directory = tempfile::tempdir().unwrap();
        let store = opened(&directory);
        for hundred in 0..30 {
            let numbers = || hundred * 100..(hundred + 1) * 100;
            store.write(numbers().map(|number| busy(number, true, 5)).collect()).await.unwrap();
            // One of them ends only with the next write, one has a later burst, of one the end comes twice.
            let ends = numbers().filter(|number| number % 100 != 7).map(|number| busy(number, false, 8));
            store.write(ends.chain([busy(hundred * 100 + 50, true, 9)]).collect()).await.unwrap();
            store.write(vec![busy(hundred * 100, false, 8), busy(hundred * 100 + 7, false, 5)]).await.unwrap();
        }
        let expected: Vec<StateRow> = (0..30)
            .map(|hundred| busy(hundred * 100 + 50, true, 9))
            .map(|burst| StateRow { key: burst.key, value: Bytes::new(), timestamp: 9 })
            .collect();
        assert_eq!(under_way(&store).await, expected);
        assert_eq!(cells(&store), 30, "of 3,000 bursts");
        store.close();
        drop(store);
        // Nor do they come back with what the journal says.
        let store = opened(&directory);
        assert_eq!(under_way(&store).await, expected);
        assert_eq!(cells(&store), 30);
    }

    #[tokio::test]
    async fn deletions_of_other_tables_are_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let store = opened(&directory);
        for table in Table::ALL.into_iter().filter(|table| *table != Table::Busy) {
            let write = |is_there, timestamp| StateWrite { table, ..busy(1, is_there, timestamp) };
            store.write(vec![write(false, 8)]).await.unwrap();
            store.write(vec![write(true, 7)]).await.unwrap();
            assert_eq!(store.read(table, SHARD, &write(true, 7).key).await, Ok(None), "{table}");
        }
    }

    #[tokio::test]
    async fn deletions_that_an_earlier_version_has_kept_are_read_and_go_with_the_next_burst() {
        let directory = tempfile::tempdir().unwrap();
        let store = opened(&directory);
        for number in 0..1_000 {
            let mut key = Vec::new();
            record::put_state_key(&mut key, Table::Busy, SHARD, &busy(number, false, 8).key);
            let mut value = BytesMut::new();
            record::put_state(&mut value, &StateCell { timestamp: 8, value: None });
            store.core().engine.state.insert(key, value.freeze()).unwrap();
        }
        assert_eq!((under_way(&store).await, cells(&store)), (Vec::new(), 1_000));
        store.write(vec![busy(3, true, 8), busy(4, true, 9), busy(5, true, 9)]).await.unwrap();
        let rows = under_way(&store).await;
        assert_eq!(rows.iter().map(|row| row.timestamp).collect::<Vec<_>>(), [9, 9], "one is older than its end");
        store.write(vec![busy(4, false, 11), busy(5, false, 11)]).await.unwrap();
        assert_eq!((under_way(&store).await, cells(&store)), (Vec::new(), 998));
    }

    #[tokio::test]
    async fn what_the_engine_has_written_out_reaches_as_far_after_it_forgot_removals() {
        let directory = tempfile::tempdir().unwrap();
        let store = opened(&directory);
        store.write(vec![busy(1, true, 5)]).await.unwrap();
        store.write(vec![busy(1, false, 6)]).await.unwrap();
        let state = &store.core().engine.state;
        state.rotate_memtable_and_wait().unwrap();
        let (reached, removals) = (state.tree.get_highest_persisted_seqno(), state.tree.tombstone_count());
        assert!(reached.is_some() && removals > 0, "{reached:?}, {removals} removals");
        state.major_compact().unwrap();
        assert_eq!(state.tree.tombstone_count(), 0, "they are forgotten");
        assert_eq!(state.tree.get_highest_persisted_seqno(), reached, "or journals would be kept and replayed");
    }
}
