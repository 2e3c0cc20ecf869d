//! The clients of one generator thread: bare connections with a protocol state, and the record of what they saw.
//!
//! A participant is one device of one user over all its sessions. It follows SPEC.md like the SDK does (sync, gap repair, repeats
//! of unacknowledged sends), but decodes from the read buffer and keeps nothing that the judgement does not need: the harness must
//! stay far cheaper than the server. Everything a participant does and sees goes to the checker.

mod flow;
mod lane;
mod reading;
mod receive;
mod send;
mod statistics;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Waker,
};

use im_proto::{ConversationId, v1};

pub use self::{
    flow::{Flow, MessageId},
    statistics::{Delays, Statistics, Timetable},
};
use self::{
    lane::{Lane, Sending},
    reading::Reading,
};
use crate::{
    checker::{Client, History, ReadRange},
    driver::{self, Micros},
    timeline::STALLED_AFTER,
};

/// Time without an entry for a gap before it is read from the history: acks and messages of one commit may cross.
const GAP_PATIENCE: Micros = 50_000;
/// A history that had nothing new is read again after this.
const LOOK_AGAIN: Micros = 50_000;
/// A call that failed is repeated after this, the next time after twice as long, as by the SDK, or when the server says if that is later.
const RETRY: Micros = 200_000;
const RETRY_MAX: Micros = 5_000_000;
/// The server's limit of un-acknowledged sends a session.
const PENDING_MAX: usize = im_proto::limits::PENDING_SENDS_MAX;
/// How often the controller is told how far this thread is.
const PUBLISH_EVERY: Micros = 20_000;
/// How long a participant stays silent if the server names no interval.
const HEARTBEAT: Micros = 30_000_000;

/// What the run's controller sets and all threads obey.
#[derive(Default)]
pub struct Switches {
    /// New messages are sent.
    pub sending: AtomicBool,
    /// Events count for the report.
    pub measuring: AtomicBool,
    /// Connections are to be closed, and not opened again.
    pub closing: AtomicBool,
    pub timetable: Timetable,
}

/// What the threads tell the controller while they run.
#[derive(Default)]
pub struct Progress {
    /// Participants that are connected and synced, without those that stopped reading.
    pub live: AtomicU64,
    pub acknowledged: AtomicU64,
    pub delivered: AtomicU64,
    /// Conversations whose oldest send that is due and not acknowledged waits for long.
    pub stalled: AtomicU64,
    pub heartbeats: AtomicU64,
    /// Messages sent, and everything not received yet: gaps, calls, unacknowledged sends.
    pub unsettled: AtomicU64,
}

/// One participant as a scenario plans it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub user: String,
    pub token: String,
    pub lanes: Vec<LanePlan>,
    /// From the moment that sending begins it reads nothing any more, with its connection open.
    pub stalls: bool,
    /// It reads random parts of its histories, with about this between two reads, as long as messages are sent.
    pub reads_every: Option<Micros>,
}

/// What a participant does in one conversation.
#[derive(Clone, Debug)]
pub struct LanePlan {
    pub with: With,
    /// It sends there; else it only receives.
    pub sends: Option<SendPlan>,
}

#[derive(Clone, Debug)]
pub enum With {
    /// The direct conversation with this user.
    Peer(String),
    Conversation(ConversationId),
}

