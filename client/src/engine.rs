//! The task of a client: connects, runs the session, connects again. It owns the state (`core`) and the connection.
//!
//! Order in a turn of a session: frames that were read, commands that wait, time, writing; then it sleeps until bytes, a command, time, a new token or
//! room in the event queue.

use std::{future::Future, pin::Pin, sync::Arc};

use bytes::BytesMut;
use im_proto::{
    ConversationId, PROTOCOL_VERSIONS, StatusCode, UserId, frame,
    status::Retry,
    v1::{self, client_frame, server_frame},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

use crate::{
    config::{ClientConfig, Endpoint},
    connection::{Connection, ConnectionError},
    core::{Command, Core, SessionEnd},
    error::{ClosedReason, Status},
    event::{Event, EventSink},
    reconnect::{Elsewhere, Next, Reconnect},
};

/// Commands taken before the connection gets its turn again.
const COMMANDS_PER_TURN: usize = 256;
/// So many times in a row a renewable token may be refused before that is final.
const TOKEN_REFUSALS_MAX: u32 = 3;

/// What handles of the client can see.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shared {
    /// Known since the first `Welcome`.
    pub(crate) me: Option<(UserId, ConversationId)>,
    pub(crate) connected: bool,
    /// Why there is no connection.
    pub(crate) last_error: String,
    pub(crate) closed: Option<ClosedReason>,
}

pub(crate) struct Engine {
    config: Arc<ClientConfig>,
    core: Core,
    commands: mpsc::Receiver<Command>,
    shared: watch::Sender<Shared>,
    events: mpsc::Sender<Event>,
    reconnect: Reconnect,
    token_refusals: u32,
    close_done: Option<oneshot::Sender<()>>,
}

/// Why an attempt to connect failed.
enum Failure {
    Text(String),
    NoToken(String),
    /// By whom it was refused.
    Status(Status, Endpoint),
    /// Elsewhere, from where, and why.
    Moved(Elsewhere, Endpoint, String),
}

type TokenFuture = Pin<Box<dyn Future<Output = Result<String, String>> + Send>>;

impl Engine {
    pub(crate) fn new(
        config: Arc<ClientConfig>,
        commands: mpsc::Receiver<Command>,
        events: mpsc::Sender<Event>,
        shared: watch::Sender<Shared>,
    ) -> Self {
        let core = Core::new(&config, EventSink::new(events.clone()));
        let reconnect = Reconnect::new(config.reconnect);
        Self { config, core, commands, shared, events, reconnect, token_refusals: 0, close_done: None }
    }

