//! Rows of the log on their way to the servers and back.
//!
//! A batch is one statement, or one unlogged batch of one partition: a replica applies it whole or not at all. A tail is one request
//! that reads all columns. Ranges are read in slices, because they lie below the committed head, where rows do not change.

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use im_proto::{ConversationId, Epoch, Timestamp, UserId, limits, v1::EntryKind};
use scylla::{response::query_result::QueryResult, value::CqlTimestamp};

use super::{
    Inner, failure,
    metrics::Operation,
    query::Query,
    value::{signed, unsigned},
};
use crate::{
    TAIL_ROWS_MAX,
    model::{Batch, BucketId, Row, RowKey, StoreError, StoredRow},
};

/// Rows of one request for a range: at most 17 MB, as an entry has at most 64 KiB and a bit.
const SLICE_ROWS: u64 = 256;

/// Slices of one range that are under way at a time.
const SLICES_IN_FLIGHT: usize = 4;

/// A range ends early behind so many buckets without a row: nobody asks from so far below `first_seq`.
const EMPTY_BUCKETS_MAX: u64 = 16;

/// Columns of a row as they are written.
type RowValues<'a> = (&'a [u8], i64, i64, i64, i64, &'a str, &'a [u8], CqlTimestamp, i32, i32, &'a [u8], &'a [u8], i64);

/// Columns of a row as they are read. A body that was erased is null.
type RowColumns<'a> =
    (i64, i64, i64, &'a str, &'a [u8], CqlTimestamp, i32, i32, Option<&'a [u8]>, Option<&'a [u8]>, i64);

/// A part of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slice {
    bucket: BucketId,
    from: u64,
    to: u64,
}

/// Cuts a range into slices of at most `rows` seqs that do not cross an edge of a bucket.
fn slices((from, to): (u64, u64), rows: u64) -> impl Iterator<Item = Slice> {
    let to = to.min(signed_max());
    let mut next = Some(from.max(1)).filter(|from| *from <= to);
    std::iter::from_fn(move || {
        let from = next?;
        let bucket = BucketId::of(from);
        let end = bucket.last_seq().min(from.saturating_add(rows - 1)).min(to);
        next = end.checked_add(1).filter(|next| *next <= to);
        Some(Slice { bucket, from, to: end })
    })
}

const fn signed_max() -> u64 {
    i64::MAX.unsigned_abs()
}

impl Inner {
    /// Writes a batch and waits for a quorum.
    pub(super) async fn append(&self, batch: &Batch) -> Result<(), StoreError> {
        let values = row_values(batch)?;
        let request = async {
            match (self.prepared.append(batch.rows.len()), values.first()) {
                (Some(statement), _) => self.session.batch(statement, &values).await.map(drop),
                (None, Some(row)) => {
                    self.session.execute_unpaged(self.prepared.get(Query::Append), row).await.map(drop)
                }
                (None, None) => Ok(()),
            }
        };
        self.appends.run(Operation::Append, request).await?;
        self.metrics.rows.increment(batch.rows.len() as u64);
        Ok(())
    }

    /// One request, all columns; see the module.
    pub(super) async fn tail(
        &self,
        conversation: ConversationId,
        bucket: BucketId,
    ) -> Result<Vec<StoredRow>, StoreError> {
        let limit = i32::try_from(TAIL_ROWS_MAX).unwrap_or(i32::MAX);
        let values = (&conversation.as_bytes()[..], signed(bucket.0)?, limit);
        let request = self.session.execute_unpaged(self.prepared.get(Query::Tail), values);
        decode_rows(self.reads.run(Operation::Tail, request).await?)
    }

    /// Rows of a range, ascending.
    pub(super) async fn range(
        &self,
        conversation: ConversationId,
        range: (u64, u64),
        limit: usize,
    ) -> Result<Vec<StoredRow>, StoreError> {
        let read = |slice: Slice| async move {
            let (bucket, from, to) = (signed(slice.bucket.0)?, signed(slice.from)?, signed(slice.to)?);
            let values = (&conversation.as_bytes()[..], bucket, from, to, i32::try_from(limit).unwrap_or(i32::MAX));
            let request = self.session.execute_unpaged(self.prepared.get(Query::Range), values);
            Ok((slice, decode_rows(self.reads.run(Operation::Range, request).await?)?))
        };
        self.collect(range, SLICE_ROWS, limit, read).await
    }

    /// Keys of a range, ascending.
    pub(super) async fn keys(
        &self,
        conversation: ConversationId,
        range: (u64, u64),
    ) -> Result<Vec<RowKey>, StoreError> {
        let read = |slice: Slice| async move {
            let values =
                (&conversation.as_bytes()[..], signed(slice.bucket.0)?, signed(slice.from)?, signed(slice.to)?);
            let request = self.session.execute_unpaged(self.prepared.get(Query::Keys), values);
            Ok((slice, decode_keys(self.reads.run(Operation::Keys, request).await?)?))
        };
        self.collect(range, limits::BUCKET_ENTRIES, usize::MAX, read).await
    }

