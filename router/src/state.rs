//! What a conversation is, made of the entries of its log. Pure: no I/O, no clock.
//!
//! The same [`apply`] runs three times over an entry: on the state that decides (after all assigned entries), on the committed state,
//! and again at open. So it is idempotent: applying an entry a second time changes nothing.

mod rows;

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use im_proto::{
    ConversationId, UserId, body,
    key::ClusterSecret,
    v1::{self, EntryKind, Role, system_event::Event},
};
use im_storage::{Row, StateWrite, Table};
use prost::Message as _;

pub use self::rows::{ConversationValue, CursorValue, ListValue, MemberValue, cursor_partition, cursor_write};
use crate::message::Effect;

/// What kind of conversation it is, and whose.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Kind {
    /// No entry yet.
    #[default]
    Empty,
    Direct(UserId, UserId),
    Group,
    /// Its members are those who may write. Who reads it is known to the readers' own logs.
    Channel,
    SelfLog(UserId),
}

impl Kind {
    /// As clients and tables know it.
    pub fn to_wire(&self) -> v1::ConversationKind {
        match self {
            Kind::Empty => v1::ConversationKind::Unspecified,
            Kind::Direct(..) => v1::ConversationKind::Direct,
            Kind::Group => v1::ConversationKind::Group,
            Kind::Channel => v1::ConversationKind::Channel,
            Kind::SelfLog(_) => v1::ConversationKind::Self_,
        }
    }
}

/// A member of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub role: Role,
    /// The entry by which the member came in; 0 for the two of a direct conversation.
    pub joined_seq: u64,
    /// `counted` at that entry: where the member's unread count begins.
    pub joined_counted: u64,
    /// The running number of mentions of all at that entry.
    pub joined_all: u64,
}

/// A row of a user's conversation list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListRow {
    pub kind: v1::ConversationKind,
    pub name: String,
    pub peer_user_id: String,
    pub joined_seq: u64,
    pub left_seq: u64,
    /// Of a channel: the user's own subscription, not the channel's log, put it here.
    pub subscribed: bool,
    /// The user has ended the subscription.
    pub ended: bool,
    /// The entry of the self log that changed the row last: its version.
    pub version: u64,
}

impl ListRow {
    /// The greatest seq of the origin's log that this row has seen.
    pub fn origin_seq(&self) -> u64 {
        self.joined_seq.max(self.left_seq)
    }

    /// Whether the user is out.
    pub fn left(&self) -> bool {
        self.ended || self.left_seq > self.joined_seq
    }
}

/// The state of a conversation after some entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub kind: Kind,
    pub name: String,
    pub members: BTreeMap<UserId, Member>,
    /// Of a self log: the user's conversations.
    pub list: BTreeMap<ConversationId, Arc<ListRow>>,
    /// Of a self log: others do not see the user come and go.
    pub invisible: bool,
}

/// Server-side facts of an entry, in `Row::meta`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct EntryMeta {
    /// First entry of a direct conversation: the other user; of a self log: its user.
    #[prost(string, tag = "1")]
    pub user_id: String,
    /// An effect of another log's entry.
    #[prost(bytes = "bytes", tag = "2")]
    pub origin: Bytes,
    #[prost(uint64, tag = "3")]
    pub origin_seq: u64,
    /// The running number of mentions of all, this entry included.
    #[prost(uint64, tag = "4")]
    pub all: u64,
    /// Of an entry that a call made under an id: what was asked for ([`crate::conversation::Dedupe::call_print`]).
    #[prost(fixed64, tag = "5")]
    pub print: u64,
}

/// What an entry does besides being there.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Consequences {
    /// Rows of the state tables.
    pub writes: Vec<StateWrite>,
    /// Entries in other logs.
    pub effects: Vec<Effect>,
    /// Who came into the group.
    pub joined: Vec<UserId>,
    /// Who left it.
    pub gone: Vec<UserId>,
    /// Of a self log: which conversation the user left.
    pub left: Option<ConversationId>,
    /// Of a self log: which group or channel the user came into.
    pub entered: Option<(ConversationId, v1::ConversationKind)>,
    /// Of a self log: whether the user is invisible from now on.
    pub invisible: Option<bool>,
}

