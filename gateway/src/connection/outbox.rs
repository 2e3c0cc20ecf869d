//! What waits to be written to one connection.
//!
//! Bounded by bytes. Live pushes that do not fit are dropped and end in one `Resync`; answers always fit, and whoever lets them pile
//! up to twice the bound is closed. Replies wait apart, in parts that never delay what is live. Whoever fills an outbox wakes the
//! connection at most once until it has been drained: the wakers of a batch are woken together at its end.

use std::{collections::VecDeque, task::Waker};

use bytes::{Bytes, BytesMut};
use im_proto::{frame, limits, status::StatusCode, v1};
use parking_lot::Mutex;
use v1::server_frame::Frame;

/// The queue of one connection.
pub(crate) struct Outbox {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Whole frames or runs of whole frames.
    queue: VecDeque<Bytes>,
    /// This connection's own small frames, not yet in the queue.
    tail: BytesMut,
    /// Queued or taken, not yet written.
    bytes: usize,
    replies: VecDeque<PendingReply>,
    reply_bytes: usize,
    /// Pushes were dropped, and the client was not told yet.
    owes_resync: bool,
    closing: bool,
    /// The connection waits for something to write.
    idle: bool,
    waker: Option<Waker>,
}

struct PendingReply {
    request_id: u32,
    payload: Bytes,
}

/// The outcome of a live push.
#[derive(Debug)]
pub(crate) enum Pushed {
    /// Wake the connection, if there is a waker.
    Queued(Option<Waker>),
    /// The outbox is over its bound: the client will be told to sync.
    Dropped,
}

/// The bounds of an outbox.
#[derive(Clone, Copy)]
pub(crate) struct Bounds {
    pub bytes_max: usize,
    pub reply_bytes_max: usize,
    pub resync_spread_ms: u32,
}

/// What there is to write.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Some,
    /// Nothing; the waker is registered.
    Nothing,
    /// Nothing, and nothing will come.
    Closed,
}

impl State {
    fn append(&mut self, frame: Frame) {
        let before = self.tail.len();
        frame::encode_frame(&v1::ServerFrame::from(frame), &mut self.tail);
        self.bytes += self.tail.len() - before;
    }

    fn seal_tail(&mut self) {
        if !self.tail.is_empty() {
            let run = self.tail.split().freeze();
            self.queue.push_back(run);
        }
    }

    fn wake(&mut self) -> Option<Waker> {
        if !std::mem::replace(&mut self.idle, false) {
            return None;
        }
        self.waker.clone()
    }

    fn close(&mut self, status: v1::Status) -> Option<Waker> {
        self.append(Frame::Close(v1::Close { status: Some(status) }));
        self.closing = true;
        self.replies.clear();
        self.owes_resync = false;
        self.idle = false;
        self.waker.clone()
    }

    /// The next part of the reply that waited longest; replies take turns.
    fn append_reply_part(&mut self) {
        let Some(mut reply) = self.replies.pop_front() else { return };
        let length = reply.payload.len().min(limits::REPLY_PART_BYTES_MAX);
        let payload = reply.payload.split_to(length);
        self.reply_bytes -= length;
        let last = reply.payload.is_empty();
        self.append(Frame::Reply(v1::Reply { request_id: reply.request_id, status: None, payload, last }));
        if !last {
            self.replies.push_back(reply);
        }
    }
}

impl Outbox {
    pub fn new() -> Self {
        Self { state: Mutex::default() }
    }

    /// Queues an answer or another frame that must not be lost. `Err` is a waker too: the client lets answers pile up, the outbox
    /// was closed.
    pub fn push(&self, frame: Frame, bounds: Bounds) -> Result<Option<Waker>, Option<Waker>> {
        let mut state = self.state.lock();
        if state.closing {
            return Ok(None);
        }
        state.append(frame);
        if state.bytes > bounds.bytes_max.saturating_mul(2) {
            return Err(state.close(StatusCode::Overloaded.to_status()));
        }
        Ok(state.wake())
    }

