//! What the full-screen chat knows and does: inputs go in, effects and a view come out. No I/O, no clock, no terminal.
//!
//! Invariants:
//! - A conversation keeps its place in `conversations`, so that an answer finds it; what is gone is hidden.
//! - A call is asked for only while there is a session; what failed is asked for again after the next sync or a moment later.
//! - What is read is what a person can have seen: the open conversation, at its end, in a terminal that has the focus.
//! - Everything is bounded: entries on hand ([`LOGS_ENTRIES_MAX`]), unsent messages, one list, one page and one cursor in flight for
//!   a conversation.

mod commands;
mod events;
mod view;

use std::collections::HashMap;

use bytes::Bytes;
use im_proto::{ConversationId, Timestamp, UserId, v1};

use crate::{
    client::{Page, Sent},
    config::Target,
    error::CallError,
    event::Event,
};

use super::{
    conversation::Conversation,
    editor::Editor,
    keys::Command,
    log::{Item, Loading},
};

pub(super) use view::{Line, Role, Row, Span, View};

/// Entries of a page of history: a few screens.
const PAGE_ENTRIES: u32 = 100;
/// Entries on hand in all conversations; beyond it those that are not open are forgotten.
const LOGS_ENTRIES_MAX: usize = 50_000;
/// Milliseconds until what failed is tried again, and between two looks at the list.
const AGAIN_MS: i64 = 1_000;
/// Milliseconds that a notice stays.
const NOTICE_MS: i64 = 6_000;
/// Milliseconds after which the server is told again that somebody types.
const TYPING_AGAIN_MS: i64 = 3_000;
/// The smallest screen on which there is anything to see.
const SMALLEST: (u16, u16) = (24, 8);

/// What happens to the chat.
#[derive(Debug)]
pub(super) enum Input {
    /// Time goes on.
    Tick(Timestamp),
    Command(Command),
    Paste(String),
    /// Columns and lines.
    Size(u16, u16),
    Focus(bool),
    Event(Event),
    /// Who this is, and the own log.
    Identified(UserId, ConversationId),
    Listed(Result<Vec<v1::ConversationRow>, CallError>),
    Paged(usize, Result<Page, CallError>),
    Members(usize, Result<Vec<v1::GroupMember>, CallError>),
    /// The outcome of a send; why it failed, in words.
    Sent(usize, u64, Result<Sent, String>),
    Marked(usize, Result<v1::MarkReadReply, CallError>),
    /// How it is with whom the chat watches.
    Watched(Result<Vec<v1::UserPresence>, CallError>),
}

/// What the chat wants done. Indices come back with the answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    List,
    /// Entries up to a seq (0: the newest).
    Page {
        index: usize,
        target: Target,
        to: u64,
        limit: u32,
    },
    Members {
        index: usize,
        group: ConversationId,
    },
    Send {
        index: usize,
        local: u64,
        target: Target,
        body: Bytes,
    },
    MarkRead {
        index: usize,
        target: Target,
        seq: u64,
    },
    Typing {
        target: Target,
        active: bool,
    },
    /// Watch whether this user is there, and nobody else.
    Watch {
        peer: UserId,
    },
    /// Give the terminal to the shell for a while.
    Suspend,
    /// Draw everything anew.
    Redraw,
    Quit,
}

/// How the chat stands to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Link {
    Connecting { since: Timestamp },
    Online { endpoint: String },
    Away { since: Timestamp, reason: String },
    Closed { reason: String },
}

/// What keys do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Mode {
    Compose,
    /// An entry to answer is chosen.
    Select(u64),
    /// Somebody is named to talk to.
    Open(Editor),
    Help,
}

#[derive(Debug)]
pub(super) struct Chat {
    me: Option<(UserId, ConversationId)>,
    link: Link,
    /// Sessions that were lost.
    losses: u64,
    conversations: Vec<Conversation>,
    by_id: HashMap<ConversationId, usize>,
    by_peer: HashMap<UserId, usize>,
    open: Option<usize>,
    /// To be opened as soon as it is known what it is.
    wanted: Option<Target>,
    mode: Mode,
    notice: Option<(String, Timestamp)>,
    now: Timestamp,
    /// Seconds that the user's clock is ahead of UTC.
    utc_offset_seconds: i64,
    size: (u16, u16),
    focused: bool,
    list_due: Option<Timestamp>,
    list_in_flight: bool,
    listed: bool,
    next_local: u64,
    /// Seq from which on entries were new when the conversation was opened.
    new_from: Option<u64>,
    /// Who is watched, and in which conversation.
    watched: Option<(UserId, Option<ConversationId>)>,
    effects: Vec<Effect>,
}

