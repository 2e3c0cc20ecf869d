//! One connection for what a run does before and after its load: creating groups, reading whole histories.

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use im_proto::{
    ConversationId, StatusCode, frame, limits,
    method::Method,
    status::Retry,
    v1::{self, client_frame, server_frame},
};
use prost::Message;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::stream::{Connector, Stream};

/// A server that does not answer within this is broken.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Tries of a call that the server asks to repeat later.
const TRIES: usize = 100;
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// A connection that does one call at a time.
pub struct Control {
    stream: Stream,
    input: BytesMut,
    next_request: u32,
}

impl Control {
    /// Connects and authenticates.
    pub async fn connect(connector: &Connector, address: &str, token: String) -> anyhow::Result<Self> {
        let stream = connector.connect(address).await.with_context(|| format!("connect to {address}"))?;
        let mut control = Self { stream, input: BytesMut::new(), next_request: 1 };
        let hello = v1::Hello {
            version_min: im_proto::PROTOCOL_VERSIONS.0,
            version_max: im_proto::PROTOCOL_VERSIONS.1,
            token,
            client_name: "loadtest".to_owned(),
            client_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..v1::Hello::default()
        };
        control.write(client_frame::Frame::Hello(hello)).await?;
        loop {
            match control.read().await? {
                server_frame::Frame::Welcome(_) => return Ok(control),
                server_frame::Frame::Close(close) => bail!("the server refused the session: {}", text(close.status)),
                _ => {}
            }
        }
    }

    /// Whether the TLS session was resumed; unknown without TLS.
    pub fn resumed(&self) -> Option<bool> {
        self.stream.resumed()
    }

    async fn write(&mut self, member: client_frame::Frame) -> anyhow::Result<()> {
        let bytes = frame::frame_to_bytes(&v1::ClientFrame::from(member));
        self.stream.write_all(&bytes).await?;
        self.stream.flush().await?;
        Ok(())
    }

    async fn read(&mut self) -> anyhow::Result<server_frame::Frame> {
        loop {
            if let Some(payload) = frame::split_frame(&mut self.input, limits::FRAME_BYTES_MAX)? {
                match frame::decode_server_frame(payload)? {
                    frame::Decoded::Frame(server_frame::Frame::Ping(ping)) => {
                        self.write(client_frame::Frame::Pong(v1::Pong { echo: ping.echo })).await?;
                    }
                    frame::Decoded::Frame(member) => return Ok(member),
                    frame::Decoded::Unknown(_) => {}
                }
                continue;
            }
            let read = tokio::time::timeout(ANSWER_WITHIN, self.stream.read_buf(&mut self.input));
            if read.await.context("the server does not answer")?? == 0 {
                bail!("the server closed the connection");
            }
        }
    }

    /// One call; what the server asks to be repeated is repeated.
    pub async fn call<R: Message + Default>(&mut self, method: Method, request: &impl Message) -> anyhow::Result<R> {
        let mut last = String::new();
        for _ in 0..TRIES {
            let status = match self.call_once(method, request).await? {
                Ok(bytes) => return R::decode(bytes).context("the reply is malformed"),
                Err(status) => status,
            };
            let code = StatusCode::from_number(status.code);
            if code.map(StatusCode::retry) != Some(Retry::Later) {
                bail!("{} failed: {}", method.full_name(), status.text);
            }
            last = status.text;
            tokio::time::sleep(TRY_AGAIN.max(Duration::from_millis(u64::from(status.retry_after_ms)))).await;
        }
        bail!("{} failed {TRIES} times: {last}", method.full_name())
    }

    async fn call_once(&mut self, method: Method, request: &impl Message) -> anyhow::Result<Result<Bytes, v1::Status>> {
        let request_id = self.next_request;
        self.next_request = self.next_request.wrapping_add(1);
        let call = v1::Call { request_id, method: method.number(), request: request.encode_to_vec().into() };
        self.write(client_frame::Frame::Call(call)).await?;
        let mut answer = BytesMut::new();
        loop {
            match self.read().await? {
                server_frame::Frame::Reply(reply) if reply.request_id == request_id => {
                    if let Some(status) = reply.status.filter(|status| status.code != 0) {
                        return Ok(Err(status));
                    }
                    answer.extend_from_slice(&reply.payload);
                    if reply.last {
                        return Ok(Ok(answer.freeze()));
                    }
                }
                server_frame::Frame::Close(close) => bail!("the server closed the session: {}", text(close.status)),
                _ => {}
            }
        }
    }

    /// The whole history of a conversation, page by page; the head.
    pub async fn read_history(
        &mut self,
        conversation: ConversationId,
        mut take: impl FnMut(&v1::Message),
    ) -> anyhow::Result<u64> {
        let target = v1::Target { target: Some(v1::target::Target::ConversationId(conversation.to_bytes())) };
        let mut next = 1;
        loop {
            let request =
                v1::HistoryRequest { target: Some(target.clone()), from: next, to: 0, limit: 0, newest: false };
            let reply: v1::HistoryReply = self.call(Method::MessageHistory, &request).await?;
            for message in reply.entries.iter().filter_map(|entry| entry.message.as_ref()) {
                take(message);
                next = i64::try_from(message.seq).unwrap_or(i64::MAX - 1) + 1;
            }
            let head = i64::try_from(reply.head).unwrap_or(i64::MAX);
            if next > head || reply.entries.is_empty() {
                return Ok(reply.head);
            }
        }
    }
}

fn text(status: Option<v1::Status>) -> String {
    status.map_or_else(|| "no status".to_owned(), |status| status.text)
}
