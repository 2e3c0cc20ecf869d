//! The surroundings of an ordinary process: the system's clock, its randomness, the current tokio runtime.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use im_proto::{
    Timestamp,
    environment::{Clock, Environment, Random, Spawn, Task},
};

/// An environment of the system this process runs on. Tasks are started on the tokio runtime that is current at that time.
pub fn system() -> Environment {
    Environment { clock: Arc::new(SystemClock), random: Arc::new(SystemRandom), tasks: Arc::new(SystemTasks) }
}

struct SystemClock;

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods, reason = "this is where the time comes from")]
    fn now(&self) -> Timestamp {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp::from_millis(i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX))
    }

    fn since_boot(&self) -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
    }
}

struct SystemRandom;

impl Random for SystemRandom {
    #[allow(clippy::disallowed_methods, reason = "this is where randomness comes from")]
    fn next_u64(&self) -> u64 {
        rand::random()
    }
}

struct SystemTasks;

impl Spawn for SystemTasks {
    #[allow(clippy::disallowed_methods, reason = "this is where tasks of an ordinary process go")]
    fn spawn(&self, task: Task) {
        tokio::spawn(task);
    }
}
