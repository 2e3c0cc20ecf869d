//! A scripted server: tests accept connections, expect frames and answer them.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use im_client::{Client, ClientConfig, DialError, Dialer, Endpoint, Event, Stream, Transport};
use im_proto::{
    ConversationId, StatusCode, Timestamp, body,
    environment::{Clock, Environment, Random, Spawn, Task},
    frame::{self, Decoded},
    limits,
    method::Method,
    v1::{self, client_frame, server_frame},
};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::{Mutex, mpsc},
};

/// Longer than any waiting time of the client: what does not come within it does not come.
const PATIENCE: Duration = Duration::from_secs(120);

pub const ME: &str = "alice";

/// The user's own log.
pub fn own_log() -> ConversationId {
    ConversationId::from_bytes([0xee; 16])
}

/// Some other conversation.
pub fn conversation(number: u8) -> ConversationId {
    ConversationId::from_bytes([number; 16])
}

struct TestEnvironment(AtomicU64);

impl Clock for TestEnvironment {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1_700_000_000_000)
    }

    fn since_boot(&self) -> Duration {
        Duration::ZERO
    }
}

impl Random for TestEnvironment {
    /// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
    fn next_u64(&self) -> u64 {
        let mut z = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Spawn for TestEnvironment {
    #[allow(clippy::disallowed_methods, reason = "the runtime of the test owns the tasks")]
    fn spawn(&self, task: Task) {
        tokio::spawn(task);
    }
}

/// Surroundings that are the same for the same seed.
pub fn environment(seed: u64) -> Environment {
    let shared = Arc::new(TestEnvironment(AtomicU64::new(seed)));
    Environment { clock: shared.clone(), random: shared.clone(), tasks: shared }
}

/// Where clients connect to; the test takes the other ends.
pub struct Server {
    connections: Mutex<mpsc::Receiver<(Endpoint, DuplexStream)>>,
    dialer: Arc<MemoryDialer>,
}

struct MemoryDialer(mpsc::Sender<(Endpoint, DuplexStream)>);

impl Dialer for MemoryDialer {
    fn dial<'a>(
        &'a self,
        endpoint: &'a Endpoint,
    ) -> Pin<Box<dyn Future<Output = Result<Stream, DialError>> + Send + 'a>> {
        Box::pin(async move {
            let (client, server) = tokio::io::duplex(256 * 1024);
            let sent = self.0.send((endpoint.clone(), server)).await;
            sent.map_err(|_| DialError("connection refused".to_owned()))?;
            Ok(Box::new(client) as Stream)
        })
    }
}

impl Server {
    pub fn new() -> Self {
        let (sender, receiver) = mpsc::channel(16);
        Self { connections: Mutex::new(receiver), dialer: Arc::new(MemoryDialer(sender)) }
    }

    /// A configuration that leads here.
    pub fn config(&self) -> ClientConfig {
        let endpoints = vec![Endpoint::new(Transport::Tcp, "first:1").unwrap()];
        self.config_for(endpoints, 1)
    }

    pub fn config_for(&self, endpoints: Vec<Endpoint>, seed: u64) -> ClientConfig {
        let token = Arc::new("token".to_owned());
        let config = ClientConfig::with_dialer(Arc::new(endpoints), token, self.dialer.clone(), environment(seed));
        // Most tests name every frame that comes.
        ClientConfig { receipts: false, ..config }
    }

    /// The next connection, before any frame.
    pub async fn accept_raw(&self) -> (Endpoint, Connection) {
        let mut connections = self.connections.lock().await;
        let accepted = tokio::time::timeout(PATIENCE, connections.recv()).await;
        let (endpoint, stream) = accepted.expect("no connection comes").expect("the dialer is gone");
        (endpoint, Connection { stream, input: BytesMut::new() })
    }

    /// The next connection, welcomed.
    pub async fn accept(&self) -> Connection {
        let (_, mut connection) = self.accept_raw().await;
        connection.welcome(welcome()).await;
        connection
    }

    /// The next connection, welcomed and synced with an empty answer.
    pub async fn accept_ready(&self) -> Connection {
        let mut connection = self.accept().await;
        connection.sync(0, vec![]).await;
        connection
    }
}

