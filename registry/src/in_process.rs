//! A registry in memory, for one process that holds all roles and for the simulation.
//!
//! [`InProcessRegistry`] is the shared core (what etcd is to a cluster): keys, a revision counter, leases with an expiry. Each role
//! or simulated process works through its own [`InProcessHandle`], which can be cut off from the core. Nothing is kept on disk:
//! whoever starts the core names a first revision that is greater than any used before.
//!
//! Leases expire by `tokio::time`, watched by a task of each process, so that a lease ends also when its own process is gone.

mod handle;
mod state;

use std::sync::Arc;

use im_proto::environment::Environment;
use parking_lot::Mutex;
use tokio::sync::watch;

pub use handle::{InProcessHandle, Reach};
use state::State;

/// The core that all handles share.
#[derive(Clone)]
pub struct InProcessRegistry {
    core: Arc<Core>,
}

struct Core {
    state: Mutex<State>,
    /// Changes with each lease that is granted: the processes watch the earliest expiry.
    grants: watch::Sender<u64>,
}

impl InProcessRegistry {
    /// An empty registry. Epochs are made of `generation` and of revisions above `first_revision`, which must be beyond every
    /// revision that was ever used with this generation and its store.
    pub fn new(generation: u64, first_revision: u64) -> Self {
        let state = Mutex::new(State::new(generation, first_revision));
        Self { core: Arc::new(Core { state, grants: watch::Sender::new(0) }) }
    }

    /// The registry as the process `name` sees it. Its keepalives run as tasks of `environment`.
    pub fn handle(&self, name: &str, environment: Environment) -> InProcessHandle {
        InProcessHandle::start(self.core.clone(), name, environment)
    }

    /// All claims and predecessor lists are gone and revisions begin again at `revision`, as in an etcd that was restored from an old
    /// snapshot. Nothing can be claimed until [`Self::recover`].
    pub fn lose(&self, revision: u64) {
        self.core.state.lock().lose(revision);
    }

    /// Begins a greater generation, after the message store was told of it: only processes whose handle is made from now on can
    /// claim.
    pub fn recover(&self, generation: u64) {
        self.core.state.lock().recover(generation);
    }

    /// The last revision that was given to a change.
    pub fn revision(&self) -> u64 {
        self.core.state.lock().revision()
    }
}
