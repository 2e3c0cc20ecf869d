//! The faulty wrapper does what its plan says.

use std::{sync::Arc, time::Duration};

use im_proto::ConversationId;
use im_storage::{AppendRequest, FaultPlan, Faulty, Memory, MessageLog as _, Store, StoreError, conformance::batch};
use tokio::{sync::mpsc, time::timeout};

const CONVERSATION: ConversationId = ConversationId::from_bytes([1; 16]);

async fn outcome_and_rows(plan: FaultPlan, seed: u64) -> (Option<Result<(), StoreError>>, usize) {
    let memory = Store::from(Memory::new());
    let store = Store::from(Faulty::new(memory.clone(), seed, plan, crate::tasks()));
    let (outcomes, mut received) = mpsc::channel(1 << 12);
    let request = AppendRequest { token: 7, batch: Arc::new(batch(CONVERSATION, 1, 1..=3)) };
    store.submit(vec![request], Arc::new(move |answers| outcomes.try_send(answers).expect("the test waits")));
    let answer = timeout(Duration::from_secs(60), received.recv()).await.ok().flatten();
    let outcome = answer.map(|answers| match &answers[..] {
        [(7, outcome)] => outcome.clone(),
        other => panic!("{other:?}"),
    });
    (outcome, memory.read_range(CONVERSATION, 1, 10, 10).await.expect("readable").len())
}

#[tokio::test(start_paused = true)]
async fn a_refused_write_has_no_effect() {
    let (outcome, rows) = outcome_and_rows(FaultPlan { refused_permille: 1000, ..FaultPlan::none() }, 1).await;
    assert!(matches!(outcome, Some(Err(StoreError::Unconfirmed(_)))));
    assert_eq!(rows, 0);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_write_has_its_effect_and_fails() {
    let plan =
        FaultPlan { unknown_permille: 1000, delay: Duration::ZERO..=Duration::from_secs(9), ..FaultPlan::none() };
    let (outcome, rows) = outcome_and_rows(plan, 2).await;
    assert!(matches!(outcome, Some(Err(StoreError::Unconfirmed(_)))));
    assert_eq!(rows, 3);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_write_is_never_answered_and_takes_effect_at_times() {
    let mut rows_seen = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let (outcome, rows) = outcome_and_rows(FaultPlan { dropped_permille: 1000, ..FaultPlan::none() }, seed).await;
        assert_eq!(outcome, None);
        rows_seen.insert(rows);
    }
    assert_eq!(rows_seen.into_iter().collect::<Vec<_>>(), [0, 3]);
}

#[tokio::test(start_paused = true)]
async fn reads_fail_and_hang_too() {
    let store = |plan| Store::from(Faulty::new(Memory::new().into(), 1, plan, crate::tasks()));
    let refusing = store(FaultPlan { refused_permille: 1000, ..FaultPlan::none() });
    assert!(matches!(refusing.read_range(CONVERSATION, 1, 2, 3).await, Err(StoreError::Unconfirmed(_))));
    let dropping = store(FaultPlan { dropped_permille: 1000, ..FaultPlan::none() });
    assert!(timeout(Duration::from_secs(60), dropping.read_range(CONVERSATION, 1, 2, 3)).await.is_err());
}
