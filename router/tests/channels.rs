//! Channels: few write, any number of users read, and what somebody writes costs the same for all numbers of them.

mod routers;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use im_proto::{
    ConversationId, StatusCode, body, limits,
    link::channel::{LinkItem, pair},
    method::Method,
    v1,
};
use im_registry::Reach;
use im_router::Router;
use im_storage::{FaultPlan, Memory, Store, Table};

use crate::{
    large::{Cluster, assert_got, call, names, resynced, send_all},
    lifecycle::faulty,
    moves::peer_hello,
    support::{CLUSTER, TestGateway, World, to, user},
};

use im_proto::v1::{gateway_message::Message as Up, router_message::Message as Down};

fn create(key: &'static str, writers: &[&str]) -> v1::ChannelCreateRequest {
    let writers = writers.iter().map(|name| (*name).to_owned()).collect();
    v1::ChannelCreateRequest { key: key.into(), name: "news".to_owned(), writers }
}

fn subscribe(id: ConversationId, call: &'static str) -> v1::ChannelSubscribeRequest {
    v1::ChannelSubscribeRequest { conversation_id: id.to_bytes(), client_message_id: call.into() }
}

fn code<T: std::fmt::Debug>(answer: Result<T, v1::Status>) -> StatusCode {
    StatusCode::from_number(answer.unwrap_err().code).unwrap()
}

async fn channel(gateway: &mut TestGateway, session: u64, writers: &[&str]) -> ConversationId {
    let created: v1::ChannelCreateReply =
        gateway.call(session, Method::ChannelCreate, &create("k", writers)).await.unwrap();
    ConversationId::from_slice(&created.conversation_id).unwrap()
}

async fn join(gateway: &mut TestGateway, session: u64, id: ConversationId) -> u64 {
    let reply: v1::ChannelSubscribeReply =
        gateway.call(session, Method::ChannelSubscribe, &subscribe(id, "")).await.unwrap();
    reply.own_seq
}

async fn end(
    gateway: &mut TestGateway,
    session: u64,
    id: ConversationId,
    call: &'static str,
) -> Result<u64, StatusCode> {
    let request = v1::ChannelUnsubscribeRequest { conversation_id: id.to_bytes(), client_message_id: call.into() };
    match gateway.call::<v1::ChannelUnsubscribeReply>(session, Method::ChannelUnsubscribe, &request).await {
        Ok(reply) => Ok(reply.own_seq),
        Err(status) => Err(StatusCode::from_number(status.code).unwrap()),
    }
}

async fn post(
    gateway: &mut TestGateway,
    session: u64,
    id: ConversationId,
    name: &'static str,
) -> Result<u64, StatusCode> {
    post_body(gateway, session, id, name, body::text(name)).await
}

async fn post_body(
    gateway: &mut TestGateway,
    session: u64,
    id: ConversationId,
    name: &'static str,
    body: Bytes,
) -> Result<u64, StatusCode> {
    let target = Some(v1::send::Target::ConversationId(id.to_bytes()));
    let send = v1::Send { target, client_message_id: Bytes::from_static(name.as_bytes()), body, ..v1::Send::default() };
    gateway.send(session, id, send).await;
    let ack = gateway.ack(name).await;
    match ack.status {
        Some(status) => Err(StatusCode::from_number(status.code).unwrap()),
        None => Ok(ack.seq),
    }
}

async fn history(gateway: &mut TestGateway, session: u64, id: ConversationId) -> Vec<u64> {
    let request = v1::HistoryRequest { target: to(id), from: 1, ..v1::HistoryRequest::default() };
    let reply: v1::HistoryReply = gateway.call(session, Method::MessageHistory, &request).await.unwrap();
    reply.entries.into_iter().filter_map(|entry| entry.message).map(|message| message.seq).collect()
}

