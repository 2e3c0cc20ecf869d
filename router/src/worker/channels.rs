//! Channels: few write, any number of users read.
//!
//! The log, the writers and their roles are those of a group. A reader is a row of the reader's own conversation list and a read cursor
//! in a partition of its own, and nothing else: a channel's owner neither knows nor loads its readers, and an entry costs it the same
//! for ten and for a million. Live entries go to routers ([`super::large`]); there the lists of users with sessions say who follows.
//!
//! To subscribe, the owner of the user's log asks the channel's owner, which moves the user's cursor to the head; then the entry of the
//! user's log is made. A crash between the two leaves a cursor that nobody looks at. To unsubscribe is an entry of that log alone.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use im_proto::{
    ConversationId, StatusCode, UserId, limits,
    v1::{self, system_event::Event},
};
use im_storage::{StoreError, Table};
use prost::Message as _;
use tokio::sync::oneshot;

use super::{
    Context,
    groups::{Asked, Creation, Made},
    heads::{self, MentionFacts, Mentions},
    receipts,
    waiting::Slot,
};
use crate::{
    caller::Caller,
    cluster::Cluster,
    conversation::{Conversation, Cursor, Dedupe, ReplyKind},
    deadline::StoreCalls,
    message::{AnswerValue, Call, HeadsQuery, ReplyTo, ShardMessage, overloaded, unavailable},
    state::{ListRow, cursor_partition},
};

/// A channel that a user subscribes to, as its owner knows it.
struct Channel {
    id: ConversationId,
    name: String,
    head: u64,
    /// The user may write there: the entry that says so brings it into the list.
    writes: bool,
}

impl Context {
    /// Creates the channel, or answers with the one that the same creator and key have made.
    pub fn channel_create(
        &mut self,
        conversation: &mut Conversation,
        call: Call,
        request: v1::ChannelCreateRequest,
        reply_to: ReplyTo,
    ) {
        let id = self.cluster.config.cluster_secret.channel_id(&call.caller.user, &request.key);
        let v1::ChannelCreateRequest { name, writers: members, .. } = request;
        let (members_max, kind) = (limits::CHANNEL_WRITERS_MAX, ReplyKind::ChannelCreate);
        self.create(conversation, call, Creation { id, name, members, members_max, kind }, reply_to);
    }

    /// Puts a channel into the caller's list: asks its owner first, unless it is there already.
    pub fn channel_subscribe(
        &mut self,
        conversation: &mut Conversation,
        call: Call,
        request: v1::ChannelSubscribeRequest,
        reply_to: ReplyTo,
    ) -> Result<(), ReplyTo> {
        let Ok(channel) = ConversationId::from_slice(&request.conversation_id) else { return Err(reply_to) };
        let Some((call, reply_to)) = self.unless_listed(conversation, call, &request, channel, reply_to) else {
            return Ok(());
        };
        let (cluster, user, own) = (self.cluster.clone(), call.caller.user.clone(), conversation.id);
        // Before the channel's owner can register this router: what it sends from then on finds the user.
        let sync = self.follow_while_asking(&user, &[channel]);
        let asking = user.clone();
        self.then(async move { ask(&cluster, asking, channel).await }, move |worker, answer| {
            let (context, slot) = (&mut worker.context, worker.conversations.get_mut(&own));
            match (answer, slot) {
                (Ok(channel), Some(Slot::Open(conversation))) => {
                    context.begin_subscription(conversation, call, &request, channel, reply_to);
                }
                (Ok(_), _) => context.refuse(reply_to),
                (Err(status), _) => context.answer_read(reply_to, Err(status)),
            }
            context.asked_heads(&user, sync, &[channel], &std::collections::BTreeSet::new());
        });
        Ok(())
    }

    /// Answers a call that was made before, or whose channel the user subscribes to; gives it back if neither.
    fn unless_listed(
        &mut self,
        conversation: &mut Conversation,
        call: Call,
        request: &v1::ChannelSubscribeRequest,
        channel: ConversationId,
        reply_to: ReplyTo,
    ) -> Option<(Call, ReplyTo)> {
        let (id, kind) = (request.client_message_id.clone(), ReplyKind::Subscribe);
        let print = Dedupe::call_print("subscribe", [channel.to_string().as_str()]);
        let (call, reply_to) = self.unless_made(conversation, call, &Asked { id: &id, print, kind }, reply_to)?;
        let row = conversation.deciding.list.get(&channel).filter(|row| !row.left()).cloned();
        let Some(row) = row else {
            // The list is in memory while its user is there.
            let is_known = conversation.deciding.list.contains_key(&channel);
            if is_known || conversation.deciding.list.len() < self.cluster.config.subscribe_list_max {
                return Some((call, reply_to));
            }
            self.refuse_call(conversation, call, reply_to, StatusCode::TooLarge);
            return None;
        };
        if row.kind != v1::ConversationKind::Channel {
            self.refuse_call(conversation, call, reply_to, StatusCode::NotFound);
        } else if !row.subscribed {
            // The channel's log put it there, for a writer, who may have left: the entry that says so may be on its way. Its owner knows.
            return Some((call, reply_to));
        } else if id.is_empty() {
            self.answer_settled(conversation, call, reply_to, in_list());
        } else {
            // The entry changes nothing and remembers the id: whoever unsubscribes before its repetition comes stays out.
            let channel = Channel { id: channel, name: row.name.clone(), head: row.joined_seq, writes: false };
            self.assign_subscription(conversation, &call.caller, request, channel, reply_to);
        }
        None
    }

