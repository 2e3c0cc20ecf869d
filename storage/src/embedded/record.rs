//! How the embedded store lays things out as keys and values. Pure functions of bytes.
//!
//! A *run* is one stored record: the rows of one batch. Its key orders runs of a conversation by their first seq; runs of different
//! epochs may overlap, and readers resolve them seq by seq. As a run has at most 128 rows and stays in its bucket, whatever covers a
//! seq begins at most 127 before it.
//!
//! ```text
//! run key    conversation (16) · first seq (8, big-endian) · epoch (8, big-endian) · rows − 1 (1)
//! run value  format (1) · committed (varint) · row*
//! row        marks (1) · fields that the marks announce, as varints · lengths · client message id, body, meta
//! state key  table (1) · length of partition (2, big-endian) · partition · key
//! state      timestamp (8, big-endian) · 1 value, or 0 for a deletion
//! fence      0 · "fence/" · instance          generation   0 · "generation"          removals   0 · "removed"
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use im_proto::{ConversationId, Epoch, InstanceId, Timestamp, UserId, limits, v1::EntryKind};
use prost::encoding::{decode_varint, encode_varint};

use crate::{
    model::{Batch, BucketId, Row, StoreError, StoredRow, Table},
    order::StateCell,
};

/// Format of a run's value.
const RUN_FORMAT: u8 = 1;
/// Rows a run can begin before a seq that it covers.
pub(super) const RUN_REACH: u64 = limits::BATCH_ROWS_MAX as u64 - 1;
const RUN_KEY_BYTES: usize = 33;

const SAME_SENDER: u8 = 1;
const SAME_TIME: u8 = 1 << 1;
const COUNTED_NEXT: u8 = 1 << 2;
const PLAIN_MESSAGE: u8 = 1 << 3;
const NO_META: u8 = 1 << 4;
const KNOWN_MARKS: u8 = (1 << 5) - 1;

/// Which run a key names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RunKey {
    pub(super) first_seq: u64,
    pub(super) epoch: Epoch,
    pub(super) rows: usize,
}

impl RunKey {
    /// From a key of the log.
    pub(super) fn decode(key: &[u8]) -> Result<Self, StoreError> {
        if key.len() != RUN_KEY_BYTES {
            return Err(damaged("the key of a run has the wrong length"));
        }
        let mut rest = &key[ConversationId::BYTES..];
        Ok(Self { first_seq: rest.get_u64(), epoch: Epoch(rest.get_u64()), rows: usize::from(rest.get_u8()) + 1 })
    }
}

/// The key of a run.
pub(super) fn run_key(
    conversation: ConversationId,
    first_seq: u64,
    epoch: u64,
    rows_less_one: u8,
) -> [u8; RUN_KEY_BYTES] {
    let mut key = [0; RUN_KEY_BYTES];
    key[..16].copy_from_slice(conversation.as_bytes());
    key[16..24].copy_from_slice(&first_seq.to_be_bytes());
    key[24..32].copy_from_slice(&epoch.to_be_bytes());
    key[32] = rows_less_one;
    key
}

/// Keys of all runs that may cover a seq of `from..=to`.
pub(super) fn run_range(conversation: ConversationId, from: u64, to: u64) -> std::ops::RangeInclusive<[u8; 33]> {
    let first = from.saturating_sub(RUN_REACH).max(BucketId::of(from).first_seq());
    run_key(conversation, first, 0, 0)..=run_key(conversation, to, u64::MAX, u8::MAX)
}

/// Writes the key of a batch's run; the batch is valid.
pub(super) fn put_run_key(buffer: &mut BytesMut, batch: &Batch) {
    let rows_less_one = u8::try_from(batch.rows.len() - 1).unwrap_or(u8::MAX);
    buffer.put_slice(&run_key(batch.conversation, batch.first_seq(), batch.epoch.0, rows_less_one));
}

/// Writes the value of a batch's run.
pub(super) fn put_run(buffer: &mut BytesMut, batch: &Batch) {
    buffer.put_u8(RUN_FORMAT);
    encode_varint(batch.committed, buffer);
    let mut previous = Previous::default();
    for row in &batch.rows {
        put_row(buffer, row, &mut previous);
    }
}

/// What a row is written relative to.
#[derive(Default)]
struct Previous<'a> {
    sender: &'a str,
    sent_at: Timestamp,
    counted: u64,
}

