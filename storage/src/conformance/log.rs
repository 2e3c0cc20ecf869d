//! The message log.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use im_proto::{ConversationId, Epoch, limits};
use tokio::sync::mpsc;

use super::{append, append_each, batch, conversation, row, stored};
use crate::{
    MessageLog, ROW_BYTES_MAX, Store, TAIL_ROWS_MAX,
    model::{AppendDone, AppendRequest, Batch, BucketId, RowKey, StoreError, StoredRow},
};

pub(super) async fn a_batch_reads_back_byte_for_byte(store: &Store) {
    let conversation = conversation(1, 0);
    let batches =
        vec![batch(conversation, 9, 1..=1), batch(conversation, 9, 2..=129), batch(conversation, 9, 130..=140)];
    let expected: Vec<_> = batches.iter().flat_map(stored).collect();
    append_each(store, batches).await;
    assert_eq!(store.read_range(conversation, 1, 140, 1_000).await, Ok(expected.clone()));
    let tail: Vec<_> = expected.into_iter().rev().collect();
    assert_eq!(store.read_tail(conversation, BucketId(0)).await, Ok(tail));
    let large = Batch {
        rows: vec![crate::Row { body: vec![7; 600_000].into(), ..row(1, 0) }],
        ..batch(super::conversation(1, 1), 1, 1..=1)
    };
    append_each(store, [large.clone()]).await;
    assert_eq!(store.read_range(large.conversation, 1, 1, 1).await, Ok(stored(&large)));
}

/// What stays of some batches, whatever order they arrive in.
fn winners(batches: &[Batch]) -> Vec<StoredRow> {
    let mut rows: Vec<_> = batches.iter().flat_map(stored).collect();
    rows.sort_by_key(|row| (row.row.seq, row.epoch));
    rows.reverse();
    rows.dedup_by_key(|row| row.row.seq);
    rows.reverse();
    rows
}

pub(super) async fn the_greater_epoch_wins_in_any_order_of_arrival(store: &Store) {
    // Re-writes that begin before, within and behind what they replace, and a late write of an early epoch.
    let shapes = [(5, 1, 10), (7, 4, 6), (6, 5, 12), (3, 1, 128), (9, 12, 12)];
    let mut orders = vec![vec![]];
    for shape in shapes {
        orders = orders
            .into_iter()
            .flat_map(|order: Vec<_>| {
                (0..=order.len()).map(move |at| {
                    let mut order = order.clone();
                    order.insert(at, shape);
                    order
                })
            })
            .collect();
    }
    assert_eq!(orders.len(), 120);
    for (number, order) in (0..).zip(orders) {
        let conversation = conversation(2, number);
        let batches: Vec<_> = order.iter().map(|&(epoch, from, to)| batch(conversation, epoch, from..=to)).collect();
        let expected = winners(&batches);
        append_each(store, batches).await;
        assert_eq!(store.read_range(conversation, 1, 128, 1_000).await.as_ref(), Ok(&expected), "order {order:?}");
        assert_eq!(store.read_range(conversation, 6, 11, 3).await.as_deref(), Ok(&expected[5..8]), "order {order:?}");
        let tail: Vec<_> = expected.into_iter().rev().collect();
        assert_eq!(store.read_tail(conversation, BucketId(0)).await, Ok(tail), "order {order:?}");
    }
}

pub(super) async fn a_repeated_batch_changes_nothing(store: &Store) {
    let conversation = conversation(3, 0);
    let batch = batch(conversation, 4, 1..=20);
    append_each(store, [batch.clone(), batch.clone()]).await;
    assert_eq!(append(store, vec![batch.clone(), batch.clone()]).await, [Ok(()), Ok(())]);
    assert_eq!(store.read_range(conversation, 1, u64::MAX, 1_000).await, Ok(stored(&batch)));
}

/// Rows `1..=to` under one epoch, in batches that keep the rules.
fn fill(conversation: ConversationId, epoch: u64, to: u64) -> Vec<Batch> {
    let (mut batches, mut from) = (Vec::new(), 1);
    while from <= to {
        // Batches of many sizes; each ends at the edge of its bucket at the latest.
        let last = (from + from * 31 % 128).min(BucketId::of(from).last_seq()).min(to);
        batches.push(batch(conversation, epoch, from..=last));
        from = last + 1;
    }
    batches
}

