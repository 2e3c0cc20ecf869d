//! The suite on every backend.

use std::time::Duration;

use im_storage::{Embedded, EmbeddedOptions, FaultPlan, Faulty, Memory, SimFaults, SimStore, Store, conformance};

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
