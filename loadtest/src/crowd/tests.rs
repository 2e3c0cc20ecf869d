//! Participants against a server in memory: everything the protocol lets a server do, and nothing lost for it.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use im_proto::{
    StatusCode, frame,
    method::Method,
    v1::{self, client_frame, server_frame},
};
use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::{
    checker::{Entry, Verdict},
    driver::Crowd as _,
};

/// Members of the one group: all of them send.
const MEMBERS: usize = 3;
const GROUP: ConversationId = ConversationId::from_bytes([7; 16]);
/// Microseconds between two steps of the test.
const STEP: Micros = 20_000;

/// A server with one group, which may lose pushes (and says so), refuse sends, and forget connections.
#[derive(Default)]
struct Server {
    log: Vec<v1::Message>,
    /// What each connection is about to receive; none: not connected.
    out: Vec<Option<VecDeque<server_frame::Frame>>>,
    /// The next sends are refused with these.
    refuse: VecDeque<StatusCode>,
    /// Pushes that are dropped and followed by a `Resync`.
    drop_pushes: bool,
    /// Reads of the history do not see the last entries.
    reads_behind: u64,
    /// All calls are refused with this.
    refuse_calls: Option<v1::Status>,
    calls: usize,
}

impl Server {
    fn push(&mut self, member: usize, frame: server_frame::Frame) {
        if let Some(Some(out)) = self.out.get_mut(member) {
            out.push_back(frame);
        }
    }

    fn receive(&mut self, member: usize, frame: client_frame::Frame) {
        match frame {
            client_frame::Frame::Hello(_) => {
                self.push(member, server_frame::Frame::Welcome(v1::Welcome::default()));
            }
            client_frame::Frame::Send(send) => self.send(member, send),
            client_frame::Frame::Call(call) => self.call(member, &call),
            _ => {}
        }
    }

    fn ack(&mut self, member: usize, id: Bytes, seq: u64, status: Option<v1::Status>) {
        let ack = v1::SendAck { client_message_id: id, conversation_id: GROUP.to_bytes(), seq, sent_at_ms: 1, status };
        self.push(member, server_frame::Frame::SendAck(ack));
    }

    fn position(&self, id: &Bytes) -> Option<u64> {
        self.log.iter().find(|message| message.client_message_id == *id).map(|message| message.seq)
    }

    fn send(&mut self, member: usize, send: v1::Send) {
        let id = send.client_message_id.clone();
        if let Some(code) = self.refuse.pop_front() {
            return self.ack(member, id, 0, Some(code.to_status()));
        }
        if let Some(seq) = self.position(&id) {
            return self.ack(member, id, seq, None);
        }
        if !send.after.is_empty() && self.position(&send.after).is_none() {
            return self.ack(member, id, 0, Some(StatusCode::OutOfOrder.to_status()));
        }
        let seq = self.log.len() as u64 + 1;
        let message = v1::Message {
            conversation_id: GROUP.to_bytes(),
            seq,
            sender: user(member),
            sent_at_ms: 1,
            client_message_id: id.clone(),
            body: send.body,
            kind: v1::EntryKind::Message.into(),
            flags: 0,
        };
        self.log.push(message.clone());
        self.ack(member, id, seq, None);
        for other in (0..self.out.len()).filter(|&other| other != member) {
            let frame = if self.drop_pushes {
                server_frame::Frame::Resync(v1::Resync { reason: 1, spread_ms: 10 })
            } else {
                server_frame::Frame::Message(message.clone())
            };
            self.push(other, frame);
        }
    }

