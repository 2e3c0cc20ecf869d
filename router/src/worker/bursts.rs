//! When the bursts of conversations end: what the next owner must open unasked has a busy row, and everything else a head row that says
//! it all. See docs/adr/0010.

use std::collections::BTreeMap;

use bytes::Bytes;
use im_proto::{ConversationId, Epoch, ShardId};
use im_registry::Claim;
use im_storage::{StateWrite, StoreError, Table};
use tokio::time::Instant;

use super::{Context, Worker, waiting::Slot};
use crate::{
    conversation::{Busy, Conversation},
    deadline::StoreCalls,
};

/// Conversations whose bursts are ended after they have left memory. What leaves beyond that keeps its busy row until it is opened.
const LEFT_MAX: usize = 65_536;
/// Of these, with one tick.
const LEFT_ENDED_AT_ONCE: usize = 256;
/// Rows of one scan for busy conversations.
const BUSY_ROWS: usize = 512;

/// Conversations that have left memory before their bursts could end.
#[derive(Default)]
pub struct LeftBursts(BTreeMap<ConversationId, Left>);

struct Left {
    shard: ShardId,
    epoch: Epoch,
    head: u64,
    last_push: Instant,
}

impl Context {
    /// Ends a burst that is over, if nobody needs the next owner to deliver the last entries again. What still waits for another router is
    /// lost with this one; what was sent past the lease may have gone to a router that no longer holds the sessions.
    pub fn look_after_burst(&mut self, conversation: &mut Conversation) {
        let quiet = conversation.last_entry.elapsed() >= self.cluster.config.quiet_after;
        let (Busy::Confirmed { since } | Busy::Inherited { since }) = conversation.busy else { return };
        if !quiet
            || !conversation.is_settled()
            || !conversation.outbox.is_empty()
            || conversation.applied() != conversation.committed
            || conversation.marks_writing
        {
            return;
        }
        // A busy row of which the entries were lost with their owner stands until there are others.
        if conversation.committed >= since && !self.past_lease() && self.pushes_arrived(conversation) {
            self.end_burst(conversation);
        } else if conversation.head_written < conversation.committed
            || conversation.applied_written < conversation.committed
            || !conversation.cursors_dirty.is_empty()
        {
            self.write_marks(conversation, |_| {});
        }
    }

    fn pushes_arrived(&self, conversation: &Conversation) -> bool {
        let before = conversation.last_push;
        if conversation.large.is_some() {
            return self.arrivals.everywhere(before);
        }
        conversation.routes.have_arrived(&self.cluster, &self.arrivals, before)
    }

    /// Marks and head row first, confirmed; then the busy row goes, with the head as timestamp.
    fn end_burst(&mut self, conversation: &mut Conversation) {
        let head = conversation.committed;
        conversation.busy = Busy::Ending;
        let busy_row = busy_end(conversation.shard, &conversation.id, head);
        let (id, epoch) = (conversation.id, conversation.epoch);
        let ended = move |worker: &mut Worker| {
            if let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id)
                && conversation.epoch == epoch
                && conversation.busy == Busy::Ending
            {
                conversation.busy = Busy::Quiet;
                if conversation.in_flight.is_some() {
                    // Entries came meanwhile: they begin a burst of their own.
                    let since = conversation.committed + 1;
                    worker.context.write_busy(conversation, since);
                }
            }
        };
        self.write_marks(conversation, move |worker| worker.context.write_state(vec![busy_row], ended));
    }

    /// The head row says it all, or it and a busy row, which stays: with it the next open delivers the last entries again.
    pub fn is_at_rest(&self, conversation: &Conversation) -> bool {
        match conversation.busy {
            Busy::Quiet => true,
            Busy::Confirmed { .. } | Busy::Inherited { .. } => {
                conversation.head_written == conversation.committed && !conversation.marks_writing
            }
            Busy::Writing | Busy::Ending => false,
        }
    }

    /// How many conversations have left memory before their bursts could end.
    pub fn left_bursts(&self) -> usize {
        self.left_bursts.0.len()
    }

    /// A conversation leaves memory: its burst is ended later, if it has not ended yet.
    pub fn leaves(&mut self, conversation: &Conversation) {
        let Conversation { id, shard, committed, last_push, .. } = *conversation;
        if let Some(epoch) = self.shards.epoch(shard)
            && let Busy::Confirmed { since } | Busy::Inherited { since } = conversation.busy
            && committed >= since
            && self.left_bursts.0.len() < LEFT_MAX
        {
            self.left_bursts.0.insert(id, Left { shard, epoch, head: committed, last_push });
        }
    }

    /// The claim of a shard has a greater epoch now; it is the same owner.
    pub fn left_bursts_stay(&mut self, raised: &Claim) {
        for left in self.left_bursts.0.values_mut().filter(|left| left.shard == raised.shard) {
            left.epoch = raised.epoch;
        }
    }
}

impl Worker {
    /// Ends bursts of conversations that have left memory. One that was opened again does that itself: its open has found the busy row.
    /// No deletion that is late harms a burst that begins meanwhile: its row has a greater timestamp.
    pub fn end_left_bursts(&mut self) {
        let (context, conversations) = (&mut self.context, &self.conversations);
        let shards = &context.shards;
        context
            .left_bursts
            .0
            .retain(|id, left| shards.epoch(left.shard) == Some(left.epoch) && !conversations.contains_key(id));
        if context.left_bursts.0.is_empty() || context.past_lease() {
            return;
        }
        let ended: Vec<ConversationId> = {
            let arrived = context.left_bursts.0.iter().filter(|(_, left)| context.arrivals.everywhere(left.last_push));
            arrived.map(|(id, _)| *id).take(LEFT_ENDED_AT_ONCE).collect()
        };
        for id in ended {
            if let Some(left) = context.left_bursts.0.remove(&id) {
                context.write_state(vec![busy_end(left.shard, &id, left.head)], |_| {});
            }
        }
    }
}

/// The end of a conversation's busy row, as far as it speaks of entries up to a head.
fn busy_end(shard: ShardId, id: &ConversationId, head: u64) -> StateWrite {
    StateWrite {
        table: Table::Busy,
        partition: Bytes::copy_from_slice(&shard.0.to_be_bytes()),
        key: id.to_bytes(),
        value: None,
        timestamp: head,
    }
}

/// What the last owner of a shard left busy.
pub async fn busy_conversations(store: &StoreCalls, shard: ShardId) -> Result<Vec<ConversationId>, StoreError> {
    let partition = shard.0.to_be_bytes();
    let mut busy: Vec<ConversationId> = Vec::new();
    loop {
        let after = busy.last().map(|id| *id.as_bytes());
        let rows = store.scan(Table::Busy, &partition, after.as_ref().map(|id| id.as_slice()), BUSY_ROWS).await?;
        let last = rows.len() < BUSY_ROWS;
        busy.extend(rows.iter().filter_map(|row| ConversationId::from_slice(&row.key).ok()));
        if last {
            return Ok(busy);
        }
    }
}