fn put_row<'a>(buffer: &mut BytesMut, row: &'a Row, previous: &mut Previous<'a>) {
    let sender = row.sender.as_ref().map_or("", |sender| sender.as_str());
    let marks = mark(SAME_SENDER, sender == previous.sender)
        | mark(SAME_TIME, row.sent_at == previous.sent_at)
        | mark(COUNTED_NEXT, row.counted == previous.counted.wrapping_add(1))
        | mark(PLAIN_MESSAGE, row.kind == EntryKind::Message && row.flags == 0)
        | mark(NO_META, row.meta.is_empty());
    buffer.put_u8(marks);
    if marks & SAME_SENDER == 0 {
        encode_varint(sender.len() as u64, buffer);
        buffer.put_slice(sender.as_bytes());
    }
    if marks & SAME_TIME == 0 {
        let delta = row.sent_at.as_millis().wrapping_sub(previous.sent_at.as_millis());
        encode_varint(((delta << 1) ^ (delta >> 63)).cast_unsigned(), buffer);
    }
    if marks & COUNTED_NEXT == 0 {
        encode_varint(row.counted, buffer);
    }
    if marks & PLAIN_MESSAGE == 0 {
        encode_varint(u64::from(i32::from(row.kind).cast_unsigned()), buffer);
        encode_varint(u64::from(row.flags), buffer);
    }
    encode_varint(row.client_message_id.len() as u64, buffer);
    encode_varint(row.body.len() as u64, buffer);
    if marks & NO_META == 0 {
        encode_varint(row.meta.len() as u64, buffer);
    }
    buffer.put_slice(&row.client_message_id);
    buffer.put_slice(&row.body);
    buffer.put_slice(&row.meta);
    *previous = Previous { sender, sent_at: row.sent_at, counted: row.counted };
}

fn mark(mark: u8, on: bool) -> u8 {
    if on { mark } else { 0 }
}

/// Reads runs. Knows the last two senders, so that the rows of a conversation of two share their texts.
#[derive(Default)]
pub(super) struct RunDecoder {
    sender: Option<UserId>,
    known: [Option<UserId>; 2],
}

impl RunDecoder {
    /// Hands the rows of a run within `from..=to` to `take`, ascending. Without `bodies`, body and meta stay empty.
    ///
    /// What a row keeps is copied, once for all its fields: a row that somebody caches must not pin the memory of a whole block.
    pub(super) fn rows(
        &mut self,
        key: RunKey,
        mut value: &[u8],
        (from, to): (u64, u64),
        bodies: bool,
        mut take: impl FnMut(StoredRow),
    ) -> Result<(), StoreError> {
        let value = &mut value;
        if byte(value)? != RUN_FORMAT {
            return Err(damaged("a run has an unknown format"));
        }
        let committed = varint(value)?;
        self.sender = None;
        let (mut sent_at, mut counted) = (Timestamp::default(), 0);
        for seq in (key.first_seq..).take(key.rows) {
            let head = self.head(value, &mut sent_at, &mut counted)?;
            let content = take_bytes(value, head.content_bytes()?)?;
            if seq > to {
                return Ok(());
            }
            if seq >= from {
                let row = self.row(seq, (sent_at, counted), &head, content, bodies);
                take(StoredRow { row, epoch: key.epoch, committed });
            }
        }
        if !value.is_empty() {
            return Err(damaged("a run has bytes behind its last row"));
        }
        Ok(())
    }

    fn head(&mut self, value: &mut &[u8], sent_at: &mut Timestamp, counted: &mut u64) -> Result<Head, StoreError> {
        let marks = byte(value)?;
        if marks & !KNOWN_MARKS != 0 {
            return Err(damaged("a row has unknown marks"));
        }
        if marks & SAME_SENDER == 0 {
            let length = length(value)?;
            self.sender = self.sender(take_bytes(value, length)?)?;
        }
        if marks & SAME_TIME == 0 {
            let zigzag = varint(value)?;
            let delta = (zigzag >> 1).cast_signed() ^ -(zigzag & 1).cast_signed();
            *sent_at = Timestamp::from_millis(sent_at.as_millis().wrapping_add(delta));
        }
        *counted = if marks & COUNTED_NEXT == 0 { varint(value)? } else { counted.wrapping_add(1) };
        let (mut kind, mut flags) = (EntryKind::Message, 0);
        if marks & PLAIN_MESSAGE == 0 {
            let number = i32::try_from(varint(value)?).map_err(|_| damaged("a row has an unknown kind"))?;
            kind = EntryKind::try_from(number).map_err(|_| damaged("a row has an unknown kind"))?;
            flags = u32::try_from(varint(value)?).map_err(|_| damaged("a row has unknown flags"))?;
        }
        let (id, body) = (length(value)?, length(value)?);
        let meta = if marks & NO_META == 0 { length(value)? } else { 0 };
        Ok(Head { kind, flags, id, body, meta })
    }

