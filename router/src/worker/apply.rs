//! The idempotent applier: state rows of committed entries, and effects on other logs through the outbox.
//!
//! A write that the store does not confirm is repeated until it is, or until the shard is lost; then the next owner applies the
//! entry again, because the applied mark stands below it.

use std::time::Duration;

use im_proto::{ConversationId, StatusCode, v1::EntryKind};
use im_storage::{StateWrite, StoreError};
use prost::Message as _;

use super::{
    Context, Worker,
    waiting::{Request, Slot},
};
use crate::{
    cluster::Ended,
    conversation::{Assigned, Completion, Conversation},
    message::{AnswerValue, Effect, ReplyTo, ShardMessage, overloaded},
    state::{Consequences, EntryMeta, Kind},
};

/// Effects of one conversation that are under way: an invitation of a thousand must not fill the queues of other routers.
const EFFECTS_AT_A_TIME: usize = 256;

impl Context {
    /// Writes state rows, again and again until confirmed, then runs a step.
    pub fn write_state(&self, writes: Vec<StateWrite>, step: impl FnOnce(&mut Worker) + Send + 'static) {
        let store = self.store.clone();
        let cluster = self.cluster.clone();
        let task = async move {
            let mut pause = Duration::from_millis(20);
            if writes.is_empty() {
                return true;
            }
            loop {
                match store.write(writes.clone()).await {
                    Ok(()) => return true,
                    Err(StoreError::Unconfirmed(_)) => {
                        tokio::time::sleep(pause + cluster.environment.jitter(pause)).await;
                        pause = (pause * 2).min(Duration::from_secs(1));
                    }
                    Err(error) => {
                        cluster.end(Ended::StoreStopped(error.to_string()));
                        return false;
                    }
                }
            }
        };
        self.then(task, move |worker, confirmed| {
            if confirmed {
                step(worker);
            }
        });
    }

    /// Writes the rows and queues the effects of a committed entry.
    pub fn apply_consequences(&mut self, conversation: &mut Conversation, seq: u64, consequences: Consequences) {
        if consequences.is_heavy() {
            conversation.heavy = seq;
        }
        let Consequences { writes, effects, .. } = consequences;
        if !writes.is_empty() {
            conversation.unwritten.push(seq, writes);
            self.write_entries(conversation);
        }
        for effect in effects {
            conversation.outbox.push(effect);
        }
        self.send_effects(conversation);
    }

