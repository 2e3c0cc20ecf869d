//! How much of the machine strangers may take: the work for connections that are not welcomed yet has a share of the cores, and what
//! is beyond it waits.
//!
//! Work is measured where it is done (a step of a TLS handshake, the first frames of a connection) and paid for with time: while
//! something is owed, listeners do not accept and handshakes do not go on, in the order in which they asked. So a flood of connects,
//! handshakes or garbage costs established users no more than that share, and what it cannot get stays in the kernel's queue, where
//! it costs nothing.

use std::{io, sync::Arc, time::Duration};

use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};
use tokio::time::{Instant, sleep_until};

use crate::spare::Spare;

/// What may be owed before anybody waits: a hundred TLS handshakes at once on one core.
const GRACE: Duration = Duration::from_millis(20);
/// What accepting a connection is taken to cost until it is measured.
const ACCEPT: Duration = Duration::from_micros(20);
/// What a step of a handshake is taken to cost until it is measured: a signature and a key exchange.
const STEP: Duration = Duration::from_micros(200);
/// A piece of work counts as at most this much: what took longer was not running all the time (another process had the core, or the
/// whole process was stopped).
const WORK_MAX: Duration = Duration::from_millis(5);
/// What measured work may put the payment off to, so that no flood keeps everybody else waiting longer than this.
const DEBT_MAX: Duration = Duration::from_secs(1);

/// The share of all handshakes.
#[derive(Clone)]
pub(crate) struct Effort {
    /// When everything is paid; `None` without a bound.
    paid_at: Option<Arc<Mutex<Instant>>>,
    /// Of one core, in percent.
    percent: u32,
}

impl Effort {
    /// So many percent of all these cores; 100 is no bound.
    pub fn new(percent: usize, cores: usize) -> Self {
        let paid_at = (percent < 100).then(|| Arc::new(Mutex::new(Instant::now())));
        let percent = u32::try_from(percent.saturating_mul(cores)).unwrap_or(u32::MAX).max(1);
        Self { paid_at, percent }
    }

    /// Does a piece of work that cannot wait, and pays for it.
    pub fn measure<T>(&self, work: impl FnOnce() -> T) -> T {
        let Some(paid_at) = &self.paid_at else { return work() };
        let began = Instant::now();
        let result = work();
        let now = Instant::now();
        let mut paid_at = paid_at.lock();
        // Turns that were given out stay beyond the bound.
        let latest = (*paid_at).max(now + DEBT_MAX);
        *paid_at = ((*paid_at).max(began) + self.price((now - began).min(WORK_MAX))).min(latest);
        result
    }

    /// Something is owed beyond the grace: strangers have to wait.
    pub fn is_exhausted(&self) -> bool {
        self.paid_at.as_ref().is_some_and(|paid_at| *paid_at.lock() > Instant::now() + GRACE)
    }

    /// The threads that can do as much.
    pub fn threads(&self) -> usize {
        usize::try_from(self.percent.div_ceil(100)).unwrap_or(1)
    }

    /// Waits until one more connection may be accepted.
    pub async fn accept(&self) {
        if let Some(turn) = self.reserve(ACCEPT) {
            sleep_until(turn).await;
        }
    }

    /// Waits for the turn of one step of a handshake that somebody else measures.
    pub async fn step(&self) {
        if let Some(turn) = self.reserve(STEP) {
            sleep_until(turn).await;
        }
        self.settle(STEP, Duration::ZERO);
    }

    /// Has one step of a handshake done at its turn, when a core has nothing else to do. It costs what it took of a core.
    pub async fn step_in<T: Send + 'static>(
        &self,
        spare: &Spare,
        step: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        if let Some(turn) = self.reserve(STEP) {
            sleep_until(turn).await;
        }
        let done = spare.run(move || {
            let began = core_time();
            (step(), core_time().saturating_sub(began))
        });
        let done = done.await;
        self.settle(STEP, done.as_ref().map_or(STEP, |(_, took)| (*took).min(WORK_MAX)));
        done.map(|(result, _)| result)
    }

    /// Books work; when its turn is, unless it is now.
    fn reserve(&self, expected: Duration) -> Option<Instant> {
        let now = Instant::now();
        let mut paid_at = self.paid_at.as_ref()?.lock();
        let turn = paid_at.checked_sub(GRACE).filter(|turn| *turn > now);
        *paid_at = (*paid_at).max(now) + self.price(expected);
        turn
    }

    /// What was booked cost something else.
    fn settle(&self, expected: Duration, actual: Duration) {
        let Some(paid_at) = &self.paid_at else { return };
        let mut paid_at = paid_at.lock();
        let paid = *paid_at + self.price(actual);
        *paid_at = paid.checked_sub(self.price(expected)).unwrap_or(paid);
    }

    /// The time in which the share yields so much work.
    fn price(&self, work: Duration) -> Duration {
        work.saturating_mul(100) / self.percent
    }
}

