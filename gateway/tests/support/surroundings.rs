//! What a gateway stands in: a clock that can be paused, numbers that repeat, links that end in the test, and counters to look at.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use im_proto::{
    InstanceId, Timestamp,
    environment::{Clock, Environment, Random, Spawn, Task},
    link::channel::{self, Connecting, Connector, GatewayEnd, LinkError, RouterEnd},
};
use tokio::{sync::mpsc, time::Instant};

/// 2026-01-01.
const EPOCH_MS: i64 = 1_767_225_600_000;

struct Surroundings {
    started: Instant,
    random: AtomicU64,
}

impl Clock for Surroundings {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(EPOCH_MS).saturating_add(self.started.elapsed())
    }

    fn since_boot(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Random for Surroundings {
    /// SplitMix64.
    fn next_u64(&self) -> u64 {
        let mut mixed = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
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

pub fn environment() -> Environment {
    let surroundings = Arc::new(Surroundings { started: Instant::now(), random: AtomicU64::new(1) });
    Environment { clock: surroundings.clone(), random: surroundings.clone(), tasks: surroundings }
}

/// Hands the router's end of each link to the test.
pub struct Dialled {
    pub ends: mpsc::UnboundedSender<(InstanceId, RouterEnd)>,
    pub capacity: usize,
}

impl Connector<GatewayEnd> for Dialled {
    fn connect(&self, to: &InstanceId, _address: &str) -> Connecting<GatewayEnd> {
        let (gateway, router) = channel::pair(self.capacity);
        let sent = self.ends.send((to.clone(), router));
        let to = to.clone();
        Box::pin(async move { sent.map(|()| gateway).map_err(|_| LinkError { to, reason: "no test".to_owned() }) })
    }
}

/// The counters of one gateway, by name and labels. A histogram has its number of samples, and `NAME in ms` their sum.
#[derive(Clone, Default)]
pub struct Counts(Arc<std::sync::Mutex<BTreeMap<String, Arc<AtomicU64>>>>);

impl Counts {
    fn handle(&self, key: &metrics::Key) -> Arc<AtomicU64> {
        let labels: Vec<_> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        let name =
            if labels.is_empty() { key.name().to_owned() } else { format!("{}{{{}}}", key.name(), labels.join(",")) };
        self.0.lock().expect("not poisoned").entry(name).or_default().clone()
    }

    fn sum_ms(&self, key: &metrics::Key) -> Arc<AtomicU64> {
        self.0.lock().expect("not poisoned").entry(format!("{} in ms", key.name())).or_default().clone()
    }

    /// The value of `name` or `name{label=value}`, which must exist.
    pub fn of(&self, name: &str) -> u64 {
        let counts = self.0.lock().expect("not poisoned");
        counts.get(name).unwrap_or_else(|| panic!("no metric {name}")).load(Ordering::Relaxed)
    }
}

struct Samples {
    count: Arc<AtomicU64>,
    sum_ms: Arc<AtomicU64>,
}

impl metrics::HistogramFn for Samples {
    fn record(&self, seconds: f64) {
        self.count.fetch_add(1, Ordering::Relaxed);
        let sample = u64::try_from(Duration::from_secs_f64(seconds).as_millis()).expect("not for ever");
        self.sum_ms.fetch_add(sample, Ordering::Relaxed);
    }
}

impl metrics::Recorder for Counts {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        metrics::Counter::from_arc(self.handle(key))
    }

    fn register_gauge(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        metrics::Gauge::noop()
    }

    fn register_histogram(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        metrics::Histogram::from_arc(Arc::new(Samples { count: self.handle(key), sum_ms: self.sum_ms(key) }))
    }
}
