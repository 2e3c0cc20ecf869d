//! Named runs: what goes wrong, and when, is chosen here and not drawn. The judgement at the end is that of every run.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use im_client::{Target, compose};
use im_proto::{ConversationId, Epoch, InstanceId, ShardId};
use im_registry::{Reach, Role};
use tokio::time::{Instant, sleep};

use super::{
    OUTCOMES_MAX, SETTLE_MAX, faults, judge, life,
    people::{Device, People},
    plan::Plan,
    trace::Trace,
    world::World,
};

/// Three routers, two gateways, two users with one device each; nothing goes wrong by itself.
fn plan(shards: u32) -> Plan {
    Plan {
        routers: 3,
        spare_router: false,
        gateways: 2,
        users: 2,
        devices_max: 1,
        groups: 0,
        shards,
        workers: 1,
        sends: 0,
        burst: 0,
        lease_ttl: Duration::from_secs(2),
        dedupe_entries: 64,
        client_window: 32,
        event_queue: 64,
        tight: false,
        quiet: false,
        fault_pause_ms: None,
        rough_store: false,
        storm: Duration::ZERO,
        ..Plan::new(1)
    }
}

struct Stage {
    world: Arc<World>,
    people: Arc<People>,
    alice: Device,
    bob: Device,
}

/// Plays a scenario; all promises must hold.
fn play<F>(plan: Plan, script: impl FnOnce(Arc<Stage>) -> F + Send + 'static)
where
    F: Future<Output = ()> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let world = World::new(plan, Trace::new(false)).expect("a world");
        let people = People::new(world.clone());
        let mut broken = world.executor.clone().run(perform(world.clone(), people.clone(), script)).await;
        let record = std::mem::take(&mut *people.record.lock());
        broken.extend(record.broken);
        broken.extend(record.history.judge().findings.iter().map(ToString::to_string));
        people.devices.lock().clear();
        world.clear();
        assert_eq!(broken, Vec::<String>::new());
    });
}

async fn perform<F>(world: Arc<World>, people: Arc<People>, script: impl FnOnce(Arc<Stage>) -> F) -> Vec<String>
where
    F: Future<Output = ()>,
{
    (1..=world.plan.routers).for_each(|number| world.start(&format!("router-{number}"), Role::Router));
    (1..=world.plan.gateways).for_each(|number| world.start(&format!("gateway-{number}"), Role::Gateway));
    let device = |user: &str| people.clone().add_device(user).expect("a device");
    let (alice, bob) = (device("user-0"), device("user-1"));
    sleep(Duration::from_secs(5)).await;
    script(Arc::new(Stage { world: world.clone(), people: people.clone(), alice, bob })).await;
    faults::heal(&world, &people).await;
    let mut broken = Vec::new();
    let open = judge::wait_for_outcomes(&people, OUTCOMES_MAX).await;
    if open > 0 {
        broken.push(format!("{open} sends have no outcome"));
    }
    broken.extend(judge::shown_unasked(&people, SETTLE_MAX).await);
    broken.extend(judge::settle(&people, SETTLE_MAX).await);
    broken
}

impl Stage {
    fn conversation(&self) -> ConversationId {
        self.world.secret.direct_id(&self.alice.user, &self.bob.user)
    }

    /// Both say that many things to each other; returns when all are handed over.
    async fn talk(&self, what: &str, count: usize) {
        for number in 0..count {
            for (from, to) in [(&self.alice, &self.bob), (&self.bob, &self.alice)] {
                let text = compose::Text::new(format!("{}: {what} {number}", from.name));
                self.people.send(from, Target::Peer(to.user.clone()), text).await;
            }
        }
    }

    async fn all_acknowledged(&self) {
        assert_eq!(judge::wait_for_outcomes(&self.people, OUTCOMES_MAX).await, 0, "sends without an outcome");
    }

