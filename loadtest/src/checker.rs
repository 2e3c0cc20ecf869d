//! The history checker: told everything that clients did and saw, it judges whether the promises of the protocol held.
//!
//! - **lost**: acknowledged, and not exactly at its seq in the history, or not delivered to a client that stayed or came back.
//! - **duplicated**: one client message id at two seqs, or delivered twice to one client as new.
//! - **reordered**: the messages of one session to one conversation out of order, or two members who saw different orders.
//! - **holes**: a seq below the head without an entry. **corrupted**: other bytes than were sent, or an entry that nobody sent.
//!
//! No I/O, no clock, no randomness: the load driver and the deterministic simulation use the same code. Bodies and ids are kept as
//! hashes; memory is 32 bytes a seq and a few words for each run of seqs a client saw, so 10⁷ messages fit in 400 MB, and a fan-out
//! to 10⁴ members costs no more than its messages.
//!
//! What it assumes: a client re-sends what is unacknowledged oldest first, before anything new (SPEC.md asks for it), so that the
//! order in which a session *first* tried its messages is the order they must have. Deliveries are recorded as the client's user
//! sees them: repeats that the client dropped because it had that seq are not recorded.

mod hash;
mod log;
mod seq_set;
mod verdict;

use std::collections::BTreeMap;

use im_proto::{ConversationId, v1};

pub use self::verdict::{Finding, Total, Verdict, Violation};
use self::{
    log::{Claim, Log, NO_SESSION, Pending, PendingSends, Sources},
    seq_set::SeqSet,
};

/// A conversation of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conversation(u32);

/// A client: one device of one user, over all its sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Client(u32);

/// A client's part in a conversation: what it sent there and what it saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct View(u32);

/// What was asked of a history while it grew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadRange {
    /// First and last seq, both included; `to` 0 is the head.
    pub from: u64,
    pub to: u64,
    /// The newest of the range, if not all fit.
    pub newest: bool,
    /// Somebody had been told of an entry at this seq before the question was asked.
    pub known: u64,
}

/// An entry as an observer saw it.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    pub seq: u64,
    pub sender: &'a str,
    /// Empty for what the server wrote by itself.
    pub client_message_id: &'a [u8],
    pub body: &'a [u8],
    /// A system event: nobody sent it as a message.
    pub event: bool,
}

impl<'a> From<&'a v1::Message> for Entry<'a> {
    fn from(message: &'a v1::Message) -> Self {
        Self {
            seq: message.seq,
            sender: &message.sender,
            client_message_id: &message.client_message_id,
            body: &message.body,
            event: message.kind == i32::from(v1::EntryKind::Event),
        }
    }
}

struct ClientState {
    user: u64,
    /// The live session; none: not connected.
    session: Option<u32>,
}

struct ViewState {
    client: u32,
    conversation: u32,
    /// Entries above this one must reach the client.
    from: u64,
    /// Whether the client has to see everything at all.
    follows: bool,
    pending: PendingSends,
    sent: u32,
    delivered: SeqSet,
    /// The session of `last_delivered`.
    session: u32,
    last_delivered: u64,
}

/// Everything that was recorded.
#[derive(Default)]
pub struct History {
    logs: Vec<Log>,
    log_of: BTreeMap<ConversationId, u32>,
    clients: Vec<ClientState>,
    views: Vec<ViewState>,
    view_of: BTreeMap<(u32, u32), u32>,
    /// The client of each session.
    sessions: Vec<u32>,
    /// What was found while recording.
    verdict: Verdict,
}