    fn call(&mut self, member: usize, call: &v1::Call) {
        self.calls += 1;
        if let Some(status) = self.refuse_calls.clone() {
            let request_id = call.request_id;
            let reply = v1::Reply { request_id, status: Some(status), payload: Bytes::new(), last: true };
            return self.push(member, server_frame::Frame::Reply(reply));
        }
        let head = self.log.len() as u64;
        let payload = if call.method == Method::ConversationSync.number() {
            let row = v1::ConversationRow { conversation_id: GROUP.to_bytes(), head, ..v1::ConversationRow::default() };
            v1::SyncReply { version: 1, conversations: vec![row], ..v1::SyncReply::default() }.encode_to_vec()
        } else {
            let request = v1::HistoryRequest::decode(call.request.clone()).unwrap();
            let to = if request.to == 0 { i64::MAX } else { request.to };
            let wanted = |message: &&v1::Message| {
                let seq = i64::try_from(message.seq).unwrap();
                request.from <= seq && seq <= to
            };
            let head = head.saturating_sub(self.reads_behind);
            let log = self.log.iter().take(usize::try_from(head).unwrap());
            // Pages of four, in two parts, so that both have to be put together.
            let page = if request.limit == 0 { 4 } else { usize::try_from(request.limit).unwrap().min(4) };
            let mut entries: Vec<&v1::Message> = log.filter(wanted).collect();
            if request.newest {
                entries.drain(..entries.len().saturating_sub(page));
            }
            entries.truncate(page);
            let entries = entries.into_iter().cloned();
            let entries = entries.map(|message| v1::HistoryEntry { message: Some(message), gone_reason: 0 }).collect();
            v1::HistoryReply { conversation_id: GROUP.to_bytes(), entries, head, first_seq: 1 }.encode_to_vec()
        };
        let middle = payload.len() / 2;
        for (part, last) in [(&payload[..middle], false), (&payload[middle..], true)] {
            let payload = Bytes::copy_from_slice(part);
            let reply = v1::Reply { request_id: call.request_id, status: None, payload, last };
            self.push(member, server_frame::Frame::Reply(reply));
        }
    }
}

fn user(member: usize) -> String {
    format!("user-{member}")
}

/// Participants, server, and the wire between them.
struct World {
    members: Participants,
    server: Server,
    now: Micros,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    /// Time passes, everybody reads and writes.
    Step,
    /// Only this one reads and writes: the others fall behind.
    StepOne(usize),
    /// A connection breaks: what was under way to the client is gone; opened again at once.
    Break(usize),
    /// A connection breaks after the server took what the client had to say, and before its acks came.
    BreakAfterSend(usize),
    Refuse(StatusCode),
    DropPushes(bool),
}

impl World {
    fn new() -> Self {
        Self::sending(None)
    }

    /// One whose members send that often, or as the window allows.
    fn sending(every: Option<Micros>) -> Self {
        let every = every.map(|every| (every as f64, 0.0));
        let flows = Arc::new((0..MEMBERS).map(|_| Flow::new(MEMBERS - 1)).collect::<Vec<_>>());
        let plan = |member: usize| {
            let flow = u32::try_from(member).unwrap();
            let sends = SendPlan { flow, window: 4, body_bytes: 20, every };
            let lanes = vec![LanePlan { with: With::Conversation(GROUP), sends: Some(sends) }];
            Plan { user: user(member), token: String::new(), lanes, stalls: false, reads_every: Some(3 * STEP) }
        };
        let switches = Arc::<Switches>::default();
        switches.sending.store(true, Ordering::Relaxed);
        switches.measuring.store(true, Ordering::Relaxed);
        let members = Participants::new((0..MEMBERS).map(plan).collect(), flows, switches, Arc::default());
        let mut world = Self { members, server: Server::default(), now: 1 };
        world.server.out = (0..MEMBERS).map(|_| None).collect();
        (0..MEMBERS).for_each(|member| world.open(member));
        world
    }

    fn open(&mut self, member: usize) {
        self.server.out[member] = Some(VecDeque::new());
        self.members.opened(member, self.now);
    }

    fn client_writes(&mut self, member: usize) {
        let mut out = Vec::new();
        self.members.fill(member, &mut out, self.now);
        let mut input = bytes::BytesMut::from(&out[..]);
        while let Some(payload) = frame::split_frame(&mut input, frame_limit()).unwrap() {
            let frame::Decoded::Frame(frame) = frame::decode_client_frame(payload).unwrap() else { panic!("unknown") };
            self.server.receive(member, frame);
        }
        assert!(input.is_empty());
    }

    fn client_reads(&mut self, member: usize) {
        let Some(frames) = self.server.out[member].replace(VecDeque::new()) else { return };
        for frame in frames {
            let payload = v1::ServerFrame::from(frame).encode_to_vec();
            self.members.frame(member, &payload, self.now);
        }
    }

