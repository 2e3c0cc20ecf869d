//! Frames of the file, written and read.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufReader, BufWriter, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use im_proto::{ConversationId, Timestamp, UserId, v1::EntryKind};
use prost::Message;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::{ClusterFacts, Totals, TransferError};
use crate::model::{Row, StateRow, Table};

const MAGIC: &[u8] = b"im-export 1\n";
/// Bytes of a payload: the largest row, and room.
const PAYLOAD_BYTES_MAX: usize = 8 * 1024 * 1024;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Header {
    /// Random; tells two exports of one cluster apart.
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) export_id: Bytes,
    #[prost(string, tag = "2")]
    pub(super) cluster_id: String,
    #[prost(string, tag = "3")]
    pub(super) issuer: String,
    #[prost(uint32, tag = "4")]
    pub(super) shards: u32,
    #[prost(bytes = "bytes", tag = "5")]
    pub(super) cluster_secret: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Rows {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) conversation: Bytes,
    #[prost(message, repeated, tag = "2")]
    pub(super) rows: Vec<RowMessage>,
    /// These are the first of their conversation.
    #[prost(bool, tag = "3")]
    pub(super) first: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RowMessage {
    #[prost(uint64, tag = "1")]
    pub(super) seq: u64,
    #[prost(uint64, tag = "2")]
    pub(super) counted: u64,
    #[prost(string, tag = "3")]
    pub(super) sender: String,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) client_message_id: Bytes,
    #[prost(int64, tag = "5")]
    pub(super) sent_at_ms: i64,
    #[prost(int32, tag = "6")]
    pub(super) kind: i32,
    #[prost(uint32, tag = "7")]
    pub(super) flags: u32,
    #[prost(bytes = "bytes", tag = "8")]
    pub(super) body: Bytes,
    #[prost(bytes = "bytes", tag = "9")]
    pub(super) meta: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct State {
    #[prost(uint32, tag = "1")]
    pub(super) table: u32,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) partition: Bytes,
    #[prost(message, repeated, tag = "3")]
    pub(super) rows: Vec<StateMessage>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StateMessage {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) value: Bytes,
    #[prost(uint64, tag = "3")]
    pub(super) timestamp: u64,
}

/// Everything before `place` is in the file, and that is `totals`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Mark {
    /// The log is complete, the place is one of the state tables.
    #[prost(bool, tag = "1")]
    pub(super) in_state: bool,
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub(super) place: Option<Bytes>,
    #[prost(message, required, tag = "3")]
    pub(super) totals: Totals,
}

/// What a frame holds.
pub(super) enum Frame {
    Header(Header),
    Rows(Rows),
    State(State),
    Mark(Mark),
    End(Totals),
}

impl Frame {
    fn encode(&self) -> (u8, Vec<u8>) {
        match self {
            Self::Header(message) => (1, message.encode_to_vec()),
            Self::Rows(message) => (2, message.encode_to_vec()),
            Self::State(message) => (3, message.encode_to_vec()),
            Self::Mark(message) => (4, message.encode_to_vec()),
            Self::End(message) => (5, message.encode_to_vec()),
        }
    }

    fn decode(kind: u8, payload: Bytes) -> Result<Self, String> {
        let decoded = match kind {
            1 => Message::decode(payload).map(Self::Header),
            2 => Message::decode(payload).map(Self::Rows),
            3 => Message::decode(payload).map(Self::State),
            4 => Message::decode(payload).map(Self::Mark),
            5 => Message::decode(payload).map(Self::End),
            _ => return Err(format!("a frame of unknown kind {kind}: a newer version wrote this file")),
        };
        decoded.map_err(|error| format!("a frame cannot be read: {error}"))
    }
}

fn checksum(kind: u8, payload: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&[kind]);
    hasher.update(payload);
    hasher.digest()
}

impl Header {
    pub(super) fn new(facts: &ClusterFacts, export_id: Bytes) -> Self {
        Self {
            export_id,
            cluster_id: facts.cluster_id.clone(),
            issuer: facts.issuer.clone(),
            shards: facts.shards,
            cluster_secret: Bytes::copy_from_slice(&facts.cluster_secret),
        }
    }

    /// What it says of the cluster.
    pub(super) fn facts(&self) -> Option<ClusterFacts> {
        let cluster_secret = self.cluster_secret[..].try_into().ok()?;
        let (cluster_id, issuer) = (self.cluster_id.clone(), self.issuer.clone());
        Some(ClusterFacts { cluster_id, issuer, shards: self.shards, cluster_secret })
    }
}

impl RowMessage {
    pub(super) fn of(row: &Row) -> Self {
        Self {
            seq: row.seq,
            counted: row.counted,
            sender: row.sender.as_ref().map(|sender| sender.as_str().to_owned()).unwrap_or_default(),
            client_message_id: row.client_message_id.clone(),
            sent_at_ms: row.sent_at.as_millis(),
            kind: i32::from(row.kind),
            flags: row.flags,
            body: row.body.clone(),
            meta: row.meta.clone(),
        }
    }

    /// The row, if it could be one.
    pub(super) fn row(self) -> Option<Row> {
        let sender = if self.sender.is_empty() { None } else { Some(UserId::parse(&self.sender).ok()?) };
        Some(Row {
            seq: self.seq,
            counted: self.counted,
            sender,
            client_message_id: self.client_message_id,
            sent_at: Timestamp::from_millis(self.sent_at_ms),
            kind: EntryKind::try_from(self.kind).ok()?,
            flags: self.flags,
            body: self.body,
            meta: self.meta,
        })
    }
}

