//! Users on several devices and gateways: who takes whose place, who is there after a gateway died, and a message that is said many times.

use std::{collections::BTreeSet, time::Duration};

use im_proto::{
    StatusCode,
    method::Method,
    v1::{self, gateway_message::Message as Up, router_message::Message as Down},
};
use im_registry::Reach;
use im_router::config::EXCLUSIVE_PLATFORMS;
use im_storage::{FaultPlan, Memory, Store};

use crate::{
    lifecycle::faulty,
    support::{CLUSTER, TestGateway, World, message, to, user},
};

fn world() -> World {
    World::new(Store::from(Memory::new()))
}

/// Sessions of a gateway that were told to go, and why.
async fn kicked(gateway: &mut TestGateway) -> Vec<(u64, u32)> {
    gateway.gather().await;
    let kick = |message: Down| match message {
        Down::Kick(kick) => Some((kick.session_id, kick.status.map_or(0, |status| status.code))),
        _ => None,
    };
    gateway.inbox.drain(..).filter_map(kick).collect()
}

/// A gateway tells the next owner which sessions it has.
async fn announce(gateway: &mut TestGateway, opened: &v1::SessionOpened) {
    let announce = v1::SessionAnnounce { session_id: opened.session_id, capability: opened.capability.clone() };
    gateway.push(vec![Up::Announce(announce)]).await;
}

#[tokio::test(start_paused = true)]
async fn a_user_has_one_session_on_an_exclusive_platform_whatever_the_gateways() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let (mut one, mut other) = (world.gateway("g1", &router).await, world.gateway("g2", &router).await);
    let displaced = StatusCode::KickedByAnotherDevice.number();
    for (number, platform) in EXCLUSIVE_PLATFORMS.into_iter().enumerate() {
        let number = number as u64 * 10;
        one.open_on(&world, number + 1, "alice", &format!("{platform}-1"), platform).await;
        // Neither another user nor another platform is concerned.
        one.open_on(&world, number + 2, "bob", &format!("{platform}-1"), platform).await;
        assert_eq!(kicked(&mut one).await, []);
        other.open_on(&world, number + 3, "alice", &format!("{platform}-2"), platform).await;
        assert_eq!(kicked(&mut one).await, [(number + 1, displaced)], "{platform}");
        one.open_on(&world, number + 4, "alice", &format!("{platform}-3"), platform).await;
        assert_eq!(kicked(&mut other).await, [(number + 3, displaced)], "{platform}");
    }
    // Terminals and bots may be any number.
    for number in 1..=3 {
        one.open_on(&world, 100 + number, "alice", &format!("terminal-{number}"), "terminal").await;
    }
    assert_eq!(kicked(&mut one).await, []);
}

/// The shard has moved, and its next owner learns of the sessions in any order: the one that was opened last stays.
#[tokio::test(start_paused = true)]
async fn the_older_phone_goes_also_when_the_shard_has_moved_in_between() {
    let displaced = StatusCode::KickedByAnotherDevice.number();
    for newer_comes_first in [false, true] {
        let world = world();
        let first = world.router(world.config("r1")).await;
        let mut one = world.gateway("g1", &first).await;
        let older = one.open_on(&world, 1, "alice", "phone-1", "phone").await;
        let tablet = one.open_on(&world, 2, "alice", "tablet-1", "tablet").await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(first.stop(Duration::from_secs(30)).await);
        let second = world.router(world.config("r2")).await;
        let (mut one, mut two) = (world.link("g1", &second).await, world.gateway("g2", &second).await);
        if !newer_comes_first {
            announce(&mut one, &older).await;
            announce(&mut one, &tablet).await;
            assert_eq!(kicked(&mut one).await, []);
        }
        two.open_on(&world, 3, "alice", "phone-2", "phone").await;
        if newer_comes_first {
            announce(&mut one, &older).await;
            announce(&mut one, &tablet).await;
        }
        assert_eq!(kicked(&mut one).await, [(1, displaced)], "newer first: {newer_comes_first}");
        assert_eq!(kicked(&mut two).await, [], "newer first: {newer_comes_first}");
        // The one that stays gets what is said.
        let mut writer = world.gateway("g3", &second).await;
        writer.open(&world, 9, "bob", "d").await;
        writer.send(9, CLUSTER.direct_id(&user("alice"), &user("bob")), message("alice", "m1", "hello", "", 0)).await;
        writer.ack("m1").await;
        assert_eq!(two.pushed().await.0, [3]);
        assert_eq!(one.pushed().await.0, [2]);
    }
}

async fn is_online(gateway: &mut TestGateway, session: u64, name: &str) -> Option<bool> {
    let request = v1::PresenceReadRequest { user_ids: vec![name.to_owned()] };
    let reply: v1::PresenceReadReply = gateway.call(session, Method::PresenceRead, &request).await.unwrap();
    reply.users.first().map(|user| user.online)
}

