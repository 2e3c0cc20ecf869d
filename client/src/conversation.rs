//! What is known of each conversation: the highest seq that exists and, if it is followed, how far the application has it.
//!
//! Invariants:
//! - `have` is the highest seq up to which the application got every entry from where it began to follow; it moves by one entry,
//!   in order, and only when the entry was taken by the event queue.
//! - A followed conversation with `have < head` is `behind` until a fetch or the entries kept ahead have closed the gap.
//! - So is one whose join came after a sync that did not have it, until history was asked: a push between what was received and the
//!   sync may be lost, and nothing else tells of it.
//!
//! It does no I/O: the caller fetches what [`Conversations::next_fetch`] names. Entries beyond a gap are kept only up to a bound;
//! what is dropped is fetched.

mod follow;
mod page;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use im_proto::{ConversationId, StatusCode, UserId};
use tokio::time::Instant;

use self::follow::{Conversation, Fetch, Follow};
pub(crate) use self::page::HistoryPage;
use crate::{
    config::{FollowAll, Target},
    error::Status,
    event::{Entry, Event, EventSink},
};

/// Entries kept beyond a gap, per conversation and in all. More would only help a client that is far behind, which reads history.
const AHEAD_MAX: usize = 256;
const AHEAD_TOTAL_MAX: usize = 4096;
/// Conversations whose history is fetched at once. Leaves most of the 16 calls of a connection to the application.
const FETCHES_MAX: usize = 4;
/// Waiting time after a fetch that failed or brought nothing.
const FETCH_RETRY: Duration = Duration::from_millis(500);

/// History that is missing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct FetchWanted {
    pub(crate) conversation: ConversationId,
    pub(crate) from: u64,
}

pub(crate) struct Conversations {
    known: BTreeMap<ConversationId, Conversation>,
    peers: BTreeMap<UserId, ConversationId>,
    /// Direct conversations to follow from that seq as soon as they exist.
    awaited: BTreeMap<UserId, u64>,
    follow_all: FollowAll,
    synced_once: bool,
    behind: BTreeSet<ConversationId>,
    waiting: BTreeSet<(Instant, ConversationId)>,
    /// Where the last fetch was, so that the next is of another conversation.
    last_fetched: Option<ConversationId>,
    fetching: usize,
    ahead_total: usize,
    own_log: Option<ConversationId>,
    /// Entries of the user's own log that passed, for the conversation list.
    own_log_passed: VecDeque<Entry>,
}

impl Conversations {
    pub(crate) fn new(follow_all: FollowAll) -> Self {
        Self {
            known: BTreeMap::new(),
            peers: BTreeMap::new(),
            awaited: BTreeMap::new(),
            follow_all,
            synced_once: false,
            behind: BTreeSet::new(),
            waiting: BTreeSet::new(),
            last_fetched: None,
            fetching: 0,
            ahead_total: 0,
            own_log: None,
            own_log_passed: VecDeque::new(),
        }
    }

    /// The user's own log, from `Welcome`.
    pub(crate) fn set_own_log(&mut self, id: ConversationId, head: u64) {
        self.own_log = Some(id);
        let deliver = self.follow_all != FollowAll::No;
        let conversation = self.known.entry(id).or_default();
        conversation.head = conversation.head.max(head);
        conversation.follow.get_or_insert_with(|| Follow::new(None, deliver));
    }

    pub(crate) fn own_log(&self) -> Option<ConversationId> {
        self.own_log
    }

    /// The address by which one conversation has one name, as far as is known.
    pub(crate) fn canonical(&self, target: Target) -> Target {
        let id = match &target {
            Target::Me => self.own_log,
            Target::Peer(user) => self.peers.get(user).copied(),
            Target::Conversation(_) => None,
        };
        id.map_or(target, Target::Conversation)
    }

    /// The highest seq known to exist; 0 if the conversation is not known.
    pub(crate) fn head(&self, target: &Target) -> u64 {
        match target {
            Target::Conversation(id) => self.known.get(id).map_or(0, |conversation| conversation.head),
            Target::Me | Target::Peer(_) => 0,
        }
    }

