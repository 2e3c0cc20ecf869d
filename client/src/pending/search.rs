//! Sends that the server cannot place (`sync first`): the log is read from what was known before the first try, and tells.

use std::collections::BTreeMap;

use im_proto::{ConversationId, Timestamp};
use tokio::time::Instant;

use super::{LaneId, LaneState, Outcome, Sends};
use crate::{
    config::Target,
    error::{SendError, Status},
    event::Entry,
};

/// A lane that wants the log searched for its sends.
pub(crate) struct SearchWanted {
    pub(crate) lane: LaneId,
    pub(crate) target: Target,
    pub(crate) from: u64,
}

impl Sends {
    /// The next lane that wants the log searched.
    pub(crate) fn next_search(&mut self) -> Option<SearchWanted> {
        while let Some(lane_id) = self.searches.pop_front() {
            let Some(lane) = self.lanes.get(&lane_id) else { continue };
            let oldest = lane.order.front().and_then(|number| self.pending.get(number));
            let known_seq = oldest.and_then(|send| send.known_seq).unwrap_or(0);
            return Some(SearchWanted { lane: lane_id, target: lane.target.clone(), from: known_seq + 1 });
        }
        None
    }

    /// The number of one of this client's sends, for [`Self::searched`].
    pub(crate) fn recognise(&self, entry: &Entry) -> Option<u64> {
        if entry.own { self.number_of(&entry.client_message_id) } else { None }
    }

    /// The log was read up to `head`: what is in it is stored, the rest is sent again.
    pub(crate) fn searched(
        &mut self,
        lane_id: LaneId,
        conversation: ConversationId,
        found: &BTreeMap<u64, (u64, Timestamp)>,
        head: u64,
        now: Instant,
    ) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        let Some(lane) = self.lanes.get_mut(&lane_id) else { return outcomes };
        if !matches!(lane.state, LaneState::Searching) {
            return outcomes;
        }
        lane.state = LaneState::Open;
        for number in lane.order.clone() {
            if let Some((seq, sent_at)) = found.get(&number) {
                outcomes.push(self.stored(number, conversation, *seq, *sent_at));
            } else if let Some(send) = self.pending.get_mut(&number) {
                send.known_seq = send.known_seq.map(|known_seq| known_seq.max(head));
            }
        }
        self.settle(lane_id, now);
        outcomes
    }

    /// The log could not be read: the send is tried again later, or refused if the server does not let this user read.
    pub(crate) fn search_failed(&mut self, lane_id: LaneId, status: Status, now: Instant) {
        let Some(lane) = self.lanes.get_mut(&lane_id) else { return };
        if !matches!(lane.state, LaneState::Searching) {
            return;
        }
        if status.is_transient() {
            self.retry(lane_id, &status);
        } else {
            lane.state = LaneState::Open;
            let oldest = lane.order.front().copied();
            if let Some((_, send)) = oldest.and_then(|number| self.take(number)) {
                send.answer.give(Err(SendError::Refused(status)));
            }
        }
        self.settle(lane_id, now);
    }
}
