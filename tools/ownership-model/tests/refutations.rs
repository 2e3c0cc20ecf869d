//! Without any one of its rules the protocol breaks, within the bounds in which the whole protocol holds.

use ownership_model::model::Ownership;
use ownership_model::rules::{Bounds, Grain, LeaveOut, Rules};
use ownership_model::schedule;
use ownership_model::search::{Limits, Order, Report, search};

fn refute(leave_out: LeaveOut, grain: Grain) -> Report {
    let model = Ownership { rules: Rules::without(leave_out), bounds: Bounds::REQUIRED, grain };
    let report = search(model, Order::BreadthFirst, Limits::NONE, false);
    println!("{leave_out} {grain:?}: {report}");
    report
}

#[test]
fn every_leave_out_is_refuted_within_the_required_bounds() {
    for leave_out in LeaveOut::ALL {
        let report = refute(leave_out, Grain::Coarse);
        let schedule = report.counterexample.map(|counterexample| schedule::render(&counterexample));
        let schedule = schedule.unwrap_or_default();
        assert!(
            ["LOST", "HOLE", "TWO", "REUSED"].iter().any(|verdict| schedule.contains(verdict)),
            "{leave_out}:\n{schedule}"
        );
    }
}

/// The others are refuted in single steps as well, after several million states: `refute-all --fine`.
#[test]
fn the_quick_ones_are_refuted_when_every_arrival_is_a_step() {
    use LeaveOut::{Committed, Freed, Repair, Rewrite, Split, Whole};
    for leave_out in [Rewrite, Whole, Committed, Freed, Split, Repair] {
        assert!(refute(leave_out, Grain::Fine).counterexample.is_some(), "{leave_out}");
    }
}

#[test]
fn a_leave_out_is_found_by_its_name() {
    for leave_out in LeaveOut::ALL {
        assert_eq!(LeaveOut::parse(leave_out.name()), Some(leave_out));
    }
    assert_eq!(LeaveOut::parse("nothing"), None);
}
