//! Files that are no export, or no longer the export that they were: `imd import` refuses them, whatever they hold.
//!
//! Changed anywhere, a file is refused and the store stays as it was. Changed by somebody who makes the checksums right again, it is
//! refused too, unless it still says the same.

use std::{fs, path::Path, sync::LazyLock};

use im_storage::{
    Inventory as _, Memory, Store,
    transfer::{Imported, Totals, TransferError, export, import, read_header, totals},
};
use proptest::{collection::vec, prelude::*, sample::Index};
use xxhash_rust::xxh3::Xxh3;

use crate::transfer::{dice, facts, fill, quiet};

const MAGIC: &[u8] = b"im-export 1\n";
const HEADER: u8 = 1;

/// Kind and payload.
type Frame = (u8, Vec<u8>);

fn now<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
}

/// A small export with frames of all kinds.
static EXPORTED: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("file");
    now(async {
        let store = Store::from(Memory::new());
        fill(&store, 3, 130).await;
        export(&store, &facts(), &file, &dice(1), quiet).await.expect("exported");
    });
    fs::read(file).expect("readable")
});

static TOTALS: LazyLock<Totals> = LazyLock::new(|| imported(&EXPORTED).1.expect("imported").totals);

fn frames(file: &[u8]) -> Vec<Frame> {
    let (mut rest, mut found) = (&file[MAGIC.len()..], Vec::new());
    while let [a, b, c, d, kind, behind @ ..] = rest {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        found.push((*kind, behind[..length].to_vec()));
        rest = &behind[length + 8..];
    }
    found
}

/// A file of these frames, with checksums that are right.
fn file_of(frames: &[Frame]) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    for (kind, payload) in frames {
        let mut hasher = Xxh3::new();
        hasher.update(&[*kind]);
        hasher.update(payload);
        file.extend(u32::try_from(payload.len()).expect("short").to_be_bytes());
        file.push(*kind);
        file.extend(payload);
        file.extend(hasher.digest().to_be_bytes());
    }
    file
}

/// Imports these bytes into an empty store.
fn imported(bytes: &[u8]) -> (Store, Result<Imported, TransferError>) {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("file");
    fs::write(&file, bytes).expect("writable");
    let store = Store::from(Memory::new());
    let outcome = now(import(&store, &file, quiet));
    look_at_header(&file);
    (store, outcome)
}

/// `imd import` shows it before it begins; any answer will do.
fn look_at_header(file: &Path) {
    let _ = read_header(file);
}

fn is_empty(store: &Store) -> bool {
    now(async {
        let logs = store.list_buckets(None, 1).await.expect("readable");
        logs.items.is_empty() && store.list_partitions(None, 1).await.expect("readable").items.is_empty()
    })
}

/// What may happen to the bytes of a file, or of a payload.
#[derive(Clone, Debug)]
enum Change {
    Flip(Index, u8),
    Cut(Index),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    Repeat(Index, usize),
    Swap(Index, Index),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let at = any::<Index>;
    let change = prop_oneof![
        4 => (at(), 1..=u8::MAX).prop_map(|(at, bits)| Change::Flip(at, bits)),
        1 => at().prop_map(Change::Cut),
        1 => (at(), vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        1 => (at(), 1..200_usize).prop_map(|(at, count)| Change::Remove(at, count)),
        1 => (at(), 1..200_usize).prop_map(|(at, count)| Change::Repeat(at, count)),
        1 => (at(), at()).prop_map(|(one, other)| Change::Swap(one, other)),
    ];
    vec(change, 1..4)
}

fn apply(change: &Change, bytes: &mut Vec<u8>) {
    let length = bytes.len();
    if length == 0 {
        return;
    }
    let place = |at: &Index| at.index(length);
    match change {
        Change::Flip(at, bits) => {
            let at = place(at);
            bytes[at] ^= bits;
        }
        Change::Cut(at) => bytes.truncate(place(at)),
        Change::Insert(at, more) => drop(bytes.splice(place(at)..place(at), more.iter().copied())),
        Change::Remove(at, count) => drop(bytes.drain(place(at)..(place(at) + count).min(length))),
        Change::Repeat(at, count) => {
            let again = bytes[place(at)..(place(at) + count).min(length)].to_vec();
            let at = place(at);
            drop(bytes.splice(at..at, again));
        }
        Change::Swap(one, other) => {
            let (one, other) = (place(one), place(other));
            bytes.swap(one, other);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_changed_export_is_refused_and_never_panics(changes in changes()) {
        let mut changed = EXPORTED.clone();
        changes.iter().for_each(|change| apply(change, &mut changed));
        prop_assume!(changed != *EXPORTED);
        let (store, outcome) = imported(&changed);
        prop_assert!(matches!(outcome, Err(TransferError::Format { .. })), "{:?}", outcome);
        prop_assert!(is_empty(&store), "the store was touched");
    }

    #[test]
    fn an_export_with_forged_checksums_is_refused_or_says_the_same(
        at in any::<Index>(),
        changes in changes(),
        kind in prop::option::of(0..8_u8),
        other in any::<Index>(),
        whole in 0..4_u8,
    ) {
        let mut forged = frames(&EXPORTED);
        let (at, other) = (at.index(forged.len()), other.index(forged.len()));
        let is_header = forged[at].0 == HEADER || forged[other].0 == HEADER;
        match whole {
            // Frames out of place, twice, or gone.
            0 => forged.swap(at, other),
            1 => forged.insert(other, forged[at].clone()),
            2 => drop(forged.remove(at)),
            _ => {
                changes.iter().for_each(|change| apply(change, &mut forged[at].1));
                forged[at].0 = kind.unwrap_or(forged[at].0);
            }
        }
        let (store, outcome) = imported(&file_of(&forged));
        // The facts of the header are what they are: there is nothing to hold them against.
        if !is_header && outcome.is_ok() {
            prop_assert_eq!(now(totals(&store, quiet)).expect("readable"), TOTALS.clone());
        }
    }

    #[test]
    fn garbage_is_no_export(kinds in vec((any::<u8>(), vec(any::<u8>(), 0..60)), 0..6), tail in vec(any::<u8>(), 0..40)) {
        let low = kinds.into_iter().map(|(kind, payload)| (kind % 7, payload)).collect::<Vec<_>>();
        for bytes in [tail.clone(), [MAGIC, &tail].concat(), [file_of(&low), tail].concat()] {
            let (store, outcome) = imported(&bytes);
            prop_assert!(matches!(outcome, Err(TransferError::Format { .. })), "{:?}", outcome);
            prop_assert!(is_empty(&store));
        }
    }
}
