//! Going through all that there is.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{append_each, batch, conversation};
use crate::{
    Directory as _, Inventory as _, Store,
    model::{BucketId, Page, StateWrite, Table},
};

/// Runs after all other checks, whose rows are in the store as well.
pub(super) async fn everything_is_listed_once(store: &Store) {
    let mut buckets = BTreeSet::new();
    for number in 0..40 {
        let conversation = conversation(10, number);
        for bucket in 0..=u64::from(number % 3) {
            let first = BucketId(bucket).first_seq() + u64::from(number);
            append_each(store, [batch(conversation, 1, first..=first + 2)]).await;
            buckets.insert((conversation, BucketId(bucket)));
        }
    }
    let mut partitions = BTreeSet::new();
    for table in [Table::Heads, Table::Busy, Table::Devices] {
        for number in 0..30_u8 {
            let partition =
                Bytes::from(vec![0xff; usize::from(number % 5)].into_iter().chain([number]).collect::<Vec<_>>());
            let row = |key: &'static str| StateWrite {
                table,
                partition: partition.clone(),
                key: key.into(),
                value: Some("v".into()),
                timestamp: 1,
            };
            store.write(vec![row(""), row("k")]).await.expect("confirmed");
            partitions.insert((table, partition));
        }
    }
    for limit in [2, 7, 10_000] {
        let mut found = Vec::new();
        let mut from = None;
        let mut done = 0;
        loop {
            let Page { items, next, done_permille } = store.list_buckets(from, limit).await.expect("readable");
            assert!(items.len() <= limit && (done..=1_000).contains(&done_permille));
            found.extend(items);
            (from, done) = (next, done_permille);
            if from.is_none() {
                break;
            }
        }
        let set: BTreeSet<_> = found.iter().copied().collect();
        assert_eq!(set.len(), found.len(), "each once");
        assert!(set.is_superset(&buckets));
        assert!(set.contains(&(conversation(5, 0), BucketId(2))), "what other checks wrote");
        let mut found = Vec::new();
        loop {
            let Page { items, next, done_permille } = store.list_partitions(from, limit).await.expect("readable");
            assert!(items.len() <= limit && done_permille <= 1_000);
            found.extend(items);
            from = next;
            if from.is_none() {
                break;
            }
        }
        let set: BTreeSet<_> = found.iter().cloned().collect();
        assert_eq!(set.len(), found.len(), "each once");
        assert!(set.is_superset(&partitions));
        assert!(set.contains(&(Table::Cursors, "p".into())), "what other checks wrote");
    }
}
