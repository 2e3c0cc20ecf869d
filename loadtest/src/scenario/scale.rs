//! What a message and a connection cost in CPU when there are more processes, and when groups are larger. PF9.
//!
//! The load is the same all the time, far below what the cluster can do. There are no several machines here, so what is compared is
//! CPU, not throughput. What the processes use while nobody does anything is measured before each load and taken off.

use std::{path::Path, process::Stdio, time::Duration};

use anyhow::Context as _;
use im_proto::limits;
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::{Target, chat, fanout};
use crate::{
    measure::Reading,
    options::Common,
    report::{Goal, Report, round},
};

/// Routers and gateways of each point. A cluster only grows.
const POINTS: [(usize, usize); 6] = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8)];
/// Members of a group, the sender and [`ONLINE`] others are there. The last is as many as a group may have.
const GROUPS: [usize; 3] = [10, 1_000, limits::GROUP_MEMBERS_MAX];
const ONLINE: usize = 9;
/// Messages a second if the options do not say.
const RATE: f64 = 1_000.0;
/// What is used by processes that nobody talks to.
const ALONE: Duration = Duration::from_secs(5);
/// A cost may differ by this from point to point.
const FLAT: f64 = 1.15;

#[derive(Clone, Debug, Serialize)]
struct Point {
    routers: usize,
    gateways: usize,
    group_members: Option<usize>,
    delivered_per_s: f64,
    server_cores: f64,
    server_cores_alone: f64,
    cpu_us_per_message: f64,
    delivery_p99_us: u64,
}

/// What `deploy/local/cluster status --json` says.
#[derive(Debug, Deserialize)]
struct Cluster {
    parts: Vec<Part>,
    key: std::path::PathBuf,
    ca: Option<std::path::PathBuf>,
}

#[derive(Debug, Deserialize)]
struct Part {
    role: String,
    pid: Option<u32>,
    #[serde(default)]
    addresses: std::collections::BTreeMap<String, String>,
}

/// One run.
pub async fn run(options: &Common, tool: &Path) -> anyhow::Result<Report> {
    let mut points = Vec::new();
    let (mut last, mut broken) = (None, Vec::new());
    for (routers, gateways) in POINTS {
        let options = cluster(options, tool, routers, gateways).await?;
        let mut target = Target::open(&options).await?;
        let alone = alone(&target).await;
        let pairs = options.pair_count(chat::PAIRS);
        let report = chat::once(&mut target, &options, pairs).await?;
        broken.extend(report.promise_broken().then(|| report.clone()));
        points.push(Point::of((routers, gateways), None, &report, alone));
        last = Some((options, report));
    }
    let (options, mut report) = last.context("no point was measured")?;
    let mut groups = Vec::new();
    for members in GROUPS {
        let mut target = Target::open(&options).await?;
        let alone = alone(&target).await;
        let options = Common {
            members: Some(members - 1),
            rate: Some(options.rate.unwrap_or(RATE) / ONLINE as f64),
            ..options.clone()
        };
        let report = fanout::once(&mut target, &options, ONLINE).await?;
        broken.extend(report.promise_broken().then(|| report.clone()));
        groups.push(Point::of(POINTS[POINTS.len() - 1], Some(members), &report, alone));
    }
    // The figures are of use even so, but the run has failed.
    if let Some(first) = broken.into_iter().next() {
        report = first;
    }
    report.scenario = "scale".to_owned();
    for (what, points) in [("gateways and routers", &points), ("members who are away", &groups)] {
        let costs = points.iter().map(|point| point.cpu_us_per_message);
        let (low, high) = costs.fold((f64::INFINITY, 0.0_f64), |(low, high), cost| (low.min(cost), high.max(cost)));
        let what = format!("CPU a message, most against least, over {what}");
        report.goals.push(Goal::at_most("PF9", &what, FLAT, high / low.max(1e-3)));
    }
    points.append(&mut groups);
    report.detail("scale", &points);
    Ok(report)
}

impl Point {
    fn of((routers, gateways): (usize, usize), members: Option<usize>, report: &Report, alone: f64) -> Self {
        let cores = (report.server.cpu_cores - alone).max(0.0);
        Self {
            routers,
            gateways,
            group_members: members,
            delivered_per_s: report.delivered_per_s,
            server_cores: report.server.cpu_cores,
            server_cores_alone: round(alone),
            cpu_us_per_message: round(cores * 1e6 / report.delivered_per_s.max(1e-9)),
            delivery_p99_us: report.delivery_us.p99,
        }
    }
}

async fn alone(target: &Target) -> f64 {
    let servers = target.pids();
    let before = Reading::take(&servers);
    tokio::time::sleep(ALONE).await;
    Reading::take(&servers).since(&before).server_cores
}

/// Has the tool start what is missing; the options for a load on it.
async fn cluster(options: &Common, tool: &Path, routers: usize, gateways: usize) -> anyhow::Result<Common> {
    let mut command = Command::new(tool);
    command.args(["up", "--routers", &routers.to_string(), "--gateways", &gateways.to_string(), "--json"]);
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = command.output().await.with_context(|| format!("run {}", tool.display()))?;
    anyhow::ensure!(output.status.success(), "{} up ended with {}", tool.display(), output.status);
    let cluster: Cluster = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{} up --json did not say what runs where", tool.display()))?;
    let addresses =
        cluster.parts.iter().filter(|part| part.role == "gateway").filter_map(|part| part.addresses.get("tcp"));
    let server: Vec<String> = addresses.map(|address| format!("tcp://{address}")).collect();
    anyhow::ensure!(
        server.len() == gateways,
        "{} of {gateways} gateways listen: take a cluster of its own with IM_CLUSTER_DIR",
        server.len()
    );
    Ok(Common {
        server,
        server_pid: cluster.parts.iter().filter_map(|part| part.pid).collect(),
        key: Some(cluster.key),
        ca: cluster.ca,
        rate: Some(options.rate.unwrap_or(RATE)),
        ..options.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_only_grows_from_point_to_point() {
        assert!(POINTS.is_sorted_by(|one, next| one.0 <= next.0 && one.1 <= next.1));
    }

    #[test]
    fn every_group_holds_those_who_are_there_and_is_not_larger_than_allowed() {
        assert!(GROUPS.iter().all(|members| (ONLINE + 1..=limits::GROUP_MEMBERS_MAX).contains(members)));
    }

    #[test]
    fn what_runs_alone_is_taken_off_a_message() {
        let mut report = Report { delivered_per_s: 1_000.0, ..Report::default() };
        report.server.cpu_cores = 0.3;
        let point = Point::of((1, 1), None, &report, 0.1);
        assert!((point.cpu_us_per_message - 200.0).abs() < 1e-6);
    }
}
