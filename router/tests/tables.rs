//! The log is there and the tables beside it are not: what is to be written waits, as one write and bounded, and comes when they are
//! back. And what becomes of rows that are many.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use im_proto::{
    ConversationId, StatusCode, body,
    environment::{Spawn, Task},
    limits,
    method::Method,
    v1::{self, gateway_message::Message as Up},
};
use im_storage::{Directory as _, FaultPlan, Memory, StateWrite, Store, Table};

use crate::{
    lifecycle::faulty,
    support::{CLUSTER, TestGateway, World, message, to, user},
};

/// Counts the tasks that live.
#[derive(Clone)]
struct Counting {
    tasks: Arc<dyn Spawn>,
    living: Arc<AtomicUsize>,
}

impl Spawn for Counting {
    fn spawn(&self, task: Task) {
        let living = self.living.clone();
        living.fetch_add(1, Ordering::Relaxed);
        self.tasks.spawn(Box::pin(async move {
            task.await;
            living.fetch_sub(1, Ordering::Relaxed);
        }));
    }
}

impl Counting {
    fn of(world: &mut World) -> Self {
        let counting = Self { tasks: world.environment.tasks.clone(), living: Arc::default() };
        world.environment.tasks = Arc::new(counting.clone());
        counting
    }

    fn living(&self) -> usize {
        self.living.load(Ordering::Relaxed)
    }
}

fn refused(table: Table) -> FaultPlan {
    FaultPlan { refused_table: Some(table), ..FaultPlan::none() }
}

async fn received(gateway: &mut TestGateway, session_id: u64, id: ConversationId, seq: u64) {
    let received = Some(v1::Received { conversation_id: id.to_bytes(), seq });
    gateway.push(vec![Up::Received(v1::SessionReceived { session_id, received })]).await;
}

async fn mark_read(gateway: &mut TestGateway, session: u64, id: ConversationId, seq: u64) -> v1::MarkReadReply {
    let request = v1::MarkReadRequest { target: to(id), seq };
    gateway.call(session, Method::ConversationMarkRead, &request).await.unwrap()
}

async fn row(gateway: &mut TestGateway, session: u64, id: ConversationId) -> v1::ConversationRow {
    for _ in 0..100 {
        let request = v1::SyncRequest { details: true, ..v1::SyncRequest::default() };
        let reply: v1::SyncReply = gateway.call(session, Method::ConversationSync, &request).await.unwrap();
        if let Some(row) = reply.conversations.into_iter().find(|row| row.conversation_id == id.to_bytes()) {
            return row;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the conversation does not come into the list");
}

async fn group(gateway: &mut TestGateway, members: &[String]) -> ConversationId {
    let create = v1::GroupCreateRequest { key: "k".into(), name: "team".to_owned(), members: members.to_vec() };
    let created: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &create).await.unwrap();
    ConversationId::from_slice(&created.conversation_id).unwrap()
}

fn leak(name: String) -> &'static str {
    Box::leak(name.into_boxed_str())
}

