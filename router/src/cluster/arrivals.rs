//! How far live pushes have arrived at the routers that hold the sessions.

use std::{collections::BTreeMap, sync::Arc};

use im_proto::InstanceId;
use tokio::time::Instant;

use super::Cluster;
use crate::peer_link::PeerLink;

/// Of each router to which there is a link: the moment before which all has arrived, `None` if a resync is on its way there.
#[derive(Debug, Default)]
pub struct Arrivals(BTreeMap<InstanceId, Option<Instant>>);

impl Arrivals {
    /// Whether there is a link to a router, and all that was queued for it before a moment has arrived.
    pub fn at(&self, router: &InstanceId, before: Instant) -> bool {
        self.0.get(router).is_some_and(|until| until.is_some_and(|until| until > before))
    }

    /// The same of a router that may be gone: then its shards have other owners, at which all sessions sync.
    pub fn at_if_there(&self, router: &InstanceId, before: Instant) -> bool {
        !self.0.contains_key(router) || self.at(router, before)
    }

    /// The same of all routers.
    pub fn everywhere(&self, before: Instant) -> bool {
        self.0.values().all(|until| until.is_some_and(|until| until > before))
    }
}

impl Cluster {
    /// As of now. What arrives is noted when this is called, so from time to time.
    pub fn arrivals(&self) -> Arrivals {
        let peers: Vec<Arc<PeerLink>> = self.peers.read().values().cloned().collect();
        Arrivals(peers.iter().map(|peer| (peer.instance.clone(), peer.arrived_until())).collect())
    }
}
