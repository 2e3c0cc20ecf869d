//! The JSON report of a run, and the rules by which it passes.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::{
    checker::Verdict,
    measure::{Flushes, Machine, Usage},
    stream::Transport,
};

/// A minute: latencies beyond it count as a minute.
const LATENCY_MAX_US: u64 = 60_000_000;
/// A generator thread busier than this may have been the limit.
const GENERATOR_BUSY: f64 = 0.95;
/// Others on the machine used more than this: the run says little about speed.
const QUIET_CORES: f64 = 0.15;
const NOT_QUIET: &str = "the machine was not quiet";

/// Latencies of a run.
pub struct Latencies(Histogram<u64>);

/// Percentiles in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Percentiles {
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p999: u64,
    pub max: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct ServerUsage {
    pub cpu_cores: f64,
    pub rss_bytes: u64,
    pub rss_bytes_per_connection: f64,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct GeneratorUsage {
    pub cpu_cores: f64,
    pub threads: usize,
}

/// One run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub scenario: String,
    pub transport: Transport,
    pub connections: usize,
    pub offered_per_s: f64,
    pub acked_per_s: f64,
    pub delivered_per_s: f64,
    pub ack_us: Percentiles,
    pub delivery_us: Percentiles,
    pub lost: u64,
    pub duplicated: u64,
    pub reordered: u64,
    pub holes: u64,
    pub corrupted: u64,
    pub errors: u64,
    /// The errors, by status text or cause.
    pub error_causes: BTreeMap<String, u64>,
    pub server: ServerUsage,
    pub generator: GeneratorUsage,
    /// Everything else on the machine, in cores.
    pub other_cpu_cores: f64,
    pub quiet: bool,
    /// Cache flushes of the disk that holds the data, from before the first send on; none: not known, and `reasons` says why.
    pub disk_flushes: Option<u64>,
    pub ceiling_per_s: Option<f64>,
    /// What `ceiling_per_s` is the rate of.
    pub denominator: String,
    pub ratio: Option<f64>,
    /// What docs/performance.md asks for, as far as this scenario measures it.
    pub goals: Vec<Goal>,
    pub verdict: String,
    pub reasons: Vec<String>,
    /// Promises that did not hold and are no entry's: what was never settled, refused for good, acknowledged before it was on disk.
    pub broken: Vec<String>,
    pub seconds: f64,
    pub machine: Machine,
    pub version: String,
    pub server_version: String,
    pub parameters: serde_json::Value,
    /// What a server that was started here was told besides its defaults: the limits of a user, raised, and what the options say.
    pub server_settings: Vec<String>,
    /// What only this scenario has.
    pub details: serde_json::Value,
    pub history: Option<Verdict>,
    /// With `--repeat`: what each run reached; the report is the median run by deliveries.
    pub runs: Vec<RunSummary>,
    pub spread: Option<Spread>,
    #[serde(skip)]
    pub generator_was_the_limit: bool,
    #[serde(skip)]
    pub read_back_left_out: bool,
}

/// One goal and what was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Goal {
    pub id: String,
    pub what: String,
    /// `at most` or `at least` this.
    pub bound: String,
    pub wanted: f64,
    pub measured: f64,
    pub met: bool,
}

impl Goal {
    pub fn at_most(id: &str, what: &str, wanted: f64, measured: f64) -> Self {
        let met = measured <= wanted;
        Self {
            id: id.to_owned(),
            what: what.to_owned(),
            bound: "at most".to_owned(),
            wanted,
            measured: round(measured),
            met,
        }
    }

    pub fn at_least(id: &str, what: &str, wanted: f64, measured: f64) -> Self {
        let met = measured >= wanted;
        Self { bound: "at least".to_owned(), met, ..Self::at_most(id, what, wanted, measured) }
    }
}

/// One of several runs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RunSummary {
    pub acked_per_s: f64,
    pub delivered_per_s: f64,
    pub ack_p99_us: u64,
    pub delivery_p99_us: u64,
    pub server_cpu_cores: f64,
    pub generator_cpu_cores: f64,
    pub ratio: Option<f64>,
    pub rss_bytes_per_connection: f64,
    pub quiet: bool,
}

