//! One claim of the shard and what its holder knows.

use crate::rules::{LeaveOut, Rules};
use crate::storage::{Cell, NO_ROWS, Rows, SEQS};

/// Claims that a model can hold.
pub const CLAIMS: usize = 3;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// This claim has not been made.
    #[default]
    Unclaimed,
    /// Its fence rows are on their way.
    Fencing,
    /// A quorum holds the fence rows; the predecessor list is to be cut. Fine grain only.
    Cutting,
    /// The predecessor list is cut; the tail is to be read.
    Reading,
    /// One replica has answered the tail read; `rows` is its answer.
    HalfRead,
    /// The re-written tail, `rows`, is on its way.
    Rewriting,
    /// A quorum holds the rows; the fence is to be read. Fine grain only.
    Checking,
    /// One replica has answered the fence read, and it held none. Fine grain only.
    HalfChecked,
    /// Open, nothing in flight.
    Serving,
    /// The batch `rows` is on its way.
    Appending,
    /// Released as planned. The instance may claim again.
    Released,
    /// Nothing it may still do has an effect.
    Stopped,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    pub phase: Phase,
    /// Number of the router instance, from 1.
    pub instance: u8,
    /// The generation that the instance was started with.
    pub generation: u8,
    pub epoch: u8,
    /// The replica that answered first, while [`Owner::awaits_second_answer`].
    pub replica: u8,
    /// The answer of that replica, or the rows in flight.
    pub rows: Rows,
    /// Only for the leave-out `split`: the top row from the first of the two requests.
    pub top: Rows,
    /// Instances to fence, as a bit set.
    pub fences: u8,
    /// Only for the leave-out `check-order`: a fence read was clean while the rows were still in flight.
    pub is_checked: bool,
    /// Messages by seq, as far as this owner takes them for committed. While a rewrite is in flight: once it is
    /// confirmed.
    pub log: [u8; SEQS],
}

impl Owner {
    pub fn head(&self) -> usize {
        self.log.iter().take_while(|message| **message != 0).count()
    }

    pub fn awaits_second_answer(&self) -> bool {
        matches!(self.phase, Phase::HalfRead | Phase::HalfChecked)
    }

    pub fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.is_checked = false;
        if !matches!(phase, Phase::HalfRead | Phase::Rewriting | Phase::Appending) {
            self.rows = NO_ROWS;
        }
        if !self.awaits_second_answer() {
            self.replica = 0;
        }
        if phase == Phase::Reading {
            self.log = [0; SEQS];
        }
    }

    /// Forgets everything but what a later claim of the same instance needs.
    pub fn end(&mut self, phase: Phase) {
        let Self { instance, generation, .. } = *self;
        *self = Self { phase, ..Self::default() };
        if phase == Phase::Released {
            self.instance = instance;
            self.generation = generation;
        }
    }

    /// Takes the rows in flight into the log, if they are a batch; a rewrite is in it already.
    pub fn take_batch(&mut self) {
        if self.phase == Phase::Appending {
            for (entry, row) in self.log.iter_mut().zip(&self.rows).filter(|(_, row)| !row.is_empty()) {
                *entry = row.message();
            }
        }
    }

    /// The batch that appends `messages` after the head.
    pub fn batch(&self, messages: &[u8]) -> Rows {
        let head = self.head();
        let mut rows = NO_ROWS;
        for (row, message) in rows[head..].iter_mut().zip(messages) {
            *row = Cell::new(self.epoch, *message, head as u8);
        }
        rows
    }
}

/// What an owner makes of the tail it has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The rows carry an epoch above its own.
    Superseded,
    /// A seq at or below the head is missing.
    Hole,
    Open {
        log: [u8; SEQS],
        rewrite: Rows,
    },
}

/// Finds the head in the rows of one tail read, and the rows to write again under `epoch`.
pub fn open(rows: &Rows, epoch: u8, rules: Rules) -> Opening {
    let Some(top) = rows.iter().rposition(|row| !row.is_empty()) else {
        return Opening::Open { log: [0; SEQS], rewrite: NO_ROWS };
    };
    let top_only = rules.lack(LeaveOut::Committed);
    let lowest = if top_only { top } else { usize::from(rows[top].committed()).saturating_sub(1) };
    let span = &rows[lowest..=top];
    let newest = span.iter().map(|row| row.epoch()).max().unwrap_or(0);
    // A reader that was overtaken may see a tail with gaps, because it asked its two replicas at two moments.
    let is_superseded = newest > epoch;
    if is_superseded && !rules.lack(LeaveOut::AlarmOrder) {
        return Opening::Superseded;
    }
    let head = lowest + span.iter().rposition(|row| row.epoch() == newest).unwrap_or(0);
    let committed = if top_only { head } else { usize::from(rows[head].committed()) };
    if rows[..=head].iter().any(|row| row.is_empty()) {
        return Opening::Hole;
    }
    if is_superseded {
        return Opening::Superseded;
    }
    let mut log = [0; SEQS];
    let mut rewrite = NO_ROWS;
    for (seq, row) in rows[..=head].iter().enumerate() {
        log[seq] = row.message();
        if seq >= committed && !rules.lack(LeaveOut::Rewrite) {
            rewrite[seq] = Cell::new(epoch, row.message(), committed as u8);
        }
    }
    Opening::Open { log, rewrite }
}
