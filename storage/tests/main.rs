//! Integration tests of the store, in one binary.

mod child;
mod conformance;
mod counters;
mod cql;
mod damage;
mod durability;
mod faulty;
mod files;
mod forged;
mod hot;
mod sim;
mod transfer;

use std::{sync::Arc, time::Duration};

use im_proto::{
    Timestamp,
    environment::{Clock, Environment, Random, Spawn, Task},
};

/// Tasks of the runtime that the test runs in.
struct TestTasks;

impl Spawn for TestTasks {
    #[allow(clippy::disallowed_methods, reason = "this is where tasks of the tests come from")]
    fn spawn(&self, task: Task) {
        drop(tokio::task::spawn(task));
    }
}

fn tasks() -> Arc<dyn Spawn> {
    Arc::new(TestTasks)
}

/// A clock that stands still, and numbers that count: nothing here depends on either.
struct TestSurroundings;

impl Clock for TestSurroundings {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1_700_000_000_000)
    }

    fn since_boot(&self) -> Duration {
        Duration::ZERO
    }
}

impl Random for TestSurroundings {
    fn next_u64(&self) -> u64 {
        4
    }
}

fn environment() -> Environment {
    Environment { clock: Arc::new(TestSurroundings), random: Arc::new(TestSurroundings), tasks: tasks() }
}
