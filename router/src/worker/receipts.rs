//! Receipts: who has received and read how much. Cursors only move forward; the others learn of it by a signal that is never stored,
//! one for all that moved within half a second, in conversations of at most `RECEIPT_MEMBERS_MAX` members. In larger ones a read
//! cursor is told to its user's own devices only, and received cursors are not kept.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use im_proto::{ConversationId, StatusCode, UserId, frame, limits, v1};
use im_storage::{StateWrite, StoreError, Table};
use prost::Message as _;

use super::{
    Context, Worker, fan_out,
    heads::{self, MentionFacts},
    waiting::{Request, Slot},
};
use crate::{
    caller::Caller,
    conversation::{Busy, Conversation, Cursor},
    deadline::StoreCalls,
    message::{AnswerValue, Delivery, ReplyTo, ShardMessage, overloaded, unavailable},
    state::{Kind, cursor_partition},
};

/// What is stored of a user's cursors.
struct Stored {
    read: Cursor,
    received: u64,
}

impl Worker {
    /// A client has received everything through a seq.
    pub fn take_received(&mut self, caller: Arc<Caller>, id: ConversationId, seq: u64) {
        self.request(id, Request::Received { caller, seq });
    }
}

impl Context {
    /// A delivery receipt. One of somebody else is nothing.
    pub fn received(&mut self, conversation: &mut Conversation, caller: &Caller, seq: u64) {
        if !conversation.may_read(&caller.user) || matches!(conversation.settled.kind, Kind::SelfLog(_)) {
            return self.cluster.metrics.signals_dropped.increment(1);
        }
        let seq = seq.min(conversation.committed);
        if !is_small(conversation) || seq <= conversation.marks.received(&caller.user) {
            return;
        }
        self.with_cursors(conversation, &caller.user, move |context, conversation, user| {
            let Some(conversation) = conversation else { return };
            // What was read was received: that is no news.
            if seq > conversation.cursor(user).seq && conversation.marks.receive(user, seq) {
                context.plan_telling(conversation);
            }
        });
    }

    /// Runs a step when the stored cursors of a user are in memory, which knows only what moved since the conversation was opened. The
    /// step gets no conversation if they cannot be read, or if it has gone meanwhile.
    fn with_cursors(
        &mut self,
        conversation: &mut Conversation,
        user: &UserId,
        step: impl FnOnce(&mut Context, Option<&mut Conversation>, &UserId) + Send + 'static,
    ) {
        if conversation.marks.is_loaded(user) {
            return step(self, Some(conversation), user);
        }
        let (store, id, user) = (self.store.clone(), conversation.id, user.clone());
        let (asked, partition) = (user.clone(), cursor_partition(conversation.is_channel(), &id, &user));
        let read = async move { read_cursors(&store, &partition, &asked).await };
        self.then(read, move |worker, outcome| {
            let Worker { context, conversations } = worker;
            match (conversations.get_mut(&id), outcome) {
                (Some(Slot::Open(conversation)), Ok(stored)) => {
                    conversation.load_cursor(&user, stored.read);
                    conversation.marks.load(&user, stored.received);
                    step(context, Some(conversation), &user);
                }
                _ => step(context, None, &user),
            }
        });
    }

    /// Moves a user's read cursor to an entry, and answers once it is stored.
    pub fn mark_read(&mut self, conversation: &mut Conversation, user: &UserId, seq: u64, reply_to: ReplyTo) {
        if !conversation.settled.members.contains_key(user) {
            return match conversation.is_channel() {
                true => self.mark_read_by_subscriber(conversation, user, seq, reply_to),
                false => self.answer_read(reply_to, Err(StatusCode::NotFound.to_status())),
            };
        }
        self.with_cursors(conversation, user, move |context, conversation, user| {
            let Some(conversation) = conversation else { return context.refuse(reply_to) };
            let seq = seq.min(conversation.committed);
            if seq <= conversation.cursor(user).seq || seq == conversation.committed {
                let (counted, all) = (conversation.committed_counted, conversation.committed_all);
                // One that does not move forward only asks where the cursor stands.
                return context.move_read(conversation, user, Cursor { seq, counted, all }, reply_to);
            }
            let (store, id, user) = (context.store.clone(), conversation.id, user.clone());
            let read = async move { store.read_range(id, seq, seq, 1).await };
            context.then(read, move |worker, outcome| {
                let row = outcome.ok().and_then(|rows| rows.into_iter().next());
                match (row, worker.conversations.get_mut(&id)) {
                    (Some(stored), Some(Slot::Open(conversation))) => {
                        let cursor = Cursor::at(&stored.row);
                        worker.context.move_read(conversation, &user, cursor, reply_to);
                    }
                    _ => worker.context.refuse(reply_to),
                }
            });
        });
    }

