//! `imd up`: all roles in one process, from an empty directory to a clean stop.
//!
//! Order of a start: if there is no data directory yet, see that the ports are free; take the data directory, create or read keys,
//! listen, open the store, start the roles, say so. Whatever fails before the store is opened is the environment's fault and exits 2.
//! Order of a stop: no longer ready, clients told and drained, shards given up, store closed.

mod announce;
mod connector;
pub mod roles;

use anyhow::Context as _;
use im_storage::Embedded;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;

use crate::{
    config::{Config, Loaded},
    data_directory::{DataDirectory, DataLock},
    failure::Failure,
    listen::{self, Addresses, ClientTls, Clients},
    process::{self, Process},
    signals::Signals,
    watch::Watched,
};
use roles::Roles;

/// Runs until a signal, or until the server cannot go on. With `watch` it says each second what it does.
pub fn run(loaded: Loaded, watch: bool) -> Result<(), Failure> {
    let prepare = |config: &Config| {
        // A taken port leaves no new directory behind. Where there is one, that it is in use says more.
        if !config.data.exists() {
            listen::probe(config)?;
        }
        let lock = DataLock::take(&config.data).map_err(Failure::usage)?;
        let shards = u32::try_from(config.shards).map_err(Failure::usage)?;
        lock.open(shards).map_err(Failure::usage)
    };
    process::run(loaded, prepare, |config, data, metrics| async move { up(&config, &data, metrics, watch).await })
}

async fn up(config: &Config, data: &DataDirectory, metrics: PrometheusHandle, watch: bool) -> Result<(), Failure> {
    let signals = Signals::listen().map_err(Failure::usage)?;
    let (listeners, http) = bind(config, data).await?;
    let store = Embedded::open(&data.store(), config.store.options()).map_err(Failure::usage)?;
    let mut process = Process::start(signals, http, metrics, watch.then_some(Watched::Everything));
    let outcome = Server { config, data, store: store.clone() }.run(listeners, &mut process).await;
    process.end().await;
    let closed = tokio::task::spawn_blocking(move || store.close()).await;
    closed.context("close the store").map_err(Failure::operation)?;
    outcome
}

/// Everything that is bound and not yet accepting.
struct Listeners {
    clients: Clients,
    api: Option<TcpListener>,
    addresses: Addresses,
}

async fn bind(config: &Config, data: &DataDirectory) -> Result<(Listeners, Option<TcpListener>), Failure> {
    let certificate = listen::certificate(&data.certificate(), &data.certificate_key())?;
    let client_tls = ClientTls { certificate, reset_key: data.reset_key };
    let mut addresses = Addresses::default();
    let clients = listen::clients(config, Some(&client_tls), &mut addresses)?;
    let api = listen::plain("api", config.api, &mut addresses.api).await?;
    let http = listen::plain("http", config.http, &mut addresses.http).await?;
    Ok((Listeners { clients, api, addresses }, http))
}

struct Server<'a> {
    config: &'a Config,
    data: &'a DataDirectory,
    store: Embedded,
}

impl Server<'_> {
    async fn run(self, listeners: Listeners, process: &mut Process) -> Result<(), Failure> {
        let environment = process.environment();
        let addresses = listeners.addresses;
        let start = self.data.next_start().map_err(Failure::operation)?;
        let roles = Roles::start(self.config, self.data, start, &addresses, self.store.clone(), &environment).await?;
        listeners.clients.run(&roles.gateway, &environment);
        if let Some(listener) = listeners.api {
            roles.serve_api(listener, &environment).await?;
        }
        let directory = Some(self.data.lock());
        process.is_ready(directory, &addresses.ready(self.data.root(), self.data.ca()))?;
        announce::print_addresses(self.config, &addresses)?;
        tracing::info!(start = start.number, data = %self.data.root().display(), "ready");

        let ended = self.until_end(&roles, &mut process.signals).await;
        process.is_draining(directory)?;
        let drained = process.drain(roles.stop(self.config)).await;
        ended.and(drained)
    }

    /// The reason to stop: a signal, or what made it impossible to go on.
    async fn until_end(&self, roles: &Roles, signals: &mut Signals) -> Result<(), Failure> {
        let mut store_stopped = self.store.stopped();
        let mut router_ended = roles.ended();
        let failure = tokio::select! {
            biased;
            signal = signals.next() => {
                tracing::info!(signal, "stopping; a second signal stops at once");
                return Ok(());
            }
            // The store's own word comes before the router's, which only follows from it.
            Ok(reason) = store_stopped.wait_for(Option::is_some) => roles::store_stopped(reason.as_deref().unwrap_or_default()),
            Ok(ended) = router_ended.wait_for(Option::is_some) => roles::router_ended(ended.as_ref()),
        };
        tracing::error!("{failure}");
        Err(failure)
    }
}
