//! State tables and fences on CQL.
//!
//! A row of a state table is one cell with an explicit timestamp; the servers themselves keep the greater timestamp, at the same one a
//! deletion, then the bytewise greater value, which is the rule of the trait. Bursts come and go, so they have a table of their own,
//! which forgets deletions sooner; all other tables share one.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use im_proto::{InstanceId, limits};
use scylla::response::query_result::QueryResult;

use super::{
    Inner, failure,
    metrics::Operation,
    query::{Query, batch_of},
    value::{signed, unsigned},
};
use crate::{
    cells::{FENCE_PARTITIONS, fence_partition},
    model::{Fence, StateRow, StateWrite, StoreError, Table},
    order::check_state,
};

/// Requests of one call to `write` that are under way at a time.
const WRITES_AT_ONCE: usize = 32;
/// Rows of one request of a scan.
const SCAN_ROWS: usize = 1_000;
/// The timestamp of a fence. It is never anything else and never deleted.
const FENCE_TIMESTAMP: i64 = 1;

/// The statements of a table.
struct Statements {
    write: Query,
    read: Query,
    scan: Query,
}

const fn statements(table: Table) -> Statements {
    match table {
        Table::Busy => Statements { write: Query::BusyWrite, read: Query::BusyRead, scan: Query::BusyScan },
        _ => Statements { write: Query::StateWrite, read: Query::StateRead, scan: Query::StateScan },
    }
}

/// Columns of a row as they are written: timestamp, value, table, partition, key.
type WriteValues<'a> = (i64, Option<&'a [u8]>, i32, &'a [u8], &'a [u8]);

fn number(table: Table) -> i32 {
    i32::from(table as u8)
}

impl Inner {
    /// Writes rows, those of one partition together.
    pub(super) async fn state_write(&self, writes: &[StateWrite]) -> Result<(), StoreError> {
        writes.iter().try_for_each(check_state)?;
        let mut partitions = BTreeMap::<_, Vec<&StateWrite>>::new();
        for write in writes {
            partitions.entry((write.table, &write.partition)).or_default().push(write);
        }
        all(partitions.into_values().flat_map(chunks).map(|chunk| self.state_write_chunk(chunk)).collect()).await
    }

    async fn state_write_chunk(&self, writes: Vec<&StateWrite>) -> Result<(), StoreError> {
        let Some(first) = writes.first() else { return Ok(()) };
        let statement = self.prepared.get(statements(first.table).write);
        let values = writes.iter().map(|write| write_values(write)).collect::<Result<Vec<_>, _>>()?;
        let request = async {
            match &values[..] {
                [one] => self.session.execute_unpaged(statement, one).await.map(drop),
                _ => self.session.batch(&batch_of(statement, values.len()), &values).await.map(drop),
            }
        };
        self.states.run(Operation::StateWrite, request).await
    }

    /// One row.
    pub(super) async fn state_read(
        &self,
        table: Table,
        partition: &[u8],
        key: &[u8],
    ) -> Result<Option<StateRow>, StoreError> {
        let statement = self.prepared.get(statements(table).read);
        let request = self.session.execute_unpaged(statement, (number(table), partition, key));
        Ok(decode(self.states.run(Operation::StateRead, request).await?)?.pop())
    }

