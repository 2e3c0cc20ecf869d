//! What all scenarios share: the server, the measured time, the reading back, the report.

pub mod ceiling;
pub mod chat;
pub mod check;
pub mod connect;
pub mod crash;
pub mod curve;
pub mod fanout;
pub mod fill;
pub mod flood;
pub mod idle;
pub mod outrun;
pub mod peer;
pub mod scale;
pub mod soak;
pub mod stall;
pub mod sync;

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::Context as _;
use im_proto::ConversationId;

use crate::{
    ceiling::{Ceiling, Measurement, Workload},
    checker::{Entry, History},
    control::Control,
    crowd::{Progress, Statistics},
    load::{Ending, Load, Outcome, total},
    measure::{self, Disk, Machine, Reading, Usage},
    options::Common,
    peer::PeerFigures,
    report::{Report, round},
    server::{Credentials, Endpoints, ServerProcess, SpawnOptions},
    stream::{Connector, Transport},
    timeline::Timeline,
    usage::usage,
};

/// Sessions of this many clients must be there within a minute, however slow the machine.
const LIVE_WITHIN: Duration = Duration::from_secs(120);
/// A machine that is busy otherwise may need this long for the first message of the measured time.
const ANYTHING_WITHIN: Duration = Duration::from_secs(30);
/// After the load everything on its way must arrive within this.
const SETTLE_WITHIN: Duration = Duration::from_secs(30);
/// Histories read back at once.
const READERS: usize = 8;

/// The server of a run.
pub struct Target {
    pub process: Option<ServerProcess>,
    pub transport: Transport,
    pub endpoints: Endpoints,
    pub credentials: Credentials,
    pids: Vec<u32>,
    /// In the names of all users, so that runs on one server do not meet.
    run: String,
    /// Loads of this run so far; each has users of its own.
    loads: usize,
}

impl Target {
    /// Starts a server, or takes the one that the options name.
    pub async fn open(options: &Common) -> anyhow::Result<Self> {
        let run = run_name();
        if options.server.is_empty() {
            let spawn = SpawnOptions {
                binary: options.imd.clone(),
                data: options.data.clone(),
                config: options.config.clone(),
                settings: options.settings(),
                raised: options.raised(),
            };
            let mut process = ServerProcess::spawn(spawn).await?;
            let endpoints = process.endpoints(options.transport).await?;
            let (credentials, pids) = (process.credentials()?, Vec::new());
            let transport = options.transport;
            let mut target = Self { process: Some(process), transport, endpoints, credentials, pids, run, loads: 0 };
            if options.fill > 0 {
                fill::fill(&mut target, options).await?;
            }
            return Ok(target);
        }
        let (transport, addresses, credentials) = running(options)?;
        Ok(Self {
            process: None,
            transport,
            endpoints: Endpoints { addresses, ca: options.ca.clone(), version: String::new() },
            credentials,
            pids: options.server_pid.clone(),
            run,
            loads: 0,
        })
    }

    /// The name of one user of the present load.
    pub fn user(&self, index: usize) -> String {
        if self.loads == 0 { format!("{}-{index}", self.run) } else { format!("{}-{}-{index}", self.run, self.loads) }
    }

    /// From now on other users.
    pub fn next_users(&mut self) {
        self.loads += 1;
    }

    /// A token for a user's only device.
    pub fn token(&self, user: &str) -> anyhow::Result<String> {
        self.credentials.token(user, "load")
    }

    /// The server's processes, as far as they run on this machine and are known.
    pub fn pids(&self) -> Vec<u32> {
        self.process.as_ref().map_or_else(|| self.pids.clone(), |process| process.pid().into_iter().collect())
    }

    /// A connection for one call after the other.
    pub async fn control(&self, user: &str, device: &str) -> anyhow::Result<Control> {
        let connector = Connector::new(self.transport, self.endpoints.ca.as_deref())?;
        self.reach(&connector, &self.credentials.token(user, device)?).await
    }

