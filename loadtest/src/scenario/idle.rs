//! Authenticated connections that do nothing but send heartbeats: memory and CPU a connection. PF4 and PF6.
//!
//! A process may hold only so many descriptors, so the connections are held by as many servers as that takes, each with two processes of
//! `loadtest`: one for those that come first, one for the others. The same heartbeats then go to as many bare servers: what a heartbeat
//! costs the machine at least.

use std::{collections::BTreeMap, io::Write as _, process::Stdio, sync::Arc, time::Duration};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use super::{ProgressLine, Target, new_report};
use crate::{
    crowd::Plan,
    load::{Load, LoadPlan, total},
    measure::{self, Reading, Usage},
    options::Common,
    report::{Goal, Report, round},
    server::Credentials,
    stream::Transport,
};

/// Connections if the options do not say.
pub const CONNECTIONS: usize = 10_000;
/// A session each second is far below what any server does: the limit is for one that hangs.
const LIVE_WITHIN: Duration = Duration::from_secs(300);
/// Descriptors that client and server need besides their connections.
const SPARE_DESCRIPTORS: u64 = 500;
/// What the servers use by themselves is measured for this long before anybody connects.
const ALONE: Duration = Duration::from_secs(3);
/// One connection in so many comes first. What the servers take once and not for each connection is there then: what the others take
/// is what one more costs.
const FIRST: usize = 5;
/// After a heartbeat's interval a connection gives back what its beginning has left behind. So long after that the others come.
const AT_REST: Duration = Duration::from_secs(2);

/// The kernel counts CPU in hundredths of a second: below this a ratio says nothing.
const CPU_SECONDS_MIN: f64 = 0.2;

/// What a process of clients says at its end.
#[derive(Debug, Default, Deserialize, Serialize)]
struct Held {
    heartbeats: u64,
    errors: BTreeMap<String, u64>,
    disconnects: BTreeMap<String, u64>,
}

