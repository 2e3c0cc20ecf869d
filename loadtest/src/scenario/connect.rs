//! Connect, authenticate, welcome, and away again. PF5.
//!
//! Each of several lanes does it one after the other with users of its own. A connection ends with a reset right after its welcome,
//! so the server's figure has the end of the session in it too.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde::Serialize;
use tokio::{task::LocalSet, time::Instant};

use super::{Target, new_report};
use crate::{
    control::Control,
    measure::{Reading, Usage},
    options::Common,
    report::{Goal, Latencies, Percentiles, Report, round},
    stream::{Connector, Transport},
};

/// Connections being opened at once by one thread.
const LANES: usize = 32;
/// Users; each comes again only after all others did.
const USERS: usize = 4096;
/// More failures than this of one lane end it.
const FAILURES_MAX: u32 = 100;

/// What one kind of handshake reached.
#[derive(Clone, Debug, Serialize)]
struct Phase {
    handshake: &'static str,
    connects_per_s: f64,
    connects_per_server_core_s: f64,
    server_cpu_us: f64,
    /// From the first packet to the welcome.
    connect_us: Percentiles,
    /// TLS only: connections that resumed a session.
    resumed: Option<u64>,
    failed: u64,
    usage: Usage,
}

/// What the threads share.
struct Attempt {
    transport: Transport,
    ca: Option<PathBuf>,
    addresses: Vec<String>,
    tokens: Vec<String>,
    next: AtomicUsize,
    resume: bool,
    measuring: AtomicBool,
    ending: AtomicBool,
}

#[derive(Default)]
struct Counts {
    done: u64,
    failed: u64,
    resumed: u64,
    latencies: Latencies,
    failure: Option<String>,
}

/// One run.
pub async fn run(options: &Common) -> anyhow::Result<Report> {
    // Handshakes are all there is here: they may have the whole machine.
    let options = Common { also_raised: vec!["gateway.handshake_cpu_percent=100".to_owned()], ..options.clone() };
    let target = Target::open(&options).await?;
    let mut report = new_report("connect", &target, &options);
    let kinds: &[(&'static str, bool)] = match target.transport {
        Transport::Tcp => &[("none", false)],
        Transport::Tls | Transport::Quic => &[("full", false), ("resumed", true)],
    };
    let mut phases = Vec::new();
    for (handshake, resume) in kinds {
        let phase = phase(&target, &options, handshake, *resume, &mut report).await?;
        report.goals.extend(goal(target.transport, &phase));
        phases.push(phase);
    }
    // The full handshake is the report's own figure.
    if let Some(main) = phases.first() {
        report.usage(&main.usage, options.threads());
        report.connections = LANES * options.threads();
        report.offered_per_s = main.connects_per_s;
        report.acked_per_s = main.connects_per_s;
        report.delivered_per_s = main.connects_per_s;
        (report.ack_us, report.delivery_us) = (main.connect_us, main.connect_us);
    }
    report.errors = phases.iter().map(|phase| phase.failed).sum();
    report.detail("phases", &phases);
    target.close(&mut report).await?;
    Ok(report)
}

fn goal(transport: Transport, phase: &Phase) -> Option<Goal> {
    let wanted = match (transport, phase.handshake) {
        (Transport::Tcp, _) => 10_000.0,
        (Transport::Tls, "full") => 2_000.0,
        _ => return None,
    };
    let what = format!("connect, authenticate and welcome a second and server core, {transport:?}");
    Some(Goal::at_least("PF5", &what, wanted, phase.connects_per_server_core_s))
}

async fn phase(
    target: &Target,
    options: &Common,
    handshake: &'static str,
    resume: bool,
    report: &mut Report,
) -> anyhow::Result<Phase> {
    let tokens: anyhow::Result<Vec<String>> = (0..USERS).map(|index| target.token(&target.user(index))).collect();
    let attempt = Arc::new(Attempt {
        transport: target.transport,
        ca: target.endpoints.ca.clone(),
        addresses: target.endpoints.addresses.clone(),
        tokens: tokens?,
        next: AtomicUsize::new(0),
        resume,
        measuring: AtomicBool::new(false),
        ending: AtomicBool::new(false),
    });
    let threads: Vec<_> = (0..options.threads())
        .map(|_| {
            let attempt = Arc::clone(&attempt);
            std::thread::spawn(move || attempt.thread())
        })
        .collect();
    tokio::time::sleep(options.warmup()).await;
    let servers = target.pids();
    let before = Reading::take(&servers);
    attempt.measuring.store(true, Ordering::Relaxed);
    tokio::time::sleep(options.time()).await;
    attempt.measuring.store(false, Ordering::Relaxed);
    let usage = Reading::take(&servers).since(&before);
    attempt.ending.store(true, Ordering::Relaxed);
    let mut counts = Counts::default();
    for thread in threads {
        counts.add(thread.join().map_err(|_| anyhow::anyhow!("a generator thread panicked"))??);
    }
    if let Some(failure) = counts.failure {
        *report.error_causes.entry(failure).or_default() += counts.failed;
    }
    let per_s = counts.done as f64 / usage.seconds.max(1e-9);
    let server_seconds = usage.server_cores * usage.seconds;
    Ok(Phase {
        handshake,
        connects_per_s: round(per_s),
        connects_per_server_core_s: round(counts.done as f64 / server_seconds.max(1e-3)),
        server_cpu_us: round(server_seconds * 1e6 / counts.done.max(1) as f64),
        connect_us: counts.latencies.percentiles(),
        resumed: (target.transport == Transport::Tls).then_some(counts.resumed),
        failed: counts.failed,
        usage,
    })
}

impl Attempt {
    fn thread(self: &Arc<Self>) -> anyhow::Result<Counts> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, async {
            let mut lanes = tokio::task::JoinSet::new();
            for _ in 0..LANES {
                let attempt = Arc::clone(self);
                lanes.spawn_local(async move { attempt.lane().await });
            }
            let mut counts = Counts::default();
            while let Some(lane) = lanes.join_next().await {
                counts.add(lane??);
            }
            Ok(counts)
        })
    }

    /// One connection after the other. A connector of its own, so that its tickets are its own.
    async fn lane(&self) -> anyhow::Result<Counts> {
        let connector = Connector::with_resumption(self.transport, self.ca.as_deref().map(Path::new), self.resume)?;
        let mut counts = Counts::default();
        let mut failures = 0;
        while !self.ending.load(Ordering::Relaxed) && failures < FAILURES_MAX {
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            let address = &self.addresses[turn % self.addresses.len()];
            let begun = Instant::now();
            match Control::connect(&connector, address, self.tokens[turn % self.tokens.len()].clone()).await {
                Ok(control) if self.measuring.load(Ordering::Relaxed) => {
                    counts.done += 1;
                    counts.resumed += u64::from(control.resumed() == Some(true));
                    counts.latencies.record(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX));
                }
                Ok(_) => {}
                Err(error) => {
                    failures += 1;
                    counts.failed += 1;
                    counts.failure = Some(format!("{error:#}"));
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
        Ok(counts)
    }
}

impl Counts {
    fn add(&mut self, other: Counts) {
        self.done += other.done;
        self.failed += other.failed;
        self.resumed += other.resumed;
        self.latencies.add(&other.latencies);
        self.failure = self.failure.take().or(other.failure);
    }
}
