//! Which large conversations the users of this worker follow: from their lists as they sync, and from the owners of conversations
//! that ask.
//!
//! A user follows while it is asked for heads, before any owner can register this router: what the owner sends from then on finds
//! the user. What turns out not to be large is followed no longer, unless somebody else has said that it is. Who has left follows no
//! longer whatever the answer is: it may have been given before.

use std::collections::{BTreeMap, BTreeSet};

use im_proto::{ConversationId, UserId, v1};

use super::{Context, sync::ask_heads};
use crate::{
    conversation::Conversation,
    message::{AnswerValue, Follow, ReplyTo},
    state::{Consequences, Kind},
};

/// Why a user follows a conversation.
#[derive(Debug, Default)]
pub struct Reasons {
    /// Its owner said that it is large.
    confirmed: bool,
    /// The user's list has the channel.
    listed: bool,
    /// Syncs whose answer will tell.
    asked: BTreeSet<u64>,
}

impl Reasons {
    fn stays(&self) -> bool {
        self.confirmed || self.listed
    }

    /// The user is out: what is being asked was asked before.
    fn end(&mut self) {
        *self = Self::default();
    }
}

/// What a user follows.
pub type Following = BTreeMap<ConversationId, Reasons>;

impl Context {
    /// The users follow a conversation if they have a session. Tells whether anybody at this router does.
    pub fn follow(&mut self, follow: &Follow, reply_to: ReplyTo) {
        for user in follow.users.iter() {
            self.start_following(user, follow.conversation, |reasons| reasons.confirmed = true);
        }
        let pushed_through = self.cluster.audiences.pushed_through(&follow.conversation);
        let answer = AnswerValue::Following {
            router: self.cluster.config.instance.clone(),
            registered: pushed_through.is_some(),
            pushed_through: pushed_through.unwrap_or(0),
        };
        self.cluster.answer(reply_to, Ok(answer));
    }

    /// The users are not members any more.
    pub fn unfollow(&mut self, unfollow: &Follow) {
        for user in unfollow.users.iter() {
            self.change_following(user, &unfollow.conversation, Reasons::end);
        }
    }

    /// The user's list has a channel. The list alone says so: the channel's owner does not know its readers.
    pub fn follow_channel(&mut self, user: &UserId, channel: &ConversationId) {
        self.start_following(user, *channel, |reasons| reasons.listed = true);
    }

    /// A user's own log was opened. A subscription that it was to have may not be in it after all.
    pub fn following_opened(&mut self, conversation: &Conversation) {
        let Kind::SelfLog(user) = &conversation.settled.kind else { return };
        let Some((following, _)) = self.users.following(user) else { return };
        let list = &conversation.settled.list;
        let listed = following.iter().filter(|(_, reasons)| reasons.listed).map(|(id, _)| *id);
        let gone: Vec<_> = listed.filter(|id| list.get(id).is_none_or(|row| row.left())).collect();
        for id in gone {
            self.change_following(user, &id, |reasons| reasons.listed = false);
        }
    }

    /// A user's own log says that the user is out of a conversation.
    pub fn left_elsewhere(&mut self, conversation: &Conversation, consequences: &Consequences) {
        if let (Some(left), Kind::SelfLog(user)) = (consequences.left, &conversation.settled.kind) {
            self.change_following(user, &left, Reasons::end);
        }
    }

    /// A user's own log says that the user came into a group or channel. Whoever was there when the owner asked for followers follows it already.
    /// Who came after that, and synced before this entry, would get nothing of a large one: it is registered now, and syncs, because
    /// entries may have been pushed meanwhile.
    pub fn entered_elsewhere(&mut self, conversation: &Conversation, consequences: &Consequences) {
        let Kind::SelfLog(user) = &conversation.settled.kind else { return };
        let Some((entered, kind)) = consequences.entered else { return };
        match self.users.following(user) {
            Some((following, _)) if following.get(&entered).is_none_or(|reasons| !reasons.stays()) => {}
            _ => return,
        }
        let is_channel = kind == v1::ConversationKind::Channel;
        if is_channel {
            self.follow_channel(user, &entered);
        }
        let (cluster, user) = (self.cluster.clone(), user.clone());
        let sync = self.follow_while_asking(&user, &[entered]);
        let asking = user.clone();
        self.then(
            async move { ask_heads(&cluster, &asking, false, std::iter::once(entered)).await },
            move |worker, heads| {
                // Where the head could not be had the sync asks again, until it is answered.
                let missed =
                    is_channel || heads.as_ref().map_or(true, |heads| heads.values().any(|head| head.registered));
                let registered =
                    heads.unwrap_or_default().into_iter().filter(|(_, head)| head.registered && !is_channel);
                let registered = registered.map(|(id, _)| id).collect();
                worker.context.asked_heads(&user, sync, &[entered], &registered);
                if missed {
                    worker.context.resync_user(&user);
                }
            },
        );
    }

    /// A user's sync is about to ask for these heads.
    pub fn follow_while_asking(&mut self, user: &UserId, conversations: &[ConversationId]) -> u64 {
        self.next_sync += 1;
        let sync = self.next_sync;
        for conversation in conversations {
            self.start_following(user, *conversation, |reasons| {
                reasons.asked.insert(sync);
            });
        }
        sync
    }

    /// The sync has its heads, or has failed. Of a conversation that the user has left meanwhile they tell nothing.
    pub fn asked_heads(
        &mut self,
        user: &UserId,
        sync: u64,
        conversations: &[ConversationId],
        registered: &BTreeSet<ConversationId>,
    ) {
        for conversation in conversations {
            self.change_following(user, conversation, |reasons| {
                reasons.confirmed |= reasons.asked.remove(&sync) && registered.contains(conversation);
            });
        }
    }

    fn start_following(&mut self, user: &UserId, id: ConversationId, change: impl FnOnce(&mut Reasons)) {
        let Some((following, sessions)) = self.users.following(user) else { return };
        change(following.entry(id).or_default());
        for key in sessions {
            self.cluster.audiences.add(&id, user, key);
        }
    }

    fn change_following(&mut self, user: &UserId, id: &ConversationId, change: impl FnOnce(&mut Reasons)) {
        let Some((following, sessions)) = self.users.following(user) else { return };
        let Some(reasons) = following.get_mut(id) else { return };
        change(reasons);
        if !reasons.stays() && reasons.asked.is_empty() {
            following.remove(id);
            for key in sessions {
                self.cluster.audiences.remove(&self.cluster, id, user, key);
            }
        }
    }
}
