//! Fences, the generation and the state tables.

use bytes::Bytes;
use im_proto::InstanceId;

use crate::{
    Directory, MessageLog, STATE_KEY_BYTES_MAX, STATE_VALUE_BYTES_MAX, Store,
    model::{StateRow, StateWrite, StoreError, Table},
};

fn instance(name: &str) -> InstanceId {
    InstanceId::parse(name).expect("an instance id")
}

pub(super) async fn fences_stay(store: &Store) {
    let (first, second, third) = (instance("router-1/a"), instance("router-1/b"), instance("router-2"));
    for each in [&first, &second, &third] {
        assert!(!store.read_fence(each).await.expect("readable").fenced);
    }
    store.write_fences(&[]).await.expect("confirmed");
    store.write_fences(&[first.clone(), second.clone()]).await.expect("confirmed");
    store.write_fences(std::slice::from_ref(&first)).await.expect("confirmed");
    assert!(store.read_fence(&first).await.expect("readable").fenced);
    assert!(store.read_fence(&second).await.expect("readable").fenced);
    assert!(!store.read_fence(&third).await.expect("readable").fenced);
}

pub(super) async fn the_generation_only_rises(store: &Store) {
    let instances: Vec<_> = (0..20).map(|number| instance(&format!("generation-{number}"))).collect();
    let before = store.read_fence(&instances[0]).await.expect("readable").generation;
    for (raise, expected) in [(before + 3, before + 3), (before + 1, before + 3), (before + 4, before + 4)] {
        store.raise_generation(raise).await.expect("confirmed");
        for instance in &instances {
            assert_eq!(store.read_fence(instance).await.expect("readable").generation, expected);
        }
    }
}

fn write(
    table: Table,
    partition: &'static str,
    key: &'static str,
    value: Option<&'static str>,
    timestamp: u64,
) -> StateWrite {
    StateWrite { table, partition: partition.into(), key: key.into(), value: value.map(Bytes::from), timestamp }
}

pub(super) async fn the_greater_timestamp_wins_and_ties_are_settled(store: &Store) {
    let versions = [(Some("b"), 5), (Some("c"), 5), (None, 5), (Some("a"), 4), (Some(""), 6), (Some("z"), 3)];
    // Every pair in both orders, one by one and in one call.
    for (i, first) in versions.iter().enumerate() {
        for (j, second) in versions.iter().enumerate() {
            let version = |(value, timestamp): &(Option<&'static str>, u64)| (*timestamp, value.is_none(), *value);
            let winner = std::cmp::max_by_key(first, second, |v| version(v));
            for together in [false, true] {
                let key: Bytes = format!("{i}-{j}-{together}").into();
                let [one, two] = [first, second].map(|&(value, timestamp)| StateWrite {
                    key: key.clone(),
                    ..write(Table::Members, "ties", "", value, timestamp)
                });
                if together {
                    store.write(vec![one, two]).await.expect("confirmed");
                } else {
                    store.write(vec![one]).await.expect("confirmed");
                    store.write(vec![two]).await.expect("confirmed");
                }
                let expected =
                    winner.0.map(|value| StateRow { key: key.clone(), value: value.into(), timestamp: winner.1 });
                let read = store.read(Table::Members, b"ties", &key).await;
                assert_eq!(read, Ok(expected), "{first:?} then {second:?}");
            }
        }
    }
    // A deletion is remembered: what is older does not come back.
    store.write(vec![write(Table::Heads, "gone", "", None, 10)]).await.expect("confirmed");
    store.write(vec![write(Table::Heads, "gone", "", Some("late"), 9)]).await.expect("confirmed");
    assert_eq!(store.read(Table::Heads, b"gone", b"").await, Ok(None));
    store.write(vec![]).await.expect("confirmed");
}

pub(super) async fn scans_page_through_a_partition(store: &Store) {
    let rows: Vec<_> = (0..100_u64)
        .map(|number| StateWrite {
            table: Table::Cursors,
            partition: "p".into(),
            key: format!("{number:03}").into(),
            // Every tenth is deleted.
            value: (number % 10 != 3).then(|| format!("value {number}").into()),
            timestamp: number,
        })
        .collect();
    let mut writes = rows.clone();
    // Neighbours of every kind: another table, a longer and a shorter partition, a key that another one begins with.
    writes.push(write(Table::Origins, "p", "500", Some("other table"), 1));
    writes.push(write(Table::Cursors, "p0", "00", Some("other partition"), 1));
    writes.push(write(Table::Cursors, "", "p000", Some("other partition"), 1));
    writes.push(write(Table::Cursors, "p", "", Some("empty key"), 1));
    writes.push(write(Table::Cursors, "p", "005\0", Some("longer key"), 1));
    store.write(writes).await.expect("confirmed");
    let mut keys: Vec<Bytes> = rows.iter().filter(|row| row.value.is_some()).map(|row| row.key.clone()).collect();
    keys.extend([Bytes::new(), Bytes::from("005\0")]);
    keys.sort();
    for page in [1, 7, 1_000] {
        let (mut found, mut after) = (Vec::new(), None::<Bytes>);
        loop {
            let rows = store.scan(Table::Cursors, b"p", after.as_deref(), page).await.expect("readable");
            assert!(rows.len() <= page);
            let Some(last) = rows.last() else { break };
            after = Some(last.key.clone());
            found.extend(rows.into_iter().map(|row| row.key));
        }
        assert_eq!(found, keys, "pages of {page}");
    }
    let after_nothing = store.scan(Table::Cursors, b"p", Some(b"0041"), 1).await.expect("readable");
    assert_eq!(after_nothing[0].key, "005", "`after` need not exist");
    assert_eq!(after_nothing[0].value, "value 5");
    assert_eq!(store.scan(Table::Cursors, b"p", None, 0).await, Ok(vec![]));
    assert_eq!(store.scan(Table::Cursors, b"none", None, usize::MAX).await, Ok(vec![]));
}

pub(super) async fn oversized_rows_are_refused(store: &Store) {
    let row = write(Table::Devices, "sizes", "k", Some("v"), 1);
    let long = |bytes: usize| Bytes::from(vec![b'x'; bytes]);
    let too_large = [
        StateWrite { partition: long(STATE_KEY_BYTES_MAX + 1), ..row.clone() },
        StateWrite { key: long(STATE_KEY_BYTES_MAX + 1), ..row.clone() },
        StateWrite { value: Some(long(STATE_VALUE_BYTES_MAX + 1)), ..row.clone() },
    ];
    for write in too_large {
        let outcome = store.write(vec![row.clone(), write]).await;
        assert!(matches!(outcome, Err(StoreError::Invalid(_))), "{outcome:?}");
    }
    let largest = StateWrite {
        partition: long(STATE_KEY_BYTES_MAX),
        key: long(STATE_KEY_BYTES_MAX),
        value: Some(long(STATE_VALUE_BYTES_MAX)),
        ..row
    };
    store.write(vec![largest.clone()]).await.expect("confirmed");
    let read = store.read(largest.table, &largest.partition, &largest.key).await.expect("readable");
    assert_eq!(read.map(|row| row.value), largest.value);
}
