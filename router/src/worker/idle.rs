//! What happens by the clock: effects sent again, cursors flushed, bursts ended, quiet conversations dropped from memory.

use std::time::Duration;

use bytes::Bytes;
use im_proto::UserId;
use im_storage::{StateWrite, Table};
use prost::Message as _;

use super::{Context, TICK, Worker, waiting::Slot};
use crate::conversation::{Busy, Conversation};

/// The applied mark is written at least this often, so that an open applies few entries again.
const APPLIED_EVERY: u64 = 1024;
/// How often a conversation is looked at whose burst would end if its entries had arrived everywhere.
const HELD_LOOK: Duration = Duration::from_secs(1);
/// Keys of `Table::Applied`.
pub const APPLIED: &[u8] = b"applied";
/// The outbox has a cursor of its own, so that an unreachable target does not hold up the tables.
pub const OUTBOX: &[u8] = b"outbox";

/// The value of `Table::Heads`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HeadValue {
    #[prost(uint64, tag = "1")]
    pub head: u64,
    #[prost(uint64, tag = "2")]
    pub counted: u64,
    #[prost(uint64, tag = "3")]
    pub first_seq: u64,
    /// The running number of mentions of all.
    #[prost(uint64, tag = "4")]
    pub all: u64,
    /// The newest entry that counts as unread: what a list shows.
    #[prost(uint64, tag = "5")]
    pub newest_counted: u64,
    /// The newest entry that mentions anybody by name.
    #[prost(uint64, tag = "6")]
    pub newest_mention: u64,
    #[prost(int32, tag = "7")]
    pub kind: i32,
    #[prost(uint64, tag = "8")]
    pub members: u64,
}

impl Worker {
    /// Looks after what goes by the clock. Conversations whose moment has not come cost nothing.
    pub fn tick(&mut self) {
        if self.context.index == 0 {
            self.context.cluster.sweep_awaited();
        }
        self.context.arrivals = self.context.cluster.arrivals();
        self.context.flush_resyncs();
        self.tick_presence();
        self.context.look_after_devices();
        self.expire_appends();
        let now = self.context.now();
        self.context.scans.sweep(now);
        while let Some(id) = self.context.schedule.next_due(now) {
            let Some(Slot::Open(conversation)) = self.conversations.get_mut(&id) else { continue };
            conversation.look_at = None;
            self.context.look_after(conversation);
            if self.context.may_leave(conversation) {
                self.context.leaves(conversation);
                self.drop_conversation(&id);
            } else {
                self.context.plan_look(conversation);
            }
        }
        self.end_left_bursts();
        if self.has_releases() {
            self.finish_releases();
        }
        self.start_opens();
    }
}

impl Context {
    fn look_after(&mut self, conversation: &mut Conversation) {
        self.send_effects(conversation);
        self.ask_followers(conversation);
        self.forget_lookups(conversation);
        self.tell_marks(conversation);
        if self.wants_marks(conversation) {
            self.write_marks(conversation, |_| {});
        }
        self.look_after_burst(conversation);
    }

    /// The applied marks are far behind, or below an entry that is dear to apply again: else each open of a young group would write the
    /// rows of all its members, and tell all of them again, as long as its first burst lasts.
    pub fn wants_marks(&self, conversation: &Conversation) -> bool {
        let (written, heavy) = (conversation.applied_written, conversation.heavy);
        let is_worthwhile = |done: u64| done >= written + APPLIED_EVERY || (heavy > written && done >= heavy);
        !conversation.marks_writing
            && is_worthwhile(conversation.committed)
            && is_worthwhile(conversation.applied().min(conversation.outbox_done()))
    }

    /// Looks after a conversation with the next tick.
    pub fn look_soon(&mut self, conversation: &mut Conversation) {
        let now = self.now();
        self.schedule.look_by(conversation, now);
    }

