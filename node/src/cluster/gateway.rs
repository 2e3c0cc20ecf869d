//! `imd gateway`: holds the connections of clients, keeps links to all routers, knows no store.

use std::{sync::Arc, time::Duration};

use im_gateway::{Gateway, GatewayConfig};
use im_registry::{AnyRegistry, Instance, Registry as _, Role};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    check_advertise,
    files::{Files, Identity},
    instance,
    registration::Registration,
    registry, run_directory,
};
use crate::{
    config::{Config, Loaded},
    data_directory::DataLock,
    failure::Failure,
    links::{Dialler, tls::ServiceTls},
    listen::{self, Addresses, ClientTls, Clients},
    process::{self, Process},
    signals::Signals,
    watch::Watched,
};

/// How often it is looked whether links lead to all shards.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// After this long without a way to all shards it is said what is missing.
const MISSING_AFTER: Duration = Duration::from_secs(10);

/// What is found before anything is changed.
struct Prepared {
    directory: Option<DataLock>,
    identity: Identity,
    service_tls: Option<ServiceTls>,
    client_tls: Option<ClientTls>,
    ca: Option<std::path::PathBuf>,
}

/// Runs until a signal. With `watch` it says each second what it does.
pub fn run(loaded: Loaded, watch: bool) -> Result<(), Failure> {
    let is_named = loaded.sources.contains_key("data");
    let prepare = |config: &Config| {
        let files = Files::new(&config.cluster, Role::Gateway, None);
        Ok(Prepared {
            identity: files.identity()?,
            service_tls: files.service_tls()?,
            client_tls: files.client_tls(config)?,
            ca: files.client_ca(),
            directory: run_directory(config, is_named)?,
        })
    };
    process::run(
        loaded,
        prepare,
        |config, prepared, metrics| async move { serve(&config, prepared, metrics, watch).await },
    )
}

async fn serve(config: &Config, prepared: Prepared, metrics: PrometheusHandle, watch: bool) -> Result<(), Failure> {
    let signals = Signals::listen().map_err(Failure::usage)?;
    let mut addresses = Addresses::default();
    let clients = listen::clients(config, prepared.client_tls.as_ref(), &mut addresses)?;
    let http = listen::plain("http", config.http, &mut addresses.http).await?;
    check_advertise(config, &addresses)?;
    let mut process = Process::start(signals, http, metrics, watch.then_some(Watched::Gateway));
    let outcome = run_role(config, &prepared, clients, addresses, &mut process).await;
    process.end().await;
    outcome
}

async fn run_role(
    config: &Config,
    prepared: &Prepared,
    clients: Clients,
    addresses: Addresses,
    process: &mut Process,
) -> Result<(), Failure> {
    let environment = process.environment();
    let Identity { cluster, shards, secret } = &prepared.identity;
    let registry = AnyRegistry::from(registry::connect(&config.cluster, &cluster.cluster_id, &environment).await?);
    let mut endpoints = addresses.of_gateway(&config.advertise);
    endpoints.extend(addresses.of_http(&config.advertise));
    let instance = instance(Role::Gateway, endpoints, config, &environment)?;
    let dialler = Dialler::new(prepared.service_tls.clone(), config.cluster.insecure_links, environment.clone());
    let gateway = Gateway::start(
        GatewayConfig { cluster_id: cluster.cluster_id.clone(), ..config.gateway.clone() },
        environment.clone(),
        instance.id.clone(),
        instance.boot,
        secret.clone(),
        *shards,
        registry.view(),
        Arc::new(dialler),
    );
    let running = Running { config, gateway, registry: registry.clone(), instance: instance.clone() };
    let registration = Registration::start(registry, instance, config.cluster.lease_ttl, &environment);
    let registration = registration.await.map_err(Failure::operation)?;
    clients.run(&running.gateway, &environment);
    let directory = prepared.directory.as_ref();
    let ready = addresses.ready(directory.map_or(&config.data, |directory| directory.root()), prepared.ca.clone());
    tokio::select! {
        biased;
        signal = process.signals.next() => tracing::info!(signal, "stopping; a second signal stops at once"),
        () = running.until_routed() => {
            let (role, instance) = (Some("gateway".to_owned()), Some(running.instance.id.to_string()));
            process.is_ready(directory, &crate::data_directory::Ready { role, instance, ..ready })?;
            tracing::info!(gateway = %running.instance.id, "ready");
            let signal = process.signals.next().await;
            tracing::info!(signal, "stopping; a second signal stops at once");
        }
    }
    process.is_draining(directory)?;
    process.drain(running.stop(&registration)).await
}

/// A gateway that runs.
struct Running<'a> {
    config: &'a Config,
    gateway: Gateway,
    registry: AnyRegistry,
    instance: Instance,
}

impl Running<'_> {
    /// Returns when links lead to the owners of all shards: from then on clients are served.
    async fn until_routed(&self) {
        let started = Instant::now();
        let mut is_said = false;
        while !self.gateway.is_routed() {
            if !is_said && started.elapsed() >= MISSING_AFTER {
                is_said = true;
                let view = self.registry.view().borrow().clone();
                let (routers, claims) = (view.of_role(Role::Router).count(), view.claims.len());
                tracing::warn!(routers, shards_with_owner = claims, "not ready: no links to the owners of all shards");
            }
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// Clients are told within the window and get what was committed for them. Cuts what is not done in time.
    async fn stop(&self, registration: &Registration) {
        let config = self.config;
        let deadline = Instant::now() + config.drain_window + config.drain_timeout;
        registration.drain().await;
        if timeout_at(deadline, self.gateway.drain(config.drain_window)).await.is_err() {
            tracing::warn!("connections were cut: the drain took too long");
        }
        self.gateway.stop();
        registration.end().await;
    }
}
