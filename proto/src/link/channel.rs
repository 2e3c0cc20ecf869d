//! A link as its two ends see it, whatever carries it: a pair of bounded channels in one process, a gRPC stream between processes,
//! a simulated stream in tests. A closed channel is a broken link.

use std::{future::Future, pin::Pin, sync::Arc};

use tokio::sync::mpsc;

use crate::{id::InstanceId, v1};

/// What travels on a link.
#[derive(Debug)]
pub enum LinkItem<B> {
    /// The first item of each side.
    Hello(v1::LinkHello),
    /// Shared with the sender's replay buffer.
    Batch(Arc<B>),
}

/// One end of a link: sends `Out`, receives `In`.
#[derive(Debug)]
pub struct LinkEnd<Out, In> {
    pub sender: mpsc::Sender<LinkItem<Out>>,
    pub receiver: mpsc::Receiver<LinkItem<In>>,
}

/// The gateway's end of a link to a router.
pub type GatewayEnd = LinkEnd<v1::GatewayBatch, v1::RouterBatch>;
/// The router's end of a link to a gateway.
pub type RouterEnd = LinkEnd<v1::RouterBatch, v1::GatewayBatch>;
/// Either end of a link between routers.
pub type PeerEnd = LinkEnd<v1::PeerBatch, v1::PeerBatch>;

/// The two ends of a link in one process. Each direction holds at most `capacity` batches; a full channel makes its sender wait.
pub fn pair<A, B>(capacity: usize) -> (LinkEnd<A, B>, LinkEnd<B, A>) {
    let (to_second, from_first) = mpsc::channel(capacity);
    let (to_first, from_second) = mpsc::channel(capacity);
    (LinkEnd { sender: to_second, receiver: from_second }, LinkEnd { sender: to_first, receiver: from_first })
}

/// Why there is no link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no link to {to}: {reason}")]
pub struct LinkError {
    pub to: InstanceId,
    pub reason: String,
}

/// A link that is being made.
pub type Connecting<E> = Pin<Box<dyn Future<Output = Result<E, LinkError>> + Send>>;

/// Makes links of a gateway to routers, or of a router to others. `address` is the `link` endpoint of the instance in the registry.
pub trait Connector<E>: Send + Sync {
    /// Dials an instance. The caller retries with back-off.
    fn connect(&self, to: &InstanceId, address: &str) -> Connecting<E>;
}
