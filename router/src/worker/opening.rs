//! Which conversations are being opened: bounded in number, those that somebody waits for first, and of the others one for so many of these.

use std::{collections::VecDeque, sync::atomic::AtomicU32, time::Duration};

use im_proto::{ConversationId, status::CorrelationId};

use super::{
    Context, Worker, fan_out,
    waiting::{Haste, Request, SendAnswer, Slot, hastiest},
};
use crate::{
    conversation::{Busy, Conversation, Dedupe, Seen},
    open::{Open, OpenError, Opened},
};

/// Conversations that wait to be opened for nothing but a receipt or a signal.
const EPHEMERAL_OPENS_WAITING_MAX: usize = 256;

impl Worker {
    /// Opens a conversation for a request.
    pub fn open_for(&mut self, id: ConversationId, request: Request) {
        let haste = request.haste();
        self.conversations.insert(id, Slot::Opening { attempt: 0, waiting: VecDeque::from([request]) });
        self.open_sooner(id, haste);
    }

    /// Opens a conversation for a receipt or a signal, once nobody else waits for one. Whoever names very many of them, which need not
    /// even exist, is not heard: a receipt comes again with the next one, a signal is worth nothing later.
    pub fn open_for_ephemeral(&mut self, id: ConversationId, request: Request) {
        if self.context.opens.unhurried() >= EPHEMERAL_OPENS_WAITING_MAX {
            return self.context.cluster.metrics.signals_dropped.increment(1);
        }
        self.open_for(id, request);
    }

    /// Opens a conversation that nobody waits for yet.
    pub fn open_later(&mut self, id: ConversationId) {
        if self.conversations.contains_key(&id) {
            return;
        }
        self.conversations.insert(id, Slot::Opening { attempt: 0, waiting: VecDeque::new() });
        self.open_sooner(id, Haste::None);
    }

    /// Somebody waits for a conversation with more haste than all before: it need not wait for others that have less.
    pub fn open_sooner(&mut self, id: ConversationId, haste: Haste) {
        self.context.opens.push(id, haste);
        self.start_opens();
    }

    /// Starts opens up to the bound.
    pub fn start_opens(&mut self) {
        while self.context.opens.running() < self.context.cluster.config.opens_max {
            let conversations = &self.conversations;
            let waits = |id: &ConversationId| matches!(conversations.get(id), Some(Slot::Opening { attempt: 0, .. }));
            let Some(id) = self.context.opens.pop(waits) else { return };
            self.start_open(id);
        }
    }

    fn start_open(&mut self, id: ConversationId) {
        let shard = self.context.cluster.shard_of(&id);
        let Some(Slot::Opening { attempt, .. }) = self.conversations.get_mut(&id) else { return };
        // Asked for again with more haste: the first start serves both.
        if *attempt != 0 {
            return;
        }
        let Some(epoch) = self.context.shards.epoch(shard) else { return };
        self.context.next_token += 1;
        *attempt = self.context.next_token;
        let attempt = *attempt;
        self.context.opens.started(attempt);
        self.context.cluster.metrics.opens.increment(1);
        let open = Open {
            cluster: self.context.cluster.clone(),
            store: self.context.store.clone(),
            fence: self.context.fence.clone(),
            id,
            epoch,
            cancelled: self.context.shards.cancellation(shard),
            attempt,
            failures: AtomicU32::new(0),
        };
        self.context.then(open.run(), move |worker, outcome| {
            worker.context.opens.ended(attempt);
            worker.opened(id, attempt, epoch, outcome);
            worker.start_opens();
        });
    }

    /// The store does not answer an open: others need not wait for it.
    pub fn open_gets_no_answer(&mut self, attempt: u64) {
        self.context.opens.gets_no_answer(attempt, self.context.cluster.config.opens_max);
        self.start_opens();
    }

    fn opened(&mut self, id: ConversationId, attempt: u64, epoch: im_proto::Epoch, outcome: Result<Opened, OpenError>) {
        match self.conversations.get(&id) {
            Some(Slot::Opening { attempt: current, .. }) if *current == attempt => {}
            _ => return,
        }
        let Some(Slot::Opening { waiting, .. }) = self.conversations.remove(&id) else { return };
        match outcome {
            Ok(opened) => self.install(id, epoch, opened, waiting),
            Err(OpenError::Lost) => waiting.into_iter().for_each(|request| self.context.give_back(id, request)),
            Err(OpenError::EpochAhead { found, own }) => {
                let shard = self.context.cluster.shard_of(&id);
                let correlation_id = self.context.cluster.correlation_id();
                tracing::error!(conversation = %id, %correlation_id, ?found, ?own, "an entry has an epoch above the owner's");
                waiting.into_iter().for_each(|request| self.context.refuse_request(&id, request, correlation_id));
                // Not if the epoch was raised meanwhile, above the one that was found.
                self.shard_refused(shard, found);
            }
            Err(error) => self.open_failed(id, &error, waiting),
        }
    }

