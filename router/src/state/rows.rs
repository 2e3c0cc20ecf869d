//! Rows of the state tables: their values, and where cursors are.

use bytes::Bytes;
use im_proto::{ConversationId, UserId};
use im_storage::{StateWrite, Table};
use prost::Message as _;

use super::mention_partition;

/// The value of `Table::Conversations`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConversationValue {
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub one: String,
    #[prost(string, tag = "4")]
    pub other: String,
    /// Of a self log.
    #[prost(bool, tag = "16")]
    pub invisible: bool,
}

/// The value of `Table::Members`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MemberValue {
    #[prost(int32, tag = "1")]
    pub role: i32,
    #[prost(uint64, tag = "2")]
    pub joined_seq: u64,
    #[prost(uint64, tag = "3")]
    pub joined_counted: u64,
    /// Has been a member and is none any more.
    #[prost(bool, tag = "4")]
    pub left: bool,
    #[prost(uint64, tag = "5")]
    pub joined_all: u64,
}

/// The value of `Table::Cursors` under a user id. The timestamp is the seq. Under a user id with a zero byte behind it, where it is
/// empty, the timestamp is the seq up to which the user has received everything.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CursorValue {
    #[prost(uint64, tag = "1")]
    pub counted: u64,
    /// The running number of mentions of all.
    #[prost(uint64, tag = "2")]
    pub all: u64,
}

/// The value of `Table::UserConversations`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ListValue {
    #[prost(int32, tag = "1")]
    pub kind: i32,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub peer_user_id: String,
    #[prost(uint64, tag = "4")]
    pub joined_seq: u64,
    #[prost(uint64, tag = "5")]
    pub left_seq: u64,
    #[prost(bool, tag = "6")]
    pub subscribed: bool,
    #[prost(bool, tag = "7")]
    pub ended: bool,
}

/// Where a user's cursor is. The readers of a channel are any number: each has a partition.
pub fn cursor_partition(is_channel: bool, id: &ConversationId, user: &UserId) -> Bytes {
    if is_channel { mention_partition(id, user) } else { id.to_bytes() }
}

/// A user's read cursor as a row: its timestamp is its seq, so it only moves forward.
pub fn cursor_write(is_channel: bool, id: &ConversationId, user: &UserId, seq: u64, value: &CursorValue) -> StateWrite {
    StateWrite {
        table: Table::Cursors,
        partition: cursor_partition(is_channel, id, user),
        key: Bytes::copy_from_slice(user.as_str().as_bytes()),
        value: Some(value.encode_to_vec().into()),
        timestamp: seq,
    }
}
