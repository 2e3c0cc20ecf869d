//! Placement: which gateways a user should connect to.
//!
//! A pure function of who asks, the live gateways and the loads that they report: weighted rendezvous hashing with bounded load. Every
//! user has an order of all gateways, drawn by hash and by capacity; the first one with room is the answer. *Room* is less than 1.10
//! times the gateway's share of all connections, in proportion to its capacity: with equal gateways 1.10 times the mean. So
//! a user is sent to the same gateway as long as that one has room, a gateway that joins takes its users evenly from all others, and
//! nobody is far above the mean. Gateways that drain or are full are never named. Of the rest those of the caller's zone come first.
//!
//! Loads come over links, each second ([`crate::gateway_link`]), never through the registry. What is done about a gateway that is above
//! its bound all the same is the business of [`crate::balance`].

use im_proto::{InstanceId, UserId, limits, v1};
use im_registry::{Instance, Role, View};
use xxhash_rust::xxh3::xxh3_64;

use crate::{caller::Caller, cluster::Cluster};

/// Gateways offered to a caller.
const GATEWAYS_OFFERED: usize = 3;
/// What a gateway may have, in percent of its share.
const BOUND_PERCENT: u128 = 110;

/// What a gateway said of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    pub connections: u64,
    /// The most that it takes.
    pub capacity: u64,
    pub draining: bool,
}

/// A gateway that placement may choose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    pub instance: &'a Instance,
    /// `None`: it has not said anything for a while. It is named behind all that have.
    pub load: Option<Load>,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    pub who: Who<'a>,
    /// Where the one stands that asks for the caller; empty if that is not known.
    pub zone: &'a str,
    /// Where the caller is connected: it stays there while there is room.
    pub current: Option<&'a InstanceId>,
}

/// For whom a gateway is looked for.
#[derive(Clone, Copy, Debug)]
pub enum Who<'a> {
    User(&'a UserId),
    /// Anybody: a random number takes the place of the user.
    Anybody(u64),
}

impl Who<'_> {
    /// How much a gateway of this capacity is preferred: XXH3-64 of the user id, a zero byte and the instance id, as a number between
    /// 0 and 1, weighted by the rule of Wang and Ravishankar (capacity / −ln), which gives each gateway users in proportion to its
    /// capacity and moves none but those that a change concerns.
    pub fn score(&self, instance: &InstanceId, capacity: u64) -> f64 {
        let hash = match self {
            Who::User(user) => xxh3_64(&[user.as_str().as_bytes(), &[0], instance.as_str().as_bytes()].concat()),
            Who::Anybody(lot) => xxh3_64(&[&lot.to_be_bytes()[..], &[0], instance.as_str().as_bytes()].concat()),
        };
        // 53 bits are what a float holds; the half keeps it off both ends.
        let unit = ((hash >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        capacity.max(1) as f64 / -unit.ln()
    }
}

/// How much of all connections each gateway should have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shares {
    connections: u128,
    capacity: u128,
}

impl Shares {
    /// Of gateways that take clients: a full one counts, one that drains does not.
    pub fn of(loads: impl IntoIterator<Item = Load>) -> Self {
        loads.into_iter().filter(|load| !load.draining).fold(Self::default(), |shares, load| Self {
            connections: shares.connections + u128::from(load.connections),
            capacity: shares.capacity + u128::from(load.capacity),
        })
    }

    /// As if so many more had come.
    fn with(self, newcomers: u64) -> Self {
        Self { connections: self.connections + u128::from(newcomers), ..self }
    }

    /// The share of a gateway of this capacity, rounded up.
    pub fn share(&self, capacity: u64) -> u64 {
        let share = (self.connections * u128::from(capacity)).div_ceil(self.capacity.max(1));
        u64::try_from(share).unwrap_or(u64::MAX)
    }

    /// The most that it may have: 1.10 times its share. Shares below 10 are too small for that: then the share rounded up, so that
    /// there is always a gateway with room.
    pub fn bound(&self, capacity: u64) -> u64 {
        let bound = BOUND_PERCENT * self.connections * u128::from(capacity) / (100 * self.capacity.max(1));
        u64::try_from(bound).unwrap_or(u64::MAX).max(self.share(capacity))
    }
}

/// The gateways for a caller, best first.
pub fn place<'a>(asker: &Asker<'_>, candidates: &[Candidate<'a>]) -> Vec<&'a Instance> {
    let shares = Shares::of(candidates.iter().filter(|c| !c.instance.draining).filter_map(|c| c.load)).with(1);
    let is_open = |candidate: &&Candidate<'_>| {
        let load = candidate.load;
        !candidate.instance.draining && load.is_none_or(|load| !load.draining && load.connections < load.capacity)
    };
    let mut chosen: Vec<_> = candidates
        .iter()
        .filter(is_open)
        .map(|candidate| {
            let (instance, load) = (candidate.instance, candidate.load);
            let is_crowded = load.is_some_and(|load| load.connections >= shares.bound(load.capacity));
            let is_far = !asker.zone.is_empty() && instance.zone != asker.zone;
            let is_elsewhere = asker.current != Some(&instance.id);
            let score = asker.who.score(&instance.id, load.map_or(1, |load| load.capacity));
            ((load.is_none(), is_crowded, is_far, is_elsewhere), score, instance)
        })
        .collect();
    chosen.sort_by(|(rank, score, instance), (other_rank, other_score, other)| {
        rank.cmp(other_rank).then_with(|| other_score.total_cmp(score)).then_with(|| instance.id.cmp(&other.id))
    });
    chosen.into_iter().take(GATEWAYS_OFFERED).map(|(_, _, instance)| instance).collect()
}

/// Answers `Locate` from the view and the loads that gateways report on their links.
pub fn locate(cluster: &Cluster, caller: Option<&Caller>) -> v1::LocateReply {
    let view = cluster.view();
    let loads = cluster.gateway_loads();
    let candidates: Vec<Candidate<'_>> = view
        .of_role(Role::Gateway)
        .map(|instance| Candidate { instance, load: loads.get(&instance.id).copied() })
        .collect();
    let current = caller.and_then(|caller| caller.session.as_ref()).map(|key| &key.gateway);
    let asker = Asker {
        who: match caller {
            Some(caller) => Who::User(&caller.user),
            None => Who::Anybody(cluster.environment.random.next_u64()),
        },
        zone: zone_of(&view, current.unwrap_or(&cluster.config.instance)),
        current,
    };
    let endpoints = place(&asker, &candidates)
        .into_iter()
        .flat_map(|instance| {
            client_endpoints(instance).map(|endpoint| v1::Endpoint {
                transport: endpoint.transport.clone(),
                address: endpoint.address.clone(),
                gateway_id: instance.id.to_string(),
            })
        })
        .collect();
    v1::LocateReply {
        endpoints,
        reconnect_base_ms: limits::RECONNECT_BASE_MS,
        reconnect_max_ms: limits::RECONNECT_MAX_MS,
    }
}

fn zone_of<'a>(view: &'a View, instance: &InstanceId) -> &'a str {
    view.instances.get(instance).map(|instance| instance.zone.as_str()).unwrap_or_default()
}

/// Where clients connect to a gateway.
pub fn client_endpoints(instance: &Instance) -> impl Iterator<Item = &im_registry::Endpoint> {
    let is_for_clients = |transport: &str| matches!(transport, "tcp" | "tls" | "quic");
    instance.endpoints.iter().filter(move |endpoint| is_for_clients(&endpoint.transport))
}

#[cfg(test)]
mod tests;
