//! One conversation as its observers saw it: a slot of 32 bytes a seq, whatever the number of observers.

use std::collections::HashMap;

use im_proto::ConversationId;

use super::{
    hash::ByHash,
    verdict::{Verdict, Violation},
};

/// A seq this far beyond all others is a mistake, not a reason to allocate.
const SEQ_JUMP_MAX: u64 = 1 << 24;

/// Nobody's session: the entry was seen, and who sent it when is not known (yet).
pub(super) const NO_SESSION: u32 = u32::MAX;

/// Who saw an entry at a seq.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sources(u8);

impl Sources {
    pub(super) const ACKNOWLEDGED: Self = Self(1);
    pub(super) const DELIVERED: Self = Self(2);
    pub(super) const STORED: Self = Self(4);
    /// Written by the server, so nobody sent it.
    pub(super) const EVENT: Self = Self(8);
    const BODY_UNKNOWN: Self = Self(16);

    pub(super) fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    pub(super) fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    fn is_none(self) -> bool {
        self.0 == 0
    }
}

/// What an observer says of one seq.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    /// Hash of sender and client message id.
    pub(super) id: u64,
    /// Hash of the body, if the observer knows it.
    pub(super) body: Option<u64>,
    pub(super) sources: Sources,
    /// The session that first tried it, and its place among that session's sends to this conversation.
    pub(super) session: u32,
    pub(super) ordinal: u32,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slot {
    pub(super) id: u64,
    body: u64,
    pub(super) session: u32,
    ordinal: u32,
    pub(super) sources: Sources,
}

/// A send without an ack.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) body: u64,
    pub(super) session: u32,
    pub(super) ordinal: u32,
}

/// Sends without an ack, by the hash of sender and client message id.
pub(super) type PendingSends = HashMap<u64, Pending, ByHash>;

pub(super) struct Log {
    pub(super) id: ConversationId,
    /// Seqs up to this one are older than the run.
    pub(super) base: u64,
    /// The slot of `base + 1` comes first.
    slots: Vec<Slot>,
    /// The head that the final read of the history was told, if there was one.
    pub(super) head_read: Option<u64>,
}

impl Log {
    pub(super) fn new(id: ConversationId, base: u64) -> Self {
        Self { id, base, slots: Vec::new(), head_read: None }
    }

    /// Whether a seq is one of the run and can be; one that cannot be is a finding.
    pub(super) fn admits(&self, seq: u64, verdict: &mut Verdict) -> bool {
        let known = self.base + self.slots.len() as u64;
        let possible = seq > 0 && seq <= known.saturating_add(SEQ_JUMP_MAX);
        if !possible {
            verdict.found(Violation::ImpossibleSeq, self.id, seq, "0, or far beyond every other seq");
        }
        possible && seq > self.base
    }

    /// Takes an observation in; true if it was the first of its kind at this seq. The seq was admitted.
    pub(super) fn claim(&mut self, seq: u64, claim: Claim, verdict: &mut Verdict) -> bool {
        let index = usize::try_from(seq - self.base - 1).unwrap_or(usize::MAX);
        if index >= self.slots.len() {
            self.slots.resize(index + 1, Slot::default());
        }
        let slot = &mut self.slots[index];
        if slot.sources.is_none() {
            *slot = claim.into_slot();
            return true;
        }
        if slot.id != claim.id {
            let violation = if slot.sources.with(claim.sources).has(Sources::ACKNOWLEDGED) {
                Violation::AcknowledgedElsewhere
            } else {
                Violation::DifferentOrders
            };
            verdict.found(violation, self.id, seq, "two different entries were seen here");
            if claim.sources.has(Sources::STORED) {
                // The store has the last word for what follows; the acknowledged entry was counted above.
                let seen = slot.sources.without(Sources::ACKNOWLEDGED);
                *slot = claim.into_slot();
                slot.sources = slot.sources.with(seen);
            }
            return true;
        }
        slot.merge(claim, self.id, seq, verdict)
    }

    /// The slot of a seq, if anybody saw it.
    pub(super) fn slot(&self, seq: u64) -> Option<&Slot> {
        let index = usize::try_from(seq.checked_sub(self.base + 1)?).ok()?;
        self.slots.get(index).filter(|slot| !slot.sources.is_none())
    }

