//! How far live pushes have arrived at the routers that hold the sessions.

use std::{collections::BTreeMap, sync::Arc};

use im_proto::{Epoch, InstanceId, ShardId};
use tokio::time::Instant;

use super::Cluster;
use crate::peer_link::PeerLink;

/// As of some moment.
#[derive(Debug, Default)]
pub struct Arrivals {
    /// Of each router to which there is a link: the moment before which all has arrived, `None` if a resync is on its way there.
    until: BTreeMap<InstanceId, Option<Instant>>,
    /// The same of all of them.
    everywhere: Option<Instant>,
    /// Pushes went to a shard of which this router did not know the owner, or knows another one since: the word of that is still to go.
    word_waits: bool,
}

impl Arrivals {
    /// Whether there is a link to a router, and all that was queued for it before a moment has arrived.
    pub fn at(&self, router: &InstanceId, before: Instant) -> bool {
        !self.word_waits && self.until.get(router).is_some_and(|until| until.is_some_and(|until| until > before))
    }

    /// The same of a router that may be gone: then its shards have other owners, at which all sessions sync.
    pub fn at_if_there(&self, router: &InstanceId, before: Instant) -> bool {
        !self.until.contains_key(router) || self.at(router, before)
    }

    /// The same of all routers.
    pub fn everywhere(&self, before: Instant) -> bool {
        !self.word_waits && self.everywhere.is_some_and(|until| until > before)
    }
}

impl Cluster {
    /// As of now. What arrives is noted when this is called, so from time to time.
    pub fn arrivals(&self) -> Arrivals {
        let peers: Vec<Arc<PeerLink>> = self.peers.read().values().cloned().collect();
        let until: BTreeMap<_, _> = peers.iter().map(|peer| (peer.instance.clone(), peer.arrived_until())).collect();
        let everywhere = until.values().copied().min().unwrap_or_else(|| Some(Instant::now()));
        let (owners, own) = (self.owners(), &self.config.instance);
        // Of a shard of this router nobody needs a word: its sessions sync when they are announced.
        let waits = |(shard, under): (&ShardId, &Option<Epoch>)| match owners.get(*shard) {
            Some((owner, epoch)) => owner != own && Some(*epoch) != *under,
            None => true,
        };
        let word_waits = self.pushed_under.lock().iter().any(waits);
        Arrivals { until, everywhere, word_waits }
    }
}