/// The smallest and the largest of the runs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Spread {
    pub acked_per_s: [f64; 2],
    pub delivered_per_s: [f64; 2],
    pub ratio: Option<[f64; 2]>,
}

impl Default for Latencies {
    fn default() -> Self {
        Self(
            Histogram::new_with_bounds(1, LATENCY_MAX_US, 3)
                .unwrap_or_else(|_| unreachable!("the bounds are constants")),
        )
    }
}

impl Latencies {
    /// One latency in microseconds.
    pub fn record(&mut self, micros: u64) {
        self.0.saturating_record(micros.max(1));
    }

    /// Another thread's.
    pub fn add(&mut self, other: &Latencies) {
        // Both have the same bounds, so this cannot fail.
        let _ = self.0.add(&other.0);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    pub fn percentiles(&self) -> Percentiles {
        Percentiles {
            p50: self.0.value_at_quantile(0.5),
            p90: self.0.value_at_quantile(0.9),
            p99: self.0.value_at_quantile(0.99),
            p999: self.0.value_at_quantile(0.999),
            max: self.0.max(),
        }
    }
}

impl Report {
    /// Takes in what the machine did during the measured time.
    pub fn usage(&mut self, usage: &Usage, generator_threads: usize) {
        self.seconds = round(usage.seconds);
        self.server.cpu_cores = round(usage.server_cores);
        self.generator = GeneratorUsage { cpu_cores: round(usage.generator_cores), threads: generator_threads };
        self.others(usage.other_cores);
        let busy = usage.generator_cores / generator_threads.max(1) as f64;
        if busy > GENERATOR_BUSY && usage.server_cores < usage.generator_cores {
            self.generator_was_the_limit = true;
            self.reasons.push(format!(
                "the generator was the limit: {:.0} % of its {generator_threads} thread(s), while the server used {:.2} cores",
                busy * 100.0,
                usage.server_cores
            ));
        }
    }

    /// What everything else on the machine used; takes the place of what was said before.
    pub fn others(&mut self, cores: f64) {
        self.other_cpu_cores = round(cores);
        self.quiet = cores < QUIET_CORES;
        self.reasons.retain(|reason| !reason.starts_with(NOT_QUIET));
        if !self.quiet {
            self.reasons.push(format!("{NOT_QUIET}: others used {cores:.2} cores"));
        }
    }

    /// Takes in the checker's judgement.
    pub fn judged(&mut self, verdict: Verdict) {
        (self.lost, self.duplicated, self.reordered) = (verdict.lost, verdict.duplicated, verdict.reordered);
        (self.holes, self.corrupted) = (verdict.holes, verdict.corrupted);
        if !verdict.is_clean() {
            self.reasons.extend(verdict.findings.iter().take(5).map(ToString::to_string));
        }
        self.history = Some(verdict);
    }

    /// A promise did not hold.
    pub fn broke(&mut self, what: String) {
        self.reasons.push(what.clone());
        self.broken.push(what);
    }

    /// Nobody looked at what is stored: the verdict goes no further than what clients were told.
    pub fn not_read_back(&mut self) {
        self.read_back_left_out = true;
        self.reasons.push("--no-read-back: what is stored was not compared with what was acknowledged".to_owned());
    }

    /// Takes in how often the disk flushed its cache while so much was acknowledged as durable.
    pub fn flushed(&mut self, flushes: &Flushes, acknowledged: u64) {
        self.disk_flushes = flushes.count;
        if let Some(why) = &flushes.unknown {
            self.reasons.push(format!("cache flushes of the disk are not known: {why}"));
        }
        if flushes.count == Some(0) && acknowledged > 0 {
            let device = &flushes.device;
            self.broke(format!("{acknowledged} messages were acknowledged, and {device} did not flush its cache once"));
        }
    }

