//! What this process listens on: sockets are bound before anything else is started, so that a taken port changes nothing.

use std::{io, net::SocketAddr, path::Path};

use im_gateway::{
    Gateway, ListenError,
    listener::{certificate::Certificate, quic, quic::ResetKey, tcp, tls},
};
use im_proto::environment::Environment;
use im_registry::Endpoint;
use tokio::net::TcpListener;

use crate::{
    config::Config,
    data_directory::{DataDirectory, Ready},
    failure::Failure,
};

/// Everything that is bound and not yet accepting.
pub struct Listeners {
    pub clients: Clients,
    pub api: Option<TcpListener>,
    pub http: Option<TcpListener>,
    pub addresses: Addresses,
}

/// The listeners of the gateway.
pub struct Clients {
    tcp: Option<tcp::Listener>,
    tls: Option<tls::Listener>,
    quic: Option<quic::Listener>,
}

/// Where this process listens; ports are the real ones.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    pub tcp: Option<SocketAddr>,
    pub tls: Option<SocketAddr>,
    pub quic: Option<SocketAddr>,
    pub api: Option<SocketAddr>,
    pub http: Option<SocketAddr>,
}

/// Binds what the configuration asks for.
pub async fn bind(config: &Config, data: &DataDirectory) -> Result<Listeners, Failure> {
    let certificate = certificate(data)?;
    let tls = |address| tls::bind(address, certificate.clone());
    let quic = |address| quic::bind_with_reset_key(address, certificate.clone(), &ResetKey::new(data.reset_key));
    let clients = Clients {
        tcp: config.tcp.map(tcp::bind).transpose().map_err(|error| gateway_refused("tcp", error))?,
        tls: config.tls.map(tls).transpose().map_err(|error| gateway_refused("tls", error))?,
        quic: config.quic.map(quic).transpose().map_err(|error| gateway_refused("quic", error))?,
    };
    let api = plain("api", config.api).await?;
    let http = plain("http", config.http).await?;
    let local = |listener: &Option<TcpListener>| listener.as_ref().and_then(|listener| listener.local_addr().ok());
    let addresses = Addresses {
        tcp: clients.tcp.as_ref().map(tcp::Listener::address),
        tls: clients.tls.as_ref().map(tls::Listener::address),
        quic: clients.quic.as_ref().map(quic::Listener::address),
        api: local(&api),
        http: local(&http),
    };
    Ok(Listeners { clients, api, http, addresses })
}

fn certificate(data: &DataDirectory) -> Result<Certificate, Failure> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|error| Failure::Usage(format!("cannot read {}: {error}", path.display())))
    };
    let (chain, key) = (data.certificate(), data.certificate_key());
    Certificate::from_pem(&read(&chain)?, &read(&key)?)
        .map_err(|error| Failure::Usage(format!("{} with {}: {error}", chain.display(), key.display())))
}

async fn plain(option: &str, address: Option<SocketAddr>) -> Result<Option<TcpListener>, Failure> {
    let Some(address) = address else { return Ok(None) };
    TcpListener::bind(address).await.map(Some).map_err(|error| refused(option, address, &error))
}

fn gateway_refused(option: &str, error: ListenError) -> Failure {
    match error {
        ListenError::Bind { address, source } => refused(option, address, &source),
        other => Failure::Usage(format!("--{option}: {other}")),
    }
}

fn refused(option: &str, address: SocketAddr, error: &io::Error) -> Failure {
    Failure::Usage(match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "--{option} {address}: port {} is taken by another program; stop that one or choose another port (0: any free one)",
            address.port()
        ),
        io::ErrorKind::PermissionDenied => {
            format!("--{option} {address}: port {} needs privileges; choose one above 1023", address.port())
        }
        _ => format!("--{option} {address}: cannot listen: {error}"),
    })
}

impl Clients {
    /// Accepts from now on, until the gateway drains.
    pub fn run(self, gateway: &Gateway, environment: &Environment) {
        if let Some(listener) = self.tcp {
            environment.spawn(listener.run(gateway.clone()));
        }
        if let Some(listener) = self.tls {
            environment.spawn(listener.run(gateway.clone()));
        }
        if let Some(listener) = self.quic {
            environment.spawn(listener.run(gateway.clone()));
        }
    }
}

impl Addresses {
    /// What clients are told, and where a link would be dialled.
    pub fn of_gateway(&self, advertise: &str) -> Vec<Endpoint> {
        [("tcp", self.tcp), ("tls", self.tls), ("quic", self.quic)]
            .into_iter()
            .filter_map(|(transport, address)| Some(endpoint(transport, address?, advertise)))
            .collect()
    }

    /// Where other roles reach the router: in this process by a pair of channels, whatever the address says.
    pub fn of_router(&self) -> Vec<Endpoint> {
        let link = Endpoint { transport: "link".to_owned(), address: "in-process".to_owned() };
        let api = self.api.map(|address| endpoint("api", address, ""));
        std::iter::once(link).chain(api).collect()
    }

    /// For `ready.json`.
    pub fn ready(&self, data: &DataDirectory) -> Ready {
        let text = |address: Option<SocketAddr>| address.map(|address| address.to_string());
        Ready {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            tcp: text(self.tcp),
            tls: text(self.tls),
            quic: text(self.quic),
            api: text(self.api),
            http: text(self.http),
            ca: data.ca(),
            data: data.root().to_owned(),
        }
    }
}

fn endpoint(transport: &str, address: SocketAddr, host: &str) -> Endpoint {
    let address = if host.is_empty() { address.to_string() } else { format!("{host}:{}", address.port()) };
    Endpoint { transport: transport.to_owned(), address }
}
