//! What a participant writes: calls that are due, repeats, and new messages as the window or the schedule allows.

use im_proto::{limits, method::Method, v1};

use super::{
    Call, GAP_PATIENCE, PENDING_MAX, Participant, Participants, State,
    flow::MessageId,
    lane::{Lane, Pending},
};
use crate::{
    driver::Micros,
    wire::{self, Send},
};

/// One write of a connection; more is filled in after it is out.
const WRITE_BYTES: usize = 64 * 1024;

impl Participants {
    /// Appends everything that a participant has to say now.
    pub(super) fn write(&mut self, member: usize, out: &mut Vec<u8>, now: Micros) {
        let participant = &mut self.members[member];
        out.append(&mut participant.control);
        if matches!(participant.state, State::Offline | State::Greeting) {
            return;
        }
        participant.write_calls(out, now);
        if participant.state != State::Live {
            return;
        }
        for lane in 0..self.members[member].lanes.len() {
            self.write_sends(member, lane, out, now);
        }
        self.read_history(member, out, now);
    }

    /// Repeats first, then new messages.
    fn write_sends(&mut self, member: usize, lane: usize, out: &mut Vec<u8>, now: Micros) {
        let participant = &mut self.members[member];
        // The limit is one of the session: whoever is beyond it is refused again and again.
        let elsewhere = participant.pending_besides(lane);
        let lane = &mut participant.lanes[lane];
        let Some(sending) = &mut lane.sending else { return };
        if sending.paused_until > now {
            let at = sending.paused_until;
            self.timers.insert((at, member));
            return;
        }
        if sending.waits_for_sync() {
            return;
        }
        let flow = &self.flows[usize::try_from(sending.flow).unwrap_or(0)];
        while out.len() < WRITE_BYTES {
            if sending.unsent == sending.pending.len() {
                let due = match &mut sending.due {
                    _ if sending.pending.len() + elsewhere >= PENDING_MAX => None,
                    Some(due) => due.pop_front(),
                    None => (self.sending && flow.in_flight() < sending.window).then_some(now),
                };
                let Some(scheduled) = due else { break };
                let id = MessageId { flow: sending.flow, number: sending.next_number, scheduled };
                sending.next_number += 1;
                sending.pending.push_back(Pending { id, known_seq: lane.known, seen_at: None, sync_first: false });
                flow.begin(id.number);
                if self.switches.measuring.load(std::sync::atomic::Ordering::Relaxed) {
                    self.statistics.begun += 1;
                }
            }
            let pending = sending.pending[sending.unsent];
            let after = sending.unsent.checked_sub(1).map(|before| sending.pending[before].id.to_bytes());
            let id = pending.id.to_bytes();
            let body = sending.body.of(pending.id);
            if let Some(view) = lane.view {
                self.history.sent(view, &id, body);
            }
            let send = Send {
                target: &lane.target,
                client_message_id: &id,
                body,
                after: after.as_ref().map_or(&[], |id| &id[..]),
                known_seq: pending.known_seq,
            };
            wire::put_send(out, send);
            sending.unsent += 1;
        }
    }

    /// A moment came that somebody waited for.
    pub(super) fn timer(&mut self, member: usize, now: Micros) {
        let participant = &mut self.members[member];
        if participant.state == State::Offline || participant.state == State::Greeting {
            return;
        }
        for lane in &mut participant.lanes {
            lane.close_gap(now);
        }
        if now < participant.beat_at {
            return;
        }
        // Something may have been written since: silence counts from there.
        participant.beat_at = participant.written_at + participant.heartbeat;
        if now >= participant.beat_at {
            participant.beat_at = now + participant.heartbeat;
            self.statistics.heartbeats += 1;
            let ping = v1::Ping { echo: bytes::Bytes::new() };
            wire::put_frame(&mut participant.control, v1::client_frame::Frame::Ping(ping));
        }
        self.timers.insert((participant.beat_at, member));
    }
}

impl Participant {
    /// Sending ends. Of what is due and was not written only the oldest of each conversation is still sent: when it is acknowledged it
    /// shows the longest that any of them waited, and a backlog of minutes need not be worked off for that. The others are dropped.
    /// Gives how many of all these nothing but the service kept from being written.
    pub(super) fn sending_ends(&mut self, now: Micros) -> u64 {
        let mut held_up = 0;
        for lane in 0..self.lanes.len() {
            let elsewhere = self.pending_besides(lane);
            let Some(sending) = &mut self.lanes[lane].sending else { continue };
            let writes = self.state == State::Live
                && sending.paused_until <= now
                && !sending.waits_for_sync()
                && sending.pending.len() + elsewhere < PENDING_MAX;
            let Some(due) = &mut sending.due else { continue };
            held_up += if writes { 0 } else { due.len() as u64 };
            due.truncate(1);
        }
        held_up
    }

    /// Sends that were not acknowledged in all lanes but this one.
    fn pending_besides(&self, lane: usize) -> usize {
        let others = self.lanes.iter().enumerate().filter(|(index, _)| *index != lane);
        others.filter_map(|(_, lane)| lane.sending.as_ref()).map(|sending| sending.pending.len()).sum()
    }

    fn write_calls(&mut self, out: &mut Vec<u8>, now: Micros) {
        if self.sync_at.is_some_and(|at| at <= now) && !self.calls.values().any(|(call, _)| matches!(call, Call::Sync))
        {
            self.sync_at = None;
            let have = self.lanes.iter().filter_map(|lane| {
                let conversation_id = lane.conversation?.to_bytes();
                Some(v1::SyncHave { conversation_id, seq: lane.have, read_seq: 0 })
            });
            let request = v1::SyncRequest {
                version: 0,
                have: have.collect(),
                page: self.sync_page.clone(),
                limit: 0,
                details: false,
            };
            self.call(out, Call::Sync, Method::ConversationSync.number(), &request);
        }
        for index in 0..self.lanes.len() {
            let lane = &mut self.lanes[index];
            if !lane.wants_history(now) || self.calls.len() >= limits::CALLS_IN_FLIGHT_MAX {
                continue;
            }
            let Some(conversation) = lane.conversation else { continue };
            lane.reading = true;
            let seq = |seq: u64| i64::try_from(seq).unwrap_or(i64::MAX);
            let request = v1::HistoryRequest {
                target: Some(v1::Target { target: Some(v1::target::Target::ConversationId(conversation.to_bytes())) }),
                from: seq(lane.have + 1),
                to: seq(lane.catch_up_to),
                limit: 0,
                newest: false,
            };
            let number = Method::MessageHistory.number();
            self.call(out, Call::History { lane: index }, number, &request);
        }
    }

    pub(super) fn call<M: prost::Message>(&mut self, out: &mut Vec<u8>, call: Call, method: u32, request: &M) {
        let request_id = self.next_request;
        self.next_request = self.next_request.wrapping_add(1);
        self.calls.insert(request_id, (call, Vec::new()));
        let request = request.encode_to_vec().into();
        let call = v1::Call { request_id, method, request };
        wire::put_frame(out, v1::client_frame::Frame::Call(call));
    }
}

impl Lane {
    /// Reads the history for a gap that was not filled in time.
    fn close_gap(&mut self, now: Micros) {
        let Some((&first, _)) = self.ahead.first_key_value() else { return };
        if self.gap_since.is_some_and(|since| now >= since + GAP_PATIENCE) {
            self.catch_up_to = self.catch_up_to.max(first - 1);
        }
    }
}