/// Rows and effects of an entry that make it heavy.
const HEAVY: usize = 16;

impl Consequences {
    /// Whether it costs an open much to apply the entry again.
    pub fn is_heavy(&self) -> bool {
        self.writes.len() + self.effects.len() >= HEAVY
    }
}

/// Applies an entry to a state and tells what follows from it.
pub fn apply(state: &mut State, id: &ConversationId, row: &Row, secret: &ClusterSecret) -> Consequences {
    let mut out = Consequences::default();
    if row.seq == 1 && state.kind == Kind::Empty && row.kind != EntryKind::Event {
        begin(state, id, row, secret, &mut out);
    } else if row.seq == 1 && row.kind != EntryKind::Event {
        // Applied before; what follows from it is told again.
        begin(&mut State::default(), id, row, secret, &mut out);
    }
    if row.kind == EntryKind::Event {
        let event = v1::Body::decode(row.body.clone()).ok().and_then(|body| match body.content {
            Some(v1::body::Content::Event(event)) => event.event,
            _ => None,
        });
        if row.seq == 1
            && let Some(owner) = meta_user(row)
        {
            begin_self(state, id, owner, &mut out);
        }
        match event {
            Some(event) => apply_event(state, id, row, &event, secret, &mut out),
            None => tracing::error!(conversation = %id, seq = row.seq, "an event that cannot be read was skipped"),
        }
    }
    out
}

/// What is in `Row::meta`.
pub fn meta(row: &Row) -> EntryMeta {
    EntryMeta::decode(row.meta.clone()).unwrap_or_default()
}

/// The running number of mentions of all at an entry.
pub fn all_of(row: &Row) -> u64 {
    if row.meta.is_empty() { 0 } else { meta(row).all }
}

/// Whom an entry mentions by name. One that mentions all names nobody besides, and nobody is told what they said themselves.
pub fn mentioned(row: &Row) -> Vec<UserId> {
    if row.flags & body::FLAG_MENTIONS == 0 || row.flags & body::FLAG_MENTIONS_ALL != 0 {
        return Vec::new();
    }
    let users = body::names(&row.body).users;
    users
        .into_iter()
        .filter_map(|user| UserId::parse(user).ok())
        .filter(|user| row.sender.as_ref() != Some(user))
        .collect()
}

/// The rows of the personal mentions of an entry.
pub fn mention_writes(id: &ConversationId, row: &Row, mentioned: &[UserId]) -> Vec<StateWrite> {
    let write = |user: &UserId| StateWrite {
        table: Table::Mentions,
        partition: mention_partition(id, user),
        key: Bytes::copy_from_slice(&row.seq.to_be_bytes()),
        value: Some(Bytes::new()),
        timestamp: row.seq,
    };
    mentioned.iter().map(write).collect()
}

/// Where a user's mentions in a conversation are.
pub fn mention_partition(id: &ConversationId, user: &UserId) -> Bytes {
    [id.as_bytes().as_slice(), user.as_str().as_bytes()].concat().into()
}

fn meta_user(row: &Row) -> Option<UserId> {
    UserId::parse(&meta(row).user_id).ok()
}

/// The first entry of a direct conversation or a self log says whose it is.
fn begin(state: &mut State, id: &ConversationId, row: &Row, secret: &ClusterSecret, out: &mut Consequences) {
    let (Some(sender), Some(other)) = (row.sender.clone(), meta_user(row)) else { return };
    if sender == other {
        return begin_self(state, id, sender, out);
    }
    state.kind = Kind::Direct(sender.clone(), other.clone());
    for user in [&sender, &other] {
        let member = Member { role: Role::Member, joined_seq: 0, joined_counted: 0, joined_all: 0 };
        state.members.entry(user.clone()).or_insert(member);
    }
    let value = ConversationValue {
        kind: v1::ConversationKind::Direct as u32,
        one: sender.to_string(),
        other: other.to_string(),
        ..ConversationValue::default()
    };
    out.writes.push(write(Table::Conversations, id, Bytes::new(), value.encode_to_vec(), row.seq));
    for (user, peer) in [(&sender, &other), (&other, &sender)] {
        out.effects.push(joined(id, user, v1::ConversationKind::Direct, "", peer.as_str(), row.seq, secret));
    }
}

