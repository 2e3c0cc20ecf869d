//! Messages, groups, history and sync of one router.

use std::time::Duration;

use im_proto::{ConversationId, StatusCode, method::Method, v1, v1::router_message::Message as Down};
use im_storage::{FaultPlan, Memory, Store};

use crate::{
    large::call,
    lifecycle::faulty,
    support::{CLUSTER, World, message, to, user},
};

async fn world() -> World {
    World::new(Store::from(Memory::new()))
}

#[tokio::test(start_paused = true)]
async fn the_first_message_creates_the_conversation_and_reaches_all_devices() {
    let world = world().await;
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.open(&world, 2, "alice", "a2").await;
    gateway.open(&world, 3, "bob", "b1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m1", "hello", "", 0)).await;
    let ack = gateway.ack("m1").await;
    assert_eq!((ack.seq, ack.status), (1, None));
    assert_eq!(ack.conversation_id, id.to_bytes());
    // The self logs' entries about the new conversation are pushed too, before or after.
    let mut reached = std::collections::BTreeSet::new();
    while !reached.is_superset(&[2, 3].into()) {
        let (sessions, pushed) = gateway.pushed().await;
        for text in pushed.into_iter().filter(|message| message.conversation_id == id.to_bytes()) {
            assert_eq!((text.seq, text.sender.as_str(), text.sent_at_ms), (1, "alice", ack.sent_at_ms));
            reached.extend(sessions.iter().copied());
        }
    }
    assert!(!reached.contains(&1), "the session that sent it has the ack");
    let row = wait_for_row(&mut gateway, 3, id).await;
    assert_eq!((row.head, row.unread, row.peer_user_id.as_str()), (1, 1, "alice"));
    let row = wait_for_row(&mut gateway, 1, id).await;
    assert_eq!((row.head, row.unread, row.peer_user_id.as_str()), (1, 0, "bob"));
}

