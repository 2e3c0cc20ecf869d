//! A bounded table of what is counted per key, for keys that strangers choose.
//!
//! An entry that says the same as none is forgotten: after each use, and when a part of the table is full. A key that finds no place
//! even then is not counted; the caller decides what that means. Keys are hashed with a seed of this start, and looking for entries
//! to forget happens at most once a second and part, so that nobody makes it slow on purpose.

use std::{collections::HashMap, time::Duration};

use foldhash::fast::FixedState;
use im_proto::environment::Environment;
use parking_lot::Mutex;

use crate::rate::Bucket;

/// Parts that are locked apart.
const PARTS: usize = 16;
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// What is kept for a key.
pub(crate) trait Entry: Default {
    /// It says the same as no entry.
    fn is_blank(&self, now: Duration) -> bool;
}

impl Entry for Bucket {
    fn is_blank(&self, now: Duration) -> bool {
        self.is_full(now)
    }
}

/// A table of entries by key.
pub(crate) struct Table<V> {
    parts: Box<[Mutex<Part<V>>]>,
    hasher: FixedState,
    part_max: usize,
}

struct Part<V> {
    entries: HashMap<u64, V, FixedState>,
    sweep_at: Duration,
}

impl<V: Entry> Table<V> {
    /// Room for this many keys at least.
    pub fn new(environment: &Environment, keys_max: usize) -> Self {
        let hasher = FixedState::with_seed(environment.random.next_u64());
        let part = |_| Mutex::new(Part { entries: HashMap::with_hasher(hasher.clone()), sweep_at: Duration::ZERO });
        Self { parts: (0..PARTS).map(part).collect(), part_max: keys_max.div_ceil(PARTS).max(1), hasher }
    }

    /// A key of anything that can be hashed. Two that share one by chance (1 of 2^64) are counted together.
    pub fn key(&self, of: impl std::hash::Hash) -> u64 {
        std::hash::BuildHasher::hash_one(&self.hasher, of)
    }

    /// Uses the entry of a key. `None`: the table is full of others.
    pub fn with<T>(&self, key: u64, now: Duration, act: impl FnOnce(&mut V) -> T) -> Option<T> {
        let place = usize::try_from(self.key(key) % PARTS as u64).unwrap_or_default();
        let mut part = self.parts.get(place)?.lock();
        if part.entries.len() >= self.part_max && !part.entries.contains_key(&key) && !part.sweep(now, self.part_max) {
            return None;
        }
        let entry = part.entries.entry(key).or_default();
        let result = act(entry);
        if entry.is_blank(now) {
            part.entries.remove(&key);
        }
        Some(result)
    }
}

impl<V: Entry> Part<V> {
    /// Forgets what is blank; whether there is room now.
    fn sweep(&mut self, now: Duration, max: usize) -> bool {
        if now < self.sweep_at {
            return false;
        }
        self.sweep_at = now + SWEEP_INTERVAL;
        self.entries.retain(|_, entry| !entry.is_blank(now));
        if self.entries.len() < max / 4 {
            self.entries.shrink_to_fit();
        }
        self.entries.len() < max
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use im_proto::{
        Timestamp,
        environment::{Clock, Random, Spawn, Task},
    };

    use super::*;
    use crate::rate::Rate;

    fn keys<V>(table: &Table<V>) -> usize {
        table.parts.iter().map(|part| part.lock().entries.len()).sum()
    }

    struct Nothing;

    impl Clock for Nothing {
        fn now(&self) -> Timestamp {
            Timestamp::from_millis(0)
        }

        fn since_boot(&self) -> Duration {
            Duration::ZERO
        }
    }

    impl Random for Nothing {
        fn next_u64(&self) -> u64 {
            7
        }
    }

    impl Spawn for Nothing {
        fn spawn(&self, _task: Task) {}
    }

    /// For what asks it for nothing but a seed.
    pub(crate) fn environment() -> Environment {
        let nothing = Arc::new(Nothing);
        Environment { clock: nothing.clone(), random: nothing.clone(), tasks: nothing }
    }

    fn table(keys_max: usize) -> Table<Bucket> {
        Table::new(&environment(), keys_max)
    }

    #[test]
    fn keys_of_strangers_never_fill_the_memory_and_make_room_when_they_rest() {
        let (table, rate) = (table(1600), Rate::per_second(1_u32));
        let at = Duration::from_millis;
        for key in 0..100_000 {
            table.with(key, at(1), |bucket| rate.take(bucket, at(1)));
        }
        assert!(keys(&table) <= 1600, "{}", keys(&table));
        assert!(table.with(200_000, at(2), |_| ()).is_none(), "full of keys that are in use");
        assert!(table.with(200_000, at(1500), |bucket| rate.take(bucket, at(1500))).is_some());
        assert!(keys(&table) <= 1501, "the part that was full has forgotten: {}", keys(&table));
    }

    #[test]
    fn an_entry_that_says_nothing_is_not_kept() {
        let table = table(16);
        table.with(1, Duration::ZERO, |_| ());
        assert_eq!(keys(&table), 0);
    }
}
