//! What one address may do: connect so often, hold so many connections, fail so many handshakes.
//!
//! An address is an IPv4 address or an IPv6 network of 64 bits, of which one subscriber has them all. Judged before a byte is read
//! or a key is computed. The machine itself is never limited unless the configuration says so. Addresses beyond the bound of the
//! table are not limited apart: then the bounds on all handshakes hold alone.

use std::{net::IpAddr, sync::Arc, time::Duration};

use im_proto::environment::Environment;

use crate::{
    config::GatewayConfig,
    rate::{Bucket, Rate},
    table::{Entry, Table},
};

/// Addresses that are counted at a time: 24 bytes each, 3 MB.
const ADDRESSES_MAX: usize = 131_072;
/// Above every IPv6 network that a packet can come from.
const IPV4: u64 = 0xffff << 48;

/// The addresses of all connections and handshakes.
#[derive(Clone)]
pub(crate) struct Addresses {
    inner: Arc<Inner>,
}

struct Inner {
    table: Table<Use>,
    connects: Rate,
    failures: Rate,
    connections_max: u32,
    limits_loopback: bool,
}

#[derive(Default)]
struct Use {
    connections: u32,
    connects: Bucket,
    failures: Bucket,
}

impl Entry for Use {
    fn is_blank(&self, now: Duration) -> bool {
        self.connections == 0 && self.connects.is_full(now) && self.failures.is_full(now)
    }
}

/// Why an address may not connect now, and when it may try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Excess {
    Connects(Duration),
    Connections,
    Failures(Duration),
}

impl Excess {
    /// How long until it may try again; a second if nobody can know.
    pub fn wait(self) -> Duration {
        match self {
            Excess::Connects(wait) | Excess::Failures(wait) => wait,
            Excess::Connections => Duration::from_secs(1),
        }
    }
}

/// The place of one connection of an address, given back on drop.
pub(crate) struct AddressPlace {
    addresses: Addresses,
    key: u64,
}

impl Addresses {
    pub fn new(environment: &Environment, config: &GatewayConfig) -> Self {
        let inner = Inner {
            table: Table::new(environment, ADDRESSES_MAX),
            connects: Rate::per_second(config.address_connects_per_second_max),
            failures: Rate::per_second(config.address_failures_per_second_max),
            connections_max: u32::try_from(config.address_connections_max).unwrap_or(u32::MAX),
            limits_loopback: config.address_limits_loopback,
        };
        Self { inner: Arc::new(inner) }
    }

    /// One more connection of an address. `Ok(None)`: nobody counts it.
    pub fn arrive(&self, address: IpAddr, now: Duration) -> Result<Option<AddressPlace>, Excess> {
        let Some(key) = self.key(address) else { return Ok(None) };
        let inner = &self.inner;
        let judged = inner.table.with(key, now, |used| {
            match inner.failures.look(used.failures, now) {
                Duration::ZERO => {}
                wait => return Err(Excess::Failures(wait)),
            }
            inner.connects.take(&mut used.connects, now).map_err(Excess::Connects)?;
            if inner.connections_max > 0 && used.connections >= inner.connections_max {
                return Err(Excess::Connections);
            }
            used.connections += 1;
            Ok(())
        });
        match judged {
            None => Ok(None),
            Some(Err(excess)) => Err(excess),
            Some(Ok(())) => Ok(Some(AddressPlace { addresses: self.clone(), key })),
        }
    }

    /// A handshake of an address led to nothing, by its own fault.
    pub fn failed(&self, address: IpAddr, now: Duration) {
        let Some(key) = self.key(address) else { return };
        self.inner.table.with(key, now, |used| self.inner.failures.charge(&mut used.failures, 1, now));
    }

    fn key(&self, address: IpAddr) -> Option<u64> {
        let address = address.to_canonical();
        if address.is_loopback() && !self.inner.limits_loopback {
            return None;
        }
        Some(network(address))
    }
}

