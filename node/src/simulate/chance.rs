//! What a seed decides: dice, the clocks and the randomness of simulated processes, and the hash over everything that happened.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use im_proto::{
    Timestamp,
    environment::{Clock, Random},
};
use parking_lot::Mutex;
use tokio::time::Instant;

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The dice of a seed for one purpose: other purposes get other numbers.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let mut hash = TraceHash::default();
        hash.add(purpose.as_bytes());
        let mut dice = Self(seed ^ hash.value());
        dice.number();
        Self(dice.number())
    }

    /// Uniformly distributed bits.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number of `low..=high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.number() % (high.saturating_sub(low) + 1)
    }

    /// Whether something happens that happens so many times in a hundred.
    pub fn percent(&mut self, chance: u64) -> bool {
        self.number() % 100 < chance
    }

    /// A duration between two numbers of milliseconds.
    pub fn millis(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.between(low, high))
    }

    /// One of several.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let index = usize::try_from(self.number() % of.len() as u64).unwrap_or(0);
        &of[index]
    }

    /// Fisher and Yates.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            let other = usize::try_from(self.number() % (last as u64 + 1)).unwrap_or(0);
            list.swap(last, other);
        }
    }
}

/// FNV-1a.
#[derive(Clone, Debug)]
pub struct TraceHash(u64);

impl Default for TraceHash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl TraceHash {
    /// Takes bytes in.
    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Takes a number in.
    pub fn add_number(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }

    /// The hash so far.
    pub fn value(&self) -> u64 {
        self.0
    }
}

/// 2027-01-15, so that tokens and timestamps look as usual.
const START_MS: i64 = 1_800_000_000_000;

/// The clock of a simulated process. The wall clock may be wrong; the time since boot may miss what the machine slept.
pub struct SimClock {
    started: Instant,
    skew_ms: AtomicI64,
    missed_ms: AtomicU64,
}

impl SimClock {
    /// A right clock of a run that started then.
    pub fn new(started: Instant) -> Arc<Self> {
        Arc::new(Self { started, skew_ms: AtomicI64::new(0), missed_ms: AtomicU64::new(0) })
    }

    /// From now on the wall clock is wrong by this much.
    pub fn set_skew(&self, skew_ms: i64) {
        self.skew_ms.store(skew_ms, Ordering::Relaxed);
    }

    /// A pause that this clock does not show.
    pub fn miss(&self, duration: Duration) {
        let millis = u64::try_from(duration.as_millis()).unwrap_or(0);
        self.missed_ms.fetch_add(millis, Ordering::Relaxed);
    }
}

impl Clock for SimClock {
    fn now(&self) -> Timestamp {
        let elapsed = i64::try_from(self.started.elapsed().as_millis()).unwrap_or(i64::MAX);
        Timestamp::from_millis(START_MS + elapsed + self.skew_ms.load(Ordering::Relaxed))
    }

    fn since_boot(&self) -> Duration {
        // A day up, so that nothing is near zero.
        Duration::from_secs(86_400) + self.started.elapsed()
            - Duration::from_millis(self.missed_ms.load(Ordering::Relaxed))
    }
}

/// The randomness of a simulated process.
pub struct SimRandom(Mutex<Dice>);

impl SimRandom {
    /// Draws from these dice.
    pub fn new(dice: Dice) -> Arc<Self> {
        Arc::new(Self(Mutex::new(dice)))
    }
}

impl Random for SimRandom {
    fn next_u64(&self) -> u64 {
        self.0.lock().number()
    }
}
