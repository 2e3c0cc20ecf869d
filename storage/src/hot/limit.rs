//! Rate limits over a sliding window, from the counts of two fixed ones.
//!
//! What was used in the window before counts by the part of it that the sliding window still covers. Nobody gets more than the limit in
//! any window by more than the unevenness of what went before, and two numbers a subject are all that is kept.

use std::time::Duration;

use im_proto::Timestamp;

/// So much in any such time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    pub amount: u32,
    /// At least a millisecond.
    pub window: Duration,
}

/// Whether something may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Charge {
    Allowed,
    Exceeded {
        /// When the same cost may be allowed, if nothing else is charged meanwhile.
        retry_after: Duration,
    },
    /// The counts could not be reached: the caller falls back to what it knows by itself.
    Unknown,
}

impl Limit {
    fn millis(&self) -> u64 {
        u64::try_from(self.window.as_millis()).unwrap_or(u64::MAX).clamp(1, 1 << 42)
    }

    /// The fixed window of a moment.
    pub fn window_of(&self, now: Timestamp) -> u64 {
        u64::try_from(now.as_millis()).unwrap_or(0) / self.millis()
    }

    /// How long a count is kept: it is asked for until the window after its own has ended.
    pub(super) fn lifetime(&self) -> Duration {
        Duration::from_millis(2 * self.millis())
    }

    /// From what was used in the present fixed window, this charge included, and in the one before.
    pub fn judge(&self, now: Timestamp, current: u64, previous: u64) -> Charge {
        let window = self.millis();
        let elapsed = u64::try_from(now.as_millis()).unwrap_or(0) % window;
        let amount = u128::from(self.amount);
        let carried = u128::from(previous) * u128::from(window - elapsed);
        if carried + u128::from(current) * u128::from(window) <= amount * u128::from(window) {
            return Charge::Allowed;
        }
        // Within this window what is carried over has to shrink; in the next, what was used in this one.
        let millis = if u128::from(current) <= amount {
            let may_carry = (amount - u128::from(current)) * u128::from(window);
            let shrinks_to = may_carry.checked_div(u128::from(previous)).unwrap_or(0);
            u128::from(window - elapsed).saturating_sub(shrinks_to)
        } else {
            let shrinks_to = (amount * u128::from(window)).checked_div(u128::from(current)).unwrap_or(0);
            u128::from(2 * window - elapsed).saturating_sub(shrinks_to)
        };
        Charge::Exceeded { retry_after: Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX).max(1)) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: Limit = Limit { amount: 10, window: Duration::from_secs(1) };

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    #[test]
    fn the_limit_is_reached_and_not_passed() {
        assert_eq!(LIMIT.judge(at(5_000), 10, 0), Charge::Allowed);
        assert!(matches!(LIMIT.judge(at(5_000), 11, 0), Charge::Exceeded { .. }));
        // Half of the window before still counts.
        assert_eq!(LIMIT.judge(at(5_500), 5, 10), Charge::Allowed);
        assert!(matches!(LIMIT.judge(at(5_500), 6, 10), Charge::Exceeded { .. }));
        assert_eq!(LIMIT.window_of(at(5_999)) + 1, LIMIT.window_of(at(6_000)));
    }

    proptest! {
        /// Who waits as long as told, and charges the same again, is let in if nobody else charged.
        #[test]
        fn waiting_helps(amount in 1_u32..1_000, window in 1_u64..100_000, now in 0_i64..1_000_000, current in 1_u64..2_000, previous in 0_u64..2_000) {
            let limit = Limit { amount, window: Duration::from_millis(window) };
            if let Charge::Exceeded { retry_after } = limit.judge(at(now), current, previous) {
                prop_assert!(retry_after <= limit.lifetime());
                let then = at(now).saturating_add(retry_after);
                let verdict = match limit.window_of(then) - limit.window_of(at(now)) {
                    0 => limit.judge(then, current, previous),
                    1 => limit.judge(then, 0, current),
                    _ => limit.judge(then, 0, 0),
                };
                prop_assert_eq!(verdict, Charge::Allowed);
            }
        }
    }
}
