//! Why a listener cannot start.

use std::{io, net::SocketAddr};

/// Why a listener cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("cannot listen on {address}: {source}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("the certificate or its key cannot be used: {0}")]
    Certificate(#[from] rustls::Error),
    #[error("QUIC cannot be set up: {0}")]
    Quic(String),
}
