//! What was read of one sender's entries, and which ids were refused lately.

use std::collections::{HashMap, HashSet, VecDeque};

use bytes::Bytes;
use foldhash::quality::FixedState;
use im_proto::{ConversationId, UserId};
use im_storage::StoreError;

use crate::deadline::StoreCalls;

/// Entries of one read.
const READ_ENTRIES: u64 = 4096;
/// Ids that are remembered as refused: four times what a session may have pending.
const REFUSED_MAX: usize = 1024;

/// One sender's client message ids among the entries that were read, which are consecutive. Entries never change, so it stays true.
#[derive(Debug)]
pub struct SenderLog {
    user: UserId,
    /// What was read; empty if `low > high`.
    low: u64,
    high: u64,
    seqs: HashMap<Bytes, u64, FixedState>,
}

/// What is known of an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    At(u64),
    /// It is not among the entries that were asked about.
    Absent,
    /// Not all of these were read.
    Unread,
}

impl SenderLog {
    pub fn new(user: &UserId) -> Self {
        Self { user: user.clone(), low: 1, high: 0, seqs: HashMap::default() }
    }

    pub fn is_of(&self, user: &UserId) -> bool {
        self.user == *user
    }

    pub fn look_up(&self, wanted: &[u8], low: u64, high: u64) -> Known {
        match self.seqs.get(wanted) {
            Some(seq) => Known::At(*seq),
            None if self.unread(low, high) == 0 => Known::Absent,
            None => Known::Unread,
        }
    }

    /// How many of the entries `low..=high` were not read.
    pub fn unread(&self, low: u64, high: u64) -> u64 {
        if low > high {
            return 0;
        }
        let (read_low, read_high) = (low.max(self.low), high.min(self.high));
        high - low + 1 - (read_high + 1).saturating_sub(read_low)
    }

    /// Reads what is missing of `low..=high`, the newest first; ends early when `wanted` is found. Gives back what was read so far if the
    /// store does not answer.
    pub async fn extend(
        mut self,
        store: &StoreCalls,
        id: ConversationId,
        low: u64,
        high: u64,
        wanted: Option<&Bytes>,
    ) -> (Self, Result<(), StoreError>) {
        if self.low > self.high || self.high + 1 < low || high + 1 < self.low {
            // Nothing, or nothing that touches what is asked for.
            (self.low, self.high) = (high + 1, high);
            self.seqs.clear();
        }
        let found = |log: &Self| wanted.is_some_and(|wanted| log.seqs.contains_key(wanted));
        while self.high < high && !found(&self) {
            let (from, to) = (self.high + 1, high.min(self.high + READ_ENTRIES));
            if let Err(error) = self.read(store, id, from, to).await {
                return (self, Err(error));
            }
            self.high = to;
        }
        while self.low > low && !found(&self) {
            let (from, to) = (low.max(self.low.saturating_sub(READ_ENTRIES)), self.low - 1);
            if let Err(error) = self.read(store, id, from, to).await {
                return (self, Err(error));
            }
            self.low = from;
        }
        (self, Ok(()))
    }

    async fn read(&mut self, store: &StoreCalls, id: ConversationId, from: u64, to: u64) -> Result<(), StoreError> {
        for key in store.read_keys(id, from, to).await? {
            if key.sender.as_ref() == Some(&self.user) && !key.client_message_id.is_empty() {
                self.seqs.insert(key.client_message_id, key.seq);
            }
        }
        Ok(())
    }
}

/// Ids of sends that were refused lately.
#[derive(Debug, Default)]
pub struct RefusedIds {
    ids: HashSet<u128, FixedState>,
    order: VecDeque<u128>,
}

impl RefusedIds {
    pub fn contains(&self, key: u128) -> bool {
        self.ids.contains(&key)
    }

    /// Remembers an id; forgets the oldest over the bound, whose successors cost a look into the log again.
    pub fn insert(&mut self, key: u128) {
        if self.ids.insert(key) {
            self.order.push_back(key);
        }
        while self.order.len() > REFUSED_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.ids.remove(&oldest);
            }
        }
    }

    /// Forgets an id, its place among the oldest included: left there, it would take a later refusal of the same id along.
    pub fn remove(&mut self, key: u128) {
        if self.ids.remove(&key) {
            self.order.retain(|other| *other != key);
        }
    }
}

#[cfg(test)]
mod tests;
