//! Established users while others flood the server: connects, TLS handshakes begun and done, garbage.
//!
//! One open-loop chat of the same users, cut into short slices that are in peace or under one of the floods, in turns: what the disk and
//! the store do over the minutes (a slow sync, a flush) then falls on all of them alike. What is compared is the p99 of a window of a
//! quarter of a second, the median over the windows of a kind: a disk or a host that stands still once moves one window. The flood is a
//! process of its own that runs when nobody else wants to, so that what it costs the established users is the server's work and not the
//! flooder's, as far as the machine keeps them apart. What it takes for whole handshakes is a control: the same with another server.

mod careless;
mod decoy;
mod flooder;

use std::{process::Stdio, sync::Arc, time::Duration};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt as _, process::Command, time::Instant};

pub use self::flooder::attack;
use super::{Target, chat, judge, run_load_while};
use crate::{
    crowd::{Delays, Switches},
    load::Load,
    measure::Reading,
    options::Common,
    report::{Goal, Percentiles, Report, round},
    stream::Transport,
    usage::usage,
};

/// The p99 of established users may grow by this.
const GROWTH_MAX: f64 = 1.2;
/// A flood of less than this share of its rate says little.
const ATTEMPTED_MIN: f64 = 0.9;
/// Until the flooder has to begin, on a machine that has hardly anything left for it.
const BEGINS_WITHIN: Duration = Duration::from_secs(30);
/// Share of the closed loop's rate, if the options name neither rate nor share.
const LOAD: f64 = 0.25;
/// What a slice may be, in the order of the first round.
const KINDS: [Option<Flood>; 6] = [
    None,
    Some(Flood::Connects),
    Some(Flood::Hellos),
    Some(Flood::Elsewhere),
    Some(Flood::Handshakes),
    Some(Flood::Garbage),
];
/// The longest slice; `--seconds` of each kind are as many slices as that takes.
const SLICE: Duration = Duration::from_secs(2);
/// Windows of a slice: of a quarter of a second in the longest.
const WINDOWS: u32 = 8;
/// After a flood has begun, and after it has ended, nothing counts for so long.
const BETWEEN: Duration = Duration::from_millis(300);

/// What a server lets one address have in a second, and after a pause at once: the key, and what it is without a setting (docs/limits.md).
const ADMITTED_KEY: &str = "gateway.address_connects_per_second_max";
const ADMITTED: f64 = 50.0;

/// What the flood consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Flood {
    /// Connections that are opened and reset.
    Connects,
    /// The beginning of a TLS handshake, the same bytes each time, until the server has answered: it has computed its part then, and the
    /// flooder nothing.
    Hellos,
    /// Whole TLS handshakes as below with another server, in the process of the flooder: what the machine takes for them.
    Elsewhere,
    /// Whole TLS handshakes, and nothing after them. What the flooder computes for its part the machine of the server computes as well.
    Handshakes,
    /// Connections that send what is no frame, and datagrams that are no QUIC.
    Garbage,
}

/// What a flood did, as its process says.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
struct Attempts {
    done: u64,
    failed: u64,
    /// It took time from nobody: it was in the scheduler's class for that.
    yielded: bool,
}

/// All slices of one kind together.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    slices: u32,
    seconds: f64,
    server_core_seconds: f64,
    other_core_seconds: f64,
    attempts: Attempts,
    flooded_seconds: f64,
}