fn begin_self(state: &mut State, id: &ConversationId, owner: UserId, out: &mut Consequences) {
    out.writes.push(self_row(id, &owner, false, 1));
    state.members.entry(owner.clone()).or_insert(Member {
        role: Role::Owner,
        joined_seq: 0,
        joined_counted: 0,
        joined_all: 0,
    });
    state.kind = Kind::SelfLog(owner);
}

/// The row of a self log.
fn self_row(id: &ConversationId, owner: &UserId, invisible: bool, seq: u64) -> StateWrite {
    let value = ConversationValue {
        kind: v1::ConversationKind::Self_ as u32,
        name: String::new(),
        one: owner.to_string(),
        other: String::new(),
        invisible,
    };
    write(Table::Conversations, id, Bytes::new(), value.encode_to_vec(), seq)
}

fn apply_event(
    state: &mut State,
    id: &ConversationId,
    row: &Row,
    event: &Event,
    secret: &ClusterSecret,
    out: &mut Consequences,
) {
    match event {
        Event::GroupCreated(v1::GroupCreated { name, creator, members })
        | Event::ChannelCreated(v1::ChannelCreated { name, creator, members }) => {
            let is_channel = matches!(event, Event::ChannelCreated(_));
            state.kind = if is_channel { Kind::Channel } else { Kind::Group };
            state.name.clone_from(name);
            let value = ConversationValue {
                kind: state.kind.to_wire() as u32,
                name: name.clone(),
                one: creator.clone(),
                ..ConversationValue::default()
            };
            out.writes.push(write(Table::Conversations, id, Bytes::new(), value.encode_to_vec(), row.seq));
            for user in members {
                let role = if user == creator { Role::Owner } else { invited_role(state) };
                join(state, id, row, user, role, secret, out);
            }
        }
        Event::MembersJoined(joined) => {
            for name in &joined.members {
                join(state, id, row, name, invited_role(state), secret, out);
            }
        }
        Event::MemberLeft(left) => {
            let Ok(user) = UserId::parse(&left.user_id) else { return };
            if state.members.get(&user).is_some_and(|member| member.joined_seq < row.seq) {
                state.members.remove(&user);
            }
            // The row stays, so that a repeat of what the user sent before is known for what it is.
            let value = MemberValue { left: true, ..MemberValue::default() };
            let key = Bytes::copy_from_slice(user.as_str().as_bytes());
            out.writes.push(write(Table::Members, id, key, value.encode_to_vec(), row.seq));
            out.gone.push(user.clone());
            let gone = v1::ConversationLeft { conversation_id: id.to_bytes(), left_seq: row.seq };
            out.effects.push(effect(id, &user, row.seq, Event::ConversationLeft(gone), secret));
        }
        Event::ConversationJoined(joined) => list_joined(state, id, row, joined, out),
        Event::ConversationLeft(left) => list_left(state, id, row, left, out),
        Event::VisibilityChanged(changed) => {
            let Kind::SelfLog(owner) = &state.kind else { return };
            state.invisible = changed.invisible;
            out.invisible = Some(changed.invisible);
            // One entry touches a row once: as the first one of a log it says what else the row has.
            out.writes.retain(|write| write.table != Table::Conversations);
            out.writes.push(self_row(id, owner, changed.invisible, row.seq));
        }
    }
}

/// What somebody is who did not create it.
fn invited_role(state: &State) -> Role {
    if state.kind == Kind::Channel { Role::Admin } else { Role::Member }
}

