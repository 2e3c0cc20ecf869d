//! Subscriptions under way: their order, with each other and with what is told; their bounds; and what cannot be decided.

use super::*;

/// A call whose answer is not waited for.
fn subscription(request_id: u32, users: &[&str]) -> Up {
    let request = v1::PresenceSubscribeRequest { user_ids: users.iter().map(|user| (*user).to_owned()).collect() };
    let (method, request) = (Method::PresenceSubscribe.number(), request.encode_to_vec().into());
    Up::Call(v1::SessionCall { session_id: 1, call: Some(v1::Call { request_id, method, request }) })
}

async fn reply_to(gateway: &mut TestGateway, request_id: u32) -> v1::CallReply {
    let is_it = |message: &Down| matches!(message, Down::CallReply(reply) if reply.request_id == request_id);
    let reply = gateway.expect("a reply", |message| match message {
        Down::CallReply(reply) if is_it(message) => Some(reply.clone()),
        _ => None,
    });
    reply.await
}

/// A session of alice, who has conversations with bob and carol, at a router that has settled.
async fn alice_on_a_faulty_store() -> ((World, Router), Faulty, TestGateway) {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    befriend(&mut gateway, 1, "alice", &["bob", "carol"]).await;
    tokio::time::sleep(11 * SECOND).await;
    ((world, router), store, gateway)
}

