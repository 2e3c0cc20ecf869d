//! Repeated sends and predecessors that memory does not reach: they are looked for in the log, as far as that is bounded, at the
//! cost of who sent them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use im_proto::{ConversationId, StatusCode, UserId, limits};
use im_storage::{StoreError, Table};
use prost::Message as _;
use tokio::time::Instant;

use super::{
    Context, Worker, commit,
    waiting::{Request, SendAnswer, SendRequest, Slot},
};
use crate::{
    caller::Caller,
    conversation::{Completion, Conversation, Dedupe, ReplyKind, Seen},
    deadline::StoreCalls,
    message::unavailable,
    state::MemberValue,
};

/// Entries of one read of a scan.
const SCAN_ENTRIES: u64 = 4096;
/// Entries that a user's sends may make the owner look through at once: two scans of the longest kind.
const SCAN_BURST: u64 = 2 * limits::DEDUPE_SCAN_ENTRIES_MAX;
/// Entries a second by which that comes back: a longest scan every four seconds.
const SCAN_REFILL: u64 = limits::DEDUPE_SCAN_ENTRIES_MAX / 4;

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
            return Err(Duration::from_secs((after - SCAN_BURST).div_ceil(SCAN_REFILL)));
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
    let seconds = now.saturating_duration_since(at).as_secs();
    spent.saturating_sub(seconds.saturating_mul(SCAN_REFILL))
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
            let status = StatusCode::PreconditionFailed.to_status();
            return self.answer_send(conversation, &caller, send.client_message_id, answer, status);
        }
        let completion = match answer {
            SendAnswer::Session => Completion::Ack { caller, client_message_id: send.client_message_id },
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
            let body_hash = Dedupe::body_hash(&row.body);
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
        send: SendRequest,
        answer: SendAnswer,
    ) {
        let (from, to) = (send.known_seq + 1, conversation.dedupe.floor);
        if to - send.known_seq > limits::DEDUPE_SCAN_ENTRIES_MAX {
            let status = StatusCode::SyncFirst.to_status();
            return self.answer_send(conversation, &caller, send.client_message_id, answer, status);
        }
        if let Err(wait) = self.scans.charge(&caller.user, to - send.known_seq, self.now()) {
            let status = StatusCode::RateLimited.retry_after(wait);
            return self.answer_send(conversation, &caller, send.client_message_id, answer, status);
        }
        let (store, id) = (self.store.clone(), conversation.id);
        let (user, wanted) = (caller.user.clone(), send.client_message_id.clone());
        let read = async move { find(&store, id, from, to, &user, &wanted).await };
        self.then(read, move |worker, outcome| worker.scanned(id, caller, send, answer, to, outcome));
    }

    /// Who is not in the group now may have sent this before: only if the user has ever been a member the log is looked through.
    pub fn scan_for_former(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        send: SendRequest,
        answer: SendAnswer,
    ) {
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
                // The floor may have moved meanwhile; it only moves up.
                Ok(true) => context.scan(conversation, caller, send, answer),
                Ok(false) => context.refuse_send(conversation, caller, send, answer),
                Err(_) => {
                    context.answer_send(conversation, &caller, send.client_message_id, answer, unavailable());
                }
            }
        });
    }

    /// `after` names a send that memory does not know: it is in the log below what memory reaches, or it never came.
    pub fn seek_predecessor(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        send: SendRequest,
        answer: SendAnswer,
    ) {
        let to = conversation.dedupe.floor;
        let lowest = to.saturating_sub(limits::DEDUPE_SCAN_ENTRIES_MAX);
        let from = lowest.max(send.sought_through).max(conversation.first_seq.saturating_sub(1)) + 1;
        if from > to {
            let status = StatusCode::OutOfOrder.to_status();
            return self.answer_send(conversation, &caller, send.client_message_id, answer, status);
        }
        if let Err(wait) = self.scans.charge(&caller.user, to - from + 1, self.now()) {
            let status = StatusCode::RateLimited.retry_after(wait);
            return self.answer_send(conversation, &caller, send.client_message_id, answer, status);
        }
        let (store, id) = (self.store.clone(), conversation.id);
        let (user, wanted) = (caller.user.clone(), send.after.clone());
        let read = async move { find(&store, id, from, to, &user, &wanted).await };
        self.then(read, move |worker, outcome| worker.sought(id, caller, send, answer, to, outcome));
    }
}

/// The seq under which a user sent a client message id, the newest entries first.
async fn find(
    store: &StoreCalls,
    id: ConversationId,
    from: u64,
    to: u64,
    user: &UserId,
    wanted: &[u8],
) -> Result<Option<u64>, StoreError> {
    let mut high = to;
    while high >= from {
        let low = from.max((high + 1).saturating_sub(SCAN_ENTRIES));
        let keys = store.read_keys(id, low, high).await?;
        let found = keys.iter().find(|key| key.sender.as_ref() == Some(user) && key.client_message_id == wanted);
        if let Some(key) = found {
            return Ok(Some(key.seq));
        }
        high = low - 1;
    }
    Ok(None)
}

impl Worker {
    fn scanned(
        &mut self,
        id: ConversationId,
        caller: Arc<Caller>,
        mut send: SendRequest,
        answer: SendAnswer,
        scanned_to: u64,
        outcome: Result<Option<u64>, StoreError>,
    ) {
        let Some(Slot::Open(conversation)) = self.conversations.get_mut(&id) else {
            return self.request(id, Request::Send { caller, send, answer });
        };
        match outcome {
            Ok(Some(seq)) => {
                let seen = Seen { seq, sent_at: conversation.last_sent_at, body_hash: None };
                self.context.repeated(conversation, caller, send, answer, seen);
            }
            Ok(None) => {
                // Everything up to here was looked at; what came after is in the map, unless the map moved on meanwhile.
                send.known_seq = scanned_to;
                self.context.send(conversation, caller, send, answer);
            }
            Err(_) => {
                let id = send.client_message_id;
                self.context.answer_send(conversation, &caller, id, answer, unavailable());
            }
        }
    }

    fn sought(
        &mut self,
        id: ConversationId,
        caller: Arc<Caller>,
        mut send: SendRequest,
        answer: SendAnswer,
        sought_through: u64,
        outcome: Result<Option<u64>, StoreError>,
    ) {
        let Some(Slot::Open(conversation)) = self.conversations.get_mut(&id) else {
            return self.request(id, Request::Send { caller, send, answer });
        };
        match outcome {
            Ok(found) => {
                if found.is_some() {
                    // It is committed, and stays so.
                    send.after = bytes::Bytes::new();
                }
                send.sought_through = sought_through;
                self.context.send(conversation, caller, send, answer);
            }
            Err(_) => {
                let id = send.client_message_id;
                self.context.answer_send(conversation, &caller, id, answer, unavailable());
            }
        }
    }
}