    /// The denominator that was measured in the same run.
    pub fn ceiling(&mut self, name: &str, per_s: f64) {
        name.clone_into(&mut self.denominator);
        self.ceiling_per_s = Some(round(per_s));
        if per_s > 0.0 {
            self.ratio = Some(round(self.delivered_per_s / per_s));
        }
    }

    /// Something that only this scenario has.
    pub fn detail(&mut self, key: &str, value: impl Serialize) {
        if !self.details.is_object() {
            self.details = serde_json::json!({});
        }
        if let serde_json::Value::Object(details) = &mut self.details {
            details.insert(key.to_owned(), serde_json::to_value(value).unwrap_or_default());
        }
    }

    /// Whether a promise of the protocol was broken.
    pub fn promise_broken(&self) -> bool {
        !self.broken.is_empty()
            || [self.lost, self.duplicated, self.reordered, self.holes, self.corrupted].iter().any(|&count| count != 0)
    }

    /// Sets the verdict. 0 or 3: the exit code.
    pub fn conclude(&mut self) -> u8 {
        let held = held(!self.read_back_left_out);
        let (verdict, code) = if self.promise_broken() {
            ("a promise did not hold".to_owned(), 3)
        } else if self.generator_was_the_limit {
            ("the generator was the limit".to_owned(), 3)
        } else if self.errors > 0 {
            (format!("{held}; there were errors"), 0)
        } else if !self.verdict.is_empty() {
            return 0;
        } else {
            (held.to_owned(), 0)
        };
        self.verdict = verdict;
        code
    }

    fn summary(&self) -> RunSummary {
        RunSummary {
            acked_per_s: self.acked_per_s,
            delivered_per_s: self.delivered_per_s,
            ack_p99_us: self.ack_us.p99,
            delivery_p99_us: self.delivery_us.p99,
            server_cpu_cores: self.server.cpu_cores,
            generator_cpu_cores: self.generator.cpu_cores,
            ratio: self.ratio,
            rss_bytes_per_connection: self.server.rss_bytes_per_connection,
            quiet: self.quiet,
        }
    }
}

/// The median run of several, with all of them summed up in it. Broken promises of any run count.
pub fn median(mut runs: Vec<Report>) -> Option<Report> {
    let summaries: Vec<RunSummary> = runs.iter().map(Report::summary).collect();
    let key = |report: &Report| {
        // Runs that deliver nothing (idle) are compared by memory.
        if report.delivered_per_s > 0.0 { report.delivered_per_s } else { report.server.rss_bytes_per_connection }
    };
    runs.sort_by(|one, other| key(one).total_cmp(&key(other)));
    let count = runs.len();
    if count <= 1 {
        return runs.pop();
    }
    let broken: Vec<Report> = runs.iter().filter(|run| run.promise_broken()).cloned().collect();
    let limited = runs.iter().filter(|run| run.generator_was_the_limit).count();
    let mut report = if broken.is_empty() { runs.swap_remove((count - 1) / 2) } else { broken[0].clone() };
    report.generator_was_the_limit = 2 * limited > count;
    let spread = |of: fn(&RunSummary) -> f64| {
        let values = summaries.iter().map(of);
        values.fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], value| [low.min(value), high.max(value)])
    };
    report.spread = Some(Spread {
        acked_per_s: spread(|run| run.acked_per_s),
        delivered_per_s: spread(|run| run.delivered_per_s),
        ratio: report.ratio.map(|_| spread(|run| run.ratio.unwrap_or(0.0))),
    });
    report.runs = summaries;
    Some(report)
}

/// The verdict of a run that broke no promise.
pub fn held(read_back: bool) -> &'static str {
    if read_back { "every promise held" } else { "every promise held as far as clients saw: no history was read back" }
}

