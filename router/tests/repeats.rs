//! Repeats and predecessors that memory does not reach, senders who have left, and what strangers learn: nothing.

use std::time::Duration;

use im_proto::{ConversationId, StatusCode, method::Method, v1};
use im_router::RouterConfig;
use im_storage::{FaultPlan, Memory, Store};

use crate::{
    lifecycle::faulty,
    support::{CLUSTER, TestGateway, World, message, to, user},
};

fn names(prefix: &str, count: usize) -> Vec<&'static str> {
    (0..count).map(|n| &*Box::leak(format!("{prefix}{n}").into_boxed_str())).collect()
}

async fn group(gateway: &mut TestGateway, members: &[&str]) -> ConversationId {
    let create = v1::GroupCreateRequest {
        key: "k".into(),
        name: "team".to_owned(),
        members: members.iter().map(|&name| name.to_owned()).collect(),
    };
    let created: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &create).await.unwrap();
    ConversationId::from_slice(&created.conversation_id).unwrap()
}

async fn refusal(gateway: &mut TestGateway, client_message_id: &'static str) -> u32 {
    gateway.ack(client_message_id).await.status.expect("a refusal").code
}

#[tokio::test(start_paused = true)]
async fn who_has_left_gets_the_ack_of_what_was_stored_before_and_nothing_else() {
    let world = World::new(Store::from(Memory::new()));
    // One router remembers the ids of all entries, the other of eight.
    for remembered in [1024, 8] {
        let config = RouterConfig { dedupe_entries: remembered, ..world.config(&format!("r{remembered}")) };
        let router = world.router(config).await;
        let mut gateway = world.gateway(&format!("g{remembered}"), &router).await;
        gateway.open(&world, 1, "alice", "a1").await;
        gateway.open(&world, 2, "bob", "b1").await;
        let id = group(&mut gateway, &["bob"]).await;
        gateway.send(2, id, message("x", "b1", "of bob", "", 0)).await;
        let seq = gateway.ack("b1").await.seq;
        for name in names(&format!("a{remembered}-"), 20) {
            gateway.send(1, id, message("x", name, name, "", 0)).await;
            assert_eq!(gateway.ack(name).await.status, None);
        }
        let leave = v1::GroupLeaveRequest { conversation_id: id.to_bytes(), ..Default::default() };
        gateway.call::<v1::GroupLeaveReply>(2, Method::GroupLeave, &leave).await.unwrap();
        gateway.send(2, id, message("x", "b1", "of bob", "", 0)).await;
        let again = gateway.ack("b1").await;
        assert_eq!((again.seq, again.status), (seq, None));
        gateway.send(2, id, message("x", "b2", "too late", "", 0)).await;
        assert_eq!(refusal(&mut gateway, "b2").await, StatusCode::NotFound.number());
        let invite = v1::GroupInviteRequest {
            conversation_id: id.to_bytes(),
            members: vec!["bob".to_owned()],
            ..Default::default()
        };
        gateway.call::<v1::GroupInviteReply>(1, Method::GroupInvite, &invite).await.unwrap();
        assert!(router.stop(Duration::from_secs(30)).await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_predecessor_below_the_memory_is_found_in_the_log() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(RouterConfig { dedupe_entries: 8, ..world.config("r1") }).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.self_id(&user("alice"));
    for (index, name) in names("n", 40).into_iter().enumerate() {
        gateway.send(1, id, message("alice", name, name, "", index as u64)).await;
        gateway.ack(name).await;
    }
    gateway.send(1, id, message("alice", "m1", "m1", "n2", 40)).await;
    assert_eq!(gateway.ack("m1").await.seq, 41);
    gateway.send(1, id, message("alice", "m2", "m2", "never sent", 40)).await;
    assert_eq!(refusal(&mut gateway, "m2").await, StatusCode::OutOfOrder.number());
    // Both at once: the message itself has to be looked for too.
    gateway.send(1, id, message("alice", "m3", "m3", "n5", 7)).await;
    assert_eq!(gateway.ack("m3").await.seq, 42);
}

#[tokio::test(start_paused = true)]
async fn looking_through_the_log_is_at_the_senders_cost() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(RouterConfig { dedupe_entries: 8, ..world.config("r1") }).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.open(&world, 2, "bob", "b1").await;
    let id = group(&mut gateway, &["bob"]).await;
    for (index, name) in names("n", 2000).into_iter().enumerate() {
        gateway.send(1, id, message("alice", name, name, "", index as u64 + 1)).await;
        gateway.ack(name).await;
    }
    // Each makes the owner forget what it read for the other.
    let mut refused = None;
    for (count, name) in names("x", 300).into_iter().enumerate() {
        let unknown = &*Box::leak(format!("never sent {name}").into_boxed_str());
        gateway.send(1 + (count % 2) as u64, id, message("alice", name, name, unknown, 2001)).await;
        let status = gateway.ack(name).await.status.expect("a refusal");
        if status.code == StatusCode::RateLimited.number() {
            refused = Some(status.retry_after_ms);
            break;
        }
        assert_eq!(status.code, StatusCode::OutOfOrder.number());
    }
    let wait = Duration::from_millis(u64::from(refused.expect("so many scans are too many")));
    tokio::time::sleep(wait).await;
    gateway.send(1, id, message("alice", "later", "later", "n0", 2001)).await;
    assert_eq!(gateway.ack("later").await.seq, 2002);
}

/// A client that comes back repeats all that it has not seen acknowledged: the log is read once for all of it, and not at all for
/// what comes behind a refused one.
#[tokio::test(start_paused = true)]
async fn a_burst_of_repeats_is_looked_up_once() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let router = world.router(RouterConfig { dedupe_entries: 8, ..world.config("r1") }).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.self_id(&user("alice"));
    let stored = names("n", 1000);
    for (index, name) in stored.iter().enumerate() {
        gateway.send(1, id, message("alice", name, name, "", index as u64)).await;
        gateway.ack(name).await;
    }
    let delay = Duration::from_millis(50)..=Duration::from_millis(50);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    let begun = tokio::time::Instant::now();
    let mut after = "";
    for name in stored[900..].iter().copied().chain(names("m", 20)) {
        gateway.send(1, id, message("alice", name, name, after, 200)).await;
        after = name;
    }
    for (index, name) in stored[900..].iter().enumerate() {
        assert_eq!(gateway.ack(name).await.seq, index as u64 + 901);
    }
    for (index, name) in names("m", 20).into_iter().enumerate() {
        assert_eq!(gateway.ack(name).await.seq, index as u64 + 1001);
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    // A refused one and all behind it: none of them costs a reading.
    gateway.send(1, id, message("alice", "p1", "p1", "never sent", 1020)).await;
    assert_eq!(refusal(&mut gateway, "p1").await, StatusCode::OutOfOrder.number());
    for name in names("o", 20) {
        gateway.send(1, id, message("alice", name, name, "", 1020)).await;
        gateway.ack(name).await;
    }
    store.set_plan(FaultPlan { dropped_permille: 1000, ..FaultPlan::none() });
    for (name, after) in [("p2", "p1"), ("p3", "p2"), ("p4", "p3")] {
        gateway.send(1, id, message("alice", name, name, after, 1040)).await;
        assert_eq!(refusal(&mut gateway, name).await, StatusCode::OutOfOrder.number());
    }
}

/// A conversation of others and one that does not exist are the same to a stranger, whatever is asked.
#[tokio::test(start_paused = true)]
async fn a_stranger_learns_nothing_by_any_method() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.open(&world, 2, "mallory", "m1").await;
    let group = group(&mut gateway, &["bob"]).await;
    let direct = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, direct, message("bob", "d1", "hello", "", 0)).await;
    gateway.ack("d1").await;
    let own = CLUSTER.self_id(&user("alice"));
    for (id, sent) in [(group, "s1"), (direct, "s2"), (own, "s3"), (ConversationId::from_bytes([3; 16]), "s4")] {
        let conversation_id = id.to_bytes();
        gateway.send(2, id, message("x", sent, "let me in", "", 0)).await;
        let mut codes = vec![refusal(&mut gateway, sent).await];
        let send = v1::SendRequest {
            target: to(id),
            client_message_id: "c".into(),
            body: im_proto::body::text("x"),
            known_seq: 0,
        };
        codes.push(gateway.call::<v1::SendReply>(2, Method::MessageSend, &send).await.unwrap_err().code);
        let history = v1::HistoryRequest { target: to(id), from: -5, ..v1::HistoryRequest::default() };
        codes.push(gateway.call::<v1::HistoryReply>(2, Method::MessageHistory, &history).await.unwrap_err().code);
        let read = v1::MarkReadRequest { target: to(id), seq: 1 };
        codes.push(gateway.call::<v1::MarkReadReply>(2, Method::ConversationMarkRead, &read).await.unwrap_err().code);
        let conversation = || conversation_id.clone();
        let invite = v1::GroupInviteRequest {
            conversation_id: conversation(),
            members: vec![String::new()],
            ..Default::default()
        };
        codes.push(gateway.call::<v1::GroupInviteReply>(2, Method::GroupInvite, &invite).await.unwrap_err().code);
        let leave = v1::GroupLeaveRequest { conversation_id: conversation(), ..Default::default() };
        codes.push(gateway.call::<v1::GroupLeaveReply>(2, Method::GroupLeave, &leave).await.unwrap_err().code);
        let members = v1::GroupMembersRequest { conversation_id: conversation(), ..Default::default() };
        codes.push(gateway.call::<v1::GroupMembersReply>(2, Method::GroupMembers, &members).await.unwrap_err().code);
        assert_eq!(codes, [StatusCode::NotFound.number(); 7], "{id:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_repeated_invitation_or_leave_has_the_effect_of_one_also_at_the_next_owner() {
    let world = World::new(Store::from(Memory::new()));
    let first = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &first).await;
    for (session, name) in [(1, "alice"), (2, "carol")] {
        gateway.open(&world, session, name, "d").await;
    }
    let create =
        v1::GroupCreateRequest { key: "k".into(), name: "walkers".to_owned(), members: vec!["bob".to_owned()] };
    let created: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &create).await.unwrap();
    let id = created.conversation_id;
    let invite = v1::GroupInviteRequest {
        conversation_id: id.clone(),
        members: vec!["carol".to_owned()],
        client_message_id: "i1".into(),
    };
    let leave = v1::GroupLeaveRequest { conversation_id: id.clone(), client_message_id: "l1".into() };
    let members = v1::GroupMembersRequest { conversation_id: id, ..v1::GroupMembersRequest::default() };
    for _ in 0..2 {
        let reply: v1::GroupInviteReply = gateway.call(1, Method::GroupInvite, &invite).await.unwrap();
        assert_eq!(reply.seq, 2);
    }
    for _ in 0..2 {
        let reply: v1::GroupLeaveReply = gateway.call(2, Method::GroupLeave, &leave).await.unwrap();
        assert_eq!(reply.seq, 3);
    }
    assert!(first.stop(Duration::from_secs(30)).await);
    let second = world.router(world.config("r2")).await;
    let mut gateway = world.gateway("g2", &second).await;
    for (session, name) in [(1, "alice"), (2, "carol")] {
        gateway.open(&world, session, name, "d").await;
    }
    // On its way all the time, or said again by a client that saw no answer.
    let reply: v1::GroupInviteReply = gateway.call(1, Method::GroupInvite, &invite).await.unwrap();
    assert_eq!(reply.seq, 2);
    let reply: v1::GroupLeaveReply = gateway.call(2, Method::GroupLeave, &leave).await.unwrap();
    assert_eq!(reply.seq, 3);
    let reply: v1::GroupMembersReply = gateway.call(1, Method::GroupMembers, &members).await.unwrap();
    assert_eq!(reply.total, 2, "who has left stays out");
    let again = v1::GroupInviteRequest { client_message_id: "i2".into(), ..invite };
    let reply: v1::GroupInviteReply = gateway.call(1, Method::GroupInvite, &again).await.unwrap();
    assert_eq!(reply.seq, 4);
}

