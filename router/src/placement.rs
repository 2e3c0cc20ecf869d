//! Placement: which gateways a user should connect to.
//!
//! A pure function of the user, the live gateways and their reported load: rendezvous hashing, gateways that take nothing new
//! excluded. (Bounded load and zones come with several gateways; this is the trait's place.)

use im_proto::{InstanceId, UserId, limits, v1};
use im_registry::{Instance, Role};
use std::sync::atomic::Ordering;
use xxhash_rust::xxh3::xxh3_64;

use crate::cluster::Cluster;

/// Endpoints offered to a caller without a token, and the most offered to anybody.
const GATEWAYS_OFFERED: usize = 3;

/// A gateway that placement may choose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    pub instance: &'a Instance,
    pub connections: u64,
    /// 0: takes nothing new, or unknown.
    pub capacity: u64,
}

/// The gateways for a user, best first.
pub fn place<'a>(user: Option<&UserId>, candidates: &[Candidate<'a>]) -> Vec<&'a Instance> {
    let open = |candidate: &&Candidate<'_>| {
        !candidate.instance.draining && (candidate.capacity == 0 || candidate.connections < candidate.capacity)
    };
    let mut chosen: Vec<&Candidate<'a>> = candidates.iter().filter(open).collect();
    chosen.sort_by_key(|candidate| {
        let weight = match user {
            Some(user) => weight(user, &candidate.instance.id),
            None => candidate.connections,
        };
        (std::cmp::Reverse(weight), candidate.instance.id.clone())
    });
    if user.is_none() {
        // Without a user the emptiest come first.
        chosen.reverse();
    }
    chosen.into_iter().take(GATEWAYS_OFFERED).map(|candidate| candidate.instance).collect()
}

/// XXH3-64 of the user id, a zero byte and the instance id.
fn weight(user: &UserId, instance: &InstanceId) -> u64 {
    xxh3_64(&[user.as_str().as_bytes(), &[0], instance.as_str().as_bytes()].concat())
}

/// Answers `Locate` from the view and the loads that gateways report on their links.
pub fn locate(cluster: &Cluster, user: Option<&UserId>) -> v1::LocateReply {
    let view = cluster.view();
    let links = cluster.links.read();
    let candidates: Vec<Candidate<'_>> = view
        .of_role(Role::Gateway)
        .map(|instance| {
            let link = links.get(&instance.id);
            Candidate {
                instance,
                connections: link.map_or(0, |link| link.load.load(Ordering::Relaxed)),
                capacity: link.map_or(0, |link| link.capacity.load(Ordering::Relaxed)),
            }
        })
        .collect();
    let endpoints = place(user, &candidates)
        .into_iter()
        .flat_map(|instance| {
            instance
                .endpoints
                .iter()
                .filter(|endpoint| matches!(endpoint.transport.as_str(), "tcp" | "tls" | "quic"))
                .map(|endpoint| v1::Endpoint {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use im_proto::BootId;

    use super::*;

    fn gateway(name: &str) -> Instance {
        Instance {
            id: InstanceId::parse(name).unwrap(),
            boot: BootId(1),
            role: Role::Gateway,
            endpoints: Vec::new(),
            zone: String::new(),
            version: String::new(),
            draining: name.starts_with("draining"),
        }
    }

    fn candidates(gateways: &[Instance]) -> Vec<Candidate<'_>> {
        gateways.iter().map(|instance| Candidate { instance, connections: 0, capacity: 0 }).collect()
    }

    fn first(user: u32, gateways: &[Instance]) -> String {
        let user = UserId::parse(&format!("user{user}")).unwrap();
        place(Some(&user), &candidates(gateways))[0].id.to_string()
    }

    #[test]
    fn a_user_stays_where_it_was_when_a_gateway_joins_or_comes_to_the_new_one() {
        let before: Vec<Instance> = ["g1", "g2", "g3", "g4"].map(gateway).into();
        let after: Vec<Instance> = ["g1", "g2", "g3", "g4", "g5"].map(gateway).into();
        let mut moved = 0;
        let mut load: BTreeMap<String, u32> = BTreeMap::new();
        for user in 0..2000 {
            let (old, new) = (first(user, &before), first(user, &after));
            if old != new {
                assert_eq!(new, "g5");
                moved += 1;
            }
            *load.entry(new).or_default() += 1;
        }
        assert!((300..500).contains(&moved), "a fifth moves, not {moved} of 2000");
        assert!(load.values().all(|users| (300..500).contains(users)), "{load:?}");
    }

    #[test]
    fn draining_and_full_gateways_get_nobody() {
        let gateways: Vec<Instance> = ["draining1", "g1", "full"].map(gateway).into();
        let mut candidates = candidates(&gateways);
        candidates[2].connections = 10;
        candidates[2].capacity = 10;
        for user in [None, Some(UserId::parse("alice").unwrap())] {
            let chosen: Vec<&str> = place(user.as_ref(), &candidates).iter().map(|g| g.id.as_str()).collect();
            assert_eq!(chosen, ["g1"]);
        }
    }

    #[test]
    fn without_a_user_the_emptiest_come_first() {
        let gateways: Vec<Instance> = ["g1", "g2"].map(gateway).into();
        let mut candidates = candidates(&gateways);
        candidates[0].connections = 5;
        assert_eq!(place(None, &candidates)[0].id.as_str(), "g2");
    }
}
