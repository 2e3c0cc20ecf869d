//! QUIC: one bidirectional stream, opened by the client, carries the frames.
//!
//! Data may come before the handshake (0-RTT), and is read only after it: whoever sends such data again cannot finish the handshake,
//! so nothing of it takes effect. Retry is asked for under pressure, so that forged addresses cost nothing.
//!
//! One endpoint, one socket: a second one on the same port (SO_REUSEPORT) gets packets by the address that they come from, and a
//! client that changes its address would reach an endpoint that does not know it.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use quinn::{
    ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime,
    TransportConfig, VarInt, crypto::rustls::QuicServerConfig,
};
use ring::{
    hmac,
    rand::{SecureRandom as _, SystemRandom},
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::{Instant, timeout};

use super::{certificate::Certificate, tcp::until_drain};
use crate::{
    Gateway, ListenError, PeerInfo, Transport,
    addresses::{AddressPlace, Excess},
};

/// Of the whole connection and of its one stream: what one client may make this process hold.
const RECEIVE_WINDOW_BYTES: u32 = 256 * 1024;
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
const SEND_WINDOW_BYTES: u64 = 256 * 1024;
/// Beyond the two and a half heartbeats after which the gateway itself gives up.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// Handshakes that wait for the listener, and the bytes that they may bring.
const INCOMING_MAX: usize = 4096;
const INCOMING_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// Enough that two live connections never share one.
const CONNECTION_ID_BYTES: usize = 8;
/// After a restart each client of the start before is told once: 100,000 of them within 10 s. Each answer is smaller than what asked.
const RESET_INTERVAL_MIN: Duration = Duration::from_micros(100);
/// One socket serves all clients; the kernel may grant less.
const SOCKET_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// A bound listener.
pub struct Listener {
    endpoint: Endpoint,
    address: SocketAddr,
}

/// Ends the connections of an earlier start. Whoever knows it can end any connection of this server.
#[derive(Clone)]
pub struct ResetKey([u8; 32]);

impl ResetKey {
    /// From 32 secret bytes. The same bytes in each start on an address: a client whose server was killed then learns so from the
    /// first packet that it sends to the next start, and not from its own idle timeout.
    pub const fn new(secret: [u8; 32]) -> Self {
        Self(secret)
    }

    fn endpoint_config(&self) -> EndpointConfig {
        let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &self.0)));
        config.cid_generator(|| Box::new(ConnectionIds));
        config.min_reset_interval(RESET_INTERVAL_MIN);
        config
    }
}

/// Plain random ids. The library's own can be told from others only within one start, so that packets of a start before would be
/// dropped without the answer that they are for.
struct ConnectionIds;

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; CONNECTION_ID_BYTES];
        // Without randomness there is no TLS handshake either.
        let _ = SystemRandom::new().fill(&mut id);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Binds an address; port 0 takes any free one. Needs a tokio runtime.
pub fn bind(address: SocketAddr, certificate: Certificate) -> Result<Listener, ListenError> {
    bind_with(address, certificate, EndpointConfig::default())
}

/// [`bind`], so that clients of an earlier start with the same key find out at once.
pub fn bind_with_reset_key(
    address: SocketAddr,
    certificate: Certificate,
    key: &ResetKey,
) -> Result<Listener, ListenError> {
    bind_with(address, certificate, key.endpoint_config())
}

fn bind_with(address: SocketAddr, certificate: Certificate, endpoint: EndpointConfig) -> Result<Listener, ListenError> {
    let failed = |source| ListenError::Bind { address, source };
    let crypto =
        QuicServerConfig::try_from(certificate.quic_config()?).map_err(|error| ListenError::Quic(error.to_string()))?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(Arc::new(transport()?))
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size_total(INCOMING_BYTES_MAX);
    let socket = socket(address).map_err(failed)?;
    let endpoint = Endpoint::new(endpoint, Some(config), socket, Arc::new(TokioRuntime));
    let endpoint = endpoint.map_err(failed)?;
    let address = endpoint.local_addr().map_err(failed)?;
    Ok(Listener { endpoint, address })
}

