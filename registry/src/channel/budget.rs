//! A bound on retries: a token bucket that each call fills by a tenth and each retry empties by one. However many calls fail, the
//! servers that are left get at most a tenth more than they got anyway, and a start of ten.
//!
//! Pure.

use std::sync::atomic::{AtomicU32, Ordering};

/// Tokens are counted in thousandths.
const TOKEN: u32 = 1_000;

#[derive(Debug)]
pub(super) struct Budget {
    tokens: AtomicU32,
    per_call: u32,
    capacity: u32,
}

impl Budget {
    /// `ratio` retries a call, and `burst` at once. The bucket begins full.
    pub(super) fn new(ratio: f64, burst: u32) -> Self {
        let capacity = burst.saturating_mul(TOKEN);
        // Between 0 and 1,000 after the clamp.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before")]
        let per_call = (ratio.clamp(0.0, 1.0) * f64::from(TOKEN)).round() as u32;
        Self { tokens: AtomicU32::new(capacity), per_call, capacity }
    }

    /// A call begins.
    pub(super) fn deposit(&self) {
        let add = |tokens: u32| Some(tokens.saturating_add(self.per_call).min(self.capacity));
        let _ = self.tokens.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Whether a retry may be made; takes a token if so.
    pub(super) fn withdraw(&self) -> bool {
        let take = |tokens: u32| tokens.checked_sub(TOKEN);
        self.tokens.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_tenth_of_the_calls_and_a_burst() {
        let budget = Budget::new(0.1, 10);
        let retries = (0..1_000).filter(|_| {
            budget.deposit();
            budget.withdraw()
        });
        let retries = retries.count();
        assert!((105..=110).contains(&retries), "{retries}");
    }

    #[test]
    fn a_full_bucket_holds_no_more_than_its_burst() {
        let budget = Budget::new(0.1, 3);
        (0..1_000).for_each(|_| budget.deposit());
        assert_eq!((0..10).filter(|_| budget.withdraw()).count(), 3);
    }

    #[test]
    fn nothing_is_retried_without_a_budget() {
        let budget = Budget::new(0.0, 0);
        budget.deposit();
        assert!(!budget.withdraw());
    }
}
