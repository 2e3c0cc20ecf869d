//! Gateways and routers as others choose them: who drains, who has too much.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use im_proto::{
    InstanceId,
    v1::{self, gateway_message::Message as Up, router_message::Message as Down},
};
use im_registry::{AnyRegistry, Registry as _, View};
use im_storage::{Memory, Store};

use crate::support::{TestGateway, World};

/// Claims of a router in a view, and whether it drains; `None` if it is not registered.
fn seen(view: &View, router: &InstanceId) -> (usize, Option<bool>) {
    let claims = view.claims.values().filter(|claim| claim.owner == *router).count();
    (claims, view.instances.get(router).map(|instance| instance.draining))
}

#[tokio::test(start_paused = true)]
async fn a_router_that_stops_is_draining_before_it_gives_anything_up() {
    let world = World { shards: 256, ..World::new(Store::from(Memory::new())) };
    let handle = AnyRegistry::from(world.registry.handle("watcher", world.environment.clone()));
    let first = world.router(world.config("r1")).await;
    let id = InstanceId::parse("r1").unwrap();
    let mut view = handle.view();
    view.wait_for(|view| seen(view, &id).0 == 256).await.unwrap();
    let (told, history) = tokio::sync::oneshot::channel();
    world.environment.spawn(async move {
        let mut history: Vec<(usize, Option<bool>)> = Vec::new();
        while let Ok(()) = view.changed().await {
            let now = seen(&view.borrow_and_update(), &id);
            history.push(now);
            if now.1.is_none() {
                break;
            }
        }
        told.send(history).unwrap();
    });
    assert!(first.stop(Duration::from_secs(30)).await);
    let history = history.await.unwrap();
    assert!(history.contains(&(256, Some(true))), "marked with all its shards: {history:?}");
    assert!(history.iter().all(|(claims, draining)| *claims == 256 || *draining != Some(false)), "{history:?}");
}

async fn report(gateway: &mut TestGateway, connections: u64, draining: bool) {
    gateway.push(vec![Up::Load(v1::GatewayLoad { connections, capacity: 100, draining })]).await;
}

/// What routers have told a gateway: sessions to move, and the last bound.
async fn told(gateway: &mut TestGateway) -> (BTreeSet<u64>, Option<u64>) {
    gateway.gather().await;
    let (mut moved, mut bound) = (BTreeSet::new(), None);
    for message in gateway.inbox.drain(..) {
        match message {
            Down::Move(sessions) => {
                let go_away = sessions.go_away.expect("it says so");
                assert!(go_away.reconnect_after_ms <= 1_000, "{go_away:?}");
                for session in sessions.session_ids {
                    assert!(moved.insert(session), "session {session} is told twice");
                }
            }
            Down::Bound(told) => bound = Some(told.connections),
            _ => {}
        }
    }
    (moved, bound)
}

#[tokio::test(start_paused = true)]
async fn a_gateway_above_its_bound_is_told_so_and_sheds_what_it_has_too_much_once() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let (mut full, mut empty) = (world.gateway("g1", &router).await, world.gateway("g2", &router).await);
    for session in 1..=40 {
        full.open(&world, session, &format!("user{session}"), "d").await;
    }
    let mut all = BTreeSet::new();
    let mut bounds = BTreeSet::new();
    // None of them goes, so that nobody may be told beyond what is too much.
    for _ in 0..20 {
        report(&mut full, 40, false).await;
        report(&mut empty, 0, false).await;
        tokio::time::sleep(Duration::from_millis(800)).await;
        let (moved, bound) = told(&mut full).await;
        assert!(moved.len() <= 8 + 2, "{} in a second", moved.len());
        all.extend(moved);
        bounds.extend(bound);
        assert_eq!(told(&mut empty).await, (BTreeSet::new(), None));
    }
    // The share is 20, the threshold 22. The other is filled, so 20 go. Two workers may each round.
    assert!((18..=22).contains(&all.len()), "{} were told", all.len());
    assert_eq!(bounds, BTreeSet::from([22]));
    // Once it is balanced the bound is lifted.
    report(&mut full, 20, false).await;
    report(&mut empty, 20, false).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(told(&mut full).await, (BTreeSet::new(), Some(0)));
}

