//! Kept sends: forwarded to the owner of their conversation's shard, and again when it moves, until the owner answers.
//!
//! Per conversation the order of sending is kept. The gateway answers only for what it never forwarded (over a limit, malformed).
//!
//! What is forwarded again may come twice to an owner that had it already, and between the two its state may change. Attempts are
//! numbered, and only the answer to the last one can refuse: what an owner does later with an earlier one would contradict it.

use std::{sync::Arc, time::Duration};

use im_proto::{ConversationId, ShardId, StatusCode, v1};
use tokio::time::Instant;
use v1::{gateway_message::Message, server_frame::Frame};

use super::{Session, State, gather::Gather};
use crate::{
    connection::outbox::Wakers,
    gateway::Shared,
    link::{Link, LinkToken},
    routing::Routes,
};

/// A send without an answer.
pub(super) struct KeptSend {
    conversation: ConversationId,
    shard: ShardId,
    send: v1::Send,
    /// Where it went last; `None` while it waits for a link.
    via: Option<LinkToken>,
    /// The number of that attempt.
    attempt: u64,
    /// How often its router asked for the capability.
    wanted: u8,
    /// When it was read, if its way is measured.
    timed: Option<Instant>,
}

/// Beyond this many requests for a capability a send is repeated only after a pause.
const WANTED_AT_ONCE_MAX: u8 = 2;
/// What a client is told that has too many sends on their way.
const OVERLOADED_RETRY: Duration = Duration::from_millis(100);

impl KeptSend {
    pub fn new(conversation: ConversationId, shard: ShardId, send: v1::Send, timed: Option<Instant>) -> Self {
        Self { conversation, shard, send, via: None, attempt: 0, wanted: 0, timed }
    }

    fn message(&self, session: u64) -> Message {
        // The id's bytes are shared with the frame where it carries one.
        let conversation_id = match &self.send.target {
            Some(v1::send::Target::ConversationId(id)) => id.clone(),
            _ => self.conversation.to_bytes(),
        };
        let (send, attempt) = (Some(self.send.clone()), self.attempt);
        Message::Send(v1::SessionSend { session_id: session, conversation_id, send, attempt })
    }

    /// An answer is that to the last attempt. A router of an older release does not number it: then it has to come the same way.
    fn is_answered(&self, from: LinkToken, attempt: u64) -> bool {
        if attempt == 0 { self.via == Some(from) } else { self.via.is_some() && self.attempt == attempt }
    }

    fn is(&self, conversation: &[u8], client_message_id: &[u8]) -> bool {
        self.send.client_message_id == client_message_id && self.conversation.as_bytes() == conversation
    }
}

/// A `SendAck` that refuses.
pub(crate) fn refusal(
    client_message_id: &bytes::Bytes,
    conversation: Option<ConversationId>,
    status: v1::Status,
) -> Frame {
    Frame::SendAck(v1::SendAck {
        client_message_id: client_message_id.clone(),
        conversation_id: conversation.map(ConversationId::to_bytes).unwrap_or_default(),
        status: Some(status),
        ..v1::SendAck::default()
    })
}

impl Session {
    pub(super) fn send(
        &self,
        state: &mut State,
        shared: &Shared,
        link: Option<&Arc<Link>>,
        mut kept: KeptSend,
        gather: &mut Gather,
    ) {
        let in_flight = state.in_flight.get_or_insert_default();
        if in_flight.kept.len() >= shared.config.pending_sends_max {
            shared.metrics.sends_refused.increment(1);
            let status = StatusCode::Overloaded.retry_after(OVERLOADED_RETRY);
            let ack = refusal(&kept.send.client_message_id, Some(kept.conversation), status);
            return self.push(shared, ack, &mut Wakers::default());
        }
        shared.metrics.sends.increment(1);
        // Nothing overtakes an older send of the same conversation that waits.
        let behind = in_flight.waiting > 0
            && in_flight.kept.iter().any(|older| older.via.is_none() && older.conversation == kept.conversation);
        match link.filter(|link| !behind && link.is_up()) {
            Some(link) => {
                self.present(state, link, gather);
                self.forward(&mut state.attempts, link, &mut kept, gather);
            }
            None => in_flight.waiting += 1,
        }
        state.in_flight.get_or_insert_default().kept.push_back(kept);
    }

