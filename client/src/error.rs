//! Errors, one type for each thing that a caller can ask for.

use std::{fmt, sync::Arc, time::Duration};

use im_proto::{StatusCode, limits, status::Retry, v1};

/// An answer of the server other than "done".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// `None` for a number that this version does not know.
    pub code: Option<StatusCode>,
    /// The number on the wire.
    pub number: u32,
    /// The server's short stable text.
    pub text: String,
    /// Names the event in the server's log; may be empty.
    pub correlation_id: String,
    /// When a retry makes sense; zero if the server did not say.
    pub retry_after: Duration,
}

impl Status {
    /// `None` if the answer means "done".
    pub(crate) fn from_wire(status: Option<v1::Status>) -> Option<Self> {
        let status = status.filter(|status| status.code != 0)?;
        Some(Self {
            code: StatusCode::from_number(status.code),
            number: status.code,
            text: status.text,
            correlation_id: status.correlation_id,
            retry_after: Duration::from_millis(status.retry_after_ms.into()),
        })
    }

    pub(crate) fn from_code(code: StatusCode) -> Self {
        Self {
            code: Some(code),
            number: code.number(),
            text: code.text().to_owned(),
            correlation_id: String::new(),
            retry_after: Duration::ZERO,
        }
    }

    /// Whether the same request may succeed later.
    pub fn is_transient(&self) -> bool {
        self.code.is_some_and(|code| code.retry() == Retry::Later)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.text.is_empty(), self.code) {
            (false, _) => f.write_str(&self.text)?,
            (true, Some(code)) => f.write_str(code.text())?,
            (true, None) => write!(f, "status {}", self.number)?,
        }
        if !self.correlation_id.is_empty() {
            write!(f, " ({})", self.correlation_id)?;
        }
        Ok(())
    }
}

/// Why a client has ended. It does not come back; make a new one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClosedReason {
    /// [`crate::Client::close`] was called or the last handle was dropped.
    #[error("the client was closed")]
    ByCaller,
    /// The server said so and a reconnect would not help.
    #[error("the server ended the session: {0}")]
    ByServer(Status),
    /// No token could be had.
    #[error("no token: {0}")]
    NoToken(Arc<str>),
}

/// Why a message was not sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The server refused it; it will not be stored. Only for `internal` the outcome is not known.
    #[error("the server refused the message: {0}")]
    Refused(Status),
    /// Refused before it was sent.
    #[error("a body has 1 to {} bytes, this one has {found}: send it in parts", limits::BODY_BYTES_MAX)]
    BodySize { found: usize },
    /// The client ended before the answer came: whether the message was stored is not known.
    #[error(transparent)]
    Closed(#[from] ClosedReason),
}

/// Why a call has no reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    #[error("{0}")]
    Refused(Status),
    /// No reply within [`crate::ClientConfig::call_timeout`], reconnects and retries included.
    #[error("no reply within {} s: {last}", .after.as_secs_f32())]
    TimedOut { after: Duration, last: String },
    /// Refused before it was sent: the server ends a connection with a larger frame than it allows.
    #[error("a request has at most {limit} bytes on this connection, this one has {found}, its envelope included")]
    RequestSize { found: usize, limit: usize },
    #[error("the server's reply is malformed")]
    Malformed,
    /// A later call has taken its place: of [`crate::Client::watch_presence`] the last one counts.
    #[error("a later call has taken its place")]
    Replaced,
    #[error(transparent)]
    Closed(#[from] ClosedReason),
}

impl CallError {
    /// The status of a refusal.
    pub fn code(&self) -> Option<StatusCode> {
        match self {
            CallError::Refused(status) => status.code,
            _ => None,
        }
    }
}

/// Why entries were not forwarded, or not to all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// There is no such message, or its body is gone.
    #[error("there is no message {seq} to forward")]
    NothingThere { seq: u64 },
    /// The entries cannot be read.
    #[error(transparent)]
    Read(#[from] CallError),
    /// A target did not take them; those before it did.
    #[error(transparent)]
    Send(#[from] SendError),
}

/// Why there is no first connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    #[error("no connection within {} s: {last}", .after.as_secs_f32())]
    TimedOut { after: Duration, last: String },
    #[error(transparent)]
    Closed(#[from] ClosedReason),
}

/// Why a configuration cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{0:?} is no server address; write tcp://host:port, tls://host:port or quic://host:port")]
    Endpoint(String),
    #[error("{0:?} is no transport; write tcp, tls or quic")]
    Transport(String),
    #[error("the certificates to trust cannot be used: {0}")]
    Trust(String),
}
