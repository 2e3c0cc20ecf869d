//! What a client needs to know before it connects. Defaults carry their reason.

use std::{fmt, future::Future, pin::Pin, str::FromStr, sync::Arc, time::Duration};

use im_proto::{ConversationId, UserId, environment::Environment, id::IdError, limits};

use crate::{
    dial::{Dialer, NetDialer, Trust},
    environment,
    error::ConfigError,
};

/// How a client is set up.
#[derive(Clone)]
pub struct ClientConfig {
    /// Where to connect; asked again before each round of attempts.
    pub endpoints: Arc<dyn EndpointSource>,
    /// Who connects.
    pub token: Arc<dyn TokenSource>,
    /// Opens byte streams. Share one between many clients: it holds the QUIC socket.
    pub dialer: Arc<dyn Dialer>,
    pub environment: Environment,
    /// Which conversations are followed without being asked for.
    pub follow_all: FollowAll,
    /// Whether the server is told of entries that were handed over as events, so that their senders see them delivered.
    pub receipts: bool,
    pub client_name: String,
    pub client_version: String,
    /// Unacknowledged sends, 1 to 256; [`crate::Client::send`] waits beyond it. 256 is what a gateway keeps for a session.
    pub window: usize,
    /// Events that wait for the application. 4,096 entries of 100 bytes are under 1 MiB and some ten milliseconds of a busy stream.
    pub event_queue: usize,
    /// For one attempt: dial, handshake, `Welcome`.
    pub connect_timeout: Duration,
    /// How long [`crate::Client::connect`] tries.
    pub ready_timeout: Duration,
    /// How long a call may take, reconnects and retries included.
    pub call_timeout: Duration,
    /// A connection on which answers are due and none arrived for this long is given up. A failover takes a lease (10 s) and some.
    pub answer_timeout: Duration,
    /// The client asks a silent server at least this often, and gives the connection up after two and a half times this. A transport
    /// need not notice a server that died: QUIC has nobody to reset it. Half a minute suits devices on a battery.
    pub heartbeat_longest: Duration,
    /// Between attempts to connect. Who refuses for a while is not asked before; if it is the only one, that can take up to 5 minutes.
    pub reconnect: Backoff,
}

impl ClientConfig {
    /// The ordinary setup on this system.
    pub fn new(
        endpoints: impl EndpointSource + 'static,
        token: impl TokenSource + 'static,
        trust: &Trust,
    ) -> Result<Self, ConfigError> {
        let dialer = Arc::new(NetDialer::new(trust)?);
        Ok(Self::with_dialer(Arc::new(endpoints), Arc::new(token), dialer, environment::system()))
    }

    /// With everything injected.
    pub fn with_dialer(
        endpoints: Arc<dyn EndpointSource>,
        token: Arc<dyn TokenSource>,
        dialer: Arc<dyn Dialer>,
        environment: Environment,
    ) -> Self {
        Self {
            endpoints,
            token,
            dialer,
            environment,
            follow_all: FollowAll::No,
            receipts: true,
            client_name: "im-client".to_owned(),
            client_version: env!("CARGO_PKG_VERSION").to_owned(),
            window: limits::PENDING_SENDS_MAX,
            event_queue: 4096,
            connect_timeout: Duration::from_secs(5),
            ready_timeout: Duration::from_secs(10),
            call_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(30),
            heartbeat_longest: Duration::from_secs(30),
            reconnect: Backoff::default(),
        }
    }
}

impl fmt::Debug for ClientConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientConfig").field("follow_all", &self.follow_all).finish_non_exhaustive()
    }
}

/// Whether conversations are followed without being asked for, the user's own log included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FollowAll {
    /// Only what [`crate::Client::follow`] names.
    #[default]
    No,
    /// Everything that happens after the first sync, in old and new conversations.
    FromNow,
    /// Everything since the user came into each conversation.
    FromStart,
}

/// Waiting times between attempts: doubled each time, a random half of it taken off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub base: Duration,
    pub max: Duration,
}

impl Default for Backoff {
    /// 100 ms to 5 s: a server that restarts is found again at once, a hundred thousand clients do not come as one wave.
    fn default() -> Self {
        Self { base: Duration::from_millis(100), max: Duration::from_secs(5) }
    }
}

