//! History: ranges of committed entries, read once for all who ask for the same range at the same time.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use im_proto::{ConversationId, StatusCode, limits, v1};
use im_storage::{StoreError, StoredRow};
use prost::Message as _;

use super::{Context, fan_out};
use crate::{
    caller::Caller,
    conversation::Conversation,
    deadline::StoreCalls,
    message::{Answer, AnswerValue, ReplyTo, unavailable},
};

/// A read that others may join.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ReadKey {
    conversation: ConversationId,
    from: u64,
    to: u64,
    /// Take the newest if not all fit.
    newest: bool,
    /// Of the moment when it began.
    head: u64,
    first_seq: u64,
    /// Not 0: nobody may join.
    alone: u64,
}

/// Reads under way, with all who wait for each.
#[derive(Default)]
pub struct Reads {
    waiting: BTreeMap<ReadKey, Vec<ReplyTo>>,
    /// Reads that nobody may join, so far.
    alone: u64,
}

impl Context {
    /// Answers a range of a conversation that the caller may read.
    pub fn history(
        &mut self,
        conversation: &Conversation,
        caller: &Caller,
        request: &v1::HistoryRequest,
        reply_to: ReplyTo,
    ) {
        if !conversation.may_read(&caller.user) {
            return self.answer_read(reply_to, Err(StatusCode::NotFound.to_status()));
        }
        let head = conversation.committed;
        let (from, to) = match range(request, conversation.first_seq, head) {
            Ok(Some(range)) => range,
            Ok(None) => {
                let reply = encode_reply(conversation.id, head, conversation.first_seq, &[]);
                return self.answer_read(reply_to, Ok(AnswerValue::Reply(reply)));
            }
            Err(status) => return self.cluster.answer(reply_to, Err(status.to_status())),
        };
        let (first_seq, newest) = (conversation.first_seq, request.newest);
        let mut key = ReadKey { alone: 0, conversation: conversation.id, from, to, newest, head, first_seq };
        // Past the lease deadline each needs a fence read that begins after it was asked for.
        if self.past_lease() {
            self.history.alone += 1;
            key.alone = self.history.alone;
        }
        if let Some(waiting) = self.history.waiting.get_mut(&key) {
            return waiting.push(reply_to);
        }
        self.history.waiting.insert(key, vec![reply_to]);
        self.read_history(key);
    }

    /// Answers from memory; past the lease deadline only after a fence read that begins now, because another owner may have gone on
    /// since. That there is nothing, or nothing more, is an answer like any other.
    pub fn answer_read(&self, reply_to: ReplyTo, answer: Answer) {
        if !self.past_lease() {
            return self.cluster.answer(reply_to, answer);
        }
        let (fence, cluster) = (self.fence.clone(), self.cluster.clone());
        self.cluster.environment.spawn(async move {
            let answer = if fence.clean().await { answer } else { Err(unavailable()) };
            cluster.answer(reply_to, answer);
        });
    }

    fn read_history(&self, key: ReadKey) {
        let (store, fence, past_lease) = (self.store.clone(), self.fence.clone(), self.past_lease());
        let read = async move {
            let rows = read_rows(&store, key).await?;
            if past_lease && !fence.clean().await {
                return Err(StoreError::Unconfirmed("the router has ended".to_owned()));
            }
            Ok(encode_reply(key.conversation, key.head, key.first_seq, &rows))
        };
        self.then(read, move |worker, outcome| {
            let waiting = worker.context.history.waiting.remove(&key).unwrap_or_default();
            let answer = match outcome {
                Ok(reply) => Ok(AnswerValue::Reply(reply)),
                Err(StoreError::Damaged(what)) => {
                    let correlation_id = worker.context.cluster.correlation_id();
                    worker.context.cluster.metrics.alarms.increment(1);
                    tracing::error!(conversation = %key.conversation, %correlation_id, what, "ALARM: history cannot be read");
                    Err(correlation_id.of(StatusCode::Internal.to_status()))
                }
                Err(_) => Err(unavailable()),
            };
            for reply_to in waiting {
                worker.context.cluster.answer(reply_to, answer.clone());
            }
        });
    }
}

/// The seqs to read, `None` if there are none. Nothing is allocated for a range however wide it is.
fn range(request: &v1::HistoryRequest, first_seq: u64, head: u64) -> Result<Option<(u64, u64)>, StatusCode> {
    let bound = |value: i64| u64::try_from(value).map_err(|_| StatusCode::Malformed);
    let (from, to) = (bound(request.from)?, bound(request.to)?);
    if to != 0 && from > to {
        return Err(StatusCode::Malformed);
    }
    let limit = match request.limit {
        0 => limits::HISTORY_ENTRIES_MAX,
        limit => limit.min(limits::HISTORY_ENTRIES_MAX),
    };
    let limit = u64::from(limit);
    let from = from.max(first_seq).max(1);
    let to = if to == 0 { head } else { to.min(head) };
    if from > to {
        return Ok(None);
    }
    if request.newest {
        Ok(Some((from.max((to + 1).saturating_sub(limit)), to)))
    } else {
        Ok(Some((from, to.min(from.saturating_add(limit - 1)))))
    }
}

/// An answer stays below the limit of what a link carries: long bodies shorten it, at least one read is in it.
const REPLY_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Rows of one read: at most 8 MiB of the longest bodies are in memory beyond the answer.
const READ_ROWS: u64 = 128;

/// Reads piece by piece, from the end that is wanted first, until all is there or the answer is full.
async fn read_rows(store: &StoreCalls, key: ReadKey) -> Result<Vec<StoredRow>, StoreError> {
    let mut pieces: VecDeque<Vec<StoredRow>> = VecDeque::new();
    let (mut from, mut to, mut bytes) = (key.from, key.to, 0);
    while from <= to && bytes < REPLY_BYTES_MAX {
        let low = if key.newest { from.max((to + 1).saturating_sub(READ_ROWS)) } else { from };
        let high = if key.newest { to } else { to.min(from + READ_ROWS - 1) };
        let count = usize::try_from(high - low + 1).unwrap_or(usize::MAX);
        let rows = store.read_range(key.conversation, low, high, count).await?;
        if rows.len() != count || rows.first().is_none_or(|row| row.row.seq != low) {
            return Err(StoreError::Damaged(format!(
                "entries of {low}..={high} are missing below the head {}",
                key.head
            )));
        }
        bytes += rows.iter().map(|row| row.row.bytes()).sum::<usize>();
        if key.newest {
            pieces.push_front(rows);
            to = low - 1;
        } else {
            pieces.push_back(rows);
            from = high + 1;
        }
    }
    Ok(pieces.into_iter().flatten().collect())
}

fn encode_reply(id: ConversationId, head: u64, first_seq: u64, rows: &[StoredRow]) -> Bytes {
    let conversation_id = id.to_bytes();
    let entries = rows
        .iter()
        .map(|stored| {
            let message = Some(fan_out::entry_message(conversation_id.clone(), &stored.row));
            v1::HistoryEntry { message, gone_reason: 0 }
        })
        .collect();
    v1::HistoryReply { conversation_id, entries, head, first_seq }.encode_to_vec().into()
}
