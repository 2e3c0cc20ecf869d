//! What the clients saw over time, with marks for what was done to the servers.
//!
//! Sampled from the load's progress counters: acknowledgements, clients with a session, and *stalled* conversations, whose oldest
//! unacknowledged send is older than [`STALLED_AFTER`]. In an open loop that may be one that is due and not written, for its client has
//! no session. After a mark, service is back when nothing is stalled any more.

use std::{
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio::time::Instant;

use crate::{crowd::Progress, driver::Micros, load::total};

/// A send that waits longer than this stalls its conversation: far above any commit, far below a lease.
pub const STALLED_AFTER: Micros = 500_000;
const INTERVAL: Duration = Duration::from_millis(100);
/// Columns of the plot.
const COLUMNS: usize = 100;
const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A recording under way.
pub struct Timeline {
    record: Arc<Mutex<Recorded>>,
    begun: Instant,
    /// Ends with this.
    _sampler: tokio::task::JoinSet<()>,
}

/// What was recorded.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Recorded {
    pub interval_ms: u64,
    pub samples: Vec<Sample>,
    pub marks: Vec<Mark>,
}

/// The end of one interval.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Sample {
    pub at_ms: u64,
    /// Acknowledged within the interval.
    pub acked: u64,
    /// Clients with a session.
    pub live: u64,
    /// Conversations that wait.
    pub stalled: u64,
}

/// Something that was done.
#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    pub at_ms: u64,
    pub what: String,
    /// Until nothing was stalled any more; 0 if nothing ever was. Counted up to the next mark.
    pub back_after_ms: u64,
    /// The most conversations that were stalled at once.
    pub stalled_max: u64,
    /// Something was still stalled at the next mark, or at the end.
    pub still_stalled: bool,
}

impl Timeline {
    /// Samples until it is finished.
    pub fn start(progress: Arc<Progress>) -> Self {
        let begun = Instant::now();
        let interval_ms = u64::try_from(INTERVAL.as_millis()).unwrap_or(u64::MAX);
        let record = Arc::new(Mutex::new(Recorded { interval_ms, ..Recorded::default() }));
        let mut sampler = tokio::task::JoinSet::new();
        let shared = Arc::clone(&record);
        sampler.spawn(async move {
            let mut ticks = tokio::time::interval(INTERVAL);
            let mut before = total(&progress.acknowledged);
            loop {
                ticks.tick().await;
                let acknowledged = total(&progress.acknowledged);
                lock(&shared).samples.push(Sample {
                    at_ms: elapsed_ms(begun),
                    acked: acknowledged.saturating_sub(before),
                    live: total(&progress.live),
                    stalled: total(&progress.stalled),
                });
                before = acknowledged;
            }
        });
        Self { record, begun, _sampler: sampler }
    }

    /// Notes what is done now.
    pub fn mark(&self, what: &str) {
        let what: String = what.chars().filter(|c| !c.is_control()).take(200).collect();
        let at_ms = elapsed_ms(self.begun);
        let mark = Mark { at_ms, what, back_after_ms: 0, stalled_max: 0, still_stalled: false };
        lock(&self.record).marks.push(mark);
    }

    /// Ends the recording.
    pub fn finish(self) -> Recorded {
        let mut record = std::mem::take(&mut *lock(&self.record));
        record.judge();
        record
    }
}

impl Recorded {
    fn judge(&mut self) {
        let ends: Vec<u64> = self.marks.iter().skip(1).map(|mark| mark.at_ms).chain([u64::MAX]).collect();
        for (mark, end) in self.marks.iter_mut().zip(ends) {
            let after = self.samples.iter().filter(|sample| sample.at_ms > mark.at_ms && sample.at_ms <= end);
            for sample in after {
                mark.stalled_max = mark.stalled_max.max(sample.stalled);
                mark.still_stalled = sample.stalled > 0;
                if sample.stalled > 0 {
                    mark.back_after_ms = sample.at_ms + self.interval_ms - mark.at_ms;
                }
            }
        }
    }

    /// Seconds from a mark that is no end of something until nothing was stalled any more: the longest. What was still stalled at the
    /// next mark counts up to the moment at which it no longer was.
    pub fn longest_outage(&self) -> f64 {
        let faults = self.marks.iter().filter(|mark| !mark.what.starts_with("end:"));
        let outages = faults.map(|mark| {
            let mut after = self.samples.iter().filter(|sample| sample.at_ms > mark.at_ms);
            // Up to the first moment with nothing stalled after the last one of this mark.
            let until = mark.at_ms + mark.back_after_ms;
            let end = after.clone().find(|sample| sample.at_ms >= until && sample.stalled == 0);
            match (mark.stalled_max, end) {
                (0, _) => 0,
                (_, Some(sample)) => sample.at_ms - mark.at_ms,
                (_, None) => after.next_back().map_or(0, |sample| sample.at_ms - mark.at_ms),
            }
        });
        outages.max().unwrap_or(0) as f64 / 1000.0
    }

