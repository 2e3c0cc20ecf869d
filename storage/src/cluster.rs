//! What all processes of a cluster must agree on, as one row of its store.
//!
//! The number of shards and the cluster secret decide where everything is; a process that has others would lose sight of all that was
//! written, so it refuses to start. The row is written once, when the cluster is founded, and never changes. The generation, which
//! does change, is beside the fences ([`crate::MessageLog::read_fence`]).

use bytes::Bytes;
use im_proto::{Epoch, key::ClusterSecret, shard::ShardCount};
use prost::Message;

use crate::{
    Directory as _, Store,
    model::{StateWrite, StoreError, Table},
};

/// The row. Its bytes are stored: tags never change.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ClusterRow {
    /// The audience of all tokens.
    #[prost(string, tag = "1")]
    pub cluster_id: String,
    #[prost(uint32, tag = "2")]
    pub shards: u32,
    /// Of the cluster secret.
    #[prost(bytes = "bytes", tag = "3")]
    pub secret_fingerprint: Bytes,
}

/// How far an import into the store has come. While it is not complete no process may use the store.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct ImportRow {
    /// Which export it is of.
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) export_id: Bytes,
    /// Frames of the file that the store has.
    #[prost(uint64, tag = "2")]
    pub(crate) frames: u64,
    #[prost(bool, tag = "3")]
    pub(crate) complete: bool,
}

impl ImportRow {
    const KEY: &'static [u8] = b"import";

    pub(crate) async fn read(store: &Store) -> Result<Option<Self>, StoreError> {
        let Some(row) = store.read(Table::Cluster, b"", Self::KEY).await? else { return Ok(None) };
        let decoded = Self::decode(row.value);
        decoded.map(Some).map_err(|error| StoreError::Damaged(format!("the mark of an import cannot be read: {error}")))
    }

    /// Later marks win: they have more frames, and the last one is the complete one.
    pub(crate) async fn write(&self, store: &Store) -> Result<(), StoreError> {
        let timestamp = self.frames * 2 + 1 + u64::from(self.complete);
        store.write(vec![row(Self::KEY, self, timestamp)]).await
    }
}

fn row(key: &'static [u8], value: &impl Message, timestamp: u64) -> StateWrite {
    let value = Some(Bytes::from(value.encode_to_vec()));
    StateWrite { table: Table::Cluster, partition: Bytes::new(), key: Bytes::from_static(key), value, timestamp }
}

/// The greatest claim of a shard that the store knows of.
const CLAIMED: &[u8] = b"claimed";

/// Notes a claim in the store, before anything is served under it: a registry that knows only smaller ones has lost claims.
pub fn note_claim(epoch: Epoch) -> StateWrite {
    row(CLAIMED, &(), epoch.0)
}

/// The greatest claim that was noted; zero if none was.
pub async fn noted_claim(store: &Store) -> Result<Epoch, StoreError> {
    let row = store.read(Table::Cluster, b"", CLAIMED).await?;
    Ok(Epoch(row.map_or(0, |row| row.timestamp)))
}

/// Why a process may not use the store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// The store is fit for use, but nobody has founded a cluster in it.
    #[error("the store belongs to no cluster yet")]
    Missing,
    #[error("an import into the store is not complete; run `imd import` again with the same file")]
    Importing,
    #[error("the store belongs to the cluster `{stored}`, this process is configured for `{configured}`")]
    Id { stored: String, configured: String },
    #[error("the cluster has {stored} shards, this process is configured for {configured}: the number never changes")]
    Shards { stored: u32, configured: u32 },
    #[error("the cluster secret of this process is not that of the cluster")]
    Secret,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ClusterRow {
    /// What a process is configured for.
    pub fn new(cluster_id: &str, shards: ShardCount, secret: &ClusterSecret) -> Self {
        let secret_fingerprint = Bytes::copy_from_slice(&secret.fingerprint());
        Self { cluster_id: cluster_id.to_owned(), shards: shards.get(), secret_fingerprint }
    }

    /// The row of a store, if it has one.
    pub async fn read(store: &Store) -> Result<Option<Self>, StoreError> {
        let Some(row) = store.read(Table::Cluster, b"", b"").await? else { return Ok(None) };
        let decoded = Self::decode(row.value);
        decoded.map(Some).map_err(|error| StoreError::Damaged(format!("the cluster row cannot be read: {error}")))
    }

    /// Whether a process that is configured like this may use the store. Every role asks before it does anything else.
    pub async fn check(&self, store: &Store) -> Result<(), ClusterError> {
        if ImportRow::read(store).await?.is_some_and(|import| !import.complete) {
            return Err(ClusterError::Importing);
        }
        Self::read(store).await?.ok_or(ClusterError::Missing)?.compare(self)
    }

    /// Founds the cluster in a store that has none, and checks. Of two that found different ones in the same moment one stays, and the
    /// other is refused at its next check: found from one place, as `imd schema apply`.
    pub async fn found(&self, store: &Store) -> Result<(), ClusterError> {
        if Self::read(store).await?.is_none() {
            self.write(store).await?;
        }
        self.check(store).await
    }

    pub(crate) async fn write(&self, store: &Store) -> Result<(), StoreError> {
        store.write(vec![row(b"", self, 1)]).await
    }

    /// Whether a process that is configured like the other may use the store of this one.
    pub(crate) fn compare(&self, configured: &Self) -> Result<(), ClusterError> {
        if self.cluster_id != configured.cluster_id {
            let (stored, configured) = (self.cluster_id.clone(), configured.cluster_id.clone());
            return Err(ClusterError::Id { stored, configured });
        }
        if self.shards != configured.shards {
            return Err(ClusterError::Shards { stored: self.shards, configured: configured.shards });
        }
        if self.secret_fingerprint != configured.secret_fingerprint {
            return Err(ClusterError::Secret);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;

    fn row(id: &str, shards: u32, secret: u8) -> ClusterRow {
        ClusterRow::new(id, ShardCount::new(shards).expect("a number"), &ClusterSecret::new([secret; 32]))
    }

    #[tokio::test]
    async fn a_process_that_is_configured_otherwise_is_refused() {
        let store = Store::from(Memory::new());
        let first = row("im-a", 64, 1);
        assert_eq!(first.check(&store).await, Err(ClusterError::Missing));
        assert_eq!(first.found(&store).await, Ok(()));
        assert_eq!(first.found(&store).await, Ok(()));
        assert_eq!(first.check(&store).await, Ok(()));
        assert!(matches!(row("im-b", 64, 1).check(&store).await, Err(ClusterError::Id { .. })));
        let shards = Err(ClusterError::Shards { stored: 64, configured: 65 });
        assert_eq!(row("im-a", 65, 1).found(&store).await, shards);
        assert_eq!(row("im-a", 64, 2).check(&store).await, Err(ClusterError::Secret));
        assert_eq!(ClusterRow::read(&store).await, Ok(Some(first)), "refusals change nothing");
    }
}
