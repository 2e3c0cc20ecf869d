//! The ceiling: the same traffic through a server that does nothing but move it.
//!
//! A bare router in memory (and with `durable` behind a bare log with one fdatasync a batch), without identity, permission,
//! numbering or idempotency. It is what this machine and this generator can do at most, so every report can carry a denominator
//! measured in the same run. The router is a process of its own, pinned to the last core; the generator has the first.

mod bare;
mod router;

use std::{path::PathBuf, process::Stdio, time::Duration};

use anyhow::Context as _;
use serde::Serialize;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use self::bare::Bare;
pub use self::router::{RouterOptions, serve};
use crate::{
    bench,
    measure::{Flushes, Usage},
    report::Percentiles,
};

/// What goes through the bare router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// Every connection gets its own frames back.
    Echo,
    /// One sends, one receives, with an ack.
    Pairs,
    /// One sends, all others receive, with an ack.
    Fanout,
    /// Connections that only say now and then that they are there.
    Idle,
}

/// One measurement.
#[derive(Clone, Debug)]
pub struct Measurement {
    pub workload: Workload,
    /// Connections of an echo, pairs, or receivers of a fan-out.
    pub size: usize,
    pub window: u64,
    pub body_bytes: usize,
    pub durable: bool,
    /// The directory of the bare log.
    pub directory: Option<PathBuf>,
    pub warmup: Duration,
    pub time: Duration,
    /// Server on the last core, generator on the first.
    pub pin: bool,
    /// Time between two heartbeats of an idle connection.
    pub heartbeat: Option<Duration>,
}

/// What was reached.
#[derive(Clone, Debug, Serialize)]
pub struct Ceiling {
    pub workload: Workload,
    pub size: usize,
    pub window: u64,
    pub durable: bool,
    pub acked_per_s: f64,
    pub delivered_per_s: f64,
    pub ack_us: Percentiles,
    pub delivery_us: Percentiles,
    pub usage: Usage,
    /// While it was measured.
    pub acknowledged: u64,
    /// Of the disk with the log, from before the first send on.
    pub flushes: Option<Flushes>,
    /// The fairer figure where the generator's core is full too.
    pub delivered_per_server_core_s: f64,
}

/// Frame sizes of the product for a body, so that the ceiling moves the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameSizes {
    pub send: usize,
    pub ack: usize,
    pub message: usize,
}

impl FrameSizes {
    /// With a text body of this many bytes.
    pub fn of(body_bytes: usize) -> Self {
        use im_proto::{ConversationId, frame::frame_to_bytes, v1};
        let id = ConversationId::from_bytes([1; 16]);
        let body = im_proto::body::text("x".repeat(body_bytes));
        let client_message_id = bytes::Bytes::from_static(&[1; 16]);
        let (seq, sent_at_ms) = (100_000, 1_800_000_000_000);
        let mut send = Vec::new();
        crate::wire::put_send(
            &mut send,
            crate::wire::Send {
                target: &crate::wire::Target::conversation(id),
                client_message_id: &client_message_id,
                body: &body,
                after: &client_message_id,
                known_seq: seq,
            },
        );
        let conversation_id = id.to_bytes();
        let ack = v1::SendAck {
            client_message_id: client_message_id.clone(),
            conversation_id: conversation_id.clone(),
            seq,
            sent_at_ms,
            status: None,
        };
        let message = v1::Message {
            conversation_id,
            seq,
            sender: "loadtest-user-1".to_owned(),
            sent_at_ms,
            client_message_id,
            body,
            kind: v1::EntryKind::Message.into(),
            flags: 0,
        };
        let length = |frame: v1::server_frame::Frame| frame_to_bytes(&v1::ServerFrame::from(frame)).len();
        Self {
            send: send.len(),
            ack: length(v1::server_frame::Frame::SendAck(ack)),
            message: length(v1::server_frame::Frame::Message(message)),
        }
    }
}

impl Measurement {
    /// Starts the bare router, drives it, and ends it.
    pub async fn run(&self) -> anyhow::Result<Ceiling> {
        let (mut server, address) = self.start().await?;
        let pid = Vec::from_iter(server.id());
        let measurement = self.clone();
        let clients = tokio::task::spawn_blocking(move || {
            bench::drive(&measurement, Box::new(Bare::new(&measurement)), &address, &pid)
        });
        let ceiling = clients.await.context("the generator of the ceiling failed")?;
        server.kill().await.ok();
        ceiling
    }

    async fn start(&self) -> anyhow::Result<(Child, String)> {
        let own = std::env::current_exe().context("find the own program")?;
        let mut command = Command::new(own);
        command.arg("ceiling-server");
        let sizes = FrameSizes::of(self.body_bytes);
        command.args(["--ack", &sizes.ack.to_string(), "--message", &sizes.message.to_string()]);
        if self.durable {
            command.arg("--log").arg(self.directory.clone().unwrap_or_else(std::env::temp_dir));
        }
        let mut server = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("start the bare router")?;
        let output = server.stdout.take().context("read from the bare router")?;
        let mut address = String::new();
        BufReader::new(output).read_line(&mut address).await.context("read from the bare router")?;
        anyhow::ensure!(!address.is_empty(), "the bare router did not start");
        Ok((server, address.trim().to_owned()))
    }
}

/// The frames of the bare router: a length like the product's, then kind, destination, message, padding.
mod frames {
    use crate::crowd::MessageId;

    /// Client to router: "I am connection number `destination`".
    pub(super) const HELLO: u8 = 0;
    /// Back to the sender.
    pub(super) const ECHO: u8 = 1;
    /// To one other connection; an ack to the sender.
    pub(super) const SEND: u8 = 2;
    /// To all other connections; an ack to the sender.
    pub(super) const FAN: u8 = 3;
    pub(super) const ACK: u8 = 4;
    pub(super) const MESSAGE: u8 = 5;

    const HEAD: usize = 1 + 4 + MessageId::BYTES;

    /// Appends a frame of `size` bytes, length prefix included.
    pub(super) fn put(out: &mut Vec<u8>, size: usize, kind: u8, destination: u32, id: &[u8; MessageId::BYTES]) {
        let payload = size.saturating_sub(4).max(HEAD);
        out.extend_from_slice(&u32::try_from(payload).unwrap_or(u32::MAX).to_be_bytes());
        out.push(kind);
        out.extend_from_slice(&destination.to_be_bytes());
        out.extend_from_slice(id);
        out.resize(out.len() + payload - HEAD, b'x');
    }

    /// Kind, destination and message of a payload.
    pub(super) fn parse(payload: &[u8]) -> Option<(u8, u32, &[u8; MessageId::BYTES])> {
        let (&kind, rest) = payload.split_first()?;
        let (destination, rest) = rest.split_first_chunk::<4>()?;
        Some((kind, u32::from_be_bytes(*destination), rest.first_chunk()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_the_size_asked_for_and_are_read_back() {
        let mut out = Vec::new();
        frames::put(&mut out, 170, frames::SEND, 9, &[7; 16]);
        assert_eq!(out.len(), 170);
        assert_eq!(frames::parse(&out[4..]), Some((frames::SEND, 9, &[7; 16])));
        assert_eq!(frames::parse(&[1, 2, 3]), None);
    }

    #[test]
    fn sizes_grow_with_the_body() {
        let (small, large) = (FrameSizes::of(10), FrameSizes::of(110));
        assert_eq!(small.ack, large.ack);
        assert!(large.send - small.send >= 100 && large.message - small.message >= 100);
    }
}