#[derive(Clone, Copy, Debug)]
pub struct SendPlan {
    /// The index of the flow.
    pub flow: u32,
    pub window: u64,
    pub body_bytes: usize,
    /// Open loop: microseconds between two sends of this lane, and the first one's moment after sending begins.
    pub every: Option<(f64, f64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Offline,
    /// `Hello` was sent.
    Greeting,
    /// Authenticated; live messages are promised from the first answer to `Sync` on.
    Syncing,
    Live,
}

enum Call {
    Sync,
    History { lane: usize },
    Read { lane: usize, range: ReadRange },
}

struct Participant {
    user: String,
    token: String,
    client: Client,
    state: State,
    sessions: u32,
    lanes: Vec<Lane>,
    /// Frames to be written before anything else.
    control: Vec<u8>,
    /// Calls in flight with the parts of their answers.
    calls: BTreeMap<u32, (Call, Vec<u8>)>,
    next_request: u32,
    /// When a `Sync` is due.
    sync_at: Option<Micros>,
    sync_page: bytes::Bytes,
    /// Syncs that failed in a row.
    sync_failures: u32,
    heartbeat: Micros,
    written_at: Micros,
    /// When its silence is looked at next.
    beat_at: Micros,
    close: bool,
    stalls: bool,
    /// It stopped reading.
    stalled: bool,
    reading: Option<Reading>,
}

/// The clients of one generator thread.
pub struct Participants {
    members: Vec<Participant>,
    flows: Arc<Vec<Flow>>,
    switches: Arc<Switches>,
    progress: Arc<Progress>,
    published: Published,
    /// Moments at which a participant has to be looked at again.
    timers: BTreeSet<(Micros, usize)>,
    /// Open loop: every sending lane, and their next scheduled moments.
    schedule: Vec<Scheduled>,
    due: BTreeSet<(Micros, usize)>,
    sending: bool,
    publish_at: Micros,
    pub history: History,
    pub statistics: Statistics,
}

/// What was added to [`Progress`] so far.
#[derive(Default)]
struct Published {
    live: u64,
    acknowledged: u64,
    delivered: u64,
    unsettled: u64,
    stalled: u64,
    heartbeats: u64,
}

struct Scheduled {
    member: usize,
    lane: usize,
    every: f64,
    next: f64,
}

impl Participants {
    /// The participants of one thread.
    pub fn new(plans: Vec<Plan>, flows: Arc<Vec<Flow>>, switches: Arc<Switches>, progress: Arc<Progress>) -> Self {
        let mut history = History::new();
        let mut schedule = Vec::new();
        let mut members = Vec::with_capacity(plans.len());
        for (member, plan) in plans.into_iter().enumerate() {
            let client = history.client(&plan.user);
            let mut lanes = Vec::with_capacity(plan.lanes.len());
            for (index, lane_plan) in plan.lanes.into_iter().enumerate() {
                let mut lane = match lane_plan.with {
                    With::Peer(peer) => Lane::to_peer(peer),
                    With::Conversation(id) => Lane::new(Some(id)),
                };
                if let Some(id) = lane.conversation {
                    let conversation = history.conversation(id);
                    let view = history.view(client, conversation);
                    history.follows(view, 0);
                    lane.view = Some(view);
                }
                if let Some(sends) = lane_plan.sends {
                    if let Some((every, first)) = sends.every {
                        schedule.push(Scheduled { member, lane: index, every, next: first });
                    }
                    lane.sending =
                        Some(Sending::new(sends.flow, sends.window, sends.body_bytes, sends.every.is_some()));
                }
                lanes.push(lane);
            }
            let (stalls, reading) = (plan.stalls, plan.reads_every.map(|every| Reading::new(every, member)));
            members.push(Participant { stalls, reading, ..Participant::new(plan.user, plan.token, client, lanes) });
        }
        Self {
            members,
            flows,
            switches,
            progress,
            published: Published::default(),
            timers: BTreeSet::new(),
            schedule,
            due: BTreeSet::new(),
            sending: false,
            publish_at: 0,
            history,
            statistics: Statistics::default(),
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.members.len()
    }

    /// A connection is there: greet.
    pub fn opened(&mut self, member: usize, now: Micros) {
        let participant = &mut self.members[member];
        participant.state = State::Greeting;
        participant.close = false;
        participant.control.clear();
        participant.calls.clear();
        participant.sync_at = None;
        participant.sync_page.clear();
        participant.sync_failures = 0;
        participant.reading.iter_mut().for_each(|reading| reading.under_way = false);
        participant.written_at = now;
        participant.lanes.iter_mut().for_each(Lane::session_began);
        let hello = v1::Hello {
            version_min: im_proto::PROTOCOL_VERSIONS.0,
            version_max: im_proto::PROTOCOL_VERSIONS.1,
            token: participant.token.clone(),
            client_name: "loadtest".to_owned(),
            client_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..v1::Hello::default()
        };
        crate::wire::put_frame(&mut participant.control, v1::client_frame::Frame::Hello(hello));
    }

    /// The connection of a participant ended, or could not be opened.
    pub fn closed(&mut self, member: usize, cause: &str) {
        let closing = self.is_closing();
        let participant = &mut self.members[member];
        // Closed by the harness at its end, the client counts as one that stayed.
        if !closing && !matches!(participant.state, State::Offline | State::Greeting) {
            self.history.session_lost(participant.client);
        }
        participant.state = State::Offline;
        if !closing {
            *self.statistics.disconnects.entry(cause.to_owned()).or_default() += 1;
        }
    }

    /// The conversations of the participants, each with a user who may read it.
    pub fn readers(&self) -> BTreeMap<ConversationId, String> {
        let lanes = self.members.iter().flat_map(|member| member.lanes.iter().map(move |lane| (lane, &member.user)));
        lanes.filter_map(|(lane, user)| Some((lane.conversation?, user.clone()))).collect()
    }

    /// Whether a participant is one of those who stop reading.
    pub fn will_stall(&self, member: usize) -> bool {
        self.members[member].stalls
    }

    /// Whether a participant stopped reading for good.
    pub fn is_stalled(&self, member: usize) -> bool {
        self.members[member].stalled
    }

    /// Whether a participant's connection is to be opened again.
    pub fn is_closing(&self) -> bool {
        self.switches.closing.load(Ordering::Relaxed)
    }

    fn wake_at(&mut self, at: Micros, member: usize) {
        self.timers.insert((at, member));
    }

    /// Tells the controller how far this thread is.
    fn publish(&mut self, now: Micros) {
        let live = self.members.iter().filter(|member| member.state == State::Live && !member.stalled).count() as u64;
        let unsettled = self.members.iter().map(|member| member.unsettled(&self.flows)).sum();
        let stalled = self.members.iter().map(|member| member.stalled(now)).sum();
        let (acknowledged, delivered) = self.history.counts();
        let add = |total: &AtomicU64, published: &mut u64, now: u64| {
            total.fetch_add(now.wrapping_sub(*published), Ordering::Relaxed);
            *published = now;
        };
        add(&self.progress.live, &mut self.published.live, live);
        add(&self.progress.stalled, &mut self.published.stalled, stalled);
        add(&self.progress.unsettled, &mut self.published.unsettled, unsettled);
        add(&self.progress.acknowledged, &mut self.published.acknowledged, acknowledged);
        add(&self.progress.delivered, &mut self.published.delivered, delivered);
        add(&self.progress.heartbeats, &mut self.published.heartbeats, self.statistics.heartbeats);
    }

    /// Open loop: hands the sends that are due by now to their lanes.
    fn release_due(&mut self, now: Micros, wake: &mut Vec<usize>) {
        while let Some(&(at, index)) = self.due.first()
            && at <= now
        {
            self.due.pop_first();
            let Scheduled { member, lane, every, next } = &mut self.schedule[index];
            if let Some(due) =
                self.members[*member].lanes[*lane].sending.as_mut().and_then(|sending| sending.due.as_mut())
            {
                due.push_back(at);
            }
            wake.push(*member);
            *next += *every;
            self.due.insert((*next as Micros, index));
        }
    }

    fn sending_switched(&mut self, sending: bool, now: Micros, wake: &mut Vec<usize>) {
        self.sending = sending;
        if sending {
            self.schedule.iter_mut().for_each(|scheduled| scheduled.next += now as f64);
            self.due = self.schedule.iter().enumerate().map(|(index, lane)| (lane.next as Micros, index)).collect();
            wake.extend(0..self.members.len());
            for member in self.members.iter_mut().filter(|member| member.stalls) {
                member.stalled = true;
                // Whoever does not read is owed nothing.
                member.lanes.iter().filter_map(|lane| lane.view).for_each(|view| self.history.unfollows(view));
            }
        } else {
            self.statistics.held_up += self.members.iter_mut().map(|member| member.sending_ends(now)).sum::<u64>();
            wake.extend(0..self.members.len());
        }
    }
}

/// The pause before a call is repeated that failed so often before. Spread by the participant's place instead of by chance.
fn pause(failures: u32, status: &v1::Status, member: usize) -> Micros {
    let half = (RETRY << failures.min(8)).min(RETRY_MAX) / 2;
    (half + half * (member as u64 % 64) / 64).max(Micros::from(status.retry_after_ms) * 1000)
}

impl Participant {
    fn new(user: String, token: String, client: Client, lanes: Vec<Lane>) -> Self {
        Self {
            user,
            token,
            client,
            state: State::Offline,
            sessions: 0,
            lanes,
            control: Vec::new(),
            calls: BTreeMap::new(),
            next_request: 1,
            sync_at: None,
            sync_page: bytes::Bytes::new(),
            sync_failures: 0,
            heartbeat: HEARTBEAT,
            written_at: 0,
            beat_at: Micros::MAX,
            close: false,
            stalls: false,
            stalled: false,
            reading: None,
        }
    }

