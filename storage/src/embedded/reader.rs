//! Reading the log: which runs to look at, and which row of overlapping runs stays. And going through all that there is.

use std::collections::BTreeMap;

use bytes::Bytes;
use im_proto::ConversationId;

use super::{
    engine::{Engine, read_error},
    record::{RUN_REACH, RunDecoder, RunKey, decode_partition, put_state_key, run_key, run_range},
};
use crate::{
    TAIL_ROWS_MAX,
    model::{BucketId, StoreError, StoredRow, Table},
    order::row_beats,
};

/// The newest rows of a bucket, descending.
pub(super) fn tail(
    engine: &Engine,
    conversation: ConversationId,
    bucket: BucketId,
) -> Result<Vec<StoredRow>, StoreError> {
    let mut rows = BTreeMap::<u64, StoredRow>::new();
    let mut decoder = RunDecoder::default();
    let mut lowest = bucket.first_seq();
    for entry in engine.log.range(run_range(conversation, bucket.first_seq(), bucket.last_seq())).rev() {
        let (key, value) = entry.into_inner().map_err(read_error)?;
        let key = RunKey::decode(&key)?;
        if key.first_seq.saturating_add(RUN_REACH) < lowest {
            break;
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
    Ok(rows.into_values().rev().take(TAIL_ROWS_MAX).collect())
}

/// Rows of a range, ascending.
pub(super) fn range(
    engine: &Engine,
    conversation: ConversationId,
    (from, to): (u64, u64),
    limit: usize,
    bodies: bool,
) -> Result<Vec<StoredRow>, StoreError> {
    let mut rows = Vec::<StoredRow>::new();
    if from > to || limit == 0 {
        return Ok(rows);
    }
    let mut decoder = RunDecoder::default();
    for entry in engine.log.range(run_range(conversation, from, to)) {
        let (key, value) = entry.into_inner().map_err(read_error)?;
        let key = RunKey::decode(&key)?;
        // Runs come in the order of their first seqs: what lies before this one is final.
        if rows.get(limit - 1).is_some_and(|last| last.row.seq < key.first_seq) {
            break;
        }
        decoder.rows(key, &value, (from, to), bodies, |row| put(&mut rows, row))?;
    }
    rows.truncate(limit);
    Ok(rows)
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
