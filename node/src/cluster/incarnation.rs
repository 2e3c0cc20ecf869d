//! One life of a router within its process: an instance id, a lease, everything that belongs to it.
//!
//! A router that was fenced or lost its lease never comes back. Its process drops all of it and begins another life on the same
//! store and the same sockets.

use std::{net::TcpListener as StdListener, sync::Arc, time::Duration};

use im_proto::{InstanceId, environment::Environment, shard::rendezvous_owner};
use im_registry::{AnyRegistry, Endpoint, EtcdRegistry, Instance, Registry as _, RegistryError, Role, View};
use im_router::{Ended, Router, RouterConfig};
use im_storage::{Hot, noted_claim};
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{
    files::{Identity, RouterKeys},
    instance,
    registry::{self, Claims},
    store::OpenStore,
};
use crate::{
    config::Config,
    environment::Tasks,
    failure::Failure,
    links::{self, Dialler, Serving, tls::ServiceTls},
    listen::Addresses,
};

/// The first router of a cluster writes the record that the others wait for.
const RECORD_PATIENCE: Duration = Duration::from_secs(5);
const RECORD_INTERVAL: Duration = Duration::from_millis(100);

/// What all lives of a router share.
pub struct Grounds {
    pub config: Config,
    pub identity: Identity,
    pub keys: RouterKeys,
    pub service_tls: Option<ServiceTls>,
    pub store: OpenStore,
    /// Hot state that several routers share; without one each keeps its own.
    pub hot: Option<Hot>,
    pub link: StdListener,
    pub api: Option<StdListener>,
    pub addresses: Addresses,
}

/// A router that runs.
pub struct Incarnation {
    pub instance: InstanceId,
    tasks: Tasks,
    router: Router,
    registry: AnyRegistry,
    stop_serving: CancellationToken,
}

impl Incarnation {
    /// Registers under a new instance id, begins to claim shards, serves links and api.
    pub async fn start(grounds: &Grounds) -> Result<Self, Failure> {
        let tasks = Tasks::default();
        let started = Self::start_within(grounds, tasks.clone()).await;
        if started.is_err() {
            tasks.stop().await;
        }
        started
    }

    async fn start_within(grounds: &Grounds, tasks: Tasks) -> Result<Self, Failure> {
        let Grounds { config, identity, .. } = grounds;
        let environment = tasks.environment();
        let instance = instance(Role::Router, endpoints(grounds), config, &environment)?;
        let (registry, generation) = registry(grounds, &instance, &environment).await?;
        let router_config = router_config(grounds, &instance, generation);
        let peers = Dialler::new(grounds.service_tls.clone(), config.cluster.insecure_links, environment.clone());
        let (id, registry) = (instance.id.clone(), AnyRegistry::from(registry));
        let store = grounds.store.store.clone();
        let router =
            Router::start(router_config, environment.clone(), store, registry.clone(), instance, Arc::new(peers));
        let router = router.await.map_err(Failure::operation)?;
        let incarnation = Self { instance: id, tasks, router, registry, stop_serving: CancellationToken::new() };
        incarnation.serve(grounds, &environment).await?;
        tracing::info!(instance = %incarnation.instance, cluster = identity.cluster.cluster_id, generation, "registered");
        Ok(incarnation)
    }

    async fn serve(&self, grounds: &Grounds, environment: &Environment) -> Result<(), Failure> {
        let tls = grounds.service_tls.as_ref();
        let stop = || self.stop_serving.clone();
        let listener = again(&grounds.link)?;
        let around = self.router.health_and_reflection(&[links::LINK_SERVICE]).await.map_err(Failure::operation)?;
        let links = links::serve_links(listener, around, self.router.clone(), tls, environment, stop());
        spawn_serving(environment, "links", links.map_err(Failure::usage)?);
        if let Some(listener) = &grounds.api {
            let routes = self.router.api_routes().await.map_err(Failure::operation)?;
            let api = links::serve_api(again(listener)?, routes, tls, stop());
            spawn_serving(environment, "the api", api.map_err(Failure::usage)?);
        }
        Ok(())
    }

    /// Returns when this router holds every shard that it should have at the moment, and all others have an owner.
    pub async fn until_settled(&self, grounds: &Grounds) {
        let (mut view, shards) = (self.registry.view(), grounds.identity.shards);
        let settled = |view: &View| {
            let routers: Vec<&InstanceId> =
                view.of_role(Role::Router).filter(|router| !router.draining).map(|router| &router.id).collect();
            routers.contains(&&self.instance)
                && shards.shards().all(|shard| {
                    let should = rendezvous_owner(shard, routers.iter().copied());
                    view.owner(shard).is_some_and(|owner| should != Some(&self.instance) || *owner == self.instance)
                })
        };
        // Without a view nothing settles any more.
        if view.wait_for(|view| settled(view)).await.is_err() {
            std::future::pending().await
        }
    }

