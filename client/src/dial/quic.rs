//! QUIC: one bidirectional stream, opened by the client, carries the frames.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use quinn::{VarInt, crypto::rustls::QuicClientConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{DialError, Stream};
use crate::{config::Endpoint, error::ConfigError};

/// A connection without packets for this long is dead. Twice the longest heartbeat interval that a server should ask for.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// A connection that is quiet asks whether the server is still there, because nothing else tells that it was killed: TCP learns it
/// from the other side's kernel, QUIC from the answer to the next packet. 5 s is how long a client may stay unaware.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// What the server may send ahead; a slow application holds this much, not more.
const RECEIVE_WINDOW_BYTES: u32 = 1024 * 1024;

/// Shares one socket per address family between all connections.
pub(super) struct QuicDialer {
    config: quinn::ClientConfig,
    v4: OnceLock<quinn::Endpoint>,
    v6: OnceLock<quinn::Endpoint>,
}

impl QuicDialer {
    pub(super) fn new(config: rustls::ClientConfig) -> Result<Self, ConfigError> {
        let crypto = QuicClientConfig::try_from(config).map_err(|error| ConfigError::Trust(error.to_string()))?;
        let mut transport = quinn::TransportConfig::default();
        transport.max_idle_timeout(IDLE_TIMEOUT.try_into().ok());
        transport.keep_alive_interval(Some(KEEP_ALIVE_INTERVAL));
        transport.receive_window(VarInt::from_u32(RECEIVE_WINDOW_BYTES));
        transport.stream_receive_window(VarInt::from_u32(RECEIVE_WINDOW_BYTES));
        transport.max_concurrent_bidi_streams(VarInt::from_u32(0));
        transport.max_concurrent_uni_streams(VarInt::from_u32(0));
        transport.datagram_receive_buffer_size(None);
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport));
        Ok(Self { config, v4: OnceLock::new(), v6: OnceLock::new() })
    }

    pub(super) async fn dial(&self, endpoint: &Endpoint) -> Result<Stream, DialError> {
        let mut last = DialError(format!("{} has no address", endpoint.address));
        for address in tokio::net::lookup_host(&endpoint.address).await? {
            match self.connect(address, endpoint.server_name()).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect(&self, address: SocketAddr, server_name: &str) -> Result<Stream, DialError> {
        let error = |error: &dyn std::error::Error| DialError(error.to_string());
        let connecting = self
            .endpoint(address)?
            .connect_with(self.config.clone(), address, server_name)
            .map_err(|failure| error(&failure))?;
        let connection = connecting.await.map_err(|failure| error(&failure))?;
        let (send, receive) = connection.open_bi().await.map_err(|failure| error(&failure))?;
        Ok(Box::new(QuicStream { send, receive, _connection: connection }))
    }

    fn endpoint(&self, address: SocketAddr) -> io::Result<&quinn::Endpoint> {
        let (slot, local) = match address.ip() {
            IpAddr::V4(_) => (&self.v4, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            IpAddr::V6(_) => (&self.v6, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        };
        match slot.get() {
            Some(endpoint) => Ok(endpoint),
            // Two at once may both open a socket; one of them is dropped again.
            None => {
                let endpoint = quinn::Endpoint::client(SocketAddr::new(local, 0))?;
                Ok(slot.get_or_init(|| endpoint))
            }
        }
    }
}

/// Both halves, and the connection, which ends when the last of the three is dropped.
struct QuicStream {
    send: quinn::SendStream,
    receive: quinn::RecvStream,
    _connection: quinn::Connection,
}

impl AsyncRead for QuicStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        AsyncRead::poll_read(Pin::new(&mut self.receive), cx, buf)
    }
}

impl AsyncWrite for QuicStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.send), cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(Pin::new(&mut self.send), cx)
    }

    /// Ends the sending half. What was written before still arrives if the caller reads on until the other side ends, too.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_shutdown(Pin::new(&mut self.send), cx)
    }
}
