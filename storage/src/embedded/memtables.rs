//! Memtables that the engine is done with, freed where nobody waits for it.
//!
//! fjall 3.1 frees a memtable that is on disk in the midst of a later rotation, under the lock that every write takes: half a million
//! entries are 100 to 200 ms without a commit. Who holds the memtable besides makes that a matter of counting down. So one handle to each
//! is kept here, and the watchdog lets go of it when it is the last one.
//!
//! Not covered: what the engine recovers from its journals at the start, and a memtable that one commit fills (`memtable_bytes` below
//! `group_bytes`). Those the engine frees as it does.

use std::{any::Any, sync::Arc, time::Duration};

use fjall::AbstractTree as _;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::engine::Engine;

/// The engine lets go of a memtable when a later one is full. Without load that may be never, and nobody looks so often for it.
const SOON: Duration = Duration::from_secs(10);

/// The engine does not export its type.
type Memtable = Arc<dyn Any + Send + Sync>;

/// The memtables that are in use somewhere.
#[derive(Default)]
pub(super) struct Memtables {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// Of the log and of the state, the newest last.
    of: [Vec<Memtable>; 2],
    /// When one was new, or freed.
    changed: Option<Instant>,
}

impl Memtables {
    /// Takes a handle to what is written to now, and says whether one is new. To be called before each commit: a memtable is then known
    /// before it is full.
    pub(super) fn note(&self, engine: &Engine) -> bool {
        let active: [Memtable; 2] = [engine.log.tree.active_memtable(), engine.state.tree.active_memtable()];
        let mut known = self.known.lock();
        let mut new = false;
        for (known, active) in known.of.iter_mut().zip(active) {
            if !known.last().is_some_and(|newest| Arc::ptr_eq(newest, &active)) {
                known.push(active);
                new = true;
            }
        }
        if new {
            known.changed = Some(Instant::now());
        }
        new
    }

    /// Whether there is soon something to be freed.
    pub(super) fn soon(&self) -> bool {
        let known = self.known.lock();
        known.of.iter().any(|known| known.len() > 1) && known.changed.is_some_and(|changed| changed.elapsed() < SOON)
    }

    /// Frees what nobody else holds, and says how many those were. Takes as long as freeing does.
    pub(super) fn free(&self) -> usize {
        let mut known = self.known.lock();
        // Nobody can take another handle from one of these meanwhile: it is out of the engine.
        let last = |memtable: &mut Memtable| Arc::strong_count(memtable) == 1;
        let unused: Vec<Memtable> = known.of.iter_mut().flat_map(|known| known.extract_if(.., last)).collect();
        if !unused.is_empty() {
            known.changed = Some(Instant::now());
        }
        // The writer need not wait for the rest.
        drop(known);
        unused.len()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        Directory as _, Embedded, EmbeddedOptions,
        model::{StateWrite, Table},
    };

    #[test]
    fn a_memtable_that_the_engine_is_done_with_is_freed_here_and_not_by_the_engine() {
        let directory = tempfile::tempdir().unwrap();
        let options = EmbeddedOptions { memtable_bytes: 1 << 20, ..EmbeddedOptions::default() };
        let engine = Engine::open(directory.path(), &options).unwrap();
        let memtables = Memtables::default();
        // Each sixteenth commit fills a memtable; the engine writes it out meanwhile and lets go of it when a later one is full.
        let freed = (0..4096_u32).map(|number| {
            memtables.note(&engine);
            engine.log.insert(number.to_be_bytes(), [0; 64 * 1024]).unwrap();
            memtables.free()
        });
        assert_ne!(freed.take_while(|freed| *freed == 0).count(), 4096, "none was left to us");
    }

    #[tokio::test]
    async fn a_store_frees_its_memtables_while_it_is_written_to() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(directory.path(), EmbeddedOptions::default()).unwrap();
        let mut known = 0;
        // A megabyte a commit; eight fill a memtable of the state.
        for number in 0..256_u32 {
            let write = |part: u32| StateWrite {
                table: Table::UserConversations,
                partition: Bytes::from_static(b"somebody"),
                key: Bytes::copy_from_slice(&[number.to_be_bytes(), part.to_be_bytes()].concat()),
                value: Some(Bytes::from_static(&[0; 64 * 1024])),
                timestamp: 1,
            };
            store.write((0..16).map(write).collect()).await.unwrap();
            let before = std::mem::replace(&mut known, store.core().memtables.known.lock().of[1].len());
            if known < before {
                return;
            }
        }
        panic!("none was freed: {known} are known");
    }
}