impl Totals {
    /// Counts a frame of rows.
    pub(super) fn add_rows(&mut self, rows: &Rows) {
        self.conversations += u64::from(rows.first);
        for row in &rows.rows {
            self.entries += 1;
            let bytes = [b"r", &rows.conversation[..], &row.encode_to_vec()].concat();
            self.add(xxh3_128(&bytes));
        }
    }

    /// Counts a frame of state rows.
    pub(super) fn add_state(&mut self, state: &State) {
        let name = State { table: state.table, partition: state.partition.clone(), rows: Vec::new() };
        // Behind its length, so that no two rows look alike.
        let name = name.encode_length_delimited_to_vec();
        for row in &state.rows {
            self.state_rows += 1;
            let bytes = [&[b's'][..], &name, &row.encode_to_vec()].concat();
            self.add(xxh3_128(&bytes));
        }
    }
}

/// Writes a file.
pub(super) struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Writer {
    /// Goes on behind the first `length` bytes of a file, or begins it.
    pub(super) fn open(path: &Path, length: u64) -> Result<Self, TransferError> {
        let open = || {
            let mut file =
                OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
            file.set_len(length)?;
            file.seek(SeekFrom::Start(length))?;
            let mut file = BufWriter::with_capacity(1 << 20, file);
            if length == 0 {
                file.write_all(MAGIC)?;
            }
            Ok(file)
        };
        let file = open().map_err(|source| TransferError::File { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), file })
    }

    pub(super) fn put(&mut self, frame: &Frame) -> Result<(), TransferError> {
        let (kind, payload) = frame.encode();
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let written = (self.file.write_all(&length.to_be_bytes()))
            .and_then(|()| self.file.write_all(&[kind]))
            .and_then(|()| self.file.write_all(&payload))
            .and_then(|()| self.file.write_all(&checksum(kind, &payload).to_be_bytes()));
        self.done(written)
    }

    /// Hands what was put to the system.
    pub(super) fn flush(&mut self) -> Result<(), TransferError> {
        let flushed = self.file.flush();
        self.done(flushed)
    }

    /// Puts the whole file on the disk.
    pub(super) fn sync(&mut self) -> Result<(), TransferError> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        self.done(synced)
    }

    fn done(&self, result: io::Result<()>) -> Result<(), TransferError> {
        result.map_err(|source| TransferError::File { path: self.path.clone(), source })
    }
}

/// Reads a file.
pub(super) struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    /// Bytes of frames that were read.
    pub(super) position: u64,
    /// Bytes of the file.
    pub(super) length: u64,
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self, TransferError> {
        let io = |source| TransferError::File { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut file = BufReader::with_capacity(1 << 20, file);
        let mut magic = [0; MAGIC.len()];
        match file.read_exact(&mut magic) {
            Ok(()) if magic == MAGIC => Ok(Self { path: path.to_owned(), file, position: MAGIC.len() as u64, length }),
            Ok(()) => Err(format_error(path, "this is no export, or one of another format")),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(format_error(path, "this is no export")),
            Err(error) => Err(io(error)),
        }
    }

    /// The next frame; nothing at the end of the file, an error also for half a frame.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, TransferError> {
        if self.position == self.length {
            return Ok(None);
        }
        let mut head = [0; 5];
        self.read(&mut head)?;
        let (length, kind) = (u32::from_be_bytes([head[0], head[1], head[2], head[3]]), head[4]);
        let length = usize::try_from(length).ok().filter(|length| *length <= PAYLOAD_BYTES_MAX);
        let mut payload = vec![0; length.ok_or_else(|| self.damaged("a frame is too long"))?];
        self.read(&mut payload)?;
        let mut sum = [0; 8];
        self.read(&mut sum)?;
        if u64::from_be_bytes(sum) != checksum(kind, &payload) {
            return Err(self.damaged("a checksum is wrong"));
        }
        self.position += (head.len() + payload.len() + sum.len()) as u64;
        Frame::decode(kind, payload.into()).map(Some).map_err(|reason| self.damaged(&reason))
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), TransferError> {
        self.file.read_exact(bytes).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => self.damaged("the file ends within a frame"),
            _ => TransferError::File { path: self.path.clone(), source: error },
        })
    }

    /// What is wrong, and where.
    pub(super) fn damaged(&self, reason: &str) -> TransferError {
        format_error(&self.path, &format!("{reason} (behind byte {})", self.position))
    }
}

pub(super) fn format_error(path: &Path, reason: &str) -> TransferError {
    TransferError::Format { path: path.to_owned(), reason: reason.to_owned() }
}

/// The frame of some rows of one conversation.
pub(super) fn rows_of(conversation: ConversationId, rows: &[Row], first: bool) -> Rows {
    Rows { conversation: conversation.to_bytes(), rows: rows.iter().map(RowMessage::of).collect(), first }
}

/// The frame of some rows of one partition.
pub(super) fn state_of(table: Table, partition: &Bytes, rows: Vec<StateRow>) -> State {
    let message = |row: StateRow| StateMessage { key: row.key, value: row.value, timestamp: row.timestamp };
    let rows = rows.into_iter().map(message).collect();
    State { table: u32::from(table as u8), partition: partition.clone(), rows }
}
