//! Users whose shard moves while their clients say Hello: an owner that is asked, left and asked again, or told of a session that it
//! was just asked for. An answer that comes late is that to its own question.

use std::time::Duration;

use im_proto::{
    InstanceId, StatusCode, UserId,
    method::Method,
    shard::rendezvous_owner,
    v1::{self, gateway_message::Message as Up, router_message::Message as Down},
};
use im_router::RouterConfig;
use im_storage::{FaultPlan, Memory, Store};

use crate::{
    lifecycle::faulty,
    support::{CLUSTER, TestGateway, World, message, user},
};

const SESSION: u64 = 3;

fn open(world: &World, user: &str) -> Up {
    let token = world.token(user, "d", "terminal");
    Up::Open(v1::SessionOpen { session_id: SESSION, token, ..v1::SessionOpen::default() })
}

fn close() -> Up {
    Up::Close(v1::SessionClose { session_id: SESSION })
}

/// As a gateway announces the session that another owner has let in.
fn announce(config: &RouterConfig, user: &str) -> Up {
    let identity = v1::Identity {
        user_id: user.to_owned(),
        device_id: "d".to_owned(),
        platform: "terminal".to_owned(),
        gateway_id: "g1".to_owned(),
        gateway_boot_id: 5,
        session_id: SESSION,
        expires_at_ms: i64::MAX,
        opened_at_ms: 0,
    };
    let capability = Some(config.router_secret.capability(&identity));
    Up::Announce(v1::SessionAnnounce { session_id: SESSION, capability })
}

/// Every call fails, and takes as long as this.
fn fails_after(delay: Duration) -> FaultPlan {
    FaultPlan { delay: delay..=delay, refused_permille: 1000, ..FaultPlan::none() }
}

/// The session is known: its calls are answered, and it gets what is said to its user.
async fn is_served(world: &World, gateway: &mut TestGateway, user_of: &str) {
    let reply = gateway.call::<v1::SyncReply>(SESSION, Method::ConversationSync, &v1::SyncRequest::default()).await;
    assert!(reply.is_ok(), "{reply:?}");
    gateway.open(world, 9, "writer", "w").await;
    let id = CLUSTER.direct_id(&user("writer"), &user(user_of));
    gateway.send(9, id, message(user_of, "m1", "hello", "", 0)).await;
    gateway
        .expect("push", |message| match message {
            Down::Deliver(deliver) if deliver.session_ids.contains(&SESSION) => Some(()),
            _ => None,
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_late_no_to_a_hello_leaves_the_session_that_was_announced_since() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let config = world.config("r1");
    let router = world.router(config.clone()).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "bob", "b1").await;
    store.set_plan(fails_after(Duration::from_secs(1)));
    gateway.push(vec![open(&world, "alice")]).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    // Away to an owner that lets it in, and back.
    gateway.push(vec![close(), announce(&config, "alice")]).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    store.set_plan(FaultPlan::none());
    tokio::time::sleep(Duration::from_secs(5)).await;
    is_served(&world, &mut gateway, "alice").await;
}

#[tokio::test(start_paused = true)]
async fn a_late_no_to_a_hello_is_none_to_the_next_one() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "bob", "b1").await;
    store.set_plan(fails_after(Duration::from_secs(1)));
    gateway.push(vec![open(&world, "alice")]).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    store.set_plan(FaultPlan::none());
    gateway.push(vec![close(), open(&world, "alice")]).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    gateway.gather().await;
    let answers: Vec<&Down> = gateway
        .inbox
        .iter()
        .filter(|message| match message {
            Down::Opened(opened) => opened.session_id == SESSION,
            Down::Refused(refused) => refused.session_id == SESSION,
            _ => false,
        })
        .collect();
    assert!(matches!(answers[..], [Down::Opened(_)]), "{answers:?}");
    is_served(&world, &mut gateway, "alice").await;
}

/// The Hello waits in a shard that is claimed and not served yet. Meanwhile the session is let in elsewhere and announced.
#[tokio::test(start_paused = true)]
async fn a_hello_that_is_turned_away_with_its_shard_leaves_the_session_that_was_announced_since() {
    let memory = Store::from(Memory::new());
    let mut world = World::new(memory.clone());
    let store = faulty(&mut world);
    store.set_plan(FaultPlan { refused_permille: 1000, ..FaultPlan::none() });
    let config = world.config("r1");
    let routers = ["r1", "r2"].map(|name| InstanceId::parse(name).unwrap());
    let is_of_second = |user: &UserId| {
        let shard = config.shards.shard_of(&CLUSTER.self_id(user));
        rendezvous_owner(shard, &routers) == Some(&routers[1])
    };
    let alice = (0..1000).map(|n| user(&format!("user{n}"))).find(is_of_second).unwrap();
    let first = world.router(config.clone()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.push(vec![open(&world, alice.as_str())]).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    gateway.push(vec![close(), announce(&config, alice.as_str())]).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    // The shard goes, and comes back.
    world.store = memory;
    let second = world.router(world.config("r2")).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    store.set_plan(FaultPlan::none());
    assert!(second.stop(Duration::from_secs(30)).await);
    tokio::time::sleep(Duration::from_secs(10)).await;
    is_served(&world, &mut gateway, alice.as_str()).await;
}

#[tokio::test(start_paused = true)]
async fn a_call_of_a_session_that_is_not_known_asks_whose_it_is_and_its_repetition_is_answered() {
    let world = World::new(Store::from(Memory::new()));
    let config = world.config("r1");
    let router = world.router(config.clone()).await;
    let mut gateway = world.gateway("g1", &router).await;
    let sync = v1::SyncRequest::default();
    let refused = gateway.call::<v1::SyncReply>(SESSION, Method::ConversationSync, &sync).await.unwrap_err();
    assert_eq!(refused.code, StatusCode::Unavailable.number());
    gateway
        .expect("capability wanted", |message| match message {
            Down::CapabilityWanted(wanted) if wanted.session_id == SESSION => Some(()),
            _ => None,
        })
        .await;
    gateway.push(vec![announce(&config, "alice")]).await;
    is_served(&world, &mut gateway, "alice").await;
}