#[tokio::test(start_paused = true)]
async fn received_cursors_that_cannot_be_stored_are_one_write_and_come_later() {
    let mut world = World::new(Store::from(Memory::new()));
    let counting = Counting::of(&mut world);
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    gateway.open(&world, 2, "bob", "d").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    for number in 1..=60_u64 {
        let name = leak(format!("m{number}"));
        gateway.send(1, id, message("bob", name, name, "", number - 1)).await;
        gateway.ack(name).await;
    }
    received(&mut gateway, 2, id, 1).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = counting.living();
    store.set_plan(refused(Table::Cursors));
    for seq in 2..=60 {
        received(&mut gateway, 2, id, seq).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(counting.living() <= before + 3, "{} tasks, {before} before", counting.living());
    store.set_plan(FaultPlan::none());
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(counting.living() <= before, "{} tasks, {before} before", counting.living());
    assert!(router.stop(Duration::from_secs(30)).await);
    let router = world.router(world.config("r2")).await;
    let mut gateway = world.gateway("g2", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    assert_eq!(row(&mut gateway, 1, id).await.cursors[0].received_seq, 60);
}

#[tokio::test(start_paused = true)]
async fn mentions_that_cannot_be_stored_are_bounded_and_other_messages_go_on() {
    let mut world = World::new(Store::from(Memory::new()));
    let counting = Counting::of(&mut world);
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    let names: Vec<String> = (0..limits::MENTIONS_MAX).map(|number| format!("user{number}")).collect();
    gateway.open(&world, 1, "alice", "d").await;
    gateway.open(&world, 2, &names[7], "d").await;
    let id = group(&mut gateway, &names).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let all_of_them = {
        let mention = |name: &String| v1::Mention {
            whom: Some(v1::mention::Whom::UserId(name.clone())),
            offset_bytes: 0,
            length_bytes: 1,
        };
        let text = v1::Text { text: "you all".to_owned(), mentions: names.iter().map(mention).collect() };
        body::encode(v1::body::Content::Text(text))
    };
    let send = |name: &'static str, body: &Bytes| v1::Send {
        target: Some(v1::send::Target::ConversationId(id.to_bytes())),
        client_message_id: name.into(),
        body: body.clone(),
        ..v1::Send::default()
    };
    let before = counting.living();
    store.set_plan(refused(Table::Mentions));
    let mut stored = 0;
    let overloaded = loop {
        let name = leak(format!("m{stored}"));
        gateway.send(1, id, send(name, &all_of_them)).await;
        match gateway.ack(name).await.status {
            None => stored += 1,
            Some(status) => break status,
        }
        assert!(stored < 200, "no bound");
    };
    assert_eq!(overloaded.code, StatusCode::Overloaded.number());
    assert!((64..=66).contains(&stored), "{stored} times 256 rows");
    assert!(counting.living() <= before + 3, "{} tasks, {before} before", counting.living());
    // Whoever mentions nobody is not concerned; whoever would need rows waits.
    gateway.send(1, id, send("plain", &body::text("hello"))).await;
    assert_eq!(gateway.ack("plain").await.status, None);
    let invite = v1::GroupInviteRequest {
        conversation_id: id.to_bytes(),
        members: vec!["late".to_owned()],
        ..v1::GroupInviteRequest::default()
    };
    let answer = gateway.call::<v1::GroupInviteReply>(1, Method::GroupInvite, &invite).await;
    assert_eq!(answer.map_err(|status| status.code), Err(StatusCode::Overloaded.number()));
    assert_eq!(row(&mut gateway, 2, id).await.mentions, stored, "also those whose rows are not stored");
    store.set_plan(FaultPlan::none());
    tokio::time::sleep(Duration::from_secs(30)).await;
    gateway.send(1, id, send("again", &all_of_them)).await;
    assert_eq!(gateway.ack("again").await.status, None);
    gateway.call::<v1::GroupInviteReply>(1, Method::GroupInvite, &invite).await.unwrap();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(counting.living() <= before, "{} tasks, {before} before", counting.living());
    assert_eq!(row(&mut gateway, 2, id).await.mentions, stored + 1);
}

#[tokio::test(start_paused = true)]
async fn a_cursor_that_moves_while_a_burst_ends_does_not_keep_the_conversation_in_memory() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    gateway.open(&world, 2, "bob", "d").await;
    let id = group(&mut gateway, &["bob".to_owned()]).await;
    for name in ["m1", "m2", "m3"] {
        gateway.send(1, id, message("x", name, name, "", 0)).await;
        gateway.ack(name).await;
    }
    // The burst would end after a minute, and cannot.
    store.set_plan(refused(Table::Heads));
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert_eq!(mark_read(&mut gateway, 2, id, 3).await.read_seq, 3);
    store.set_plan(FaultPlan::none());
    tokio::time::sleep(Duration::from_secs(600)).await;
    // What is in memory would be answered from there.
    store.set_plan(FaultPlan { refused_permille: 1000, ..FaultPlan::none() });
    let members = v1::GroupMembersRequest { conversation_id: id.to_bytes(), ..v1::GroupMembersRequest::default() };
    let call = gateway.call::<v1::GroupMembersReply>(1, Method::GroupMembers, &members);
    assert!(tokio::time::timeout(Duration::from_secs(30), call).await.is_err());
}

/// Hundreds have come to a small group and left it again: their rows stay, and must not hide those of its members.
#[tokio::test(start_paused = true)]
async fn cursors_are_shown_however_many_have_left() {
    let store = Store::from(Memory::new());
    let world = World::new(store.clone());
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    gateway.open(&world, 2, "zoe", "d").await;
    let id = group(&mut gateway, &["zoe".to_owned()]).await;
    for name in ["m1", "m2"] {
        gateway.send(1, id, message("x", name, name, "", 0)).await;
        gateway.ack(name).await;
    }
    let gone = |table, value: &'static [u8]| {
        let write = move |number: u32| StateWrite {
            table,
            partition: id.to_bytes(),
            key: format!("gone{number:04}").into(),
            value: Some(Bytes::from_static(value)),
            timestamp: 1,
        };
        (0..1_500).map(write).collect::<Vec<_>>()
    };
    store.write(gone(Table::Cursors, b"")).await.unwrap();
    // A member that has left: field 4 of its row.
    store.write(gone(Table::Members, &[0x20, 1])).await.unwrap();
    received(&mut gateway, 2, id, 3).await;
    assert_eq!(mark_read(&mut gateway, 2, id, 2).await.read_seq, 2);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let expected = [v1::MemberCursor { user_id: "zoe".to_owned(), read_seq: 2, received_seq: 3 }];
    assert_eq!(row(&mut gateway, 1, id).await.cursors, expected);
    tokio::time::sleep(Duration::from_secs(1_000)).await;
    assert_eq!(row(&mut gateway, 1, id).await.cursors, expected, "also of a conversation that is not open");
}
