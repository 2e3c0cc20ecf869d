//! How much of the machine strangers may take: the work for connections that are not welcomed yet has a share of the cores, and what
//! is beyond it waits.
//!
//! Work is measured where it is done (a step of a TLS handshake, the first frames of a connection) and paid for with time: while
//! something is owed, listeners do not accept and handshakes do not go on, in the order in which they asked. So a flood of connects,
//! handshakes or garbage costs established users no more than that share, and what it cannot get stays in the kernel's queue, where
//! it costs nothing.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::{Instant, Sleep, sleep_until};

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

    /// Runs a handshake step by step, each at its turn.
    pub fn pace<F: Future>(&self, handshake: F) -> Paced<F> {
        Paced { effort: self.clone(), turn: None, handshake: Box::pin(handshake) }
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

/// A handshake that takes its turns.
pub(crate) struct Paced<F> {
    effort: Effort,
    turn: Option<Pin<Box<Sleep>>>,
    handshake: Pin<Box<F>>,
}

impl<F: Future> Future for Paced<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        if this.effort.paid_at.is_none() {
            return this.handshake.as_mut().poll(cx);
        }
        if this.turn.is_none()
            && let Some(turn) = this.effort.reserve(STEP)
        {
            this.turn = Some(Box::pin(sleep_until(turn)));
        }
        if let Some(turn) = &mut this.turn {
            ready!(turn.as_mut().poll(cx));
            this.turn = None;
        }
        let began = Instant::now();
        let polled = this.handshake.as_mut().poll(cx);
        this.effort.settle(STEP, began.elapsed().min(WORK_MAX));
        polled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Work of this long, in paused time.
    async fn work(effort: &Effort, time: Duration) {
        effort.pace(std::future::ready(())).await;
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
