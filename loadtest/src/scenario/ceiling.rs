//! The ceiling as a report of its own.

use std::path::Path;

use crate::{
    ceiling::{Ceiling, Measurement, Workload},
    measure::Machine,
    options::Common,
    report::Report,
};

/// Connections and pairs if the options do not say.
const SIZE: usize = 100;

/// Echo, pairs and fan-out, or the one that was asked for.
pub async fn run(options: &Common, durable: bool, workload: Option<Workload>) -> anyhow::Result<Report> {
    let workloads = workload.map_or_else(|| vec![Workload::Echo, Workload::Pairs, Workload::Fanout], |one| vec![one]);
    let directory = options.data.clone().unwrap_or_else(std::env::temp_dir);
    let mut ceilings = Vec::new();
    for workload in workloads {
        let size = match workload {
            Workload::Echo | Workload::Idle => options.connections.unwrap_or(SIZE),
            Workload::Pairs => options.pair_count(SIZE),
            Workload::Fanout => options.members(),
        };
        let measurement = Measurement {
            workload,
            size,
            window: options.window,
            body_bytes: options.body,
            durable,
            directory: Some(directory.clone()),
            warmup: options.warmup(),
            time: options.time(),
            pin: workload != Workload::Idle,
            heartbeat: (workload == Workload::Idle).then(|| options.heartbeat()),
        };
        ceilings.push(measurement.run().await?);
    }
    Ok(report(options, &ceilings, durable, &directory))
}

/// The pairs are the report's own figures if they were measured, else the only workload.
fn report(options: &Common, ceilings: &[Ceiling], durable: bool, directory: &Path) -> Report {
    let Some(main) = ceilings.iter().find(|ceiling| ceiling.workload == Workload::Pairs).or(ceilings.first()) else {
        return Report::default();
    };
    let mut report = Report {
        scenario: if durable { "ceiling-durable" } else { "ceiling" }.to_owned(),
        connections: match main.workload {
            Workload::Echo | Workload::Idle => main.size,
            Workload::Pairs => 2 * main.size,
            Workload::Fanout => main.size + 1,
        },
        offered_per_s: main.acked_per_s,
        acked_per_s: main.acked_per_s,
        delivered_per_s: main.delivered_per_s,
        ack_us: main.ack_us,
        delivery_us: main.delivery_us,
        machine: Machine::describe(directory),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        parameters: options.parameters(),
        details: serde_json::json!({ "workloads": ceilings }),
        ..Report::default()
    };
    report.usage(&main.usage, 1);
    for ceiling in ceilings {
        if let Some(flushes) = &ceiling.flushes {
            report.flushed(flushes, ceiling.acknowledged);
        }
    }
    report.ceiling("itself", main.delivered_per_s);
    // The ceiling is one of machine and generator together: a full generator is part of it, not a fault of the run.
    report.generator_was_the_limit = false;
    report.verdict = "the ceiling of this machine with this generator".to_owned();
    report
}