    /// The channel's owner has answered: the entry of the user's own log is made, unless another call has made it meanwhile.
    fn begin_subscription(
        &mut self,
        conversation: &mut Conversation,
        call: Call,
        request: &v1::ChannelSubscribeRequest,
        channel: Channel,
        reply_to: ReplyTo,
    ) {
        let (caller, id) = (call.caller.clone(), channel.id);
        let Some((call, reply_to)) = self.unless_listed(conversation, call, request, id, reply_to) else { return };
        let row = conversation.deciding.list.get(&id);
        // What the list knows of the channel may be newer than the answer.
        let is_writer = row.is_some_and(|row| !row.left() && row.joined_seq > channel.head);
        if channel.writes || is_writer {
            return self.answer_settled(conversation, call, reply_to, in_list());
        }
        if row.is_some_and(|row| row.origin_seq() > channel.head) {
            return self.refuse(reply_to);
        }
        let assigned = conversation.assigned;
        self.assign_subscription(conversation, &caller, request, channel, reply_to);
        if conversation.assigned > assigned {
            self.cluster.metrics.subscriptions.increment(1);
            self.follow_channel(&caller.user, &id);
        }
    }

    fn assign_subscription(
        &mut self,
        conversation: &mut Conversation,
        caller: &Arc<Caller>,
        request: &v1::ChannelSubscribeRequest,
        channel: Channel,
        reply_to: ReplyTo,
    ) {
        let print = Dedupe::call_print("subscribe", [channel.id.to_string().as_str()]);
        let joined = v1::ConversationJoined {
            conversation_id: channel.id.to_bytes(),
            kind: v1::ConversationKind::Channel.into(),
            name: channel.name,
            peer_user_id: String::new(),
            joined_seq: channel.head,
        };
        let (event, id) = (Event::ConversationJoined(joined), request.client_message_id.clone());
        self.assign_event(conversation, caller, Made { event, id, print, kind: ReplyKind::Subscribe }, reply_to);
    }

    /// Takes a channel out of the caller's list.
    pub fn channel_unsubscribe(
        &mut self,
        conversation: &mut Conversation,
        call: Call,
        request: &v1::ChannelUnsubscribeRequest,
        reply_to: ReplyTo,
    ) -> Result<(), ReplyTo> {
        let Ok(channel) = ConversationId::from_slice(&request.conversation_id) else { return Err(reply_to) };
        let (caller, id, kind) = (call.caller.clone(), request.client_message_id.clone(), ReplyKind::Unsubscribe);
        let print = Dedupe::call_print("unsubscribe", [channel.to_string().as_str()]);
        let asked = Asked { id: &id, print, kind };
        let Some((call, reply_to)) = self.unless_made(conversation, call, &asked, reply_to) else { return Ok(()) };
        let is_channel = |row: &&Arc<ListRow>| row.kind == v1::ConversationKind::Channel;
        let row = conversation.deciding.list.get(&channel).filter(is_channel).cloned();
        match row {
            None => self.refuse_call(conversation, call, reply_to, StatusCode::NotFound),
            // Whoever may write leaves, with an entry of the channel's log.
            Some(row) if !row.left() && !row.subscribed => {
                self.refuse_call(conversation, call, reply_to, StatusCode::Forbidden);
            }
            Some(row) if row.left() && id.is_empty() => {
                let reply = v1::ChannelUnsubscribeReply { own_seq: 0 }.encode_to_vec();
                self.answer_settled(conversation, call, reply_to, reply.into());
            }
            Some(row) => {
                // Of one that has ended already it changes nothing.
                let left_seq = if row.left() { row.origin_seq() } else { row.joined_seq };
                let left = v1::ConversationLeft { conversation_id: channel.to_bytes(), left_seq };
                let event = Event::ConversationLeft(left);
                self.assign_event(conversation, &caller, Made { event, id, print, kind }, reply_to);
            }
        }
        Ok(())
    }