    fn sender(&mut self, bytes: &[u8]) -> Result<Option<UserId>, StoreError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let known = self.known.iter().flatten().find(|known| known.as_str().as_bytes() == bytes);
        if let Some(known) = known {
            return Ok(Some(known.clone()));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| damaged("a sender is no text"))?;
        let sender = UserId::parse(text).map_err(|_| damaged("a sender is no user id"))?;
        self.known.swap(0, 1);
        self.known[0] = Some(sender.clone());
        Ok(Some(sender))
    }

    fn row(&self, seq: u64, (sent_at, counted): (Timestamp, u64), head: &Head, content: &[u8], bodies: bool) -> Row {
        let mut bytes = Bytes::copy_from_slice(if bodies { content } else { &content[..head.id] });
        let client_message_id = bytes.split_to(head.id);
        let (body, meta) = if bodies { (bytes.split_to(head.body), bytes) } else { (Bytes::new(), Bytes::new()) };
        Row {
            seq,
            counted,
            sender: self.sender.clone(),
            client_message_id,
            sent_at,
            kind: head.kind,
            flags: head.flags,
            body,
            meta,
        }
    }
}

/// A row without the bytes at its end.
struct Head {
    kind: EntryKind,
    flags: u32,
    id: usize,
    body: usize,
    meta: usize,
}

impl Head {
    fn content_bytes(&self) -> Result<usize, StoreError> {
        let sum = self.id.checked_add(self.body).and_then(|sum| sum.checked_add(self.meta));
        sum.ok_or_else(|| damaged("a row has an impossible length"))
    }
}

fn byte(value: &mut &[u8]) -> Result<u8, StoreError> {
    Ok(take_bytes(value, 1)?[0])
}

fn varint(value: &mut &[u8]) -> Result<u64, StoreError> {
    decode_varint(value).map_err(|_| damaged("a run ends early"))
}

fn length(value: &mut &[u8]) -> Result<usize, StoreError> {
    usize::try_from(varint(value)?).map_err(|_| damaged("a row has an impossible length"))
}

fn take_bytes<'a>(value: &mut &'a [u8], length: usize) -> Result<&'a [u8], StoreError> {
    let (taken, rest) = value.split_at_checked(length).ok_or_else(|| damaged("a run ends early"))?;
    *value = rest;
    Ok(taken)
}

/// Writes the key of a row of a state table.
pub(super) fn put_state_key(buffer: &mut impl BufMut, table: Table, partition: &[u8], key: &[u8]) {
    buffer.put_u8(table as u8);
    buffer.put_u16(u16::try_from(partition.len()).unwrap_or(u16::MAX));
    buffer.put_slice(partition);
    buffer.put_slice(key);
}

/// Table and partition of the key of a state row.
pub(super) fn decode_partition(key: &[u8]) -> Result<(Table, Bytes), StoreError> {
    let unknown = || damaged("the key of a state row has an unknown format");
    let (head, rest) = key.split_at_checked(3).ok_or_else(unknown)?;
    let table = Table::from_number(head[0]).ok_or_else(unknown)?;
    let partition = rest.get(..usize::from(u16::from_be_bytes([head[1], head[2]]))).ok_or_else(unknown)?;
    Ok((table, Bytes::copy_from_slice(partition)))
}

/// Bytes before the key proper in the key of a row of that partition.
pub(super) fn state_prefix_bytes(partition: &[u8]) -> usize {
    3 + partition.len()
}

/// Writes a version of a row of a state table.
pub(super) fn put_state(buffer: &mut BytesMut, cell: &StateCell) {
    buffer.put_u64(cell.timestamp);
    buffer.put_u8(u8::from(cell.value.is_some()));
    buffer.put_slice(cell.value.as_deref().unwrap_or_default());
}

/// Reads a version of a row of a state table.
pub(super) fn decode_state(mut value: &[u8]) -> Result<StateCell, StoreError> {
    if value.len() < 9 {
        return Err(damaged("a state row ends early"));
    }
    let timestamp = value.get_u64();
    match value.get_u8() {
        0 if value.is_empty() => Ok(StateCell { timestamp, value: None }),
        1 => Ok(StateCell { timestamp, value: Some(Bytes::copy_from_slice(value)) }),
        _ => Err(damaged("a state row has an unknown format")),
    }
}

