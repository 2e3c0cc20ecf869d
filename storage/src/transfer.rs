//! Moving all data of a cluster between stores of any kind, through one file.
//!
//! The file is what a cluster is, apart from who serves it: id, shard count and cluster secret, every entry of every log up to its
//! committed head, every row of the state tables with its timestamp. Fences and epochs stay behind, they are about processes: entries
//! are imported with timestamp 1, below every epoch, so that whoever claims a shard afterwards writes above them.
//!
//! Nobody may write to the source while it is exported, nor use the target before it is complete: of the latter the target itself takes
//! care, [`ClusterRow::check`](crate::ClusterRow::check) refuses a store with a half import in it. Both directions go on where they
//! were cut off. The file holds a secret; it is made readable for its owner only.
//!
//! ```text
//! file      "im-export 1\n" · frame*        header, then (rows | state | mark)*, then end
//! frame     length of the payload (4 bytes, big-endian) · kind (1) · payload · checksum (8, big-endian)
//! checksum  XXH3-64 of kind and payload
//! payload   a protobuf message: kind 1 header, 2 rows, 3 state, 4 mark, 5 end
//! ```
//!
//! A frame of rows is a batch as an owner would write it, so that an import writes the same batches however often it is repeated. A
//! mark says that everything before a place of the source is in the file. Messages may grow fields; a kind that is not known ends an
//! import.

mod export;
mod format;
mod import;
mod walk;

use std::{io, path::PathBuf};

use bytes::Bytes;
use im_proto::{key::ClusterSecret, shard::ShardCount};

pub use self::{
    export::{export, totals},
    import::{Imported, import, read_header},
};
use crate::{ClusterError, ClusterRow, model::StoreError};

/// What a cluster is, besides its data.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterFacts {
    pub cluster_id: String,
    /// Who signs its tokens.
    pub issuer: String,
    pub shards: u32,
    pub cluster_secret: [u8; 32],
}

impl std::fmt::Debug for ClusterFacts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterFacts").field("cluster_id", &self.cluster_id).finish_non_exhaustive()
    }
}

impl ClusterFacts {
    /// The row of a store that belongs to this cluster; nothing if the number of shards is none.
    pub fn row(&self) -> Option<ClusterRow> {
        let shards = ShardCount::new(self.shards)?;
        Some(ClusterRow::new(&self.cluster_id, shards, &ClusterSecret::new(self.cluster_secret)))
    }
}

/// How much there is, and what it is: equal totals mean equal data, in whatever order it was read.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Totals {
    #[prost(uint64, tag = "1")]
    pub conversations: u64,
    #[prost(uint64, tag = "2")]
    pub entries: u64,
    #[prost(uint64, tag = "3")]
    pub state_rows: u64,
    /// The sum of XXH3-128 of all entries and rows, modulo 2^128, big-endian.
    #[prost(bytes = "bytes", tag = "4")]
    pub digest: Bytes,
}

impl Totals {
    fn add(&mut self, hash: u128) {
        let sum = self.digest[..].try_into().map_or(0, u128::from_be_bytes);
        self.digest = Bytes::copy_from_slice(&sum.wrapping_add(hash).to_be_bytes());
    }
}

/// What a transfer is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Reading the file to see whether it is whole.
    Checking,
    /// Entries of conversations.
    Messages,
    /// Rows of the state tables.
    State,
}

/// How far a transfer has come.
#[derive(Clone, Debug)]
pub struct Progress<'a> {
    pub step: Step,
    /// Roughly how much of this step is done.
    pub permille: u32,
    pub totals: &'a Totals,
}

/// Why a transfer ended early. It may be started again and goes on where it was, unless the message says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}: {reason}", .path.display())]
    Format { path: PathBuf, reason: String },
    #[error("{} belongs to another export; remove it or choose another file", .0.display())]
    OtherExport(PathBuf),
    #[error("{} is there already; remove it or choose another file", .0.display())]
    Exists(PathBuf),
    #[error("the store holds messages already: import into one that was never used")]
    NotEmpty,
    #[error("the store holds a part of another import: empty it first")]
    OtherImport,
    #[error("what was imported is not what the file says: the file and the store have to be looked at")]
    Differs,
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Store(#[from] StoreError),
}