    fn step(&mut self, members: impl Iterator<Item = usize>) {
        self.now += STEP;
        let mut wake = Vec::new();
        self.members.tick(self.now, &mut wake);
        for member in members {
            self.client_writes(member);
            self.client_reads(member);
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Step => self.step(0..MEMBERS),
            Event::StepOne(member) => self.step(member..=member),
            Event::Break(member) | Event::BreakAfterSend(member) => {
                if matches!(event, Event::BreakAfterSend(_)) {
                    self.client_writes(member);
                }
                self.members.closed(member, "broken");
                self.open(member);
            }
            Event::Refuse(code) => self.server.refuse.push_back(code),
            Event::DropPushes(drop) => self.server.drop_pushes = drop,
        }
    }

    /// Stops sending, lets everything arrive, reads back, judges.
    fn finish(mut self) -> (Verdict, Server) {
        self.server.refuse.clear();
        self.members.switches.sending.store(false, Ordering::Relaxed);
        for _ in 0..200 {
            self.step(0..MEMBERS);
        }
        assert_eq!(
            self.members.members.iter().map(|member| member.unsettled(&self.members.flows)).sum::<u64>(),
            0,
            "not settled"
        );
        assert!(self.members.statistics.errors.is_empty(), "{:?}", self.members.statistics.errors);
        let acknowledged = self.members.statistics.acknowledged;
        let mut history = self.members.history;
        let conversation = history.conversation(GROUP);
        for message in &self.server.log {
            history.stored(conversation, Entry::from(message));
        }
        history.stored_through(conversation, self.server.log.len() as u64);
        let verdict = history.judge();
        assert_eq!(acknowledged, verdict.acknowledged, "each counts once, however the client learned of it");
        (verdict, self.server)
    }
}

fn frame_limit() -> usize {
    im_proto::limits::FRAME_BYTES_MAX
}

fn event() -> impl Strategy<Value = Event> {
    let refusals = vec![StatusCode::Overloaded, StatusCode::SyncFirst, StatusCode::OutOfOrder, StatusCode::Unavailable];
    prop_oneof![
        6 => Just(Event::Step),
        3 => (0..MEMBERS).prop_map(Event::StepOne),
        1 => (0..MEMBERS).prop_map(Event::Break),
        2 => (0..MEMBERS).prop_map(Event::BreakAfterSend),
        2 => proptest::sample::select(refusals).prop_map(Event::Refuse),
        1 => any::<bool>().prop_map(Event::DropPushes),
    ]
}

proptest! {
    #[test]
    fn whatever_a_correct_server_does_every_promise_is_found_to_hold(
        events in proptest::collection::vec(event(), 1..80),
        every in prop_oneof![Just(None), (STEP / 4..4 * STEP).prop_map(Some)],
    ) {
        let mut world = World::sending(every);
        (0..3).for_each(|_| world.apply(Event::Step));
        events.into_iter().for_each(|event| world.apply(event));
        world.server.drop_pushes = false;
        let (verdict, server) = world.finish();
        prop_assert!(verdict.is_clean(), "{verdict}");
        prop_assert_eq!(verdict.acknowledged, server.log.len() as u64);
        prop_assert_eq!(verdict.sent, verdict.acknowledged);
        prop_assert!(verdict.sent > 0);
    }
}

#[test]
fn the_window_is_full_and_no_more() {
    let mut world = World::new();
    (0..3).for_each(|_| world.step(0..MEMBERS));
    world.client_writes(0);
    let in_flight: BTreeMap<_, _> = world.members.flows.iter().map(Flow::in_flight).enumerate().collect();
    assert!(in_flight.values().all(|&count| count <= 4) && in_flight[&0] == 4, "{in_flight:?}");
}

