//! One session as links and the connection share it: who it is, what it waits for, what it sends to whom.
//!
//! The connection task owns the socket; everything that a router's answer or a moved shard touches is here, behind one lock that is
//! held while messages are pushed to a link, so that what the session sends keeps its order. The state is rebuilt by a reconnect of
//! the client; nothing here outlives the connection.

mod calls;
mod gather;
mod registration;
mod sends;

use std::{
    collections::VecDeque,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use im_proto::{ConversationId, Epoch, SessionId, ShardId, StatusCode, Timestamp, UserId, status::Retry, v1};
use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use v1::{gateway_message::Message, server_frame::Frame};

use crate::{
    connection::{
        Transport,
        outbox::{Outbox, Pushed, Wakers},
    },
    gateway::Shared,
    link::{Link, LinkToken},
};
use calls::PendingCall;
pub(crate) use calls::failed_reply;
use gather::Gather;
pub(crate) use registration::Opening;
use registration::Renewing;
pub(crate) use registration::common_version;
use sends::KeptSend;
pub(crate) use sends::refusal;

/// A session, from the accepted connection to its end.
pub(crate) struct Session {
    id: SessionId,
    transport: Transport,
    user: OnceLock<UserId>,
    /// `Welcome` was queued.
    live: AtomicBool,
    /// It was closed for something that its client did.
    at_fault: AtomicBool,
    pub outbox: Outbox,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The version of the routes that everything below was reconciled with.
    version: u64,
    gone: bool,
    /// Of the user's self log, known from `Hello` on.
    shard: Option<ShardId>,
    opening: Option<Box<Opening>>,
    /// The user's owner knows the session through this.
    registered: Option<LinkToken>,
    /// The claim under which it does.
    registered_under: Option<Epoch>,
    /// Routers that know the session, the user's owner among them. Under an older token than the link's own one still has to be
    /// told of it before it can be asked anything, and of its end.
    presented: Vec<(LinkToken, Arc<Link>)>,
    /// An encoded `Capability`.
    capability: Box<[u8]>,
    expires_at: Timestamp,
    /// `None` if it was empty when the session was last looked through: an idle session is small.
    in_flight: Option<Box<InFlight>>,
    /// Sends that were forwarded, one that was forwarded again counted again.
    attempts: u64,
    last_call: u32,
    renewing: Option<Box<Renewing>>,
}

/// What the client waits for.
#[derive(Default)]
struct InFlight {
    kept: VecDeque<KeptSend>,
    /// Kept sends that no link has taken.
    waiting: usize,
    calls: Vec<PendingCall>,
}

impl InFlight {
    fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.calls.is_empty()
    }
}

/// What a connection read, checked, for the routers.
pub(crate) enum Work {
    /// `timed` is when it was read, if its way is measured.
    Send {
        conversation: ConversationId,
        shard: ShardId,
        send: v1::Send,
        timed: Option<Instant>,
    },
    Call(v1::Call),
    Received {
        shard: ShardId,
        received: v1::Received,
    },
    Signal {
        conversation: ConversationId,
        shard: ShardId,
        signal: v1::Signal,
    },
    Renew {
        token: String,
        expires_at: Timestamp,
        now: Instant,
    },
}

impl Session {
    pub fn new(id: SessionId, transport: Transport) -> Self {
        Self {
            id,
            transport,
            user: OnceLock::new(),
            live: AtomicBool::new(false),
            at_fault: AtomicBool::new(false),
            outbox: Outbox::new(),
            state: Mutex::default(),
        }
    }

    /// What carries its connection.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Whose session it is, as the token says; nobody before `Hello`.
    pub fn user(&self) -> Option<&UserId> {
        self.user.get()
    }

    /// The client was welcomed.
    pub fn is_live(&self) -> bool {
        self.live.load(Ordering::Acquire)
    }

    /// It was closed for something that its client did: another try of the same would end alike.
    pub fn is_at_fault(&self) -> bool {
        self.at_fault.load(Ordering::Acquire)
    }

    /// When the token ends.
    pub fn expires_at(&self) -> Timestamp {
        self.state.lock().expires_at
    }

    /// Nothing that the client waits for is on its way.
    pub fn is_quiet(&self) -> bool {
        self.state.lock().in_flight.as_ref().is_none_or(|in_flight| in_flight.is_empty())
    }

    /// Gives back what a burst left allocated.
    pub fn trim(&self) {
        self.outbox.trim();
        let mut state = self.state.lock();
        if state.in_flight.as_ref().is_some_and(|in_flight| in_flight.is_empty()) {
            state.in_flight = None;
        }
    }

