//! What every backend must do. Each check gets an empty registry and panics with the property that does not hold.
//!
//! Time passes through `tokio::time`; a backend without real waiting runs the suite with paused time.

use std::{future::Future, sync::Arc, time::Duration};

use im_proto::{BootId, Epoch, InstanceId, ShardId};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use crate::{CLAIMS_PER_CALL_MAX, Claim, ClaimOutcome, Instance, Lease, Registry, RegistryError, Role, View};

/// A registry under test and the processes that use it.
pub trait Fixture {
    /// The registry as one process sees it.
    type Registry: Registry;

    /// Another process of the cluster.
    fn process(&self, name: &str) -> impl Future<Output = Self::Registry>;

    /// Breaks or heals the way between a process and the registry.
    fn set_connected(&self, name: &str, connected: bool);

    /// Time of the clock that [`Lease::deadline`] refers to.
    fn since_boot(&self) -> Duration;
}

/// The TTL that the suite registers with.
pub const TTL: Duration = Duration::from_secs(10);
/// Longer than any backend may take to notice an expiry or to pass on a change.
const PATIENCE: Duration = Duration::from_secs(30);
const SHARD: ShardId = ShardId(7);

/// All checks, each on a fresh registry, side by side: most of them wait for time to pass.
pub async fn all<F: Fixture, New: Future<Output = F>>(fresh: impl Fn() -> New) {
    tokio::join!(
        async { epochs_increase_strictly_per_shard(&fresh().await).await },
        async { a_claim_needs_the_shard_to_be_free(&fresh().await).await },
        async { predecessors_name_all_others_until_cut(&fresh().await).await },
        async { a_release_takes_the_owner_off_the_list(&fresh().await).await },
        async { a_changed_claim_cannot_be_cut_released_or_raised(&fresh().await).await },
        async { a_lease_that_is_not_renewed_is_lost(&fresh().await).await },
        async { a_deadline_moves_only_with_renewals(&fresh().await).await },
        async { an_expired_lease_cannot_claim(&fresh().await).await },
        async { a_watch_sees_all_changes(&fresh().await).await },
        async { too_many_shards_are_refused(&fresh().await).await },
        async { an_instance_id_is_registered_once(&fresh().await).await },
    );
}

/// Every claim and every raise of a shard has a greater epoch than all before.
pub async fn epochs_increase_strictly_per_shard<F: Fixture>(fixture: &F) {
    let registry = fixture.process("a").await;
    let lease = register(&registry, "a").await;
    let mut last = Epoch(0);
    for _ in 0..5 {
        let claim = claim(&registry, &lease, SHARD).await;
        assert!(claim.epoch > last, "a claim has a greater epoch than the one before");
        let raised = registry.raise_epoch(&claim).await.expect("raise").expect("the claim is unchanged");
        assert!(raised.epoch > claim.epoch, "a raised epoch is greater");
        assert_eq!(raised.epoch.generation(), claim.epoch.generation(), "an epoch stays in its generation");
        last = raised.epoch;
        registry.release(&[raised]).await.expect("release");
    }
}

/// Only one of two claimers gets a shard; the holder is told again that it has it.
pub async fn a_claim_needs_the_shard_to_be_free<F: Fixture>(fixture: &F) {
    let (first, second) = (fixture.process("a").await, fixture.process("b").await);
    let (first_lease, second_lease) = (register(&first, "a").await, register(&second, "b").await);
    let claimed = claim(&first, &first_lease, SHARD).await;
    let outcomes = second.claim(&second_lease, &[SHARD, ShardId(8)]).await.expect("claim");
    assert_eq!(outcomes[0], ClaimOutcome::Taken(SHARD), "a shard that is held cannot be claimed");
    assert!(matches!(&outcomes[1], ClaimOutcome::Claimed(claim) if claim.shard == ShardId(8)));
    assert_eq!(claim(&first, &first_lease, SHARD).await, claimed, "the holder's repeat changes nothing");
}

/// A claim names every other instance that ever held the shard since the last cut; expiry does not shorten the list.
pub async fn predecessors_name_all_others_until_cut<F: Fixture>(fixture: &F) {
    for name in ["a", "b"] {
        let registry = fixture.process(name).await;
        let lease = register(&registry, name).await;
        claim(&registry, &lease, SHARD).await;
        registry.revoke(&lease).await.expect("revoke");
    }
    let registry = fixture.process("c").await;
    let lease = register(&registry, "c").await;
    let claimed = claim(&registry, &lease, SHARD).await;
    assert_eq!(claimed.predecessors, [id("a"), id("b")], "a dead owner stays on the list");
    let raised = registry.raise_epoch(&claimed).await.expect("raise").expect("unchanged");
    assert_eq!(registry.cut_predecessors(&[claimed]).await.expect("cut"), [false], "the old claim cuts nothing");
    assert_eq!(registry.cut_predecessors(&[raised]).await.expect("cut"), [true]);
    assert!(claim(&registry, &lease, SHARD).await.predecessors.is_empty(), "a cut leaves the claimer alone");
    registry.revoke(&lease).await.expect("revoke");
    let registry = fixture.process("d").await;
    let lease = register(&registry, "d").await;
    assert_eq!(claim(&registry, &lease, SHARD).await.predecessors, [id("c")], "the list begins again at the cut");
}

