//! A client in the hands of the test.

use bytes::{Bytes, BytesMut};
use im_proto::{
    StatusCode,
    frame::{self, Decoded},
    v1,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use super::{ClientFrame, PATIENCE, ServerFrame};

/// A client that speaks frames, or whatever bytes it likes.
pub struct Client<S> {
    stream: S,
    read: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, read: BytesMut::new() }
    }

    pub async fn send(&mut self, frame: ClientFrame) {
        self.send_bytes(&encode(frame)).await;
    }

    pub async fn send_bytes(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.stream.write_all(bytes)).await.expect("the gateway reads").expect("it is connected");
        self.stream.flush().await.expect("it is connected");
    }

    /// Writes, unless the gateway has closed.
    pub async fn try_send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    /// Writes the same bytes again and again until the gateway closes.
    pub async fn flood(&mut self, bytes: &[u8]) {
        while self.stream.write_all(bytes).await.is_ok() {}
    }

    /// The next frame, or `None` at the end of the stream.
    pub async fn next_or_end(&mut self) -> Option<ServerFrame> {
        loop {
            if let Some(payload) = frame::split_frame(&mut self.read, usize::MAX).expect("well formed") {
                match frame::decode_server_frame(payload).expect("well formed") {
                    Decoded::Frame(frame) => return Some(frame),
                    Decoded::Unknown(field) => panic!("unknown server frame {field}"),
                }
            }
            let read = timeout(PATIENCE, self.stream.read_buf(&mut self.read)).await.expect("a frame in time");
            if read.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    pub async fn next(&mut self) -> ServerFrame {
        self.next_or_end().await.expect("a frame, not the end")
    }

    pub async fn welcome(&mut self) -> v1::Welcome {
        match self.next().await {
            ServerFrame::Welcome(welcome) => welcome,
            other => panic!("expected a welcome, found {other:?}"),
        }
    }

    pub async fn ack(&mut self) -> v1::SendAck {
        match self.next().await {
            ServerFrame::SendAck(ack) => ack,
            other => panic!("expected an ack, found {other:?}"),
        }
    }

    /// The connection ends with this status and nothing after it.
    pub async fn is_closed_with(&mut self, code: StatusCode) {
        match self.next().await {
            ServerFrame::Close(close) => assert_eq!(status_of(close.status.as_ref()), Some(code)),
            other => panic!("expected a close, found {other:?}"),
        }
        assert!(self.next_or_end().await.is_none(), "nothing follows a close");
    }

    /// The connection works: a ping is answered at once.
    pub async fn is_alive(&mut self) {
        self.send(ClientFrame::Ping(v1::Ping { echo: Bytes::from_static(b"alive?") })).await;
        match self.next().await {
            ServerFrame::Pong(pong) => assert_eq!(pong.echo, "alive?"),
            other => panic!("expected a pong, found {other:?}"),
        }
    }
}

pub fn encode(frame: ClientFrame) -> Bytes {
    frame::frame_to_bytes(&v1::ClientFrame::from(frame))
}

pub fn status_of(status: Option<&v1::Status>) -> Option<StatusCode> {
    status.and_then(|status| StatusCode::from_number(status.code))
}
