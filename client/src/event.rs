//! What a client tells its application, in one stream.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use im_proto::{ConversationId, Timestamp, UserId, v1};
use tokio::sync::mpsc;

use crate::error::{ClosedReason, Status};

/// An entry of a conversation's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub conversation: ConversationId,
    pub seq: u64,
    /// `None` for what the server wrote itself, as in the user's own log.
    pub sender: Option<UserId>,
    pub sent_at: Timestamp,
    /// Empty for what the server wrote itself.
    pub client_message_id: Bytes,
    /// An encoded [`v1::Body`], as its sender wrote it. Empty if `gone_reason` is not 0.
    pub body: Bytes,
    pub kind: v1::EntryKind,
    /// A sum: 1 it counts as unread, 2 it mentions somebody by name, 4 it mentions all.
    pub flags: u32,
    /// Sent by this user, from whatever device.
    pub own: bool,
    /// 0: present. Why the body is gone: 1 recalled, 2 expired, 3 moderated, 4 account deleted.
    pub gone_reason: u32,
}

impl Entry {
    /// `None` if the server's message breaks the protocol.
    pub(crate) fn from_wire(message: v1::Message, gone_reason: u32, me: Option<&UserId>) -> Option<Self> {
        let kind = message.kind();
        let own = me.is_some_and(|me| me.as_str() == message.sender);
        let sender = match me {
            _ if message.sender.is_empty() => None,
            Some(me) if own => Some(me.clone()),
            _ => Some(UserId::parse(&message.sender).ok()?),
        };
        Some(Self {
            conversation: ConversationId::from_slice(&message.conversation_id).ok()?,
            seq: message.seq,
            sender,
            sent_at: Timestamp::from_millis(message.sent_at_ms),
            client_message_id: message.client_message_id,
            body: message.body,
            kind,
            flags: message.flags,
            own,
            gone_reason,
        })
    }

    /// The decoded body, if this version can read it.
    pub fn decode_body(&self) -> Option<v1::Body> {
        use prost::Message as _;
        v1::Body::decode(self.body.as_ref()).ok()
    }
}

/// An event. Entries of one conversation come in the order of their seqs, each once; events of other kinds are notices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The next entry of a followed conversation, also of this client's own sends.
    Message(Entry),
    /// Entries of a followed conversation up to this seq are no longer kept by the server; the next one is `through + 1`.
    Gone { conversation: ConversationId, through: u64 },
    /// A followed conversation cannot be read (any more). It is picked up again when the user is back in it.
    Unreadable { conversation: ConversationId, status: Status },
    /// Somebody types, a cursor has moved ([`v1::Receipt`], also that of this user on another device), or another ephemeral signal.
    /// May be lost.
    Signal(v1::Signal),
    /// How it is with users whom [`crate::Client::watch_presence`] named: those of whom it has changed, also while there was no
    /// session. What that call has answered may be said once more.
    Presence(Vec<v1::UserPresence>),
    /// A session is up. Sends wait for the sync that follows.
    Connected { endpoint: String },
    /// The conversation list is in step with the server again, after a connect or because the server asked for it.
    Resynced,
    /// The session ended; the client connects again by itself.
    Disconnected { reason: String },
    /// The last event: the client has ended.
    Closed(ClosedReason),
}

/// Notices that wait for room; the oldest is dropped beyond this, entries never are.
const NOTICES_MAX: usize = 32;

/// The sending end. When the queue is full entries are not taken (they are read from history when there is room again) and
/// notices wait, at most [`NOTICES_MAX`] of them.
pub(crate) struct EventSink {
    sender: mpsc::Sender<Event>,
    notices: VecDeque<Event>,
    /// The last entries of others that were taken, by conversation.
    taken: BTreeMap<ConversationId, u64>,
}

impl EventSink {
    pub(crate) fn new(sender: mpsc::Sender<Event>) -> Self {
        Self { sender, notices: VecDeque::new(), taken: BTreeMap::new() }
    }

    /// How many entries are taken now.
    pub(crate) fn room(&self) -> usize {
        if self.sender.is_closed() { usize::MAX } else { self.sender.capacity().saturating_sub(self.notices.len()) }
    }

    /// Whether there is room enough that fetching history for it pays.
    pub(crate) fn is_roomy(&self) -> bool {
        self.room() >= self.worthwhile_room()
    }

    /// Room that a page of history should find.
    pub(crate) fn worthwhile_room(&self) -> usize {
        (self.sender.max_capacity() / 4).clamp(1, 64)
    }

    /// Gives the event to the application. It comes back if there is no room.
    #[must_use]
    pub(crate) fn deliver(&mut self, event: Event) -> Option<Event> {
        if self.room() == 0 {
            return Some(event);
        }
        let entry = match &event {
            Event::Message(entry) if !entry.own => Some((entry.conversation, entry.seq)),
            _ => None,
        };
        match self.sender.try_send(event) {
            Err(mpsc::error::TrySendError::Full(event)) => Some(event),
            Ok(()) => {
                self.taken.extend(entry);
                None
            }
            // Nobody wants events.
            Err(mpsc::error::TrySendError::Closed(_)) => None,
        }
    }

    /// The last entries of others that were taken since the last time.
    pub(crate) fn take_taken(&mut self) -> BTreeMap<ConversationId, u64> {
        std::mem::take(&mut self.taken)
    }

    pub(crate) fn notice(&mut self, event: Event) {
        if self.notices.len() == NOTICES_MAX {
            self.notices.pop_front();
        }
        self.notices.push_back(event);
        self.flush_notices();
    }

    pub(crate) fn flush_notices(&mut self) {
        while let Some(event) = self.notices.pop_front() {
            if let Err(mpsc::error::TrySendError::Full(event)) = self.sender.try_send(event) {
                self.notices.push_front(event);
                return;
            }
        }
    }

    pub(crate) fn has_waiting_notices(&self) -> bool {
        !self.notices.is_empty()
    }
}