    /// Until the client is closed, by whomever.
    pub(crate) async fn run(mut self) {
        let reason = loop {
            let (connection, endpoint) = match self.connect().await {
                Ok(connected) => connected,
                Err(reason) => break reason,
            };
            if let Err(reason) = self.session(connection, &endpoint).await {
                break reason;
            }
        };
        tracing::debug!(%reason, "the client has ended");
        self.core.close(&reason);
        self.shared.send_modify(|shared| {
            shared.connected = false;
            shared.closed = Some(reason.clone());
        });
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            if let Some(done) = self.core.on_command(command) {
                let _ = done.send(());
            }
        }
        self.core.close(&reason);
        if let Some(done) = self.close_done.take() {
            let _ = done.send(());
        }
        // The last event waits for room; the task ends when the application has read it or dropped the receiver.
        let _ = self.events.send(Event::Closed(reason)).await;
    }

    /// Tries until there is a session. Commands are taken meanwhile.
    async fn connect(&mut self) -> Result<(Connection, Endpoint), ClosedReason> {
        loop {
            let delay = self.reconnect.delay(&self.config.environment);
            self.with_commands(tokio::time::sleep(delay)).await?;
            let failure = match self.next_endpoint().await? {
                Err(text) => Failure::Text(text),
                Ok(endpoint) => {
                    let attempt = attempt(self.config.clone(), endpoint.clone());
                    match self.with_commands(attempt).await? {
                        Ok((connection, welcome)) => match self.begin(&welcome, &endpoint) {
                            Ok(()) => return Ok((connection, endpoint)),
                            Err(status) => Failure::Status(status, endpoint),
                        },
                        Err(failure) => failure,
                    }
                }
            };
            self.failed(failure)?;
        }
    }

    /// The endpoint to try, once one may be tried.
    async fn next_endpoint(&mut self) -> Result<Result<Endpoint, String>, ClosedReason> {
        loop {
            match self.reconnect.next_endpoint(self.config.endpoints.as_ref(), Instant::now()) {
                Ok(Next::Dial(endpoint)) => return Ok(Ok(endpoint)),
                Ok(Next::Wait(until)) => self.with_commands(tokio::time::sleep_until(until)).await?,
                Err(text) => return Ok(Err(text)),
            }
        }
    }

    fn begin(&mut self, welcome: &v1::Welcome, endpoint: &Endpoint) -> Result<(), Status> {
        self.core.welcome(welcome, endpoint, Instant::now())?;
        tracing::debug!(%endpoint, session = welcome.session_id, "connected");
        self.token_refusals = 0;
        let me = self.core.me().cloned().zip(self.core.conversations.own_log());
        self.shared.send_modify(|shared| {
            shared.me = me;
            shared.connected = true;
        });
        Ok(())
    }

    fn failed(&mut self, failure: Failure) -> Result<(), ClosedReason> {
        let text = match failure {
            Failure::Text(text) => text,
            Failure::NoToken(text) => return Err(ClosedReason::NoToken(text.into())),
            Failure::Status(status, endpoint) => {
                self.reconnect.refused(&endpoint, status.retry_after, Instant::now());
                self.judge(status)?
            }
            Failure::Moved(elsewhere, endpoint, text) => {
                self.reconnect.moved(elsewhere, &endpoint, Instant::now());
                text
            }
        };
        tracing::debug!(reason = text, "no connection");
        self.shared.send_modify(|shared| shared.last_error = text);
        self.reconnect.failed();
        Ok(())
    }

    /// Whether a status by which the server ended a session is the end of the client, too.
    fn judge(&mut self, status: Status) -> Result<String, ClosedReason> {
        let is_final = match status.code {
            Some(StatusCode::Unauthenticated | StatusCode::TokenExpired) => {
                self.token_refusals += 1;
                !self.config.token.is_renewable() || self.token_refusals >= TOKEN_REFUSALS_MAX
            }
            Some(StatusCode::Forbidden | StatusCode::NotFound) => true,
            Some(code) => code.closes() && code.retry() == Retry::Never,
            None => false,
        };
        if is_final { Err(ClosedReason::ByServer(status)) } else { Ok(format!("the server said: {status}")) }
    }

    /// One session. Ok: connect again.
    async fn session(&mut self, mut connection: Connection, endpoint: &Endpoint) -> Result<(), ClosedReason> {
        let ended = self.drive(&mut connection).await;
        let elsewhere = self.core.take_go_away();
        let draining = |status: &Status| status.code == Some(StatusCode::Draining);
        let is_leaving = elsewhere.is_some() || matches!(&ended, Err(SessionEnd::Status(status)) if draining(status));
        let (text, outcome) = match ended {
            Ok(()) => {
                let out = std::mem::take(&mut self.core.out);
                connection.finish(out).await;
                ("the client was closed".to_owned(), Err(ClosedReason::ByCaller))
            }
            Err(SessionEnd::Broken(text)) => (text, Ok(())),
            Err(SessionEnd::Moved) => ("the server asked to connect elsewhere".to_owned(), Ok(())),
            Err(SessionEnd::Status(status)) => {
                let text = status.to_string();
                self.reconnect.refused(endpoint, status.retry_after, Instant::now());
                (text, self.judge(status).map(drop))
            }
        };
        if self.core.is_ready() {
            self.reconnect.succeeded(is_leaving);
        } else {
            self.reconnect.failed();
        }
        if let Some(elsewhere) = elsewhere {
            self.reconnect.moved(elsewhere, endpoint, Instant::now());
        }
        tracing::debug!(%endpoint, reason = text, "disconnected");
        self.shared.send_modify(|shared| {
            shared.connected = false;
            shared.last_error = text.clone();
        });
        self.core.disconnected(text);
        outcome
    }

    /// Ok: the caller closed the client.
    async fn drive(&mut self, connection: &mut Connection) -> Result<(), SessionEnd> {
        let events = self.events.clone();
        let mut renewal: Option<TokenFuture> = None;
        let broken = |error: ConnectionError| SessionEnd::Broken(error.to_string());
        let sleep = tokio::time::sleep_until(Instant::now());
        tokio::pin!(sleep);
        loop {
            let now = Instant::now();
            while let Some(frame) = connection.next_frame().map_err(broken)? {
                self.core.on_frame(frame, now)?;
            }
            if self.take_commands() {
                return Ok(());
            }
            self.core.on_time(now)?;
            if self.core.take_renewal(now) {
                let source = self.config.token.clone();
                renewal = Some(Box::pin(async move { source.token().await }));
            }
            self.core.pump(now);
            let deadline = self.core.next_deadline();
            if let Some(deadline) = deadline.filter(|deadline| *deadline != sleep.deadline()) {
                sleep.as_mut().reset(deadline);
            }
            let wants_room = self.core.wants_room();
            let room = self.core.events.worthwhile_room();
            tokio::select! {
                biased;
                read = connection.exchange(&mut self.core.out) => read.map_err(broken)?,
                command = self.commands.recv() => {
                    if self.take_command(command) {
                        return Ok(());
                    }
                }
                () = sleep.as_mut(), if deadline.is_some() => {}
                token = poll_renewal(&mut renewal) => {
                    renewal = None;
                    match token {
                        Ok(token) => self.core.renew(token),
                        Err(text) => tracing::warn!(reason = text, "no new token; the session ends with the old one"),
                    }
                }
                _ = events.reserve_many(room), if wants_room => {}
            }
        }
    }

    /// Takes what waits. True if the client is to be closed.
    fn take_commands(&mut self) -> bool {
        for _ in 0..COMMANDS_PER_TURN {
            match self.commands.try_recv() {
                Ok(command) => {
                    if self.take_command(Some(command)) {
                        return true;
                    }
                }
                Err(mpsc::error::TryRecvError::Empty) => return false,
                Err(mpsc::error::TryRecvError::Disconnected) => return true,
            }
        }
        false
    }

    /// True if the client is to be closed.
    fn take_command(&mut self, command: Option<Command>) -> bool {
        let Some(command) = command else { return true };
        if let Some(done) = self.core.on_command(command) {
            self.close_done = Some(done);
            return true;
        }
        false
    }

    /// Awaits something while commands are taken.
    async fn with_commands<T>(&mut self, future: impl Future<Output = T>) -> Result<T, ClosedReason> {
        tokio::pin!(future);
        loop {
            tokio::select! {
                biased;
                output = &mut future => return Ok(output),
                command = self.commands.recv() => {
                    if self.take_command(command) {
                        return Err(ClosedReason::ByCaller);
                    }
                }
            }
        }
    }
}

