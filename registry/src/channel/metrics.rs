//! Metrics of the balanced channels of a process. Handles are looked up once.

use metrics::{Counter, Gauge, counter, gauge};

pub(super) struct Metrics {
    pub(super) calls: Counter,
    pub(super) failures: Counter,
    pub(super) retries: Counter,
    /// Retries that were not made because of the budget.
    pub(super) retries_refused: Counter,
    pub(super) ejections: Counter,
    pub(super) members: Gauge,
}

impl Metrics {
    pub(super) fn new() -> Self {
        Self {
            calls: counter!("im_registry_channel_calls_total"),
            failures: counter!("im_registry_channel_failures_total"),
            retries: counter!("im_registry_channel_retries_total"),
            retries_refused: counter!("im_registry_channel_retries_refused_total"),
            ejections: counter!("im_registry_channel_ejections_total"),
            members: gauge!("im_registry_channel_members"),
        }
    }
}
