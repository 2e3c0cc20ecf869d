//! What happened in a run, as a hash, as counts and, if asked for, as text.

use std::{collections::BTreeMap, io::Write as _, sync::Arc};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::chance::TraceHash;

/// A run's trace. Clones are the same one.
#[derive(Clone)]
pub struct Trace {
    shared: Arc<Shared>,
}

struct Shared {
    started: Instant,
    print: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    hash: TraceHash,
    counts: BTreeMap<&'static str, u64>,
}

impl Trace {
    /// Nothing has happened. Called within the runtime of the run.
    pub fn new(print: bool) -> Self {
        let shared = Shared { started: Instant::now(), print, state: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    /// Something happened.
    pub fn event(&self, what: &str, detail: impl FnOnce() -> String) {
        let at = self.shared.started.elapsed();
        let detail = detail();
        {
            let mut state = self.shared.state.lock();
            state.hash.add_number(u64::try_from(at.as_micros()).unwrap_or(u64::MAX));
            state.hash.add(what.as_bytes());
            state.hash.add(detail.as_bytes());
        }
        if self.shared.print {
            // Nobody may be left to read it.
            let _ = writeln!(std::io::stdout(), "{:>10.3} {what:<12} {detail}", at.as_secs_f64());
        }
    }

    /// Counts something.
    pub fn count(&self, what: &'static str) {
        *self.shared.state.lock().counts.entry(what).or_default() += 1;
    }

    /// The hash so far.
    pub fn hash(&self) -> u64 {
        self.shared.state.lock().hash.value()
    }

    /// The counts so far.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.shared.state.lock().counts.clone()
    }
}
