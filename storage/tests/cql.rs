//! The CQL store on real servers, whose addresses are in `IM_TEST_CQL`.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;
use im_proto::{ConversationId, Timestamp};
use im_storage::{
    BucketId, Directory as _, FaultPlan, Faulty, Insistent, MessageLog as _, Scylla, ScyllaOptions, StateWrite, Store,
    StoreError, TAIL_ROWS_MAX, Table, conformance,
    scylla::schema::{self, Warning},
};
use scylla::client::{session::Session, session_builder::SessionBuilder};

use crate::counters::Counters;

const CONVERSATION: ConversationId = ConversationId::from_bytes([7; 16]);

/// Copies of each row: `IM_TEST_CQL_REPLICATION`, or one on each node, at most three.
fn replication(nodes: usize) -> u32 {
    match std::env::var("IM_TEST_CQL_REPLICATION") {
        Ok(copies) => copies.parse().expect("IM_TEST_CQL_REPLICATION is a number"),
        Err(_) => u32::try_from(nodes).expect("small").min(3),
    }
}

/// A keyspace of one test, dropped by `finish`.
pub struct Keyspace {
    options: ScyllaOptions,
    session: Session,
}

impl Keyspace {
    async fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let addresses =
            std::env::var("IM_TEST_CQL").expect("IM_TEST_CQL names CQL servers: run through deploy/test.sh");
        let nodes: Vec<String> = addresses.split(',').map(str::to_owned).collect();
        let modified = std::fs::metadata("/proc/self").expect("a process").modified().expect("a time");
        let started = modified.duration_since(UNIX_EPOCH).expect("later").as_nanos();
        let keyspace = format!("t{}_{started}_{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let session = SessionBuilder::new().known_nodes(&nodes).build().await.expect("a CQL server answers");
        let replication_factor = replication(nodes.len());
        Self { options: ScyllaOptions { nodes, keyspace, replication_factor, ..ScyllaOptions::default() }, session }
    }

    pub async fn with_schema() -> Self {
        let keyspace = Self::new().await;
        schema::apply(&keyspace.options, Timestamp::from_millis(5)).await.expect("the schema is applied");
        keyspace
    }

    pub async fn store(&self) -> Scylla {
        Scylla::connect(self.options.clone(), crate::environment()).await.expect("connects")
    }

    async fn run(&self, statement: &str) {
        self.session.query_unpaged(statement.replace("{keyspace}", &self.options.keyspace), ()).await.expect(statement);
    }

