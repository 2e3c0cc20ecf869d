//! `imd router`: owns conversations.
//!
//! A router that was fenced or lost its lease starts again under a new instance id, within the process. The process itself ends by a
//! signal, or with the embedded store.

use std::{
    net::{SocketAddr, TcpListener as StdListener},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context as _;
use im_registry::Role;
use im_router::Ended;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{net::TcpListener, time::sleep};

use super::{
    check_advertise,
    files::{Files, Identity, RouterKeys},
    incarnation::{Grounds, Incarnation},
    run_directory,
    store::{self, Place},
};
use crate::{
    config::{Config, Loaded},
    data_directory::{DataLock, Ready},
    failure::Failure,
    links::tls::ServiceTls,
    listen::{self, Addresses},
    process::{self, Process},
    signals::Signals,
    up::roles::store_stopped,
    watch::Watched,
};

/// Between a life that ended, or could not begin, and the next. Short: until then nobody has its shards.
const REBIRTH_PAUSE: Duration = Duration::from_millis(100);
const REBIRTH_PAUSE_MAX: Duration = Duration::from_secs(5);

/// What is found before anything is changed.
struct Prepared {
    directory: Option<DataLock>,
    place: Place,
    identity: Identity,
    keys: RouterKeys,
    service_tls: Option<ServiceTls>,
}

/// Runs until a signal, or until the embedded store has stopped. With `watch` it says each second what it does.
pub fn run(loaded: Loaded, watch: bool) -> Result<(), Failure> {
    let is_named = loaded.sources.contains_key("data");
    process::run(
        loaded,
        |config| prepare(config, is_named),
        |config, prepared, metrics| async move { serve(config, prepared, metrics, watch).await },
    )
}

fn prepare(config: &Config, is_named: bool) -> Result<Prepared, Failure> {
    let cluster = &config.cluster;
    if cluster.cql_nodes().is_empty() {
        return prepare_embedded(config);
    }
    let files = Files::new(cluster, Role::Router, None);
    let (identity, keys, service_tls) = (files.identity()?, files.router_keys()?, files.service_tls()?);
    Ok(Prepared { directory: run_directory(config, is_named)?, place: Place::Cql, identity, keys, service_tls })
}

/// Without a directory of secrets that of the data is one, as for `imd up`.
fn prepare_embedded(config: &Config) -> Result<Prepared, Failure> {
    let mut lock = DataLock::take(&config.data).map_err(Failure::usage)?;
    let root: PathBuf = lock.root().to_owned();
    let is_own = config.cluster.secrets.is_none() && config.cluster.cluster.is_none();
    if is_own {
        let shards = u32::try_from(config.shards).map_err(Failure::usage)?;
        lock = lock.open(shards).map_err(Failure::usage)?.into_lock();
    }
    let files = Files::new(&config.cluster, Role::Router, Some(&root));
    let (identity, keys, service_tls) = (files.identity()?, files.router_keys()?, files.service_tls()?);
    let place = Place::Embedded(root.join("store"), config.store.options());
    Ok(Prepared { directory: Some(lock), place, identity, keys, service_tls })
}

async fn serve(config: Config, prepared: Prepared, metrics: PrometheusHandle, watch: bool) -> Result<(), Failure> {
    let signals = Signals::listen().map_err(Failure::usage)?;
    let mut addresses = Addresses::default();
    check_plain_text(&config, prepared.service_tls.is_some())?;
    let link = listen::plain("link", config.link, &mut addresses.link).await?;
    let link = link.ok_or_else(|| Failure::usage("link is off: no gateway could reach this router"))?;
    let api = listen::plain("api", config.api, &mut addresses.api).await?;
    let http = listen::plain("http", config.http, &mut addresses.http).await?;
    check_advertise(&config, &addresses)?;
    let redis = store::redis_options(&config.cluster, &prepared.identity)?;
    let mut process = Process::start(signals, http, metrics, watch.then_some(Watched::Router));
    let environment = process.environment();
    let opened = async {
        let hot = redis.map(|options| store::start_redis(&config.cluster, options, &environment)).transpose()?;
        Ok((prepared.place.open(&config.cluster, &prepared.identity.row(), &environment).await?, hot))
    };
    let (store, hot) = match opened.await {
        Ok(opened) => opened,
        Err(failure) => {
            process.end().await;
            return Err(failure);
        }
    };
    let Prepared { directory, identity, keys, service_tls, .. } = prepared;
    let (link, api) = (into_std(link)?, api.map(into_std).transpose()?);
    let grounds = Grounds { config, identity, keys, service_tls, store, hot, link, api, addresses };
    let outcome = live(&grounds, directory.as_ref(), &mut process).await;
    process.end().await;
    let closed = tokio::task::spawn_blocking(move || grounds.store.close()).await;
    closed.context("close the store").map_err(Failure::operation)?;
    outcome
}

fn into_std(listener: TcpListener) -> Result<StdListener, Failure> {
    listener.into_std().map_err(Failure::operation)
}

/// Whoever reaches a link can act for every user.
fn check_plain_text(config: &Config, has_tls: bool) -> Result<(), Failure> {
    if has_tls || config.cluster.insecure_links {
        return Ok(());
    }
    let beyond = |address: &SocketAddr| !address.ip().is_loopback();
    for (option, address) in [("link", config.link), ("api", config.api)] {
        if let Some(address) = address.filter(beyond) {
            return Err(Failure::Usage(format!(
                "--{option} {address} is not this machine alone, and there are no service certificates; --service-ca, --service-cert \
                 and --service-key name some (imd secrets makes them), --insecure-links goes without"
            )));
        }
    }
    Ok(())
}

/// Why a life is over.
enum Over {
    Signal(&'static str),
    StoreStopped(String),
    /// Another router has an embedded store of its own.
    Displaced(String),
    /// Fenced, or without its lease.
    Ended(&'static str),
}

/// One life after the other.
async fn live(grounds: &Grounds, directory: Option<&DataLock>, process: &mut Process) -> Result<(), Failure> {
    let mut incarnation = Incarnation::start(grounds).await?;
    loop {
        let over = one_life(grounds, &incarnation, directory, process).await?;
        match over {
            Over::Signal(signal) => {
                tracing::info!(signal, "stopping; a second signal stops at once");
                process.is_draining(directory)?;
                return process.drain(incarnation.stop(&grounds.config)).await;
            }
            Over::StoreStopped(reason) => {
                process.is_draining(directory)?;
                incarnation.abandon().await;
                return Err(store_stopped(&reason));
            }
            Over::Displaced(other) => {
                process.is_draining(directory)?;
                incarnation.abandon().await;
                return Err(Failure::Operation(format!(
                    "the router {other} is registered beside this one, and the embedded store admits one; stop one of them, or give \
                     both a common store with --cql"
                )));
            }
            Over::Ended(why) => {
                let lease_left_ms = u64::try_from(incarnation.lease_left().as_millis()).unwrap_or(u64::MAX);
                tracing::warn!(instance = %incarnation.instance, why, lease_left_ms, "starting again under a new instance id");
                process.is_starting();
                incarnation.abandon().await;
            }
        }
        incarnation = match rebirth(grounds, process).await {
            Some(incarnation) => incarnation,
            None => {
                process.is_draining(directory)?;
                return process.drain(std::future::ready(())).await;
            }
        };
    }
}

async fn one_life(
    grounds: &Grounds,
    incarnation: &Incarnation,
    directory: Option<&DataLock>,
    process: &mut Process,
) -> Result<Over, Failure> {
    let mut ended = incarnation.ended();
    let mut is_settled = false;
    loop {
        tokio::select! {
            biased;
            signal = process.signals.next() => return Ok(Over::Signal(signal)),
            other = incarnation.until_displaced(grounds) => return Ok(Over::Displaced(other.to_string())),
            // The store's own word comes before the router's, which only follows from it.
            reason = grounds.store.stopped() => return Ok(Over::StoreStopped(reason)),
            Ok(ended) = ended.wait_for(Option::is_some) => {
                return Ok(match &*ended {
                    Some(Ended::StoreStopped(reason)) => Over::StoreStopped(reason.clone()),
                    Some(Ended::Fenced) => Over::Ended("it was fenced"),
                    Some(Ended::LeaseLost) | None => Over::Ended("its lease was lost"),
                });
            }
            () = incarnation.until_settled(grounds), if !is_settled => {
                is_settled = true;
                let data = directory.map_or(&grounds.config.data as &std::path::Path, DataLock::root);
                let ready = Ready {
                    role: Some("router".to_owned()),
                    instance: Some(incarnation.instance.to_string()),
                    ..grounds.addresses.ready(data, None)
                };
                process.is_ready(directory, &ready)?;
                tracing::info!(instance = %incarnation.instance, "ready");
            }
        }
    }
}

/// The next life; `None` if a signal came first. What is in the way (etcd, the store) may come back, so this goes on for ever.
async fn rebirth(grounds: &Grounds, process: &mut Process) -> Option<Incarnation> {
    let mut pause = REBIRTH_PAUSE;
    loop {
        tokio::select! {
            biased;
            _ = process.signals.next() => return None,
            () = sleep(pause) => {}
        }
        tokio::select! {
            biased;
            _ = process.signals.next() => return None,
            started = Incarnation::start(grounds) => match started {
                Ok(incarnation) => return Some(incarnation),
                Err(failure) => tracing::error!("cannot start again: {failure}"),
            }
        }
        pause = (pause * 2).min(REBIRTH_PAUSE_MAX);
    }
}
