//! The writer thread: takes what waits, commits it, tells everybody. Beside it a watchdog, for commits that never return and for memory
//! that the engine is done with.

use std::panic::{AssertUnwindSafe, catch_unwind};

use fjall::PersistMode;
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use tokio::{sync::watch, time::Instant};

use super::{
    EmbeddedOptions, FREE_INTERVAL, FenceTable, WATCH_INTERVAL,
    engine::Engine,
    group::{Acks, Encoder, Group},
    memtables::Memtables,
    metrics::Metrics,
    queue::{Queue, Work},
};
use crate::model::StoreError;

/// What the threads and the handles share.
pub(super) struct Core {
    pub(super) engine: Engine,
    pub(super) queue: Queue,
    pub(super) fences: RwLock<FenceTable>,
    pub(super) stopped: watch::Sender<Option<String>>,
    pub(super) memtables: Memtables,
    group_bytes: usize,
    metrics: Metrics,
    /// The commit under way. Whoever takes the acks out answers them: the writer, or the watchdog when it gives the commit up.
    in_flight: Mutex<Option<(Instant, Acks)>>,
    watch_ended: Mutex<bool>,
    watch_wake: Condvar,
}

impl Core {
    pub(super) fn new(engine: Engine, fences: FenceTable, options: &EmbeddedOptions) -> Self {
        Self {
            engine,
            queue: Queue::new(options.queue_bytes),
            fences: RwLock::new(fences),
            stopped: watch::Sender::new(None),
            memtables: Memtables::default(),
            group_bytes: options.group_bytes,
            metrics: Metrics::new(),
            in_flight: Mutex::new(None),
            watch_ended: Mutex::new(false),
            watch_wake: Condvar::new(),
        }
    }

    pub(super) fn end_watch(&self) {
        *self.watch_ended.lock() = true;
        self.watch_wake.notify_all();
    }

    /// Stops the store for good and tells everybody who waits.
    fn stop(&self, reason: &str) {
        let stopped = StoreError::Stopped(reason.to_owned());
        let first = self.stopped.send_if_modified(|current| {
            let first = current.is_none();
            current.get_or_insert_with(|| reason.to_owned());
            first
        });
        if first {
            tracing::error!(reason, "the store has stopped taking writes");
            self.metrics.stopped.set(1.0);
        }
        let in_flight = self.in_flight.lock().take();
        if let Some((_, acks)) = in_flight {
            acks.answer(&Err(stopped.clone()));
        }
        self.queue.abort(&stopped);
    }
}

/// Commits until the queue is closed or something fails.
pub(super) fn run(core: &Core) {
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let (mut encoder, mut waiting) = (Encoder::default(), Vec::new());
        while let Some(waited) = core.queue.take(&mut waiting) {
            core.metrics.taken(waited);
            let mut work = waiting.drain(..);
            while let Err(error) = commit_all(core, &mut encoder, &mut work) {
                core.stop(&error);
                let stopped = StoreError::Stopped(error);
                work.by_ref().for_each(|work| work.fail(&stopped));
            }
        }
    }));
    if ended.is_err() {
        core.stop("the writer thread panicked");
    }
}

/// Commits all of some work, in groups of bounded size.
fn commit_all(core: &Core, encoder: &mut Encoder, work: &mut std::vec::Drain<'_, Work>) -> Result<(), String> {
    while work.len() > 0 {
        if let Some(reason) = core.stopped.borrow().clone() {
            return Err(reason);
        }
        let mut group = Group::new(&core.engine, work.len());
        let mut added = Ok(());
        // Nothing is taken for which there is no room: it would be dropped, and whoever waits for it not be told.
        while added.is_ok()
            && group.bytes < core.group_bytes
            && let Some(next) = work.next()
        {
            added = group.add(&core.engine, encoder, next);
        }
        commit(core, encoder, group, added)?;
    }
    Ok(())
}

fn commit(core: &Core, encoder: &mut Encoder, mut group: Group, added: Result<(), StoreError>) -> Result<(), String> {
    let (batch, acks) = group.finish(&core.engine, encoder);
    let begun = Instant::now();
    *core.in_flight.lock() = Some((begun, acks));
    added.map_err(|error| error.to_string())?;
    if let Some(batch) = batch {
        if core.memtables.note(&core.engine) {
            core.watch_wake.notify_all();
        }
        batch.commit().map_err(|error| format!("a commit failed: {error}"))?;
        core.metrics.committed(group.rows, group.bytes, begun.elapsed());
    }
    if !group.fences.is_empty() || group.generation.is_some() {
        let mut fences = core.fences.write();
        fences.fenced.extend(group.fences);
        fences.generation = fences.generation.max(group.generation.unwrap_or(0));
    }
    let in_flight = core.in_flight.lock().take();
    if let Some((_, acks)) = in_flight {
        acks.answer(&Ok(()));
    }
    Ok(())
}

/// Gives up a commit that waits for ever: when the engine's own threads have died of a full disk, a commit may wait for them without
/// end. The engine says so, if asked. And frees what the engine is done with.
pub(super) fn watch(core: &Core) {
    let mut ended = core.watch_ended.lock();
    while !*ended {
        core.watch_wake.wait_for(&mut ended, if core.memtables.soon() { FREE_INTERVAL } else { WATCH_INTERVAL });
        let slow = core.in_flight.lock().as_ref().is_some_and(|(begun, _)| begun.elapsed() > 2 * WATCH_INTERVAL);
        // Neither holds the lock: whoever is answered may close the store, and freeing takes its time.
        MutexGuard::unlocked(&mut ended, || {
            if slow && let Err(error) = core.engine.database.persist(PersistMode::Buffer) {
                core.stop(&format!("the engine has failed: {error}"));
            }
            core.memtables.free();
        });
    }
}
