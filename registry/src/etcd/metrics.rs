//! The registry's metrics. Handles are looked up once.

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

/// Handles of all metrics of the etcd backend.
pub(super) struct Metrics {
    /// Seconds until an answer, of calls that got one.
    pub(super) call_seconds: Histogram,
    pub(super) call_failures: Counter,
    pub(super) endpoint_switches: Counter,
    pub(super) renewals: Counter,
    pub(super) renewal_failures: Counter,
    pub(super) leases_lost: Counter,
    pub(super) watch_restarts: Counter,
    pub(super) reconciles: Counter,
    /// Readings that found what the watch had not told.
    pub(super) reconcile_differences: Counter,
    /// 1 while the watch is up.
    pub(super) watching: Gauge,
    pub(super) instances: Gauge,
    pub(super) unreadable_keys: Gauge,
    pub(super) views_held_back: Counter,
    /// Instances that are gone from the registry and still in the view.
    pub(super) instances_held: Gauge,
    /// 1 while the registry must not be used as it is: `imd cluster recover` is needed.
    pub(super) refused: Gauge,
    pub(super) claims: Counter,
    pub(super) claims_taken: Counter,
    pub(super) registrations_repaired: Counter,
}

impl Metrics {
    pub(super) fn new() -> Self {
        Self {
            call_seconds: histogram!("im_registry_call_seconds"),
            call_failures: counter!("im_registry_call_failures_total"),
            endpoint_switches: counter!("im_registry_endpoint_switches_total"),
            renewals: counter!("im_registry_renewals_total"),
            renewal_failures: counter!("im_registry_renewal_failures_total"),
            leases_lost: counter!("im_registry_leases_lost_total"),
            watch_restarts: counter!("im_registry_watch_restarts_total"),
            reconciles: counter!("im_registry_reconciles_total"),
            reconcile_differences: counter!("im_registry_reconcile_differences_total"),
            watching: gauge!("im_registry_watching"),
            instances: gauge!("im_registry_instances"),
            unreadable_keys: gauge!("im_registry_unreadable_keys"),
            views_held_back: counter!("im_registry_views_held_back_total"),
            instances_held: gauge!("im_registry_instances_held"),
            refused: gauge!("im_registry_refused"),
            claims: counter!("im_registry_claims_total"),
            claims_taken: counter!("im_registry_claims_taken_total"),
            registrations_repaired: counter!("im_registry_registrations_repaired_total"),
        }
    }
}
