//! A damaged directory is refused with a word on what to do, and a torn tail is not damage.

use std::{fs, path::Path};

use im_storage::{Embedded, EmbeddedOptions, MessageLog as _, Store, StoreError, conformance};

use crate::files::copy_tree;

const COMMITS: u64 = 12;

/// A store with some commits in its journal; gives the lengths of the journal after each.
async fn filled(root: &Path) -> Vec<u64> {
    let store = Embedded::open(root, EmbeddedOptions::default()).expect("opens");
    let conversation = crate::child::conversation(1);
    let mut lengths = Vec::new();
    for n in 0..COMMITS {
        let batch = conformance::batch(conversation, 1, n * 5 + 1..=n * 5 + 5);
        conformance::append_each(&Store::from(store.clone()), [batch]).await;
        let journal = fs::read(root.join("fjall/0.jnl")).expect("a journal");
        lengths.push(journal.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1));
    }
    lengths
}

/// How many rows a directory has, in order and byte for byte.
async fn rows(root: &Path) -> Result<u64, StoreError> {
    let store = Embedded::open(root, EmbeddedOptions::default())?;
    let rows = store.read_range(crate::child::conversation(1), 1, u64::MAX, 1_000).await?;
    for (stored, seq) in rows.iter().zip(1..) {
        assert_eq!(stored.row, conformance::row(seq, 1));
    }
    Ok(rows.len() as u64)
}

fn change(root: &Path, name: &str, with: impl FnOnce(&mut Vec<u8>)) {
    let path = root.join(name);
    let mut bytes = fs::read(&path).expect("a file");
    with(&mut bytes);
    fs::write(path, bytes).expect("written");
}

#[tokio::test]
async fn a_torn_tail_is_cut_off_and_every_commit_before_it_stays() {
    let directory = tempfile::tempdir().expect("a directory");
    let original = directory.path().join("original");
    let lengths = filled(&original).await;
    let (before, end) = (lengths[lengths.len() - 2] as usize, lengths[lengths.len() - 1] as usize);
    let mut random = 1_u64;
    for case in 0..60 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let at = before + (random >> 33) as usize % (end - before);
        let copy = directory.path().join(format!("copy-{case}"));
        copy_tree(&original, &copy).expect("copied");
        change(&copy, "fjall/0.jnl", |journal| match case % 4 {
            0 => journal.truncate(at),
            1 => journal[at..end].fill(0),
            2 => journal[at..(at + 600).min(end)].fill((random >> 50) as u8 | 1),
            _ => journal[at] ^= 1 << (random >> 60 & 7),
        });
        let found = rows(&copy).await.unwrap_or_else(|error| panic!("case {case}, byte {at}: {error}"));
        // One bit of the last commit may sit in a byte that the checksum does not need.
        assert!([(COMMITS - 1) * 5, COMMITS * 5].contains(&found), "case {case}, byte {at}: {found} rows");
        assert_eq!(rows(&copy).await, Ok(found), "case {case}: opened twice");
        fs::remove_dir_all(copy).expect("removed");
    }
}

#[tokio::test]
async fn a_torn_tail_in_front_of_a_journal_that_was_only_begun_is_cut_off_too() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path().join("store");
    let lengths = filled(&root).await;
    // The last commit did not fit on the disk; the next journal was begun all the same, and nothing was written to it.
    change(&root, "fjall/0.jnl", |journal| journal.truncate(lengths[lengths.len() - 1] as usize - 7));
    fs::write(root.join("fjall/1.jnl"), vec![0; 1 << 20]).expect("written");
    let copy = directory.path().join("copy");
    copy_tree(&root, &copy).expect("copied");
    assert_eq!(rows(&root).await, Ok((COMMITS - 1) * 5));
    // As soon as it holds anything, what is broken before it was acknowledged.
    change(&copy, "fjall/1.jnl", |journal| journal[0] = 1);
    assert!(matches!(rows(&copy).await, Err(StoreError::Damaged(_))));
}

#[tokio::test]
async fn damage_in_front_of_intact_commits_is_refused_and_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let original = directory.path().join("original");
    let lengths = filled(&original).await;
    let end = lengths[lengths.len() - 2];
    for case in 0..40 {
        let at = (lengths[0] + case * 997 % (end - lengths[0])) as usize;
        let copy = directory.path().join(format!("copy-{case}"));
        copy_tree(&original, &copy).expect("copied");
        change(&copy, "fjall/0.jnl", |journal| journal[at] ^= 0x40);
        match rows(&copy).await {
            Err(StoreError::Damaged(what)) => assert!(what.contains("0.jnl") && what.contains("backup"), "{what}"),
            other => panic!("case {case}, byte {at}: {other:?}"),
        }
        fs::remove_dir_all(copy).expect("removed");
    }
}

