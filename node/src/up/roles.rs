//! Gateway and router of one process, joined by an in-process link over the registry in memory.

use std::{sync::Arc, time::Duration};

use im_gateway::{Gateway, GatewayConfig};
use im_proto::{BootId, InstanceId, ShardCount, environment::Environment};
use im_registry::{AnyRegistry, Endpoint, InProcessRegistry, Instance, Lease, Registry as _, Role};
use im_router::{Ended, Router, RouterConfig};
use im_storage::{ClusterRow, Embedded, MessageLog as _, Store, StoreError};
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::connector::{NoPeers, ToRouter};
use crate::{
    config::Config,
    data_directory::{DataDirectory, Start},
    failure::Failure,
    links,
    listen::Addresses,
};

/// All shards are claimed within milliseconds; whoever waits longer than this waits for a fault.
const CLAIM_PATIENCE: Duration = Duration::from_secs(30);
/// The lock on the data directory plays the lease: it ends with the process and not before. A lease that ran out while the process
/// was stopped (a paused machine, a debugger) would end the server for nothing.
const LEASE: Duration = Duration::from_secs(365 * 24 * 3600);

/// The running roles.
pub struct Roles {
    pub gateway: Gateway,
    router: Router,
    registry: AnyRegistry,
    gateway_lease: Lease,
    stop_api: CancellationToken,
}

impl Roles {
    /// Starts both and returns when every shard is owned.
    pub async fn start(
        config: &Config,
        data: &DataDirectory,
        start: Start,
        addresses: &Addresses,
        store: Embedded,
        environment: &Environment,
    ) -> Result<Self, Failure> {
        let shards = ShardCount::new(data.cluster.shards).ok_or_else(|| Failure::usage("1 to 65536 shards"))?;
        let boot = BootId(environment.random.next_u64().max(1));
        let store = Store::from(store);
        let row = ClusterRow::new(&data.cluster.cluster_id, shards, &data.cluster_secret);
        row.found(&store).await.map_err(Failure::usage)?;
        let router = instance(Role::Router, start, boot, in_process_endpoints(addresses))?;
        let generation = begin_generation(&store, &router.id, start).await.map_err(Failure::operation)?;
        let core = InProcessRegistry::new(generation, start.first_revision());

        let registry = AnyRegistry::from(core.handle("router", environment.clone()));
        let router_config = router_config(config, data, generation, router.id.clone(), boot, shards);
        let peers = Arc::new(NoPeers);
        let router = Router::start(router_config, environment.clone(), store, registry, router, peers)
            .await
            .map_err(Failure::operation)?;

        let registry = AnyRegistry::from(core.handle("gateway", environment.clone()));
        let gateway = instance(Role::Gateway, start, boot, addresses.of_gateway(&config.advertise))?;
        let gateway_id = gateway.id.clone();
        let gateway_lease = registry.register(gateway, LEASE).await.map_err(Failure::operation)?;
        let gateway = Gateway::start(
            GatewayConfig { cluster_id: data.cluster.cluster_id.clone(), ..config.gateway.clone() },
            environment.clone(),
            gateway_id,
            boot,
            data.cluster_secret.clone(),
            shards,
            registry.view(),
            Arc::new(ToRouter(router.clone())),
        );
        let roles = Self { gateway, router, registry, gateway_lease, stop_api: CancellationToken::new() };
        roles.wait_for_shards(shards).await?;
        Ok(roles)
    }

    async fn wait_for_shards(&self, shards: ShardCount) -> Result<(), Failure> {
        let mut view = self.registry.view();
        let mut ended = self.router.ended();
        tokio::select! {
            biased;
            Ok(ended) = ended.wait_for(Option::is_some) => Err(router_ended(ended.as_ref())),
            claimed = timeout(CLAIM_PATIENCE, view.wait_for(|view| view.claims.len() == shards.get() as usize)) => {
                claimed.map(|_| ()).map_err(|_| Failure::operation("the router did not get its shards; its log says why"))
            }
        }
    }

