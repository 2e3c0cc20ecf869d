//! From committed entries to the owners of the receivers' shards: one message for each owner and commit, whatever the number of
//! entries and members.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use im_proto::{ShardId, UserId, frame, v1};
use im_storage::Row;

use crate::{
    caller::{Caller, SessionKey},
    conversation::Conversation,
    message::{Delivery, ReplyTo, ShardMessage},
    worker::Context,
};

/// The members of a conversation by the shard that acts for them.
#[derive(Debug, Default)]
pub struct Routes {
    owners_version: u64,
    members_version: u64,
    groups: Vec<Group>,
    valid: bool,
}

/// The members whose sessions one worker or one other router's shard holds.
#[derive(Debug)]
struct Group {
    /// Finds the worker.
    shard: ShardId,
    users: Arc<[UserId]>,
    /// All of them, if they are several.
    shards: Arc<[ShardId]>,
}

impl Routes {
    /// Forgets what was computed.
    pub fn invalidate(&mut self) {
        self.valid = false;
    }
}

/// Delivers entries to the live sessions of all members. A run of entries of one sender's session travels as one run of frames.
pub fn deliver(context: &mut Context, conversation: &mut Conversation, entries: &[(Row, Option<Arc<Caller>>)]) {
    refresh_routes(context, conversation);
    let mut from = 0;
    while from < entries.len() {
        let session = session_of(entries[from].1.as_ref());
        let run = entries[from..].iter().take_while(|(_, sender)| session_of(sender.as_ref()) == session).count();
        let frames = encode(conversation, &entries[from..from + run]);
        send(context, conversation, &frames, session.cloned());
        from += run;
    }
}

/// Delivers a frame that is not an entry.
pub fn deliver_frame(
    context: &mut Context,
    conversation: &mut Conversation,
    frames: &Bytes,
    except: Option<SessionKey>,
) {
    refresh_routes(context, conversation);
    send(context, conversation, frames, except);
}

fn send(context: &Context, conversation: &Conversation, frames: &Bytes, except: Option<SessionKey>) {
    for group in &conversation.routes.groups {
        let delivery = Delivery {
            frames: frames.clone(),
            users: group.users.clone(),
            shards: group.shards.clone(),
            except: except.clone(),
        };
        context.cluster.send(group.shard, ShardMessage::Deliver(delivery), ReplyTo::Nobody);
    }
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

fn refresh_routes(context: &Context, conversation: &mut Conversation) {
    let owners = context.cluster.owners();
    let routes = &conversation.routes;
    if routes.valid && routes.owners_version == owners.version && routes.members_version == conversation.members_version
    {
        return;
    }
    // A shard stands for its owner: this router's workers each, another router as a whole would need one message a shard,
    // because the receiver finds its worker by the shard.
    let mut groups: BTreeMap<(bool, u64), (BTreeSet<ShardId>, Vec<UserId>)> = BTreeMap::new();
    for user in conversation.settled.members.keys() {
        let shard = context.cluster.shard_of_user(user);
        let local = owners.get(shard).is_some_and(|(owner, _)| *owner == context.cluster.config.instance);
        let key = if local { context.cluster.worker_of(shard) as u64 } else { u64::from(shard.0) };
        let (shards, users) = groups.entry((local, key)).or_default();
        shards.insert(shard);
        users.push(user.clone());
    }
    let group = |(shards, users): (BTreeSet<ShardId>, Vec<UserId>)| {
        let shard = *shards.first()?;
        let shards = if shards.len() > 1 { shards.into_iter().collect() } else { Arc::default() };
        Some(Group { shard, users: users.into(), shards })
    };
    conversation.routes = Routes {
        owners_version: owners.version,
        members_version: conversation.members_version,
        groups: groups.into_values().filter_map(group).collect(),
        valid: true,
    };
}
