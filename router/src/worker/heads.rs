//! Heads: where conversations end and how far a user has read. From memory for open conversations, from head rows for quiet ones.

mod details;

pub use details::{Draft, Facts, MentionFacts, Mentions, mentions, shape};

use futures::{StreamExt as _, TryStreamExt as _};
use im_proto::{ConversationId, InstanceId, StatusCode, UserId, v1};
use im_storage::{StoreError, Table};
use prost::Message as _;
use tokio::sync::oneshot;

use super::{
    Context, Worker,
    idle::HeadValue,
    large::Registration,
    waiting::{Request, Slot},
};
use crate::{
    conversation::{Conversation, Cursor},
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
    pub fn head_of(&self, conversation: &mut Conversation, asker: &Asker) -> Draft {
        let Asker { user, router, .. } = asker;
        let registration = self.register(conversation, user, router);
        let cursor = conversation.cursor(user);
        let subscribes = asker.subscribe && conversation.is_channel();
        let mut head = v1::Head {
            conversation_id: conversation.id.to_bytes(),
            head: conversation.committed,
            counted: conversation.committed_counted,
            first_seq: conversation.first_seq,
            read_seq: cursor.seq,
            read_counted: cursor.counted,
            unavailable: registration == Registration::Unreachable,
            registered: registration == Registration::Made,
            ..v1::Head::default()
        };
        if subscribes {
            (head.kind, head.name) = (v1::ConversationKind::Channel.into(), conversation.settled.name.clone());
            head.writes = conversation.settled.members.contains_key(user);
        }
        let facts = match asker.details {
            true => Facts::of(conversation, user),
            false => Facts::brief(conversation),
        };
        let (seq, counted, all) = (conversation.committed, conversation.committed_counted, conversation.committed_all);
        // A writer's cursor is the owner's to keep; what others have read is only in the table.
        let begins = (subscribes && !head.writes).then_some(Cursor { seq, counted, all });
        Draft { id: conversation.id, head, read_all: cursor.all, facts, begins }
    }
}

/// Who asks for heads, and for what.
#[derive(Clone, Debug)]
pub struct Asker {
    pub user: UserId,
    /// Where the user's sessions are.
    pub router: InstanceId,
    /// With what a list shows.
    pub details: bool,
    /// The user subscribes to the channels.
    pub subscribe: bool,
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
        let HeadsQuery { user, conversations, details, subscribe } = query;
        let asker = Asker { user, router, details, subscribe };
        let (mut ready, mut opening, mut quiet) = (Vec::new(), Vec::new(), Vec::new());
        for id in conversations {
            if !self.context.shards.is_active(self.context.cluster.shard_of(&id)) {
                ready.push(Draft::unavailable(id));
                continue;
            }
            match self.conversations.get_mut(&id) {
                Some(Slot::Open(conversation)) => ready.push(self.context.head_of(conversation, &asker)),
                None if !subscribe => quiet.push(id),
                Some(Slot::Opening { .. } | Slot::Raising { .. }) | None => {
                    let (answer, receiver) = oneshot::channel();
                    self.request(id, Request::Head { asker: asker.clone(), answer });
                    opening.push(receiver);
                }
            }
        }
        let asked = Asked {
            store: self.context.store.clone(),
            fence: self.context.fence.clone(),
            past_lease: self.context.past_lease(),
            is_reachable: self.context.is_reachable(&asker.router),
            asker,
        };
        let cluster = self.context.cluster.clone();
        self.context.cluster.environment.spawn(async move {
            let answer = gather(asked, ready, opening, quiet).await;
            let answer = answer.map(AnswerValue::Heads).map_err(|error| match error {
                StoreError::Damaged(what) => {
                    let correlation_id = cluster.correlation_id();
                    cluster.metrics.alarms.increment(1);
                    tracing::error!(%correlation_id, what, "ALARM: heads cannot be read");
                    correlation_id.of(unavailable())
                }
                _ => unavailable(),
            });
            cluster.answer(reply_to, answer);
        });
    }
}

/// What the reads of a query need.
struct Asked {
    store: StoreCalls,
    fence: FenceService,
    past_lease: bool,
    /// What is pushed finds the way to who asks.
    is_reachable: bool,
    asker: Asker,
}

async fn gather(
    asked: Asked,
    mut drafts: Vec<Draft>,
    opening: Vec<oneshot::Receiver<Draft>>,
    quiet: Vec<ConversationId>,
) -> Result<Vec<v1::Head>, StoreError> {
    let Asked { store, fence, past_lease, is_reachable, asker } = asked;
    let mut quiet = at_a_time(quiet.into_iter().map(|id| quiet_head(&store, id))).await?;
    // Entries of a channel will go to all routers that its owner can reach.
    let is_lost = |draft: &&mut Draft| draft.facts.is_channel && !is_reachable;
    quiet.iter_mut().filter(is_lost).for_each(|draft| draft.head.unavailable = true);
    drafts.extend(quiet);
    for receiver in opening {
        let gone = |_| StoreError::Unconfirmed("the worker has ended".to_owned());
        drafts.push(receiver.await.map_err(gone)?);
    }
    let mut heads = at_a_time(drafts.into_iter().map(|draft| draft.finish(&store, &asker.user, asker.details))).await?;
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

async fn quiet_head(store: &StoreCalls, id: ConversationId) -> Result<Draft, StoreError> {
    let row = store.read(Table::Heads, id.as_bytes(), b"").await?;
    let value = row.map(|row| HeadValue::decode(row.value)).transpose();
    let value =
        value.map_err(|_| StoreError::Damaged(format!("the head row of {id} cannot be read")))?.unwrap_or_default();
    let head = v1::Head {
        conversation_id: id.to_bytes(),
        head: value.head,
        counted: value.counted,
        first_seq: value.first_seq.max(1),
        ..v1::Head::default()
    };
    Ok(Draft { id, head, read_all: 0, facts: Facts::stored(&value), begins: None })
}