impl Chat {
    pub(super) fn new(target: Option<Target>, now: Timestamp, utc_offset_seconds: i64, size: (u16, u16)) -> Self {
        let mut chat = Self {
            me: None,
            link: Link::Connecting { since: now },
            losses: 0,
            conversations: Vec::new(),
            by_id: HashMap::new(),
            by_peer: HashMap::new(),
            open: None,
            wanted: target,
            mode: Mode::Compose,
            notice: None,
            now,
            utc_offset_seconds,
            size,
            focused: true,
            list_due: None,
            list_in_flight: false,
            listed: false,
            next_local: 0,
            new_from: None,
            watched: None,
            effects: Vec::new(),
        };
        // An id is the same whoever this is: what is written there while there is no session waits for one.
        if matches!(chat.wanted, Some(Target::Conversation(_))) {
            chat.open_wanted();
        }
        chat
    }

    /// Who this is, as the server said it.
    fn identified(&mut self, user: UserId, own_log: ConversationId) {
        self.me = Some((user, own_log));
        let index = self.of_id(own_log);
        self.conversations[index].kind = v1::ConversationKind::Self_;
        self.open_wanted();
    }

    pub(super) fn is_identified(&self) -> bool {
        self.me.is_some()
    }

    /// Takes an input in and says what is to be done.
    pub(super) fn on(&mut self, input: Input) -> Vec<Effect> {
        match input {
            Input::Tick(now) => self.tick(now),
            Input::Command(command) => self.command(command),
            Input::Paste(text) => self.insert(&text),
            Input::Size(columns, lines) => self.size = (columns, lines),
            Input::Focus(focused) => self.focused = focused,
            Input::Event(event) => self.event(event),
            Input::Identified(user, own_log) => self.identified(user, own_log),
            Input::Listed(outcome) => self.on_list(outcome),
            Input::Paged(index, outcome) => self.on_page(index, outcome),
            Input::Members(index, outcome) => self.on_members(index, outcome),
            Input::Sent(index, local, outcome) => self.on_sent(index, local, outcome),
            Input::Marked(index, outcome) => self.on_marked(index, outcome),
            // Without it the title says less; the next conversation asks again.
            Input::Watched(outcome) => self.seen(outcome.unwrap_or_default()),
        }
        self.watch();
        self.load();
        self.see();
        std::mem::take(&mut self.effects)
    }

    fn tick(&mut self, now: Timestamp) {
        self.now = now;
        if self.notice.as_ref().is_some_and(|(_, until)| *until <= now) {
            self.notice = None;
        }
        for conversation in &mut self.conversations {
            conversation.expire_typing(now);
            if matches!(conversation.log.loading, Loading::Failed(again_at) if again_at <= now) {
                conversation.log.loading = Loading::No;
            }
        }
        if self.is_online() && !self.list_in_flight && self.list_due.is_some_and(|due| due <= now) {
            self.list_due = None;
            self.list_in_flight = true;
            self.effects.push(Effect::List);
        }
    }

    fn is_online(&self) -> bool {
        matches!(self.link, Link::Online { .. })
    }

    fn later(&self, millis: i64) -> Timestamp {
        Timestamp::from_millis(self.now.as_millis().saturating_add(millis))
    }

    /// Beside the list of a terminal of 80 columns there is room for 49 cells: what helps comes first, what may be long last.
    fn notify(&mut self, text: impl Into<String>) {
        self.notice = Some((text.into(), self.later(NOTICE_MS)));
    }

    /// The list is to be looked at, soon.
    fn want_list(&mut self) {
        let due = self.later(if self.listed { AGAIN_MS } else { 0 });
        self.list_due = Some(self.list_due.map_or(due, |already| already.min(due)));
    }

    /// The conversation with an id, made if it is new.
    fn of_id(&mut self, id: ConversationId) -> usize {
        *self.by_id.entry(id).or_insert_with(|| {
            self.conversations.push(Conversation { id: Some(id), ..Conversation::default() });
            self.conversations.len() - 1
        })
    }

    /// The direct conversation with a user, made if it is new.
    fn of_peer(&mut self, peer: UserId) -> usize {
        *self.by_peer.entry(peer.clone()).or_insert_with(|| {
            let kind = v1::ConversationKind::Direct;
            self.conversations.push(Conversation { peer: Some(peer), kind, ..Conversation::default() });
            self.conversations.len() - 1
        })
    }

