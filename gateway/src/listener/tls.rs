//! TCP with TLS 1.3.

mod stream;

use std::{net::SocketAddr, sync::Arc};

use rustls::ServerConfig;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};

use self::stream::TlsStream;
use super::{ALPN, certificate::Certificate, tcp};
use crate::{Gateway, ListenError, PeerInfo, Transport, addresses::AddressPlace};

/// A bound listener.
pub struct Listener {
    tcp: tcp::Listener,
    config: Arc<ServerConfig>,
}

/// Binds an address; port 0 takes any free one.
pub fn bind(address: SocketAddr, certificate: Certificate) -> Result<Listener, ListenError> {
    let config = Arc::new(certificate.tls_config()?);
    Ok(Listener { tcp: tcp::bind(address)?, config })
}

impl Listener {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.tcp.address()
    }

    /// Accepts until the gateway drains or stops. Connections go on as tasks of the environment.
    pub async fn run(self, gateway: Gateway) {
        let accepting = self.tcp.accept_each(&gateway, |stream, remote_address| match gateway.arrive(remote_address) {
            Ok(address) => {
                let serving = serve(gateway.clone(), self.config.clone(), stream, remote_address, address);
                gateway.shared.environment.spawn(serving);
            }
            // There is no cheap way to say why before the handshake.
            Err(excess) => gateway.shared.metrics.limited_address(excess).increment(1),
        });
        tcp::until_drain(&gateway, accepting).await;
    }
}

/// The handshake is a task of its own, boxed, so that a served connection does not carry its state for life.
async fn serve(
    gateway: Gateway,
    config: Arc<ServerConfig>,
    stream: TcpStream,
    remote_address: SocketAddr,
    address: Option<AddressPlace>,
) {
    let shared = gateway.shared.clone();
    let Ok(permit) = shared.admission.handshake() else {
        return shared.metrics.refused_handshakes.increment(1);
    };
    let handshake = shared.limits.effort.pace(TlsStream::accept(config, stream));
    let handshake = Box::pin(timeout(shared.config.handshake_deadline, handshake));
    let stream = match handshake.await {
        Ok(Ok(stream)) if stream.agreed().alpn_protocol() == Some(ALPN) => stream,
        refused => {
            // Not by its own fault: the connection broke, or it was this gateway that had no time.
            let at_fault = match &refused {
                Ok(Ok(_)) => true,
                Ok(Err(error)) => error.kind() == std::io::ErrorKind::InvalidData,
                Err(_) => !shared.limits.effort.is_exhausted(),
            };
            tracing::debug!(%remote_address, error = ?refused.map(|stream| stream.map(|_| "no ALPN")), "TLS failed");
            if at_fault {
                shared.limits.addresses.failed(remote_address.ip(), shared.limits.time(Instant::now()));
            }
            return shared.metrics.transport_failures.increment(1);
        }
    };
    drop(permit);
    let peer = PeerInfo { transport: Transport::Tls, remote_address };
    let connection = gateway.serve_judged(stream, peer, address);
    shared.environment.spawn(connection);
}