#[derive(Debug, Serialize)]
struct Phase {
    flood: Option<Flood>,
    slices: u32,
    attempts_per_s: f64,
    failed_per_s: f64,
    ack_us: Percentiles,
    delivery_us: Percentiles,
    server_cores: f64,
    other_cores: f64,
    /// The medians over the windows of the delivery's percentiles in each, µs.
    median_us: Medians,
    /// Those against the windows in peace.
    p50_against_peace: f64,
    p90_against_peace: f64,
    p99_against_peace: f64,
    /// The p99 of all messages against that of all in peace.
    p99_of_all_against_peace: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Medians {
    p50: u64,
    p90: u64,
    p99: u64,
}

/// One run: `--seconds` of each kind.
pub async fn run(options: &Common, rate: f64) -> anyhow::Result<Report> {
    let pairs = options.pair_count(chat::PAIRS);
    // Limits of addresses hold as they are by default. The established users, who have one address, come in at the pace that they allow.
    let raised = vec!["gateway.address_limits_loopback=true".to_owned()];
    let mut options = Common { also_raised: raised, ..options.clone() };
    let mut target = Target::open(&options).await?;
    if options.rate.is_none() {
        let closed = chat::closed_loop(&mut target, &options, pairs).await?;
        options.rate = Some(closed.delivered_per_s * options.rate_of.unwrap_or(LOAD));
    }
    let entrances = Entrances::of(&mut target, rate, admitted(&options.set)?).await?;
    target.next_users();
    let load = Load::start(chat::plan(&target, &options, pairs)?, target.endpoints.clone())?;
    let (switches, origin) = (Arc::clone(&load.switches), load.origin);
    let servers = target.pids();
    let slices = slices(options.time(), (&switches, origin), &servers, &entrances);
    let (mut report, mut outcome, sums) = run_load_while(load, &target, &options, "flood", slices).await?;
    report.connections = 2 * pairs;
    let delays = std::mem::take(&mut outcome.statistics.phases);
    judge(&target, &options, outcome, &mut report).await;
    compare(&mut report, &sums?, delays, rate);
    target.close(&mut report).await?;
    Ok(report)
}

/// Slices in rounds, each kind once a round for `each` in all; what happened in those of each kind.
async fn slices(
    each: Duration,
    (switches, origin): (&Switches, Instant),
    servers: &[u32],
    entrances: &Entrances,
) -> anyhow::Result<[Sum; KINDS.len()]> {
    let rounds = each.div_duration_f64(SLICE).ceil().max(1.0) as u32;
    let mut sums = [Sum::default(); KINDS.len()];
    let at = |moment: Duration| u64::try_from(moment.as_micros()).unwrap_or(u64::MAX);
    for (slice, kind) in (0..rounds).flat_map(order).enumerate() {
        let attacker = match KINDS[kind] {
            Some(flood) => Some(Attacker::start(entrances, flood).await?),
            None => None,
        };
        tokio::time::sleep(BETWEEN).await;
        let before = Reading::take(servers);
        let (begun, length) = (origin.elapsed(), each / rounds);
        // Messages count by the moment at which they were to be sent, so all of it is known now.
        for window in 0..WINDOWS {
            let begins = begun + length * window / WINDOWS;
            switches.timetable.begin(at(begins), Some(slice * WINDOWS as usize + window as usize));
        }
        switches.timetable.begin(at(begun + length), None);
        tokio::time::sleep_until(origin + begun + length).await;
        let usage = Reading::take(servers).since(&before);
        let sum = &mut sums[kind];
        sum.slices += 1;
        sum.seconds += usage.seconds;
        sum.server_core_seconds += usage.server_cores * usage.seconds;
        sum.other_core_seconds += usage.other_cores * usage.seconds;
        if let Some(attacker) = attacker {
            let (attempts, seconds) = attacker.stop().await?;
            sum.attempts.done += attempts.done;
            sum.attempts.failed += attempts.failed;
            sum.attempts.yielded = attempts.yielded;
            sum.flooded_seconds += seconds;
        }
        tokio::time::sleep(BETWEEN).await;
    }
    Ok(sums)
}

/// The kinds of one round. Each round begins with another, and every second goes backwards, so that no kind always follows the same.
fn order(round: u32) -> [usize; KINDS.len()] {
    let kinds = KINDS.len();
    let forwards = |place: usize| (place + round as usize / 2) % kinds;
    std::array::from_fn(|place| forwards(if round.is_multiple_of(2) { place } else { kinds - 1 - place }))
}

/// What each flood did to the established users, against the slices in peace.
fn compare(report: &mut Report, sums: &[Sum; KINDS.len()], mut windows: Vec<Delays>, rate: f64) {
    let rounds = sums[0].slices;
    windows.resize_with(rounds as usize * KINDS.len() * WINDOWS as usize, Delays::default);
    let of_kind = |kind: usize| {
        let slices = windows.chunks(WINDOWS as usize).zip((0..rounds).flat_map(order));
        slices.filter(move |(_, other)| *other == kind).flat_map(|(windows, _)| windows)
    };
    let mut peace: Option<(Medians, Percentiles)> = None;
    let mut elsewhere: Option<Medians> = None;
    let mut phases = Vec::with_capacity(KINDS.len());
    for (kind, (flood, sum)) in KINDS.into_iter().zip(sums).enumerate() {
        let mut all = Delays::default();
        of_kind(kind).for_each(|window| all.add(window));
        if all.delivery.count() == 0 {
            let when = flood.map_or_else(|| "in peace".to_owned(), |flood| format!("under {flood:?}"));
            report.broke(format!("nothing that was to be sent {when} was delivered"));
        }
        let (medians, delivery) = (Medians::of(of_kind(kind)), all.delivery.percentiles());
        let peace = *peace.get_or_insert((medians, delivery));
        let against = |own: u64, peace: u64| own as f64 / peace.max(1) as f64;
        let a_second = |count: u64| round(count as f64 / sum.flooded_seconds.max(1e-9));
        let cores = |core_seconds: f64| round(core_seconds / sum.seconds.max(1e-9));
        let p99 = against(medians.p99, peace.0.p99);
        if let Some(flood) = flood {
            let mut ask_for = |against: &str, ratio| {
                let what = format!("delivery p99 of established users under {flood:?} against that {against}");
                report.goals.push(Goal::at_most("flood", &what, GROWTH_MAX, ratio));
            };
            match flood {
                // What the machine takes is nobody's goal, but what the server adds to it is.
                Flood::Elsewhere => elsewhere = Some(medians),
                Flood::Handshakes => {
                    ask_for("in peace", p99);
                    if let Some(elsewhere) = elsewhere {
                        ask_for("under those with another server", against(medians.p99, elsewhere.p99));
                    }
                }
                Flood::Connects | Flood::Hellos | Flood::Garbage => ask_for("in peace", p99),
            }
            if !sum.attempts.yielded {
                report
                    .reasons
                    .push(format!("{flood:?} took cores from those whom it disturbed: `chrt --idle` did not work"));
            }
            let attempted = a_second(sum.attempts.done + sum.attempts.failed);
            if attempted < ATTEMPTED_MIN * rate {
                report.reasons.push(format!(
                    "{flood:?} came {attempted} times a second of {rate}: the machine had no more for them"
                ));
            }
        }
        phases.push(Phase {
            flood,
            slices: sum.slices,
            attempts_per_s: a_second(sum.attempts.done),
            failed_per_s: a_second(sum.attempts.failed),
            ack_us: all.ack.percentiles(),
            delivery_us: delivery,
            server_cores: cores(sum.server_core_seconds),
            other_cores: cores(sum.other_core_seconds),
            median_us: medians,
            p50_against_peace: round(against(medians.p50, peace.0.p50)),
            p90_against_peace: round(against(medians.p90, peace.0.p90)),
            p99_against_peace: round(p99),
            p99_of_all_against_peace: round(against(delivery.p99, peace.1.p99)),
        });
    }
    report.detail("phases", phases);
    // The flood itself is no other.
    report.others(sums[0].other_core_seconds / sums[0].seconds.max(1e-9));
}

impl Medians {
    /// A window in which nothing was delivered is the slowest of all.
    fn of<'a>(windows: impl Iterator<Item = &'a Delays>) -> Self {
        let never = Percentiles { p50: u64::MAX, p90: u64::MAX, p99: u64::MAX, ..Percentiles::default() };
        let of_window =
            |window: &Delays| if window.delivery.count() > 0 { window.delivery.percentiles() } else { never };
        let each: Vec<Percentiles> = windows.map(of_window).collect();
        let median = |of: fn(&Percentiles) -> u64| {
            let mut sorted: Vec<u64> = each.iter().map(of).collect();
            sorted.sort_unstable();
            sorted.get(sorted.len() / 2).copied().unwrap_or_default()
        };
        Self { p50: median(|window| window.p50), p90: median(|window| window.p90), p99: median(|window| window.p99) }
    }
}

