//! Authenticated connections that do nothing but answer heartbeats. PF4.

use std::{sync::Arc, time::Duration};

use super::{ProgressLine, Target, new_report, statistics};
use crate::{
    crowd::Plan,
    load::{Load, LoadPlan},
    measure::{self, Reading},
    options::Common,
    report::{Report, round},
};

/// Connections if the options do not say.
const CONNECTIONS: usize = 10_000;
/// A session each second is far below what any server does: the limit is for one that hangs.
const LIVE_WITHIN: Duration = Duration::from_secs(300);
/// Descriptors that client and server need besides their connections.
const SPARE_DESCRIPTORS: u64 = 100;

/// One run.
pub async fn run(options: &Common) -> anyhow::Result<Report> {
    let target = Target::open(options).await?;
    let mut report = new_report("idle", &target, options);
    let wanted = options.connections.unwrap_or(CONNECTIONS).max(1);
    let room = report.machine.descriptors_max.saturating_sub(SPARE_DESCRIPTORS);
    let connections = wanted.min(usize::try_from(room).unwrap_or(usize::MAX));
    if connections < wanted {
        report.reasons.push(format!("{connections} connections instead of {wanted}: the limit of descriptors"));
    }
    let plan = plan(&target, options, connections)?;
    let servers = target.pids();
    // After the tokens were signed: what the harness itself takes does not matter, the server's growth does.
    let server_before = measure::rss_bytes(&servers);
    let slab_before = measure::slab_bytes();
    let began = Reading::take(&servers);
    let load = Load::start(plan, target.endpoints.clone())?;
    let progress = ProgressLine::start("idle", Arc::clone(&load.progress));
    load.all_live(LIVE_WITHIN).await?;
    let connecting = Reading::take(&servers).since(&began);
    let at_once = measure::rss_bytes(&servers);
    let began = Reading::take(&servers);
    tokio::time::sleep(options.time()).await;
    let usage = Reading::take(&servers).since(&began);
    let server_after = measure::rss_bytes(&servers);
    let slab_after = measure::slab_bytes();
    drop(progress);
    let outcome = load.finish()?;
    report.connections = connections;
    report.usage(&usage, options.threads());
    statistics(&mut report, &outcome.statistics, options, &usage);
    let a_connection = |after: u64, before: u64| round(after.saturating_sub(before) as f64 / connections as f64);
    report.server.rss_bytes = server_after;
    report.server.rss_bytes_per_connection = a_connection(server_after, server_before);
    report.details = serde_json::json!({
        "server_rss_before_bytes": server_before,
        "rss_bytes_per_connection_when_the_last_had_its_session": a_connection(at_once, server_before),
        "kernel_slab_bytes_per_connection_both_ends": a_connection(slab_after, slab_before),
        "connect_per_s": round(connections as f64 / connecting.seconds),
        "connecting": connecting,
        "server_cpu_us_per_connect": round(connecting.server_cores * connecting.seconds * 1e6 / connections as f64),
        "held_seconds": options.seconds,
    });
    target.close(&mut report).await?;
    Ok(report)
}

fn plan(target: &Target, options: &Common, connections: usize) -> anyhow::Result<LoadPlan> {
    let mut threads: Vec<Vec<Plan>> = (0..options.threads()).map(|_| Vec::new()).collect();
    for index in 0..connections {
        let user = target.user(index);
        let token = target.token(&user)?;
        threads[index % options.threads()].push(Plan { user, token, lanes: Vec::new(), stalls: false });
    }
    Ok(LoadPlan {
        transport: target.transport,
        threads,
        flows: Vec::new(),
        open_loop: false,
        reconnect: false,
        pin: options.pin,
    })
}