/// A process of clients. It is killed when this is dropped.
struct Clients {
    child: Child,
    /// Its end ends the clients.
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// What the bare server needs for a heartbeat.
#[derive(Debug, Serialize)]
struct Bare {
    heartbeats_per_s: f64,
    server_cores: f64,
    server_cpu_us_per_heartbeat: f64,
}

/// One run.
pub async fn run(options: &Common) -> anyhow::Result<Report> {
    let wanted = options.connections.unwrap_or(CONNECTIONS);
    let mut targets = vec![Target::open(options).await?];
    let mut report = new_report("idle", &targets[0], options);
    let room = usize::try_from(report.machine.descriptors_max.saturating_sub(SPARE_DESCRIPTORS)).unwrap_or(usize::MAX);
    let processes = options.processes.unwrap_or_else(|| wanted.div_ceil(room.max(1))).max(1);
    let shares = shares(wanted.min(processes.saturating_mul(room.max(1))), processes);
    let connections: usize = shares.iter().sum();
    if connections < wanted {
        report.reasons.push(format!("{connections} connections instead of {wanted}: the limit of descriptors"));
    }
    // One server a process, unless a cluster is given.
    while options.server.is_empty() && targets.len() < processes {
        targets.push(Target::open(&options.with_data_beside(targets.len())).await?);
    }
    let servers: Vec<u32> = targets.iter().flat_map(Target::pids).collect();
    let alone = usage_during(&servers, &[], ALONE).await;
    let before = (measure::rss_bytes(&servers), measure::slab_bytes());
    let [first, further] = in_two(&shares);
    let mut clients = start_clients(options, &targets, &first).await?;
    if !clients.is_empty() {
        tokio::time::sleep(options.heartbeat() + AT_REST).await;
    }
    let with_first = measure::rss_bytes(&servers);
    let began = Reading::take(&servers);
    clients.extend(start_clients(options, &targets, &further).await?);
    let connecting = Reading::take(&servers).since(&began);
    let at_once = measure::rss_bytes(&servers);
    let generators: Vec<u32> = clients.iter().filter_map(|clients| clients.child.id()).collect();
    let counted = count(&mut clients).await?;
    let usage = usage_during(&servers, &generators, options.time()).await;
    let heartbeats = count(&mut clients).await? - counted;
    let after = (measure::rss_bytes(&servers), measure::slab_bytes());
    let mut held = Held::default();
    for clients in clients {
        held.add(clients.finish().await?);
    }
    report.connections = connections;
    report.usage(&usage, generators.len());
    report.server.rss_bytes = after.0;
    let a_connection = |now: u64, then: u64| round(now.saturating_sub(then) as f64 / connections as f64);
    report.server.rss_bytes_per_connection = a_connection(after.0, before.0);
    let connected = further.iter().sum::<usize>() as f64;
    let each_further = after.0.saturating_sub(with_first) as f64 / connected;
    report.error_causes = held.errors;
    report.error_causes.extend(held.disconnects);
    report.errors = report.error_causes.values().sum();
    report.details = serde_json::json!({
        "servers": servers.len(),
        "processes": generators.len(),
        "server_rss_before_bytes": before.0,
        "rss_bytes_per_further_connection": round(each_further),
        "rss_bytes_per_connection_when_the_last_had_its_session": a_connection(at_once, before.0),
        "kernel_slab_bytes_per_connection_both_ends": a_connection(after.1, before.1),
        "connect_per_s": round(connected / connecting.seconds),
        "connecting": connecting,
        "server_cpu_us_per_connect": round(connecting.server_cores * connecting.seconds * 1e6 / connected),
        "held_seconds": options.seconds,
        "server_cores_alone": round(alone.server_cores),
        "heartbeats": held.heartbeats,
        "heartbeats_per_s": round(heartbeats as f64 / usage.seconds),
    });
    memory_goals(&mut report, each_further);
    for target in targets {
        target.close(&mut report).await?;
    }
    cost(&mut report, options, &shares, heartbeats, [&usage, &alone]).await?;
    Ok(report)
}

/// The connections of each process, as even as can be.
fn shares(connections: usize, processes: usize) -> Vec<usize> {
    (0..processes).map(|process| (connections + process) / processes).collect()
}

/// Of each server those that come first, and the others: of fewer than [`FIRST`] all are others.
fn in_two(shares: &[usize]) -> [Vec<usize>; 2] {
    let first: Vec<usize> = shares.iter().map(|share| share / FIRST).collect();
    let further = shares.iter().zip(&first).map(|(share, first)| share - first).collect();
    [first, further]
}

async fn usage_during(servers: &[u32], generators: &[u32], time: Duration) -> Usage {
    let before = Reading::with_generators(servers, generators);
    tokio::time::sleep(time).await;
    Reading::with_generators(servers, generators).since(&before)
}

/// What one more connection takes, and what the servers grew by for each of all, with what they take once.
fn memory_goals(report: &mut Report, each_further: f64) {
    let (name, most) = match report.transport {
        Transport::Tcp => ("TCP", 2.5),
        Transport::Tls => ("TLS", 8.0),
        Transport::Quic => ("QUIC", 32.0),
    };
    let measured = [("one more", each_further), ("each of all", report.server.rss_bytes_per_connection)];
    for (which, bytes) in measured {
        let what = format!("memory of an idle authenticated {name} connection, gateway and router, KiB ({which})");
        report.goals.push(Goal::at_most("PF4", &what, most, bytes / 1024.0));
    }
}

/// What a heartbeat costs, here and with the bare server.
async fn cost(
    report: &mut Report,
    options: &Common,
    shares: &[usize],
    heartbeats: u64,
    [usage, alone]: [&Usage; 2],
) -> anyhow::Result<()> {
    let micros = |cores: f64| round(cores.max(0.0) * usage.seconds * 1e6 / heartbeats.max(1) as f64);
    let (all, own) = (micros(usage.server_cores), micros(usage.server_cores - alone.server_cores));
    report.detail("server_cpu_us_per_heartbeat", own);
    report.detail("server_cpu_us_per_heartbeat_with_what_servers_use_alone", all);
    if options.ceiling <= 0.0 || report.transport != Transport::Tcp {
        return Ok(());
    }
    let bare = bare(options, shares).await?;
    let ratio = own / bare.server_cpu_us_per_heartbeat.max(0.001);
    report.detail("bare", &bare);
    if [usage.server_cores * usage.seconds, bare.server_cores * usage.seconds].iter().any(|&cpu| cpu < CPU_SECONDS_MIN)
    {
        let what =
            format!("servers used less than {CPU_SECONDS_MIN} s of CPU: too little to say what a heartbeat costs");
        report.reasons.push(what);
        return Ok(());
    }
    report.detail("heartbeat_against_bare", round(ratio));
    report.goals.push(Goal::at_most("PF6", "CPU of a heartbeat against the bare server", 1.5, ratio));
    Ok(())
}

/// Heartbeats of all clients until now.
async fn count(clients: &mut [Clients]) -> anyhow::Result<u64> {
    let mut sum = 0;
    for one in clients {
        one.input.write_all(b"\n").await?;
        let mut line = String::new();
        one.output.read_line(&mut line).await?;
        sum += line.trim().parse::<u64>().context("a process of clients did not say how many heartbeats it sent")?;
    }
    Ok(sum)
}

async fn start_clients(options: &Common, targets: &[Target], shares: &[usize]) -> anyhow::Result<Vec<Clients>> {
    let mut clients = Vec::with_capacity(shares.len());
    for (process, connections) in shares.iter().enumerate().filter(|(_, connections)| **connections > 0) {
        let target = &targets[process % targets.len()];
        clients.push(Clients::start(options, target, process, *connections)?);
    }
    for one in &mut clients {
        let mut line = String::new();
        let live = tokio::time::timeout(LIVE_WITHIN, one.output.read_line(&mut line)).await;
        let count = live.context("not all clients got a session in time")??;
        anyhow::ensure!(count > 0, "a process of clients ended early");
    }
    Ok(clients)
}

impl Clients {
    fn start(options: &Common, target: &Target, process: usize, connections: usize) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe().context("find the own program")?);
        command.arg("idle-clients").args(["--connections", &connections.to_string()]);
        let scheme = serde_json::to_value(target.transport)?;
        let address = &target.endpoints.addresses[process % target.endpoints.addresses.len()];
        command.args(["--server", &format!("{}://{address}", scheme.as_str().unwrap_or_default())]);
        let key = match (&options.key, &target.process) {
            (Some(key), _) => key.clone(),
            (None, process) => process.as_ref().context("there is no key")?.key_file(),
        };
        let cluster = options.cluster.clone().unwrap_or_else(|| Credentials::cluster_beside(&key));
        command.arg("--key").arg(key).arg("--cluster").arg(cluster);
        if let Some(ca) = &target.endpoints.ca {
            command.arg("--ca").arg(ca);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("start a process of clients")?;
        let input = child.stdin.take().context("write to a process of clients")?;
        let output = child.stdout.take().context("read from a process of clients")?;
        Ok(Self { child, input, output: BufReader::new(output) })
    }

