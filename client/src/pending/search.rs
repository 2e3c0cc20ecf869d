//! Sends that the server cannot place (`sync first`): the log is read from what was known before the first try, and tells.

use im_proto::{ConversationId, Timestamp};
use tokio::time::Instant;

use super::{Lane, LaneId, LaneState, Outcome, Sends};
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
            let tried = lane.order.iter().filter_map(|number| self.pending.get(number)?.known_seq);
            let known_seq = tried.min().unwrap_or(0);
            return Some(SearchWanted { lane: lane_id, target: lane.target.clone(), from: known_seq + 1 });
        }
        None
    }

    /// The number of one of this client's sends, for [`Self::searched`].
    pub(crate) fn recognise(&self, entry: &Entry) -> Option<u64> {
        if entry.own { self.number_of(&entry.client_message_id) } else { None }
    }

    /// The log was read from where the search began up to `through`: what is in it is stored, the rest is not there, which is known
    /// from now on. With `done` the rest is sent again.
    pub(crate) fn searched(
        &mut self,
        lane_id: LaneId,
        conversation: ConversationId,
        found: &[(u64, u64, Timestamp)],
        through: u64,
        done: bool,
        now: Instant,
    ) -> Vec<Outcome> {
        let is_searching = |lane: &Lane| matches!(lane.state, LaneState::Searching);
        if !self.lanes.get(&lane_id).is_some_and(is_searching) {
            return Vec::new();
        }
        let is_in_lane = |sends: &Self, number| sends.pending.get(number).is_some_and(|send| send.lane == lane_id);
        let found = found.iter().filter(|(number, ..)| is_in_lane(self, number)).copied().collect::<Vec<_>>();
        let outcomes = found.into_iter().map(|(number, seq, sent_at)| self.stored(number, conversation, seq, sent_at));
        let outcomes = outcomes.collect();
        let Some(lane) = self.lanes.get_mut(&lane_id) else { return outcomes };
        for number in &lane.order {
            if let Some(send) = self.pending.get_mut(number) {
                send.known_seq = send.known_seq.map(|known_seq| known_seq.max(through));
            }
        }
        if done {
            lane.state = LaneState::Open;
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
