//! One-to-one: in each pair one user sends to the other. PF1 and PF2.

use super::{Target, add_ceilings, ceilings, judge, run_load, threads_of};
use crate::{
    ceiling::Workload,
    crowd::{Flow, LanePlan, Plan, SendPlan, With},
    load::{Load, LoadPlan},
    options::Common,
    report::Report,
};

/// Pairs if the options do not say.
const PAIRS: usize = 100;

/// One run.
pub async fn run(options: &Common) -> anyhow::Result<Report> {
    let pairs = options.pair_count(PAIRS);
    let ceilings = ceilings(options, Workload::Pairs, pairs).await?;
    let target = Target::open(options).await?;
    let plan = plan(&target, options, pairs)?;
    let load = Load::start(plan, target.endpoints.clone())?;
    let (mut report, outcome) = run_load(load, &target, options, "chat").await?;
    report.connections = 2 * pairs;
    judge(&target, options, outcome, &mut report).await?;
    add_ceilings(&mut report, &ceilings);
    target.close(&mut report).await?;
    Ok(report)
}

fn plan(target: &Target, options: &Common, pairs: usize) -> anyhow::Result<LoadPlan> {
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
            anyhow::Ok(Plan { user: user.to_owned(), token: target.token(user)?, lanes: vec![lane] })
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
