//! The CQL store on real servers, whose addresses are in `IM_TEST_CQL`.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, UNIX_EPOCH},
};

use im_proto::Timestamp;
use im_storage::{FaultPlan, Faulty, Scylla, ScyllaOptions, Store, conformance, scylla::schema};
use scylla::client::{session::Session, session_builder::SessionBuilder};

/// A keyspace of one test, dropped by `finish`.
struct Keyspace {
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
        let replication_factor = u32::try_from(nodes.len()).expect("small").min(3);
        Self { options: ScyllaOptions { nodes, keyspace, replication_factor, ..ScyllaOptions::default() }, session }
    }

    async fn with_schema() -> Self {
        let keyspace = Self::new().await;
        schema::apply(&keyspace.options, Timestamp::from_millis(5)).await.expect("the schema is applied");
        keyspace
    }

    async fn store(&self) -> Scylla {
        Scylla::connect(self.options.clone(), crate::environment()).await.expect("connects")
    }

    async fn run(&self, statement: &str) {
        self.session.query_unpaged(statement.replace("{keyspace}", &self.options.keyspace), ()).await.expect(statement);
    }

    async fn finish(self) {
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
