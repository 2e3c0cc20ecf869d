//! One type for points in time.

use std::time::Duration;

/// Milliseconds since 1970-01-01T00:00:00Z. Order of messages is by seq, never by this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// From milliseconds since the epoch of Unix.
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Milliseconds since the epoch of Unix.
    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// This much later, or the greatest timestamp.
    pub fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_is_greater_and_never_wraps() {
        let now = Timestamp::from_millis(1_000);
        assert_eq!(now.saturating_add(Duration::from_secs(2)).as_millis(), 3_000);
        assert_eq!(now.saturating_add(Duration::from_micros(999)), now);
        assert_eq!(now.saturating_add(Duration::MAX).as_millis(), i64::MAX);
        assert_eq!(Timestamp::from_millis(i64::MAX - 1).saturating_add(Duration::from_secs(1)).as_millis(), i64::MAX);
    }
}
