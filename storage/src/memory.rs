//! Everything in the memory of one process: for tests. Nothing survives it.

use std::sync::Arc;

use bytes::Bytes;
use im_proto::{ConversationId, InstanceId};
use parking_lot::Mutex;

use crate::{
    Directory, Inventory, MessageLog,
    cells::{Cells, FENCE_PARTITIONS, state_row},
    model::{
        AppendDone, AppendRequest, BucketId, Fence, Page, RowKey, StateRow, StateWrite, StoreError, StoredRow, Table,
    },
    order::{check_batch, check_state},
    place,
};

/// The backend. Clones share the content.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    cells: Arc<Mutex<Cells>>,
}

impl Memory {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }
}

impl MessageLog for Memory {
    /// Completes before it returns: `done` is called by the caller's own thread, with no lock held.
    fn submit(&self, requests: Vec<AppendRequest>, done: AppendDone) {
        if requests.is_empty() {
            return;
        }
        let mut cells = self.cells.lock();
        let append = |request: AppendRequest| {
            let outcome = check_batch(&request.batch).map(|()| cells.apply_batch(&request.batch));
            (request.token, outcome)
        };
        let outcomes = requests.into_iter().map(append).collect();
        drop(cells);
        done(outcomes);
    }

    async fn read_tail(&self, conversation: ConversationId, bucket: BucketId) -> Result<Vec<StoredRow>, StoreError> {
        Ok(self.cells.lock().tail(conversation, bucket))
    }

    async fn read_range(
        &self,
        conversation: ConversationId,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<Vec<StoredRow>, StoreError> {
        Ok(self.cells.lock().range(conversation, from, to, limit))
    }

    async fn read_keys(&self, conversation: ConversationId, from: u64, to: u64) -> Result<Vec<RowKey>, StoreError> {
        Ok(self.cells.lock().range(conversation, from, to, usize::MAX).into_iter().map(RowKey::from).collect())
    }

    async fn write_fences(&self, instances: &[InstanceId]) -> Result<(), StoreError> {
        let mut cells = self.cells.lock();
        instances.iter().for_each(|instance| cells.fence(instance.clone()));
        Ok(())
    }

    async fn read_fence(&self, instance: &InstanceId) -> Result<Fence, StoreError> {
        Ok(self.cells.lock().read_fence(instance))
    }

    async fn raise_generation(&self, generation: u64) -> Result<(), StoreError> {
        let mut cells = self.cells.lock();
        (0..FENCE_PARTITIONS).for_each(|partition| cells.raise_generation(partition, generation));
        Ok(())
    }
}

impl Directory for Memory {
    async fn write(&self, writes: Vec<StateWrite>) -> Result<(), StoreError> {
        writes.iter().try_for_each(check_state)?;
        let mut cells = self.cells.lock();
        writes.iter().for_each(|write| cells.apply_state(write));
        Ok(())
    }

    async fn read(&self, table: Table, partition: &[u8], key: &[u8]) -> Result<Option<StateRow>, StoreError> {
        let key = (table, Bytes::copy_from_slice(partition), Bytes::copy_from_slice(key));
        Ok(self.cells.lock().cell(&key).and_then(|cell| state_row(&key.2, cell)))
    }

    async fn scan(
        &self,
        table: Table,
        partition: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<StateRow>, StoreError> {
        let cells = self.cells.lock();
        let rows = cells.partition(table, partition, after).filter_map(|(key, cell)| state_row(key, cell));
        Ok(rows.take(limit).collect())
    }
}

impl Inventory for Memory {
    async fn list_buckets(
        &self,
        from: Option<Bytes>,
        limit: usize,
    ) -> Result<Page<(ConversationId, BucketId)>, StoreError> {
        let cells = self.cells.lock();
        let next = |last: Option<&_>| Ok(cells.bucket_behind(last));
        place::page(place::bucket(from)?, limit, next, |item| place::of_bucket(*item), place::bucket_permille)
    }

    async fn list_partitions(&self, from: Option<Bytes>, limit: usize) -> Result<Page<(Table, Bytes)>, StoreError> {
        let cells = self.cells.lock();
        let next = |last: Option<&_>| Ok(cells.partition_behind(last));
        place::page(place::partition(from)?, limit, next, place::of_partition, place::partition_permille)
    }
}

impl From<StoredRow> for RowKey {
    fn from(stored: StoredRow) -> Self {
        let row = stored.row;
        Self { seq: row.seq, sender: row.sender, client_message_id: row.client_message_id }
    }
}
