//! Frames over a byte stream: reads what came, writes what is due, both in one poll of one task.
//!
//! It does not know what frames mean, and has no timers; heartbeats are the caller's.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use im_proto::{
    frame::{self, Decoded, FrameError},
    limits, v1,
};
use tokio::io::{AsyncWrite as _, AsyncWriteExt as _};
use tokio_util::io::poll_read_buf;

use crate::dial::Stream;

/// The read buffer grows from the first to the second size while reads fill it: an idle connection stays small.
const READ_BYTES_MIN: usize = 4 * 1024;
const READ_BYTES_MAX: usize = 64 * 1024;

/// Why a connection is at its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error("the server closed the connection")]
    Ended,
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    #[error("the server broke the protocol: {0}")]
    Frame(#[from] FrameError),
}

pub(crate) struct Connection {
    stream: Stream,
    input: BytesMut,
    read_bytes: usize,
    unflushed: bool,
}

impl Connection {
    pub(crate) fn new(stream: Stream) -> Self {
        Self { stream, input: BytesMut::new(), read_bytes: READ_BYTES_MIN, unflushed: false }
    }

    /// Writes from `out` while it can and returns when something was read. Cancel-safe.
    pub(crate) async fn exchange(&mut self, out: &mut BytesMut) -> Result<(), ConnectionError> {
        poll_fn(|cx| self.poll_exchange(cx, out)).await
    }

    fn poll_exchange(&mut self, cx: &mut Context<'_>, out: &mut BytesMut) -> Poll<Result<(), ConnectionError>> {
        // A failing write is not the end yet: what the server said before it closed is read first.
        if let Poll::Ready(Err(error)) = self.poll_write_out(cx, out) {
            out.clear();
            self.unflushed = false;
            if let Poll::Ready(Ok(())) = self.poll_read_in(cx) {
                return Poll::Ready(Ok(()));
            }
            return Poll::Ready(Err(error.into()));
        }
        self.poll_read_in(cx)
    }

    fn poll_write_out(&mut self, cx: &mut Context<'_>, out: &mut BytesMut) -> Poll<io::Result<()>> {
        while !out.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, out))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            out.advance(written);
            self.unflushed = true;
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_read_in(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        if self.input.capacity() - self.input.len() < self.read_bytes / 2 {
            self.input.reserve(self.read_bytes);
        }
        let room = self.input.capacity() - self.input.len();
        let read = ready!(poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.input))?;
        if read == 0 {
            return Poll::Ready(Err(ConnectionError::Ended));
        }
        if read == room {
            self.read_bytes = (self.read_bytes * 2).min(READ_BYTES_MAX);
        }
        Poll::Ready(Ok(()))
    }

    /// The next whole frame of what was read; a frame that this version does not know is skipped.
    pub(crate) fn next_frame(&mut self) -> Result<Option<v1::server_frame::Frame>, ConnectionError> {
        while let Some(payload) = frame::split_frame(&mut self.input, limits::FRAME_BYTES_MAX)? {
            match frame::decode_server_frame(payload)? {
                Decoded::Frame(frame) => return Ok(Some(frame)),
                Decoded::Unknown(field) => tracing::debug!(field, "skipping a frame that this version does not know"),
            }
        }
        Ok(None)
    }

    /// Writes what is left and says goodbye. Bounded: the other side may be gone.
    pub(crate) async fn finish(mut self, mut out: BytesMut) {
        frame::encode_frame(&v1::ClientFrame::from(v1::client_frame::Frame::Close(v1::Close::default())), &mut out);
        let goodbye = async {
            poll_fn(|cx| self.poll_write_out(cx, &mut out)).await?;
            self.stream.shutdown().await?;
            // Until the server has read it all and closes, too.
            loop {
                self.input.clear();
                self.input.reserve(READ_BYTES_MIN);
                let read = poll_fn(|cx| poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.input)).await?;
                if read == 0 {
                    return io::Result::Ok(());
                }
            }
        };
        // Whatever fails here, the connection is gone afterwards.
        let _ = tokio::time::timeout(Duration::from_millis(500), goodbye).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn frames_arrive_whatever_the_pieces() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut connection = Connection::new(Box::new(ours));
        let ping = v1::ServerFrame::from(v1::server_frame::Frame::Ping(v1::Ping { echo: vec![7; 100].into() }));
        let bytes = frame::frame_to_bytes(&ping);
        let server = async move {
            for byte in bytes.iter().chain(bytes.iter()) {
                theirs.write_all(&[*byte]).await.unwrap();
            }
            let mut read = vec![0; 8];
            theirs.read_exact(&mut read).await.unwrap();
            read
        };
        let mut out = BytesMut::from(&b"12345678"[..]);
        let mut frames = Vec::new();
        let client = async {
            while frames.len() < 2 {
                connection.exchange(&mut out).await.unwrap();
                frames.extend(connection.next_frame().unwrap());
            }
        };
        let (read, ()) = tokio::join!(server, client);
        assert_eq!(read, b"12345678");
        assert!(matches!(connection.exchange(&mut out).await, Err(ConnectionError::Ended)));
    }
}
