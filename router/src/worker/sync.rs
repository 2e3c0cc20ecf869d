//! Sync: the conversation list from the user's self log, with heads from the conversations' owners.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use im_proto::{ConversationId, ShardId, StatusCode, UserId, limits, v1};
use prost::Message as _;
use tokio::sync::oneshot;

use super::Context;
use crate::{
    caller::Caller,
    cluster::Cluster,
    conversation::Conversation,
    message::{AnswerValue, HeadsQuery, ReplyTo, ShardMessage, unavailable},
    state::ListRow,
};

/// Conversations that a client may name in one request.
const HAVE_MAX: usize = 10_000;

impl Context {
    /// Answers one page: the rows are this owner's, the heads are asked for.
    pub fn sync(
        &mut self,
        conversation: &Conversation,
        caller: &Arc<Caller>,
        request: v1::SyncRequest,
        reply_to: ReplyTo,
    ) {
        if request.have.len() > HAVE_MAX {
            return self.cluster.answer(reply_to, Err(StatusCode::TooLarge.to_status()));
        }
        let after = match request.page.len() {
            0 => None,
            _ => match ConversationId::from_slice(&request.page) {
                Ok(id) => Some(id),
                Err(_) => return self.cluster.answer(reply_to, Err(StatusCode::Malformed.to_status())),
            },
        };
        let limit = match request.limit {
            0 => limits::SYNC_CONVERSATIONS_MAX,
            limit => limit.min(limits::SYNC_CONVERSATIONS_MAX),
        } as usize;
        let rows: Vec<(ConversationId, Arc<ListRow>)> = match after {
            Some(after) => {
                conversation.settled.list.range((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded))
            }
            None => conversation.settled.list.range(..),
        }
        .take(limit + 1)
        .map(|(id, row)| (*id, row.clone()))
        .collect();
        // Before any owner can register this router: what it sends from then on must find the user.
        let of_kind = |kind: v1::ConversationKind| {
            let rows = rows.iter().take(limit).filter(move |(_, row)| row.kind == kind && !row.left());
            rows.map(|(id, _)| *id).collect::<Vec<ConversationId>>()
        };
        let groups = of_kind(v1::ConversationKind::Group);
        let channels = of_kind(v1::ConversationKind::Channel);
        channels.iter().for_each(|channel| self.follow_channel(&caller.user, channel));
        let (user, sync) = (caller.user.clone(), self.follow_while_asking(&caller.user, &groups));
        let (cluster, version) = (self.cluster.clone(), conversation.committed);
        let invisible = conversation.settled.invisible;
        let (fence, past_lease) = (self.fence.clone(), self.past_lease());
        let asking = user.clone();
        let answer = async move {
            let reply = v1::SyncReply { version, invisible, ..v1::SyncReply::default() };
            let answer = page(&cluster, asking, reply, &request, rows, limit).await;
            if past_lease && !fence.clean().await { Err(unavailable()) } else { answer }
        };
        self.then(answer, move |worker, answer: Result<Page, v1::Status>| {
            let (answer, registered) = match answer {
                Ok(page) => (Ok(AnswerValue::Reply(page.reply)), page.registered),
                Err(status) => (Err(status), BTreeSet::new()),
            };
            worker.context.asked_heads(&user, sync, &groups, &registered);
            worker.context.cluster.answer(reply_to, answer);
        });
    }
}

struct Page {
    reply: Bytes,
    /// Conversations with which this router is registered now.
    registered: BTreeSet<ConversationId>,
}

async fn page(
    cluster: &Arc<Cluster>,
    user: UserId,
    reply: v1::SyncReply,
    request: &v1::SyncRequest,
    mut rows: Vec<(ConversationId, Arc<ListRow>)>,
    limit: usize,
) -> Result<Page, v1::Status> {
    let more = rows.len() > limit;
    rows.truncate(limit);
    let next = if more { rows.last().map(|(id, _)| id.to_bytes()).unwrap_or_default() } else { Bytes::new() };
    let live = rows.iter().filter(|(_, row)| !row.left()).map(|(id, _)| *id);
    let heads = ask_heads(cluster, &user, request.details, live).await?;
    // A version that this list never had is none.
    let since = if request.version > reply.version { 0 } else { request.version };
    let have: BTreeMap<&[u8], &v1::SyncHave> =
        request.have.iter().map(|have| (have.conversation_id.as_ref(), have)).collect();
    let conversations = rows
        .iter()
        .filter_map(|(id, row)| {
            let head = heads.get(id).cloned().unwrap_or_default();
            let known = have.get(id.as_bytes().as_slice());
            let is_known = known.map_or(0, |known| known.seq) == head.head
                && (!request.details || known.map_or(0, |known| known.read_seq) == head.read_seq);
            let changed = row.version > since || (!row.left() && !is_known);
            changed.then(|| list_row(id, row, &head))
        })
        .collect();
    let reply = v1::SyncReply { conversations, next, ..reply };
    let registered = heads.iter().filter(|(_, head)| head.registered).map(|(id, _)| *id).collect();
    Ok(Page { reply: reply.encode_to_vec().into(), registered })
}

fn list_row(id: &ConversationId, row: &ListRow, head: &v1::Head) -> v1::ConversationRow {
    v1::ConversationRow {
        conversation_id: id.to_bytes(),
        kind: row.kind.into(),
        name: row.name.clone(),
        peer_user_id: row.peer_user_id.clone(),
        head: head.head,
        counted: head.counted,
        first_seq: head.first_seq,
        read_seq: head.read_seq,
        unread: head.counted.saturating_sub(head.read_counted),
        left: row.left(),
        joined_seq: row.joined_seq,
        left_seq: row.left_seq,
        preview: head.preview.clone(),
        mentions: head.mentions,
        mentioned_seqs: head.mentioned_seqs.clone(),
        cursors: head.cursors.clone(),
    }
}

/// Asks the owners, one request a shard, all at once. A page without one of its heads would look complete, so one that cannot be
/// had fails the page.
pub async fn ask_heads(
    cluster: &Arc<Cluster>,
    user: &UserId,
    details: bool,
    conversations: impl Iterator<Item = ConversationId>,
) -> Result<BTreeMap<ConversationId, v1::Head>, v1::Status> {
    let mut by_shard: BTreeMap<ShardId, Vec<ConversationId>> = BTreeMap::new();
    for id in conversations {
        by_shard.entry(cluster.shard_of(&id)).or_default().push(id);
    }
    let mut answers = Vec::with_capacity(by_shard.len());
    for (shard, conversations) in by_shard {
        let (sender, receiver) = oneshot::channel();
        let query = HeadsQuery { user: user.clone(), conversations, details, subscribe: false };
        cluster.send(shard, ShardMessage::Heads(query), ReplyTo::Task(sender));
        answers.push(receiver);
    }
    let mut heads = BTreeMap::new();
    for answer in answers {
        let Ok(Ok(AnswerValue::Heads(list))) = answer.await else { return Err(unavailable()) };
        for head in list {
            if head.unavailable {
                return Err(unavailable());
            }
            if let Ok(id) = ConversationId::from_slice(&head.conversation_id) {
                heads.insert(id, head);
            }
        }
    }
    Ok(heads)
}