    /// Every seq that anybody saw, as claims.
    pub(super) fn claims(&self) -> impl Iterator<Item = (u64, Claim)> + '_ {
        self.seen().map(|(seq, slot)| (seq, slot.as_claim()))
    }

    fn seen(&self) -> impl Iterator<Item = (u64, &Slot)> {
        (self.base + 1..).zip(&self.slots).filter(|(_, slot)| !slot.sources.is_none())
    }

    /// The highest seq that anybody saw and that counts as committed.
    pub(super) fn head(&self) -> u64 {
        let known = self.base + self.slots.len() as u64;
        self.head_read.map_or(known, |head| head.min(known))
    }

    /// Judges everything that needs no view: stored as acknowledged, no hole, no id twice, order within sessions.
    pub(super) fn judge(&mut self, unacknowledged: &PendingSends, verdict: &mut Verdict) {
        self.match_unacknowledged(unacknowledged, verdict);
        self.judge_stored(verdict);
        self.judge_single(verdict);
        self.judge_session_order(verdict);
    }

    /// An entry without an ack must be one of the sends whose outcome nobody was told.
    fn match_unacknowledged(&mut self, unacknowledged: &PendingSends, verdict: &mut Verdict) {
        for (seq, slot) in (self.base + 1..).zip(&mut self.slots) {
            let sources = slot.sources;
            if sources.is_none() || sources.has(Sources::EVENT) || sources.has(Sources::ACKNOWLEDGED) {
                continue;
            }
            match unacknowledged.get(&slot.id) {
                Some(pending) => {
                    let claim = Claim {
                        id: slot.id,
                        body: Some(pending.body),
                        sources: Sources::default(),
                        session: pending.session,
                        ordinal: pending.ordinal,
                    };
                    slot.merge(claim, self.id, seq, verdict);
                }
                None => verdict.found(Violation::NobodySent, self.id, seq, "no client sent this entry"),
            }
        }
    }

    fn judge_stored(&self, verdict: &mut Verdict) {
        let Some(head) = self.head_read else { return };
        for (seq, slot) in (self.base + 1..).zip(&self.slots) {
            if slot.sources.has(Sources::STORED) {
                continue;
            }
            if slot.sources.has(Sources::ACKNOWLEDGED) {
                verdict.found(Violation::AcknowledgedNotStored, self.id, seq, "not in the history");
            } else if slot.sources.has(Sources::DELIVERED) {
                verdict.found(Violation::DeliveredNotStored, self.id, seq, "not in the history");
            }
            if seq <= head {
                verdict.found(Violation::Hole, self.id, seq, "the history has no entry here");
            }
        }
        let known = self.base + self.slots.len() as u64;
        if head > known {
            verdict.found_many(head - known, Violation::Hole, self.id, known + 1, "the history has no entry here");
        }
    }

    fn judge_single(&self, verdict: &mut Verdict) {
        let mut ids: Vec<(u64, u64)> =
            self.seen().filter(|(_, slot)| slot.id != 0).map(|(seq, slot)| (slot.id, seq)).collect();
        ids.sort_unstable();
        for pair in ids.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
            verdict.found(Violation::TwoSeqs, self.id, pair[1].1, &format!("the same message is at seq {}", pair[0].1));
        }
    }

    fn judge_session_order(&self, verdict: &mut Verdict) {
        let mut last_of: HashMap<u32, (u32, u64), ByHash> = HashMap::default();
        for (seq, slot) in self.seen().filter(|(_, slot)| slot.session != NO_SESSION) {
            let last = last_of.entry(slot.session).or_insert((slot.ordinal, seq));
            if slot.ordinal < last.0 {
                let detail = format!("sent before the message at seq {} of the same session", last.1);
                verdict.found(Violation::SessionOrder, self.id, seq, &detail);
            } else {
                *last = (slot.ordinal, seq);
            }
        }
    }
}

impl Claim {
    fn into_slot(self) -> Slot {
        let unknown = if self.body.is_none() { Sources::BODY_UNKNOWN } else { Sources::default() };
        Slot {
            id: self.id,
            body: self.body.unwrap_or(0),
            session: self.session,
            ordinal: self.ordinal,
            sources: self.sources.with(unknown),
        }
    }
}

impl Slot {
    fn as_claim(&self) -> Claim {
        let body = (!self.sources.has(Sources::BODY_UNKNOWN)).then_some(self.body);
        let sources = self.sources.without(Sources::BODY_UNKNOWN);
        Claim { id: self.id, body, sources, session: self.session, ordinal: self.ordinal }
    }

    /// Another observation of the same entry; true if it was the first of its kind.
    fn merge(&mut self, claim: Claim, conversation: ConversationId, seq: u64, verdict: &mut Verdict) -> bool {
        match claim.body {
            Some(body) if self.sources.has(Sources::BODY_UNKNOWN) => {
                self.body = body;
                self.sources = self.sources.without(Sources::BODY_UNKNOWN);
            }
            Some(body) if body != self.body => {
                verdict.found(Violation::Bytes, conversation, seq, "the bytes of the body differ");
            }
            _ => {}
        }
        if self.session == NO_SESSION {
            (self.session, self.ordinal) = (claim.session, claim.ordinal);
        }
        let first = !self.sources.has(claim.sources.without(Sources::EVENT));
        self.sources = self.sources.with(claim.sources);
        first
    }
}
