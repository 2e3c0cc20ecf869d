//! Api calls at the conversation that answers them.

use im_proto::{StatusCode, UserId, body, limits, method::Method, v1};
use prost::Message as _;

use super::{
    Context, Worker,
    waiting::{Request, SendAnswer, SendRequest},
};
use crate::{
    api,
    conversation::Conversation,
    message::{Call, ReplyTo},
};

impl Worker {
    /// A call for one of this worker's conversations.
    pub fn take_call(&mut self, call: Call, reply_to: ReplyTo) {
        if matches!(call.method, Method::DeviceList | Method::DeviceKick) {
            return self.context.device_call(call, reply_to);
        }
        match api::conversation_of(&self.context.cluster, &call.caller, call.method, &call.request) {
            Ok(id) => self.request(id, Request::Call { call, reply_to }),
            Err(status) => self.context.cluster.answer(reply_to, Err(status.to_status())),
        }
    }
}

impl Context {
    /// Handles a call in its open conversation.
    pub fn call(&mut self, conversation: &mut Conversation, call: Call, reply_to: ReplyTo) {
        self.cluster.metrics.calls.increment(1);
        let handled = self.try_call(conversation, call, reply_to);
        if let Err(reply_to) = handled {
            self.cluster.metrics.calls_refused.increment(1);
            self.cluster.answer(reply_to, Err(StatusCode::Malformed.to_status()));
        }
    }

    /// Gives `reply_to` back if the request cannot be decoded or breaks a rule of its form.
    fn try_call(&mut self, conversation: &mut Conversation, call: Call, reply_to: ReplyTo) -> Result<(), ReplyTo> {
        macro_rules! decode {
            ($message:ty) => {
                match <$message>::decode(call.request.clone()) {
                    Ok(request) => request,
                    Err(_) => return Err(reply_to),
                }
            };
        }
        match call.method {
            Method::MessageSend => return self.call_send(conversation, &call, reply_to),
            Method::MessageHistory => {
                let request = decode!(v1::HistoryRequest);
                self.history(conversation, &call.caller, &request, reply_to);
            }
            Method::ConversationSync => {
                let request = decode!(v1::SyncRequest);
                self.sync(conversation, &call.caller, request, reply_to);
            }
            Method::ConversationMarkRead => {
                let request = decode!(v1::MarkReadRequest);
                self.mark_read(conversation, &call.caller.user, request.seq, reply_to);
            }
            Method::ConversationSignal => {
                let request = decode!(v1::SignalRequest);
                self.call_signal(conversation, call.caller, request, reply_to);
            }
            Method::PresenceRead => {
                let request = decode!(v1::PresenceReadRequest);
                return self.presence(conversation, &call.caller, &request, reply_to);
            }
            Method::ChannelCreate => {
                let request = decode!(v1::ChannelCreateRequest);
                self.channel_create(conversation, call, request, reply_to);
            }
            Method::ChannelSubscribe => {
                let request = decode!(v1::ChannelSubscribeRequest);
                return self.channel_subscribe(conversation, call, request, reply_to);
            }
            Method::ChannelUnsubscribe => {
                let request = decode!(v1::ChannelUnsubscribeRequest);
                return self.channel_unsubscribe(conversation, call, &request, reply_to);
            }
            Method::PresenceSubscribe => {
                let request = decode!(v1::PresenceSubscribeRequest);
                return self.presence_subscribe(conversation, &call.caller, &request, reply_to);
            }
            Method::PresenceSetVisibility => {
                let request = decode!(v1::PresenceSetVisibilityRequest);
                self.presence_set_visibility(conversation, call, &request, reply_to);
            }
            Method::GroupCreate => {
                let request = decode!(v1::GroupCreateRequest);
                self.group_create(conversation, call, request, reply_to);
            }
            Method::GroupInvite => {
                let request = decode!(v1::GroupInviteRequest);
                self.group_invite(conversation, call, &request, reply_to);
            }
            Method::GroupLeave => {
                let request = decode!(v1::GroupLeaveRequest);
                self.group_leave(conversation, call, &request, reply_to);
            }
            Method::GroupMembers => {
                let request = decode!(v1::GroupMembersRequest);
                self.group_members(conversation, &call.caller, &request, reply_to);
            }
            // Answered without a conversation.
            Method::PlacementLocate | Method::DeviceList | Method::DeviceKick => return Err(reply_to),
        }
        Ok(())
    }

    fn call_send(&mut self, conversation: &mut Conversation, call: &Call, reply_to: ReplyTo) -> Result<(), ReplyTo> {
        let Ok(request) = v1::SendRequest::decode(call.request.clone()) else { return Err(reply_to) };
        if let Err(status) = well_formed(&request) {
            self.cluster.metrics.calls_refused.increment(1);
            self.cluster.answer(reply_to, Err(status.to_status()));
            return Ok(());
        }
        let peer = match request.target.and_then(|target| target.target) {
            Some(v1::target::Target::PeerUserId(peer)) => UserId::parse(&peer).ok(),
            _ => None,
        };
        let send = SendRequest {
            peer,
            client_message_id: request.client_message_id,
            body: request.body,
            after: bytes::Bytes::new(),
            known_seq: request.known_seq,
            was_member: false,
        };
        self.send(conversation, call.caller.clone(), send, SendAnswer::Reply(reply_to));
        Ok(())
    }
}

/// What a gateway checks of a `Send`.
fn well_formed(request: &v1::SendRequest) -> Result<(), StatusCode> {
    match request.client_message_id.len() {
        0 => Err(StatusCode::Malformed),
        bytes if bytes > limits::CLIENT_MESSAGE_ID_BYTES_MAX => Err(StatusCode::TooLarge),
        _ => body::validate(&request.body).map_err(|error| error.status()),
    }
}