#[tokio::test(start_paused = true)]
async fn of_two_subscriptions_under_way_the_later_one_stands_whichever_is_decided_first() {
    let ((world, _router), store, mut gateway) = alice_on_a_faulty_store().await;
    let delay = Duration::from_millis(50)..=Duration::from_millis(50);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    // Eight lists at a time are read for one call.
    let strangers: Vec<String> = (0..100).map(|n| format!("stranger{n}")).collect();
    let mut many: Vec<&str> = strangers.iter().map(String::as_str).collect();
    many.push("carol");
    for (round, last) in [(0, &["bob"][..]), (1, &[])] {
        let [first, second] = [1, 2].map(|n| 900 + 10 * round + n);
        gateway.push(vec![subscription(first, &many), subscription(second, last)]).await;
        let decided = reply_to(&mut gateway, second).await;
        assert!(decided.status.is_none() && decided.in_order, "{decided:?}");
        let is_there = |message: &Down| matches!(message, Down::CallReply(reply) if reply.request_id == first);
        assert!(!gateway.inbox.iter().any(is_there), "the first one takes longer");
        let first = reply_to(&mut gateway, first).await;
        assert_eq!(first.status, None, "as if it had been replaced at once");
        told_after(&mut gateway, SOON).await;
        let session = 10 * (u64::from(round) + 1);
        gateway.open(&world, session, "bob", "d").await;
        gateway.open(&world, session + 1, "carol", "d").await;
        let wanted: Vec<_> = last.iter().map(|name| came(1, name)).collect();
        assert_eq!(told_after(&mut gateway, 2 * SOON).await, wanted, "round {round}");
        close(&mut gateway, session).await;
        close(&mut gateway, session + 1).await;
        told_after(&mut gateway, GRACE).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_comes_behind_what_was_told_later_changes_nothing() {
    let mut cluster = Cluster::new(2).await;
    let (alice, bob) = (cluster.users_of(0).next().unwrap(), cluster.users_of(1).next().unwrap());
    cluster.open(1, alice).await;
    cluster.befriend(1, alice, bob).await;
    subscribe(&mut cluster.links[0], 1, &[bob]).await;
    assert_eq!(told_after(&mut cluster.links[0], SOON).await, [went(1, bob)]);
    cluster.mesh.hold_answers_to(Some("r0"));
    cluster.mesh.take();
    while !cluster.mesh.take().0.contains_key("watch") {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The owner has answered that nobody is there; that is on its way.
    tokio::time::sleep(Duration::from_millis(50)).await;
    cluster.open(2, bob).await;
    assert_eq!(told_after(&mut cluster.links[0], SOON).await, [came(1, bob)]);
    cluster.mesh.hold_answers_to(None);
    assert_eq!(told_after(&mut cluster.links[0], SOON).await, []);
    assert_eq!(subscribe(&mut cluster.links[0], 1, &[bob]).await, [(bob.to_owned(), true)]);
    assert_eq!(told_after(&mut cluster.links[0], RENEWAL).await, []);
}

/// Its answer would not come in the order of what is told.
#[tokio::test(start_paused = true)]
async fn a_subscription_by_another_router_than_the_sessions_is_to_be_tried_again() {
    let mut cluster = Cluster::new(2).await;
    let alice = cluster.users_of(0).next().unwrap();
    let opened = cluster.open(1, alice).await;
    let present = v1::SessionPresent { session_id: 1, capability: opened.capability };
    cluster.links[1].push(vec![Up::Present(present)]).await;
    let refused = try_subscribe(&mut cluster.links[1], 1, &[]).await.map_err(|status| status.code);
    assert_eq!(refused, Err(StatusCode::Unavailable.number()));
    assert_eq!(try_subscribe(&mut cluster.links[0], 1, &[]).await, Ok(Vec::new()));
}

#[tokio::test(start_paused = true)]
async fn lists_are_read_a_bounded_number_at_a_time_however_many_subscribe() {
    const CALLS: u32 = 20;
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for n in 1..=CALLS {
        gateway.open(&world, n.into(), &format!("watcher{n}"), "d").await;
    }
    let strangers: Vec<String> = (0..100).map(|n| format!("stranger{n}")).collect();
    let strangers: Vec<&str> = strangers.iter().map(String::as_str).collect();
    tokio::time::sleep(11 * SECOND).await;
    let delay = Duration::from_millis(50)..=Duration::from_millis(50);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    let begun = tokio::time::Instant::now();
    let call = |n: u32| match subscription(900 + n, &strangers) {
        Up::Call(call) => Up::Call(v1::SessionCall { session_id: n.into(), ..call }),
        other => other,
    };
    gateway.push((1..=CALLS).map(call).collect()).await;
    for n in 1..=CALLS {
        assert_eq!(reply_to(&mut gateway, 900 + n).await.status, None);
    }
    // 32 lists of 50 ms at a time.
    let least = Duration::from_millis(50) * CALLS * 100 / 32;
    assert!((least..2 * least).contains(&begun.elapsed()), "{:?}, not {least:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_subscription_that_cannot_be_decided_for_everybody_is_refused_and_the_former_stands() {
    let ((world, _router), store, mut gateway) = alice_on_a_faulty_store().await;
    subscribe(&mut gateway, 1, &["bob"]).await;
    told_after(&mut gateway, SOON).await;
    let damaged_partition = Some(CLUSTER.self_id(&user("carol")).to_bytes());
    for plan in [
        FaultPlan { refused_permille: 1000, ..FaultPlan::none() },
        FaultPlan { damaged_partition, ..FaultPlan::none() },
    ] {
        store.set_plan(plan);
        let refused = try_subscribe(&mut gateway, 1, &["bob", "carol"]).await.map_err(|status| status.code);
        assert_eq!(refused, Err(StatusCode::Unavailable.number()));
    }
    store.set_plan(FaultPlan::none());
    gateway.open(&world, 2, "bob", "d").await;
    gateway.open(&world, 3, "carol", "d").await;
    assert_eq!(told_after(&mut gateway, SOON).await, [came(1, "bob")]);
    let known = subscribe(&mut gateway, 1, &["bob", "carol"]).await;
    assert_eq!(known, [("bob".to_owned(), true), ("carol".to_owned(), true)]);
}

/// Another router may own its users by now, and know that they have left.
#[tokio::test(start_paused = true)]
async fn past_its_lease_a_router_says_of_nobody_in_hot_state_that_it_is_there() {
    let world = World::new(Store::from(Memory::new()));
    let hot = Hot::from(MemoryHot::new(&world.environment));
    let handle = world.registry.handle("r1", world.environment.clone());
    let config = RouterConfig { hot: Some(hot.clone()), ..world.config("r1") };
    let router = world.router_on(config, handle.clone().into()).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    let is_online = async || {
        let known = hot.presence(&[user("alice")]).await.remove(0);
        known.is_some_and(|known| known.is_online(now(&world)))
    };
    tokio::time::sleep(100 * SECOND).await;
    assert!(is_online().await);
    handle.set_reach(Reach::Refused);
    tokio::time::sleep(100 * SECOND).await;
    assert!(!is_online().await, "what was said before holds for a minute");
}
