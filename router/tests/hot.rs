//! What routers keep in hot state: presence, and limits that several routers share. And that nothing depends on it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use im_proto::{
    InstanceId, ShardCount, StatusCode,
    method::Method,
    v1::{self, gateway_message::Message as Up, router_message::Message as Down},
};
use im_registry::{AnyRegistry, Registry as _, View};
use im_router::{Router, RouterConfig};
use im_storage::{FaultPlan, Hot, Memory, MemoryHot, RedisHot, RedisOptions, Store};

use crate::{
    lifecycle::faulty,
    support::{CLUSTER, Mesh, TestGateway, World, message, to, user},
};

/// What is told of some users, by their id: whether online.
async fn read(gateway: &mut TestGateway, session: u64, users: &[&str]) -> BTreeMap<String, bool> {
    let request = v1::PresenceReadRequest { user_ids: users.iter().map(|user| (*user).to_owned()).collect() };
    let reply: v1::PresenceReadReply = gateway.call(session, Method::PresenceRead, &request).await.unwrap();
    reply.users.into_iter().map(|user| (user.user_id, user.online)).collect()
}

/// Asks until this is told.
async fn until(gateway: &mut TestGateway, session: u64, users: &[&str], told: &[(&str, bool)]) {
    let told: BTreeMap<String, bool> = told.iter().map(|(user, online)| ((*user).to_owned(), *online)).collect();
    for _ in 0..100 {
        if read(gateway, session, users).await == told {
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    panic!("{:?} instead of {told:?}", read(gateway, session, users).await);
}

async fn close(gateway: &mut TestGateway, session: u64) {
    gateway.push(vec![Up::Close(v1::SessionClose { session_id: session })]).await;
}

#[tokio::test(start_paused = true)]
async fn presence_is_told_to_those_who_share_a_conversation_and_to_nobody_else() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name) in [(1, "alice"), (2, "bob"), (3, "carol"), (4, "dave")] {
        gateway.open(&world, session, name, "d").await;
    }
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m1", "hello", "", 0)).await;
    gateway.ack("m1").await;
    let create =
        v1::GroupCreateRequest { key: "team".into(), name: "team".to_owned(), members: vec!["carol".to_owned()] };
    let _: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &create).await.unwrap();
    let everybody = ["alice", "bob", "carol", "dave", "nobody"];
    until(&mut gateway, 1, &everybody, &[("alice", true), ("bob", true), ("carol", true)]).await;
    until(&mut gateway, 2, &everybody, &[("alice", true), ("bob", true)]).await;
    until(&mut gateway, 4, &everybody, &[("dave", true)]).await;
    close(&mut gateway, 2).await;
    until(&mut gateway, 1, &everybody, &[("alice", true), ("bob", false), ("carol", true)]).await;
    // Who stays online is said to be so again and again.
    tokio::time::sleep(Duration::from_secs(300)).await;
    until(&mut gateway, 1, &everybody, &[("alice", true), ("bob", false), ("carol", true)]).await;
    // Who left a group shares it no longer.
    let team = CLUSTER.group_id(&user("alice"), b"team");
    let leave = v1::GroupLeaveRequest { conversation_id: team.to_bytes(), client_message_id: "l1".into() };
    let _: v1::GroupLeaveReply = gateway.call(3, Method::GroupLeave, &leave).await.unwrap();
    until(&mut gateway, 1, &everybody, &[("alice", true), ("bob", false)]).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_for_too_many_or_for_no_name_is_refused() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    for (users, code) in [
        ((0..33).map(|number| format!("u{number}")).collect(), StatusCode::TooLarge),
        (vec![String::new()], StatusCode::Malformed),
        (vec!["x".repeat(1_000)], StatusCode::Malformed),
    ] {
        let request = v1::PresenceReadRequest { user_ids: users };
        let refused = gateway.call::<v1::PresenceReadReply>(1, Method::PresenceRead, &request).await.unwrap_err();
        assert_eq!(refused.code, code.number());
    }
    assert_eq!(read(&mut gateway, 1, &[]).await, BTreeMap::new());
}

