//! What waits to be written to one connection.
//!
//! Bounded by bytes. Live pushes that do not fit are dropped and end in one `Resync`; answers always fit, and whoever lets them pile
//! up to twice the bound is closed. Replies wait apart, in parts that never delay what is live. Whoever fills an outbox wakes the
//! connection at most once until it has been drained: the wakers of a batch are woken together at its end.

use std::{collections::VecDeque, task::Waker};

use bytes::{Bytes, BytesMut};
use im_proto::{frame, limits, status::StatusCode, v1};
use parking_lot::Mutex;
use tokio::time::Instant;
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
    /// `None` if there are none.
    replies: Option<Box<Replies>>,
    /// The frame whose way out is measured; one at a time.
    timed: Option<Box<Timed>>,
    /// Pushes were dropped, and the client was not told yet.
    owes_resync: bool,
    closing: bool,
    /// The connection waits for something to write.
    idle: bool,
    waker: Option<Waker>,
}

/// Replies that wait for their turn.
#[derive(Default)]
struct Replies {
    queue: VecDeque<PendingReply>,
    bytes: usize,
}

struct PendingReply {
    request_id: u32,
    payload: Bytes,
}

/// A frame that is timed until it has left the process.
struct Timed {
    since: Instant,
    /// Up to its last byte.
    bytes_ahead: usize,
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
        self.replies = None;
        self.owes_resync = false;
        self.idle = false;
        self.waker.clone()
    }

    /// The next part of the reply that waited longest; replies take turns.
    fn append_reply_part(&mut self) {
        let Some(replies) = &mut self.replies else { return };
        let Some(mut reply) = replies.queue.pop_front() else { return };
        let length = reply.payload.len().min(limits::REPLY_PART_BYTES_MAX);
        let payload = reply.payload.split_to(length);
        replies.bytes -= length;
        let (request_id, last) = (reply.request_id, reply.payload.is_empty());
        if !last {
            replies.queue.push_back(reply);
        } else if replies.queue.is_empty() {
            self.replies = None;
        }
        self.append(Frame::Reply(v1::Reply { request_id, status: None, payload, last }));
    }
}

impl Outbox {
    pub fn new() -> Self {
        Self { state: Mutex::default() }
    }