/// Loads are a few seconds old: who has gone meanwhile is still in them, and must not be counted as one more that is to go.
#[tokio::test(start_paused = true)]
async fn who_goes_at_once_makes_nobody_else_go_though_the_loads_are_old() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let (mut full, mut empty) = (world.gateway("g1", &router).await, world.gateway("g2", &router).await);
    for session in 1..=40 {
        full.open(&world, session, &format!("user{session}"), "d").await;
    }
    let (mut gone, mut history) = (0, Vec::new());
    for second in 0..20 {
        history.push(gone);
        // What was true two seconds ago.
        let known = history[second.max(2) - 2];
        report(&mut full, 40 - known, false).await;
        report(&mut empty, known, false).await;
        tokio::time::sleep(Duration::from_millis(800)).await;
        let (moved, _) = told(&mut full).await;
        gone += moved.len() as u64;
        let close = |session_id: u64| Up::Close(v1::SessionClose { session_id });
        full.push(moved.into_iter().map(close).collect()).await;
    }
    // The share is 20; the other is filled. Two workers may each round.
    assert!((18..=22).contains(&gone), "{gone} have gone");
}

#[tokio::test(start_paused = true)]
async fn nobody_is_moved_to_a_gateway_that_drains() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let (mut full, mut leaving) = (world.gateway("g1", &router).await, world.gateway("g2", &router).await);
    for session in 1..=40 {
        full.open(&world, session, &format!("user{session}"), "d").await;
    }
    for _ in 0..8 {
        report(&mut full, 40, false).await;
        report(&mut leaving, 0, true).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(told(&mut full).await, (BTreeSet::new(), None));
    }
}

/// Two routers, one gateway that both see: each moves only its own users, so that together they move what is too much, not twice
/// as many.
#[tokio::test(start_paused = true)]
async fn two_routers_move_no_more_than_one_would() {
    let mesh = crate::support::Mesh::default();
    let mut world = World { shards: 64, peers: mesh.of("r1"), ..World::new(Store::from(Memory::new())) };
    let one = world.router(world.config("r1")).await;
    mesh.add("r1", &one);
    world.peers = mesh.of("r2");
    let two = world.router(world.config("r2")).await;
    mesh.add("r2", &two);
    let handle = AnyRegistry::from(world.registry.handle("watcher", world.environment.clone()));
    let both = |view: &Arc<View>| {
        let owners: BTreeSet<_> = view.claims.values().map(|claim| claim.owner.clone()).collect();
        view.claims.len() == 64 && owners.len() == 2
    };
    let mut view = handle.view();
    view.wait_for(both).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let view = view.borrow().clone();
    let owner_of = |user: &str| {
        let id = crate::support::CLUSTER.self_id(&crate::support::user(user));
        view.owner(im_proto::ShardCount::new(64).unwrap().shard_of(&id)).unwrap().clone()
    };
    let (mut to_one, mut to_two) = (world.gateway("g1", &one).await, world.link("g1", &two).await);
    let (mut empty_one, mut empty_two) = (world.gateway("g2", &one).await, world.link("g2", &two).await);
    for session in 1..=40 {
        let user = format!("user{session}");
        let gateway = if owner_of(&user).as_str() == "r1" { &mut to_one } else { &mut to_two };
        gateway.open(&world, session, &user, "d").await;
    }
    let (mut all, mut bounds) = (BTreeSet::new(), 0);
    for _ in 0..20 {
        for (gateway, load) in [(&mut to_one, 40), (&mut to_two, 40), (&mut empty_one, 0), (&mut empty_two, 0)] {
            report(gateway, load, false).await;
        }
        tokio::time::sleep(Duration::from_millis(800)).await;
        for gateway in [&mut to_one, &mut to_two] {
            let (moved, bound) = told(gateway).await;
            all.extend(moved);
            bounds += usize::from(bound.is_some());
        }
    }
    // Four workers round their parts of 20.
    assert!((16..=24).contains(&all.len()), "{} were told", all.len());
    assert!(bounds <= 20, "one router tells the bound, not both: {bounds}");
}
