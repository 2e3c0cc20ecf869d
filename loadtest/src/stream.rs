//! Connections of the three transports behind one stream. Above this file there are only bytes.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs as _},
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use quinn::crypto::rustls::QuicClientConfig;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpSocket, TcpStream},
};

/// The protocol's name in TLS.
pub const ALPN: &[u8] = b"im/1";
/// Asked for; the kernel gives at most `net.core.rmem_max` and `wmem_max`.
const QUIC_SOCKET_BYTES: usize = 4 * 1024 * 1024;

/// What the kernel may take in for a narrow connection.
const NARROW_BYTES: u32 = 4096;

/// How the clients of a run connect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    #[default]
    Tcp,
    Tls,
    Quic,
}

/// Opens connections to one server address. Belongs to one runtime, since a QUIC endpoint does.
pub struct Connector {
    tls: Option<tokio_rustls::TlsConnector>,
    quic: Option<quinn::Endpoint>,
    /// The address that TCP connections come from.
    from: Option<std::net::IpAddr>,
}

/// A connected stream of bytes in both directions.
pub enum Stream {
    Tcp(TcpStream),
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
    Quic { send: quinn::SendStream, receive: quinn::RecvStream, connection: quinn::Connection },
}

impl Connector {
    /// For a transport; each connection after the first may resume its TLS session.
    pub fn new(transport: Transport, ca: Option<&Path>) -> anyhow::Result<Self> {
        Self::with_resumption(transport, ca, true)
    }

    /// For a transport; `ca` is the PEM file of the certificate authority, which TLS and QUIC need.
    pub fn with_resumption(transport: Transport, ca: Option<&Path>, resume: bool) -> anyhow::Result<Self> {
        let mut connector = Self { tls: None, quic: None, from: None };
        if transport == Transport::Tcp {
            return Ok(connector);
        }
        let ca = ca.context("TLS and QUIC need --ca FILE")?;
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(ca).with_context(|| format!("read {}", ca.display()))? {
            roots.add(certificate.with_context(|| format!("read {}", ca.display()))?)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        if !resume {
            config.resumption = rustls::client::Resumption::disabled();
        }
        if transport == Transport::Tls {
            connector.tls = Some(tokio_rustls::TlsConnector::from(Arc::new(config)));
        } else {
            let mut endpoint = quic_endpoint()?;
            let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config)?));
            let mut transport = quinn::TransportConfig::default();
            transport.keep_alive_interval(Some(Duration::from_secs(20)));
            config.transport_config(Arc::new(transport));
            endpoint.set_default_client_config(config);
            connector.quic = Some(endpoint);
        }
        Ok(connector)
    }

    /// For TLS as it says.
    pub fn with_tls(mut config: rustls::ClientConfig) -> Self {
        config.alpn_protocols = vec![ALPN.to_vec()];
        Self { tls: Some(tokio_rustls::TlsConnector::from(Arc::new(config))), quic: None, from: None }
    }

    /// The first bytes of a TLS handshake with a server.
    pub fn client_hello(&self, address: &str) -> anyhow::Result<Vec<u8>> {
        let connector = self.tls.as_ref().context("only TLS has such bytes")?;
        let mut handshake = rustls::ClientConnection::new(connector.config().clone(), server_name(address)?)?;
        let mut hello = Vec::new();
        handshake.write_tls(&mut hello)?;
        Ok(hello)
    }

    /// From now on TCP connections come from this address of the machine.
    pub fn come_from(&mut self, address: std::net::IpAddr) {
        self.from = Some(address);
    }

    /// A connection to `host:port`.
    pub async fn connect(&self, address: &str) -> anyhow::Result<Stream> {
        self.connect_reading(address, false).await
    }

    /// The same; a narrow one takes in little that nobody reads, so that a stalled reader is felt soon.
    pub async fn connect_reading(&self, address: &str, narrow: bool) -> anyhow::Result<Stream> {
        let resolved = address.to_socket_addrs()?.next().context("the address resolves to nothing")?;
        if let Some(endpoint) = &self.quic {
            let connection = endpoint.connect(resolved, host_of(address))?.await?;
            let (send, receive) = connection.open_bi().await?;
            return Ok(Stream::Quic { send, receive, connection });
        }
        let stream = connect_tcp(resolved, self.from, narrow).await?;
        match &self.tls {
            None => Ok(Stream::Tcp(stream)),
            Some(connector) => Ok(Stream::Tls(Box::new(connector.connect(server_name(address)?, stream).await?))),
        }
    }
}

fn host_of(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']'])
}

fn server_name(address: &str) -> anyhow::Result<ServerName<'static>> {
    Ok(ServerName::try_from(host_of(address).to_owned())?)
}

/// An endpoint whose socket holds what a burst for all its connections brings: what the kernel drops there comes again only after a
/// timeout, and would be read as the server's latency.
fn quic_endpoint() -> anyhow::Result<quinn::Endpoint> {
    let socket = std::net::UdpSocket::bind(SocketAddr::from(([0, 0, 0, 0], 0)))?;
    let options = socket2::SockRef::from(&socket);
    options.set_recv_buffer_size(QUIC_SOCKET_BYTES)?;
    options.set_send_buffer_size(QUIC_SOCKET_BYTES)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    Ok(quinn::Endpoint::new(quinn::EndpointConfig::default(), None, socket, runtime)?)
}

async fn connect_tcp(address: SocketAddr, from: Option<std::net::IpAddr>, narrow: bool) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(from) = from {
        socket.bind(SocketAddr::new(from, 0))?;
    }
    if narrow {
        socket.set_recv_buffer_size(NARROW_BYTES)?;
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

impl Stream {
    /// Whether the TLS session was resumed; unknown over QUIC.
    pub fn resumed(&self) -> Option<bool> {
        match self {
            Stream::Tls(stream) => Some(stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed)),
            Stream::Tcp(_) | Stream::Quic { .. } => None,
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        match self {
            // A reset instead of a handshake: thousands of connections in TIME_WAIT would disturb the next run.
            Stream::Tcp(stream) => _ = socket2::SockRef::from(&*stream).set_linger(Some(Duration::ZERO)),
            Stream::Tls(stream) => _ = socket2::SockRef::from(stream.get_ref().0).set_linger(Some(Duration::ZERO)),
            Stream::Quic { connection, .. } => connection.close(0u32.into(), b""),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buffer),
            Stream::Quic { receive, .. } => AsyncRead::poll_read(Pin::new(receive), cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, bytes),
            Stream::Quic { send, .. } => AsyncWrite::poll_write(Pin::new(send), cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
            Stream::Tcp(_) | Stream::Quic { .. } => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
            Stream::Quic { send, .. } => AsyncWrite::poll_shutdown(Pin::new(send), cx),
        }
    }
}
