//! Who owns the shards, as far as this router knows.

use im_proto::{Epoch, InstanceId, ShardId};

/// The owners of all shards at some moment.
#[derive(Debug, Default)]
pub struct Owners {
    pub(super) owners: Vec<Option<(InstanceId, Epoch)>>,
    /// Grows with each change.
    pub version: u64,
}

impl Owners {
    /// The owner of a shard and the epoch of its claim.
    pub fn get(&self, shard: ShardId) -> Option<&(InstanceId, Epoch)> {
        self.owners.get(shard.0 as usize).and_then(Option::as_ref)
    }
}
