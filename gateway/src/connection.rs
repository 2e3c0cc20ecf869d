//! One connection: one task, one loop, whatever carries the bytes.
//!
//! The loop writes what waits, then reads what came, then looks at its timer, and holds no buffer while it waits: the read buffer
//! belongs to the worker, a partial frame to the connection. Everything that came with one read goes to the routers in one push a
//! link; everything that waits goes out in one vectored write.
//!
//! It does not know who a client may write to, nor what is in a body beyond its form.

mod frames;
mod input;
pub(crate) mod outbox;
mod timer;
mod writer;

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use im_proto::{
    StatusCode, Timestamp,
    frame::{FrameError, decode_client_frame},
    v1,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};
use v1::server_frame::Frame;

use crate::{
    addresses::{AddressPlace, Excess},
    admission::{Permit, Refusal},
    gateway::{PeerInfo, Shared},
    session::Session,
};
use frames::Rates;
use input::{Frames, Input, with_scratch};
use outbox::Wakers;
use timer::Timer;
use writer::{Writer, Wrote};

/// What carries a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Tls,
    Quic,
    /// A stream within the process, for tests and simulations.
    Memory,
}

impl Transport {
    pub(crate) const ALL: [Transport; 4] = [Transport::Tcp, Transport::Tls, Transport::Quic, Transport::Memory];

    /// As in `SessionOpen.transport` and in endpoints.
    pub const fn as_str(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Tls => "tls",
            Transport::Quic => "quic",
            Transport::Memory => "memory",
        }
    }

    fn index(self) -> usize {
        Transport::ALL.iter().position(|transport| *transport == self).unwrap_or_default()
    }
}

/// Reads and writes of one poll before other tasks get their turn.
const ROUNDS: usize = 8;

/// A connection as a future that ends with it.
pub(crate) struct Connection<S> {
    shared: Arc<Shared>,
    session: Arc<Session>,
    stream: S,
    input: Input,
    writer: Writer,
    timer: Timer,
    rates: Rates,
    stage: Stage,
    /// Bytes thrown away after the last frame.
    discarded: u32,
    /// Until the client is let in.
    early: Option<Box<Early>>,
    /// Of a connection, or of a farewell.
    _place: Option<Permit>,
    _address: Option<AddressPlace>,
}

/// What is known of a stranger, and not kept of a client that was let in: an idle connection is small.
struct Early {
    remote_address: SocketAddr,
    /// Frames before the `Hello`.
    frames: u8,
    _handshake: Option<Permit>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing but `Hello` and pings.
    Hello,
    /// `Hello` came; the user's owner has not answered.
    Opening,
    Live,
    /// The last frame is queued. What comes in is thrown away: closing a socket with unread input would take the last frame with it.
    Closing,
    /// It is not even told why.
    Over,
}

enum Step {
    Again,
    Wait,
    End,
}