/// The row of a conversation in a session's list.
async fn row(gateway: &mut TestGateway, session: u64, id: ConversationId) -> Option<v1::ConversationRow> {
    let request = v1::SyncRequest { details: true, ..v1::SyncRequest::default() };
    for _ in 0..100 {
        match gateway.call::<v1::SyncReply>(session, Method::ConversationSync, &request).await {
            Ok(reply) => return reply.conversations.into_iter().find(|row| row.conversation_id == id.to_bytes()),
            Err(status) => assert_eq!(status.code, StatusCode::Unavailable.number()),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the list does not come");
}

async fn mark_read(
    gateway: &mut TestGateway,
    session: u64,
    id: ConversationId,
    seq: u64,
) -> Result<v1::MarkReadReply, v1::Status> {
    gateway.call(session, Method::ConversationMarkRead, &v1::MarkReadRequest { target: to(id), seq }).await
}

/// The sessions that signals were pushed to since the last time.
async fn signalled(gateway: &mut TestGateway) -> Vec<u64> {
    gateway.gather().await;
    let mut sessions = Vec::new();
    for message in gateway.inbox.drain(..) {
        // The first field of a frame is what it is.
        if let Down::Deliver(deliver) = message
            && deliver.frame.get(4) == Some(&0x32)
        {
            sessions.extend(deliver.session_ids);
        }
    }
    sessions
}

async fn invite(cluster: &mut Cluster, creator: &str, id: ConversationId, who: &str) {
    let members = vec![who.to_owned()];
    let request =
        v1::GroupInviteRequest { conversation_id: id.to_bytes(), members, ..v1::GroupInviteRequest::default() };
    cluster.call::<v1::GroupInviteReply>(creator, Method::GroupInvite, &request).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn anybody_reads_a_channel_from_its_beginning_and_only_its_writers_write() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name) in [(1, "alice"), (2, "bob"), (3, "carol")] {
        gateway.open(&world, session, name, "d").await;
    }
    let id = channel(&mut gateway, 1, &["bob"]).await;
    assert_eq!(channel(&mut gateway, 1, &["bob", "alice"]).await, id, "the same creator, key and writers");
    let other = gateway.call::<v1::ChannelCreateReply>(1, Method::ChannelCreate, &create("k", &["carol"])).await;
    assert_eq!(code(other), StatusCode::PreconditionFailed);
    assert_eq!(post(&mut gateway, 1, id, "m2").await, Ok(2));
    assert_eq!(post(&mut gateway, 2, id, "m3").await, Ok(3));
    assert_eq!(history(&mut gateway, 3, id).await, [1, 2, 3], "without a subscription");
    assert_eq!(post(&mut gateway, 3, id, "no").await, Err(StatusCode::Forbidden));
    join(&mut gateway, 3, id).await;
    assert_eq!(post(&mut gateway, 3, id, "no more").await, Err(StatusCode::Forbidden));
    let typing = v1::signal_request::Signal::Typing(v1::Typing { active: true });
    let typing = v1::SignalRequest { target: to(id), signal: Some(typing) };
    assert_eq!(
        code(gateway.call::<v1::SignalReply>(3, Method::ConversationSignal, &typing).await),
        StatusCode::Forbidden
    );
    let invite = v1::GroupInviteRequest {
        conversation_id: id.to_bytes(),
        members: vec!["carol".to_owned()],
        ..v1::GroupInviteRequest::default()
    };
    for session in [2, 3] {
        let answer = gateway.call::<v1::GroupInviteReply>(session, Method::GroupInvite, &invite).await;
        assert_eq!(code(answer), StatusCode::Forbidden, "only the owner says who writes");
    }
    let leave = v1::GroupLeaveRequest { conversation_id: id.to_bytes(), ..v1::GroupLeaveRequest::default() };
    let answer = gateway.call::<v1::GroupLeaveReply>(3, Method::GroupLeave, &leave).await;
    assert_eq!(code(answer), StatusCode::Forbidden, "who reads unsubscribes");
    gateway.call::<v1::GroupInviteReply>(1, Method::GroupInvite, &invite).await.unwrap();
    assert_eq!(post(&mut gateway, 3, id, "m5").await, Ok(5));
    let members = v1::GroupMembersRequest { conversation_id: id.to_bytes(), ..v1::GroupMembersRequest::default() };
    gateway.open(&world, 4, "dave", "d").await;
    let writers: v1::GroupMembersReply = gateway.call(4, Method::GroupMembers, &members).await.unwrap();
    let roles: Vec<_> = writers.members.iter().map(|member| (member.user_id.as_str(), member.role())).collect();
    assert_eq!(roles, [("alice", v1::Role::Owner), ("bob", v1::Role::Admin), ("carol", v1::Role::Admin)]);
    assert_eq!((writers.total, writers.name.as_str()), (3, "news"));
    gateway.call::<v1::GroupLeaveReply>(3, Method::GroupLeave, &leave).await.unwrap();
    assert_eq!(post(&mut gateway, 3, id, "gone").await, Err(StatusCode::Forbidden));
    assert_eq!(history(&mut gateway, 3, id).await.len(), 6);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_channel_or_no_subscription_is_refused() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name) in [(1, "alice"), (2, "bob"), (3, "carol")] {
        gateway.open(&world, session, name, "d").await;
    }
    let group = v1::GroupCreateRequest { key: "k".into(), name: "g".to_owned(), members: vec!["bob".to_owned()] };
    let group: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &group).await.unwrap();
    let group = ConversationId::from_slice(&group.conversation_id).unwrap();
    let id = channel(&mut gateway, 1, &["bob"]).await;
    assert_ne!(id, group);
    let unknown = ConversationId::from_bytes([4; 16]);
    for (session, id) in [(3, unknown), (3, group), (2, group), (3, CLUSTER.self_id(&user("alice")))] {
        let call = subscribe(id, "s");
        let answer = gateway.call::<v1::ChannelSubscribeReply>(session, Method::ChannelSubscribe, &call).await;
        assert_eq!(code(answer), StatusCode::NotFound);
        assert_eq!(end(&mut gateway, session, id, "u").await, Err(StatusCode::NotFound));
    }
    assert_eq!(code(mark_read(&mut gateway, 3, id, 1).await), StatusCode::NotFound, "who has never subscribed");
    assert_eq!(row(&mut gateway, 3, id).await, None);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(end(&mut gateway, 2, id, "u2").await, Err(StatusCode::Forbidden), "a writer leaves the channel");
    let call = subscribe(id, "s2");
    let reply: v1::ChannelSubscribeReply = gateway.call(2, Method::ChannelSubscribe, &call).await.unwrap();
    assert_eq!(reply.own_seq, 0, "and has it in the list as it is");
    assert_eq!(end(&mut gateway, 2, id, "u3").await, Err(StatusCode::Forbidden));
    let odd = v1::ChannelSubscribeRequest { conversation_id: Bytes::from_static(b"odd"), ..Default::default() };
    let answer = gateway.call::<v1::ChannelSubscribeReply>(3, Method::ChannelSubscribe, &odd).await;
    assert_eq!(code(answer), StatusCode::Malformed);
    let writers: Vec<String> = (0..limits::CHANNEL_WRITERS_MAX).map(|n| format!("w{n}")).collect();
    for (key, writers, wanted) in [
        (Bytes::new(), Vec::new(), StatusCode::Malformed),
        (Bytes::from(vec![b'k'; 65]), Vec::new(), StatusCode::TooLarge),
        (Bytes::from_static(b"many"), writers.clone(), StatusCode::TooLarge),
    ] {
        let request = v1::ChannelCreateRequest { key, name: "n".to_owned(), writers };
        assert_eq!(code(gateway.call::<v1::ChannelCreateReply>(1, Method::ChannelCreate, &request).await), wanted);
    }
    let named = writers.iter().skip(1).cloned().chain(["alice".to_owned()]).collect();
    let request = v1::ChannelCreateRequest { key: Bytes::from_static(b"most"), name: "n".to_owned(), writers: named };
    let made = gateway.call::<v1::ChannelCreateReply>(1, Method::ChannelCreate, &request).await;
    made.expect("its maker counts once, named or not");
    let invite =
        v1::GroupInviteRequest { conversation_id: id.to_bytes(), members: writers, client_message_id: Bytes::new() };
    let answer = gateway.call::<v1::GroupInviteReply>(1, Method::GroupInvite, &invite).await;
    assert_eq!(code(answer), StatusCode::TooLarge);
}

