//! Bursts and quiet conversations, repeats that memory does not reach, moves of users, bounds.

use std::{sync::Arc, time::Duration};

use im_proto::{
    ConversationId, Epoch, InstanceId, StatusCode,
    link::channel::{LinkItem, pair},
    method::Method,
    v1,
    v1::{gateway_message::Message as Up, router_message::Message as Down},
};
use im_registry::Reach;
use im_router::RouterConfig;
use im_storage::{
    AppendRequest, Batch, Directory as _, FaultPlan, Faulty, Memory, MessageLog as _, Row, SimFaults, SimStore,
    StateWrite, Store, Table,
};
use prost::Message as _;

use crate::support::{CLUSTER, SHARDS, World, message, to, user};

fn shard_partition(world: &World, id: &ConversationId) -> [u8; 4] {
    world.config("any").shards.shard_of(id).0.to_be_bytes()
}

#[tokio::test(start_paused = true)]
async fn a_quiet_conversation_has_a_head_row_instead_of_a_busy_row_and_opens_again() {
    let store = Store::from(Memory::new());
    let world = World::new(store.clone());
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.self_id(&user("alice"));
    let partition = shard_partition(&world, &id);
    gateway.send(1, id, message("alice", "n1", "one", "", 0)).await;
    gateway.ack("n1").await;
    assert!(store.read(Table::Busy, &partition, id.as_bytes()).await.unwrap().is_some());
    // Quiet for a minute, out of memory after five.
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert!(store.read(Table::Busy, &partition, id.as_bytes()).await.unwrap().is_none());
    assert_eq!(store.read(Table::Heads, id.as_bytes(), b"").await.unwrap().unwrap().timestamp, 1);
    tokio::time::sleep(Duration::from_secs(600)).await;
    gateway.send(1, id, message("alice", "n2", "two", "", 1)).await;
    assert_eq!(gateway.ack("n2").await.seq, 2);
    assert_eq!(store.read(Table::Busy, &partition, id.as_bytes()).await.unwrap().unwrap().timestamp, 2);
    gateway.send(1, id, message("alice", "n1", "one", "", 0)).await;
    assert_eq!(gateway.ack("n1").await.seq, 1);
}

/// Else an owner that dies after its first commit leaves a conversation that no successor opens, and an old head that nobody doubts.
#[tokio::test(start_paused = true)]
async fn the_first_entry_of_a_burst_is_acknowledged_after_its_busy_row_is_confirmed() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = SimStore::new(1, SimFaults::none(), world.environment.tasks.clone());
    world.store = Store::from(store.handle("r1"));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.self_id(&user("alice"));
    store.cut_state("r1", true);
    gateway.send(1, id, message("alice", "n1", "one", "", 0)).await;
    let early = tokio::time::timeout(Duration::from_secs(20), gateway.ack("n1")).await;
    assert!(early.is_err(), "acknowledged without a busy row: {early:?}");
    assert_eq!(store.committed_view(id).len(), 1, "the log has it");
    store.cut_state("r1", false);
    assert_eq!(gateway.ack("n1").await.seq, 1);
}

#[tokio::test(start_paused = true)]
async fn a_repeat_below_the_memory_is_found_in_the_log_or_sent_back_to_sync_first() {
    let world = World::new(Store::from(Memory::new()));
    let mut config = world.config("r1");
    config.dedupe_entries = 8;
    let router = world.router(config).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.self_id(&user("alice"));
    let names: Vec<&'static str> = (0..64).map(|n| &*Box::leak(format!("n{n}").into_boxed_str())).collect();
    for (index, name) in names.iter().enumerate() {
        gateway.send(1, id, message("alice", name, name, "", index as u64)).await;
        assert_eq!(gateway.ack(name).await.seq, index as u64 + 1);
    }
    gateway.send(1, id, message("alice", "n3", "n3", "", 0)).await;
    assert_eq!(gateway.ack("n3").await.seq, 4);
    gateway.send(1, id, message("alice", "n3", "another body", "", 0)).await;
    assert_eq!(gateway.ack("n3").await.status.unwrap().code, StatusCode::PreconditionFailed.number());
    gateway.send(1, id, message("alice", "new", "new", "", 0)).await;
    assert_eq!(gateway.ack("new").await.seq, 65);
}