/// No timer is set for longer.
const LONGEST_TIMER: Duration = Duration::from_secs(24 * 60 * 60);

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Takes a stream, or tells it to go elsewhere. `address` is its place among those of its address, judged before.
    pub fn accept(
        shared: Arc<Shared>,
        stream: S,
        peer: PeerInfo,
        address: Result<Option<AddressPlace>, Excess>,
    ) -> Self {
        let metrics = &shared.metrics;
        metrics.accepted[peer.transport.index()].increment(1);
        metrics.connections.increment(1.0);
        let admitted = address.map_err(Refusal::Address).and_then(|address| {
            let place = shared.admission.connection(shared.environment.clock.since_boot())?;
            Ok((place, shared.admission.handshake()?, address))
        });
        let session = Arc::new(Session::new(shared.sessions.next_id(), peer.transport));
        let (place, handshake, address, stage) = match admitted {
            Ok((place, handshake, address)) => {
                shared.sessions.insert(session.clone());
                (Some(place), Some(handshake), address, Stage::Hello)
            }
            Err(refusal) => {
                let farewell = shared.admission.farewell();
                refuse(&shared, &session, refusal, farewell.is_some());
                let stage = if farewell.is_some() { Stage::Hello } else { Stage::Over };
                (farewell, None, None, stage)
            }
        };
        let timer = Timer::start(Instant::now() + shared.config.handshake_deadline);
        Self {
            session,
            stream,
            input: Input::default(),
            writer: Writer::default(),
            timer,
            rates: Rates::default(),
            stage,
            discarded: 0,
            early: Some(Box::new(Early { remote_address: peer.remote_address, frames: 0, _handshake: handshake })),
            _place: place,
            _address: address,
            shared,
        }
    }

    fn step(&mut self, cx: &mut Context<'_>) -> Step {
        if self.stage == Stage::Over {
            return Step::End;
        }
        self.follow_session();
        let (shared, outbox) = (&self.shared, &self.session.outbox);
        match self.writer.write(&mut self.stream, outbox, shared.bounds, &shared.metrics.ack_seconds, cx) {
            Wrote::Broken => return Step::End,
            Wrote::Idle | Wrote::Blocked => {}
        }
        self.shared.metrics.bytes_out.increment(self.writer.take_written());
        // The `Welcome` may have been queued after the look above and written just now: its answer must not be read as too early.
        self.follow_session();
        match self.read(cx) {
            Ok(Poll::Ready(0)) => return Step::End,
            Ok(Poll::Ready(_)) => return Step::Again,
            Ok(Poll::Pending) => {}
            Err(error) => {
                tracing::debug!(session = self.session.id().0, %error, "the connection broke");
                return Step::End;
            }
        }
        self.tick(cx)
    }

    /// What others did to the session: welcomed it, closed it.
    fn follow_session(&mut self) {
        if self.stage == Stage::Opening && self.session.is_live() {
            self.stage = Stage::Live;
            self.early = None;
            let now = Instant::now();
            self.timer.received(now);
            // The first look is for what coming in has left behind.
            self.arm_by(now + self.shared.config.heartbeat_interval);
        }
        if self.stage != Stage::Closing && self.session.outbox.is_closing() {
            if let Some(early) = self.early.as_ref().filter(|_| self.session.is_at_fault() && !self.session.is_live()) {
                let limits = &self.shared.limits;
                limits.addresses.failed(early.remote_address.ip(), limits.time(Instant::now()));
            }
            self.stage = Stage::Closing;
            self.input = Input::default();
            self.timer.arm(Instant::now() + self.shared.config.close_linger);
        }
    }

    /// Bytes read; 0 at the end of the stream.
    fn read(&mut self, cx: &mut Context<'_>) -> io::Result<Poll<usize>> {
        let must_wait =
            self.rates.is_paused() || (self.writer.is_blocked() && self.session.outbox.is_over(self.shared.bounds));
        if must_wait && self.stage != Stage::Closing {
            return Ok(Poll::Pending);
        }
        let limit = match self.stage {
            Stage::Live => self.shared.config.frame_bytes_max,
            _ => self.shared.config.frame_bytes_max_before_hello,
        };
        let (stream, input, is_closing) = (&mut self.stream, &mut self.input, self.stage == Stage::Closing);
        let read = with_scratch(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
            let count = buffer.filled().len();
            let frames = (count > 0 && !is_closing).then(|| input.accept(buffer.filled(), limit));
            Poll::Ready(Ok::<_, io::Error>((count, frames)))
        });
        let Poll::Ready((count, frames)) = read? else { return Ok(Poll::Pending) };
        if is_closing {
            self.discarded = self.discarded.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
            // Whoever sends on and on will not see the last frame anyway.
            let is_enough = self.discarded as usize > self.shared.config.frame_bytes_max;
            return Ok(Poll::Ready(if is_enough { 0 } else { count }));
        }
        if let Some(frames) = frames {
            self.shared.metrics.bytes_in.increment(u64::try_from(count).unwrap_or(u64::MAX));
            self.handle(frames, count);
        }
        Ok(Poll::Ready(count))
    }

    fn handle(&mut self, frames: Frames, bytes: usize) {
        let now = Instant::now();
        self.timer.received(now);
        let mut work = frames::borrow_work();
        let mut count = 0;
        for payload in frames {
            count += 1;
            let decoded = payload.and_then(|payload| Ok((decode_client_frame(payload.bytes)?, payload.buffer_bytes)));
            let outcome = decoded.map_err(|error| refused_stream(&error));
            if let Err(status) = outcome.and_then(|(frame, buffer)| self.frame(frame, buffer, now, &mut work)) {
                self.close(status);
                break;
            }
        }
        self.shared.metrics.frames_in.increment(u64::from(count));
        self.session.apply(&self.shared, &mut work);
        frames::return_work(work);
        self.rates.count(&self.shared, count, bytes, now);
        if self.rates.is_paused() {
            self.rearm();
        }
    }

    /// Queues a frame of this connection's own; the loop writes before it waits, so nobody needs to be woken.
    fn push(&self, frame: Frame) {
        self.session.push(&self.shared, frame, &mut Wakers::default());
    }

    fn close(&self, status: v1::Status) {
        self.session.close(&self.shared, status, &mut Wakers::default());
    }

    fn tick(&mut self, cx: &mut Context<'_>) -> Step {
        if self.timer.poll(cx).is_pending() {
            return Step::Wait;
        }
        let now = Instant::now();
        match self.stage {
            Stage::Closing | Stage::Over => return Step::End,
            Stage::Hello => self.close(StatusCode::TimedOut.to_status()),
            // The client did its part: it is not to blame, and may try again.
            Stage::Opening => self.close(StatusCode::Unavailable.to_status()),
            Stage::Live => self.tick_live(now),
        }
        Step::Again
    }

    fn tick_live(&mut self, now: Instant) {
        self.rates.resume(now);
        self.session.trim();
        self.writer.trim();
        let interval = self.shared.config.heartbeat_interval;
        if self.session.expires_at() <= self.shared.environment.clock.now() {
            return self.close(StatusCode::TokenExpired.to_status());
        }
        if self.timer.is_dead(now, interval) {
            return self.close(StatusCode::TimedOut.to_status());
        }
        if self.timer.must_ask(now, interval) {
            self.push(Frame::Ping(v1::Ping::default()));
        }
        self.rearm();
    }

    /// Sets the timer to whatever comes first.
    fn rearm(&mut self) {
        self.arm_by(self.timer.next_heartbeat(self.shared.config.heartbeat_interval));
    }

    /// Until then, as the wall clock has it; at most a day, for whatever a stranger's token says must fit into a timer, which looks again.
    fn left(&self, until: Timestamp) -> Duration {
        let left_ms = until.as_millis().saturating_sub(self.shared.environment.clock.now().as_millis());
        Duration::from_millis(u64::try_from(left_ms).unwrap_or(0)).min(LONGEST_TIMER)
    }

    /// Sets the timer to that, or to what comes before it.
    fn arm_by(&mut self, mut next: Instant) {
        let now = Instant::now();
        next = next.min(self.timer.next_heartbeat(self.shared.config.heartbeat_interval));
        if let Some(resume_at) = self.rates.resume_at() {
            next = next.min(resume_at);
        }
        let left = self.left(self.session.expires_at());
        if left < next.saturating_duration_since(now) {
            next = now + left;
        }
        self.timer.arm(next);
    }
}

