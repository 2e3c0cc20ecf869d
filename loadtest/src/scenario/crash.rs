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

use super::{ProgressLine, Target, chat::schedule, fanout::create_group, judge, new_report, statistics};
use crate::{
    crowd::{Flow, LanePlan, Plan, SendPlan, With},
    load::{Load, LoadPlan, total},
    measure::Reading,
    options::Common,
    report::{Goal, Latencies, Percentiles, Report},
    server::ServerProcess,
    timeline::Timeline,
};

/// Pairs if the options do not say; both users of a pair send.
const PAIRS: usize = 8;
/// Members of the one group, all of whom send.
const GROUP: usize = 6;
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
    if !options.server.is_empty() {
        bail!("crash kills the server, so it starts its own: leave out --server");
    }
    let mut target = Target::open(options).await?;
    let pairs = options.pair_count(PAIRS);
    let (plan, connections) = plan(&target, options, pairs).await?;
    let load = Load::start(plan, target.endpoints.clone())?;
    let progress = ProgressLine::start("crash", Arc::clone(&load.progress));
    load.all_live(PROGRESS_WITHIN).await?;
    let before = Reading::take(&[]);
    load.switches.measuring.store(true, Ordering::Relaxed);
    load.switches.sending.store(true, Ordering::Relaxed);
    let timeline = Timeline::start(Arc::clone(&load.progress));
    let outages = kill_repeatedly(&mut target, &load, &timeline, kills, options.seed).await?;
    load.switches.measuring.store(false, Ordering::Relaxed);
    load.switches.sending.store(false, Ordering::Relaxed);
    let usage = Reading::take(&[]).since(&before);
    let settled = load.settled(SETTLE_WITHIN).await;
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
    if !settled {
        *report.error_causes.entry("not settled after the last restart".to_owned()).or_default() += 1;
    }
    report.errors = report.error_causes.values().sum();
    if let serde_json::Value::Object(details) = &mut report.details {
        details.insert("kills".to_owned(), kills.into());
        details.insert("outage_us".to_owned(), serde_json::json!(outages));
        details.insert("timeline".to_owned(), serde_json::json!(recorded));
        details.insert("disconnects".to_owned(), serde_json::json!(outcome.statistics.disconnects));
    }
    judge(&target, options, outcome, &mut report).await?;
    report.reasons.push(POWER_LOSS.to_owned());
    let longest = outages.max as f64 / 1e6;
    report.goals.push(Goal::at_most(
        "PF12",
        "from SIGKILL to the first ack after it, the longest, s",
        BACK_WITHIN,
        longest,
    ));
    // Killed instead of drained, the server had nothing to say; its end after the run is not judged here.
    target.close(&mut report).await?;
    Ok(report)
}

/// What the kills do not show, and what does. A test holds the seeds against the tests that have them.
const POWER_LOSS: &str = "SIGKILL keeps the page cache: power loss is shown by `cargo test -p im-storage power_failure`, over a file \
     layer that drops what was not synced, with the seeds 0..32 and 100..103";

/// Pairs in both directions, and one group.
pub async fn plan(target: &Target, options: &Common, pairs: usize) -> anyhow::Result<(LoadPlan, usize)> {
    let members: Vec<String> = (0..(2 * pairs).min(GROUP)).map(|index| target.user(index)).collect();
    let group = create_group(target, &members).await?;
    // Several lanes share the session's limit of un-acknowledged sends.
    let window = options.window.min(64);
    let lanes = 2 * pairs + members.len();
    let mut flows = Vec::new();
    let mut sends = |receivers: usize| {
        let every = schedule(options.rate, flows.len(), lanes);
        flows.push(Flow::new(receivers));
        let flow = u32::try_from(flows.len() - 1).unwrap_or(u32::MAX);
        Some(SendPlan { flow, window, body_bytes: options.body, every })
    };
    let mut threads: Vec<Vec<Plan>> = (0..options.threads()).map(|_| Vec::new()).collect();
    for index in 0..2 * pairs {
        let user = target.user(index);
        let mut lanes = vec![LanePlan { with: With::Peer(target.user(index ^ 1)), sends: sends(1) }];
        if index < members.len() {
            lanes.push(LanePlan { with: With::Conversation(group), sends: sends(members.len() - 1) });
        }
        threads[index / 2 % options.threads()].push(Plan { token: target.token(&user)?, user, lanes, stalls: false });
    }
    let plan = LoadPlan {
        transport: target.transport,
        threads,
        flows,
        open_loop: options.rate.is_some(),
        reconnect: true,
        pin: options.pin,
    };
    Ok((plan, 2 * pairs))
}

/// Kills and restarts; for each kill how long it took from the kill to the first ack after it.
async fn kill_repeatedly(
    target: &mut Target,
    load: &Load,
    timeline: &Timeline,
    kills: u32,
    seed: u64,
) -> anyhow::Result<Percentiles> {
    let mut outages = Latencies::default();
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
    Ok(outages.percentiles())
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
