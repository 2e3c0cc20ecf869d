//! Integration tests of the store, in one binary.

mod conformance;
mod faulty;
mod sim;

use std::sync::Arc;

use im_proto::environment::{Spawn, Task};

/// Tasks of the runtime that the test runs in.
struct TestTasks;

impl Spawn for TestTasks {
    fn spawn(&self, task: Task) {
        tokio::spawn(task);
    }
}

fn tasks() -> Arc<dyn Spawn> {
    Arc::new(TestTasks)
}