/// The status that ends a stream which cannot go on.
fn refused_stream(error: &FrameError) -> v1::Status {
    match error {
        FrameError::TooLarge { .. } => StatusCode::TooLarge.to_status(),
        FrameError::Empty | FrameError::Malformed(_) => StatusCode::Malformed.to_status(),
    }
}

fn refuse(shared: &Shared, session: &Session, refusal: Refusal, is_told: bool) {
    let metrics = &shared.metrics;
    let (counter, code) = match refusal {
        Refusal::Full => (&metrics.refused_full, StatusCode::Overloaded),
        Refusal::Uneven => (&metrics.refused_uneven, StatusCode::Overloaded),
        Refusal::TooManyHandshakes => (&metrics.refused_handshakes, StatusCode::Overloaded),
        Refusal::Draining => (&metrics.refused_draining, StatusCode::Draining),
        Refusal::Address(excess) => (metrics.limited_address(excess), StatusCode::RateLimited),
    };
    counter.increment(1);
    if !is_told {
        return metrics.dropped.increment(1);
    }
    if let Refusal::Address(excess) = refusal {
        let wait = excess.wait() + shared.environment.jitter(Duration::from_secs(1));
        return session.close(shared, code.retry_after(wait), &mut Wakers::default());
    }
    let reconnect_after = Duration::from_secs(1) + shared.environment.jitter(Duration::from_secs(4));
    let go_away = v1::GoAway {
        reason: Some(code.to_status()),
        reconnect_after_ms: u32::try_from(reconnect_after.as_millis()).unwrap_or(u32::MAX),
        endpoints: shared.neighbours.offer_others(&shared.environment, &shared.instance, session.transport()),
    };
    session.push(shared, Frame::GoAway(go_away), &mut Wakers::default());
    session.close(shared, code.retry_after(reconnect_after), &mut Wakers::default());
}

impl<S: AsyncRead + AsyncWrite + Unpin> Future for Connection<S> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if !matches!(self.stage, Stage::Hello | Stage::Opening) {
            return self.run(cx);
        }
        let shared = self.shared.clone();
        shared.limits.effort.measure(|| self.run(cx))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    fn run(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..ROUNDS {
            match self.step(cx) {
                Step::Again => {}
                Step::Wait => return Poll::Pending,
                Step::End => return Poll::Ready(()),
            }
        }
        // A connection that is always busy has deadlines too.
        if matches!(self.tick(cx), Step::End) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<S> Drop for Connection<S> {
    /// The one place where a connection ends, whatever ended it.
    fn drop(&mut self) {
        self.session.outbox.finish();
        self.shared.sessions.remove(self.session.id());
        self.session.disconnected();
        self.shared.metrics.connections.decrement(1.0);
        if self.session.is_live() {
            self.shared.metrics.sessions.decrement(1.0);
        }
    }
}
