//! What a generator thread measured.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use super::Switches;
use crate::{driver::Micros, report::Latencies};

/// What a thread measured.
#[derive(Default)]
pub struct Statistics {
    /// During the measured time.
    pub acknowledged: u64,
    pub delivered: u64,
    pub begun: u64,
    pub ack: Latencies,
    pub delivery: Latencies,
    /// The same delays apart for each phase of a scenario that has some.
    pub phases: Vec<Delays>,
    /// During the whole run, by cause: what the server refused for good, and what it said that it should not.
    pub errors: BTreeMap<String, u64>,
    /// By cause: connections that ended unasked or could not be opened.
    pub disconnects: BTreeMap<String, u64>,
    /// By status text: what the server asked to be tried again.
    pub retries: BTreeMap<String, u64>,
    /// Sends that the server refused for good; `errors` says why.
    pub refused: u64,
    /// Messages that came although the client had them, and dropped.
    pub redelivered: u64,
    pub gaps_repaired: u64,
    /// Reads of random parts of histories that were judged.
    pub reads: u64,
    pub resyncs: u64,
    pub reconnects: u64,
    pub heartbeats: u64,
}

/// The delays of one phase.
#[derive(Default)]
pub struct Delays {
    pub ack: Latencies,
    pub delivery: Latencies,
}

impl Statistics {
    /// A send was acknowledged so long after its moment.
    pub(super) fn acknowledged(&mut self, switches: &Switches, delay: Micros) {
        if switches.measuring.load(Ordering::Relaxed) {
            self.acknowledged += 1;
            self.ack.record(delay);
            self.in_phase(switches, |delays| delays.ack.record(delay));
        }
    }

    /// A message was delivered so long after the moment of its send.
    pub(super) fn delivered(&mut self, switches: &Switches, delay: Micros) {
        if switches.measuring.load(Ordering::Relaxed) {
            self.delivered += 1;
            self.delivery.record(delay);
            self.in_phase(switches, |delays| delays.delivery.record(delay));
        }
    }

    fn in_phase(&mut self, switches: &Switches, record: impl FnOnce(&mut Delays)) {
        let Some(phase) = switches.phase.load(Ordering::Relaxed).checked_sub(1) else { return };
        if self.phases.len() <= phase {
            self.phases.resize_with(phase + 1, Delays::default);
        }
        record(&mut self.phases[phase]);
    }

    /// Adds what another thread measured.
    pub fn absorb(&mut self, other: Statistics) {
        self.acknowledged += other.acknowledged;
        self.delivered += other.delivered;
        self.begun += other.begun;
        self.ack.add(&other.ack);
        self.delivery.add(&other.delivery);
        if self.phases.len() < other.phases.len() {
            self.phases.resize_with(other.phases.len(), Delays::default);
        }
        for (own, other) in self.phases.iter_mut().zip(&other.phases) {
            own.ack.add(&other.ack);
            own.delivery.add(&other.delivery);
        }
        let counts = [
            (&mut self.errors, other.errors),
            (&mut self.disconnects, other.disconnects),
            (&mut self.retries, other.retries),
        ];
        for (own, other) in counts {
            for (cause, count) in other {
                *own.entry(cause).or_default() += count;
            }
        }
        self.refused += other.refused;
        self.redelivered += other.redelivered;
        self.gaps_repaired += other.gaps_repaired;
        self.reads += other.reads;
        self.resyncs += other.resyncs;
        self.reconnects += other.reconnects;
        self.heartbeats += other.heartbeats;
    }
}
