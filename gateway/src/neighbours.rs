//! Where clients may go: the gateways of the registry's newest view, this one among them.
//!
//! Answers `Locate` before `Hello` and fills `GoAway.endpoints`. It knows neither users nor loads: a client that asks with its token
//! is placed by its owner. Gateways of the same zone come first.

use std::{
    hash::BuildHasher as _,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use im_proto::{InstanceId, environment::Environment, v1};
use im_registry::{Instance, Role, View};
use parking_lot::RwLock;

use crate::{addresses::network, connection::Transport};

/// Gateways named in one answer.
const GATEWAYS_OFFERED: usize = 3;
/// Addresses that are counted apart. Two addresses that share a place share their rate.
const PLACES: usize = 4096;

/// The gateways that take clients.
#[derive(Default)]
pub(crate) struct Neighbours {
    open: RwLock<Arc<Vec<Neighbour>>>,
}

struct Neighbour {
    id: InstanceId,
    is_near: bool,
    endpoints: Vec<v1::Endpoint>,
}

impl Neighbours {
    /// Takes over a view, as seen by one of its gateways.
    pub fn update(&self, view: &View, own: &InstanceId) {
        let zone = view.instances.get(own).map(|instance| instance.zone.as_str()).unwrap_or_default();
        let open = view.of_role(Role::Gateway).filter(|instance| !instance.draining).map(|instance| Neighbour {
            id: instance.id.clone(),
            is_near: instance.zone == zone,
            endpoints: client_endpoints(instance),
        });
        *self.open.write() = Arc::new(open.filter(|neighbour| !neighbour.endpoints.is_empty()).collect());
    }

    /// Endpoints of up to three gateways at random.
    pub fn offer(&self, environment: &Environment) -> Vec<v1::Endpoint> {
        self.draw(environment, |_| true).into_iter().flatten().collect()
    }

    /// URLs of up to three other gateways for a client of this transport, for `GoAway`. Never another transport: a client that came
    /// encrypted is not sent to a plain port.
    pub fn offer_others(&self, environment: &Environment, own: &InstanceId, transport: Transport) -> Vec<String> {
        let fits = |endpoint: &v1::Endpoint| endpoint.transport == transport.as_str();
        let drawn = self.draw(environment, |other| other.id != *own && other.endpoints.iter().any(fits));
        let urls = drawn.iter().flatten().filter(|endpoint| fits(endpoint));
        urls.map(|endpoint| format!("{}://{}", endpoint.transport, endpoint.address)).collect()
    }

    fn draw(&self, environment: &Environment, wanted: impl Fn(&Neighbour) -> bool) -> Vec<Vec<v1::Endpoint>> {
        let open = self.open.read().clone();
        let mut drawn: Vec<(bool, u64, &Neighbour)> = open
            .iter()
            .filter(|neighbour| wanted(neighbour))
            .map(|neighbour| (!neighbour.is_near, environment.random.next_u64(), neighbour))
            .collect();
        drawn.sort_unstable_by_key(|(far, lot, _)| (*far, *lot));
        drawn.iter().take(GATEWAYS_OFFERED).map(|(_, _, neighbour)| neighbour.endpoints.clone()).collect()
    }
}

fn client_endpoints(instance: &Instance) -> Vec<v1::Endpoint> {
    let is_for_clients = |transport: &str| matches!(transport, "tcp" | "tls" | "quic");
    instance
        .endpoints
        .iter()
        .filter(|endpoint| is_for_clients(&endpoint.transport))
        .map(|endpoint| v1::Endpoint {
            transport: endpoint.transport.clone(),
            address: endpoint.address.clone(),
            gateway_id: instance.id.to_string(),
        })
        .collect()
}

/// How often each address (IPv4, or IPv6 network of 64 bits) asked in the present second, in a table of fixed size.
pub(crate) struct AddressRate {
    /// Second and count, 32 bits each.
    places: Box<[AtomicU64]>,
    hasher: foldhash::fast::FixedState,
    per_second_max: u32,
}

impl AddressRate {
    /// `per_second_max` 0 is no limit.
    pub fn new(environment: &Environment, per_second_max: u32) -> Self {
        Self {
            places: (0..PLACES).map(|_| AtomicU64::new(0)).collect(),
            hasher: foldhash::fast::FixedState::with_seed(environment.random.next_u64()),
            per_second_max,
        }
    }

    /// Takes one; false if this address had its share of this second. The machine itself is never refused.
    pub fn take(&self, environment: &Environment, address: IpAddr) -> bool {
        if self.per_second_max == 0 || address.to_canonical().is_loopback() {
            return true;
        }
        let hash = self.hasher.hash_one(network(address));
        let place = usize::try_from(hash % PLACES as u64).unwrap_or_default();
        let second = environment.clock.since_boot().as_secs() << 32;
        let count = |seen: u64| if seen & !u64::from(u32::MAX) == second { seen } else { second };
        let Some(place) = self.places.get(place) else { return true };
        place
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |seen| {
                let seen = count(seen);
                (seen & u64::from(u32::MAX) < u64::from(self.per_second_max)).then_some(seen + 1)
            })
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::tests::environment;

    #[test]
    fn an_ipv6_network_of_64_bits_asks_as_one_address() {
        let environment = environment();
        let rate = AddressRate::new(&environment, 3);
        let take = |address: &str| rate.take(&environment, address.parse().expect("an address"));
        let taken = (1..=20).filter(|host| take(&format!("2001:db8::{host}"))).count();
        assert_eq!(taken, 3);
        assert!(take("2001:db8:0:1::1"), "another network is not concerned");
        assert!(take("192.0.2.1"));
        assert_eq!((0..20).filter(|_| take("::1")).count(), 20, "the machine itself");
    }
}
