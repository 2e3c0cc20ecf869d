//! From an endpoint to a byte stream. Above this nothing knows which transport carries the frames.

mod quic;
mod tcp;
mod tls;

use std::{fmt, future::Future, io, pin::Pin, sync::Arc};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{
    config::{Endpoint, Transport},
    error::ConfigError,
};

/// The protocol name in TLS and QUIC handshakes.
const ALPN: &[u8] = b"im/1";

/// A duplex stream of bytes.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

/// What a dialer yields.
pub type Stream = Box<dyn ByteStream>;

/// Why there is no stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DialError(pub String);

impl From<io::Error> for DialError {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

/// Opens byte streams. The caller bounds the time.
pub trait Dialer: Send + Sync {
    /// A stream to the endpoint, its handshake done.
    fn dial<'a>(
        &'a self,
        endpoint: &'a Endpoint,
    ) -> Pin<Box<dyn Future<Output = Result<Stream, DialError>> + Send + 'a>>;
}

/// Whose certificates are good.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Nobody's: for TCP in the clear alone.
    Nobody,
    /// What this system trusts. If it trusts nobody, TLS and QUIC fail at the handshake.
    SystemRoots,
    /// Only what these certificates (PEM) have signed.
    Pinned(Vec<u8>),
}

/// The dialer for real networks.
pub struct NetDialer {
    tls: tokio_rustls::TlsConnector,
    quic: quic::QuicDialer,
}

impl fmt::Debug for NetDialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetDialer").finish_non_exhaustive()
    }
}

impl NetDialer {
    /// Trusts what it is told to trust.
    pub fn new(trust: &Trust) -> Result<Self, ConfigError> {
        let config = client_config(trust)?;
        let quic = quic::QuicDialer::new(config.clone())?;
        Ok(Self { tls: tokio_rustls::TlsConnector::from(Arc::new(config)), quic })
    }
}

impl Dialer for NetDialer {
    fn dial<'a>(
        &'a self,
        endpoint: &'a Endpoint,
    ) -> Pin<Box<dyn Future<Output = Result<Stream, DialError>> + Send + 'a>> {
        Box::pin(async move {
            match endpoint.transport {
                Transport::Tcp => tcp::dial(&endpoint.address).await.map(|stream| Box::new(stream) as Stream),
                Transport::Tls => tls::dial(&self.tls, endpoint).await,
                Transport::Quic => self.quic.dial(endpoint).await,
            }
        })
    }
}

/// TLS 1.3 only, with the ring provider named: a process-wide default could be missing or another one.
fn client_config(trust: &Trust) -> Result<rustls::ClientConfig, ConfigError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| ConfigError::Trust(error.to_string()))?
        .with_root_certificates(roots(trust)?)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

fn roots(trust: &Trust) -> Result<rustls::RootCertStore, ConfigError> {
    let mut roots = rustls::RootCertStore::empty();
    match trust {
        Trust::Nobody => {}
        Trust::SystemRoots => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
        }
        Trust::Pinned(pem) => {
            for certificate in CertificateDer::pem_slice_iter(pem) {
                let certificate = certificate.map_err(|error| ConfigError::Trust(error.to_string()))?;
                roots.add(certificate).map_err(|error| ConfigError::Trust(error.to_string()))?;
            }
            if roots.is_empty() {
                return Err(ConfigError::Trust("there is no certificate in the PEM text".to_owned()));
            }
        }
    }
    Ok(roots)
}
