//! A worker: one task that owns many shards and drains its inbox in batches.
//!
//! Everything a worker holds is its own; nothing here is locked. A turn takes what waits in the inbox, handles it, then forms
//! batches of everything that was assigned meanwhile and hands them to the store at once. Results come back as inputs. What needs
//! the store or the registry runs in a task whose outcome comes back as a step ([`Context::then`]).

pub mod conversations;
pub mod input;
pub mod waiting;

pub mod fan_out;
pub mod following;
pub mod large;

mod apply;
pub mod bursts;
mod calls;
mod channels;
mod commit;
mod describe;
mod devices;
mod groups;
pub mod heads;
mod history;
pub mod idle;
mod opening;
pub mod presence;
pub mod receipts;
pub mod repeats;
mod sends;
mod sessions;
mod shards;
pub mod shedding;
mod signals;
mod sync;

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    sync::Arc,
    time::Duration,
};

use foldhash::quality::FixedState;
use im_proto::{ConversationId, InstanceId, v1};
use im_registry::Lease;
use im_storage::{AppendDone, AppendRequest};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior},
};

use self::{
    bursts::LeftBursts,
    conversations::{Conversations, Schedule},
    input::{GatewayInput, Input},
    sessions::Users,
    shards::Shards,
    waiting::OpenQueue,
};
use crate::{
    caller::SessionKey,
    cluster::{Cluster, arrivals::Arrivals},
    conversation::Conversation,
    deadline::StoreCalls,
    fence::FenceService,
    message::{ReplyTo, ShardMessage},
    ownership::RaiseRequest,
};

/// Inputs of one turn.
const INPUTS_PER_TURN: usize = 1024;
/// Between looks at idle conversations, unanswered effects and cursors.
const TICK: Duration = Duration::from_millis(500);

/// All of a worker but its conversations, so that both can be borrowed at once.
pub struct Context {
    pub index: usize,
    pub cluster: Arc<Cluster>,
    pub store: StoreCalls,
    raises: mpsc::UnboundedSender<RaiseRequest>,
    pub fence: FenceService,
    pub lease: Lease,
    inbox: mpsc::UnboundedSender<Input>,
    shards: Shards,
    users: Users,
    opens: OpenQueue,
    schedule: Schedule,
    left_bursts: LeftBursts,
    /// As of the last tick.
    arrivals: Arrivals,
    /// Conversations with assigned entries and no batch in flight.
    dirty: Vec<ConversationId>,
    /// Which conversation a submitted batch belongs to.
    tokens: HashMap<u64, ConversationId, FixedState>,
    next_token: u64,
    /// Batches that the store has confirmed since the last fence request.
    confirmed: Vec<(ConversationId, u64)>,
    /// Batches that wait for a fence read, by ticket.
    fencing: VecDeque<(u64, Vec<(ConversationId, u64)>)>,
    next_ticket: u64,
    submissions: Vec<AppendRequest>,
    /// Until when each batch that was handed to the store must be answered, in the order of the deadlines.
    append_deadlines: VecDeque<(Instant, u64)>,
    append_done: AppendDone,
    /// For gateways, by their instance.
    outgoing: HashMap<InstanceId, Vec<v1::RouterMessage>, FixedState>,
    history: history::Reads,
    scans: repeats::ScanBudgets,
    next_sync: u64,
    stopped: bool,
}

/// A worker.
pub struct Worker {
    pub context: Context,
    pub conversations: Conversations,
}

impl Worker {
    pub fn new(
        index: usize,
        cluster: Arc<Cluster>,
        store: StoreCalls,
        raises: mpsc::UnboundedSender<RaiseRequest>,
        fence: FenceService,
        lease: Lease,
        inbox: mpsc::UnboundedSender<Input>,
    ) -> Self {
        let done = inbox.clone();
        let shards = cluster.config.shards;
        let append_done: AppendDone = Arc::new(move |results| {
            // A worker that has ended no longer wants results.
            let _ = done.send(Input::Appended(results));
        });
        Self {
            context: Context {
                index,
                cluster,
                store,
                raises,
                fence,
                lease,
                inbox,
                shards: Shards::default(),
                users: Users::default(),
                opens: OpenQueue::default(),
                schedule: Schedule::default(),
                left_bursts: LeftBursts::default(),
                arrivals: Arrivals::default(),
                dirty: Vec::new(),
                tokens: HashMap::default(),
                next_token: 1,
                confirmed: Vec::new(),
                fencing: VecDeque::new(),
                next_ticket: 1,
                submissions: Vec::new(),
                append_deadlines: VecDeque::new(),
                append_done,
                outgoing: HashMap::default(),
                history: history::Reads::default(),
                scans: repeats::ScanBudgets::default(),
                next_sync: 0,
                stopped: false,
            },
            conversations: Conversations::new(shards),
        }
    }

    /// Runs until the router ends.
    pub async fn run(mut self, mut inputs: mpsc::UnboundedReceiver<Input>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut waiting = Vec::with_capacity(INPUTS_PER_TURN);
        while !self.context.stopped {
            tokio::select! {
                biased;
                // First, or a worker that always has inputs would never look after what goes by the clock.
                _ = tick.tick() => self.tick(),
                count = inputs.recv_many(&mut waiting, INPUTS_PER_TURN) => {
                    if count == 0 {
                        return;
                    }
                    for input in waiting.drain(..) {
                        self.take(input);
                    }
                }
            }
            self.end_turn();
            // Other tasks of this thread get their turn even under load.
            tokio::task::consume_budget().await;
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Gateway(messages) => {
                self.context.cluster.gateway_taken(messages.len());
                messages.into_iter().for_each(|message| self.take_gateway(message));
            }
            Input::Shard { shard, message, reply_to } => self.take_shard(shard, message, reply_to),
            Input::Appended(results) => results.into_iter().for_each(|(token, result)| self.appended(token, result)),
            Input::FenceClean(ticket) => self.fence_clean(ticket),
            Input::EffectAnswered { origin, target, origin_seq, done } => {
                self.effect_answered(&origin, &target, origin_seq, done);
            }
            Input::GatewayGone(gateway) => self.context.gateway_gone(&gateway),
            Input::Run(step) => step(self),
            Input::Stop => self.context.stopped = true,
        }
    }