    /// The machine that owns the conversation.
    fn owner(&self) -> String {
        let claims = claims(&self.world);
        let (owner, _) = claims.get(&self.world.shards().shard_of(&self.conversation())).expect("an owner");
        owner.as_str().split('.').next().unwrap_or_default().to_owned()
    }

    /// Waits until another machine owns the conversation.
    async fn owner_after(&self, former: &str) -> String {
        let begun = Instant::now();
        loop {
            let owner = self.owner();
            if owner != former {
                return owner;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{former} is still the owner");
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn log(&self) -> BTreeMap<u64, bytes::Bytes> {
        let rows = self.world.store.committed_view(self.conversation());
        rows.into_iter().map(|stored| (stored.row.seq, stored.row.body)).collect()
    }
}

/// What an owner wrote reaches the replicas when two others have owned the conversation after it, and have used the same seqs.
#[test]
fn an_old_owners_writes_surface_after_two_takeovers() {
    const LATE: Duration = Duration::from_secs(90);
    play(plan(4), |stage| async move {
        let world = &stage.world;
        stage.talk("before", 5).await;
        stage.all_acknowledged().await;
        let (first, begun) = (stage.owner(), Instant::now());
        world.store.slow(&first, LATE);
        stage.talk("under the first owner", 5).await;
        sleep(Duration::from_secs(1)).await;
        world.pause(&first, true, None);
        let paused = Instant::now();
        let second = stage.owner_after(&first).await;
        stage.all_acknowledged().await;
        stage.talk("under the second owner", 5).await;
        stage.all_acknowledged().await;
        world.crash(&second);
        let third = stage.owner_after(&second).await;
        assert!(third != first && third != second, "{first}, {second}, {third}");
        stage.talk("under the third owner", 5).await;
        stage.all_acknowledged().await;
        let log = stage.log();
        assert_eq!(world.store.stale_deliveries(), 0, "too early");
        assert!(begun.elapsed() < LATE, "the take-overs took {:?}", begun.elapsed());
        sleep(LATE + Duration::from_secs(5) - begun.elapsed()).await;
        assert!(world.store.stale_deliveries() > 0, "nothing of the first owner has surfaced");
        let after = stage.log();
        assert!(log.iter().all(|(seq, body)| after.get(seq) == Some(body)), "the log has changed below its head");
        // The first owner goes on where it stood, and its clock has not moved.
        world.store.slow(&first, Duration::ZERO);
        world.pause(&first, false, Some(paused.elapsed()));
        stage.talk("after all", 5).await;
        stage.all_acknowledged().await;
    });
}

/// A virtual machine that is stopped and goes on: its owner believes that its lease is good, for as long as it lasts by its own clock.
#[test]
fn a_pause_that_the_paused_clock_does_not_show_lets_nothing_in() {
    play(plan(4), |stage| async move {
        let world = &stage.world;
        stage.talk("before", 5).await;
        stage.all_acknowledged().await;
        let first = stage.owner();
        // Something is on its way to the store when it stops.
        world.store.slow(&first, Duration::from_millis(300));
        stage.talk("in flight", 10).await;
        sleep(Duration::from_millis(100)).await;
        world.pause(&first, true, None);
        let paused = Instant::now();
        stage.owner_after(&first).await;
        stage.talk("under the second owner", 10).await;
        stage.all_acknowledged().await;
        let log = stage.log();
        world.store.slow(&first, Duration::ZERO);
        world.pause(&first, false, Some(paused.elapsed()));
        stage.talk("with two that believe", 10).await;
        stage.all_acknowledged().await;
        let after = stage.log();
        assert!(log.iter().all(|(seq, body)| after.get(seq) == Some(body)), "the log has changed below its head");
    });
}

/// Shards move all the time while messages flow.
#[test]
fn ten_shards_move_a_second_for_half_a_minute() {
    play(plan(64), |stage| async move {
        let world = stage.world.clone();
        let is_over = Arc::new(AtomicBool::new(false));
        let (talking, over) = (stage.clone(), is_over.clone());
        let talk = life(&world, async move {
            let mut number = 0;
            while !over.load(Ordering::Relaxed) {
                number += 1;
                talking.talk(&format!("on the move {number},"), 1).await;
                sleep(Duration::from_millis(40)).await;
            }
        });
        let (begun, mut known, mut moves) = (Instant::now(), claims(&world), 0);
        for turn in 0_u64.. {
            if begun.elapsed() >= Duration::from_secs(30) {
                break;
            }
            let name = format!("router-{}", turn % 3 + 1);
            world.leave(&name).await;
            moves += moved(&mut known, claims(&world));
            world.start(&name, Role::Router);
            sleep(Duration::from_millis(700)).await;
            moves += moved(&mut known, claims(&world));
        }
        let seconds = begun.elapsed().as_secs();
        is_over.store(true, Ordering::Relaxed);
        let _ = talk.await;
        stage.all_acknowledged().await;
        assert!(moves >= 10 * seconds, "{moves} moves in {seconds} s");
    });
}

/// The registry is away for everybody, for ten leases: etcd without its quorum. Nobody can take anything over, so owners go on, with a
/// fence read for each answer. When it is back, it has forgotten all leases, and everybody begins again.
#[test]
fn while_the_whole_registry_is_away_messages_go_on() {
    for reach in [Reach::Refused, Reach::Silent] {
        play(plan(16), move |stage| async move {
            let world = &stage.world;
            stage.talk("before", 5).await;
            stage.all_acknowledged().await;
            let before = stage.log().len();
            let machines: Vec<String> =
                [Role::Router, Role::Gateway].into_iter().flat_map(|role| world.machines(role)).collect();
            machines.iter().for_each(|name| world.set_reach(name, reach));
            let away = Instant::now();
            let mut said = 0;
            while away.elapsed() < 10 * world.plan.lease_ttl {
                stage.talk(&format!("while it is away {said},"), 1).await;
                said += 1;
                sleep(Duration::from_millis(250)).await;
            }
            stage.all_acknowledged().await;
            assert!(said > 40, "{said}");
            assert_eq!(stage.log().len(), before + 2 * said, "all of it is stored before the registry is back");
            assert_eq!(judge::shown_unasked(&stage.people, SETTLE_MAX).await, Vec::<String>::new());
            machines.iter().for_each(|name| world.set_reach(name, Reach::Up));
            stage.talk("after", 5).await;
            stage.all_acknowledged().await;
        });
    }
}

type Claims = BTreeMap<ShardId, (InstanceId, Epoch)>;

/// Who has claimed what, as far as any machine knows.
fn claims(world: &World) -> Claims {
    let mut newest = Claims::new();
    for view in world.views() {
        for (shard, claim) in &view.claims {
            if newest.get(shard).is_none_or(|(_, epoch)| *epoch < claim.epoch) {
                newest.insert(*shard, (claim.owner.clone(), claim.epoch));
            }
        }
    }
    newest
}

/// How many shards were claimed anew.
fn moved(known: &mut Claims, now: Claims) -> u64 {
    let fresh = now.iter().filter(|(shard, claim)| known.get(shard) != Some(claim)).count();
    *known = now;
    fresh as u64
}

/// Nothing depends on what time it is: the owner's clock is minutes ahead, then the conversation goes to one that is minutes behind.
#[test]
fn clocks_that_are_wrong_by_minutes_change_no_order() {
    play(plan(4), |stage| async move {
        let world = &stage.world;
        stage.talk("before", 3).await;
        stage.all_acknowledged().await;
        let first = stage.owner();
        for name in ["router-1", "router-2", "router-3", "gateway-1"] {
            world.skew(name, if name == first { 300_000 } else { -300_000 });
        }
        stage.talk("five minutes ahead", 5).await;
        stage.all_acknowledged().await;
        world.crash(&first);
        stage.owner_after(&first).await;
        stage.talk("five minutes behind", 5).await;
        stage.all_acknowledged().await;
    });
}
