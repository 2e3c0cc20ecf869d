//! The machines of a run: routers and gateways as processes that can crash, pause and be cut off, and what starts them again.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use im_gateway::{Gateway, GatewayConfig, PeerInfo, Transport};
use im_proto::{
    BootId, InstanceId, ShardCount,
    environment::{Environment, Spawn as _},
    key::{ClusterSecret, RouterSecret},
    link::channel::{Connecting, Connector, GatewayEnd, LinkError, PeerEnd, pair},
    token::{Claims, SigningKey},
};
use im_registry::{AnyRegistry, Endpoint, InProcessHandle, InProcessRegistry, Instance, Reach, Registry as _, Role};
use im_router::{Router, RouterConfig};
use im_storage::{MessageLog as _, SimFaults, SimStore, Store};
use parking_lot::Mutex;
use tokio::{
    io::DuplexStream,
    time::{Instant, sleep},
};

use super::{
    chance::{Dice, SimClock, SimRandom},
    executor::{Executor, ProcessTasks},
    network::Network,
    plan::Plan,
    trace::Trace,
};

const CLUSTER: &str = "simulated";
const ISSUER: &str = "im";
/// Batches that wait in each piece of a simulated link.
const LINK_BATCHES: usize = 4;
/// Between the start of a router that has no shards any more and its end.
const STOP_PATIENCE: Duration = Duration::from_secs(8);

/// A run.
pub struct World {
    pub plan: Plan,
    pub trace: Trace,
    pub executor: Executor,
    /// Tasks that no fault touches.
    pub tasks: ProcessTasks,
    pub network: Network,
    pub store: SimStore,
    pub started: Instant,
    pub secret: ClusterSecret,
    router_secret: RouterSecret,
    signing: SigningKey,
    registry: InProcessRegistry,
    generation: AtomicU64,
    machines: Mutex<BTreeMap<String, Machine>>,
    dice: Mutex<Dice>,
}

struct Machine {
    role: Role,
    incarnation: u64,
    process: ProcessTasks,
    clock: Arc<SimClock>,
    registry: Option<InProcessHandle>,
    running: Running,
}

#[derive(Clone)]
enum Running {
    Down,
    Starting,
    Router(Router),
    Gateway(Gateway),
}

