//! From `Hello` to a registered session, and how routers go on knowing it: open at the user's owner, announce to the next one,
//! present to others, renew.

use std::{sync::Arc, time::Duration};

use im_proto::{Epoch, PROTOCOL_VERSIONS, ShardId, StatusCode, Timestamp, UserId, v1};
use prost::Message as _;
use tokio::time::Instant;
use v1::{gateway_message::Message, server_frame::Frame};

use super::{Session, State, gather::Gather};
use crate::{
    config::GatewayConfig,
    connection::outbox::Wakers,
    gateway::Shared,
    link::{Link, LinkToken},
    routing::Routes,
};

/// Between `Hello` and `Welcome`.
pub(crate) struct Opening {
    pub open: v1::SessionOpen,
    /// The version of the protocol that both sides speak.
    pub version: u32,
    pub sent_to: Option<(LinkToken, Arc<Link>)>,
    /// The claim of the owner when it was sent.
    pub sent_under: Option<Epoch>,
}

/// A token that the user's owner has not judged yet. There is one at a time: answers name no token.
pub(super) struct Renewing {
    token: String,
    expires_at: Timestamp,
    asked_at: Instant,
    sent_to: Option<LinkToken>,
}

/// How long a renewal stands in the way of another one. An owner that is just taking its shard over drops what it cannot judge yet.
const RENEWAL_PATIENCE: Duration = Duration::from_secs(10);
/// What a client is told that asks for another one before.
const RENEWAL_RETRY: Duration = Duration::from_secs(1);

impl Renewing {
    pub fn new(token: String, expires_at: Timestamp, asked_at: Instant) -> Self {
        Self { token, expires_at, asked_at, sent_to: None }
    }
}

impl Session {
    /// The client said `Hello` with a token that looks good.
    pub fn open(&self, shared: &Shared, user: UserId, shard: ShardId, expires_at: Timestamp, opening: Opening) {
        // There is one `Hello` a connection; the loop refuses a second one.
        self.user.get_or_init(|| user);
        let mut gather = Gather::default();
        let mut state = self.lock();
        state.shard = Some(shard);
        state.expires_at = expires_at;
        state.opening = Some(Box::new(opening));
        // The version first: a change between the two leads to a visit.
        state.version = shared.routing.version();
        let routes = shared.routing.routes();
        self.open_again(&mut state, &routes, &mut gather);
        gather.flush();
    }

    pub(super) fn open_again(&self, state: &mut State, routes: &Routes, gather: &mut Gather) {
        let (Some(opening), Some(shard)) = (&mut state.opening, state.shard) else { return };
        let Some(link) = routes.owner(shard) else { return };
        let token = link.token();
        let is_sent = opening.sent_to.as_ref().is_some_and(|(sent_to, _)| *sent_to == token);
        if is_sent || !link.is_up() {
            return;
        }
        // A former owner may have recorded it, whatever was lost on the way from there.
        if let Some((sent_to, former)) = opening.sent_to.take().filter(|(sent_to, _)| !sent_to.same_link(token)) {
            tracing::debug!(session = self.id.0, from = %former.router, ?sent_to, "the owner moved during the handshake");
            gather.add(&former, Message::Close(v1::SessionClose { session_id: self.id.0 }));
        }
        gather.add(link, Message::Open(opening.open.clone()));
        opening.sent_to = Some((token, link.clone()));
        opening.sent_under = routes.epoch(shard);
    }

    /// The user's owner has recorded the session.
    pub fn opened(&self, shared: &Shared, from: LinkToken, opened: &v1::SessionOpened, wakers: &mut Wakers) {
        let mut state = self.lock();
        let is_asked = |opening: &Opening| opening.sent_to.as_ref().is_some_and(|(token, _)| *token == from);
        if state.gone || !state.opening.as_deref().is_some_and(is_asked) {
            return;
        }
        let Some(opening) = state.opening.take() else { return };
        let identity = opened.identity.clone().unwrap_or_default();
        state.expires_at = Timestamp::from_millis(identity.expires_at_ms);
        state.capability = encoded(opened.capability.as_ref());
        state.registered = Some(from);
        state.registered_under = opening.sent_under;
        state.presented = opening.sent_to.into_iter().collect();
        let welcome = self.welcome(shared, opening.version, opened, &identity);
        // Live before the frame can be seen, so that nothing is refused that the client sends after it.
        self.live.store(true, std::sync::atomic::Ordering::Release);
        shared.metrics.sessions.increment(1.0);
        self.push(shared, welcome, wakers);
        let now_under = state.shard.and_then(|shard| shared.routing.routes().epoch(shard));
        if now_under != state.registered_under {
            // The shard moved while the answer was on its way, perhaps there and back.
            shared.routing.retry_later(self.id);
        }
    }

