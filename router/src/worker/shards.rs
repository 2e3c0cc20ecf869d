//! The shards of a worker: claimed (being fenced), active, releasing.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use im_proto::{ConversationId, Epoch, ShardId, v1, v1::router_message::Message as ToGateway};
use im_registry::Claim;
use tokio::sync::oneshot;

use super::{
    Context, Worker,
    input::Input,
    waiting::{Request, Slot},
};
use crate::{
    caller::Caller,
    message::{ReplyTo, unavailable},
    worker::input::GatewayInput,
};

/// Inputs that wait while a shard's predecessors are being fenced. Beyond it they are refused.
const PARKED_MAX: usize = 65_536;

enum Shard {
    /// Claimed; nothing may be read before the fence is confirmed.
    Claimed {
        epoch: Epoch,
        parked: Vec<Input>,
    },
    Active {
        claim: Claim,
        cancelled: Arc<AtomicBool>,
    },
    /// Claimed, not fenced, and yet a row of a later epoch was found: the registry has lost its state, and whoever wrote that row may
    /// be alive. Nothing is served until the generation is raised, which ends this router.
    Refused,
    /// Given up: finishes what is in flight, takes nothing new.
    Releasing {
        done: oneshot::Sender<()>,
        /// Conversations that have something in flight. No more come.
        unsettled: BTreeSet<ConversationId>,
    },
}

/// The shards of a worker.
#[derive(Default)]
pub struct Shards {
    shards: BTreeMap<ShardId, Shard>,
    /// Sessions announced before this router knew that it has their shard: gateways may learn of a claim sooner than the claimer,
    /// whose answer may be late or lost.
    early: BTreeMap<ShardId, Vec<Arc<Caller>>>,
}

/// Early announcements of one shard. Beyond it their clients are told to come again.
const EARLY_MAX: usize = 65_536;

impl Shards {
    /// Whether requests for it are handled here.
    pub fn is_active(&self, shard: ShardId) -> bool {
        matches!(self.shards.get(&shard), Some(Shard::Active { .. }))
    }

    /// Whether live pushes for a shard's users reach all that have a session here. Before a shard is served nobody has one: whoever
    /// gets one later syncs then.
    pub fn takes_pushes(&self, shard: ShardId) -> bool {
        matches!(self.shards.get(&shard), Some(Shard::Active { .. } | Shard::Claimed { .. }))
    }

    /// Whether batches in flight may still be finished.
    pub fn is_held(&self, shard: ShardId) -> bool {
        matches!(self.shards.get(&shard), Some(Shard::Active { .. } | Shard::Releasing { .. }))
    }

    /// The claim of an active shard.
    pub fn claim(&self, shard: ShardId) -> Option<&Claim> {
        match self.shards.get(&shard) {
            Some(Shard::Active { claim, .. }) => Some(claim),
            _ => None,
        }
    }

    /// The epoch of an active shard's claim.
    pub fn epoch(&self, shard: ShardId) -> Option<Epoch> {
        self.claim(shard).map(|claim| claim.epoch)
    }

    /// Room for an input that must wait until the shard is active; `None` if it need not or must not.
    pub fn parking(&mut self, shard: ShardId) -> Option<&mut Vec<Input>> {
        match self.shards.get_mut(&shard) {
            Some(Shard::Claimed { parked, .. }) if parked.len() < PARKED_MAX => Some(parked),
            _ => None,
        }
    }

    /// Turns true once the shard is no longer held, for its tasks.
    pub fn cancellation(&self, shard: ShardId) -> Arc<AtomicBool> {
        match self.shards.get(&shard) {
            Some(Shard::Active { cancelled, .. }) => cancelled.clone(),
            _ => Arc::new(AtomicBool::new(true)),
        }
    }

    /// Keeps an announcement until the shard is served; `false` if there is no room.
    fn announced_early(&mut self, shard: ShardId, caller: Arc<Caller>) -> bool {
        let early = self.early.entry(shard).or_default();
        early.retain(|known| known.session != caller.session);
        let room = early.len() < EARLY_MAX;
        if room {
            early.push(caller);
        }
        room
    }

    /// Forgets early announcements of sessions that have ended.
    pub fn forget_early(&mut self, ended: impl Fn(&Caller) -> bool) {
        self.early.retain(|_, early| {
            early.retain(|caller| !ended(caller));
            !early.is_empty()
        });
    }

    fn cancel(&self, shard: ShardId) {
        if let Some(Shard::Active { cancelled, .. }) = self.shards.get(&shard) {
            cancelled.store(true, Ordering::Release);
        }
    }

    fn raise(&mut self, shard: ShardId, raised: Claim) {
        if let Some(Shard::Active { claim, .. }) = self.shards.get_mut(&shard) {
            *claim = raised;
        }
    }
}

impl Worker {
    /// A shard was claimed; requests for it wait from now on.
    pub fn shard_claimed(&mut self, shard: ShardId, epoch: Epoch) {
        self.context.shards.shards.insert(shard, Shard::Claimed { epoch, parked: Vec::new() });
    }

