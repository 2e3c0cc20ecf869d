//! Fence reads: one at a time serves everything that waited for it when it began.
//!
//! Commit rests on it: QUORUM confirmed the batch, and a read of the router's own fence row that began after that confirmation finds
//! no fence and the generation that the router was started with.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use im_storage::StoreError;
use tokio::sync::{mpsc, oneshot};

use crate::{
    cluster::{self, Cluster, Ended},
    deadline::StoreCalls,
    worker::input::Input,
};

/// Somebody who waits for a fence read that begins from now on.
pub enum FenceRequest {
    /// A worker; it gets `Input::FenceClean` with its greatest ticket.
    Worker { worker: usize, ticket: u64 },
    /// A task.
    Task(oneshot::Sender<()>),
}

/// Hands requests to the one reader. Its queue is bounded by what waits for a commit or a read.
#[derive(Clone)]
pub struct FenceService {
    requests: mpsc::UnboundedSender<FenceRequest>,
}

impl FenceService {
    /// The service and the reader's end, for [`run`].
    pub fn new() -> (Self, mpsc::UnboundedReceiver<FenceRequest>) {
        let (requests, receiver) = cluster::inbox();
        (Self { requests }, receiver)
    }

    /// Asks for a worker.
    pub fn request(&self, worker: usize, ticket: u64) {
        let _ = self.requests.send(FenceRequest::Worker { worker, ticket });
    }

    /// Waits until a read that began after this call was clean; `false` if the router has ended.
    pub async fn clean(&self) -> bool {
        let (sender, receiver) = oneshot::channel();
        let _ = self.requests.send(FenceRequest::Task(sender));
        receiver.await.is_ok()
    }
}

/// Reads until the router ends.
pub async fn run(cluster: Arc<Cluster>, store: StoreCalls, mut requests: mpsc::UnboundedReceiver<FenceRequest>) {
    let mut waiting = Vec::new();
    while requests.recv_many(&mut waiting, usize::MAX).await > 0 {
        if !read_clean(&cluster, &store).await {
            return;
        }
        let mut tickets = BTreeMap::new();
        for request in waiting.drain(..) {
            match request {
                FenceRequest::Worker { worker, ticket } => {
                    let greatest = tickets.entry(worker).or_insert(ticket);
                    *greatest = ticket.max(*greatest);
                }
                FenceRequest::Task(sender) => {
                    let _ = sender.send(());
                }
            }
        }
        for (worker, ticket) in tickets {
            cluster.to_worker(worker, Input::FenceClean(ticket));
        }
    }
}

/// Reads until there is an answer; ends the router if it is fenced.
async fn read_clean(cluster: &Cluster, store: &StoreCalls) -> bool {
    let mut pause = Duration::from_millis(5);
    loop {
        cluster.metrics.fence_reads.increment(1);
        match store.read_fence(&cluster.config.instance).await {
            Ok(fence) if !fence.fenced && fence.generation <= cluster.config.generation => return true,
            Ok(_) => {
                cluster.end(Ended::Fenced);
                return false;
            }
            Err(StoreError::Unconfirmed(_)) => {
                tokio::time::sleep(pause + cluster.environment.jitter(pause)).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
            Err(error) => {
                cluster.end(Ended::StoreStopped(error.to_string()));
                return false;
            }
        }
    }
}