    /// Returns if another router is registered although the embedded store admits one: they have started in the same moment. The one
    /// with the greater id stays.
    pub async fn until_displaced(&self, grounds: &Grounds) -> InstanceId {
        let mut view = self.registry.view();
        let displaced = |view: &View| {
            let other = view.of_role(Role::Router).map(|router| &router.id).find(|id| **id > self.instance);
            other.filter(|_| grounds.store.is_embedded()).cloned()
        };
        loop {
            let other = displaced(&view.borrow_and_update());
            if let Some(other) = other {
                return other;
            }
            if view.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Why the router ended by itself, once it has.
    pub fn ended(&self) -> watch::Receiver<Option<Ended>> {
        self.router.ended()
    }

    /// How long its lease holds by its own clock.
    pub fn lease_left(&self) -> Duration {
        self.router.lease_left()
    }

    /// Gives up all shards with nothing in flight, then everything else.
    pub async fn stop(self, config: &Config) {
        let deadline = Instant::now() + config.drain_timeout;
        if !self.router.stop(config.drain_timeout).await {
            tracing::warn!("the router did not give up its shards in time; others take them when its lease runs out");
        }
        self.stop_serving.cancel();
        // Gateways take what was committed last, then their links end.
        let patience = deadline.saturating_duration_since(Instant::now()).min(links::KEEPALIVE_INTERVAL);
        sleep(patience.min(Duration::from_millis(100))).await;
        self.tasks.stop().await;
    }

    /// Drops everything where it stands; the lease runs out by itself.
    pub async fn abandon(self) {
        self.stop_serving.cancel();
        self.tasks.stop().await;
    }
}

fn endpoints(grounds: &Grounds) -> Vec<Endpoint> {
    let (addresses, config) = (&grounds.addresses, &grounds.config);
    let mut endpoints = addresses.of_router(&config.advertise);
    endpoints.extend(addresses.of_http(&config.advertise));
    let store =
        if grounds.store.is_embedded() { "embedded".to_owned() } else { format!("cql/{}", config.cluster.keyspace) };
    endpoints.push(Endpoint { transport: STORE.to_owned(), address: store });
    endpoints
}

/// Not a way to reach the router, but where it keeps messages: all routers of a cluster must have the same.
const STORE: &str = "store";

/// An embedded store admits one router, and no other store beside it.
fn refuse_other_stores(view: &View, own: &Instance) -> Result<(), Failure> {
    let store_of = |instance: &Instance| {
        instance.endpoints.iter().find(|endpoint| endpoint.transport == STORE).map(|endpoint| endpoint.address.clone())
    };
    let ours = store_of(own);
    for other in view.of_role(Role::Router) {
        let theirs = store_of(other);
        let id = &other.id;
        if theirs != ours {
            let [ours, theirs] = [ours, theirs].map(Option::unwrap_or_default);
            return Err(Failure::Usage(format!(
                "the router {id} keeps messages in the store {theirs}, and this one would in {ours}: all routers of a cluster share one"
            )));
        }
        if ours.as_deref() == Some("embedded") {
            return Err(Failure::Usage(format!(
                "the router {id} is registered, and the embedded store admits one: stop that one and wait until its lease has run out, \
                 or give all routers a common store with --cql"
            )));
        }
    }
    Ok(())
}

/// Connects to etcd with the generation of the store, and makes sure that claims are accepted. Looks who is there before anything is
/// changed.
async fn registry(
    grounds: &Grounds,
    instance: &Instance,
    environment: &Environment,
) -> Result<(EtcdRegistry, u64), Failure> {
    let (config, cluster_id) = (&grounds.config.cluster, &grounds.identity.cluster.cluster_id);
    let observer = registry::connect(config, cluster_id, environment).await?;
    refuse_other_stores(&observer.view().borrow(), instance)?;
    let registered = observer.cluster_record().await.map_err(Failure::operation)?;
    let registered = registered.map_or(0, |record| record.generation);
    let generation = grounds.store.generation(&instance.id, registered).await.map_err(Failure::operation)?;
    // A new generation begins in any etcd.
    let claimed = match generation.begins {
        true => None,
        false => Some(noted_claim(&grounds.store.store).await.map_err(Failure::operation)?),
    };
    let claims = Claims { generation: Some(generation.number), claimed };
    let registry = registry::connect_as(config, cluster_id, claims, environment).await?;
    if generation.begins {
        registry.recover(generation.number).await.map_err(Failure::usage)?;
    }
    let started = Instant::now();
    loop {
        match registry.check_claims().await {
            Ok(()) => return Ok((registry, generation.number)),
            Err(RegistryError::Refused(_)) if started.elapsed() < RECORD_PATIENCE => sleep(RECORD_INTERVAL).await,
            Err(error) => return Err(Failure::usage(error)),
        }
    }
}

/// Each life accepts from the same socket, so that nobody else can take its port in between.
fn again(listener: &StdListener) -> Result<TcpListener, Failure> {
    listener.try_clone().and_then(TcpListener::from_std).map_err(Failure::operation)
}

fn spawn_serving(environment: &Environment, what: &'static str, serving: Serving) {
    environment.spawn(async move {
        if let Err(error) = serving.await {
            tracing::error!(%error, "{what} are no longer served");
        }
    });
}

fn router_config(grounds: &Grounds, instance: &Instance, generation: u64) -> RouterConfig {
    let Grounds { config, identity, keys, .. } = grounds;
    let (id, secret) = (instance.id.clone(), identity.secret.clone());
    RouterConfig {
        cluster_id: identity.cluster.cluster_id.clone(),
        issuer: identity.cluster.issuer.clone(),
        shards: identity.shards,
        generation,
        verify_keys: keys.verify.clone(),
        lease_ttl: config.cluster.lease_ttl,
        hot: grounds.hot.clone(),
        ..config
            .router
            .tune(config.token.lifetime_max, RouterConfig::new(id, instance.boot, secret, keys.secret.clone()))
    }
}
