//! The handle that applications hold. Cheap to clone; when the last clone is dropped the client ends.

mod devices;
mod marks;
mod presence;

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use im_proto::{ConversationId, StatusCode, Timestamp, UserId, environment::Environment, limits, method::Method, v1};
use parking_lot::Mutex;
use prost::Message;
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::Instant,
};

use crate::{
    calls::{Purpose, Request},
    catch_up::wire_target,
    config::{Backoff, ClientConfig, Target},
    conversation::HistoryPage,
    core::Command,
    engine::{Engine, Shared},
    error::{CallError, ClosedReason, ConnectError, SendError},
    event::{Entry, Event},
    pending::Answer,
};

/// Calls of the application that may wait at once; further ones wait for a place in the order of their calls.
const CALLS_WAITING_MAX: usize = 64;
/// More than sends and calls can fill, so that enqueuing them never waits here.
const COMMANDS_MAX: usize = limits::PENDING_SENDS_MAX + CALLS_WAITING_MAX + 64;
/// Waiting times between repeats of a call that the server could not answer.
const CALL_RETRY: Backoff = Backoff { base: Duration::from_millis(100), max: Duration::from_secs(2) };

/// A client of the IM backend. See the crate's documentation for what it promises.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    commands: mpsc::Sender<Command>,
    window: Arc<Semaphore>,
    calls: Semaphore,
    events: Mutex<Option<mpsc::Receiver<Event>>>,
    shared: watch::Receiver<Shared>,
    environment: Environment,
    call_timeout: Duration,
    ready_timeout: Duration,
}

/// Where a message is: durable, at that place, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    pub conversation: ConversationId,
    pub seq: u64,
    pub sent_at: Timestamp,
}

/// A send on its way. Dropping it does not take the send back.
#[derive(Debug)]
#[must_use = "whether the message was stored is known only when this has finished"]
pub struct PendingSend {
    reply: oneshot::Receiver<Result<Sent, SendError>>,
}

impl PendingSend {
    /// The outcome, if it is there already.
    pub fn try_outcome(&mut self) -> Option<Result<Sent, SendError>> {
        match self.reply.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(oneshot::error::TryRecvError::Empty) => None,
            Err(oneshot::error::TryRecvError::Closed) => Some(Err(ClosedReason::ByCaller.into())),
        }
    }
}

impl Future for PendingSend {
    type Output = Result<Sent, SendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = ready!(Pin::new(&mut self.reply).poll(cx));
        // The engine answers every send before it ends, unless its process is shut down.
        Poll::Ready(outcome.unwrap_or(Err(SendError::Closed(ClosedReason::ByCaller))))
    }
}

/// Where to begin to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// With this seq; 1 is the beginning.
    Seq(u64),
    /// With what comes from now on.
    Now,
}

/// A page of history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    pub conversation: ConversationId,
    /// Ascending.
    pub entries: Vec<Entry>,
    /// The last seq of the conversation.
    pub head: u64,
    /// The first seq that is still kept.
    pub first_seq: u64,
}

/// The conversation list, or what of it has changed.
#[derive(Clone, Debug, PartialEq)]
pub struct ConversationList {
    /// For the next question about changes.
    pub version: u64,
    pub rows: Vec<v1::ConversationRow>,
}

impl Client {
    /// Starts a client and waits until it is connected, at most [`ClientConfig::ready_timeout`].
    pub async fn connect(config: ClientConfig) -> Result<Self, ConnectError> {
        let client = Self::start(config);
        client.connected().await?;
        Ok(client)
    }

    /// Starts a client, which goes on trying to connect until it is closed. Sends and calls are taken at once.
    pub fn start(config: ClientConfig) -> Self {
        let config = Arc::new(config);
        let (commands, commands_end) = mpsc::channel(COMMANDS_MAX);
        let (events, events_end) = mpsc::channel(config.event_queue.max(1));
        let (shared, shared_end) = watch::channel(Shared::default());
        let engine = Engine::new(config.clone(), commands_end, events, shared);
        config.environment.spawn(engine.run());
        let window = config.window.clamp(1, limits::PENDING_SENDS_MAX);
        Self {
            inner: Arc::new(Inner {
                commands,
                window: Arc::new(Semaphore::new(window)),
                calls: Semaphore::new(CALLS_WAITING_MAX),
                events: Mutex::new(Some(events_end)),
                shared: shared_end,
                environment: config.environment.clone(),
                call_timeout: config.call_timeout,
                ready_timeout: config.ready_timeout,
            }),
        }
    }

