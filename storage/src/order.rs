//! Which of two versions of one row stays, and what a store accepts at all. Every backend asks here, so that they cannot disagree.

use std::cmp::Ordering;

use bytes::Bytes;

use crate::{
    ROW_BYTES_MAX, STATE_KEY_BYTES_MAX, STATE_VALUE_BYTES_MAX,
    model::{Batch, Row, StateWrite, StoreError, StoredRow},
};

/// A version of a row of a state table; without a value it is a deletion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateCell {
    pub(crate) timestamp: u64,
    pub(crate) value: Option<Bytes>,
}

impl StateCell {
    /// The greater timestamp; at the same one a deletion, then the greater value.
    pub(crate) fn beats(&self, other: &Self) -> bool {
        let deleted = |cell: &Self| cell.value.is_none();
        (self.timestamp, deleted(self), &self.value) > (other.timestamp, deleted(other), &other.value)
    }
}

/// Whether a log row replaces another at the same seq: the greater epoch; at the same one the greater content. (A pair of epoch and
/// seq names one entry, so the second rule only makes the outcome independent of the order of arrival.)
pub(crate) fn row_beats(row: &StoredRow, other: &StoredRow) -> bool {
    row.epoch.cmp(&other.epoch).then_with(|| content_order(row, other)) == Ordering::Greater
}

fn content_order(row: &StoredRow, other: &StoredRow) -> Ordering {
    row.committed.cmp(&other.committed).then_with(|| {
        fn content(row: &Row) -> impl Ord + '_ {
            (
                row.counted,
                row.sender.as_ref().map_or("", |s| s.as_str()),
                &row.client_message_id[..],
                row.sent_at,
                i32::from(row.kind),
                row.flags,
                &row.body[..],
                &row.meta[..],
            )
        }
        content(&row.row).cmp(&content(&other.row))
    })
}

/// Refuses what no store may hold.
pub(crate) fn check_batch(batch: &Batch) -> Result<(), StoreError> {
    if !batch.is_valid() {
        return Err(StoreError::Invalid(format!(
            "a batch has 1 to {} consecutive rows of one bucket and at most {} bytes",
            im_proto::limits::BATCH_ROWS_MAX,
            im_proto::limits::BATCH_BYTES_MAX
        )));
    }
    if batch.rows.len() == 1 && batch.rows[0].bytes() > ROW_BYTES_MAX {
        return Err(StoreError::Invalid(format!("a row has at most {ROW_BYTES_MAX} bytes")));
    }
    Ok(())
}

/// Refuses what no store may hold.
pub(crate) fn check_state(write: &StateWrite) -> Result<(), StoreError> {
    if write.partition.len() > STATE_KEY_BYTES_MAX || write.key.len() > STATE_KEY_BYTES_MAX {
        return Err(StoreError::Invalid(format!("partition and key have at most {STATE_KEY_BYTES_MAX} bytes")));
    }
    if write.value.as_ref().is_some_and(|value| value.len() > STATE_VALUE_BYTES_MAX) {
        return Err(StoreError::Invalid(format!("a value has at most {STATE_VALUE_BYTES_MAX} bytes")));
    }
    Ok(())
}
