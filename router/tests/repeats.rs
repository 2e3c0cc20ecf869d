//! Repeats and predecessors that memory does not reach, senders who have left, and what strangers learn: nothing.

use im_proto::{ConversationId, StatusCode, method::Method, v1};
use im_router::RouterConfig;
use im_storage::{Memory, Store};

use crate::support::{CLUSTER, TestGateway, World, message, to, user};

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
        assert!(router.stop(std::time::Duration::from_secs(30)).await);
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
    let id = CLUSTER.self_id(&user("alice"));
    for (index, name) in names("n", 2000).into_iter().enumerate() {
        gateway.send(1, id, message("alice", name, name, "", index as u64)).await;
        gateway.ack(name).await;
    }
    let mut refused = None;
    for name in names("x", 100) {
        gateway.send(1, id, message("alice", name, name, "never sent", 2000)).await;
        let status = gateway.ack(name).await.status.expect("a refusal");
        if status.code == StatusCode::RateLimited.number() {
            refused = Some(status.retry_after_ms);
            break;
        }
        assert_eq!(status.code, StatusCode::OutOfOrder.number());
    }
    let wait = std::time::Duration::from_millis(u64::from(refused.expect("a hundred scans are too many")));
    tokio::time::sleep(wait).await;
    gateway.send(1, id, message("alice", "later", "later", "n0", 2000)).await;
    assert_eq!(gateway.ack("later").await.seq, 2001);
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