    /// For a sync: every conversation with what needs no telling. For one that is not followed that is its head.
    pub(crate) fn have(&self) -> impl Iterator<Item = (ConversationId, u64)> {
        self.known.iter().map(|(id, conversation)| {
            let have = conversation.follow.as_ref().map_or(Some(conversation.head), |follow| follow.have);
            (*id, have.unwrap_or(0))
        })
    }

    /// The conversation with a user is this one.
    pub(crate) fn learn_peer(&mut self, user: &UserId, id: ConversationId) {
        self.peers.insert(user.clone(), id);
        if let Some(from) = self.awaited.remove(user) {
            self.follow(id, from.saturating_sub(1), 0);
        }
    }

    /// Follows a conversation of which the application has everything up to `have`.
    pub(crate) fn follow(&mut self, id: ConversationId, have: u64, head: u64) {
        let own_log = self.own_log == Some(id);
        let conversation = self.known.entry(id).or_default();
        conversation.head = conversation.head.max(head);
        match &mut conversation.follow {
            // Followed already: the position is the application's, or about to be known.
            Some(follow) if follow.deliver || !own_log => {}
            slot => {
                let replaced = slot.replace(Follow::new(Some(have), true));
                self.ahead_total -= replaced.map_or(0, |follow| follow.ahead.len());
            }
        }
        self.judge(id);
    }

    /// Follows the conversation with a user who was never written to, from its seq `from` on, once it exists.
    pub(crate) fn follow_peer_later(&mut self, user: UserId, from: u64) {
        match self.peers.get(&user).copied() {
            Some(id) => self.follow(id, from.saturating_sub(1), 0),
            None => {
                self.awaited.insert(user, from);
            }
        }
    }

    pub(crate) fn unfollow(&mut self, id: ConversationId) {
        if self.own_log == Some(id) {
            if let Some(follow) = self.known.get_mut(&id).and_then(|conversation| conversation.follow.as_mut()) {
                follow.deliver = false;
            }
        } else if let Some(follow) = self.known.get_mut(&id).and_then(|conversation| conversation.follow.take()) {
            self.ahead_total -= follow.ahead.len();
        }
        self.judge(id);
    }

    /// The conversation exists, the user came in at `joined_seq`, says the entry `own_seq` of the own log.
    pub(crate) fn joined(&mut self, id: ConversationId, joined_seq: u64, own_seq: u64) {
        let start = self.start(0, joined_seq);
        let conversation = self.known.entry(id).or_default();
        conversation.head = conversation.head.max(joined_seq);
        self.begin(id, start, own_seq);
    }

    /// A row of a sync.
    pub(crate) fn row(&mut self, id: ConversationId, head: u64, joined_seq: u64) {
        let start = self.start(head, joined_seq);
        let conversation = self.known.entry(id).or_default();
        conversation.head = conversation.head.max(head);
        self.begin(id, start, 0);
    }

    /// The user left; what came before may still be read. Followed again after the next join.
    pub(crate) fn left(&mut self, id: ConversationId, head: u64) {
        let conversation = self.known.entry(id).or_default();
        conversation.head = conversation.head.max(head);
        conversation.joined_by = None;
        self.judge(id);
    }

    /// Where a conversation begins to be followed without being asked for.
    fn start(&self, head: u64, joined_seq: u64) -> Option<u64> {
        match self.follow_all {
            FollowAll::No => None,
            FollowAll::FromNow if !self.synced_once => Some(head),
            FollowAll::FromNow | FollowAll::FromStart => Some(joined_seq.saturating_sub(1)),
        }
    }

    fn begin(&mut self, id: ConversationId, start: Option<u64>, by: u64) {
        let own_log = self.own_log == Some(id);
        let Some(conversation) = self.known.get_mut(&id) else { return };
        if start.is_some() && conversation.follow.is_none() {
            conversation.follow = Some(Follow::new(None, true));
        }
        conversation.is_joined(by);
        if let Some(follow) = &mut conversation.follow {
            if follow.fetch == Fetch::Refused {
                follow.fetch = Fetch::Idle;
            }
            // The own log begins where the sync ends.
            if follow.have.is_none() && !own_log {
                follow.have = start;
            }
        }
        self.judge(id);
    }

