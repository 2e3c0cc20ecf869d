//! Groups: create, invite, leave as entries of the group's log; members from the committed state.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use im_proto::{
    ConversationId, StatusCode, UserId, body, limits,
    v1::{self, EntryKind, Role, system_event::Event},
};
use prost::Message as _;

use super::{
    Context,
    waiting::{Request, Slot},
};
use crate::{
    caller::Caller,
    conversation::{Assigned, Completion, Conversation, Dedupe, ReplyKind, Seen},
    message::{AnswerValue, Call, ReplyTo, overloaded},
    state::{EntryMeta, Kind},
};

/// Members of one answer.
const MEMBERS_PAGE_MAX: u32 = 1_000;

/// A group or channel to be created.
pub struct Creation {
    pub id: ConversationId,
    pub name: String,
    /// Besides the creator.
    pub members: Vec<String>,
    pub members_max: usize,
    pub kind: ReplyKind,
}

/// An entry that a call makes.
pub struct Made {
    pub event: Event,
    /// The call's `client_message_id`; empty if it has none.
    pub id: Bytes,
    /// What was asked for under that id; 0 if it has none.
    pub print: u64,
    pub kind: ReplyKind,
}

/// What a call asks for under its id.
pub struct Asked<'a> {
    pub id: &'a Bytes,
    pub print: u64,
    pub kind: ReplyKind,
}

impl Context {
    /// Creates the group, or answers with the one that the same creator and key have made.
    pub fn group_create(
        &mut self,
        conversation: &mut Conversation,
        call: Call,
        request: v1::GroupCreateRequest,
        reply_to: ReplyTo,
    ) {
        let id = self.cluster.config.cluster_secret.group_id(&call.caller.user, &request.key);
        let v1::GroupCreateRequest { name, members, .. } = request;
        let creation =
            Creation { id, name, members, members_max: limits::GROUP_MEMBERS_MAX, kind: ReplyKind::GroupCreate };
        self.create(conversation, call, creation, reply_to);
    }

    /// Creates the conversation, or answers with the one that the same creator and key have made, if it was made of the same.
    pub fn create(&mut self, conversation: &mut Conversation, call: Call, creation: Creation, reply_to: ReplyTo) {
        let Creation { id, name, members: names, members_max, kind } = creation;
        if id != conversation.id {
            let status = self.cluster.mistake("a creation came to a conversation of another id");
            return self.cluster.answer(reply_to, Err(status));
        }
        let members = match members(&names) {
            Ok(members) => members,
            Err(status) => return self.cluster.answer(reply_to, Err(status.to_status())),
        };
        let caller = call.caller.clone();
        let others = members.iter().filter(|user| **user != caller.user).map(UserId::to_string);
        if name.len() > limits::GROUP_NAME_BYTES_MAX || others.clone().count() >= members_max {
            return self.cluster.answer(reply_to, Err(StatusCode::TooLarge.to_status()));
        }
        let (creator, members) =
            (caller.user.to_string(), std::iter::once(caller.user.to_string()).chain(others).collect());
        let event = match kind {
            ReplyKind::ChannelCreate => Event::ChannelCreated(v1::ChannelCreated { name, creator, members }),
            _ => Event::GroupCreated(v1::GroupCreated { name, creator, members }),
        };
        if conversation.assigned > 0 {
            return self.created_before(conversation, call, event, kind, reply_to);
        }
        let made = Made { event, id: Bytes::new(), print: 0, kind };
        self.assign_event(conversation, &caller, made, reply_to);
    }

