//! One client's handle of the simulated store.

use std::{collections::BTreeSet, fmt, sync::Arc};

use bytes::Bytes;
use im_proto::{ConversationId, InstanceId};
use tokio::sync::oneshot;

use super::{Mutation, Shared, merge_cells, merge_rows};
use crate::{
    Directory, Inventory, MessageLog, TAIL_ROWS_MAX,
    cells::{FENCE_PARTITIONS, fence_partition, state_row},
    model::{
        AppendDone, AppendRequest, BucketId, Fence, Page, RowKey, StateRow, StateWrite, StoreError, StoredRow, Table,
    },
    order::{StateCell, check_batch, check_state},
    place,
};

/// The backend. Clones are the same client.
#[derive(Clone)]
pub struct SimHandle {
    shared: Arc<Shared>,
    client: Arc<str>,
}

impl SimHandle {
    pub(super) fn new(shared: Arc<Shared>, client: &str) -> Self {
        Self { shared, client: Arc::from(client) }
    }

    /// Starts all writes and waits for all; the last error, if any.
    async fn write_all(&self, mutations: Vec<Mutation>) -> Result<(), StoreError> {
        let start = |mutation| {
            let (waiter, outcome) = oneshot::channel();
            // A client that has gone does not want to know.
            self.shared.write(&self.client, mutation, Box::new(|outcome| drop(waiter.send(outcome))));
            outcome
        };
        let outcomes: Vec<_> = mutations.into_iter().map(start).collect();
        let mut result = Ok(());
        for outcome in outcomes {
            let gone = |_| Err(StoreError::Unconfirmed("the simulation has ended".into()));
            result = outcome.await.unwrap_or_else(gone).and(result);
        }
        result
    }

    async fn rows(
        &self,
        conversation: ConversationId,
        look: impl Fn(&crate::cells::Cells) -> Vec<StoredRow> + Send,
        pick: impl FnOnce(Vec<StoredRow>) -> Vec<StoredRow> + Send,
    ) -> Result<Vec<StoredRow>, StoreError> {
        let merge = |one: Vec<StoredRow>, two| {
            let rows = pick(merge_rows(one.into_iter().chain(two)).into_values().collect());
            let repair = Mutation::Rows(conversation, Arc::new(rows.clone()));
            let repair = Some(repair).filter(|_| !rows.is_empty());
            (rows, repair)
        };
        self.shared.read(&self.client, look, merge).await
    }
}

impl fmt::Debug for SimHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SimHandle").field(&self.client).finish()
    }
}

impl MessageLog for SimHandle {
    fn submit(&self, requests: Vec<AppendRequest>, done: AppendDone) {
        for AppendRequest { token, batch } in requests {
            match check_batch(&batch) {
                Err(refusal) => done(vec![(token, Err(refusal))]),
                Ok(()) => {
                    let done = done.clone();
                    let answer = Box::new(move |outcome| done(vec![(token, outcome)]));
                    self.shared.write(&self.client, Mutation::Batch(batch), answer);
                }
            }
        }
    }

    async fn read_tail(&self, conversation: ConversationId, bucket: BucketId) -> Result<Vec<StoredRow>, StoreError> {
        let newest = |rows: Vec<StoredRow>| rows.into_iter().rev().take(TAIL_ROWS_MAX).collect();
        self.rows(conversation, |cells| cells.tail(conversation, bucket), newest).await
    }

