//! A peer as a report of its own, with the bare router beside it.

use std::time::Duration;

use super::{ceilings, ratios};
use crate::{
    ceiling::{Measurement, Workload},
    measure::Machine,
    options::Common,
    peer::{Peer, PeerFigures},
    report::Report,
};

/// Pairs if the options do not say.
const PAIRS: usize = 100;

/// Pairs, and the fan-out if it was asked for.
pub async fn run(options: &Common, peer: Peer, workload: Workload) -> anyhow::Result<Report> {
    let size = match workload {
        Workload::Fanout => options.members(),
        Workload::Pairs | Workload::Echo | Workload::Idle => options.pair_count(PAIRS),
    };
    let ceilings = ceilings(options, workload, size).await?;
    let figures = measure(options, peer, workload, size, options.time()).await?;
    let (directory, main) = (options.store_parent(), &figures.reached);
    let mut report = Report {
        scenario: format!("peer-{}", figures.name),
        connections: if workload == Workload::Fanout { size + 1 } else { 2 * size },
        offered_per_s: main.acked_per_s,
        acked_per_s: main.acked_per_s,
        delivered_per_s: main.delivered_per_s,
        ack_us: main.ack_us,
        delivery_us: main.delivery_us,
        machine: Machine::describe(&directory),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        server_version: figures.version.clone(),
        parameters: options.parameters(),
        ..Report::default()
    };
    report.usage(&main.usage, 1);
    report.details = serde_json::json!({ "peer": figures });
    ratios(&mut report, &ceilings, None);
    report.verdict = "what this peer reaches on this machine".to_owned();
    Ok(report)
}

/// A peer under the product's traffic.
pub async fn measure(
    options: &Common,
    peer: Peer,
    workload: Workload,
    size: usize,
    time: Duration,
) -> anyhow::Result<PeerFigures> {
    let directory = options.store_parent();
    let measurement = Measurement {
        workload,
        size,
        window: options.window,
        body_bytes: options.body,
        durable: peer == Peer::RedisStream,
        directory: Some(directory.clone()),
        warmup: options.warmup(),
        time,
        pin: false,
        heartbeat: None,
    };
    peer.measure(&measurement, &directory).await
}
