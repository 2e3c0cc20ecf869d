//! One query for many equal reads.
//!
//! A read must see every write that was confirmed before it began. So a read that meets an equal query under way may take that one's
//! answer only if what it asks for cannot have changed since the query began ([`Join::Running`]: rows below the committed head, which
//! were committed when the first of the two asked for them, and are immutable). Any other read waits for the *next* query, which
//! begins after the one under way has ended, and shares it with all that came meanwhile ([`Join::Next`]): there are never more than
//! two queries for one key, however many readers. A read that decides about a commit, of a fence, does not come here at all.
//!
//! Whoever waits drives the query: no task of its own, and it ends with the last of its readers.

use std::{collections::HashMap, future::Future, hash::Hash, sync::Arc};

use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};
use metrics::Counter;
use parking_lot::Mutex;

use crate::model::StoreError;

/// Which query a read may share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Join {
    /// Also one that has begun: what is read never changes once it may be asked for.
    Running,
    /// Only one that has not begun.
    Next,
}

type Answer<V> = Result<Arc<V>, StoreError>;
type Running<V> = Shared<BoxFuture<'static, Answer<V>>>;

/// Equal reads of one kind.
pub(crate) struct Coalescer<K, V> {
    slots: Arc<Mutex<Slots<K, V>>>,
    joined: Counter,
}

struct Slots<K, V> {
    by_key: HashMap<K, Slot<V>>,
    next_id: u64,
}

/// The queries of one key. There is no slot without a query.
struct Slot<V> {
    /// Has begun, or begins at once.
    running: Option<Query<V>>,
    /// Begins when the other one has ended.
    next: Option<Query<V>>,
}

/// A query that lives as long as somebody waits for it.
struct Query<V> {
    id: u64,
    answer: WeakShared<BoxFuture<'static, Answer<V>>>,
}

impl<V> Query<V> {
    fn is(query: &Option<Self>, id: u64) -> bool {
        query.as_ref().is_some_and(|query| query.id == id)
    }

    fn join(query: &Option<Self>) -> Option<Running<V>> {
        query.as_ref().and_then(|query| query.answer.upgrade())
    }
}

impl<K, V> Coalescer<K, V>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// `joined` counts reads that caused no query.
    pub(crate) fn new(joined: Counter) -> Self {
        Self { slots: Arc::new(Mutex::new(Slots { by_key: HashMap::new(), next_id: 0 })), joined }
    }

    /// Reads by `query`, or shares an equal read as `join` allows.
    pub(crate) async fn read<F>(&self, key: K, join: Join, query: impl FnOnce() -> F) -> Result<V, StoreError>
    where
        F: Future<Output = Result<V, StoreError>> + Send + 'static,
    {
        let answer = self.join_or_begin(key, join, query);
        answer.await.map(Arc::unwrap_or_clone)
    }

    fn join_or_begin<F>(&self, key: K, join: Join, query: impl FnOnce() -> F) -> Running<V>
    where
        F: Future<Output = Result<V, StoreError>> + Send + 'static,
    {
        let mut slots = self.slots.lock();
        let (running, next) =
            slots.by_key.get(&key).map_or((None, None), |slot| (Query::join(&slot.running), Query::join(&slot.next)));
        // No handle is dropped while the slots are locked: the last one takes its query out of them.
        let joined = match join {
            Join::Running => running.as_ref().or(next.as_ref()).cloned(),
            Join::Next => next.clone(),
        };
        if let Some(joined) = joined {
            drop(slots);
            self.joined.increment(1);
            return joined;
        }
        let id = slots.next_id;
        slots.next_id += 1;
        let waits = running.is_some();
        let guard = Guard { slots: self.slots.clone(), key: key.clone(), id };
        let query = query();
        let answer = async move {
            if let Some(running) = running {
                // Its answer is of no use here, and neither is its failure.
                let _ = running.await;
                guard.begin();
            }
            let answer = query.await.map(Arc::new);
            drop(guard);
            answer
        };
        let answer = answer.boxed().shared();
        // It has just been made and was not polled.
        if let Some(weak) = answer.downgrade() {
            let query = Some(Query { id, answer: weak });
            let slot = slots.by_key.entry(key).or_insert(Slot { running: None, next: None });
            if waits {
                slot.next = query;
            } else {
                slot.running = query;
            }
        }
        answer
    }
}

/// Takes a query out of its slot when it has ended, or when nobody waits for it any more.
struct Guard<K: Eq + Hash, V> {
    slots: Arc<Mutex<Slots<K, V>>>,
    key: K,
    id: u64,
}