    /// Its conversations that wait for an ack for long.
    fn stalled(&self, now: Micros) -> u64 {
        let oldest = self.lanes.iter().filter_map(|lane| lane.sending.as_ref()?.waits_since());
        oldest.filter(|since| since + STALLED_AFTER < now).count() as u64
    }

    /// What this participant still waits for.
    fn unsettled(&self, flows: &[Flow]) -> u64 {
        if self.stalled {
            return 0;
        }
        let own = u64::from(self.state != State::Live) + u64::from(self.sync_at.is_some()) + self.calls.len() as u64;
        let lanes = self.lanes.iter().map(|lane| {
            let on_their_way = lane.sending.as_ref().map_or(0, |sending| {
                let flow = flows.get(usize::try_from(sending.flow).unwrap_or(usize::MAX));
                let due = sending.due.as_ref().map_or(0, VecDeque::len);
                flow.map_or(0, Flow::in_flight).max(sending.pending.len() as u64) + due as u64
            });
            on_their_way + lane.ahead.len() as u64 + u64::from(lane.catch_up_to > lane.have)
        });
        own + lanes.sum::<u64>()
    }
}

impl driver::Crowd for Participants {
    fn frame(&mut self, member: usize, payload: &[u8], now: Micros) {
        self.receive(member, payload, now);
    }