pub(super) async fn the_tail_is_limited_descending_and_of_one_bucket(store: &Store) {
    let conversation = conversation(4, 0);
    let batches = fill(conversation, 2, 1_500);
    let all: Vec<_> = batches.iter().flat_map(stored).rev().collect();
    append_each(store, batches).await;
    let bucket = |bucket: BucketId| -> Vec<_> {
        all.iter().filter(|row| BucketId::of(row.row.seq) == bucket).take(TAIL_ROWS_MAX).cloned().collect()
    };
    for number in 0..3 {
        assert_eq!(store.read_tail(conversation, BucketId(number)).await, Ok(bucket(BucketId(number))));
    }
    assert_eq!(store.read_tail(super::conversation(4, 1), BucketId(0)).await, Ok(vec![]));
    // A new owner writes the last committed rows again and goes on: still the newest 257, each in its newest version.
    let rewritten = [batch(conversation, 8, 1_400..=1_420), batch(conversation, 8, 1_421..=1_450)];
    let mut expected = all;
    for row in rewritten.iter().flat_map(stored) {
        let at = usize::try_from(1_500 - row.row.seq).expect("small");
        expected[at] = row;
    }
    append_each(store, rewritten).await;
    expected.truncate(TAIL_ROWS_MAX);
    assert_eq!(store.read_tail(conversation, BucketId(1)).await, Ok(expected));
}

pub(super) async fn ranges_cross_buckets_and_keep_their_bounds(store: &Store) {
    let conversation = conversation(5, 0);
    let batches = fill(conversation, 3, 2_100);
    let all: Vec<_> = batches.iter().flat_map(stored).collect();
    append_each(store, batches).await;
    let cases = [
        (1, 2_100, 10_000),
        (1_000, 1_100, 10_000),
        (1_024, 1_025, 10),
        (1_025, 1_025, 1),
        (7, 2_000, 640),
        (127, 129, 2),
        (2_050, u64::MAX, usize::MAX),
        (0, 3, 10),
        (2_101, 5_000, 10),
        (9, 8, 10),
        (u64::MAX, 0, usize::MAX),
        (5, 10, 0),
    ];
    for (from, to, limit) in cases {
        let inside = all.iter().filter(|row| (from..=to).contains(&row.row.seq));
        let expected: Vec<_> = inside.take(limit).cloned().collect();
        assert_eq!(store.read_range(conversation, from, to, limit).await, Ok(expected), "{from}..={to}, {limit}");
    }
    // The neighbours in the order of ids are other conversations.
    assert_eq!(store.read_range(super::conversation(5, 1), 0, u64::MAX, 10).await, Ok(vec![]));
}

pub(super) async fn keys_match_the_rows(store: &Store) {
    let conversation = conversation(6, 0);
    let batches = fill(conversation, 3, 1_300);
    let keys: Vec<_> = batches.iter().flat_map(stored).map(RowKey::from).collect();
    append_each(store, batches).await;
    assert_eq!(store.read_keys(conversation, 1, 1_300).await.as_ref(), Ok(&keys));
    assert_eq!(store.read_keys(conversation, 1_020, 1_030).await.as_deref(), Ok(&keys[1_019..1_030]));
    assert_eq!(store.read_keys(conversation, 5, 4).await, Ok(vec![]));
}