pub fn welcome() -> v1::Welcome {
    v1::Welcome {
        session_id: 1,
        version: 1,
        heartbeat_interval_ms: 10_000,
        user_id: ME.to_owned(),
        device_id: "device".to_owned(),
        platform: "test".to_owned(),
        self_conversation_id: own_log().to_bytes(),
        ..v1::Welcome::default()
    }
}

/// The server's end of a connection.
pub struct Connection {
    stream: DuplexStream,
    input: BytesMut,
}

impl Connection {
    /// The next frame, `None` when the client has closed.
    pub async fn next(&mut self) -> Option<client_frame::Frame> {
        loop {
            if let Some(payload) = frame::split_frame(&mut self.input, limits::FRAME_BYTES_MAX).unwrap() {
                match frame::decode_client_frame(payload).unwrap() {
                    Decoded::Frame(frame) => return Some(frame),
                    Decoded::Unknown(field) => panic!("frame {field}"),
                }
            }
            if self.stream.read_buf(&mut self.input).await.ok()? == 0 {
                return None;
            }
        }
    }

    /// The next frame that is no heartbeat.
    pub async fn expect(&mut self) -> client_frame::Frame {
        loop {
            let frame = tokio::time::timeout(PATIENCE, self.next()).await.expect("no frame comes");
            match frame.expect("the client has closed") {
                client_frame::Frame::Ping(ping) => {
                    self.send(server_frame::Frame::Pong(v1::Pong { echo: ping.echo })).await;
                }
                frame => return frame,
            }
        }
    }

    /// Nothing but heartbeats comes for this long.
    pub async fn expect_silence(&mut self, time: Duration) {
        if let Ok(frame) = tokio::time::timeout(time, self.expect()).await {
            panic!("unexpected: {frame:?}");
        }
    }

    pub async fn expect_send(&mut self) -> v1::Send {
        match self.expect().await {
            client_frame::Frame::Send(send) => send,
            other => panic!("not a send: {other:?}"),
        }
    }

    pub async fn expect_call(&mut self, method: Method) -> v1::Call {
        match self.expect().await {
            client_frame::Frame::Call(call) if call.method == method.number() => call,
            other => panic!("not a call of {}: {other:?}", method.full_name()),
        }
    }

    pub async fn expect_history(&mut self) -> (u32, v1::HistoryRequest) {
        let call = self.expect_call(Method::MessageHistory).await;
        (call.request_id, v1::HistoryRequest::decode(call.request).unwrap())
    }

    pub async fn expect_sync(&mut self) -> (u32, v1::SyncRequest) {
        let call = self.expect_call(Method::ConversationSync).await;
        (call.request_id, v1::SyncRequest::decode(call.request).unwrap())
    }

    pub async fn welcome(&mut self, welcome: v1::Welcome) {
        match self.expect().await {
            client_frame::Frame::Hello(hello) => assert_eq!(hello.token, "token"),
            other => panic!("not a hello: {other:?}"),
        }
        self.send(server_frame::Frame::Welcome(welcome)).await;
    }

    /// Answers a sync with one page.
    pub async fn sync(&mut self, version: u64, conversations: Vec<v1::ConversationRow>) -> v1::SyncRequest {
        let (id, request) = self.expect_sync().await;
        self.reply(id, &v1::SyncReply { version, conversations, ..v1::SyncReply::default() }).await;
        request
    }

    pub async fn send(&mut self, frame: server_frame::Frame) {
        let bytes = frame::frame_to_bytes(&v1::ServerFrame::from(frame));
        // A test may write to a client that has gone.
        let _ = self.stream.write_all(&bytes).await;
    }

    pub async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub async fn reply(&mut self, request_id: u32, reply: &impl prost::Message) {
        let payload = reply.encode_to_vec().into();
        self.send(server_frame::Frame::Reply(v1::Reply { request_id, status: None, payload, last: true })).await;
    }

    pub async fn refuse_call(&mut self, request_id: u32, code: StatusCode) {
        let status = Some(code.to_status());
        let reply = v1::Reply { request_id, status, payload: Bytes::new(), last: true };
        self.send(server_frame::Frame::Reply(reply)).await;
    }

    /// Answers a history request with texts whose seq is their text.
    pub async fn reply_history(
        &mut self,
        request_id: u32,
        id: ConversationId,
        seqs: std::ops::RangeInclusive<u64>,
        head: u64,
    ) {
        let entries = seqs.map(|seq| v1::HistoryEntry { message: Some(message(id, seq)), gone_reason: 0 }).collect();
        let reply = v1::HistoryReply { conversation_id: id.to_bytes(), entries, head, first_seq: 1 };
        self.reply(request_id, &reply).await;
    }