    fn reads(&self, member: usize) -> bool {
        !self.members[member].stalled
    }

    fn fill(&mut self, member: usize, out: &mut Vec<u8>, now: Micros) {
        self.write(member, out, now);
        if !out.is_empty() {
            self.members[member].written_at = now;
        }
    }

    fn wants_close(&self, member: usize) -> bool {
        self.members[member].close || self.is_closing()
    }

    fn tick(&mut self, now: Micros, wake: &mut Vec<usize>) {
        let sending = self.switches.sending.load(Ordering::Relaxed);
        self.statistics.measured |= self.switches.measuring.load(Ordering::Relaxed);
        if sending != self.sending {
            self.sending_switched(sending, now, wake);
        }
        if sending {
            self.release_due(now, wake);
        }
        while let Some(&(at, member)) = self.timers.first()
            && at <= now
        {
            self.timers.pop_first();
            self.timer(member, now);
            wake.push(member);
        }
        if self.is_closing() {
            wake.extend(0..self.members.len());
        }
        if now >= self.publish_at {
            self.publish_at = now + PUBLISH_EVERY;
            self.publish(now);
        }
    }

    fn waker(&mut self, member: usize, waker: &Waker) {
        for lane in &self.members[member].lanes {
            if let Some(sending) = &lane.sending {
                self.flows[usize::try_from(sending.flow).unwrap_or(0)].waker.register(waker);
            }
        }
    }
}

#[cfg(test)]
mod tests;
