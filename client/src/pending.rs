//! Sends that are not acknowledged yet: one lane per conversation, which keeps the order of the calls.
//!
//! Invariants:
//! - A lane's sends have tries in flight from its oldest on, without a hole, and at most one try each. `after` of a try names the
//!   send before it in the lane, if there is one.
//! - When the server wants a send tried again, the lane waits until all its tries are answered, then starts again with its oldest
//!   and an empty `after`: an answer can never be mistaken for that of an earlier try.
//! - `known_seq` of a send is fixed by its first try; only a completed search (`sync first`) sets it anew.
//!
//! It does no I/O and reads no clock.

mod search;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use im_proto::{ConversationId, StatusCode, Timestamp, UserId, v1};
use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::Instant,
};

use crate::{
    client::Sent,
    config::{Backoff, Target},
    error::{ClosedReason, SendError, Status},
    event::Entry,
};

/// Waiting times of a lane whose send is to be tried again later.
const RETRY: Backoff = Backoff { base: Duration::from_millis(50), max: Duration::from_secs(2) };
/// After so many `out of order` in a row without progress the lane waits before it tries again.
const PROMPT_RETRIES: u32 = 3;
/// `internal` may go away or not; after so many in a row it counts as a refusal.
const INTERNAL_RETRIES: u32 = 8;

/// Where the outcome of a send goes. The permit is the send's place in the window.
pub(crate) struct Answer {
    pub(crate) reply: oneshot::Sender<Result<Sent, SendError>>,
    pub(crate) permit: Option<OwnedSemaphorePermit>,
}

impl Answer {
    fn give(self, outcome: Result<Sent, SendError>) {
        drop(self.permit);
        // The caller may have lost interest.
        let _ = self.reply.send(outcome);
    }
}

pub(crate) use search::SearchWanted;

pub(crate) type LaneId = u64;

struct Pending {
    lane: LaneId,
    client_message_id: Bytes,
    body: Bytes,
    /// Set by the first try.
    known_seq: Option<u64>,
    in_flight: bool,
    answer: Answer,
}

struct Lane {
    target: Target,
    /// Numbers of its sends, oldest first.
    order: VecDeque<u64>,
    /// How many of them, from the oldest on, have been tried since the lane last started.
    tried: usize,
    /// How many of those are not answered.
    in_flight: usize,
    state: LaneState,
    /// Retries without an acknowledgement between them.
    retries: u32,
}

enum LaneState {
    Open,
    /// To be tried again once all tries are answered.
    Settling {
        delay: Duration,
        search: bool,
    },
    Waiting(Instant),
    Searching,
}

/// What became of an answer.
pub(crate) enum Outcome {
    Stored(Box<Stored>),
    /// Nothing for the caller to do.
    Nothing,
}

/// A durable send: what the event stream needs to show it as the log has it.
pub(crate) struct Stored {
    pub(crate) conversation: ConversationId,
    /// As it was addressed.
    pub(crate) target: Target,
    pub(crate) seq: u64,
    pub(crate) sent_at: Timestamp,
    pub(crate) client_message_id: Bytes,
    pub(crate) body: Bytes,
}

impl Stored {
    /// The entry as the server's log has it.
    pub(crate) fn into_entry(self, me: UserId) -> Entry {
        Entry {
            conversation: self.conversation,
            seq: self.seq,
            sender: Some(me),
            sent_at: self.sent_at,
            client_message_id: self.client_message_id,
            flags: im_proto::body::names(&self.body).flags(),
            body: self.body,
            kind: v1::EntryKind::Message,
            own: true,
            gone_reason: 0,
        }
    }
}

pub(crate) struct Sends {
    /// The first half of all client message ids of this client; the second is the number of the send.
    id_prefix: u64,
    next_number: u64,
    next_lane: LaneId,
    pending: BTreeMap<u64, Pending>,
    lanes: BTreeMap<LaneId, Lane>,
    by_target: BTreeMap<Target, LaneId>,
    /// Lanes that may try, by the number of the send that is next.
    runnable: BTreeSet<(u64, LaneId)>,
    waiting: BTreeSet<(Instant, LaneId)>,
    searches: VecDeque<LaneId>,
    in_flight: usize,
    /// When tries were last known to get on: an answer came, or the first of them was made.
    progress: Option<Instant>,
}

