//! Delivery receipts: a moment after entries were handed to the application the server is told up to where, once a conversation.
//!
//! They are a courtesy: one that is lost with a connection is told again in the next session if it is recent, and every later one
//! says the same and more.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use im_proto::{ConversationId, v1};
use tokio::time::Instant;

/// Entries that come within this make one receipt.
const GATHER: Duration = Duration::from_millis(250);
/// What was told within this before a connection broke is told again.
const DOUBTFUL: Duration = Duration::from_secs(5);
/// So many of those are kept; what is beyond is not told again.
const DOUBTFUL_MAX: usize = 1024;

#[derive(Default)]
pub(crate) struct Receipts {
    due: BTreeMap<ConversationId, u64>,
    at: Option<Instant>,
    told: VecDeque<(Instant, ConversationId, u64)>,
}

impl Receipts {
    /// Everything through `seq` has arrived.
    pub(crate) fn arrived(&mut self, id: ConversationId, seq: u64, now: Instant) {
        let due = self.due.entry(id).or_default();
        *due = seq.max(*due);
        self.at.get_or_insert(now + GATHER);
    }

    /// When [`Self::take_due`] has something.
    pub(crate) fn due_at(&self) -> Option<Instant> {
        self.at
    }

    /// What is to be told now.
    pub(crate) fn take_due(&mut self, now: Instant) -> Vec<v1::Received> {
        if self.at.is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.at = None;
        while self.told.front().is_some_and(|(at, ..)| *at + DOUBTFUL < now) {
            self.told.pop_front();
        }
        let due = std::mem::take(&mut self.due);
        for (id, seq) in &due {
            if self.told.len() == DOUBTFUL_MAX {
                self.told.pop_front();
            }
            self.told.push_back((now, *id, *seq));
        }
        due.into_iter().map(|(id, seq)| v1::Received { conversation_id: id.to_bytes(), seq }).collect()
    }

    /// The session ended.
    pub(crate) fn disconnected(&mut self, now: Instant) {
        for (at, id, seq) in std::mem::take(&mut self.told) {
            if at + DOUBTFUL >= now {
                self.arrived(id, seq, now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ConversationId = ConversationId::from_bytes([1; 16]);

    #[tokio::test(start_paused = true)]
    async fn entries_that_come_together_make_one_receipt_and_a_doubtful_one_is_told_again() {
        let mut receipts = Receipts::default();
        let start = Instant::now();
        receipts.arrived(ID, 3, start);
        receipts.arrived(ID, 2, start);
        assert!(receipts.take_due(start).is_empty());
        let later = start + GATHER;
        let told = v1::Received { conversation_id: ID.to_bytes(), seq: 3 };
        assert_eq!(receipts.take_due(later), vec![told.clone()]);
        assert_eq!(receipts.due_at(), None);
        receipts.disconnected(later + DOUBTFUL / 2);
        assert_eq!(receipts.take_due(later + DOUBTFUL), vec![told]);
        receipts.disconnected(later + DOUBTFUL * 3);
        assert_eq!(receipts.due_at(), None);
    }
}