/// An id names one send or call of its user in a conversation: whatever else comes under it is refused, at the next owner too.
#[tokio::test(start_paused = true)]
async fn a_reused_id_for_another_call_is_refused_also_at_the_next_owner() {
    let world = World::new(Store::from(Memory::new()));
    let first = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "d").await;
    gateway.open(&world, 2, "bob", "d").await;
    let id = group(&mut gateway, &["bob"]).await;
    let invite = |members: &[&str], client_message_id: &'static str| v1::GroupInviteRequest {
        conversation_id: id.to_bytes(),
        members: members.iter().map(|&name| name.to_owned()).collect(),
        client_message_id: client_message_id.into(),
    };
    let leave = |client_message_id: &'static str| v1::GroupLeaveRequest {
        conversation_id: id.to_bytes(),
        client_message_id: client_message_id.into(),
    };
    // Bob is in already, which is nothing to the repetition.
    let made = invite(&["carol", "bob", "dave"], "i1");
    let reply: v1::GroupInviteReply = gateway.call(1, Method::GroupInvite, &made).await.unwrap();
    assert_eq!(reply.seq, 2);
    gateway.send(1, id, message("x", "m1", "hello", "", 0)).await;
    assert_eq!(gateway.ack("m1").await.seq, 3);
    // Ids are their users' own.
    let of_bob: v1::GroupLeaveReply = gateway.call(2, Method::GroupLeave, &leave("i1")).await.unwrap();
    assert_eq!(of_bob.seq, 4);
    let refused = StatusCode::PreconditionFailed.number();
    for (router, next) in [("r1", "r2"), ("r2", "")] {
        for other in [invite(&["carol"], "i1"), invite(&["carol", "bob", "dave", "eve"], "i1"), invite(&["eve"], "m1")]
        {
            let answer = gateway.call::<v1::GroupInviteReply>(1, Method::GroupInvite, &other).await;
            assert_eq!(answer.map_err(|status| status.code), Err(refused), "{other:?} at {router}");
        }
        for reused in ["i1", "m1"] {
            let answer = gateway.call::<v1::GroupLeaveReply>(1, Method::GroupLeave, &leave(reused)).await;
            assert_eq!(answer.map_err(|status| status.code), Err(refused), "{reused} at {router}");
        }
        let answer = gateway.call::<v1::GroupInviteReply>(2, Method::GroupInvite, &invite(&["eve"], "i1")).await;
        assert_eq!(answer.map_err(|status| status.code), Err(refused), "at {router}");
        gateway.send(1, id, message("x", "i1", "hello", "", 0)).await;
        assert_eq!(refusal(&mut gateway, "i1").await, refused);
        let again: v1::GroupInviteReply =
            gateway.call(1, Method::GroupInvite, &invite(&["dave", "carol", "bob", "bob"], "i1")).await.unwrap();
        assert_eq!(again.seq, 2, "the same users are the same call");
        if next.is_empty() {
            break;
        }
        assert!(first.stop(Duration::from_secs(30)).await);
        let router = Box::leak(Box::new(world.router(world.config(next)).await));
        gateway = world.gateway("g2", router).await;
        gateway.open(&world, 1, "alice", "d").await;
        gateway.open(&world, 2, "bob", "d").await;
    }
    let members = v1::GroupMembersRequest { conversation_id: id.to_bytes(), ..v1::GroupMembersRequest::default() };
    let reply: v1::GroupMembersReply = gateway.call(1, Method::GroupMembers, &members).await.unwrap();
    assert_eq!(reply.total, 3, "alice, carol, dave");
}