/// After a planned move the new owner has nobody to fence, and those before the releaser stay.
pub async fn a_release_takes_the_owner_off_the_list<F: Fixture>(fixture: &F) {
    let (first, second, third) = (fixture.process("a").await, fixture.process("b").await, fixture.process("c").await);
    let first_lease = register(&first, "a").await;
    claim(&first, &first_lease, SHARD).await;
    first.revoke(&first_lease).await.expect("revoke");
    let second_lease = register(&second, "b").await;
    let claimed = claim(&second, &second_lease, SHARD).await;
    second.release(&[claimed]).await.expect("release");
    let third_lease = register(&third, "c").await;
    let claimed = claim(&third, &third_lease, SHARD).await;
    assert_eq!(claimed.predecessors, [id("a")], "the releaser is off the list, one who died before it is not");
    third.cut_predecessors(std::slice::from_ref(&claimed)).await.expect("cut");
    third.release(&[claimed]).await.expect("release");
    assert!(claim(&second, &second_lease, SHARD).await.predecessors.is_empty(), "cut and released: nobody is left");
}

/// What is guarded by a claim fails once the claim changed.
pub async fn a_changed_claim_cannot_be_cut_released_or_raised<F: Fixture>(fixture: &F) {
    let (first, second) = (fixture.process("a").await, fixture.process("b").await);
    let first_lease = register(&first, "a").await;
    let old = claim(&first, &first_lease, SHARD).await;
    first.revoke(&first_lease).await.expect("revoke");
    let second_lease = register(&second, "b").await;
    let new = claim(&second, &second_lease, SHARD).await;
    assert_eq!(first.cut_predecessors(std::slice::from_ref(&old)).await.expect("cut"), [false]);
    assert_eq!(first.raise_epoch(&old).await.expect("raise"), None);
    first.release(&[old]).await.expect("release");
    assert_eq!(claim(&second, &second_lease, SHARD).await, new, "the new owner's claim and list are untouched");
}

/// Cut off, a process loses its lease at the TTL: others see it go, its claims are free, and it learns of it after it is back.
pub async fn a_lease_that_is_not_renewed_is_lost<F: Fixture>(fixture: &F) {
    let (cut_off, other) = (fixture.process("a").await, fixture.process("b").await);
    let (lease, other_lease) = (register(&cut_off, "a").await, register(&other, "b").await);
    claim(&cut_off, &lease, SHARD).await;
    sleep(3 * TTL).await;
    assert!(!*lease.lost().borrow(), "a lease is kept alive");
    fixture.set_connected("a", false);
    let cut_at = Instant::now();
    wait(&mut other.view(), |view| !view.instances.contains_key(&id("a"))).await;
    assert!(cut_at.elapsed() <= TTL + Duration::from_secs(1), "a lease ends at its TTL");
    assert_eq!(other.view().borrow().owner(SHARD), None, "claims end with their lease");
    assert!(!*lease.lost().borrow(), "nobody has told the process yet");
    assert!(matches!(cut_off.claim(&lease, &[SHARD]).await, Err(RegistryError::Unavailable(_))));
    assert_eq!(claim(&other, &other_lease, SHARD).await.predecessors, [id("a")]);
    fixture.set_connected("a", true);
    let mut lost = lease.lost();
    timeout(PATIENCE, lost.wait_for(|lost| *lost)).await.expect("the process learns that its lease is dead").ok();
}

/// The deadline is the send time of the last renewal that was answered, plus less than the TTL.
pub async fn a_deadline_moves_only_with_renewals<F: Fixture>(fixture: &F) {
    let registry = fixture.process("a").await;
    let lease = register(&registry, "a").await;
    for _ in 0..6 {
        sleep(TTL / 2).await;
        let left = lease.deadline().checked_sub(fixture.since_boot());
        assert!(left.is_some_and(|left| left < TTL), "a lease that is kept alive has a deadline ahead, within the TTL");
    }
    fixture.set_connected("a", false);
    let deadline = lease.deadline();
    sleep(TTL / 2).await;
    assert_eq!(lease.deadline(), deadline, "without an answer the deadline stays");
}

