//! The calls: who may know of whom is decided by the owner of the caller's own log, from the two conversation lists.

use std::{collections::BTreeSet, future::Future, sync::Arc};

use im_proto::{ConversationId, ShardId, StatusCode, UserId, body, limits, v1};
use im_storage::{HotState as _, Presence};
use prost::Message as _;

use super::sharing::{is_mutual, share};
use crate::{
    caller::Caller,
    conversation::{Assigned, Completion, Conversation, ReplyKind},
    message::{AnswerValue, Call, ReplyTo, overloaded, unavailable},
    state::{EntryMeta, Kind},
    watches::{Seen, Subscription},
    worker::{Context, waiting::Request},
};

/// Users of whom the caller may know, and what hot state knows of them.
type Known = Vec<(UserId, Option<Presence>)>;

impl Context {
    /// Reads presence for the owner of an open self log.
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
        let Some(users) = parse(&request.user_ids) else { return Err(reply_to) };
        let own = users.contains(&caller.user).then(|| self.own_presence(conversation, caller));
        let (cluster, known) = (self.cluster.clone(), self.look_up(conversation, caller, users, false));
        let answer = async move {
            let Some(known) = known.await else { return cluster.answer(reply_to, Err(unavailable())) };
            let now = cluster.environment.clock.now();
            let told = known.into_iter().filter_map(|(user, known)| {
                let known = known?;
                let seen = Seen { online: known.is_online(now), last_seen_ms: known.last_seen.as_millis() };
                Some(seen.to_wire(&user))
            });
            let reply = v1::PresenceReadReply { users: told.chain(own).collect() };
            cluster.answer(reply_to, Ok(AnswerValue::Reply(reply.encode_to_vec().into())));
        };
        self.cluster.environment.spawn(answer);
        Ok(())
    }

    /// A session wants to know when users come and go.
    pub fn presence_subscribe(
        &mut self,
        conversation: &Conversation,
        caller: &Arc<Caller>,
        request: &v1::PresenceSubscribeRequest,
        reply_to: ReplyTo,
    ) -> Result<(), ReplyTo> {
        if request.user_ids.len() > limits::PRESENCE_WATCHED_MAX {
            self.cluster.answer(reply_to, Err(StatusCode::TooLarge.to_status()));
            return Ok(());
        }
        let Some(users) = parse(&request.user_ids) else { return Err(reply_to) };
        let Some(key) = caller.session.clone() else {
            // A call over gRPC has no session that could be told.
            self.cluster.answer(reply_to, Err(StatusCode::Forbidden.to_status()));
            return Ok(());
        };
        if !reply_to.is_own_session() {
            // By another router: its answer could come behind what is told later. The gateway is about to know the owner.
            self.refuse(reply_to);
            return Ok(());
        }
        let own = users.contains(&caller.user).then(|| self.own_presence(conversation, caller));
        let (known, watcher) = (self.look_up(conversation, caller, users, true), caller.user.clone());
        self.users.presence.subscriptions += 1;
        let number = self.users.presence.subscriptions;
        self.then(known, move |worker, known| {
            let context = &mut worker.context;
            match known {
                Some(known) if context.users.has_session(&watcher, &key) => {
                    let subscription = Subscription { key, watcher, number, users: context.seen_in_hot(known), own };
                    context.subscribe(subscription, reply_to);
                }
                // One that is not recorded here would not be found by what is told; its gateway is about to announce it.
                _ => context.refuse(reply_to),
            }
        });
        Ok(())
    }

    fn seen_in_hot(&self, known: Known) -> Vec<(ShardId, UserId, Option<Seen>)> {
        let now = self.cluster.environment.clock.now();
        let seen = |known: Presence| Seen { online: known.is_online(now), last_seen_ms: known.last_seen.as_millis() };
        let users = known.into_iter();
        users.map(|(user, known)| (self.cluster.shard_of_user(&user), user, known.map(seen))).collect()
    }

    fn subscribe(&mut self, subscription: Subscription, reply_to: ReplyTo) {
        for (shard, users) in self.cluster.watches.subscribe(&self.cluster, subscription, reply_to) {
            self.cluster.watches.ask(&self.cluster, shard, &users);
        }
    }

    /// Users see of themselves how it is, not what they let others see.
    fn own_presence(&mut self, conversation: &Conversation, caller: &Caller) -> v1::UserPresence {
        let online = self.users.sight(&caller.user).is_some();
        let last_seen_ms = if online { self.cluster.environment.clock.now().as_millis() } else { 0 };
        let invisible = conversation.settled.invisible;
        v1::UserPresence { user_id: caller.user.to_string(), online, last_seen_ms, invisible }
    }

    /// What is known of those of these users, besides the caller, who share a conversation with the caller. The same is read for
    /// everybody who is asked for, allowed or not, existing or not. `None` if this router may own the caller's log no longer, if too many wait
    /// for an answer, or if it must be `complete` and a list could not be read.
    fn look_up(
        &self,
        conversation: &Conversation,
        caller: &Caller,
        mut users: BTreeSet<UserId>,
        complete: bool,
    ) -> impl Future<Output = Option<Known>> + Send + 'static {
        users.remove(&caller.user);
        let rows = conversation.settled.list.iter().filter(|(_, row)| !row.left() && is_mutual(row.kind.into()));
        let own: BTreeSet<ConversationId> = rows.map(|(id, _)| *id).collect();
        let (cluster, store) = (self.cluster.clone(), self.store.clone());
        let fence = self.past_lease().then(|| self.fence.clone());
        async move {
            if let Some(fence) = fence
                && !fence.clean().await
            {
                return None;
            }
            let users: Vec<UserId> = users.into_iter().collect();
            let known = cluster.hot.presence(&users).await;
            let _place = cluster.turns.call()?;
            // A list that cannot be read has nothing in common.
            let allowed = share(&cluster, &store, &own, &users).await;
            if complete && allowed.iter().any(Result::is_err) {
                return None;
            }
            let told = users.into_iter().zip(known).zip(allowed).filter(|(_, allowed)| matches!(allowed, Ok(true)));
            Some(told.map(|(told, _)| told).collect())
        }
    }

    /// Sets whether others see the caller come and go.
    pub fn presence_set_visibility(
        &mut self,
        conversation: &mut Conversation,
        call: Call,
        request: &v1::PresenceSetVisibilityRequest,
        reply_to: ReplyTo,
    ) {
        if conversation.deciding.invisible == request.invisible {
            let reply = v1::PresenceSetVisibilityReply { seq: 0 }.encode_to_vec();
            if conversation.last_event > conversation.committed {
                // What made it so may not be committed yet.
                let again = Completion::Again(Box::new(Request::Call { call, reply_to }));
                return conversation.waiters.entry(conversation.last_event).or_default().push(again);
            }
            return self.answer_read(reply_to, Ok(AnswerValue::Reply(reply.into())));
        }
        if conversation.queue.len() >= self.cluster.config.conversation_queue_max || conversation.unwritten.is_full() {
            return self.cluster.answer(reply_to, Err(overloaded()));
        }
        let user = call.caller.user.clone();
        let meta = match conversation.deciding.kind {
            Kind::Empty => EntryMeta { user_id: user.to_string(), ..EntryMeta::default() }.encode_to_vec().into(),
            _ => bytes::Bytes::new(),
        };
        let changed = v1::VisibilityChanged { invisible: request.invisible };
        let body = body::event(v1::system_event::Event::VisibilityChanged(changed));
        let none = bytes::Bytes::new();
        let row = self.next_row(conversation, v1::EntryKind::Event, Some(user), &none, body, meta);
        let completion = Some(Completion::Reply { reply_to, kind: ReplyKind::SetVisibility });
        // All the caller's sessions get the entry.
        self.assign(conversation, Assigned { row, sender: None, completion });
    }
}

fn parse(ids: &[String]) -> Option<BTreeSet<UserId>> {
    ids.iter().map(|id| UserId::parse(id).ok()).collect()
}
