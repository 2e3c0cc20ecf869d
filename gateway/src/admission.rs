//! Who may come in: bounds on connections and on unfinished handshakes, and the drain flag.
//!
//! A permit is given back when it is dropped. Nothing here waits: who is over a bound is told so at once.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::watch;

/// Counts connections and handshakes.
pub(crate) struct Admission {
    connections_max: usize,
    handshakes_max: usize,
    connections: Arc<AtomicUsize>,
    handshakes: Arc<AtomicUsize>,
    draining: AtomicBool,
    drain: watch::Sender<bool>,
}

/// Why a connection is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Full,
    TooManyHandshakes,
    Draining,
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
            draining: AtomicBool::new(false),
            drain: watch::Sender::new(false),
        }
    }

    /// A place for a connection.
    pub fn connection(&self) -> Result<Permit, Refusal> {
        if self.is_draining() {
            return Err(Refusal::Draining);
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

    /// So many handshakes are under way that strangers should first prove their address.
    pub fn is_under_pressure(&self) -> bool {
        self.handshakes.load(Ordering::Acquire) > self.handshakes_max / 2
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
