//! What every server process has around its roles: logging, metrics, health, signals, the end of all tasks.
//!
//! Order of a start: logging, what the environment must allow (exit 2 if it does not), then roles. Order of a stop: no longer ready,
//! the roles' own drain, then tasks. A second signal cuts the drain short.

use std::time::Duration;

use anyhow::Context as _;
use im_proto::environment::Environment;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{net::TcpListener, runtime::Runtime, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, Loaded},
    data_directory::{DataLock, Ready},
    environment::Tasks,
    failure::Failure,
    http::{self, Readiness},
    signals::Signals,
    telemetry,
    watch::{self as status_line, Watched},
};

/// Threads for blocking work, long reads of the store, may take this long to end after everything else has.
const THREADS_PATIENCE: Duration = Duration::from_secs(2);

/// Runs a server with logging and metrics, on a runtime of its own. `prepare` does what needs no runtime: whatever it fails at leaves
/// everything as it was.
pub fn run<P, F>(
    loaded: Loaded,
    prepare: impl FnOnce(&Config) -> Result<P, Failure>,
    serve: impl FnOnce(Config, P, PrometheusHandle) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let Loaded { config, unknown_variables, .. } = loaded;
    telemetry::start_logging(&config.log).map_err(Failure::usage)?;
    for variable in unknown_variables {
        tracing::warn!(variable, "this environment variable looks like a setting and is none");
    }
    let metrics = telemetry::start_metrics().map_err(Failure::usage)?;
    let prepared = prepare(&config)?;
    let runtime = Runtime::new().context("start the runtime").map_err(Failure::usage)?;
    let outcome = runtime.block_on(serve(config, prepared, metrics));
    runtime.shutdown_timeout(THREADS_PATIENCE);
    outcome
}

/// A server process that runs.
pub struct Process {
    tasks: Tasks,
    pub signals: Signals,
    readiness: watch::Sender<Readiness>,
    stop_http: CancellationToken,
    is_watched: bool,
}

impl Process {
    /// From now on signals are heard and `/healthz` is answered; `/readyz` says no. What is `watched` is said each second.
    pub fn start(
        signals: Signals,
        http: Option<TcpListener>,
        metrics: PrometheusHandle,
        watched: Option<Watched>,
    ) -> Self {
        let tasks = Tasks::default();
        let environment = tasks.environment();
        let (readiness, is_ready) = watch::channel(Readiness::Starting);
        let stop_http = CancellationToken::new();
        environment.spawn(telemetry::upkeep(metrics.clone()));
        if let Some(watched) = watched {
            environment.spawn(status_line::run(metrics.clone(), watched));
        }
        if let Some(listener) = http {
            let serving = http::serve(listener, metrics, is_ready, stop_http.clone());
            environment.spawn(async move {
                if let Err(error) = serving.await {
                    tracing::error!(%error, "metrics and health are no longer served");
                }
            });
        }
        Self { tasks, signals, readiness, stop_http, is_watched: watched.is_some() }
    }

    /// What roles get their clock, randomness and tasks from.
    pub fn environment(&self) -> Environment {
        self.tasks.environment()
    }

    /// It wants traffic. `directory` is where scripts look for `ready.json`.
    pub fn is_ready(&self, directory: Option<&DataLock>, ready: &Ready) -> Result<(), Failure> {
        self.readiness.send_replace(Readiness::Ready);
        directory.map_or(Ok(()), |directory| directory.write_ready(ready)).map_err(Failure::operation)
    }

    /// It does what it can, and wants no new traffic for a while.
    pub fn is_starting(&self) {
        self.readiness.send_replace(Readiness::Starting);
    }

    /// It wants no more traffic.
    pub fn is_draining(&self, directory: Option<&DataLock>) -> Result<(), Failure> {
        self.readiness.send_replace(Readiness::Draining);
        directory.map_or(Ok(()), DataLock::remove_ready).map_err(Failure::operation)
    }

    /// Waits for roles to stop, or for a second signal.
    pub async fn drain(&mut self, stopping: impl Future<Output = ()>) -> Result<(), Failure> {
        let drained = tokio::select! {
            biased;
            signal = self.signals.next() => {
                Err(Failure::Operation(format!("stopped at once by a second {signal}; what was acknowledged is safe")))
            }
            () = stopping => Ok(()),
        };
        self.stop_http.cancel();
        drained
    }

    /// Ends all tasks.
    pub async fn end(self) {
        self.tasks.stop().await;
        if self.is_watched {
            status_line::end();
        }
    }
}
