//! What `imd simulate` prints.

use std::{collections::BTreeMap, fmt::Write as _, io::Write as _};

use super::{Report, run};
use crate::{args::SimulateArguments, failure::Failure};

/// Findings of one seed that are printed.
const FINDINGS_MAX: usize = 12;

/// Runs the seeds that were asked for.
pub fn command(options: &SimulateArguments) -> Result<(), Failure> {
    let (from, count) = match options.seed {
        Some(seed) => (seed, 1),
        None => (options.from, options.seeds),
    };
    let mut all = Totals::default();
    for seed in from..from.saturating_add(count) {
        let report = run(seed, options.trace);
        all.add(&report);
        print(&line(&report))?;
        if !report.broken.is_empty() && !options.keep_going {
            break;
        }
    }
    print(&all.summary())?;
    if all.broken.is_empty() {
        return Ok(());
    }
    let seeds: Vec<String> = all.broken.iter().map(u64::to_string).collect();
    let first = seeds.first().cloned().unwrap_or_default();
    Err(Failure::Promise(format!(
        "promises were broken in the runs of these seeds: {}\nreplay: imd simulate --seed {first} --trace",
        seeds.join(", ")
    )))
}

#[derive(Default)]
struct Totals {
    runs: u64,
    sent: u64,
    acknowledged: u64,
    shown: u64,
    stored_late: u64,
    simulated_seconds: u64,
    faults: BTreeMap<&'static str, u64>,
    broken: Vec<u64>,
}

impl Totals {
    fn add(&mut self, report: &Report) {
        self.runs += 1;
        self.sent += report.sent;
        self.acknowledged += report.acknowledged;
        self.shown += report.shown;
        self.stored_late += report.stored_late;
        self.simulated_seconds += report.lasted.as_secs();
        for (kind, count) in &report.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        if !report.broken.is_empty() {
            self.broken.push(report.seed);
        }
    }

    fn summary(&self) -> String {
        let mut text = format!(
            "{} runs, {} broken; {} sends, {} acknowledged, {} entries shown, {} s simulated\n",
            self.runs,
            self.broken.len(),
            self.sent,
            self.acknowledged,
            self.shown,
            self.simulated_seconds
        );
        let faults: Vec<String> = self.faults.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        let _ = writeln!(text, "faults: {}", faults.join(", "));
        if self.stored_late > 0 {
            let late = self.stored_late;
            let _ =
                writeln!(text, "{late} entries were refused and had come by an earlier connection (SPEC.md, Sending)");
        }
        text
    }
}

fn line(report: &Report) -> String {
    let faults: u64 = report.faults.values().sum();
    let mut text = format!(
        "seed {}: {}, {} sends, {} acknowledged, {} entries shown, {faults} faults, {:.1} s simulated, trace {:016x}\n",
        report.seed,
        if report.broken.is_empty() { "ok" } else { "BROKEN" },
        report.sent,
        report.acknowledged,
        report.shown,
        report.lasted.as_secs_f64(),
        report.trace
    );
    for finding in report.broken.iter().take(FINDINGS_MAX) {
        let _ = writeln!(text, "  {finding}");
    }
    if report.broken.len() > FINDINGS_MAX {
        let _ = writeln!(text, "  and {} more", report.broken.len() - FINDINGS_MAX);
    }
    text
}

/// A closed pipe ends nothing.
fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::Operation(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}
