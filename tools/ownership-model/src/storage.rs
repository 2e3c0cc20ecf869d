//! Three replicas of one conversation's rows, and the writes that have not reached all of them.
//!
//! A replica keeps, at each seq, the cell with the greatest timestamp. A write is atomic on one replica and nowhere
//! else: it may reach the replicas at any three times, or never. A late hint is such an arrival. A read repair is one
//! more write, whose rows were written before.

/// Replicas of a partition. A quorum is two of them.
pub const REPLICAS: usize = 3;
/// Seqs that a conversation can reach in the model.
pub const SEQS: usize = 4;

/// One row as a replica holds it, or nothing. The order of the bits is the order of last-write-wins: timestamp first,
/// and the value only to break a tie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cell(u16);

impl Cell {
    pub const EMPTY: Self = Self(0);

    pub fn new(epoch: u8, message: u8, committed: u8) -> Self {
        debug_assert!((1..16).contains(&epoch) && (1..8).contains(&message) && committed < 8);
        Self(u16::from(epoch) << 6 | u16::from(message) << 3 | u16::from(committed))
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn epoch(self) -> u8 {
        (self.0 >> 6 & 15) as u8
    }

    pub fn message(self) -> u8 {
        (self.0 >> 3 & 7) as u8
    }

    /// The last seq that was committed when the row's batch was formed.
    pub fn committed(self) -> u8 {
        (self.0 & 7) as u8
    }

    /// Only for the leave-out `ts`: the arrival outranks the epoch.
    pub fn arrived(self, clock: u8) -> Self {
        Self(self.0 & 0x3ff | u16::from(clock.min(63)) << 10)
    }
}

/// The rows of a conversation, by seq; `rows[0]` is seq 1.
pub type Rows = [Cell; SEQS];

pub const NO_ROWS: Rows = [Cell::EMPTY; SEQS];

pub fn merge(mut rows: Rows, other: &Rows) -> Rows {
    for (cell, other) in rows.iter_mut().zip(other) {
        *cell = (*cell).max(*other);
    }
    rows
}

pub fn packed(rows: &Rows) -> u64 {
    rows.iter().fold(0, |bits, cell| bits << 16 | u64::from(cell.0))
}

/// A set of replicas, one bit each.
pub type Replicas = u8;

pub const EVERY_REPLICA: Replicas = (1 << REPLICAS) - 1;

/// A write that was handed to the driver and is not yet on every replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    pub rows: Rows,
    pub on: Replicas,
}

#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Storage {
    pub replicas: [Rows; REPLICAS],
    /// Sorted by rows, no two alike: the same rows written twice are one write.
    pub writes: Vec<Write>,
}

impl Storage {
    pub fn issue(&mut self, rows: Rows) {
        match self.writes.iter_mut().find(|write| write.rows == rows) {
            // The same rows once more: where they are already, their arrival has no effect, which `settle` finds out.
            Some(write) => write.on = 0,
            None => self.writes.push(Write { rows, on: 0 }),
        }
    }

    /// Hands out what a read of `first` and `second` returned, to these two only.
    pub fn repair(&mut self, rows: Rows, first: usize, second: usize) {
        if rows != NO_ROWS && self.writes.iter().all(|write| write.rows != rows) {
            self.writes.push(Write { rows, on: EVERY_REPLICA & !(1 << first | 1 << second) });
        }
    }

    /// Lets write number `write` reach `replica`. With a clock, the arrival decides instead of the epoch.
    pub fn deliver(&mut self, write: usize, replica: usize, clock: Option<u8>) {
        let Write { mut rows, on } = self.writes[write];
        if on & 1 << replica != 0 {
            return;
        }
        if let Some(clock) = clock {
            for cell in rows.iter_mut().filter(|cell| !cell.is_empty()) {
                *cell = cell.arrived(clock);
            }
        }
        self.replicas[replica] = merge(self.replicas[replica], &rows);
        self.writes[write].on |= 1 << replica;
    }

    /// The replicas that have acknowledged the write of `rows`, or could at no effect.
    pub fn holders(&self, rows: &Rows) -> Replicas {
        self.writes.iter().find(|write| write.rows == *rows).map_or(EVERY_REPLICA, |write| write.on)
    }

    /// The writes that may still reach `replica`, as a bit set of their numbers.
    pub fn pending(&self, replica: usize) -> u32 {
        self.writes
            .iter()
            .enumerate()
            .filter(|(_, write)| write.on & 1 << replica == 0)
            .fold(0, |bits, (number, _)| bits | 1 << number)
    }

    /// Forgets what can have no effect any more. Where every cell of a write is outranked, its arrival changes
    /// nothing, at any time, so it may as well have arrived.
    pub fn settle(&mut self, arrival_decides: bool) {
        if !arrival_decides {
            for write in &mut self.writes {
                for (number, replica) in self.replicas.iter().enumerate() {
                    if write.rows.iter().zip(replica).all(|(cell, held)| cell <= held) {
                        write.on |= 1 << number;
                    }
                }
            }
        }
        self.writes.retain(|write| write.on != EVERY_REPLICA);
        self.writes.sort_unstable_by_key(|write| packed(&write.rows));
    }
}