    /// The first entry says of what the conversation was made.
    fn created_before(
        &mut self,
        conversation: &mut Conversation,
        call: Call,
        event: Event,
        kind: ReplyKind,
        reply_to: ReplyTo,
    ) {
        if conversation.committed == 0 {
            // It may yet be nothing.
            let again = Completion::Again(Box::new(Request::Call { call, reply_to }));
            return conversation.waiters.entry(1).or_default().push(again);
        }
        let (store, id) = (self.store.clone(), conversation.id);
        let read = async move { store.read_range(id, 1, 1, 1).await };
        self.then(read, move |worker, outcome| {
            let row = outcome.ok().and_then(|rows| rows.into_iter().next()).map(|stored| stored.row);
            let Some(row) = row else { return worker.context.refuse(reply_to) };
            if is_made_of(&row.body, &event) {
                let done = Completion::Reply { reply_to, kind };
                return super::commit::complete_at(&mut worker.context, &id, 1, row.sent_at, done);
            }
            worker.context.cluster.metrics.calls_refused.increment(1);
            worker.context.cluster.answer(reply_to, Err(StatusCode::PreconditionFailed.to_status()));
        });
    }

    /// Adds users who are not in the group yet. If all are and the call has an id, an entry that names nobody remembers it: whoever leaves
    /// before its repetition comes stays out.
    pub fn group_invite(
        &mut self,
        conversation: &mut Conversation,
        call: Call,
        request: &v1::GroupInviteRequest,
        reply_to: ReplyTo,
    ) {
        let caller = call.caller.clone();
        let id = request.client_message_id.clone();
        let print = Dedupe::call_print("invite", request.members.iter().map(String::as_str));
        let asked = Asked { id: &id, print, kind: ReplyKind::GroupInvite };
        let Some((call, reply_to)) = self.unless_made(conversation, call, &asked, reply_to) else { return };
        let members_max = match conversation.deciding.kind {
            Kind::Group if conversation.is_member(&caller.user) => limits::GROUP_MEMBERS_MAX,
            Kind::Channel if is_owner(conversation, &caller.user) => limits::CHANNEL_WRITERS_MAX,
            Kind::Channel => return self.refuse_call(conversation, call, reply_to, StatusCode::Forbidden),
            _ => return self.refuse_call(conversation, call, reply_to, StatusCode::NotFound),
        };
        let members = match members(&request.members) {
            Ok(members) => members,
            Err(status) => return self.cluster.answer(reply_to, Err(status.to_status())),
        };
        let new: Vec<String> =
            members.iter().filter(|user| !conversation.is_member(user)).map(UserId::to_string).collect();
        if new.is_empty() && id.is_empty() {
            let reply = v1::GroupInviteReply { seq: 0 }.encode_to_vec();
            return self.answer_settled(conversation, call, reply_to, reply.into());
        }
        if conversation.deciding.members.len() + new.len() > members_max {
            return self.refuse_call(conversation, call, reply_to, StatusCode::TooLarge);
        }
        let joined = v1::MembersJoined { invited_by: caller.user.to_string(), members: new };
        let made = Made { event: Event::MembersJoined(joined), id, print, kind: ReplyKind::GroupInvite };
        self.assign_event(conversation, &caller, made, reply_to);
    }

    /// Takes the caller out.
    pub fn group_leave(
        &mut self,
        conversation: &mut Conversation,
        call: Call,
        request: &v1::GroupLeaveRequest,
        reply_to: ReplyTo,
    ) {
        let caller = call.caller.clone();
        let id = request.client_message_id.clone();
        let print = Dedupe::call_print("leave", []);
        let asked = Asked { id: &id, print, kind: ReplyKind::GroupLeave };
        let Some((call, reply_to)) = self.unless_made(conversation, call, &asked, reply_to) else { return };
        let status = match conversation.deciding.kind {
            Kind::Group => StatusCode::NotFound,
            // Who reads unsubscribes.
            Kind::Channel => StatusCode::Forbidden,
            _ => return self.refuse_call(conversation, call, reply_to, StatusCode::NotFound),
        };
        if !conversation.is_member(&caller.user) {
            return self.refuse_call(conversation, call, reply_to, status);
        }
        if is_owner(conversation, &caller.user) && conversation.deciding.members.len() > 1 {
            return self.refuse_call(conversation, call, reply_to, StatusCode::Forbidden);
        }
        let left = v1::MemberLeft { user_id: caller.user.to_string() };
        let made = Made { event: Event::MemberLeft(left), id, print, kind: ReplyKind::GroupLeave };
        self.assign_event(conversation, &caller, made, reply_to);
    }