    /// A shard's predecessors are fenced: serve it, and open what its last owner left busy. The store was asked meanwhile, for any
    /// time: a claim that was given up or lost since then, or claimed again and not fenced yet, is none to serve under. An owner
    /// that gave a shard up is not fenced, so nothing else would stop it.
    pub fn shard_active(&mut self, claim: Claim, busy: Vec<ConversationId>) {
        let shard = claim.shard;
        match self.context.shards.shards.get(&shard) {
            Some(Shard::Claimed { epoch, .. }) if *epoch == claim.epoch => {}
            _ => return,
        }
        let before = self.context.shards.shards.insert(shard, Shard::Active { claim, cancelled: Arc::default() });
        self.context.users.presence.shard_begins(shard);
        for conversation in busy {
            self.open_later(conversation);
        }
        for caller in self.context.shards.early.remove(&shard).unwrap_or_default() {
            self.context.announce_session(caller);
        }
        if let Some(Shard::Claimed { parked, .. }) = before {
            for input in parked {
                match input {
                    // Counted as taken when it was parked.
                    Input::Gateway(messages) => messages.into_iter().for_each(|message| self.take_gateway(message)),
                    input => self.take(input),
                }
            }
        }
    }

    /// A planned move: finish what is in flight, then say so.
    pub fn shard_releasing(&mut self, shard: ShardId, done: oneshot::Sender<()>) {
        self.context.shards.cancel(shard);
        let unsettled = self.conversations.of_shard(shard).into_iter().collect();
        let before = self.context.shards.shards.insert(shard, Shard::Releasing { done, unsettled });
        if let Some(Shard::Claimed { parked, .. }) = before {
            self.refuse_parked(parked);
        }
        self.context.forget_users_of(shard);
        self.finish_release(shard);
    }

    /// The shard is lost: everything that is not committed is dropped with its queue.
    pub fn shard_lost(&mut self, shard: ShardId) {
        self.context.shards.cancel(shard);
        if let Some(Shard::Claimed { parked, .. }) = self.context.shards.shards.remove(&shard) {
            self.refuse_parked(parked);
        }
        self.context.forget_users_of(shard);
        for id in self.conversations.of_shard(shard) {
            self.drop_conversation(&id);
        }
    }

    /// An owner that is not fenced has met an epoch above its own: what is true for one conversation may be so for all of the shard.
    pub fn shard_refused(&mut self, shard: ShardId, found: Epoch) {
        let Some(own) = self.context.shards.epoch(shard).filter(|own| found > *own) else { return };
        self.context.cluster.metrics.alarms.increment(1);
        tracing::error!(
            shard = shard.0,
            ?found,
            ?own,
            "ALARM: a shard is refused, because a later epoch wrote there. The registry was restored or lost: run `imd cluster recover`"
        );
        self.context.shards.cancel(shard);
        self.context.shards.shards.insert(shard, Shard::Refused);
        self.context.forget_users_of(shard);
        for id in self.conversations.of_shard(shard) {
            self.drop_conversation(&id);
        }
    }

    fn refuse_parked(&mut self, parked: Vec<Input>) {
        for input in parked {
            match input {
                Input::Shard { reply_to, .. } => self.context.cluster.answer(reply_to, Err(unavailable())),
                // Not active any more, so this returns sends to their gateways.
                Input::Gateway(messages) => messages.into_iter().for_each(|message| self.take_gateway(message)),
                _ => {}
            }
        }
    }

    /// Releases whose conversations have nothing in flight any more are done.
    pub fn finish_releases(&mut self) {
        let releasing = |(shard, state): (&ShardId, &Shard)| matches!(state, Shard::Releasing { .. }).then_some(*shard);
        let releasing: Vec<ShardId> = self.context.shards.shards.iter().filter_map(releasing).collect();
        for shard in releasing {
            self.finish_release(shard);
        }
    }

    /// Drops the conversations of a shard that have nothing in flight; the release is done when none is left.
    fn finish_release(&mut self, shard: ShardId) {
        let Some(Shard::Releasing { unsettled, .. }) = self.context.shards.shards.get_mut(&shard) else { return };
        let mut left = std::mem::take(unsettled);
        left.retain(|id| {
            let stays =
                matches!(self.conversations.get(id), Some(Slot::Open(conversation)) if !conversation.is_settled());
            if !stays {
                self.drop_conversation(id);
            }
            stays
        });
        match self.context.shards.shards.remove(&shard) {
            Some(Shard::Releasing { done, unsettled: _ }) if left.is_empty() => {
                let _ = done.send(());
            }
            Some(Shard::Releasing { done, .. }) => {
                self.context.shards.shards.insert(shard, Shard::Releasing { done, unsettled: left });
            }
            Some(other) => {
                self.context.shards.shards.insert(shard, other);
            }
            None => {}
        }
    }