fn transport() -> Result<TransportConfig, ListenError> {
    let idle = IDLE_TIMEOUT.try_into().map_err(|_| ListenError::Quic("the idle timeout is too long".to_owned()))?;
    let mut transport = TransportConfig::default();
    transport
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW_BYTES))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .datagram_send_buffer_size(0)
        .max_idle_timeout(Some(idle))
        // Frames are small, and a probe leaves a buffer of twice its size with each connection. docs/performance.md has figures.
        .mtu_discovery_config(None);
    Ok(transport)
}

fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

impl Listener {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until the gateway drains or stops. Connections go on as tasks of the environment.
    pub async fn run(self, gateway: Gateway) {
        let accepting = async {
            while let Some(incoming) = self.endpoint.accept().await {
                accept(&gateway, incoming);
            }
        };
        until_drain(&gateway, accepting).await;
        // Connections that are being drained keep the socket; new ones are refused by it.
        self.endpoint.set_server_config(None);
    }
}

fn accept(gateway: &Gateway, incoming: Incoming) {
    let shared = &gateway.shared;
    let Ok(permit) = shared.admission.handshake() else {
        shared.metrics.refused_handshakes.increment(1);
        return incoming.refuse();
    };
    let is_pressed = shared.admission.is_under_pressure() || shared.limits.effort.is_exhausted();
    if is_pressed && !incoming.remote_address_validated() {
        shared.metrics.quic_retries.increment(1);
        // Cannot fail for an address that is not validated.
        return incoming.retry().unwrap_or_else(|error| error.into_incoming().refuse());
    }
    // Before the address is proven somebody else may have written it: it is charged for nothing until the handshake has proven it.
    let mut proven = incoming.remote_address_validated();
    let early = if proven {
        match gateway.arrive(incoming.remote_address()) {
            Ok(place) => Some(place),
            Err(excess) => {
                shared.metrics.limited_address(excess).increment(1);
                return incoming.refuse();
            }
        }
    } else {
        None
    };
    let serving = gateway.clone();
    shared.environment.spawn(async move {
        let shared = &serving.shared;
        let (deadline, remote_address) = (shared.config.handshake_deadline, incoming.remote_address());
        let opened = Box::pin(timeout(deadline, open(&serving, incoming, early, &mut proven))).await;
        match opened {
            Ok(Ok(Opened { stream, place })) => {
                drop(permit);
                let peer = PeerInfo { transport: Transport::Quic, remote_address };
                // A task of its own: what the handshake's has room for is twice as large. The connection closes with its stream.
                shared.environment.spawn(serving.serve_judged(stream, peer, place));
            }
            Ok(Err(NotOpened::Limited(excess))) => shared.metrics.limited_address(excess).increment(1),
            failed => {
                let error = failed.map(|opened| opened.err());
                tracing::debug!(%remote_address, ?error, "no QUIC stream was opened");
                if proven && !shared.limits.effort.is_exhausted() {
                    shared.limits.addresses.failed(remote_address.ip(), shared.limits.time(Instant::now()));
                }
                shared.metrics.transport_failures.increment(1);
            }
        }
    });
}

type Stream = tokio::io::Join<quinn::RecvStream, quinn::SendStream>;

/// The client's stream, which holds the connection.
struct Opened {
    stream: Stream,
    place: Option<AddressPlace>,
}

#[derive(Debug, thiserror::Error)]
enum NotOpened {
    #[error(transparent)]
    Failed(#[from] quinn::ConnectionError),
    #[error("the address is over a limit: {0:?}")]
    Limited(Excess),
}

/// The handshake and the client's stream. An address that was not `proven` is once the handshake is done, and is charged then.
async fn open(
    gateway: &Gateway,
    incoming: Incoming,
    early: Option<Option<AddressPlace>>,
    proven: &mut bool,
) -> Result<Opened, NotOpened> {
    let (effort, address) = (&gateway.shared.limits.effort, incoming.remote_address());
    effort.step().await;
    // All of the handshake's cryptography that the server does for the first flight happens in here.
    let connecting = effort.measure(|| incoming.accept())?;
    // Not `into_0rtt`: what came early may be a replay until the client has finished.
    let connection = connecting.await?;
    *proven = true;
    let place = match early {
        Some(place) => place,
        None => gateway.arrive(address).map_err(|excess| {
            connection.close(VarInt::from_u32(0), b"");
            NotOpened::Limited(excess)
        })?,
    };
    let (send, receive) = connection.accept_bi().await?;
    Ok(Opened { stream: tokio::io::join(receive, send), place })
}