    /// Waits until there is a session, at most [`ClientConfig::ready_timeout`]. On a time-out the client goes on trying.
    pub async fn connected(&self) -> Result<(), ConnectError> {
        let mut shared = self.inner.shared.clone();
        let after = self.inner.ready_timeout;
        let waited = tokio::time::timeout(after, shared.wait_for(|shared| shared.connected || shared.closed.is_some()));
        match waited.await {
            Ok(Ok(shared)) => shared.closed.clone().map_or(Ok(()), |reason| Err(reason.into())),
            Ok(Err(_)) => Err(ClosedReason::ByCaller.into()),
            Err(_) => {
                let last = self.inner.shared.borrow().last_error.clone();
                let last = if last.is_empty() { "no answer".to_owned() } else { last };
                Err(ConnectError::TimedOut { after, last })
            }
        }
    }

    /// The user and the user's own log, once the server has said so.
    pub async fn identity(&self) -> Result<(UserId, ConversationId), ClosedReason> {
        let mut shared = self.inner.shared.clone();
        let known = shared.wait_for(|shared| shared.me.is_some() || shared.closed.is_some()).await;
        match known.map(|shared| (shared.me.clone(), shared.closed.clone())) {
            Ok((Some(me), _)) => Ok(me),
            Ok((None, reason)) => Err(reason.unwrap_or(ClosedReason::ByCaller)),
            Err(_) => Err(ClosedReason::ByCaller),
        }
    }

    /// The stream of events. There is one: the second call gives `None`.
    pub fn events(&self) -> Option<mpsc::Receiver<Event>> {
        self.inner.events.lock().take()
    }

    /// Sends a message and waits until it is durable. See [`Self::enqueue`].
    pub async fn send(&self, target: Target, body: Bytes) -> Result<Sent, SendError> {
        self.enqueue(target, body).await?.await
    }

    /// Hands a message over and returns when it has a place among the 256 that may be unacknowledged; what is returned then is the
    /// way to its outcome. Messages to one conversation are stored in the order of these calls (a direct conversation that is not
    /// on the user's list yet must always be addressed in the same way for that). It is tried until it is
    /// acknowledged or definitely refused, across reconnects, without ever being stored twice.
    pub async fn enqueue(&self, target: Target, body: Bytes) -> Result<PendingSend, SendError> {
        if body.is_empty() || body.len() > limits::BODY_BYTES_MAX {
            return Err(SendError::BodySize { found: body.len() });
        }
        let permit = self.inner.window.clone().acquire_owned().await.ok();
        let (answer, reply) = oneshot::channel();
        let answer = Answer { reply: answer, permit };
        match self.inner.commands.send(Command::Send { target, body, answer }).await {
            Ok(()) => Ok(PendingSend { reply }),
            Err(_) => Err(SendError::Closed(self.closed_reason())),
        }
    }

    fn closed_reason(&self) -> ClosedReason {
        self.inner.shared.borrow().closed.clone().unwrap_or(ClosedReason::ByCaller)
    }

    /// Calls a method of the api. Tried again across reconnects and after statuses that a later try may cure, until
    /// [`ClientConfig::call_timeout`]: every method may be repeated.
    pub async fn call<Q: Message, R: Message + Default>(&self, method: Method, request: &Q) -> Result<R, CallError> {
        let after = self.inner.call_timeout;
        let deadline = Instant::now() + after;
        let request = Bytes::from(request.encode_to_vec());
        let mut last = None;
        for attempt in 0.. {
            let outcome = match tokio::time::timeout_at(deadline, self.call_once(method, request.clone())).await {
                Ok(outcome) => outcome,
                Err(_) => break,
            };
            match outcome {
                Err(CallError::Refused(status)) if status.is_transient() => {
                    let delay = CALL_RETRY.delay(attempt, &self.inner.environment).max(status.retry_after);
                    last = Some(status);
                    if Instant::now() + delay >= deadline {
                        break;
                    }
                    tokio::time::sleep(delay).await;
                }
                Err(error) => return Err(error),
                Ok(reply) => return R::decode(reply).map_err(|_| CallError::Malformed),
            }
        }
        let last =
            last.map(|status| status.to_string()).unwrap_or_else(|| self.inner.shared.borrow().last_error.clone());
        let last = if last.is_empty() { "no answer".to_owned() } else { last };
        Err(CallError::TimedOut { after, last })
    }

    async fn call_once(&self, method: Method, request: Bytes) -> Result<Bytes, CallError> {
        let _permit = self.inner.calls.acquire().await;
        let (reply, outcome) = oneshot::channel();
        let request = Request { method, request, purpose: Purpose::Application(reply) };
        let closed = || CallError::Closed(self.closed_reason());
        self.inner.commands.send(Command::Call(request)).await.map_err(|_| closed())?;
        outcome.await.unwrap_or_else(|_| Err(closed()))
    }

