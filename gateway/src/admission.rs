//! Who may come in: bounds on connections and on unfinished handshakes, and the drain flag.
//!
//! A permit is given back when it is dropped. Nothing here waits: who is over a bound is told so at once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use crate::addresses::Excess;

/// A bound that nobody repeats is forgotten: then the routers are gone, and any gateway is better than none.
const BOUND_HOLDS: Duration = Duration::from_secs(10);
/// Refused connections that are told why at a time; the next ones are closed without a word. Each holds a descriptor until it has
/// read that.
const FAREWELLS_MAX: usize = 1_000;
/// From this part of the handshakes on strangers first prove their address.
const PRESSURE: usize = 8;

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Counts connections and handshakes.
pub(crate) struct Admission {
    connections_max: usize,
    handshakes_max: usize,
    connections: Arc<AtomicUsize>,
    handshakes: Arc<AtomicUsize>,
    farewells: Arc<AtomicUsize>,
    /// What the routers think is this gateway's share, and until when that holds, in milliseconds since boot.
    bound: AtomicUsize,
    bound_until_ms: AtomicU64,
    draining: AtomicBool,
    drain: watch::Sender<bool>,
}

/// Why a connection is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Full,
    /// Above its share of the cluster's connections.
    Uneven,
    TooManyHandshakes,
    Draining,
    /// Its address is over a limit.
    Address(Excess),
}

/// A place that is given back on drop.
pub(crate) struct Permit(Arc<AtomicUsize>);

impl Permit {
    fn acquire(count: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        let taken =
            count.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| (count < limit).then_some(count + 1));
        taken.ok().map(|_| Self(count.clone()))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Admission {
    pub fn new(connections_max: usize, handshakes_max: usize) -> Self {
        Self {
            connections_max,
            handshakes_max,
            connections: Arc::default(),
            handshakes: Arc::default(),
            farewells: Arc::default(),
            bound: AtomicUsize::new(0),
            bound_until_ms: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            drain: watch::Sender::new(false),
        }
    }

    /// From now on newcomers are sent elsewhere while there are more connections than this; 0: no bound. Whoever sets it repeats it.
    pub fn set_bound(&self, connections: usize, now: Duration) {
        self.bound.store(connections, Ordering::Release);
        self.bound_until_ms.store(millis(now + BOUND_HOLDS), Ordering::Release);
    }

    /// A place for a connection.
    pub fn connection(&self, now: Duration) -> Result<Permit, Refusal> {
        if self.is_draining() {
            return Err(Refusal::Draining);
        }
        let bound = self.bound.load(Ordering::Acquire);
        let holds = bound > 0 && millis(now) < self.bound_until_ms.load(Ordering::Acquire);
        if holds && self.connections() >= bound {
            return Err(Refusal::Uneven);
        }
        Permit::acquire(&self.connections, self.connections_max).ok_or(Refusal::Full)
    }

    /// A place for a handshake, of the transport or of the protocol.
    pub fn handshake(&self) -> Result<Permit, Refusal> {
        if self.is_draining() {
            return Err(Refusal::Draining);
        }
        Permit::acquire(&self.handshakes, self.handshakes_max).ok_or(Refusal::TooManyHandshakes)
    }

    /// A place for telling a refused connection why.
    pub fn farewell(&self) -> Option<Permit> {
        Permit::acquire(&self.farewells, FAREWELLS_MAX)
    }

    /// So many handshakes are under way that strangers should first prove their address.
    pub fn is_under_pressure(&self) -> bool {
        self.handshakes.load(Ordering::Acquire) > self.handshakes_max / PRESSURE
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Acquire)
    }

    pub fn capacity(&self) -> usize {
        self.connections_max
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    pub fn start_draining(&self) {
        self.draining.store(true, Ordering::Release);
        self.drain.send_replace(true);
    }

    /// Turns true when listeners must stop.
    pub fn drain(&self) -> watch::Receiver<bool> {
        self.drain.subscribe()
    }
}