impl World {
    /// Nothing is started yet. Called within the runtime of the run.
    pub fn new(plan: Plan, trace: Trace) -> Result<Arc<Self>, String> {
        let seed = plan.seed;
        let executor = Executor::new(Dice::new(seed, "schedule"));
        let tasks = executor.process();
        let store = SimStore::new(Dice::new(seed, "store").number(), SimFaults::none(), Arc::new(tasks.clone()));
        let mut key =
            vec![0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
        key.extend([7_u8; 32]);
        Ok(Arc::new(Self {
            network: Network::new(Dice::new(seed, "network"), executor.process()),
            store,
            started: Instant::now(),
            secret: ClusterSecret::new([1; 32]),
            router_secret: RouterSecret::new([2; 32]),
            signing: SigningKey::from_pkcs8(&key).map_err(|error| error.to_string())?,
            registry: InProcessRegistry::new(1, 0),
            generation: AtomicU64::new(1),
            machines: Mutex::default(),
            dice: Mutex::new(Dice::new(seed, "world")),
            plan,
            trace,
            executor,
            tasks,
        }))
    }

    /// What a process of this name and start gets from its surroundings.
    pub fn surroundings(&self, name: &str, incarnation: u64) -> (ProcessTasks, Arc<SimClock>, Environment) {
        let process = self.executor.process();
        let clock = SimClock::new(self.started);
        let dice = Dice::new(self.plan.seed ^ incarnation.rotate_left(40), name);
        let environment =
            Environment { clock: clock.clone(), random: SimRandom::new(dice), tasks: Arc::new(process.clone()) };
        (process, clock, environment)
    }

    /// A token for a device of a user.
    pub fn token(&self, user: &str, device: &str, platform: &str) -> Result<String, String> {
        let claims = Claims {
            sub: user.to_owned(),
            device: device.to_owned(),
            platform: platform.to_owned(),
            iss: ISSUER.to_owned(),
            aud: CLUSTER.to_owned(),
            iat: 1_799_990_000,
            exp: 1_800_900_000,
        };
        self.signing.sign(&claims).map_err(|error| error.to_string())
    }

    /// The names of a role's machines that were ever started.
    pub fn machines(&self, role: Role) -> Vec<String> {
        let machines = self.machines.lock();
        machines.iter().filter(|(_, machine)| machine.role == role).map(|(name, _)| name.clone()).collect()
    }

    /// Starts a machine, under a new instance id if it ran before.
    pub fn start(self: &Arc<Self>, name: &str, role: Role) {
        let incarnation = self.machines.lock().get(name).map_or(1, |machine| machine.incarnation + 1);
        let (process, clock, environment) = self.surroundings(name, incarnation);
        let registry = self.registry.handle(name, environment.clone());
        let machine = Machine {
            role,
            incarnation,
            process: process.clone(),
            clock,
            registry: Some(registry.clone()),
            running: Running::Starting,
        };
        self.machines.lock().insert(name.to_owned(), machine);
        self.trace.event("starts", || format!("{name} for the {incarnation}. time"));
        let start = Start {
            world: Arc::downgrade(self),
            name: name.to_owned(),
            incarnation,
            boot: BootId(environment.random.next_u64().max(1)),
            environment,
            registry: AnyRegistry::from(registry),
            generation: self.generation.load(Ordering::Relaxed),
        };
        match role {
            Role::Router => process.spawn(Box::pin(start.router())),
            Role::Gateway => process.spawn(Box::pin(start.gateway())),
        }
    }

    /// The registry loses its claims and goes back to an old revision; after a while somebody raises the generation, first in the
    /// store, then in the registry. Routers of the old generation are fenced by that and start again.
    pub async fn lose_registry(&self, revision_percent: u64, recover_after: Duration) {
        self.registry.lose(self.registry.revision() * revision_percent / 100);
        sleep(recover_after).await;
        let generation = self.generation.load(Ordering::Relaxed) + 1;
        let store = Store::from(self.store.handle("operator"));
        while store.raise_generation(generation).await.is_err() {
            sleep(Duration::from_millis(100)).await;
        }
        self.generation.store(generation, Ordering::Relaxed);
        self.registry.recover(generation);
    }

    /// Ends a machine where it stands.
    pub fn crash(&self, name: &str) {
        let process = self.machines.lock().get_mut(name).map(|machine| {
            machine.running = Running::Down;
            machine.registry = None;
            machine.process.clone()
        });
        if let Some(process) = process {
            process.crash();
        }
    }

    /// Whether the machine is meant to run.
    pub fn is_up(&self, name: &str) -> bool {
        self.machines.lock().get(name).is_some_and(|machine| !matches!(machine.running, Running::Down))
    }

    /// The machine is in the middle of that start.
    fn is_current(&self, name: &str, incarnation: u64) -> bool {
        self.machines
            .lock()
            .get(name)
            .is_some_and(|machine| machine.incarnation == incarnation && !matches!(machine.running, Running::Down))
    }

    /// A machine that has ended by itself is started again after a while.
    async fn restart(self: &Arc<Self>, name: &str, incarnation: u64, why: &str) {
        if !self.is_current(name, incarnation) {
            return;
        }
        self.trace.count("ended by itself");
        self.trace.event("ends", || format!("{name}: {why}"));
        self.crash(name);
        let pause = self.dice.lock().millis(50, 1_500);
        sleep(pause).await;
        let (is_last, role) = match self.machines.lock().get(name) {
            Some(machine) => (machine.incarnation == incarnation, machine.role),
            None => return,
        };
        if is_last && !self.is_up(name) {
            self.start(name, role);
        }
    }

    /// A machine does nothing for a while; its clock may not show it.
    pub fn pause(&self, name: &str, pause: bool, missed: Option<Duration>) {
        let machines = self.machines.lock();
        let Some(machine) = machines.get(name) else { return };
        if let Some(missed) = missed {
            machine.clock.miss(missed);
        }
        let process = machine.process.clone();
        drop(machines);
        if pause { process.pause() } else { process.resume() }
    }

    /// Sets a machine's wall clock wrong.
    pub fn skew(&self, name: &str, skew_ms: i64) {
        if let Some(machine) = self.machines.lock().get(name) {
            machine.clock.set_skew(skew_ms);
        }
    }

    /// How a machine reaches the registry.
    pub fn set_reach(&self, name: &str, reach: Reach) {
        let handle = self.machines.lock().get(name).and_then(|machine| machine.registry.clone());
        if let Some(handle) = handle {
            handle.set_reach(reach);
        }
    }

    /// Stops a machine as an operator would.
    pub async fn leave(self: &Arc<Self>, name: &str) {
        let Some(running) = self.machines.lock().get(name).map(|machine| machine.running.clone()) else { return };
        match running {
            Running::Router(router) => {
                let done = router.stop(STOP_PATIENCE).await;
                self.trace.event("left", || format!("{name}, released: {done}"));
            }
            Running::Gateway(gateway) => {
                let drained = gateway.drain(Duration::from_millis(500));
                let done = tokio::time::timeout(STOP_PATIENCE, drained).await.is_ok();
                self.trace.event("left", || format!("{name}, drained: {done}"));
            }
            Running::Down | Running::Starting => {}
        }
        self.crash(name);
    }

    fn set_running(&self, name: &str, incarnation: u64, running: Running) {
        if let Some(machine) = self.machines.lock().get_mut(name)
            && machine.incarnation == incarnation
            && !matches!(machine.running, Running::Down)
        {
            machine.running = running;
        }
    }

    /// A machine that runs as a router.
    pub fn router(&self, name: &str) -> Option<Router> {
        match self.machines.lock().get(name).map(|machine| &machine.running) {
            Some(Running::Router(router)) => Some(router.clone()),
            _ => None,
        }
    }

    /// Hands a stream to a gateway; `false` if nobody listens.
    pub fn accept(&self, name: &str, stream: DuplexStream) -> bool {
        let machines = self.machines.lock();
        let Some(machine) = machines.get(name) else { return false };
        let Running::Gateway(gateway) = &machine.running else { return false };
        let peer = PeerInfo { transport: Transport::Memory, remote_address: ([127, 0, 0, 1], 1).into() };
        let (connection, process) = (gateway.serve_stream(stream, peer), machine.process.clone());
        drop(machines);
        process.spawn(Box::pin(connection));
        true
    }

    /// Gives everything up, that the run leaves no memory behind.
    pub fn clear(&self) {
        let machines = std::mem::take(&mut *self.machines.lock());
        drop(machines);
    }

    /// What the machines know of the registry.
    #[cfg(test)]
    pub fn views(&self) -> Vec<Arc<im_registry::View>> {
        let machines = self.machines.lock();
        machines.values().filter_map(|machine| Some(machine.registry.as_ref()?.view().borrow().clone())).collect()
    }

    pub fn shards(&self) -> ShardCount {
        ShardCount::new(self.plan.shards).unwrap_or_default()
    }
}

/// One start of a machine.
struct Start {
    world: Weak<World>,
    name: String,
    incarnation: u64,
    boot: BootId,
    environment: Environment,
    registry: AnyRegistry,
    /// Of the cluster when it starts.
    generation: u64,
}

impl Start {
    fn instance(&self, role: Role) -> Option<Instance> {
        Some(Instance {
            id: InstanceId::parse(&format!("{}.{}", self.name, self.incarnation)).ok()?,
            boot: self.boot,
            role,
            endpoints: vec![Endpoint { transport: "link".to_owned(), address: self.name.clone() }],
            zone: String::new(),
            version: String::new(),
            draining: false,
        })
    }

