//! The whole protocol keeps its invariants, and is not vacuous.

use std::collections::{BTreeSet, HashSet};

use ownership_model::model::Ownership;
use ownership_model::owner::Phase;
use ownership_model::rules::{Bounds, Grain, Rules};
use ownership_model::search::{Limits, Order, search};
use ownership_model::state::State;
use stateright::Model;

fn protocol(bounds: &str, grain: Grain) -> Ownership {
    Ownership { rules: Rules::all(), bounds: bounds.parse().expect("bounds of a test"), grain }
}

fn assert_exhausted(bounds: &str, grain: Grain) {
    let report = search(protocol(bounds, grain), Order::DepthFirst, Limits::NONE, false);
    println!("{bounds} {grain:?}: {report}");
    assert!(report.is_exhausted, "{bounds} {grain:?}: {report}");
}

/// Visits every state; for bounds small enough to keep them all.
fn visit(model: &Ownership, mut look_at: impl FnMut(&State)) {
    let mut waiting = model.init_states();
    let mut seen: HashSet<State> = waiting.iter().cloned().collect();
    let mut actions = Vec::new();
    while let Some(state) = waiting.pop() {
        look_at(&state);
        actions.clear();
        model.actions(&state, &mut actions);
        let next = actions.iter().filter_map(|action| model.next_state(&state, *action));
        for next in next {
            if seen.insert(next.clone()) {
                waiting.push(next);
            }
        }
    }
}

#[test]
fn three_claims_keep_the_invariants() {
    assert_exhausted("3,3,2,1,0,0,0", Grain::Coarse);
}

#[test]
fn three_claims_keep_the_invariants_when_an_open_begins_again() {
    assert_exhausted("3,3,2,0,0,1,0", Grain::Coarse);
}

#[test]
fn three_claims_keep_the_invariants_across_a_restored_registry() {
    assert_exhausted("3,3,2,0,0,0,1", Grain::Coarse);
}

#[test]
fn two_claims_keep_the_invariants_with_everything_that_can_happen() {
    assert_exhausted("2,3,2,1,1,1,1", Grain::Coarse);
}

#[test]
fn the_invariants_hold_when_every_arrival_is_a_step() {
    for bounds in ["2,2,2,1,0,1,0", "2,2,2,0,0,0,1", "2,2,2,0,1,0,0", "2,3,2,0,0,0,0"] {
        assert_exhausted(bounds, Grain::Fine);
    }
}

/// Ten minutes or more, and 1.3 GB: `cargo test --release -p ownership-model -- --ignored`.
#[test]
#[ignore = "ten minutes in a release build"]
fn the_required_bounds_are_exhausted() {
    assert_exhausted(&format_bounds(Bounds::REQUIRED), Grain::Coarse);
}

fn format_bounds(bounds: Bounds) -> String {
    let Bounds { claims, messages, batch_rows, releases, raises, retries, recoveries } = bounds;
    format!("{claims},{messages},{batch_rows},{releases},{raises},{retries},{recoveries}")
}

/// The coarse grain leaves out steps, not outcomes: whatever can be committed in steps of one arrival each can be
/// committed in coarse steps, with the same budget left, and the other way round.
#[test]
fn both_grains_commit_the_same() {
    for bounds in ["2,2,2,1,0,1,0", "2,2,2,0,0,0,1", "2,2,2,0,1,0,0"] {
        let outcomes = |grain| {
            let mut outcomes = BTreeSet::new();
            visit(&protocol(bounds, grain), |state| {
                let left = state.left;
                outcomes.insert((
                    state.committed,
                    left.releases,
                    left.raises,
                    left.retries,
                    left.recoveries,
                    state.instances,
                ));
            });
            outcomes
        };
        assert_eq!(outcomes(Grain::Coarse), outcomes(Grain::Fine), "{bounds}");
    }
}

#[test]
fn the_protocol_makes_progress_through_every_kind_of_takeover() {
    let mut after_lease = false;
    let mut after_release = false;
    let mut after_raise = false;
    let mut after_recovery = false;
    visit(&protocol("2,2,2,1,1,0,1", Grain::Coarse), |state| {
        let left = state.left;
        // Everything is committed, and by two owners: the second serves what the first began.
        let is_done = state.committed[1] != 0 && state.owners[1].phase == Phase::Serving && state.owners[1].head() == 2;
        after_lease |= is_done && left.releases == 1 && left.raises == 1 && left.recoveries == 1;
        after_release |= is_done && left.releases == 0;
        after_raise |= is_done && left.raises == 0;
        after_recovery |= is_done && left.recoveries == 0 && state.fences.generation == 1;
    });
    assert!(after_lease && after_release && after_raise && after_recovery);
}
