//! Export and import: what arrives is what there was, also after being cut off, and nothing arrives from a damaged file.

use std::{
    fs,
    path::Path,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use im_proto::{ConversationId, InstanceId, environment::Random};
use im_storage::{
    BucketId, ClusterError, Directory as _, Embedded, EmbeddedOptions, FaultPlan, Faulty, Inventory as _, Memory,
    MessageLog as _, StateWrite, Store, StoredRow, Table, conformance,
    transfer::{ClusterFacts, Progress, Totals, TransferError, export, import, read_header, totals},
};
use tokio::sync::mpsc;

/// Numbers that differ from export to export, if one wants.
pub struct Dice(AtomicU64);

impl Random for Dice {
    fn next_u64(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

pub fn dice(number: u64) -> Dice {
    Dice(AtomicU64::new(number))
}

pub fn facts() -> ClusterFacts {
    ClusterFacts { cluster_id: "im-test".into(), issuer: "imd".into(), shards: 64, cluster_secret: [9; 32] }
}

fn conversation(number: u64) -> ConversationId {
    // Spread over the order of ids.
    let mut bytes = [0x5a; 16];
    bytes[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    ConversationId::from_bytes(bytes)
}

pub fn quiet(_: Progress<'_>) {}

/// Conversations of many shapes, and rows of all tables.
pub async fn fill(store: &Store, conversations: u64, longest: u64) {
    for number in 0..conversations {
        let id = conversation(number);
        // Some end at an edge of a bucket, some go over it.
        let head = [3, 1, 130, 1_024, 1_025, 2_500][usize::try_from(number % 6).expect("small")].min(longest);
        let mut batches = Vec::new();
        let mut first = 1;
        while first <= head {
            let last = (first + number % 127).min(BucketId::of(first).last_seq()).min(head);
            batches.push(conformance::batch(id, 7 + first / 500, first..=last));
            first = last + 1;
        }
        conformance::append_each(store, batches).await;
        let write = |table, key: &[u8], value: Option<&'static str>, timestamp| StateWrite {
            table,
            partition: id.to_bytes(),
            key: Bytes::copy_from_slice(key),
            value: value.map(Bytes::from),
            timestamp,
        };
        let mut writes: Vec<_> =
            Table::ALL[1..].iter().map(|table| write(*table, b"", Some("value"), number)).collect();
        writes.extend(
            (0..number * 7 % 600 * u64::from(number % 8 == 1))
                .map(|key| write(Table::Members, &key.to_be_bytes(), Some(""), key)),
        );
        writes.push(write(Table::Members, &3_u64.to_be_bytes(), None, 900));
        store.write(writes).await.expect("confirmed");
    }
    store.write_fences(&[InstanceId::parse("old").expect("an id")]).await.expect("confirmed");
}

async fn rows(store: &Store, id: ConversationId) -> Vec<StoredRow> {
    store.read_range(id, 1, 5_000, 5_000).await.expect("readable")
}

/// The rows without epoch and batch, which are about owners.
async fn history(store: &Store, id: ConversationId) -> Vec<im_storage::Row> {
    rows(store, id).await.into_iter().map(|stored| stored.row).collect()
}

async fn assert_same(one: &Store, other: &Store, conversations: u64) {
    for number in 0..conversations {
        let id = conversation(number);
        assert_eq!(history(one, id).await, history(other, id).await, "conversation {number}");
        for table in &Table::ALL[1..] {
            let scan = |store: &Store| {
                let store = store.clone();
                async move { store.scan(*table, id.as_bytes(), None, 10_000).await.expect("readable") }
            };
            assert_eq!(scan(one).await, scan(other).await, "{table} of conversation {number}");
        }
    }
    assert_eq!(totals(one, quiet).await.expect("readable"), totals(other, quiet).await.expect("readable"));
}

#[tokio::test]
async fn what_arrives_is_what_there_was() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    let memory = Store::from(Memory::new());
    fill(&memory, 60, 5_000).await;
    // As in the target afterwards.
    facts().row().expect("a row").found(&memory).await.expect("founded");
    let exported = export(&memory, &facts(), &path("one"), &dice(1), quiet).await.expect("exported");
    assert_eq!((exported.conversations, exported.entries > 40_000), (60, true));
    assert_eq!(read_header(&path("one")).expect("a header"), facts());
    assert_eq!(totals(&memory, quiet).await.expect("readable"), exported);
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path("one")).expect("a file").permissions());
    assert_eq!(mode & 0o777, 0o600, "there is a secret in it");

    let embedded = Embedded::open(&path("store"), EmbeddedOptions::default()).expect("opens");
    let store = Store::from(embedded.clone());
    let imported = import(&store, &path("one"), quiet).await.expect("imported");
    assert_eq!((imported.facts, imported.totals), (facts(), exported));
    assert_same(&memory, &store, 60).await;
    assert!(rows(&store, conversation(5)).await.iter().all(|row| row.epoch.0 == 1), "below every epoch");
    let old = InstanceId::parse("old").expect("an id");
    assert!(!store.read_fence(&old).await.expect("readable").fenced, "fences stay behind");
    assert_eq!(facts().row().expect("a row").check(&store).await, Ok(()), "the store belongs to the cluster");

    // Back again: the same order, so the very same bytes.
    export(&store, &facts(), &path("two"), &dice(1), quiet).await.expect("exported");
    assert!(fs::read(path("one")).expect("readable") == fs::read(path("two")).expect("readable"));
    embedded.close();
}

#[tokio::test]
async fn what_no_owner_committed_stays_behind() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("file");
    let memory = Store::from(Memory::new());
    let id = conversation(1);
    // Epoch 9 committed up to 1,026; a fenced owner of epoch 4 had assigned more, in the next bucket.
    conformance::append_each(
        &memory,
        [
            conformance::batch(id, 4, 1..=100),
            conformance::batch(id, 4, 1_020..=1_024),
            conformance::batch(id, 4, 1_025..=1_040),
            conformance::batch(id, 9, 1_023..=1_024),
            conformance::batch(id, 9, 1_025..=1_026),
        ],
    )
    .await;
    let missing = export(&memory, &facts(), &file, &dice(1), quiet).await.expect_err("there is a hole");
    assert!(missing.to_string().contains("entry 101 of"), "{missing}");
    let fill = (101..1_020).step_by(128).map(|first| conformance::batch(id, 4, first..=(first + 127).min(1_019)));
    conformance::append_each(&memory, fill).await;
    let exported = export(&memory, &facts(), &file, &dice(1), quiet).await.expect("exported");
    assert_eq!((exported.conversations, exported.entries), (1, 1_026));
    let target = Store::from(Memory::new());
    import(&target, &file, quiet).await.expect("imported");
    let mut expected = history(&memory, id).await;
    expected.truncate(1_026);
    assert_eq!(history(&target, id).await, expected);
}

