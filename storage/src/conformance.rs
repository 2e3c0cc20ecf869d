//! What every backend must do, as functions over a [`Store`]. A failure panics, as in any test.
//!
//! Each check uses conversations, instances and partitions of its own, so that all of them run on one store. They need a store that
//! loses nothing: the simulated and faulty ones run them without faults, and are tested for their faults elsewhere.

pub mod hot;
mod inventory;
mod log;
mod state;

use std::sync::Arc;

use bytes::Bytes;
use im_proto::{ConversationId, Epoch, Timestamp, UserId, v1::EntryKind};
use tokio::sync::mpsc;

use crate::{
    MessageLog, Store,
    model::{AppendRequest, Batch, Row, StoreError, StoredRow},
};

/// Runs the whole suite, on a store that was never used.
pub async fn all(store: &Store) {
    state::fences_stay(store).await;
    log::the_tail_is_limited_descending_and_of_one_bucket(store).await;
    again(store).await;
}

/// Runs what can also be run on a store that has seen the suite before: everything writes what it wrote then, and reads the same.
pub async fn again(store: &Store) {
    log::a_batch_reads_back_byte_for_byte(store).await;
    log::the_greater_epoch_wins_in_any_order_of_arrival(store).await;
    log::a_repeated_batch_changes_nothing(store).await;
    log::ranges_cross_buckets_and_keep_their_bounds(store).await;
    log::keys_match_the_rows(store).await;
    log::readers_see_batches_whole(store).await;
    log::invalid_batches_are_refused(store).await;
    log::a_thousand_concurrent_submits_are_each_answered_once(store).await;
    state::the_generation_only_rises(store).await;
    state::the_greater_timestamp_wins_and_ties_are_settled(store).await;
    state::scans_page_through_a_partition(store).await;
    state::oversized_rows_are_refused(store).await;
    inventory::everything_is_listed_once(store).await;
}

/// A conversation that only one check uses.
fn conversation(check: u8, number: u8) -> ConversationId {
    let mut bytes = [0xc0; 16];
    (bytes[0], bytes[15]) = (check, number);
    ConversationId::from_bytes(bytes)
}

/// A row whose fields all depend on seq and salt; some are empty, some are large.
pub fn row(seq: u64, salt: u64) -> Row {
    let sender = (!seq.is_multiple_of(5)).then(|| UserId::parse(&format!("user-{}", seq % 3)).expect("a user id"));
    let body_bytes = if seq.is_multiple_of(97) { 3_000 } else { usize::try_from(seq % 150).expect("small") };
    Row {
        seq,
        counted: seq / 2 + salt,
        sender,
        client_message_id: Bytes::from(format!("{salt}/{seq}")),
        sent_at: Timestamp::from_millis(1_700_000_000_000 + i64::try_from(seq * 7 % 50).expect("small")),
        kind: if seq.is_multiple_of(11) { EntryKind::Event } else { EntryKind::Message },
        flags: u32::from(seq.is_multiple_of(13)),
        body: (0..body_bytes).map(|i| (i as u64 ^ seq ^ salt) as u8).collect(),
        meta: if seq.is_multiple_of(7) { Bytes::from_static(b"meta\0") } else { Bytes::new() },
    }
}

/// Consecutive rows as one batch.
pub fn batch(conversation: ConversationId, epoch: u64, seqs: std::ops::RangeInclusive<u64>) -> Batch {
    let committed = seqs.start().saturating_sub(1);
    Batch { conversation, epoch: Epoch(epoch), committed, rows: seqs.map(|seq| row(seq, epoch)).collect() }
}

/// What a batch reads back as.
pub fn stored(batch: &Batch) -> Vec<StoredRow> {
    let stored = |row: &Row| StoredRow { row: row.clone(), epoch: batch.epoch, committed: batch.committed };
    batch.rows.iter().map(stored).collect()
}

/// Submits batches in one call and waits for all outcomes, in the order of the batches.
pub async fn append(store: &Store, batches: Vec<Batch>) -> Vec<Result<(), StoreError>> {
    let (outcomes, mut received) = mpsc::channel(1 << 12);
    let requests: Vec<_> =
        (0..).zip(batches).map(|(token, batch)| AppendRequest { token, batch: Arc::new(batch) }).collect();
    let mut ordered = vec![None; requests.len()];
    store.submit(
        requests,
        Arc::new(move |answers| {
            // The check that waits may have failed already.
            let _ = outcomes.try_send(answers);
        }),
    );
    while ordered.iter().any(Option::is_none) {
        let answers = received.recv().await.expect("every batch is answered");
        for (token, outcome) in answers {
            let place = &mut ordered[usize::try_from(token).expect("a token of this call")];
            assert_eq!(place.replace(outcome), None, "a batch is answered once");
        }
    }
    ordered.into_iter().flatten().collect()
}

/// Appends batches one after the other, and expects success.
pub async fn append_each(store: &Store, batches: impl IntoIterator<Item = Batch>) {
    for batch in batches {
        assert_eq!(append(store, vec![batch]).await, [Ok(())]);
    }
}