    /// Queues a shared frame, unless the outbox is over its bound or the client is owed a `Resync`.
    pub fn push_live(&self, frame: &Bytes, bounds: Bounds) -> Pushed {
        let mut state = self.state.lock();
        if state.closing {
            return Pushed::Queued(None);
        }
        if state.owes_resync || state.bytes + frame.len() > bounds.bytes_max {
            state.owes_resync = true;
            return Pushed::Dropped;
        }
        state.seal_tail();
        state.bytes += frame.len();
        state.queue.push_back(frame.clone());
        Pushed::Queued(state.wake())
    }

    /// Queues a reply, to be written in parts. `false` if replies wait already and this one does not fit beside them: the caller
    /// answers `overloaded`.
    pub fn push_reply(&self, request_id: u32, payload: &Bytes, bounds: Bounds) -> Result<Option<Waker>, ReplyTooLarge> {
        let mut state = self.state.lock();
        if state.closing {
            return Ok(None);
        }
        if !state.replies.is_empty() && state.reply_bytes + payload.len() > bounds.reply_bytes_max {
            return Err(ReplyTooLarge);
        }
        state.reply_bytes += payload.len();
        state.replies.push_back(PendingReply { request_id, payload: payload.clone() });
        Ok(state.wake())
    }

    /// Ends the connection after what is queued and a last `Close`. `None` if it is ending already.
    pub fn close(&self, status: v1::Status) -> Option<Option<Waker>> {
        let mut state = self.state.lock();
        if state.closing {
            return None;
        }
        Some(state.close(status))
    }

    /// Ends the connection after what is queued, without a word.
    pub fn finish(&self) {
        let mut state = self.state.lock();
        state.closing = true;
        state.replies.clear();
        state.owes_resync = false;
    }

    pub fn is_closing(&self) -> bool {
        self.state.lock().closing
    }

    /// Moves everything that is queued to `writing`, which is empty; before that a `Resync` that is owed, after all a part of a
    /// reply. Registers the waker.
    pub fn take(&self, writing: &mut VecDeque<Bytes>, waker: &Waker, bounds: Bounds) -> Taken {
        let mut state = self.state.lock();
        match &mut state.waker {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        if state.owes_resync && state.bytes <= bounds.bytes_max / 2 {
            state.owes_resync = false;
            let reason = v1::ResyncReason::SlowConsumer.into();
            state.append(Frame::Resync(v1::Resync { reason, spread_ms: bounds.resync_spread_ms }));
        }
        if state.queue.is_empty() && state.tail.is_empty() {
            state.append_reply_part();
        }
        state.seal_tail();
        if state.queue.is_empty() {
            state.idle = true;
            // Nothing is kept for the next burst: an idle connection is small, and allocating again costs less than a wake-up.
            state.tail = BytesMut::new();
            state.queue = VecDeque::new();
            *writing = VecDeque::new();
            return if state.closing { Taken::Closed } else { Taken::Nothing };
        }
        std::mem::swap(&mut state.queue, writing);
        Taken::Some
    }

    /// That many bytes left the process.
    pub fn written(&self, bytes: usize) {
        let mut state = self.state.lock();
        state.bytes = state.bytes.saturating_sub(bytes);
    }

    /// More waits than the bound: the connection should not read what causes more.
    pub fn is_over(&self, bounds: Bounds) -> bool {
        self.state.lock().bytes > bounds.bytes_max
    }

    /// Gives back what a burst left allocated.
    pub fn trim(&self) {
        let mut state = self.state.lock();
        if state.queue.is_empty() {
            state.queue = VecDeque::new();
        }
        if state.replies.is_empty() {
            state.replies = VecDeque::new();
        }
    }
}

/// The reply does not fit beside those that wait.
#[derive(Debug)]
pub(crate) struct ReplyTooLarge;

/// Wakers of a batch, woken together when it is handled.
#[derive(Default)]
pub(crate) struct Wakers(Vec<Waker>);

impl Wakers {
    pub fn add(&mut self, waker: Option<Waker>) {
        self.0.extend(waker);
    }

    pub fn wake(&mut self) {
        self.0.drain(..).for_each(Waker::wake);
    }
}

impl Drop for Wakers {
    fn drop(&mut self) {
        self.wake();
    }
}