/// Whether a deletion in that table takes the row away and leaves no version of its own: its stored key says which.
///
/// Busy rows come and go with every burst, so what stayed would be one cell for each conversation there ever was, and each start goes
/// through all of them. To forget is safe here: there is one copy, written in the order in which writes were put in, so only a write
/// that is given up and repeated much later could be older than the deletion; and a busy row that stands without a burst costs one
/// open of its conversation, as in a cluster, where `busy` forgets deletions too. In all other tables an older row must not come back.
pub(super) fn forgets_deletions(key: &[u8]) -> bool {
    key.first() == Some(&(Table::Busy as u8))
}

/// What the keys of all fences begin with.
pub(super) const FENCE_PREFIX: &[u8] = b"\0fence/";
/// The key of a row that is written along with removals. The engine forgets a removal when it reaches the last level, and tells by the
/// newest that a table file holds how far a journal is written out: without a row that stays it would keep and replay journals that
/// nothing needs.
pub(super) const REMOVED_KEY: &[u8] = b"\0removed";
/// The key of the generation.
pub(super) const GENERATION_KEY: &[u8] = b"\0generation";

/// The key of an instance's fence.
pub(super) fn fence_key(instance: &InstanceId) -> Vec<u8> {
    [FENCE_PREFIX, instance.as_str().as_bytes()].concat()
}

fn damaged(what: &str) -> StoreError {
    StoreError::Damaged(format!("{what}; restore the data directory from a backup"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(max: usize) -> impl Strategy<Value = Bytes> {
        proptest::collection::vec(any::<u8>(), 0..max).prop_map(Bytes::from)
    }

    prop_compose! {
        fn rows()(rows in proptest::collection::vec(
            (0_u64..3, proptest::option::of("[ab]{1,3}"), bytes(20), any::<i64>(), 0_i32..6, 0_u32..2, bytes(60), bytes(4)), 1..20),
            first in 1_u64..900, same_time in any::<bool>(),
        ) -> Vec<Row> {
            rows.into_iter().zip(first..).map(|((counted, sender, id, sent_at, kind, flags, body, meta), seq)| Row {
                seq, counted,
                sender: sender.map(|s| UserId::parse(&s).expect("a user id")),
                client_message_id: id,
                sent_at: Timestamp::from_millis(if same_time { 7 } else { sent_at }),
                kind: EntryKind::try_from(kind).expect("a kind"),
                flags, body, meta,
            }).collect()
        }
    }

    fn encoded(batch: &Batch) -> (RunKey, Bytes) {
        let mut buffer = BytesMut::new();
        put_run_key(&mut buffer, batch);
        let key = RunKey::decode(&buffer.split()).expect("a key");
        put_run(&mut buffer, batch);
        (key, buffer.freeze())
    }

    fn decoded(key: RunKey, value: &[u8], range: (u64, u64)) -> Result<Vec<StoredRow>, StoreError> {
        let mut rows = Vec::new();
        RunDecoder::default().rows(key, value, range, true, |row| rows.push(row))?;
        Ok(rows)
    }

    proptest! {
        #[test]
        fn a_run_reads_back_as_written(rows in rows(), epoch in any::<u64>(), committed in any::<u64>()) {
            let batch = Batch { conversation: ConversationId::from_bytes([7; 16]), epoch: Epoch(epoch), committed, rows };
            let (key, value) = encoded(&batch);
            let read = decoded(key, &value, (0, u64::MAX)).expect("readable");
            let expected: Vec<_> =
                batch.rows.iter().map(|row| StoredRow { row: row.clone(), epoch: batch.epoch, committed }).collect();
            prop_assert_eq!(&read, &expected);
            let bytes: usize = batch.rows.iter().map(Row::bytes).sum();
            prop_assert!(value.len() <= bytes + 16, "the bound by which buffers are sized holds");
        }

        #[test]
        fn damaged_runs_are_errors_and_never_panic(rows in rows(), at in any::<usize>(), with in any::<u8>()) {
            let batch = Batch { conversation: ConversationId::from_bytes([7; 16]), epoch: Epoch(3), committed: 1, rows };
            let (key, value) = encoded(&batch);
            for cut in 0..value.len() {
                prop_assert!(decoded(key, &value[..cut], (0, u64::MAX)).is_err());
            }
            let mut value = value.to_vec();
            let at = at % value.len();
            value[at] = with;
            let _ = decoded(key, &value, (0, u64::MAX));
        }
    }
}