    fn router_config(&self, world: &World, instance: InstanceId) -> RouterConfig {
        let plan = &world.plan;
        let mut dice = Dice::new(plan.seed, "router");
        let config = RouterConfig::new(instance, self.boot, world.secret.clone(), world.router_secret.clone());
        RouterConfig {
            cluster_id: CLUSTER.to_owned(),
            issuer: ISSUER.to_owned(),
            verify_keys: vec![world.signing.verify_key()],
            generation: self.generation,
            shards: world.shards(),
            workers: plan.workers,
            lease_ttl: plan.lease_ttl,
            opens_max: *dice.pick(&[1, 4, 64]),
            dedupe_entries: plan.dedupe_entries,
            quiet_after: dice.millis(1_000, 4_000),
            evict_after: dice.millis(2_000, 8_000),
            append_patience: dice.millis(1_000, 4_000),
            peer_timeout: dice.millis(1_500, 4_000),
            resync_spread: dice.millis(50, 500),
            link_queue_bytes_max: if plan.tight { 4 * 1024 } else { 1024 * 1024 },
            store_timeout: dice.millis(500, 5_000),
            // Groups have a handful of members here.
            large_members: *dice.pick(&[1, 3, 256]),
            named_sessions_min: *dice.pick(&[1, 16]),
            ..config
        }
    }

