//! What every test needs: an environment and things to register.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use im_proto::{
    BootId, InstanceId, Timestamp,
    environment::{Clock, Environment, Random, Spawn, Task},
};
use im_registry::{Instance, Role};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use parking_lot::Mutex;
use tokio::time::Instant;

/// Real or paused time, whichever the runtime has.
pub struct Surroundings {
    started: Instant,
    drawn: AtomicU64,
}

impl Surroundings {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { started: Instant::now(), drawn: AtomicU64::new(4) })
    }

    pub fn environment(self: &Arc<Self>) -> Environment {
        Environment { clock: self.clone(), random: self.clone(), tasks: self.clone() }
    }
}

impl Clock for Surroundings {
    fn now(&self) -> Timestamp {
        Timestamp::default()
    }

    fn since_boot(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Random for Surroundings {
    fn next_u64(&self) -> u64 {
        // SplitMix64: the choices of a channel need all bits.
        let mut mixed = self.drawn.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

impl Spawn for Surroundings {
    fn spawn(&self, task: Task) {
        tokio::spawn(task);
    }
}

pub fn id(name: &str) -> InstanceId {
    InstanceId::parse(name).expect("an instance id")
}

pub fn instance(role: Role, name: &str) -> Instance {
    Instance {
        id: id(name),
        boot: BootId(1),
        role,
        endpoints: Vec::new(),
        zone: String::new(),
        version: String::new(),
        draining: false,
    }
}

pub fn router(name: &str) -> Instance {
    instance(Role::Router, name)
}

/// Metrics by name, of what is made while it is the recorder.
#[derive(Default)]
pub struct Numbers(Mutex<BTreeMap<String, Arc<AtomicU64>>>);

impl Numbers {
    pub fn counter(&self, name: &str) -> u64 {
        self.0.lock().get(name).unwrap_or_else(|| panic!("no metric {name}")).load(Ordering::Relaxed)
    }

    pub fn gauge(&self, name: &str) -> f64 {
        f64::from_bits(self.counter(name))
    }

    fn of(&self, key: &Key) -> Arc<AtomicU64> {
        self.0.lock().entry(key.name().to_owned()).or_default().clone()
    }
}

impl Recorder for Numbers {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.of(key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.of(key))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}