    /// Queues an answer or another frame that must not be lost. `Err` is a waker too: the client lets answers pile up, the outbox
    /// was closed. With `since`, [`Self::written`] returns that moment once the frame has left the process, unless another one is
    /// timed already.
    pub fn push(&self, frame: Frame, since: Option<Instant>, bounds: Bounds) -> Result<Option<Waker>, Option<Waker>> {
        let mut state = self.state.lock();
        if state.closing {
            return Ok(None);
        }
        state.append(frame);
        if let (Some(since), None) = (since, &state.timed) {
            state.timed = Some(Box::new(Timed { since, bytes_ahead: state.bytes }));
        }
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
        let replies = state.replies.get_or_insert_default();
        if !replies.queue.is_empty() && replies.bytes + payload.len() > bounds.reply_bytes_max {
            return Err(ReplyTooLarge);
        }
        replies.bytes += payload.len();
        replies.queue.push_back(PendingReply { request_id, payload: payload.clone() });
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
        state.replies = None;
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

    /// That many bytes left the process; the moment that a frame among them is timed from.
    pub fn written(&self, bytes: usize) -> Option<Instant> {
        let mut state = self.state.lock();
        state.bytes = state.bytes.saturating_sub(bytes);
        let timed = state.timed.as_mut()?;
        timed.bytes_ahead = timed.bytes_ahead.saturating_sub(bytes);
        if timed.bytes_ahead > 0 {
            return None;
        }
        state.timed.take().map(|timed| timed.since)
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

#[cfg(test)]
mod tests {
    use bytes::BufMut as _;
    use im_proto::frame::{Decoded, PREFIX_BYTES, decode_server_frame, frame_to_bytes, split_frame};
    use proptest::{collection::vec, prelude::*, test_runner::TestCaseError};

    use super::*;

    const BOUNDS: Bounds =
        Bounds { bytes_max: 100_000, reply_bytes_max: 3 * limits::REPLY_PART_BYTES_MAX, resync_spread_ms: 7 };

    #[derive(Clone, Debug)]
    enum Step {
        Answer { bytes: usize },
        Live { bytes: usize },
        Reply { bytes: usize },
        Take,
        Write { bytes: usize },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0..12_000_usize).prop_map(|bytes| Step::Answer { bytes }),
            6 => (0..12_000_usize).prop_map(|bytes| Step::Live { bytes }),
            1 => (0..2 * limits::REPLY_PART_BYTES_MAX + 9).prop_map(|bytes| Step::Reply { bytes }),
            3 => Just(Step::Take),
            4 => (1..25_000_usize).prop_map(|bytes| Step::Write { bytes }),
        ];
        vec(step, 0..150)
    }

    /// An outbox, and what its bounds and its order say must come out of it.
    #[derive(Default)]
    struct Watched {
        outbox: Outbox,
        pushed: u32,
        /// Answers and live frames that were taken in, in order.
        expected: VecDeque<Frame>,
        /// What is left of each reply, in the order of their turns.
        replies: VecDeque<(u32, Bytes)>,
        /// Pushes were dropped since the last `Resync`.
        owes_resync: bool,
        closed: bool,
        /// Not yet written, and what of it was taken.
        bytes: usize,
        taken: usize,
    }

    impl Default for Outbox {
        fn default() -> Self {
            Self::new()
        }
    }

    impl Watched {
        /// A body that no other frame has.
        fn body(&mut self, bytes: usize) -> Bytes {
            self.pushed += 1;
            let mut body = BytesMut::new();
            body.put_u32(self.pushed);
            body.resize(4 + bytes, b'x');
            body.freeze()
        }

        fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
            match *step {
                Step::Answer { bytes } => {
                    let ack = v1::SendAck { client_message_id: self.body(bytes), ..v1::SendAck::default() };
                    self.answer(Frame::SendAck(ack))?;
                }
                Step::Live { bytes } => {
                    let body = self.body(bytes);
                    self.live(Frame::Message(v1::Message { body, ..v1::Message::default() }))?;
                }
                Step::Reply { bytes } => {
                    let (payload, id) = (self.body(bytes), self.pushed);
                    let waiting: usize = self.replies.iter().map(|(_, payload)| payload.len()).sum();
                    let fits = self.replies.is_empty() || waiting + payload.len() <= BOUNDS.reply_bytes_max;
                    let outcome = self.outbox.push_reply(id, &payload, BOUNDS);
                    prop_assert_eq!(outcome.is_ok(), fits || self.closed);
                    if fits && !self.closed {
                        self.replies.push_back((id, payload));
                    }
                }
                // As the connection does it: the next run when the last one is out.
                Step::Take if self.taken == 0 => {
                    self.take()?;
                }
                Step::Take => {}
                Step::Write { bytes } => self.write(bytes),
            }
            let counted = self.outbox.state.lock().bytes;
            prop_assert!(self.closed || counted == self.bytes, "{} bytes, not {}", counted, self.bytes);
            let part = limits::REPLY_PART_BYTES_MAX + 64;
            prop_assert!(self.closed || counted <= 2 * BOUNDS.bytes_max + part, "{} bytes wait", counted);
            Ok(())
        }

        fn answer(&mut self, frame: Frame) -> Result<(), TestCaseError> {
            let outcome = self.outbox.push(frame.clone(), None, BOUNDS);
            if self.closed {
                prop_assert!(outcome.is_ok());
                return Ok(());
            }
            self.bytes += frame_to_bytes(&v1::ServerFrame::from(frame.clone())).len();
            // It always fits; at twice the bound it is the last one.
            self.expected.push_back(frame);
            self.closed = self.bytes > 2 * BOUNDS.bytes_max;
            prop_assert_eq!(outcome.is_err(), self.closed);
            if self.closed {
                self.replies.clear();
                self.owes_resync = false;
            }
            Ok(())
        }

        fn live(&mut self, frame: Frame) -> Result<(), TestCaseError> {
            let encoded = frame_to_bytes(&v1::ServerFrame::from(frame.clone()));
            let is_dropped = matches!(self.outbox.push_live(&encoded, BOUNDS), Pushed::Dropped);
            if self.closed {
                prop_assert!(!is_dropped);
                return Ok(());
            }
            let fits = !self.owes_resync && self.bytes + encoded.len() <= BOUNDS.bytes_max;
            prop_assert_eq!(is_dropped, !fits, "{} bytes wait", self.bytes);
            if fits {
                self.bytes += encoded.len();
                self.expected.push_back(frame);
            }
            self.owes_resync |= is_dropped;
            Ok(())
        }

        fn write(&mut self, bytes: usize) {
            let bytes = bytes.min(self.taken);
            self.taken -= bytes;
            self.bytes = self.bytes.saturating_sub(bytes);
            assert!(self.outbox.written(bytes).is_none(), "nothing is timed");
        }

        fn take(&mut self) -> Result<Taken, TestCaseError> {
            let mut runs = VecDeque::new();
            let taken = self.outbox.take(&mut runs, Waker::noop(), BOUNDS);
            let mut stream = BytesMut::new();
            runs.iter().for_each(|run| stream.extend_from_slice(run));
            self.taken = stream.len();
            while let Some(payload) = split_frame(&mut stream, usize::MAX).expect("whole frames") {
                let length = PREFIX_BYTES + payload.len();
                let Ok(Decoded::Frame(frame)) = decode_server_frame(payload) else { panic!("a frame") };
                match frame {
                    Frame::Resync(resync) => {
                        prop_assert!(self.owes_resync, "a resync that nothing asks for");
                        prop_assert_eq!(resync.spread_ms, 7);
                        (self.owes_resync, self.bytes) = (false, self.bytes + length);
                    }
                    Frame::Reply(part) => {
                        prop_assert!(self.expected.is_empty(), "a reply delays what is live");
                        self.part(&part)?;
                        self.bytes += length;
                    }
                    Frame::Close(_) => prop_assert!(self.closed && stream.is_empty() && self.expected.is_empty()),
                    frame => prop_assert_eq!(Some(frame), self.expected.pop_front()),
                }
            }
            Ok(taken)
        }

        /// Replies take turns, a part each.
        fn part(&mut self, part: &v1::Reply) -> Result<(), TestCaseError> {
            let (id, mut left) = self.replies.pop_front().expect("a reply waits");
            prop_assert_eq!(part.request_id, id);
            let length = left.len().min(limits::REPLY_PART_BYTES_MAX);
            prop_assert_eq!(&part.payload, &left.split_to(length));
            prop_assert_eq!(part.last, left.is_empty());
            if !part.last {
                self.replies.push_back((id, left));
            }
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn answers_are_never_lost_drops_end_in_one_resync_and_what_waits_is_bounded(steps in steps()) {
            let mut watched = Watched::default();
            for step in &steps {
                watched.step(step)?;
            }
            // Whoever reads again gets everything that was promised.
            loop {
                watched.write(usize::MAX);
                match watched.take()? {
                    Taken::Some => {}
                    taken => {
                        prop_assert_eq!(taken == Taken::Closed, watched.closed);
                        break;
                    }
                }
            }
            prop_assert!(watched.expected.is_empty() && watched.replies.is_empty() && !watched.owes_resync);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_frame_is_timed_until_its_last_byte_is_written_one_at_a_time() {
        let (outbox, since) = (Outbox::new(), Instant::now());
        let pong = |echo| Frame::Pong(v1::Pong { echo });
        let length = frame_to_bytes(&v1::ServerFrame::from(pong("one".into()))).len();
        outbox.push(pong("one".into()), None, BOUNDS).expect("room");
        outbox.push(pong("two".into()), Some(since), BOUNDS).expect("room");
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        outbox.push(pong("six".into()), Some(Instant::now()), BOUNDS).expect("room");
        let mut writing = VecDeque::new();
        assert_eq!(outbox.take(&mut writing, Waker::noop(), BOUNDS), Taken::Some);
        assert_eq!(outbox.written(2 * length - 1), None);
        assert_eq!(outbox.written(1), Some(since));
        assert_eq!(outbox.written(length), None, "the third was not timed");
    }
}