#[tokio::test(start_paused = true)]
async fn whoever_was_online_when_everything_died_is_offline_after_a_minute() {
    let world = World::new(Store::from(Memory::new()));
    let hot = Hot::from(MemoryHot::new(&world.environment));
    let mut config = world.config("r1");
    config.hot = Some(hot.clone());
    let first = world.router(config).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "d").await;
    gateway.open(&world, 2, "bob", "d").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m1", "hello", "", 0)).await;
    gateway.ack("m1").await;
    until(&mut gateway, 1, &["bob"], &[("bob", true)]).await;
    assert!(first.stop(Duration::from_secs(30)).await);
    let mut config = world.config("r2");
    config.hot = Some(hot);
    let second = world.router(config).await;
    let mut gateway = world.gateway("g2", &second).await;
    gateway.open(&world, 1, "alice", "d").await;
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert_eq!(read(&mut gateway, 1, &["bob"]).await, BTreeMap::from([("bob".to_owned(), false)]));
}

#[tokio::test(start_paused = true)]
async fn without_hot_state_messages_flow_limits_hold_here_and_presence_is_unknown() {
    let world = World::new(Store::from(Memory::new()));
    // Nobody listens there.
    let options = RedisOptions { url: "redis://127.0.0.1:1".to_owned(), ..RedisOptions::default() };
    let mut config = world.config("r1");
    config.hot = Some(RedisHot::start(options, &world.environment).unwrap().into());
    config.user_sends_max = 5;
    let router = world.router(config).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    for name in ["m1", "m2", "m3", "m4", "m5"] {
        gateway.send(1, id, message("bob", name, name, "", 0)).await;
        assert!(gateway.ack(name).await.status.is_none());
    }
    gateway.send(1, id, message("bob", "m6", "m6", "", 0)).await;
    let refused = gateway.ack("m6").await.status.unwrap();
    assert_eq!(refused.code, StatusCode::RateLimited.number());
    tokio::time::sleep(Duration::from_millis(u64::from(refused.retry_after_ms))).await;
    gateway.send(1, id, message("bob", "m6", "m6", "", 0)).await;
    assert_eq!(gateway.ack("m6").await.seq, 6);
    let known = BTreeMap::from([("alice".to_owned(), true)]);
    assert_eq!(read(&mut gateway, 1, &["alice", "bob"]).await, known, "of others it is unknown, not offline");
}

#[tokio::test(start_paused = true)]
async fn only_a_message_that_gets_a_number_is_taken_from_its_users_limit() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let config = RouterConfig { user_sends_max: 3, append_patience: Duration::from_secs(2), ..world.config("r1") };
    let router = world.router(config).await;
    let mut gateway = world.gateway("g1", &router).await;
    let opened = gateway.open(&world, 1, "alice", "d").await;
    assert_eq!((opened.user_sends_per_ten_seconds, opened.user_call_cost_per_ten_seconds), (3, 20_000));
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    // What is said again, by a client or by its gateway.
    for _ in 0..20 {
        gateway.send(1, id, message("bob", "m1", "m1", "", 0)).await;
        assert_eq!(gateway.ack("m1").await.seq, 1);
    }
    // What is refused: where alice may not write, behind one that never came, with the id of another.
    let foreign = CLUSTER.direct_id(&user("carol"), &user("bob"));
    for (id, send, code) in [
        (foreign, message("x", "m2", "m2", "", 0), StatusCode::NotFound),
        (id, message("bob", "m2", "m2", "never sent", 1), StatusCode::OutOfOrder),
        (id, message("bob", "m1", "other", "", 0), StatusCode::PreconditionFailed),
    ] {
        for _ in 0..5 {
            let client_message_id = if send.client_message_id == "m1" { "m1" } else { "m2" };
            gateway.send(1, id, send.clone()).await;
            assert_eq!(gateway.ack(client_message_id).await.status.unwrap().code, code.number());
        }
    }
    // What got a number and lost it again, with its owner's epoch.
    store.set_plan(FaultPlan { refused_permille: 1000, ..FaultPlan::none() });
    gateway.send(1, id, message("bob", "m2", "m2", "", 1)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    store.set_plan(FaultPlan::none());
    gateway
        .expect("send returned", |message| match message {
            Down::SendReturned(returned) if returned.client_message_id == "m2" => Some(()),
            _ => None,
        })
        .await;
    // By frame and by call.
    gateway.send(1, id, message("bob", "m2", "m2", "", 1)).await;
    assert_eq!(gateway.ack("m2").await.seq, 2);
    let send = |text: &'static str| v1::SendRequest {
        target: to(id),
        client_message_id: text.into(),
        body: im_proto::body::text(text),
        known_seq: 2,
    };
    for _ in 0..5 {
        let reply: v1::SendReply = gateway.call(1, Method::MessageSend, &send("m3")).await.unwrap();
        assert_eq!(reply.seq, 3);
    }
    let refused = gateway.call::<v1::SendReply>(1, Method::MessageSend, &send("m4")).await.unwrap_err();
    assert_eq!(refused.code, StatusCode::RateLimited.number());
    gateway.send(1, id, message("bob", "m5", "m5", "", 3)).await;
    assert_eq!(gateway.ack("m5").await.status.unwrap().code, StatusCode::RateLimited.number());
    gateway.send(1, id, message("bob", "m1", "m1", "", 0)).await;
    assert_eq!(gateway.ack("m1").await.seq, 1, "what is stored is told to whoever is over the limit");
    tokio::time::sleep(Duration::from_millis(u64::from(refused.retry_after_ms))).await;
    gateway.send(1, id, message("bob", "m5", "m5", "", 3)).await;
    assert_eq!(gateway.ack("m5").await.seq, 4);
}

