//! Whether users are invisible: a setting of their own logs, read when they come, and changed by its entries.
//!
//! The row of a quiet log says it. Of one that is open, the state in memory does; one that is being opened is waited for.

use futures::{StreamExt as _, stream};
use im_proto::{ConversationId, UserId};
use im_storage::{StoreError, Table};
use prost::Message as _;
use tokio::time::Instant;

use super::{GRACE, Leaving};
use crate::{
    conversation::Conversation,
    deadline::StoreCalls,
    state::{Consequences, ConversationValue, Kind},
    worker::{Context, Worker, waiting::Slot},
};

/// Users looked at in one go.
const USERS_MAX: usize = 2_048;
/// Rows that are read at a time, of all that there are: after a failover messages must not wait for them.
const READS_AT_A_TIME: usize = 32;

impl Worker {
    /// Finds out of users who came whether they are invisible. One such task at a time.
    pub fn read_visibility(&mut self) {
        if self.context.users.presence.reading {
            return;
        }
        let (mut asked, mut later) = (Vec::new(), Vec::new());
        for _ in 0..USERS_MAX {
            let Some(user) = self.context.users.presence.unread.pop_first() else { break };
            let id = self.context.cluster.config.cluster_secret.self_id(&user);
            match self.conversations.get(&id) {
                Some(Slot::Open(conversation)) => {
                    let invisible = conversation.settled.invisible;
                    self.context.visibility_is(&user, invisible);
                }
                Some(_) => later.push(user),
                None => asked.push((user, id)),
            }
        }
        self.context.users.presence.unread.extend(later);
        if asked.is_empty() {
            return;
        }
        self.context.users.presence.reading = true;
        let store = self.context.store.clone();
        let read = async move {
            let reads = asked.into_iter().map(|(user, id)| {
                let store = &store;
                async move { (user, id, read_row(store, id).await) }
            });
            stream::iter(reads).buffered(READS_AT_A_TIME).collect::<Vec<_>>().await
        };
        self.context.then(read, |worker, rows| {
            worker.context.users.presence.reading = false;
            for (user, id, row) in rows {
                worker.visibility_read(&user, &id, row);
            }
        });
    }

    /// A row was read. If the log was opened meanwhile it may have changed.
    fn visibility_read(&mut self, user: &UserId, id: &ConversationId, row: Result<bool, StoreError>) {
        match row {
            Ok(invisible) if !self.conversations.contains_key(id) => self.context.visibility_is(user, invisible),
            _ if self.context.users.sight(user).is_some_and(|sight| sight.invisible.is_none()) => {
                self.context.users.presence.begins(user);
            }
            _ => {}
        }
    }
}

impl Context {
    /// A user's own log says whether the user is invisible.
    pub fn visibility_is(&mut self, user: &UserId, invisible: bool) {
        let now = self.cluster.environment.clock.now();
        let Some(sight) = self.users.sight(user) else { return };
        if sight.invisible.replace(invisible) == Some(invisible) {
            return;
        }
        let was_shown = invisible && std::mem::take(&mut sight.shown);
        self.users.presence.unread.remove(user);
        if !invisible {
            self.users.presence.came(user);
        } else if was_shown {
            // As if the user had left just now.
            let leaving = Leaving { seen: now, due: Instant::now() + GRACE };
            self.users.presence.leaving.insert(user.clone(), leaving);
        }
    }

    /// An entry of a user's own log was committed.
    pub fn visibility_changed(&mut self, conversation: &Conversation, consequences: &Consequences) {
        if let (Some(invisible), Kind::SelfLog(user)) = (consequences.invisible, &conversation.settled.kind) {
            self.visibility_is(user, invisible);
        }
    }

    /// A user's own log was opened; its last entries may have been committed by that.
    pub fn visibility_opened(&mut self, conversation: &Conversation) {
        if let Kind::SelfLog(user) = &conversation.settled.kind {
            self.visibility_is(user, conversation.settled.invisible);
        }
    }
}

async fn read_row(store: &StoreCalls, id: ConversationId) -> Result<bool, StoreError> {
    let row = store.read(Table::Conversations, id.as_bytes(), b"").await?;
    let value = row.map(|row| ConversationValue::decode(row.value)).transpose();
    let damaged = |_| StoreError::Damaged(format!("the row of {id} cannot be read"));
    Ok(value.map_err(damaged)?.is_some_and(|value| value.invisible))
}
