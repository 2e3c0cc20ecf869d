//! Reading the log: which runs to look at, and which row of overlapping runs stays.

use std::collections::BTreeMap;

use im_proto::ConversationId;

use super::{
    engine::{Engine, read_error},
    record::{RUN_REACH, RunDecoder, RunKey, run_range},
};
use crate::{
    TAIL_ROWS_MAX,
    model::{BucketId, StoreError, StoredRow},
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
