//! From committed entries to the owners of the receivers' shards: one message for each owner and commit, whatever the number of
//! entries and members.

use std::{collections::BTreeMap, sync::Arc};

use bytes::{Bytes, BytesMut};
use im_proto::{InstanceId, ShardId, UserId, frame, v1};
use im_storage::Row;
use tokio::time::Instant;

use crate::{
    audience::AudiencePush,
    caller::{Caller, SessionKey},
    cluster::{Cluster, arrivals::Arrivals},
    conversation::Conversation,
    message::{Delivery, ReplyTo, ShardMessage},
    worker::Context,
};

/// Users by who acts for them: each worker of this router, and each other router as a whole.
#[derive(Debug, Default)]
pub struct Groups {
    owners_version: u64,
    members_version: u64,
    groups: Vec<Group>,
    valid: bool,
}

/// The users whose sessions one worker or one other router holds, in the order of their shards.
#[derive(Debug)]
struct Group {
    /// Finds the worker, or the router.
    shard: ShardId,
    /// The other router.
    router: Option<InstanceId>,
    users: Arc<[UserId]>,
    /// How many of them are of which shard.
    spans: Arc<[(ShardId, u32)]>,
}

/// Whose sessions they are.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Holder<'a> {
    Worker(usize),
    Router(&'a InstanceId),
    /// Nobody knows yet: each shard for itself.
    Nobody(ShardId),
}

impl Groups {
    /// Forgets what was computed.
    pub fn invalidate(&mut self) {
        self.valid = false;
    }

    /// Computes the groups again if owners or users have changed.
    pub fn refresh<'a>(
        &mut self,
        cluster: &Cluster,
        members_version: u64,
        users: impl Iterator<Item = (ShardId, &'a UserId)>,
    ) {
        let owners = cluster.owners();
        if self.valid && self.owners_version == owners.version && self.members_version == members_version {
            return;
        }
        let mut by_holder: BTreeMap<Holder<'_>, Vec<(ShardId, &UserId)>> = BTreeMap::new();
        for (shard, user) in users {
            let holder = match owners.get(shard) {
                Some((owner, _)) if *owner == cluster.config.instance => Holder::Worker(cluster.worker_of(shard)),
                Some((owner, _)) => Holder::Router(owner),
                None => Holder::Nobody(shard),
            };
            by_holder.entry(holder).or_default().push((shard, user));
        }
        self.groups = by_holder.into_iter().filter_map(|(holder, users)| Group::new(&holder, users)).collect();
        (self.owners_version, self.members_version, self.valid) = (owners.version, members_version, true);
    }

    /// Whether all that was sent to them before a moment has arrived: where it was sent, and where it would be sent now, for the word that
    /// it did not reach the former owner of a shard.
    pub fn have_arrived(&self, cluster: &Cluster, arrivals: &Arrivals, before: Instant) -> bool {
        let owners = cluster.owners();
        let is_there = |(shard, _): &(ShardId, u32)| {
            let owner = owners.get(*shard).map(|(owner, _)| owner);
            owner.is_some_and(|owner| *owner == cluster.config.instance || arrivals.at(owner, before))
        };
        self.groups.iter().all(|group| {
            group.router.as_ref().is_none_or(|router| arrivals.at_if_there(router, before))
                && group.spans.iter().all(is_there)
        })
    }

    /// One message to each of them.
    pub fn send(&self, cluster: &Cluster, frames: &Bytes, except: Option<&SessionKey>) {
        for group in &self.groups {
            let delivery = Delivery {
                frames: frames.clone(),
                users: group.users.clone(),
                spans: group.spans.clone(),
                except: except.cloned(),
            };
            cluster.send(group.shard, ShardMessage::Deliver(delivery), ReplyTo::Nobody);
        }
    }
}

impl Group {
    fn new(holder: &Holder<'_>, mut users: Vec<(ShardId, &UserId)>) -> Option<Self> {
        users.sort_unstable();
        let (shard, _) = *users.first()?;
        let mut spans: Vec<(ShardId, u32)> = Vec::new();
        for (shard, _) in &users {
            match spans.last_mut() {
                Some((last, count)) if last == shard => *count += 1,
                _ => spans.push((*shard, 1)),
            }
        }
        let router = match holder {
            Holder::Router(router) => Some((*router).clone()),
            Holder::Worker(_) | Holder::Nobody(_) => None,
        };
        Some(Self {
            shard,
            router,
            users: users.into_iter().map(|(_, user)| user.clone()).collect(),
            spans: spans.into(),
        })
    }
}

/// Delivers entries to the live sessions of all members. A run of entries of one sender's session travels as one run of frames.
pub fn deliver(context: &Context, conversation: &mut Conversation, entries: &[(Row, Option<Arc<Caller>>)]) {
    let mut from = 0;
    while from < entries.len() {
        let session = session_of(entries[from].1.as_ref());
        let run = entries[from..].iter().take_while(|(_, sender)| session_of(sender.as_ref()) == session).count();
        let frames = encode(conversation, &entries[from..from + run]);
        let last_seq = entries[from + run - 1].0.seq;
        send(context, conversation, &frames, last_seq, session);
        from += run;
    }
    conversation.last_push = Instant::now();
}

/// Delivers a frame that is not an entry.
pub fn deliver_frame(context: &Context, conversation: &mut Conversation, frames: &Bytes, except: Option<&SessionKey>) {
    send(context, conversation, frames, 0, except);
}

fn send(
    context: &Context,
    conversation: &mut Conversation,
    frames: &Bytes,
    last_seq: u64,
    except: Option<&SessionKey>,
) {
    if conversation.large.is_some() {
        let push = AudiencePush { conversation: conversation.id, frames, last_seq, except };
        return context.push_large(conversation, &push);
    }
    let cluster = &context.cluster;
    let members = conversation.settled.members.keys().map(|user| (cluster.shard_of_user(user), user));
    conversation.routes.refresh(cluster, conversation.members_version, members);
    conversation.routes.send(cluster, frames, except);
}

fn session_of(caller: Option<&Arc<Caller>>) -> Option<&SessionKey> {
    caller.and_then(|caller| caller.session.as_ref())
}

fn encode(conversation: &Conversation, entries: &[(Row, Option<Arc<Caller>>)]) -> Bytes {
    let bytes = entries.iter().map(|(row, _)| row.bytes() + 32).sum();
    let mut out = BytesMut::with_capacity(bytes);
    for (row, _) in entries {
        let message = v1::server_frame::Frame::Message(to_message(conversation, row));
        frame::encode_frame(&v1::ServerFrame { frame: Some(message) }, &mut out);
    }
    out.freeze()
}

/// An entry as everybody sees it.
pub fn to_message(conversation: &Conversation, row: &Row) -> v1::Message {
    entry_message(conversation.id.to_bytes(), row)
}

/// An entry as everybody sees it, live and from history.
pub fn entry_message(conversation_id: Bytes, row: &Row) -> v1::Message {
    v1::Message {
        conversation_id,
        seq: row.seq,
        sender: row.sender.as_ref().map(UserId::to_string).unwrap_or_default(),
        sent_at_ms: row.sent_at.as_millis(),
        client_message_id: row.client_message_id.clone(),
        body: row.body.clone(),
        kind: row.kind.into(),
        flags: row.flags,
    }
}