    pub async fn finish(self) {
        self.run("DROP KEYSPACE {keyspace}").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs CQL: run through deploy/test.sh"]
async fn cql_conforms_also_after_a_new_connection() {
    let keyspace = Keyspace::with_schema().await;
    conformance::all(&Store::from(keyspace.store().await)).await;
    conformance::again(&Store::from(keyspace.store().await)).await;
    keyspace.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs CQL: run through deploy/test.sh"]
async fn cql_conforms_when_calls_are_slow() {
    let keyspace = Keyspace::with_schema().await;
    let plan = FaultPlan { delay: Duration::ZERO..=Duration::from_millis(5), ..FaultPlan::none() };
    let store = Faulty::new(keyspace.store().await.into(), 5, plan, crate::tasks());
    conformance::all(&Store::from(store)).await;
    keyspace.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs CQL: run through deploy/test.sh"]
async fn cql_conforms_when_outcomes_are_unknown_and_calls_are_repeated() {
    let keyspace = Keyspace::with_schema().await;
    // Reads and state writes that are never answered cost the patience each, one after the other: few of them.
    let plan = FaultPlan { refused_permille: 150, unknown_permille: 250, dropped_permille: 2, ..FaultPlan::none() };
    let real = Store::from(keyspace.store().await);
    let faulty = Faulty::new(real.clone(), 6, plan, crate::tasks());
    let store = Insistent::new(faulty.into(), Duration::from_secs(2), crate::tasks());
    conformance::all(&Store::from(store.clone())).await;
    assert!(store.repeats() > 500, "only {} calls were repeated", store.repeats());
    // What the suite wrote through it is what stands there.
    conformance::again(&real).await;
    keyspace.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs CQL: run through deploy/test.sh"]
async fn cql_lets_no_late_write_of_an_older_epoch_in() {
    let keyspace = Keyspace::with_schema().await;
    let store = Store::from(keyspace.store().await);
    // A fenced owner of epoch 3 assigned 5 to 9; its successor of epoch 9 wrote 5 and 6. Then the old writes surface.
    let (old, new) = (conformance::batch(CONVERSATION, 3, 5..=9), conformance::batch(CONVERSATION, 9, 5..=6));
    conformance::append_each(&store, [new.clone(), old.clone()]).await;
    let mut expected = conformance::stored(&new);
    expected.extend(conformance::stored(&old).split_off(2));
    assert_eq!(store.read_range(CONVERSATION, 5, 9, 10).await.as_ref(), Ok(&expected));
    // What is above the successor's head stays visible to tails until it is overwritten, with its epoch.
    expected.reverse();
    assert_eq!(store.read_tail(CONVERSATION, BucketId(0)).await, Ok(expected));
    conformance::append_each(&store, [conformance::batch(CONVERSATION, 9, 7..=12), old.clone()]).await;
    let tail = store.read_tail(CONVERSATION, BucketId(0)).await.expect("readable");
    assert!(tail.iter().all(|row| row.epoch.0 == 9) && tail.len() == 8, "{tail:?}");
    keyspace.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs CQL: run through deploy/test.sh"]
async fn cql_reads_the_largest_tail_and_the_largest_rows() {
    let keyspace = Keyspace::with_schema().await;
    let store = Store::from(keyspace.store().await);
    let mut batches = Vec::new();
    for first in (1..=264).step_by(4) {
        let mut batch = conformance::batch(CONVERSATION, 2, first..=first + 3);
        batch.rows.iter_mut().for_each(|row| row.body = Bytes::from(vec![b'b'; 64 * 1024]));
        batches.push(batch);
    }
    conformance::append_each(&store, batches).await;
    let tail = store.read_tail(CONVERSATION, BucketId(0)).await.expect("readable");
    assert_eq!(tail.len(), TAIL_ROWS_MAX);
    assert!(tail.iter().all(|row| row.row.body.len() == 64 * 1024));
    let rows = store.read_range(CONVERSATION, 1, 264, 1_000).await.expect("readable");
    assert_eq!(rows.iter().map(|row| row.row.seq).collect::<Vec<_>>(), (1..=264).collect::<Vec<_>>());
    keyspace.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs CQL: run through deploy/test.sh"]
async fn cql_answers_unconfirmed_whatever_the_server_says() {
    let keyspace = Keyspace::with_schema().await;
    let store = Store::from(keyspace.store().await);
    for table in ["messages", "state", "fences"] {
        keyspace.run(&format!("DROP TABLE {{keyspace}}.{table}")).await;
    }
    let outcome = conformance::append(&store, vec![conformance::batch(CONVERSATION, 1, 1..=3)]).await;
    assert!(matches!(outcome[..], [Err(StoreError::Unconfirmed(_))]), "{outcome:?}");
    let write = StateWrite {
        table: Table::Heads,
        partition: Bytes::new(),
        key: Bytes::new(),
        value: Some(Bytes::new()),
        timestamp: 1,
    };
    assert!(matches!(store.write(vec![write]).await, Err(StoreError::Unconfirmed(_))));
    assert!(matches!(store.raise_generation(3).await, Err(StoreError::Unconfirmed(_))));
    assert!(matches!(store.read_tail(CONVERSATION, BucketId(0)).await, Err(StoreError::Unconfirmed(_))));
    // What the store itself refuses was never sent.
    let too_late = conformance::batch(CONVERSATION, 1 << 63, 1..=3);
    let outcome = conformance::append(&store, vec![too_late]).await;
    assert!(matches!(outcome[..], [Err(StoreError::Invalid(_))]), "{outcome:?}");
    keyspace.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs CQL: run through deploy/test.sh"]
async fn the_schema_is_applied_once_and_completed_after_a_crash() {
    let keyspace = Keyspace::new().await;
    let options = &keyspace.options;
    let before = schema::status(options).await.expect("a status");
    assert_eq!((before.version(), &before.missing[..], &before.replication), (0, &[1][..], &None));
    let refused = Scylla::connect(options.clone(), crate::environment()).await.expect_err("there is no keyspace");
    assert!(matches!(&refused, StoreError::Open(advice) if advice.contains("imd schema apply")), "{refused}");

    // Somebody died after the first table of the first migration.
    keyspace
        .run("CREATE KEYSPACE {keyspace} WITH replication = {'class':'NetworkTopologyStrategy','datacenter1':1}")
        .await;
    keyspace
        .run(
            "CREATE TABLE {keyspace}.messages (conversation_id blob, bucket bigint, seq bigint, committed bigint, \
             counted bigint, sender text, client_message_id blob, sent_at timestamp, kind int, flags int, body blob, \
             meta blob, PRIMARY KEY ((conversation_id, bucket), seq))",
        )
        .await;
    let half = schema::status(options).await.expect("a status");
    assert_eq!((half.version(), &half.missing[..], half.applied.len()), (0, &[1][..], 0));
    let refused = Scylla::connect(options.clone(), crate::environment()).await.expect_err("half a schema is none");
    assert!(matches!(&refused, StoreError::Open(advice) if advice.contains("version 0")), "{refused}");

    let first = schema::apply(options, Timestamp::from_millis(5)).await.expect("completed");
    assert_eq!((&first.applied_now[..], first.status.version()), (&[1][..], schema::VERSION));
    let again = schema::apply(options, Timestamp::from_millis(9)).await.expect("applied again");
    assert!(again.applied_now.is_empty());
    assert_eq!(again.status.applied[0].applied_at, Timestamp::from_millis(5), "the first record stays");
    assert_eq!(again.status, schema::status(options).await.expect("a status"));
    let copies = again.status.replication.as_ref().and_then(|map| map.get("datacenter1").cloned());
    assert_eq!(copies.as_deref(), Some("1"), "an existing keyspace is left as it is");
    let few = |warning: &Warning| matches!(warning, Warning::FewCopies { copies: 1, .. });
    assert!(again.status.warnings.iter().any(few), "{:?}", again.status.warnings);
    let unknown = |warning: &Warning| matches!(warning, Warning::CommitLogUnknown { .. });
    assert!(!again.status.warnings.iter().any(unknown), "{:?}", again.status.warnings);
    conformance::all(&Store::from(keyspace.store().await)).await;
    keyspace.finish().await;
}

#[tokio::test]
#[ignore = "needs CQL: run through deploy/test.sh"]
async fn a_thousand_equal_reads_are_one_query_to_the_server() {
    let recorder = Counters::default();
    // One thread: handles are registered, and counted, here.
    let _recording = metrics::set_default_local_recorder(&recorder);
    let keyspace = Keyspace::with_schema().await;
    let store = Store::from(keyspace.store().await);
    let batch = conformance::batch(CONVERSATION, 1, 1..=100);
    conformance::append_each(&store, [batch.clone()]).await;
    let reads = (0..1_000).map(|_| store.read_range(CONVERSATION, 1, 100, 100));
    let expected = conformance::stored(&batch);
    for rows in futures::future::join_all(reads).await {
        assert_eq!(rows.as_ref(), Ok(&expected));
    }
    assert_eq!(recorder.get("im_storage_cql_requests_total/range"), 1);
    assert_eq!(recorder.get("im_storage_cql_coalesced_reads_total"), 999);
    // Tails change: the first reader has a query, all others share the next.
    let reads = (0..1_000).map(|_| store.read_tail(CONVERSATION, BucketId(0)));
    assert!(
        futures::future::join_all(reads).await.iter().all(|rows| rows.as_ref().is_ok_and(|rows| rows.len() == 100))
    );
    assert_eq!(recorder.get("im_storage_cql_requests_total/tail"), 2);
    // A fence is read as often as it is asked for.
    let instance = im_proto::InstanceId::parse("router").expect("an id");
    let reads = (0..50).map(|_| store.read_fence(&instance));
    assert!(futures::future::join_all(reads).await.iter().all(Result::is_ok));
    assert_eq!(recorder.get("im_storage_cql_requests_total/fence_read"), 50);
    keyspace.finish().await;
}