    /// Plans the next look: not before its burst may end or it may leave, as far as can be told now.
    pub fn plan_look(&mut self, conversation: &mut Conversation) {
        let soon = self.now() + TICK;
        let at = match conversation.busy {
            Busy::Quiet => conversation.last_use + self.stays(conversation),
            Busy::Confirmed { .. } | Busy::Inherited { .. } => {
                let quiet_from = conversation.last_entry + self.cluster.config.quiet_after;
                // Quiet already, and its burst cannot end yet: that may last, and there may be many.
                if quiet_from > self.now() { quiet_from } else { self.now() + HELD_LOOK }
            }
            Busy::Writing | Busy::Ending => soon,
        };
        let at = conversation.marks.due_at(self.now()).map_or(at, |told_at| told_at.min(at));
        self.schedule.look_by(conversation, at.max(soon));
    }

    /// How long a quiet conversation stays. Anybody may name conversations that do not exist: these do not stay.
    fn stays(&self, conversation: &Conversation) -> Duration {
        if conversation.assigned == 0 { Duration::ZERO } else { self.cluster.config.evict_after }
    }

    fn may_leave(&self, conversation: &Conversation) -> bool {
        self.is_at_rest(conversation)
            && conversation.is_settled()
            && conversation.waiters.is_empty()
            && conversation.cursors_dirty.is_empty()
            && conversation.outbox.is_empty()
            && conversation.unwritten.is_empty()
            && conversation.marks.is_settled()
            && conversation.last_use.elapsed() >= self.stays(conversation)
    }

    /// Cursors first, confirmed, then the applied marks: an open moves the senders' own cursors again for all entries above the mark. One
    /// such write at a time.
    pub fn write_marks(&mut self, conversation: &mut Conversation, then: impl FnOnce(&mut Worker) + Send + 'static) {
        let (applied, outbox) = (conversation.applied(), conversation.outbox_done());
        conversation.applied_written = applied.min(outbox);
        conversation.marks_writing = true;
        let dirty = std::mem::take(&mut conversation.cursors_dirty);
        let cursors: Vec<StateWrite> = dirty.iter().filter_map(|user| cursor_write(conversation, user)).collect();
        let partition = conversation.id.to_bytes();
        let mark = move |key: &'static [u8], seq: u64| StateWrite {
            table: Table::Applied,
            partition: partition.clone(),
            key: Bytes::from_static(key),
            value: Some(Bytes::copy_from_slice(&seq.to_be_bytes())),
            timestamp: seq,
        };
        // The head row goes with them, so that an open in the middle of a long burst begins near its end.
        let marks = vec![mark(APPLIED, applied), mark(OUTBOX, outbox), head_write(conversation)];
        let (id, epoch, head) = (conversation.id, conversation.epoch, conversation.committed);
        let written = move |worker: &mut Worker| {
            if let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id)
                && conversation.epoch == epoch
            {
                conversation.head_written = head;
                conversation.marks_writing = false;
            }
            then(worker);
        };
        self.write_state(cursors, move |worker| worker.context.write_state(marks, written));
    }
}

/// Where the log is committed to, as a row.
fn head_write(conversation: &Conversation) -> StateWrite {
    let head = conversation.committed;
    let (kind, members) = super::heads::shape(conversation);
    let value = HeadValue {
        head,
        counted: conversation.committed_counted,
        first_seq: conversation.first_seq,
        all: conversation.committed_all,
        newest_counted: conversation.newest_counted,
        newest_mention: conversation.newest_mention,
        kind,
        members,
    };
    StateWrite {
        table: Table::Heads,
        partition: conversation.id.to_bytes(),
        key: Bytes::new(),
        value: Some(value.encode_to_vec().into()),
        timestamp: head,
    }
}

/// A cursor as a row: its timestamp is its seq, so it only moves forward.
pub fn cursor_write(conversation: &Conversation, user: &UserId) -> Option<StateWrite> {
    let cursor = conversation.cursors.get(user)?;
    Some(cursor.to_write(conversation.is_channel(), &conversation.id, user))
}
