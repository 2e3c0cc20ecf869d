//! The conversations of a worker: by shard, so that losing one shard costs nothing for the others, and by the moment at which each
//! wants to be looked after, so that a million idle ones cost nothing.

use std::collections::{BTreeSet, HashMap};

use foldhash::quality::FixedState;
use im_proto::{ConversationId, ShardCount, ShardId};
use tokio::time::Instant;

use super::waiting::Slot;
use crate::conversation::Conversation;

type OfShard = HashMap<ConversationId, Slot, FixedState>;

/// Conversations by shard and id.
pub struct Conversations {
    shards: ShardCount,
    by_shard: HashMap<ShardId, OfShard, FixedState>,
}

impl Conversations {
    pub fn new(shards: ShardCount) -> Self {
        Self { shards, by_shard: HashMap::default() }
    }

    pub fn get(&self, id: &ConversationId) -> Option<&Slot> {
        self.by_shard.get(&self.shards.shard_of(id))?.get(id)
    }

    pub fn get_mut(&mut self, id: &ConversationId) -> Option<&mut Slot> {
        self.by_shard.get_mut(&self.shards.shard_of(id))?.get_mut(id)
    }

    pub fn contains_key(&self, id: &ConversationId) -> bool {
        self.get(id).is_some()
    }

    pub fn insert(&mut self, id: ConversationId, slot: Slot) {
        self.by_shard.entry(self.shards.shard_of(&id)).or_default().insert(id, slot);
    }

    pub fn remove(&mut self, id: &ConversationId) -> Option<Slot> {
        let shard = self.shards.shard_of(id);
        let of_shard = self.by_shard.get_mut(&shard)?;
        let slot = of_shard.remove(id);
        if of_shard.is_empty() {
            self.by_shard.remove(&shard);
        }
        slot
    }

    /// The conversations of a shard, in the same order in every run.
    pub fn of_shard(&self, shard: ShardId) -> Vec<ConversationId> {
        let mut ids: Vec<ConversationId> =
            self.by_shard.get(&shard).map(|of_shard| of_shard.keys().copied().collect()).unwrap_or_default();
        ids.sort_unstable();
        ids
    }
}

/// When open conversations want to be looked after. Each has at most one moment, which it knows itself.
#[derive(Default)]
pub struct Schedule {
    looks: BTreeSet<(Instant, ConversationId)>,
}

impl Schedule {
    /// Looks at a conversation at this moment, or sooner if that was planned.
    pub fn look_by(&mut self, conversation: &mut Conversation, at: Instant) {
        if conversation.look_at.is_some_and(|planned| planned <= at) {
            return;
        }
        self.forget(conversation);
        conversation.look_at = Some(at);
        self.looks.insert((at, conversation.id));
    }

    /// The conversation leaves memory.
    pub fn forget(&mut self, conversation: &mut Conversation) {
        if let Some(planned) = conversation.look_at.take() {
            self.looks.remove(&(planned, conversation.id));
        }
    }

    /// A conversation whose moment has come.
    pub fn next_due(&mut self, now: Instant) -> Option<ConversationId> {
        let (at, _) = self.looks.first()?;
        if *at > now {
            return None;
        }
        self.looks.pop_first().map(|(_, id)| id)
    }
}

#[cfg(test)]
mod tests;
