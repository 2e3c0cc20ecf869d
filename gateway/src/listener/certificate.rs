//! A certificate with its key, and what TLS and QUIC make of it: TLS 1.3 only, ALPN, the ring provider named explicitly.

use std::sync::Arc;

use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{NoServerSessionStorage, ServerSessionMemoryCache},
    version::TLS13,
};

use super::ALPN;
use crate::ListenError;

/// QUIC clients whose ticket is good for one more connection: some 400 bytes each, 3 MB.
const QUIC_TICKETS_MAX: usize = 8_192;

/// A certificate chain, leaf first, and the leaf's private key.
#[derive(Debug)]
pub struct Certificate {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl Clone for Certificate {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

impl Certificate {
    /// From PEM texts.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, ListenError> {
        let bad = |error: rustls::pki_types::pem::Error| rustls::Error::General(error.to_string());
        let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<Vec<_>, _>>().map_err(bad)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(bad)?;
        Ok(Self { chain, key })
    }

    /// For TLS over TCP: resumption by tickets alone, the server remembers nothing a client.
    pub(super) fn tls_config(self) -> Result<ServerConfig, ListenError> {
        let mut config = self.server_config()?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.ticketer = ring::Ticketer::new()?;
        Ok(config)
    }

    /// For QUIC, with data before the handshake: its ticket must be good for one use, so the server remembers the last ones. Whose
    /// ticket was forgotten does a whole handshake.
    pub(super) fn quic_config(self) -> Result<ServerConfig, ListenError> {
        let mut config = self.server_config()?;
        config.session_storage = ServerSessionMemoryCache::new(QUIC_TICKETS_MAX);
        // The one value that QUIC allows.
        config.max_early_data_size = u32::MAX;
        Ok(config)
    }

    fn server_config(self) -> Result<ServerConfig, ListenError> {
        let provider = Arc::new(ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_single_cert(self.chain, self.key)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 1;
        Ok(config)
    }
}
