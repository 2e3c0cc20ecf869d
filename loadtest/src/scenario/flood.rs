//! Established users while others flood the server: connects, TLS handshakes, garbage.
//!
//! The same open-loop chat once in peace and once under each flood. The flood is a process of its own with the lowest priority, so
//! that what it costs the established users is the server's work and not the flooder's.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt as _, process::Command, time::Instant};

use super::{Target, chat};
use crate::{
    options::Common,
    report::{Goal, Percentiles, Report, round},
    stream::{Connector, Transport},
    usage::usage,
};

/// The p99 of established users may grow by this.
const GROWTH_MAX: f64 = 1.2;
/// Share of the closed loop's rate, if the options name neither rate nor share.
const LOAD: f64 = 0.25;
/// Attempts under way at once.
const AT_ONCE: usize = 256;
const FLOOD_FROM: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 2));
const ATTEMPT_WITHIN: Duration = Duration::from_secs(5);
const GARBAGE_BYTES: usize = 4096;
const DATAGRAM_BYTES: usize = 1200;

/// What the flood consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Flood {
    /// Connections that are opened and reset.
    Connects,
    /// Whole TLS handshakes, and nothing after them.
    Handshakes,
    /// Connections that send what is no frame, and datagrams that are no QUIC.
    Garbage,
}

/// What a flood did, as its process says.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
struct Attempts {
    done: u64,
    failed: u64,
}

#[derive(Debug, Serialize)]
struct Phase {
    flood: Option<Flood>,
    attempts_per_s: f64,
    failed_per_s: f64,
    ack_us: Percentiles,
    delivery_us: Percentiles,
    delivered_per_s: f64,
    server_cores: f64,
    other_cores: f64,
    /// The delivery's p99 against the run in peace.
    p99_against_peace: f64,
}

/// One run.
pub async fn run(options: &Common, rate: f64) -> anyhow::Result<Report> {
    if !options.server.is_empty() {
        return Err(usage("flood starts its own server: leave out --server"));
    }
    let pairs = options.pair_count(chat::PAIRS);
    // Limits of addresses hold as they are by default. The established users, who have one address, come in at the pace that they allow.
    let raised = vec!["gateway.address_limits_loopback=true".to_owned()];
    let mut options = Common { also_raised: raised, ..options.clone() };
    let mut target = Target::open(&options).await?;
    if options.rate.is_none() {
        let closed = chat::closed_loop(&mut target, &options, pairs).await?;
        options.rate = Some(closed.delivered_per_s * options.rate_of.unwrap_or(LOAD));
    }
    let mut report = chat::once(&mut target, &options, pairs).await?;
    let peace = report.delivery_us.p99.max(1);
    let mut phases = vec![phase(None, &report, Attempts::default(), 1.0)];
    for flood in [Flood::Connects, Flood::Handshakes, Flood::Garbage] {
        let attacker = Attacker::start(&mut target, flood, rate).await?;
        let run = chat::once(&mut target, &options, pairs).await?;
        let (attempts, seconds) = attacker.stop().await?;
        let against = run.delivery_us.p99 as f64 / peace as f64;
        phases.push(phase(Some(flood), &run, attempts, seconds));
        phases.last_mut().into_iter().for_each(|phase| phase.p99_against_peace = round(against));
        let what = format!("delivery p99 of established users under {flood:?} against the run in peace");
        report.goals.push(Goal::at_most("flood", &what, GROWTH_MAX, against));
        if run.promise_broken() {
            let goals = std::mem::take(&mut report.goals);
            report = Report { goals, ..run };
        }
    }
    report.scenario = "flood".to_owned();
    report.detail("phases", phases);
    target.close(&mut report).await?;
    Ok(report)
}

fn phase(flood: Option<Flood>, run: &Report, attempts: Attempts, seconds: f64) -> Phase {
    Phase {
        flood,
        attempts_per_s: round(attempts.done as f64 / seconds),
        failed_per_s: round(attempts.failed as f64 / seconds),
        ack_us: run.ack_us,
        delivery_us: run.delivery_us,
        delivered_per_s: run.delivered_per_s,
        server_cores: run.server.cpu_cores,
        other_cores: run.other_cpu_cores,
        p99_against_peace: 1.0,
    }
}

/// The process that floods.
struct Attacker {
    child: tokio::process::Child,
    begun: Instant,
}

