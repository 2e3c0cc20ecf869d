//! The way to one router: a queue that connections fill, and a task ([`dial`]) that numbers, sends, replays and receives.
//!
//! Connections push while they hold their session's lock, so what one session sends keeps its order. A link that lost something
//! beyond replay starts a new *incarnation*: everything that was sent under an older [`LinkToken`] counts as not sent.

mod audiences;
pub(crate) mod dial;
mod inbox;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use audiences::Audiences;
use im_proto::{InstanceId, v1};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use v1::{GatewayMessage, gateway_message::Message};

/// One incarnation of one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkToken {
    index: u32,
    incarnation: u32,
}

impl LinkToken {
    /// Two incarnations of one link.
    pub fn same_link(self, other: LinkToken) -> bool {
        self.index == other.index
    }

    /// The number of the link among all that this gateway has made.
    pub fn index(self) -> u32 {
        self.index
    }
}

/// The way to one router.
pub(crate) struct Link {
    pub router: InstanceId,
    pub address: String,
    pub stop: CancellationToken,
    index: u32,
    incarnation: AtomicU32,
    up: AtomicBool,
    queue: Mutex<Vec<GatewayMessage>>,
    filled: Notify,
    queue_max: usize,
    /// Used by the link's own task only.
    audiences: Mutex<Audiences>,
}

/// The most that one batch holds: what a gRPC message and a router's inbox take at once.
const BATCH_MESSAGES_MAX: usize = 4096;
const BATCH_BYTES_MAX: usize = 1024 * 1024;

impl Link {
    pub fn new(index: u32, router: InstanceId, address: String, queue_max: usize, stop: CancellationToken) -> Self {
        Self {
            router,
            address,
            stop,
            index,
            incarnation: AtomicU32::new(0),
            up: AtomicBool::new(false),
            queue: Mutex::default(),
            filled: Notify::new(),
            queue_max,
            audiences: Mutex::default(),
        }
    }

    pub fn token(&self) -> LinkToken {
        LinkToken { index: self.index, incarnation: self.incarnation.load(Ordering::Acquire) }
    }

    /// Hellos were exchanged and the link has not broken since.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::Release);
    }

    /// Queues messages, in order.
    pub fn push(&self, messages: &mut Vec<GatewayMessage>) {
        let mut queue = self.queue.lock();
        if queue.len() + messages.len() > self.queue_max {
            messages.retain(|message| !is_ephemeral(message));
        }
        let was_empty = queue.is_empty() && !messages.is_empty();
        queue.append(messages);
        drop(queue);
        if was_empty {
            self.filled.notify_one();
        }
    }

    /// Queues one message.
    pub fn push_one(&self, message: Message) {
        self.push(&mut vec![GatewayMessage { message: Some(message) }]);
    }

    fn is_empty(&self) -> bool {
        self.queue.lock().is_empty()
    }

    /// What fits into one batch.
    fn take(&self) -> Vec<GatewayMessage> {
        let mut queue = self.queue.lock();
        let mut bytes = 0;
        let count = queue
            .iter()
            .take(BATCH_MESSAGES_MAX)
            .take_while(|message| {
                let fits = bytes < BATCH_BYTES_MAX;
                bytes += size_bytes(message);
                fits
            })
            .count();
        if count == queue.len() {
            return std::mem::take(&mut *queue);
        }
        queue.drain(..count).collect()
    }

    /// Forgets what waits and what was sent: sessions will send it again under the new token.
    fn reset(&self) {
        let mut queue = self.queue.lock();
        queue.clear();
        self.audiences.lock().forget();
        self.incarnation.fetch_add(1, Ordering::AcqRel);
    }
}

/// Lost without harm when the queue is full: read receipts are cumulative, signals are worth nothing later.
fn is_ephemeral(message: &GatewayMessage) -> bool {
    matches!(&message.message, Some(Message::Received(_) | Message::Signal(_) | Message::Load(_)))
}

/// Roughly; only what can be large is counted.
fn size_bytes(message: &GatewayMessage) -> usize {
    let large = match &message.message {
        Some(Message::Send(send)) => send.send.as_ref().map_or(0, |send| send.body.len()),
        Some(Message::Call(call)) => call.call.as_ref().map_or(0, |call| call.request.len()),
        Some(Message::Open(open)) => open.token.len(),
        _ => 0,
    };
    128 + large
}
