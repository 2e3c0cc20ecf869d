//! Shards and rendezvous hashing. Both hashes are fixed for ever and have golden vectors.

use std::num::NonZeroU32;

use xxhash_rust::xxh3::xxh3_64;

use crate::id::{ConversationId, InstanceId};

/// A unit of ownership.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(pub u32);

/// How many shards a cluster has; never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardCount(NonZeroU32);

impl ShardCount {
    /// 1 to 65,536 shards.
    pub fn new(count: u32) -> Option<Self> {
        NonZeroU32::new(count).filter(|count| count.get() <= 65_536).map(Self)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// All shards.
    pub fn shards(self) -> impl Iterator<Item = ShardId> {
        (0..self.get()).map(ShardId)
    }

    /// The shard of a conversation: XXH3-64 (seed 0) of the 16 bytes of the id, modulo the count.
    ///
    /// A user's shard is the shard of the user's self log, so that sessions and conversation list have one owner.
    pub fn shard_of(self, conversation: &ConversationId) -> ShardId {
        let hash = xxh3_64(conversation.as_bytes());
        ShardId((hash % u64::from(self.get())) as u32)
    }
}

impl Default for ShardCount {
    /// 1024.
    fn default() -> Self {
        Self(NonZeroU32::MIN.saturating_add(1023))
    }
}

/// The instance that should own a shard: the one with the greatest [`rendezvous_weight`], ties by the greater id.
pub fn rendezvous_owner<'a>(
    shard: ShardId,
    instances: impl IntoIterator<Item = &'a InstanceId>,
) -> Option<&'a InstanceId> {
    instances.into_iter().max_by_key(|instance| (rendezvous_weight(shard, instance), *instance))
}

/// XXH3-64 (seed 0) of the shard number as 4 bytes big-endian followed by the bytes of the instance id.
pub fn rendezvous_weight(shard: ShardId, instance: &InstanceId) -> u64 {
    let mut key = Vec::with_capacity(4 + instance.as_str().len());
    key.extend_from_slice(&shard.0.to_be_bytes());
    key.extend_from_slice(instance.as_str().as_bytes());
    xxh3_64(&key)
}
