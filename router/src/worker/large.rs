//! Large conversations and channels at their owner: entries go to registered routers, not to members.
//!
//! A router is registered by asking for the head, or by answering that somebody there follows the conversation. A member whose owner
//! has not answered yet is *pending* and gets every entry by name as well. All members are pending when the conversation is opened or
//! becomes large, new ones when they come. So the cost of an entry does not depend on the number of members, online or not.
//!
//! The readers of a channel are unknown here, so there is nobody to ask about: each router that can be reached gets its entries until it
//! says that nobody there follows the channel, and again once somebody there asks for the head. A router that comes into reach later may
//! have missed entries, so those who follow anything there are told to sync.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
};

use im_proto::{ConversationId, InstanceId, ShardId, UserId};

use super::{Context, Worker, fan_out::Groups, waiting::Slot};
use crate::{
    audience::AudiencePush,
    cluster::Cluster,
    conversation::Conversation,
    message::{Answer, AnswerValue, AudienceDelivery, Follow, ReplyTo, ShardMessage},
    state::{Consequences, Kind},
};

/// What the owner of a large conversation knows of those who follow it.
#[derive(Debug, Default)]
pub struct Large {
    routers: Routers,
    pending: BTreeMap<ShardId, Pending>,
    /// The pending members by their owners.
    groups: Groups,
    /// Entries below this one were sent by an earlier owner, or never; 0 if that does not matter.
    sent_from: u64,
    /// The last entry that was sent to the routers, here or by an earlier owner.
    sent_through: u64,
    next_ask: u64,
}

/// Which routers get the entries.
#[derive(Debug)]
enum Routers {
    /// Those where somebody follows, with the last entry that was sent before they were registered.
    Registered(BTreeMap<InstanceId, u64>),
    /// All but those where nobody does.
    AllBut(BTreeSet<InstanceId>),
}

impl Default for Routers {
    fn default() -> Self {
        Routers::Registered(BTreeMap::new())
    }
}

impl Routers {
    /// Somebody at a router follows the conversation, of which entries up to one were sent; `false` if it gets the entries anyway.
    fn add(&mut self, router: &InstanceId, sent_through: u64) -> bool {
        match self {
            Routers::Registered(registered) => registered.insert(router.clone(), sent_through).is_none(),
            Routers::AllBut(others) => others.remove(router),
        }
    }

    /// A router says that a push up to an entry found nobody there. If it was registered since, somebody has come: the answer to
    /// [`Follow`] comes on another link than this, and may come first.
    fn gone(&mut self, router: &InstanceId, seq: u64) {
        match self {
            Routers::Registered(registered) if registered.get(router).is_some_and(|since| seq <= *since) => {}
            _ => self.remove(router),
        }
    }

    /// Nobody there does, or the router is gone.
    fn remove(&mut self, router: &InstanceId) {
        match self {
            Routers::Registered(registered) => drop(registered.remove(router)),
            Routers::AllBut(others) => drop(others.insert(router.clone())),
        }
    }

    /// Whom the next entry goes to. What is known of routers that are gone is forgotten.
    fn targets(&mut self, cluster: &Cluster) -> Vec<InstanceId> {
        match self {
            Routers::Registered(registered) => registered.keys().cloned().collect(),
            Routers::AllBut(others) => {
                cluster.audiences.sent_to_all.store(true, Ordering::Release);
                let own = &cluster.config.instance;
                let peers = cluster.peers.read();
                others.retain(|router| router == own || peers.contains_key(router));
                peers.keys().chain([own]).filter(|router| !others.contains(*router)).cloned().collect()
            }
        }
    }
}

/// Members of one shard whose owner has not answered.
#[derive(Debug, Default)]
struct Pending {
    users: BTreeSet<UserId>,
    /// The question under way.
    ask: Option<u64>,
}

impl Large {
    fn add(&mut self, shard: ShardId, user: UserId) {
        let pending = self.pending.entry(shard).or_default();
        pending.users.insert(user);
        // An answer that is under way does not speak of this one.
        pending.ask = None;
        self.groups.invalidate();
    }

    fn remove(&mut self, shard: ShardId, user: &UserId) {
        if let Some(pending) = self.pending.get_mut(&shard) {
            pending.users.remove(user);
            if pending.users.is_empty() {
                self.pending.remove(&shard);
            }
            self.groups.invalidate();
        }
    }
}

impl Context {
    /// A conversation with this many members is opened: nobody is registered yet. Entries from `sent_from` on are sent by this owner.
    pub fn open_large(&mut self, conversation: &mut Conversation, sent_from: u64) {
        let is_large = match conversation.settled.kind {
            Kind::Group => conversation.settled.members.len() > self.cluster.config.large_members,
            Kind::Channel => true,
            _ => false,
        };
        if is_large {
            self.become_large(conversation, sent_from);
        }
    }

    fn become_large(&mut self, conversation: &mut Conversation, sent_from: u64) {
        let sent_through = conversation.committed;
        let mut large = Box::new(Large { sent_from, sent_through, ..Large::default() });
        if conversation.is_channel() {
            large.routers = Routers::AllBut(BTreeSet::new());
        } else {
            for user in conversation.settled.members.keys() {
                large.add(self.cluster.shard_of_user(user), user.clone());
            }
        }
        conversation.large = Some(large);
        self.ask_followers(conversation);
    }