    /// Moves the cursor of a reader who may not write. It is not kept in memory: of such cursors there may be any number.
    pub fn mark_read_by_subscriber(
        &mut self,
        conversation: &mut Conversation,
        user: &UserId,
        seq: u64,
        reply_to: ReplyTo,
    ) {
        if !conversation.marks.begin_read() {
            return self.cluster.answer(reply_to, Err(overloaded()));
        }
        let (counted, all) = (conversation.committed_counted, conversation.committed_all);
        let reading = Reading {
            store: self.store.clone(),
            id: conversation.id,
            user: user.clone(),
            head: Cursor { seq: conversation.committed, counted, all },
            facts: MentionFacts::of(conversation, user),
        };
        let (id, epoch, user) = (conversation.id, conversation.epoch, user.clone());
        self.then(async move { reading.read_to(seq).await }, move |worker, outcome| {
            if let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id)
                && conversation.epoch == epoch
            {
                conversation.marks.read_written();
            }
            let context = &worker.context;
            let answer = match outcome {
                Ok(Some(read)) => {
                    if read.moved {
                        let mut frame = BytesMut::new();
                        receipts::encode_cursor(&id, &user, read.cursor, 0, &mut frame);
                        context.tell_user(&user, frame.freeze());
                    }
                    let (read_seq, mentions) = (read.cursor.seq, read.mentions.count);
                    let reply = v1::MarkReadReply { read_seq, unread: read.unread, mentions };
                    Ok(AnswerValue::Reply(reply.encode_to_vec().into()))
                }
                Ok(None) => Err(StatusCode::NotFound.to_status()),
                Err(_) => Err(unavailable()),
            };
            context.answer_read(reply_to, answer);
        });
    }
}

/// Nothing had to be done.
fn in_list() -> Bytes {
    v1::ChannelSubscribeReply { own_seq: 0 }.encode_to_vec().into()
}

/// A subscriber who reads on.
struct Reading {
    store: StoreCalls,
    id: ConversationId,
    user: UserId,
    head: Cursor,
    facts: MentionFacts,
}

/// Where a subscriber's cursor stands.
struct Read {
    cursor: Cursor,
    moved: bool,
    unread: u64,
    mentions: Mentions,
}

impl Reading {
    /// Moves the stored cursor forward; `None` if there is none, because the user has never subscribed.
    async fn read_to(self, seq: u64) -> Result<Option<Read>, StoreError> {
        let Self { store, id, user, head, facts } = self;
        let partition = cursor_partition(true, &id, &user);
        let stored = store.read(Table::Cursors, &partition, user.as_str().as_bytes()).await?;
        let Some(mut cursor) = stored.and_then(Cursor::of_row) else { return Ok(None) };
        let moved = seq.min(head.seq) > cursor.seq;
        if moved {
            cursor = if seq >= head.seq { head } else { at(&store, id, seq).await? };
            // Of two at once the later seq stands, whichever is written last.
            store.write(vec![cursor.to_write(true, &id, &user)]).await?;
        }
        let mentions = heads::mentions(&store, id, &user, cursor, head.seq, &facts).await?;
        let unread = head.counted.saturating_sub(cursor.counted);
        Ok(Some(Read { cursor, moved, unread, mentions }))
    }
}

async fn at(store: &StoreCalls, id: ConversationId, seq: u64) -> Result<Cursor, StoreError> {
    let rows = store.read_range(id, seq, seq, 1).await?;
    let row = rows.first().ok_or_else(|| StoreError::Damaged(format!("entry {seq} of {id} is missing")))?;
    Ok(Cursor::at(&row.row))
}

/// Asks a channel's owner to begin a subscription. What is no channel is not found.
async fn ask(cluster: &Arc<Cluster>, user: UserId, channel: ConversationId) -> Result<Channel, v1::Status> {
    let (sender, receiver) = oneshot::channel();
    let query = HeadsQuery { user, conversations: vec![channel], details: false, subscribe: true };
    cluster.send(cluster.shard_of(&channel), ShardMessage::Heads(query), ReplyTo::Task(sender));
    let Ok(Ok(AnswerValue::Heads(heads))) = receiver.await else { return Err(unavailable()) };
    match heads.into_iter().next() {
        Some(head) if head.unavailable => Err(unavailable()),
        Some(head) if head.kind() == v1::ConversationKind::Channel => {
            Ok(Channel { id: channel, name: head.name, head: head.head, writes: head.writes })
        }
        _ => Err(StatusCode::NotFound.to_status()),
    }
}
