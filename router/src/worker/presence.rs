//! Presence: mirrored to hot state for whoever asks, and read from it.
//!
//! The owner of a user's sessions is the one who knows. It says so when it changes, and again every 20 s for whoever is online; a word
//! holds for 60 s. Nothing waits for hot state: what cannot be stored is said again, and what is not there is *unknown* to who asks,
//! never *offline*.

use std::{collections::BTreeSet, time::Duration};

use futures::{StreamExt as _, stream};
use im_proto::{ConversationId, StatusCode, UserId, limits, v1};
use im_storage::{HotState as _, Presence, Table};
use prost::Message as _;

use super::Context;
use crate::{
    caller::Caller,
    conversation::Conversation,
    deadline::StoreCalls,
    message::{AnswerValue, ReplyTo, unavailable},
    state::ListValue,
};

/// How long a word that somebody is online holds: three times as long as until it is said again, so that two may be lost.
const HOLDS: Duration = Duration::from_secs(60);
/// In so many ticks of half a second everybody is said to be online again.
const TICKS_A_ROUND: usize = 40;
/// Conversations of a user that are compared with the caller's. Whoever has more shares with the caller what is among the first.
const LIST_ROWS_MAX: usize = 1_024;
/// Lists that are read at a time for one call.
const LISTS_AT_A_TIME: usize = 8;

/// What is still to be said.
#[derive(Default)]
pub struct Mirror {
    changed: BTreeSet<UserId>,
    after: Option<UserId>,
}

impl Mirror {
    /// A user came or went.
    pub fn changed(&mut self, user: &UserId) {
        self.changed.insert(user.clone());
    }
}

impl Context {
    /// Says who came and went since the last tick, and of some of the others that they are still there.
    pub fn mirror_presence(&mut self) {
        let now = self.cluster.environment.clock.now();
        let online = Presence { online_until: now.saturating_add(HOLDS), last_seen: now };
        let offline = Presence { online_until: now, last_seen: now };
        let mut words = Vec::new();
        for user in std::mem::take(&mut self.users.presence.changed) {
            // Of a user whose shard went elsewhere the new owner speaks.
            if self.shards.is_active(self.cluster.shard_of_user(&user)) {
                let word = if self.users.is_online(&user) { online } else { offline };
                words.push((user, word));
            }
        }
        let count = self.users.count().div_ceil(TICKS_A_ROUND);
        let after = self.users.presence.after.take();
        let again: Vec<UserId> = self.users.after(after.as_ref()).take(count).map(|(user, _)| user.clone()).collect();
        self.users.presence.after = again.last().cloned();
        words.extend(again.into_iter().map(|user| (user, online)));
        if !words.is_empty() {
            self.cluster.metrics.presence_words.increment(words.len() as u64);
            self.cluster.hot.put_presence(words);
        }
    }

    /// Reads presence for the owner of an open self log. The same is read for everybody who is asked for, allowed or not, existing or not.
    pub fn presence(
        &mut self,
        conversation: &Conversation,
        caller: &Caller,
        request: &v1::PresenceReadRequest,
        reply_to: ReplyTo,
    ) -> Result<(), ReplyTo> {
        if request.user_ids.len() > limits::PRESENCE_USERS_MAX {
            self.cluster.answer(reply_to, Err(StatusCode::TooLarge.to_status()));
            return Ok(());
        }
        let users: Result<BTreeSet<UserId>, _> = request.user_ids.iter().map(|id| UserId::parse(id)).collect();
        let Ok(users) = users else { return Err(reply_to) };
        let rows = conversation.settled.list.iter().filter(|(_, row)| !row.left());
        let own: BTreeSet<ConversationId> = rows.map(|(id, _)| *id).collect();
        let (cluster, store, caller) = (self.cluster.clone(), self.store.clone(), caller.user.clone());
        let fence = self.past_lease().then(|| self.fence.clone());
        let answer = async move {
            if let Some(fence) = fence
                && !fence.clean().await
            {
                return cluster.answer(reply_to, Err(unavailable()));
            }
            let users: Vec<UserId> = users.into_iter().collect();
            let known = cluster.hot.presence(&users).await;
            let shares = |user: &UserId| {
                let (store, own, is_caller) = (&store, &own, *user == caller);
                let self_id = cluster.config.cluster_secret.self_id(user);
                async move { shares_one(store, self_id, own).await || is_caller }
            };
            let allowed: Vec<bool> = stream::iter(users.iter().map(shares)).buffered(LISTS_AT_A_TIME).collect().await;
            let now = cluster.environment.clock.now();
            let told = users.iter().zip(known).zip(allowed).filter(|(_, allowed)| *allowed);
            let told = told.filter_map(|((user, known), _)| {
                let known = known?;
                let (user_id, last_seen_ms) = (user.to_string(), known.last_seen.as_millis());
                Some(v1::UserPresence { user_id, online: known.is_online(now), last_seen_ms })
            });
            let reply = v1::PresenceReadReply { users: told.collect() };
            cluster.answer(reply_to, Ok(AnswerValue::Reply(reply.encode_to_vec().into())));
        };
        self.cluster.environment.spawn(answer);
        Ok(())
    }
}

/// Whether a user is in one of these conversations. A list that cannot be read has none.
async fn shares_one(store: &StoreCalls, self_id: ConversationId, own: &BTreeSet<ConversationId>) -> bool {
    let rows = store.scan(Table::UserConversations, self_id.as_bytes(), None, LIST_ROWS_MAX).await.unwrap_or_default();
    let mut shares = false;
    for row in rows {
        let is_shared = ConversationId::from_slice(&row.key).is_ok_and(|id| own.contains(&id));
        let is_in = ListValue::decode(row.value).is_ok_and(|value| value.left_seq <= value.joined_seq);
        shares |= is_shared && is_in;
    }
    shares
}
