//! Drains an outbox: one vectored write for many frames, a flush only when nothing is left.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf as _, Bytes};
use metrics::Histogram;
use tokio::io::AsyncWrite;

use super::outbox::{Bounds, Outbox, Taken};

/// Slices of one vectored write.
const SLICES_MAX: usize = 64;
/// What is copied together for a stream without vectored writes.
const COALESCE_BYTES: usize = 32 * 1024;

thread_local! {
    static COALESCED: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(COALESCE_BYTES));
}

/// What is on its way into the stream.
#[derive(Default)]
pub(crate) struct Writer {
    writing: VecDeque<Bytes>,
    must_flush: bool,
    must_shut_down: bool,
    is_shut_down: bool,
    is_blocked: bool,
    written: u64,
}

/// How a write ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wrote {
    /// Everything is out; the outbox wakes the connection.
    Idle,
    /// The stream takes no more now; it wakes the connection.
    Blocked,
    Broken,
}

impl Writer {
    /// Writes until nothing is left or the stream is full.
    pub fn write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        outbox: &Outbox,
        bounds: Bounds,
        ack_seconds: &Histogram,
        cx: &mut Context<'_>,
    ) -> Wrote {
        self.is_blocked = false;
        loop {
            if self.writing.is_empty() {
                match outbox.take(&mut self.writing, cx.waker(), bounds) {
                    Taken::Some => {}
                    Taken::Nothing => return self.settle(stream, cx),
                    Taken::Closed => {
                        self.must_shut_down = !self.is_shut_down;
                        return self.settle(stream, cx);
                    }
                }
            }
            match poll_write(stream, &self.writing, cx) {
                Poll::Pending => {
                    self.is_blocked = true;
                    return Wrote::Blocked;
                }
                Poll::Ready(Ok(count)) if count > 0 => {
                    self.must_flush = true;
                    self.advance(count);
                    if let Some(since) = outbox.written(count) {
                        ack_seconds.record(since.elapsed());
                    }
                }
                Poll::Ready(_) => return Wrote::Broken,
            }
        }
    }

    fn advance(&mut self, mut count: usize) {
        self.written += u64::try_from(count).unwrap_or(u64::MAX);
        while let Some(front) = self.writing.front_mut() {
            if front.len() > count {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.writing.pop_front();
        }
    }

    /// Pushes what the stream itself may still hold, and ends it after the last frame.
    fn settle<S: AsyncWrite + Unpin>(&mut self, stream: &mut S, cx: &mut Context<'_>) -> Wrote {
        if self.must_flush {
            match Pin::new(&mut *stream).poll_flush(cx) {
                Poll::Pending => return Wrote::Idle,
                Poll::Ready(Ok(())) => self.must_flush = false,
                Poll::Ready(Err(_)) => return Wrote::Broken,
            }
        }
        if self.must_shut_down {
            match Pin::new(stream).poll_shutdown(cx) {
                Poll::Pending => return Wrote::Idle,
                Poll::Ready(Ok(())) => (self.must_shut_down, self.is_shut_down) = (false, true),
                Poll::Ready(Err(_)) => return Wrote::Broken,
            }
        }
        Wrote::Idle
    }

    /// The stream took no more at the last write.
    pub fn is_blocked(&self) -> bool {
        self.is_blocked
    }

    /// Bytes written since the last call, for the metric.
    pub fn take_written(&mut self) -> u64 {
        std::mem::take(&mut self.written)
    }

    /// Gives back what a burst left allocated.
    pub fn trim(&mut self) {
        if self.writing.is_empty() {
            self.writing = VecDeque::new();
        }
    }
}

fn poll_write<S: AsyncWrite + Unpin>(
    stream: &mut S,
    writing: &VecDeque<Bytes>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    let stream = Pin::new(stream);
    if let ([only], []) = writing.as_slices() {
        return stream.poll_write(cx, only);
    }
    if stream.is_write_vectored() {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let count = writing.len().min(SLICES_MAX);
        for (slice, bytes) in slices.iter_mut().zip(writing) {
            *slice = IoSlice::new(bytes);
        }
        return stream.poll_write_vectored(cx, &slices[..count]);
    }
    COALESCED.with_borrow_mut(|run| {
        run.clear();
        for bytes in writing {
            let room = COALESCE_BYTES - run.len();
            run.extend_from_slice(&bytes[..bytes.len().min(room)]);
            if run.len() == COALESCE_BYTES {
                break;
            }
        }
        stream.poll_write(cx, run)
    })
}
