//! What a role takes from its surroundings: wall clock, randomness, a place for its tasks.
//!
//! Gateway, router and client get an [`Environment`] and use nothing else, so that the same code runs in a deterministic
//! simulation. Monotonic time is the runtime's own (`tokio::time`), which a simulation pauses.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use crate::timestamp::Timestamp;

/// A task without a result.
pub type Task = Pin<Box<dyn Future<Output = ()> + Send + 'static>>;

/// Time as seen by one process.
pub trait Clock: Send + Sync {
    /// The wall clock. May jump in both directions.
    fn now(&self) -> Timestamp;

    /// Time since some fixed moment that also passes while the machine sleeps (CLOCK_BOOTTIME). Leases are measured with it.
    fn since_boot(&self) -> Duration;
}

/// Randomness that need not be secret unless the implementation says so.
pub trait Random: Send + Sync {
    /// Uniformly distributed bits.
    fn next_u64(&self) -> u64;
}

/// Where tasks run. Every task belongs to one process of the system and ends with it.
pub trait Spawn: Send + Sync {
    /// Starts a task; it ends when it is done or when its process is shut down.
    fn spawn(&self, task: Task);
}

/// The surroundings of one process.
#[derive(Clone)]
pub struct Environment {
    pub clock: Arc<dyn Clock>,
    pub random: Arc<dyn Random>,
    pub tasks: Arc<dyn Spawn>,
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment").finish_non_exhaustive()
    }
}

impl Environment {
    /// Starts a task of this process.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(Box::pin(task));
    }

    /// A random duration in `0..=limit`, for jitter.
    pub fn jitter(&self, limit: Duration) -> Duration {
        let micros = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX).saturating_add(1).max(1);
        Duration::from_micros(self.random.next_u64() % micros)
    }
}
