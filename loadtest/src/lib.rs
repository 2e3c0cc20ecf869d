//! The load harness: scenarios that drive servers started as processes, and the checker that judges what the clients saw.
//!
//! [`checker`] stands alone: the deterministic simulation uses it too. Everything else is the `loadtest` command. The harness
//! links no server: what it measures is a process of its own, so that CPU and memory of server and generator are told apart, and
//! a crash of the server is a real one.

pub mod checker;

mod bench;
mod ceiling;
mod control;
mod crowd;
mod driver;
mod html;
mod load;
mod measure;
mod options;
mod output;
mod peer;
mod report;
mod scenario;
mod server;
mod stream;
mod suite;
mod timeline;
mod usage;
mod wire;

use std::{io::Write as _, process::ExitCode};

use anyhow::Context as _;

pub use self::options::Options;
use self::{
    options::{Common, Scenario},
    report::Report,
};

/// Runs what was asked for; the process's exit code.
pub fn main(options: Options) -> ExitCode {
    match run(options) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "loadtest: {error:#}");
            ExitCode::from(if usage::is_usage(&error) { 2 } else { 1 })
        }
    }
}

fn run(options: Options) -> anyhow::Result<u8> {
    if let Scenario::CeilingServer { ack, message, log } = options.scenario {
        ceiling::serve(ceiling::RouterOptions { ack_bytes: ack, message_bytes: message, log })?;
        return Ok(0);
    }
    if let Scenario::FloodClient { kind, address, udp, rate, admitted } = options.scenario {
        scenario::flood::attack(kind, &address, udp.as_deref(), rate, admitted)?;
        return Ok(0);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            biased;
            // Dropping the scenario kills the server that it started.
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
            _ = terminate.recv() => anyhow::bail!("terminated"),
            code = run_scenario(options.scenario) => code,
        }
    })
}

async fn run_scenario(scenario: Scenario) -> anyhow::Result<u8> {
    if let Scenario::IdleClients(common) = &scenario {
        return scenario::idle::clients(common).await.map(|()| 0);
    }
    let common = scenario.common().cloned().context("this scenario has no report")?;
    scenario::check::options(&scenario)?;
    output::check(&common)?;
    scenario::check::programs(&scenario)?;
    let (report, reports, code) = match &scenario {
        Scenario::Suite { common, quick } => {
            let (reports, code) = run_suite(common, *quick).await;
            (suite::report(common, reports.clone(), code), reports, code)
        }
        _ => {
            let (report, code) = run_repeatedly(&scenario, common.repeat).await?;
            (report.clone(), vec![report], code)
        }
    };
    let text = serde_json::to_string_pretty(&report)?;
    let title = format!("loadtest {}", report["scenario"].as_str().unwrap_or_default());
    let complete = output::write(&common, &text, || html::page(&title, &reports));
    Ok(if complete { code } else { code.max(1) })
}

/// The median of several runs, and the exit code.
async fn run_repeatedly(scenario: &Scenario, repeat: u32) -> anyhow::Result<(serde_json::Value, u8)> {
    let mut runs = Vec::new();
    for _ in 0..repeat {
        runs.push(run_once(scenario).await?);
    }
    let mut report = report::median(runs).context("nothing was run")?;
    let code = report.conclude();
    Ok((serde_json::to_value(&report)?, code))
}

/// Every step, also after one that failed; the worst exit code.
async fn run_suite(common: &Common, quick: bool) -> (Vec<serde_json::Value>, u8) {
    let steps = suite::steps(common, quick);
    let (count, mut reports, mut worst) = (steps.len(), Vec::new(), 0);
    for (number, step) in steps.iter().enumerate() {
        suite::announce(number + 1, count, step);
        // What is missing for one step keeps no other from being run. A step is a large future: not on the stack of its caller.
        let ready = scenario::check::options(&step.scenario).and_then(|()| scenario::check::programs(&step.scenario));
        let ran = match ready {
            Ok(()) => Box::pin(run_repeatedly(&step.scenario, common.repeat)).await,
            Err(missing) => Err(missing),
        };
        match ran {
            Ok((report, code)) => {
                reports.push(report);
                worst = worst.max(code);
            }
            Err(error) => {
                reports.push(suite::failed(step, &error));
                worst = worst.max(1);
            }
        }
    }
    (reports, worst)
}

async fn run_once(scenario: &Scenario) -> anyhow::Result<Report> {
    match scenario {
        Scenario::Ceiling { common, durable, workload } => scenario::ceiling::run(common, *durable, *workload).await,
        Scenario::Chat(common) => scenario::chat::run(common).await,
        Scenario::Curve(common) => scenario::curve::run(common).await,
        Scenario::Peer { common, name, workload } => scenario::peer::run(common, *name, *workload).await,
        Scenario::Fanout(common) => scenario::fanout::run(common).await,
        Scenario::Idle(common) => scenario::idle::run(common).await,
        Scenario::Crash { common, kills } => scenario::crash::run(common, *kills).await,
        Scenario::Soak { common, marks, settle, goal_back, wait_max } => {
            let settle = std::time::Duration::from_secs_f64(*settle);
            let bounds = scenario::soak::Bounds { settle, goal_back: *goal_back, wait_max: *wait_max };
            scenario::soak::run(common, *marks, bounds).await
        }
        Scenario::Connect(common) => scenario::connect::run(common).await,
        Scenario::Stall { common, slow_disk: true, .. } => scenario::outrun::run(common).await,
        Scenario::Stall { common, stalled, .. } => scenario::stall::run(common, *stalled).await,
        Scenario::Sync { common, conversations } => scenario::sync::run(common, *conversations).await,
        Scenario::Flood { common, flood_rate } => scenario::flood::run(common, *flood_rate).await,
        Scenario::Scale { common, tool } => scenario::scale::run(common, tool).await,
        Scenario::Suite { .. }
        | Scenario::IdleClients(_)
        | Scenario::CeilingServer { .. }
        | Scenario::FloodClient { .. } => anyhow::bail!("this has no report of its own"),
    }
}

impl Scenario {
    pub(crate) fn common(&self) -> Option<&Common> {
        match self {
            Scenario::Chat(common)
            | Scenario::Connect(common)
            | Scenario::Curve(common)
            | Scenario::Fanout(common)
            | Scenario::Idle(common)
            | Scenario::IdleClients(common)
            | Scenario::Scale { common, .. }
            | Scenario::Suite { common, .. }
            | Scenario::Stall { common, .. }
            | Scenario::Sync { common, .. }
            | Scenario::Flood { common, .. }
            | Scenario::Peer { common, .. } => Some(common),
            Scenario::Ceiling { common, .. } | Scenario::Crash { common, .. } | Scenario::Soak { common, .. } => {
                Some(common)
            }
            Scenario::CeilingServer { .. } | Scenario::FloodClient { .. } => None,
        }
    }
}
