//! Reads of the history while the load runs: random ranges and the newest entries, of conversations that the participant is in.
//!
//! What a read must show, whatever happens to servers meanwhile: nothing below a head that anybody was told of before the read began
//! is missing, a range has no hole, and every entry is the one that all others saw at its seq.

use im_proto::{method::Method, v1};
use prost::Message as _;

use super::{Call, Participant, Participants, State};
use crate::{
    checker::{Entry, ReadRange},
    driver::Micros,
};

/// Entries of one read, at most.
const ENTRIES_MAX: u64 = 200;
/// One read of so many is of the newest entries.
const NEWEST_EVERY: u64 = 4;

/// When and what a participant reads.
#[derive(Debug)]
pub(super) struct Reading {
    /// Time between two reads.
    every: Micros,
    next: Micros,
    random: u64,
    /// One at a time.
    pub(super) under_way: bool,
}

impl Reading {
    pub(super) fn new(every: Micros, member: usize) -> Self {
        // Any numbers will do, as long as they are the same in each run.
        let random = (member as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self { every: every.max(1000), next: 0, random, under_way: false }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % bound.max(1)
    }

    /// A range of a conversation of which so much is known to exist.
    fn range(&mut self, known: u64) -> (ReadRange, u32) {
        let entries = 1 + self.below(ENTRIES_MAX);
        let newest = self.below(NEWEST_EVERY) == 0;
        let (from, to) = match (newest, 1 + self.below(known)) {
            (true, _) => (1, 0),
            (false, from) => (from, from + entries - 1),
        };
        (ReadRange { from, to, newest, known }, u32::try_from(entries).unwrap_or(u32::MAX))
    }
}

impl Participants {
    /// Begins a read if one is due.
    pub(super) fn read_history(&mut self, member: usize, out: &mut Vec<u8>, now: Micros) {
        let participant = &mut self.members[member];
        let Some(reading) = &mut participant.reading else { return };
        if !self.sending || participant.state != State::Live || reading.under_way {
            return;
        }
        if reading.next == 0 {
            // Not all at once.
            reading.next = now + reading.below(reading.every);
        }
        if now < reading.next {
            let at = reading.next;
            self.timers.insert((at, member));
            return;
        }
        reading.next = now + reading.every / 2 + reading.below(reading.every);
        self.timers.insert((reading.next, member));
        let lane = usize::try_from(reading.below(participant.lanes.len() as u64)).unwrap_or(0);
        let Some(id) = participant.lanes.get(lane).and_then(|lane| lane.conversation) else { return };
        // What any client of this thread was told of.
        let lanes = self.members.iter().flat_map(|member| &member.lanes);
        let known = lanes.filter(|lane| lane.conversation == Some(id)).map(|lane| lane.known).max().unwrap_or(0);
        let participant = &mut self.members[member];
        if let (Some(reading), true) = (&mut participant.reading, known > 0) {
            let (range, limit) = reading.range(known);
            reading.under_way = true;
            participant.call_read(out, lane, range, limit);
        }
    }

    /// The answer to a read.
    pub(super) fn history_read(&mut self, member: usize, lane: usize, range: ReadRange, answer: &[u8]) {
        let Ok(reply) = v1::HistoryReply::decode(answer) else { return self.error("malformed history reply") };
        let participant = &mut self.members[member];
        participant.reading.iter_mut().for_each(|reading| reading.under_way = false);
        let Some(id) = participant.lanes[lane].conversation else { return };
        let conversation = self.history.conversation(id);
        let entries = reply.entries.iter().filter_map(|entry| entry.message.as_ref()).map(Entry::from);
        self.statistics.reads += 1;
        self.history.read(conversation, range, reply.head, reply.first_seq, entries);
    }
}

impl Participant {
    fn call_read(&mut self, out: &mut Vec<u8>, lane: usize, range: ReadRange, limit: u32) {
        let Some(id) = self.lanes[lane].conversation else { return };
        let seq = |seq: u64| i64::try_from(seq).unwrap_or(i64::MAX);
        let request = v1::HistoryRequest {
            target: Some(v1::Target { target: Some(v1::target::Target::ConversationId(id.to_bytes())) }),
            from: seq(range.from),
            to: seq(range.to),
            limit,
            newest: range.newest,
        };
        self.call(out, Call::Read { lane, range }, Method::MessageHistory.number(), &request);
    }
}
