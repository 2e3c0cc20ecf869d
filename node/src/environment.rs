//! The surroundings of a real process: the machine's clocks, the operating system's randomness, tasks on the tokio runtime.
//!
//! Everything else of the server gets its time, randomness and tasks from here, so that a simulation can replace them.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use im_proto::{
    Timestamp,
    environment::{Clock, Environment, Random, Spawn, Task},
};
use pin_project_lite::pin_project;
use rustix::time::{ClockId, clock_gettime};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::TaskTracker,
};

/// The tasks of this process. All end with [`Tasks::stop`].
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    cancel: CancellationToken,
}

impl Tasks {
    /// The environment whose tasks these are.
    pub fn environment(&self) -> Environment {
        Environment { clock: Arc::new(SystemClock), random: Arc::new(SystemRandom), tasks: Arc::new(self.clone()) }
    }

    /// Cancels every task at its next await and waits until all are gone.
    pub async fn stop(&self) {
        self.tracker.close();
        self.cancel.cancel();
        self.tracker.wait().await;
    }
}

impl Spawn for Tasks {
    fn spawn(&self, task: Task) {
        self.tracker.spawn(UntilCancelled { cancelled: self.cancel.clone().cancelled_owned(), task });
    }
}

pin_project! {
    /// A task that ends early when it is cancelled. What an `async` block makes of the same takes 128 bytes more, for each connection.
    struct UntilCancelled {
        #[pin]
        cancelled: WaitForCancellationFutureOwned,
        task: Task,
    }
}

impl Future for UntilCancelled {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        // The task first: it may have ended, or see the same and end in order.
        match this.task.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(()),
            Poll::Pending => this.cancelled.poll(cx),
        }
    }
}

struct SystemClock;

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods, reason = "this is where time comes from")]
    fn now(&self) -> Timestamp {
        // A clock before 1970 reads as 1970: order never depends on it.
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Timestamp::from_millis(i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX))
    }

    fn since_boot(&self) -> Duration {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        const CLOCK: ClockId = ClockId::Boottime;
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        const CLOCK: ClockId = ClockId::Monotonic;
        let time = clock_gettime(CLOCK);
        Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
    }
}

struct SystemRandom;

impl Random for SystemRandom {
    #[allow(clippy::disallowed_methods, reason = "this is where randomness comes from")]
    fn next_u64(&self) -> u64 {
        // A generator for each thread, seeded by the operating system and fit for secrets.
        rand::random()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stop_ends_tasks_that_never_end_by_themselves() {
        let tasks = Tasks::default();
        let (alive, gone) = tokio::sync::oneshot::channel::<()>();
        tasks.environment().spawn(async move {
            let _alive = alive;
            std::future::pending::<()>().await;
        });
        tasks.stop().await;
        assert!(gone.await.is_err());
    }

    #[test]
    fn time_since_boot_does_not_run_backwards() {
        let clock = SystemClock;
        let first = clock.since_boot();
        assert!(first > Duration::ZERO && clock.since_boot() >= first);
    }
}
