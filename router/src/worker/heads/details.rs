//! What a list shows of a conversation beside its head: the newest message, mentions, how far the others have come. From the log and
//! the tables; only what a list asks for is read.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use im_proto::{ConversationId, UserId, limits, v1};
use im_storage::{StateRow, StoreError, Table};
use prost::Message as _;

use crate::{
    conversation::{Conversation, Cursor},
    deadline::StoreCalls,
    state::{MemberValue, cursor_partition, mention_partition},
    worker::{fan_out, idle::HeadValue, receipts},
};

/// Rows of the cursors of a small conversation that are read at once, of those included who have left it. If there are more, those of its
/// members are read one by one.
const CURSOR_ROWS_MAX: usize = 8 * limits::RECEIPT_MEMBERS_MAX;
/// Reads of the members of a small group, of those included who have left it: 32,768. Members behind so many are not shown.
const MEMBER_READS_MAX: usize = 64;

/// What the owner knows of a conversation at one moment.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Each reader of a channel has a cursor of its own partition.
    pub is_channel: bool,
    newest_counted: u64,
    mentions: MentionFacts,
    others: Others,
}

/// What of it tells unread mentions of a user: all that moving a cursor needs, each time somebody reads on.
#[derive(Clone, Debug, Default)]
pub struct MentionFacts {
    /// The running number of mentions of all, at the head.
    all: u64,
    newest: u64,
    /// Mentions of the user whose rows are being written.
    unwritten: Vec<u64>,
}

impl MentionFacts {
    /// Of an open conversation, for a user.
    pub fn of(conversation: &Conversation, user: &UserId) -> Self {
        if !conversation.may_read(user) {
            return Self::default();
        }
        let unwritten = conversation.mentions_unwritten.iter().filter(|(_, users)| users.contains(user));
        Self {
            all: conversation.committed_all,
            newest: conversation.newest_mention,
            unwritten: unwritten.map(|(seq, _)| *seq).collect(),
        }
    }
}

/// Whose cursors a list shows.
#[derive(Clone, Debug, Default)]
enum Others {
    #[default]
    Nobody,
    /// The other one of the two, whoever that is.
    Peer,
    /// Known from memory, with their cursors as far as they moved since the conversation was opened.
    Members(BTreeMap<UserId, v1::MemberCursor>),
    /// The members of a small group, to be read.
    Group,
}

impl Facts {
    /// Of an open conversation, for a user.
    pub fn of(conversation: &Conversation, user: &UserId) -> Self {
        if !conversation.may_read(user) {
            return Self::default();
        }
        let members = &conversation.settled.members;
        let others = if receipts::is_small(conversation) {
            let others = members.keys().filter(|other| *other != user);
            Others::Members(others.map(|other| (other.clone(), cursor_of(conversation, other))).collect())
        } else {
            Others::Nobody
        };
        Self {
            is_channel: conversation.is_channel(),
            newest_counted: conversation.newest_counted,
            mentions: MentionFacts::of(conversation, user),
            others,
        }
    }

    /// Of an open conversation of which a list shows nothing.
    pub fn brief(conversation: &Conversation) -> Self {
        Self { is_channel: conversation.is_channel(), ..Self::default() }
    }

    /// Of a quiet conversation.
    pub fn stored(head: &HeadValue) -> Self {
        let others = match v1::ConversationKind::try_from(head.kind) {
            Ok(v1::ConversationKind::Direct) => Others::Peer,
            Ok(v1::ConversationKind::Group) if head.members <= limits::RECEIPT_MEMBERS_MAX as u64 => Others::Group,
            _ => Others::Nobody,
        };
        Self {
            is_channel: head.kind == v1::ConversationKind::Channel as i32,
            newest_counted: head.newest_counted,
            mentions: MentionFacts { all: head.all, newest: head.newest_mention, unwritten: Vec::new() },
            others,
        }
    }
}

fn cursor_of(conversation: &Conversation, user: &UserId) -> v1::MemberCursor {
    let read_seq = conversation.cursor(user).seq;
    let received_seq = conversation.marks.received(user).max(read_seq);
    v1::MemberCursor { user_id: user.to_string(), read_seq, received_seq }
}

