//! Group commit: one batch in flight a conversation; committed once the store confirmed it and a fence read that began afterwards
//! was clean. Only then is anything acknowledged, delivered or applied.

use std::{sync::Arc, time::Duration};

use im_proto::{ConversationId, Timestamp, body, limits, v1};
use im_storage::{AppendRequest, Batch, BucketId, Row, StateWrite, StoreError, Table};

use super::{
    Context, Worker, fan_out,
    waiting::{Request, Slot},
};
use crate::{
    caller::Caller,
    cluster::Ended,
    conversation::{Assigned, Busy, Completion, Conversation, Cursor, InFlight},
    message::{AnswerValue, unavailable},
    ownership::RaiseRequest,
    state::{self, Consequences},
    user_limits::Limited,
};

/// First pause before a batch is handed to the store again.
const RETRY_FIRST: Duration = Duration::from_millis(20);
/// Longest pause.
const RETRY_LONGEST: Duration = Duration::from_secs(1);

impl Worker {
    /// Forms a batch for each conversation that has assigned entries and none in flight.
    pub fn form_batches(&mut self) {
        let dirty = std::mem::take(&mut self.context.dirty);
        for id in dirty {
            let Some(Slot::Open(conversation)) = self.conversations.get_mut(&id) else { continue };
            conversation.dirty = false;
            if conversation.in_flight.is_some() || conversation.queue.is_empty() {
                continue;
            }
            self.context.form_batch(conversation);
        }
    }

    /// The store has answered for a batch. A token that is not known is that of an attempt that was given up.
    pub fn appended(&mut self, token: u64, result: Result<(), StoreError>) {
        let Some(id) = self.context.tokens.remove(&token) else { return };
        let Some(Slot::Open(conversation)) = self.conversations.get_mut(&id) else { return };
        let Some(in_flight) = conversation.in_flight.as_mut().filter(|in_flight| in_flight.token == token) else {
            return;
        };
        match result {
            Ok(()) => {
                in_flight.confirmed = true;
                self.context.await_fence(conversation);
            }
            Err(StoreError::Unconfirmed(reason)) => self.append_again(id, &reason),
            Err(error) => self.context.cluster.end(Ended::StoreStopped(error.to_string())),
        }
    }

    /// Batches that the store has not answered in time are not confirmed: a result that comes later is ignored, whatever it says.
    pub fn expire_appends(&mut self) {
        let now = self.context.now();
        while let Some((deadline, token)) = self.context.append_deadlines.front().copied() {
            let is_open = self.context.tokens.contains_key(&token);
            if is_open && deadline > now {
                return;
            }
            self.context.append_deadlines.pop_front();
            if is_open {
                let reason = format!("no answer within {:?}", self.context.store.deadline());
                self.appended(token, Err(StoreError::Unconfirmed(reason)));
            }
        }
    }

    /// No answer but success is definite: the identical batch again under a new token, or, if that is hopeless, a greater epoch.
    fn append_again(&mut self, id: ConversationId, reason: &str) {
        let Some(Slot::Open(conversation)) = self.conversations.get_mut(&id) else { return };
        let Some(in_flight) = conversation.in_flight.as_mut() else { return };
        self.context.cluster.metrics.batches_retried.increment(1);
        if in_flight.submitted.elapsed() > self.context.cluster.config.append_patience {
            tracing::warn!(conversation = %id, reason, "a batch was given up; the epoch is raised");
            return self.raise(id);
        }
        in_flight.attempts += 1;
        let token = self.context.next_token;
        self.context.next_token += 1;
        self.context.tokens.insert(token, id);
        in_flight.token = token;
        let longest = RETRY_FIRST.saturating_mul(1 << in_flight.attempts.min(6)).min(RETRY_LONGEST);
        let pause = longest / 2 + self.context.cluster.environment.jitter(longest / 2);
        self.context.then(tokio::time::sleep(pause), move |worker, ()| {
            if let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id)
                && let Some(in_flight) = &conversation.in_flight
                && in_flight.token == token
            {
                let batch = in_flight.batch.clone();
                worker.context.submissions.push(AppendRequest { token, batch });
            }
        });
    }

    /// Drops a conversation with all it has assigned, and opens it again under a greater epoch.
    fn raise(&mut self, id: ConversationId) {
        let Some(Slot::Open(mut conversation)) = self.conversations.remove(&id) else { return };
        self.context.drop_speculative(&mut conversation);
        let shard = conversation.shard;
        let Some(claim) = self.context.shards.claim(shard).cloned() else { return };
        let slot = Slot::Raising { waiting: std::collections::VecDeque::new() };
        self.conversations.insert(id, slot);
        // If the router has ended nobody answers, and nobody waits.
        let _ = self.context.raises.send(RaiseRequest { claim, conversation: id });
    }

    /// A clean fence read began after everything up to this ticket was confirmed.
    pub fn fence_clean(&mut self, ticket: u64) {
        while self.context.fencing.front().is_some_and(|(first, _)| *first <= ticket) {
            let Some((_, batches)) = self.context.fencing.pop_front() else { break };
            for (id, token) in batches {
                self.commit(&id, token);
            }
        }
    }

    fn commit(&mut self, id: &ConversationId, token: u64) {
        let Some(Slot::Open(conversation)) = self.conversations.get_mut(id) else { return };
        if conversation.in_flight.as_ref().is_none_or(|in_flight| in_flight.token != token) {
            return;
        }
        // A shard that is being released may finish; one that is lost has dropped its conversations.
        if !self.context.shards.is_held(conversation.shard) {
            return;
        }
        let Some(in_flight) = conversation.in_flight.take() else { return };
        let again = self.context.commit_batch(conversation, in_flight);
        let settled = conversation.is_settled();
        for request in again {
            self.request(*id, request);
        }
        if settled {
            self.settled(id);
        }
    }
}

