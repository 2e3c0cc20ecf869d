//! What a participant makes of a frame.

use im_proto::{
    ConversationId, StatusCode,
    status::Retry,
    v1::{self, server_frame::Frame},
};
use prost::Message as _;

use super::{
    Call, GAP_PATIENCE, LOOK_AGAIN, Participants, State,
    flow::MessageId,
    lane::{AHEAD_MAX, Ahead, Pending},
    pause,
};
use crate::{
    checker::Entry,
    driver::Micros,
    wire::{self, Ack, Incoming, Message},
};

/// The least pause before a refused send is tried again.
const PAUSE: Micros = 10_000;

impl Participants {
    pub(super) fn receive(&mut self, member: usize, payload: &[u8], now: Micros) {
        match wire::decode(payload) {
            Ok(Incoming::Ack(ack)) => self.ack(member, &ack, now),
            Ok(Incoming::Message(message)) => self.message(member, &message, now),
            Ok(Incoming::Other(frame)) => self.other(member, frame, now),
            Ok(Incoming::Unknown(field)) => self.error(&format!("unknown server frame {field}")),
            Err(error) => self.error(&format!("malformed server frame: {error}")),
        }
    }

    pub(super) fn error(&mut self, cause: &str) {
        *self.statistics.errors.entry(cause.to_owned()).or_default() += 1;
    }

    fn other(&mut self, member: usize, frame: Frame, now: Micros) {
        let participant = &mut self.members[member];
        match frame {
            Frame::Welcome(welcome) => {
                participant.state = State::Syncing;
                participant.sync_at = Some(now);
                if welcome.heartbeat_interval_ms > 0 {
                    participant.heartbeat = Micros::from(welcome.heartbeat_interval_ms) * 1000;
                }
                participant.sessions += 1;
                if participant.sessions > 1 {
                    self.statistics.reconnects += 1;
                }
                self.history.session_started(participant.client);
                let at = now + participant.heartbeat;
                participant.beat_at = at;
                self.wake_at(at, member);
            }
            Frame::Ping(ping) => {
                let pong = v1::client_frame::Frame::Pong(v1::Pong { echo: ping.echo });
                wire::put_frame(&mut participant.control, pong);
            }
            Frame::Resync(resync) => {
                self.statistics.resyncs += 1;
                // Spread by the participant's place instead of by chance: the same in every run.
                let spread = Micros::from(resync.spread_ms) * 1000;
                let at = now + spread * (member as u64 % 64) / 64;
                participant.sync_at = Some(at);
                self.wake_at(at, member);
            }
            Frame::GoAway(_) => participant.close = true,
            Frame::Reply(reply) => self.reply(member, reply, now),
            Frame::Close(close) => {
                let status = close.status.map_or_else(|| "no status".to_owned(), |status| status.text);
                self.error(&format!("closed: {status}"));
            }
            Frame::Refused(refused) => {
                let status = refused.status.map_or_else(|| "no status".to_owned(), |status| status.text);
                self.error(&format!("frame {} refused: {status}", refused.frame));
            }
            Frame::SendAck(ack) => {
                let light = Ack {
                    client_message_id: &ack.client_message_id,
                    conversation_id: &ack.conversation_id,
                    seq: ack.seq,
                    status: ack.status.clone(),
                };
                self.ack(member, &light, now);
            }
            Frame::Message(message) => self.message(member, &Message::from(&message), now),
            Frame::Pong(_) | Frame::Signal(_) | Frame::Renewed(_) => {}
        }
    }

