//! What each frame of a client means: checked here, carried out by the session.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use bytes::Bytes;
use im_proto::{ConversationId, StatusCode, UserId, body, frame::Decoded, limits, method::Method, token, v1};
use prost::Message as _;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};
use v1::{client_frame::Frame as ClientFrame, server_frame::Frame};

use super::{Connection, Stage, input::compact};
use crate::{
    gateway::Shared,
    rate::{Bucket, Rate},
    session::{Opening, Work, common_version, failed_reply, refusal},
};

thread_local! {
    static WORK: RefCell<Vec<Work>> = const { RefCell::new(Vec::new()) };
    /// Sends that this worker took, for the choice of those that are timed.
    static SENDS: Cell<u32> = const { Cell::new(0) };
}

/// One send of so many is timed until its acknowledgement is written: enough for a distribution, too few to cost anything.
const TIMED_SENDS: u32 = 64;

/// The worker's list, so that a read does not allocate one.
pub(super) fn borrow_work() -> Vec<Work> {
    WORK.take()
}

/// Gives the empty list back.
pub(super) fn return_work(work: Vec<Work>) {
    WORK.replace(work);
}

fn time_this_send() -> bool {
    let number = SENDS.get();
    SENDS.set(number.wrapping_add(1));
    number.is_multiple_of(TIMED_SENDS)
}

/// What a connection used of its rates.
#[derive(Default)]
pub(super) struct Rates {
    sends: Bucket,
    frames: Bucket,
    bytes: Bucket,
    renewals: Bucket,
    /// Once refused, sends are refused until then: a client that goes on sending would have every second one taken, out of order.
    sends_again_at: Option<Instant>,
    /// It is not read until then.
    paused_until: Option<Instant>,
}

/// The least that a client is told to wait whose send is over a rate.
const SENDS_PAUSE_MIN: Duration = Duration::from_millis(100);
/// Renewals of a session: each costs its user's owner a signature. A client renews once in the lifetime of its token, which is minutes.
const RENEWALS: Rate = Rate::per_ten_seconds(5);
/// How long somebody who asks where to go has to wait over the rate.
const LOCATE_PAUSE: Duration = Duration::from_secs(1);

impl Rates {
    /// Takes one send of the session and of its user; the time to wait if there is none left.
    fn take_send(&mut self, shared: &Shared, user: Option<&UserId>, now: Instant) -> Result<(), Duration> {
        if let Some(again_at) = self.sends_again_at {
            if now < again_at {
                return Err(again_at - now);
            }
            self.sends_again_at = None;
        }
        let (limits, time) = (&shared.limits, shared.limits.time(now));
        let of_session = limits.sends.take(&mut self.sends, time);
        let of_user = of_session.and_then(|()| user.map_or(Ok(()), |user| limits.take_user_send(user, time)));
        let counter =
            if of_session.is_err() { &shared.metrics.limited_sends } else { &shared.metrics.limited_user_sends };
        of_user.map_err(|wait| {
            counter.increment(1);
            let wait = wait.max(SENDS_PAUSE_MIN);
            self.sends_again_at = Some(now + wait);
            wait
        })
    }

    /// Takes one renewal; the time to wait if there is none left.
    fn take_renewal(&mut self, shared: &Shared, now: Instant) -> Result<(), Duration> {
        RENEWALS.take(&mut self.renewals, shared.limits.time(now))
    }

    /// Counts what was read; a connection that read too much rests.
    pub fn count(&mut self, shared: &Shared, frames: u32, bytes: usize, now: Instant) {
        let (limits, time) = (&shared.limits, shared.limits.time(now));
        let of_frames = limits.frames.charge(&mut self.frames, frames.into(), time);
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let of_bytes = limits.bytes.charge(&mut self.bytes, bytes, time);
        if !of_frames.is_zero() {
            shared.metrics.limited_frames.increment(1);
        }
        if !of_bytes.is_zero() {
            shared.metrics.limited_bytes.increment(1);
        }
        let wait = of_frames.max(of_bytes);
        self.paused_until = (!wait.is_zero()).then(|| now + wait);
    }

