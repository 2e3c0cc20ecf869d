//! What does not answer, what is full, who falls silent: everything ends in an answer.

use std::{sync::Arc, time::Duration};

use im_proto::{
    ConversationId, InstanceId, StatusCode,
    link::channel::{LinkItem, PeerEnd, pair},
    method::Method,
    v1::{self, gateway_message::Message as Up, peer_message::Message as Peer, router_message::Message as Down},
};
use im_registry::Reach;
use im_router::RouterConfig;
use im_storage::{FaultPlan, Memory, Store};

use crate::{
    lifecycle::faulty,
    moves::peer_hello,
    support::{CLUSTER, World, message, to, user},
};

fn world() -> World {
    World::new(Store::from(Memory::new()))
}

#[tokio::test(start_paused = true)]
async fn a_store_that_never_answers_some_calls_stalls_nothing_for_ever() {
    let mut world = world();
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let names: Vec<String> = (0..8).map(|n| format!("bob{n}")).collect();
    let request = |name: &str| v1::HistoryRequest {
        target: to(CLUSTER.direct_id(&user("alice"), &user(name))),
        from: 1,
        ..v1::HistoryRequest::default()
    };
    // Every kind of call is dropped now and then: opens, appends, busy rows, fence reads.
    store.set_plan(FaultPlan { dropped_permille: 250, ..FaultPlan::none() });
    for round in ["m1", "m2", "m3"] {
        for name in &names {
            gateway.send(1, CLUSTER.direct_id(&user("alice"), &user(name)), message(name, round, round, "", 0)).await;
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    store.set_plan(FaultPlan::none());
    // What a raised epoch gave back the gateway would send again.
    tokio::time::sleep(Duration::from_secs(40)).await;
    for name in &names {
        for round in ["m1", "m2", "m3"] {
            let id = CLUSTER.direct_id(&user("alice"), &user(name));
            gateway.send(1, id, message(name, round, round, "", 0)).await;
            gateway.ack_of(id, round).await;
        }
        let history: v1::HistoryReply = gateway.call(1, Method::MessageHistory, &request(name)).await.unwrap();
        assert_eq!(history.entries.len(), 3, "{name}");
    }
}

/// For whoever looks for the cause, in the simulation.
#[tokio::test(start_paused = true)]
async fn a_router_says_what_its_conversations_wait_for_and_whose_sessions_it_has() {
    let mut world = world();
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m1", "hi", "", 0)).await;
    gateway.ack("m1").await;
    store.set_plan(FaultPlan { refused_permille: 1000, ..FaultPlan::none() });
    gateway.send(1, id, message("bob", "m2", "hi", "", 1)).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let lines = router.describe().await;
    let of = |start: String| lines.iter().find(|line| line.starts_with(&start)).cloned();
    let waiting = of(format!("{id}: ")).unwrap_or_else(|| panic!("{lines:?}"));
    assert!(waiting.contains("committed to 1 of 2") && waiting.contains("confirmed: false"), "{waiting}");
    assert_eq!(of("alice:".to_owned()).as_deref(), Some("alice: g1/1"));
    store.set_plan(FaultPlan::none());
    gateway.ack("m2").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let lines = router.describe().await;
    assert!(!lines.iter().any(|line| line.starts_with(&format!("{id}: committed"))), "{lines:?}");
}

#[tokio::test(start_paused = true)]
async fn an_append_that_is_never_answered_is_repeated_and_its_late_result_is_nothing() {
    let mut world = world();
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.self_id(&user("alice"));
    gateway.send(1, id, message("alice", "n1", "one", "", 0)).await;
    gateway.ack("n1").await;
    // Answered after the deadline, when the repetition is under way.
    let delay = Duration::from_millis(10_100)..=Duration::from_millis(10_100);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    gateway.send(1, id, message("alice", "n2", "two", "", 1)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    store.set_plan(FaultPlan::none());
    assert_eq!(gateway.ack("n2").await.seq, 2);
    gateway.send(1, id, message("alice", "n3", "three", "", 2)).await;
    assert_eq!(gateway.ack("n3").await.seq, 3);
}

#[tokio::test(start_paused = true)]
async fn a_conversation_that_the_store_cannot_read_keeps_no_other_one_closed() {
    let mut world = world();
    let store = faulty(&mut world);
    let config = RouterConfig { opens_max: 1, workers: 1, ..world.config("r1") };
    let router = world.router(config).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let [stuck, other] = ["bob", "carol"].map(|peer| CLUSTER.direct_id(&user("alice"), &user(peer)));
    store.set_plan(FaultPlan { unread_partition: Some(stuck.to_bytes()), ..FaultPlan::none() });
    gateway.send(1, stuck, message("bob", "m1", "m1", "", 0)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    gateway.send(1, other, message("carol", "m2", "m2", "", 0)).await;
    assert_eq!(gateway.ack("m2").await.status, None);
    store.set_plan(FaultPlan::none());
    assert_eq!(gateway.ack("m1").await.status, None, "and is opened as soon as it can be");
}

#[tokio::test(start_paused = true)]
async fn heads_are_read_several_at_a_time() {
    let mut world = world();
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    for n in 0..100 {
        let name = format!("bob{n}");
        let id = CLUSTER.direct_id(&user("alice"), &user(&name));
        gateway.send(1, id, message(&name, "m1", "m1", "", 0)).await;
        gateway.ack_of(id, "m1").await;
    }
    tokio::time::sleep(Duration::from_secs(600)).await;
    let sync = v1::SyncRequest::default();
    gateway.call::<v1::SyncReply>(1, Method::ConversationSync, &sync).await.unwrap();
    let delay = Duration::from_millis(50)..=Duration::from_millis(50);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    let begun = tokio::time::Instant::now();
    let reply: v1::SyncReply = gateway.call(1, Method::ConversationSync, &sync).await.unwrap();
    assert_eq!(reply.conversations.len(), 100);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_router_whose_registry_is_away_stops_in_the_middle_of_raising_an_epoch() {
    let mut world = world();
    let store = faulty(&mut world);
    let handle = world.registry.handle("r1", world.environment.clone());
    let router = world.router_on(world.config("r1"), handle.clone().into()).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.self_id(&user("alice"));
    gateway.send(1, id, message("alice", "n1", "one", "", 0)).await;
    gateway.ack("n1").await;
    store.set_plan(FaultPlan { refused_permille: 1000, ..FaultPlan::none() });
    gateway.send(1, id, message("alice", "n2", "two", "", 1)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    handle.set_reach(Reach::Refused);
    gateway
        .expect("send returned", |message| match message {
            Down::SendReturned(returned) if returned.client_message_id == "n2" => Some(()),
            _ => None,
        })
        .await;
    assert!(router.stop(Duration::from_secs(20)).await, "the router does not stop");
}

#[tokio::test(start_paused = true)]
async fn an_announced_session_that_has_no_room_is_told_to_go() {
    let world = world();
    let config = RouterConfig { sessions_per_user_max: 2, ..world.config("r1") };
    let router = world.router(config.clone()).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.open(&world, 2, "alice", "a2").await;
    let identity = v1::Identity {
        user_id: "alice".to_owned(),
        device_id: "a3".to_owned(),
        platform: "terminal".to_owned(),
        gateway_id: "g1".to_owned(),
        gateway_boot_id: 5,
        session_id: 3,
        expires_at_ms: i64::MAX,
        opened_at_ms: 0,
    };
    let capability = Some(config.router_secret.capability(&identity));
    gateway.push(vec![Up::Announce(v1::SessionAnnounce { session_id: 3, capability })]).await;
    let status = gateway
        .expect("kick", |message| match message {
            Down::Kick(kick) if kick.session_id == 3 => kick.status.clone(),
            _ => None,
        })
        .await;
    assert_eq!(status.code, StatusCode::TimedOut.number());
}

#[tokio::test(start_paused = true)]
async fn group_events_have_the_bound_of_sends() {
    let mut world = world();
    let store = faulty(&mut world);
    let router = world.router(RouterConfig { conversation_queue_max: 2, ..world.config("r1") }).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let create = v1::GroupCreateRequest { key: "k".into(), name: "g".to_owned(), members: Vec::new() };
    let group: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &create).await.unwrap();
    let delay = Duration::from_secs(1)..=Duration::from_secs(1);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    let invites = (0..10).map(|n| {
        let request = v1::GroupInviteRequest {
            conversation_id: group.conversation_id.clone(),
            members: vec![format!("bob{n}")],
            ..v1::GroupInviteRequest::default()
        };
        let request = prost::Message::encode_to_vec(&request).into();
        let call = v1::Call { request_id: 1000 + n, method: Method::GroupInvite.number(), request };
        Up::Call(v1::SessionCall { session_id: 1, call: Some(call) })
    });
    gateway.push(invites.collect()).await;
    let mut refused = 0;
    for n in 0..10 {
        let status = gateway
            .expect("reply", |message| match message {
                Down::CallReply(reply) if reply.request_id == 1000 + n => Some(reply.status.clone()),
                _ => None,
            })
            .await;
        refused += u32::from(status.is_some_and(|status| status.code == StatusCode::Overloaded.number()));
    }
    assert!((6..10).contains(&refused), "{refused} of 10 refused");
}

/// A link to a router as another router makes it.
async fn peer_link(router: &im_router::Router) -> PeerEnd {
    let (mut peer, far) = pair(64);
    router.accept_peer(far);
    peer.sender.send(peer_hello("r2")).await.unwrap();
    assert!(matches!(peer.receiver.recv().await, Some(LinkItem::Hello(_))));
    peer
}

async fn next_batch(peer: &mut PeerEnd) -> Arc<v1::PeerBatch> {
    match tokio::time::timeout(Duration::from_secs(30), peer.receiver.recv()).await {
        Ok(Some(LinkItem::Batch(batch))) => batch,
        other => panic!("no batch came: {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn effects_have_the_bound_of_sends() {
    let mut world = world();
    let store = faulty(&mut world);
    let router = world.router(RouterConfig { conversation_queue_max: 2, ..world.config("r1") }).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let target = CLUSTER.self_id(&user("alice"));
    let shard = world.config("any").shards.shard_of(&target).0;
    gateway.send(1, target, message("alice", "n1", "one", "", 0)).await;
    gateway.ack("n1").await;
    let delay = Duration::from_secs(1)..=Duration::from_secs(1);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    let mut peer = peer_link(&router).await;
    let effect = |n: u8| {
        let effect = v1::PeerEffect {
            target: target.to_bytes(),
            origin: ConversationId::from_bytes([n; 16]).to_bytes(),
            origin_seq: 1,
            target_user_id: "alice".to_owned(),
            body: im_proto::body::text("hi"),
        };
        v1::PeerMessage { shard, request_id: u64::from(n), message: Some(Peer::Effect(effect)) }
    };
    let messages = (1..=10).map(effect).collect();
    let batch = v1::PeerBatch { first_number: 1, acknowledged_through: 0, messages };
    peer.sender.send(LinkItem::Batch(Arc::new(batch))).await.unwrap();
    let (mut answered, mut refused) = (0, 0);
    while answered < 10 {
        for message in &next_batch(&mut peer).await.messages {
            let Some(Peer::Answer(answer)) = &message.message else { continue };
            answered += 1;
            refused += u32::from(answer.status.as_ref().is_some_and(|s| s.code == StatusCode::Overloaded.number()));
        }
    }
    assert!((6..10).contains(&refused), "{refused} of 10 refused");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_only_sends_is_told_what_has_arrived() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let _gateway = world.gateway("g1", &router).await;
    let mut peer = peer_link(&router).await;
    let resync =
        || v1::PeerMessage { shard: 0, request_id: 0, message: Some(Peer::ResyncShard(v1::PeerResyncShard {})) };
    let batch = |first_number, count: usize| {
        let messages = std::iter::repeat_with(resync).take(count).collect();
        LinkItem::Batch(Arc::new(v1::PeerBatch { first_number, acknowledged_through: 0, messages }))
    };
    // By time.
    peer.sender.send(batch(1, 3)).await.unwrap();
    let told = next_batch(&mut peer).await;
    assert_eq!((told.acknowledged_through, told.messages.len()), (3, 0));
    // By number, at once.
    let begun = tokio::time::Instant::now();
    peer.sender.send(batch(4, 2000)).await.unwrap();
    assert_eq!(next_batch(&mut peer).await.acknowledged_through, 2003);
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_link_whose_router_no_view_shows_breaks_instead_of_falling_silent() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut peer = peer_link(&router).await;
    // A new view, without the other router.
    let _other = world.gateway("other", &router).await;
    let broken = tokio::time::timeout(Duration::from_secs(60), async { while peer.receiver.recv().await.is_some() {} });
    assert!(broken.await.is_ok(), "the link is still there");
    // It dials again, and is answered.
    let mut peer = peer_link(&router).await;
    let request = v1::PeerHeads { user_id: "alice".to_owned(), ..v1::PeerHeads::default() };
    let message = v1::PeerMessage { shard: 0, request_id: 7, message: Some(Peer::Heads(request)) };
    let batch = v1::PeerBatch { first_number: 1, acknowledged_through: 0, messages: vec![message] };
    peer.sender.send(LinkItem::Batch(Arc::new(batch))).await.unwrap();
    assert_eq!(next_batch(&mut peer).await.messages[0].request_id, 7);
    assert!(InstanceId::parse("r2").is_ok());
}