#[test]
fn while_nothing_is_acknowledged_all_lanes_together_keep_the_limit_of_a_session() {
    let lane = |flow: u8| LanePlan {
        with: With::Conversation(ConversationId::from_bytes([flow; 16])),
        sends: Some(SendPlan { flow: flow.into(), window: 4, body_bytes: 20, every: Some((1000.0, 0.0)) }),
    };
    let plan =
        Plan { user: user(0), token: String::new(), lanes: vec![lane(0), lane(1)], stalls: false, reads_every: None };
    let switches = Arc::<Switches>::default();
    switches.sending.store(true, Ordering::Relaxed);
    let flows = Arc::new(vec![Flow::new(1), Flow::new(1)]);
    let mut members = Participants::new(vec![plan], flows, switches, Arc::default());
    members.opened(0, 1);
    members.members[0].state = State::Live;
    for now in (0..2000).map(|millis| millis * 1000) {
        members.tick(now, &mut Vec::new());
        members.fill(0, &mut Vec::new(), now);
    }
    let pending = |lane: &Lane| lane.sending.as_ref().unwrap().pending.len();
    let pending: Vec<usize> = members.members[0].lanes.iter().map(pending).collect();
    assert!(pending.iter().all(|&count| count > 0) && pending.iter().sum::<usize>() == PENDING_MAX, "{pending:?}");
}

/// One client who is to send each `every` from the moment 1 on, not connected.
fn lone_sender(every: Micros) -> Participants {
    let sends = SendPlan { flow: 0, window: 4, body_bytes: 20, every: Some((every as f64, 0.0)) };
    let lanes = vec![LanePlan { with: With::Conversation(GROUP), sends: Some(sends) }];
    let plan = Plan { user: user(0), token: String::new(), lanes, stalls: false, reads_every: None };
    let switches = Arc::<Switches>::default();
    switches.sending.store(true, Ordering::Relaxed);
    switches.measuring.store(true, Ordering::Relaxed);
    let mut members = Participants::new(vec![plan], Arc::new(vec![Flow::new(0)]), switches, Arc::default());
    members.tick(1, &mut Vec::new());
    members
}

#[test]
fn a_conversation_waits_for_what_its_client_cannot_send_without_a_session() {
    let mut members = lone_sender(100_000);
    let mut stalled = |now| {
        members.tick(now, &mut Vec::new());
        members.members[0].stalled(now)
    };
    assert_eq!((stalled(1 + STALLED_AFTER), stalled(2 + STALLED_AFTER)), (0, 1));
    members.opened(0, 3 + STALLED_AFTER);
    members.members[0].state = State::Live;
    members.fill(0, &mut Vec::new(), 3 + STALLED_AFTER);
    assert_eq!(members.members[0].stalled(3 + STALLED_AFTER), 1, "sent, and not acknowledged");
}

#[test]
fn a_send_that_is_found_in_the_history_counts_as_acknowledged_then() {
    let mut world = World::new();
    (0..4).for_each(|_| world.apply(Event::Step));
    // Taken before the connection broke, refused when it is repeated.
    world.apply(Event::BreakAfterSend(0));
    let pending = world.members.members[0].lanes[0].sending.as_ref().unwrap().pending[0];
    assert!(world.server.position(&Bytes::copy_from_slice(&pending.id.to_bytes())).is_some());
    world.apply(Event::Refuse(StatusCode::SyncFirst));
    (0..4).for_each(|_| world.apply(Event::StepOne(0)));
    assert!(world.server.refuse.is_empty());
    let (verdict, _) = world.finish();
    assert!(verdict.is_clean() && verdict.acknowledged > 0, "{verdict}");
}

#[test]
fn how_long_a_send_waited_counts_whenever_its_ack_comes_after_the_measured_time_began() {
    let mut members = lone_sender(1_000_000);
    members.opened(0, 1);
    members.members[0].state = State::Live;
    members.fill(0, &mut Vec::new(), 2);
    let id = members.members[0].lanes[0].sending.as_ref().unwrap().pending[0].id;
    members.switches.sending.store(false, Ordering::Relaxed);
    members.switches.measuring.store(false, Ordering::Relaxed);
    members.tick(3, &mut Vec::new());
    // More than the percentiles know.
    let later = 100_000_000;
    let ack = v1::SendAck {
        client_message_id: Bytes::copy_from_slice(&id.to_bytes()),
        conversation_id: GROUP.to_bytes(),
        seq: 1,
        sent_at_ms: 1,
        status: None,
    };
    members.frame(0, &v1::ServerFrame::from(server_frame::Frame::SendAck(ack)).encode_to_vec(), id.scheduled + later);
    let statistics = &members.statistics;
    assert_eq!((statistics.longest_wait, statistics.acknowledged, statistics.delays.ack.count()), (later, 0, 0));
}