impl Attacker {
    async fn start(target: &mut Target, flood: Flood, rate: f64) -> anyhow::Result<Self> {
        let process = target.process.as_mut().context("there is no own server")?;
        let tls = process.endpoints(Transport::Tls).await?;
        let quic = process.endpoints(Transport::Quic).await?;
        let tcp = process.endpoints(Transport::Tcp).await?;
        let address = if flood == Flood::Handshakes { &tls.addresses[0] } else { &tcp.addresses[0] };
        let own = std::env::current_exe().context("find the own program")?;
        let mut command = Command::new(own);
        let kind = serde_json::to_value(flood)?;
        command.args(["flood-client", "--kind", kind.as_str().unwrap_or_default(), "--address", address]);
        command.args(["--rate", &rate.to_string()]);
        if flood == Flood::Garbage {
            command.args(["--udp", &quic.addresses[0]]);
        }
        if let Some(ca) = &tls.ca {
            command.arg("--ca").arg(ca);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("start the flood")?;
        // It says that it has begun.
        let output = child.stdout.as_mut().context("read from the flood")?;
        anyhow::ensure!(output.read_u8().await.is_ok_and(|byte| byte == b'\n'), "the flood did not start");
        Ok(Self { child, begun: Instant::now() })
    }

    async fn stop(mut self) -> anyhow::Result<(Attempts, f64)> {
        let seconds = self.begun.elapsed().as_secs_f64();
        drop(self.child.stdin.take());
        let output = self.child.wait_with_output().await?;
        let attempts = serde_json::from_slice(&output.stdout).context("the flood did not say what it did")?;
        Ok((attempts, seconds))
    }
}

/// Floods until standard input ends.
pub fn attack(kind: Flood, address: &str, udp: Option<&str>, ca: Option<&Path>, rate: f64) -> anyhow::Result<()> {
    // Whatever the flooder itself needs is not taken from those whom it disturbs.
    let _ = rustix::process::nice(19);
    let (ended, mut over) = tokio::sync::watch::channel(false);
    std::thread::spawn(move || {
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        let _ = ended.send(true);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let counts = Counts::default();
    runtime.block_on(async {
        let attack = Attack { kind, address, udp: udp.map(str::parse).transpose()?, ca, rate };
        std::io::stdout().write_all(b"\n")?;
        std::io::stdout().flush()?;
        tokio::select! {
            biased;
            _ = over.changed() => anyhow::Ok(()),
            failed = attack.run(&counts) => failed,
        }
    })?;
    let attempts =
        Attempts { done: counts.done.load(Ordering::Relaxed), failed: counts.failed.load(Ordering::Relaxed) };
    println!("{}", serde_json::to_string(&attempts)?);
    Ok(())
}

#[derive(Default)]
struct Counts {
    done: AtomicU64,
    failed: AtomicU64,
}

struct Attack<'a> {
    kind: Flood,
    address: &'a str,
    udp: Option<SocketAddr>,
    ca: Option<&'a Path>,
    rate: f64,
}

impl Attack<'_> {
    /// At most [`AT_ONCE`] attempts at once, each lane at its share of the rate.
    async fn run(&self, counts: &Counts) -> anyhow::Result<()> {
        let transport = if self.kind == Flood::Handshakes { Transport::Tls } else { Transport::Tcp };
        let mut connector = Connector::with_resumption(transport, self.ca, false)?;
        if self.address.starts_with("127.") {
            // Another address than the established users have: limits of addresses must tell them apart.
            connector.come_from(FLOOD_FROM);
        }
        let datagrams = tokio::net::UdpSocket::bind("0.0.0.0:0").await?;
        let every = Duration::from_secs_f64(AT_ONCE as f64 / self.rate.max(0.1));
        let lanes = (0..AT_ONCE).map(|lane| {
            let (connector, datagrams) = (&connector, &datagrams);
            async move {
                let mut next = Instant::now() + every * u32::try_from(lane).unwrap_or(0) / AT_ONCE as u32;
                let mut noise = lane as u64 + 1;
                loop {
                    tokio::time::sleep_until(next).await;
                    // Behind the schedule it does not catch up: a slow server is flooded by those at once.
                    next = (next + every).max(Instant::now());
                    let attempt = self.attempt(connector, datagrams, &mut noise);
                    match tokio::time::timeout(ATTEMPT_WITHIN, attempt).await {
                        Ok(Ok(())) => counts.done.fetch_add(1, Ordering::Relaxed),
                        Ok(Err(_)) | Err(_) => counts.failed.fetch_add(1, Ordering::Relaxed),
                    };
                }
            }
        });
        // No lane ever ends by itself.
        let _: Vec<std::convert::Infallible> = futures::future::join_all(lanes).await;
        Ok(())
    }

    async fn attempt(
        &self,
        connector: &Connector,
        datagrams: &tokio::net::UdpSocket,
        noise: &mut u64,
    ) -> anyhow::Result<()> {
        let mut stream = connector.connect(self.address).await?;
        if self.kind != Flood::Garbage {
            return Ok(());
        }
        if let Some(udp) = self.udp {
            datagrams.send_to(&garbage(noise, DATAGRAM_BYTES), udp).await?;
        }
        tokio::io::AsyncWriteExt::write_all(&mut stream, &garbage(noise, GARBAGE_BYTES)).await?;
        // Until the server has had enough of it.
        let _ = stream.read_u8().await;
        Ok(())
    }
}

/// Bytes by chance; the same in every run.
fn garbage(noise: &mut u64, bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        *noise ^= *noise << 13;
        *noise ^= *noise >> 7;
        *noise ^= *noise << 17;
        out.extend_from_slice(&noise.to_le_bytes());
    }
    out.truncate(bytes);
    out
}