    fn take_gateway(&mut self, input: GatewayInput) {
        let shard = self.context.cluster.shard_of(&input.conversation());
        if let Some(parked) = self.context.shards.parking(shard) {
            return parked.push(Input::Gateway(vec![input]));
        }
        if !self.context.shards.is_active(shard) {
            return self.context.refuse_gateway(input);
        }
        match input {
            GatewayInput::Send { caller, conversation, attempt, send } => {
                self.take_send(caller, conversation, attempt, send);
            }
            GatewayInput::Signal { caller, conversation, signal } => self.take_signal(caller, conversation, signal),
            GatewayInput::Received { caller, conversation, seq } => self.take_received(caller, conversation, seq),
            GatewayInput::Open { link, open, token, .. } => self.open_session(link, &open, &token),
            GatewayInput::Announce { link: _, caller } => self.context.announce_session(caller),
            GatewayInput::Renew { link, caller, token } => self.context.renew_session(&link, &caller, &token),
            GatewayInput::Close { caller } => self.context.close_session(&caller),
        }
    }

    fn take_shard(&mut self, shard: im_proto::ShardId, message: ShardMessage, reply_to: ReplyTo) {
        if let ShardMessage::Deliver(delivery) = &message {
            return self.context.take_delivery(delivery);
        }
        if let Some(parked) = self.context.shards.parking(shard) {
            return parked.push(Input::Shard { shard, message, reply_to });
        }
        if !self.context.shards.is_active(shard) {
            return self.context.refuse(reply_to);
        }
        match message {
            ShardMessage::Deliver(delivery) => self.context.take_delivery(&delivery),
            ShardMessage::ResyncShard => self.context.resync_shard(shard),
            ShardMessage::Effect(effect) => {
                let target = effect.target;
                self.request(target, waiting::Request::Effect { effect, reply_to });
            }
            ShardMessage::Heads(query) => self.heads(query, reply_to),
            ShardMessage::Follow(follow) => self.context.follow(&follow, reply_to),
            ShardMessage::Unfollow(unfollow) => self.context.unfollow(&unfollow),
            ShardMessage::AudienceGone { conversation, router, seq } => self.audience_gone(&conversation, &router, seq),
            ShardMessage::Watch(watch) => self.context.watch(shard, &watch, reply_to),
            ShardMessage::Call(call) => self.take_call(call, reply_to),
        }
    }

    /// Forms batches of what was assigned, hands them to the store, asks for a fence read for what was confirmed, flushes links.
    fn end_turn(&mut self) {
        self.form_batches();
        let context = &mut self.context;
        if !context.submissions.is_empty() {
            let submissions = std::mem::take(&mut context.submissions);
            let deadline = context.now() + context.store.deadline();
            context.append_deadlines.extend(submissions.iter().map(|request| (deadline, request.token)));
            context.store.submit(submissions, context.append_done.clone());
        }
        if !context.confirmed.is_empty() {
            let ticket = context.next_ticket;
            context.next_ticket += 1;
            context.fencing.push_back((ticket, std::mem::take(&mut context.confirmed)));
            context.fence.request(context.index, ticket);
        }
        context.flush_links();
    }
}

impl Context {
    /// Runs a task and then a step on this worker with its outcome.
    pub fn then<F, T>(&self, task: F, step: impl FnOnce(&mut Worker, T) + Send + 'static)
    where
        F: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        let inbox = self.inbox.clone();
        self.cluster.environment.spawn(async move {
            let outcome = task.await;
            let _ = inbox.send(Input::Run(Box::new(move |worker| step(worker, outcome))));
        });
    }

    /// Queues a message for a session's gateway; it leaves at the end of the turn.
    pub fn tell_session(&mut self, key: &SessionKey, message: v1::router_message::Message) {
        let message = v1::RouterMessage { message: Some(message) };
        match self.outgoing.get_mut(&key.gateway) {
            Some(messages) => messages.push(message),
            None => {
                self.outgoing.insert(key.gateway.clone(), vec![message]);
            }
        }
    }

    fn flush_links(&mut self) {
        if self.outgoing.values().all(Vec::is_empty) {
            return;
        }
        let links = self.cluster.links.read();
        self.outgoing.retain(|gateway, messages| {
            // Messages to a gateway that is gone have nobody to reach.
            let link = links.get(gateway);
            if let Some(link) = link {
                link.send(std::mem::take(messages));
            }
            link.is_some()
        });
    }

    /// Time, for idle conversations.
    pub fn now(&self) -> Instant {
        Instant::now()
    }

    /// Whether the lease may have been taken by others: then reads need a fence read too.
    pub fn past_lease(&self) -> bool {
        self.cluster.environment.clock.since_boot() >= self.lease.deadline()
    }

    fn mark_dirty(&mut self, conversation: &mut Conversation) {
        if !conversation.dirty {
            conversation.dirty = true;
            self.dirty.push(conversation.id);
        }
    }
}