/// A head on its way to who asked.
#[derive(Debug)]
pub struct Draft {
    pub id: ConversationId,
    pub head: v1::Head,
    /// The running number of mentions of all, at the user's read cursor.
    pub read_all: u64,
    pub facts: Facts,
    /// The user subscribes: where the cursor is to begin.
    pub begins: Option<Cursor>,
}

impl Draft {
    /// The owner cannot answer for this one now.
    pub fn unavailable(id: ConversationId) -> Self {
        let head = v1::Head { conversation_id: id.to_bytes(), unavailable: true, ..v1::Head::default() };
        Self { id, head, read_all: 0, facts: Facts::default(), begins: None }
    }

    /// Reads what is missing.
    pub async fn finish(mut self, store: &StoreCalls, user: &UserId, details: bool) -> Result<v1::Head, StoreError> {
        if self.head.unavailable {
            return Ok(self.head);
        }
        if !details || matches!(self.facts.others, Others::Nobody) {
            if let Some(cursor) = self.begins {
                store.write(vec![cursor.to_write(self.facts.is_channel, &self.id, user)]).await?;
            }
            let partition = cursor_partition(self.facts.is_channel, &self.id, user);
            self.read_to(store.read(Table::Cursors, &partition, user.as_str().as_bytes()).await?);
        } else {
            self.cursors(store, user).await?;
        }
        if details {
            let cursor = Cursor { seq: self.head.read_seq, counted: self.head.read_counted, all: self.read_all };
            let mentions = mentions(store, self.id, user, cursor, self.head.head, &self.facts.mentions).await?;
            (self.head.mentions, self.head.mentioned_seqs) = (mentions.count, mentions.newest);
            self.head.preview = self.preview(store).await?;
        }
        Ok(self.head)
    }

    /// The stored cursor may be ahead of the one in memory, which knows only what moved since the conversation was opened.
    fn read_to(&mut self, row: Option<StateRow>) {
        if let Some(row) = row
            && row.timestamp > self.head.read_seq
            && let Some(cursor) = Cursor::of_row(row)
        {
            (self.head.read_seq, self.head.read_counted, self.read_all) = (cursor.seq, cursor.counted, cursor.all);
        }
    }

    /// The user's own cursor and those of the others: in one read, unless so many have come and gone that they do not fit.
    async fn cursors(&mut self, store: &StoreCalls, user: &UserId) -> Result<(), StoreError> {
        let mut rows = store.scan(Table::Cursors, self.id.as_bytes(), None, CURSOR_ROWS_MAX).await?;
        let mut others = match std::mem::take(&mut self.facts.others) {
            Others::Members(others) => others,
            Others::Group => read_members(store, self.id, user).await?,
            Others::Peer | Others::Nobody => rows.iter().filter_map(|row| other_of(row, user)).collect(),
        };
        if rows.len() == CURSOR_ROWS_MAX {
            let mut keys = Vec::with_capacity(2 * others.len() + 2);
            for user in others.keys().chain([user]) {
                keys.extend([Bytes::copy_from_slice(user.as_str().as_bytes()), receipts::received_key(user)]);
            }
            let reads = keys.into_iter().map(|key| read_cursor(store, self.id, key));
            rows = super::at_a_time(reads).await?.into_iter().flatten().collect();
        }
        for row in rows {
            let (key, is_received) = key_of(&row);
            if key == user.as_str().as_bytes() {
                if !is_received {
                    self.read_to(Some(row));
                }
            } else if let Some(other) = std::str::from_utf8(key).ok().and_then(|key| others.get_mut(key)) {
                let seq = if is_received { &mut other.received_seq } else { &mut other.read_seq };
                *seq = row.timestamp.max(*seq);
            }
        }
        for other in others.values_mut() {
            other.received_seq = other.received_seq.max(other.read_seq);
        }
        self.head.cursors = others.into_values().collect();
        Ok(())
    }