impl Sends {
    pub(crate) fn new(id_prefix: u64) -> Self {
        Self {
            id_prefix,
            next_number: 1,
            next_lane: 1,
            pending: BTreeMap::new(),
            lanes: BTreeMap::new(),
            by_target: BTreeMap::new(),
            runnable: BTreeSet::new(),
            waiting: BTreeSet::new(),
            searches: VecDeque::new(),
            in_flight: 0,
            progress: None,
        }
    }

    /// Takes a send over. `target` is as canonical as is known now.
    pub(crate) fn push(&mut self, target: Target, body: Bytes, answer: Answer) {
        let number = self.next_number;
        self.next_number += 1;
        let lane_id = self.lane_of(target);
        let client_message_id = self.client_message_id(number);
        let send = Pending { lane: lane_id, client_message_id, body, known_seq: None, in_flight: false, answer };
        self.pending.insert(number, send);
        if let Some(lane) = self.lanes.get_mut(&lane_id) {
            lane.order.push_back(number);
        }
        self.judge(lane_id);
    }

    fn lane_of(&mut self, target: Target) -> LaneId {
        let Self { by_target, lanes, next_lane, .. } = self;
        *by_target.entry(target).or_insert_with_key(|target| {
            let id = *next_lane;
            *next_lane += 1;
            let lane = Lane {
                target: target.clone(),
                order: VecDeque::new(),
                tried: 0,
                in_flight: 0,
                state: LaneState::Open,
                retries: 0,
            };
            lanes.insert(id, lane);
            id
        })
    }

    fn client_message_id(&self, number: u64) -> Bytes {
        let mut id = BytesMut::with_capacity(16);
        id.put_u64(self.id_prefix);
        id.put_u64(number);
        id.freeze()
    }

    fn number_of(&self, client_message_id: &[u8]) -> Option<u64> {
        let (prefix, number) = client_message_id.split_first_chunk::<8>()?;
        let number = u64::from_be_bytes(number.try_into().ok()?);
        (u64::from_be_bytes(*prefix) == self.id_prefix).then_some(number)
    }

    /// Puts a lane where its state says.
    fn judge(&mut self, lane_id: LaneId) {
        let Some(lane) = self.lanes.get(&lane_id) else { return };
        if lane.order.is_empty() {
            self.by_target.remove(&lane.target);
            self.lanes.remove(&lane_id);
            return;
        }
        if let (LaneState::Open, Some(next)) = (&lane.state, lane.order.get(lane.tried)) {
            self.runnable.insert((*next, lane_id));
        }
    }

    /// The next try, if the window of the session has room. `known_head` names the highest seq known to exist.
    pub(crate) fn next_try(
        &mut self,
        window: usize,
        now: Instant,
        known_head: impl FnOnce(&Target) -> u64,
    ) -> Option<v1::Send> {
        if self.in_flight >= window {
            return None;
        }
        let (number, lane_id) = self.runnable.pop_first()?;
        let lane = self.lanes.get_mut(&lane_id)?;
        let after = match lane.tried.checked_sub(1).and_then(|previous| lane.order.get(previous)) {
            Some(previous) => self.pending.get(previous).map(|send| send.client_message_id.clone()).unwrap_or_default(),
            None => Bytes::new(),
        };
        let send = self.pending.get_mut(&number)?;
        let frame = v1::Send {
            client_message_id: send.client_message_id.clone(),
            body: send.body.clone(),
            after,
            known_seq: *send.known_seq.get_or_insert_with(|| known_head(&lane.target)),
            target: match &lane.target {
                Target::Conversation(conversation) => Some(v1::send::Target::ConversationId(conversation.to_bytes())),
                Target::Peer(user) => Some(v1::send::Target::PeerUserId(user.as_str().to_owned())),
                // Resolved when the session began.
                Target::Me => None,
            },
        };
        send.in_flight = true;
        lane.tried += 1;
        lane.in_flight += 1;
        if self.in_flight == 0 {
            self.progress = Some(now);
        }
        self.in_flight += 1;
        self.judge(lane_id);
        Some(frame)
    }