#[test]
fn what_is_due_at_the_end_of_sending_waits_on_with_its_oldest_send() {
    let mut members = lone_sender(100_000);
    members.tick(450_000, &mut Vec::new());
    members.switches.sending.store(false, Ordering::Relaxed);
    let mut wake = Vec::new();
    members.tick(500_000, &mut wake);
    assert_eq!((members.statistics.held_up, wake), (5, vec![0]));
    let open = |members: &Participants| members.members[0].unsettled(&members.flows);
    assert_eq!(members.members[0].stalled(2 + STALLED_AFTER), 1);
    assert_eq!(open(&members), 2, "the send and the session");
    members.opened(0, 700_000);
    members.members[0].state = State::Live;
    let mut out = Vec::new();
    members.fill(0, &mut out, 700_000);
    let pending = &members.members[0].lanes[0].sending.as_ref().unwrap().pending;
    assert_eq!(pending.iter().map(|pending| pending.id.scheduled).collect::<Vec<_>>(), [1]);
    assert_eq!(open(&members), 1);
}

#[test]
fn what_a_client_could_have_sent_is_not_held_up() {
    let mut members = lone_sender(100_000);
    members.opened(0, 1);
    members.members[0].state = State::Live;
    members.tick(450_000, &mut Vec::new());
    members.switches.sending.store(false, Ordering::Relaxed);
    members.tick(500_000, &mut Vec::new());
    assert_eq!(members.statistics.held_up, 0, "the generator was late");
}

/// Else a crowd that waits for an owner keeps the machine so busy that there is none for long.
#[test]
fn refused_calls_are_repeated_less_and_less_often_and_not_before_the_server_says() {
    for (retry_after_ms, calls_max) in [(0, 8), (3000, 5)] {
        let mut world = World::new();
        let status = StatusCode::Unavailable.to_status();
        world.server.refuse_calls = Some(v1::Status { retry_after_ms, ..status });
        // Ten seconds.
        (0..500).for_each(|_| world.apply(Event::Step));
        let calls = world.server.calls;
        assert!((3 * MEMBERS..=calls_max * MEMBERS).contains(&calls), "{calls} calls, {retry_after_ms}");
        world.server.refuse_calls = None;
        (0..300).for_each(|_| world.apply(Event::Step));
        let (verdict, _) = world.finish();
        assert!(verdict.is_clean() && verdict.acknowledged > 0, "{verdict}");
    }
}

#[test]
fn a_server_that_stores_a_repeat_again_is_found() {
    let mut world = World::new();
    (0..4).for_each(|_| world.apply(Event::Step));
    let mut again = world.server.log[0].clone();
    again.seq = world.server.log.len() as u64 + 1;
    world.server.log.push(again);
    (0..4).for_each(|_| world.apply(Event::Step));
    let (verdict, _) = world.finish();
    assert!(verdict.duplicated > 0, "{verdict}");
}

#[test]
fn histories_are_read_while_they_grow_and_a_head_that_goes_back_is_found() {
    let run = |reads_behind| {
        let mut world = World::new();
        (0..12).for_each(|_| world.apply(Event::Step));
        world.server.reads_behind = reads_behind;
        (0..12).for_each(|_| world.apply(Event::Step));
        world.server.reads_behind = 0;
        let reads = world.members.statistics.reads;
        (world.finish().0, reads)
    };
    let (verdict, reads) = run(0);
    assert!(verdict.is_clean() && reads >= 6, "{reads} reads: {verdict}");
    // More than a client sends at once, so that somebody was told of what is not seen.
    let (verdict, _) = run(100);
    assert!(verdict.lost > 0 && verdict.findings[0].violation == crate::checker::Violation::HeadWentBack, "{verdict}");
}

#[test]
fn a_server_that_forgets_an_acknowledged_message_is_found() {
    let mut world = World::new();
    (0..4).for_each(|_| world.apply(Event::Step));
    world.server.log.pop();
    world.members.switches.sending.store(false, Ordering::Relaxed);
    let (verdict, _) = world.finish();
    assert!(verdict.lost > 0, "{verdict}");
}
