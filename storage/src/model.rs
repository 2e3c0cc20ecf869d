//! What is stored.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use im_proto::{ConversationId, Epoch, Timestamp, UserId, limits, v1::EntryKind};

/// A partition of a conversation's log: `(seq − 1) / 1024`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BucketId(pub u64);

impl BucketId {
    /// The bucket of a seq; seqs begin at 1.
    pub const fn of(seq: u64) -> Self {
        Self(seq.saturating_sub(1) / limits::BUCKET_ENTRIES)
    }

    /// Its first seq.
    pub const fn first_seq(self) -> u64 {
        self.0 * limits::BUCKET_ENTRIES + 1
    }

    /// Its last seq.
    pub const fn last_seq(self) -> u64 {
        (self.0 + 1) * limits::BUCKET_ENTRIES
    }
}

/// An entry of a log as it is stored. Every field is always written: empty rather than null.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub seq: u64,
    /// The running number of entries that count as unread, this one included.
    pub counted: u64,
    /// `None` for what the server wrote itself; stored as an empty text.
    pub sender: Option<UserId>,
    pub client_message_id: Bytes,
    pub sent_at: Timestamp,
    pub kind: EntryKind,
    pub flags: u32,
    /// The sender's own bytes.
    pub body: Bytes,
    /// Server-side facts that readers do not see (an encoded message of the router's), mostly empty.
    pub meta: Bytes,
}

impl Row {
    /// What the row adds to a batch, for its bound in bytes.
    pub fn bytes(&self) -> usize {
        64 + self.client_message_id.len()
            + self.body.len()
            + self.meta.len()
            + self.sender.as_ref().map_or(0, |s| s.as_str().len())
    }
}

/// Consecutive rows of one bucket, written as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub conversation: ConversationId,
    /// The write timestamp of every row.
    pub epoch: Epoch,
    /// The last seq committed when the batch was formed; stored in every row.
    pub committed: u64,
    /// 1 to 128 rows with consecutive seqs of one bucket.
    pub rows: Vec<Row>,
}

impl Batch {
    /// The bucket that holds it.
    pub fn bucket(&self) -> BucketId {
        BucketId::of(self.first_seq())
    }

    /// The seq of the first row.
    pub fn first_seq(&self) -> u64 {
        self.rows.first().map_or(0, |row| row.seq)
    }

    /// The seq of the last row.
    pub fn last_seq(&self) -> u64 {
        self.rows.last().map_or(0, |row| row.seq)
    }

    /// Whether it keeps the rules: 1 to 128 consecutive rows of one bucket, at most 512 KiB unless it is a single row.
    pub fn is_valid(&self) -> bool {
        let consecutive = self.rows.windows(2).all(|pair| pair[0].seq.checked_add(1) == Some(pair[1].seq));
        let bytes: usize = self.rows.iter().map(Row::bytes).sum();
        !self.rows.is_empty()
            && self.first_seq() > 0
            && self.rows.len() <= limits::BATCH_ROWS_MAX
            && consecutive
            && BucketId::of(self.first_seq()) == BucketId::of(self.last_seq())
            && (bytes <= limits::BATCH_BYTES_MAX || self.rows.len() == 1)
    }
}

/// A batch on its way to the log.
#[derive(Clone, Debug)]
pub struct AppendRequest {
    /// Chosen by the caller, given back with the outcome.
    pub token: u64,
    pub batch: Arc<Batch>,
}

/// What became of a submitted batch, by its token.
pub type AppendOutcome = (u64, Result<(), StoreError>);

/// Takes outcomes of submitted batches.
pub type AppendDone = Arc<dyn Fn(Vec<AppendOutcome>) + Send + Sync>;

/// A row read back, with the batch facts it was written with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRow {
    pub row: Row,
    pub epoch: Epoch,
    pub committed: u64,
}

/// What idempotency needs of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowKey {
    pub seq: u64,
    pub sender: Option<UserId>,
    pub client_message_id: Bytes,
}

/// The answer to a fence read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence {
    pub fenced: bool,
    pub generation: u64,
}

/// A state table. The number is part of stored keys and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Table {
    /// What the cluster is, and how far an import has come. Partition: empty. Key: empty, or `import`.
    Cluster = 1,
    /// The head row of a quiet conversation. Partition: conversation. Key: empty. Timestamp: the head.
    Heads = 2,
    /// Conversations with a burst under way. Partition: shard (4 bytes big-endian). Key: conversation. Timestamp: first seq of the burst.
    /// A store may forget deletions of these rows: one that comes back costs an open of its conversation.
    Busy = 3,
    /// How far a log was applied, and how far its outbox. Partition: conversation. Key: which of the two. Timestamp: that seq.
    Applied = 4,
    /// What a conversation is: kind, name, creator. Partition: conversation. Key: empty. Timestamp: seq of the entry.
    Conversations = 5,
    /// Members of a group. Partition: conversation. Key: user id. Timestamp: seq of the entry.
    Members = 6,
    /// A user's conversations. Partition: the self log. Key: conversation. Timestamp: seq of the entry in the self log.
    UserConversations = 7,
    /// The greatest origin seq appended. Partition: target conversation. Key: origin conversation. Timestamp: that origin seq.
    Origins = 8,
    /// Read cursors. Partition: conversation. Key: user id; with a zero byte behind it: the received cursor. Timestamp: seq.
    Cursors = 9,
    /// Devices of a user. Partition: the self log. Key: slot (1 byte), so that a partition never has more rows than there may be
    /// devices, nor deleted ones. Timestamp: when it was written, in milliseconds.
    Devices = 10,
    /// Entries that mention a user by name. Partition: conversation, then the user id. Key: seq (8 bytes big-endian). Timestamp: seq.
    Mentions = 11,
}

impl Table {
    /// All tables.
    pub const ALL: [Self; 11] = [
        Self::Cluster,
        Self::Heads,
        Self::Busy,
        Self::Applied,
        Self::Conversations,
        Self::Members,
        Self::UserConversations,
        Self::Origins,
        Self::Cursors,
        Self::Devices,
        Self::Mentions,
    ];

    /// The table of a number, if there is one.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|table| *table as u8 == number)
    }
}

/// Some of what is in a store, see [`crate::Inventory`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Where the next page begins, in words of the store; `None` if there is none.
    pub next: Option<Bytes>,
    /// Roughly how much of everything lies before it, in a thousand.
    pub done_permille: u32,
}

/// A row of a state table to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateWrite {
    pub table: Table,
    pub partition: Bytes,
    pub key: Bytes,
    /// `None` deletes.
    pub value: Option<Bytes>,
    pub timestamp: u64,
}

/// A row of a state table as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateRow {
    pub key: Bytes,
    pub value: Bytes,
    pub timestamp: u64,
}

/// Why the store gave no answer, or no success.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No answer, or one that does not tell whether the write took effect. Repeat the identical request.
    #[error("the store did not confirm: {0}")]
    Unconfirmed(String),
    /// The store has stopped (failed sync, full disk, damage) and takes no more writes until the process is started again.
    #[error("the store has stopped: {0}")]
    Stopped(String),
    /// What was read contradicts what must be there. A person has to look.
    #[error("the store is damaged: {0}")]
    Damaged(String),
    /// The store could not be opened: no permission, no space, not a directory.
    #[error("the store cannot be opened: {0}")]
    Open(String),
    /// Another process has the store open.
    #[error("the store is in use by another process: {0}")]
    InUse(String),
    /// The request itself breaks a rule of the store. It was not carried out and never will be.
    #[error("the store refused an invalid request: {0}")]
    Invalid(String),
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
