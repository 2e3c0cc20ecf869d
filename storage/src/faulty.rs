//! Another store, made unreliable: delays, errors, outcomes that nobody learns, answers that never come.
//!
//! For tests of what stands above a store, on any backend. Invalid requests are refused as ever. Takes time from tokio and chance
//! from a seed.

use std::{
    fmt,
    future::Future,
    ops::RangeInclusive,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use im_proto::{ConversationId, InstanceId, environment::Spawn};
use parking_lot::Mutex;
use tokio::time::sleep;

use crate::{
    Directory, Inventory, MessageLog, Store,
    dice::Dice,
    model::{
        AppendDone, AppendRequest, BucketId, Fence, Page, RowKey, StateRow, StateWrite, StoreError, StoredRow, Table,
    },
};

/// What goes wrong, in a thousand calls each.
#[derive(Clone, Debug)]
pub struct FaultPlan {
    /// How long a call waits before it reaches the store.
    pub delay: RangeInclusive<Duration>,
    /// Calls that fail without an effect.
    pub refused_permille: u32,
    /// Calls that take effect and fail.
    pub unknown_permille: u32,
    /// Calls that are never answered; half of them take effect.
    pub dropped_permille: u32,
    /// Writes of state rows of this table fail without an effect; the others do as the rest of the plan says.
    pub refused_table: Option<Table>,
    /// Whoever reads all state rows of this partition finds it damaged.
    pub damaged_partition: Option<Bytes>,
    /// Reads of single state rows of this partition fail.
    pub unread_partition: Option<Bytes>,
}

impl FaultPlan {
    /// Nothing goes wrong.
    pub fn none() -> Self {
        Self {
            delay: Duration::ZERO..=Duration::ZERO,
            refused_permille: 0,
            unknown_permille: 0,
            dropped_permille: 0,
            refused_table: None,
            damaged_partition: None,
            unread_partition: None,
        }
    }
}

/// The wrapper. Clones share the store, the plan and the dice.
#[derive(Clone)]
pub struct Faulty {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    state: Mutex<(FaultPlan, Dice)>,
    tasks: Arc<dyn Spawn>,
    calls: AtomicU64,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Good,
    Refused,
    Unknown,
    Dropped { applied: bool },
}

impl Fate {
    fn reaches_the_store(self) -> bool {
        matches!(self, Self::Good | Self::Unknown | Self::Dropped { applied: true })
    }
}

/// Boxed and named, because a faulty store may wrap another: an anonymous future would contain itself.
type Boxed<T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send>>;

fn unconfirmed() -> StoreError {
    StoreError::Unconfirmed("the faulty store says so".into())
}

impl Faulty {
    /// Wraps a store. Delayed submissions run as `tasks`.
    pub fn new(store: Store, seed: u64, plan: FaultPlan, tasks: Arc<dyn Spawn>) -> Self {
        let state = Mutex::new((plan, Dice::new(seed)));
        Self { inner: Arc::new(Inner { store, state, tasks, calls: AtomicU64::new(0) }) }
    }

    /// Calls so far: what a store is asked to do, for tests of what something costs.
    pub fn calls(&self) -> u64 {
        self.inner.calls.load(Ordering::Relaxed)
    }

    /// From now on other things go wrong.
    pub fn set_plan(&self, plan: FaultPlan) {
        self.inner.state.lock().0 = plan;
    }

    /// The store that is wrapped.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    fn draw(&self) -> (Duration, Fate) {
        self.inner.calls.fetch_add(1, Ordering::Relaxed);
        let (plan, dice) = &mut *self.inner.state.lock();
        let (delay, chance, applied) = (dice.duration(&plan.delay), dice.below(1000), dice.permille(500));
        let refused = u64::from(plan.refused_permille);
        let unknown = refused + u64::from(plan.unknown_permille);
        let dropped = unknown + u64::from(plan.dropped_permille);
        let fate = match chance {
            chance if chance < refused => Fate::Refused,
            chance if chance < unknown => Fate::Unknown,
            chance if chance < dropped => Fate::Dropped { applied },
            _ => Fate::Good,
        };
        (delay, fate)
    }

    /// A call as the plan has it.
    fn call<T, F>(&self, call: impl FnOnce(Arc<Inner>) -> F) -> Boxed<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let (delay, fate) = self.draw();
        let call = call(self.inner.clone());
        Box::pin(async move {
            if !delay.is_zero() {
                sleep(delay).await;
            }
            let result = if fate.reaches_the_store() { call.await } else { Err(unconfirmed()) };
            match fate {
                Fate::Good | Fate::Refused => result,
                Fate::Unknown => result.and(Err(unconfirmed())),
                Fate::Dropped { .. } => std::future::pending().await,
            }
        })
    }

    fn submit_one(&self, request: AppendRequest, done: AppendDone) {
        let (delay, fate) = self.draw();
        let inner = self.inner.clone();
        let submit = move || {
            if !fate.reaches_the_store() {
                if fate == Fate::Refused {
                    done(vec![(request.token, Err(unconfirmed()))]);
                }
                return;
            }
            let mapped = move |outcomes: Vec<(u64, Result<(), StoreError>)>| match fate {
                Fate::Unknown => {
                    let unknown = |(token, outcome): (u64, Result<(), _>)| (token, outcome.and(Err(unconfirmed())));
                    done(outcomes.into_iter().map(unknown).collect());
                }
                Fate::Dropped { .. } => {}
                Fate::Good | Fate::Refused => done(outcomes),
            };
            inner.store.submit(vec![request], Arc::new(mapped));
        };
        if delay.is_zero() {
            submit();
        } else {
            self.inner.tasks.spawn(Box::pin(async move {
                sleep(delay).await;
                submit();
            }));
        }
    }
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Faulty").field(&self.inner.store).finish()
    }
}