/// What a server lets one address have: the last of the settings that says so, else the default of `imd`.
pub fn admitted(settings: &[String]) -> anyhow::Result<f64> {
    let mut values = settings.iter().filter_map(|setting| setting.strip_prefix(ADMITTED_KEY)?.strip_prefix('='));
    match values.next_back().map(|value| value.trim().replace('_', "").parse::<u32>()) {
        None => Ok(ADMITTED),
        Some(Ok(0)) => Ok(f64::INFINITY),
        Some(Ok(connects)) => Ok(connects.into()),
        Some(Err(error)) => {
            Err(usage(format!("{ADMITTED_KEY} is a number of connects a second, 0 for no limit: {error}")))
        }
    }
}

/// Where a flood goes.
struct Entrances {
    tcp: String,
    tls: String,
    quic: String,
    rate: f64,
    /// Connects a second that the server lets one address have.
    admitted: f64,
}

impl Entrances {
    async fn of(target: &mut Target, rate: f64, admitted: f64) -> anyhow::Result<Self> {
        let process = target.process.as_mut().context("there is no own server")?;
        let mut tls = process.endpoints(Transport::Tls).await?;
        let mut quic = process.endpoints(Transport::Quic).await?;
        let mut tcp = process.endpoints(Transport::Tcp).await?;
        let first = |addresses: &mut Vec<String>| addresses.swap_remove(0);
        let [tcp, quic] = [&mut tcp, &mut quic].map(|endpoints| first(&mut endpoints.addresses));
        Ok(Self { tcp, tls: first(&mut tls.addresses), quic, rate, admitted })
    }
}

