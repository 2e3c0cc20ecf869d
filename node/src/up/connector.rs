//! Links within one process: the two ends of a pair of channels, handed to gateway and router.

use im_proto::{
    InstanceId,
    link::channel::{Connecting, Connector, GatewayEnd, LinkError, PeerEnd, pair},
};
use im_router::Router;

/// Batches that wait in each direction before the sender has to. A batch holds what gathered while the other side was busy, so
/// a few are enough to keep both sides at work.
const BATCHES_WAITING_MAX: usize = 64;

/// Joins the gateway to the router of this process.
pub struct ToRouter(pub Router);

impl Connector<GatewayEnd> for ToRouter {
    fn connect(&self, _to: &InstanceId, _address: &str) -> Connecting<GatewayEnd> {
        let (gateway, router) = pair(BATCHES_WAITING_MAX);
        self.0.accept_gateway(router);
        Box::pin(std::future::ready(Ok(gateway)))
    }
}

/// A router that is alone has no peers; the embedded store admits one.
pub struct NoPeers;

impl Connector<PeerEnd> for NoPeers {
    fn connect(&self, to: &InstanceId, _address: &str) -> Connecting<PeerEnd> {
        let reason = "the embedded store admits one router".to_owned();
        Box::pin(std::future::ready(Err(LinkError { to: to.clone(), reason })))
    }
}
