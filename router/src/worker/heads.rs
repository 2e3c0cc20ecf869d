//! Heads: where conversations end and how far a user has read. From memory for open conversations, from head rows for quiet ones.

use futures::{StreamExt as _, TryStreamExt as _};
use im_proto::{ConversationId, InstanceId, StatusCode, UserId, v1};
use im_storage::{StoreError, Table};
use prost::Message as _;
use tokio::sync::oneshot;

use super::{
    Context, Worker,
    idle::{CursorValue, HeadValue},
    large::Registration,
    waiting::{Request, Slot},
};
use crate::{
    conversation::{Busy, Conversation, Cursor},
    deadline::StoreCalls,
    fence::FenceService,
    message::{AnswerValue, HeadsQuery, ReplyTo, unavailable},
};

/// Conversations of one query.
const CONVERSATIONS_MAX: usize = 1024;
/// Reads of one query that are under way: enough to hide the store's latency, few beside those of other queries.
const READS_AT_A_TIME: usize = 32;

impl Context {
    /// The head of an open conversation, for a user at a router. What is committed from now on is sent to that router.
    pub fn head_of(&self, conversation: &mut Conversation, user: &UserId, router: &InstanceId) -> v1::Head {
        let registration = self.register(conversation, user, router);
        let cursor = conversation.cursor(user);
        v1::Head {
            conversation_id: conversation.id.to_bytes(),
            head: conversation.committed,
            counted: conversation.committed_counted,
            first_seq: conversation.first_seq,
            read_seq: cursor.seq,
            read_counted: cursor.counted,
            unavailable: registration == Registration::Unreachable,
            registered: registration == Registration::Made,
        }
    }
}

impl Worker {
    /// Answers for all conversations of a query at once. The asking router is registered with those that are large.
    pub fn heads(&mut self, query: HeadsQuery, reply_to: ReplyTo) {
        let router = match &reply_to {
            ReplyTo::Peer { router, .. } => router.clone(),
            _ => self.context.cluster.config.instance.clone(),
        };
        if query.conversations.len() > CONVERSATIONS_MAX {
            return self.context.cluster.answer(reply_to, Err(StatusCode::TooLarge.to_status()));
        }
        let (mut ready, mut opening, mut quiet) = (Vec::new(), Vec::new(), Vec::new());
        for id in query.conversations {
            if !self.context.shards.is_active(self.context.cluster.shard_of(&id)) {
                ready.push(v1::Head { conversation_id: id.to_bytes(), unavailable: true, ..v1::Head::default() });
                continue;
            }
            match self.conversations.get_mut(&id) {
                Some(Slot::Open(conversation)) => ready.push(self.context.head_of(conversation, &query.user, &router)),
                Some(Slot::Opening { .. } | Slot::Raising { .. }) => {
                    let (answer, receiver) = oneshot::channel();
                    self.request(id, Request::Head { user: query.user.clone(), router: router.clone(), answer });
                    opening.push(receiver);
                }
                None => quiet.push(id),
            }
        }
        let (store, fence, past_lease) =
            (self.context.store.clone(), self.context.fence.clone(), self.context.past_lease());
        let cluster = self.context.cluster.clone();
        self.context.cluster.environment.spawn(async move {
            let answer = gather(&store, &fence, past_lease, &query.user, ready, opening, quiet).await;
            if let Err(StoreError::Damaged(what)) = &answer {
                cluster.metrics.alarms.increment(1);
                tracing::error!(what, "ALARM: heads cannot be read");
            }
            cluster.answer(reply_to, answer.map(AnswerValue::Heads).map_err(|_| unavailable()));
        });
    }
}

async fn gather(
    store: &StoreCalls,
    fence: &FenceService,
    past_lease: bool,
    user: &UserId,
    mut heads: Vec<v1::Head>,
    opening: Vec<oneshot::Receiver<v1::Head>>,
    quiet: Vec<ConversationId>,
) -> Result<Vec<v1::Head>, StoreError> {
    heads.extend(at_a_time(quiet.into_iter().map(|id| quiet_head(store, id))).await?);
    for receiver in opening {
        let gone = |_| StoreError::Unconfirmed("the worker has ended".to_owned());
        heads.push(receiver.await.map_err(gone)?);
    }
    let mut heads = at_a_time(heads.into_iter().map(|head| merge_cursor(store, user, head))).await?;
    // Which read was answered first is nobody's business.
    heads.sort_unstable_by(|one, other| one.conversation_id.cmp(&other.conversation_id));
    // What was read counts only if nobody else owned the shard meanwhile.
    if past_lease && !fence.clean().await {
        return Err(StoreError::Unconfirmed("the router has ended".to_owned()));
    }
    Ok(heads)
}

/// Runs reads, a bounded number at a time.
async fn at_a_time<T>(
    reads: impl Iterator<Item: Future<Output = Result<T, StoreError>>>,
) -> Result<Vec<T>, StoreError> {
    futures::stream::iter(reads).buffer_unordered(READS_AT_A_TIME).try_collect().await
}

async fn quiet_head(store: &StoreCalls, id: ConversationId) -> Result<v1::Head, StoreError> {
    let row = store.read(Table::Heads, id.as_bytes(), b"").await?;
    let value = row.map(|row| HeadValue::decode(row.value)).transpose();
    let value =
        value.map_err(|_| StoreError::Damaged(format!("the head row of {id} cannot be read")))?.unwrap_or_default();
    Ok(v1::Head {
        conversation_id: id.to_bytes(),
        head: value.head,
        counted: value.counted,
        first_seq: value.first_seq.max(1),
        ..v1::Head::default()
    })
}

/// The stored cursor may be ahead of the one in memory, which knows only what moved since the conversation was opened.
async fn merge_cursor(store: &StoreCalls, user: &UserId, mut head: v1::Head) -> Result<v1::Head, StoreError> {
    let row = store.read(Table::Cursors, &head.conversation_id, user.as_str().as_bytes()).await?;
    if let Some(row) = row
        && row.timestamp > head.read_seq
        && let Ok(value) = CursorValue::decode(row.value)
    {
        head.read_seq = row.timestamp;
        head.read_counted = value.counted;
    }
    Ok(head)
}

impl Context {
    /// Moves a user's read cursor and answers once it is stored.
    pub fn mark_read(
        &mut self,
        conversation: &mut Conversation,
        user: &UserId,
        seq: u64,
        counted: u64,
        reply_to: ReplyTo,
    ) {
        conversation.move_cursor(user, Cursor { seq, counted });
        let cursor = conversation.cursor(user);
        let unread = conversation.committed_counted.saturating_sub(cursor.counted);
        let reply = v1::MarkReadReply { read_seq: cursor.seq, unread }.encode_to_vec();
        let writes: Vec<_> = super::idle::cursor_write(conversation, user).into_iter().collect();
        if conversation.busy == Busy::Quiet {
            // No mark is written before the next burst, so none can overtake this write.
            conversation.cursors_dirty.remove(user);
        }
        let mut reply_to = Some(reply_to);
        self.write_state(writes, move |worker| {
            if let Some(reply_to) = reply_to.take() {
                worker.context.cluster.answer(reply_to, Ok(AnswerValue::Reply(reply.into())));
            }
        });
    }
}