    /// An answer of the server. One for a send that is not pending any more is ignored.
    pub(crate) fn answered(&mut self, ack: v1::SendAck, now: Instant) -> Outcome {
        let Some(number) = self.number_of(&ack.client_message_id) else { return Outcome::Nothing };
        let Some(send) = self.pending.get_mut(&number) else { return Outcome::Nothing };
        if !std::mem::take(&mut send.in_flight) {
            return Outcome::Nothing;
        }
        let lane_id = send.lane;
        self.in_flight -= 1;
        self.progress = Some(now);
        let Some(lane) = self.lanes.get_mut(&lane_id) else { return Outcome::Nothing };
        lane.in_flight -= 1;
        let outcome = match Status::from_wire(ack.status) {
            None => match ConversationId::from_slice(&ack.conversation_id) {
                Ok(conversation) => {
                    lane.retries = 0;
                    self.stored(number, conversation, ack.seq, Timestamp::from_millis(ack.sent_at_ms))
                }
                Err(_) => {
                    self.retry(lane_id, &Status::from_code(StatusCode::Internal));
                    Outcome::Nothing
                }
            },
            Some(status) if self.may_retry(lane_id, &status) => {
                self.retry(lane_id, &status);
                Outcome::Nothing
            }
            Some(status) => {
                if let Some((_, send)) = self.take(number) {
                    send.answer.give(Err(SendError::Refused(status)));
                }
                Outcome::Nothing
            }
        };
        self.settle(lane_id, now);
        outcome
    }

    fn may_retry(&self, lane_id: LaneId, status: &Status) -> bool {
        match status.code {
            Some(StatusCode::OutOfOrder | StatusCode::SyncFirst) => true,
            Some(StatusCode::Internal) => self.lanes.get(&lane_id).is_some_and(|lane| lane.retries < INTERNAL_RETRIES),
            _ => status.is_transient(),
        }
    }

    /// The lane has to start again: notes when and how.
    fn retry(&mut self, lane_id: LaneId, status: &Status) {
        let Some(lane) = self.lanes.get_mut(&lane_id) else { return };
        if let Some(next) = lane.order.get(lane.tried) {
            self.runnable.remove(&(*next, lane_id));
        }
        let (wanted, wants_search) = match status.code {
            Some(StatusCode::SyncFirst) => (Duration::ZERO, true),
            Some(StatusCode::OutOfOrder) if lane.retries < PROMPT_RETRIES => (Duration::ZERO, false),
            // Jitter is not needed here: the server's limits are per user and per conversation.
            _ => {
                let own = RETRY.base.saturating_mul(1 << lane.retries.min(16)).min(RETRY.max);
                (status.retry_after.max(own), false)
            }
        };
        lane.state = match lane.state {
            LaneState::Settling { delay, search } => {
                LaneState::Settling { delay: delay.max(wanted), search: search || wants_search }
            }
            _ => {
                lane.retries += 1;
                LaneState::Settling { delay: wanted, search: wants_search }
            }
        };
    }

    /// Starts a lane again that wants to and has no try in flight.
    fn settle(&mut self, lane_id: LaneId, now: Instant) {
        let Some(lane) = self.lanes.get_mut(&lane_id) else { return };
        if let (LaneState::Settling { delay, search }, 0) = (&lane.state, lane.in_flight) {
            lane.tried = 0;
            if *search {
                lane.state = LaneState::Searching;
                self.searches.push_back(lane_id);
            } else if delay.is_zero() {
                lane.state = LaneState::Open;
            } else {
                let until = now + *delay;
                lane.state = LaneState::Waiting(until);
                self.waiting.insert((until, lane_id));
            }
        }
        self.judge(lane_id);
    }

