//! The one timer of a connection. It is not moved by traffic: when it fires, the time of the last frame tells what is due.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// Deadlines and heartbeat.
pub(crate) struct Timer {
    sleep: Pin<Box<Sleep>>,
    last_received: Instant,
    asked: bool,
}

impl Timer {
    pub fn start(at: Instant) -> Self {
        Self { sleep: Box::pin(sleep_until(at)), last_received: Instant::now(), asked: false }
    }

    pub fn arm(&mut self, at: Instant) {
        self.sleep.as_mut().reset(at);
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.sleep.as_mut().poll(cx)
    }

    /// The peer lives.
    pub fn received(&mut self, now: Instant) {
        self.last_received = now;
        self.asked = false;
    }

    /// Nothing at all came for two and a half intervals.
    pub fn is_dead(&self, now: Instant, interval: Duration) -> bool {
        now >= self.last_received + dead_after(interval)
    }

    /// Nothing came for long enough, and the peer was not asked since.
    pub fn must_ask(&mut self, now: Instant, interval: Duration) -> bool {
        if self.asked || now < self.last_received + ask_after(interval) {
            return false;
        }
        self.asked = true;
        true
    }

    /// When to look again.
    pub fn next_heartbeat(&self, interval: Duration) -> Instant {
        self.last_received + if self.asked { dead_after(interval) } else { ask_after(interval) }
    }
}

/// A client's own heartbeat is due after an interval. Who asks at the same moment asks half of the time before it: that doubles what goes
/// over the network, and wakes a phone for nothing.
fn ask_after(interval: Duration) -> Duration {
    interval * 3 / 2
}

fn dead_after(interval: Duration) -> Duration {
    interval * 5 / 2
}
