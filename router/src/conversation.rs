//! An open conversation in its owner's memory.
//!
//! Entries go through three stages: *assigned* (numbered, in `queue`), *in flight* (one batch handed to the store), *committed*.
//! Losing the shard or raising the epoch drops the first two; what is committed is in the store.

mod dedupe;
mod marks;
mod outbox;
mod unwritten;

pub use dedupe::{Dedupe, Seen};
pub use marks::Marks;
pub use outbox::Outbox;
pub use unwritten::Unwritten;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use im_proto::{ConversationId, Epoch, ShardId, Timestamp, UserId};
use im_storage::{Batch, Row, StateRow, StateWrite};
use prost::Message as _;
use tokio::time::Instant;

use crate::{
    caller::Caller,
    message::ReplyTo,
    state::{self, CursorValue, Kind, State},
    worker::{fan_out::Groups, large::Large, repeats::Lookups, waiting::Request},
};

/// Who hears of an entry once it is committed.
#[derive(Debug)]
pub enum Completion {
    /// A `SendAck` to the session that sent it.
    Ack { caller: Arc<Caller>, client_message_id: Bytes, attempt: u64 },
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
    SetVisibility,
    ChannelCreate,
    Subscribe,
    Unsubscribe,
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

/// How far a user has read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    pub seq: u64,
    pub counted: u64,
    /// The running number of mentions of all.
    pub all: u64,
}

impl Cursor {
    /// At an entry.
    pub fn at(row: &Row) -> Self {
        Self { seq: row.seq, counted: row.counted, all: state::all_of(row) }
    }

    /// As a row.
    pub fn to_write(self, is_channel: bool, id: &ConversationId, user: &UserId) -> StateWrite {
        let value = CursorValue { counted: self.counted, all: self.all };
        state::cursor_write(is_channel, id, user, self.seq, &value)
    }

    /// From a row; `None` if it cannot be read.
    pub fn of_row(row: StateRow) -> Option<Self> {
        let value = CursorValue::decode(row.value).ok()?;
        Some(Self { seq: row.timestamp, counted: value.counted, all: value.all })
    }
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
    /// The running number of mentions of all.
    pub committed_all: u64,
    /// The newest committed entry that counts as unread, and the newest that mentions anybody by name.
    pub newest_counted: u64,
    pub newest_mention: u64,
    pub assigned: u64,
    pub assigned_counted: u64,
    pub assigned_all: u64,
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
    /// State rows that are being written.
    pub unwritten: Unwritten,
    /// What `Table::Applied` says.
    pub applied_written: u64,
    /// The last entry that costs an open much as long as it is above the mark: an invitation of many.
    pub heavy: u64,
    /// The marks, and the cursors before them, are being written.
    pub marks_writing: bool,
    pub cursors: BTreeMap<UserId, Cursor>,
    pub cursors_dirty: BTreeSet<UserId>,
    pub marks: Marks,
    /// Personal mentions whose rows are being written.
    pub mentions_unwritten: BTreeMap<u64, Vec<UserId>>,
    /// What `Table::Heads` is known to say.
    pub head_written: u64,
    pub last_entry: Instant,
    /// When the last entries were delivered.
    pub last_push: Instant,
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
            committed_all: 0,
            newest_counted: 0,
            newest_mention: 0,
            assigned: 0,
            assigned_counted: 0,
            assigned_all: 0,
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
            unwritten: Unwritten::default(),
            applied_written: 0,
            heavy: 0,
            marks_writing: false,
            cursors: BTreeMap::new(),
            cursors_dirty: BTreeSet::new(),
            marks: Marks::default(),
            mentions_unwritten: BTreeMap::new(),
            head_written: 0,
            last_entry: now,
            last_push: now,
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

    /// Whether its members write and anybody reads, as far as others may know.
    pub fn is_channel(&self) -> bool {
        self.settled.kind == Kind::Channel
    }

    /// Whether the user may read it.
    pub fn may_read(&self, user: &UserId) -> bool {
        self.is_channel() || self.settled.members.contains_key(user)
    }

    /// Everything up to here is in the state tables.
    pub fn applied(&self) -> u64 {
        self.unwritten.first().map_or(self.committed, |first| first.saturating_sub(1).min(self.committed))
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
        let joined = self.settled.members.get(user).map_or(Cursor::default(), |member| Cursor {
            seq: member.joined_seq,
            counted: member.joined_counted,
            all: member.joined_all,
        });
        match self.cursors.get(user) {
            Some(cursor) if cursor.seq > joined.seq => *cursor,
            _ => joined,
        }
    }

    /// What is stored of a cursor.
    pub fn load_cursor(&mut self, user: &UserId, stored: Cursor) {
        let cursor = self.cursors.entry(user.clone()).or_default();
        if cursor.seq < stored.seq {
            *cursor = stored;
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
