//! What routers say, handed to the sessions. Effects of one run of batches wake each connection at most once, at its end.

use std::sync::Arc;

use im_proto::{ConversationId, SessionId, v1};
use v1::{RouterMessage, gateway_message, router_message::Message, server_frame::Frame};

use super::{
    Link, LinkToken,
    audiences::{Changed, Found},
};
use crate::{connection::outbox::Wakers, gateway::Shared, session::Session};

pub(super) struct Inbox<'a> {
    shared: &'a Shared,
    link: &'a Arc<Link>,
    token: LinkToken,
    wakers: Wakers,
}

impl<'a> Inbox<'a> {
    pub fn new(shared: &'a Shared, link: &'a Arc<Link>) -> Self {
        Self { shared, link, token: link.token(), wakers: Wakers::default() }
    }

    /// An unknown message of a newer router is ignored: what it may not lose it sends only to gateways that know it.
    pub fn handle(&mut self, message: &RouterMessage) {
        let (shared, token) = (self.shared, self.token);
        match &message.message {
            Some(Message::SendResult(result)) => {
                self.on(result.session_id, |session, wakers| session.send_result(shared, token, result, wakers));
            }
            Some(Message::Deliver(deliver)) => {
                let wakers = &mut self.wakers;
                shared.sessions.for_each(&deliver.session_ids, |session| {
                    // `Welcome` is the first frame. What is committed before it is in the sync that the client begins with.
                    if session.is_live() {
                        session.push_live(shared, &deliver.frame, wakers);
                    }
                });
            }
            Some(Message::CallReply(reply)) => {
                self.on(reply.session_id, |session, wakers| session.call_reply(shared, token, reply, wakers));
            }
            Some(Message::Opened(opened)) => {
                self.on(opened.session_id, |session, wakers| session.opened(shared, token, opened, wakers));
            }
            Some(Message::Refused(refused)) => {
                let status = refused.status.clone();
                self.on(refused.session_id, |session, wakers| session.refused(shared, token, status, wakers));
            }
            Some(Message::Renewed(renewed)) => {
                self.on(renewed.session_id, |session, wakers| session.renewed(shared, token, renewed, wakers));
            }
            Some(Message::Resync(resync)) => self.resync(resync),
            Some(Message::Kick(kick)) => {
                let status = kick.status.clone();
                let status = status.unwrap_or_else(|| shared.mistake("a router ended a session without a status"));
                self.on(kick.session_id, |session, wakers| session.close(shared, status, wakers));
            }
            Some(Message::SendReturned(returned)) => {
                self.on(returned.session_id, |session, _| session.send_returned(shared, token, returned));
            }
            Some(Message::CapabilityWanted(wanted)) => {
                let link = self.link;
                self.on(wanted.session_id, |session, _| session.capability_wanted(shared, link, wanted));
            }
            Some(Message::AudienceSet(audience)) => self.audience(audience),
            Some(Message::AudienceDeliver(deliver)) => self.audience_deliver(deliver),
            Some(Message::Move(sessions)) => self.send_elsewhere(sessions),
            Some(Message::Bound(bound)) => {
                let connections = usize::try_from(bound.connections).unwrap_or(usize::MAX);
                shared.admission.set_bound(connections, shared.environment.clock.since_boot());
            }
            None => {}
        }
    }

    fn audience(&mut self, change: &v1::AudienceSet) {
        let Ok(id) = ConversationId::from_slice(&change.conversation_id) else { return };
        let mut audiences = self.link.audiences.lock();
        match audiences.change(id, change) {
            Changed::Taken => {}
            Changed::Ask => self.ask(id),
            Changed::Repaired => {
                let reason = v1::ResyncReason::LinkLost.into();
                let spread_ms = u32::try_from(self.shared.config.resync_spread_all.as_millis()).unwrap_or(u32::MAX);
                let resync = v1::Resync { reason, spread_ms };
                let (shared, wakers) = (self.shared, &mut self.wakers);
                shared.sessions.for_each(audiences.sessions(&id), |session| tell(shared, session, resync, wakers));
            }
        }
    }

    fn audience_deliver(&mut self, deliver: &v1::AudienceDeliver) {
        let Ok(id) = ConversationId::from_slice(&deliver.conversation_id) else { return };
        let (shared, wakers) = (self.shared, &mut self.wakers);
        let mut audiences = self.link.audiences.lock();
        match audiences.find(id, deliver.version) {
            Found::Sessions(sessions) => shared.sessions.for_each(sessions, |session| {
                if session.is_live() && session.id().0 != deliver.except_session_id {
                    session.push_live(shared, &deliver.frame, wakers);
                }
            }),
            Found::Ask => self.ask(id),
            // Whoever misses this is told when the whole set comes.
            Found::Waits => {}
        }
    }

    fn ask(&self, id: ConversationId) {
        self.shared.metrics.audiences_wanted.increment(1);
        self.link
            .push_one(gateway_message::Message::AudienceWanted(v1::AudienceWanted { conversation_id: id.to_bytes() }));
    }

    fn send_elsewhere(&mut self, sessions: &v1::SessionsMove) {
        let Some(go_away) = &sessions.go_away else { return };
        let (shared, wakers) = (self.shared, &mut self.wakers);
        shared.sessions.for_each(&sessions.session_ids, |session| {
            let own =
                |url: &&String| url.split_once("://").is_some_and(|(scheme, _)| scheme == session.transport().as_str());
            let endpoints = go_away.endpoints.iter().filter(own).cloned().collect();
            shared.metrics.sessions_moved.increment(1);
            session.push(shared, Frame::GoAway(v1::GoAway { endpoints, ..go_away.clone() }), wakers);
        });
    }

    fn on(&mut self, session: u64, act: impl FnOnce(&Session, &mut Wakers)) {
        if let Some(session) = self.shared.sessions.find(SessionId(session)) {
            act(&session, &mut self.wakers);
        }
    }

    fn resync(&mut self, resync: &v1::SessionsResync) {
        let Some(frame) = resync.resync else { return };
        let (shared, wakers) = (self.shared, &mut self.wakers);
        shared.sessions.for_each(&resync.session_ids, |session| tell(shared, session, frame, wakers));
    }
}

fn tell(shared: &Shared, session: &Session, resync: v1::Resync, wakers: &mut Wakers) {
    if session.is_live() {
        shared.metrics.resyncs.increment(1);
        session.push(shared, Frame::Resync(resync), wakers);
    }
}
