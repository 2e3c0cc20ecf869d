//! Kept sends: forwarded to the owner of their conversation's shard, and again when it moves, until the owner answers.
//!
//! Per conversation the order of sending is kept. The gateway answers only for what it never forwarded (over a limit, malformed).

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
        Self { conversation, shard, send, via: None, wanted: 0, timed }
    }

    fn message(&self, session: u64) -> Message {
        // The id's bytes are shared with the frame where it carries one.
        let conversation_id = match &self.send.target {
            Some(v1::send::Target::ConversationId(id)) => id.clone(),
            _ => self.conversation.to_bytes(),
        };
        Message::Send(v1::SessionSend { session_id: session, conversation_id, send: Some(self.send.clone()) })
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
        if state.kept.len() >= shared.config.pending_sends_max {
            shared.metrics.sends_refused.increment(1);
            let status = StatusCode::Overloaded.retry_after(OVERLOADED_RETRY);
            let ack = refusal(&kept.send.client_message_id, Some(kept.conversation), status);
            return self.push(shared, ack, &mut Wakers::default());
        }
        shared.metrics.sends.increment(1);
        // Nothing overtakes an older send of the same conversation that waits.
        let behind = state.waiting > 0
            && state.kept.iter().any(|older| older.via.is_none() && older.conversation == kept.conversation);
        match link.filter(|link| !behind && link.is_up()) {
            Some(link) => {
                self.present(state, link, gather);
                gather.add(link, kept.message(self.id.0));
                kept.via = Some(link.token());
            }
            None => state.waiting += 1,
        }
        state.kept.push_back(kept);
    }

    /// Forwards everything that is not where it belongs.
    pub(super) fn send_again(&self, state: &mut State, shared: &Shared, routes: &Routes, gather: &mut Gather) {
        let mut kept = std::mem::take(&mut state.kept);
        for send in &mut kept {
            let Some(link) = routes.owner(send.shard) else { continue };
            let token = link.token();
            if send.via == Some(token) {
                continue;
            }
            send.via = None;
            if link.is_up() {
                shared.metrics.sends_again.increment(1);
                self.present(state, link, gather);
                gather.add(link, send.message(self.id.0));
                send.via = Some(token);
            }
        }
        state.waiting = kept.iter().filter(|send| send.via.is_none()).count();
        state.kept = kept;
    }

    /// An owner's answer.
    pub fn send_result(&self, shared: &Shared, from: LinkToken, ack: &v1::SendAck, wakers: &mut Wakers) {
        let mut state = self.lock();
        let position = state.kept.iter().position(|kept| kept.is(&ack.conversation_id, &ack.client_message_id));
        let Some(position) = position else { return };
        // That it is durable is true whoever says so. A refusal counts only from the owner that has it now.
        if ack.status.is_some() && state.kept[position].via != Some(from) {
            return;
        }
        let kept = state.kept.remove(position);
        if kept.as_ref().is_some_and(|kept| kept.via.is_none()) {
            state.waiting -= 1;
        }
        drop(state);
        shared.metrics.acks.increment(1);
        let since = kept.and_then(|kept| kept.timed);
        self.push_since(shared, Frame::SendAck(ack.clone()), since, wakers);
    }

    /// A router that does not own the shard gave a send back: it is tried again after a pause, or at once when the owner changes.
    pub fn send_returned(&self, shared: &Shared, from: LinkToken, returned: &v1::SendReturned) {
        let mut state = self.lock();
        let state = &mut *state;
        let kept = state
            .kept
            .iter_mut()
            .find(|kept| kept.via == Some(from) && kept.is(&returned.conversation_id, &returned.client_message_id));
        if let Some(kept) = kept {
            kept.via = None;
            state.waiting += 1;
            shared.routing.retry_later(self.id);
        }
    }

    /// A router does not know the session: it is presented, and the send follows.
    pub fn capability_wanted(&self, shared: &Shared, link: &Arc<Link>, wanted: &v1::CapabilityWanted) {
        let from = link.token();
        let mut gather = Gather::default();
        let mut state = self.lock();
        state.presented.retain(|(token, _)| *token != from);
        let mut kept = std::mem::take(&mut state.kept);
        self.present(&mut state, link, &mut gather);
        let send = kept
            .iter_mut()
            .find(|kept| kept.via == Some(from) && kept.is(&wanted.conversation_id, &wanted.client_message_id));
        if let Some(send) = send {
            send.wanted = send.wanted.saturating_add(1);
            if send.wanted <= WANTED_AT_ONCE_MAX {
                gather.add(link, send.message(self.id.0));
            } else {
                send.via = None;
                state.waiting += 1;
                shared.routing.retry_later(self.id);
            }
        }
        state.kept = kept;
        gather.flush();
    }
}
