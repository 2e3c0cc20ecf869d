//! Ephemeral signals: to members only, never stored, no ack, no number.

use std::sync::Arc;

use im_proto::{ConversationId, frame, v1};

use super::{
    Context, Worker, fan_out,
    waiting::{Request, Slot},
};
use crate::{caller::Caller, conversation::Conversation};

impl Worker {
    /// A signal of a client. One to a conversation that is not open opens it: whoever types is about to send.
    pub fn take_signal(&mut self, caller: Arc<Caller>, id: ConversationId, signal: v1::Signal) {
        match self.conversations.get_mut(&id) {
            Some(Slot::Open(conversation)) => self.context.signal(conversation, &caller, signal),
            Some(_) => {}
            None => self.open_for(id, Request::Signal { caller, signal }),
        }
    }
}

impl Context {
    /// Passes a signal on to the other members' sessions.
    pub fn signal(&mut self, conversation: &mut Conversation, caller: &Caller, mut signal: v1::Signal) {
        if !conversation.settled.members.contains_key(&caller.user) {
            return;
        }
        signal.sender = caller.user.to_string();
        signal.target = Some(v1::signal::Target::ConversationId(conversation.id.to_bytes()));
        let frame = v1::ServerFrame { frame: Some(v1::server_frame::Frame::Signal(signal)) };
        fan_out::deliver_frame(self, conversation, &frame::frame_to_bytes(&frame), caller.session.as_ref());
    }
}