    async fn router(self) {
        let Some(world) = self.world.upgrade() else { return };
        let Some(instance) = self.instance(Role::Router) else { return };
        let config = self.router_config(&world, instance.id.clone());
        let store = Store::from(world.store.handle(&self.name));
        let peers = Arc::new(Dialling { world: self.world.clone(), from: self.name.clone() });
        let (environment, registry) = (self.environment.clone(), self.registry.clone());
        let router = match Router::start(config, environment, store, registry, instance, peers).await {
            Ok(router) => router,
            // The try may have registered the instance although its answer was lost: a new start takes a new id.
            Err(error) => {
                let (world, name, incarnation) = (world.clone(), self.name.clone(), self.incarnation);
                world.clone().tasks.spawn(Box::pin(async move {
                    world.restart(&name, incarnation, &format!("not registered: {error}")).await;
                }));
                return;
            }
        };
        world.set_running(&self.name, self.incarnation, Running::Router(router.clone()));
        let (name, incarnation) = (self.name, self.incarnation);
        let supervised = world.clone();
        world.tasks.spawn(Box::pin(async move {
            let mut ended = router.ended();
            drop(router);
            if let Ok(why) = ended.wait_for(Option::is_some).await.map(|why| format!("{why:?}")) {
                supervised.restart(&name, incarnation, &why).await;
            }
        }));
    }

    async fn gateway(self) {
        let Some(world) = self.world.upgrade() else { return };
        let Some(instance) = self.instance(Role::Gateway) else { return };
        let plan = &world.plan;
        let lease = match self.registry.register(instance.clone(), plan.lease_ttl).await {
            Ok(lease) => lease,
            Err(error) => {
                let (world, name, incarnation) = (world.clone(), self.name.clone(), self.incarnation);
                world.clone().tasks.spawn(Box::pin(async move {
                    world.restart(&name, incarnation, &format!("not registered: {error}")).await;
                }));
                return;
            }
        };
        let mut dice = Dice::new(plan.seed, "gateway");
        let config = GatewayConfig {
            heartbeat_interval: dice.millis(1_000, 4_000),
            handshake_deadline: dice.millis(2_000, 5_000),
            outbox_bytes_max: if plan.tight { 8 * 1024 } else { 256 * 1024 },
            resync_spread_one: dice.millis(50, 500),
            resync_spread_all: dice.millis(50, 1_000),
            link_replay_bytes_max: if plan.tight { 2 * 1024 } else { 1024 * 1024 },
            link_backoff_max: Duration::from_secs(1),
            link_dial_timeout: Duration::from_secs(2),
            drain_grace: Duration::from_secs(2),
            ..GatewayConfig::new(CLUSTER)
        };
        let connector = Arc::new(Dialling { world: self.world.clone(), from: self.name.clone() });
        let view = self.registry.view();
        let gateway = Gateway::start(
            config,
            self.environment.clone(),
            instance.id,
            self.boot,
            world.secret.clone(),
            world.shards(),
            view,
            connector,
        );
        world.set_running(&self.name, self.incarnation, Running::Gateway(gateway));
        let (name, incarnation) = (self.name, self.incarnation);
        let supervised = world.clone();
        world.tasks.spawn(Box::pin(async move {
            if lease.lost().wait_for(|lost| *lost).await.is_ok() {
                supervised.restart(&name, incarnation, "the lease is lost").await;
            }
        }));
    }
}

/// Makes simulated links from a machine.
struct Dialling {
    world: Weak<World>,
    from: String,
}

impl Dialling {
    async fn router(self: &Dialling, to: &InstanceId, address: &str) -> Result<(Arc<World>, Router), LinkError> {
        let error = |reason: &str| LinkError { to: to.clone(), reason: reason.to_owned() };
        let world = self.world.upgrade().ok_or_else(|| error("the run is over"))?;
        if !world.network.reach(&self.from, address).await {
            return Err(error("no answer"));
        }
        let router = world.router(address).ok_or_else(|| error("refused"))?;
        Ok((world, router))
    }
}

impl Connector<GatewayEnd> for Dialling {
    fn connect(&self, to: &InstanceId, address: &str) -> Connecting<GatewayEnd> {
        let this = Dialling { world: self.world.clone(), from: self.from.clone() };
        let (to, address) = (to.clone(), address.to_owned());
        Box::pin(async move {
            let (world, router) = this.router(&to, &address).await?;
            let (end, near) = pair(LINK_BATCHES);
            let (far, router_end) = pair(LINK_BATCHES);
            router.accept_gateway(router_end);
            world.network.join_link(&this.from, &address, near, far);
            Ok(end)
        })
    }
}

impl Connector<PeerEnd> for Dialling {
    fn connect(&self, to: &InstanceId, address: &str) -> Connecting<PeerEnd> {
        let this = Dialling { world: self.world.clone(), from: self.from.clone() };
        let (to, address) = (to.clone(), address.to_owned());
        Box::pin(async move {
            let (world, router) = this.router(&to, &address).await?;
            let (end, near) = pair(LINK_BATCHES);
            let (far, router_end) = pair(LINK_BATCHES);
            router.accept_peer(router_end);
            world.network.join_link(&this.from, &address, near, far);
            Ok(end)
        })
    }
}