    /// Rows of a partition, page by page.
    pub(super) async fn state_scan(
        &self,
        table: Table,
        partition: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<StateRow>, StoreError> {
        let statement = self.prepared.get(statements(table).scan);
        let mut rows = Vec::<StateRow>::new();
        let mut first = after.map(behind).unwrap_or_default();
        while rows.len() < limit {
            let page = SCAN_ROWS.min(limit - rows.len());
            let page_rows = i32::try_from(page).unwrap_or(i32::MAX);
            let request = self.session.execute_unpaged(statement, (number(table), partition, &first[..], page_rows));
            let found = decode(self.states.run(Operation::StateScan, request).await?)?;
            let last = found.len() < page;
            rows.extend(found);
            match rows.last() {
                Some(row) if !last => first = behind(&row.key),
                _ => break,
            }
        }
        Ok(rows)
    }

    /// Writes fences and waits for all.
    pub(super) async fn fence(&self, instances: &[InstanceId]) -> Result<(), StoreError> {
        let write = |instance: &InstanceId| {
            let values = (i32::from(fence_partition(instance)), instance.as_str().to_owned(), FENCE_TIMESTAMP);
            let request = async move { self.session.execute_unpaged(self.prepared.get(Query::Fence), values).await };
            self.fences.run(Operation::FenceWrite, request)
        };
        all(instances.iter().map(write).collect()).await
    }

    /// Looks for a fence, and at the generation, at once.
    pub(super) async fn fence_read(&self, instance: &InstanceId) -> Result<Fence, StoreError> {
        let values = (i32::from(fence_partition(instance)), instance.as_str());
        let request = self.session.execute_unpaged(self.prepared.get(Query::FenceRead), values);
        let result = self.fences.run(Operation::FenceRead, request).await?;
        let result = result.into_rows_result().map_err(failure::damaged)?;
        let mut fence = Fence { fenced: false, generation: 0 };
        for row in result.rows::<(&str, Option<i64>)>().map_err(failure::damaged)? {
            let (name, generation) = row.map_err(failure::damaged)?;
            fence.fenced |= name == instance.as_str();
            fence.generation = unsigned(generation.unwrap_or(0))?;
        }
        Ok(fence)
    }

    /// Raises the generation in every slot: the timestamp is the generation, so that the greatest one stays.
    pub(super) async fn generation(&self, generation: u64) -> Result<(), StoreError> {
        let generation = signed(generation)?;
        let write = |slot: u8| {
            let values = (i32::from(slot), generation, generation);
            let request = self.session.execute_unpaged(self.prepared.get(Query::Generation), values);
            self.fences.run(Operation::FenceWrite, request)
        };
        all((0..FENCE_PARTITIONS).map(write).collect()).await
    }
}

/// Some requests, a bounded number at a time. All of them come to their end, whatever becomes of one.
async fn all<T>(requests: Vec<impl Future<Output = Result<T, StoreError>>>) -> Result<(), StoreError> {
    let outcomes = stream::iter(requests).buffer_unordered(WRITES_AT_ONCE);
    outcomes.fold(Ok(()), |result, outcome| std::future::ready(result.and(outcome.map(drop)))).await
}

/// Cuts the rows of a partition into batches within the bounds of a batch of the log.
fn chunks(writes: Vec<&StateWrite>) -> Vec<Vec<&StateWrite>> {
    let mut chunks = vec![Vec::new()];
    let mut bytes = 0;
    for write in writes {
        let size = 64 + write.partition.len() + write.key.len() + write.value.as_ref().map_or(0, Bytes::len);
        let full = chunks.last().is_some_and(|chunk: &Vec<_>| chunk.len() >= limits::BATCH_ROWS_MAX);
        if full || bytes + size > limits::BATCH_BYTES_MAX {
            chunks.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        chunks.last_mut().into_iter().for_each(|chunk| chunk.push(write));
    }
    chunks
}

fn write_values(write: &StateWrite) -> Result<WriteValues<'_>, StoreError> {
    let value = write.value.as_deref();
    Ok((signed(write.timestamp)?, value, number(write.table), &write.partition[..], &write.key[..]))
}

/// The least key above another.
fn behind(key: impl AsRef<[u8]>) -> Vec<u8> {
    [key.as_ref(), &[0]].concat()
}

fn decode(result: QueryResult) -> Result<Vec<StateRow>, StoreError> {
    let result = result.into_rows_result().map_err(failure::damaged)?;
    let mut rows = Vec::with_capacity(result.rows_num());
    for columns in result.rows::<(&[u8], Option<&[u8]>, Option<i64>)>().map_err(failure::damaged)? {
        let (key, value, timestamp) = columns.map_err(failure::damaged)?;
        if let (Some(value), Some(timestamp)) = (value, timestamp) {
            rows.push(StateRow {
                key: Bytes::copy_from_slice(key),
                value: Bytes::copy_from_slice(value),
                timestamp: unsigned(timestamp)?,
            });
        }
    }
    Ok(rows)
}
