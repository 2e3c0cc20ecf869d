//! What was acknowledged is there: after SIGKILL, after the power failed, after a sync failed, on a full disk.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    child::{Acknowledged, Order, listen, verify},
    files::POWER_FAILED,
};

fn merge(into: &mut Acknowledged, from: Acknowledged) {
    for (conversation, seq) in from.seqs {
        let known = into.seqs.entry(conversation).or_default();
        *known = seq.max(*known);
    }
    into.state = from.state.max(into.state);
}

#[test]
fn everything_acknowledged_survives_sigkill_in_mid_flow() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut acknowledged = Acknowledged::default();
    let order = Order { root: directory.path().join("store"), batches: u64::MAX, ..Order::default() };
    for round in 0..6 {
        let order = Order { seed: round, ..order.clone() };
        // Killed after some acknowledgements, at whatever the process does then.
        let mut left = 5 + round * 60;
        let (seen, code) = listen(&mut order.start(), |child, _| {
            left = left.saturating_sub(1);
            if left == 0 {
                child.kill().expect("it runs");
            }
        });
        assert_eq!(code, None, "round {round}: killed, not ended");
        assert!(!seen.seqs.is_empty());
        merge(&mut acknowledged, seen);
        verify(&order.root, &acknowledged, false, &format!("round {round}"));
    }
}

/// Runs a store, from what the last run left, until the power fails, and checks what is left this time. Gives its place, and whether
/// the power did fail.
fn run(root: &Path, start: Option<PathBuf>, order: Order, acknowledged: &mut Acknowledged) -> (PathBuf, bool) {
    let seed = order.seed;
    let order = Order {
        root: root.join(format!("store-{seed}")),
        image: root.join(format!("image-{seed}")),
        layer: true,
        ..order
    };
    if let Some(start) = start {
        fs::rename(start, &order.root).expect("renamed");
    }
    let (seen, code) = listen(&mut order.start(), |_, _| {});
    assert_eq!(seen.stopped, None, "seed {seed}");
    merge(acknowledged, seen);
    let left = match code {
        Some(0) => order.root,
        Some(POWER_FAILED) => {
            fs::remove_dir_all(&order.root).expect("removed");
            order.image
        }
        other => panic!("seed {seed}: the child ended with {other:?}"),
    };
    verify(&left, acknowledged, order.large, &format!("seed {seed}"));
    (left, code == Some(POWER_FAILED))
}

#[test]
fn everything_acknowledged_survives_a_power_failure_that_drops_and_tears_what_was_not_synced() {
    let directory = tempfile::tempdir().expect("a directory");
    let (mut failures, mut acknowledged, mut start) = (0, Acknowledged::default(), None);
    for seed in 0..32 {
        // Early failures meet creation and recovery, late ones flushes and compactions.
        let power_fails_at = Some(1 + seed * 7_919 % 1_200);
        let order = Order { seed, batches: 300, power_fails_at, ..Order::default() };
        let (left, failed) = run(directory.path(), start.take(), order, &mut acknowledged);
        failures += u32::from(failed);
        // Every eighth begins anew, so that creation is met again.
        if seed % 8 == 7 {
            acknowledged = Acknowledged::default();
            fs::remove_dir_all(left).expect("removed");
        } else {
            start = Some(left);
        }
    }
    assert!(failures >= 16, "{failures} of 32 met the power failure");
}

#[test]
fn everything_acknowledged_survives_a_power_failure_around_a_rotated_journal() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut failures = 0;
    for seed in 100..103 {
        // fjall rotates its journal at 64 MB, which these runs pass at operations 500 to 700.
        let order = Order {
            seed,
            batches: 150,
            large: true,
            power_fails_at: Some(500 + seed * 7_919 % 250),
            ..Order::default()
        };
        let (left, failed) = run(directory.path(), None, order, &mut Acknowledged::default());
        fs::remove_dir_all(left).expect("removed");
        failures += u32::from(failed);
    }
    assert!(failures >= 1, "{failures} of 3 met the power failure");
}

#[test]
fn a_failing_sync_stops_the_store_and_loses_nothing_acknowledged() {
    for from in [1, 9, 20, 33, 60, 150] {
        let directory = tempfile::tempdir().expect("a directory");
        let order = Order {
            root: directory.path().join("store"),
            seed: from,
            batches: 2_000,
            layer: true,
            syncs_fail_from: Some(from),
            ..Order::default()
        };
        let (seen, code) = listen(&mut order.start(), |_, _| {});
        assert_eq!(code, Some(0), "sync {from}");
        assert!(seen.stopped.is_some(), "sync {from}: the store says that it stopped");
        if order.root.exists() {
            verify(&order.root, &seen, false, &format!("sync {from}"));
        }
    }
}

#[test]
fn a_full_disk_stops_the_store_and_loses_nothing_acknowledged() {
    for kilobytes in [1, 40, 700, 3_000] {
        let directory = tempfile::tempdir().expect("a directory");
        let order = Order {
            root: directory.path().join("store"),
            seed: kilobytes,
            batches: 100_000,
            layer: true,
            space_bytes: Some(kilobytes * 1_000 + 123),
            ..Order::default()
        };
        let (seen, code) = listen(&mut order.start(), |_, _| {});
        assert_eq!(code, Some(0), "{kilobytes} kB");
        let said = seen.stopped.clone().expect("the store says that it stopped");
        assert!(kilobytes < 100 || said.starts_with("stopped: "), "{said}");
        if order.root.exists() {
            verify(&order.root, &seen, false, &format!("{kilobytes} kB"));
        }
    }
}