async fn next_router(world: &World, name: &str, before: &Router) -> (Router, TestGateway) {
    assert!(before.stop(Duration::from_secs(30)).await);
    let router = world.router(world.config(name)).await;
    let gateway = world.gateway(&format!("gateway-{name}"), &router).await;
    (router, gateway)
}

const SESSIONS: [(u64, &str, &str); 4] = [(1, "alice", "a1"), (2, "bob", "b1"), (3, "bob", "b2"), (4, "carol", "c1")];

fn mention_of_all() -> Bytes {
    let whom = Some(v1::mention::Whom::All(true));
    let mentions = vec![v1::Mention { whom, offset_bytes: 0, length_bytes: 1 }];
    body::encode(v1::body::Content::Text(v1::Text { text: "hello".to_owned(), mentions }))
}

#[tokio::test(start_paused = true)]
async fn unread_is_exact_for_a_subscriber_across_owners_and_while_the_channel_is_not_open() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name, device) in SESSIONS {
        gateway.open(&world, session, name, device).await;
    }
    let id = channel(&mut gateway, 1, &[]).await;
    post_body(&mut gateway, 1, id, "m2", mention_of_all()).await.unwrap();
    for session in [2, 4] {
        join(&mut gateway, session, id).await;
        let row = row(&mut gateway, session, id).await.expect("a row");
        assert_eq!((row.kind(), row.name.as_str(), row.left), (v1::ConversationKind::Channel, "news", false));
        assert_eq!((row.head, row.joined_seq, row.read_seq), (2, 2, 2));
        assert_eq!((row.unread, row.mentions), (0, 0), "what was there before is not unread");
    }
    for name in ["m3", "m4", "m5"] {
        post(&mut gateway, 1, id, name).await.unwrap();
    }
    post_body(&mut gateway, 1, id, "m6", mention_of_all()).await.unwrap();
    signalled(&mut gateway).await;
    let read = mark_read(&mut gateway, 2, id, 4).await.unwrap();
    assert_eq!((read.read_seq, read.unread, read.mentions), (4, 2, 1));
    let read = mark_read(&mut gateway, 3, id, 3).await.unwrap();
    assert_eq!((read.read_seq, read.unread, read.mentions), (4, 2, 1), "a cursor moves forward only");
    assert_eq!(signalled(&mut gateway).await, [2, 3], "the user's devices learn it once, and nobody else");
    let mut last = router;
    for (name, pause) in [("r2", 1), ("r3", 70), ("r4", 1000)] {
        let (router, mut gateway) = next_router(&world, name, &last).await;
        for (session, name, device) in SESSIONS {
            gateway.open(&world, session, name, device).await;
        }
        for again in 0..2 {
            let row = row(&mut gateway, 3, id).await.expect("a row");
            assert_eq!((row.head, row.unread, row.mentions, row.read_seq), (6, 2, 1, 4), "{name} {again}");
            assert_eq!((row.preview.map(|preview| preview.seq), row.cursors), (Some(6), Vec::new()));
            tokio::time::sleep(Duration::from_secs(pause)).await;
        }
        last = router;
    }
    let (_router, mut gateway) = next_router(&world, "r5", &last).await;
    gateway.open(&world, 4, "carol", "c1").await;
    let read = mark_read(&mut gateway, 4, id, 99).await.unwrap();
    assert_eq!((read.read_seq, read.unread, read.mentions), (6, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn who_unsubscribes_gets_nothing_more_and_who_comes_again_begins_at_the_head() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name, device) in SESSIONS {
        gateway.open(&world, session, name, device).await;
    }
    let id = channel(&mut gateway, 1, &[]).await;
    let call = subscribe(id, "s1");
    let first: v1::ChannelSubscribeReply = gateway.call(2, Method::ChannelSubscribe, &call).await.unwrap();
    let again: v1::ChannelSubscribeReply = gateway.call(3, Method::ChannelSubscribe, &call).await.unwrap();
    assert_eq!((first.own_seq, again.own_seq), (1, 1), "a repeated call");
    assert_eq!(join(&mut gateway, 2, id).await, 0, "it is in the list");
    let other = v1::ChannelSubscribeRequest { conversation_id: Bytes::from_static(&[7; 16]), ..call.clone() };
    let answer = gateway.call::<v1::ChannelSubscribeReply>(2, Method::ChannelSubscribe, &other).await;
    assert_eq!(code(answer), StatusCode::PreconditionFailed, "the same id for another channel");
    assert_eq!(got_by(&mut gateway, 3, id, "m2").await, Some(2), "all devices get it");
    for (call, own_seq) in [("u1", 2), ("u1", 2), ("", 0)] {
        assert_eq!(end(&mut gateway, 2, id, call).await, Ok(own_seq));
    }
    assert!(row(&mut gateway, 2, id).await.expect("a row").left, "although the channel had no entry meanwhile");
    assert_eq!(got_by(&mut gateway, 3, id, "m3").await, None);
    // A repetition that comes late does not bring the user back.
    gateway.call::<v1::ChannelSubscribeReply>(2, Method::ChannelSubscribe, &call).await.unwrap();
    assert_eq!(got_by(&mut gateway, 3, id, "m4").await, None);
    assert_eq!(join(&mut gateway, 3, id).await, 3);
    let listed = row(&mut gateway, 2, id).await.expect("a row");
    assert_eq!((listed.left, listed.joined_seq, listed.unread), (false, 4, 0));
    assert_eq!(got_by(&mut gateway, 2, id, "m5").await, Some(5));
    // Again without an entry between, then as a writer, whose effects are those of the channel's log.
    end(&mut gateway, 2, id, "u2").await.unwrap();
    assert_eq!(join(&mut gateway, 2, id).await, 5);
    end(&mut gateway, 2, id, "u3").await.unwrap();
    let invite = v1::GroupInviteRequest {
        conversation_id: id.to_bytes(),
        members: vec!["bob".to_owned()],
        ..v1::GroupInviteRequest::default()
    };
    gateway.call::<v1::GroupInviteReply>(1, Method::GroupInvite, &invite).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let listed = row(&mut gateway, 2, id).await.expect("a row");
    assert_eq!((listed.left, listed.joined_seq, listed.read_seq), (false, 6, 6));
    assert_eq!(end(&mut gateway, 2, id, "u4").await, Err(StatusCode::Forbidden));
    assert_eq!(got_by(&mut gateway, 3, id, "m7").await, Some(7));
    let leave = v1::GroupLeaveRequest { conversation_id: id.to_bytes(), ..v1::GroupLeaveRequest::default() };
    gateway.call::<v1::GroupLeaveReply>(2, Method::GroupLeave, &leave).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(row(&mut gateway, 2, id).await.expect("a row").left);
    join(&mut gateway, 2, id).await;
    let listed = row(&mut gateway, 2, id).await.expect("a row");
    assert_eq!((listed.left, listed.joined_seq, listed.read_seq), (false, 8, 8));
}

