//! What is kept of one conversation.

use std::collections::BTreeMap;

use tokio::time::Instant;

use crate::event::Entry;

#[derive(Default)]
pub(super) struct Conversation {
    /// The highest seq known to exist.
    pub(super) head: u64,
    pub(super) follow: Option<Follow>,
    /// What names the user as being in it: an entry of the own log by its seq, a row of a sync by 0.
    pub(super) joined_by: Option<u64>,
    /// A sync was complete before the user was known to be in it. What was pushed until then is all that is known of its head, and
    /// more may have been lost than the sync told.
    pub(super) is_unlisted: bool,
}

pub(super) struct Follow {
    /// `None` until it is known where to begin.
    pub(super) have: Option<u64>,
    /// Entries beyond a gap.
    pub(super) ahead: BTreeMap<u64, Entry>,
    /// Whether the application gets the entries. The user's own log is followed for the list's sake even if it does not.
    pub(super) deliver: bool,
    pub(super) fetch: Fetch,
    /// There may be more than the known head: history has to be asked once.
    pub(super) is_unsure: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fetch {
    Idle,
    /// `checks`: it also tells whether there is more than the known head.
    InFlight {
        checks: bool,
    },
    Waiting(Instant),
    /// The server refuses; tried again after the next sync or join.
    Refused,
}

impl Follow {
    pub(super) fn new(have: Option<u64>, deliver: bool) -> Self {
        Self { have, ahead: BTreeMap::new(), deliver, fetch: Fetch::Idle, is_unsure: false }
    }

    /// History is asked for.
    pub(super) fn asks(&mut self) {
        self.fetch = Fetch::InFlight { checks: std::mem::take(&mut self.is_unsure) };
    }

    /// It will not be answered.
    pub(super) fn asks_again(&mut self) {
        if let Fetch::InFlight { checks } = self.fetch {
            self.fetch = Fetch::Idle;
            self.is_unsure |= checks;
        }
    }

    /// Whether history has to be asked, and can be.
    pub(super) fn is_behind(&self, head: u64) -> bool {
        self.fetch == Fetch::Idle && self.have.is_some_and(|have| have < head || self.is_unsure)
    }
}

impl Conversation {
    /// The user is in it, says an entry of the own log or, if that is 0, a row of a sync that also told the head.
    pub(super) fn is_joined(&mut self, by: u64) {
        let was_unlisted = std::mem::take(&mut self.is_unlisted) && by > 0;
        if self.joined_by.replace(by).is_none() && was_unlisted {
            self.doubt_head();
        }
    }

    /// A sync is complete that told the heads of all in which the user was at that seq of the own log.
    pub(super) fn is_synced(&mut self, version: u64) {
        match self.joined_by {
            Some(by) if by <= version => {}
            // Told of while the sync was under way, which does not have it.
            Some(_) => self.doubt_head(),
            None => self.is_unlisted = true,
        }
    }

    fn doubt_head(&mut self) {
        if let Some(follow) = &mut self.follow {
            follow.is_unsure = true;
        }
    }
}
