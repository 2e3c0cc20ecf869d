//! Reading the log: which runs to look at, and which row of overlapping runs stays. Scanning the state tables. And going through all
//! that there is.

use std::collections::BTreeMap;

use bytes::Bytes;
use im_proto::ConversationId;

use super::{
    engine::{Engine, read_error},
    record::{RUN_REACH, RunDecoder, RunKey, decode_partition, decode_state, put_state_key, run_key, run_range},
};
use crate::{
    TAIL_ROWS_MAX,
    cells::state_row,
    model::{BucketId, StateRow, StoreError, StoredRow, Table},
    order::row_beats,
};

/// What a read may still go through before it takes too long for the task that asks. A read that reaches it gives nothing.
pub(super) struct Bound {
    cells: usize,
    bytes: usize,
}

impl Bound {
    /// About a millisecond. Of the cells some are not among the rows that are found: they were deleted, are of another epoch, or end
    /// before the range.
    pub(super) const SHORT: Self = Self { cells: 1_024, bytes: 1 << 20 };
    pub(super) const NONE: Self = Self { cells: usize::MAX, bytes: usize::MAX };

    /// Counts a cell of so many bytes. False if that is too much.
    fn covers(&mut self, bytes: usize) -> bool {
        let left = (self.cells.checked_sub(1), self.bytes.checked_sub(bytes));
        let (Some(cells), Some(bytes)) = left else { return false };
        (self.cells, self.bytes) = (cells, bytes);
        true
    }
}

/// The newest rows of a bucket, descending.
pub(super) fn tail(
    engine: &Engine,
    conversation: ConversationId,
    bucket: BucketId,
    mut bound: Bound,
) -> Result<Option<Vec<StoredRow>>, StoreError> {
    let mut rows = BTreeMap::<u64, StoredRow>::new();
    let mut decoder = RunDecoder::default();
    let mut lowest = bucket.first_seq();
    for entry in engine.log.range(run_range(conversation, bucket.first_seq(), bucket.last_seq())).rev() {
        let (key, value) = entry.into_inner().map_err(read_error)?;
        let key = RunKey::decode(&key)?;
        if key.first_seq.saturating_add(RUN_REACH) < lowest {
            break;
        }
        if !bound.covers(value.len()) {
            return Ok(None);
        }
        decoder.rows(key, &value, (lowest, bucket.last_seq()), true, |row| {
            let stays = rows.get(&row.row.seq).is_none_or(|other| row_beats(&row, other));
            if stays {
                rows.insert(row.row.seq, row);
            }
        })?;
        if let Some(seq) = rows.keys().rev().nth(TAIL_ROWS_MAX - 1) {
            lowest = *seq;
        }
    }
    Ok(Some(rows.into_values().rev().take(TAIL_ROWS_MAX).collect()))
}

/// Rows of a range, ascending.
pub(super) fn range(
    engine: &Engine,
    conversation: ConversationId,
    (from, to): (u64, u64),
    limit: usize,
    bodies: bool,
    mut bound: Bound,
) -> Result<Option<Vec<StoredRow>>, StoreError> {
    let mut rows = Vec::<StoredRow>::new();
    if from > to || limit == 0 {
        return Ok(Some(rows));
    }
    let mut decoder = RunDecoder::default();
    for entry in engine.log.range(run_range(conversation, from, to)) {
        let (key, value) = entry.into_inner().map_err(read_error)?;
        let key = RunKey::decode(&key)?;
        // Runs come in the order of their first seqs: what lies before this one is final.
        if rows.get(limit - 1).is_some_and(|last| last.row.seq < key.first_seq) {
            break;
        }
        if !bound.covers(value.len()) {
            return Ok(None);
        }
        decoder.rows(key, &value, (from, to), bodies, |row| put(&mut rows, row))?;
    }
    rows.truncate(limit);
    Ok(Some(rows))
}

/// Rows of a partition of a state table in the order of their stored keys, from `first` on. `prefix` bytes of it name the partition.
pub(super) fn scan(
    engine: &Engine,
    first: &[u8],
    prefix: usize,
    limit: usize,
    mut bound: Bound,
) -> Result<Option<Vec<StateRow>>, StoreError> {
    let mut rows = Vec::new();
    for entry in engine.state.range(first..) {
        let (key, value) = entry.into_inner().map_err(read_error)?;
        if rows.len() == limit || key.get(..prefix) != first.get(..prefix) {
            break;
        }
        if !bound.covers(key.len() + value.len()) {
            return Ok(None);
        }
        rows.extend(state_row(&Bytes::copy_from_slice(&key[prefix..]), &decode_state(&value)?));
    }
    Ok(Some(rows))
}

/// The next partition of the log that has rows.
pub(super) fn bucket_behind(
    engine: &Engine,
    last: Option<&(ConversationId, BucketId)>,
) -> Result<Option<(ConversationId, BucketId)>, StoreError> {
    let first = last.map_or((ConversationId::from_bytes([0; 16]), 0), |(id, bucket)| (*id, bucket.last_seq() + 1));
    let Some(entry) = engine.log.range(run_key(first.0, first.1, 0, 0)..).next() else { return Ok(None) };
    let key = entry.key().map_err(read_error)?;
    let run = RunKey::decode(&key)?;
    let conversation = ConversationId::from_slice(&key[..ConversationId::BYTES]);
    conversation
        .map(|id| Some((id, BucketId::of(run.first_seq))))
        .map_err(|error| StoreError::Damaged(error.to_string()))
}

