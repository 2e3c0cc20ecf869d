//! The loop of one generator thread: many connections, one state for all of them.
//!
//! Each connection is one task without a buffer of its own: it reads into the thread's scratch buffer, hands whole frames to the
//! [`Crowd`], asks it for what to write, and writes that at once. Frames of one read are answered by one write. A single thread
//! runs a crowd, so its state needs no lock.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use im_proto::frame::PREFIX_BYTES;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use crate::stream::Stream;

/// Microseconds since the run began; the same origin in all threads of the generator.
pub type Micros = u64;

/// One read; also the most that a connection takes in before others have their turn is a few of these.
const SCRATCH_BYTES: usize = 256 * 1024;
/// Reads of one connection before the others have their turn.
const READS_A_TURN: usize = 4;
/// The greatest frame that a server may send.
const FRAME_BYTES_MAX: usize = im_proto::limits::FRAME_BYTES_MAX;

/// What all connections of a thread are and do.
pub trait Crowd {
    /// A frame came, without its length prefix.
    fn frame(&mut self, connection: usize, payload: &[u8], now: Micros);

    /// Bytes came: hands over every whole frame; the bytes used, or a length that is none. The product's frames, unless the crowd
    /// speaks another protocol.
    fn frames(&mut self, connection: usize, bytes: &[u8], now: Micros) -> Result<usize, usize> {
        each_frame(bytes, |payload| self.frame(connection, payload, now))
    }

    /// Whether the connection is read from at all.
    fn reads(&self, _: usize) -> bool {
        true
    }

    /// Appends what is to be written now; nothing: the connection waits. Called again until it appends nothing.
    fn fill(&mut self, connection: usize, out: &mut Vec<u8>, now: Micros);

    /// Whether the connection shall be closed, once what was filled is written.
    fn wants_close(&self, connection: usize) -> bool;

    /// Who must look at its state again (time passed, a window opened): one call a moment.
    fn tick(&mut self, now: Micros, wake: &mut Vec<usize>);

    /// The task of a connection can be woken by this from any thread.
    fn waker(&mut self, connection: usize, waker: &Waker);
}

/// A thread's crowd with what its tasks share.
pub struct Stage<C> {
    pub crowd: RefCell<C>,
    wakers: RefCell<Vec<Option<Waker>>>,
    scratch: RefCell<Vec<u8>>,
    origin: Instant,
}

/// Why a connection ended.
#[derive(Debug)]
pub enum Ended {
    /// The crowd wanted it.
    Closed,
    /// The server closed it.
    EndOfStream,
    /// It broke.
    Broken(io::Error),
    /// The server sent a length that is none.
    BadLength(usize),
}

/// What a connection keeps between two turns: usually nothing.
#[derive(Default)]
struct Buffers {
    /// The beginning of a frame whose end is still to come.
    partial: Vec<u8>,
    out: Vec<u8>,
    written: usize,
}

impl<C: Crowd> Stage<C> {
    /// A stage for this many connections, with the run's origin of time.
    pub fn new(crowd: C, connections: usize, origin: Instant) -> Rc<Self> {
        Rc::new(Self {
            crowd: RefCell::new(crowd),
            wakers: RefCell::new(vec![None; connections]),
            scratch: RefCell::new(vec![0; SCRATCH_BYTES]),
            origin,
        })
    }

