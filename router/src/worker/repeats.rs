//! Repeated sends and predecessors that memory does not reach: they are looked for in the log, as far as that is bounded, at the
//! cost of who sent them.
//!
//! What was read stays for a while: a client that comes back repeats all that it has not seen acknowledged, and one reading answers
//! for all of it. One reading at a time runs for a conversation; sends that need another wait in their order.

mod log;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use im_proto::{StatusCode, UserId, limits};
use im_storage::{StoreError, Table};
use prost::Message as _;
use tokio::time::Instant;

use self::log::{Known, RefusedIds, SenderLog};
use super::{
    Context, commit,
    waiting::{Request, SendAnswer, SendRequest, Slot},
};
use crate::{
    caller::Caller,
    conversation::{Completion, Conversation, Dedupe, ReplyKind, Seen},
    message::{overloaded, unavailable},
    state::MemberValue,
};

/// Entries that a user's sends may make the owner look through at once: two scans of the longest kind.
const SCAN_BURST: u64 = 2 * limits::DEDUPE_SCAN_ENTRIES_MAX;
/// Entries a second by which that comes back: a longest scan every four seconds.
const SCAN_REFILL: u64 = limits::DEDUPE_SCAN_ENTRIES_MAX / 4;

/// How long what was read is kept at least: while a client comes back.
const LOOKUPS_KEPT: Duration = Duration::from_secs(10);

/// What users have spent on scans lately.
#[derive(Default)]
pub struct ScanBudgets {
    /// Entries spent, as of a moment. Who has spent nothing is not in it.
    spent: BTreeMap<UserId, (u64, Instant)>,
}

impl ScanBudgets {
    /// Takes entries from a user's budget; tells how long to wait if there are not enough.
    fn charge(&mut self, user: &UserId, entries: u64, now: Instant) -> Result<(), Duration> {
        let spent = self.spent.get(user).map_or(0, |spent| left_over(*spent, now));
        let after = spent.saturating_add(entries);
        if after > SCAN_BURST {
            return Err(Duration::from_millis((after - SCAN_BURST).saturating_mul(1000).div_ceil(SCAN_REFILL)));
        }
        self.spent.insert(user.clone(), (after, now));
        Ok(())
    }

    /// Forgets those whose budgets are whole again.
    pub fn sweep(&mut self, now: Instant) {
        self.spent.retain(|_, spent| left_over(*spent, now) > 0);
    }
}

fn left_over((spent, at): (u64, Instant), now: Instant) -> u64 {
    let millis = u64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX);
    spent.saturating_sub(millis.saturating_mul(SCAN_REFILL) / 1000)
}

/// What an owner has looked up of a conversation's log for its senders. Not there for most.
#[derive(Debug, Default)]
pub struct Lookups {
    /// Of the sender who was looked for last.
    log: Option<SenderLog>,
    running: bool,
    /// Sends that need a reading while one runs.
    waiting: VecDeque<(Arc<Caller>, SendRequest, SendAnswer)>,
    refused: RefusedIds,
    used: Option<Instant>,
}

impl Lookups {
    /// What waits, when the conversation is closed.
    pub fn into_waiting(self) -> impl Iterator<Item = Request> {
        self.waiting.into_iter().map(|(caller, send, answer)| Request::Send { caller, send, answer })
    }
}

impl Context {
    /// A client message id that was seen before: the same answer, once that entry is committed; another body is refused.
    pub fn repeated(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        send: SendRequest,
        answer: SendAnswer,
        seen: Seen,
    ) {
        self.cluster.metrics.sends_repeated.increment(1);
        let Some(body_hash) = seen.body_hash else {
            return self.read_repeated(conversation, caller, send, answer, seen);
        };
        if body_hash != Dedupe::body_hash(&send.body) {
            if seen.seq > conversation.committed {
                // What is not committed may yet be nothing.
                let again = Completion::Again(Box::new(Request::Send { caller, send, answer }));
                return conversation.waiters.entry(seen.seq).or_default().push(again);
            }
            let status = StatusCode::PreconditionFailed.to_status();
            return self.answer_send(conversation, &caller, send.client_message_id, answer, status);
        }
        self.is_stored(conversation, Dedupe::key(&caller.user, &send.client_message_id));
        let completion = match answer {
            SendAnswer::Session { attempt } => {
                Completion::Ack { caller, client_message_id: send.client_message_id, attempt }
            }
            SendAnswer::Reply(reply_to) => Completion::Reply { reply_to, kind: ReplyKind::Send },
        };
        if seen.seq > conversation.committed {
            conversation.waiters.entry(seen.seq).or_default().push(completion);
        } else {
            commit::complete_at(self, &conversation.id, seen.seq, seen.sent_at, completion);
        }
    }