    fn stored(&mut self, number: u64, conversation: ConversationId, seq: u64, sent_at: Timestamp) -> Outcome {
        let Some((target, send)) = self.take(number) else { return Outcome::Nothing };
        let Pending { client_message_id, body, answer, .. } = send;
        answer.give(Ok(Sent { conversation, seq, sent_at }));
        Outcome::Stored(Box::new(Stored { conversation, target, seq, sent_at, client_message_id, body }))
    }

    /// Removes a send that has its answer.
    fn take(&mut self, number: u64) -> Option<(Target, Pending)> {
        let send = self.pending.remove(&number)?;
        let lane = self.lanes.get_mut(&send.lane)?;
        // Answers mostly come in order, so that this is the front.
        let place = lane.order.iter().position(|other| *other == number)?;
        lane.order.remove(place);
        if place < lane.tried {
            lane.tried -= 1;
        }
        Some((lane.target.clone(), send))
    }

    /// Opens the lanes whose waiting time is over.
    pub(crate) fn wake(&mut self, now: Instant) {
        while let Some((until, lane_id)) = self.waiting.first().copied().filter(|(until, _)| *until <= now) {
            self.waiting.pop_first();
            if let Some(lane) = self.lanes.get_mut(&lane_id)
                && matches!(lane.state, LaneState::Waiting(time) if time == until)
            {
                lane.state = LaneState::Open;
                self.judge(lane_id);
            }
        }
    }

    /// When [`Self::wake`] has something to do.
    pub(crate) fn next_wake(&self) -> Option<Instant> {
        self.waiting.first().map(|(until, _)| *until)
    }

    /// Since when answers are due and none came.
    pub(crate) fn stalled_since(&self) -> Option<Instant> {
        self.progress.filter(|_| self.in_flight > 0)
    }

    /// Tries without an answer.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The session ended: what was tried is tried again, from the oldest of each lane.
    pub(crate) fn disconnected(&mut self) {
        self.pending.values_mut().for_each(|send| send.in_flight = false);
        self.in_flight = 0;
        self.runnable.clear();
        self.searches.clear();
        let lanes: Vec<LaneId> = self.lanes.keys().copied().collect();
        for lane_id in lanes {
            if let Some(lane) = self.lanes.get_mut(&lane_id) {
                lane.tried = 0;
                lane.in_flight = 0;
                if !matches!(lane.state, LaneState::Waiting(_)) {
                    lane.state = LaneState::Open;
                }
            }
            self.judge(lane_id);
        }
    }

    /// What was addressed as `from` is this conversation: from now on one lane.
    pub(crate) fn alias(&mut self, from: &Target, to: ConversationId, now: Instant) {
        let Some(moving) = self.by_target.remove(from) else { return };
        let to = Target::Conversation(to);
        let Some(staying) = self.by_target.get(&to).copied() else {
            if let Some(lane) = self.lanes.get_mut(&moving) {
                lane.target = to.clone();
                self.by_target.insert(to, moving);
            }
            return;
        };
        let Some(moved) = self.lanes.remove(&moving) else { return };
        if let Some(next) = moved.order.get(moved.tried) {
            self.runnable.remove(&(*next, moving));
        }
        for number in &moved.order {
            if let Some(send) = self.pending.get_mut(number) {
                send.lane = staying;
            }
        }
        let Some(lane) = self.lanes.get_mut(&staying) else { return };
        if let Some(next) = lane.order.get(lane.tried) {
            self.runnable.remove(&(*next, staying));
        }
        lane.order.extend(moved.order);
        lane.order.make_contiguous().sort_unstable();
        lane.in_flight += moved.in_flight;
        lane.tried = 0;
        lane.state = LaneState::Settling { delay: Duration::ZERO, search: false };
        self.settle(staying, now);
    }

    /// The client has ended: nobody will answer.
    pub(crate) fn close(&mut self, reason: &ClosedReason) {
        self.lanes.clear();
        self.by_target.clear();
        self.runnable.clear();
        for (_, send) in std::mem::take(&mut self.pending) {
            send.answer.give(Err(SendError::Closed(reason.clone())));
        }
    }
}
