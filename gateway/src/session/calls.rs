//! Calls: served by the user's owner. A call whose link breaks or whose owner moves is answered `unavailable`; a repeat is the
//! client's to decide.

use std::sync::Arc;

use im_proto::{StatusCode, limits, v1};
use v1::{gateway_message::Message, server_frame::Frame};

use super::{Session, State, gather::Gather};
use crate::{
    connection::outbox::{ReplyTooLarge, Wakers},
    gateway::Shared,
    link::{Link, LinkToken},
};

/// A call without a reply.
pub(super) struct PendingCall {
    /// The gateway's own number: a late reply cannot be taken for that of a newer call with the client's old number.
    number: u32,
    request_id: u32,
    via: LinkToken,
}

impl Session {
    pub(super) fn call(
        &self,
        state: &mut State,
        shared: &Shared,
        link: Option<&Arc<Link>>,
        call: v1::Call,
        gather: &mut Gather,
    ) {
        let refuse = |code: StatusCode| {
            shared.metrics.calls_unavailable.increment(1);
            self.push(shared, failed_reply(call.request_id, code.to_status()), &mut Wakers::default());
        };
        let calls = &mut state.in_flight.get_or_insert_default().calls;
        if calls.len() >= shared.config.calls_in_flight_max {
            return refuse(StatusCode::Overloaded);
        }
        if calls.iter().any(|pending| pending.request_id == call.request_id) {
            return refuse(StatusCode::AlreadyExists);
        }
        let Some(link) = link.filter(|link| link.is_up()) else { return refuse(StatusCode::Unavailable) };
        shared.metrics.calls.increment(1);
        state.last_call = state.last_call.wrapping_add(1);
        let number = state.last_call;
        calls.push(PendingCall { number, request_id: call.request_id, via: link.token() });
        self.present(state, link, gather);
        let call = v1::Call { request_id: number, ..call };
        gather.add(link, Message::Call(v1::SessionCall { session_id: self.id.0, call: Some(call) }));
    }

    /// Answers the calls that no router is going to answer.
    pub(super) fn give_up_calls(
        &self,
        state: &mut State,
        shared: &Shared,
        home: Option<&Arc<Link>>,
        wakers: &mut Wakers,
    ) {
        let Some(in_flight) = &mut state.in_flight else { return };
        let token = home.filter(|link| link.is_up()).map(|link| link.token());
        in_flight.calls.retain(|call| {
            let stays = Some(call.via) == token;
            if !stays {
                shared.metrics.calls_unavailable.increment(1);
                self.push(shared, failed_reply(call.request_id, StatusCode::Unavailable.to_status()), wakers);
            }
            stays
        });
    }

    /// The owner's reply.
    pub fn call_reply(&self, shared: &Shared, from: LinkToken, reply: &v1::CallReply, wakers: &mut Wakers) {
        let mut state = self.lock();
        let Some(in_flight) = &mut state.in_flight else { return };
        let position = in_flight.calls.iter().position(|call| call.number == reply.request_id && call.via == from);
        let Some(position) = position else { return };
        let request_id = in_flight.calls.swap_remove(position).request_id;
        if in_flight.is_empty() && in_flight.kept.capacity() == 0 {
            // One that sends nothing has called once, and may be idle from now on.
            state.in_flight = None;
        }
        drop(state);
        if let Some(status) = reply.status.as_ref().filter(|status| status.code != 0) {
            return self.push(shared, failed_reply(request_id, status.clone()), wakers);
        }
        if reply.in_order && reply.reply.len() <= limits::REPLY_PART_BYTES_MAX {
            // Replies wait apart, where what is live would overtake them.
            let payload = reply.reply.clone();
            return self.push(
                shared,
                Frame::Reply(v1::Reply { request_id, status: None, payload, last: true }),
                wakers,
            );
        }
        match self.outbox.push_reply(request_id, &reply.reply, shared.bounds) {
            Ok(waker) => wakers.add(waker),
            Err(ReplyTooLarge) => {
                self.push(shared, failed_reply(request_id, StatusCode::Overloaded.to_status()), wakers);
            }
        }
    }
}

/// A reply that carries nothing but a status.
pub(crate) fn failed_reply(request_id: u32, status: v1::Status) -> Frame {
    Frame::Reply(v1::Reply { request_id, status: Some(status), payload: bytes::Bytes::new(), last: true })
}
