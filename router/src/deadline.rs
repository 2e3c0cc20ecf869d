//! The store with a deadline on every call: one that is never answered counts as unconfirmed, so that whoever waits tries again.
//!
//! A call past its deadline is dropped and its late result with it. An append is handed over and answered through a callback; its
//! deadline is kept by whoever handed it over ([`StoreCalls::deadline`]).

use std::{future::Future, time::Duration};

use im_proto::{ConversationId, InstanceId};
use im_storage::{
    AppendDone, AppendRequest, BucketId, Directory as _, Fence, MessageLog as _, RowKey, StateRow, StateWrite, Store,
    StoreError, StoredRow, Table,
};

/// A store whose calls end.
#[derive(Clone)]
pub struct StoreCalls {
    store: Store,
    deadline: Duration,
}

impl StoreCalls {
    pub fn new(store: Store, deadline: Duration) -> Self {
        Self { store, deadline }
    }

    /// How long an answer is waited for.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    async fn within<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        match tokio::time::timeout(self.deadline, call).await {
            Ok(answer) => answer,
            Err(_) => Err(StoreError::Unconfirmed(format!("no answer within {:?}", self.deadline))),
        }
    }

    pub fn submit(&self, requests: Vec<AppendRequest>, done: AppendDone) {
        self.store.submit(requests, done);
    }

    pub async fn read_tail(
        &self,
        conversation: ConversationId,
        bucket: BucketId,
    ) -> Result<Vec<StoredRow>, StoreError> {
        self.within(self.store.read_tail(conversation, bucket)).await
    }

    pub async fn read_range(
        &self,
        conversation: ConversationId,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<Vec<StoredRow>, StoreError> {
        self.within(self.store.read_range(conversation, from, to, limit)).await
    }

    pub async fn read_keys(&self, conversation: ConversationId, from: u64, to: u64) -> Result<Vec<RowKey>, StoreError> {
        self.within(self.store.read_keys(conversation, from, to)).await
    }

    pub async fn write_fences(&self, instances: &[InstanceId]) -> Result<(), StoreError> {
        self.within(self.store.write_fences(instances)).await
    }

    pub async fn read_fence(&self, instance: &InstanceId) -> Result<Fence, StoreError> {
        self.within(self.store.read_fence(instance)).await
    }

    pub async fn write(&self, writes: Vec<StateWrite>) -> Result<(), StoreError> {
        self.within(self.store.write(writes)).await
    }

    pub async fn read(&self, table: Table, partition: &[u8], key: &[u8]) -> Result<Option<StateRow>, StoreError> {
        self.within(self.store.read(table, partition, key)).await
    }

    pub async fn scan(
        &self,
        table: Table,
        partition: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<StateRow>, StoreError> {
        self.within(self.store.scan(table, partition, after, limit)).await
    }
}
