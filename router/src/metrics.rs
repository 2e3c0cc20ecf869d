//! The router's metrics. Handles are looked up once.

use std::time::Duration;

use im_proto::method::Method;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

/// Handles of all metrics of this crate.
pub struct Metrics {
    pub sends_accepted: Counter,
    pub sends_refused: Counter,
    pub sends_repeated: Counter,
    pub entries_committed: Counter,
    pub batches_committed: Counter,
    pub batch_rows: Histogram,
    pub batches_retried: Counter,
    pub epochs_raised: Counter,
    pub opens: Counter,
    pub opens_failed: Counter,
    pub alarms: Counter,
    pub deliveries: Counter,
    pub deliveries_dropped: Counter,
    pub audience_pushes: Counter,
    pub subscriptions: Counter,
    pub sessions: Gauge,
    pub conversations_open: Gauge,
    pub shards_owned: Gauge,
    pub calls: Counter,
    pub calls_refused: Counter,
    /// By method, in the order of [`Method::ALL`].
    call_seconds: Vec<Histogram>,
    pub effects_sent: Counter,
    pub fence_reads: Counter,
    pub signals_passed: Counter,
    pub signals_dropped: Counter,
    pub sessions_moved: Counter,
    pub rate_limited: Counter,
    pub presence_words: Counter,
    pub presence_watches: Gauge,
    pub presence_pushes: Counter,
    pub presence_watches_refused: Counter,
    pub devices_written: Counter,
    pub devices_kicked: Counter,
    pub gateways_shedding: Gauge,
}

impl Metrics {
    pub fn new() -> Self {
        Self {
            sends_accepted: counter!("im_router_sends_accepted_total"),
            sends_refused: counter!("im_router_sends_refused_total"),
            sends_repeated: counter!("im_router_sends_repeated_total"),
            entries_committed: counter!("im_router_entries_committed_total"),
            batches_committed: counter!("im_router_batches_committed_total"),
            batch_rows: histogram!("im_router_batch_rows"),
            batches_retried: counter!("im_router_batches_retried_total"),
            epochs_raised: counter!("im_router_epochs_raised_total"),
            opens: counter!("im_router_opens_total"),
            opens_failed: counter!("im_router_opens_failed_total"),
            alarms: counter!("im_router_alarms_total"),
            deliveries: counter!("im_router_deliveries_total"),
            deliveries_dropped: counter!("im_router_deliveries_dropped_total"),
            audience_pushes: counter!("im_router_audience_pushes_total"),
            subscriptions: counter!("im_router_subscriptions_total"),
            sessions: gauge!("im_router_sessions"),
            conversations_open: gauge!("im_router_conversations_open"),
            shards_owned: gauge!("im_router_shards_owned"),
            calls: counter!("im_router_calls_total"),
            calls_refused: counter!("im_router_calls_refused_total"),
            call_seconds: Method::ALL
                .iter()
                .map(|method| histogram!("im_router_call_seconds", "method" => short_name(*method)))
                .collect(),
            effects_sent: counter!("im_router_effects_sent_total"),
            fence_reads: counter!("im_router_fence_reads_total"),
            signals_passed: counter!("im_router_signals_passed_total"),
            signals_dropped: counter!("im_router_signals_dropped_total"),
            rate_limited: counter!("im_router_rate_limited_total"),
            presence_words: counter!("im_router_presence_words_total"),
            presence_watches: gauge!("im_router_presence_watches"),
            presence_pushes: counter!("im_router_presence_pushes_total"),
            presence_watches_refused: counter!("im_router_presence_watches_refused_total"),
            devices_written: counter!("im_router_devices_written_total"),
            devices_kicked: counter!("im_router_devices_kicked_total"),
            sessions_moved: counter!("im_router_sessions_moved_total"),
            gateways_shedding: gauge!("im_router_gateways_shedding"),
        }
    }
}

impl Metrics {
    /// A call was answered.
    pub fn called(&self, method: Method, time: Duration) {
        let index = Method::ALL.iter().position(|known| *known == method);
        if let Some(histogram) = index.and_then(|index| self.call_seconds.get(index)) {
            histogram.record(time);
        }
    }
}

/// `MessageService.History`: without the package.
fn short_name(method: Method) -> &'static str {
    method.full_name().trim_start_matches("im.v1.")
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