impl<K: Eq + Hash, V> Guard<K, V> {
    /// From now on reads that may not join a running query do not join this one.
    fn begin(&self) {
        if let Some(slot) = self.slots.lock().by_key.get_mut(&self.key)
            && Query::is(&slot.next, self.id)
        {
            slot.running = slot.next.take();
        }
    }
}

impl<K: Eq + Hash, V> Drop for Guard<K, V> {
    fn drop(&mut self) {
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.by_key.get_mut(&self.key) {
            if Query::is(&slot.running, self.id) {
                slot.running = None;
            }
            if Query::is(&slot.next, self.id) {
                slot.next = None;
            }
            if slot.running.is_none() && slot.next.is_none() {
                slots.by_key.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::sync::Semaphore;

    use super::*;

    /// A value that changes, and queries that read it when they begin and answer when they are let go.
    struct Source {
        value: AtomicU64,
        queries: AtomicU64,
        gate: Semaphore,
        coalescer: Coalescer<u8, u64>,
    }

    impl Source {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                value: AtomicU64::new(0),
                queries: AtomicU64::new(0),
                gate: Semaphore::new(0),
                coalescer: Coalescer::new(Counter::noop()),
            })
        }

        fn read(self: &Arc<Self>, key: u8, join: Join) -> BoxFuture<'static, Result<u64, StoreError>> {
            let source = self.clone();
            async move {
                let inner = source.clone();
                let query = move || async move {
                    inner.queries.fetch_add(1, Ordering::Relaxed);
                    let value = inner.value.load(Ordering::Relaxed);
                    inner.gate.acquire().await.expect("open").forget();
                    Ok(value)
                };
                source.coalescer.read(key, join, query).await
            }
            .boxed()
        }

        fn queries(&self) -> u64 {
            self.queries.load(Ordering::Relaxed)
        }
    }

    /// Polls reads once, so that they have begun.
    async fn begin(reads: &mut [BoxFuture<'static, Result<u64, StoreError>>]) {
        for read in reads {
            assert!(futures::poll!(read).is_pending());
        }
    }

    #[tokio::test]
    async fn a_thousand_equal_reads_are_one_query() {
        let source = Source::new();
        let mut reads: Vec<_> = (0..1_000).map(|_| source.read(1, Join::Running)).collect();
        begin(&mut reads).await;
        source.gate.add_permits(1);
        assert_eq!(futures::future::join_all(reads).await, vec![Ok(0); 1_000]);
        assert_eq!(source.queries(), 1);
        assert!(source.coalescer.slots.lock().by_key.is_empty());
    }

    #[tokio::test]
    async fn a_read_never_takes_the_answer_of_a_query_that_began_before_it() {
        let source = Source::new();
        let mut early = vec![source.read(1, Join::Next)];
        begin(&mut early).await;
        // A write that is confirmed now must be seen by whoever reads from now on.
        source.value.store(7, Ordering::Relaxed);
        let mut late: Vec<_> = (0..999).map(|_| source.read(1, Join::Next)).collect();
        begin(&mut late).await;
        assert_eq!(source.queries(), 1, "one at a time");
        source.gate.add_permits(1);
        assert_eq!(early.pop().expect("one").await, Ok(0));
        begin(&mut late[..1]).await;
        // The second query has begun: whoever comes now waits for a third.
        source.value.store(8, Ordering::Relaxed);
        let mut latest = vec![source.read(1, Join::Next)];
        begin(&mut latest).await;
        source.gate.add_permits(2);
        assert_eq!(futures::future::join_all(late).await, vec![Ok(7); 999]);
        assert_eq!(latest.pop().expect("one").await, Ok(8));
        assert_eq!(source.queries(), 3);
        assert!(source.coalescer.slots.lock().by_key.is_empty());
    }

    #[tokio::test]
    async fn different_reads_have_queries_of_their_own() {
        let source = Source::new();
        let mut reads: Vec<_> = (0..10).map(|key| source.read(key, Join::Running)).collect();
        begin(&mut reads).await;
        assert_eq!(source.queries(), 10);
    }

    #[tokio::test]
    async fn a_query_goes_on_without_its_first_reader_and_ends_without_any() {
        let source = Source::new();
        for join in [Join::Running, Join::Next] {
            let mut reads: Vec<_> = (0..3).map(|_| source.read(1, join)).collect();
            begin(&mut reads).await;
            drop(reads.remove(0));
            begin(&mut reads).await;
            source.gate.add_permits(2);
            assert_eq!(futures::future::join_all(reads).await, vec![Ok(0); 2], "{join:?}");
            source.gate.forget_permits(2);
            let mut reads: Vec<_> = (0..3).map(|_| source.read(1, join)).collect();
            begin(&mut reads).await;
            drop(reads);
            assert!(source.coalescer.slots.lock().by_key.is_empty(), "nothing is left behind");
        }
    }
}