    pub async fn push(&mut self, id: ConversationId, seq: u64) {
        self.send(server_frame::Frame::Message(message(id, seq))).await;
    }

    pub async fn ack(&mut self, send: &v1::Send, id: ConversationId, seq: u64) {
        let ack = v1::SendAck {
            client_message_id: send.client_message_id.clone(),
            conversation_id: id.to_bytes(),
            seq,
            sent_at_ms: sent_at_ms(seq),
            status: None,
        };
        self.send(server_frame::Frame::SendAck(ack)).await;
    }

    pub async fn refuse(&mut self, send: &v1::Send, status: v1::Status) {
        let client_message_id = send.client_message_id.clone();
        let ack = v1::SendAck { client_message_id, status: Some(status), ..v1::SendAck::default() };
        self.send(server_frame::Frame::SendAck(ack)).await;
    }

    pub async fn close(&mut self, code: StatusCode) {
        self.send(server_frame::Frame::Close(v1::Close { status: Some(code.to_status()) })).await;
    }

    /// The client closes the connection.
    pub async fn expect_end(&mut self) {
        while let Some(frame) = tokio::time::timeout(PATIENCE, self.next()).await.expect("the client stays") {
            assert!(matches!(frame, client_frame::Frame::Ping(_) | client_frame::Frame::Close(_)), "{frame:?}");
        }
    }
}

pub fn sent_at_ms(seq: u64) -> i64 {
    1_700_000_000_000 + i64::try_from(seq).unwrap()
}

/// A text of bob's that is its seq.
pub fn message(id: ConversationId, seq: u64) -> v1::Message {
    v1::Message {
        conversation_id: id.to_bytes(),
        seq,
        sender: "bob".to_owned(),
        sent_at_ms: sent_at_ms(seq),
        client_message_id: Bytes::from(format!("bob-{seq}")),
        body: body::text(seq.to_string()),
        kind: v1::EntryKind::Message.into(),
        flags: 0,
    }
}

pub fn row(id: ConversationId, head: u64) -> v1::ConversationRow {
    v1::ConversationRow {
        conversation_id: id.to_bytes(),
        kind: v1::ConversationKind::Group.into(),
        head,
        first_seq: 1,
        joined_seq: 1,
        ..v1::ConversationRow::default()
    }
}

/// An entry of one's own log: a conversation came to be.
pub fn joined(own_seq: u64, id: ConversationId, peer: &str) -> v1::Message {
    let joined = v1::ConversationJoined {
        conversation_id: id.to_bytes(),
        kind: v1::ConversationKind::Direct.into(),
        peer_user_id: peer.to_owned(),
        joined_seq: 1,
        ..v1::ConversationJoined::default()
    };
    own_event(own_seq, v1::system_event::Event::ConversationJoined(joined))
}

/// An entry of one's own log: something about the conversation list.
pub fn own_event(own_seq: u64, event: v1::system_event::Event) -> v1::Message {
    v1::Message { body: body::event(event), kind: v1::EntryKind::Event.into(), ..message(own_log(), own_seq) }
}

/// The events of a client.
pub struct Events(mpsc::Receiver<Event>);

impl Events {
    pub fn of(client: &Client) -> Self {
        Self(client.events().expect("the events are taken"))
    }

    pub async fn next(&mut self) -> Event {
        let event = tokio::time::timeout(PATIENCE, self.0.recv()).await;
        event.expect("no event comes").expect("the events have ended")
    }

    /// The next entries, other events skipped: conversation and seq.
    pub async fn entries(&mut self, count: usize) -> Vec<(ConversationId, u64)> {
        let mut entries = Vec::new();
        while entries.len() < count {
            if let Event::Message(entry) = self.next().await {
                entries.push((entry.conversation, entry.seq));
            }
        }
        entries
    }

    /// No entry comes for this long.
    pub async fn expect_no_entry(&mut self, time: Duration) {
        let wait = async {
            loop {
                if let Event::Message(entry) = self.next().await {
                    return entry;
                }
            }
        };
        if let Ok(entry) = tokio::time::timeout(time, wait).await {
            panic!("unexpected: {entry:?}");
        }
    }
}
