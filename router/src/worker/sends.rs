//! Sends: may the sender write here, was it sent before, is it in order; then a number.

use std::sync::Arc;

use bytes::Bytes;
use im_proto::{
    ConversationId, StatusCode, UserId, limits,
    v1::{self, EntryKind, router_message::Message as ToGateway},
};
use im_storage::{MessageLog as _, Row};
use prost::Message as _;

use super::{
    Context, Worker, commit,
    waiting::{Request, SendAnswer, SendRequest, Slot},
};
use crate::{
    caller::Caller,
    conversation::{Assigned, Completion, Conversation, Dedupe, ReplyKind, Seen},
    message::{AnswerValue, unavailable},
    state::{EntryMeta, Kind},
};

/// Entry flag: it counts as unread.
pub const FLAG_COUNTED: u32 = 1;

impl Worker {
    /// A `Send` frame.
    pub fn take_send(&mut self, caller: Arc<Caller>, id: ConversationId, send: v1::Send) {
        let peer = match &send.target {
            Some(v1::send::Target::PeerUserId(peer)) => UserId::parse(peer).ok(),
            _ => None,
        };
        let v1::Send { client_message_id, body, after, known_seq, .. } = send;
        let send = SendRequest { peer, client_message_id, body, after, known_seq };
        self.request(id, Request::Send { caller, send, answer: SendAnswer::Session });
    }
}

impl Context {
    /// Decides about a send and numbers it.
    pub fn send(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        send: SendRequest,
        answer: SendAnswer,
    ) {
        let refusal = self.permission(conversation, &caller, &send);
        // Who was never let in learns nothing. Who has left a group may have sent this before, and a refusal says that it is not stored.
        if let Some(refusal) = refusal.filter(|refusal| *refusal != StatusCode::NotAMember) {
            return self.refuse_send(conversation, caller, send, answer, refusal);
        }
        let key = Dedupe::key(&caller.user, &send.client_message_id);
        if let Some(seen) = conversation.dedupe.get(key) {
            return self.repeated(conversation, caller, send, answer, seen);
        }
        if conversation.dedupe.floor > send.known_seq {
            return self.scan(conversation, caller, send, answer);
        }
        if let Some(refusal) = refusal {
            return self.refuse_send(conversation, caller, send, answer, refusal);
        }
        if !send.after.is_empty() && conversation.dedupe.get(Dedupe::key(&caller.user, &send.after)).is_none() {
            return self.answer_send(
                conversation,
                &caller,
                send.client_message_id,
                answer,
                StatusCode::OutOfOrder.to_status(),
            );
        }
        if conversation.queue.len() >= self.cluster.config.conversation_queue_max {
            let status = StatusCode::Overloaded.retry_after(std::time::Duration::from_millis(200));
            return self.answer_send(conversation, &caller, send.client_message_id, answer, status);
        }
        self.cluster.metrics.sends_accepted.increment(1);
        self.assign_message(conversation, key, caller, send, answer);
    }

    fn assign_message(
        &mut self,
        conversation: &mut Conversation,
        key: u128,
        caller: Arc<Caller>,
        send: SendRequest,
        answer: SendAnswer,
    ) {
        let first = conversation.assigned == 0;
        let meta = if first { self.first_meta(&caller, &send) } else { Bytes::new() };
        let row = self.next_row(
            conversation,
            EntryKind::Message,
            Some(caller.user.clone()),
            &send.client_message_id,
            send.body,
            meta,
        );
        let seen = Seen { seq: row.seq, sent_at: row.sent_at, body_hash: Some(Dedupe::body_hash(&row.body)) };
        conversation.dedupe.insert(key, seen, conversation.committed);
        let completion = match answer {
            SendAnswer::Session => {
                Completion::Ack { caller: caller.clone(), client_message_id: send.client_message_id }
            }
            SendAnswer::Reply(reply_to) => Completion::Reply { reply_to, kind: ReplyKind::Send },
        };
        self.assign(conversation, Assigned { row, sender: Some(caller), completion: Some(completion) });
    }

    fn first_meta(&self, caller: &Caller, send: &SendRequest) -> Bytes {
        let user = send.peer.as_ref().unwrap_or(&caller.user);
        EntryMeta { user_id: user.to_string(), ..EntryMeta::default() }.encode_to_vec().into()
    }

    /// The next entry of a conversation. Its time never goes back.
    pub fn next_row(
        &self,
        conversation: &mut Conversation,
        kind: EntryKind,
        sender: Option<UserId>,
        client_message_id: &Bytes,
        body: Bytes,
        meta: Bytes,
    ) -> Row {
        let counts = kind == EntryKind::Message;
        conversation.assigned += 1;
        conversation.assigned_counted += u64::from(counts);
        conversation.last_sent_at = self.cluster.environment.clock.now().max(conversation.last_sent_at);
        Row {
            seq: conversation.assigned,
            counted: conversation.assigned_counted,
            sender,
            client_message_id: client_message_id.clone(),
            sent_at: conversation.last_sent_at,
            kind,
            flags: if counts { FLAG_COUNTED } else { 0 },
            body,
            meta,
        }
    }

