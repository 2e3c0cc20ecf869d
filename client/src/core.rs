//! The client's state and what frames, commands and time do to it, without I/O: bytes to write pile up in `out`, events in the
//! event queue. One task owns it, see `engine`.
//!
//! A session runs so: `Welcome` → sync → sends and fetches. Sends wait for the sync, so that `known_seq` of a first try is as high
//! as the client can know.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use im_proto::{
    ConversationId, StatusCode, UserId,
    environment::Environment,
    frame,
    v1::{self, client_frame, server_frame},
};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    calls::{self, Calls, Purpose, Request},
    catch_up::Search,
    config::{ClientConfig, Endpoint, Target},
    conversation::Conversations,
    error::{ClosedReason, Status},
    event::{Entry, Event, EventSink},
    pending::{Answer, Sends},
    presence::{WatchAnswer, Watching},
    receipts::Receipts,
    reconnect::Elsewhere,
    sync::SyncState,
};

/// If the server names no interval, or a foolish one.
const HEARTBEAT_DEFAULT: Duration = Duration::from_secs(30);
const HEARTBEAT_MIN: Duration = Duration::from_millis(100);
const HEARTBEAT_MAX: Duration = Duration::from_secs(600);
/// After a `GoAway` the client stays this much longer for answers that are due.
const LINGER: Duration = Duration::from_secs(1);

/// What the application wants.
pub(crate) enum Command {
    Send { target: Target, body: Bytes, answer: Answer },
    Call(Request),
    Follow { conversation: ConversationId, have: u64, head: u64, done: oneshot::Sender<()> },
    FollowPeerLater { user: UserId, from: u64, done: oneshot::Sender<()> },
    Unfollow(ConversationId),
    Received { conversation: ConversationId, seq: u64 },
    Signal { target: Target, signal: v1::signal::Signal },
    Watch { users: Vec<UserId>, answer: WatchAnswer },
    Close(oneshot::Sender<()>),
}

/// Why a session is over.
#[derive(Debug)]
pub(crate) enum SessionEnd {
    /// The server said so.
    Status(Status),
    /// The time has come at which the server asked the client to go elsewhere.
    Moved,
    /// The connection is of no use any more.
    Broken(String),
}

/// One connection after its `Welcome`.
struct Session {
    user: UserId,
    window: usize,
    calls: usize,
    /// Of a frame that the server takes.
    frame_bytes: usize,
    heartbeat: Duration,
    /// The sync is done.
    ready: bool,
    last_sent: Instant,
    last_received: Instant,
    last_ping: Instant,
    /// When to leave, and where to go.
    go_away: Option<Elsewhere>,
    renew_at: Option<Instant>,
}

pub(crate) struct Core {
    pub(crate) environment: Environment,
    pub(crate) sends: Sends,
    pub(crate) conversations: Conversations,
    pub(crate) calls: Calls,
    pub(crate) sync: SyncState,
    pub(crate) search: Option<Search>,
    pub(crate) events: EventSink,
    pub(crate) watching: Watching,
    receipts: Receipts,
    receipts_wanted: bool,
    /// Others do not see this user: what would betray that it is there is held back.
    pub(crate) invisible: bool,
    /// The entry of the own log that said so last: the answer to a sync may be older.
    pub(crate) visibility_seq: u64,
    /// Frames to write.
    pub(crate) out: BytesMut,
    session: Option<Session>,
    window: usize,
    heartbeat_longest: Duration,
    answer_timeout: Duration,
    token_is_renewable: bool,
}

impl Core {
    pub(crate) fn new(config: &ClientConfig, events: EventSink) -> Self {
        Self {
            environment: config.environment.clone(),
            sends: Sends::new(config.environment.random.next_u64()),
            conversations: Conversations::new(config.follow_all),
            calls: Calls::default(),
            sync: SyncState::new(),
            search: None,
            events,
            watching: Watching::default(),
            receipts: Receipts::default(),
            receipts_wanted: config.receipts,
            invisible: false,
            visibility_seq: 0,
            out: BytesMut::new(),
            session: None,
            window: config.window.max(1),
            heartbeat_longest: config.heartbeat_longest,
            answer_timeout: config.answer_timeout,
            token_is_renewable: config.token.is_renewable(),
        }
    }

    /// Who this is, while there is a session.
    pub(crate) fn me(&self) -> Option<&UserId> {
        self.session.as_ref().map(|session| &session.user)
    }

