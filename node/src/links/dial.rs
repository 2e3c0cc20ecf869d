//! Dialling: a connection of its own for each link.

use std::{error::Error, net::SocketAddr};

use im_proto::{
    InstanceId,
    environment::Environment,
    link::channel::{Connecting, Connector, GatewayEnd, LinkError, PeerEnd},
    v1::link_service_client::LinkServiceClient,
};
use tokio::time::timeout;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use super::{
    DIAL_TIMEOUT, FRAME_BYTES_MAX, ITEM_BYTES_MAX, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, WINDOW_BYTES, pump,
    tls::ServiceTls,
};

/// Makes links to routers at the addresses of the registry.
#[derive(Clone)]
pub struct Dialler {
    tls: Option<ServiceTls>,
    /// Plain text beyond this machine.
    insecure: bool,
    environment: Environment,
}

impl Dialler {
    /// Without `tls` links are plain text, and lead to this machine alone unless `insecure`. What comes in on links is read by tasks
    /// of `environment`.
    pub fn new(tls: Option<ServiceTls>, insecure: bool, environment: Environment) -> Self {
        Self { tls, insecure, environment }
    }

    async fn client(&self, address: &str) -> Result<LinkServiceClient<Channel>, String> {
        if self.tls.is_none() && !self.insecure && !is_loopback(address) {
            return Err("it is not on this machine, and there are no service certificates; --service-ca, \
                        --service-cert and --service-key name some, --insecure-links goes without"
                .to_owned());
        }
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
            .map_err(|error| with_causes(&error))?
            .connect_timeout(DIAL_TIMEOUT)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        if let Some(tls) = &self.tls {
            endpoint = endpoint.tls_config(tls.towards_router()).map_err(|error| with_causes(&error))?;
        }
        let channel = endpoint.connect().await.map_err(|error| with_causes(&error))?;
        Ok(LinkServiceClient::new(channel).max_decoding_message_size(ITEM_BYTES_MAX))
    }

    async fn gateway(self, address: String) -> Result<GatewayEnd, String> {
        let (sender, outgoing) = pump::away();
        let incoming = self.client(&address).await?.gateway(outgoing).await.map_err(refused)?;
        Ok(pump::end(sender, incoming.into_inner(), &self.environment))
    }

    async fn peer(self, address: String) -> Result<PeerEnd, String> {
        let (sender, outgoing) = pump::away();
        let incoming = self.client(&address).await?.peer(outgoing).await.map_err(refused)?;
        Ok(pump::end(sender, incoming.into_inner(), &self.environment))
    }
}

impl Connector<GatewayEnd> for Dialler {
    fn connect(&self, to: &InstanceId, address: &str) -> Connecting<GatewayEnd> {
        Box::pin(in_time(to.clone(), self.clone().gateway(address.to_owned())))
    }
}

impl Connector<PeerEnd> for Dialler {
    fn connect(&self, to: &InstanceId, address: &str) -> Connecting<PeerEnd> {
        Box::pin(in_time(to.clone(), self.clone().peer(address.to_owned())))
    }
}

async fn in_time<E>(to: InstanceId, dialling: impl Future<Output = Result<E, String>>) -> Result<E, LinkError> {
    let outcome = timeout(DIAL_TIMEOUT, dialling).await.unwrap_or_else(|_| Err("no answer in time".to_owned()));
    outcome.map_err(|reason| LinkError { to, reason })
}

/// By the address itself: a name could lead anywhere.
fn is_loopback(address: &str) -> bool {
    address.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_loopback())
        || address.strip_prefix("localhost:").is_some()
}

fn refused(status: Status) -> String {
    format!("{}: {}", status.code().description(), status.message())
}

/// tonic's own text is "transport error"; what happened is below it.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