    fn ack(&mut self, member: usize, ack: &Ack<'_>, now: Micros) {
        let Some(id) = MessageId::parse(ack.client_message_id) else { return self.error("ack of an unknown message") };
        let lanes = &self.members[member].lanes;
        let lane = lanes.iter().position(|lane| lane.sending.as_ref().is_some_and(|sending| sending.flow == id.flow));
        let Some(lane) = lane else { return self.error("ack of an unknown message") };
        if let Some(status) = &ack.status {
            return self.refused(member, lane, id, status, now);
        }
        if self.members[member].lanes[lane].view.is_none() {
            self.learn(member, lane, ack.conversation_id);
        }
        let lane = &mut self.members[member].lanes[lane];
        let (Some(view), Some(sending)) = (lane.view, lane.sending.as_mut()) else { return };
        self.history.acknowledged(view, ack.client_message_id, ack.seq);
        let Some(position) = sending.position(id) else { return };
        sending.remove(position);
        self.flows[usize::try_from(id.flow).unwrap_or(0)].arrived(id.number);
        self.statistics.acknowledged(&self.switches, id.scheduled, now);
        self.extend(member, id.flow, ack.seq, now);
    }

    /// The own message is at `seq`: the lane has that one.
    fn extend(&mut self, member: usize, flow: u32, seq: u64, now: Micros) {
        let lanes = &mut self.members[member].lanes;
        let lane = lanes.iter().position(|lane| lane.sending.as_ref().is_some_and(|sending| sending.flow == flow));
        let Some(index) = lane else { return };
        let lane = &mut lanes[index];
        lane.exists(seq);
        if seq == lane.have + 1 {
            lane.have = seq;
            self.drain_ahead(member, index, now);
        } else if seq > lane.have {
            lane.ahead.insert(seq, Ahead::Own);
            self.gap(member, index, now);
        }
    }

    /// A send was not taken.
    fn refused(&mut self, member: usize, lane: usize, id: MessageId, status: &v1::Status, now: Micros) {
        let code = StatusCode::from_number(status.code);
        let participant = &mut self.members[member];
        let Some(sending) = &mut participant.lanes[lane].sending else { return };
        let Some(position) = sending.position(id) else { return };
        match code.map(StatusCode::retry) {
            Some(Retry::Later | Retry::After) => {
                *self.statistics.retries.entry(status.text.clone()).or_default() += 1;
                if code == Some(StatusCode::SyncFirst) {
                    sending.pending[position].sync_first = true;
                    participant.sync_at.get_or_insert(now);
                }
                let at = now + PAUSE.max(Micros::from(status.retry_after_ms) * 1000);
                sending.send_again(at);
                self.wake_at(at, member);
            }
            Some(Retry::Never) | None => {
                sending.remove(position);
                self.flows[usize::try_from(id.flow).unwrap_or(0)].abandoned(id.number);
                self.statistics.refused += 1;
                self.error(&format!("send refused: {}", status.text));
            }
        }
    }

    fn message(&mut self, member: usize, message: &Message<'_>, now: Micros) {
        let index = self.find_lane(member, message.conversation_id, message.sender);
        // Entries of other conversations (the self log) are not the harness's business.
        let Some(index) = index else { return };
        let lane = &mut self.members[member].lanes[index];
        lane.exists(message.seq);
        if message.seq <= lane.have {
            self.statistics.redelivered += 1;
        } else if message.seq == lane.have + 1 {
            self.show(member, index, message, now);
            if !self.members[member].lanes[index].ahead.is_empty() {
                self.drain_ahead(member, index, now);
            }
        } else {
            if lane.ahead.len() < AHEAD_MAX {
                lane.ahead.insert(message.seq, Ahead::Entry(Box::new(owned(message))));
            }
            self.gap(member, index, now);
        }
    }

    /// The lane of a conversation. One whose id was not known yet is recognised by the other user.
    fn find_lane(&mut self, member: usize, id: &[u8], peer: &str) -> Option<usize> {
        let lanes = &self.members[member].lanes;
        let known = lanes.iter().position(|lane| lane.conversation.is_some_and(|known| known.as_bytes()[..] == *id));
        if known.is_some() {
            return known;
        }
        let index = lanes.iter().position(|lane| lane.conversation.is_none() && lane.peer.as_deref() == Some(peer))?;
        self.learn(member, index, id);
        Some(index)
    }