async fn poll_renewal(renewal: &mut Option<TokenFuture>) -> Result<String, String> {
    match renewal {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// One attempt: token, dial, `Hello`, `Welcome`.
async fn attempt(config: Arc<ClientConfig>, endpoint: Endpoint) -> Result<(Connection, v1::Welcome), Failure> {
    let text = |text: String| Failure::Text(format!("{endpoint}: {text}"));
    let opened_at_ms = config.environment.clock.now().as_millis();
    let whole = async {
        let token = match config.token.token().await {
            Ok(token) => token,
            // A later call may succeed if the source says that it can give new ones.
            Err(error) if config.token.is_renewable() => return Err(text(format!("no token: {error}"))),
            Err(error) => return Err(Failure::NoToken(error)),
        };
        let stream = config.dialer.dial(&endpoint).await.map_err(|error| text(error.to_string()))?;
        let mut connection = Connection::new(stream);
        let mut out = BytesMut::new();
        let hello = v1::Hello {
            version_min: PROTOCOL_VERSIONS.0,
            version_max: PROTOCOL_VERSIONS.1,
            token,
            client_name: config.client_name.clone(),
            client_version: config.client_version.clone(),
            features: Vec::new(),
            opened_at_ms,
        };
        frame::encode_frame(&v1::ClientFrame::from(client_frame::Frame::Hello(hello)), &mut out);
        loop {
            connection.exchange(&mut out).await.map_err(|error| text(error.to_string()))?;
            // What follows the welcome is for the session; a push that came before it is in what the session will sync.
            while let Some(frame) = connection.next_frame().map_err(|error| text(error.to_string()))? {
                match frame {
                    server_frame::Frame::Welcome(welcome) => return Ok((connection, welcome)),
                    server_frame::Frame::Close(close) => {
                        let status = Status::from_wire(close.status);
                        let status = status.unwrap_or_else(|| Status::from_code(StatusCode::Draining));
                        return Err(Failure::Status(status, endpoint.clone()));
                    }
                    server_frame::Frame::GoAway(go_away) => {
                        let elsewhere = Elsewhere::from_wire(&go_away, Instant::now());
                        let why = Status::from_wire(go_away.reason).map(|status| format!(": {status}"));
                        let why = format!("{endpoint}: sent elsewhere{}", why.unwrap_or_default());
                        return Err(Failure::Moved(elsewhere, endpoint.clone(), why));
                    }
                    _ => {}
                }
            }
        }
    };
    match tokio::time::timeout(config.connect_timeout, whole).await {
        Ok(outcome) => outcome,
        Err(_) => Err(text(format!("no welcome within {} s", config.connect_timeout.as_secs_f32()))),
    }
}
