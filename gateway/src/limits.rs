//! The limits of a gateway that are rates, with the counters that connections share.

use std::time::Duration;

use im_proto::{UserId, environment::Environment};
use tokio::time::Instant;

use crate::{
    addresses::Addresses,
    config::GatewayConfig,
    effort::Effort,
    rate::{Bucket, Rate},
    table::Table,
};

/// Users whose sends are counted at a time: 16 bytes each, 3 MB. One is forgotten when it has rested for a second.
const USERS_MAX: usize = 131_072;

/// All of them.
pub(crate) struct Limits {
    started: Instant,
    pub sends: Rate,
    pub frames: Rate,
    pub bytes: Rate,
    user_sends: Rate,
    users: Table<Bucket>,
    pub addresses: Addresses,
    pub effort: Effort,
}

impl Limits {
    pub fn new(environment: &Environment, config: &GatewayConfig) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            started: Instant::now(),
            sends: Rate::per_second(config.sends_per_second_max),
            frames: Rate::per_second(config.frames_per_second_max),
            bytes: Rate::per_second(u64::try_from(config.bytes_per_second_max).unwrap_or(u64::MAX)),
            user_sends: Rate::per_second(config.user_sends_per_second_max),
            users: Table::new(environment, USERS_MAX),
            addresses: Addresses::new(environment, config),
            effort: Effort::new(config.handshake_cpu_percent, cores),
        }
    }

    /// The time that counters are kept in.
    pub fn time(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.started)
    }

    /// Takes one send of a user, over all its sessions here; the time to wait if there is none left.
    pub fn take_user_send(&self, user: &UserId, now: Duration) -> Result<(), Duration> {
        if self.user_sends.is_unlimited() {
            return Ok(());
        }
        let taken = self.users.with(self.users.key(user), now, |sends| self.user_sends.take(sends, now));
        // Nobody is refused because others are many: each session has its own limit.
        taken.unwrap_or(Ok(()))
    }
}
