//! Continuous load while the server is killed with SIGKILL and started again, in the middle of batches.
//!
//! Clients reconnect, sync, and repeat what was not acknowledged under the same client message id. At the end every history is
//! read back and judged. SIGKILL keeps the page cache: what this shows is recovery of the process, not of the machine.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::time::Instant;

use super::{ProgressLine, Target, chat::schedule, completed, fanout::create_group, judge, new_report, statistics};
use crate::{
    crowd::{Flow, LanePlan, Plan, SendPlan, With},
    load::{Load, LoadPlan, total},
    measure::Reading,
    options::Common,
    report::{Goal, Latencies, Report},
    server::ServerProcess,
    timeline::Timeline,
};

/// Pairs if the options do not say; both users of a pair send.
const PAIRS: usize = 8;
/// Members of the one group, all of whom send; of a larger one so many do.
pub const GROUP: usize = 6;
/// Between a restart and the next kill the clients must get somewhere: this many acks, at least.
const ACKS_BETWEEN_KILLS: u64 = 200;
/// The kill follows those acks after a random part of this, so that it falls anywhere in a batch.
const KILL_WITHIN: Duration = Duration::from_millis(60);
/// Progress that does not come within this is a failure of its own.
const PROGRESS_WITHIN: Duration = Duration::from_secs(60);
/// What the goal asks for: seconds until clients are served again.
const BACK_WITHIN: f64 = 5.0;
const SETTLE_WITHIN: Duration = Duration::from_secs(60);

/// One run.
pub async fn run(options: &Common, kills: u32) -> anyhow::Result<Report> {
    let mut target = Target::open(options).await?;
    let pairs = options.pair_count(PAIRS);
    let (plan, connections) = plan(&target, options, pairs, GROUP.min(2 * pairs)).await?;
    let load = Load::start(plan, target.endpoints.clone())?;
    let progress = ProgressLine::start("crash", Arc::clone(&load.progress));
    load.all_live(PROGRESS_WITHIN).await?;
    let before = Reading::take(&[]);
    let disk = target.disk().watch();
    load.switches.measuring.store(true, Ordering::Relaxed);
    load.switches.sending.store(true, Ordering::Relaxed);
    let timeline = Timeline::start(Arc::clone(&load.progress));
    let mut outages = Latencies::default();
    // A server that does not come back is what is looked for here: the run is judged all the same.
    let killed = kill_repeatedly(&mut target, &load, &timeline, kills, options.seed, &mut outages).await;
    load.switches.measuring.store(false, Ordering::Relaxed);
    load.switches.sending.store(false, Ordering::Relaxed);
    let usage = Reading::take(&[]).since(&before);
    let (acknowledged, flushes) = (total(&load.progress.acknowledged), disk.until_now());
    let ending = load.ending(if killed.is_ok() { SETTLE_WITHIN } else { Duration::ZERO }).await;
    let recorded = timeline.finish();
    drop(progress);
    eprint!("{}", recorded.plot());
    let outcome = load.finish()?;
    let mut report = new_report("crash", &target, options);
    report.connections = connections;
    report.usage(&usage, options.threads());
    statistics(&mut report, &outcome.statistics, options, &usage);
    // Connections break at every kill: that is the test, not an error.
    report.error_causes = outcome.statistics.errors.clone();
    report.errors = report.error_causes.values().sum();
    report.flushed(&flushes, acknowledged);
    if let Err(error) = &killed {
        report.broke(format!("the server did not come back: {error:#}"));
    }
    completed(&mut report, ending, &outcome.statistics);
    let outages = outages.percentiles();
    if let serde_json::Value::Object(details) = &mut report.details {
        details.insert("kills".to_owned(), kills.into());
        details.insert("outage_us".to_owned(), serde_json::json!(outages));
        details.insert("timeline".to_owned(), serde_json::json!(recorded));
        details.insert("disconnects".to_owned(), serde_json::json!(outcome.statistics.disconnects));
    }
    judge(&target, options, outcome, &mut report).await;
    report.reasons.push(POWER_LOSS.to_owned());
    if killed.is_ok() {
        let (what, longest) = ("from SIGKILL to the first ack after it, the longest, s", outages.max as f64 / 1e6);
        report.goals.push(Goal::at_most("PF12", what, BACK_WITHIN, longest));
    }
    // Killed instead of drained, the server had nothing to say; its end after the run is not judged here.
    target.close(&mut report).await?;
    Ok(report)
}

/// What the kills do not show, and what does. A test holds the seeds against the tests that have them.
const POWER_LOSS: &str = "SIGKILL keeps the page cache: power loss is shown by `cargo test -p im-storage power_failure`, over a file \
     layer that drops what was not synced, with the seeds 0..32 and 100..103";