fn join(
    state: &mut State,
    id: &ConversationId,
    row: &Row,
    name: &str,
    role: Role,
    secret: &ClusterSecret,
    out: &mut Consequences,
) {
    let Ok(user) = UserId::parse(name) else { return };
    let member = Member { role, joined_seq: row.seq, joined_counted: row.counted, joined_all: all_of(row) };
    let Member { joined_seq, joined_counted, joined_all, .. } = member;
    let value = MemberValue { role: role.into(), joined_seq, joined_counted, joined_all, left: false };
    let key = Bytes::copy_from_slice(user.as_str().as_bytes());
    out.writes.push(write(Table::Members, id, key, value.encode_to_vec(), row.seq));
    // The join moves the read cursor: what was said before is not unread.
    let cursor = CursorValue { counted: joined_counted, all: joined_all };
    out.writes.push(cursor_write(state.kind == Kind::Channel, id, &user, row.seq, &cursor));
    out.effects.push(joined(id, &user, state.kind.to_wire(), &state.name, "", row.seq, secret));
    out.joined.push(user.clone());
    if state.members.get(&user).is_none_or(|known| known.joined_seq < row.seq) {
        state.members.insert(user, member);
    }
}

fn list_joined(
    state: &mut State,
    id: &ConversationId,
    row: &Row,
    joined: &v1::ConversationJoined,
    out: &mut Consequences,
) {
    let Ok(conversation) = ConversationId::from_slice(&joined.conversation_id) else { return };
    let left_seq = state.list.get(&conversation).map_or(0, |known| known.left_seq);
    let entry = ListRow {
        kind: joined.kind(),
        name: joined.name.clone(),
        peer_user_id: joined.peer_user_id.clone(),
        joined_seq: joined.joined_seq,
        left_seq,
        subscribed: row.sender.is_some(),
        ended: false,
        version: row.seq,
    };
    let is_many = matches!(entry.kind, v1::ConversationKind::Group | v1::ConversationKind::Channel);
    out.entered = (is_many && !entry.left()).then_some((conversation, entry.kind));
    put_list_row(state, id, conversation, entry, out);
}

fn list_left(state: &mut State, id: &ConversationId, row: &Row, left: &v1::ConversationLeft, out: &mut Consequences) {
    let Ok(conversation) = ConversationId::from_slice(&left.conversation_id) else { return };
    let Some(known) = state.list.get(&conversation) else { return };
    let (ended, left_seq) = (row.sender.is_some(), left.left_seq);
    let entry = ListRow { left_seq, ended, version: row.seq, ..(**known).clone() };
    out.left = entry.left().then_some(conversation);
    put_list_row(state, id, conversation, entry, out);
}

fn put_list_row(
    state: &mut State,
    id: &ConversationId,
    conversation: ConversationId,
    entry: ListRow,
    out: &mut Consequences,
) {
    if state.list.get(&conversation).is_some_and(|known| known.version > entry.version) {
        return;
    }
    let value = ListValue {
        kind: entry.kind.into(),
        name: entry.name.clone(),
        peer_user_id: entry.peer_user_id.clone(),
        joined_seq: entry.joined_seq,
        left_seq: entry.left_seq,
        subscribed: entry.subscribed,
        ended: entry.ended,
    };
    out.writes.push(write(Table::UserConversations, id, conversation.to_bytes(), value.encode_to_vec(), entry.version));
    state.list.insert(conversation, Arc::new(entry));
}

fn write(table: Table, id: &ConversationId, key: Bytes, value: Vec<u8>, timestamp: u64) -> StateWrite {
    StateWrite { table, partition: id.to_bytes(), key, value: Some(value.into()), timestamp }
}

fn joined(
    id: &ConversationId,
    user: &UserId,
    kind: v1::ConversationKind,
    name: &str,
    peer: &str,
    seq: u64,
    secret: &ClusterSecret,
) -> Effect {
    let joined = v1::ConversationJoined {
        conversation_id: id.to_bytes(),
        kind: kind.into(),
        name: name.to_owned(),
        peer_user_id: peer.to_owned(),
        joined_seq: seq,
    };
    effect(id, user, seq, Event::ConversationJoined(joined), secret)
}

fn effect(id: &ConversationId, user: &UserId, origin_seq: u64, event: Event, secret: &ClusterSecret) -> Effect {
    Effect {
        target: secret.self_id(user),
        target_user: user.clone(),
        origin: *id,
        origin_seq,
        body: body::event(event),
    }
}

#[cfg(test)]
mod tests;
