//! Whether an instance gets calls: ejection after failures in a row, for longer each time, and a single call to try it again.
//!
//! Pure: time and jitter come in as arguments.

use std::time::Duration;

use tokio::time::Instant;

/// When instances are ejected.
#[derive(Clone, Copy, Debug)]
pub struct Ejection {
    /// Failures in a row. An instance that cannot even be connected to is ejected at once.
    pub failures: u32,
    /// How long the first time; twice as long each time after, until a call succeeds.
    pub first: Duration,
    pub longest: Duration,
}

impl Default for Ejection {
    /// Three failures rule out a single bad call; 1 s to 30 s is the time of a restart.
    fn default() -> Self {
        Self { failures: 3, first: Duration::from_secs(1), longest: Duration::from_secs(30) }
    }
}

/// What became of a call, as far as it tells something about the instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Answered,
    /// No answer, or "unavailable" as the word of the instance about itself.
    Failed,
    /// There was nobody to send to.
    NotConnected,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Health {
    failures_in_a_row: u32,
    ejections_in_a_row: u32,
    ejected_until: Option<Instant>,
}

impl Health {
    /// Whether it gets calls now. After an ejection it gets one at a time until one succeeds.
    pub(super) fn takes_calls(&self, now: Instant, in_flight: usize) -> bool {
        match self.ejected_until {
            None => true,
            Some(until) => until <= now && in_flight == 0,
        }
    }

    /// `true` if the instance is ejected by this.
    pub(super) fn note(&mut self, outcome: Outcome, now: Instant, rules: &Ejection, jitter: Duration) -> bool {
        match outcome {
            Outcome::Answered => {
                // An answer to a call that began before the ejection is no news.
                if self.ejected_until.is_none_or(|until| until <= now) {
                    *self = Self::default();
                }
                return false;
            }
            Outcome::Failed => self.failures_in_a_row = self.failures_in_a_row.saturating_add(1),
            Outcome::NotConnected => self.failures_in_a_row = rules.failures.max(1),
        }
        let ejected = self.ejected_until.is_some_and(|until| until > now);
        let on_trial = self.ejected_until.is_some() && !ejected;
        if ejected || (self.failures_in_a_row < rules.failures && !on_trial) {
            return false;
        }
        let pause = rules.first.saturating_mul(1 << self.ejections_in_a_row.min(16)).min(rules.longest);
        self.ejections_in_a_row += 1;
        self.ejected_until = Some(now + pause + jitter.min(pause / 4));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Ejection = Ejection { failures: 3, first: Duration::from_secs(1), longest: Duration::from_secs(4) };

    fn note(health: &mut Health, outcome: Outcome, now: Instant) -> bool {
        health.note(outcome, now, &RULES, Duration::ZERO)
    }

    #[test]
    fn failures_in_a_row_eject_and_an_answer_between_them_does_not_let_them_add_up() {
        let (mut health, now) = (Health::default(), Instant::now());
        for outcome in [Outcome::Failed, Outcome::Failed, Outcome::Answered, Outcome::Failed, Outcome::Failed] {
            assert!(!note(&mut health, outcome, now));
            assert!(health.takes_calls(now, 9));
        }
        assert!(note(&mut health, Outcome::Failed, now));
        assert!(!health.takes_calls(now, 0));
    }

    #[test]
    fn who_cannot_be_connected_to_is_ejected_at_once() {
        let (mut health, now) = (Health::default(), Instant::now());
        assert!(note(&mut health, Outcome::NotConnected, now));
    }

    #[test]
    fn an_ejection_ends_with_one_call_and_lasts_longer_each_time() {
        let (mut health, mut now) = (Health::default(), Instant::now());
        assert!(note(&mut health, Outcome::NotConnected, now));
        for seconds in [1, 2, 4, 4] {
            let end = now + Duration::from_secs(seconds);
            assert!(!health.takes_calls(end - Duration::from_millis(1), 0));
            assert!(health.takes_calls(end, 0));
            assert!(!health.takes_calls(end, 1), "one on trial is enough");
            now = end;
            assert!(note(&mut health, Outcome::Failed, now), "a single failure on trial ejects again");
        }
        now += Duration::from_secs(4);
        assert!(!note(&mut health, Outcome::Answered, now));
        assert!(health.takes_calls(now, 9));
        note(&mut health, Outcome::NotConnected, now);
        assert!(health.takes_calls(now + Duration::from_secs(1), 0), "and all begins anew");
    }

    #[test]
    fn late_news_of_calls_from_before_the_ejection_change_nothing() {
        let (mut health, now) = (Health::default(), Instant::now());
        note(&mut health, Outcome::NotConnected, now);
        assert!(!note(&mut health, Outcome::Failed, now), "not ejected twice");
        note(&mut health, Outcome::Answered, now);
        assert!(!health.takes_calls(now, 0));
        assert!(health.takes_calls(now + Duration::from_secs(1), 0), "nor for longer");
    }
}