    async fn read_range(
        &self,
        conversation: ConversationId,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<Vec<StoredRow>, StoreError> {
        let first = |mut rows: Vec<StoredRow>| {
            rows.truncate(limit);
            rows
        };
        self.rows(conversation, |cells| cells.range(conversation, from, to, limit), first).await
    }

    async fn read_keys(&self, conversation: ConversationId, from: u64, to: u64) -> Result<Vec<RowKey>, StoreError> {
        let rows = self.read_range(conversation, from, to, usize::MAX).await?;
        Ok(rows.into_iter().map(RowKey::from).collect())
    }

    async fn write_fences(&self, instances: &[InstanceId]) -> Result<(), StoreError> {
        self.write_all(instances.iter().cloned().map(Mutation::Fence).collect()).await
    }

    async fn read_fence(&self, instance: &InstanceId) -> Result<Fence, StoreError> {
        let merge = |one: Fence, two: Fence| {
            let fence = Fence { fenced: one.fenced || two.fenced, generation: one.generation.max(two.generation) };
            let repair = if fence.fenced {
                Some(Mutation::Fence(instance.clone()))
            } else {
                let (partition, generation) = (fence_partition(instance), fence.generation);
                (one.generation != two.generation).then_some(Mutation::Generation { partition, generation })
            };
            (fence, repair)
        };
        self.shared.read(&self.client, |cells| cells.read_fence(instance), merge).await
    }

    async fn raise_generation(&self, generation: u64) -> Result<(), StoreError> {
        let raise = |partition| Mutation::Generation { partition, generation };
        self.write_all((0..FENCE_PARTITIONS).map(raise).collect()).await
    }
}

impl Directory for SimHandle {
    async fn write(&self, writes: Vec<StateWrite>) -> Result<(), StoreError> {
        writes.iter().try_for_each(check_state)?;
        let cell = |write: StateWrite| {
            let cell = StateCell { timestamp: write.timestamp, value: write.value };
            Mutation::Cells(Arc::new(vec![((write.table, write.partition, write.key), cell)]))
        };
        self.write_all(writes.into_iter().map(cell).collect()).await
    }

    async fn read(&self, table: Table, partition: &[u8], key: &[u8]) -> Result<Option<StateRow>, StoreError> {
        let key = (table, Bytes::copy_from_slice(partition), Bytes::copy_from_slice(key));
        let merge = |one: Option<StateCell>, two: Option<StateCell>| {
            let cell = match (one, two) {
                (Some(one), Some(two)) => Some(if one.beats(&two) { one } else { two }),
                (one, two) => one.or(two),
            };
            let repair = cell.clone().map(|cell| Mutation::Cells(Arc::new(vec![(key.clone(), cell)])));
            (cell.and_then(|cell| state_row(&key.2, &cell)), repair)
        };
        self.shared.read(&self.client, |cells| cells.cell(&key).cloned(), merge).await
    }

    async fn scan(
        &self,
        table: Table,
        partition: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<StateRow>, StoreError> {
        let look = |cells: &crate::cells::Cells| -> Vec<(Bytes, StateCell)> {
            cells.partition(table, partition, after).map(|(key, cell)| (key.clone(), cell.clone())).collect()
        };
        let merge = |one: Vec<(Bytes, StateCell)>, two| {
            let mut live = merge_cells(one.into_iter().chain(two));
            live.retain(|_, cell| cell.value.is_some());
            let returned: Vec<_> = live.into_iter().take(limit).collect();
            let rows = returned.iter().filter_map(|(key, cell)| state_row(key, cell)).collect();
            let key = |key| (table, Bytes::copy_from_slice(partition), key);
            let repair: Vec<_> = returned.into_iter().map(|(k, cell)| (key(k), cell)).collect();
            (rows, Some(Mutation::Cells(Arc::new(repair))))
        };
        self.shared.read(&self.client, look, merge).await
    }
}

impl Inventory for SimHandle {
    async fn list_buckets(
        &self,
        from: Option<Bytes>,
        limit: usize,
    ) -> Result<Page<(ConversationId, BucketId)>, StoreError> {
        let from = place::bucket(from)?;
        let all = |cells: &crate::cells::Cells| {
            std::iter::successors(cells.bucket_behind(from.as_ref()), |last| cells.bucket_behind(Some(last))).collect()
        };
        let merge = |one: BTreeSet<_>, two: BTreeSet<_>| (one.union(&two).copied().collect::<BTreeSet<_>>(), None);
        let mut found = self.shared.read(&self.client, all, merge).await?.into_iter();
        place::page(from, limit, |_| Ok(found.next()), |item| place::of_bucket(*item), place::bucket_permille)
    }

    async fn list_partitions(&self, from: Option<Bytes>, limit: usize) -> Result<Page<(Table, Bytes)>, StoreError> {
        let from = place::partition(from)?;
        let all = |cells: &crate::cells::Cells| {
            std::iter::successors(cells.partition_behind(from.as_ref()), |last| cells.partition_behind(Some(last)))
                .collect()
        };
        let merge = |one: BTreeSet<_>, two: BTreeSet<_>| (one.union(&two).cloned().collect::<BTreeSet<_>>(), None);
        let mut found = self.shared.read(&self.client, all, merge).await?.into_iter();
        place::page(from, limit, |_| Ok(found.next()), place::of_partition, place::partition_permille)
    }
}