impl Backoff {
    /// The waiting time before attempt `attempt` (0 is the first retry).
    pub(crate) fn delay(&self, attempt: u32, environment: &Environment) -> Duration {
        let whole = self.base.saturating_mul(1 << attempt.min(16)).min(self.max);
        whole / 2 + environment.jitter(whole / 2)
    }
}

/// How bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// TCP in the clear, for loopback and tests.
    Tcp,
    /// TCP with TLS 1.3.
    Tls,
    Quic,
}

impl Transport {
    /// As in the scheme of an address.
    pub const fn as_str(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Tls => "tls",
            Transport::Quic => "quic",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Transport {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        [Transport::Tcp, Transport::Tls, Transport::Quic]
            .into_iter()
            .find(|transport| transport.as_str() == text)
            .ok_or_else(|| ConfigError::Transport(text.to_owned()))
    }
}

/// A place to connect to, written `tcp://host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub transport: Transport,
    /// `host:port`.
    pub address: String,
    /// The name that the certificate must have; the host of the address if absent. Endpoints that the server there offers have this name,
    /// too, unless they are configured with another one.
    pub server_name: Option<String>,
}

impl Endpoint {
    /// From a transport and `host:port`.
    pub fn new(transport: Transport, address: impl Into<String>) -> Result<Self, ConfigError> {
        let address = address.into();
        let port =
            address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse().ok());
        match port {
            Some(0_u16) | None => Err(ConfigError::Endpoint(address)),
            Some(_) => Ok(Self { transport, address, server_name: None }),
        }
    }

    /// The name to check the certificate against.
    pub fn server_name(&self) -> &str {
        let host = self.address.rsplit_once(':').map_or(self.address.as_str(), |(host, _)| host);
        self.server_name.as_deref().unwrap_or_else(|| host.trim_start_matches('[').trim_end_matches(']'))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.transport, self.address)
    }
}

impl FromStr for Endpoint {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let invalid = || ConfigError::Endpoint(text.to_owned());
        let (scheme, address) = text.split_once("://").ok_or_else(invalid)?;
        let transport = scheme.parse().map_err(|_| invalid())?;
        Self::new(transport, address.trim_end_matches('/')).map_err(|_| invalid())
    }
}

/// Where endpoints come from. Must not block for long: a small file is fine.
pub trait EndpointSource: Send + Sync {
    /// All of them, the best first. The text of an error is for people.
    fn endpoints(&self) -> Result<Vec<Endpoint>, String>;
}

impl EndpointSource for Vec<Endpoint> {
    fn endpoints(&self) -> Result<Vec<Endpoint>, String> {
        Ok(self.clone())
    }
}

/// Where tokens come from.
pub trait TokenSource: Send + Sync {
    /// A token for the next session. The text of an error is for people.
    fn token(&self) -> Pin<Box<dyn Future<Output = Result<String, String>> + Send + '_>>;

    /// Whether a later call may give another token, so that an expired one is not the end.
    fn is_renewable(&self) -> bool;
}

impl TokenSource for String {
    fn token(&self) -> Pin<Box<dyn Future<Output = Result<String, String>> + Send + '_>> {
        Box::pin(std::future::ready(Ok(self.clone())))
    }

    fn is_renewable(&self) -> bool {
        false
    }
}

/// Which conversation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// The user's own log.
    Me,
    /// The direct conversation with that user.
    Peer(UserId),
    Conversation(ConversationId),
}

impl Target {
    /// The direct conversation with a user.
    pub fn peer(user: &str) -> Result<Self, IdError> {
        Ok(Self::Peer(UserId::parse(user)?))
    }
}

impl From<ConversationId> for Target {
    fn from(conversation: ConversationId) -> Self {
        Self::Conversation(conversation)
    }
}

/// `@user`, `me`, or 32 hexadecimal digits.
impl FromStr for Target {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        match text.strip_prefix('@') {
            Some(user) => Self::peer(user),
            None if text == "me" => Ok(Self::Me),
            None => text.parse().map(Self::Conversation),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Me => f.write_str("me"),
            Target::Peer(user) => write!(f, "@{user}"),
            Target::Conversation(conversation) => conversation.fmt(f),
        }
    }
}