    /// Members came or went by a committed entry.
    pub fn members_changed(&mut self, conversation: &mut Conversation, consequences: &Consequences) {
        let Some(large) = &mut conversation.large else {
            if !consequences.joined.is_empty() {
                self.open_large(conversation, 0);
            }
            return;
        };
        // Who may write into a channel reads it like everybody, by the own list. What is asked about by name is answered on another link
        // than the one that says that nobody follows, and would be overtaken.
        if matches!(large.routers, Routers::AllBut(_)) {
            return;
        }
        for user in &consequences.joined {
            large.add(self.cluster.shard_of_user(user), user.clone());
        }
        for user in &consequences.gone {
            let shard = self.cluster.shard_of_user(user);
            large.remove(shard, user);
            let unfollow = Follow { conversation: conversation.id, users: Arc::from([user.clone()]) };
            self.cluster.send(shard, ShardMessage::Unfollow(unfollow), ReplyTo::Nobody);
        }
        self.ask_followers(conversation);
    }

    /// Asks the owners of all pending members that are not being asked.
    pub fn ask_followers(&mut self, conversation: &mut Conversation) {
        let id = conversation.id;
        let Some(large) = &mut conversation.large else { return };
        for (shard, pending) in large.pending.iter_mut().filter(|(_, pending)| pending.ask.is_none()) {
            large.next_ask += 1;
            pending.ask = Some(large.next_ask);
            let follow = Follow { conversation: id, users: pending.users.iter().cloned().collect() };
            let reply_to = ReplyTo::Follow { conversation: id, shard: *shard, ask: large.next_ask };
            self.cluster.send(*shard, ShardMessage::Follow(follow), reply_to);
        }
    }

    /// A router that asks for the head of a large conversation is registered with it; `false` if pushes would not find it yet.
    pub fn register(&self, conversation: &mut Conversation, user: &UserId, router: &InstanceId) -> Registration {
        let may_read = conversation.may_read(user);
        let Some(large) = conversation.large.as_mut().filter(|_| may_read) else { return Registration::None };
        if !self.is_reachable(router) {
            return Registration::Unreachable;
        }
        large.routers.add(router, large.sent_through);
        Registration::Made
    }

    /// Whether there is a way to a router.
    pub fn is_reachable(&self, router: &InstanceId) -> bool {
        *router == self.cluster.config.instance || self.cluster.peers.read().contains_key(router)
    }

    /// Sends frames to all registered routers; returns the groups of members that must get them by name.
    pub fn push_large(&self, conversation: &mut Conversation, push: &AudiencePush<'_>) {
        let Some(large) = &mut conversation.large else { return };
        let shard = conversation.shard;
        large.sent_through = large.sent_through.max(push.last_seq);
        for router in large.routers.targets(&self.cluster) {
            let mut stays = true;
            self.cluster.metrics.audience_pushes.increment(1);
            if router == self.cluster.config.instance {
                self.cluster.audiences.push(&self.cluster, push, || stays = false);
            } else {
                stays = self.cluster.send_audience(&router, shard, &AudienceDelivery::of(push));
            }
            if !stays {
                large.routers.remove(&router);
            }
        }
        if !large.pending.is_empty() {
            let users =
                large.pending.iter().flat_map(|(shard, pending)| pending.users.iter().map(|user| (*shard, user)));
            large.groups.refresh(&self.cluster, 0, users);
            large.groups.send(&self.cluster, push.frames, push.except);
        }
    }
}

/// What came of registering a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    /// The conversation is not large, or the user is not in it.
    None,
    Made,
    /// This router knows no way to it yet.
    Unreachable,
}

impl Worker {
    /// The owner of pending members has answered, or could not.
    pub fn followed(&mut self, id: &ConversationId, shard: ShardId, ask: u64, answer: Answer) {
        let Some(Slot::Open(conversation)) = self.conversations.get_mut(id) else { return };
        let Some(large) = &mut conversation.large else { return };
        let Some(pending) = large.pending.get_mut(&shard).filter(|pending| pending.ask == Some(ask)) else { return };
        let Ok(AnswerValue::Following { router, registered, pushed_through }) = answer else {
            pending.ask = None;
            // It is asked again with the next tick.
            return self.context.look_soon(conversation);
        };
        large.pending.remove(&shard);
        large.groups.invalidate();
        let is_new = registered && large.routers.add(&router, large.sent_through);
        if is_new && pushed_through > 0 && pushed_through + 1 < large.sent_from {
            self.context.cluster.resync_audience(&router, conversation.shard, id);
        }
    }

    /// A push up to an entry found nobody who follows the conversation at a router.
    pub fn audience_gone(&mut self, id: &ConversationId, router: &InstanceId, seq: u64) {
        if let Some(Slot::Open(conversation)) = self.conversations.get_mut(id)
            && let Some(large) = &mut conversation.large
        {
            large.routers.gone(router, seq);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_there_does_not_unregister_a_router_that_was_registered_since() {
        let router = InstanceId::parse("router").expect("an id");
        let is_registered =
            |routers: &Routers| matches!(routers, Routers::Registered(all) if all.contains_key(&router));
        let mut routers = Routers::default();
        assert!(routers.add(&router, 3));
        routers.gone(&router, 0);
        routers.gone(&router, 3);
        assert!(is_registered(&routers), "it was said of pushes before");
        routers.gone(&router, 4);
        assert!(!is_registered(&routers));
        assert!(routers.add(&router, 4));
        assert!(!routers.add(&router, 6), "somebody else there asked");
        routers.gone(&router, 5);
        assert!(is_registered(&routers));
        routers.gone(&router, 7);
        assert!(!is_registered(&routers));
    }
}
