//! Where transports end. Each listener turns what it accepts into a byte stream for [`crate::Gateway::serve_stream`].
//!
//! Binding and running are apart, so that the process knows its addresses before anything is accepted.

pub mod certificate;
pub mod quic;
pub mod tcp;
pub mod tls;

/// The name of the protocol in TLS and QUIC handshakes. A client that does not offer it is refused.
pub const ALPN: &[u8] = b"im/1";