impl Context {
    fn form_batch(&mut self, conversation: &mut Conversation) {
        let committed = conversation.committed;
        let bucket = BucketId::of(committed + 1);
        let mut rows = Vec::with_capacity(conversation.queue.len().min(limits::BATCH_ROWS_MAX));
        let mut entries = Vec::with_capacity(rows.capacity());
        let mut bytes = 0;
        while let Some(next) = conversation.queue.front() {
            bytes += next.row.bytes();
            let fits = rows.len() < limits::BATCH_ROWS_MAX && (bytes <= limits::BATCH_BYTES_MAX || rows.is_empty());
            if !fits || BucketId::of(next.row.seq) != bucket {
                break;
            }
            let Some(Assigned { row, sender, completion }) = conversation.queue.pop_front() else { break };
            rows.push(row);
            entries.push((sender, completion));
        }
        let batch = Arc::new(Batch { conversation: conversation.id, epoch: conversation.epoch, committed, rows });
        let token = self.next_token;
        self.next_token += 1;
        self.tokens.insert(token, conversation.id);
        if matches!(conversation.busy, Busy::Quiet | Busy::Inherited { .. }) {
            self.write_busy(conversation, committed + 1);
        }
        self.submissions.push(AppendRequest { token, batch: batch.clone() });
        conversation.in_flight =
            Some(InFlight { token, batch, entries, confirmed: false, submitted: self.now(), attempts: 0 });
    }

