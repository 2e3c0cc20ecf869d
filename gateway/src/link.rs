//! The way to one router: a queue that connections fill, and a task ([`dial`]) that numbers, sends, replays and receives.
//!
//! Connections push while they hold their session's lock, so what one session sends keeps its order. A link that lost something
//! beyond replay starts a new *incarnation*: everything that was sent under an older [`LinkToken`] counts as not sent.

mod audiences;
pub(crate) mod dial;
mod inbox;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use audiences::Audiences;
use im_proto::{InstanceId, link::Weighed, v1};
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

    /// The same link before something was lost: what is known under it has to be said again.
    pub fn outdated(self) -> LinkToken {
        LinkToken { incarnation: self.incarnation.wrapping_sub(1), ..self }
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
    queue: Mutex<Queue>,
    filled: Notify,
    queue_max: usize,
    /// Used by the link's own task only.
    audiences: Mutex<Audiences>,
}

/// What waits for a link.
#[derive(Default)]
struct Queue {
    messages: Vec<GatewayMessage>,
    /// The weight of all of them.
    bytes: usize,
}

/// The most that one batch holds: what a gRPC message and a router's inbox take at once.
const BATCH_MESSAGES_MAX: usize = 4096;
const BATCH_BYTES_MAX: usize = 1024 * 1024;
/// Bytes that wait for a link beyond which ephemeral messages are dropped: as much as it keeps for a replay by default, and a tenth
/// of a second of 1 Gbit/s. What is never dropped is bounded by what sessions may have in flight.
const QUEUE_BYTES_MAX: usize = 16 * 1024 * 1024;

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
        let mut bytes: usize = messages.iter().map(Weighed::weight).sum();
        let mut queue = self.queue.lock();
        if queue.messages.len() + messages.len() > self.queue_max || queue.bytes + bytes > QUEUE_BYTES_MAX {
            messages.retain(|message| !is_ephemeral(message));
            bytes = messages.iter().map(Weighed::weight).sum();
        }
        let was_empty = queue.messages.is_empty() && !messages.is_empty();
        queue.messages.append(messages);
        queue.bytes += bytes;
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
        self.queue.lock().messages.is_empty()
    }

    /// What fits into one batch. Its last message may go beyond the bound: that is at most one frame of a client.
    fn take(&self) -> Vec<GatewayMessage> {
        let mut queue = self.queue.lock();
        let (mut bytes, mut count) = (0, 0);
        for message in queue.messages.iter().take(BATCH_MESSAGES_MAX) {
            if bytes >= BATCH_BYTES_MAX {
                break;
            }
            bytes += message.weight();
            count += 1;
        }
        queue.bytes -= bytes;
        if count == queue.messages.len() {
            return std::mem::take(&mut queue.messages);
        }
        queue.messages.drain(..count).collect()
    }

    /// Forgets what waits and what was sent: sessions will send it again under the new token. Those that are over will not, so what
    /// says that they are over stays: the router may have lost nothing of what it was told, and would take them for alive. Ids are
    /// never used again, so it does no harm where the session is not known.
    fn reset(&self) {
        let mut queue = self.queue.lock();
        queue.messages.retain(|message| matches!(message.message, Some(Message::Close(_))));
        queue.bytes = queue.messages.iter().map(Weighed::weight).sum();
        self.audiences.lock().forget();
        self.incarnation.fetch_add(1, Ordering::AcqRel);
    }
}

/// Lost without harm when the queue is full, by number or by bytes: read receipts are cumulative, signals are worth nothing later.
fn is_ephemeral(message: &GatewayMessage) -> bool {
    matches!(&message.message, Some(Message::Received(_) | Message::Signal(_) | Message::Load(_)))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use im_proto::limits;
    use prost::Message as _;

    use super::*;

    /// The least that a router takes as one item.
    const ITEM_BYTES: usize = 16 * 1024 * 1024;

    fn link() -> Link {
        let router = InstanceId::parse("r1").expect("an instance id");
        Link::new(1, router, String::new(), 65_536, CancellationToken::new())
    }

    fn signal(sender: &str, data_bytes: usize) -> Message {
        let custom = v1::CustomSignal { r#type: String::new(), data: vec![7; data_bytes].into() };
        let signal = v1::Signal {
            sender: sender.to_owned(),
            signal: Some(v1::signal::Signal::Custom(custom)),
            ..v1::Signal::default()
        };
        Message::Signal(v1::SessionSignal { session_id: 1, conversation_id: Bytes::new(), signal: Some(signal) })
    }

    fn renew() -> Message {
        Message::Renew(v1::SessionRenew { session_id: 1, token: "t".repeat(limits::TOKEN_BYTES_MAX) })
    }

    fn call(bytes: usize) -> Message {
        let call = v1::Call { request: vec![7; bytes].into(), ..v1::Call::default() };
        Message::Call(v1::SessionCall { session_id: 1, call: Some(call) })
    }

    /// All batches that there are, encoded: the length of each, and their messages.
    fn drain(link: &Link) -> (Vec<usize>, usize) {
        let (mut lengths, mut count) = (Vec::new(), 0);
        loop {
            let messages = link.take();
            if messages.is_empty() {
                return (lengths, count);
            }
            count += messages.len();
            lengths.push(v1::GatewayBatch { messages, ..v1::GatewayBatch::default() }.encoded_len());
        }
    }

    #[test]
    fn no_batch_is_more_than_a_router_takes_whatever_it_is_made_of() {
        type Make = fn() -> Message;
        let of: [(&str, Make, usize); 4] = [
            ("the largest signals", || signal("", limits::SIGNAL_BYTES_MAX), 3_000),
            ("signals of a sender of 1 MiB", || signal(&"s".repeat(1024 * 1024), 1), 10),
            ("the largest tokens", renew, 5_000),
            ("the largest calls", || call(8 * 1024 * 1024), 3),
        ];
        for (what, message, count) in of {
            let link = link();
            (0..count).for_each(|_| link.push_one(message()));
            let (lengths, taken) = drain(&link);
            assert_eq!(taken, count, "{what} were lost");
            let longest = lengths.into_iter().max();
            assert!(longest.is_some_and(|longest| longest < ITEM_BYTES), "{what} make an item of {longest:?} bytes");
        }
    }

    #[test]
    fn signals_that_wait_are_bounded_in_bytes_and_nothing_else_is_dropped_for_them() {
        let link = link();
        for _ in 0..5_000 {
            link.push_one(signal("", limits::SIGNAL_BYTES_MAX));
        }
        for _ in 0..10 {
            link.push_one(renew());
        }
        let (lengths, taken) = drain(&link);
        assert!(lengths.iter().all(|length| *length < ITEM_BYTES));
        assert!(lengths.iter().sum::<usize>() <= QUEUE_BYTES_MAX + 10 * 2 * limits::TOKEN_BYTES_MAX);
        assert!(taken > 3_000, "{taken} of what there is room for");
        link.push_one(signal("", limits::SIGNAL_BYTES_MAX));
        assert_eq!(drain(&link).1, 1, "there is room again");
    }
}