#[tokio::test]
async fn an_export_that_was_cut_off_anywhere_goes_on() {
    let directory = tempfile::tempdir().expect("a directory");
    let (whole, file) = (directory.path().join("whole"), directory.path().join("file"));
    let partial = directory.path().join("file.partial");
    let store = Store::from(Memory::new());
    fill(&store, 140, 4).await;
    let exported = export(&store, &facts(), &whole, &dice(3), quiet).await.expect("exported");
    let bytes = fs::read(&whole).expect("readable");
    for part in [0, 5, 12, 13, 60, 1_000, 3_333, 5_000, 7_777, 9_000, 9_990, 9_999] {
        let length = if part < 100 { part } else { bytes.len() * part / 10_000 };
        fs::write(&partial, &bytes[..length]).expect("writable");
        let again = export(&store, &facts(), &file, &dice(3), quiet).await.expect("goes on");
        assert_eq!(again, exported);
        assert!(fs::read(&file).expect("readable") == bytes, "cut off after {length} bytes");
        assert!(!partial.exists());
        fs::remove_file(&file).expect("removable");
    }
    fs::write(&partial, &bytes[..bytes.len() / 2]).expect("writable");
    let other = ClusterFacts { cluster_id: "other".into(), ..facts() };
    let refused = export(&store, &other, &file, &dice(3), quiet).await;
    assert!(matches!(refused, Err(TransferError::OtherExport(_))), "{refused:?}");
    let refused = export(&store, &facts(), &whole, &dice(3), quiet).await;
    assert!(matches!(refused, Err(TransferError::Exists(_))), "{refused:?}");
}

/// Imports until the progress was told `times`, then ends it as a kill would.
async fn cut_off(store: &Store, file: &Path, times: u32) -> bool {
    let (told, mut heard) = mpsc::channel(1);
    let mut count = 0;
    let progress = |progress: Progress<'_>| {
        count += u32::from(progress.step != im_storage::transfer::Step::Checking);
        if count == times {
            let _ = told.try_send(());
        }
    };
    let importing = pin!(import(store, file, progress));
    tokio::select! {
        biased;
        _ = heard.recv() => true,
        done = importing => {
            done.expect("imported");
            false
        }
    }
}

