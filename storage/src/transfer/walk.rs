//! Going through all that a store holds: conversations up to their committed heads, state tables.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use im_proto::{ConversationId, limits};
use tokio::time::{Instant, sleep};

use super::format::{Rows, State, rows_of, state_of};
use crate::{
    Directory as _, MessageLog as _, Store,
    model::{BucketId, Row, StateRow, StoreError, StoredRow, Table},
};

/// How long an unconfirmed request is repeated before the transfer gives up.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Rows of one read.
const READ_ROWS: usize = 512;
/// Rows, and bytes, of a frame of state rows.
const STATE_ROWS: usize = 256;
const STATE_BYTES: usize = 1024 * 1024;

/// Repeats a request until the store answers.
pub(super) async fn patiently<T, F>(request: impl Fn() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let (begun, mut pause) = (Instant::now(), Duration::from_millis(20));
    loop {
        match request().await {
            Err(StoreError::Unconfirmed(_)) if begun.elapsed() < PATIENCE => {
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
            answer => return answer,
        }
    }
}

/// A conversation being read.
pub(super) struct Conversation<'a> {
    store: &'a Store,
    id: ConversationId,
    next: u64,
    head: u64,
    first: bool,
}

impl<'a> Conversation<'a> {
    /// Begins a conversation at the lowest bucket that it has; nothing for any other bucket, and for one without committed entries.
    pub(super) async fn begin(
        store: &'a Store,
        (id, bucket): (ConversationId, BucketId),
    ) -> Result<Option<Self>, StoreError> {
        if bucket.0 > 0 {
            let below = BucketId(bucket.0 - 1);
            let range = (below.first_seq(), below.last_seq());
            // There are rows above, so everything down there is committed.
            if !patiently(|| store.read_range(id, range.0, range.1, 1)).await?.is_empty() {
                return Ok(None);
            }
        }
        let head = committed_head(store, id, bucket).await?;
        Ok((head > 0).then_some(Self { store, id, next: bucket.first_seq(), head, first: true }))
    }

    /// The next frames of rows, ascending; none at the end.
    pub(super) async fn next(&mut self) -> Result<Vec<Rows>, StoreError> {
        if self.next > self.head {
            return Ok(Vec::new());
        }
        let to = self.head.min(self.next + READ_ROWS as u64 - 1);
        let stored = patiently(|| self.store.read_range(self.id, self.next, to, READ_ROWS)).await?;
        let rows: Vec<Row> = stored.into_iter().map(|stored| stored.row).collect();
        let missing = (self.next..=to).zip(rows.iter().map(|row| Some(row.seq)).chain(std::iter::repeat(None)));
        if let Some((seq, _)) = missing.into_iter().find(|(seq, found)| Some(*seq) != *found) {
            return Err(StoreError::Damaged(format!(
                "entry {seq} of {} is missing below the head {}",
                self.id, self.head
            )));
        }
        let mut frames = Vec::new();
        for batch in batches(&rows) {
            frames.push(rows_of(self.id, batch, std::mem::take(&mut self.first)));
        }
        self.next = to + 1;
        Ok(frames)
    }
}

/// Cuts consecutive rows into batches within the bounds of one.
fn batches(rows: &[Row]) -> Vec<&[Row]> {
    let mut batches = Vec::new();
    let (mut begin, mut bytes) = (0, 0);
    for (at, row) in rows.iter().enumerate() {
        let full = at - begin >= limits::BATCH_ROWS_MAX || bytes + row.bytes() > limits::BATCH_BYTES_MAX;
        if at > begin && (full || BucketId::of(row.seq) != BucketId::of(rows[begin].seq)) {
            batches.push(&rows[begin..at]);
            (begin, bytes) = (at, 0);
        }
        bytes += row.bytes();
    }
    if begin < rows.len() {
        batches.push(&rows[begin..]);
    }
    batches
}

/// The committed head, as an owner finds it when it opens the conversation: the greatest seq of the greatest epoch of the tail. Only
/// whole tails are read, because read repair copies just the rows that a read returned. 0 if there is none.
async fn committed_head(store: &Store, id: ConversationId, lowest: BucketId) -> Result<u64, StoreError> {
    let tail = |bucket: u64| patiently(move || store.read_tail(id, BucketId(bucket)));
    // Buckets are without a gap: gallop upwards until one is empty, then halve.
    let (mut low, mut step) = (lowest.0, 1);
    let mut top = tail(low).await?;
    let mut empty = loop {
        let rows = tail(low + step).await?;
        if rows.is_empty() {
            break low + step;
        }
        (low, top, step) = (low + step, rows, step * 2);
    };
    while empty - low > 1 {
        let middle = low + (empty - low) / 2;
        let rows = tail(middle).await?;
        if rows.is_empty() {
            empty = middle;
        } else {
            (low, top) = (middle, rows);
        }
    }
    let Some(committed) = top.first().map(|row| row.committed) else { return Ok(0) };
    let mut rows: BTreeMap<u64, StoredRow> = top.into_iter().map(|row| (row.row.seq, row)).collect();
    if committed > 0 && BucketId::of(committed).0 != low {
        let below = tail(BucketId::of(committed).0).await?;
        rows.extend(below.into_iter().map(|row| (row.row.seq, row)));
    }
    let span = || rows.range(committed..);
    let epoch = span().map(|(_, row)| row.epoch).max();
    Ok(span().filter(|(_, row)| Some(row.epoch) == epoch).map(|(seq, _)| *seq).max().unwrap_or(0))
}

/// The frames of a partition of a state table. What a cluster is stands in the header.
pub(super) async fn partition(store: &Store, (table, partition): (Table, Bytes)) -> Result<Vec<State>, StoreError> {
    let mut frames = Vec::new();
    if table == Table::Cluster {
        return Ok(frames);
    }
    let mut after: Option<Bytes> = None;
    loop {
        let read = || store.scan(table, &partition, after.as_deref(), READ_ROWS);
        let rows = patiently(read).await?;
        let last = rows.len() < READ_ROWS;
        after = rows.last().map(|row| row.key.clone());
        let mut frame = Vec::<StateRow>::new();
        let mut bytes = 0;
        for row in rows {
            let size = row.key.len() + row.value.len();
            if !frame.is_empty() && (frame.len() >= STATE_ROWS || bytes + size > STATE_BYTES) {
                frames.push(state_of(table, &partition, std::mem::take(&mut frame)));
                bytes = 0;
            }
            bytes += size;
            frame.push(row);
        }
        if !frame.is_empty() {
            frames.push(state_of(table, &partition, frame));
        }
        if last {
            return Ok(frames);
        }
    }
}
