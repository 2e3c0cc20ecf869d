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

use super::{ProgressLine, Target, completed, crash, judge, new_report, statistics};
use crate::{
    crowd::Progress,
    load::{Load, total},
    measure::Reading,
    options::Common,
    report::{Goal, Report},
    timeline::Timeline,
    usage::usage,
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
    let Bounds { settle, goal_back, wait_max } = bounds;
    if options.server.is_empty() {
        return Err(usage(
            "soak needs a running cluster: name its gateways with --server; `loadtest crash` starts and kills its own server",
        ));
    }
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
    let ending = load.ending(settle).await;
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
    if let Some(seconds) = goal_back {
        let what = "from a fault until no conversation waits any more, the longest, s";
        report.goals.push(Goal::at_most("PF12", what, seconds, recorded.longest_outage()));
    }
    let longest = report.ack_us.max as f64 / 1e6;
    if let Some(seconds) = wait_max.filter(|seconds| longest > *seconds) {
        report.broke(format!("a send waited {longest:.1} s for its acknowledgement, {seconds} s are allowed"));
    }
    if let serde_json::Value::Object(details) = &mut report.details {
        details.insert("disconnects".to_owned(), serde_json::json!(outcome.statistics.disconnects));
        details.insert("settled_ms".to_owned(), serde_json::json!(settled_after.as_millis() as u64));
        details.insert("timeline".to_owned(), serde_json::json!(recorded));
    }
    judge(&target, options, outcome, &mut report).await;
    Ok(report)
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