async fn wait_for_row(
    gateway: &mut crate::support::TestGateway,
    session: u64,
    id: ConversationId,
) -> v1::ConversationRow {
    for _ in 0..100 {
        let reply: v1::SyncReply =
            gateway.call(session, Method::ConversationSync, &v1::SyncRequest::default()).await.unwrap();
        if let Some(row) = reply.conversations.into_iter().find(|row| row.conversation_id == id.to_bytes()) {
            return row;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the conversation does not come into the list");
}

#[tokio::test(start_paused = true)]
async fn a_repeated_send_stays_single_and_another_body_is_refused() {
    let world = world().await;
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    for _ in 0..100 {
        gateway.send(1, id, message("bob", "m1", "hello", "", 0)).await;
    }
    for _ in 0..100 {
        assert_eq!(gateway.ack("m1").await.seq, 1);
    }
    gateway.send(1, id, message("bob", "m1", "something else", "", 0)).await;
    let refused = gateway.ack("m1").await.status.expect("a refusal");
    assert_eq!(refused.code, StatusCode::PreconditionFailed.number());
    let request = v1::HistoryRequest { target: to(id), from: 1, ..v1::HistoryRequest::default() };
    let history: v1::HistoryReply = gateway.call(1, Method::MessageHistory, &request).await.unwrap();
    assert_eq!(history.entries.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_send_whose_predecessor_is_missing_is_out_of_order() {
    let world = world().await;
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m2", "second", "m1", 0)).await;
    assert_eq!(gateway.ack("m2").await.status.unwrap().code, StatusCode::OutOfOrder.number());
    gateway.send(1, id, message("bob", "m1", "first", "", 0)).await;
    gateway.send(1, id, message("bob", "m2", "second", "m1", 0)).await;
    assert_eq!(gateway.ack("m1").await.seq, 1);
    assert_eq!(gateway.ack("m2").await.seq, 2);
}

#[tokio::test(start_paused = true)]
async fn a_stranger_cannot_tell_a_conversation_from_none() {
    let world = world().await;
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.open(&world, 2, "mallory", "m1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m1", "hello", "", 0)).await;
    gateway.ack("m1").await;
    for conversation in [id, ConversationId::from_bytes([3; 16])] {
        let request = v1::HistoryRequest { target: to(conversation), from: 1, ..v1::HistoryRequest::default() };
        let refused = gateway.call::<v1::HistoryReply>(2, Method::MessageHistory, &request).await.unwrap_err();
        assert_eq!(refused.code, StatusCode::NotFound.number());
        gateway.send(2, conversation, message("bob", "x1", "let me in", "", 0)).await;
        assert_eq!(gateway.ack("x1").await.status.unwrap().code, StatusCode::NotFound.number());
    }
}

#[tokio::test(start_paused = true)]
async fn history_ranges_are_checked_and_bounded() {
    let world = world().await;
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.self_id(&user("alice"));
    for name in ["n1", "n2", "n3", "n4", "n5"] {
        gateway.send(1, id, message("alice", name, name, "", 0)).await;
        gateway.ack(name).await;
    }
    let request = |from: i64, to_seq: i64, limit: u32, newest: bool| v1::HistoryRequest {
        target: to(id),
        from,
        to: to_seq,
        limit,
        newest,
    };
    for (asked, expected) in [
        (request(1, 0, 0, false), vec![1, 2, 3, 4, 5]),
        (request(2, 3, 0, false), vec![2, 3]),
        (request(1, 0, 2, true), vec![4, 5]),
        (request(1, 1_000_000_000, 2, false), vec![1, 2]),
        (request(9, 0, 0, false), vec![]),
    ] {
        let reply: v1::HistoryReply = gateway.call(1, Method::MessageHistory, &asked).await.unwrap();
        let seqs: Vec<u64> = reply.entries.iter().filter_map(|entry| entry.message.as_ref()).map(|m| m.seq).collect();
        assert_eq!((seqs, reply.head), (expected, 5), "{asked:?}");
    }
    for bad in [request(-1, 0, 0, false), request(5, 2, 0, false), request(0, -7, 0, false)] {
        let refused = gateway.call::<v1::HistoryReply>(1, Method::MessageHistory, &bad).await.unwrap_err();
        assert_eq!(refused.code, StatusCode::Malformed.number(), "{bad:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_is_created_once_and_only_members_write() {
    let world = world().await;
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name) in [(1, "alice"), (2, "bob"), (3, "carol")] {
        gateway.open(&world, session, name, "d").await;
    }
    let create = v1::GroupCreateRequest {
        key: "k".into(),
        name: "team".to_owned(),
        members: vec!["bob".to_owned(), "alice".to_owned()],
    };
    let created: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &create).await.unwrap();
    let again: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &create).await.unwrap();
    assert_eq!(created, again);
    let id = ConversationId::from_slice(&created.conversation_id).unwrap();
    gateway.send(3, id, message("x", "c1", "hi", "", 0)).await;
    assert_eq!(gateway.ack("c1").await.status.unwrap().code, StatusCode::NotFound.number());
    let invite = v1::GroupInviteRequest {
        conversation_id: id.to_bytes(),
        members: vec!["carol".to_owned()],
        ..Default::default()
    };
    let invited: v1::GroupInviteReply = gateway.call(2, Method::GroupInvite, &invite).await.unwrap();
    assert_eq!(invited.seq, 2);
    let nothing_new: v1::GroupInviteReply = gateway.call(2, Method::GroupInvite, &invite).await.unwrap();
    assert_eq!(nothing_new.seq, 0);
    gateway.send(3, id, message("x", "c2", "hi", "", 0)).await;
    assert_eq!(gateway.ack("c2").await.seq, 3);
    let leave = v1::GroupLeaveRequest { conversation_id: id.to_bytes(), ..Default::default() };
    let left: v1::GroupLeaveReply = gateway.call(3, Method::GroupLeave, &leave).await.unwrap();
    assert_eq!(left.seq, 4);
    gateway.send(3, id, message("x", "c3", "hi", "", 0)).await;
    assert_eq!(gateway.ack("c3").await.status.unwrap().code, StatusCode::NotFound.number());
    let members = v1::GroupMembersRequest { conversation_id: id.to_bytes(), ..Default::default() };
    let list: v1::GroupMembersReply = gateway.call(1, Method::GroupMembers, &members).await.unwrap();
    let names: Vec<&str> = list.members.iter().map(|member| member.user_id.as_str()).collect();
    assert_eq!((names, list.total), (vec!["alice", "bob"], 2));
    let row = wait_for_row(&mut gateway, 2, id).await;
    assert_eq!((row.name.as_str(), row.head), ("team", 4));
}

/// While the first one is not committed, afterwards, and at the next owner.
#[tokio::test(start_paused = true)]
async fn a_key_that_made_another_group_is_refused() {
    let mut world = world().await;
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    let create = |name: &str, members: &[&str]| v1::GroupCreateRequest {
        key: "k".into(),
        name: name.to_owned(),
        members: members.iter().map(|name| (*name).to_owned()).collect(),
    };
    let calls = [
        (create("team", &["bob", "carol"]), true),
        (create("team", &["carol", "alice", "bob", "bob"]), true),
        (create("tea", &["bob", "carol"]), false),
        (create("team", &["bob"]), false),
        (create("team", &["bob", "carol", "dave"]), false),
    ];
    let delay = Duration::from_millis(50)..=Duration::from_millis(50);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    // All at once: which of them makes it is the first.
    let numbered = (900..).zip(&calls);
    gateway.push(numbered.clone().map(|(n, (request, _))| call(1, n, Method::GroupCreate, request)).collect()).await;
    for (number, (request, is_same)) in numbered {
        let reply = gateway.expect("a reply", |message| match message {
            Down::CallReply(reply) if reply.request_id == number => Some(reply.clone()),
            _ => None,
        });
        let code = reply.await.status.map(|status| status.code);
        assert_eq!(code, (!is_same).then_some(StatusCode::PreconditionFailed.number()), "{request:?}");
    }
    store.set_plan(FaultPlan::none());
    let made: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &calls[0].0).await.unwrap();
    assert_eq!(made.seq, 1);
    assert!(router.stop(Duration::from_secs(30)).await);
    let router = world.router(world.config("r2")).await;
    let mut gateway = world.gateway("g2", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    for (request, is_same) in &calls {
        let reply = gateway.call::<v1::GroupCreateReply>(1, Method::GroupCreate, request).await;
        let wanted = if *is_same { Ok(made.clone()) } else { Err(StatusCode::PreconditionFailed.number()) };
        assert_eq!(reply.map_err(|status| status.code), wanted, "{request:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn batches_never_cross_a_bucket() {
    let world = world().await;
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.self_id(&user("alice"));
    let names: Vec<&'static str> = (0..1100).map(|n| &*Box::leak(format!("n{n}").into_boxed_str())).collect();
    for name in &names {
        gateway.send(1, id, message("alice", name, name, "", 0)).await;
    }
    for (index, name) in names.iter().enumerate() {
        assert_eq!(gateway.ack(name).await.seq, index as u64 + 1);
    }
    let request = v1::HistoryRequest { target: to(id), from: 1000, to: 1100, ..v1::HistoryRequest::default() };
    let reply: v1::HistoryReply = gateway.call(1, Method::MessageHistory, &request).await.unwrap();
    assert_eq!(reply.entries.len(), 101);
}