    /// Bytes of a request that fits into a frame of this session.
    pub(crate) fn request_bytes_max(&self) -> usize {
        let frame_bytes = self.session.as_ref().map_or(0, |session| session.frame_bytes);
        frame_bytes.saturating_sub(calls::ENVELOPE_BYTES_MAX)
    }

    /// Whether the session's first sync is done.
    pub(crate) fn is_ready(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.ready)
    }

    /// A session begins.
    pub(crate) fn welcome(&mut self, welcome: &v1::Welcome, endpoint: &Endpoint, now: Instant) -> Result<(), Status> {
        let malformed = || Status::from_code(StatusCode::Malformed);
        let user = UserId::parse(&welcome.user_id).map_err(|_| malformed())?;
        let own_log = ConversationId::from_slice(&welcome.self_conversation_id).map_err(|_| malformed())?;
        let told = welcome.limits.as_ref().and_then(|limits| usize::try_from(limits.pending_sends).ok());
        let heartbeat = Duration::from_millis(welcome.heartbeat_interval_ms.into());
        let heartbeat = if heartbeat.is_zero() { HEARTBEAT_DEFAULT } else { heartbeat };
        self.session = Some(Session {
            user: user.clone(),
            window: told.filter(|told| *told > 0).map_or(self.window, |told| told.min(self.window)),
            calls: calls::in_flight_max(welcome.limits.as_ref()),
            frame_bytes: calls::frame_bytes_max(welcome.limits.as_ref()),
            heartbeat: heartbeat.min(self.heartbeat_longest).clamp(HEARTBEAT_MIN, HEARTBEAT_MAX),
            ready: false,
            last_sent: now,
            last_received: now,
            last_ping: now,
            go_away: None,
            renew_at: self.renew_at(welcome.token_expires_at_ms, welcome.server_time_ms, now),
        });
        self.conversations.set_own_log(own_log, welcome.sync_version);
        self.sends.alias(&Target::Me, own_log, now);
        self.sends.alias(&Target::Peer(user.clone()), own_log, now);
        self.conversations.learn_peer(&user, own_log);
        self.sync.want(now);
        self.events.notice(Event::Connected { endpoint: endpoint.to_string() });
        Ok(())
    }

    /// When nine tenths of the token's remaining life are over.
    fn renew_at(&self, expires_at_ms: i64, server_time_ms: i64, now: Instant) -> Option<Instant> {
        let left = u64::try_from(expires_at_ms.saturating_sub(server_time_ms)).ok().filter(|left| *left > 0)?;
        self.token_is_renewable.then(|| now + Duration::from_millis(left / 10 * 9))
    }

    /// The first sync of the session is done.
    pub(crate) fn ready(&mut self) {
        if let Some(session) = &mut self.session {
            session.ready = true;
        }
    }

    /// The session is over: everything unanswered is done again in the next one.
    pub(crate) fn disconnected(&mut self, reason: String) {
        self.out.clear();
        self.sends.disconnected();
        self.calls.disconnected();
        self.conversations.disconnected();
        self.sync.disconnected();
        self.watching.disconnected();
        self.receipts.disconnected(Instant::now());
        self.search = None;
        if self.session.take().is_some() {
            self.events.notice(Event::Disconnected { reason });
        }
    }

    /// The client is over.
    pub(crate) fn close(&mut self, reason: &ClosedReason) {
        self.sends.close(reason);
        self.calls.close(reason);
        self.watching.close(reason);
    }

    /// Does what the application wants, or takes note of it. Gives [`Command::Close`] back.
    pub(crate) fn on_command(&mut self, command: Command) -> Option<oneshot::Sender<()>> {
        match command {
            Command::Send { target, body, answer } => {
                self.sends.push(self.conversations.canonical(target), body, answer);
            }
            Command::Call(request) => self.calls.push(request),
            Command::Follow { conversation, have, head, done } => {
                self.conversations.follow(conversation, have, head);
                let _ = done.send(());
            }
            Command::FollowPeerLater { user, from, done } => {
                self.conversations.follow_peer_later(user, from);
                let _ = done.send(());
            }
            Command::Unfollow(conversation) => self.conversations.unfollow(conversation),
            Command::Received { conversation, seq } => self.receipts.arrived(conversation, seq, Instant::now()),
            Command::Signal { target, signal } => self.signal(target, signal),
            Command::Watch { users, answer } => self.watching.watch(users, answer, Instant::now()),
            Command::Close(done) => return Some(done),
        }
        None
    }

    /// A frame of the server.
    pub(crate) fn on_frame(&mut self, frame: server_frame::Frame, now: Instant) -> Result<(), SessionEnd> {
        if let Some(session) = &mut self.session {
            session.last_received = now;
        }
        match frame {
            server_frame::Frame::Message(message) => {
                if let Some(entry) = Entry::from_wire(message, 0, self.me()) {
                    self.conversations.arrived(entry, &mut self.events);
                    self.apply_own_log(now);
                }
            }
            server_frame::Frame::SendAck(ack) => {
                let outcome = self.sends.answered(ack, now);
                self.stored(outcome, now);
            }
            server_frame::Frame::Reply(reply) => self.on_reply(reply, now),
            server_frame::Frame::Ping(ping) => {
                self.write(client_frame::Frame::Pong(v1::Pong { echo: ping.echo }));
            }
            server_frame::Frame::Pong(_) => {}
            server_frame::Frame::Signal(signal) => match signal.signal {
                Some(v1::signal::Signal::Presence(presence)) => self.watching.told(&signal.sender, presence),
                _ => self.events.notice(Event::Signal(signal)),
            },
            server_frame::Frame::Resync(resync) => {
                let spread = Duration::from_millis(resync.spread_ms.into());
                self.sync.want(now + self.environment.jitter(spread));
            }
            server_frame::Frame::GoAway(go_away) => self.on_go_away(&go_away, now),
            server_frame::Frame::Close(close) => {
                let status = Status::from_wire(close.status).unwrap_or_else(|| Status::from_code(StatusCode::Draining));
                return Err(SessionEnd::Status(status));
            }
            server_frame::Frame::Renewed(renewed) => self.on_renewed(renewed, now),
            server_frame::Frame::Refused(refused) => {
                let status = Status::from_wire(refused.status).map(|status| status.to_string()).unwrap_or_default();
                tracing::warn!(frame = refused.frame, status, "the server refused a frame");
            }
            server_frame::Frame::Welcome(_) => {
                return Err(SessionEnd::Broken("the server sent a second welcome".to_owned()));
            }
        }
        Ok(())
    }

    fn on_reply(&mut self, reply: v1::Reply, now: Instant) {
        let Some((purpose, result)) = self.calls.replied(reply, now) else { return };
        match purpose {
            Purpose::Application(reply) => {
                // The caller may have lost interest.
                let _ = reply.send(result.map_err(crate::error::CallError::Refused));
            }
            Purpose::Sync => self.sync_replied(result, now),
            Purpose::CatchUp(id) => self.caught_up(id, result, now),
            Purpose::Search(lane) => self.search_replied(lane, result, now),
            Purpose::Watch => self.watching_replied(result, now),
        }
    }

    fn on_go_away(&mut self, go_away: &v1::GoAway, now: Instant) {
        if let Some(session) = &mut self.session {
            session.go_away = Some(Elsewhere::from_wire(go_away, now));
        }
    }

    /// Where the server asked the client to go, if it did. It holds whatever ends the session: a quiet one is closed right after
    /// its `GoAway`, before the client would leave by itself.
    pub(crate) fn take_go_away(&mut self) -> Option<Elsewhere> {
        self.session.as_mut().and_then(|session| session.go_away.take())
    }

    fn on_renewed(&mut self, renewed: v1::Renewed, now: Instant) {
        // A refusal is followed by the server's `Close` when the old token expires.
        if renewed.status.as_ref().is_some_and(|status| status.code != 0) {
            return;
        }
        let wall_clock_ms = self.environment.clock.now().as_millis();
        let renew_at = self.renew_at(renewed.token_expires_at_ms, wall_clock_ms, now);
        if let Some(session) = &mut self.session {
            session.renew_at = renew_at;
        }
    }

    /// Whether a new token is due; says so once.
    pub(crate) fn take_renewal(&mut self, now: Instant) -> bool {
        let Some(session) = &mut self.session else { return false };
        session.renew_at.take_if(|at| *at <= now).is_some()
    }

    /// A new token for this session.
    pub(crate) fn renew(&mut self, token: String) {
        self.write(client_frame::Frame::Renew(v1::Renew { token }));
    }

    /// A signal is worth nothing later: without a session it is dropped.
    fn signal(&mut self, target: Target, signal: v1::signal::Signal) {
        use v1::signal::Target as Wire;
        let target = match self.conversations.canonical(target) {
            Target::Conversation(id) => Wire::ConversationId(id.to_bytes()),
            Target::Peer(user) => Wire::PeerUserId(user.to_string()),
            Target::Me => return,
        };
        let betrays = self.invisible && matches!(signal, v1::signal::Signal::Typing(_));
        if self.is_ready() && !betrays {
            let signal = v1::Signal { target: Some(target), sender: String::new(), signal: Some(signal) };
            self.write(client_frame::Frame::Signal(signal));
        }
    }

    /// Takes note of what the application was given, for receipts. One's own log needs none.
    fn note_taken(&mut self, now: Instant) {
        let own_log = self.conversations.own_log();
        for (id, seq) in self.events.take_taken() {
            if self.receipts_wanted && Some(id) != own_log {
                self.receipts.arrived(id, seq, now);
            }
        }
    }

    fn write(&mut self, frame: client_frame::Frame) {
        frame::encode_frame(&v1::ClientFrame::from(frame), &mut self.out);
    }

    /// What time brings: heartbeats, the end of waiting times, the end of a session that does not answer.
    pub(crate) fn on_time(&mut self, now: Instant) -> Result<(), SessionEnd> {
        self.sends.wake(now);
        self.conversations.wake(now);
        let stalled = self.stalled_since();
        let in_flight = self.sends.in_flight();
        let Some(session) = &mut self.session else { return Ok(()) };
        if let Some(Elsewhere { at, .. }) = &session.go_away
            && (now >= *at + LINGER || (now >= *at && in_flight == 0))
        {
            return Err(SessionEnd::Moved);
        }
        if now >= session.dead_at() {
            return Err(SessionEnd::Broken("no heartbeat of the server".to_owned()));
        }
        if stalled.is_some_and(|since| now >= since + self.answer_timeout) {
            return Err(SessionEnd::Broken("the server does not answer".to_owned()));
        }
        if now >= session.ping_at() {
            session.last_ping = now;
            self.write(client_frame::Frame::Ping(v1::Ping::default()));
        }
        Ok(())
    }

    fn stalled_since(&self) -> Option<Instant> {
        let sends = self.sends.stalled_since();
        self.calls.stalled_since().map_or(sends, |calls| Some(sends.map_or(calls, |sends| sends.min(calls))))
    }

    /// Writes whatever may be written now.
    pub(crate) fn pump(&mut self, now: Instant) {
        self.events.flush_notices();
        self.watching.tell(&mut self.events);
        self.note_taken(now);
        let Some(session) = &self.session else { return };
        let (ready, window, calls, frame_bytes) = (session.ready, session.window, session.calls, session.frame_bytes);
        let leaving = session.go_away.as_ref().is_some_and(|elsewhere| now >= elsewhere.at);
        let before = self.out.len();
        self.start_sync(now);
        if ready {
            self.start_search();
            self.start_fetches(now);
            self.start_watching(now);
            if !self.invisible {
                for received in self.receipts.take_due(now) {
                    self.write(client_frame::Frame::Received(received));
                }
            }
        }
        while let Some(call) = self.calls.next_call(calls, frame_bytes, now) {
            self.write(client_frame::Frame::Call(call));
        }
        if ready && !leaving {
            let Self { sends, conversations, out, .. } = self;
            while let Some(send) = sends.next_try(window, now, |target| conversations.head(target)) {
                frame::encode_frame(&v1::ClientFrame::from(client_frame::Frame::Send(send)), out);
            }
        }
        if self.out.len() > before
            && let Some(session) = &mut self.session
        {
            session.last_sent = now;
        }
    }

    /// Whether something can only go on when the application has read events.
    pub(crate) fn wants_room(&self) -> bool {
        self.events.has_waiting_notices()
            || self.watching.has_news()
            || (self.conversations.is_behind() && !self.events.is_roomy())
    }

    /// When [`Self::on_time`] or [`Self::pump`] has something to do.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let session = self.session.as_ref();
        let stalled = self.stalled_since().map(|since| since + self.answer_timeout);
        [
            session.map(Session::ping_at),
            session.map(Session::dead_at),
            session.and_then(|session| session.renew_at),
            session.and_then(|session| self.leave_at(session)),
            stalled.filter(|_| session.is_some()),
            self.sends.next_wake(),
            self.conversations.next_wake(),
            self.sync.due(),
            self.watching.due().filter(|_| self.is_ready()),
            self.receipts.due_at().filter(|_| self.is_ready() && !self.invisible),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn leave_at(&self, session: &Session) -> Option<Instant> {
        let at = session.go_away.as_ref()?.at;
        Some(if self.sends.in_flight() == 0 { at } else { at + LINGER })
    }
}

impl Session {
    fn ping_at(&self) -> Instant {
        self.last_sent.min(self.last_received).max(self.last_ping) + self.heartbeat
    }

    fn dead_at(&self) -> Instant {
        self.last_received + self.heartbeat * 5 / 2
    }
}
