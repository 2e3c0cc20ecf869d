//! Sends: may the sender write here, was it sent before, is it in order; then a number.

use std::sync::Arc;

use bytes::Bytes;
use im_proto::{
    ConversationId, StatusCode, UserId,
    body::{self, FLAG_COUNTED, FLAG_MENTIONS_ALL},
    v1::{self, EntryKind, router_message::Message as ToGateway},
};
use im_storage::Row;
use prost::Message as _;

use super::{
    Context, Worker,
    waiting::{Request, SendAnswer, SendRequest},
};
use crate::{
    caller::Caller,
    conversation::{Assigned, Completion, Conversation, Dedupe, ReplyKind, Seen},
    message::{AnswerValue, overloaded},
    state::{EntryMeta, Kind},
    user_limits::Limited,
};

/// Whether somebody may write into a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Permission {
    Given,
    /// Not in the group; perhaps once was.
    NotNow,
    /// Cannot ever have written here.
    Never,
}

impl Worker {
    /// A `Send` frame.
    pub fn take_send(&mut self, caller: Arc<Caller>, id: ConversationId, attempt: u64, send: v1::Send) {
        let peer = match &send.target {
            Some(v1::send::Target::PeerUserId(peer)) => UserId::parse(peer).ok(),
            _ => None,
        };
        let v1::Send { client_message_id, body, after, known_seq, .. } = send;
        let send = SendRequest { peer, client_message_id, body, after, known_seq, was_member: false };
        self.request(id, Request::Send { caller, send, answer: SendAnswer::Session { attempt } });
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
        let permission = self.permission(conversation, &caller, &send);
        if permission == Permission::Never {
            return self.refuse_send(conversation, caller, send, answer);
        }
        // A repeat gets the answer of the first try, even if its sender has left since: a refusal would say that it is not stored.
        let key = Dedupe::key(&caller.user, &send.client_message_id);
        if let Some(seen) = conversation.dedupe.get(key) {
            return self.repeated(conversation, caller, send, answer, seen);
        }
        if conversation.dedupe.floor > send.known_seq {
            return match permission {
                Permission::NotNow => self.scan_for_former(conversation, caller, send, answer),
                Permission::Given | Permission::Never => self.scan(conversation, caller, send, answer),
            };
        }
        if permission == Permission::NotNow {
            return self.refuse_send(conversation, caller, send, answer);
        }
        if !send.after.is_empty() && conversation.dedupe.get(Dedupe::key(&caller.user, &send.after)).is_none() {
            return self.seek_predecessor(conversation, caller, send, answer);
        }
        let is_full = conversation.queue.len() >= self.cluster.config.conversation_queue_max;
        // Mentions have rows of their own; messages without any go on.
        if is_full || (conversation.unwritten.is_full() && !body::names(&send.body).users.is_empty()) {
            let status = overloaded();
            return self.answer_send(conversation, &caller, send.client_message_id, answer, status);
        }
        let named = names_well(conversation, &caller, &send);
        if named != Ok(()) {
            return self.refuse_names(conversation, caller, send, answer, named);
        }
        // Here and nowhere before: what is repeated, refused or sent again by a gateway costs its user nothing.
        if let Err(status) = self.cluster.user_limits.take(&self.cluster, &caller.user, Limited::Sends, 1) {
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
        self.is_stored(conversation, key);
        let seen = Seen { seq: row.seq, sent_at: row.sent_at, body_hash: Some(Dedupe::body_hash(&row.body)) };
        conversation.dedupe.insert(key, seen, conversation.committed);
        let completion = match answer {
            SendAnswer::Session { attempt } => {
                Completion::Ack { caller: caller.clone(), client_message_id: send.client_message_id, attempt }
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
        let flags = if kind == EntryKind::Message { body::names(&body).flags() } else { 0 };
        conversation.assigned += 1;
        conversation.assigned_counted += u64::from(flags & FLAG_COUNTED != 0);
        conversation.assigned_all += u64::from(flags & FLAG_MENTIONS_ALL != 0);
        let meta = with_all(meta, conversation.assigned_all);
        conversation.last_sent_at = self.cluster.environment.clock.now().max(conversation.last_sent_at);
        Row {
            seq: conversation.assigned,
            counted: conversation.assigned_counted,
            sender,
            client_message_id: client_message_id.clone(),
            sent_at: conversation.last_sent_at,
            kind,
            flags,
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

    /// Whether the sender may write here.
    fn permission(&self, conversation: &Conversation, caller: &Caller, send: &SendRequest) -> Permission {
        let is_one_of_two = match &conversation.deciding.kind {
            Kind::Empty => {
                let named = send.peer.as_ref().unwrap_or(&caller.user);
                self.cluster.config.cluster_secret.direct_id(&caller.user, named) == conversation.id
            }
            Kind::Direct(one, other) => caller.user == *one || caller.user == *other,
            Kind::SelfLog(owner) => caller.user == *owner,
            Kind::Group | Kind::Channel if conversation.is_member(&caller.user) => true,
            Kind::Group | Kind::Channel => return Permission::NotNow,
        };
        if is_one_of_two { Permission::Given } else { Permission::Never }
    }

    /// Who is mentioned is not in the conversation, or what is quoted does not exist.
    fn refuse_names(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        send: SendRequest,
        answer: SendAnswer,
        named: Result<(), StatusCode>,
    ) {
        let Err(code) = named else { return };
        // Who is a member may rest on entries that are not committed yet.
        if code == StatusCode::NotAMember && conversation.last_event > conversation.committed {
            let again = Completion::Again(Box::new(Request::Send { caller, send, answer }));
            return conversation.waiters.entry(conversation.last_event).or_default().push(again);
        }
        self.cluster.metrics.sends_refused.increment(1);
        self.answer_send(conversation, &caller, send.client_message_id, answer, code.to_status());
    }

    /// Whether it exists is nothing to who may not write here.
    pub fn refuse_send(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        send: SendRequest,
        answer: SendAnswer,
    ) {
        // A refusal that rests on entries that are not committed yet waits for them.
        if conversation.last_event > conversation.committed {
            let again = Completion::Again(Box::new(Request::Send { caller, send, answer }));
            return conversation.waiters.entry(conversation.last_event).or_default().push(again);
        }
        self.cluster.metrics.sends_refused.increment(1);
        // A channel is no secret: anybody may read it.
        let code = if conversation.is_channel() { StatusCode::Forbidden } else { StatusCode::NotFound };
        let status = code.to_status();
        self.answer_send(conversation, &caller, send.client_message_id, answer, status);
    }
}

/// Whether all whom a message mentions are in the conversation, and the entry that it answers exists there.
fn names_well(conversation: &Conversation, caller: &Caller, send: &SendRequest) -> Result<(), StatusCode> {
    let names = body::names(&send.body);
    if names.quoted.is_some_and(|seq| seq < conversation.first_seq || seq > conversation.assigned) {
        return Err(StatusCode::NotFound);
    }
    let is_in = |user: &str| match conversation.deciding.kind {
        // The first message of the two.
        Kind::Empty => user == caller.user.as_str() || send.peer.as_ref().is_some_and(|peer| user == peer.as_str()),
        _ => conversation.deciding.members.contains_key(user),
    };
    if names.users.iter().all(|user| is_in(user)) { Ok(()) } else { Err(StatusCode::NotAMember) }
}

/// The facts of an entry with the running number of mentions of all.
fn with_all(meta: Bytes, all: u64) -> Bytes {
    if all == 0 {
        return meta;
    }
    // Fields of one message may stand in two pieces.
    let all = EntryMeta { all, ..EntryMeta::default() }.encode_to_vec();
    if meta.is_empty() { all.into() } else { [meta.as_ref(), &all].concat().into() }
}

impl Context {
    /// Answers a send that was not numbered.
    pub fn answer_send(
        &mut self,
        conversation: &mut Conversation,
        caller: &Caller,
        client_message_id: Bytes,
        answer: SendAnswer,
        status: v1::Status,
    ) {
        self.is_refused(conversation, caller, &client_message_id);
        match answer {
            SendAnswer::Session { attempt } => {
                let ack = v1::SendAck {
                    client_message_id,
                    conversation_id: conversation.id.to_bytes(),
                    status: Some(status),
                    ..v1::SendAck::default()
                };
                self.ack_read(caller, ack, attempt);
            }
            SendAnswer::Reply(reply_to) => self.answer_read(reply_to, Err(status)),
        }
    }

    /// A refusal rests on what is in memory, like [`Self::answer_read`].
    fn ack_read(&mut self, caller: &Caller, ack: v1::SendAck, attempt: u64) {
        if !self.past_lease() {
            return self.ack(caller, ack, attempt);
        }
        let (fence, caller) = (self.fence.clone(), caller.clone());
        self.then(async move { fence.clean().await }, move |worker, is_owner| {
            // Else the router has ended, and the gateway asks the next owner.
            if is_owner {
                worker.context.ack(&caller, ack, attempt);
            }
        });
    }

    /// Sends an ack to the session that sent the message.
    pub fn ack(&mut self, caller: &Caller, ack: v1::SendAck, attempt: u64) {
        if let Some(key) = &caller.session {
            let result = v1::SendResult { session_id: key.session.0, ack: Some(ack), attempt };
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
            ReplyKind::SetVisibility => v1::PresenceSetVisibilityReply { seq }.encode_to_vec(),
            ReplyKind::ChannelCreate => v1::ChannelCreateReply { conversation_id: id.to_bytes(), seq }.encode_to_vec(),
            ReplyKind::Subscribe => v1::ChannelSubscribeReply { own_seq: seq }.encode_to_vec(),
            ReplyKind::Unsubscribe => v1::ChannelUnsubscribeReply { own_seq: seq }.encode_to_vec(),
        };
        AnswerValue::Reply(reply.into())
    }
}