    fn welcome(&self, shared: &Shared, version: u32, opened: &v1::SessionOpened, identity: &v1::Identity) -> Frame {
        let config = &shared.config;
        let self_id = self.user().map(|user| shared.secret.self_id(user));
        Frame::Welcome(v1::Welcome {
            session_id: self.id.0,
            version,
            server_time_ms: shared.environment.clock.now().as_millis(),
            heartbeat_interval_ms: u32::try_from(config.heartbeat_interval.as_millis()).unwrap_or(u32::MAX),
            limits: Some(limits(config, opened)),
            sync_version: opened.sync_version,
            user_id: identity.user_id.clone(),
            device_id: identity.device_id.clone(),
            platform: identity.platform.clone(),
            token_expires_at_ms: identity.expires_at_ms,
            features: Vec::new(),
            self_conversation_id: self_id.map(|id| id.to_bytes()).unwrap_or_default(),
        })
    }

    /// The user's owner refuses the session. That it cannot answer now is no refusal: it is asked again until the deadline of the
    /// handshake.
    pub fn refused(&self, shared: &Shared, from: LinkToken, status: Option<v1::Status>, wakers: &mut Wakers) {
        let mut state = self.lock();
        let Some(opening) = &mut state.opening else {
            // Asked twice, the shard having moved away and back, the owner's first answer let it in: and by now it does not know it.
            if self.is_live() && state.registered == Some(from) {
                state.registered = None;
                state.presented.retain(|(known, _)| *known != from);
                drop(state);
                shared.routing.retry_later(self.id);
            }
            return;
        };
        if opening.sent_to.as_ref().is_none_or(|(token, _)| *token != from) {
            return;
        }
        opening.sent_to = None;
        let status = status.unwrap_or_else(|| shared.mistake("a router refused a session without a status"));
        if status.code == StatusCode::Unavailable.number() {
            drop(state);
            return shared.routing.retry_later(self.id);
        }
        drop(state);
        self.close(shared, status, wakers);
    }

    /// Makes the session known to the owner that the user's shard has now.
    pub(super) fn register_again(
        &self,
        state: &mut State,
        shared: &Shared,
        routes: &Routes,
        gather: &mut Gather,
        wakers: &mut Wakers,
    ) {
        let home = state.shard.and_then(|shard| Some((routes.owner(shard)?, routes.epoch(shard))));
        let Some((link, under)) = home.filter(|(link, _)| link.is_up()) else { return };
        let token = link.token();
        if state.registered != Some(token) || state.registered_under != under {
            // Under a new owner the router tells the session to sync; what a link lost only this side knows.
            if state.registered.is_some_and(|before| before != token && before.same_link(token)) {
                shared.metrics.resyncs.increment(1);
                let spread_ms = u32::try_from(shared.config.resync_spread_all.as_millis()).unwrap_or(u32::MAX);
                let reason = v1::ResyncReason::LinkLost.into();
                self.push(shared, Frame::Resync(v1::Resync { reason, spread_ms }), wakers);
            }
            (state.registered, state.registered_under) = (Some(token), under);
            // A router that the session was only presented to has not recorded it: it must be announced now. So must one that had
            // the shard before: it has forgotten its sessions.
            state.presented.retain(|(known, _)| *known != token);
            self.present(state, link, gather);
            // So has its router dropped a token that it was asked to judge meanwhile.
            if let Some(renewing) = &mut state.renewing {
                renewing.sent_to = None;
            }
        }
        self.renew_again(state, link, gather);
    }

    /// Makes the session known to a router, once a link: the user's owner records it, others take its word for the sender.
    pub(super) fn present(&self, state: &mut State, link: &Arc<Link>, gather: &mut Gather) {
        let token = link.token();
        if state.presented.iter().any(|(known, _)| *known == token) {
            return;
        }
        state.presented.retain(|(known, link)| !known.same_link(token) && !link.stop.is_cancelled());
        state.presented.push((token, link.clone()));
        let capability = v1::Capability::decode(&state.capability[..]).ok();
        let session_id = self.id.0;
        gather.add(
            link,
            if state.registered == Some(token) {
                Message::Announce(v1::SessionAnnounce { session_id, capability })
            } else {
                Message::Present(v1::SessionPresent { session_id, capability })
            },
        );
    }