#[tokio::test(start_paused = true)]
async fn a_session_that_comes_with_a_capability_is_told_to_sync_and_one_without_is_asked_for_it() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    let opened = gateway.open(&world, 1, "alice", "a1").await;
    let announce = v1::SessionAnnounce { session_id: 1, capability: opened.capability.clone() };
    gateway.push(vec![v1::gateway_message::Message::Announce(announce)]).await;
    gateway
        .expect("resync", |message| match message {
            Down::Resync(resync) if resync.session_ids == [1] => Some(()),
            _ => None,
        })
        .await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(77, id, message("bob", "m1", "hi", "", 0)).await;
    let wanted = gateway
        .expect("capability wanted", |message| match message {
            Down::CapabilityWanted(wanted) => Some(wanted.clone()),
            _ => None,
        })
        .await;
    assert_eq!((wanted.session_id, wanted.client_message_id.as_ref()), (77, b"m1".as_slice()));
    // A capability is good for its own session only.
    let stolen = v1::SessionPresent { session_id: 77, capability: opened.capability };
    gateway.push(vec![v1::gateway_message::Message::Present(stolen)]).await;
    gateway.send(77, id, message("bob", "m2", "hi", "", 0)).await;
    gateway
        .expect("capability wanted", |message| match message {
            Down::CapabilityWanted(wanted) if wanted.client_message_id == "m2" => Some(()),
            _ => None,
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn every_answer_to_a_send_names_the_attempt() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    let foreign = CLUSTER.direct_id(&user("bob"), &user("carol"));
    // Stored, stored before, refused by the owner, of a session that the router does not know.
    gateway.attempt(1, id, message("bob", "m1", "hi", "", 0), 7).await;
    gateway.attempt(1, id, message("bob", "m1", "hi", "", 0), 8).await;
    gateway.attempt(1, foreign, message("carol", "m2", "hi", "", 0), 9).await;
    gateway.attempt(77, id, message("bob", "m3", "hi", "", 0), 10).await;
    let mut attempts = Vec::new();
    for _ in 0..4 {
        let answered = gateway.expect("an answer", |message| match message {
            Down::SendResult(result) => Some((result.attempt, result.ack.as_ref().and_then(|ack| ack.status.clone()))),
            Down::CapabilityWanted(wanted) => Some((wanted.attempt, None)),
            _ => None,
        });
        let (attempt, status) = answered.await;
        attempts.push((attempt, status.map(|status| status.code)));
    }
    attempts.sort_unstable();
    let refused = Some(StatusCode::NotFound.number());
    assert_eq!(attempts, [(7, None), (8, None), (9, refused), (10, None)]);
}

#[tokio::test(start_paused = true)]
async fn the_same_device_takes_the_place_of_its_older_session() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.open(&world, 2, "alice", "a2").await;
    gateway.open(&world, 3, "alice", "a1").await;
    let kicked = gateway
        .expect("kick", |message| match message {
            Down::Kick(kick) => Some((kick.session_id, kick.status.as_ref().map_or(0, |status| status.code))),
            _ => None,
        })
        .await;
    assert_eq!(kicked, (1, StatusCode::KickedByAnotherDevice.number()));
}

#[tokio::test(start_paused = true)]
async fn tokens_that_are_foreign_expired_or_garbage_are_refused() {
    let world = World::new(Store::from(Memory::new()));
    let foreign = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    let mut old = world.token("alice", "a1", "terminal");
    for (session, token) in
        [(1, foreign.token("alice", "a1", "terminal")), (2, "garbage".to_owned()), (3, std::mem::take(&mut old))]
    {
        if session == 3 {
            tokio::time::sleep(Duration::from_secs(3601)).await;
        }
        let open = v1::SessionOpen { session_id: session, token, ..v1::SessionOpen::default() };
        gateway.push(vec![v1::gateway_message::Message::Open(open)]).await;
        let code = gateway
            .expect("refusal", |message| match message {
                Down::Refused(refused) if refused.session_id == session => {
                    Some(refused.status.as_ref().map_or(0, |status| status.code))
                }
                _ => None,
            })
            .await;
        let expected = if session == 3 { StatusCode::TokenExpired } else { StatusCode::Unauthenticated };
        assert_eq!(code, expected.number(), "session {session}");
    }
}