    fn move_read(&mut self, conversation: &mut Conversation, user: &UserId, to: Cursor, reply_to: ReplyTo) {
        if !conversation.marks.begin_read() {
            return self.cluster.answer(reply_to, Err(overloaded()));
        }
        let moved = to.seq > conversation.cursor(user).seq && conversation.move_cursor(user, to);
        if moved {
            conversation.marks.moved(user);
            self.plan_telling(conversation);
        }
        let cursor = conversation.cursor(user);
        let (facts, head) = (MentionFacts::of(conversation, user), conversation.committed);
        let unread = conversation.committed_counted.saturating_sub(cursor.counted);
        let writes: Vec<_> = super::idle::cursor_write(conversation, user).into_iter().collect();
        if matches!(conversation.busy, Busy::Quiet | Busy::Ending) {
            // No mark is written before the next burst, so none can overtake this write. One that is being written at the end of a burst
            // covers what was dirty when that began.
            conversation.cursors_dirty.remove(user);
        }
        let (id, epoch, user) = (conversation.id, conversation.epoch, user.clone());
        self.write_state(writes, move |worker| {
            if let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id)
                && conversation.epoch == epoch
            {
                conversation.marks.read_written();
            }
            let store = worker.context.store.clone();
            let read = async move { heads::mentions(&store, id, &user, cursor, head, &facts).await };
            worker.context.then(read, move |worker, outcome| {
                let answer = outcome.map_err(|_| unavailable()).map(|mentions| {
                    let reply = v1::MarkReadReply { read_seq: cursor.seq, unread, mentions: mentions.count };
                    AnswerValue::Reply(reply.encode_to_vec().into())
                });
                // Who has gone on since may know of more that is unread.
                worker.context.answer_read(reply_to, answer);
            });
        });
    }

    /// Tells now what has moved, or as soon as it may be told again.
    fn plan_telling(&mut self, conversation: &mut Conversation) {
        let now = self.now();
        match conversation.marks.due_at(now) {
            Some(at) if at <= now => self.tell_marks(conversation),
            Some(at) => self.schedule.look_by(conversation, at),
            None => {}
        }
    }

    /// Tells the other members, and the users' own other devices, how far the users have come whose cursors moved.
    pub fn tell_marks(&mut self, conversation: &mut Conversation) {
        let now = self.now();
        if conversation.marks.due_at(now).is_none_or(|at| at > now) {
            return;
        }
        let moved = conversation.marks.take_untold(now);
        if is_small(conversation) {
            let mut frames = BytesMut::new();
            for user in &moved {
                encode_receipt(conversation, user, &mut frames);
            }
            fan_out::deliver_frame(self, conversation, &frames.freeze(), None);
        } else {
            for user in &moved {
                let mut frames = BytesMut::new();
                encode_receipt(conversation, user, &mut frames);
                self.tell_user(user, frames.freeze());
            }
        }
        self.write_received(conversation);
    }

    /// Writes the received cursors that have moved, unless a write of this conversation is under way: then they go with the next one.
    fn write_received(&self, conversation: &mut Conversation) {
        let unwritten = conversation.marks.begin_writing();
        if unwritten.is_empty() {
            return;
        }
        let write = |user: UserId| StateWrite {
            table: Table::Cursors,
            partition: conversation.id.to_bytes(),
            key: received_key(&user),
            value: Some(Bytes::new()),
            timestamp: conversation.marks.received(&user),
        };
        let writes: Vec<StateWrite> = unwritten.into_iter().map(write).collect();
        let (id, epoch) = (conversation.id, conversation.epoch);
        self.write_state(writes, move |worker| {
            if let Some(Slot::Open(conversation)) = worker.conversations.get_mut(&id)
                && conversation.epoch == epoch
            {
                conversation.marks.written();
                worker.context.write_received(conversation);
            }
        });
    }

    /// Frames for one user's own devices.
    pub fn tell_user(&self, user: &UserId, frames: Bytes) {
        let shard = self.cluster.shard_of_user(user);
        let (users, spans) = (Arc::from([user.clone()]), Arc::from([(shard, 1)]));
        let delivery = Delivery { frames, users, spans, except: None };
        self.cluster.send(shard, ShardMessage::Deliver(delivery), ReplyTo::Nobody);
    }
}

/// Whether the members see each other's receipts.
pub fn is_small(conversation: &Conversation) -> bool {
    !conversation.is_channel() && conversation.settled.members.len() <= limits::RECEIPT_MEMBERS_MAX
}

/// The key of a received cursor: no user id has a zero byte.
pub fn received_key(user: &UserId) -> Bytes {
    [user.as_str().as_bytes(), &[0]].concat().into()
}

fn encode_receipt(conversation: &Conversation, user: &UserId, out: &mut BytesMut) {
    encode_cursor(&conversation.id, user, conversation.cursor(user), conversation.marks.received(user), out);
}

/// How far a user has come, as a frame.
pub fn encode_cursor(id: &ConversationId, user: &UserId, cursor: Cursor, received: u64, out: &mut BytesMut) {
    let receipt =
        v1::Receipt { received_seq: received.max(cursor.seq), read_seq: cursor.seq, read_counted: cursor.counted };
    let signal = v1::Signal {
        target: Some(v1::signal::Target::ConversationId(id.to_bytes())),
        sender: user.to_string(),
        signal: Some(v1::signal::Signal::Receipt(receipt)),
    };
    frame::encode_frame(&v1::ServerFrame { frame: Some(v1::server_frame::Frame::Signal(signal)) }, out);
}

async fn read_cursors(store: &StoreCalls, partition: &[u8], user: &UserId) -> Result<Stored, StoreError> {
    let read = store.read(Table::Cursors, partition, user.as_str().as_bytes()).await?;
    let received = store.read(Table::Cursors, partition, &received_key(user)).await?;
    Ok(Stored {
        read: read.and_then(Cursor::of_row).unwrap_or_default(),
        received: received.map_or(0, |row| row.timestamp),
    })
}
