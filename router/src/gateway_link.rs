//! The router's side of links to gateways: numbering, replay, the sessions that a gateway has shown to this router.
//!
//! A [`GatewayLink`] lives as long as its gateway is registered, across reconnects. One task pumps one connection. What waits for a
//! gateway is bounded in bytes: beyond the bound live pushes are dropped and all its sessions are told to resync; acks and replies
//! are few (bounded by the sends and calls that a gateway may have in flight) and are never dropped.

mod pump;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use im_proto::{
    ConversationId, InstanceId, SessionId,
    link::{Arrival, Batch, Incoming, Outgoing, Weighed as _},
    token::Unverified,
    v1,
    v1::{gateway_message::Message as FromGateway, router_message::Message as ToGateway},
};
use metrics::Counter;
use parking_lot::{Mutex, RwLock};
use tokio::{sync::Notify, time::Instant};

use crate::{
    api,
    caller::{Caller, SessionKey},
    cluster::Cluster,
    link_queue::{Acknowledged, LinkQueue},
    message::{Answer, AnswerValue, ReplyTo, unavailable},
    placement::Load,
    worker::input::{GatewayInput, Input},
};

/// What a gateway is believed to hold at most.
const CONNECTIONS_MAX: u64 = 1 << 32;

pub use self::pump::serve;

/// Replay buffer of one link.
const REPLAY_BYTES_MAX: usize = 16 * 1024 * 1024;
/// A load counts for so long: gateways report it each second, and three reports may be late.
const LOAD_HOLDS: Duration = Duration::from_secs(4);

/// A gateway as this router sees it.
pub struct GatewayLink {
    pub instance: InstanceId,
    pub boot: u64,
    sessions: RwLock<HashMap<SessionId, Arc<Caller>>>,
    /// Sessions on their way to the worker that opens them; whoever changes both holds this first.
    opening: Mutex<BTreeSet<SessionId>>,
    queue: Mutex<Queue>,
    queue_bytes_max: usize,
    /// Pushes that were dropped for want of room.
    dropped: Counter,
    wake: Notify,
    numbering: Mutex<Numbering>,
    /// Only the newest connection pumps.
    connection: AtomicU64,
    /// What the gateway said last of itself, and when.
    load: Mutex<Option<(Load, Instant)>>,
}

#[derive(Default)]
struct Queue {
    messages: LinkQueue<v1::RouterMessage>,
    /// Live pushes were dropped; all sessions of the gateway must resync.
    overflowed: bool,
}

struct Numbering {
    outgoing: Outgoing<Arc<v1::RouterBatch>>,
    incoming: Incoming,
    acknowledged: Acknowledged,
}

impl GatewayLink {
    fn new(instance: InstanceId, boot: u64, queue_bytes_max: usize, dropped: Counter) -> Self {
        Self {
            instance,
            boot,
            sessions: RwLock::default(),
            opening: Mutex::default(),
            queue: Mutex::default(),
            queue_bytes_max,
            dropped,
            wake: Notify::new(),
            numbering: Mutex::new(Numbering {
                outgoing: Outgoing::new(REPLAY_BYTES_MAX),
                incoming: Incoming::default(),
                acknowledged: Acknowledged::default(),
            }),
            connection: AtomicU64::new(0),
            load: Mutex::new(None),
        }
    }

    /// Queues messages. Live pushes over the bound are dropped here and become a resync.
    pub fn send(&self, messages: Vec<v1::RouterMessage>) {
        if messages.is_empty() {
            return;
        }
        let mut queue = self.queue.lock();
        for message in messages {
            let droppable = matches!(&message.message, Some(ToGateway::Deliver(_) | ToGateway::AudienceDeliver(_)));
            if droppable && queue.messages.bytes() + message.weight() > self.queue_bytes_max {
                queue.overflowed = true;
                self.dropped.increment(1);
                continue;
            }
            queue.messages.push(message);
        }
        drop(queue);
        self.wake.notify_one();
    }

