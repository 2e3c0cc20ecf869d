//! An open conversation in its owner's memory.
//!
//! Entries go through three stages: *assigned* (numbered, in `queue`), *in flight* (one batch handed to the store), *committed*.
//! Losing the shard or raising the epoch drops the first two; what is committed is in the store.

mod outbox;

pub use outbox::Outbox;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use im_proto::{ConversationId, Epoch, ShardId, Timestamp, UserId, limits};
use im_storage::{Batch, Row};
use tokio::time::Instant;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::{
    caller::Caller,
    message::ReplyTo,
    state::State,
    worker::{fan_out::Groups, large::Large, repeats::Lookups, waiting::Request},
};

/// Who hears of an entry once it is committed.
#[derive(Debug)]
pub enum Completion {
    /// A `SendAck` to the session that sent it.
    Ack { caller: Arc<Caller>, client_message_id: Bytes },
    /// The reply to an api call.
    Reply { reply_to: ReplyTo, kind: ReplyKind },
    /// An effect of another log's entry was appended.
    Effect { reply_to: ReplyTo, origin_seq: u64 },
    /// A request that could not be decided before this entry was committed: decide it again.
    Again(Box<Request>),
}

/// Which reply an api call gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyKind {
    Send,
    GroupCreate,
    GroupInvite,
    GroupLeave,
}

/// An entry with a number.
#[derive(Debug)]
pub struct Assigned {
    pub row: Row,
    /// Who sent it gets an ack instead of the message.
    pub sender: Option<Arc<Caller>>,
    pub completion: Option<Completion>,
}

/// The batch that is with the store.
#[derive(Debug)]
pub struct InFlight {
    pub token: u64,
    pub batch: Arc<Batch>,
    pub entries: Vec<(Option<Arc<Caller>>, Option<Completion>)>,
    pub confirmed: bool,
    pub submitted: Instant,
    pub attempts: u32,
}

/// The busy row of a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    /// No burst: the head row says it all.
    Quiet,
    /// The busy row is being written; nothing is committed before it is confirmed.
    Writing,
    /// Confirmed, with the first seq of the burst.
    Confirmed { since: u64 },
    /// The row of an earlier owner's burst, found at open. That owner may have been ending the burst, and its deletion may still
    /// arrive; so the first batch writes a row of its own, which no deletion of the past can undo.
    Inherited { since: u64 },
    /// Head row and deletion of the busy row are under way.
    Ending,
}

/// What was sent under a client message id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub seq: u64,
    pub sent_at: Timestamp,
    /// XXH3-64 of the body, `None` if the entry was read back without its body.
    pub body_hash: Option<u64>,
}

/// The newest client message ids of a conversation.
#[derive(Debug, Default)]
pub struct Dedupe {
    seen: HashMap<u128, Seen, foldhash::quality::FixedState>,
    order: VecDeque<u128>,
    /// All entries above this seq are in the map.
    pub floor: u64,
    limit: usize,
}

impl Dedupe {
    /// Remembers at most `limit` entries; knows everything above `floor`.
    pub fn new(limit: usize, floor: u64) -> Self {
        Self { limit, floor, ..Self::default() }
    }

    /// The 128-bit hash of a sender and a client message id: XXH3-128 over the sender, a zero byte and the id.
    pub fn key(sender: &UserId, client_message_id: &[u8]) -> u128 {
        let mut input = [0; limits::ID_BYTES_MAX + 1 + limits::CLIENT_MESSAGE_ID_BYTES_MAX];
        let sender = sender.as_str().as_bytes();
        let length = sender.len() + 1 + client_message_id.len();
        if length > input.len() {
            return xxh3_128(&[sender, &[0], client_message_id].concat());
        }
        input[..sender.len()].copy_from_slice(sender);
        input[sender.len() + 1..length].copy_from_slice(client_message_id);
        xxh3_128(&input[..length])
    }

    /// XXH3-64 of a body.
    pub fn body_hash(body: &[u8]) -> u64 {
        xxh3_64(body)
    }

    /// What was sent under a key, if it is remembered.
    pub fn get(&self, key: u128) -> Option<Seen> {
        self.seen.get(&key).copied()
    }

    /// Remembers the next entry; forgets the oldest over the limit, but never one that is not committed.
    pub fn insert(&mut self, key: u128, seen: Seen, committed: u64) {
        if self.seen.insert(key, seen).is_none() {
            self.order.push_back(key);
        }
        while self.order.len() > self.limit {
            let Some(oldest) = self.order.front().and_then(|key| self.seen.get(key)) else { break };
            if oldest.seq > committed {
                break;
            }
            self.floor = self.floor.max(oldest.seq);
            if let Some(key) = self.order.pop_front() {
                self.seen.remove(&key);
            }
        }
    }