/// The process that floods.
struct Attacker {
    child: tokio::process::Child,
    begun: Instant,
}

impl Attacker {
    async fn start(entrances: &Entrances, flood: Flood) -> anyhow::Result<Self> {
        let is_tls = matches!(flood, Flood::Hellos | Flood::Handshakes);
        let address = if is_tls { &entrances.tls } else { &entrances.tcp };
        let own = std::env::current_exe().context("find the own program")?;
        let mut command = Command::new(own);
        let kind = serde_json::to_value(flood)?;
        command.args(["flood-client", "--kind", kind.as_str().unwrap_or_default(), "--address", address]);
        command.args(["--rate", &entrances.rate.to_string(), "--admitted", &entrances.admitted.to_string()]);
        if flood == Flood::Garbage {
            command.args(["--udp", &entrances.quic]);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("start the flood")?;
        // It says that it has begun.
        let output = child.stdout.as_mut().context("read from the flood")?;
        let begins = tokio::time::timeout(BEGINS_WITHIN, output.read_u8()).await;
        anyhow::ensure!(begins.is_ok_and(|begins| begins.is_ok_and(|byte| byte == b'\n')), "the flood did not start");
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

#[cfg(test)]
mod tests {
    use super::{ADMITTED, ADMITTED_KEY, Delays, KINDS, Medians, admitted, order};

    #[test]
    fn the_control_admits_what_the_server_does() {
        let set = |value: &str| admitted(&["gateway.x=1".to_owned(), format!("{ADMITTED_KEY}={value}")]);
        assert_eq!(admitted(&[]).unwrap(), ADMITTED);
        assert_eq!((set("2_00").unwrap(), set("0").unwrap()), (200.0, f64::INFINITY));
        set("many").unwrap_err();
    }

    #[test]
    fn a_disk_that_stands_still_once_moves_one_window() {
        let windows: Vec<Delays> = (0_u64..5)
            .map(|window| {
                let mut delays = Delays::default();
                for message in 1..=100 {
                    delays.delivery.record(if window == 1 { 500_000 } else { message });
                }
                delays
            })
            .chain([Delays::default()])
            .collect();
        let medians = Medians::of(windows.iter());
        assert_eq!((medians.p50, medians.p90, medians.p99), (50, 90, 99));
    }

    #[test]
    fn over_twelve_rounds_each_kind_has_each_place_as_often() {
        let mut places = [[0; KINDS.len()]; KINDS.len()];
        for round in 0..12 {
            for (place, kind) in order(round).into_iter().enumerate() {
                places[kind][place] += 1;
            }
        }
        assert_eq!(places, [[2; KINDS.len()]; KINDS.len()]);
    }
}