    async fn preview(&self, store: &StoreCalls) -> Result<Option<v1::Message>, StoreError> {
        let seq = self.facts.newest_counted;
        if seq < self.head.first_seq || seq == 0 {
            return Ok(None);
        }
        let rows = store.read_range(self.id, seq, seq, 1).await?;
        Ok(rows.into_iter().next().map(|stored| {
            let mut message = fan_out::entry_message(self.id.to_bytes(), &stored.row);
            if message.body.len() > limits::PREVIEW_BODY_BYTES_MAX {
                message.body = Bytes::new();
            }
            message
        }))
    }
}

async fn read_cursor(store: &StoreCalls, id: ConversationId, key: Bytes) -> Result<Option<StateRow>, StoreError> {
    store.read(Table::Cursors, id.as_bytes(), &key).await
}

/// Whose cursor a row is, and whether it is the received one.
fn key_of(row: &StateRow) -> (&[u8], bool) {
    row.key.strip_suffix(&[0]).map_or((row.key.as_ref(), false), |user| (user, true))
}

fn other_of(row: &StateRow, user: &UserId) -> Option<(UserId, v1::MemberCursor)> {
    let other = std::str::from_utf8(key_of(row).0).ok().and_then(|key| UserId::parse(key).ok())?;
    let cursor = v1::MemberCursor { user_id: other.to_string(), ..v1::MemberCursor::default() };
    (other != *user).then_some((other, cursor))
}

/// The other members of a small group, each as if nothing was read since the join.
async fn read_members(
    store: &StoreCalls,
    id: ConversationId,
    user: &UserId,
) -> Result<BTreeMap<UserId, v1::MemberCursor>, StoreError> {
    let (mut members, mut after) = (BTreeMap::new(), None);
    for _ in 0..MEMBER_READS_MAX {
        let rows = store.scan(Table::Members, id.as_bytes(), after.as_deref(), CURSOR_ROWS_MAX).await?;
        let is_last = rows.len() < CURSOR_ROWS_MAX;
        after = rows.last().map(|row| row.key.clone());
        members.extend(rows.into_iter().filter_map(|row| {
            let member = std::str::from_utf8(&row.key).ok().and_then(|key| UserId::parse(key).ok())?;
            let value = MemberValue::decode(row.value).ok().filter(|value| !value.left)?;
            let (user_id, read_seq) = (member.to_string(), value.joined_seq);
            (member != *user).then_some((member, v1::MemberCursor { user_id, read_seq, received_seq: read_seq }))
        }));
        if is_last {
            break;
        }
    }
    Ok(members)
}

/// Unread mentions.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mentions {
    /// By name and of all together.
    pub count: u64,
    /// The newest of those by name, ascending.
    pub newest: Vec<u64>,
}

/// The mentions of a user beyond a cursor, up to a head.
pub async fn mentions(
    store: &StoreCalls,
    id: ConversationId,
    user: &UserId,
    cursor: Cursor,
    head: u64,
    facts: &MentionFacts,
) -> Result<Mentions, StoreError> {
    let all = facts.all.saturating_sub(cursor.all);
    if facts.newest <= cursor.seq {
        return Ok(Mentions { count: all, newest: Vec::new() });
    }
    let (partition, after) = (mention_partition(&id, user), cursor.seq.to_be_bytes());
    let rows = store.scan(Table::Mentions, &partition, Some(&after), limits::MENTIONS_COUNTED_MAX).await?;
    let mut seqs: BTreeSet<u64> = rows.iter().map(|row| row.timestamp).collect();
    seqs.extend(&facts.unwritten);
    let unread: Vec<u64> = seqs.into_iter().filter(|seq| (cursor.seq + 1..=head).contains(seq)).collect();
    let count = unread.len().min(limits::MENTIONS_COUNTED_MAX) as u64;
    let newest = unread[unread.len().saturating_sub(limits::MENTIONED_SEQS_MAX)..].to_vec();
    Ok(Mentions { count: count + all, newest })
}

/// What kind it is, and how many members, for the head row.
pub fn shape(conversation: &Conversation) -> (i32, u64) {
    (conversation.settled.kind.to_wire().into(), conversation.settled.members.len() as u64)
}
