//! Ephemeral signals: to members only, never stored, no ack, no number; so many a second of each user.

use std::{sync::Arc, time::Duration};

use im_proto::{ConversationId, StatusCode, frame, limits, v1};
use prost::Message as _;

use super::{
    Context, Worker, fan_out,
    waiting::{Request, Slot},
};
use crate::{
    caller::Caller,
    conversation::Conversation,
    message::{AnswerValue, ReplyTo},
};

/// When a signal that is one too many may be tried again.
const SECOND: Duration = Duration::from_secs(1);

impl Worker {
    /// A signal of a client. One to a conversation that is not open opens it: whoever types is about to send.
    pub fn take_signal(&mut self, caller: Arc<Caller>, id: ConversationId, signal: v1::Signal) {
        match self.conversations.get_mut(&id) {
            Some(Slot::Open(conversation)) => self.context.signal(conversation, &caller, signal),
            Some(_) => {}
            None => self.open_for_ephemeral(id, Request::Signal { caller, signal }),
        }
    }
}

impl Context {
    /// A signal of a client; nobody waits for an answer. Past the lease deadline it is dropped: it is worth nothing after a fence read,
    /// and of those that wait for one there may be any number.
    pub fn signal(&mut self, conversation: &mut Conversation, caller: &Caller, signal: v1::Signal) {
        let signal = signal.signal.filter(|_| !self.past_lease());
        let passed = signal.is_some_and(|signal| self.pass_signal(conversation, caller, signal).is_ok());
        if !passed {
            self.cluster.metrics.signals_dropped.increment(1);
        }
    }

    /// A signal by a call.
    pub fn call_signal(
        &mut self,
        conversation: &mut Conversation,
        caller: Arc<Caller>,
        request: v1::SignalRequest,
        reply_to: ReplyTo,
    ) {
        use v1::{signal::Signal, signal_request::Signal as Asked};
        let signal = match request.signal {
            Some(Asked::Typing(typing)) => Signal::Typing(typing),
            Some(Asked::Custom(custom)) => Signal::Custom(custom),
            None => return self.cluster.answer(reply_to, Err(StatusCode::Malformed.to_status())),
        };
        if !self.past_lease() {
            return self.pass_and_answer(conversation, &caller, signal, reply_to);
        }
        // Another owner may have gone on since, with other members.
        let (fence, id) = (self.fence.clone(), conversation.id);
        self.then(async move { fence.clean().await }, move |worker, is_owner| {
            let Worker { context, conversations } = worker;
            match conversations.get_mut(&id) {
                Some(Slot::Open(conversation)) if is_owner => {
                    context.pass_and_answer(conversation, &caller, signal, reply_to);
                }
                _ => context.refuse(reply_to),
            }
        });
    }

    fn pass_and_answer(
        &mut self,
        conversation: &mut Conversation,
        caller: &Caller,
        signal: v1::signal::Signal,
        reply_to: ReplyTo,
    ) {
        let answer = match self.pass_signal(conversation, caller, signal) {
            Ok(()) => Ok(AnswerValue::Reply(v1::SignalReply {}.encode_to_vec().into())),
            Err(StatusCode::RateLimited) => Err(StatusCode::RateLimited.retry_after(SECOND)),
            Err(code) => Err(code.to_status()),
        };
        self.cluster.answer(reply_to, answer);
    }

    /// Passes a signal on to the other members' sessions.
    fn pass_signal(
        &mut self,
        conversation: &mut Conversation,
        caller: &Caller,
        signal: v1::signal::Signal,
    ) -> Result<(), StatusCode> {
        use v1::signal::Signal;
        if !conversation.settled.members.contains_key(&caller.user) {
            // Any number of readers would tell any number of readers.
            return Err(if conversation.is_channel() { StatusCode::Forbidden } else { StatusCode::NotFound });
        }
        match &signal {
            // The server's own.
            Signal::Receipt(_) | Signal::Presence(_) => return Err(StatusCode::Forbidden),
            Signal::Custom(custom) if custom.r#type.len() + custom.data.len() > limits::SIGNAL_BYTES_MAX => {
                return Err(StatusCode::TooLarge);
            }
            Signal::Typing(_) | Signal::Custom(_) => {}
        }
        if !conversation.marks.may_signal(&caller.user, self.now()) {
            return Err(StatusCode::RateLimited);
        }
        let signal = v1::Signal {
            target: Some(v1::signal::Target::ConversationId(conversation.id.to_bytes())),
            sender: caller.user.to_string(),
            signal: Some(signal),
        };
        let frame = v1::ServerFrame { frame: Some(v1::server_frame::Frame::Signal(signal)) };
        fan_out::deliver_frame(self, conversation, &frame::frame_to_bytes(&frame), caller.session.as_ref());
        self.cluster.metrics.signals_passed.increment(1);
        Ok(())
    }
}