    /// The entry was read back without its body: read it whole, then compare.
    fn read_repeated(
        &mut self,
        conversation: &Conversation,
        caller: Arc<Caller>,
        send: SendRequest,
        answer: SendAnswer,
        seen: Seen,
    ) {
        let (store, id) = (self.store.clone(), conversation.id);
        let read = async move { store.read_range(id, seen.seq, seen.seq, 1).await };
        self.then(read, move |worker, outcome| {
            let row = outcome.ok().and_then(|rows| rows.into_iter().next()).map(|stored| stored.row);
            let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id) else {
                return worker.request(id, Request::Send { caller, send, answer });
            };
            let Some(row) = row else { return worker.context.give_back(id, Request::Send { caller, send, answer }) };
            let body_hash = Dedupe::print(&row);
            let key = Dedupe::key(&caller.user, &send.client_message_id);
            conversation.dedupe.set_body_hash(key, body_hash, row.sent_at);
            let seen = Seen { seq: row.seq, sent_at: row.sent_at, body_hash: Some(body_hash) };
            worker.context.repeated(conversation, caller, send, answer, seen);
        });
    }

    /// The map of client message ids does not reach down to what the client knew: look into the log, or let the client look.
    pub fn scan(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        mut send: SendRequest,
        answer: SendAnswer,
    ) {
        let (known_seq, floor) = (send.known_seq, conversation.dedupe.floor);
        if floor - known_seq > limits::DEDUPE_SCAN_ENTRIES_MAX {
            let status = StatusCode::SyncFirst.to_status();
            return self.answer_send(conversation, &caller, send.client_message_id, answer, status);
        }
        match look_up(conversation, &caller.user, &send.client_message_id, known_seq + 1, floor) {
            Known::At(seq) => {
                let seen = Seen { seq, sent_at: conversation.last_sent_at, body_hash: None };
                self.repeated(conversation, caller, send, answer, seen);
            }
            Known::Absent => {
                // Everything up to here was looked at; what came after is in the map.
                send.known_seq = floor;
                self.send(conversation, caller, send, answer);
            }
            Known::Unread => self.read_log(conversation, caller, send, answer, known_seq + 1, false),
        }
    }

    /// `after` names a send that memory does not know: it is in the log below what memory reaches, or it never came.
    pub fn seek_predecessor(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        mut send: SendRequest,
        answer: SendAnswer,
    ) {
        let floor = conversation.dedupe.floor;
        let low = floor.saturating_sub(limits::DEDUPE_SCAN_ENTRIES_MAX).max(conversation.first_seq - 1) + 1;
        let key = Dedupe::key(&caller.user, &send.after);
        // One that was refused a moment ago has to come first in any case: then so do those behind it, a whole burst of them.
        let was_refused = conversation.lookups.as_ref().is_some_and(|lookups| lookups.refused.contains(key));
        let known = match was_refused || low > floor {
            true => Known::Absent,
            false => look_up(conversation, &caller.user, &send.after, low, floor),
        };
        match known {
            Known::At(_) => {
                // It is committed, and stays so.
                send.after = bytes::Bytes::new();
                self.send(conversation, caller, send, answer);
            }
            Known::Absent => {
                let status = StatusCode::OutOfOrder.to_status();
                self.answer_send(conversation, &caller, send.client_message_id, answer, status);
            }
            Known::Unread => self.read_log(conversation, caller, send, answer, low, true),
        }
    }

    /// Reads what is not known of the sender from `low` up to what memory has, then decides again. For a predecessor the newest entries
    /// come first, until it is found.
    fn read_log(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        send: SendRequest,
        answer: SendAnswer,
        low: u64,
        is_predecessor: bool,
    ) {
        let (id, floor) = (conversation.id, conversation.dedupe.floor);
        let (now, waits_max) = (self.now(), self.cluster.config.conversation_queue_max);
        let lookups = conversation.lookups.get_or_insert_default();
        if lookups.running {
            if lookups.waiting.len() >= waits_max {
                return self.answer_send(conversation, &caller, send.client_message_id, answer, overloaded());
            }
            return lookups.waiting.push_back((caller, send, answer));
        }
        let log =
            lookups.log.take().filter(|log| log.is_of(&caller.user)).unwrap_or_else(|| SenderLog::new(&caller.user));
        if let Err(wait) = self.scans.charge(&caller.user, log.unread(low, floor), now) {
            lookups.log = Some(log);
            let status = StatusCode::RateLimited.retry_after(wait);
            return self.answer_send(conversation, &caller, send.client_message_id, answer, status);
        }
        lookups.running = true;
        lookups.used = Some(now);
        let store = self.store.clone();
        let wanted = is_predecessor.then(|| send.after.clone());
        let read = async move { log.extend(&store, id, low, floor, wanted.as_ref()).await };
        self.then(read, move |worker, (log, outcome)| {
            let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id) else {
                return worker.request(id, Request::Send { caller, send, answer });
            };
            let lookups = conversation.lookups.get_or_insert_default();
            (lookups.log, lookups.running) = (Some(log), false);
            let waiting = std::mem::take(&mut lookups.waiting);
            let context = &mut worker.context;
            match outcome {
                Ok(()) => context.send(conversation, caller, send, answer),
                Err(_) => {
                    context.answer_send(conversation, &caller, send.client_message_id, answer, unavailable());
                }
            }
            for (caller, send, answer) in waiting {
                context.send(conversation, caller, send, answer);
            }
        });
    }

    /// Who is not in the group now may have sent this before: only if the user has ever been a member the log is looked through.
    pub fn scan_for_former(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        mut send: SendRequest,
        answer: SendAnswer,
    ) {
        if send.was_member {
            return self.scan(conversation, caller, send, answer);
        }
        let (store, id) = (self.store.clone(), conversation.id);
        let user = caller.user.clone();
        let read = async move {
            let row = store.read(Table::Members, id.as_bytes(), user.as_str().as_bytes()).await?;
            Ok::<_, StoreError>(row.and_then(|row| MemberValue::decode(row.value).ok()).is_some())
        };
        self.then(read, move |worker, outcome| {
            let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id) else {
                return worker.request(id, Request::Send { caller, send, answer });
            };
            let context = &mut worker.context;
            match outcome {
                Ok(true) => {
                    send.was_member = true;
                    context.send(conversation, caller, send, answer);
                }
                Ok(false) => context.refuse_send(conversation, caller, send, answer),
                Err(_) => {
                    context.answer_send(conversation, &caller, send.client_message_id, answer, unavailable());
                }
            }
        });
    }

    /// A send was refused, so its successors are out of order until it comes again.
    pub fn is_refused(&self, conversation: &mut Conversation, caller: &Caller, client_message_id: &[u8]) {
        let key = Dedupe::key(&caller.user, client_message_id);
        let now = self.now();
        let lookups = conversation.lookups.get_or_insert_default();
        lookups.refused.insert(key);
        lookups.used = Some(now);
    }

    /// It came again.
    pub fn is_stored(&self, conversation: &mut Conversation, key: u128) {
        if let Some(lookups) = &mut conversation.lookups {
            lookups.refused.remove(key);
        }
    }

    /// What was read is of use while a client comes back, and no longer.
    pub fn forget_lookups(&self, conversation: &mut Conversation) {
        let is_idle = |lookups: &mut Box<Lookups>| {
            let used_lately = lookups.used.is_some_and(|used| used.elapsed() < LOOKUPS_KEPT);
            !lookups.running && lookups.waiting.is_empty() && !used_lately
        };
        conversation.lookups.take_if(is_idle);
    }
}

/// What is known of a sender's client message id among the entries `low..=high`.
fn look_up(conversation: &Conversation, user: &UserId, wanted: &[u8], low: u64, high: u64) -> Known {
    let log = conversation.lookups.as_ref().and_then(|lookups| lookups.log.as_ref()).filter(|log| log.is_of(user));
    log.map_or(Known::Unread, |log| log.look_up(wanted, low, high))
}