    /// A sync is complete: the conversation list is that of `version`, a seq of the user's own log.
    pub(crate) fn synced(&mut self, version: u64) {
        let start = match self.follow_all {
            FollowAll::FromStart if !self.synced_once => 0,
            _ => version,
        };
        self.synced_once = true;
        let Some(id) = self.own_log else { return };
        let others: Vec<ConversationId> = self.known.keys().copied().filter(|other| *other != id).collect();
        for other in others {
            if let Some(conversation) = self.known.get_mut(&other) {
                conversation.is_synced(version);
            }
            self.judge(other);
        }
        let Some(conversation) = self.known.get_mut(&id) else { return };
        conversation.head = conversation.head.max(version);
        if let Some(follow) = &mut conversation.follow {
            match (follow.have, follow.deliver) {
                (None, _) => follow.have = Some(start),
                // Only the list wants it, and the list has it.
                (Some(have), false) => follow.have = Some(have.max(version)),
                (Some(_), true) => {}
            }
        }
        self.judge(id);
    }

    /// The next entry of the user's own log that passed.
    pub(crate) fn next_own_log_entry(&mut self) -> Option<Entry> {
        self.own_log_passed.pop_front()
    }

    /// An entry that the server pushed, or one's own that was acknowledged.
    pub(crate) fn arrived(&mut self, entry: Entry, events: &mut EventSink) {
        let id = entry.conversation;
        let follow_all = self.follow_all != FollowAll::No;
        let conversation = self.known.entry(id).or_default();
        conversation.head = conversation.head.max(entry.seq);
        if follow_all {
            conversation.follow.get_or_insert_with(|| Follow::new(None, true));
        }
        let Some(follow) = &mut conversation.follow else { return };
        if follow.have.is_some_and(|have| entry.seq <= have) {
            return;
        }
        let in_order = follow.have.is_some_and(|have| entry.seq == have + 1);
        if in_order && follow.ahead.is_empty() && self.own_log != Some(id) {
            // The usual case, without a detour.
            let seq = entry.seq;
            if events.deliver(Event::Message(entry)).is_none() {
                follow.have = Some(seq);
            }
            return self.judge(id);
        }
        let room = follow.ahead.len() < AHEAD_MAX && self.ahead_total < AHEAD_TOTAL_MAX;
        if (in_order || room) && follow.ahead.insert(entry.seq, entry).is_none() {
            self.ahead_total += 1;
        }
        self.drain_ahead(id, events);
        self.judge(id);
    }

    /// Gives the application what is next and here. Stops when the event queue is full.
    fn drain_ahead(&mut self, id: ConversationId, events: &mut EventSink) {
        let own_log = self.own_log == Some(id);
        let Some(follow) = self.known.get_mut(&id).and_then(|conversation| conversation.follow.as_mut()) else {
            return;
        };
        let Some(mut have) = follow.have else { return };
        while let Some(next) = follow.ahead.first_entry() {
            if *next.key() > have + 1 {
                break;
            }
            let (seq, entry) = next.remove_entry();
            self.ahead_total -= 1;
            if seq <= have {
                continue;
            }
            let passed = own_log.then(|| entry.clone());
            if follow.deliver
                && let Some(Event::Message(entry)) = events.deliver(Event::Message(entry))
            {
                follow.ahead.insert(seq, entry);
                self.ahead_total += 1;
                break;
            }
            self.own_log_passed.extend(passed);
            have = seq;
        }
        follow.have = Some(have);
    }

    /// Notes whether a conversation is behind.
    fn judge(&mut self, id: ConversationId) {
        let is_behind = self.known.get(&id).is_some_and(|conversation| {
            conversation.follow.as_ref().is_some_and(|follow| follow.is_behind(conversation.head))
        });
        if is_behind {
            self.behind.insert(id);
        } else if !self.behind.is_empty() {
            self.behind.remove(&id);
        }
    }

    /// Whether something is behind and could be fetched.
    pub(crate) fn is_behind(&self) -> bool {
        !self.behind.is_empty()
    }