    /// A conversation has nothing in flight any more; its shard may wait for that.
    pub fn settled(&mut self, id: &ConversationId) {
        let shard = self.context.cluster.shard_of(id);
        if matches!(self.context.shards.shards.get(&shard), Some(Shard::Releasing { .. })) {
            self.finish_release(shard);
        }
    }

    /// Whether any release waits for conversations to settle.
    pub fn has_releases(&self) -> bool {
        self.context.shards.shards.values().any(|shard| matches!(shard, Shard::Releasing { .. }))
    }

    /// Takes a conversation out of memory. What was not committed is answered `unavailable`, or returned to its gateway.
    pub fn drop_conversation(&mut self, id: &ConversationId) {
        let Some(slot) = self.conversations.remove(id) else { return };
        match slot {
            Slot::Opening { waiting, .. } | Slot::Raising { waiting, .. } => {
                waiting.into_iter().for_each(|request| self.context.give_back(*id, request));
            }
            Slot::Open(mut conversation) => self.context.drop_speculative(&mut conversation),
        }
    }

    /// The shard's claim has a greater epoch now; the conversation that asked for it is opened again.
    pub fn epoch_raised(&mut self, id: ConversationId, raised: Option<Claim>) {
        let shard = self.context.cluster.shard_of(&id);
        let Some(claim) = raised else { return self.shard_lost(shard) };
        self.context.cluster.metrics.epochs_raised.increment(1);
        self.context.left_bursts_stay(&claim);
        self.context.shards.raise(shard, claim);
        if let Some(Slot::Raising { waiting, .. }) = self.conversations.remove(&id) {
            // Also if only what is dropped when much waits wants it: its head row may be older than its log, so it keeps its place.
            self.open_later(id);
            for request in waiting {
                self.request(id, request);
            }
        }
    }
}

impl Context {
    /// The shards, in words.
    pub fn describe_shards(&self) -> Vec<(ShardId, String)> {
        let state = |shard: &Shard| match shard {
            Shard::Claimed { epoch, parked } => format!("claimed under {epoch:?}, {} wait", parked.len()),
            Shard::Active { claim, .. } => format!("served under {:?}", claim.epoch),
            Shard::Refused => "refused".to_owned(),
            Shard::Releasing { unsettled, .. } => {
                format!("released, {} conversations are not settled", unsettled.len())
            }
        };
        self.shards.shards.iter().map(|(id, shard)| (*id, state(shard))).collect()
    }

    /// Answers a request that this router cannot handle (any more).
    pub fn give_back(&mut self, id: ConversationId, request: Request) {
        match request {
            Request::Send { caller, send, answer } => match answer {
                super::waiting::SendAnswer::Session { attempt } => {
                    self.return_send(&caller, id, send.client_message_id, attempt);
                }
                super::waiting::SendAnswer::Reply(reply_to) => self.cluster.answer(reply_to, Err(unavailable())),
            },
            Request::Effect { reply_to, .. } | Request::Call { reply_to, .. } => {
                self.cluster.answer(reply_to, Err(unavailable()));
            }
            Request::Head { answer, .. } => {
                let _ = answer.send(super::heads::Draft::unavailable(id));
            }
            Request::Signal { .. } | Request::Received { .. } => {}
        }
    }

    /// Tells a gateway to keep a send and try the conversation's owner.
    pub fn return_send(&mut self, caller: &Caller, id: ConversationId, client_message_id: bytes::Bytes, attempt: u64) {
        let Some(key) = &caller.session else { return };
        let (session_id, conversation_id) = (key.session.0, id.to_bytes());
        let returned = v1::SendReturned { session_id, conversation_id, client_message_id, attempt };
        self.tell_session(key, ToGateway::SendReturned(returned));
    }

    /// A gateway's input for a shard that is not active here.
    pub fn refuse_gateway(&mut self, input: GatewayInput) {
        match input {
            GatewayInput::Send { caller, conversation, attempt, send } => {
                self.return_send(&caller, conversation, send.client_message_id, attempt);
            }
            GatewayInput::Open { link, open, .. } => {
                link.forget_opening(im_proto::SessionId(open.session_id));
                let refused = v1::SessionRefused { session_id: open.session_id, status: Some(unavailable()) };
                link.send(vec![v1::RouterMessage { message: Some(ToGateway::Refused(refused)) }]);
            }
            GatewayInput::Announce { caller, .. } => {
                let shard = self.cluster.shard_of(&caller.self_id);
                if !self.shards.announced_early(shard, caller.clone()) {
                    self.come_again(&caller);
                }
            }
            GatewayInput::Close { caller } => self.shards.forget_early(|early| early.session == caller.session),
            // The gateway renews again at the owner; a signal is worth nothing later.
            GatewayInput::Renew { .. } | GatewayInput::Signal { .. } | GatewayInput::Received { .. } => {}
        }
    }

    /// Parks an answerable request, or refuses it.
    pub fn refuse(&mut self, reply_to: ReplyTo) {
        self.cluster.answer(reply_to, Err(unavailable()));
    }
}