    /// Reads slices, a few at a time, in their order, until there is enough.
    async fn collect<T, F>(
        &self,
        range: (u64, u64),
        slice_rows: u64,
        limit: usize,
        read: impl Fn(Slice) -> F,
    ) -> Result<Vec<T>, StoreError>
    where
        F: Future<Output = Result<(Slice, Vec<T>), StoreError>>,
    {
        let mut rows = Vec::new();
        if limit == 0 {
            return Ok(rows);
        }
        // No more slices at a time than the limit will need.
        let wanted = u64::try_from(limit).unwrap_or(u64::MAX);
        let at_once = usize::try_from(wanted.div_ceil(slice_rows)).unwrap_or(usize::MAX).min(SLICES_IN_FLIGHT);
        let mut slices = stream::iter(slices(range, slice_rows)).map(read).buffered(at_once);
        let mut last_with_rows = BucketId::of(range.0.max(1)).0;
        while let Some((slice, found)) = slices.try_next().await? {
            if !found.is_empty() {
                last_with_rows = slice.bucket.0;
            }
            rows.extend(found);
            if rows.len() >= limit || slice.bucket.0 - last_with_rows > EMPTY_BUCKETS_MAX {
                break;
            }
        }
        rows.truncate(limit);
        Ok(rows)
    }
}

fn row_values(batch: &Batch) -> Result<Vec<RowValues<'_>>, StoreError> {
    let conversation = &batch.conversation.as_bytes()[..];
    let bucket = signed(batch.bucket().0)?;
    let (committed, timestamp) = (signed(batch.committed)?, signed(batch.epoch.0)?);
    batch
        .rows
        .iter()
        .map(|row| {
            let (seq, counted) = (signed(row.seq)?, signed(row.counted)?);
            let sender = row.sender.as_ref().map_or("", |sender| sender.as_str());
            let sent_at = CqlTimestamp(row.sent_at.as_millis());
            let (kind, flags) = (i32::from(row.kind), row.flags.cast_signed());
            let id = &row.client_message_id[..];
            Ok((
                conversation,
                bucket,
                seq,
                committed,
                counted,
                sender,
                id,
                sent_at,
                kind,
                flags,
                &row.body[..],
                &row.meta[..],
                timestamp,
            ))
        })
        .collect()
}

fn decode_rows(result: QueryResult) -> Result<Vec<StoredRow>, StoreError> {
    let result = result.into_rows_result().map_err(failure::damaged)?;
    let mut senders = Senders::default();
    let mut rows = Vec::with_capacity(result.rows_num());
    for columns in result.rows::<RowColumns<'_>>().map_err(failure::damaged)? {
        rows.push(decode_row(columns.map_err(failure::damaged)?, &mut senders)?);
    }
    Ok(rows)
}

fn decode_row(columns: RowColumns<'_>, senders: &mut Senders) -> Result<StoredRow, StoreError> {
    let (seq, committed, counted, sender, id, sent_at, kind, flags, body, meta, written_at) = columns;
    let (body, meta) = (body.unwrap_or_default(), meta.unwrap_or_default());
    // Copied, once for all fields: a row that somebody keeps must not pin the memory of a whole answer.
    let mut bytes = BytesMut::with_capacity(id.len() + body.len() + meta.len());
    bytes.extend_from_slice(id);
    bytes.extend_from_slice(body);
    bytes.extend_from_slice(meta);
    let mut bytes = bytes.freeze();
    let client_message_id = bytes.split_to(id.len());
    let row = Row {
        seq: unsigned(seq)?,
        counted: unsigned(counted)?,
        sender: senders.parse(sender)?,
        client_message_id,
        sent_at: Timestamp::from_millis(sent_at.0),
        kind: EntryKind::try_from(kind).map_err(|_| failure::damaged(format!("entry {seq} has an unknown kind")))?,
        flags: flags.cast_unsigned(),
        body: bytes.split_to(body.len()),
        meta: bytes,
    };
    Ok(StoredRow { row, epoch: Epoch(unsigned(written_at)?), committed: unsigned(committed)? })
}

fn decode_keys(result: QueryResult) -> Result<Vec<RowKey>, StoreError> {
    let result = result.into_rows_result().map_err(failure::damaged)?;
    let mut senders = Senders::default();
    let mut keys = Vec::with_capacity(result.rows_num());
    for columns in result.rows::<(i64, &str, &[u8])>().map_err(failure::damaged)? {
        let (seq, sender, id) = columns.map_err(failure::damaged)?;
        let (seq, sender) = (unsigned(seq)?, senders.parse(sender)?);
        keys.push(RowKey { seq, sender, client_message_id: Bytes::copy_from_slice(id) });
    }
    Ok(keys)
}

/// Knows the last two senders, so that the rows of a conversation of two share their texts.
#[derive(Default)]
struct Senders([Option<UserId>; 2]);

impl Senders {
    fn parse(&mut self, text: &str) -> Result<Option<UserId>, StoreError> {
        if text.is_empty() {
            return Ok(None);
        }
        if let Some(known) = self.0.iter().flatten().find(|known| known.as_str() == text) {
            return Ok(Some(known.clone()));
        }
        let sender = UserId::parse(text).map_err(|_| failure::damaged("a sender is no user id"))?;
        self.0.swap(0, 1);
        self.0[0] = Some(sender.clone());
        Ok(Some(sender))
    }
}