    /// A page of the members.
    pub fn group_members(
        &mut self,
        conversation: &Conversation,
        caller: &Caller,
        request: &v1::GroupMembersRequest,
        reply_to: ReplyTo,
    ) {
        let state = &conversation.settled;
        let is_many = matches!(state.kind, Kind::Group | Kind::Channel);
        if !is_many || !conversation.may_read(&caller.user) {
            return self.answer_read(reply_to, Err(StatusCode::NotFound.to_status()));
        }
        let limit = match request.limit {
            0 => MEMBERS_PAGE_MAX,
            limit => limit.min(MEMBERS_PAGE_MAX),
        } as usize;
        let after = request.after.as_str();
        let mut page: Vec<v1::GroupMember> = state
            .members
            .range::<str, _>((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded))
            .take(limit + 1)
            .map(|(user, member)| v1::GroupMember {
                user_id: user.to_string(),
                role: member.role.into(),
                joined_seq: member.joined_seq,
            })
            .collect();
        let more = page.len() > limit;
        page.truncate(limit);
        let next =
            if more { page.last().map(|member| member.user_id.clone()).unwrap_or_default() } else { String::new() };
        let total = u32::try_from(state.members.len()).unwrap_or(u32::MAX);
        let reply = v1::GroupMembersReply { members: page, name: state.name.clone(), total, next };
        self.answer_read(reply_to, Ok(AnswerValue::Reply(reply.encode_to_vec().into())));
    }

    /// Answers a call that was made before under its id: whoever was invited and has left again stays out, and who has left is told so
    /// again. The same id for anything else is refused. Gives the call back if it is new, as far as the newest entries tell.
    pub fn unless_made(
        &mut self,
        conversation: &mut Conversation,
        call: Call,
        asked: &Asked<'_>,
        reply_to: ReplyTo,
    ) -> Option<(Call, ReplyTo)> {
        if asked.id.len() > limits::CLIENT_MESSAGE_ID_BYTES_MAX {
            self.cluster.answer(reply_to, Err(StatusCode::TooLarge.to_status()));
            return None;
        }
        let key = Dedupe::key(&call.caller.user, asked.id);
        let seen = (!asked.id.is_empty()).then(|| conversation.dedupe.get(key)).flatten();
        let Some(seen) = seen else { return Some((call, reply_to)) };
        match seen.body_hash {
            None => self.read_made(conversation, key, seen.seq, call, reply_to),
            Some(print) if print == asked.print => {
                let done = Completion::Reply { reply_to, kind: asked.kind };
                self.when_committed(conversation, seen.seq, done);
            }
            // What is not committed may yet be nothing.
            Some(_) if seen.seq > conversation.committed => {
                let again = Completion::Again(Box::new(Request::Call { call, reply_to }));
                conversation.waiters.entry(seen.seq).or_default().push(again);
            }
            Some(_) => {
                self.cluster.metrics.calls_refused.increment(1);
                self.cluster.answer(reply_to, Err(StatusCode::PreconditionFailed.to_status()));
            }
        }
        None
    }