    pub(super) fn renew(
        &self,
        state: &mut State,
        shared: &Shared,
        home: Option<&Arc<Link>>,
        renewing: Renewing,
        gather: &mut Gather,
    ) {
        let is_under_way = |known: &Renewing| renewing.asked_at.duration_since(known.asked_at) < RENEWAL_PATIENCE;
        if state.renewing.as_deref().is_some_and(is_under_way) {
            shared.metrics.limited_renewals.increment(1);
            let status = Some(StatusCode::RateLimited.retry_after(RENEWAL_RETRY));
            let token_expires_at_ms = state.expires_at.as_millis();
            let refused = Frame::Renewed(v1::Renewed { status, token_expires_at_ms });
            return self.push(shared, refused, &mut Wakers::default());
        }
        state.renewing = Some(Box::new(renewing));
        if let Some(link) = home.filter(|link| link.is_up()) {
            self.renew_again(state, link, gather);
        }
    }

    fn renew_again(&self, state: &mut State, link: &Arc<Link>, gather: &mut Gather) {
        let Some(renewing) = &mut state.renewing else { return };
        if renewing.sent_to != Some(link.token()) {
            renewing.sent_to = Some(link.token());
            let token = renewing.token.clone();
            gather.add(link, Message::Renew(v1::SessionRenew { session_id: self.id.0, token }));
        }
    }

    /// The user's owner has judged a new token. That it accepts is true whichever token is under way, and known by its expiry; a
    /// refusal is that of the last.
    pub fn renewed(&self, shared: &Shared, from: LinkToken, renewed: &v1::SessionRenewed, wakers: &mut Wakers) {
        let mut state = self.lock();
        let state = &mut *state;
        let asked = state.renewing.as_ref().filter(|renewing| renewing.sent_to == Some(from));
        let expected = asked.map(|renewing| renewing.expires_at);
        let status = renewed.status.clone().filter(|status| status.code != 0);
        let said = renewed.identity.as_ref().map(|identity| Timestamp::from_millis(identity.expires_at_ms));
        let accepted = said.or(expected).filter(|_| status.is_none());
        let is_expected = expected.is_some() && (status.is_some() || accepted == expected);
        let is_of_earlier =
            state.registered == Some(from) && accepted.is_some_and(|accepted| accepted > state.expires_at);
        if !is_expected && !is_of_earlier {
            return;
        }
        if is_expected {
            state.renewing = None;
        }
        if let Some(accepted) = accepted {
            state.expires_at = accepted;
            state.capability = encoded(renewed.capability.as_ref());
            // Other routers hold a capability that ends with the old token.
            for (token, _) in state.presented.iter_mut().filter(|(token, _)| *token != from) {
                *token = token.outdated();
            }
        }
        let token_expires_at_ms = state.expires_at.as_millis();
        self.push(shared, Frame::Renewed(v1::Renewed { status, token_expires_at_ms }), wakers);
    }
}

/// What the gateway enforces, and what the user's owner says that it does.
fn limits(config: &GatewayConfig, opened: &v1::SessionOpened) -> v1::Limits {
    let narrow = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    v1::Limits {
        frame_bytes: narrow(config.frame_bytes_max),
        body_bytes: narrow(im_proto::limits::BODY_BYTES_MAX),
        pending_sends: narrow(config.pending_sends_max),
        calls_in_flight: narrow(config.calls_in_flight_max),
        sends_per_second: config.sends_per_second_max,
        user_sends_per_second: config.user_sends_per_second_max,
        frames_per_second: config.frames_per_second_max,
        bytes_per_second: narrow(config.bytes_per_second_max),
        user_sends_per_ten_seconds: opened.user_sends_per_ten_seconds,
        user_call_cost_per_ten_seconds: opened.user_call_cost_per_ten_seconds,
        address_connects_per_second: config.address_connects_per_second_max,
        address_connections: narrow(config.address_connections_max),
        address_failures_per_second: config.address_failures_per_second_max,
        address_locates_per_second: config.locates_per_second_max,
        connections: narrow(config.connections_max),
        handshakes: narrow(config.handshakes_max),
        handshake_deadline_ms: u32::try_from(config.handshake_deadline.as_millis()).unwrap_or(u32::MAX),
        handshake_cpu_percent: narrow(config.handshake_cpu_percent),
        outbox_bytes: narrow(config.outbox_bytes_max),
        reply_bytes: narrow(config.reply_bytes_max),
    }
}

fn encoded(capability: Option<&v1::Capability>) -> Box<[u8]> {
    capability.map(|capability| capability.encode_to_vec().into_boxed_slice()).unwrap_or_default()
}

/// The version to speak with a client, if there is a common one.
pub(crate) fn common_version(hello: &v1::Hello) -> Option<u32> {
    let (min, max) = PROTOCOL_VERSIONS;
    let highest = hello.version_max.min(max);
    (hello.version_min <= hello.version_max && highest >= hello.version_min.max(min)).then_some(highest)
}
