//! Equal reads at one time become one query. Which ones may, and which query they may share, is argued in [`crate::coalesce`].

use std::sync::Arc;

use bytes::Bytes;
use im_proto::ConversationId;

use super::{Inner, metrics::Metrics};
use crate::{
    coalesce::{Coalescer, Join},
    model::{BucketId, RowKey, StateRow, StoreError, StoredRow, Table},
};

type RangeKey = (ConversationId, u64, u64, usize);
/// Table, partition, first key or the one before it, limit; a read of one row has no limit.
type StateKey = (Table, Bytes, Option<Bytes>, Option<usize>);

/// Reads under way, by what they ask for.
pub(super) struct EqualReads {
    tails: Coalescer<(ConversationId, BucketId), Vec<StoredRow>>,
    ranges: Coalescer<RangeKey, Vec<StoredRow>>,
    keys: Coalescer<(ConversationId, u64, u64), Vec<RowKey>>,
    states: Coalescer<StateKey, Vec<StateRow>>,
}

impl EqualReads {
    pub(super) fn new(metrics: &Metrics) -> Self {
        Self {
            tails: Coalescer::new(metrics.coalesced.clone()),
            ranges: Coalescer::new(metrics.coalesced.clone()),
            keys: Coalescer::new(metrics.coalesced.clone()),
            states: Coalescer::new(metrics.coalesced.clone()),
        }
    }

    pub(super) async fn tail(
        &self,
        inner: &Arc<Inner>,
        conversation: ConversationId,
        bucket: BucketId,
    ) -> Result<Vec<StoredRow>, StoreError> {
        let inner = inner.clone();
        let query = || async move { inner.tail(conversation, bucket).await };
        self.tails.read((conversation, bucket), Join::Next, query).await
    }

    /// Below the committed head nothing changes.
    pub(super) async fn range(
        &self,
        inner: &Arc<Inner>,
        conversation: ConversationId,
        range: (u64, u64),
        limit: usize,
    ) -> Result<Vec<StoredRow>, StoreError> {
        let inner = inner.clone();
        let query = || async move { inner.range(conversation, range, limit).await };
        self.ranges.read((conversation, range.0, range.1, limit), Join::Running, query).await
    }

    /// Below the committed head nothing changes.
    pub(super) async fn keys(
        &self,
        inner: &Arc<Inner>,
        conversation: ConversationId,
        range: (u64, u64),
    ) -> Result<Vec<RowKey>, StoreError> {
        let inner = inner.clone();
        let query = || async move { inner.keys(conversation, range).await };
        self.keys.read((conversation, range.0, range.1), Join::Running, query).await
    }

    pub(super) async fn state_read(
        &self,
        inner: &Arc<Inner>,
        table: Table,
        partition: &[u8],
        key: &[u8],
    ) -> Result<Option<StateRow>, StoreError> {
        let (partition, key) = (Bytes::copy_from_slice(partition), Bytes::copy_from_slice(key));
        let name = (table, partition.clone(), Some(key.clone()), None);
        let inner = inner.clone();
        let query = || async move { Ok(inner.state_read(table, &partition, &key).await?.into_iter().collect()) };
        Ok(self.states.read(name, Join::Next, query).await?.pop())
    }

    pub(super) async fn state_scan(
        &self,
        inner: &Arc<Inner>,
        table: Table,
        partition: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<StateRow>, StoreError> {
        let (partition, after) = (Bytes::copy_from_slice(partition), after.map(Bytes::copy_from_slice));
        let name = (table, partition.clone(), after.clone(), Some(limit));
        let inner = inner.clone();
        let query = || async move { inner.state_scan(table, &partition, after.as_deref(), limit).await };
        self.states.read(name, Join::Next, query).await
    }
}