/// Three digits behind the point: more is noise.
pub fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(delivered_per_s: f64) -> Report {
        Report { delivered_per_s, acked_per_s: delivered_per_s, ..Report::default() }
    }

    #[test]
    fn the_median_run_is_reported_with_the_spread_of_all() {
        let report = median(vec![run(30.0), run(10.0), run(20.0)]).unwrap();
        assert_eq!(report.delivered_per_s, 20.0);
        assert_eq!(report.spread.unwrap().delivered_per_s, [10.0, 30.0]);
        assert_eq!(report.runs.len(), 3);
    }

    #[test]
    fn one_broken_run_of_three_is_the_one_reported() {
        let broken = Report { lost: 1, ..run(10.0) };
        let mut report = median(vec![run(30.0), broken, run(20.0)]).unwrap();
        assert_eq!(report.conclude(), 3);
    }

    #[test]
    fn a_busy_generator_beside_an_idle_server_is_the_limit() {
        let mut report = run(1.0);
        let usage = Usage { seconds: 1.0, server_cores: 0.5, generator_cores: 0.97, other_cores: 0.0 };
        report.usage(&usage, 1);
        assert_eq!(report.conclude(), 3);
        assert!(report.reasons[0].contains("generator"));
        let mut report = run(1.0);
        report.usage(&Usage { server_cores: 1.0, ..usage }, 1);
        assert_eq!(report.conclude(), 0);
    }

    #[test]
    fn what_was_acknowledged_without_a_flush_is_a_broken_promise() {
        let flushed = |count: Option<u64>, acknowledged| {
            let unknown = count.is_none().then(|| "it is on no device".to_owned());
            let mut report = run(1.0);
            report.flushed(&Flushes { device: "sda".to_owned(), count, unknown }, acknowledged);
            (report.conclude(), report)
        };
        let (code, report) = flushed(Some(0), 7);
        assert_eq!((code, report.disk_flushes), (3, Some(0)));
        assert_eq!(report.verdict, "a promise did not hold");
        assert!(report.reasons[0].contains("7 messages") && report.reasons[0].contains("sda"), "{report:?}");
        assert_eq!(flushed(Some(1), 7).0, 0);
        assert_eq!(flushed(Some(0), 0).0, 0, "nothing was promised");
        let (code, report) = flushed(None, 7);
        assert_eq!((code, report.disk_flushes), (0, None));
        assert!(report.reasons[0].contains("it is on no device"), "{report:?}");
    }

    #[test]
    fn one_run_that_broke_a_promise_without_a_number_is_the_one_reported() {
        let mut broken = run(10.0);
        broken.broke("one client is not there".to_owned());
        let mut report = median(vec![run(30.0), broken, run(20.0)]).unwrap();
        assert_eq!((report.conclude(), report.delivered_per_s), (3, 10.0));
    }

    #[test]
    fn errors_that_were_tried_again_break_nothing() {
        let mut report = Report { errors: 4, ..run(1.0) };
        assert_eq!((report.conclude(), report.verdict.as_str()), (0, "every promise held; there were errors"));
    }

    #[test]
    fn what_was_not_read_back_is_not_said_to_hold() {
        for errors in [0, 4] {
            let mut report = Report { errors, ..run(1.0) };
            report.not_read_back();
            assert_eq!(report.conclude(), 0);
            assert!(report.verdict.starts_with("every promise held as far as clients saw"), "{}", report.verdict);
            assert_eq!(report.verdict.ends_with("; there were errors"), errors > 0, "{}", report.verdict);
        }
    }

    #[test]
    fn the_report_has_the_promised_keys() {
        let report = serde_json::to_value(run(1.0)).unwrap();
        for key in [
            "scenario",
            "transport",
            "connections",
            "offered_per_s",
            "acked_per_s",
            "delivered_per_s",
            "ack_us",
            "delivery_us",
            "lost",
            "duplicated",
            "reordered",
            "errors",
            "server",
            "generator",
            "disk_flushes",
            "ceiling_per_s",
            "ratio",
            "verdict",
            "reasons",
            "broken",
            "seconds",
            "machine",
            "version",
        ] {
            assert!(report.get(key).is_some(), "{key}");
        }
        for key in ["p50", "p90", "p99", "p999", "max"] {
            assert!(report["ack_us"].get(key).is_some(), "{key}");
        }
        assert!(report["server"].get("rss_bytes_per_connection").is_some());
    }
}
