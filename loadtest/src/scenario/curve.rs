//! Latency over throughput, open loop. PF2.
//!
//! The closed loop says what the server reaches; then come shares of that as schedules, and a search for the highest rate at which
//! server and generator leave 30 % of the box free.

use serde::Serialize;

use super::{Target, ceilings, chat, ratios};
use crate::{
    ceiling::Workload,
    measure,
    options::Common,
    report::{Goal, Percentiles, Report, round},
};

/// Shares of the closed loop's rate.
const SHARES: [f64; 7] = [0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0];
/// The goal's share.
const QUARTER: f64 = 0.25;
/// Server and generator may use this much of the box.
const BUSY_MAX: f64 = 0.7;
/// Halvings of the search: its result is right within 1/16 of a step.
const HALVINGS: u32 = 4;
/// A run that starts less than this of what was scheduled did not keep up.
const KEPT_UP: f64 = 0.98;

#[derive(Clone, Copy, Debug, Serialize)]
struct Point {
    share: f64,
    offered_per_s: f64,
    delivered_per_s: f64,
    ack_us: Percentiles,
    delivery_us: Percentiles,
    server_cores: f64,
    generator_cores: f64,
    /// Server and generator, of all cores.
    busy: f64,
    kept_up: bool,
}

impl Point {
    fn of(share: f64, report: &Report) -> Self {
        let cores = measure::cores().max(1) as f64;
        Self {
            share: round(share),
            offered_per_s: round(report.offered_per_s),
            delivered_per_s: report.delivered_per_s,
            ack_us: report.ack_us,
            delivery_us: report.delivery_us,
            server_cores: report.server.cpu_cores,
            generator_cores: report.generator.cpu_cores,
            busy: round((report.server.cpu_cores + report.generator.cpu_cores) / cores),
            kept_up: report.delivered_per_s >= report.offered_per_s * KEPT_UP,
        }
    }

    fn fits(&self) -> bool {
        self.kept_up && self.busy <= BUSY_MAX
    }
}

struct Curve<'a> {
    target: Target,
    options: &'a Common,
    pairs: usize,
    closed_per_s: f64,
    points: Vec<Point>,
    /// The run with the highest rate that fits.
    best: Option<Report>,
    broken: Option<Report>,
}

/// One run.
pub async fn run(options: &Common) -> anyhow::Result<Report> {
    let pairs = options.pair_count(chat::PAIRS);
    let ceilings = ceilings(options, Workload::Pairs, pairs).await?;
    let mut target = Target::open(options).await?;
    let closed = chat::closed_loop(&mut target, options, pairs).await?;
    let closed_per_s = closed.delivered_per_s;
    let mut curve = Curve { target, options, pairs, closed_per_s, points: Vec::new(), best: None, broken: None };
    for share in SHARES {
        if !curve.point(share).await?.kept_up {
            break;
        }
    }
    curve.search().await?;
    curve.finish(closed, &ceilings).await
}

impl Curve<'_> {
    async fn point(&mut self, share: f64) -> anyhow::Result<Point> {
        let options = Common { rate: Some(self.closed_per_s * share), ..self.options.clone() };
        let report = chat::once(&mut self.target, &options, self.pairs).await?;
        let point = Point::of(share, &report);
        self.points.push(point);
        if report.promise_broken() {
            self.broken = Some(report);
        } else if point.fits() && self.best.as_ref().is_none_or(|best| best.offered_per_s < report.offered_per_s) {
            self.best = Some(report);
        }
        Ok(point)
    }

    /// The highest share that fits, between the last that does and the first that does not.
    async fn search(&mut self) -> anyhow::Result<()> {
        let (mut low, mut high) = bounds(&self.points);
        for _ in 0..HALVINGS {
            if high - low < 0.01 {
                break;
            }
            let middle = f64::midpoint(low, high);
            if self.point(middle).await?.fits() {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(())
    }

    async fn finish(mut self, closed: Report, ceilings: &[crate::ceiling::Ceiling]) -> anyhow::Result<Report> {
        self.points.sort_by(|one, other| one.offered_per_s.total_cmp(&other.offered_per_s));
        let quarter = self.points.iter().find(|point| point.share == QUARTER).copied();
        let found = self.best.is_some();
        let mut report = self.broken.take().or(self.best.take()).unwrap_or(closed);
        report.scenario = "curve".to_owned();
        if !found {
            report.reasons.push(format!("no rate left {:.0} % of the box free", (1.0 - BUSY_MAX) * 100.0));
        }
        report.detail("closed_loop_delivered_per_s", self.closed_per_s);
        report.detail("curve", &self.points);
        ratios(&mut report, ceilings, None);
        if let Some(quarter) = quarter {
            report.goals.extend(goals("at 25 % of the closed loop", quarter.delivery_us));
        }
        if found {
            let what = format!("at {:.0}/s, the most within 70 % of the box", report.offered_per_s);
            let delivery = report.delivery_us;
            report.goals.extend(goals(&what, delivery));
        }
        self.target.close(&mut report).await?;
        Ok(report)
    }
}

/// Where the search begins.
fn bounds(points: &[Point]) -> (f64, f64) {
    let low = points.iter().filter(|point| point.fits()).map(|point| point.share).fold(0.0, f64::max);
    let above = points.iter().filter(|point| !point.fits() && point.share > low).map(|point| point.share);
    (low, above.fold(f64::INFINITY, f64::min).min(SHARES[SHARES.len() - 1]).max(low))
}

fn goals(what: &str, us: Percentiles) -> [Goal; 3] {
    let goal = |name: &str, most: f64, micros: u64| {
        Goal::at_most("PF2", &format!("delivery {name} {what}, ms"), most, micros as f64 / 1000.0)
    };
    [goal("p50", 2.0, us.p50), goal("p99", 10.0, us.p99), goal("p99.9", 50.0, us.p999)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(share: f64, busy: f64, kept_up: bool) -> Point {
        let us = Percentiles::default();
        Point {
            share,
            offered_per_s: share,
            delivered_per_s: share,
            ack_us: us,
            delivery_us: us,
            server_cores: 0.0,
            generator_cores: 0.0,
            busy,
            kept_up,
        }
    }

    #[test]
    fn the_search_begins_between_the_last_that_fits_and_the_first_that_does_not() {
        let points = [point(0.25, 0.3, true), point(0.5, 0.6, true), point(0.7, 0.8, true), point(0.85, 0.6, false)];
        assert_eq!(bounds(&points), (0.5, 0.7));
        assert_eq!(bounds(&[point(1.0, 0.5, true)]), (1.0, 1.0), "all fits: nothing to search");
        assert_eq!(bounds(&[point(0.1, 0.9, true)]), (0.0, 0.1));
    }
}
