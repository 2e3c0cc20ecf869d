//! Runs the checker and reports what it did.

use std::fmt;
use std::time::{Duration, Instant};

use stateright::report::{ReportData, ReportDiscovery, Reporter};
use stateright::{Checker, HasDiscoveries, Model};

use crate::model::{Action, Ownership};
use crate::state::State;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Finds a shortest counterexample.
    BreadthFirst,
    /// Needs far less memory to exhaust a model, since it keeps no frontier of whole states.
    DepthFirst,
}

/// Where a search ends although states are left.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Steps from the initial state. Meaningful breadth-first only: depth-first, a state first met at the limit would
    /// hide what a shorter way to it could reach.
    pub depth: Option<usize>,
    /// States generated, repeats included.
    pub states: Option<usize>,
}

impl Limits {
    pub const NONE: Self = Self { depth: None, states: None };
}

/// A path that ends in a violation; `states` has one element more than `actions`.
#[derive(Clone, Debug)]
pub struct Counterexample {
    pub model: Ownership,
    pub states: Vec<State>,
    pub actions: Vec<Action>,
}

#[derive(Clone, Debug)]
pub struct Report {
    /// States generated, repeats included.
    pub generated: usize,
    /// Distinct states.
    pub distinct: usize,
    /// Steps on the longest path explored.
    pub depth: usize,
    pub duration: Duration,
    /// Whether every reachable state was visited, and none violates an invariant.
    pub is_exhausted: bool,
    pub counterexample: Option<Counterexample>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match (&self.counterexample, self.is_exhausted) {
            (Some(counterexample), _) => format!("REFUTED in {} steps", counterexample.actions.len()),
            (None, true) => "EXHAUSTED, no violation".to_owned(),
            (None, false) => "no violation, stopped at a limit".to_owned(),
        };
        let Self { generated, distinct, depth, duration, .. } = self;
        let seconds = duration.as_secs_f64();
        write!(f, "{outcome}: {distinct} distinct states, {generated} generated, depth {depth}, {seconds:.1} s")
    }
}

/// Searches on one thread, so that breadth-first order is exact. With `is_watched`, progress goes to standard error.
#[allow(
    clippy::disallowed_methods,
    reason = "measures how long a search took; there is no runtime whose clock could pause"
)]
pub fn search(model: Ownership, order: Order, limits: Limits, is_watched: bool) -> Report {
    let mut builder = model.clone().checker().finish_when(HasDiscoveries::Any);
    if let Some(states) = limits.states {
        builder = builder.target_state_count(states);
    }
    if let Some(depth) = limits.depth {
        // The checker counts the states of a path, not its steps.
        builder = builder.target_max_depth(depth + 1);
    }
    let started = Instant::now();
    match order {
        Order::BreadthFirst => conclude(&model, builder.spawn_bfs(), limits, is_watched, started),
        Order::DepthFirst => conclude(&model, builder.spawn_dfs(), limits, is_watched, started),
    }
}

fn conclude(
    model: &Ownership,
    checker: impl Checker<Ownership> + Send + Sync,
    limits: Limits,
    is_watched: bool,
    started: Instant,
) -> Report {
    let checker = if is_watched { checker.join_and_report(&mut Progress::default()) } else { checker.join() };
    let duration = started.elapsed();
    let depth = checker.max_depth() - 1;
    let shortest = checker.discoveries().into_iter().map(|(name, path)| (path, name));
    let shortest = shortest.map(|(path, name)| (path.into_vec(), name)).min_by_key(|(path, name)| (path.len(), *name));
    let counterexample = shortest.map(|(path, _)| {
        let actions = path.iter().filter_map(|(_, action)| *action).collect();
        Counterexample { model: model.clone(), states: path.into_iter().map(|(state, _)| state).collect(), actions }
    });
    let is_cut = limits.depth.is_some_and(|limit| depth >= limit)
        || limits.states.is_some_and(|limit| checker.state_count() >= limit);
    Report {
        generated: checker.state_count(),
        distinct: checker.unique_state_count(),
        depth,
        duration,
        is_exhausted: !is_cut && counterexample.is_none(),
        counterexample,
    }
}

/// Prints a line now and then, so that a search of many minutes can be told from one that hangs.
#[derive(Debug, Default)]
struct Progress {
    reports: u32,
}

impl Reporter<Ownership> for Progress {
    fn report_checking(&mut self, data: ReportData) {
        self.reports += 1;
        if self.reports.is_multiple_of(300) && !data.done {
            let ReportData { total_states, unique_states, max_depth, duration, .. } = data;
            let seconds = duration.as_secs();
            eprintln!("{seconds} s: {unique_states} distinct states, {total_states} generated, depth {max_depth}");
        }
    }

    fn report_discoveries(
        &mut self,
        _: &Ownership,
        _: std::collections::BTreeMap<&'static str, ReportDiscovery<Ownership>>,
    ) {
    }

    fn delay(&self) -> Duration {
        Duration::from_millis(100)
    }
}