    /// Microseconds since the run began.
    pub fn now(&self) -> Micros {
        u64::try_from(self.origin.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Lets time pass for the crowd.
    pub fn tick(&self) {
        let mut wake = Vec::new();
        self.crowd.borrow_mut().tick(self.now(), &mut wake);
        for connection in wake {
            self.wake(connection);
        }
    }

    /// Has a connection look at its state again.
    pub fn wake(&self, connection: usize) {
        if let Some(waker) = &self.wakers.borrow()[connection] {
            waker.wake_by_ref();
        }
    }

    /// Drives one connection until it ends.
    pub async fn drive(self: &Rc<Self>, connection: usize, stream: &mut Stream) -> Ended {
        let mut buffers = Buffers::default();
        let ended = std::future::poll_fn(|cx| self.poll(connection, stream, &mut buffers, cx)).await;
        self.wakers.borrow_mut()[connection] = None;
        ended
    }

    fn remember(&self, connection: usize, crowd: &mut C, waker: &Waker) {
        let mut wakers = self.wakers.borrow_mut();
        if !wakers[connection].as_ref().is_some_and(|known| known.will_wake(waker)) {
            wakers[connection] = Some(waker.clone());
        }
        crowd.waker(connection, waker);
    }

    fn poll(&self, connection: usize, stream: &mut Stream, buffers: &mut Buffers, cx: &mut Context<'_>) -> Poll<Ended> {
        let mut crowd = self.crowd.borrow_mut();
        self.remember(connection, &mut crowd, cx.waker());
        if crowd.reads(connection)
            && let Poll::Ready(ended) = self.poll_read(connection, stream, buffers, &mut crowd, cx)
        {
            return Poll::Ready(ended);
        }
        let now = self.now();
        loop {
            if buffers.out.is_empty() {
                crowd.fill(connection, &mut buffers.out, now);
                if buffers.out.is_empty() {
                    break;
                }
            }
            match Pin::new(&mut *stream).poll_write(cx, &buffers.out[buffers.written..]) {
                Poll::Ready(Ok(count)) => buffers.written += count,
                Poll::Ready(Err(error)) => return Poll::Ready(Ended::Broken(error)),
                Poll::Pending => break,
            }
            if buffers.written == buffers.out.len() {
                buffers.out.clear();
                buffers.written = 0;
            }
        }
        if let Poll::Ready(Err(error)) = Pin::new(&mut *stream).poll_flush(cx) {
            return Poll::Ready(Ended::Broken(error));
        }
        if buffers.out.is_empty() && crowd.wants_close(connection) {
            return Poll::Ready(Ended::Closed);
        }
        Poll::Pending
    }

    fn poll_read(
        &self,
        connection: usize,
        stream: &mut Stream,
        buffers: &mut Buffers,
        crowd: &mut C,
        cx: &mut Context<'_>,
    ) -> Poll<Ended> {
        let mut scratch = self.scratch.borrow_mut();
        for _ in 0..READS_A_TURN {
            // What is left of the last read goes first, so that every frame lies in one piece.
            let kept = buffers.partial.len();
            if scratch.len() < kept + SCRATCH_BYTES / 2 {
                scratch.resize(kept + SCRATCH_BYTES, 0);
            }
            scratch[..kept].copy_from_slice(&buffers.partial);
            let mut read = ReadBuf::new(&mut scratch[kept..]);
            match Pin::new(&mut *stream).poll_read(cx, &mut read) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Ended::Broken(error)),
                Poll::Ready(Ok(())) if read.filled().is_empty() => return Poll::Ready(Ended::EndOfStream),
                Poll::Ready(Ok(())) => {}
            }
            let filled = kept + read.filled().len();
            let now = self.now();
            match crowd.frames(connection, &scratch[..filled], now) {
                Ok(used) => {
                    buffers.partial.clear();
                    buffers.partial.extend_from_slice(&scratch[used..filled]);
                }
                Err(length) => return Poll::Ready(Ended::BadLength(length)),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Hands over every whole frame; the bytes used, or a length that is none.
pub fn each_frame(bytes: &[u8], mut take: impl FnMut(&[u8])) -> Result<usize, usize> {
    let mut used = 0;
    while let Some(prefix) = bytes[used..].first_chunk::<PREFIX_BYTES>() {
        let length = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
        if length == 0 || length > FRAME_BYTES_MAX {
            return Err(length);
        }
        let start = used + PREFIX_BYTES;
        let Some(payload) = bytes.get(start..start + length) else { break };
        take(payload);
        used = start + length;
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_split_and_a_part_is_left() {
        let bytes = [0, 0, 0, 1, b'a', 0, 0, 0, 2, b'b', b'c', 0, 0, 0, 3, b'd'];
        let mut frames = Vec::new();
        assert_eq!(each_frame(&bytes, |frame| frames.push(frame.to_vec())), Ok(11));
        assert_eq!(frames, [b"a".to_vec(), b"bc".to_vec()]);
    }

    #[test]
    fn lengths_of_zero_and_of_too_much_end_the_connection() {
        assert_eq!(each_frame(&[0, 0, 0, 0], |_| {}), Err(0));
        assert_eq!(each_frame(&[0xff, 0, 0, 0], |_| {}), Err(0xff00_0000));
    }
}
