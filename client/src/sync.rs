//! Bringing the conversation list, and whether the user is visible, in step: after each connect and whenever the server asks for it.
//!
//! A sync is a row of pages. Its version is that of the first page: what changes while the pages are read comes live, too, and
//! the user's own log is read from that version on.

use std::time::Duration;

use bytes::Bytes;
use im_proto::{ConversationId, UserId, limits, method::Method, v1};
use prost::Message as _;
use tokio::time::Instant;

use crate::{
    calls::{Purpose, Request},
    config::{Backoff, Target},
    core::Core,
    error::Status,
    event::{Entry, Event},
};

/// Waiting times after a sync that the server could not answer.
const RETRY: Backoff = Backoff { base: Duration::from_millis(200), max: Duration::from_secs(5) };

/// What is going on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Due(Instant),
    Running,
}

pub(crate) struct SyncState {
    /// Of the last complete sync; 0 before the first.
    version: u64,
    /// Of the first page of the running sync.
    running_version: Option<u64>,
    phase: Phase,
    /// Asked for while one was running: run again then.
    again: Option<Instant>,
    retries: u32,
}

impl SyncState {
    pub(crate) fn new() -> Self {
        Self { version: 0, running_version: None, phase: Phase::Idle, again: None, retries: 0 }
    }

    /// A sync is wanted at that time; an earlier wish stands.
    pub(crate) fn want(&mut self, at: Instant) {
        match self.phase {
            Phase::Idle => self.phase = Phase::Due(at),
            Phase::Due(earlier) => self.phase = Phase::Due(earlier.min(at)),
            Phase::Running => self.again = Some(self.again.map_or(at, |earlier| earlier.min(at))),
        }
    }

    /// When the next sync shall start.
    pub(crate) fn due(&self) -> Option<Instant> {
        match self.phase {
            Phase::Due(at) => Some(at),
            Phase::Idle | Phase::Running => None,
        }
    }

    pub(crate) fn disconnected(&mut self) {
        self.phase = Phase::Idle;
        self.again = None;
        self.retries = 0;
    }
}

impl Core {
    /// Starts a sync that is due.
    pub(crate) fn start_sync(&mut self, now: Instant) {
        if self.sync.due().is_some_and(|at| at <= now) {
            self.sync.phase = Phase::Running;
            self.sync.running_version = None;
            self.request_sync_page(Bytes::new());
        }
    }

    fn request_sync_page(&mut self, page: Bytes) {
        let (version, limit) = (self.sync.version, limits::SYNC_CONVERSATIONS_MAX);
        let mut request = v1::SyncRequest { version, have: Vec::new(), page, limit, details: false };
        let mut room = self.request_bytes_max().saturating_sub(request.encoded_len());
        let have = self.conversations.have().take(limits::SYNC_HAVE_MAX);
        let have = have.map(|(id, seq)| v1::SyncHave { conversation_id: id.to_bytes(), seq, read_seq: 0 });
        // A longer list would be refused, and a larger frame would end the connection. Those not named are only told again.
        request.have = have
            .map_while(|have| {
                // A tag and a length of one byte each.
                room = room.checked_sub(have.encoded_len() + 2)?;
                Some(have)
            })
            .collect();
        let request = Bytes::from(request.encode_to_vec());
        self.calls.push(Request { method: Method::ConversationSync, request, purpose: Purpose::Sync });
    }

    /// A page of a sync, or its failure.
    pub(crate) fn sync_replied(&mut self, reply: Result<Bytes, Status>, now: Instant) {
        let reply = reply.and_then(|bytes| {
            v1::SyncReply::decode(bytes).map_err(|_| Status::from_code(im_proto::StatusCode::Malformed))
        });
        match reply {
            Ok(reply) => self.sync_page(reply, now),
            Err(status) => {
                tracing::debug!(%status, "the sync failed, trying again");
                let delay = RETRY.delay(self.sync.retries, &self.environment).max(status.retry_after);
                self.sync.retries += 1;
                self.sync.phase = Phase::Due(now + delay);
            }
        }
    }

    fn sync_page(&mut self, reply: v1::SyncReply, now: Instant) {
        let version = *self.sync.running_version.get_or_insert(reply.version);
        if reply.version >= self.visibility_seq {
            self.invisible = reply.invisible;
        }
        for row in reply.conversations {
            self.sync_row(&row, now);
        }
        if !reply.next.is_empty() {
            return self.request_sync_page(reply.next);
        }
        self.sync.version = version;
        self.sync.retries = 0;
        self.sync.phase = match self.sync.again.take() {
            Some(at) => Phase::Due(at),
            None => Phase::Idle,
        };
        self.conversations.synced(version);
        self.ready();
        self.watching.want(now);
        self.events.notice(Event::Resynced);
    }

    fn sync_row(&mut self, row: &v1::ConversationRow, now: Instant) {
        let Ok(id) = ConversationId::from_slice(&row.conversation_id) else { return };
        self.learn_peer(&row.peer_user_id, id, now);
        if row.left {
            self.conversations.left(id, row.head);
        } else {
            self.conversations.row(id, row.head, row.joined_seq);
        }
    }

    /// The direct conversation with a user is this one.
    fn learn_peer(&mut self, user: &str, id: ConversationId, now: Instant) {
        if let Ok(user) = UserId::parse(user) {
            self.sends.alias(&Target::Peer(user.clone()), id, now);
            self.conversations.learn_peer(&user, id);
        }
    }

    /// Applies what the user's own log says about the conversation list; whether it said anything.
    pub(crate) fn apply_own_log(&mut self, now: Instant) -> bool {
        let mut is_changed = false;
        while let Some(entry) = self.conversations.next_own_log_entry() {
            let Some(event) = system_event(&entry) else { continue };
            is_changed = true;
            match event {
                v1::system_event::Event::ConversationJoined(joined) => {
                    let Ok(id) = ConversationId::from_slice(&joined.conversation_id) else { continue };
                    self.learn_peer(&joined.peer_user_id, id, now);
                    self.conversations.joined(id, joined.joined_seq, entry.seq);
                }
                v1::system_event::Event::ConversationLeft(left) => {
                    if let Ok(id) = ConversationId::from_slice(&left.conversation_id) {
                        self.conversations.left(id, left.left_seq);
                    }
                }
                v1::system_event::Event::VisibilityChanged(changed) => {
                    (self.invisible, self.visibility_seq) = (changed.invisible, entry.seq);
                }
                _ => {}
            }
        }
        is_changed
    }
}

fn system_event(entry: &Entry) -> Option<v1::system_event::Event> {
    match entry.decode_body()?.content? {
        v1::body::Content::Event(event) => event.event,
        _ => None,
    }
}