    /// The next history to fetch. Gives to the application first what is here already.
    pub(crate) fn next_fetch(&mut self, events: &mut EventSink) -> Option<FetchWanted> {
        while self.fetching < FETCHES_MAX && events.is_roomy() {
            let after = self.last_fetched.and_then(|last| {
                self.behind.range((std::ops::Bound::Excluded(last), std::ops::Bound::Unbounded)).next().copied()
            });
            let id = after.or_else(|| self.behind.first().copied())?;
            self.last_fetched = Some(id);
            self.drain_ahead(id, events);
            self.judge(id);
            if !self.behind.contains(&id) || events.room() == 0 {
                continue;
            }
            let follow = self.known.get_mut(&id).and_then(|conversation| conversation.follow.as_mut())?;
            follow.asks();
            self.fetching += 1;
            let from = follow.have.unwrap_or(0) + 1;
            self.judge(id);
            return Some(FetchWanted { conversation: id, from });
        }
        None
    }

    /// The answer to a fetch: entries in ascending order, without a hole from the first on.
    pub(crate) fn fetched(&mut self, id: ConversationId, page: HistoryPage, events: &mut EventSink, now: Instant) {
        self.fetching = self.fetching.saturating_sub(1);
        let Some(conversation) = self.known.get_mut(&id) else { return };
        conversation.head = conversation.head.max(page.head);
        let Some(follow) = &mut conversation.follow else { return };
        follow.fetch = Fetch::Idle;
        let Some(before) = follow.have else { return };
        let mut have = before;
        if page.first_seq > have + 1 && events.room() > 0 {
            let through = page.first_seq - 1;
            if !follow.deliver || events.deliver(Event::Gone { conversation: id, through }).is_none() {
                have = through;
            }
        }
        let own_log = self.own_log == Some(id);
        let mut full = false;
        for entry in page.entries {
            if entry.seq <= have {
                continue;
            }
            let passed = own_log.then(|| entry.clone());
            let seq = entry.seq;
            if seq != have + 1 {
                break;
            }
            full = follow.deliver && events.deliver(Event::Message(entry)).is_some();
            if full {
                break;
            }
            self.own_log_passed.extend(passed);
            have = seq;
        }
        follow.have = Some(have);
        if have == before && !full && have < conversation.head {
            self.wait(id, now);
        }
        self.drain_ahead(id, events);
        self.judge(id);
    }

    fn wait(&mut self, id: ConversationId, now: Instant) {
        let Some(follow) = self.known.get_mut(&id).and_then(|conversation| conversation.follow.as_mut()) else {
            return;
        };
        let until = now + FETCH_RETRY;
        follow.asks_again();
        follow.fetch = Fetch::Waiting(until);
        self.waiting.insert((until, id));
    }

    /// A fetch was refused.
    pub(crate) fn fetch_failed(&mut self, id: ConversationId, status: Status, events: &mut EventSink, now: Instant) {
        self.fetching = self.fetching.saturating_sub(1);
        let Some(follow) = self.known.get_mut(&id).and_then(|conversation| conversation.follow.as_mut()) else {
            return;
        };
        let definite = matches!(
            status.code,
            Some(StatusCode::NotFound | StatusCode::NotAMember | StatusCode::Forbidden | StatusCode::Malformed)
        );
        if definite {
            follow.fetch = Fetch::Refused;
            if follow.deliver {
                events.notice(Event::Unreadable { conversation: id, status });
            }
        } else {
            self.wait(id, now);
        }
        self.judge(id);
    }

    /// Makes fetches possible again whose waiting time is over.
    pub(crate) fn wake(&mut self, now: Instant) {
        while let Some((until, id)) = self.waiting.first().copied().filter(|(until, _)| *until <= now) {
            self.waiting.pop_first();
            if let Some(follow) = self.known.get_mut(&id).and_then(|conversation| conversation.follow.as_mut())
                && follow.fetch == Fetch::Waiting(until)
            {
                follow.fetch = Fetch::Idle;
                self.judge(id);
            }
        }
    }

    /// When [`Self::wake`] has something to do.
    pub(crate) fn next_wake(&self) -> Option<Instant> {
        self.waiting.first().map(|(until, _)| *until)
    }

    /// The session ended: its fetches will not be answered.
    pub(crate) fn disconnected(&mut self) {
        self.fetching = 0;
        let ids: Vec<ConversationId> = self.known.keys().copied().collect();
        for id in ids {
            if let Some(follow) = self.known.get_mut(&id).and_then(|conversation| conversation.follow.as_mut()) {
                follow.asks_again();
            }
            self.judge(id);
        }
    }
}