    /// Queues the answer to a call.
    pub fn reply(&self, session: SessionId, request_id: u32, answer: Answer) {
        let in_order = matches!(answer, Ok(AnswerValue::ReplyInOrder(_)));
        let (status, reply) = match answer {
            Ok(AnswerValue::Reply(reply) | AnswerValue::ReplyInOrder(reply)) => (None, reply),
            Ok(_) => (None, Bytes::new()),
            Err(status) => (Some(status), Bytes::new()),
        };
        let reply = v1::CallReply { session_id: session.0, request_id, status, reply, in_order };
        self.send(vec![v1::RouterMessage { message: Some(ToGateway::CallReply(reply)) }]);
    }

    /// The identity of a session that was registered or presented here.
    pub fn session(&self, session: SessionId) -> Option<Arc<Caller>> {
        self.sessions.read().get(&session).cloned()
    }

    /// Remembers a session's identity.
    pub fn add_session(&self, caller: Arc<Caller>) {
        if let Some(key) = &caller.session {
            self.sessions.write().insert(key.session, caller.clone());
        }
    }

    /// Remembers the identity of a session that is being opened; `false` if it was closed meanwhile.
    pub fn admit_session(&self, caller: Arc<Caller>) -> bool {
        let Some(key) = &caller.session else { return false };
        let mut opening = self.opening.lock();
        let wanted = opening.remove(&key.session);
        if wanted {
            self.add_session(caller);
        }
        wanted
    }

    /// Takes over a later expiry, unless the session was closed meanwhile.
    pub fn renew_session(&self, caller: Arc<Caller>) {
        if let Some(key) = &caller.session
            && let Some(known) = self.sessions.write().get_mut(&key.session)
        {
            *known = caller;
        }
    }

    /// What the gateway said of itself, unless that is long ago.
    pub fn load(&self) -> Option<Load> {
        (*self.load.lock()).filter(|(_, heard)| heard.elapsed() < LOAD_HOLDS).map(|(load, _)| load)
    }

    /// The session is over.
    pub fn forget_session(&self, session: SessionId) -> Option<Arc<Caller>> {
        let mut opening = self.opening.lock();
        opening.remove(&session);
        self.sessions.write().remove(&session)
    }

    /// A session on its way to be opened is refused. If it is known all the same it was closed and announced meanwhile, and stays.
    pub fn forget_opening(&self, session: SessionId) {
        self.opening.lock().remove(&session);
    }

    /// Whether a session still is what an open made of it: not if it was closed meanwhile, also not if it came again since then.
    pub fn is_as_opened(&self, caller: &Arc<Caller>) -> bool {
        let known = caller.session.as_ref().and_then(|key| self.session(key.session));
        known.is_some_and(|known| Arc::ptr_eq(&known, caller))
    }

    /// A session that was admitted is refused after all; `false` if it is not as it was opened, and stays as it is.
    pub fn forget_opened(&self, caller: &Arc<Caller>) -> bool {
        let _opening = self.opening.lock();
        let mut sessions = self.sessions.write();
        let Some(key) = &caller.session else { return false };
        let is_as_opened = sessions.get(&key.session).is_some_and(|known| Arc::ptr_eq(known, caller));
        if is_as_opened {
            sessions.remove(&key.session);
        }
        is_as_opened
    }

    /// Ends the connection that pumps. A link that answers no longer find must not be read either: its gateway would wait for ever. One
    /// that lives after all (it registered after this view was made, or lost its lease) dials again and is admitted again.
    pub fn retire(&self) {
        self.connection.fetch_add(1, Ordering::AcqRel);
        self.wake.notify_one();
    }

    fn take_queue(&self) -> Vec<v1::RouterMessage> {
        let (mut messages, overflowed) = {
            let mut queue = self.queue.lock();
            (queue.messages.take_batch(), std::mem::take(&mut queue.overflowed))
        };
        if overflowed {
            messages.push(self.resync_all(v1::ResyncReason::SlowConsumer));
        }
        messages
    }

    fn resync_all(&self, reason: v1::ResyncReason) -> v1::RouterMessage {
        let mut session_ids: Vec<u64> = self.sessions.read().keys().map(|session| session.0).collect();
        session_ids.sort_unstable();
        let resync = Some(v1::Resync { reason: reason.into(), spread_ms: 1000 });
        v1::RouterMessage { message: Some(ToGateway::Resync(v1::SessionsResync { session_ids, resync })) }
    }
}