/// Pairs in both directions, and one group. Members of the group beyond the users of the pairs only receive.
pub async fn plan(target: &Target, options: &Common, pairs: usize, group: usize) -> anyhow::Result<(LoadPlan, usize)> {
    let members: Vec<String> = (0..group).map(|index| target.user(index)).collect();
    let conversation = create_group(target, &members).await?;
    let senders = group.min(2 * pairs).min(GROUP);
    // Several lanes share the session's limit of un-acknowledged sends.
    let window = options.window.min(64);
    let lanes = 2 * pairs + senders;
    let mut flows = Vec::new();
    let mut sends = |receivers: usize| {
        let every = schedule(options.rate, flows.len(), lanes);
        flows.push(Flow::new(receivers));
        let flow = u32::try_from(flows.len() - 1).unwrap_or(u32::MAX);
        Some(SendPlan { flow, window, body_bytes: options.body, every })
    };
    let mut threads: Vec<Vec<Plan>> = (0..options.threads()).map(|_| Vec::new()).collect();
    let clients = group.max(2 * pairs);
    let reads_every = (options.reads > 0.0).then(|| (clients as f64 * 1e6 / options.reads) as u64);
    for index in 0..clients {
        let user = target.user(index);
        let mut lanes = Vec::new();
        if index < 2 * pairs {
            lanes.push(LanePlan { with: With::Peer(target.user(index ^ 1)), sends: sends(1) });
        }
        if index < members.len() {
            let sends = if index < senders { sends(members.len() - 1) } else { None };
            lanes.push(LanePlan { with: With::Conversation(conversation), sends });
        }
        threads[index / 2 % options.threads()].push(Plan {
            token: target.token(&user)?,
            user,
            lanes,
            stalls: false,
            reads_every,
        });
    }
    let plan = LoadPlan {
        transport: target.transport,
        threads,
        flows,
        open_loop: options.rate.is_some(),
        reconnect: true,
        pin: options.pin,
    };
    Ok((plan, clients))
}

/// Kills and restarts, and records for each kill how long it took from the kill to the first ack after it.
async fn kill_repeatedly(
    target: &mut Target,
    load: &Load,
    timeline: &Timeline,
    kills: u32,
    seed: u64,
    outages: &mut Latencies,
) -> anyhow::Result<()> {
    let mut random = seed | 1;
    wait_for(target, load, ACKS_BETWEEN_KILLS).await?;
    for kill in 1..=kills {
        // xorshift: any spread will do, as long as the seed decides it.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        tokio::time::sleep(KILL_WITHIN * u32::try_from(random % 1000).unwrap_or(0) / 1000).await;
        let process = target.process.as_mut().context("there is no own server")?;
        let killed = Instant::now();
        timeline.mark("SIGKILL");
        process.kill().await?;
        process.restart().await.with_context(|| format!("restart after kill {kill}"))?;
        target.endpoints = process.endpoints(target.transport).await?;
        load.move_to(target.endpoints.clone());
        // What the killed server had sent may still be counted; published within this.
        let acknowledged = total(&load.progress.acknowledged);
        wait_for(target, load, acknowledged + 1).await.with_context(|| format!("after kill {kill}"))?;
        outages.record(u64::try_from(killed.elapsed().as_micros()).unwrap_or(u64::MAX));
        wait_for(target, load, acknowledged + ACKS_BETWEEN_KILLS)
            .await
            .with_context(|| format!("after kill {kill}"))?;
    }
    Ok(())
}

async fn wait_for(target: &mut Target, load: &Load, acknowledged: u64) -> anyhow::Result<()> {
    let deadline = Instant::now() + PROGRESS_WITHIN;
    while total(&load.progress.acknowledged) < acknowledged {
        if Instant::now() > deadline {
            let (live, open) = (total(&load.progress.live), total(&load.progress.unsettled));
            let log = target.process.as_ref().map(ServerProcess::log_tail).unwrap_or_default();
            bail!(
                "nothing is acknowledged for {PROGRESS_WITHIN:?}; {live} clients live, {open} things open; server:\n{log}"
            );
        }
        if let Some(process) = &mut target.process
            && !process.is_alive()
        {
            bail!("the server ended by itself:\n{}", process.log_tail());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::POWER_LOSS;

    #[test]
    fn the_report_names_the_seeds_of_the_power_loss_tests() {
        let source = include_str!("../../../storage/tests/durability.rs");
        let seeds: Vec<&str> = source
            .split("power_failure")
            .filter_map(|text| text.split_once("for seed in ")?.1.split_once(" {"))
            .map(|(range, _)| range)
            .collect();
        assert_eq!(seeds.len(), 2, "{seeds:?}");
        assert!(seeds.iter().all(|range| POWER_LOSS.contains(range)), "{seeds:?}");
    }
}
