//! Integration tests of the store, in one binary.

mod child;
mod conformance;
mod damage;
mod durability;
mod faulty;
mod files;
mod sim;

use std::sync::Arc;

use im_proto::environment::{Spawn, Task};

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
