//! The instances that calls can go to, as the registry's view has them, each with its connection and its health.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use im_proto::{InstanceId, environment::Environment};
use parking_lot::{Mutex, RwLock};
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};

use super::{
    ChannelOptions,
    health::{Health, Outcome},
    metrics::Metrics,
};
use crate::View;

pub(super) struct Member {
    pub(super) id: InstanceId,
    address: String,
    /// Connects when it is first used, and again when the connection is gone.
    pub(super) channel: Channel,
    in_flight: AtomicUsize,
    health: Mutex<Health>,
}

/// A call that runs at a member.
pub(super) struct InFlight(pub(super) Arc<Member>);

impl InFlight {
    pub(super) fn at(member: &Arc<Member>) -> Self {
        member.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(member.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One instance and whether it takes new work.
type Listed = (Arc<Member>, bool);

pub(super) struct Members {
    options: ChannelOptions,
    environment: Environment,
    metrics: Metrics,
    listed: RwLock<Arc<Vec<Listed>>>,
}

impl Members {
    pub(super) fn new(options: ChannelOptions, environment: Environment) -> Self {
        Self { options, environment, metrics: Metrics::new(), listed: RwLock::default() }
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    pub(super) fn options(&self) -> &ChannelOptions {
        &self.options
    }

    /// Takes over a view. Who is still there under the same address keeps connection and health.
    pub(super) fn reconcile(&self, view: &View) {
        let known: BTreeMap<InstanceId, Arc<Member>> =
            self.listed.read().iter().map(|(member, _)| (member.id.clone(), member.clone())).collect();
        let mut listed = Vec::new();
        for instance in view.of_role(self.options.role) {
            let transport = &self.options.transport;
            let Some(endpoint) = instance.endpoints.iter().find(|endpoint| endpoint.transport == *transport) else {
                continue;
            };
            let member = match known.get(&instance.id) {
                Some(member) if member.address == endpoint.address => member.clone(),
                _ => match self.connect(&instance.id, &endpoint.address) {
                    Ok(member) => Arc::new(member),
                    Err(error) => {
                        tracing::warn!(instance = %instance.id, address = %endpoint.address, %error, "no usable address");
                        continue;
                    }
                },
            };
            listed.push((member, !instance.draining));
        }
        self.metrics.members.set(listed.len() as f64);
        *self.listed.write() = Arc::new(listed);
    }

    fn connect(&self, id: &InstanceId, address: &str) -> Result<Member, tonic::transport::Error> {
        let scheme = if self.options.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))?
            .connect_timeout(self.options.connect_timeout)
            .tcp_nodelay(true)
            // A peer that is gone without a word is noticed, and its calls fail, after the sum of both.
            .http2_keep_alive_interval(self.options.ping)
            .keep_alive_timeout(self.options.ping)
            .keep_alive_while_idle(false);
        if let Some(tls) = &self.options.tls {
            endpoint = endpoint.tls_config(tls.clone())?;
        }
        Ok(Member {
            id: id.clone(),
            address: address.to_owned(),
            channel: endpoint.connect_lazy(),
            in_flight: AtomicUsize::new(0),
            health: Mutex::default(),
        })
    }

    /// Whom to send a call to that failed at `tried` already: of two random ones the one with fewer calls in flight. Ejected and
    /// draining ones only if there is nobody else, and never one that was tried.
    pub(super) fn pick(&self, tried: &[Arc<Member>]) -> Option<Arc<Member>> {
        let listed = self.listed.read().clone();
        let now = Instant::now();
        let untried = listed.iter().filter(|(member, _)| !tried.iter().any(|tried| Arc::ptr_eq(tried, member)));
        let untried: Vec<&Listed> = untried.collect();
        let load = |member: &Member| member.in_flight.load(Ordering::Relaxed);
        let healthy = |(member, _): &&&Listed| member.health.lock().takes_calls(now, load(member));
        let best: Vec<&Listed> = untried.iter().filter(|listed| listed.1).filter(healthy).copied().collect();
        let draining: Vec<&Listed> = untried.iter().filter(healthy).copied().collect();
        let from = [best, draining, untried].into_iter().find(|candidates| !candidates.is_empty())?;
        let (one, other) = two_of(from.len(), self.environment.random.next_u64());
        let (one, other) = (&from[one].0, &from[other].0);
        Some(if load(other) < load(one) { other.clone() } else { one.clone() })
    }

    /// Notes what became of a call.
    pub(super) fn note(&self, member: &Member, outcome: Outcome) {
        let jitter = self.environment.jitter(Duration::from_secs(1));
        if member.health.lock().note(outcome, Instant::now(), &self.options.ejection, jitter) {
            self.metrics.ejections.increment(1);
            tracing::warn!(instance = %member.id, address = %member.address, "an instance does not answer and gets no calls for a while");
        }
    }
}

/// Two different positions below `count`, or twice the only one.
fn two_of(count: usize, random: u64) -> (usize, usize) {
    // Both halves of the bits are uniform.
    let pick = |bits: u64, below: usize| {
        let below = u64::try_from(below).unwrap_or(1).max(1);
        usize::try_from((bits & 0xffff_ffff) % below).unwrap_or(0)
    };
    let one = pick(random, count);
    if count < 2 {
        return (one, one);
    }
    let other = pick(random >> 32, count - 1);
    (one, if other >= one { other + 1 } else { other })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_different_ones_are_drawn_and_each_pair_is_as_likely() {
        let mut drawn: BTreeMap<(usize, usize), u32> = BTreeMap::new();
        let mut random = 1_u64;
        for _ in 0..12_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let pair = two_of(4, random.rotate_left(17));
            assert!(pair.0 != pair.1 && pair.0 < 4 && pair.1 < 4);
            *drawn.entry(pair).or_default() += 1;
        }
        assert_eq!(drawn.len(), 12);
        assert!(drawn.values().all(|count| (800..1_200).contains(count)), "{drawn:?}");
        assert_eq!(two_of(1, 77), (0, 0));
    }
}