    /// The conversation stays closed until somebody asks for it a while later; its callers get `unavailable` and may try again. It
    /// keeps its place: its head row may be older than its log.
    fn open_failed(&mut self, id: ConversationId, error: &OpenError, waiting: VecDeque<Request>) {
        self.context.cluster.metrics.opens_failed.increment(1);
        let correlation_id = self.context.cluster.correlation_id();
        tracing::error!(conversation = %id, %correlation_id, %error, "ALARM: a conversation cannot be opened");
        self.conversations.insert(id, Slot::Opening { attempt: u64::MAX, waiting: VecDeque::new() });
        for request in waiting {
            self.context.refuse_request(&id, request, correlation_id);
        }
        self.context.then(tokio::time::sleep(Duration::from_secs(1)), move |worker, ()| {
            if let Some(Slot::Opening { attempt, waiting }) = worker.conversations.get_mut(&id)
                && *attempt == u64::MAX
            {
                *attempt = 0;
                if !waiting.is_empty() {
                    let haste = hastiest(waiting);
                    worker.open_sooner(id, haste);
                }
            }
        });
    }

    fn install(&mut self, id: ConversationId, epoch: im_proto::Epoch, opened: Opened, waiting: VecDeque<Request>) {
        let mut conversation = Box::new(self.context.conversation(id, epoch, &opened));
        for (user, cursor) in &opened.cursors {
            conversation.move_cursor(user, *cursor);
            // Cursors are stored before the mark that covers them.
            if cursor.seq <= opened.applied {
                conversation.cursors_dirty.remove(user);
            }
        }
        for effect in opened.effects {
            conversation.outbox.push(effect);
        }
        let sent_from = opened.rewritten.first().map_or(opened.head + 1, |row| row.seq);
        self.context.open_large(&mut conversation, sent_from);
        self.context.visibility_opened(&conversation);
        self.context.following_opened(&conversation);
        let rewritten: Vec<_> = opened.rewritten.into_iter().map(|row| (row, None)).collect();
        if !rewritten.is_empty() {
            fan_out::deliver(&self.context, &mut conversation, &rewritten);
        }
        self.context.send_effects(&mut conversation);
        self.context.plan_look(&mut conversation);
        self.context.mark_soon(&mut conversation);
        self.context.cluster.metrics.conversations_open.increment(1.0);
        self.conversations.insert(id, Slot::Open(conversation));
        for request in waiting {
            self.request(id, request);
        }
    }
}

impl Context {
    fn conversation(&self, id: ConversationId, epoch: im_proto::Epoch, opened: &Opened) -> Conversation {
        let mut dedupe = Dedupe::new(self.cluster.config.dedupe_entries, opened.keys_floor);
        for key in &opened.keys {
            if let Some(sender) = &key.sender
                && !key.client_message_id.is_empty()
            {
                let seen = Seen { seq: key.seq, sent_at: opened.last_sent_at, body_hash: None };
                dedupe.insert(Dedupe::key(sender, &key.client_message_id), seen, opened.head);
            }
        }
        Conversation {
            first_seq: opened.first_seq,
            committed: opened.head,
            committed_counted: opened.counted,
            committed_all: opened.all,
            newest_counted: opened.newest_counted,
            newest_mention: opened.newest_mention,
            assigned: opened.head,
            assigned_counted: opened.counted,
            assigned_all: opened.all,
            last_sent_at: opened.last_sent_at,
            deciding: opened.state.clone(),
            settled: opened.state.clone(),
            dedupe,
            // The burst of the last owner is taken over and ended in its time.
            busy: opened.busy_since.map_or(Busy::Quiet, |since| Busy::Inherited { since }),
            applied_written: opened.applied,
            heavy: opened.heavy,
            ..Conversation::new(id, self.cluster.shard_of(&id), epoch)
        }
    }

    /// Answers a request in a conversation that cannot be opened: the caller may try again later, and can name what the log has of it.
    fn refuse_request(&mut self, id: &ConversationId, request: Request, correlation_id: CorrelationId) {
        let status = correlation_id.of(crate::message::unavailable());
        match request {
            Request::Send { caller, send, answer: SendAnswer::Session { attempt } } => {
                let ack = im_proto::v1::SendAck {
                    client_message_id: send.client_message_id,
                    conversation_id: id.to_bytes(),
                    status: Some(status),
                    ..im_proto::v1::SendAck::default()
                };
                self.ack(&caller, ack, attempt);
            }
            Request::Send { answer: SendAnswer::Reply(reply_to), .. }
            | Request::Effect { reply_to, .. }
            | Request::Call { reply_to, .. } => self.cluster.answer(reply_to, Err(status)),
            request => self.give_back(*id, request),
        }
    }
}