    pub fn is_paused(&self) -> bool {
        self.paused_until.is_some()
    }

    pub fn resume(&mut self, now: Instant) {
        self.paused_until = self.paused_until.filter(|until| now < *until);
    }

    pub fn resume_at(&self) -> Option<Instant> {
        self.paused_until
    }
}

/// Pings, questions where to go and the `Hello` itself: what a stranger may say before it has said who it is.
const EARLY_FRAMES_MAX: u8 = 32;

/// How far ahead of this clock a client may say that it began to connect. Of two logins of a device the later one stays: one that
/// said a day in the future would keep all others out for that day.
const OPENED_AHEAD_MAX_MS: i64 = 60_000;

/// A frame that does not end the connection, or the status that ends it.
type Verdict = Result<(), v1::Status>;

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// `buffer_bytes` are those of the buffer that it came in.
    pub(super) fn frame(
        &mut self,
        frame: Decoded<ClientFrame>,
        buffer_bytes: usize,
        now: Instant,
        work: &mut Vec<Work>,
    ) -> Verdict {
        let malformed = || Err(StatusCode::Malformed.to_status());
        if self.stage == Stage::Hello {
            let Some(early) = &mut self.early else { return malformed() };
            early.frames += 1;
            if early.frames > EARLY_FRAMES_MAX {
                return malformed();
            }
        }
        let frame = match frame {
            Decoded::Frame(frame) => frame,
            Decoded::Unknown(_) if self.stage == Stage::Hello => return malformed(),
            Decoded::Unknown(field) => {
                self.shared.metrics.frames_unknown.increment(1);
                self.refuse_frame(field, StatusCode::UnknownFrame);
                return Ok(());
            }
        };
        match (self.stage, frame) {
            (_, ClientFrame::Ping(ping)) => self.ping(ping),
            (Stage::Hello, ClientFrame::Hello(hello)) => return self.hello(hello),
            (Stage::Hello | Stage::Opening, ClientFrame::Call(call))
                if Method::from_number(call.method) == Some(Method::PlacementLocate) =>
            {
                self.locate(call.request_id);
            }
            (Stage::Hello | Stage::Opening, _) | (_, ClientFrame::Hello(_)) => return malformed(),
            (_, ClientFrame::Pong(_)) => {}
            (_, ClientFrame::Send(send)) => self.send(send, buffer_bytes, now, work),
            (_, ClientFrame::Call(call)) => work.push(Work::Call(compact(call, buffer_bytes))),
            (_, ClientFrame::Received(received)) => match ConversationId::from_slice(&received.conversation_id) {
                Ok(id) => {
                    let (shard, received) = (self.shared.shards.shard_of(&id), compact(received, buffer_bytes));
                    work.push(Work::Received { shard, received });
                }
                Err(_) => self.refuse_frame(5, StatusCode::Malformed),
            },
            (_, ClientFrame::Signal(signal)) => self.signal(signal, buffer_bytes, work),
            (_, ClientFrame::Renew(renew)) => self.renew(renew.token, now, work),
            (_, ClientFrame::Close(_)) => self.session.outbox.finish(),
        }
        Ok(())
    }

    fn refuse_frame(&self, field: u32, code: StatusCode) {
        self.shared.metrics.frames_refused.increment(1);
        self.push(Frame::Refused(v1::Refused { frame: field, status: Some(code.to_status()) }));
    }

    fn ping(&self, ping: v1::Ping) {
        if ping.echo.len() > limits::PING_ECHO_BYTES_MAX {
            return self.refuse_frame(2, StatusCode::TooLarge);
        }
        self.push(Frame::Pong(v1::Pong { echo: ping.echo }));
    }

    /// For a client that has not said who it is: some gateways, it does not matter which.
    fn locate(&self, request_id: u32) {
        let shared = &self.shared;
        // Only a stranger asks.
        let is_allowed = self
            .early
            .as_ref()
            .is_some_and(|early| shared.locates.take(&shared.environment, early.remote_address.ip()));
        if !is_allowed {
            shared.metrics.limited_locates.increment(1);
            return self.push(failed_reply(request_id, StatusCode::RateLimited.retry_after(LOCATE_PAUSE)));
        }
        let reply = v1::LocateReply {
            endpoints: shared.neighbours.offer(&shared.environment),
            reconnect_base_ms: limits::RECONNECT_BASE_MS,
            reconnect_max_ms: limits::RECONNECT_MAX_MS,
        };
        let payload = reply.encode_to_vec().into();
        self.push(Frame::Reply(v1::Reply { request_id, status: None, payload, last: true }));
    }

    fn hello(&mut self, hello: v1::Hello) -> Verdict {
        let Some(version) = common_version(&hello) else { return Err(StatusCode::WrongVersion.to_status()) };
        let text_max = limits::CLIENT_TEXT_BYTES_MAX;
        if hello.client_name.len() > text_max || hello.client_version.len() > text_max {
            return Err(StatusCode::TooLarge.to_status());
        }
        let verified = self.inspect(&hello.token)?;
        let own_clock = self.shared.environment.clock.now().as_millis();
        let latest = own_clock.saturating_add(OPENED_AHEAD_MAX_MS);
        let opened_at_ms = if hello.opened_at_ms > 0 { hello.opened_at_ms.min(latest) } else { own_clock };
        let open = v1::SessionOpen {
            session_id: self.session.id().0,
            token: hello.token,
            client_name: hello.client_name,
            client_version: hello.client_version,
            remote_address: self.early.as_ref().map(|early| early.remote_address.to_string()).unwrap_or_default(),
            transport: self.session.transport().as_str().to_owned(),
            opened_at_ms,
        };
        let shard = self.shared.shards.shard_of(&self.shared.secret.self_id(&verified.user));
        self.stage = Stage::Opening;
        let opening = Opening { open, version, sent_to: None, sent_under: None };
        self.session.open(&self.shared, verified.user, shard, verified.expires_at, opening);
        Ok(())
    }

    /// Form and expiry; the signature is for the user's owner to check.
    fn inspect(&self, token: &str) -> Result<token::Verified, v1::Status> {
        if token.len() > limits::TOKEN_BYTES_MAX {
            return Err(StatusCode::Unauthenticated.to_status());
        }
        token::inspect(token, self.shared.environment.clock.now()).map_err(|error| {
            tracing::debug!(session = self.session.id().0, %error, "refused a token");
            error.status().to_status()
        })
    }

    fn renew(&mut self, token: String, now: Instant, work: &mut Vec<Work>) {
        let admitted = self.rates.take_renewal(&self.shared, now).map_err(|wait| {
            self.shared.metrics.limited_renewals.increment(1);
            StatusCode::RateLimited.retry_after(wait)
        });
        let refused = match admitted.and_then(|()| self.inspect(&token)) {
            Ok(verified) if Some(&verified.user) == self.session.user() => {
                // Should it end before the present one, the timer looks then whether it was taken.
                self.arm_by(now + self.left(verified.expires_at));
                return work.push(Work::Renew { token, expires_at: verified.expires_at, now });
            }
            Ok(_) => StatusCode::Forbidden.to_status(),
            Err(status) => status,
        };
        let token_expires_at_ms = self.session.expires_at().as_millis();
        self.push(Frame::Renewed(v1::Renewed { status: Some(refused), token_expires_at_ms }));
    }

    fn send(&mut self, send: v1::Send, buffer_bytes: usize, now: Instant, work: &mut Vec<Work>) {
        let (conversation, checked) = match self.check_send(&send) {
            Ok(conversation) => (Some(conversation), Ok(())),
            Err(StatusCode::Internal) => (None, Err(self.shared.mistake("a session without a user sends"))),
            Err(code) => (None, Err(code.to_status())),
        };
        let admitted = checked.and_then(|()| {
            let taken = self.rates.take_send(&self.shared, self.session.user(), now);
            taken.map_err(|wait| StatusCode::RateLimited.retry_after(wait))
        });
        match (conversation, admitted) {
            (Some(conversation), Ok(())) => {
                let shard = self.shared.shards.shard_of(&conversation);
                let send = compact(send, buffer_bytes);
                work.push(Work::Send { conversation, shard, send, timed: time_this_send().then_some(now) });
            }
            (conversation, admitted) => {
                self.shared.metrics.sends_refused.increment(1);
                let status = admitted.err().unwrap_or_else(|| self.shared.mistake("a send without a conversation"));
                // An id that is itself too long is not repeated.
                let known = send.client_message_id.len() <= limits::CLIENT_MESSAGE_ID_BYTES_MAX;
                let id = if known { send.client_message_id } else { Bytes::new() };
                self.push(refusal(&id, conversation, status));
            }
        }
    }

    fn check_send(&self, send: &v1::Send) -> Result<ConversationId, StatusCode> {
        let id = send.client_message_id.len();
        if id == 0 {
            return Err(StatusCode::Malformed);
        }
        if id > limits::CLIENT_MESSAGE_ID_BYTES_MAX || send.after.len() > limits::CLIENT_MESSAGE_ID_BYTES_MAX {
            return Err(StatusCode::TooLarge);
        }
        body::validate(&send.body).map_err(|error| error.status())?;
        match &send.target {
            Some(v1::send::Target::ConversationId(id)) => self.conversation(id),
            Some(v1::send::Target::PeerUserId(peer)) => self.direct(peer),
            None => Err(StatusCode::Malformed),
        }
    }

    fn signal(&self, signal: v1::Signal, buffer_bytes: usize, work: &mut Vec<Work>) {
        use v1::signal::Signal;
        // The owner says who sent it; of a client's own word nothing goes on, however long it is.
        let signal = v1::Signal { sender: String::new(), ..signal };
        match &signal.signal {
            // The server's own.
            Some(Signal::Receipt(_) | Signal::Presence(_)) => return self.refuse_frame(6, StatusCode::Forbidden),
            Some(Signal::Custom(custom)) if custom.r#type.len() + custom.data.len() > limits::SIGNAL_BYTES_MAX => {
                return self.refuse_frame(6, StatusCode::TooLarge);
            }
            Some(Signal::Typing(_) | Signal::Custom(_)) | None => {}
        }
        let conversation = match &signal.target {
            Some(v1::signal::Target::ConversationId(id)) => self.conversation(id),
            Some(v1::signal::Target::PeerUserId(peer)) => self.direct(peer),
            None => Err(StatusCode::Malformed),
        };
        match conversation {
            Ok(conversation) => {
                let shard = self.shared.shards.shard_of(&conversation);
                work.push(Work::Signal { conversation, shard, signal: compact(signal, buffer_bytes) });
            }
            Err(code) => self.refuse_frame(6, code),
        }
    }

    fn conversation(&self, id: &[u8]) -> Result<ConversationId, StatusCode> {
        ConversationId::from_slice(id).map_err(|_| StatusCode::Malformed)
    }

    /// The direct conversation with a peer. Whether the peer exists is not known here.
    fn direct(&self, peer: &str) -> Result<ConversationId, StatusCode> {
        let peer = UserId::parse(peer).map_err(|_| StatusCode::Malformed)?;
        let user = self.session.user().ok_or(StatusCode::Internal)?;
        Ok(self.shared.secret.direct_id(user, &peer))
    }
}
