//! A rate in eight bytes a counter: the generic cell rate algorithm (ITU-T I.371), a token bucket without a timer.
//!
//! A [`Bucket`] holds only the moment at which it is full again. Whoever owns buckets keeps them where they belong (in a connection,
//! in a bounded table) and forgets those that are full: a forgotten bucket is a full one. Time is the runtime's own, counted from
//! the start of the gateway, so that a test or a simulation decides it.
//!
//! Not the `governor` crate: its limiter costs a clock and a quota a counter (56 bytes a connection), its tables of keys grow until
//! somebody sweeps them, and it cannot owe, which a connection must whose frames were read already.

use std::time::Duration;

const NANOS: u64 = 1_000_000_000;

/// So much in a time, usually a second, of which all may come at once after a pause.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    units: u64,
    nanos: u64,
}

/// What was used of a rate: when all of it is there again, in nanoseconds since the start of the gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bucket(u64);

impl Bucket {
    /// Nothing of it is used: it may be forgotten.
    pub fn is_full(self, now: Duration) -> bool {
        self.0 <= nanos(now)
    }
}

impl Rate {
    /// 0 is no limit.
    pub fn per_second(per_second: impl Into<u64>) -> Self {
        Self { units: per_second.into(), nanos: NANOS }
    }

    /// So many in ten seconds.
    pub const fn per_ten_seconds(units: u64) -> Self {
        Self { units, nanos: 10 * NANOS }
    }

    pub fn is_unlimited(self) -> bool {
        self.units == 0
    }

    /// Takes one, or says how long until there is one.
    pub fn take(self, bucket: &mut Bucket, now: Duration) -> Result<(), Duration> {
        if self.is_unlimited() {
            return Ok(());
        }
        match self.wait(*bucket, 1, now) {
            Duration::ZERO => {
                self.add(bucket, 1, now);
                Ok(())
            }
            wait => Err(wait),
        }
    }

    /// How long until one is there, taking none.
    pub fn look(self, bucket: Bucket, now: Duration) -> Duration {
        if self.is_unlimited() { Duration::ZERO } else { self.wait(bucket, 1, now) }
    }

    /// Takes so many, whether they are there or not: what came in came in. Returns how long the owner has to rest until it owes
    /// nothing.
    pub fn charge(self, bucket: &mut Bucket, units: u64, now: Duration) -> Duration {
        if self.is_unlimited() || units == 0 {
            return Duration::ZERO;
        }
        self.add(bucket, units, now);
        self.wait(*bucket, 0, now)
    }

    fn add(self, bucket: &mut Bucket, units: u64, now: Duration) {
        bucket.0 = bucket.0.max(nanos(now)).saturating_add(self.cost(units));
    }

    fn wait(self, bucket: Bucket, units: u64, now: Duration) -> Duration {
        let full_at = bucket.0.max(nanos(now)).saturating_add(self.cost(units));
        Duration::from_nanos(full_at.saturating_sub(nanos(now).saturating_add(self.nanos)))
    }

    fn cost(self, units: u64) -> u64 {
        (u128::from(units) * u128::from(self.nanos) / u128::from(self.units.max(1))).try_into().unwrap_or(u64::MAX)
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_second_comes_at_once_and_then_one_at_a_time() {
        let rate = Rate::per_second(10_u32);
        let mut bucket = Bucket::default();
        let now = Duration::from_secs(5);
        for _ in 0..10 {
            assert_eq!(rate.take(&mut bucket, now), Ok(()));
        }
        let wait = rate.take(&mut bucket, now).expect_err("none is left");
        assert_eq!(wait, Duration::from_millis(100));
        assert_eq!(rate.take(&mut bucket, now + wait), Ok(()));
        assert!(rate.take(&mut bucket, now + wait).is_err());
        assert!(!bucket.is_full(now + wait));
        assert!(bucket.is_full(now + wait + Duration::from_secs(1)));
    }

    #[test]
    fn what_was_charged_beyond_the_rate_is_owed() {
        let rate = Rate::per_second(100_u32);
        let mut bucket = Bucket::default();
        assert_eq!(rate.charge(&mut bucket, 100, Duration::ZERO), Duration::ZERO);
        assert_eq!(rate.charge(&mut bucket, 300, Duration::ZERO), Duration::from_secs(3));
        assert_eq!(rate.charge(&mut bucket, 1, Duration::from_secs(3)), Duration::from_millis(10));
    }

    #[test]
    fn nothing_is_limited_by_zero() {
        let (rate, mut bucket) = (Rate::per_second(0_u32), Bucket::default());
        assert_eq!(rate.charge(&mut bucket, u64::MAX, Duration::ZERO), Duration::ZERO);
        assert_eq!(rate.take(&mut bucket, Duration::ZERO), Ok(()));
        assert_eq!(bucket, Bucket::default());
    }

    proptest! {
        /// Against the plain model: a bucket of tokens that fills continuously.
        #[test]
        fn it_is_a_bucket_of_tokens(per_second in 1_u32..1000, steps in prop::collection::vec(0_u64..400, 1..200)) {
            let rate = Rate::per_second(per_second);
            let mut bucket = Bucket::default();
            // In nanoseconds of filling; one token costs as many as in the code, rounding included.
            let (cost, mut filled, mut now) = (NANOS / u64::from(per_second), NANOS, Duration::ZERO);
            for step in steps {
                now += Duration::from_millis(step);
                filled = (filled + step * 1_000_000).min(NANOS);
                let taken = rate.take(&mut bucket, now).is_ok();
                prop_assert_eq!(taken, filled >= cost);
                if taken {
                    filled -= cost;
                }
            }
        }
    }
}