/// What this thread has used of a core.
fn core_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spare::PATIENCE;

    /// Work of this long, in paused time.
    async fn work(effort: &Effort, time: Duration) {
        effort.step().await;
        let began = Instant::now();
        tokio::time::advance(time).await;
        effort.settle(Duration::ZERO, began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn handshakes_get_their_share_of_the_cores_and_no_more() {
        let effort = Effort::new(25, 2);
        let began = Instant::now();
        for _ in 0..1000 {
            work(&effort, Duration::from_millis(1)).await;
        }
        let took = began.elapsed();
        let expected = Duration::from_secs(2);
        assert!(took >= expected - 2 * GRACE && took <= expected + GRACE, "a second of work takes two: {took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_few_handshakes_do_not_wait() {
        let effort = Effort::new(25, 2);
        let began = Instant::now();
        for _ in 0..5 {
            work(&effort, Duration::from_millis(1)).await;
        }
        assert_eq!(began.elapsed(), Duration::from_millis(5));
        assert!(!effort.is_exhausted());
    }

    #[tokio::test(start_paused = true)]
    async fn while_something_is_owed_nobody_is_accepted() {
        let effort = Effort::new(50, 1);
        effort.settle(Duration::ZERO, Duration::from_millis(100));
        assert!(effort.is_exhausted());
        let began = Instant::now();
        effort.accept().await;
        assert!(began.elapsed() >= Duration::from_millis(180), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn steps_that_did_not_wait_cost_what_was_measured() {
        let effort = Effort::new(25, 1);
        for _ in 0..1000 {
            effort.step().await;
        }
        assert!(!effort.is_exhausted());
    }

    #[tokio::test(start_paused = true)]
    async fn no_flood_and_no_pause_keeps_newcomers_waiting_for_long() {
        let effort = Effort::new(1, 1);
        for _ in 0..1000 {
            effort.measure(|| std::thread::sleep(Duration::ZERO));
            let took = Duration::from_secs(20);
            // A stop of the process in the middle of a piece of work.
            effort.settle(Duration::ZERO, took.min(WORK_MAX));
            let began = Instant::now();
            tokio::time::advance(Duration::from_millis(400)).await;
            effort.accept().await;
            assert!(began.elapsed() < DEBT_MAX + GRACE, "{:?}", began.elapsed());
        }
    }

    #[tokio::test]
    async fn a_step_elsewhere_costs_what_it_took_of_a_core() {
        let (spare, effort) = (Spare::start(0, PATIENCE, metrics::Counter::noop()), Effort::new(1, 1));
        let began = Instant::now();
        effort.step_in(&spare, || std::thread::sleep(Duration::from_millis(1))).await.expect("done");
        assert!(!effort.is_exhausted(), "asleep it takes nothing");
        let busy = || {
            let until = core_time() + Duration::from_millis(1);
            while core_time() < until {}
        };
        effort.step_in(&spare, busy).await.expect("done");
        // A hundredth of a core takes 100 ms for a millisecond.
        let paid_at = *effort.paid_at.as_ref().expect("bounded").lock();
        assert!(paid_at >= began + Duration::from_millis(100), "{:?}", paid_at - began);
    }

    #[test]
    fn there_are_threads_for_the_share() {
        let threads = |percent, cores| Effort::new(percent, cores).threads();
        assert_eq!([threads(25, 2), threads(1, 1), threads(25, 16), threads(100, 8)], [1, 1, 4, 8]);
    }

    #[tokio::test(start_paused = true)]
    async fn all_of_the_machine_is_no_bound() {
        let effort = Effort::new(100, 2);
        let began = Instant::now();
        effort.settle(Duration::ZERO, Duration::from_secs(100));
        effort.accept().await;
        effort.step().await;
        assert!(!effort.is_exhausted());
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
