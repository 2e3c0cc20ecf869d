//! A server of the flooder's own: what the machine gives for whole handshakes when nobody of the established users' server takes part.

use std::{net::IpAddr, sync::Arc};

use futures::{StreamExt as _, stream::FuturesUnordered};
use rustls::{ServerConfig, crypto::ring, version::TLS13};
use tokio::{
    net::{TcpListener, TcpStream},
    time::Instant,
};
use tokio_rustls::TlsAcceptor;

use crate::stream::ALPN;

/// It listens.
pub struct Decoy {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    /// Handshakes in one second, and after a pause at once; beyond them connections are closed.
    admitted: f64,
    /// Where it listens.
    pub address: String,
}

impl Decoy {
    pub async fn listen(address: IpAddr, admitted: f64) -> anyhow::Result<Self> {
        let signed = rcgen::generate_simple_self_signed(vec![address.to_string()])?;
        let key = rustls::pki_types::PrivateKeyDer::try_from(signed.signing_key.serialize_der());
        let key = key.map_err(|error| anyhow::anyhow!("the key cannot be used: {error}"))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![signed.cert.der().clone()], key)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 1;
        let listener = TcpListener::bind((address, 0)).await?;
        let address = listener.local_addr()?.to_string();
        Ok(Self { listener, acceptor: TlsAcceptor::from(Arc::new(config)), admitted, address })
    }

    /// Serves for as long as it is polled.
    pub async fn run(&self) -> std::convert::Infallible {
        let mut handshakes = FuturesUnordered::new();
        let (mut left, mut since) = (self.admitted, Instant::now());
        loop {
            tokio::select! {
                accepted = self.listener.accept() => {
                    let now = Instant::now();
                    left = (left + (now - since).as_secs_f64() * self.admitted).min(self.admitted);
                    since = now;
                    if let Ok((stream, _)) = accepted && left >= 1.0 {
                        left -= 1.0;
                        handshakes.push(self.serve(stream));
                    }
                }
                Some(()) = handshakes.next() => {}
            }
        }
    }

    async fn serve(&self, stream: TcpStream) {
        if let Ok(mut stream) = self.acceptor.accept(stream).await {
            // Until the client has gone.
            let _ = tokio::io::AsyncReadExt::read_u8(&mut stream).await;
        }
    }
}