    /// The entry was read back without its body: read it whole, then decide about the call again.
    fn read_made(&self, conversation: &Conversation, key: u128, seq: u64, call: Call, reply_to: ReplyTo) {
        let (store, id) = (self.store.clone(), conversation.id);
        let read = async move { store.read_range(id, seq, seq, 1).await };
        self.then(read, move |worker, outcome| {
            let row = outcome.ok().and_then(|rows| rows.into_iter().next()).map(|stored| stored.row);
            let Some(row) = row else { return worker.context.refuse(reply_to) };
            if let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id) {
                conversation.dedupe.set_body_hash(key, Dedupe::print(&row), row.sent_at);
            }
            worker.request(id, Request::Call { call, reply_to });
        });
    }

    pub fn assign_event(
        &mut self,
        conversation: &mut Conversation,
        caller: &Arc<Caller>,
        made: Made,
        reply_to: ReplyTo,
    ) {
        if conversation.queue.len() >= self.cluster.config.conversation_queue_max || conversation.unwritten.is_full() {
            return self.cluster.answer(reply_to, Err(overloaded()));
        }
        let Made { event, id, print, kind } = made;
        let (sender, body) = (Some(caller.user.clone()), body::event(event));
        // The first entry of a user's own log says whose it is.
        let begins = conversation.id == caller.self_id && conversation.assigned == 0;
        let user_id = if begins { caller.user.to_string() } else { String::new() };
        let meta = EntryMeta { user_id, print, ..EntryMeta::default() }.encode_to_vec().into();
        let row = self.next_row(conversation, EntryKind::Event, sender, &id, body, meta);
        if !id.is_empty() {
            let seen = Seen { seq: row.seq, sent_at: row.sent_at, body_hash: Some(print) };
            conversation.dedupe.insert(Dedupe::key(&caller.user, &id), seen, conversation.committed);
        }
        let completion = Some(Completion::Reply { reply_to, kind });
        // The caller's own session gets the entry too: the reply names only its seq.
        self.assign(conversation, Assigned { row, sender: None, completion });
    }

    /// A refusal rests on what is assigned: it is told once that is committed.
    pub fn refuse_call(&mut self, conversation: &mut Conversation, call: Call, reply_to: ReplyTo, status: StatusCode) {
        if conversation.last_event > conversation.committed {
            let again = Completion::Again(Box::new(Request::Call { call, reply_to }));
            return conversation.waiters.entry(conversation.last_event).or_default().push(again);
        }
        self.cluster.metrics.calls_refused.increment(1);
        self.answer_read(reply_to, Err(status.to_status()));
    }

    pub fn answer_settled(&mut self, conversation: &mut Conversation, call: Call, reply_to: ReplyTo, reply: Bytes) {
        if conversation.last_event > conversation.committed {
            let again = Completion::Again(Box::new(Request::Call { call, reply_to }));
            return conversation.waiters.entry(conversation.last_event).or_default().push(again);
        }
        self.answer_read(reply_to, Ok(AnswerValue::Reply(reply)));
    }

    fn when_committed(&mut self, conversation: &mut Conversation, seq: u64, completion: Completion) {
        if conversation.committed >= seq {
            let sent_at = conversation.last_sent_at;
            super::commit::complete_at(self, &conversation.id, seq, sent_at, completion);
        } else {
            conversation.waiters.entry(seq).or_default().push(completion);
        }
    }
}

fn is_owner(conversation: &Conversation, user: &UserId) -> bool {
    conversation.deciding.members.get(user).is_some_and(|member| member.role == Role::Owner)
}

/// Whether a first entry is a creation of the same kind, name and members, in whatever order.
fn is_made_of(body: &Bytes, asked: &Event) -> bool {
    let content = v1::Body::decode(body.clone()).ok().and_then(|body| body.content);
    let Some(v1::body::Content::Event(v1::SystemEvent { event: Some(made) })) = content else { return false };
    let parts = |event: Event| match event {
        Event::GroupCreated(v1::GroupCreated { name, creator, members }) => Some((false, name, creator, members)),
        Event::ChannelCreated(v1::ChannelCreated { name, creator, members }) => Some((true, name, creator, members)),
        _ => None,
    };
    let parts = |event: Event| {
        let (is_channel, name, creator, members) = parts(event)?;
        Some((is_channel, name, creator, members.into_iter().collect::<BTreeSet<_>>()))
    };
    parts(made).is_some_and(|made| Some(made) == parts(asked.clone()))
}

fn members(names: &[String]) -> Result<BTreeSet<UserId>, StatusCode> {
    if names.len() > limits::MEMBERS_PER_CALL_MAX {
        return Err(StatusCode::TooLarge);
    }
    names.iter().map(|name| UserId::parse(name).map_err(|_| StatusCode::Malformed)).collect()
}
