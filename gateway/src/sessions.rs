//! All connections of this gateway, by session id.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use foldhash::fast::FixedState;
use im_proto::SessionId;
use parking_lot::RwLock;

use crate::session::Session;

/// The table. Ids are this gateway's own counter, so a fixed hasher is safe and keeps a simulation deterministic.
pub(crate) struct Sessions {
    last_id: AtomicU64,
    table: RwLock<Table>,
}

type Table = std::collections::HashMap<u64, Arc<Session>, FixedState>;

impl Sessions {
    pub fn new() -> Self {
        Self { last_id: AtomicU64::new(0), table: RwLock::new(Table::with_hasher(FixedState::default())) }
    }

    /// A session id that was never used in this boot.
    pub fn next_id(&self) -> SessionId {
        SessionId(self.last_id.fetch_add(1, Ordering::Relaxed) + 1)
    }

    pub fn insert(&self, session: Arc<Session>) {
        self.table.write().insert(session.id().0, session);
    }

    pub fn remove(&self, id: SessionId) {
        self.table.write().remove(&id.0);
    }

    pub fn find(&self, id: SessionId) -> Option<Arc<Session>> {
        self.table.read().get(&id.0).cloned()
    }

    /// Visits those of the given sessions that live.
    pub fn for_each(&self, ids: &[u64], mut visit: impl FnMut(&Session)) {
        let table = self.table.read();
        for session in ids.iter().filter_map(|id| table.get(id)) {
            visit(session);
        }
    }

    pub fn all(&self) -> Vec<Arc<Session>> {
        let mut sessions: Vec<_> = self.table.read().values().cloned().collect();
        sessions.sort_unstable_by_key(|session| session.id());
        sessions
    }

    pub fn count(&self) -> usize {
        self.table.read().len()
    }
}
