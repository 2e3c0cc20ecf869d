//! Take-over: what a router has acknowledged is there for the next one, and a router that was fenced acknowledges nothing.

use std::time::Duration;

use im_proto::{StatusCode, method::Method, v1};
use im_registry::Reach;
use im_router::Ended;
use im_storage::{Memory, Store};

use crate::support::{CLUSTER, World, message, to, user};

#[tokio::test(start_paused = true)]
async fn a_stopped_router_hands_over_and_repeats_stay_single() {
    let world = World::new(Store::from(Memory::new()));
    let first = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    for name in ["m1", "m2", "m3"] {
        gateway.send(1, id, message("bob", name, name, "", 0)).await;
        gateway.ack(name).await;
    }
    assert!(first.stop(Duration::from_secs(30)).await);
    let second = world.router(world.config("r2")).await;
    let mut gateway = world.gateway("g2", &second).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.send(1, id, message("bob", "m2", "m2", "", 0)).await;
    assert_eq!(gateway.ack("m2").await.seq, 2);
    gateway.send(1, id, message("bob", "m2", "other", "", 0)).await;
    assert_eq!(gateway.ack("m2").await.status.unwrap().code, StatusCode::PreconditionFailed.number());
    gateway.send(1, id, message("bob", "m4", "m4", "m3", 3)).await;
    assert_eq!(gateway.ack("m4").await.seq, 4);
    let request = v1::HistoryRequest { target: to(id), from: 1, ..v1::HistoryRequest::default() };
    let history: v1::HistoryReply = gateway.call(1, Method::MessageHistory, &request).await.unwrap();
    assert_eq!(history.entries.len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_router_cut_off_from_the_registry_is_fenced_and_acknowledges_nothing_more() {
    let world = World::new(Store::from(Memory::new()));
    let config = world.config("r1");
    let handle = world.registry.handle("r1", world.environment.clone());
    let first = world.router_on(config, handle.clone().into()).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m1", "m1", "", 0)).await;
    assert_eq!(gateway.ack("m1").await.seq, 1);
    handle.set_reach(Reach::Refused);
    // The registry lets the lease run out; nobody has claimed yet, so sends go on.
    tokio::time::sleep(Duration::from_secs(5)).await;
    gateway.send(1, id, message("bob", "m2", "m2", "m1", 1)).await;
    assert_eq!(gateway.ack("m2").await.seq, 2);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let second = world.router(world.config("r2")).await;
    let mut other = world.gateway("g2", &second).await;
    other.open(&world, 1, "alice", "a1").await;
    other.send(1, id, message("bob", "m3", "m3", "m2", 2)).await;
    assert_eq!(other.ack("m3").await.seq, 3);
    gateway.send(1, id, message("bob", "m4", "m4", "m2", 2)).await;
    let mut ended = first.ended();
    let why = ended.wait_for(Option::is_some).await.unwrap().clone();
    assert_eq!(why, Some(Ended::Fenced));
    let request = v1::HistoryRequest { target: to(id), from: 1, ..v1::HistoryRequest::default() };
    let history: v1::HistoryReply = other.call(1, Method::MessageHistory, &request).await.unwrap();
    let ids: Vec<_> = history
        .entries
        .iter()
        .filter_map(|entry| entry.message.as_ref())
        .map(|m| m.client_message_id.clone())
        .collect();
    assert_eq!(ids, ["m1", "m2", "m3"]);
}
