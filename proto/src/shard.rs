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
        let remainder = xxh3_64(conversation.as_bytes()) % u64::from(self.get());
        // Smaller than the count, which is a u32.
        ShardId(u32::try_from(remainder).unwrap_or(0))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn instances(names: &[&str]) -> Vec<InstanceId> {
        names.iter().map(|name| InstanceId::parse(name).expect("an instance id")).collect()
    }

    #[test]
    fn a_cluster_has_1_to_65536_shards() {
        assert_eq!(ShardCount::new(0), None);
        assert_eq!(ShardCount::new(65_537), None);
        assert_eq!(ShardCount::new(1).map(ShardCount::get), Some(1));
        assert_eq!(ShardCount::new(65_536).map(ShardCount::get), Some(65_536));
        assert_eq!(ShardCount::default().get(), 1024);
        assert_eq!(ShardCount::default().shards().count(), 1024);
    }

    #[test]
    fn shards_are_in_range_and_about_even() {
        let count = ShardCount::new(16).expect("in range");
        let mut hits = [0_u32; 16];
        for i in 0..16_000_u64 {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&i.to_be_bytes());
            hits[count.shard_of(&ConversationId::from_bytes(id)).0 as usize] += 1;
        }
        assert!(hits.iter().all(|hits| (800..1200).contains(hits)), "{hits:?}");
    }

    #[test]
    fn when_an_instance_goes_only_its_shards_move_and_they_spread() {
        let all = instances(&["router-a", "router-b", "router-c"]);
        let mut taken_over = [0, 0];
        for shard in ShardCount::default().shards() {
            let before = rendezvous_owner(shard, &all).expect("an owner");
            let after = rendezvous_owner(shard, &all[..2]).expect("an owner");
            if before == &all[2] {
                taken_over[usize::from(after == &all[1])] += 1;
            } else {
                assert_eq!(before, after);
            }
        }
        assert!(taken_over.iter().all(|count| *count > 120), "{taken_over:?}");
    }

    #[test]
    fn the_order_of_the_instances_does_not_matter() {
        let all = instances(&["a", "b", "c", "d"]);
        for shard in ShardCount::default().shards() {
            assert_eq!(rendezvous_owner(shard, &all), rendezvous_owner(shard, all.iter().rev()));
        }
        assert_eq!(rendezvous_owner(ShardId(0), []), None);
    }
}