    /// Writes the rows that wait, unless a write of this conversation is under way.
    fn write_entries(&self, conversation: &mut Conversation) {
        let Some(writes) = conversation.unwritten.begin() else { return };
        let (id, epoch) = (conversation.id, conversation.epoch);
        self.write_state(writes, move |worker| {
            if let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id)
                && conversation.epoch == epoch
            {
                for seq in conversation.unwritten.stored() {
                    conversation.mentions_unwritten.remove(&seq);
                }
                worker.context.write_entries(conversation);
                worker.context.mark_soon(conversation);
            }
        });
    }

    /// Writes the marks with the next tick if they are wanted now.
    pub fn mark_soon(&mut self, conversation: &mut Conversation) {
        if self.wants_marks(conversation) {
            self.look_soon(conversation);
        }
    }

    /// Sends the effects that none of the same target precedes.
    pub fn send_effects(&mut self, conversation: &mut Conversation) {
        for effect in conversation.outbox.take_sendable(EFFECTS_AT_A_TIME) {
            self.cluster.metrics.effects_sent.increment(1);
            let shard = self.cluster.shard_of(&effect.target);
            let reply_to =
                ReplyTo::Outbox { origin: effect.origin, target: effect.target, origin_seq: effect.origin_seq };
            self.cluster.send(shard, ShardMessage::Effect(effect), reply_to);
        }
    }

    /// An effect of another log's entry: appended once, answered "done" at or below the greatest origin seq appended.
    pub fn effect(&mut self, conversation: &mut Conversation, effect: Effect, reply_to: ReplyTo) {
        if self.cluster.config.cluster_secret.self_id(&effect.target_user) != conversation.id {
            return self.cluster.answer(reply_to, Err(StatusCode::Malformed.to_status()));
        }
        let known = conversation.deciding.list.get(&effect.origin).map_or(0, |row| row.origin_seq());
        if effect.origin_seq <= known {
            let done = AnswerValue::EffectDone(known);
            if conversation.last_event > conversation.committed {
                // The entry that did it may not be committed yet.
                let waiting = Completion::Effect { reply_to, origin_seq: effect.origin_seq };
                conversation.waiters.entry(conversation.last_event).or_default().push(waiting);
            } else {
                self.cluster.answer(reply_to, Ok(done));
            }
            return;
        }
        if conversation.queue.len() >= self.cluster.config.conversation_queue_max || conversation.unwritten.is_full() {
            // The outbox of the other log sends it again.
            return self.cluster.answer(reply_to, Err(overloaded()));
        }
        let user_id =
            if conversation.deciding.kind == Kind::Empty { effect.target_user.to_string() } else { String::new() };
        let (origin, origin_seq) = (effect.origin.to_bytes(), effect.origin_seq);
        let meta = EntryMeta { user_id, origin, origin_seq, ..EntryMeta::default() };
        let meta = meta.encode_to_vec().into();
        let none = bytes::Bytes::new();
        let row = self.next_row(conversation, EntryKind::Event, None, &none, effect.body, meta);
        let completion = Some(Completion::Effect { reply_to, origin_seq: effect.origin_seq });
        self.assign(conversation, Assigned { row, sender: None, completion });
    }
}

impl Worker {
    /// The owner of a target has answered.
    pub fn effect_answered(&mut self, origin: &ConversationId, target: &ConversationId, origin_seq: u64, done: bool) {
        let Some(Slot::Open(conversation)) = self.conversations.get_mut(origin) else { return };
        conversation.outbox.answered(target, origin_seq, done);
        if done {
            self.context.send_effects(conversation);
            self.context.mark_soon(conversation);
        } else {
            // It goes out again with the next tick.
            self.context.look_soon(conversation);
        }
    }

    /// Handles a request now, or when its conversation is open.
    pub fn request(&mut self, id: ConversationId, request: Request) {
        let shard = self.context.cluster.shard_of(&id);
        if !self.context.shards.is_active(shard) {
            return self.context.give_back(id, request);
        }
        match self.conversations.get_mut(&id) {
            Some(Slot::Open(conversation)) => self.context.handle(conversation, request),
            Some(slot @ (Slot::Opening { .. } | Slot::Raising { .. })) => {
                if slot.waiting().is_some_and(|waiting| waiting.len() >= self.context.cluster.config.opening_queue_max)
                {
                    return self.context.give_back(id, request);
                }
                if let Some(haste) = slot.wait(request) {
                    self.open_sooner(id, haste);
                }
            }
            None if request.is_ephemeral() => self.open_for_ephemeral(id, request),
            None => self.open_for(id, request),
        }
    }
}

impl Context {
    /// Handles a request in an open conversation.
    pub fn handle(&mut self, conversation: &mut Conversation, request: Request) {
        conversation.last_use = self.now();
        match request {
            Request::Send { caller, send, answer } => self.send(conversation, caller, send, answer),
            Request::Received { caller, seq } => self.received(conversation, &caller, seq),
            Request::Signal { caller, signal } => self.signal(conversation, &caller, signal),
            Request::Effect { effect, reply_to } => self.effect(conversation, effect, reply_to),
            Request::Call { call, reply_to } => self.call(conversation, call, reply_to),
            Request::Head { asker, answer } => {
                let _ = answer.send(self.head_of(conversation, &asker));
            }
        }
    }
}
