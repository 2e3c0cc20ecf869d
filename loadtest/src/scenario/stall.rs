//! A group some of whose readers stop reading, with their connections open. PF11.
//!
//! The same load twice: first all read, then some do not. What the others see must not change, and what waits for the stalled ones must
//! stay under the server's own limits. Each run has a fresh server: what a cold one takes for itself (caches, memtables, heap) it takes
//! in both, so that the difference is what it keeps for the stalled ones. The memory of one that runs already (`--server`) is not judged.

use super::{Target, fanout, judge, run_load_while};
use crate::{
    load::Load,
    measure,
    options::Common,
    report::{Goal, Report, round},
    stream::Transport,
};

/// Messages a second if the options do not say: with 1,000 members 100,000 deliveries.
const RATE: f64 = 100.0;
/// What the server keeps for a connection at most, as a multiple of `gateway.outbox_bytes_max`: there it closes it.
const OUTBOXES: f64 = 2.0;
const OUTBOX_KEY: &str = "gateway.outbox_bytes_max";
/// What QUIC keeps besides until the client has acknowledged it. A test holds it against the gateway.
const QUIC_SEND_WINDOW: u64 = 256 * 1024;
/// The others' p99 may grow by this.
const GROWTH_MAX: f64 = 1.1;

/// One run.
pub async fn run(options: &Common, stalled: usize) -> anyhow::Result<Report> {
    let options = Common { rate: Some(options.rate.unwrap_or(RATE)), ..options.clone() };
    let mut closed = Report::default();
    if options.fill > 0 && options.data.is_some() {
        // Else the first of the two would be the warm one, with what it has just filled.
        Target::open(&options).await?.close(&mut closed).await?;
    }
    let mut target = Target::open(&options).await?;
    let (without, without_growth) = once(&mut target, &options, 0).await?;
    target.close(&mut closed).await?;
    let mut target = Target::open(&options).await?;
    let (mut report, growth) = once(&mut target, &options, stalled).await?;
    report.reasons.append(&mut closed.reasons);
    let ratio = report.delivery_us.p99 as f64 / without.delivery_us.p99.max(1) as f64;
    report.detail("stalled", stalled);
    report.detail(
        "without",
        serde_json::json!({
            "delivery_us": without.delivery_us, "ack_us": without.ack_us, "delivered_per_s": without.delivered_per_s,
            "server_rss_growth_bytes": without_growth,
        }),
    );
    report.detail("p99_against_without", round(ratio));
    report.detail("server_rss_growth_bytes", growth);
    report.goals.push(Goal::at_most("PF11", "the others' delivery p99 against the run without", GROWTH_MAX, ratio));
    if let Some(outbox) = target.setting(OUTBOX_KEY).and_then(|text| bytes(&text)) {
        let (each, arithmetic) = bound(outbox, target.transport);
        let bound = each * stalled as f64;
        report.detail("memory_bound_bytes", bound);
        report.detail("memory_bound", format!("{stalled} stalled × {arithmetic}"));
        let beyond = growth as f64 - without_growth as f64;
        report.goals.push(Goal::at_most(
            "PF11",
            "growth of the server's memory beyond the run without, bytes",
            bound,
            beyond,
        ));
    }
    if without.promise_broken() {
        report.reasons.push("a promise did not hold in the run without stalled readers".to_owned());
        (report.lost, report.duplicated) = (report.lost + without.lost, report.duplicated + without.duplicated);
        report.reordered += without.reordered;
        report.broken.extend(without.broken);
    }
    target.close(&mut report).await?;
    Ok(report)
}

/// One load; the report of those who read, and by how much the server's memory grew at most meanwhile.
async fn once(target: &mut Target, options: &Common, stalled: usize) -> anyhow::Result<(Report, u64)> {
    target.next_users();
    let users: Vec<String> = (0..=options.members()).map(|index| target.user(index)).collect();
    let group = fanout::create_group(target, &users).await?;
    let plan = fanout::plan(target, options, &users, group, stalled)?;
    let servers = target.pids();
    let load = Load::start(plan, target.endpoints.clone())?;
    load.all_live(super::LIVE_WITHIN).await?;
    let before = measure::rss_bytes(&servers);
    let time = tokio::time::sleep(options.time());
    let running = run_load_while(load, target, options, "stall", time);
    let (peak, ended) = measure::peak_rss(&servers, running).await;
    let (mut report, outcome, ()) = ended?;
    report.connections = users.len();
    judge(target, options, outcome, &mut report).await;
    Ok((report, peak.saturating_sub(before)))
}

/// What a stalled connection may hold, and how that comes about.
fn bound(outbox: u64, transport: Transport) -> (f64, String) {
    let outboxes = outbox as f64 * OUTBOXES;
    let arithmetic = format!("{OUTBOXES} × {OUTBOX_KEY} {outbox}");
    match transport {
        // What the kernel holds is no memory of the process.
        Transport::Tcp | Transport::Tls => (outboxes, arithmetic),
        Transport::Quic => {
            (outboxes + QUIC_SEND_WINDOW as f64, format!("({arithmetic} + QUIC's send window {QUIC_SEND_WINDOW})"))
        }
    }
}

/// A size as the server's configuration writes it.
pub(super) fn bytes(text: &str) -> Option<u64> {
    let text = text.trim().trim_matches('"');
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text[digits.len()..].trim() {
        "" | "B" => 1,
        "KiB" => 1024,
        "MiB" => 1024 * 1024,
        "GiB" => 1024 * 1024 * 1024,
        _ => return None,
    };
    digits.replace('_', "").parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::{QUIC_SEND_WINDOW, Transport, bound};

    #[test]
    fn over_quic_the_send_window_of_the_gateway_is_part_of_the_bound() {
        let source = include_str!("../../../gateway/src/listener/quic.rs");
        let window =
            source.lines().find_map(|line| line.strip_prefix("const SEND_WINDOW_BYTES: u64 = ")?.strip_suffix(';'));
        let bytes: u64 =
            window.expect("a send window").split(" * ").map(|factor| factor.parse::<u64>().unwrap()).product();
        assert_eq!(bytes, QUIC_SEND_WINDOW);
        let (tcp, quic) = (bound(1024, Transport::Tcp).0, bound(1024, Transport::Quic).0);
        assert_eq!((tcp, quic - tcp), (2048.0, QUIC_SEND_WINDOW as f64));
    }

    #[test]
    fn sizes_are_read_as_the_configuration_writes_them() {
        assert_eq!(super::bytes("\"1MiB\""), Some(1024 * 1024));
        assert_eq!(super::bytes("64 KiB"), Some(64 * 1024));
        assert_eq!(super::bytes("12"), Some(12));
        assert_eq!(super::bytes("1 lot"), None);
    }
}
