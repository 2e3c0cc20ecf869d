//! `imd up`: all roles in one process, from an empty directory to a clean stop.
//!
//! Order of a start: take the data directory, create or read keys, listen, open the store, start the roles, say so. Whatever fails
//! before the store is opened is the environment's fault and exits 2. Order of a stop: no longer ready, clients told and drained,
//! shards given up, store closed.

mod announce;
mod connector;
mod listen;
mod roles;

use std::time::Duration;

use anyhow::Context as _;
use im_proto::environment::Environment;
use im_storage::{Embedded, EmbeddedOptions};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{runtime::Runtime, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, Loaded},
    data_directory::{DataDirectory, DataLock},
    environment::Tasks,
    failure::Failure,
    http::{self, Readiness},
    signals::Signals,
    telemetry,
};
use listen::Listeners;
use roles::Roles;

/// Threads for blocking work, long reads of the store, may take this long to end after everything else has.
const THREADS_PATIENCE: Duration = Duration::from_secs(2);

/// Runs until a signal, or until the server cannot go on.
pub fn run(loaded: Loaded) -> Result<(), Failure> {
    let Loaded { config, unknown_variables, .. } = loaded;
    telemetry::start_logging(&config.log).map_err(Failure::usage)?;
    for variable in unknown_variables {
        tracing::warn!(variable, "this environment variable looks like a setting and is none");
    }
    let metrics = telemetry::start_metrics().map_err(Failure::usage)?;
    let lock = DataLock::take(&config.data).map_err(Failure::usage)?;
    let shards = u32::try_from(config.shards).map_err(Failure::usage)?;
    let data = lock.open(shards).map_err(Failure::usage)?;
    let runtime = Runtime::new().context("start the runtime").map_err(Failure::usage)?;
    let outcome = runtime.block_on(up(&config, &data, metrics));
    runtime.shutdown_timeout(THREADS_PATIENCE);
    outcome
}

async fn up(config: &Config, data: &DataDirectory, metrics: PrometheusHandle) -> Result<(), Failure> {
    let mut signals = Signals::listen().map_err(Failure::usage)?;
    let listeners = listen::bind(config, data).await?;
    let store = Embedded::open(&data.store(), EmbeddedOptions::default()).map_err(Failure::usage)?;
    let tasks = Tasks::default();
    let server = Server { config, data, store: store.clone(), environment: tasks.environment() };
    let outcome = server.run(listeners, metrics, &mut signals).await;
    tasks.stop().await;
    let closed = tokio::task::spawn_blocking(move || store.close()).await;
    closed.context("close the store").map_err(Failure::operation)?;
    outcome
}

struct Server<'a> {
    config: &'a Config,
    data: &'a DataDirectory,
    store: Embedded,
    environment: Environment,
}

impl Server<'_> {
    async fn run(self, listeners: Listeners, metrics: PrometheusHandle, signals: &mut Signals) -> Result<(), Failure> {
        let (readiness, is_ready) = watch::channel(Readiness::Starting);
        let stop_http = CancellationToken::new();
        self.environment.spawn(telemetry::upkeep(metrics.clone()));
        if let Some(listener) = listeners.http {
            let serving = http::serve(listener, metrics, is_ready, stop_http.clone());
            self.environment.spawn(async move {
                if let Err(error) = serving.await {
                    tracing::error!(%error, "metrics and health are no longer served");
                }
            });
        }
        let addresses = listeners.addresses;
        let start = self.data.next_start().map_err(Failure::operation)?;
        let roles =
            Roles::start(self.config, self.data, start, &addresses, self.store.clone(), &self.environment).await?;
        listeners.clients.run(&roles.gateway, &self.environment);
        if let Some(listener) = listeners.api {
            roles.serve_api(listener, &self.environment).await?;
        }
        readiness.send_replace(Readiness::Ready);
        self.data.write_ready(&addresses.ready(self.data)).map_err(Failure::operation)?;
        announce::print_addresses(self.config, &addresses)?;
        tracing::info!(start = start.number, data = %self.data.root().display(), "ready");

        let ended = self.until_end(&roles, signals).await;
        readiness.send_replace(Readiness::Draining);
        self.data.remove_ready().map_err(Failure::operation)?;
        let drained = tokio::select! {
            biased;
            signal = signals.next() => {
                Err(Failure::Operation(format!("stopped at once by a second {signal}; what was acknowledged is safe")))
            }
            () = roles.stop(self.config) => Ok(()),
        };
        stop_http.cancel();
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
