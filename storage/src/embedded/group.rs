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
        for (key, cell) in self.state.drain() {
            let bytes_max = 16 + cell.value.as_ref().map_or(0, Bytes::len);
            let value = encoder.piece(bytes_max, |buffer| record::put_state(buffer, &cell));
            self.bytes += key.len() + value.len();
            self.batch.insert(&engine.state, key, value);
        }
        if let Some(generation) = self.generation {
            self.batch.insert(&engine.state, record::GENERATION_KEY, generation.to_be_bytes());
        }
        let empty = OwnedWriteBatch::with_capacity(engine.database.clone(), 0);
        let batch = std::mem::replace(&mut self.batch, empty);
        (Some(batch).filter(|batch| !batch.is_empty()), std::mem::take(&mut self.acks))
    }
}
