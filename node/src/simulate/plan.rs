//! What a seed plans: how large the system is, how tight its bounds are, how much is sent and what goes wrong.

use std::time::Duration;

use super::chance::Dice;

/// A run's plan. Times are simulated.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub routers: u64,
    /// A router that joins and leaves in the middle.
    pub spare_router: bool,
    pub gateways: u64,
    pub users: u64,
    pub devices_max: u64,
    pub groups: u64,
    /// Somebody writes into a channel, and the others come and go as its readers.
    pub channel: bool,
    pub shards: u32,
    pub workers: usize,
    /// Sends of each device.
    pub sends: u64,
    /// The longest pause of a device between two sends.
    pub send_pause_ms: u64,
    /// One device sends this many to one conversation, so that it crosses the edge of a bucket.
    pub burst: u64,
    pub lease_ttl: Duration,
    pub dedupe_entries: usize,
    pub client_window: usize,
    pub event_queue: usize,
    /// Tight bounds on outboxes, link queues and replay buffers: pushes get lost.
    pub tight: bool,
    /// Bursts begin and end all the time, and what is written beside the log gets lost: few sends, long pauses.
    pub quiet: bool,
    /// The longest pause between two faults; none: nothing goes wrong.
    pub fault_pause_ms: Option<u64>,
    pub rough_store: bool,
    /// How long things go wrong after the last send: what is lost then, no later message brings to light.
    pub storm: Duration,
}

impl Plan {
    /// The plan of a seed.
    pub fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed, "plan");
        let calm = seed.is_multiple_of(16);
        let burst = if seed % 16 == 5 { dice.between(1_050, 1_400) } else { 0 };
        let quiet = matches!(seed % 16, 7 | 10 | 13);
        let plan = Self {
            seed,
            routers: dice.between(2, 3),
            spare_router: dice.percent(60),
            gateways: dice.between(1, 2),
            users: dice.between(3, 5),
            devices_max: dice.between(1, 2),
            groups: dice.between(1, 3),
            // Not drawn: other seeds plan what they always did.
            channel: matches!(seed % 16, 2 | 9 | 12),
            shards: u32::try_from(dice.between(4, 12)).unwrap_or(8),
            workers: if dice.percent(70) { 1 } else { 2 },
            sends: dice.between(20, 70),
            send_pause_ms: *dice.pick(&[20, 200, 800]),
            burst,
            lease_ttl: dice.millis(1_500, 3_000),
            dedupe_entries: *dice.pick(&[1, 8, 64, 1_024]),
            client_window: *dice.pick(&[4, 32, 256]),
            event_queue: *dice.pick(&[8, 64, 1_024]),
            tight: dice.percent(40),
            quiet,
            fault_pause_ms: (!calm).then(|| *dice.pick(&[1_000, 2_500, 5_000])),
            rough_store: dice.percent(60),
            storm: if dice.percent(50) { dice.millis(0, 12_000) } else { Duration::ZERO },
        };
        if !quiet {
            return plan;
        }
        Self { sends: dice.between(4, 12), send_pause_ms: 8_000, fault_pause_ms: Some(2_500), ..plan }
    }
}
