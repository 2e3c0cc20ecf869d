//! The bodies of a call: a request that can be sent again, and an answer that is watched until its end.

use std::{
    future::Future as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::Frame;
use parking_lot::Mutex;
use tokio::time::Sleep;
use tonic::{Status, body::Body};

use super::{
    health::Outcome,
    members::{InFlight, Members},
};

/// A longer request is sent once.
const REPLAY_BYTES_MAX: usize = 256 << 10;

/// A request body that is handed out to one attempt after the other. What an attempt has taken is kept for the next.
pub(super) struct Tape {
    shared: Arc<Mutex<Recording>>,
}

struct Recording {
    source: Body,
    taken: Vec<Bytes>,
    bytes: usize,
    /// More was taken than is kept.
    lost: bool,
    ended: bool,
    /// The attempt that may read.
    attempt: u32,
}

impl Tape {
    pub(super) fn new(source: Body) -> Self {
        let recording = Recording { source, taken: Vec::new(), bytes: 0, lost: false, ended: false, attempt: 0 };
        Self { shared: Arc::new(Mutex::new(recording)) }
    }

    /// The body from its beginning, for a new attempt. Bodies handed out before end with an error.
    pub(super) fn hand_out(&self) -> Body {
        let mut recording = self.shared.lock();
        recording.attempt += 1;
        let attempt = recording.attempt;
        drop(recording);
        Body::new(HandedOut { shared: self.shared.clone(), attempt, position: 0 })
    }

    /// Whether all of it can be sent again.
    pub(super) fn is_whole(&self) -> bool {
        !self.shared.lock().lost
    }
}

struct HandedOut {
    shared: Arc<Mutex<Recording>>,
    attempt: u32,
    position: usize,
}

impl http_body::Body for HandedOut {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let shared = self.shared.clone();
        let mut recording = shared.lock();
        if recording.attempt != self.attempt {
            return Poll::Ready(Some(Err(Status::cancelled("the call went on elsewhere"))));
        }
        if let Some(bytes) = recording.taken.get(self.position) {
            let frame = Frame::data(bytes.clone());
            self.position += 1;
            return Poll::Ready(Some(Ok(frame)));
        }
        if recording.ended {
            return Poll::Ready(None);
        }
        let frame = match ready!(Pin::new(&mut recording.source).poll_frame(context)) {
            None => {
                recording.ended = true;
                return Poll::Ready(None);
            }
            Some(Err(error)) => {
                recording.lost = true;
                return Poll::Ready(Some(Err(error)));
            }
            Some(Ok(frame)) => frame,
        };
        match frame.data_ref() {
            Some(data) if !recording.lost && recording.bytes + data.len() <= REPLAY_BYTES_MAX => {
                recording.bytes += data.len();
                recording.taken.push(data.clone());
                self.position += 1;
            }
            _ => {
                recording.lost = true;
                recording.taken = Vec::new();
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

/// An answer on its way to the caller: it counts as in flight until its end, ends with the deadline, and tells how the instance is.
pub(super) struct Watched {
    pub(super) body: Body,
    pub(super) deadline: Option<Pin<Box<Sleep>>>,
    pub(super) in_flight: InFlight,
    pub(super) members: Arc<Members>,
    pub(super) told: bool,
}

impl Watched {
    fn tell(&mut self, outcome: Outcome) {
        if !self.told {
            self.told = true;
            self.members.note(&self.in_flight.0, outcome);
        }
    }
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if polled.is_pending() {
            let late = self.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(context).is_ready());
            if late {
                self.tell(Outcome::Failed);
                return Poll::Ready(Some(Err(Status::deadline_exceeded("the answer did not end in time"))));
            }
        }
        let frame = ready!(polled);
        match &frame {
            None => self.tell(Outcome::Answered),
            Some(Err(_)) => self.tell(Outcome::Failed),
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    self.tell(super::outcome_of(trailers));
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use http_body::Body as _;

    use super::*;

    struct Pieces(Vec<&'static [u8]>);

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            let next = (!self.0.is_empty()).then(|| self.0.remove(0));
            Poll::Ready(next.map(|piece| Ok(Frame::data(Bytes::from_static(piece)))))
        }
    }

    async fn next(body: &mut Body) -> Option<Result<Bytes, Status>> {
        let frame = poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await;
        frame.map(|frame| frame.map(|frame| frame.into_data().expect("data")))
    }

    async fn all(mut body: Body) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Some(piece) = next(&mut body).await {
            bytes.extend_from_slice(&piece.expect("no error"));
        }
        bytes
    }

    #[tokio::test]
    async fn a_body_is_the_same_for_each_attempt_wherever_the_one_before_stopped() {
        for taken in 0..4 {
            let tape = Tape::new(Body::new(Pieces(vec![b"one ", b"two ", b"three"])));
            let mut first = tape.hand_out();
            for _ in 0..taken {
                next(&mut first).await;
            }
            let second = tape.hand_out();
            assert!(tape.is_whole());
            assert!(taken == 0 || next(&mut first).await.is_some_and(|piece| piece.is_err()), "the old one is over");
            assert_eq!(all(second).await, b"one two three", "after {taken} pieces");
        }
    }

    #[tokio::test]
    async fn what_is_too_long_to_keep_cannot_be_sent_again() {
        const BIG: &[u8] = &[7; REPLAY_BYTES_MAX];
        let tape = Tape::new(Body::new(Pieces(vec![BIG, b"more"])));
        let mut body = tape.hand_out();
        next(&mut body).await;
        assert!(tape.is_whole());
        assert_eq!(next(&mut body).await.expect("a piece").expect("data"), b"more".as_slice());
        assert!(!tape.is_whole());
        assert!(next(&mut body).await.is_none(), "the attempt itself goes on");
    }
}