#[tokio::test]
async fn an_import_that_was_cut_off_goes_on_and_lets_nobody_in_before() {
    let directory = tempfile::tempdir().expect("a directory");
    let (file, other) = (directory.path().join("file"), directory.path().join("other"));
    let source = Store::from(Memory::new());
    fill(&source, 400, 4).await;
    export(&source, &facts(), &file, &dice(1), quiet).await.expect("exported");
    export(&source, &facts(), &other, &dice(2), quiet).await.expect("exported");
    let row = facts().row().expect("a row");
    for founded in [false, true] {
        let plan = FaultPlan { refused_permille: 20, unknown_permille: 20, ..FaultPlan::none() };
        let inner = Store::from(Memory::new());
        if founded {
            row.found(&inner).await.expect("founded");
        }
        let store = Store::from(Faulty::new(inner.clone(), 1, plan, crate::tasks()));
        for times in 1..=2 {
            assert!(cut_off(&store, &file, times).await, "there is more than one window");
            assert_eq!(row.check(&inner).await, Err(ClusterError::Importing));
            let refused = import(&store, &other, quiet).await;
            assert!(matches!(refused, Err(TransferError::OtherImport)), "{refused:?}");
        }
        import(&store, &file, quiet).await.expect("goes on");
        assert_same(&source, &inner, 400).await;
        assert_eq!(row.check(&inner).await, Ok(()));
        // Once more changes nothing, also when the cluster has been in use since.
        conformance::append_each(&inner, [conformance::batch(conversation(0), 1 << 40, 4..=6)]).await;
        import(&store, &file, quiet).await.expect("is there already");
        assert_eq!(rows(&inner, conversation(0)).await.len(), 6);
        let refused = import(&store, &other, quiet).await;
        assert!(matches!(refused, Err(TransferError::NotEmpty)), "{refused:?}");
    }
}

#[tokio::test]
async fn nothing_is_imported_where_it_does_not_belong_or_from_a_damaged_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let (file, damaged) = (directory.path().join("file"), directory.path().join("damaged"));
    let source = Store::from(Memory::new());
    fill(&source, 6, 130).await;
    export(&source, &facts(), &file, &dice(1), quiet).await.expect("exported");
    let used = Store::from(Memory::new());
    fill(&used, 1, 4).await;
    assert!(matches!(import(&used, &file, quiet).await, Err(TransferError::NotEmpty)));
    let other = Store::from(Memory::new());
    let row = ClusterFacts { cluster_id: "other".into(), ..facts() }.row().expect("a row");
    row.found(&other).await.expect("founded");
    let refused = import(&other, &file, quiet).await;
    assert!(matches!(refused, Err(TransferError::Cluster(ClusterError::Id { .. }))), "{refused:?}");

    let bytes = fs::read(&file).expect("readable");
    let target = Store::from(Memory::new());
    for at in (0..bytes.len()).step_by(bytes.len() / 150).chain(0..60).chain(bytes.len() - 40..bytes.len()) {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        fs::write(&damaged, &changed).expect("writable");
        let refused = import(&target, &damaged, quiet).await;
        assert!(matches!(refused, Err(TransferError::Format { .. })), "byte {at}: {refused:?}");
        fs::write(&damaged, &bytes[..at]).expect("writable");
        let refused = import(&target, &damaged, quiet).await;
        assert!(matches!(refused, Err(TransferError::Format { .. })), "cut at {at}: {refused:?}");
    }
    fs::write(&damaged, [&bytes[..], b"x"].concat()).expect("writable");
    assert!(matches!(import(&target, &damaged, quiet).await, Err(TransferError::Format { .. })));
    assert!(target.list_buckets(None, 10).await.expect("readable").items.is_empty());
    assert!(target.list_partitions(None, 10).await.expect("readable").items.is_empty(), "nothing was touched");
    assert!(matches!(import(&target, &directory.path().join("none"), quiet).await, Err(TransferError::File { .. })));
}

#[tokio::test]
async fn an_empty_store_is_exported_too() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("file");
    let exported = export(&Store::from(Memory::new()), &facts(), &file, &dice(1), quiet).await.expect("exported");
    assert_eq!(exported, Totals::default());
    let target = Store::from(Memory::new());
    import(&target, &file, quiet).await.expect("imported");
    assert_eq!(facts().row().expect("a row").check(&target).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs CQL: run through deploy/test.sh"]
async fn data_moves_to_cql_and_back() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    let embedded = Embedded::open(&path("store"), EmbeddedOptions::default()).expect("opens");
    let source = Store::from(embedded.clone());
    fill(&source, 24, 5_000).await;
    let exported = export(&source, &facts(), &path("one"), &dice(1), quiet).await.expect("exported");
    let keyspace = crate::cql::Keyspace::with_schema().await;
    let cql = Store::from(keyspace.store().await);
    import(&cql, &path("one"), quiet).await.expect("imported");
    assert_same(&source, &cql, 24).await;
    // Another order of partitions, the same data.
    let again = export(&cql, &facts(), &path("two"), &dice(2), quiet).await.expect("exported");
    assert_eq!(again, exported);
    let memory = Store::from(Memory::new());
    import(&memory, &path("two"), quiet).await.expect("imported");
    assert_same(&source, &memory, 24).await;
    embedded.close();
    keyspace.finish().await;
}
