//! Hot state of one process, in its memory: for tests and for a server that runs alone.

use std::{collections::HashMap, fmt, hash::Hash, sync::Arc, time::Duration};

use im_proto::environment::{Clock, Environment};
use parking_lot::Mutex;

use super::{Charge, Hint, HintKey, HotState, Limit, SUBJECT_BYTES_MAX};

/// Entries of each kind. Beyond it what has expired is thrown away, and if that is not enough everything: it may vanish at any time.
/// A million heads are about 100 MB.
const ENTRIES_MAX: usize = 1 << 20;

/// The backend. Clones share the content.
#[derive(Clone)]
pub struct MemoryHot {
    state: Arc<Mutex<State>>,
    clock: Arc<dyn Clock>,
}

struct State {
    hints: Entries<HintKey, Hint>,
    /// By subject and number of the window.
    counts: Entries<(String, u64), u64>,
}

/// What is forgotten after a while.
struct Entries<K, V> {
    /// Value, and when it is forgotten.
    by_key: HashMap<K, (V, Duration)>,
    entries_max: usize,
}

impl<K: Eq + Hash, V: Copy> Entries<K, V> {
    fn new(entries_max: usize) -> Self {
        Self { by_key: HashMap::new(), entries_max }
    }

    fn get(&self, key: &K, now: Duration) -> Option<V> {
        self.by_key.get(key).filter(|(_, until)| now < *until).map(|(value, _)| *value)
    }

    fn put(&mut self, key: K, value: V, now: Duration, lifetime: Duration) {
        if self.by_key.len() >= self.entries_max && !self.by_key.contains_key(&key) {
            self.by_key.retain(|_, (_, until)| now < *until);
            if self.by_key.len() >= self.entries_max {
                self.by_key.clear();
            }
        }
        self.by_key.insert(key, (value, now.saturating_add(lifetime)));
    }
}

impl MemoryHot {
    /// Nothing is known yet.
    pub fn new(environment: &Environment) -> Self {
        Self::with_entries_max(environment, ENTRIES_MAX)
    }

    fn with_entries_max(environment: &Environment, entries_max: usize) -> Self {
        let state = State { hints: Entries::new(entries_max), counts: Entries::new(entries_max) };
        Self { state: Arc::new(Mutex::new(state)), clock: environment.clock.clone() }
    }
}

impl fmt::Debug for MemoryHot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryHot").finish_non_exhaustive()
    }
}

impl HotState for MemoryHot {
    fn raise(&self, hints: Vec<(HintKey, Hint, Duration)>) {
        let now = self.clock.since_boot();
        let mut state = self.state.lock();
        for (key, hint, lifetime) in hints {
            if state.hints.get(&key, now).is_none_or(|known| known.version <= hint.version) {
                state.hints.put(key, hint, now, lifetime);
            }
        }
    }

    async fn read(&self, keys: Vec<HintKey>) -> Vec<Option<Hint>> {
        let now = self.clock.since_boot();
        let state = self.state.lock();
        keys.iter().map(|key| state.hints.get(key, now)).collect()
    }

    async fn charge(&self, subject: &str, cost: u32, limit: Limit) -> Charge {
        if subject.len() > SUBJECT_BYTES_MAX {
            return Charge::Unknown;
        }
        let (wall, now) = (self.clock.now(), self.clock.since_boot());
        let window = limit.window_of(wall);
        let mut state = self.state.lock();
        let mut key = (subject.to_owned(), window.wrapping_sub(1));
        let previous = state.counts.get(&key, now).unwrap_or(0);
        key.1 = window;
        let current = state.counts.get(&key, now).unwrap_or(0).saturating_add(u64::from(cost));
        state.counts.put(key, current, now, limit.lifetime());
        drop(state);
        limit.judge(wall, current, previous)
    }
}

#[cfg(test)]
mod tests {
    use im_proto::UserId;

    use super::*;

    #[test]
    fn a_full_table_forgets_and_never_grows() {
        let mut entries = Entries::new(10);
        let key = |number: u32| HintKey::Presence(UserId::parse(&number.to_string()).expect("an id"));
        for number in 0..100 {
            let lifetime = Duration::from_secs(if number % 2 == 0 { 1 } else { 1_000 });
            entries.put(key(number), number, Duration::from_secs(u64::from(number)), lifetime);
            assert!(entries.by_key.len() <= 10);
            assert_eq!(entries.get(&key(number), Duration::from_secs(u64::from(number))), Some(number));
        }
        assert_eq!(entries.get(&key(98), Duration::from_secs(99)), None, "expired");
    }
}