    async fn finish(mut self) -> anyhow::Result<Held> {
        drop(self.input);
        let mut text = String::new();
        self.output.read_to_string(&mut text).await?;
        self.child.wait().await?;
        serde_json::from_str(&text).context("a process of clients did not say what it saw")
    }
}

impl Held {
    fn add(&mut self, other: Held) {
        self.heartbeats += other.heartbeats;
        for (sum, causes) in [(&mut self.errors, other.errors), (&mut self.disconnects, other.disconnects)] {
            causes.into_iter().for_each(|(cause, count)| *sum.entry(cause).or_default() += count);
        }
    }
}

/// One process of clients: connects, says so with a line, answers each line with its heartbeats so far, and holds until its input
/// ends.
pub async fn clients(options: &Common) -> anyhow::Result<()> {
    let target = Target::open(options).await?;
    let load = Load::start(plan(&target, options)?, target.endpoints.clone())?;
    let progress = ProgressLine::start("idle", Arc::clone(&load.progress));
    load.all_live(LIVE_WITHIN).await?;
    writeln!(std::io::stdout(), "live")?;
    std::io::stdout().flush()?;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while lines.next_line().await?.is_some() {
        writeln!(std::io::stdout(), "{}", total(&load.progress.heartbeats))?;
        std::io::stdout().flush()?;
    }
    drop(progress);
    let statistics = load.finish()?.statistics;
    let held =
        Held { heartbeats: statistics.heartbeats, errors: statistics.errors, disconnects: statistics.disconnects };
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&held)?)?;
    Ok(())
}

fn plan(target: &Target, options: &Common) -> anyhow::Result<LoadPlan> {
    let mut threads: Vec<Vec<Plan>> = (0..options.threads()).map(|_| Vec::new()).collect();
    for index in 0..options.connections.unwrap_or(CONNECTIONS) {
        let user = target.user(index);
        let token = target.token(&user)?;
        threads[index % options.threads()].push(Plan {
            user,
            token,
            lanes: Vec::new(),
            stalls: false,
            reads_every: None,
        });
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

/// Bare servers with the same connections and heartbeats, as many as there are servers.
async fn bare(options: &Common, shares: &[usize]) -> anyhow::Result<Bare> {
    let own = std::env::current_exe().context("find the own program")?;
    let runs = shares.iter().map(|connections| {
        let mut command = Command::new(&own);
        command.args(["ceiling", "--workload", "idle", "--connections", &connections.to_string()]);
        let times = [("--heartbeat", options.heartbeat), ("--warmup", options.warmup), ("--seconds", options.seconds)];
        times.iter().for_each(|(name, value)| _ = command.args([*name, &value.to_string()]));
        command.stdin(Stdio::null()).kill_on_drop(true).output()
    });
    let (mut cores, mut per_s) = (0.0, 0.0);
    for output in futures::future::try_join_all(runs).await.context("measure the bare server")? {
        let report: serde_json::Value =
            serde_json::from_slice(&output.stdout).context("the bare server was not measured")?;
        let measured = &report["details"]["workloads"][0];
        cores += measured["usage"]["server_cores"].as_f64().unwrap_or(0.0);
        per_s += measured["delivered_per_s"].as_f64().unwrap_or(0.0);
    }
    Ok(Bare {
        heartbeats_per_s: round(per_s),
        server_cores: round(cores),
        server_cpu_us_per_heartbeat: round(cores * 1e6 / per_s.max(1e-9)),
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn connections_are_shared_out_to_the_last_one() {
        assert_eq!(super::shares(10, 3), [3, 3, 4]);
        assert_eq!(super::shares(100_000, 6).iter().sum::<usize>(), 100_000);
    }

    #[test]
    fn all_of_them_come_in_two_parts() {
        assert_eq!(super::in_two(&[10_000, 4]), [vec![2_000, 0], vec![8_000, 4]]);
    }
}