/// Handles an arrived batch; `false` if the link must be reset.
fn take_batch(cluster: &Arc<Cluster>, link: &Arc<GatewayLink>, batch: &Arc<v1::GatewayBatch>) -> bool {
    let (arrival, lost) = {
        let numbering = &mut *link.numbering.lock();
        numbering.outgoing.acknowledge(batch.acknowledged_through);
        let count = Batch::messages(batch);
        let lost = count > 0 && batch.first_number > numbering.incoming.received_through() + 1;
        let arrival = numbering.incoming.arrive(batch.first_number, count);
        numbering.acknowledged.arrived(&numbering.incoming, batch.bytes());
        (arrival, lost)
    };
    let Arrival::Handle { skip } = arrival else {
        tracing::warn!(gateway = %link.instance, first = batch.first_number, "a gap in a link's numbers; the link is reset");
        return false;
    };
    if lost {
        // Closes may be among what is lost. The gateway presents every session that still lives again, from this batch on.
        link.opening.lock().clear();
        link.sessions.write().clear();
        cluster.to_all_workers(|| Input::GatewayGone(link.instance.clone()));
    }
    let mut inputs = Inputs::new(cluster);
    for message in batch.messages.iter().skip(skip) {
        if let Some(message) = &message.message {
            dispatch(cluster, link, message, &mut inputs);
        }
    }
    inputs.flush();
    true
}

/// Inputs of one batch, gathered for each worker.
struct Inputs<'a> {
    cluster: &'a Cluster,
    by_worker: Vec<Vec<GatewayInput>>,
}

impl<'a> Inputs<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        Self { cluster, by_worker: (0..cluster.config.workers).map(|_| Vec::new()).collect() }
    }

    fn push(&mut self, input: GatewayInput) {
        let worker = self.cluster.worker_of(self.cluster.shard_of(&input.conversation()));
        self.by_worker[worker].push(input);
    }

    fn flush(self) {
        for (worker, inputs) in self.by_worker.into_iter().enumerate() {
            if !inputs.is_empty() {
                self.cluster.gateway_to_worker(worker, inputs);
            }
        }
    }
}

fn dispatch(cluster: &Arc<Cluster>, link: &Arc<GatewayLink>, message: &FromGateway, inputs: &mut Inputs<'_>) {
    match message {
        FromGateway::Open(open) => dispatch_open(cluster, link, open, inputs),
        FromGateway::Announce(announce) => {
            if let Some(caller) = verify_capability(cluster, link, announce.session_id, announce.capability.as_ref()) {
                link.add_session(caller.clone());
                inputs.push(GatewayInput::Announce { link: link.clone(), caller });
            }
        }
        FromGateway::Present(present) => {
            if let Some(caller) = verify_capability(cluster, link, present.session_id, present.capability.as_ref()) {
                link.add_session(caller);
            }
        }
        FromGateway::Close(close) => {
            if let Some(caller) = link.forget_session(SessionId(close.session_id)) {
                inputs.push(GatewayInput::Close { caller });
            }
        }
        FromGateway::Renew(renew) => {
            if let Some(caller) = link.session(SessionId(renew.session_id)) {
                inputs.push(GatewayInput::Renew { link: link.clone(), caller, token: renew.token.clone() });
            }
        }
        FromGateway::Send(send) => dispatch_send(link, send, inputs),
        FromGateway::Call(call) => dispatch_call(cluster, link, call),
        FromGateway::Signal(signal) => {
            let caller = link.session(SessionId(signal.session_id));
            let id = ConversationId::from_slice(&signal.conversation_id);
            if let (Some(caller), Ok(conversation), Some(signal)) = (caller, id, &signal.signal) {
                inputs.push(GatewayInput::Signal { caller, conversation, signal: signal.clone() });
            }
        }
        FromGateway::Received(received) => {
            if let Some(input) = GatewayInput::received(link.session(SessionId(received.session_id)), received) {
                inputs.push(input);
            }
        }
        FromGateway::AudienceWanted(wanted) => {
            if let Ok(id) = ConversationId::from_slice(&wanted.conversation_id) {
                cluster.audiences.wanted(cluster, &link.instance, &id);
            }
        }
        FromGateway::Load(load) => {
            // No gateway holds more; greater numbers would spoil the sums for all.
            let [connections, capacity] = [load.connections, load.capacity].map(|count| count.min(CONNECTIONS_MAX));
            let load = Load { connections, capacity, draining: load.draining };
            *link.load.lock() = Some((load, Instant::now()));
        }
    }
}

