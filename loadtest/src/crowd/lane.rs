//! One client's part in one conversation: what it has, what it sent, what it waits for.
//!
//! The rules are those of SPEC.md for any client: live messages extend the contiguous part or are a gap to be read from the
//! history; unacknowledged sends are repeated oldest first, with the `known_seq` of their first try; `sync first` is answered by
//! reading the log and looking for the own id.

use std::collections::{BTreeMap, VecDeque};

use im_proto::ConversationId;

use super::flow::{BodyTemplate, MessageId};
use crate::{checker::View, driver::Micros, wire::Target};

/// Entries kept above a gap; beyond it they are dropped and read from the history like the gap.
pub(super) const AHEAD_MAX: usize = 4096;

/// A send that was not acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) id: MessageId,
    /// The highest seq known to exist at the first try.
    pub(super) known_seq: u64,
    /// The own entry was met in the history at this seq.
    pub(super) seen_at: Option<u64>,
    /// The server wants the log to be read before it takes this one.
    pub(super) sync_first: bool,
}

/// How this client sends here.
#[derive(Debug)]
pub(super) struct Sending {
    pub(super) flow: u32,
    /// Messages not complete at once.
    pub(super) window: u64,
    pub(super) body: BodyTemplate,
    pub(super) pending: VecDeque<Pending>,
    /// The pending sends from this index on are not written in this session, or have to be written again.
    pub(super) unsent: usize,
    pub(super) next_number: u32,
    /// Open loop: the scheduled moments of sends that are due. None: closed loop.
    pub(super) due: Option<VecDeque<Micros>>,
    /// The server asked for a pause.
    pub(super) paused_until: Micros,
}

/// An entry above a gap.
#[derive(Clone, Debug)]
pub(super) enum Ahead {
    /// The own message at this seq was acknowledged.
    Own,
    Entry(Box<im_proto::v1::Message>),
}

#[derive(Debug)]
pub(super) struct Lane {
    pub(super) conversation: Option<ConversationId>,
    /// The other user of a direct conversation.
    pub(super) peer: Option<String>,
    pub(super) target: Target,
    pub(super) view: Option<View>,
    /// Everything up to here was shown to the user.
    pub(super) have: u64,
    pub(super) ahead: BTreeMap<u64, Ahead>,
    pub(super) gap_since: Option<Micros>,
    /// The highest seq known to exist.
    pub(super) known: u64,
    /// The history is to be read up to here.
    pub(super) catch_up_to: u64,
    /// A history call is in flight.
    pub(super) reading: bool,
    pub(super) read_again_at: Micros,
    /// History calls that failed in a row.
    pub(super) read_failures: u32,
    pub(super) sending: Option<Sending>,
}

impl Sending {
    pub(super) fn new(flow: u32, window: u64, body_bytes: usize, open_loop: bool) -> Self {
        Self {
            flow,
            window,
            body: BodyTemplate::new(body_bytes),
            pending: VecDeque::new(),
            unsent: 0,
            next_number: 0,
            due: open_loop.then(VecDeque::new),
            paused_until: 0,
        }
    }

    /// The place of a message among the pending ones. Acks come in order, so it is nearly always the first.
    pub(super) fn position(&self, id: MessageId) -> Option<usize> {
        self.pending.iter().position(|pending| pending.id == id)
    }

    /// Takes a pending send out.
    pub(super) fn remove(&mut self, position: usize) -> Option<Pending> {
        if position < self.unsent {
            self.unsent -= 1;
        }
        self.pending.remove(position)
    }

    /// Everything pending is to be written again, oldest first, not before a moment.
    pub(super) fn send_again(&mut self, not_before: Micros) {
        self.unsent = 0;
        self.paused_until = self.paused_until.max(not_before);
    }

    /// The moment of the oldest send that is not acknowledged. Without a session it is one that could not even be written: to whoever
    /// sends that is the same wait.
    pub(super) fn waits_since(&self) -> Option<Micros> {
        let due = self.due.as_ref().and_then(|due| due.front().copied());
        self.pending.front().map(|pending| pending.id.scheduled).or(due)
    }

    /// Whether a send waits for the log to be read.
    pub(super) fn waits_for_sync(&self) -> bool {
        self.pending.iter().any(|pending| pending.sync_first)
    }
}

impl Lane {
    pub(super) fn to_peer(peer: String) -> Self {
        Self { target: Target::peer(&peer), peer: Some(peer), ..Self::new(None) }
    }

    pub(super) fn new(conversation: Option<ConversationId>) -> Self {
        Self {
            conversation,
            peer: None,
            target: Target::conversation(conversation.unwrap_or(ConversationId::from_bytes([0; 16]))),
            view: None,
            have: 0,
            ahead: BTreeMap::new(),
            gap_since: None,
            known: 0,
            catch_up_to: 0,
            reading: false,
            read_again_at: 0,
            read_failures: 0,
            sending: None,
        }
    }

    /// A new session: calls in flight are gone, and everything pending is to be sent again.
    pub(super) fn session_began(&mut self) {
        self.reading = false;
        self.read_again_at = 0;
        self.read_failures = 0;
        if let Some(sending) = &mut self.sending {
            sending.unsent = 0;
            sending.paused_until = 0;
        }
    }

    /// The history has to be read now.
    pub(super) fn wants_history(&self, now: Micros) -> bool {
        !self.reading && self.catch_up_to > self.have && self.read_again_at <= now && self.conversation.is_some()
    }

    /// A higher seq exists than was known.
    pub(super) fn exists(&mut self, seq: u64) {
        self.known = self.known.max(seq);
    }
}