    /// A connection to the first server that takes one.
    async fn reach(&self, connector: &Connector, token: &str) -> anyhow::Result<Control> {
        let mut failed = None;
        for address in &self.endpoints.addresses {
            match Control::connect(connector, address, token.to_owned()).await {
                Ok(control) => return Ok(control),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(|| anyhow::anyhow!("no server is known")))
    }

    /// Reads every conversation back, for the checker to judge.
    pub async fn read_back(
        &self,
        history: &mut History,
        readers: &BTreeMap<ConversationId, String>,
    ) -> anyhow::Result<()> {
        let connector = Connector::new(self.transport, self.endpoints.ca.as_deref())?;
        let all: Vec<(&ConversationId, &String)> = readers.iter().collect();
        for some in all.chunks(READERS) {
            // Cooperative on one thread: the checker takes entries as pages come, whatever their order.
            let recorder = std::cell::RefCell::new(&mut *history);
            // A device of its own for each: one user may read several conversations at once.
            let reads = some.iter().enumerate().map(|(reader, (id, user))| {
                self.read_one(&connector, &recorder, **id, (user.as_str(), format!("reader-{reader}")))
            });
            futures::future::try_join_all(reads).await?;
        }
        Ok(())
    }

    async fn read_one(
        &self,
        connector: &Connector,
        recorder: &std::cell::RefCell<&mut History>,
        id: ConversationId,
        (user, device): (&str, String),
    ) -> anyhow::Result<()> {
        let token = self.credentials.token(user, &device)?;
        let mut control = self.reach(connector, &token).await?;
        let conversation = recorder.borrow_mut().conversation(id);
        let head = control
            .read_history(id, |message| recorder.borrow_mut().stored(conversation, Entry::from(message)))
            .await
            .with_context(|| format!("read the history of {id}"))?;
        recorder.borrow_mut().stored_through(conversation, head);
        Ok(())
    }

    /// Ends a server that was started here.
    pub async fn close(self, report: &mut Report) -> anyhow::Result<()> {
        let Some(process) = self.process else { return Ok(()) };
        if !process.stop().await? {
            report.reasons.push("the server did not drain and exit with 0 on SIGTERM within 30 s".to_owned());
        }
        Ok(())
    }

    /// A setting of a server that was started here, as its configuration writes it.
    pub fn setting(&self, key: &str) -> Option<String> {
        self.process.as_ref()?.setting(key)
    }

    /// The disk of the data of a server that was started here.
    pub fn disk(&self) -> Disk {
        let elsewhere = || Disk::unknown("the data directory of a server that runs already is not known");
        self.process.as_ref().map_or_else(elsewhere, |process| Disk::of(process.directory()))
    }

    /// Where the data lies, for the description of the machine.
    pub fn directory(&self) -> PathBuf {
        self.process.as_ref().map_or_else(std::env::temp_dir, |process| process.directory().to_owned())
    }
}

/// How to reach the server that runs already, and what signs tokens for it.
fn running(options: &Common) -> anyhow::Result<(Transport, Vec<String>, Credentials)> {
    let mut transport = None;
    let mut addresses = Vec::new();
    for url in &options.server {
        let (scheme, address) =
            url.split_once("://").ok_or_else(|| usage(format!("--server {url}: that is no scheme://host:port")))?;
        let scheme = match scheme {
            "tcp" => Transport::Tcp,
            "tls" => Transport::Tls,
            "quic" => Transport::Quic,
            _ => return Err(usage(format!("--server {url}: the scheme is tcp, tls or quic"))),
        };
        if transport.is_some_and(|transport| transport != scheme) {
            return Err(usage(format!("--server {url}: all servers of a run have the same scheme")));
        }
        transport = Some(scheme);
        addresses.push(address.to_owned());
    }
    let transport = transport.unwrap_or_default();
    if transport != Transport::Tcp && options.ca.is_none() {
        return Err(usage("TLS and QUIC need --ca FILE, the certificate authority of the server"));
    }
    let key = options.key.as_deref().ok_or_else(|| usage("--server needs --key FILE"))?;
    let cluster = options.cluster.clone().unwrap_or_else(|| Credentials::cluster_beside(key));
    Ok((transport, addresses, Credentials::load(key, &cluster)?))
}

fn run_name() -> String {
    format!("l{:x}", (measure::unix_time().as_millis() as u64 ^ u64::from(std::process::id()) << 20) & 0xff_ffff_ffff)
}

/// Users `first..` of a run, each with its token, spread over threads so that what belongs together stays together.
pub fn threads_of<T>(groups: Vec<Vec<T>>, threads: usize) -> Vec<Vec<T>> {
    let mut spread: Vec<Vec<T>> = (0..threads.max(1)).map(|_| Vec::new()).collect();
    for (number, group) in groups.into_iter().enumerate() {
        spread[number % threads.max(1)].extend(group);
    }
    spread
}

/// Warm-up, the measured time as long as `meanwhile` takes, and the end of sending.
pub async fn measured<T>(
    load: &Load,
    options: &Common,
    servers: &[u32],
    meanwhile: impl Future<Output = T>,
) -> (Usage, T) {
    load.switches.sending.store(true, Ordering::Relaxed);
    tokio::time::sleep(options.warmup()).await;
    let before = Reading::take(servers);
    load.switches.measuring.store(true, Ordering::Relaxed);
    let acknowledged = total(&load.progress.acknowledged);
    let given = meanwhile.await;
    // A time in which nothing happened says nothing: it goes on until something does.
    let deadline = tokio::time::Instant::now() + ANYTHING_WITHIN;
    while total(&load.progress.acknowledged) == acknowledged && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    load.switches.measuring.store(false, Ordering::Relaxed);
    let usage = Reading::take(servers).since(&before);
    load.switches.sending.store(false, Ordering::Relaxed);
    (usage, given)
}

/// Runs a load to its end: live, measured, settled; the report with everything but the judgement of the histories.
pub async fn run_load(
    load: Load,
    target: &Target,
    options: &Common,
    scenario: &str,
) -> anyhow::Result<(Report, Outcome)> {
    let (report, outcome, ()) =
        run_load_while(load, target, options, scenario, tokio::time::sleep(options.time())).await?;
    Ok((report, outcome))
}

/// The same, measured as long as `meanwhile` takes.
pub async fn run_load_while<T>(
    load: Load,
    target: &Target,
    options: &Common,
    scenario: &str,
    meanwhile: impl Future<Output = T>,
) -> anyhow::Result<(Report, Outcome, T)> {
    let progress = ProgressLine::start(scenario, Arc::clone(&load.progress));
    load.all_live(LIVE_WITHIN).await?;
    let timeline = Timeline::start(Arc::clone(&load.progress));
    let servers = target.pids();
    let disk = target.disk().watch();
    let (usage, given) = measured(&load, options, &servers, meanwhile).await;
    // In this order: what was acknowledged by now was on disk before.
    let (acknowledged, flushes) = (total(&load.progress.acknowledged), disk.until_now());
    let recorded = timeline.finish();
    let rss = measure::rss_bytes(&servers);
    let ending = load.ending(SETTLE_WITHIN).await;
    drop(progress);
    let outcome = load.finish()?;
    let mut report = new_report(scenario, target, options);
    report.server.rss_bytes = rss;
    report.usage(&usage, options.threads());
    statistics(&mut report, &outcome.statistics, options, &usage);
    report.detail("timeline", &recorded);
    kept_up(&mut report, &outcome.statistics, 0, options, &usage);
    if target.process.is_some() {
        report.flushed(&flushes, acknowledged);
    }
    completed(&mut report, ending, &outcome.statistics);
    Ok((report, outcome, given))
}

/// What was begun and did not come to its end is a broken promise; what was tried again and then did is an error at most.
pub fn completed(report: &mut Report, ending: Ending, statistics: &Statistics) {
    let Ending { settled, open, live, expected, within } = ending;
    if !settled {
        let what = format!(
            "not settled within {within:?} after the last send: {open} sends, gaps, calls or sessions are open"
        );
        report.broke(what);
    }
    if live < expected {
        report.broke(format!("only {live} of {expected} clients have a session at the end"));
    }
    if statistics.refused > 0 {
        report.broke(format!("{} sends were refused for good", statistics.refused));
    }
}

/// The report's head.
pub fn new_report(scenario: &str, target: &Target, options: &Common) -> Report {
    Report {
        scenario: scenario.to_owned(),
        transport: target.transport,
        machine: Machine::describe(&target.directory()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        server_version: target.endpoints.version.clone(),
        parameters: options.parameters(),
        server_settings: target.process.as_ref().map(|process| process.settings().to_vec()).unwrap_or_default(),
        ..Report::default()
    }
}

/// Rates, latencies and errors.
pub fn statistics(report: &mut Report, statistics: &Statistics, options: &Common, usage: &Usage) {
    let per_s = |count: u64| round(count as f64 / usage.seconds.max(1e-9));
    report.offered_per_s = options.rate.unwrap_or_else(|| per_s(statistics.begun));
    report.acked_per_s = per_s(statistics.acknowledged);
    report.delivered_per_s = per_s(statistics.delivered);
    report.ack_us = statistics.delays.ack.percentiles();
    report.delivery_us = statistics.delays.delivery.percentiles();
    report.error_causes = statistics.errors.clone();
    for (cause, count) in &statistics.disconnects {
        *report.error_causes.entry(cause.clone()).or_default() += count;
    }
    report.errors = report.error_causes.values().sum();
    report.details = serde_json::json!({
        "retries": statistics.retries, "redelivered": statistics.redelivered,
        "history_reads": statistics.gaps_repaired, "resyncs": statistics.resyncs, "reconnects": statistics.reconnects,
        "reads": statistics.reads,
    });
}

/// Reads back and judges.
pub async fn judge(target: &Target, options: &Common, outcome: Outcome, report: &mut Report) {
    let Outcome { mut history, readers, .. } = outcome;
    if options.no_read_back {
        report.not_read_back();
    } else if let Err(error) = target.read_back(&mut history, &readers).await {
        report.broke(format!("the histories cannot be read back: {error:#}"));
    }
    report.judged(history.judge());
}

/// The two denominators of a workload, measured now; none if the options do not want them.
pub async fn ceilings(options: &Common, workload: Workload, size: usize) -> anyhow::Result<Vec<Ceiling>> {
    let mut ceilings = Vec::new();
    if options.ceiling <= 0.0 {
        return Ok(ceilings);
    }
    for durable in [false, true] {
        let measurement = Measurement {
            workload,
            size,
            window: options.window,
            body_bytes: options.body,
            durable,
            directory: Some(options.store_parent()),
            warmup: Duration::from_secs(1),
            time: Duration::from_secs_f64(options.ceiling),
            pin: true,
            heartbeat: None,
        };
        ceilings.push(measurement.run().await?);
    }
    Ok(ceilings)
}

/// Open loop: says so if the schedule was not kept. So many more sends than were begun were none of the generator's business.
fn kept_up(report: &mut Report, statistics: &Statistics, excused: u64, options: &Common, usage: &Usage) {
    let Some(rate) = options.rate else { return };
    let begun = statistics.begun as f64 / usage.seconds.max(1e-9);
    report.detail("begun_per_s", round(begun));
    if begun + excused as f64 / usage.seconds.max(1e-9) < rate * 0.98 {
        report.reasons.push(format!(
            "the schedule was not kept: {begun:.0} of {rate:.0} sends a second could be begun, what waited longer than the run is \
             in no percentile"
        ));
    }
}

/// What was reached as a share of everything that was measured in the same run. The denominator of `ratio` is the peer if there is
/// one, else the bare router.
pub fn ratios(report: &mut Report, ceilings: &[Ceiling], peer: Option<&PeerFigures>) {
    let reached = report.delivered_per_s;
    let mut denominators: Vec<(String, f64)> = Vec::new();
    if let Some(peer) = peer {
        denominators.push((format!("peer {}", peer.name), peer.reached.delivered_per_s));
        report.detail("peer", peer);
    }
    for ceiling in ceilings {
        let name = if ceiling.durable { "durable ceiling" } else { "ceiling" };
        denominators.push((name.to_owned(), ceiling.delivered_per_s));
    }
    if !ceilings.is_empty() {
        report.detail("ceilings", ceilings);
    }
    let Some((name, per_s)) = denominators.first() else { return };
    report.ceiling(name, *per_s);
    let ratios: BTreeMap<&String, f64> =
        denominators.iter().map(|(name, per_s)| (name, round(reached / per_s.max(1.0)))).collect();
    report.detail("ratios", ratios);
}

/// One line on standard error that follows a run, if that is a terminal.
pub struct ProgressLine(Option<tokio::task::JoinSet<()>>);

impl ProgressLine {
    pub fn start(scenario: &str, progress: Arc<Progress>) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let scenario = scenario.to_owned();
        let mut task = tokio::task::JoinSet::new();
        task.spawn(async move {
            let mut last = 0;
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let delivered = total(&progress.delivered);
                let _ = write!(
                    std::io::stderr(),
                    "\r{scenario}: {} connected, {} acknowledged, {delivered} delivered ({}/s)   ",
                    total(&progress.live),
                    total(&progress.acknowledged),
                    delivered.saturating_sub(last)
                );
                last = delivered;
            }
        });
        Self(Some(task))
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.0.take().is_some() {
            let _ = writeln!(std::io::stderr());
        }
    }
}