#[tokio::test(start_paused = true)]
async fn the_repetition_of_an_invitation_that_changed_nothing_brings_nobody_back() {
    let world = World::new(Store::from(Memory::new()));
    let first = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "d").await;
    gateway.open(&world, 2, "bob", "d").await;
    let id = group(&mut gateway, &["bob", "carol"]).await;
    let invite = v1::GroupInviteRequest {
        conversation_id: id.to_bytes(),
        members: vec!["bob".to_owned()],
        client_message_id: "i1".into(),
    };
    let reply: v1::GroupInviteReply = gateway.call(1, Method::GroupInvite, &invite).await.unwrap();
    assert_eq!(reply.seq, 2);
    let leave = v1::GroupLeaveRequest { conversation_id: id.to_bytes(), client_message_id: "l1".into() };
    gateway.call::<v1::GroupLeaveReply>(2, Method::GroupLeave, &leave).await.unwrap();
    let members = v1::GroupMembersRequest { conversation_id: id.to_bytes(), ..v1::GroupMembersRequest::default() };
    let reply: v1::GroupInviteReply = gateway.call(1, Method::GroupInvite, &invite).await.unwrap();
    assert_eq!(reply.seq, 2);
    assert!(first.stop(Duration::from_secs(30)).await);
    let second = world.router(world.config("r2")).await;
    let mut gateway = world.gateway("g2", &second).await;
    gateway.open(&world, 1, "alice", "d").await;
    let reply: v1::GroupInviteReply = gateway.call(1, Method::GroupInvite, &invite).await.unwrap();
    assert_eq!(reply.seq, 2);
    let reply: v1::GroupMembersReply = gateway.call(1, Method::GroupMembers, &members).await.unwrap();
    assert_eq!(reply.total, 2, "who has left stays out");
}
