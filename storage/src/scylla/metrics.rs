//! What the CQL store counts.

use metrics::{Counter, Gauge, Histogram};

macro_rules! labels {
    ($(#[doc = $doc:literal])* $name:ident { $($variant:ident = $label:literal,)* }) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum $name { $($variant,)* }

        impl $name {
            const ALL: &[Self] = &[$(Self::$variant,)*];

            /// As a label of a metric.
            pub(super) const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }
        }
    };
}

labels! {
    /// What is asked of the servers.
    Operation {
        Append = "append",
        Tail = "tail",
        Range = "range",
        Keys = "keys",
        FenceRead = "fence_read",
        FenceWrite = "fence_write",
        StateRead = "state_read",
        StateScan = "state_scan",
        StateWrite = "state_write",
        List = "list",
    }
}

labels! {
    /// Why a request failed.
    ErrorKind {
        Timeout = "timeout",
        QueueFull = "queue_full",
        Connection = "connection",
        Unavailable = "unavailable",
        Overloaded = "overloaded",
        ReadFailure = "read_failure",
        WriteFailure = "write_failure",
        Refused = "refused",
        Damaged = "damaged",
        Other = "other",
    }
}

/// Handles, registered once.
pub(super) struct Metrics {
    requests: Vec<Counter>,
    seconds: Vec<Histogram>,
    errors: Vec<Counter>,
    /// Reads that were answered by another one's query.
    pub(super) coalesced: Counter,
    /// Rows of the log that were confirmed.
    pub(super) rows: Counter,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let operations = || Operation::ALL.iter().map(|operation| operation.label());
        Self {
            requests: operations()
                .map(|label| metrics::counter!("im_storage_cql_requests_total", "operation" => label))
                .collect(),
            seconds: operations()
                .map(|label| metrics::histogram!("im_storage_cql_request_seconds", "operation" => label))
                .collect(),
            errors: ErrorKind::ALL
                .iter()
                .map(|kind| metrics::counter!("im_storage_cql_errors_total", "kind" => kind.label()))
                .collect(),
            coalesced: metrics::counter!("im_storage_cql_coalesced_reads_total"),
            rows: metrics::counter!("im_storage_cql_committed_rows_total"),
        }
    }

    /// A request was answered, well or not.
    pub(super) fn answered(&self, operation: Operation, took: std::time::Duration) {
        self.requests[operation as usize].increment(1);
        self.seconds[operation as usize].record(took);
    }

    /// A request failed.
    pub(super) fn failed(&self, kind: ErrorKind) {
        self.errors[kind as usize].increment(1);
    }
}

/// Who waits for a place, and who has one.
#[derive(Clone)]
pub(super) struct LaneMetrics {
    pub(super) waiting: Gauge,
    pub(super) in_flight: Gauge,
}

impl LaneMetrics {
    pub(super) fn new(lane: &'static str) -> Self {
        let waiting = metrics::gauge!("im_storage_cql_waiting", "lane" => lane);
        let in_flight = metrics::gauge!("im_storage_cql_in_flight", "lane" => lane);
        waiting.set(0.0);
        in_flight.set(0.0);
        Self { waiting, in_flight }
    }
}
