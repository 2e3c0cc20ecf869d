//! What the embedded store counts.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};

/// Handles, registered once.
pub(super) struct Metrics {
    commits: Counter,
    rows: Counter,
    bytes: Counter,
    rows_per_commit: Histogram,
    /// Write and sync of one commit: the engine does both in one step.
    commit_seconds: Histogram,
    /// From being put in until the writer takes it, of the work that waited longest.
    queue_seconds: Histogram,
    /// 1 once the store has stopped.
    pub(super) stopped: Gauge,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let stopped = metrics::gauge!("im_storage_stopped");
        stopped.set(0.0);
        Self {
            commits: metrics::counter!("im_storage_commits_total"),
            rows: metrics::counter!("im_storage_committed_rows_total"),
            bytes: metrics::counter!("im_storage_committed_bytes_total"),
            rows_per_commit: metrics::histogram!("im_storage_commit_rows"),
            commit_seconds: metrics::histogram!("im_storage_commit_seconds"),
            queue_seconds: metrics::histogram!("im_storage_queue_seconds"),
            stopped,
        }
    }

    /// The writer took what waited.
    pub(super) fn taken(&self, waited: Duration) {
        self.queue_seconds.record(waited);
    }

    /// One commit was synced.
    pub(super) fn committed(&self, rows: usize, bytes: usize, took: Duration) {
        self.commits.increment(1);
        self.rows.increment(rows as u64);
        self.bytes.increment(bytes as u64);
        self.rows_per_commit.record(rows as f64);
        self.commit_seconds.record(took);
    }
}

/// What waits for the writer, in bytes.
pub(super) fn queue_bytes() -> Gauge {
    let gauge = metrics::gauge!("im_storage_queue_bytes");
    gauge.set(0.0);
    gauge
}