#[tokio::test(start_paused = true)]
async fn unread_counts_survive_a_take_over() {
    let world = World::new(Store::from(Memory::new()));
    let first = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    for name in ["m1", "m2", "m3"] {
        gateway.send(1, id, message("bob", name, name, "", 0)).await;
        gateway.ack(name).await;
    }
    gateway.open(&world, 2, "bob", "b1").await;
    let read = v1::MarkReadRequest { target: to(id), seq: 2 };
    let reply: v1::MarkReadReply = gateway.call(2, Method::ConversationMarkRead, &read).await.unwrap();
    assert_eq!((reply.read_seq, reply.unread), (2, 1));
    let back = v1::MarkReadRequest { target: to(id), seq: 1 };
    let reply: v1::MarkReadReply = gateway.call(2, Method::ConversationMarkRead, &back).await.unwrap();
    assert_eq!((reply.read_seq, reply.unread), (2, 1), "cursors only move forward");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(first.stop(Duration::from_secs(30)).await);
    let second = world.router(world.config("r2")).await;
    let mut gateway = world.gateway("g2", &second).await;
    for (session, name, unread) in [(1, "alice", 0), (2, "bob", 1)] {
        gateway.open(&world, session, name, "d").await;
        let reply: v1::SyncReply =
            gateway.call(session, Method::ConversationSync, &v1::SyncRequest::default()).await.unwrap();
        let row = reply.conversations.iter().find(|row| row.conversation_id == id.to_bytes()).expect("a row");
        assert_eq!((row.head, row.unread), (3, unread), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn locate_offers_the_live_gateways() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let reply: v1::LocateReply = gateway.call(1, Method::PlacementLocate, &v1::LocateRequest::default()).await.unwrap();
    assert!(reply.endpoints.iter().all(|endpoint| InstanceId::parse(&endpoint.gateway_id).is_ok()));
    assert!(reply.reconnect_base_ms > 0);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_last_owners_burst_that_arrives_late_does_not_hide_the_next_burst() {
    let store = Store::from(Memory::new());
    let world = World::new(store.clone());
    let first = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.self_id(&user("alice"));
    let partition = shard_partition(&world, &id);
    gateway.send(1, id, message("alice", "n1", "one", "", 0)).await;
    gateway.ack("n1").await;
    assert!(first.stop(Duration::from_secs(30)).await);
    let second = world.router(world.config("r2")).await;
    let mut gateway = world.gateway("g2", &second).await;
    gateway.open(&world, 1, "alice", "a1").await;
    // The first router was ending the burst when it gave the shard up.
    let deletion = StateWrite {
        table: Table::Busy,
        partition: partition.to_vec().into(),
        key: id.to_bytes(),
        value: None,
        timestamp: 1,
    };
    store.write(vec![deletion]).await.unwrap();
    gateway.send(1, id, message("alice", "n2", "two", "n1", 1)).await;
    assert_eq!(gateway.ack("n2").await.seq, 2);
    assert!(store.read(Table::Busy, &partition, id.as_bytes()).await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_during_its_handshake_leaves_no_session() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.open(&world, 2, "bob", "b1").await;
    let token = world.token("bob", "b2", "terminal");
    let open = v1::SessionOpen { session_id: 3, token, ..v1::SessionOpen::default() };
    let close = v1::SessionClose { session_id: 3 };
    gateway.push(vec![v1::gateway_message::Message::Open(open), v1::gateway_message::Message::Close(close)]).await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m1", "hi", "", 0)).await;
    gateway.ack("m1").await;
    let receivers = gateway
        .expect("push", |message| match message {
            Down::Deliver(deliver) if deliver.session_ids.contains(&2) => Some(deliver.session_ids.clone()),
            _ => None,
        })
        .await;
    assert_eq!(receivers, [2]);
}

/// A store that refuses everything from when it is told to.
pub fn faulty(world: &mut World) -> Faulty {
    let store = Faulty::new(world.store.clone(), 1, FaultPlan::none(), world.environment.tasks.clone());
    world.store = Store::from(store.clone());
    store
}

#[tokio::test(start_paused = true)]
async fn a_conversation_that_was_opened_to_be_read_leaves_memory_again() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let create = v1::GroupCreateRequest { key: "k".into(), name: "g".to_owned(), members: vec!["bob".to_owned()] };
    let group: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &create).await.unwrap();
    let members = v1::GroupMembersRequest {
        conversation_id: group.conversation_id.clone(),
        ..v1::GroupMembersRequest::default()
    };
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_secs(600)).await;
        let reply: v1::GroupMembersReply = gateway.call(1, Method::GroupMembers, &members).await.unwrap();
        assert_eq!(reply.total, 2);
    }
    tokio::time::sleep(Duration::from_secs(600)).await;
    // What is in memory would be answered from there.
    store.set_plan(FaultPlan { refused_permille: 1000, ..FaultPlan::none() });
    let call = gateway.call::<v1::GroupMembersReply>(1, Method::GroupMembers, &members);
    assert!(tokio::time::timeout(Duration::from_secs(30), call).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_busy_conversation_that_cannot_be_opened_is_not_shown_with_its_old_head() {
    let store = Store::from(Memory::new());
    let world = World::new(store.clone());
    let first = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m1", "m1", "", 0)).await;
    gateway.ack("m1").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(first.stop(Duration::from_secs(30)).await);
    // Somebody wrote under an epoch that no claim has given out.
    let row = Row {
        seq: 2,
        counted: 2,
        sender: Some(user("bob")),
        client_message_id: "x".into(),
        sent_at: im_proto::Timestamp::default(),
        kind: v1::EntryKind::Message,
        flags: 1,
        body: bytes::Bytes::new(),
        meta: bytes::Bytes::new(),
    };
    let batch = Batch { conversation: id, epoch: Epoch(u64::MAX >> 8), committed: 1, rows: vec![row] };
    store.submit(vec![AppendRequest { token: 1, batch: Arc::new(batch) }], Arc::new(|_| {}));
    let second = world.router(world.config("r2")).await;
    let mut gateway = world.gateway("g2", &second).await;
    gateway.open(&world, 1, "alice", "a1").await;
    for _ in 0..5 {
        let reply = gateway.call::<v1::SyncReply>(1, Method::ConversationSync, &v1::SyncRequest::default()).await;
        assert_eq!(reply.map_err(|status| status.code), Err(StatusCode::Unavailable.number()));
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn conversations_that_somebody_waits_for_are_opened_first() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let first = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let names: Vec<String> = (0..40).map(|n| format!("bob{n}")).collect();
    for name in &names {
        gateway.send(1, CLUSTER.direct_id(&user("alice"), &user(name)), message(name, "m1", "m1", "", 0)).await;
        gateway.ack("m1").await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(first.stop(Duration::from_secs(30)).await);
    let delay = Duration::from_millis(50)..=Duration::from_millis(50);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    let second = world.router(RouterConfig { opens_max: 1, ..world.config("r2") }).await;
    let mut gateway = world.gateway("g2", &second).await;
    let begun = tokio::time::Instant::now();
    gateway.open(&world, 1, "alice", "a1").await;
    for name in &names[36..] {
        gateway.send(1, CLUSTER.direct_id(&user("alice"), &user(name)), message(name, "m2", "m2", "m1", 1)).await;
        gateway.ack("m2").await;
    }
    // Forty conversations and their forty-one users' own logs take half a second each, two at a time.
    assert!(begun.elapsed() < Duration::from_secs(9), "{:?}", begun.elapsed());
}

/// After a failover whoever waits with a message goes before whoever wants to look.
#[tokio::test(start_paused = true)]
async fn conversations_with_messages_that_wait_are_opened_before_those_that_are_read() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let first = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let names: Vec<String> = (0..12).map(|n| format!("bob{n}")).collect();
    let with = |name: &String| CLUSTER.direct_id(&user("alice"), &user(name));
    for name in &names {
        gateway.send(1, with(name), message(name, "m1", "m1", "", 0)).await;
        gateway.ack("m1").await;
    }
    // Until all is quiet: nobody opens them but who asks for them.
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert!(first.stop(Duration::from_secs(30)).await);
    let delay = Duration::from_millis(50)..=Duration::from_millis(50);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    let second = world.router(RouterConfig { opens_max: 1, workers: 1, ..world.config("r2") }).await;
    let mut gateway = world.gateway("g2", &second).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let read = |(request_id, name): (u32, &String)| {
        let request = v1::HistoryRequest { target: to(with(name)), from: 1, ..v1::HistoryRequest::default() };
        let (method, request) = (Method::MessageHistory.number(), request.encode_to_vec().into());
        let call = Some(v1::Call { request_id, method, request });
        v1::gateway_message::Message::Call(v1::SessionCall { session_id: 1, call })
    };
    gateway.push((1..).zip(&names[..11]).map(read).collect()).await;
    gateway.send(1, with(&names[11]), message(&names[11], "m2", "m2", "m1", 1)).await;
    gateway.ack("m2").await;
    let answered = gateway.inbox.iter().filter(|message| matches!(message, Down::CallReply(_))).count();
    assert!(answered <= 1, "{answered} histories came first");
    for request_id in 1..=11 {
        gateway
            .expect("history", |message| match message {
                Down::CallReply(reply) if reply.request_id == request_id && reply.status.is_none() => Some(()),
                _ => None,
            })
            .await;
    }
}

/// Else each owner would write the rows of all members, and tell all of them again, as long as the first burst lasts.
#[tokio::test(start_paused = true)]
async fn a_young_group_of_many_is_marked_as_applied_once_all_members_know_of_it() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let members = |from: u32, to: u32| (from..to).map(|n| format!("bob{n}")).collect::<Vec<_>>();
    let create = v1::GroupCreateRequest { key: "k".into(), name: "g".to_owned(), members: members(0, 40) };
    let group: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &create).await.unwrap();
    let id = ConversationId::from_slice(&group.conversation_id).unwrap();
    let memory = store.store().clone();
    let mark = async |key: &[u8]| {
        memory.read(Table::Applied, id.as_bytes(), key).await.unwrap().map_or(0, |row| row.timestamp)
    };
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((mark(b"applied").await, mark(b"outbox").await), (1, 1));
    // A message costs little to apply again.
    gateway.send(1, id, v1::Send { target: None, ..message("", "m1", "hello", "", 1) }).await;
    gateway.ack("m1").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(mark(b"applied").await, 1);
    // Not before its rows are stored.
    store.set_plan(FaultPlan { refused_table: Some(Table::Members), ..FaultPlan::none() });
    let invite = v1::GroupInviteRequest {
        conversation_id: group.conversation_id,
        members: members(40, 80),
        ..v1::GroupInviteRequest::default()
    };
    let _: v1::GroupInviteReply = gateway.call(1, Method::GroupInvite, &invite).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(mark(b"applied").await, 1);
    store.set_plan(FaultPlan::none());
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((mark(b"applied").await, mark(b"outbox").await), (3, 3));
    // The members' own logs are quiet after a minute, while the burst of the group goes on.
    for (name, seq) in ["k1", "k2", "k3", "k4", "k5", "k6", "k7", "k8"].into_iter().zip(4..) {
        tokio::time::sleep(Duration::from_secs(10)).await;
        gateway.send(1, id, v1::Send { target: None, ..message("", name, "hello", "", seq - 1) }).await;
        assert_eq!(gateway.ack(name).await.seq, seq);
    }
    // The next owner has little to do: a dozen calls for each of the eighty logs would be a thousand.
    assert!(router.stop(Duration::from_secs(30)).await);
    let before = store.calls();
    let second = world.router(world.config("r2")).await;
    let mut gateway = world.gateway("g2", &second).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.send(1, id, v1::Send { target: None, ..message("", "m2", "hello", "m1", 11) }).await;
    assert_eq!(gateway.ack("m2").await.seq, 12);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let calls = store.calls() - before;
    assert!(calls < 100, "{calls} calls");
}

/// A gateway may dial before the router has seen that it registered: a view made before must not leave it with a link that takes
/// what it says and answers nothing.
#[tokio::test(start_paused = true)]
async fn a_link_whose_gateway_no_view_shows_breaks_instead_of_falling_silent() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let (mut early, far) = pair(64);
    router.accept_gateway(far);
    let hello = v1::LinkHello {
        instance_id: "early".to_owned(),
        boot_id: 5,
        cluster_id: "im".to_owned(),
        shards: SHARDS,
        ..v1::LinkHello::default()
    };
    early.sender.send(LinkItem::Hello(hello)).await.unwrap();
    assert!(matches!(early.receiver.recv().await, Some(LinkItem::Hello(_))));
    // Another one registers: a new view, still without the early one.
    let mut other = world.gateway("other", &router).await;
    let broken =
        tokio::time::timeout(Duration::from_secs(60), async { while early.receiver.recv().await.is_some() {} });
    assert!(broken.await.is_ok(), "the link is still there");
    // Registered, it dials again and is served.
    let mut early = world.gateway("early", &router).await;
    early.open(&world, 1, "alice", "a1").await;
    other.open(&world, 1, "bob", "b1").await;
}