    /// Takes what a connection read to the routers, in order.
    pub fn apply(&self, shared: &Shared, work: &mut Vec<Work>) {
        if work.is_empty() {
            return;
        }
        // The connection writes after it has read: nobody needs to be woken.
        let mut wakers = Wakers::default();
        let mut gather = Gather::default();
        let mut state = self.state.lock();
        self.reconcile_locked(&mut state, shared, &mut gather, &mut wakers, false);
        let routes = shared.routing.routes();
        let home = state.shard.and_then(|shard| routes.owner(shard));
        for work in work.drain(..) {
            match work {
                Work::Send { conversation, shard, send, timed } => {
                    let (link, kept) = (routes.owner(shard), KeptSend::new(conversation, shard, send, timed));
                    self.send(&mut state, shared, link, kept, &mut gather);
                }
                Work::Call(call) => self.call(&mut state, shared, home, call, &mut gather),
                Work::Received { shard, received } => {
                    let message =
                        Message::Received(v1::SessionReceived { session_id: self.id.0, received: Some(received) });
                    self.ephemeral(&mut state, shared, routes.owner(shard), message, &mut gather);
                }
                Work::Signal { conversation, shard, signal } => {
                    let message = Message::Signal(v1::SessionSignal {
                        session_id: self.id.0,
                        conversation_id: conversation.to_bytes(),
                        signal: Some(signal),
                    });
                    self.ephemeral(&mut state, shared, routes.owner(shard), message, &mut gather);
                }
                Work::Renew { token, expires_at, now } => {
                    self.renew(&mut state, shared, home, Renewing::new(token, expires_at, now), &mut gather);
                }
            }
        }
        gather.flush();
    }

    /// Sends to the present owners what an older route had, oldest first.
    pub fn reconcile(&self, shared: &Shared) {
        self.reconcile_with(shared, false);
    }

    /// The same although no route changed: a router gave something back.
    pub fn retry(&self, shared: &Shared) {
        self.reconcile_with(shared, true);
    }

    fn reconcile_with(&self, shared: &Shared, force: bool) {
        let mut wakers = Wakers::default();
        let mut gather = Gather::default();
        let mut state = self.state.lock();
        self.reconcile_locked(&mut state, shared, &mut gather, &mut wakers, force);
        gather.flush();
        drop(state);
    }

    fn reconcile_locked(
        &self,
        state: &mut State,
        shared: &Shared,
        gather: &mut Gather,
        wakers: &mut Wakers,
        force: bool,
    ) {
        // Read first: a change during the visit leads to another visit.
        let version = shared.routing.version();
        if (state.version == version && !force) || state.gone || self.outbox.is_closing() {
            return;
        }
        state.version = version;
        let routes = shared.routing.routes();
        let home = state.shard.and_then(|shard| routes.owner(shard));
        self.open_again(state, &routes, gather);
        if self.is_live() {
            self.register_again(state, shared, &routes, gather, wakers);
            self.give_up_calls(state, shared, home, wakers);
            self.send_again(state, shared, &routes, gather);
        }
    }

    fn ephemeral(
        &self,
        state: &mut State,
        shared: &Shared,
        link: Option<&Arc<Link>>,
        message: Message,
        gather: &mut Gather,
    ) {
        match link.filter(|link| link.is_up()) {
            Some(link) => {
                self.present(state, link, gather);
                gather.add(link, message);
            }
            None => shared.metrics.ephemeral_dropped.increment(1),
        }
    }

    /// Queues a frame that must not be lost.
    pub fn push(&self, shared: &Shared, frame: Frame, wakers: &mut Wakers) {
        self.push_since(shared, frame, None, wakers);
    }

    /// The same, timed since a moment.
    fn push_since(&self, shared: &Shared, frame: Frame, since: Option<Instant>, wakers: &mut Wakers) {
        match self.outbox.push(frame, since, shared.bounds) {
            Ok(waker) => wakers.add(waker),
            Err(waker) => {
                shared.metrics.closed(StatusCode::Overloaded.number());
                tracing::debug!(session = self.id.0, "closed: answers pile up");
                wakers.add(waker);
            }
        }
    }

    /// Queues a shared frame that may be lost with a `Resync`.
    pub fn push_live(&self, shared: &Shared, frame: &bytes::Bytes, wakers: &mut Wakers) {
        match self.outbox.push_live(frame, shared.bounds) {
            Pushed::Queued(waker) => {
                shared.metrics.pushes.increment(1);
                wakers.add(waker);
            }
            Pushed::Dropped => shared.metrics.pushes_dropped.increment(1),
        }
    }

    /// Ends the connection with a status.
    pub fn close(&self, shared: &Shared, status: v1::Status, wakers: &mut Wakers) {
        let code = status.code;
        // Before the connection can see that it is closed.
        let is_at_fault = StatusCode::from_number(code)
            .is_some_and(|code| code == StatusCode::TimedOut || code.retry() != Retry::Later);
        self.at_fault.store(is_at_fault, Ordering::Release);
        if let Some(waker) = self.outbox.close(status) {
            shared.metrics.closed(code);
            wakers.add(waker);
        }
    }

    /// Tells the routers once that the session is over.
    pub fn disconnected(&self) {
        let mut state = self.state.lock();
        if std::mem::replace(&mut state.gone, true) {
            return;
        }
        let mut known = std::mem::take(&mut state.presented);
        if let Some(sent_to) = state.opening.take().and_then(|opening| opening.sent_to) {
            known.push(sent_to);
        }
        // Also under an older token: what was lost on the way to here the router has all the same.
        for (_, link) in known {
            link.push_one(Message::Close(v1::SessionClose { session_id: self.id.0 }));
        }
        state.in_flight = None;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}