    /// Corrects what was read back, once its body was compared.
    pub fn set_body_hash(&mut self, key: u128, body_hash: u64, sent_at: Timestamp) {
        if let Some(seen) = self.seen.get_mut(&key) {
            seen.body_hash = Some(body_hash);
            seen.sent_at = sent_at;
        }
    }
}

/// How far a user has read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    pub seq: u64,
    pub counted: u64,
}

/// An open conversation.
pub struct Conversation {
    pub id: ConversationId,
    pub shard: ShardId,
    /// The epoch under which it was opened; it writes with this one.
    pub epoch: Epoch,
    pub first_seq: u64,
    pub committed: u64,
    pub committed_counted: u64,
    pub assigned: u64,
    pub assigned_counted: u64,
    pub last_sent_at: Timestamp,
    /// The last assigned entry that changed `deciding`.
    pub last_event: u64,
    /// After all assigned entries: what decisions are made on.
    pub deciding: State,
    /// After all committed entries: what others may know.
    pub settled: State,
    /// Grows when `settled.members` changes.
    pub members_version: u64,
    pub queue: VecDeque<Assigned>,
    pub in_flight: Option<InFlight>,
    pub dedupe: Dedupe,
    /// What was read of the log for senders whose ids `dedupe` does not reach.
    pub lookups: Option<Box<Lookups>>,
    /// Who else waits for the commit of a seq.
    pub waiters: BTreeMap<u64, Vec<Completion>>,
    pub busy: Busy,
    pub outbox: Outbox,
    /// Entries whose state rows are being written.
    pub unapplied: BTreeSet<u64>,
    /// What `Table::Applied` says.
    pub applied_written: u64,
    pub cursors: BTreeMap<UserId, Cursor>,
    pub cursors_dirty: BTreeSet<UserId>,
    pub last_entry: Instant,
    pub last_use: Instant,
    /// Members by the owner of their shard, for the current owners and members.
    pub routes: Groups,
    /// If it has so many members that entries go to registered routers instead.
    pub large: Option<Box<Large>>,
    /// When the worker looks after it next.
    pub look_at: Option<Instant>,
    /// It is in the worker's list of conversations that want a batch.
    pub dirty: bool,
}

impl Conversation {
    /// One without entries.
    pub fn new(id: ConversationId, shard: ShardId, epoch: Epoch) -> Self {
        let now = Instant::now();
        Self {
            id,
            shard,
            epoch,
            first_seq: 1,
            committed: 0,
            committed_counted: 0,
            assigned: 0,
            assigned_counted: 0,
            last_sent_at: Timestamp::default(),
            last_event: 0,
            deciding: State::default(),
            settled: State::default(),
            members_version: 1,
            queue: VecDeque::new(),
            in_flight: None,
            dedupe: Dedupe::default(),
            lookups: None,
            waiters: BTreeMap::new(),
            busy: Busy::Quiet,
            outbox: Outbox::default(),
            unapplied: BTreeSet::new(),
            applied_written: 0,
            cursors: BTreeMap::new(),
            cursors_dirty: BTreeSet::new(),
            last_entry: now,
            last_use: now,
            routes: Groups::default(),
            large: None,
            look_at: None,
            dirty: false,
        }
    }

    /// Whether the user is in it, on the state that decides.
    pub fn is_member(&self, user: &UserId) -> bool {
        self.deciding.members.contains_key(user)
    }

    /// Everything up to here is in the state tables.
    pub fn applied(&self) -> u64 {
        self.unapplied.first().map_or(self.committed, |first| first.saturating_sub(1).min(self.committed))
    }

    /// All effects of entries up to here are done.
    pub fn outbox_done(&self) -> u64 {
        self.outbox.first_waiting().map_or(self.committed, |first| first.saturating_sub(1).min(self.committed))
    }

    /// Nothing is assigned beyond what is committed.
    pub fn is_settled(&self) -> bool {
        self.assigned == self.committed && self.in_flight.is_none()
    }

    /// A user's cursor: what was read, or where the user came in.
    pub fn cursor(&self, user: &UserId) -> Cursor {
        let joined = self
            .settled
            .members
            .get(user)
            .map_or(Cursor::default(), |member| Cursor { seq: member.joined_seq, counted: member.joined_counted });
        match self.cursors.get(user) {
            Some(cursor) if cursor.seq > joined.seq => *cursor,
            _ => joined,
        }
    }

    /// Moves a cursor forward; `false` if it stands there or further already.
    pub fn move_cursor(&mut self, user: &UserId, to: Cursor) -> bool {
        let cursor = self.cursors.entry(user.clone()).or_default();
        if cursor.seq >= to.seq {
            return false;
        }
        *cursor = to;
        self.cursors_dirty.insert(user.clone());
        true
    }
}

#[cfg(test)]
mod tests;