    /// One's own log by its id: the server knows it under no other name in a call.
    async fn resolved(&self, target: Target) -> Result<Target, CallError> {
        match target {
            Target::Me => {
                let after = self.inner.call_timeout;
                let last = || self.inner.shared.borrow().last_error.clone();
                let identity = tokio::time::timeout(after, self.identity()).await;
                let (_, own_log) = identity.map_err(|_| CallError::TimedOut { after, last: last() })??;
                Ok(Target::Conversation(own_log))
            }
            other => Ok(other),
        }
    }

    /// Entries `from..=to`, ascending, at most `limit` and at most 1,000; fewer may come. `to` 0 is the head, `limit` 0 the
    /// server's limit. `newest` takes the end of the range, not its beginning.
    pub async fn history(
        &self,
        target: Target,
        from: u64,
        to: u64,
        limit: u32,
        newest: bool,
    ) -> Result<Page, CallError> {
        let target = self.resolved(target).await?;
        let seq = |seq: u64| i64::try_from(seq).unwrap_or(i64::MAX);
        let wire = Some(wire_target(&target));
        let request = v1::HistoryRequest { target: wire, from: seq(from), to: seq(to), limit, newest };
        let reply: v1::HistoryReply = self.call(Method::MessageHistory, &request).await?;
        let me = self.inner.shared.borrow().me.as_ref().map(|(user, _)| user.clone());
        let page = HistoryPage::from_wire(reply, me.as_ref());
        let conversation = match (page.conversation, target) {
            (Some(conversation), _) | (None, Target::Conversation(conversation)) => conversation,
            (None, _) => return Err(CallError::Malformed),
        };
        Ok(Page { conversation, entries: page.entries, head: page.head, first_seq: page.first_seq })
    }

    /// Makes a conversation's entries come as events, from a position on. `None` for the conversation with a user to whom nobody
    /// has written yet: it is followed from its first entry once it exists.
    pub async fn follow(&self, target: Target, from: Position) -> Result<Option<ConversationId>, CallError> {
        let peer = match &target {
            Target::Peer(user) => Some(user.clone()),
            Target::Me | Target::Conversation(_) => None,
        };
        let (done, followed) = oneshot::channel();
        let (command, conversation) = match (self.history(target, 1, 0, 1, true).await, peer) {
            (Ok(page), _) => {
                let have = match from {
                    Position::Seq(seq) => seq.saturating_sub(1),
                    Position::Now => page.head,
                };
                let conversation = page.conversation;
                (Command::Follow { conversation, have, head: page.head, done }, Some(conversation))
            }
            (Err(error), Some(user)) if error.code() == Some(StatusCode::NotFound) => {
                let from = match from {
                    Position::Seq(seq) => seq,
                    Position::Now => 1,
                };
                (Command::FollowPeerLater { user, from, done }, None)
            }
            (Err(error), _) => return Err(error),
        };
        let closed = || CallError::Closed(self.closed_reason());
        self.inner.commands.send(command).await.map_err(|_| closed())?;
        followed.await.map(|()| conversation).map_err(|_| closed())
    }

    /// Ends what [`Self::follow`] began. Entries that wait in the event queue still come.
    pub async fn unfollow(&self, conversation: ConversationId) -> Result<(), ClosedReason> {
        let sent = self.inner.commands.send(Command::Unfollow(conversation)).await;
        sent.map_err(|_| self.closed_reason())
    }

    /// All conversations of the user with what a list shows of each, those left included.
    pub async fn conversations(&self) -> Result<Vec<v1::ConversationRow>, CallError> {
        self.conversations_since(0, &[]).await.map(|list| list.rows)
    }

    /// The conversations that differ from what the application has: `version` is [`ConversationList::version`] of its list (0 if it has
    /// none), `have` the head and the read cursor of each row of it. A version that the server does not know brings all. Of more than
    /// 10,000 rows in `have` the rest are left out, and told again as if they were new.
    pub async fn conversations_since(
        &self,
        version: u64,
        have: &[v1::SyncHave],
    ) -> Result<ConversationList, CallError> {
        // More would be refused.
        let have = &have[..have.len().min(limits::SYNC_HAVE_MAX)];
        let mut list = ConversationList { version: 0, rows: Vec::new() };
        let mut page = Bytes::new();
        loop {
            let first = page.is_empty();
            let request = v1::SyncRequest { version, have: have.to_vec(), page, limit: 0, details: true };
            let reply: v1::SyncReply = self.call(Method::ConversationSync, &request).await?;
            if first {
                list.version = reply.version;
            }
            list.rows.extend(reply.conversations);
            if reply.next.is_empty() {
                return Ok(list);
            }
            page = reply.next;
        }
    }

