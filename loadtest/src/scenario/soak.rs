//! Continuous load on a running cluster while somebody else breaks it.
//!
//! The same clients as in `crash`: pairs in both directions and one group, who reconnect, sync and repeat what was not
//! acknowledged. Whoever makes the faults writes a line for each to standard input; the report has the timeline around them, and
//! at the end every history is read back and judged.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    time::Instant,
};

use super::{ProgressLine, Target, completed, crash, judge, kept_up, new_report, statistics};
use crate::{
    crowd::{Progress, Statistics},
    load::{Load, total},
    measure::Reading,
    options::Common,
    report::{Goal, Report},
    timeline::{Recorded, Timeline},
};

/// Pairs if the options do not say.
const PAIRS: usize = 24;
const LIVE_WITHIN: Duration = Duration::from_secs(60);
/// Before the first fault nothing waits for this long, unless it takes more than that.
const CALM: Duration = Duration::from_secs(2);
const CALM_WITHIN: Duration = Duration::from_secs(60);

/// What is asked of the service while it is broken.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// After the last fault everything must be back within this.
    pub settle: Duration,
    /// Seconds from a fault until no conversation waits any more: a goal.
    pub goal_back: Option<f64>,
    /// Seconds that any send waits for its acknowledgement: a promise.
    pub wait_max: Option<f64>,
}

/// One run.
pub async fn run(options: &Common, marks: bool, bounds: Bounds) -> anyhow::Result<Report> {
    let target = Target::open(options).await?;
    let (plan, connections) = {
        let pairs = options.pair_count(PAIRS);
        let group = options.members.unwrap_or(crash::GROUP.min(2 * pairs)).max(1);
        crash::plan(&target, options, pairs, group).await?
    };
    let load = Load::start(plan, target.endpoints.clone())?;
    let progress = ProgressLine::start("soak", Arc::clone(&load.progress));
    load.all_live(LIVE_WITHIN).await?;
    load.switches.sending.store(true, Ordering::Relaxed);
    // What was done to the servers before is over: its waits are not those of the faults to come.
    calm(&load.progress).await;
    let before = Reading::take(&target.pids());
    load.switches.measuring.store(true, Ordering::Relaxed);
    let timeline = Timeline::start(Arc::clone(&load.progress));
    // Whoever makes the faults waits for this line.
    eprintln!("soak: under way");
    if marks {
        take_marks(&timeline).await?;
    } else {
        tokio::time::sleep(options.time()).await;
    }
    load.switches.measuring.store(false, Ordering::Relaxed);
    load.switches.sending.store(false, Ordering::Relaxed);
    let usage = Reading::take(&target.pids()).since(&before);
    let begun = Instant::now();
    let ending = load.ending(bounds.settle).await;
    let settled_after = begun.elapsed();
    let recorded = timeline.finish();
    drop(progress);
    let outcome = load.finish()?;
    let mut report = new_report("soak", &target, options);
    report.connections = connections;
    report.usage(&usage, options.threads());
    statistics(&mut report, &outcome.statistics, options, &usage);
    // Connections break: that is the test, not an error.
    report.error_causes = outcome.statistics.errors.clone();
    report.errors = report.error_causes.values().sum();
    completed(&mut report, ending, &outcome.statistics);
    eprint!("{}", recorded.plot());
    waited(&mut report, bounds, &recorded, &outcome.statistics);
    // What the broken service held up is no fault of the generator's.
    kept_up(&mut report, &outcome.statistics, outcome.statistics.held_up, options, &usage);
    if let serde_json::Value::Object(details) = &mut report.details {
        details.insert("disconnects".to_owned(), serde_json::json!(outcome.statistics.disconnects));
        details.insert("settled_ms".to_owned(), serde_json::json!(settled_after.as_millis() as u64));
        details.insert("timeline".to_owned(), serde_json::json!(recorded));
    }
    judge(&target, options, outcome, &mut report).await;
    Ok(report)
}

/// Judges how long anything waited, also what was acknowledged after the end of sending only.
fn waited(report: &mut Report, bounds: Bounds, recorded: &Recorded, statistics: &Statistics) {
    if let Some(seconds) = bounds.goal_back {
        let what = "from a fault until no conversation waits any more, the longest, s";
        report.goals.push(Goal::at_most("PF12", what, seconds, recorded.longest_outage()));
    }
    // Not of the percentiles: they are those of the measured time, and end at a minute.
    let longest = statistics.longest_wait as f64 / 1e6;
    if let Some(seconds) = bounds.wait_max.filter(|seconds| longest > *seconds) {
        report.broke(format!("a send waited {longest:.1} s for its acknowledgement, {seconds} s are allowed"));
    }
    report.detail("longest_wait_us", statistics.longest_wait);
    report.detail("held_up", statistics.held_up);
}

/// Waits until messages are acknowledged and no conversation has waited for a while.
async fn calm(progress: &Progress) {
    let deadline = Instant::now() + CALM_WITHIN;
    let mut since = Instant::now();
    while since.elapsed() < CALM && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if total(&progress.stalled) > 0 || total(&progress.acknowledged) == 0 {
            since = Instant::now();
        }
    }
}

/// A mark a line, until the input ends.
async fn take_marks(timeline: &Timeline) -> anyhow::Result<()> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        timeline.mark(line.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_that_ended_after_the_measured_time_or_after_a_minute_breaks_the_promise() {
        let mut statistics = Statistics::default();
        statistics.longest_wait = 70_000_000;
        let broken = |wait_max| {
            let mut report = Report::default();
            let bounds = Bounds { settle: Duration::ZERO, goal_back: None, wait_max };
            waited(&mut report, bounds, &Recorded::default(), &statistics);
            assert_eq!(report.details["longest_wait_us"], 70_000_000);
            report.broken
        };
        assert!(broken(Some(65.0))[0].contains("a send waited 70.0 s"));
        assert!(broken(Some(70.0)).is_empty() && broken(None).is_empty());
    }

    #[test]
    fn what_the_service_held_up_is_not_said_of_the_generator() {
        let options = <crate::Options as clap::Parser>::parse_from(["loadtest", "chat", "--rate", "100"]);
        let crate::options::Scenario::Chat(options) = options.scenario else { panic!("chat is chat") };
        let usage = crate::measure::Usage { seconds: 10.0, ..Default::default() };
        let said = |begun, held_up| {
            let mut report = Report::default();
            let mut statistics = Statistics::default();
            (statistics.begun, statistics.held_up) = (begun, held_up);
            kept_up(&mut report, &statistics, statistics.held_up, &options, &usage);
            report.reasons
        };
        assert_eq!((said(1000, 0).len(), said(600, 400).len()), (0, 0));
        assert!(said(600, 300)[0].contains("was not kept"));
    }
}
