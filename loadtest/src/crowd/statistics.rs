//! What a generator thread measured.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::Switches;
use crate::{driver::Micros, report::Latencies};

/// What a thread measured.
#[derive(Default)]
pub struct Statistics {
    /// During the measured time.
    pub acknowledged: u64,
    pub delivered: u64,
    pub begun: u64,
    /// Sends that were due and not begun at the end of sending, for nothing could be written then: no session, or too much un-acknowledged.
    pub held_up: u64,
    /// The longest time from when a message was to be sent until its ack, of all whose ack came after the measured time had begun, be
    /// it after its end.
    pub longest_wait: Micros,
    /// The measured time has begun.
    pub(super) measured: bool,
    pub delays: Delays,
    /// The same apart for each phase of a scenario that has some.
    pub phases: Vec<Delays>,
    /// The timetable as far as this thread knows it.
    timetable: Vec<(Micros, Option<usize>)>,
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

/// From the moment at which a message was to be sent.
#[derive(Default)]
pub struct Delays {
    pub ack: Latencies,
    pub delivery: Latencies,
}

impl Delays {
    pub fn add(&mut self, other: &Delays) {
        self.ack.add(&other.ack);
        self.delivery.add(&other.delivery);
    }
}

impl Statistics {
    /// A send of that moment was acknowledged now.
    pub(super) fn acknowledged(&mut self, switches: &Switches, scheduled: Micros, now: Micros) {
        let delay = now.saturating_sub(scheduled);
        if self.measured {
            self.longest_wait = self.longest_wait.max(delay);
        }
        if switches.measuring.load(Ordering::Relaxed) {
            self.acknowledged += 1;
            self.each(switches, scheduled, |delays| delays.ack.record(delay));
        }
    }

    /// A message of that moment was delivered now.
    pub(super) fn delivered(&mut self, switches: &Switches, scheduled: Micros, now: Micros) {
        if switches.measuring.load(Ordering::Relaxed) {
            self.delivered += 1;
            let delay = now.saturating_sub(scheduled);
            self.each(switches, scheduled, |delays| delays.delivery.record(delay));
        }
    }

    /// Records among all delays and in those of a phase: the one in which a message was to be sent, whenever it arrives.
    fn each(&mut self, switches: &Switches, scheduled: Micros, record: impl Fn(&mut Delays)) {
        record(&mut self.delays);
        switches.timetable.copy_to(&mut self.timetable);
        let begun = self.timetable.partition_point(|(at, _)| *at <= scheduled);
        let Some(phase) = begun.checked_sub(1).and_then(|last| self.timetable[last].1) else { return };
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
        self.held_up += other.held_up;
        self.longest_wait = self.longest_wait.max(other.longest_wait);
        self.delays.add(&other.delays);
        if self.phases.len() < other.phases.len() {
            self.phases.resize_with(other.phases.len(), Delays::default);
        }
        for (own, other) in self.phases.iter_mut().zip(&other.phases) {
            own.add(other);
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

/// Which phase began when.
#[derive(Default)]
pub struct Timetable {
    begun: Mutex<Vec<(Micros, Option<usize>)>>,
    length: AtomicUsize,
}

impl Timetable {
    /// From `at` on messages count for this phase, or for none.
    pub fn begin(&self, at: Micros, phase: Option<usize>) {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.push((at, phase));
        self.length.store(begun.len(), Ordering::Release);
    }

    fn copy_to(&self, known: &mut Vec<(Micros, Option<usize>)>) {
        if self.length.load(Ordering::Acquire) != known.len() {
            known.clone_from(&self.begun.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_counts_for_the_phase_of_its_moment_whenever_it_arrives() {
        let switches = Switches::default();
        switches.measuring.store(true, Ordering::Relaxed);
        let mut statistics = Statistics::default();
        statistics.delivered(&switches, 5, 9);
        assert!(statistics.phases.is_empty(), "there is none yet");
        for (at, phase) in [(10, Some(1)), (20, None), (30, Some(0))] {
            switches.timetable.begin(at, phase);
        }
        for (scheduled, arrived) in [(5, 12), (10, 11), (19, 35), (25, 31), (30, 99)] {
            statistics.delivered(&switches, scheduled, arrived);
        }
        let delays = |phase: usize| {
            let delivery = &statistics.phases[phase].delivery;
            (delivery.count(), delivery.percentiles().max)
        };
        assert_eq!((delays(0), delays(1)), ((1, 69), (2, 16)));
        assert_eq!((statistics.delivered, statistics.delays.delivery.count()), (6, 6));
    }
}