fn index(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn next_number(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(NO_SESSION)
}

impl History {
    /// Nothing recorded yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The conversation with this id, from its first entry on.
    pub fn conversation(&mut self, id: ConversationId) -> Conversation {
        self.conversation_after(id, 0)
    }

    /// The conversation with this id, whose entries up to `base` are older than the run.
    pub fn conversation_after(&mut self, id: ConversationId, base: u64) -> Conversation {
        let number = *self.log_of.entry(id).or_insert_with(|| {
            self.logs.push(Log::new(id, base));
            next_number(self.logs.len() - 1)
        });
        Conversation(number)
    }

    /// A client of a user, not connected yet.
    pub fn client(&mut self, user: &str) -> Client {
        self.clients.push(ClientState { user: hash::user(user), session: None });
        Client(next_number(self.clients.len() - 1))
    }

    /// The client has a session from now on. A session it had is over.
    pub fn session_started(&mut self, client: Client) {
        self.sessions.push(client.0);
        self.clients[index(client.0)].session = Some(next_number(self.sessions.len() - 1));
    }

    /// The client's connection ended. If no session follows, nothing more has to reach it.
    pub fn session_lost(&mut self, client: Client) {
        self.clients[index(client.0)].session = None;
    }

    /// The client's part in a conversation. It need not see everything unless [`History::follows`] says so.
    pub fn view(&mut self, client: Client, conversation: Conversation) -> View {
        let number = *self.view_of.entry((client.0, conversation.0)).or_insert_with(|| {
            self.views.push(ViewState {
                client: client.0,
                conversation: conversation.0,
                from: 0,
                follows: false,
                pending: PendingSends::default(),
                sent: 0,
                delivered: SeqSet::default(),
                session: NO_SESSION,
                last_delivered: 0,
            });
            next_number(self.views.len() - 1)
        });
        View(number)
    }

    /// From now on every entry above `seq` has to reach the client, live or by catching up, as long as it stays or comes back.
    pub fn follows(&mut self, view: View, seq: u64) {
        let state = &mut self.views[index(view.0)];
        (state.follows, state.from) = (true, seq);
    }

    /// Nothing more has to reach this view (the user left the conversation).
    pub fn unfollows(&mut self, view: View) {
        self.views[index(view.0)].follows = false;
    }

    /// The client tried to send. Repeats of a message are recorded like the first try.
    pub fn sent(&mut self, view: View, client_message_id: &[u8], body: &[u8]) {
        let state = &mut self.views[index(view.0)];
        let client = &self.clients[index(state.client)];
        let id = hash::message(client.user, client_message_id);
        let (session, ordinal) = (client.session.unwrap_or(NO_SESSION), state.sent);
        let entry = state.pending.entry(id);
        if let std::collections::hash_map::Entry::Vacant(vacant) = entry {
            vacant.insert(Pending { body: hash::body(body), session, ordinal });
            state.sent += 1;
            self.verdict.sent += 1;
        }
    }

    /// The client was told that its message is durable at `seq`.
    pub fn acknowledged(&mut self, view: View, client_message_id: &[u8], seq: u64) {
        let state = &mut self.views[index(view.0)];
        let id = hash::message(self.clients[index(state.client)].user, client_message_id);
        let claim = match state.pending.remove(&id) {
            Some(Pending { body, session, ordinal }) => {
                Claim { id, body: Some(body), sources: Sources::ACKNOWLEDGED, session, ordinal }
            }
            None => Claim { id, body: None, sources: Sources::ACKNOWLEDGED, session: NO_SESSION, ordinal: 0 },
        };
        let log = &mut self.logs[index(state.conversation)];
        if log.admits(seq, &mut self.verdict) && log.claim(seq, claim, &mut self.verdict) {
            self.verdict.acknowledged += 1;
        }
    }

    /// The client showed an entry to its user as new: live, or caught up from the history.
    pub fn delivered(&mut self, view: View, entry: Entry<'_>) {
        let state = &mut self.views[index(view.0)];
        let log = &mut self.logs[index(state.conversation)];
        if !log.admits(entry.seq, &mut self.verdict) {
            return;
        }
        let session = self.clients[index(state.client)].session.unwrap_or(NO_SESSION);
        if state.session != session {
            (state.session, state.last_delivered) = (session, 0);
        }
        if !state.delivered.insert(entry.seq) {
            self.verdict.found(Violation::DeliveredTwice, log.id, entry.seq, "delivered twice as new");
        } else if entry.seq < state.last_delivered {
            let detail = format!("delivered after seq {}", state.last_delivered);
            self.verdict.found(Violation::DeliveryOrder, log.id, entry.seq, &detail);
        }
        state.last_delivered = state.last_delivered.max(entry.seq);
        self.verdict.delivered += 1;
        log.claim(entry.seq, entry.claim(Sources::DELIVERED), &mut self.verdict);
    }

    /// An entry of the history as read at the end of the run.
    pub fn stored(&mut self, conversation: Conversation, entry: Entry<'_>) {
        let log = &mut self.logs[index(conversation.0)];
        let admitted = log.admits(entry.seq, &mut self.verdict);
        if admitted && log.claim(entry.seq, entry.claim(Sources::STORED), &mut self.verdict) {
            self.verdict.stored += 1;
        }
    }

    /// A part of the history was read in the middle of the run. It may be shorter than what was asked for, never empty.
    pub fn read<'a>(
        &mut self,
        conversation: Conversation,
        range: ReadRange,
        head: u64,
        first_seq: u64,
        entries: impl Iterator<Item = Entry<'a>>,
    ) {
        let log = &mut self.logs[index(conversation.0)];
        if head < range.known {
            let detail = format!("a read was told of head {head} after this was known");
            self.verdict.found(Violation::HeadWentBack, log.id, range.known, &detail);
        }
        let (from, to) = (range.from.max(first_seq).max(1), if range.to == 0 { head } else { range.to.min(head) });
        let mut last = None;
        for entry in entries {
            let expected = last.map_or(if range.newest { entry.seq } else { from }, |last| last + 1);
            if entry.seq != expected || !(from..=to).contains(&entry.seq) {
                let detail = format!("a read of {from} to {to} has seq {} here", entry.seq);
                self.verdict.found(Violation::Hole, log.id, expected, &detail);
            }
            last = Some(entry.seq);
            if log.admits(entry.seq, &mut self.verdict) {
                log.claim(entry.seq, entry.claim(Sources::DELIVERED), &mut self.verdict);
            }
        }
        let ends_early = if range.newest { last != Some(to) } else { last.is_none() };
        if from <= to && ends_early {
            let detail = format!("a read of {from} to {to} ends at {}", last.unwrap_or(0));
            self.verdict.found(Violation::Hole, log.id, to, &detail);
        }
    }

    /// The history was read to its end, and its head is this. Without it nothing is judged against the history.
    pub fn stored_through(&mut self, conversation: Conversation, head: u64) {
        self.logs[index(conversation.0)].head_read = Some(head);
    }

    /// Different messages acknowledged, and deliveries as new, so far.
    pub fn counts(&self) -> (u64, u64) {
        (self.verdict.acknowledged, self.verdict.delivered)
    }

    /// Takes in what another thread recorded. Its clients stay its own; conversations of the same id become one.
    pub fn absorb(&mut self, other: History) {
        let first_client = next_number(self.clients.len());
        let first_session = next_number(self.sessions.len());
        self.clients.extend(
            other
                .clients
                .into_iter()
                .map(|client| ClientState { session: client.session.map(|session| session + first_session), ..client }),
        );
        self.sessions.extend(other.sessions.into_iter().map(|client| client + first_client));
        self.verdict.absorb(other.verdict);
        let shift = |session: u32| if session == NO_SESSION { session } else { session + first_session };
        let mut conversations = Vec::with_capacity(other.logs.len());
        for log in other.logs {
            let conversation = self.conversation_after(log.id, log.base);
            conversations.push(conversation.0);
            let own = &mut self.logs[index(conversation.0)];
            for (seq, claim) in log.claims() {
                let claim = Claim { session: shift(claim.session), ..claim };
                if own.admits(seq, &mut self.verdict) {
                    own.claim(seq, claim, &mut self.verdict);
                }
            }
            own.head_read = own.head_read.max(log.head_read);
        }
        for mut view in other.views {
            view.client += first_client;
            view.conversation = conversations[index(view.conversation)];
            view.session = shift(view.session);
            view.pending.values_mut().for_each(|pending| pending.session = shift(pending.session));
            self.view_of.insert((view.client, view.conversation), next_number(self.views.len()));
            self.views.push(view);
        }
    }

    /// Judges the whole run.
    pub fn judge(mut self) -> Verdict {
        let mut verdict = std::mem::take(&mut self.verdict);
        let mut unacknowledged: Vec<PendingSends> = self.logs.iter().map(|_| PendingSends::default()).collect();
        for view in &mut self.views {
            unacknowledged[index(view.conversation)].extend(view.pending.drain());
        }
        for (log, pending) in self.logs.iter_mut().zip(&unacknowledged) {
            log.judge(pending, &mut verdict);
        }
        for view in &self.views {
            self.judge_delivery(view, &mut verdict);
        }
        verdict
    }

    /// Everything above where the view began has reached a client that is connected at the end; its own messages by their acks.
    fn judge_delivery(&self, view: &ViewState, verdict: &mut Verdict) {
        if !view.follows || self.clients[index(view.client)].session.is_none() {
            return;
        }
        let log = &self.logs[index(view.conversation)];
        for (first, last) in view.delivered.gaps(view.from.max(log.base) + 1, log.head()) {
            let missing = (first..=last).filter(|&seq| !self.is_own_acknowledged(view, log, seq));
            // Holes of the history itself were reported as such.
            let missing: Vec<u64> = missing.filter(|&seq| log.slot(seq).is_some()).collect();
            if let Some(&seq) = missing.first() {
                let detail = format!("client {} never got it", view.client);
                verdict.found_many(missing.len() as u64, Violation::NotDelivered, log.id, seq, &detail);
            }
        }
    }

    fn is_own_acknowledged(&self, view: &ViewState, log: &Log, seq: u64) -> bool {
        log.slot(seq).is_some_and(|slot| {
            let sender = self.sessions.get(index(slot.session));
            slot.sources.has(Sources::ACKNOWLEDGED) && sender == Some(&view.client)
        })
    }
}

impl Entry<'_> {
    fn claim(&self, source: Sources) -> Claim {
        Claim {
            id: hash::message(hash::user(self.sender), self.client_message_id),
            body: Some(hash::body(self.body)),
            sources: if self.event { source.with(Sources::EVENT) } else { source },
            session: NO_SESSION,
            ordinal: 0,
        }
    }
}

#[cfg(test)]
mod tests;