fn dispatch_open(cluster: &Cluster, link: &Arc<GatewayLink>, open: &v1::SessionOpen, inputs: &mut Inputs<'_>) {
    // Only to find the worker: the worker verifies.
    let now = cluster.environment.clock.now();
    match Unverified::read(&open.token).and_then(|token| Ok((token.inspect(now)?, token))) {
        Ok((seen, token)) => {
            let self_id = cluster.config.cluster_secret.self_id(&seen.user);
            link.opening.lock().insert(SessionId(open.session_id));
            let open = without_token(open);
            inputs.push(GatewayInput::Open { link: link.clone(), open, token: Box::new(token), self_id });
        }
        Err(error) => {
            let refused = v1::SessionRefused { session_id: open.session_id, status: Some(error.status().to_status()) };
            link.send(vec![v1::RouterMessage { message: Some(ToGateway::Refused(refused)) }]);
        }
    }
}

/// The same without its token, which is in what was read of it.
fn without_token(open: &v1::SessionOpen) -> v1::SessionOpen {
    v1::SessionOpen {
        session_id: open.session_id,
        token: String::new(),
        client_name: open.client_name.clone(),
        client_version: open.client_version.clone(),
        remote_address: open.remote_address.clone(),
        transport: open.transport.clone(),
        opened_at_ms: open.opened_at_ms,
    }
}

fn dispatch_send(link: &Arc<GatewayLink>, send: &v1::SessionSend, inputs: &mut Inputs<'_>) {
    let Ok(conversation) = ConversationId::from_slice(&send.conversation_id) else { return };
    let Some(message) = &send.send else { return };
    match link.session(SessionId(send.session_id)) {
        Some(caller) => {
            let (attempt, send) = (send.attempt, message.clone());
            inputs.push(GatewayInput::Send { caller, conversation, attempt, send });
        }
        None => {
            let wanted = v1::CapabilityWanted {
                session_id: send.session_id,
                conversation_id: send.conversation_id.clone(),
                client_message_id: message.client_message_id.clone(),
                attempt: send.attempt,
            };
            link.send(vec![v1::RouterMessage { message: Some(ToGateway::CapabilityWanted(wanted)) }]);
        }
    }
}

fn dispatch_call(cluster: &Arc<Cluster>, link: &Arc<GatewayLink>, session_call: &v1::SessionCall) {
    let Some(call) = &session_call.call else { return };
    let session = SessionId(session_call.session_id);
    let Some(caller) = link.session(session) else {
        // The call is the client's to repeat; by then the gateway has shown whose session it is.
        let wanted = v1::CapabilityWanted { session_id: session.0, ..v1::CapabilityWanted::default() };
        link.send(vec![v1::RouterMessage { message: Some(ToGateway::CapabilityWanted(wanted)) }]);
        return link.reply(session, call.request_id, Err(unavailable()));
    };
    let key = SessionKey { gateway: link.instance.clone(), session };
    let reply_to = ReplyTo::Session { key, request_id: call.request_id };
    api::call(cluster, caller, call.method, call.request.clone(), reply_to);
}

fn verify_capability(
    cluster: &Cluster,
    link: &GatewayLink,
    session_id: u64,
    capability: Option<&v1::Capability>,
) -> Option<Arc<Caller>> {
    let identity = cluster.config.router_secret.verify(capability?)?;
    let names_this = identity.gateway_id == link.instance.as_str()
        && identity.gateway_boot_id == link.boot
        && identity.session_id == session_id
        && identity.expires_at_ms > cluster.environment.clock.now().as_millis();
    if !names_this {
        tracing::warn!(gateway = %link.instance, "a capability of another session or an expired one was refused");
        return None;
    }
    Caller::from_identity(&identity, &cluster.config.cluster_secret).ok().map(Arc::new)
}
