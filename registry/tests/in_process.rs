//! The in-process backend passes the suite, and what only it can do works.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use im_proto::{Epoch, ShardId};
use im_registry::{
    AnyRegistry, ClaimOutcome, InProcessHandle, InProcessRegistry, Reach, Registry, RegistryError, conformance,
};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::support::{Surroundings, router};

struct Cluster {
    registry: InProcessRegistry,
    surroundings: Arc<Surroundings>,
    handles: Mutex<BTreeMap<String, InProcessHandle>>,
}

impl Cluster {
    fn new() -> Self {
        let registry = InProcessRegistry::new(3, 100);
        Self { registry, surroundings: Surroundings::new(), handles: Mutex::default() }
    }

    fn handle(&self, name: &str) -> InProcessHandle {
        let handle = self.registry.handle(name, self.surroundings.environment());
        self.handles.lock().insert(name.to_owned(), handle.clone());
        handle
    }
}

impl conformance::Fixture for Cluster {
    type Registry = AnyRegistry;

    async fn process(&self, name: &str) -> AnyRegistry {
        self.handle(name).into()
    }

    fn set_connected(&self, name: &str, connected: bool) {
        self.handles.lock()[name].set_reach(if connected { Reach::Up } else { Reach::Refused });
    }

    fn since_boot(&self) -> Duration {
        im_proto::environment::Clock::since_boot(&*self.surroundings)
    }
}

#[tokio::test(start_paused = true)]
async fn the_in_process_backend_conforms() {
    conformance::all(async || Cluster::new()).await;
}

#[tokio::test(start_paused = true)]
async fn epochs_begin_beyond_the_first_revision() {
    let cluster = Cluster::new();
    let registry = cluster.handle("a");
    let lease = registry.register(router("a"), conformance::TTL).await.expect("register");
    let outcomes = registry.claim(&lease, &[ShardId(0)]).await.expect("claim");
    let ClaimOutcome::Claimed(claim) = &outcomes[0] else { panic!("taken") };
    assert!(claim.epoch > Epoch::new(3, 100));
    assert_eq!(claim.epoch, Epoch::new(3, cluster.registry.revision()));
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_answer_was_lost_can_be_repeated() {
    let cluster = Cluster::new();
    let registry = cluster.handle("a");
    let lease = registry.register(router("a"), conformance::TTL).await.expect("register");
    registry.set_reach(Reach::AnswersLost);
    let lost = registry.claim(&lease, &[ShardId(0)]).await;
    assert!(matches!(lost, Err(RegistryError::Unavailable(_))));
    let deadline = lease.deadline();
    tokio::time::sleep(conformance::TTL / 2).await;
    assert_eq!(lease.deadline(), deadline, "a renewal whose answer was lost does not move the deadline");
    registry.set_reach(Reach::Up);
    let outcomes = registry.claim(&lease, &[ShardId(0)]).await.expect("claim");
    assert!(matches!(&outcomes[0], ClaimOutcome::Claimed(_)), "the lost call had claimed it for this lease");
}

#[tokio::test(start_paused = true)]
async fn a_silent_registry_is_given_up_or_waited_for() {
    let cluster = Cluster::new();
    let registry = cluster.handle("a");
    registry.set_reach(Reach::Silent);
    let started = Instant::now();
    let silent = registry.register(router("a"), conformance::TTL).await;
    assert!(matches!(silent, Err(RegistryError::Unavailable(_))));
    assert_eq!(started.elapsed().as_secs(), 5);
    let waiting = tokio::spawn({
        let registry = registry.clone();
        async move { registry.register(router("a"), conformance::TTL).await }
    });
    tokio::task::yield_now().await;
    registry.set_reach(Reach::Up);
    waiting.await.expect("no panic").expect("answered once connected");
}

#[tokio::test(start_paused = true)]
async fn in_a_registry_that_lost_its_data_only_who_starts_after_the_recovery_can_claim() {
    let cluster = Cluster::new();
    let before = cluster.handle("a");
    let lease = before.register(router("a"), conformance::TTL).await.expect("register");
    before.claim(&lease, &[ShardId(0)]).await.expect("claim");
    cluster.registry.lose(10);
    assert!(before.view().borrow().claims.is_empty());
    let early = cluster.handle("b");
    let early_lease = early.register(router("b"), conformance::TTL).await.expect("register");
    for (registry, lease) in [(&before, &lease), (&early, &early_lease)] {
        assert!(matches!(registry.claim(lease, &[ShardId(0)]).await, Err(RegistryError::Refused(_))));
    }
    cluster.registry.recover(4);
    for (registry, lease) in [(&before, &lease), (&early, &early_lease)] {
        assert!(matches!(registry.claim(lease, &[ShardId(0)]).await, Err(RegistryError::Refused(_))));
    }
    let late = cluster.handle("c");
    let lease = late.register(router("c"), conformance::TTL).await.expect("register");
    let outcomes = late.claim(&lease, &[ShardId(0)]).await.expect("claim");
    let ClaimOutcome::Claimed(claim) = &outcomes[0] else { panic!("taken") };
    assert!(claim.epoch > Epoch::new(3, u64::from(u32::MAX)), "beyond all of the generation before");
}