    fn forward(&self, attempts: &mut u64, link: &Arc<Link>, kept: &mut KeptSend, gather: &mut Gather) {
        *attempts += 1;
        (kept.attempt, kept.via) = (*attempts, Some(link.token()));
        gather.add(link, kept.message(self.id.0));
    }

    /// Forwards everything that is not where it belongs.
    pub(super) fn send_again(&self, state: &mut State, shared: &Shared, routes: &Routes, gather: &mut Gather) {
        let Some(mut in_flight) = state.in_flight.take() else { return };
        for send in &mut in_flight.kept {
            let Some(link) = routes.owner(send.shard) else { continue };
            if send.via == Some(link.token()) {
                continue;
            }
            send.via = None;
            if link.is_up() {
                shared.metrics.sends_again.increment(1);
                self.present(state, link, gather);
                self.forward(&mut state.attempts, link, send, gather);
            }
        }
        in_flight.waiting = in_flight.kept.iter().filter(|send| send.via.is_none()).count();
        state.in_flight = Some(in_flight);
    }

    /// An owner's answer.
    pub fn send_result(&self, shared: &Shared, from: LinkToken, result: &v1::SendResult, wakers: &mut Wakers) {
        let Some(ack) = &result.ack else { return };
        let mut state = self.lock();
        let Some(in_flight) = &mut state.in_flight else { return };
        let position = in_flight.kept.iter().position(|kept| kept.is(&ack.conversation_id, &ack.client_message_id));
        let Some(position) = position else { return };
        // That it is durable is true whoever says so. A refusal counts only of the last attempt, from the owner that has it now.
        if ack.status.is_some() && !in_flight.kept[position].is_answered(from, result.attempt) {
            return;
        }
        let kept = in_flight.kept.remove(position);
        if kept.as_ref().is_some_and(|kept| kept.via.is_none()) {
            in_flight.waiting -= 1;
        }
        drop(state);
        shared.metrics.acks.increment(1);
        let since = kept.and_then(|kept| kept.timed);
        self.push_since(shared, Frame::SendAck(ack.clone()), since, wakers);
    }

    /// A router that does not own the shard gave a send back: it is tried again after a pause, or at once when the owner changes.
    pub fn send_returned(&self, shared: &Shared, from: LinkToken, returned: &v1::SendReturned) {
        let mut state = self.lock();
        let Some(in_flight) = &mut state.in_flight else { return };
        let kept = in_flight
            .kept
            .iter_mut()
            .filter(|kept| kept.is_answered(from, returned.attempt))
            .find(|kept| kept.is(&returned.conversation_id, &returned.client_message_id));
        if let Some(kept) = kept {
            kept.via = None;
            in_flight.waiting += 1;
            shared.routing.retry_later(self.id);
        }
    }

    /// A router does not know the session: it is presented, and the send follows.
    pub fn capability_wanted(&self, shared: &Shared, link: &Arc<Link>, wanted: &v1::CapabilityWanted) {
        let from = link.token();
        let mut gather = Gather::default();
        let mut state = self.lock();
        if state.gone {
            // Shown again, it would stay there for as long as the link.
            return;
        }
        state.presented.retain(|(token, _)| *token != from);
        self.present(&mut state, link, &mut gather);
        let Some(mut in_flight) = state.in_flight.take() else { return gather.flush() };
        let send = in_flight
            .kept
            .iter_mut()
            .filter(|kept| kept.is_answered(from, wanted.attempt))
            .find(|kept| kept.is(&wanted.conversation_id, &wanted.client_message_id));
        if let Some(send) = send {
            send.wanted = send.wanted.saturating_add(1);
            if send.wanted <= WANTED_AT_ONCE_MAX {
                self.forward(&mut state.attempts, link, send, &mut gather);
            } else {
                send.via = None;
                in_flight.waiting += 1;
                shared.routing.retry_later(self.id);
            }
        }
        state.in_flight = Some(in_flight);
        gather.flush();
    }
}
