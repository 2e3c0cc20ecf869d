//! What this process listens on: sockets are bound before anything else is started, so that a taken port changes nothing.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use im_gateway::{
    Gateway, ListenError,
    listener::{certificate::Certificate, quic, quic::ResetKey, tcp, tls},
};
use im_proto::environment::Environment;
use im_registry::Endpoint;
use tokio::net::TcpListener;

use crate::{config::Config, data_directory::Ready, failure::Failure};

/// What TLS and QUIC show to clients.
pub struct ClientTls {
    pub certificate: Certificate,
    /// Ends QUIC connections of earlier starts.
    pub reset_key: [u8; 32],
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
    pub link: Option<SocketAddr>,
}

/// Tries whether these could be bound, before there is anything that binding needs. Somebody may still come first.
pub fn probe(config: &Config) -> Result<(), Failure> {
    let streams = [("tcp", config.tcp), ("tls", config.tls), ("api", config.api), ("http", config.http)];
    for (option, wanted) in streams {
        let Some(wanted) = wanted else { continue };
        std::net::TcpListener::bind(wanted).map_err(|error| refused(option, wanted, &error))?;
    }
    let Some(wanted) = config.quic else { return Ok(()) };
    std::net::UdpSocket::bind(wanted).map(drop).map_err(|error| refused("quic", wanted, &error))
}

/// Reads a certificate chain with its key.
pub fn certificate(chain: &Path, key: &Path) -> Result<Certificate, Failure> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|error| Failure::Usage(format!("cannot read {}: {error}", path.display())))
    };
    Certificate::from_pem(&read(chain)?, &read(key)?)
        .map_err(|error| Failure::Usage(format!("{} with {}: {error}", chain.display(), key.display())))
}

/// Binds where clients connect. `tls` is not needed if neither TLS nor QUIC is asked for.
pub fn clients(config: &Config, client_tls: Option<&ClientTls>, addresses: &mut Addresses) -> Result<Clients, Failure> {
    let mut clients = Clients { tcp: None, tls: None, quic: None };
    clients.tcp = config.tcp.map(tcp::bind).transpose().map_err(|error| gateway_refused("tcp", error))?;
    if let Some(ClientTls { certificate, reset_key }) = client_tls {
        let tls = |address| tls::bind(address, certificate.clone());
        let quic = |address| quic::bind_with_reset_key(address, certificate.clone(), &ResetKey::new(*reset_key));
        clients.tls = config.tls.map(tls).transpose().map_err(|error| gateway_refused("tls", error))?;
        clients.quic = config.quic.map(quic).transpose().map_err(|error| gateway_refused("quic", error))?;
    }
    addresses.tcp = clients.tcp.as_ref().map(tcp::Listener::address);
    addresses.tls = clients.tls.as_ref().map(tls::Listener::address);
    addresses.quic = clients.quic.as_ref().map(quic::Listener::address);
    Ok(clients)
}

/// Binds another listener, named as its option; says where it listens.
pub async fn plain(
    option: &str,
    wanted: Option<SocketAddr>,
    address: &mut Option<SocketAddr>,
) -> Result<Option<TcpListener>, Failure> {
    let Some(wanted) = wanted else { return Ok(None) };
    let bound = TcpListener::bind(wanted).await.and_then(|listener| Ok((listener.local_addr()?, listener)));
    let (local, listener) = bound.map_err(|error| refused(option, wanted, &error))?;
    *address = Some(local);
    Ok(Some(listener))
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
    /// What clients of a gateway are told.
    pub fn of_gateway(&self, advertise: &str) -> Vec<Endpoint> {
        [("tcp", self.tcp), ("tls", self.tls), ("quic", self.quic)]
            .into_iter()
            .filter_map(|(transport, address)| Some(endpoint(transport, address?, advertise)))
            .collect()
    }

    /// Where other roles and services reach a router.
    pub fn of_router(&self, advertise: &str) -> Vec<Endpoint> {
        [("link", self.link), ("api", self.api)]
            .into_iter()
            .filter_map(|(transport, address)| Some(endpoint(transport, address?, advertise)))
            .collect()
    }

    /// Where metrics and health are, for whoever looks at the whole cluster.
    pub fn of_http(&self, advertise: &str) -> Option<Endpoint> {
        self.http.map(|address| endpoint("http", address, advertise))
    }

    /// For `ready.json`.
    pub fn ready(&self, data: &Path, ca: Option<PathBuf>) -> Ready {
        let text = |address: Option<SocketAddr>| address.map(|address| address.to_string());
        Ready {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            role: None,
            instance: None,
            tcp: text(self.tcp),
            tls: text(self.tls),
            quic: text(self.quic),
            api: text(self.api),
            http: text(self.http),
            link: text(self.link),
            ca,
            data: data.to_owned(),
        }
    }
}

fn endpoint(transport: &str, address: SocketAddr, host: &str) -> Endpoint {
    let address = if host.is_empty() { address.to_string() } else { format!("{host}:{}", address.port()) };
    Endpoint { transport: transport.to_owned(), address }
}
