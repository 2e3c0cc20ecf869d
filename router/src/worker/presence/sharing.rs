//! Who may know of whom: those who are in a conversation together. Asked when somebody reads or subscribes, and again for whoever
//! goes on watching.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use im_proto::{ConversationId, UserId, v1};
use im_storage::{StoreError, Table};
use prost::Message as _;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::{cluster::Cluster, deadline::StoreCalls, state::ListValue, watches::Check, worker::Context};

/// Conversations of a user that are compared with the caller's. Whoever has more shares with the caller what is among the first.
const LIST_ROWS_MAX: usize = 1_024;
/// Lists that are read at a time for one call, and for all that is checked again.
const LISTS_AT_A_TIME: usize = 8;
/// Lists that are read at a time by a router. After it lost its clients for a moment all of them subscribe again, and the store has more
/// urgent things to do.
const LISTS_MAX: usize = 32;
/// Calls that may wait for their turn; the next one is refused, and its client tries again later.
const CALLS_MAX: usize = 4_096;
/// Pages of one's own list that are read for a check: a million conversations.
const OWN_PAGES_MAX: usize = 1_024;

/// How much may be asked at a time.
pub struct Turns {
    lists: Semaphore,
    calls: Semaphore,
}

impl Default for Turns {
    fn default() -> Self {
        Self { lists: Semaphore::new(LISTS_MAX), calls: Semaphore::new(CALLS_MAX) }
    }
}

impl Turns {
    /// A place for a call; `None` if too many wait.
    pub fn call(&self) -> Option<SemaphorePermit<'_>> {
        self.calls.try_acquire().ok()
    }
}

impl Context {
    /// Checks again of some sessions whether they may still watch whom they watch. One such task at a time.
    pub fn check_watches(&self) {
        let checks = self.cluster.watches.begin_checks();
        if checks.is_empty() {
            return;
        }
        let (cluster, store) = (self.cluster.clone(), self.store.clone());
        self.cluster.environment.spawn(async move {
            for check in checks {
                // What cannot be read is asked again the next time.
                if let Ok(gone) = strangers(&cluster, &store, &check).await {
                    cluster.watches.restrict(&cluster, &check, &gone);
                }
            }
            cluster.watches.end_checks();
        });
    }
}

/// Whom of those that a session watches its user shares no conversation with any more.
async fn strangers(cluster: &Arc<Cluster>, store: &StoreCalls, check: &Check) -> Result<BTreeSet<UserId>, StoreError> {
    let own = own_list(store, cluster.config.cluster_secret.self_id(&check.watcher)).await?;
    let shares = share(cluster, store, &own, &check.users).await;
    let mut gone = BTreeSet::new();
    for (user, shares) in check.users.iter().zip(shares) {
        if !shares? {
            gone.insert(user.clone());
        }
    }
    Ok(gone)
}

/// Whether each of these users is in one of these conversations.
pub async fn share(
    cluster: &Arc<Cluster>,
    store: &StoreCalls,
    own: &BTreeSet<ConversationId>,
    users: &[UserId],
) -> Vec<Result<bool, StoreError>> {
    let shares = |user: &UserId| {
        let self_id = cluster.config.cluster_secret.self_id(user);
        async move {
            // It is never closed.
            let _turn = cluster.turns.lists.acquire().await;
            shares_one(store, self_id, own).await
        }
    };
    stream::iter(users.iter().map(shares)).buffered(LISTS_AT_A_TIME).collect().await
}

async fn shares_one(
    store: &StoreCalls,
    self_id: ConversationId,
    own: &BTreeSet<ConversationId>,
) -> Result<bool, StoreError> {
    let rows = store.scan(Table::UserConversations, self_id.as_bytes(), None, LIST_ROWS_MAX).await?;
    let mut shares = false;
    for row in rows {
        let is_shared = ConversationId::from_slice(&row.key).is_ok_and(|id| own.contains(&id));
        shares |= is_shared && is_in(row.value);
    }
    Ok(shares)
}

async fn own_list(store: &StoreCalls, self_id: ConversationId) -> Result<BTreeSet<ConversationId>, StoreError> {
    let (mut own, mut after): (_, Option<Bytes>) = (BTreeSet::new(), None);
    for _ in 0..OWN_PAGES_MAX {
        let page = store.scan(Table::UserConversations, self_id.as_bytes(), after.as_deref(), LIST_ROWS_MAX).await?;
        let is_last = page.len() < LIST_ROWS_MAX;
        after = page.last().map(|row| row.key.clone());
        let ids = page.into_iter().filter_map(|row| {
            let id = ConversationId::from_slice(&row.key).ok()?;
            is_in(row.value).then_some(id)
        });
        own.extend(ids);
        if is_last {
            break;
        }
    }
    Ok(own)
}

/// Whether a row of a list says that its user is in a conversation whose members know of each other.
fn is_in(value: Bytes) -> bool {
    ListValue::decode(value).is_ok_and(|value| value.left_seq <= value.joined_seq && is_mutual(value.kind))
}

/// Who reads the same channel shares nothing.
pub fn is_mutual(kind: i32) -> bool {
    v1::ConversationKind::try_from(kind) != Ok(v1::ConversationKind::Channel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_beyond_the_bound_has_no_place_until_another_one_is_done() {
        let turns = Turns::default();
        let mut held: Vec<_> = std::iter::from_fn(|| turns.call()).take(CALLS_MAX + 1).collect();
        assert_eq!(held.len(), CALLS_MAX);
        held.pop();
        assert!(turns.call().is_some());
    }
}