    /// Serves the gRPC api.
    pub async fn serve_api(&self, listener: TcpListener, environment: &Environment) -> Result<(), Failure> {
        let routes = self.router.api_routes().await.map_err(Failure::operation)?;
        let serving = links::serve_api(listener, routes, None, self.stop_api.clone()).map_err(Failure::operation)?;
        environment.spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "the api is no longer served");
            }
        });
        Ok(())
    }

    /// Why the router ended by itself, once it has.
    pub fn ended(&self) -> watch::Receiver<Option<Ended>> {
        self.router.ended()
    }

    /// Clients are told and get what was committed for them; then the shards are given up. Cuts what is not done in time.
    pub async fn stop(&self, config: &Config) {
        let deadline = Instant::now() + config.drain_window + config.drain_timeout;
        self.mark_gateway_draining().await;
        if timeout_at(deadline, self.gateway.drain(config.drain_window)).await.is_err() {
            tracing::warn!("connections were cut: the drain took too long");
        }
        self.stop_api.cancel();
        let patience = deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
        if !self.router.stop(patience).await {
            tracing::warn!("the router did not give up its shards in time; the next start takes them all the same");
        }
        self.gateway.stop();
        if let Err(error) = self.registry.revoke(&self.gateway_lease).await {
            tracing::debug!(%error, "the gateway's registration ends with the process");
        }
    }
}

impl Roles {
    /// Nobody is sent here any more, before anybody is sent away.
    async fn mark_gateway_draining(&self) {
        let instance = self.registry.view().borrow().instances.get(self.gateway_lease.instance()).cloned();
        let Some(instance) = instance.map(|instance| Instance { draining: true, ..instance }) else { return };
        if let Err(error) = self.registry.update(&self.gateway_lease, instance).await {
            tracing::debug!(%error, "the registry does not know that this gateway drains");
        }
    }
}

/// The store takes no more writes.
pub fn store_stopped(reason: &str) -> Failure {
    Failure::Operation(format!(
        "the store has stopped taking writes: {reason}; what was acknowledged is safe. Make room or repair the disk, then start again"
    ))
}

/// The router has ended by itself.
pub fn router_ended(ended: Option<&Ended>) -> Failure {
    match ended {
        Some(Ended::StoreStopped(reason)) => store_stopped(reason),
        Some(Ended::Fenced) => {
            Failure::operation("another server took over this data; stop that one before this one starts again")
        }
        Some(Ended::LeaseLost) | None => {
            Failure::operation("the router lost its lease, as after a long pause of the machine; start again")
        }
    }
}

/// The generation of the epochs of this start. If `imd router` has raised it here, revisions of etcd were used with it: then this start
/// begins the next.
async fn begin_generation(store: &Store, router: &InstanceId, start: Start) -> Result<u64, StoreError> {
    let stored = store.read_fence(router).await?.generation;
    let generation = if stored > start.generation() { stored + 1 } else { start.generation() };
    store.raise_generation(generation).await?;
    Ok(generation)
}

/// In this process a link is a pair of channels, whatever its address says.
fn in_process_endpoints(addresses: &Addresses) -> Vec<Endpoint> {
    let link = Endpoint { transport: "link".to_owned(), address: "in-process".to_owned() };
    std::iter::once(link).chain(addresses.of_router("")).collect()
}

/// A new instance id for each start: it never comes back.
fn instance(role: Role, start: Start, boot: BootId, endpoints: Vec<Endpoint>) -> Result<Instance, Failure> {
    let name = if role == Role::Router { "router" } else { "gateway" };
    Ok(Instance {
        id: InstanceId::parse(&format!("{name}-{}", start.number)).map_err(Failure::operation)?,
        boot,
        role,
        endpoints,
        zone: String::new(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        draining: false,
    })
}

fn router_config(
    config: &Config,
    data: &DataDirectory,
    generation: u64,
    instance: InstanceId,
    boot: BootId,
    shards: ShardCount,
) -> RouterConfig {
    let (cluster_secret, router_secret) = (data.cluster_secret.clone(), data.router_secret.clone());
    let config =
        config.router.tune(config.token.lifetime_max, RouterConfig::new(instance, boot, cluster_secret, router_secret));
    RouterConfig {
        cluster_id: data.cluster.cluster_id.clone(),
        issuer: data.cluster.issuer.clone(),
        shards,
        generation,
        verify_keys: data.verify_keys.clone(),
        lease_ttl: LEASE,
        ..config
    }
}