    /// The next entry of a lane: as new, unless it is the own message that was acknowledged before.
    fn show(&mut self, member: usize, index: usize, message: &Message<'_>, now: Micros) {
        let participant = &mut self.members[member];
        let lane = &mut participant.lanes[index];
        lane.have = message.seq;
        let id = MessageId::parse(message.client_message_id);
        let event = message.kind == v1::EntryKind::Event as u64;
        if message.sender == participant.user && !event {
            let Some((sending, id)) = lane.sending.as_mut().zip(id) else { return };
            let Some(position) = sending.position(id) else { return };
            sending.pending[position].seen_at = Some(message.seq);
        } else if let Some(id) = id {
            if let Some(flow) = self.flows.get(usize::try_from(id.flow).unwrap_or(usize::MAX)) {
                flow.arrived(id.number);
            }
            self.statistics.delivered(&self.switches, id.scheduled, now);
        }
        if let Some(view) = lane.view {
            self.history.delivered(view, entry(message));
        }
    }

    fn drain_ahead(&mut self, member: usize, index: usize, now: Micros) {
        loop {
            let lane = &mut self.members[member].lanes[index];
            let Some(first) = lane.ahead.first_entry() else { break };
            if *first.key() > lane.have + 1 {
                break;
            }
            let (seq, ahead) = first.remove_entry();
            if seq <= lane.have {
                continue;
            }
            match ahead {
                Ahead::Own => lane.have = seq,
                Ahead::Entry(message) => self.show(member, index, &Message::from(&*message), now),
            }
        }
        let lane = &mut self.members[member].lanes[index];
        if lane.ahead.is_empty() {
            lane.gap_since = None;
        } else {
            self.gap(member, index, now);
        }
    }

    /// Something is missing below what came: wait a moment for it, then read it.
    fn gap(&mut self, member: usize, index: usize, now: Micros) {
        let lane = &mut self.members[member].lanes[index];
        if lane.gap_since.is_none() {
            lane.gap_since = Some(now);
            self.wake_at(now + GAP_PATIENCE, member);
        }
    }

    /// The id of a direct conversation is known from now on.
    fn learn(&mut self, member: usize, index: usize, id: &[u8]) {
        let Ok(id) = ConversationId::from_slice(id) else { return self.error("malformed conversation id") };
        let participant = &mut self.members[member];
        let lane = &mut participant.lanes[index];
        let conversation = self.history.conversation(id);
        let view = self.history.view(participant.client, conversation);
        self.history.follows(view, 0);
        (lane.conversation, lane.view) = (Some(id), Some(view));
        // What was sent before the id was known is recorded now.
        let Some(sending) = &mut lane.sending else { return };
        for position in 0..sending.unsent {
            let id = sending.pending[position].id;
            self.history.sent(view, &id.to_bytes(), sending.body.of(id));
        }
    }

    fn reply(&mut self, member: usize, reply: v1::Reply, now: Micros) {
        let participant = &mut self.members[member];
        let Some((_, parts)) = participant.calls.get_mut(&reply.request_id) else {
            return self.error("reply to no call");
        };
        parts.extend_from_slice(&reply.payload);
        if !reply.last && reply.status.is_none() {
            return;
        }
        let Some((call, answer)) = participant.calls.remove(&reply.request_id) else { return };
        let failed = reply.status.filter(|status| status.code != 0);
        match (call, failed) {
            (Call::Sync, None) => self.synced(member, &answer, now),
            (Call::History { lane }, None) => self.history_page(member, lane, &answer, now),
            (Call::Read { lane, range }, None) => self.history_read(member, lane, range, &answer),
            // The next one comes by itself.
            (Call::Read { .. }, Some(status)) => {
                *self.statistics.retries.entry(format!("read: {}", status.text)).or_default() += 1;
                participant.reading.iter_mut().for_each(|reading| reading.under_way = false);
            }
            (Call::Sync, Some(status)) => {
                *self.statistics.retries.entry(format!("sync: {}", status.text)).or_default() += 1;
                let at = now + pause(participant.sync_failures, &status, member);
                participant.sync_failures += 1;
                participant.sync_at = Some(at);
                self.wake_at(at, member);
            }
            (Call::History { lane }, Some(status)) => {
                *self.statistics.retries.entry(format!("history: {}", status.text)).or_default() += 1;
                let lane = &mut participant.lanes[lane];
                let at = now + pause(lane.read_failures, &status, member);
                (lane.reading, lane.read_failures, lane.read_again_at) = (false, lane.read_failures + 1, at);
                self.wake_at(at, member);
            }
        }
    }