    /// Acknowledgements and stalled conversations over time, for a terminal. Marks stand below, with their numbers in the list.
    pub fn plot(&self) -> String {
        let mut out = String::new();
        let per_column = self.samples.len().div_ceil(COLUMNS).max(1);
        let columns: Vec<&[Sample]> = self.samples.chunks(per_column).collect();
        let row = |title: &str, of: &dyn Fn(&[Sample]) -> u64| {
            let values: Vec<u64> = columns.iter().map(|samples| of(samples)).collect();
            let top = values.iter().copied().max().unwrap_or(0);
            let scale = |value: u64| value.saturating_mul(8).div_ceil(top.max(1)).min(8);
            let bars: String = values.iter().map(|value| BARS[usize::try_from(scale(*value)).unwrap_or(0)]).collect();
            (format!("{title:<13}|{bars}|"), top)
        };
        let column_ms = self.interval_ms * per_column as u64;
        let (acked, top) = row("acknowledged", &|samples| samples.iter().map(|sample| sample.acked).sum());
        let _ = writeln!(out, "{acked} up to {}/s", top * 1000 / column_ms.max(1));
        let (stalled, top) = row("stalled", &|samples| samples.iter().map(|sample| sample.stalled).max().unwrap_or(0));
        let _ = writeln!(out, "{stalled} up to {top} conversations");
        let mut marks = vec![' '; columns.len() + 4];
        for (number, mark) in self.marks.iter().enumerate() {
            let at = usize::try_from(mark.at_ms / column_ms.max(1)).unwrap_or(usize::MAX);
            for (offset, digit) in (number + 1).to_string().chars().enumerate() {
                if let Some(place) = marks.get_mut(at.saturating_add(offset)) {
                    *place = digit;
                }
            }
        }
        let marks: String = marks.into_iter().collect();
        let _ = writeln!(out, "{:<13}|{}  a column is {:.1} s", "", marks.trim_end(), column_ms as f64 / 1000.0);
        for (number, mark) in self.marks.iter().enumerate() {
            let back = match (mark.still_stalled, mark.stalled_max) {
                (true, _) => "not back before the next".to_owned(),
                (false, 0) => "no conversation waited".to_owned(),
                (false, most) => format!("back after {:.1} s, up to {most} waited", mark.back_after_ms as f64 / 1000.0),
            };
            let _ = writeln!(out, "{:>4}  {:>7.1} s  {}: {back}", number + 1, mark.at_ms as f64 / 1000.0, mark.what);
        }
        out
    }
}

fn elapsed_ms(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn lock(record: &Mutex<Recorded>) -> MutexGuard<'_, Recorded> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(stalled: &[u64], marks: &[u64]) -> Recorded {
        let sample = |(index, stalled): (usize, &u64)| Sample {
            at_ms: (index as u64 + 1) * 100,
            acked: 10,
            live: 1,
            stalled: *stalled,
        };
        let mark = |at_ms: &u64| Mark {
            at_ms: *at_ms,
            what: "it".into(),
            back_after_ms: 0,
            stalled_max: 0,
            still_stalled: false,
        };
        let mut recorded = Recorded {
            interval_ms: 100,
            samples: stalled.iter().enumerate().map(sample).collect(),
            marks: marks.iter().map(mark).collect(),
        };
        recorded.judge();
        recorded
    }

    #[test]
    fn service_is_back_when_nothing_is_stalled_any_more() {
        let recorded = recorded(&[0, 0, 3, 5, 1, 0, 0, 0, 2, 2], &[150, 650]);
        let first = &recorded.marks[0];
        assert_eq!((first.back_after_ms, first.stalled_max, first.still_stalled), (450, 5, false));
        let second = &recorded.marks[1];
        assert_eq!((second.stalled_max, second.still_stalled), (2, true));
    }

    #[test]
    fn an_outage_lasts_until_nothing_is_stalled_whatever_is_done_meanwhile() {
        let outage = |stalled: &[u64], marks: &[u64]| recorded(stalled, marks).longest_outage();
        assert_eq!(outage(&[0, 0, 0, 0], &[150]), 0.0);
        assert_eq!(outage(&[0, 0, 3, 5, 0, 0], &[150]), 0.35);
        // The second mark comes while the first is not over.
        assert_eq!(outage(&[0, 0, 3, 5, 1, 0], &[150, 350]), 0.45);
        // Never back.
        assert_eq!(outage(&[0, 1, 1, 1], &[50]), 0.35);
        let mut ended = recorded(&[0, 0, 1, 1, 0], &[150]);
        ended.marks[0].what = "end: it".to_owned();
        assert_eq!(ended.longest_outage(), 0.0);
    }

    #[test]
    fn the_plot_has_a_column_for_each_time_and_a_number_for_each_mark() {
        let plot = recorded(&[0, 0, 4, 0], &[100]).plot();
        let lines: Vec<&str> = plot.lines().collect();
        assert_eq!(lines[0], "acknowledged |████| up to 100/s");
        assert_eq!(lines[1], "stalled      |  █ | up to 4 conversations");
        assert!(lines[2].starts_with("             | 1  a column"), "{plot}");
        assert!(lines[3].contains("back after 0.3 s, up to 4 waited"), "{plot}");
    }
}
