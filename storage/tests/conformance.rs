//! The suite on every backend.

use std::time::Duration;

use im_proto::ConversationId;
use im_storage::{
    Batch, Embedded, EmbeddedOptions, FaultPlan, Faulty, Insistent, Memory, SimFaults, SimStore, Store, StoreError,
    conformance,
};

#[tokio::test]
async fn memory_conforms() {
    conformance::all(&Store::from(Memory::new())).await;
}

#[tokio::test]
async fn embedded_conforms_also_after_it_was_opened_again() {
    let directory = tempfile::tempdir().expect("a directory");
    for blob_threshold_bytes in [None, Some(1024)] {
        let path = directory.path().join(format!("{blob_threshold_bytes:?}"));
        let options = EmbeddedOptions { blob_threshold_bytes, ..EmbeddedOptions::default() };
        let store = Embedded::open(&path, options.clone()).expect("opens");
        conformance::all(&Store::from(store.clone())).await;
        store.close();
        drop(store);
        let store = Embedded::open(&path, options).expect("opens again");
        conformance::again(&Store::from(store)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_simulated_store_conforms_when_nothing_goes_wrong() {
    let store = SimStore::new(1, SimFaults::none(), crate::tasks());
    conformance::all(&Store::from(store.handle("client"))).await;
}

#[tokio::test(start_paused = true)]
async fn the_simulated_store_conforms_when_deliveries_are_late_or_attempted_twice() {
    let faults = SimFaults { late_permille: 300, again_permille: 300, ..SimFaults::none() };
    let store = SimStore::new(2, faults, crate::tasks());
    conformance::all(&Store::from(store.handle("client"))).await;
}

#[tokio::test(start_paused = true)]
async fn a_faulty_store_conforms_when_it_is_only_slow() {
    let plan = FaultPlan { delay: Duration::ZERO..=Duration::from_millis(5), ..FaultPlan::none() };
    // Twice wrapped, as nothing forbids it. Delays reorder the writes of one submitter: the suite has one on its way at a time.
    let inner = Faulty::new(Memory::new().into(), 3, FaultPlan::none(), crate::tasks());
    let store = Faulty::new(inner.into(), 4, plan, crate::tasks());
    conformance::all(&Store::from(store)).await;
}

/// Fails, takes effect without saying so, and does not answer, until it is asked again.
const UNKNOWN: FaultPlan = FaultPlan {
    delay: Duration::ZERO..=Duration::from_millis(5),
    refused_permille: 150,
    unknown_permille: 250,
    dropped_permille: 50,
    refused_table: None,
    damaged_partition: None,
};

#[tokio::test(start_paused = true)]
async fn a_store_of_unknown_outcomes_conforms_to_whoever_repeats_unchanged() {
    for seed in 0..5 {
        let faulty = Faulty::new(Memory::new().into(), seed, UNKNOWN, crate::tasks());
        let store = Insistent::new(faulty.into(), Duration::from_secs(1), crate::tasks());
        conformance::all(&Store::from(store.clone())).await;
        conformance::again(&Store::from(store.clone())).await;
        assert!(store.repeats() > 1_000, "seed {seed}: only {} calls were repeated", store.repeats());
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_for_good_is_not_repeated() {
    let store = Insistent::new(Memory::new().into(), Duration::from_secs(1), crate::tasks());
    let gap = [1..=3, 9..=9].map(|seqs| conformance::batch(ConversationId::from_bytes([1; 16]), 1, seqs));
    let rows = gap.iter().flat_map(|batch| batch.rows.clone()).collect();
    let invalid = Batch { rows, ..gap[0].clone() };
    let outcome = conformance::append(&Store::from(store.clone()), vec![invalid]).await;
    assert!(matches!(outcome[..], [Err(StoreError::Invalid(_))]), "{outcome:?}");
    assert_eq!(store.repeats(), 0);
}
