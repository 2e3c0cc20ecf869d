//! What waits for the writer thread: a queue bounded in bytes that never blocks who puts something in.

use std::time::Duration;

use ::metrics::Gauge;
use im_proto::InstanceId;
use parking_lot::{Condvar, Mutex};
use tokio::{sync::oneshot, time::Instant};

use super::metrics;
use crate::model::{AppendDone, AppendRequest, Row, StateWrite, StoreError};

/// Where the outcome of a write that is not an append goes.
pub(super) type Waiter = oneshot::Sender<Result<(), StoreError>>;

/// One thing to write.
pub(super) enum Work {
    Append { requests: Vec<AppendRequest>, done: AppendDone },
    State { writes: Vec<StateWrite>, waiter: Waiter },
    Fences { instances: Vec<InstanceId>, waiter: Waiter },
    Generation { generation: u64, waiter: Waiter },
}

impl Work {
    /// An estimate of what it holds.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Append { requests, .. } => {
                requests.iter().flat_map(|request| &request.batch.rows).map(Row::bytes).sum()
            }
            Self::State { writes, .. } => writes
                .iter()
                .map(|write| 64 + write.partition.len() + write.key.len() + write.value.as_ref().map_or(0, |v| v.len()))
                .sum(),
            Self::Fences { instances, .. } => 64 * instances.len(),
            Self::Generation { .. } => 64,
        }
    }

    /// Answers that it failed.
    pub(super) fn fail(self, error: &StoreError) {
        match self {
            Self::Append { requests, done } => {
                done(requests.into_iter().map(|request| (request.token, Err(error.clone()))).collect());
            }
            Self::State { waiter, .. } | Self::Fences { waiter, .. } | Self::Generation { waiter, .. } => {
                // A waiter that is gone does not want to know.
                let _ = waiter.send(Err(error.clone()));
            }
        }
    }
}

/// The queue.
pub(super) struct Queue {
    state: Mutex<State>,
    filled: Condvar,
    bytes_max: usize,
    depth: Gauge,
}

#[derive(Default)]
struct State {
    work: Vec<Work>,
    bytes: usize,
    /// When the first of the work was put in.
    since: Option<Instant>,
    /// Set for ever by close or by a failure; what is put in afterwards fails with it.
    closed: Option<StoreError>,
}

impl Queue {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { state: Mutex::default(), filled: Condvar::new(), bytes_max, depth: metrics::queue_bytes() }
    }

    /// Queues work, or answers at once that it failed: a full queue says `Unconfirmed`, and the caller repeats later.
    pub(super) fn put(&self, work: Work) {
        let bytes = work.bytes();
        let mut state = self.state.lock();
        let refusal = match &state.closed {
            Some(error) => error.clone(),
            None if !state.work.is_empty() && state.bytes.saturating_add(bytes) > self.bytes_max => {
                StoreError::Unconfirmed("the queue of writes is full; repeat later".into())
            }
            None => {
                state.bytes += bytes;
                state.since.get_or_insert_with(Instant::now);
                state.work.push(work);
                self.depth.set(state.bytes as f64);
                drop(state);
                self.filled.notify_one();
                return;
            }
        };
        drop(state);
        work.fail(&refusal);
    }

    /// Waits for work and swaps all of it into the empty `taken`; says how long the first of it has waited, and nothing when the queue
    /// is closed and drained.
    pub(super) fn take(&self, taken: &mut Vec<Work>) -> Option<Duration> {
        let mut state = self.state.lock();
        while state.work.is_empty() {
            if state.closed.is_some() {
                return None;
            }
            self.filled.wait(&mut state);
        }
        std::mem::swap(&mut state.work, taken);
        self.emptied(&mut state)
    }

    fn emptied(&self, state: &mut State) -> Option<Duration> {
        state.bytes = 0;
        self.depth.set(0.0);
        Some(state.since.take()?.elapsed())
    }

    /// Refuses further work. What waits already is still handed out.
    pub(super) fn close(&self, error: StoreError) {
        self.state.lock().closed.get_or_insert(error);
        self.filled.notify_all();
    }

    /// Refuses further work, and what waits already too.
    pub(super) fn abort(&self, error: &StoreError) {
        let mut state = self.state.lock();
        state.closed = Some(error.clone());
        let work = std::mem::take(&mut state.work);
        self.emptied(&mut state);
        drop(state);
        self.filled.notify_all();
        work.into_iter().for_each(|work| work.fail(error));
    }
}