    /// Creates a group of this user and the others.
    pub async fn create_group(&self, name: &str, members: &[UserId]) -> Result<ConversationId, CallError> {
        let request = v1::GroupCreateRequest { key: self.fresh_id(), name: name.to_owned(), members: texts(members) };
        let reply: v1::GroupCreateReply = self.call(Method::GroupCreate, &request).await?;
        ConversationId::from_slice(&reply.conversation_id).map_err(|_| CallError::Malformed)
    }

    /// Brings users into a group, or lets them write into a channel. The seq of the entry, which names nobody if all were in already.
    pub async fn invite(&self, group: ConversationId, members: &[UserId]) -> Result<u64, CallError> {
        let request = v1::GroupInviteRequest {
            conversation_id: group.to_bytes(),
            members: texts(members),
            client_message_id: self.fresh_id(),
        };
        let reply: v1::GroupInviteReply = self.call(Method::GroupInvite, &request).await?;
        Ok(reply.seq)
    }

    /// Leaves a group, or ceases to be a writer of a channel. The seq of the entry.
    pub async fn leave(&self, group: ConversationId) -> Result<u64, CallError> {
        let request = v1::GroupLeaveRequest { conversation_id: group.to_bytes(), client_message_id: self.fresh_id() };
        let reply: v1::GroupLeaveReply = self.call(Method::GroupLeave, &request).await?;
        Ok(reply.seq)
    }

    /// Creates a channel into which this user and the others may write.
    pub async fn create_channel(&self, name: &str, writers: &[UserId]) -> Result<ConversationId, CallError> {
        let request = v1::ChannelCreateRequest { key: self.fresh_id(), name: name.to_owned(), writers: texts(writers) };
        let reply: v1::ChannelCreateReply = self.call(Method::ChannelCreate, &request).await?;
        ConversationId::from_slice(&reply.conversation_id).map_err(|_| CallError::Malformed)
    }

    /// Puts a channel into the conversation list, with its messages from now on.
    pub async fn subscribe(&self, channel: ConversationId) -> Result<(), CallError> {
        let (conversation_id, client_message_id) = (channel.to_bytes(), self.fresh_id());
        let request = v1::ChannelSubscribeRequest { conversation_id, client_message_id };
        self.call(Method::ChannelSubscribe, &request).await.map(|_: v1::ChannelSubscribeReply| ())
    }

    /// Takes a channel out of the conversation list.
    pub async fn unsubscribe(&self, channel: ConversationId) -> Result<(), CallError> {
        let (conversation_id, client_message_id) = (channel.to_bytes(), self.fresh_id());
        let request = v1::ChannelUnsubscribeRequest { conversation_id, client_message_id };
        self.call(Method::ChannelUnsubscribe, &request).await.map(|_: v1::ChannelUnsubscribeReply| ())
    }

    /// All members of a group, or all writers of a channel.
    pub async fn members(&self, group: ConversationId) -> Result<Vec<v1::GroupMember>, CallError> {
        let mut members = Vec::new();
        let mut after = String::new();
        loop {
            let request = v1::GroupMembersRequest { conversation_id: group.to_bytes(), after, limit: 0 };
            let reply: v1::GroupMembersReply = self.call(Method::GroupMembers, &request).await?;
            members.extend(reply.members);
            if reply.next.is_empty() {
                return Ok(members);
            }
            after = reply.next;
        }
    }

    /// Endpoints that the cluster offers to this user.
    pub async fn locate(&self) -> Result<v1::LocateReply, CallError> {
        self.call(Method::PlacementLocate, &v1::LocateRequest {}).await
    }

    /// Ends the client. Sends without an outcome fail with [`SendError::Closed`]: await them first.
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.inner.commands.send(Command::Close(done)).await.is_ok() {
            let _ = closed.await;
        }
    }

    /// A key that makes a mutating call idempotent.
    fn fresh_id(&self) -> Bytes {
        let mut id = BytesMut::with_capacity(16);
        id.put_u64(self.inner.environment.random.next_u64());
        id.put_u64(self.inner.environment.random.next_u64());
        id.freeze()
    }
}

fn texts(users: &[UserId]) -> Vec<String> {
    users.iter().map(|user| user.as_str().to_owned()).collect()
}