/// Flips one bit of a seqno, which lies behind the tag and the number of items of a commit.
fn flip_seqno(root: &Path, commit_at: u64, bit: usize) {
    change(root, "fjall/0.jnl", |journal| journal[commit_at as usize + 5 + bit / 8] ^= 1 << (bit % 8));
}

#[tokio::test]
async fn a_damaged_seqno_between_intact_commits_is_refused_and_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path().join("store");
    let lengths = filled(&root).await;
    // Its commit is intact for its checksum; replayed under another seqno it would win or lose against others of the same row.
    let commit_at = lengths[COMMITS as usize / 2];
    for bit in 0..64 {
        flip_seqno(&root, commit_at, bit);
        match rows(&root).await {
            Err(StoreError::Damaged(what)) => assert!(what.contains("0.jnl") && what.contains("backup"), "{what}"),
            other => panic!("bit {bit}: {other:?}"),
        }
        flip_seqno(&root, commit_at, bit);
    }
    assert_eq!(rows(&root).await, Ok(COMMITS * 5), "nothing was cut off meanwhile");
}

#[tokio::test]
async fn a_damaged_seqno_of_the_first_or_last_commit_is_no_torn_tail_and_no_panic() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path().join("store");
    let lengths = filled(&root).await;
    let last_at = lengths[COMMITS as usize - 2];
    // A tear does not leave the checksum behind it intact, so this commit was acknowledged: it is not cut off.
    for bit in 32..64 {
        flip_seqno(&root, last_at, bit);
        assert!(matches!(rows(&root).await, Err(StoreError::Damaged(_))), "bit {bit}");
        flip_seqno(&root, last_at, bit);
    }
    let mut intact = Vec::new();
    change(&root, "fjall/0.jnl", |journal| {
        intact = journal[5..13].to_vec();
        journal[5..13].fill(0xff);
    });
    assert!(matches!(rows(&root).await, Err(StoreError::Damaged(_))));
    change(&root, "fjall/0.jnl", |journal| journal[5..13].copy_from_slice(&intact));
    assert_eq!(rows(&root).await, Ok(COMMITS * 5));
}

#[tokio::test]
async fn a_missing_file_is_refused_and_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let original = directory.path().join("original");
    filled(&original).await;
    for name in ["fjall/0.jnl", "fjall/version", "fjall/keyspaces/1/current", "fjall/keyspaces/0/current"] {
        let copy = directory.path().join("copy");
        copy_tree(&original, &copy).expect("copied");
        fs::remove_file(copy.join(name)).expect("removed");
        assert!(matches!(rows(&copy).await, Err(StoreError::Damaged(_))), "{name}");
        fs::remove_dir_all(copy).expect("removed");
    }
    for name in ["fjall/version", "fjall/keyspaces/1/current", "fjall/keyspaces/0/current"] {
        let copy = directory.path().join("copy");
        copy_tree(&original, &copy).expect("copied");
        change(&copy, name, |bytes| bytes.fill(0xff));
        let found = rows(&copy).await;
        assert!(matches!(found, Err(StoreError::Damaged(_))), "{name}: {found:?}");
        fs::remove_dir_all(copy).expect("removed");
    }
}

#[tokio::test]
async fn a_store_in_use_and_a_place_that_is_none_are_told_apart() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Embedded::open(directory.path(), EmbeddedOptions::default()).expect("opens");
    let second = Embedded::open(directory.path(), EmbeddedOptions::default());
    assert!(matches!(second, Err(StoreError::InUse(_))), "{second:?}");
    drop(store);
    Embedded::open(directory.path(), EmbeddedOptions::default()).expect("free again");
    let file = directory.path().join("file");
    fs::write(&file, "").expect("written");
    let found = Embedded::open(&file, EmbeddedOptions::default());
    assert!(matches!(found, Err(StoreError::Open(_))), "{found:?}");
    // A creation that was cut short is begun anew.
    let half = directory.path().join("half");
    fs::create_dir_all(half.join("fjall.new/keyspaces/1")).expect("created");
    fs::write(half.join("fjall.new/0.jnl"), "half").expect("written");
    Embedded::open(&half, EmbeddedOptions::default()).expect("opens");
}