/// A tail read while batches are on their way shows each of them whole or not at all.
pub(super) async fn readers_see_batches_whole(store: &Store) {
    let conversation = conversation(7, 0);
    let (outcomes, mut received) = mpsc::channel(1 << 12);
    let done: AppendDone = Arc::new(move |answers| {
        let _ = outcomes.try_send(answers.len());
    });
    for first in (1..=201).step_by(10) {
        let batch = Arc::new(batch(conversation, 1, first..=first + 9));
        store.submit(vec![AppendRequest { token: first, batch }], done.clone());
        loop {
            let rows = store.read_tail(conversation, BucketId(0)).await.expect("readable");
            let counts = rows.chunk_by(|a, b| (a.row.seq - 1) / 10 == (b.row.seq - 1) / 10).map(<[_]>::len);
            assert_eq!(counts.filter(|count| *count != 10).count(), 0, "a batch was seen in part");
            match received.try_recv() {
                Ok(_) => break,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    }
}

pub(super) async fn invalid_batches_are_refused(store: &Store) {
    let conversation = conversation(8, 0);
    let valid = batch(conversation, 1, 1..=3);
    let with = |change: fn(&mut Batch)| {
        let mut batch = valid.clone();
        change(&mut batch);
        batch
    };
    let invalid = vec![
        with(|batch| batch.rows.clear()),
        with(|batch| batch.rows[0].seq = 0),
        with(|batch| batch.rows.swap(0, 1)),
        with(|batch| batch.rows[2].seq = 9),
        with(|batch| batch.rows[2].seq = u64::MAX),
        batch(conversation, 1, 1..=129),
        batch(conversation, 1, limits::BUCKET_ENTRIES..=limits::BUCKET_ENTRIES + 1),
        with(|batch| batch.rows.iter_mut().for_each(|row| row.body = Bytes::from(vec![0; 300_000]))),
        with(|batch| {
            batch.rows.truncate(1);
            batch.rows[0].body = Bytes::from(vec![0; ROW_BYTES_MAX]);
        }),
    ];
    for batch in invalid.clone() {
        let outcome = append(store, vec![batch]).await;
        assert!(matches!(outcome[..], [Err(StoreError::Invalid(_))]), "{outcome:?}");
    }
    // Beside valid ones only the invalid are refused.
    let mut mixed = invalid;
    mixed.insert(4, valid.clone());
    let outcomes = append(store, mixed).await;
    assert_eq!(outcomes.iter().positions_of_ok(), [4]);
    assert_eq!(store.read_range(conversation, 0, u64::MAX, 100).await, Ok(stored(&valid)));
    store.submit(vec![], Arc::new(|_| {}));
}

trait PositionsOfOk {
    fn positions_of_ok(self) -> Vec<usize>;
}

impl<'a, I: Iterator<Item = &'a Result<(), StoreError>>> PositionsOfOk for I {
    fn positions_of_ok(self) -> Vec<usize> {
        self.enumerate().filter(|(_, outcome)| outcome.is_ok()).map(|(at, _)| at).collect()
    }
}

pub(super) async fn a_thousand_concurrent_submits_are_each_answered_once(store: &Store) {
    let (outcomes, mut received) = mpsc::channel(1 << 12);
    // Four submitters, as a router has several workers.
    let submitters: Vec<AppendDone> = (0..4)
        .map(|_| {
            let outcomes = outcomes.clone();
            Arc::new(move |answers: Vec<(u64, Result<(), StoreError>)>| {
                for (token, outcome) in answers {
                    let _ = outcomes.try_send((token, outcome));
                }
            }) as AppendDone
        })
        .collect();
    drop(outcomes);
    let of = |token: u64| {
        let conversation = conversation(9, u8::try_from(token % 250).expect("a byte"));
        let first = token / 250 * 5 + 1;
        Batch { epoch: Epoch(6), ..batch(conversation, 6, first..=first + 4) }
    };
    for token in 0..1_000 {
        let request = AppendRequest { token, batch: Arc::new(of(token)) };
        store.submit(vec![request], submitters[usize::try_from(token % 4).expect("small")].clone());
    }
    drop(submitters);
    let mut answered = BTreeSet::new();
    while answered.len() < 1_000 {
        let (token, outcome) = received.recv().await.expect("every batch is answered");
        assert_eq!(outcome, Ok(()));
        assert!(answered.insert(token), "batch {token} was answered twice");
    }
    for token in 0..250 {
        let expected: Vec<_> = (0..4).flat_map(|n| stored(&of(token + 250 * n))).collect();
        let conversation = of(token).conversation;
        assert_eq!(store.read_range(conversation, 1, 20, 100).await, Ok(expected));
    }
}
