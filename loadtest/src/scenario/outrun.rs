//! Senders who write more than the disk takes: what waits for it, in memory, against the arithmetic of the configured limits. PF11.
//!
//! Every sender keeps as many messages un-acknowledged as a session may, to users who are away, so that nothing but the disk makes them
//! wait. The rest of the memory of a store (what was written last, what is cached) is part of the sum: it fills up meanwhile.

use serde::Serialize;

use super::{LIVE_WITHIN, Target, judge, run_load_while, stall::bytes, threads_of};
use crate::{
    crowd::{Flow, LanePlan, Plan, SendPlan, With},
    load::{Load, LoadPlan},
    measure,
    options::Common,
    report::{Goal, Report, round},
    usage::usage,
};

/// Senders if the options do not say.
const SENDERS: usize = 32;
/// Bytes of text in a message if the options do not say more.
const BODY_BYTES: usize = 16 * 1024;
/// Of a message besides its text: ids, names, the places in which it waits.
const MESSAGE_BYTES: usize = 1024;
/// A message waits in the buffer that it came in, from which it is also written; that may have grown to twice of what is in it.
const BUFFER: u64 = 2;
/// The engine takes no write while four full memtables wait to be written out, besides the one that is filled.
const MEMTABLES: u64 = 5;

/// One part of the sum.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Part {
    what: String,
    bytes: u64,
}

/// One run.
pub async fn run(options: &Common) -> anyhow::Result<Report> {
    let senders = options.pair_count(SENDERS);
    let mut options = Common { rate: None, body: options.body.max(BODY_BYTES), ..options.clone() };
    let target = Target::open(&options).await?;
    let size = |key: &str| target.setting(key).and_then(|text| bytes(&text));
    let sum = sum(senders, options.body, &size)?;
    options.window = size("gateway.pending_sends_max").unwrap_or(options.window);
    let servers = target.pids();
    let load = Load::start(plan(&target, &options, senders)?, target.endpoints.clone())?;
    load.all_live(LIVE_WITHIN).await?;
    let before = measure::rss_bytes(&servers);
    let running = run_load_while(load, &target, &options, "stall-slow-disk", tokio::time::sleep(options.time()));
    let (peak, ended) = measure::peak_rss(&servers, running).await;
    let (mut report, outcome, ()) = ended?;
    report.connections = senders;
    judge(&target, &options, outcome, &mut report).await;
    let (bound, growth) = (sum.iter().map(|part| part.bytes).sum::<u64>(), peak.saturating_sub(before));
    report.detail("body_bytes", options.body);
    report.detail("written_bytes_per_s", round(report.acked_per_s * options.body as f64));
    report.detail("server_rss_before_bytes", before);
    report.detail("server_rss_growth_bytes", growth);
    report.detail("memory_bound_bytes", bound);
    report.detail("memory_bound", &sum);
    let what = "growth of the server's memory while senders outrun the disk, bytes";
    report.goals.push(Goal::at_most("PF11", what, bound as f64, growth as f64));
    target.close(&mut report).await?;
    Ok(report)
}

/// What the configuration lets wait, part by part.
fn sum(senders: usize, body: usize, size: &dyn Fn(&str) -> Option<u64>) -> anyhow::Result<Vec<Part>> {
    let known =
        |key: &str| size(key).ok_or_else(|| usage(format!("this imd has no setting {key}: take that of this tree")));
    let part = |what: String, bytes: u64| Part { what, bytes };
    let pending = known("gateway.pending_sends_max")?;
    let waiting = senders as u64 * pending * (body + MESSAGE_BYTES) as u64;
    let sends = format!(
        "{senders} senders × gateway.pending_sends_max {pending} × ({body} bytes of text + {MESSAGE_BYTES}) × {BUFFER}"
    );
    // What is in the store's queue are the same buffers.
    let mut parts = vec![part(sends, waiting * BUFFER)];
    for (key, times) in [("store.group_bytes", 2), ("store.memtable_bytes", MEMTABLES), ("store.cache_bytes", 1)] {
        let each = known(key)?;
        parts.push(part(format!("{times} × {key} {each}"), each * times));
    }
    Ok(parts)
}

fn plan(target: &Target, options: &Common, senders: usize) -> anyhow::Result<LoadPlan> {
    let mut plans = Vec::with_capacity(senders);
    for sender in 0..senders {
        let user = target.user(sender);
        let sends =
            SendPlan { flow: u32::try_from(sender)?, window: options.window, body_bytes: options.body, every: None };
        let lane = LanePlan { with: With::Peer(format!("{user}-away")), sends: Some(sends) };
        plans.push(vec![Plan {
            token: target.token(&user)?,
            user,
            lanes: vec![lane],
            stalls: false,
            reads_every: None,
        }]);
    }
    Ok(LoadPlan {
        transport: target.transport,
        threads: threads_of(plans, options.threads()),
        // The receivers are away: an ack completes a message.
        flows: (0..senders).map(|_| Flow::new(0)).collect(),
        open_loop: false,
        reconnect: true,
        pin: options.pin,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_the_settings() {
        let size = |key: &str| match key {
            "gateway.pending_sends_max" => Some(10),
            "store.group_bytes" | "store.memtable_bytes" | "store.cache_bytes" => Some(100),
            _ => None,
        };
        let parts = sum(2, 0, &size).unwrap();
        let bytes: Vec<u64> = parts.iter().map(|part| part.bytes).collect();
        assert_eq!(bytes, [2 * 10 * 1024 * 2, 200, 500, 100]);
        assert!(parts[0].what.starts_with("2 senders × gateway.pending_sends_max 10"));
        assert!(sum(2, 0, &|_| None).unwrap_err().to_string().contains("no setting gateway.pending_sends_max"));
    }
}
