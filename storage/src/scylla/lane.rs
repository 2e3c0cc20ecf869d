//! Bounds: how many requests are under way, how many wait for a place, and how long all of it may take.
//!
//! Kinds of requests that must not hold each other up have lanes of their own; a fence read never waits behind reads of history.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use scylla::errors::ExecutionError;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};

use super::{
    failure,
    metrics::{ErrorKind, LaneMetrics, Metrics, Operation},
};
use crate::model::StoreError;

/// One bound.
pub(super) struct Lane {
    places: Semaphore,
    waiting: AtomicUsize,
    waiting_max: usize,
    timeout: Duration,
    lane_metrics: LaneMetrics,
    metrics: Arc<Metrics>,
}

impl Lane {
    pub(super) fn new(
        name: &'static str,
        places: usize,
        waiting_max: usize,
        timeout: Duration,
        metrics: Arc<Metrics>,
    ) -> Self {
        let places = Semaphore::new(places.min(Semaphore::MAX_PERMITS));
        Self {
            places,
            waiting: AtomicUsize::new(0),
            waiting_max,
            timeout,
            lane_metrics: LaneMetrics::new(name),
            metrics,
        }
    }

    /// Sends a request once there is a place for it. Whatever is not a success is `Unconfirmed`: also of a request that the server
    /// called invalid an earlier attempt may have been applied.
    pub(super) async fn run<T>(
        &self,
        operation: Operation,
        request: impl Future<Output = Result<T, ExecutionError>>,
    ) -> Result<T, StoreError> {
        let begun = Instant::now();
        let deadline = begun + self.timeout;
        let place = {
            let _waiting = self.wait()?;
            timeout_at(deadline, self.places.acquire()).await
        };
        let answer = match place {
            Ok(_place) => {
                let _in_flight = Counted::new(&self.lane_metrics.in_flight);
                timeout_at(deadline, request).await
            }
            Err(elapsed) => Err(elapsed),
        };
        self.metrics.answered(operation, begun.elapsed());
        let (kind, error) = match answer {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => failure::of(&error),
            Err(_) => (ErrorKind::Timeout, StoreError::Unconfirmed("no answer in time".into())),
        };
        self.metrics.failed(kind);
        tracing::debug!(operation = operation.label(), %error, "a request to the store failed");
        Err(error)
    }

    fn wait(&self) -> Result<Waiting<'_>, StoreError> {
        let waiting = Waiting { lane: self, _counted: Counted::new(&self.lane_metrics.waiting) };
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.waiting_max {
            self.metrics.failed(ErrorKind::QueueFull);
            return Err(StoreError::Unconfirmed("too many requests wait for the store; repeat later".into()));
        }
        Ok(waiting)
    }
}

/// A request without a place.
struct Waiting<'a> {
    lane: &'a Lane,
    _counted: Counted<'a>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.lane.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One more on a gauge, as long as this lives.
struct Counted<'a>(&'a metrics::Gauge);

impl<'a> Counted<'a> {
    fn new(gauge: &'a metrics::Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}
