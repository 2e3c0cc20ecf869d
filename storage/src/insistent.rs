//! Another store, asked again until it confirms: what an owner does with an unknown outcome, for every call.
//!
//! With it the conformance suite runs on a store whose calls fail, take effect without saying so, or are never answered (`faulty`): the
//! suite then shows that a call that is repeated unchanged is as good as one. For tests, and without a bound on the repeats: a test has
//! its own patience. Whatever else a call says than "unconfirmed" is passed on.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use im_proto::{ConversationId, InstanceId, environment::Spawn};
use tokio::{sync::oneshot, task::yield_now, time::timeout};

use crate::{
    Directory, Inventory, MessageLog, Store,
    model::{
        AppendDone, AppendRequest, BucketId, Fence, Page, RowKey, StateRow, StateWrite, StoreError, StoredRow, Table,
    },
};

/// The wrapper. Clones share the store and the count.
#[derive(Clone)]
pub struct Insistent {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    patience: Duration,
    repeats: AtomicU64,
    tasks: Arc<dyn Spawn>,
}

/// Boxed and named, because an insistent store may wrap another: an anonymous future would contain itself.
type Boxed<T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send>>;

impl Insistent {
    /// Wraps a store. A call without an answer for `patience` is repeated too. Submissions run as `tasks`.
    pub fn new(store: Store, patience: Duration, tasks: Arc<dyn Spawn>) -> Self {
        Self { inner: Arc::new(Inner { store, patience, repeats: AtomicU64::new(0), tasks }) }
    }

    /// How many calls were made again.
    pub fn repeats(&self) -> u64 {
        self.inner.repeats.load(Ordering::Relaxed)
    }

    fn call<T, F>(&self, call: impl Fn(Arc<Inner>) -> F + Send + 'static) -> Boxed<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let inner = self.inner.clone();
        Box::pin(async move {
            loop {
                match timeout(inner.patience, call(inner.clone())).await {
                    Err(_) | Ok(Err(StoreError::Unconfirmed(_))) => {
                        inner.repeats.fetch_add(1, Ordering::Relaxed);
                        yield_now().await;
                    }
                    Ok(result) => return result,
                }
            }
        })
    }

    fn append(&self, request: AppendRequest) -> Boxed<()> {
        self.call(move |inner| {
            let request = AppendRequest { token: request.token, batch: request.batch.clone() };
            async move { outcome_of(&inner.store, request).await }
        })
    }
}

/// Submits one batch and waits for its outcome.
async fn outcome_of(store: &Store, request: AppendRequest) -> Result<(), StoreError> {
    let (sender, receiver) = oneshot::channel();
    let sender = parking_lot::Mutex::new(Some(sender));
    let done: AppendDone = Arc::new(move |outcomes: Vec<(u64, Result<(), StoreError>)>| {
        for (_, outcome) in outcomes {
            if let Some(sender) = sender.lock().take() {
                // Whoever waited may have lost patience.
                let _ = sender.send(outcome);
            }
        }
    });
    store.submit(vec![request], done);
    // A store that gave the batch up without a word has confirmed nothing.
    receiver.await.unwrap_or_else(|_| Err(StoreError::Unconfirmed("it was never answered".into())))
}

impl fmt::Debug for Insistent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Insistent").field(&self.inner.store).finish()
    }
}

#[allow(refining_impl_trait, reason = "see `Boxed`")]
impl MessageLog for Insistent {
    /// Each batch by itself: one that is repeated may come after those that were submitted later.
    fn submit(&self, requests: Vec<AppendRequest>, done: AppendDone) {
        for request in requests {
            let token = request.token;
            let (done, appending) = (done.clone(), self.append(request));
            self.inner.tasks.spawn(Box::pin(async move { done(vec![(token, appending.await)]) }));
        }
    }

    fn read_tail(&self, conversation: ConversationId, bucket: BucketId) -> Boxed<Vec<StoredRow>> {
        self.call(move |inner| async move { inner.store.read_tail(conversation, bucket).await })
    }

    fn read_range(&self, conversation: ConversationId, from: u64, to: u64, limit: usize) -> Boxed<Vec<StoredRow>> {
        self.call(move |inner| async move { inner.store.read_range(conversation, from, to, limit).await })
    }

    fn read_keys(&self, conversation: ConversationId, from: u64, to: u64) -> Boxed<Vec<RowKey>> {
        self.call(move |inner| async move { inner.store.read_keys(conversation, from, to).await })
    }

    fn write_fences(&self, instances: &[InstanceId]) -> Boxed<()> {
        let instances: Arc<[InstanceId]> = instances.into();
        self.call(move |inner| {
            let instances = instances.clone();
            async move { inner.store.write_fences(&instances).await }
        })
    }

    fn read_fence(&self, instance: &InstanceId) -> Boxed<Fence> {
        let instance = instance.clone();
        self.call(move |inner| {
            let instance = instance.clone();
            async move { inner.store.read_fence(&instance).await }
        })
    }

    fn raise_generation(&self, generation: u64) -> Boxed<()> {
        self.call(move |inner| async move { inner.store.raise_generation(generation).await })
    }
}

#[allow(refining_impl_trait, reason = "see `Boxed`")]
impl Directory for Insistent {
    fn write(&self, writes: Vec<StateWrite>) -> Boxed<()> {
        self.call(move |inner| {
            let writes = writes.clone();
            async move { inner.store.write(writes).await }
        })
    }

    fn read(&self, table: Table, partition: &[u8], key: &[u8]) -> Boxed<Option<StateRow>> {
        let at = (Bytes::copy_from_slice(partition), Bytes::copy_from_slice(key));
        self.call(move |inner| {
            let (partition, key) = at.clone();
            async move { inner.store.read(table, &partition, &key).await }
        })
    }

    fn scan(&self, table: Table, partition: &[u8], after: Option<&[u8]>, limit: usize) -> Boxed<Vec<StateRow>> {
        let from = (Bytes::copy_from_slice(partition), after.map(Bytes::copy_from_slice));
        self.call(move |inner| {
            let (partition, after) = from.clone();
            async move { inner.store.scan(table, &partition, after.as_deref(), limit).await }
        })
    }
}

#[allow(refining_impl_trait, reason = "see `Boxed`")]
impl Inventory for Insistent {
    fn list_buckets(&self, from: Option<Bytes>, limit: usize) -> Boxed<Page<(ConversationId, BucketId)>> {
        self.call(move |inner| {
            let from = from.clone();
            async move { inner.store.list_buckets(from, limit).await }
        })
    }

    fn list_partitions(&self, from: Option<Bytes>, limit: usize) -> Boxed<Page<(Table, Bytes)>> {
        self.call(move |inner| {
            let from = from.clone();
            async move { inner.store.list_partitions(from, limit).await }
        })
    }
}