    /// Puts a numbered entry into the queue and applies it to the state that decides.
    pub fn assign(&mut self, conversation: &mut Conversation, entry: Assigned) {
        if entry.row.kind == EntryKind::Event || entry.row.seq == 1 {
            crate::state::apply(
                &mut conversation.deciding,
                &conversation.id,
                &entry.row,
                &self.cluster.config.cluster_secret,
            );
            conversation.last_event = entry.row.seq;
        }
        conversation.queue.push_back(entry);
        conversation.last_entry = self.now();
        self.mark_dirty(conversation);
    }

    /// Why the sender may not write here, if so.
    fn permission(&self, conversation: &Conversation, caller: &Caller, send: &SendRequest) -> Option<StatusCode> {
        match &conversation.deciding.kind {
            Kind::Empty => {
                let named = send.peer.as_ref().unwrap_or(&caller.user);
                let named_id = self.cluster.config.cluster_secret.direct_id(&caller.user, named);
                if named_id == conversation.id { None } else { Some(StatusCode::NotFound) }
            }
            Kind::Direct(one, other) => (caller.user != *one && caller.user != *other).then_some(StatusCode::NotFound),
            Kind::SelfLog(owner) => (caller.user != *owner).then_some(StatusCode::NotFound),
            Kind::Group => (!conversation.is_member(&caller.user)).then_some(StatusCode::NotAMember),
        }
    }

    fn refuse_send(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        send: SendRequest,
        answer: SendAnswer,
        status: StatusCode,
    ) {
        // A refusal that rests on entries that are not committed yet waits for them.
        if conversation.last_event > conversation.committed {
            let again = Completion::Again(Box::new(Request::Send { caller, send, answer }));
            return conversation.waiters.entry(conversation.last_event).or_default().push(again);
        }
        self.cluster.metrics.sends_refused.increment(1);
        self.answer_send(conversation, &caller, send.client_message_id, answer, status.to_status());
    }

    /// A client message id that was seen before: the same answer, once that entry is committed; another body is refused.
    fn repeated(
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
    fn scan(&mut self, conversation: &mut Conversation, caller: Arc<Caller>, send: SendRequest, answer: SendAnswer) {
        let (from, to) = (send.known_seq + 1, conversation.dedupe.floor);
        if to - send.known_seq > limits::DEDUPE_SCAN_ENTRIES_MAX {
            return self.answer_send(
                conversation,
                &caller,
                send.client_message_id,
                answer,
                StatusCode::SyncFirst.to_status(),
            );
        }
        let (store, id) = (self.store.clone(), conversation.id);
        let (user, wanted) = (caller.user.clone(), send.client_message_id.clone());
        let read = async move {
            let keys = store.read_keys(id, from, to).await?;
            let found = keys
                .iter()
                .find(|key| key.sender.as_ref() == Some(&user) && key.client_message_id == wanted)
                .map(|key| key.seq);
            Ok::<_, im_storage::StoreError>(found)
        };
        self.then(read, move |worker, outcome| worker.scanned(id, caller, send, answer, to, outcome));
    }
}

impl Worker {
    fn scanned(
        &mut self,
        id: ConversationId,
        caller: Arc<Caller>,
        mut send: SendRequest,
        answer: SendAnswer,
        scanned_to: u64,
        outcome: Result<Option<u64>, im_storage::StoreError>,
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
}

impl Context {
    /// Answers a send that was not numbered.
    pub fn answer_send(
        &mut self,
        conversation: &Conversation,
        caller: &Caller,
        client_message_id: Bytes,
        answer: SendAnswer,
        status: v1::Status,
    ) {
        match answer {
            SendAnswer::Session => {
                let ack = v1::SendAck {
                    client_message_id,
                    conversation_id: conversation.id.to_bytes(),
                    status: Some(status),
                    ..v1::SendAck::default()
                };
                self.ack(caller, ack);
            }
            SendAnswer::Reply(reply_to) => self.cluster.answer(reply_to, Err(status)),
        }
    }

    /// Sends an ack to the session that sent the message.
    pub fn ack(&mut self, caller: &Caller, ack: v1::SendAck) {
        if let Some(key) = &caller.session {
            let result = v1::SendResult { session_id: key.session.0, ack: Some(ack) };
            self.tell_session(key, ToGateway::SendResult(result));
        }
    }

    /// The reply of an api call that was an entry.
    pub fn entry_reply(id: &ConversationId, seq: u64, sent_at: im_proto::Timestamp, kind: ReplyKind) -> AnswerValue {
        let reply = match kind {
            ReplyKind::Send => {
                v1::SendReply { conversation_id: id.to_bytes(), seq, sent_at_ms: sent_at.as_millis() }.encode_to_vec()
            }
            ReplyKind::GroupCreate => v1::GroupCreateReply { conversation_id: id.to_bytes(), seq }.encode_to_vec(),
            ReplyKind::GroupInvite => v1::GroupInviteReply { seq }.encode_to_vec(),
            ReplyKind::GroupLeave => v1::GroupLeaveReply { seq }.encode_to_vec(),
        };
        AnswerValue::Reply(reply.into())
    }
}
