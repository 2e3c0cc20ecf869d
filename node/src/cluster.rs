//! One role of a cluster as a process: `imd router`, `imd gateway`.
//!
//! What a process needs from outside: `files` (who it is), `registry` (etcd), `store` (CQL, or the embedded store with one router).
//! What it refuses: a store or a registry of another cluster, a configuration that cannot work; all with exit 2 and one line.

pub mod admin;
mod credentials;
pub mod files;
pub mod gateway;
mod incarnation;
mod registration;
pub mod registry;
pub mod router;
pub mod status;
pub mod store;

use anyhow::Context as _;
use im_proto::{BootId, InstanceId, environment::Environment};
use im_registry::{Endpoint, Instance, Role};
use tokio::runtime::Runtime;

use crate::{
    config::{Config, LogConfig, LogFormat},
    data_directory::DataLock,
    environment::Tasks,
    failure::Failure,
    listen::Addresses,
    telemetry,
};

/// The directory of `ready.json`, for a role that keeps nothing else: only if it was named.
fn run_directory(config: &Config, is_named: bool) -> Result<Option<DataLock>, Failure> {
    is_named.then(|| DataLock::take(&config.data).map_err(Failure::usage)).transpose()
}

/// What others need to reach a process. Who listens everywhere has to say under which name.
fn check_advertise(config: &Config, addresses: &Addresses) -> Result<(), Failure> {
    let all = [addresses.tcp, addresses.tls, addresses.quic, addresses.api, addresses.link];
    match all.into_iter().flatten().find(|address| address.ip().is_unspecified()) {
        Some(address) if config.advertise.is_empty() => Err(Failure::Usage(format!(
            "--advertise is not set: nobody can connect to {address}; say under which name or address this process is reached"
        ))),
        _ => Ok(()),
    }
}

/// A process as it is registered, under an id that no other start ever gets.
fn instance(
    role: Role,
    endpoints: Vec<Endpoint>,
    config: &Config,
    environment: &Environment,
) -> Result<Instance, Failure> {
    let name = match role {
        Role::Router => "router",
        Role::Gateway => "gateway",
    };
    let id = format!("{name}-{:016x}", environment.random.next_u64());
    Ok(Instance {
        id: InstanceId::parse(&id).map_err(Failure::operation)?,
        boot: BootId(environment.random.next_u64().max(1)),
        role,
        endpoints,
        zone: config.cluster.zone.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        draining: false,
    })
}

/// Runs a command that asks services and ends: its log says only what is wrong. That the CQL store does not answer, the command says
/// itself.
pub fn run_tool<T>(command: impl AsyncFnOnce(&Environment) -> Result<T, Failure>) -> Result<T, Failure> {
    let log = LogConfig { filter: "warn,scylla=off".to_owned(), format: LogFormat::Text };
    telemetry::start_logging(&log).map_err(Failure::usage)?;
    let runtime = Runtime::new().context("start the runtime").map_err(Failure::usage)?;
    let outcome = runtime.block_on(async {
        let tasks = Tasks::default();
        let outcome = command(&tasks.environment()).await;
        tasks.stop().await;
        outcome
    });
    runtime.shutdown_background();
    outcome
}