#[allow(refining_impl_trait, reason = "see `Boxed`")]
impl MessageLog for Faulty {
    fn submit(&self, requests: Vec<AppendRequest>, done: AppendDone) {
        requests.into_iter().for_each(|request| self.submit_one(request, done.clone()));
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
        let instances = instances.to_vec();
        self.call(move |inner| async move { inner.store.write_fences(&instances).await })
    }

    fn read_fence(&self, instance: &InstanceId) -> Boxed<Fence> {
        let instance = instance.clone();
        self.call(move |inner| async move { inner.store.read_fence(&instance).await })
    }

    fn raise_generation(&self, generation: u64) -> Boxed<()> {
        self.call(move |inner| async move { inner.store.raise_generation(generation).await })
    }
}

#[allow(refining_impl_trait, reason = "see `Boxed`")]
impl Directory for Faulty {
    fn write(&self, writes: Vec<StateWrite>) -> Boxed<()> {
        let refused = self.inner.state.lock().0.refused_table;
        if writes.iter().any(|write| Some(write.table) == refused) {
            return Box::pin(async { Err(unconfirmed()) });
        }
        self.call(move |inner| async move { inner.store.write(writes).await })
    }

    fn read(&self, table: Table, partition: &[u8], key: &[u8]) -> Boxed<Option<StateRow>> {
        if self.inner.state.lock().0.unread_partition.as_deref() == Some(partition) {
            return Box::pin(async { Err(unconfirmed()) });
        }
        let (partition, key) = (partition.to_vec(), key.to_vec());
        self.call(move |inner| async move { inner.store.read(table, &partition, &key).await })
    }

    fn scan(&self, table: Table, partition: &[u8], after: Option<&[u8]>, limit: usize) -> Boxed<Vec<StateRow>> {
        if self.inner.state.lock().0.damaged_partition.as_deref() == Some(partition) {
            return Box::pin(async { Err(StoreError::Damaged("the faulty store says so".into())) });
        }
        let (partition, after) = (partition.to_vec(), after.map(<[u8]>::to_vec));
        self.call(move |inner| async move { inner.store.scan(table, &partition, after.as_deref(), limit).await })
    }
}

#[allow(refining_impl_trait, reason = "see `Boxed`")]
impl Inventory for Faulty {
    fn list_buckets(&self, from: Option<Bytes>, limit: usize) -> Boxed<Page<(ConversationId, BucketId)>> {
        self.call(move |inner| async move { inner.store.list_buckets(from, limit).await })
    }

    fn list_partitions(&self, from: Option<Bytes>, limit: usize) -> Boxed<Page<(Table, Bytes)>> {
        self.call(move |inner| async move { inner.store.list_partitions(from, limit).await })
    }
}
