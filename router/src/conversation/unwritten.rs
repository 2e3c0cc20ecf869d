//! Rows of the state tables that committed entries call for, until they are stored.
//!
//! One write is under way at a time, so that a store that has the log but not the tables is asked once for each conversation, not once
//! for each entry. What comes meanwhile goes with the next one. The rows are bounded: whoever would add one beyond it is refused before
//! anything is numbered ([`Unwritten::is_full`]), and a client or an outbox tries again.

use std::collections::VecDeque;

use im_storage::StateWrite;

/// Rows of one write; an entry with more is written alone.
const ROWS_OF_A_WRITE: usize = 512;
/// Rows that wait: eight of the largest invitations, about 4 MiB. What is assigned already may come on top.
const ROWS_MAX: usize = 16_384;

/// Rows that are not stored yet, by the entry that calls for them, ascending.
#[derive(Debug, Default)]
pub struct Unwritten {
    waiting: VecDeque<(u64, Vec<StateWrite>)>,
    /// Entries whose rows are under way.
    writing: Vec<u64>,
    rows: usize,
    rows_writing: usize,
}

impl Unwritten {
    /// The rows of a committed entry.
    pub fn push(&mut self, seq: u64, rows: Vec<StateWrite>) {
        self.rows += rows.len();
        self.waiting.push_back((seq, rows));
    }

    /// What is to be written now; `None` if nothing is, or while a write is under way.
    pub fn begin(&mut self) -> Option<Vec<StateWrite>> {
        if !self.writing.is_empty() {
            return None;
        }
        let mut out: Vec<StateWrite> = Vec::new();
        while let Some((_, rows)) = self.waiting.front()
            && (out.is_empty() || out.len() + rows.len() <= ROWS_OF_A_WRITE)
            && let Some((seq, rows)) = self.waiting.pop_front()
        {
            self.writing.push(seq);
            out.extend(rows);
        }
        self.rows_writing = out.len();
        (!out.is_empty()).then_some(out)
    }

    /// What was under way is stored: the entries whose rows it had.
    pub fn stored(&mut self) -> Vec<u64> {
        self.rows -= std::mem::take(&mut self.rows_writing);
        std::mem::take(&mut self.writing)
    }

    /// The first entry that is not stored.
    pub fn first(&self) -> Option<u64> {
        self.writing.first().copied().or_else(|| self.waiting.front().map(|(seq, _)| *seq))
    }

    /// Nothing waits and nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.first().is_none()
    }

    /// No entry that calls for rows is accepted now.
    pub fn is_full(&self) -> bool {
        self.rows >= ROWS_MAX
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use im_storage::Table;

    use super::*;

    fn rows(count: usize) -> Vec<StateWrite> {
        let write = StateWrite {
            table: Table::Mentions,
            partition: Bytes::new(),
            key: Bytes::new(),
            value: None,
            timestamp: 1,
        };
        vec![write; count]
    }

    #[test]
    fn one_write_is_under_way_and_takes_with_it_what_came_meanwhile() {
        let mut unwritten = Unwritten::default();
        assert!(unwritten.is_empty() && unwritten.begin().is_none());
        (1..=3).for_each(|seq| unwritten.push(seq, rows(1)));
        assert_eq!(unwritten.begin().map(|rows| rows.len()), Some(3));
        unwritten.push(4, rows(500));
        unwritten.push(5, rows(12));
        unwritten.push(6, rows(1));
        unwritten.push(7, rows(2_000));
        assert_eq!((unwritten.begin(), unwritten.first()), (None, Some(1)));
        assert_eq!(unwritten.stored(), [1, 2, 3]);
        for (seqs, count) in [(vec![4, 5], 512), (vec![6], 1), (vec![7], 2_000)] {
            assert_eq!(unwritten.first(), Some(seqs[0]));
            assert_eq!(unwritten.begin().map(|rows| rows.len()), Some(count));
            assert_eq!(unwritten.stored(), seqs);
        }
        assert!(unwritten.is_empty() && unwritten.rows == 0);
    }

    #[test]
    fn rows_that_wait_are_bounded() {
        let mut unwritten = Unwritten::default();
        let mut seq = 0;
        while !unwritten.is_full() {
            seq += 1;
            unwritten.push(seq, rows(256));
        }
        assert_eq!(seq, 64);
        assert!(unwritten.begin().is_some() && unwritten.is_full(), "what is under way is not stored");
        unwritten.stored();
        assert!(!unwritten.is_full());
    }
}