    /// It became known that the direct conversation with a user has an id. The place that was opened first stays.
    fn join(&mut self, id: ConversationId, peer: &UserId) -> usize {
        match (self.by_id.get(&id).copied(), self.by_peer.get(peer).copied()) {
            (Some(of_id), Some(of_peer)) if of_id != of_peer => {
                let seen = std::mem::take(&mut self.conversations[of_id]);
                self.conversations[of_id].hidden = true;
                self.conversations[of_id].joined_into = Some(of_peer);
                self.conversations[of_peer].absorb(id, seen);
                if self.open == Some(of_id) {
                    self.open = Some(of_peer);
                }
                self.by_id.insert(id, of_peer);
                of_peer
            }
            (Some(index), _) => {
                self.conversations[index].peer = Some(peer.clone());
                self.conversations[index].kind = v1::ConversationKind::Direct;
                self.by_peer.insert(peer.clone(), index);
                index
            }
            (None, Some(index)) => {
                let conversation = &mut self.conversations[index];
                conversation.id = Some(id);
                // It could not be read before there was anything. Nothing came that would be missed: it was known by no id.
                conversation.log.start_over();
                self.by_id.insert(id, index);
                index
            }
            (None, None) => {
                let index = self.of_id(id);
                self.join(id, peer);
                index
            }
        }
    }

    /// Where the conversation is that had a place when something was asked.
    fn place_now(&self, mut index: usize) -> usize {
        // It ends: who joined another is found by no name any more, and nobody joins it.
        while let Some(into) = self.conversations[index].joined_into {
            index = into;
        }
        index
    }

    /// Opens what was named, if it is known what it is.
    fn open_wanted(&mut self) {
        let index = match (self.wanted.take(), &self.me) {
            (None, _) => return,
            (Some(Target::Conversation(id)), _) => self.of_id(id),
            (Some(Target::Me), Some((_, own_log))) => self.of_id(*own_log),
            (Some(Target::Peer(peer)), Some((me, own_log))) => {
                if peer == *me {
                    self.of_id(*own_log)
                } else {
                    self.of_peer(peer)
                }
            }
            (wanted, None) => {
                self.wanted = wanted;
                return;
            }
        };
        self.conversations[index].hidden = false;
        self.open(index);
    }

    fn open(&mut self, index: usize) {
        if self.open != Some(index) {
            self.stop_typing();
            self.mode = Mode::Compose;
        }
        self.open = Some(index);
        let conversation = &self.conversations[index];
        self.new_from = (conversation.unread > 0).then_some(conversation.read_seq + 1);
        let entries = |conversation: &Conversation| conversation.log.items().len();
        if self.conversations.iter().map(entries).sum::<usize>() > LOGS_ENTRIES_MAX {
            let others = self.conversations.iter_mut().enumerate().filter(|(other, _)| *other != index);
            others.for_each(|(_, conversation)| conversation.log.forget());
        }
    }

    /// Watches the other user of the open conversation. Whoever has just written to somebody for the first time may do so only now.
    fn watch(&mut self) {
        let Some(index) = self.open.filter(|_| self.is_online()) else { return };
        let Conversation { id, peer: Some(peer), .. } = &self.conversations[index] else { return };
        if self.watched.as_ref().is_none_or(|(watched, in_which)| watched != peer || in_which != id) {
            self.watched = Some((peer.clone(), *id));
            self.effects.push(Effect::Watch { peer: peer.clone() });
        }
    }

    /// Asks for what the view lacks: the members of a group, and the newest page or the one before what is on hand.
    fn load(&mut self) {
        let Some(index) = self.open.filter(|_| self.is_online()) else { return };
        let conversation = &mut self.conversations[index];
        if let Some(group) = conversation.id.filter(|_| conversation.is_group() && !conversation.members_asked) {
            conversation.members_asked = true;
            self.effects.push(Effect::Members { index, group });
        }
        let log = &self.conversations[index].log;
        if log.loading != Loading::No || log.unreadable.is_some() {
            return;
        }
        let to = match log.older() {
            _ if !log.opened => 0,
            Some(older) if self.is_near_top() => older,
            _ => return,
        };
        let conversation = &mut self.conversations[index];
        let Some(target) = conversation.target() else { return };
        conversation.log.loading = Loading::InFlight;
        self.effects.push(Effect::Page { index, target, to, limit: PAGE_ENTRIES });
    }

    /// Moves the read cursor to the end if a person can have seen it.
    fn see(&mut self) {
        let Some(index) = self.open.filter(|_| self.focused && self.is_online() && self.mode != Mode::Help) else {
            return;
        };
        let conversation = &mut self.conversations[index];
        let seq = conversation.log.last_seq();
        if conversation.marking
            || conversation.mark_after > self.now
            || conversation.log.anchor.is_some()
            || seq <= conversation.read_seq
        {
            return;
        }
        let Some(target) = conversation.target() else { return };
        conversation.marking = true;
        (conversation.unread, conversation.mentions) = (0, 0);
        self.effects.push(Effect::MarkRead { index, target, seq });
    }

    fn item(&self, entry: &crate::event::Entry) -> Item {
        Item::new(entry, self.me.as_ref().map(|(me, _)| me))
    }
}

#[cfg(test)]
mod tests;
