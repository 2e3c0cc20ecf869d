//! `--watch` of the servers: a line a second on standard error with what the server does, from its own metrics.
//!
//! On a terminal one line is rewritten; the cursor stays at its beginning, so that a line of the log takes its place. Elsewhere each
//! line stands.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::time::Instant;

const INTERVAL: Duration = Duration::from_secs(1);

/// Which roles this process has, and so what there is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watched {
    Everything,
    Gateway,
    Router,
}

/// Writes until it is dropped, or until nobody reads it.
pub async fn run(metrics: PrometheusHandle, watched: Watched) {
    let on_terminal = io::stderr().is_terminal();
    let started = Instant::now();
    let mut ticks = tokio::time::interval(INTERVAL);
    let mut before = Sample::of(&metrics.render(), 0);
    let mut sampled = started;
    ticks.tick().await;
    loop {
        ticks.tick().await;
        metrics.run_upkeep();
        let now = Instant::now();
        let sample = Sample::of(&metrics.render(), resident_bytes());
        let line = line(watched, &before, &sample, now - sampled, now - started);
        (before, sampled) = (sample, now);
        let written = if on_terminal {
            // A line longer than the terminal would not be rewritten as one.
            let columns = rustix::termios::tcgetwinsize(io::stderr()).map_or(80, |size| usize::from(size.ws_col));
            let line: String = line.chars().take(columns.saturating_sub(1)).collect();
            write!(io::stderr(), "\x1b[K{line}\r")
        } else {
            // In one piece, so that no line of the log gets into it.
            io::stderr().write_all(format!("{line}\n").as_bytes())
        };
        if written.is_err() {
            return;
        }
    }
}

/// Clears the line, when the server says its last words.
pub fn end() {
    if io::stderr().is_terminal() {
        let _ = write!(io::stderr(), "\x1b[K");
    }
}

/// What is shown, at one time. Counters are since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sample {
    connections: f64,
    shards: f64,
    sessions: f64,
    entries: f64,
    sends: f64,
    deliveries: f64,
    commits: f64,
    sync_seconds: f64,
    resident_bytes: u64,
}

impl Sample {
    fn of(exposition: &str, resident_bytes: u64) -> Self {
        let values = totals(exposition);
        let value = |name: &str| values.get(name).copied().unwrap_or_default();
        Self {
            connections: value("im_gateway_connections_count"),
            shards: value("im_router_shards_owned"),
            sessions: value("im_router_sessions"),
            entries: value("im_router_entries_committed_total"),
            sends: value("im_gateway_sends_total"),
            deliveries: value("im_gateway_pushes_total"),
            commits: value("im_storage_commits_total"),
            sync_seconds: value("im_storage_commit_seconds_sum"),
            resident_bytes,
        }
    }
}

/// The sum over all labels of each metric of the text format of Prometheus.
fn totals(exposition: &str) -> BTreeMap<&str, f64> {
    let mut totals = BTreeMap::new();
    for line in exposition.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let name = series.split('{').next().unwrap_or_default();
        let value: f64 = value.parse().unwrap_or_default();
        *totals.entry(name).or_default() += value;
    }
    totals
}

fn line(watched: Watched, before: &Sample, now: &Sample, between: Duration, up: Duration) -> String {
    let rate = |before: f64, now: f64| short((now - before).max(0.0) / between.as_secs_f64().max(0.001));
    let seconds = up.as_secs();
    let mut line = format!("up {}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    if watched == Watched::Router {
        let (shards, sessions) = (short(now.shards), short(now.sessions));
        let entries = rate(before.entries, now.entries);
        let _ = write!(line, "  {shards} shards  {sessions} sessions  {entries} entries/s");
    } else {
        let (sends, deliveries) = (rate(before.sends, now.sends), rate(before.deliveries, now.deliveries));
        let connections = short(now.connections);
        let _ = write!(line, "  {connections} connections  {sends} sends/s  {deliveries} deliveries/s");
    }
    if watched == Watched::Everything {
        let commits = (now.commits - before.commits).max(0.0);
        let sync = if commits > 0.0 {
            format!("{:.2} ms", (now.sync_seconds - before.sync_seconds).max(0.0) * 1000.0 / commits)
        } else {
            "-".to_owned()
        };
        let _ = write!(line, "  {} commits/s  sync {sync}", rate(before.commits, now.commits));
    }
    let _ = write!(line, "  {} MiB", now.resident_bytes / (1024 * 1024));
    line
}

/// Three digits and a factor.
fn short(value: f64) -> String {
    match value {
        value if value >= 999_500.0 => format!("{:.2}M", value / 1e6),
        value if value >= 9_999.5 => format!("{:.1}k", value / 1e3),
        value => format!("{value:.0}"),
    }
}

/// Memory of this process that is in use, or 0 where the system does not say.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPOSITION: &str = "\
# TYPE im_gateway_connections_count gauge
im_gateway_connections_count 12
im_gateway_sends_total 1500
im_gateway_pushes_total 21000
im_storage_commits_total{a=\"b c\"} 90
im_storage_commits_total{a=\"d\"} 10
im_storage_commit_seconds_bucket{le=\"0.1\"} 7
im_storage_commit_seconds_sum 0.25
im_router_shards_owned 341
im_router_sessions 7
im_router_entries_committed_total 12000
";

    #[test]
    fn a_line_says_what_happened_in_a_second() {
        let now = Sample::of(EXPOSITION, 300 * 1024 * 1024);
        let second = Duration::from_secs(1);
        assert_eq!(
            line(Watched::Everything, &Sample::default(), &now, second, Duration::from_secs(3_725)),
            "up 1:02:05  12 connections  1500 sends/s  21.0k deliveries/s  100 commits/s  sync 2.50 ms  300 MiB"
        );
        let quiet = line(Watched::Everything, &now, &now, second, second);
        assert!(quiet.contains(" 0 sends/s  0 deliveries/s  0 commits/s  sync -  "), "{quiet}");
        let of = |watched| line(watched, &Sample::default(), &now, second, second);
        assert_eq!(of(Watched::Gateway), "up 0:00:01  12 connections  1500 sends/s  21.0k deliveries/s  300 MiB");
        assert_eq!(of(Watched::Router), "up 0:00:01  341 shards  7 sessions  12.0k entries/s  300 MiB");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 9_999.0, 10_000.0, 999_999.0].map(short), ["0", "9999", "10.0k", "1.00M"]);
    }

    #[test]
    fn this_process_uses_memory() {
        assert!(resident_bytes() > 0);
    }
}