#[tokio::test(start_paused = true)]
async fn who_was_on_a_gateway_that_died_is_offline_within_its_lease() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    let handle = world.registry.handle("g2", world.environment.clone());
    let mut dying = world.gateway_on("g2", &router, handle.clone().into()).await;
    gateway.open(&world, 1, "alice", "d").await;
    for (session, name, device) in [(1, "bob", "d"), (2, "carol", "d1")] {
        dying.open(&world, session, name, device).await;
    }
    // Carol is elsewhere too.
    gateway.open(&world, 2, "carol", "d2").await;
    for (name, id) in [("bob", "m1"), ("carol", "m2")] {
        gateway.send(1, CLUSTER.direct_id(&user("alice"), &user(name)), message(name, id, "hello", "", 0)).await;
        gateway.ack(id).await;
    }
    for name in ["bob", "carol"] {
        while is_online(&mut gateway, 1, name).await != Some(true) {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    // Killed: nothing is said any more, neither on its links nor to the registry.
    handle.set_reach(Reach::Refused);
    let died = tokio::time::Instant::now();
    drop(dying);
    while is_online(&mut gateway, 1, "bob").await != Some(false) {
        assert!(died.elapsed() < Duration::from_secs(60), "still online");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // A lease of ten seconds, and the half second in which words are gathered.
    assert!(died.elapsed() <= Duration::from_secs(11), "{:?}", died.elapsed());
    assert_eq!(is_online(&mut gateway, 1, "carol").await, Some(true));
}

/// The acks of a client message id that have come to a gateway: their seqs.
async fn acked(gateway: &mut TestGateway) -> Vec<u64> {
    gateway.gather().await;
    let ack = |message: Down| match message {
        Down::SendResult(v1::SendResult { ack: Some(ack), .. }) => {
            assert_eq!(ack.status, None);
            Some(ack.seq)
        }
        _ => None,
    };
    gateway.inbox.drain(..).filter_map(ack).collect()
}

/// A session of alice at each of two gateways.
async fn two_sessions(world: &World, mut gateways: [TestGateway; 2]) -> [TestGateway; 2] {
    for (session, gateway) in gateways.iter_mut().enumerate() {
        gateway.open(world, session as u64 + 1, "alice", &format!("d{session}")).await;
    }
    gateways
}

#[tokio::test(start_paused = true)]
async fn a_message_that_is_said_a_hundred_times_by_two_sessions_while_its_owner_stops_is_stored_once() {
    let mut world = world();
    let store = faulty(&mut world);
    let first = world.router(world.config("r1")).await;
    let gateways = [world.gateway("g1", &first).await, world.gateway("g2", &first).await];
    let mut gateways = two_sessions(&world, gateways).await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateways[0].send(1, id, message("bob", "m0", "before", "", 0)).await;
    assert_eq!(gateways[0].ack("m0").await.seq, 1);
    let (mut seqs, mut said) = (BTreeSet::new(), 0);
    let delay = Duration::from_millis(50)..=Duration::from_millis(50);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    for turn in 0..50 {
        let gateway = &mut gateways[turn % 2];
        gateway.send(turn as u64 % 2 + 1, id, message("bob", "m1", "hello", "", 1)).await;
        said += 1;
    }
    // In the middle: what is on its way is acknowledged or given back.
    assert!(first.stop(Duration::from_secs(30)).await);
    let mut acks = 0;
    for gateway in &mut gateways {
        let of_gateway = acked(gateway).await;
        acks += of_gateway.len();
        seqs.extend(of_gateway);
    }
    store.set_plan(FaultPlan::none());
    let second = world.router(world.config("r2")).await;
    let gateways = [world.link("g1", &second).await, world.link("g2", &second).await];
    let mut gateways = two_sessions(&world, gateways).await;
    while said < 100 {
        let at = said % 2;
        gateways[at].send(at as u64 + 1, id, message("bob", "m1", "hello", "", 1)).await;
        said += 1;
        if said % 10 == 0 {
            // Something else in between.
            let name = &*Box::leak(format!("x{said}").into_boxed_str());
            gateways[at].send(at as u64 + 1, id, message("bob", name, name, "", 1)).await;
            gateways[at].ack(name).await;
        }
    }
    for gateway in &mut gateways {
        let of_gateway = acked(gateway).await;
        acks += of_gateway.len();
        seqs.extend(of_gateway);
    }
    assert!(acks >= 50, "{acks} acks: all that the second owner got, at least");
    assert_eq!(seqs.len(), 1, "{seqs:?}");
    let request = v1::HistoryRequest { target: to(id), from: 1, ..v1::HistoryRequest::default() };
    let history: v1::HistoryReply = gateways[0].call(1, Method::MessageHistory, &request).await.unwrap();
    let stored = history.entries.iter().filter_map(|entry| entry.message.as_ref());
    let stored: Vec<u64> = stored.filter(|stored| stored.client_message_id == "m1").map(|stored| stored.seq).collect();
    assert_eq!(stored, Vec::from_iter(seqs));
}