    /// The busy row of a burst is confirmed before the burst's first commit.
    pub fn write_busy(&mut self, conversation: &mut Conversation, since: u64) {
        conversation.busy = Busy::Writing;
        let write = StateWrite {
            table: Table::Busy,
            partition: bytes::Bytes::copy_from_slice(&conversation.shard.0.to_be_bytes()),
            key: conversation.id.to_bytes(),
            value: Some(bytes::Bytes::new()),
            timestamp: since,
        };
        let (id, epoch) = (conversation.id, conversation.epoch);
        self.write_state(vec![write], move |worker| {
            if let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id)
                && conversation.epoch == epoch
                && conversation.busy == Busy::Writing
            {
                conversation.busy = Busy::Confirmed { since };
                // Else one that was quiet before is looked at only when it would leave.
                worker.context.plan_look(conversation);
                worker.context.await_fence(conversation);
            }
        });
    }

    /// A batch that is confirmed, in a conversation whose busy row is confirmed, waits for a fence read that begins from now on.
    fn await_fence(&mut self, conversation: &Conversation) {
        if let Some(in_flight) = &conversation.in_flight
            && in_flight.confirmed
            && matches!(conversation.busy, Busy::Confirmed { .. })
        {
            self.confirmed.push((conversation.id, in_flight.token));
        }
    }

    /// Answers, applies and delivers a committed batch. Returns requests that waited for it.
    fn commit_batch(&mut self, conversation: &mut Conversation, in_flight: InFlight) -> Vec<Request> {
        let InFlight { batch, entries, .. } = in_flight;
        conversation.committed = batch.last_seq();
        conversation.committed_counted = batch.rows.last().map_or(conversation.committed_counted, |row| row.counted);
        self.cluster.metrics.batches_committed.increment(1);
        self.cluster.metrics.entries_committed.increment(batch.rows.len() as u64);
        self.cluster.metrics.batch_rows.record(batch.rows.len() as f64);
        let rows = match Arc::try_unwrap(batch) {
            Ok(batch) => batch.rows,
            Err(batch) => batch.rows.clone(),
        };
        let mut again = Vec::new();
        let mut delivered: Vec<(Row, Option<Arc<Caller>>)> = Vec::with_capacity(rows.len());
        for (row, (sender, completion)) in rows.into_iter().zip(entries) {
            self.settle(conversation, &row);
            if let Some(completion) = completion {
                again.extend(complete(self, &conversation.id, row.seq, row.sent_at, completion));
            }
            delivered.push((row, sender));
        }
        while let Some(entry) =
            conversation.waiters.first_entry().filter(|entry| *entry.key() <= conversation.committed)
        {
            let seq = *entry.key();
            let sent_at = delivered
                .iter()
                .find(|(row, _)| row.seq == seq)
                .map_or(conversation.last_sent_at, |(row, _)| row.sent_at);
            for completion in entry.remove() {
                again.extend(complete(self, &conversation.id, seq, sent_at, completion));
            }
        }
        fan_out::deliver(self, conversation, &delivered);
        self.mark_soon(conversation);
        if !conversation.queue.is_empty() {
            self.mark_dirty(conversation);
        }
        again
    }

    /// What a committed entry does to the committed state, the tables, other logs and the sender's own cursor.
    pub fn settle(&mut self, conversation: &mut Conversation, row: &Row) {
        if let Some(sender) = &row.sender {
            conversation.move_cursor(sender, Cursor::at(row));
        }
        if row.flags & body::FLAG_COUNTED != 0 {
            conversation.newest_counted = row.seq;
        }
        if row.flags & body::FLAG_MENTIONS_ALL != 0 {
            conversation.committed_all = state::all_of(row);
        }
        let mentioned = state::mentioned(row);
        if row.kind != v1::EntryKind::Event && row.seq != 1 && mentioned.is_empty() {
            return;
        }
        let mut consequences = Consequences::default();
        if row.kind == v1::EntryKind::Event || row.seq == 1 {
            let secret = &self.cluster.config.cluster_secret;
            consequences = state::apply(&mut conversation.settled, &conversation.id, row, secret);
            conversation.members_version += 1;
            conversation.last_event = conversation.last_event.max(row.seq);
        }
        if !mentioned.is_empty() {
            conversation.newest_mention = row.seq;
            consequences.writes.extend(state::mention_writes(&conversation.id, row, &mentioned));
            conversation.mentions_unwritten.insert(row.seq, mentioned);
        }
        self.members_changed(conversation, &consequences);
        self.left_elsewhere(conversation, &consequences);
        self.entered_elsewhere(conversation, &consequences);
        self.visibility_changed(conversation, &consequences);
        self.apply_consequences(conversation, row.seq, consequences);
    }

    /// Drops what is not committed: its senders are told, or their gateways keep it for the next owner.
    pub fn drop_speculative(&mut self, conversation: &mut Conversation) {
        let id = conversation.id;
        self.schedule.forget(conversation);
        let in_flight = conversation.in_flight.take();
        if let Some(in_flight) = &in_flight {
            self.tokens.remove(&in_flight.token);
        }
        let flying = in_flight.into_iter().flat_map(|in_flight| in_flight.entries);
        let queued = std::mem::take(&mut conversation.queue).into_iter().map(|entry| (entry.sender, entry.completion));
        for (sender, completion) in flying.chain(queued) {
            if let Some(caller) = sender {
                // It is charged when it comes again.
                self.cluster.user_limits.give_back(&caller.user, Limited::Sends, 1);
            }
            if let Some(completion) = completion {
                self.give_up(id, completion);
            }
        }
        for completion in std::mem::take(&mut conversation.waiters).into_values().flatten() {
            self.give_up(id, completion);
        }
        if let Some(lookups) = conversation.lookups.take() {
            lookups.into_waiting().for_each(|request| self.give_back(id, request));
        }
        self.cluster.metrics.conversations_open.decrement(1.0);
    }

    fn give_up(&mut self, id: ConversationId, completion: Completion) {
        match completion {
            Completion::Ack { caller, client_message_id, attempt } => {
                self.return_send(&caller, id, client_message_id, attempt);
            }
            Completion::Reply { reply_to, .. } | Completion::Effect { reply_to, .. } => {
                self.cluster.answer(reply_to, Err(unavailable()));
            }
            Completion::Again(request) => self.give_back(id, *request),
        }
    }
}

/// Tells whoever waits for a committed entry; gives back a request that has to be decided again.
fn complete(
    context: &mut Context,
    id: &ConversationId,
    seq: u64,
    sent_at: Timestamp,
    completion: Completion,
) -> Option<Request> {
    match completion {
        Completion::Again(request) => return Some(*request),
        completion => complete_at(context, id, seq, sent_at, completion),
    }
    None
}

/// Tells whoever waits for a committed entry.
pub fn complete_at(context: &mut Context, id: &ConversationId, seq: u64, sent_at: Timestamp, completion: Completion) {
    match completion {
        Completion::Ack { caller, client_message_id, attempt } => {
            let ack = v1::SendAck {
                client_message_id,
                conversation_id: id.to_bytes(),
                seq,
                sent_at_ms: sent_at.as_millis(),
                status: None,
            };
            context.ack(&caller, ack, attempt);
        }
        Completion::Reply { reply_to, kind } => {
            context.cluster.answer(reply_to, Ok(Context::entry_reply(id, seq, sent_at, kind)));
        }
        Completion::Effect { reply_to, origin_seq } => {
            context.cluster.answer(reply_to, Ok(AnswerValue::EffectDone(origin_seq)));
        }
        Completion::Again(request) => context.give_back(*id, *request),
    }
}