/// Posts as the first session; the seq of it that was pushed to another one.
async fn got_by(gateway: &mut TestGateway, session: u64, id: ConversationId, name: &'static str) -> Option<u64> {
    gateway.gather().await;
    gateway.inbox.clear();
    let seq = post(gateway, 1, id, name).await.unwrap();
    gateway.gather().await;
    let mut got = None;
    for message in gateway.inbox.drain(..) {
        if let Down::Deliver(deliver) = message
            && deliver.session_ids.contains(&session)
            && deliver.frame.get(4) == Some(&0x2a)
        {
            got = crate::support::decode(deliver.frame).iter().map(|message| message.seq).find(|found| *found == seq);
        }
    }
    got
}

#[tokio::test(start_paused = true)]
async fn the_readers_of_a_channel_do_not_see_each_other() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name, device) in SESSIONS {
        gateway.open(&world, session, name, device).await;
    }
    let id = channel(&mut gateway, 1, &[]).await;
    join(&mut gateway, 2, id).await;
    join(&mut gateway, 4, id).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    let request = v1::PresenceReadRequest { user_ids: ["alice", "bob", "carol"].map(str::to_owned).to_vec() };
    let reply: v1::PresenceReadReply = gateway.call(4, Method::PresenceRead, &request).await.unwrap();
    assert_eq!(reply.users.iter().map(|user| user.user_id.as_str()).collect::<Vec<_>>(), ["carol"]);
}
