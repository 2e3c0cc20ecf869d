//! The suite on every backend.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use im_proto::ConversationId;
use im_storage::{
    AppendDone, AppendRequest, Batch, Directory as _, Embedded, EmbeddedOptions, FaultPlan, Faulty, Insistent, Memory,
    MessageLog as _, SimFaults, SimStore, StateWrite, Store, StoreError, Table, conformance,
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

/// What waits is taken as a whole and committed in groups of bounded size: what does not fit into one is for the next.
#[tokio::test]
async fn everybody_is_answered_however_many_groups_what_waits_makes() {
    let directory = tempfile::tempdir().expect("a directory");
    let options = EmbeddedOptions { group_bytes: 1024, ..EmbeddedOptions::default() };
    let store = Embedded::open(&directory.path().join("store"), options).expect("opens");
    let (answer, mut answers) = tokio::sync::mpsc::channel(200);
    let done: AppendDone = Arc::new(move |outcomes| {
        outcomes.into_iter().for_each(|outcome| answer.try_send(outcome).expect("room for all"))
    });
    let state = (0..200u64).map(|n| {
        let conversation = ConversationId::from_slice(&(u128::from(n) + 1).to_be_bytes()).expect("an id");
        let mut batch = conformance::batch(conversation, 1, 1..=1);
        batch.rows[0].body = Bytes::from(vec![7; 700]);
        store.submit(vec![AppendRequest { token: n, batch: Arc::new(batch) }], done.clone());
        let write = StateWrite {
            table: Table::Applied,
            partition: Bytes::copy_from_slice(&n.to_be_bytes()),
            key: Bytes::new(),
            value: Some(Bytes::from(vec![7; 300])),
            timestamp: 1,
        };
        store.write(vec![write])
    });
    for outcome in futures::future::join_all(state).await {
        outcome.expect("it is written");
    }
    let mut tokens = BTreeSet::new();
    while tokens.len() < 200 {
        let answer = tokio::time::timeout(Duration::from_secs(60), answers.recv()).await;
        let (token, outcome) = answer.expect("everybody is answered").expect("the store has it");
        outcome.expect("it is written");
        assert!(tokens.insert(token));
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
    unread_partition: None,
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