/// A process keeps its address and changes its instance id: who still dials the former one must not end the link that serves.
#[tokio::test(start_paused = true)]
async fn a_link_meant_for_a_former_instance_leaves_the_one_that_serves() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let (mut stale, far) = pair(64);
    router.accept_gateway(far);
    let hello = v1::LinkHello {
        instance_id: "g1".to_owned(),
        boot_id: 5,
        cluster_id: "im".to_owned(),
        shards: SHARDS,
        to_instance_id: "r0".to_owned(),
        ..v1::LinkHello::default()
    };
    stale.sender.send(LinkItem::Hello(hello)).await.unwrap();
    let Some(LinkItem::Hello(answer)) = stale.receiver.recv().await else { panic!("no hello") };
    assert_eq!(answer.instance_id, "r1");
    assert!(stale.receiver.recv().await.is_none(), "it is not served");
    gateway.open(&world, 2, "bob", "b1").await;
}

/// Its head row is older than its log. While its epoch is raised only a receipt waits for it, which is dropped when much waits.
#[tokio::test(start_paused = true)]
async fn a_conversation_whose_epoch_was_raised_is_not_shown_with_its_old_head() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let patience = Duration::from_secs(2);
    let config = RouterConfig { append_patience: patience, opens_max: 1, workers: 1, ..world.config("r1") };
    let handle = world.registry.handle("r1", world.environment.clone());
    let router = world.router_on(config, handle.clone().into()).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m1", "m1", "", 0)).await;
    gateway.ack("m1").await;
    // It is quiet and has a head row, then a burst begins, and the store takes an entry without a word.
    tokio::time::sleep(Duration::from_secs(100)).await;
    gateway.send(1, id, message("bob", "m2", "m2", "", 1)).await;
    gateway.ack("m2").await;
    store.set_plan(FaultPlan { unknown_permille: 1000, ..FaultPlan::none() });
    gateway.send(1, id, message("bob", "m3", "m3", "", 2)).await;
    // There is no greater epoch for a while.
    handle.set_reach(Reach::Refused);
    tokio::time::sleep(patience + patience / 2).await;
    let received = |conversation_id| {
        let received = Some(v1::Received { conversation_id, seq: 1 });
        Up::Received(v1::SessionReceived { session_id: 1, received })
    };
    // The first of the others is never answered: the rest waits for its turn.
    store.set_plan(FaultPlan { dropped_permille: 1000, ..FaultPlan::none() });
    let others = (0..300_u128).map(|n| received(ConversationId::from_bytes(n.to_be_bytes()).to_bytes()));
    gateway.push([received(id.to_bytes())].into_iter().chain(others).collect()).await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    store.set_plan(FaultPlan::none());
    handle.set_reach(Reach::Up);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let reply: v1::SyncReply = gateway.call(1, Method::ConversationSync, &v1::SyncRequest::default()).await.unwrap();
    let heads: Vec<u64> =
        reply.conversations.iter().filter(|row| row.conversation_id == id.to_bytes()).map(|row| row.head).collect();
    assert_eq!(heads, [3]);
}