/// Two routers with one hot state and a limit of ten sends, once both own shards, and who owns which.
async fn two_routers(world: &mut World, mesh: &Mesh) -> (Vec<Router>, Arc<View>) {
    let hot = Hot::from(MemoryHot::new(&world.environment));
    let mut routers = Vec::new();
    for name in ["r1", "r2"] {
        world.peers = mesh.of(name);
        let mut config = world.config(name);
        (config.hot, config.user_sends_max) = (Some(hot.clone()), 10);
        let router = world.router(config).await;
        mesh.add(name, &router);
        routers.push(router);
    }
    let handle = AnyRegistry::from(world.registry.handle("watcher", world.environment.clone()));
    let mut view = handle.view();
    let names = ["r1", "r2"].map(|name| InstanceId::parse(name).unwrap());
    view.wait_for(|view| {
        let holds = |router: &InstanceId| view.claims.values().any(|claim| claim.owner == *router);
        view.claims.len() == 64 && names.iter().all(holds)
    })
    .await
    .unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let view = view.borrow().clone();
    (routers, view)
}

/// Two routers with one hot state: what a user sends through both counts together.
#[tokio::test(start_paused = true)]
async fn a_limit_holds_in_the_whole_cluster() {
    let mesh = Mesh::default();
    let mut world = World { shards: 64, peers: mesh.of("r1"), ..World::new(Store::from(Memory::new())) };
    let (routers, view) = two_routers(&mut world, &mesh).await;
    let names = ["r1", "r2"].map(|name| InstanceId::parse(name).unwrap());
    let owner = |id: &im_proto::ConversationId| {
        let owner = view.owner(ShardCount::new(64).unwrap().shard_of(id)).unwrap();
        usize::from(*owner == names[1])
    };
    let mut links = [world.gateway("g1", &routers[0]).await, world.link("g1", &routers[1]).await];
    let home = owner(&CLUSTER.self_id(&user("alice")));
    let opened = links[home].open(&world, 1, "alice", "d").await;
    let present = v1::SessionPresent { session_id: 1, capability: opened.capability };
    links[1 - home].push(vec![Up::Present(present)]).await;
    let peer_of = |router: usize| {
        let peers = (0..).map(|number| format!("peer{number}"));
        peers.into_iter().find(|peer| owner(&CLUSTER.direct_id(&user("alice"), &user(peer))) == router).unwrap()
    };
    let peers = [peer_of(0), peer_of(1)];
    let mut send = async |router: usize, name: String| {
        let id = CLUSTER.direct_id(&user("alice"), &user(&peers[router]));
        let mut send = message(&peers[router], "m", "text", "", 0);
        send.client_message_id = name.clone().into();
        let link = &mut links[router];
        link.send(1, id, send).await;
        link.expect("ack", |message| match message {
            Down::SendResult(v1::SendResult { ack: Some(ack), .. }) if ack.client_message_id == name => {
                Some(ack.clone())
            }
            _ => None,
        })
        .await
        .status
    };
    // Each router alone would let ten in.
    for number in 0..8 {
        for router in [0, 1] {
            assert_eq!(send(router, format!("m{number}")).await, None);
        }
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut longest = 0;
    for router in [0, 1] {
        // A router learns what the others have counted with the next of its own.
        let mut refused = send(router, "one more".to_owned()).await;
        if refused.is_none() {
            tokio::time::sleep(Duration::from_secs(1)).await;
            refused = send(router, "two more".to_owned()).await;
        }
        let refused = refused.expect("the cluster has counted 16");
        assert_eq!(refused.code, StatusCode::RateLimited.number());
        longest = longest.max(refused.retry_after_ms);
    }
    tokio::time::sleep(Duration::from_millis(u64::from(longest))).await;
    for router in [0, 1] {
        assert_eq!(send(router, "afterwards".to_owned()).await, None, "waiting as long as told helps");
    }
}