    fn synced(&mut self, member: usize, answer: &[u8], now: Micros) {
        let Ok(reply) = v1::SyncReply::decode(answer) else { return self.error("malformed sync reply") };
        for row in &reply.conversations {
            let index = self.find_lane(member, &row.conversation_id, &row.peer_user_id);
            let Some(index) = index else { continue };
            let lane = &mut self.members[member].lanes[index];
            lane.exists(row.head);
            lane.catch_up_to = lane.catch_up_to.max(row.head);
            self.caught_up(member, index, now);
        }
        let participant = &mut self.members[member];
        participant.sync_failures = 0;
        participant.sync_page = reply.next;
        if participant.sync_page.is_empty() {
            participant.state = State::Live;
        } else {
            participant.sync_at = Some(now);
        }
    }

    fn history_page(&mut self, member: usize, index: usize, answer: &[u8], now: Micros) {
        let Ok(reply) = v1::HistoryReply::decode(answer) else { return self.error("malformed history reply") };
        self.members[member].lanes[index].reading = false;
        self.members[member].lanes[index].read_failures = 0;
        let before = self.members[member].lanes[index].have;
        for message in reply.entries.iter().filter_map(|entry| entry.message.as_ref()) {
            if message.seq == self.members[member].lanes[index].have + 1 {
                self.show(member, index, &Message::from(message), now);
            }
        }
        self.drain_ahead(member, index, now);
        let lane = &mut self.members[member].lanes[index];
        self.statistics.gaps_repaired += u64::from(lane.have > before);
        if lane.have == before && lane.catch_up_to > lane.have {
            // Nothing new: do not ask again at once.
            lane.read_again_at = now + LOOK_AGAIN;
            self.wake_at(now + LOOK_AGAIN, member);
        }
        self.caught_up(member, index, now);
    }

    /// With everything read, sends that were to wait for that go on: found in the log, or again with what is known now.
    fn caught_up(&mut self, member: usize, index: usize, now: Micros) {
        let lane = &mut self.members[member].lanes[index];
        if lane.catch_up_to > lane.have {
            return;
        }
        let Some(sending) = &mut lane.sending else { return };
        let mut position = 0;
        while let Some(pending) = sending.pending.get_mut(position) {
            if !std::mem::take(&mut pending.sync_first) {
                position += 1;
                continue;
            }
            let Some(seq) = pending.seen_at else {
                pending.known_seq = lane.have;
                position += 1;
                continue;
            };
            let Some(Pending { id, .. }) = sending.remove(position) else { break };
            if let Some(view) = lane.view {
                self.history.acknowledged(view, &id.to_bytes(), seq);
            }
            self.flows[usize::try_from(id.flow).unwrap_or(0)].arrived(id.number);
            self.statistics.acknowledged(&self.switches, id.scheduled, now);
        }
    }
}

fn entry<'a>(message: &Message<'a>) -> Entry<'a> {
    Entry {
        seq: message.seq,
        sender: message.sender,
        client_message_id: message.client_message_id,
        body: message.body,
        event: message.kind == v1::EntryKind::Event as u64,
    }
}

fn owned(message: &Message<'_>) -> v1::Message {
    v1::Message {
        conversation_id: bytes::Bytes::copy_from_slice(message.conversation_id),
        seq: message.seq,
        sender: message.sender.to_owned(),
        sent_at_ms: 0,
        client_message_id: bytes::Bytes::copy_from_slice(message.client_message_id),
        body: bytes::Bytes::copy_from_slice(message.body),
        kind: i32::try_from(message.kind).unwrap_or(0),
        flags: 0,
    }
}
