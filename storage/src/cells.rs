//! One copy of everything, in memory: what the memory backend holds once and the simulated one three times.
//!
//! Every write is a merge by the rules of [`crate::order`], so that the content does not depend on the order of arrival. Knows
//! nothing of quorums, time or faults.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use bytes::Bytes;
use im_proto::{ConversationId, InstanceId};

use crate::{
    TAIL_ROWS_MAX,
    model::{Batch, BucketId, Fence, StateRow, StateWrite, StoredRow, Table},
    order::{StateCell, row_beats},
};

/// Partitions of the fence table; each carries the generation.
pub(crate) const FENCE_PARTITIONS: u8 = 16;

/// The fence partition of an instance.
pub(crate) fn fence_partition(instance: &InstanceId) -> u8 {
    let hash = instance
        .as_str()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    (hash >> 32) as u8 % FENCE_PARTITIONS
}

/// A key of a state table.
pub(crate) type StateKey = (Table, Bytes, Bytes);

/// The rows of one copy.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cells {
    log: BTreeMap<(ConversationId, u64), StoredRow>,
    state: BTreeMap<StateKey, StateCell>,
    fences: BTreeSet<InstanceId>,
    generations: [u64; FENCE_PARTITIONS as usize],
}

impl Cells {
    /// Applies all rows of a batch.
    pub(crate) fn apply_batch(&mut self, batch: &Batch) {
        for row in &batch.rows {
            let stored = StoredRow { row: row.clone(), epoch: batch.epoch, committed: batch.committed };
            self.apply_row(batch.conversation, stored);
        }
    }

    /// Applies one row.
    pub(crate) fn apply_row(&mut self, conversation: ConversationId, stored: StoredRow) {
        match self.log.entry((conversation, stored.row.seq)) {
            Entry::Vacant(entry) => {
                entry.insert(stored);
            }
            Entry::Occupied(mut entry) => {
                if row_beats(&stored, entry.get()) {
                    entry.insert(stored);
                }
            }
        }
    }

    /// The newest rows of a bucket, descending.
    pub(crate) fn tail(&self, conversation: ConversationId, bucket: BucketId) -> Vec<StoredRow> {
        let keys = (conversation, bucket.first_seq())..=(conversation, bucket.last_seq());
        self.log.range(keys).rev().take(TAIL_ROWS_MAX).map(|(_, row)| row.clone()).collect()
    }

    /// Rows of a range, ascending.
    pub(crate) fn range(&self, conversation: ConversationId, from: u64, to: u64, limit: usize) -> Vec<StoredRow> {
        if from > to {
            return Vec::new();
        }
        let keys = (conversation, from)..=(conversation, to);
        self.log.range(keys).take(limit).map(|(_, row)| row.clone()).collect()
    }

    /// Applies one row of a state table.
    pub(crate) fn apply_state(&mut self, write: &StateWrite) {
        let cell = StateCell { timestamp: write.timestamp, value: write.value.clone() };
        self.apply_cell((write.table, write.partition.clone(), write.key.clone()), cell);
    }

    /// Applies one version of a row of a state table.
    pub(crate) fn apply_cell(&mut self, key: StateKey, cell: StateCell) {
        match self.state.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(cell);
            }
            Entry::Occupied(mut entry) => {
                if cell.beats(entry.get()) {
                    entry.insert(cell);
                }
            }
        }
    }

    /// The newest version of a row of a state table, a deletion included.
    pub(crate) fn cell(&self, key: &StateKey) -> Option<&StateCell> {
        self.state.get(key)
    }

    /// The newest versions of the rows of a partition behind `after`, deletions included, ascending.
    pub(crate) fn partition(
        &self,
        table: Table,
        partition: &[u8],
        after: Option<&[u8]>,
    ) -> impl Iterator<Item = (&Bytes, &StateCell)> {
        let partition = Bytes::copy_from_slice(partition);
        // The least key above `after` is `after` with a zero byte behind it.
        let mut first = after.map(<[u8]>::to_vec).unwrap_or_default();
        if after.is_some() {
            first.push(0);
        }
        self.state
            .range((table, partition.clone(), Bytes::from(first))..)
            .take_while(move |((t, p, _), _)| *t == table && *p == partition)
            .map(|((_, _, key), cell)| (key, cell))
    }

    /// The next partition of the log that has rows.
    pub(crate) fn bucket_behind(
        &self,
        last: Option<&(ConversationId, BucketId)>,
    ) -> Option<(ConversationId, BucketId)> {
        let first = last.map_or((ConversationId::from_bytes([0; 16]), 0), |(id, bucket)| (*id, bucket.last_seq() + 1));
        self.log.range(first..).next().map(|((conversation, seq), _)| (*conversation, BucketId::of(*seq)))
    }

    /// The next partition of the state tables that has rows or had some.
    pub(crate) fn partition_behind(&self, last: Option<&(Table, Bytes)>) -> Option<(Table, Bytes)> {
        let first = last.map_or((Table::Cluster, Bytes::new(), Bytes::new()), |(table, partition)| {
            (*table, [&partition[..], &[0]].concat().into(), Bytes::new())
        });
        self.state.range(first..).next().map(|((table, partition, _), _)| (*table, partition.clone()))
    }

    /// Fences an instance for ever.
    pub(crate) fn fence(&mut self, instance: InstanceId) {
        self.fences.insert(instance);
    }

    /// Raises the generation of one partition.
    pub(crate) fn raise_generation(&mut self, partition: u8, generation: u64) {
        let current = &mut self.generations[usize::from(partition % FENCE_PARTITIONS)];
        *current = generation.max(*current);
    }

    /// What a fence read finds.
    pub(crate) fn read_fence(&self, instance: &InstanceId) -> Fence {
        Fence {
            fenced: self.fences.contains(instance),
            generation: self.generations[usize::from(fence_partition(instance))],
        }
    }
}

/// A version as readers see it; nothing for a deletion.
pub(crate) fn state_row(key: &Bytes, cell: &StateCell) -> Option<StateRow> {
    let value = cell.value.clone()?;
    Some(StateRow { key: key.clone(), value, timestamp: cell.timestamp })
}