/// The next partition of the state tables that has rows or had some.
pub(super) fn partition_behind(
    engine: &Engine,
    last: Option<&(Table, Bytes)>,
) -> Result<Option<(Table, Bytes)>, StoreError> {
    let mut first = Vec::new();
    match last {
        // Fences and the generation come before all tables.
        None => first.push(Table::Cluster as u8),
        Some((table, partition)) => {
            put_state_key(&mut first, *table, partition, b"");
            increment(&mut first);
        }
    }
    let Some(entry) = engine.state.range(first..).next() else { return Ok(None) };
    decode_partition(&entry.key().map_err(read_error)?).map(Some)
}

/// The least bytes above all that begin with these. The first of them is the number of a table and never the greatest byte.
fn increment(bytes: &mut Vec<u8>) {
    while let Some(last) = bytes.last_mut() {
        if let Some(next) = last.checked_add(1) {
            *last = next;
            return;
        }
        bytes.pop();
    }
}

/// Puts a row at its place among ascending ones; mostly that is the end.
fn put(rows: &mut Vec<StoredRow>, row: StoredRow) {
    match rows.last() {
        Some(last) if last.row.seq >= row.row.seq => match rows.binary_search_by_key(&row.row.seq, |r| r.row.seq) {
            Ok(at) if row_beats(&row, &rows[at]) => rows[at] = row,
            Ok(_) => {}
            Err(at) => rows.insert(at, row),
        },
        _ => rows.push(row),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Directory as _, Embedded, EmbeddedOptions, MessageLog as _,
        conformance::{append_each, batch},
        model::{Batch, Row, StateWrite},
    };

    const CONVERSATION: ConversationId = ConversationId::from_bytes([7; 16]);

    fn opened(directory: &tempfile::TempDir) -> Embedded {
        Embedded::open(directory.path(), EmbeddedOptions::default()).unwrap()
    }

    #[tokio::test]
    async fn a_scan_that_goes_through_many_deleted_rows_is_no_short_one_and_finds_what_is_behind() {
        let directory = tempfile::tempdir().unwrap();
        let store = opened(&directory);
        let write = |number: u16, is_there: bool| StateWrite {
            table: Table::Members,
            partition: Bytes::from_static(b"group"),
            key: Bytes::copy_from_slice(&number.to_be_bytes()),
            value: is_there.then(|| Bytes::from_static(b"member")),
            timestamp: 1,
        };
        store.write((0..2_000).map(|number| write(number, number >= 1_500)).collect()).await.unwrap();
        let from = |key: &[u8]| {
            let mut first = Vec::new();
            put_state_key(&mut first, Table::Members, b"group", key);
            first
        };
        let (engine, prefix) = (&store.core().engine, from(b"").len());
        assert_eq!(scan(engine, &from(b""), prefix, 10, Bound::SHORT), Ok(None));
        let rows = scan(engine, &from(b""), prefix, 10, Bound::NONE).unwrap().unwrap();
        assert_eq!((rows.len(), &rows[0].key[..]), (10, &1_500_u16.to_be_bytes()[..]));
        assert_eq!(store.scan(Table::Members, b"group", None, 10).await, Ok(rows));
        // Behind them it is short.
        assert!(scan(engine, &from(&1_500_u16.to_be_bytes()), prefix, 10, Bound::SHORT).unwrap().is_some());
    }

    #[tokio::test]
    async fn a_tail_or_range_of_many_bytes_is_no_short_read_and_gives_the_same_rows() {
        let directory = tempfile::tempdir().unwrap();
        let store = opened(&directory);
        let large = |seq: u64| {
            let mut batch = batch(CONVERSATION, 1, seq..=seq);
            batch.rows[0].body = Bytes::from(vec![seq as u8; 200_000]);
            batch
        };
        let batches: Vec<Batch> = (1..=10).map(large).collect();
        let expected: Vec<Row> = batches.iter().flat_map(|batch| batch.rows.clone()).collect();
        append_each(&store.clone().into(), batches).await;
        let engine = &store.core().engine;
        assert_eq!(tail(engine, CONVERSATION, BucketId(0), Bound::SHORT), Ok(None));
        assert_eq!(range(engine, CONVERSATION, (1, 10), 10, true, Bound::SHORT), Ok(None));
        assert!(range(engine, CONVERSATION, (1, 10), 2, true, Bound::SHORT).unwrap().is_some());
        let rows = |rows: Vec<StoredRow>| rows.into_iter().map(|stored| stored.row).collect::<Vec<_>>();
        assert_eq!(rows(store.read_range(CONVERSATION, 1, 10, 10).await.unwrap()), expected);
        let mut newest = rows(store.read_tail(CONVERSATION, BucketId(0)).await.unwrap());
        newest.reverse();
        assert_eq!(newest, expected);
        assert_eq!(store.read_keys(CONVERSATION, 1, 10).await.unwrap().len(), 10);
    }

    #[test]
    fn a_bound_covers_as_many_cells_and_bytes_as_it_says() {
        let mut bound = Bound { cells: 2, bytes: 10 };
        assert_eq!([9, 1, 0].map(|bytes| bound.covers(bytes)), [true, true, false], "cells");
        let mut bound = Bound { cells: 9, bytes: 10 };
        assert_eq!([9, 2, 1, 1].map(|bytes| bound.covers(bytes)), [true, false, true, false], "bytes");
    }
}