/// What counts as one address.
pub(crate) fn network(address: IpAddr) -> u64 {
    match address.to_canonical() {
        IpAddr::V4(address) => IPV4 | u64::from(address.to_bits()),
        IpAddr::V6(address) => u64::try_from(address.to_bits() >> 64).unwrap_or_default(),
    }
}

impl Drop for AddressPlace {
    fn drop(&mut self) {
        // What is left of the rates keeps the entry; the next sweep or use looks at the clock.
        self.addresses.inner.table.with(self.key, Duration::ZERO, |used| {
            used.connections = used.connections.saturating_sub(1);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::tests::environment;

    fn addresses(change: impl FnOnce(&mut GatewayConfig)) -> Addresses {
        let mut config = GatewayConfig::new("c");
        (config.address_connects_per_second_max, config.address_connections_max) = (3, 2);
        config.address_failures_per_second_max = 2;
        change(&mut config);
        Addresses::new(&environment(), &config)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    const NOW: Duration = Duration::from_secs(1);

    #[test]
    fn connections_of_an_address_are_bounded_and_come_back_when_they_end() {
        let addresses = addresses(|config| config.address_connects_per_second_max = 0);
        let first = addresses.arrive(ip("192.0.2.1"), NOW).expect("room");
        let _second = addresses.arrive(ip("192.0.2.1"), NOW).expect("room");
        assert_eq!(addresses.arrive(ip("192.0.2.1"), NOW).err(), Some(Excess::Connections));
        assert!(addresses.arrive(ip("192.0.2.2"), NOW).is_ok(), "another address is not concerned");
        drop(first);
        assert!(addresses.arrive(ip("::ffff:192.0.2.1"), NOW).is_ok(), "the same address in its other form");
    }

    #[test]
    fn an_address_connects_only_so_often() {
        let addresses = addresses(|_| {});
        for _ in 0..3 {
            assert!(addresses.arrive(ip("192.0.2.1"), NOW).is_ok());
        }
        let Some(Excess::Connects(wait)) = addresses.arrive(ip("192.0.2.1"), NOW).err() else { panic!("too often") };
        assert!(addresses.arrive(ip("192.0.2.1"), NOW + wait).is_ok());
    }

    #[test]
    fn an_ipv6_network_of_64_bits_is_one_address() {
        let addresses = addresses(|_| {});
        for host in 1..=3 {
            assert!(addresses.arrive(ip(&format!("2001:db8::{host}")), NOW).is_ok());
        }
        assert!(addresses.arrive(ip("2001:db8::ffff:4"), NOW).is_err());
        assert!(addresses.arrive(ip("2001:db8:0:1::4"), NOW).is_ok());
    }

    #[test]
    fn who_fails_too_often_is_not_let_in_for_a_while() {
        let addresses = addresses(|_| {});
        assert!(addresses.arrive(ip("192.0.2.1"), NOW).is_ok());
        for _ in 0..4 {
            addresses.failed(ip("192.0.2.1"), NOW);
        }
        let Some(Excess::Failures(wait)) = addresses.arrive(ip("192.0.2.1"), NOW).err() else { panic!("failed often") };
        assert!(wait >= Duration::from_secs(1), "{wait:?}");
        assert!(addresses.arrive(ip("192.0.2.2"), NOW).is_ok());
        assert!(addresses.arrive(ip("192.0.2.1"), NOW + wait).is_ok());
    }

    #[test]
    fn the_machine_itself_is_limited_only_if_configured() {
        for (limits_loopback, refused) in [(false, 0), (true, 7)] {
            let addresses = addresses(|config| config.address_limits_loopback = limits_loopback);
            let arrivals = (0..10).map(|_| addresses.arrive(ip("127.0.0.1"), NOW));
            assert_eq!(arrivals.filter(Result::is_err).count(), refused);
        }
    }
}
