//! One-to-one: in each pair one user sends to the other. PF1 and PF2.

use super::{Target, ceilings, judge, peer, ratios, run_load, threads_of};
use crate::{
    ceiling::Workload,
    crowd::{Flow, LanePlan, Plan, SendPlan, With},
    load::{Load, LoadPlan},
    options::Common,
    report::{Goal, Report, round},
    stream::Transport,
};

/// TLS and QUIC: of what TCP has to reach.
const OTHER_TRANSPORTS: f64 = 0.6;
/// Pairs if the options do not say.
pub const PAIRS: usize = 100;

/// One run: closed loop, open loop with `--rate`, or one after the other with `--rate-of`.
pub async fn run(options: &Common) -> anyhow::Result<Report> {
    let pairs = options.pair_count(PAIRS);
    let ceilings = ceilings(options, Workload::Pairs, pairs).await?;
    let peer = match options.peer {
        Some(name) => Some(peer::measure(options, name, Workload::Pairs, pairs, options.peer_time()).await?),
        None => None,
    };
    let mut target = Target::open(options).await?;
    let mut options = options.clone();
    let closed = match options.rate_of {
        Some(share) => {
            let closed = closed_loop(&mut target, &options, pairs).await?;
            options.rate = Some(closed.delivered_per_s * share);
            Some(closed)
        }
        None => None,
    };
    let mut report = once(&mut target, &options, pairs).await?;
    if let Some(closed) = closed {
        report.detail("closed_loop_delivered_per_s", closed.delivered_per_s);
        report.detail("share_of_closed_loop", round(report.delivered_per_s / closed.delivered_per_s.max(1.0)));
    }
    ratios(&mut report, &ceilings, peer.as_ref());
    if options.rate.is_none()
        && let (Some(ratio), Some(peer)) = (report.ratio, peer.as_ref())
        && peer.on_disk_before_ack
    {
        let what = format!("{pairs} pairs over {:?}, delivered a second against peer {}", report.transport, peer.name);
        let wanted = if report.transport == Transport::Tcp { 1.0 } else { OTHER_TRANSPORTS };
        report.goals.push(Goal::at_least("PF1", &what, wanted, ratio));
    }
    target.close(&mut report).await?;
    Ok(report)
}

/// What the server reaches without a schedule, by users of their own.
pub async fn closed_loop(target: &mut Target, options: &Common, pairs: usize) -> anyhow::Result<Report> {
    let options = Common { rate: None, ..options.clone() };
    let report = once(target, &options, pairs).await?;
    anyhow::ensure!(!report.promise_broken(), "a promise did not hold in the closed loop: {:?}", report.reasons);
    anyhow::ensure!(report.delivered_per_s > 0.0, "the closed loop delivered nothing");
    Ok(report)
}

/// One load with users of its own, judged.
pub async fn once(target: &mut Target, options: &Common, pairs: usize) -> anyhow::Result<Report> {
    target.next_users();
    let load = Load::start(plan(target, options, pairs)?, target.endpoints.clone())?;
    let (mut report, outcome) = run_load(load, target, options, "chat").await?;
    report.connections = 2 * pairs;
    judge(target, options, outcome, &mut report).await;
    Ok(report)
}

/// Pairs of users, the first of each sends.
pub fn plan(target: &Target, options: &Common, pairs: usize) -> anyhow::Result<LoadPlan> {
    let mut groups = Vec::with_capacity(pairs);
    for pair in 0..pairs {
        let (sender, receiver) = (target.user(2 * pair), target.user(2 * pair + 1));
        let sends = SendPlan {
            flow: u32::try_from(pair)?,
            window: options.window,
            body_bytes: options.body,
            every: schedule(options.rate, pair, pairs),
        };
        let lane = |peer: &str, sends| LanePlan { with: With::Peer(peer.to_owned()), sends };
        let plan = |user: &str, lane| {
            anyhow::Ok(Plan {
                user: user.to_owned(),
                token: target.token(user)?,
                lanes: vec![lane],
                stalls: false,
                reads_every: None,
            })
        };
        groups.push(vec![plan(&sender, lane(&receiver, Some(sends)))?, plan(&receiver, lane(&sender, None))?]);
    }
    Ok(LoadPlan {
        transport: target.transport,
        threads: threads_of(groups, options.threads()),
        flows: (0..pairs).map(|_| Flow::new(1)).collect(),
        open_loop: options.rate.is_some(),
        reconnect: true,
        pin: options.pin,
    })
}

/// Microseconds between two sends of one of several senders, and when its first is due: evenly spread over all.
pub fn schedule(rate: Option<f64>, sender: usize, senders: usize) -> Option<(f64, f64)> {
    let between = 1e6 / rate?.max(0.001);
    Some((between * senders as f64, between * sender as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senders_share_the_rate_evenly() {
        assert_eq!(schedule(None, 0, 10), None);
        assert_eq!(schedule(Some(1000.0), 3, 10), Some((10_000.0, 3_000.0)));
    }
}