/// A dead lease can do nothing, also before its holder knows.
pub async fn an_expired_lease_cannot_claim<F: Fixture>(fixture: &F) {
    let registry = fixture.process("a").await;
    let lease = register(&registry, "a").await;
    fixture.set_connected("a", false);
    sleep(2 * TTL).await;
    fixture.set_connected("a", true);
    let lost = Err(RegistryError::LeaseLost(id("a")));
    assert_eq!(registry.claim(&lease, &[SHARD]).await, lost);
    assert_eq!(registry.update(&lease, instance("a")).await, Err(RegistryError::LeaseLost(id("a"))));
    let fresh = register(&registry, "a2").await;
    registry.revoke(&fresh).await.expect("revoke");
    assert_eq!(registry.claim(&fresh, &[SHARD]).await, Err(RegistryError::LeaseLost(id("a2"))));
}

/// A view follows registrations, updates, claims, raises, releases and ends of leases, and catches up after a break.
pub async fn a_watch_sees_all_changes<F: Fixture>(fixture: &F) {
    let (watching, acting) = (fixture.process("w").await, fixture.process("a").await);
    let mut view = watching.view();
    let lease = register(&acting, "a").await;
    wait(&mut view, |view| view.of_role(Role::Router).any(|instance| instance.id == id("a"))).await;
    acting.update(&lease, Instance { draining: true, ..instance("a") }).await.expect("update");
    wait(&mut view, |view| view.instances.get(&id("a")).is_some_and(|instance| instance.draining)).await;
    let claimed = claim(&acting, &lease, SHARD).await;
    wait(&mut view, |view| view.claims.get(&SHARD).is_some_and(|claim| claim.epoch == claimed.epoch)).await;
    let raised = acting.raise_epoch(&claimed).await.expect("raise").expect("unchanged");
    wait(&mut view, |view| view.claims.get(&SHARD).is_some_and(|claim| claim.epoch == raised.epoch)).await;
    let before = view.borrow().revision;
    fixture.set_connected("w", false);
    acting.release(&[raised]).await.expect("release");
    acting.revoke(&lease).await.expect("revoke");
    sleep(Duration::from_secs(1)).await;
    assert_eq!(view.borrow().owner(SHARD), Some(&id("a")), "a process that is cut off sees nothing new");
    fixture.set_connected("w", true);
    wait(&mut view, |view| view.owner(SHARD).is_none() && view.instances.is_empty()).await;
    assert!(view.borrow().revision > before, "the revision grows");
}

/// More shards than a transaction holds are refused as a whole.
pub async fn too_many_shards_are_refused<F: Fixture>(fixture: &F) {
    let registry = fixture.process("a").await;
    let lease = register(&registry, "a").await;
    let shards: Vec<ShardId> = (0..=64).map(ShardId).collect();
    assert_eq!(shards.len(), CLAIMS_PER_CALL_MAX + 1);
    let refused = RegistryError::TooManyShards { found: shards.len() };
    assert_eq!(registry.claim(&lease, &shards).await, Err(refused.clone()));
    let outcomes = registry.claim(&lease, &shards[..CLAIMS_PER_CALL_MAX]).await.expect("as many as allowed");
    let mut claims: Vec<Claim> = outcomes.into_iter().map(claimed).collect();
    claims.push(claim(&registry, &lease, ShardId(64)).await);
    assert_eq!(registry.cut_predecessors(&claims).await, Err(refused.clone()));
    assert_eq!(registry.release(&claims).await, Err(refused));
}

/// Two processes cannot be one instance.
pub async fn an_instance_id_is_registered_once<F: Fixture>(fixture: &F) {
    let (first, second) = (fixture.process("a").await, fixture.process("b").await);
    let lease = register(&first, "same").await;
    assert!(matches!(second.register(instance("same"), TTL).await, Err(RegistryError::InUse(_))));
    first.revoke(&lease).await.expect("revoke");
    register(&second, "same").await;
}

async fn register(registry: &impl Registry, name: &str) -> Lease {
    registry.register(instance(name), TTL).await.expect("register")
}

async fn claim(registry: &impl Registry, lease: &Lease, shard: ShardId) -> Claim {
    claimed(registry.claim(lease, &[shard]).await.expect("claim").remove(0))
}

fn claimed(outcome: ClaimOutcome) -> Claim {
    match outcome {
        ClaimOutcome::Claimed(claim) => claim,
        ClaimOutcome::Taken(shard) => panic!("shard {} is taken", shard.0),
    }
}

async fn wait(view: &mut watch::Receiver<Arc<View>>, until: impl FnMut(&Arc<View>) -> bool) {
    timeout(PATIENCE, view.wait_for(until)).await.expect("the view shows the change in time").expect("the watch lives");
}

fn id(name: &str) -> InstanceId {
    InstanceId::parse(name).expect("an instance id")
}

fn instance(name: &str) -> Instance {
    Instance {
        id: id(name),
        boot: BootId(1),
        role: Role::Router,
        endpoints: Vec::new(),
        zone: String::new(),
        version: String::new(),
        draining: false,
    }
}
