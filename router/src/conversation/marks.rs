//! How far the members of an open conversation have come beside their read cursors, who was not told yet, and what each may signal.
//!
//! Received cursors live in memory and are written behind: what a crash loses of them comes back with the next receipt. Read cursors
//! are in `Conversation::cursors`; a call that moves one is answered after its row is stored.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use im_proto::{UserId, limits};
use tokio::time::Instant;

/// Cursors that move within this are told and written at once.
pub const GATHER: Duration = Duration::from_millis(500);
/// Signals that a conversation passes on in a second, from all its members together: with a thousand who type at once each needs to be
/// seen typing by nobody.
const SIGNALS_OF_ALL_MAX: u32 = 64;
/// Read cursors of one conversation that are being written: as many as wait where a large group reads on at once and the store takes 100
/// ms. Beyond it `MarkRead` is overloaded.
const READS_WRITING_MAX: usize = 1024;
const SECOND: Duration = Duration::from_secs(1);

/// Read beside the log, and gone with the conversation.
#[derive(Debug, Default)]
pub struct Marks {
    /// Received cursors of users whose stored cursors are in memory.
    received: BTreeMap<UserId, u64>,
    /// Received cursors to be written.
    unwritten: BTreeSet<UserId>,
    /// A write of received cursors is under way: the next one waits for it.
    writing: bool,
    /// Writes of read cursors that are under way.
    reads_writing: usize,
    /// Whose cursors have moved since the others were told.
    untold: BTreeSet<UserId>,
    told: Option<Instant>,
    rates: Rates,
}

/// Signals of the present second.
#[derive(Debug, Default)]
struct Rates {
    second: Option<Instant>,
    all: u32,
    of_user: BTreeMap<UserId, u32>,
}

impl Marks {
    /// Whether the stored cursors of a user are in memory.
    pub fn is_loaded(&self, user: &UserId) -> bool {
        self.received.contains_key(user)
    }

    /// The stored received cursor of a user.
    pub fn load(&mut self, user: &UserId, received: u64) {
        let known = self.received.entry(user.clone()).or_default();
        *known = received.max(*known);
    }

    /// What is known of a user's received cursor.
    pub fn received(&self, user: &UserId) -> u64 {
        self.received.get(user).copied().unwrap_or(0)
    }

    /// Moves a received cursor forward; `false` if it stands there or further already.
    pub fn receive(&mut self, user: &UserId, seq: u64) -> bool {
        let known = self.received.entry(user.clone()).or_default();
        if *known >= seq {
            return false;
        }
        *known = seq;
        self.unwritten.insert(user.clone());
        self.untold.insert(user.clone());
        true
    }

    /// A user's cursor has moved.
    pub fn moved(&mut self, user: &UserId) {
        self.untold.insert(user.clone());
    }

    /// When the others are to be told, if there is anything to tell.
    pub fn due_at(&self, now: Instant) -> Option<Instant> {
        (!self.untold.is_empty()).then(|| self.told.map_or(now, |told| (told + GATHER).max(now)))
    }

    /// Nothing waits to be told or written.
    pub fn is_settled(&self) -> bool {
        self.untold.is_empty() && self.unwritten.is_empty() && !self.writing && self.reads_writing == 0
    }

    /// Whose cursors have moved.
    pub fn take_untold(&mut self, now: Instant) -> BTreeSet<UserId> {
        self.told = Some(now);
        std::mem::take(&mut self.untold)
    }

    /// Whose received cursors are to be written now; nobody's while a write is under way.
    pub fn begin_writing(&mut self) -> BTreeSet<UserId> {
        if self.writing {
            return BTreeSet::new();
        }
        self.writing = !self.unwritten.is_empty();
        std::mem::take(&mut self.unwritten)
    }

    /// What was under way is stored.
    pub fn written(&mut self) {
        self.writing = false;
    }

    /// Begins a write of a read cursor; `false` if there are too many.
    pub fn begin_read(&mut self) -> bool {
        let has_room = self.reads_writing < READS_WRITING_MAX;
        self.reads_writing += usize::from(has_room);
        has_room
    }

    /// A read cursor is stored.
    pub fn read_written(&mut self) {
        self.reads_writing -= 1;
    }

    /// Whether a user may send a signal now; takes it from the rates if so.
    pub fn may_signal(&mut self, user: &UserId, now: Instant) -> bool {
        let rates = &mut self.rates;
        if rates.second.is_none_or(|second| now >= second + SECOND) {
            *rates = Rates { second: Some(now), ..Rates::default() };
        }
        // No more users than signals are remembered.
        if rates.all >= SIGNALS_OF_ALL_MAX {
            return false;
        }
        let of_user = rates.of_user.entry(user.clone()).or_default();
        if *of_user >= limits::SIGNALS_PER_SECOND_MAX {
            return false;
        }
        *of_user += 1;
        rates.all += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_user_signals_so_often_a_second_and_all_together_so_often() {
        let user = |number: u32| UserId::parse(&format!("user-{number}")).unwrap();
        let mut marks = Marks::default();
        let now = Instant::now();
        let passed = (0..100).filter(|_| marks.may_signal(&user(0), now)).count();
        assert_eq!(passed, limits::SIGNALS_PER_SECOND_MAX as usize);
        let passed = (1..1000).filter(|number| marks.may_signal(&user(*number), now)).count();
        assert_eq!(passed, (SIGNALS_OF_ALL_MAX - limits::SIGNALS_PER_SECOND_MAX) as usize);
        assert!(marks.rates.of_user.len() <= SIGNALS_OF_ALL_MAX as usize);
        assert!(marks.may_signal(&user(0), now + SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn cursors_move_forward_only_and_are_told_once_in_a_while() {
        let (user, mut marks, now) = (UserId::parse("alice").unwrap(), Marks::default(), Instant::now());
        assert_eq!(marks.due_at(now), None);
        assert!(marks.receive(&user, 5) && !marks.receive(&user, 5) && !marks.receive(&user, 4));
        assert_eq!((marks.received(&user), marks.due_at(now)), (5, Some(now)));
        assert_eq!(marks.take_untold(now).len(), 1);
        assert!(marks.receive(&user, 6));
        assert_eq!(marks.due_at(now), Some(now + GATHER));
        assert!(!marks.is_settled());
    }

    #[tokio::test(start_paused = true)]
    async fn received_cursors_are_written_one_write_at_a_time() {
        let (alice, bob) = (UserId::parse("alice").unwrap(), UserId::parse("bob").unwrap());
        let mut marks = Marks::default();
        assert!(marks.begin_writing().is_empty() && marks.is_settled());
        marks.receive(&alice, 5);
        assert_eq!(marks.begin_writing().len(), 1);
        marks.take_untold(Instant::now());
        assert!(!marks.is_settled(), "it may yet fail");
        marks.receive(&alice, 6);
        marks.receive(&bob, 6);
        assert!(marks.begin_writing().is_empty());
        marks.written();
        assert_eq!(marks.begin_writing().len(), 2);
        marks.take_untold(Instant::now());
        marks.written();
        assert!(marks.is_settled());
    }
}
