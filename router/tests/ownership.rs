//! Take-over: what a router has acknowledged is there for the next one, and a router that was fenced acknowledges nothing.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use im_proto::{
    ConversationId, Epoch, ShardId, StatusCode, Timestamp, UserId, method::Method, v1,
    v1::router_message::Message as Down,
};
use im_registry::{AnyRegistry, InProcessHandle, Reach, Registry as _};
use im_router::{Ended, Router};
use im_storage::{
    AppendRequest, Batch, Directory as _, FaultPlan, Memory, MessageLog as _, Row, StateWrite, Store, Table,
    noted_claim,
};
use prost::Message as _;

use crate::{
    lifecycle::faulty,
    moves::user_of,
    support::{CLUSTER, Mesh, TestGateway, World, decode, message, to, user},
};

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

#[tokio::test(start_paused = true)]
async fn past_the_lease_deadline_even_that_there_is_nothing_more_waits_for_a_fence_read() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let handle = world.registry.handle("r1", world.environment.clone());
    let router = world.router_on(world.config("r1"), handle.clone().into()).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m1", "m1", "", 0)).await;
    gateway.ack("m1").await;
    // Nothing is read from the store for it: the head is in memory.
    let beyond = v1::HistoryRequest { target: to(id), from: 2, ..v1::HistoryRequest::default() };
    let nothing: v1::HistoryReply = gateway.call(1, Method::MessageHistory, &beyond).await.unwrap();
    assert_eq!((nothing.head, nothing.entries.len()), (1, 0));
    handle.set_reach(Reach::Refused);
    assert!(router.lease_left() > Duration::ZERO);
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(router.lease_left(), Duration::ZERO);
    store.set_plan(FaultPlan { refused_permille: 1000, ..FaultPlan::none() });
    let early = gateway.call::<v1::HistoryReply>(1, Method::MessageHistory, &beyond);
    let early = tokio::time::timeout(Duration::from_secs(5), early).await;
    assert!(early.is_err(), "another owner may have gone on: {early:?}");
    store.set_plan(FaultPlan::none());
    let nothing: v1::HistoryReply = gateway.call(1, Method::MessageHistory, &beyond).await.unwrap();
    assert_eq!((nothing.head, nothing.entries.len()), (1, 0));
}

/// An owner that was fenced and does not know it yet: whatever it is asked past its lease, it says nothing of what it remembers.
#[tokio::test(start_paused = true)]
async fn past_the_lease_deadline_no_answer_and_no_refusal_comes_from_memory_alone() {
    // Each question finds out that the router is fenced, so each gets a world of its own.
    for question in ["read", "read of a stranger", "signal", "signal of a stranger", "send of a stranger", "invitation"]
    {
        let world = World::new(Store::from(Memory::new()));
        let handle = world.registry.handle("r1", world.environment.clone());
        let first = world.router_on(world.config("r1"), handle.clone().into()).await;
        let mut gateway = world.gateway("g1", &first).await;
        gateway.open(&world, 1, "alice", "d").await;
        gateway.open(&world, 2, "carol", "d").await;
        let create =
            v1::GroupCreateRequest { key: "k".into(), name: "team".to_owned(), members: vec!["bob".to_owned()] };
        let created: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &create).await.unwrap();
        let id = ConversationId::from_slice(&created.conversation_id).unwrap();
        let read = v1::MarkReadRequest { target: to(id), seq: 1 };
        gateway.call::<v1::MarkReadReply>(1, Method::ConversationMarkRead, &read).await.unwrap();
        handle.set_reach(Reach::Refused);
        tokio::time::sleep(Duration::from_secs(12)).await;
        let second = world.router(world.config("r2")).await;
        let mut other = world.gateway("g2", &second).await;
        other.open(&world, 1, "alice", "d").await;
        let invite = v1::GroupInviteRequest {
            conversation_id: id.to_bytes(),
            members: vec!["carol".to_owned()],
            ..v1::GroupInviteRequest::default()
        };
        other.call::<v1::GroupInviteReply>(1, Method::GroupInvite, &invite).await.unwrap();
        assert!(first.ended().borrow().is_none(), "it does not know yet");
        let signal = v1::SignalRequest {
            target: to(id),
            signal: Some(v1::signal_request::Signal::Typing(v1::Typing::default())),
        };
        let session_id = if question.ends_with("stranger") { 2 } else { 1 };
        let call = |method: Method, request: Vec<u8>| {
            let call = v1::Call { request_id: 900, method: method.number(), request: request.into() };
            v1::gateway_message::Message::Call(v1::SessionCall { session_id, call: Some(call) })
        };
        gateway.gather().await;
        gateway.inbox.clear();
        match question {
            "send of a stranger" => gateway.send(2, id, message("x", "c1", "hello", "", 0)).await,
            "invitation" => {
                let nobody_new = v1::GroupInviteRequest { members: vec!["bob".to_owned()], ..invite };
                gateway.push(vec![call(Method::GroupInvite, nobody_new.encode_to_vec())]).await;
            }
            "read" | "read of a stranger" => {
                gateway.push(vec![call(Method::ConversationMarkRead, read.encode_to_vec())]).await;
            }
            _ => gateway.push(vec![call(Method::ConversationSignal, signal.encode_to_vec())]).await,
        }
        let mut ended = first.ended();
        let why = ended.wait_for(Option::is_some).await.unwrap().clone();
        assert_eq!(why, Some(Ended::Fenced), "{question}");
        gateway.gather().await;
        let unavailable = |reply: &v1::CallReply| {
            reply.status.as_ref().is_some_and(|status| status.code == StatusCode::Unavailable.number())
        };
        for told in &gateway.inbox {
            match told {
                Down::CallReply(reply) => assert!(unavailable(reply), "{question}: {reply:?}"),
                Down::SendResult(_) | Down::Deliver(_) => panic!("{question}: {told:?}"),
                _ => {}
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_committed_before_the_busy_row_of_its_burst_is_confirmed() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.open(&world, 2, "bob", "b1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    store.set_plan(FaultPlan { refused_table: Some(Table::Busy), ..FaultPlan::none() });
    gateway.send(1, id, message("bob", "m1", "m1", "", 0)).await;
    // The row of the log is confirmed, and a new owner would not look for it: the head row says that there is nothing.
    tokio::time::sleep(Duration::from_secs(5)).await;
    gateway.gather().await;
    let told = |message: &Down| matches!(message, Down::SendResult(_) | Down::Deliver(_));
    assert!(!gateway.inbox.iter().any(told), "{:?}", gateway.inbox);
    store.set_plan(FaultPlan::none());
    assert_eq!(gateway.ack("m1").await.seq, 1);
}

/// So that whoever starts on a registry that has lost the claim finds out.
#[tokio::test(start_paused = true)]
async fn a_shard_is_served_once_the_store_knows_of_its_claim() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    store.set_plan(FaultPlan { refused_table: Some(Table::Cluster), ..FaultPlan::none() });
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    let early = tokio::time::timeout(Duration::from_secs(20), gateway.open(&world, 1, "alice", "a1")).await;
    assert!(early.is_err(), "{early:?}");
    store.set_plan(FaultPlan::none());
    gateway
        .expect("session opened", |message| match message {
            Down::Opened(opened) => Some(opened.session_id),
            _ => None,
        })
        .await;
    let registry = AnyRegistry::from(world.registry.handle("observer", world.environment.clone()));
    let greatest = registry.view().borrow().claims.values().map(|claim| claim.epoch).max();
    assert_eq!(Some(noted_claim(store.store()).await.unwrap()), greatest);
}

async fn is_returned(gateway: &mut TestGateway, id: &'static str) {
    gateway
        .expect("send returned", |message| match message {
            Down::SendReturned(returned) if returned.client_message_id == id => Some(()),
            _ => None,
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_later_epoch_in_one_conversation_refuses_the_whole_shard_and_no_other() {
    let store = Store::from(Memory::new());
    let world = World::new(store.clone());
    let shards = world.config("any").shards;
    let alice = user("alice");
    let own = shards.shard_of(&CLUSTER.self_id(&alice));
    let peers_in = |wanted: &dyn Fn(ShardId) -> bool| -> Vec<String> {
        let names = (0..).map(|n| format!("peer{n}"));
        names.filter(|name| wanted(shards.shard_of(&CLUSTER.direct_id(&alice, &user(name))))).take(2).collect()
    };
    let damaged = (0..crate::support::SHARDS).map(ShardId).find(|shard| *shard != own).unwrap();
    let (bad, good) = (peers_in(&|shard| shard == damaged), peers_in(&|shard| shard == own));
    let id_of = |name: &str| CLUSTER.direct_id(&user("alice"), &user(name));
    let row = Row {
        seq: 1,
        counted: 1,
        sender: Some(alice.clone()),
        client_message_id: "x".into(),
        sent_at: Timestamp::default(),
        kind: v1::EntryKind::Message,
        flags: 1,
        body: Bytes::new(),
        meta: Bytes::new(),
    };
    let batch = Batch { conversation: id_of(&bad[0]), epoch: Epoch(u64::MAX >> 8), committed: 0, rows: vec![row] };
    store.submit(vec![AppendRequest { token: 1, batch: Arc::new(batch) }], Arc::new(|_| {}));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.send(1, id_of(&bad[1]), message(&bad[1], "before", "before", "", 0)).await;
    assert_eq!(gateway.ack("before").await.seq, 1);
    // Whoever wrote under the later epoch may be alive, and own every conversation of the shard.
    let read = v1::HistoryRequest { target: to(id_of(&bad[0])), from: 1, ..v1::HistoryRequest::default() };
    let reply = gateway.call::<v1::HistoryReply>(1, Method::MessageHistory, &read).await;
    assert_eq!(reply.map_err(|status| status.code), Err(StatusCode::Unavailable.number()));
    for (name, id) in [(&bad[1], "after"), (&bad[0], "same")] {
        gateway.send(1, id_of(name), message(name, id, id, "", 1)).await;
        is_returned(&mut gateway, id).await;
    }
    gateway.send(1, id_of(&good[0]), message(&good[0], "other", "other", "", 0)).await;
    assert_eq!(gateway.ack("other").await.seq, 1);
}

#[tokio::test(start_paused = true)]
async fn a_head_row_without_its_log_or_without_sense_is_an_alarm_and_never_a_start_at_1() {
    // Head 5, and bytes that are no protobuf.
    for value in [&[0x08, 0x05][..], &[0xff]] {
        let store = Store::from(Memory::new());
        let world = World::new(store.clone());
        let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
        let head = StateWrite {
            table: Table::Heads,
            partition: id.to_bytes(),
            key: Bytes::new(),
            value: Some(Bytes::copy_from_slice(value)),
            timestamp: 5,
        };
        store.write(vec![head]).await.unwrap();
        let router = world.router(world.config("r1")).await;
        let mut gateway = world.gateway("g1", &router).await;
        gateway.open(&world, 1, "alice", "a1").await;
        gateway.send(1, id, message("bob", "m1", "m1", "", 0)).await;
        assert_eq!(gateway.ack("m1").await.status.unwrap().code, StatusCode::Unavailable.number(), "{value:?}");
        let row = store.read_range(id, 1, 10, 10).await.unwrap();
        assert!(row.is_empty(), "nothing was written: {row:?}");
    }
}

/// Two routers and a gateway linked to both; a conversation of the first router between a user of it and one of the second.
struct Pair {
    world: World,
    mesh: Mesh,
    first: InProcessHandle,
    routers: [Router; 2],
    sender: TestGateway,
    receiver: TestGateway,
    id: ConversationId,
    bob: UserId,
}

impl Pair {
    async fn new() -> Self {
        let mut world = World::new(Store::from(Memory::new()));
        let mesh = Mesh::default();
        let handles = ["r1", "r2"].map(|name| world.registry.handle(name, world.environment.clone()));
        let mut routers = Vec::new();
        for (name, handle) in ["r1", "r2"].into_iter().zip(&handles) {
            world.peers = mesh.of(name);
            let router = world.router_on(world.config(name), handle.clone().into()).await;
            mesh.add(name, &router);
            routers.push(router);
        }
        let routers: [Router; 2] = routers.try_into().ok().unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
        let registry = AnyRegistry::from(handles[0].clone());
        let alice = user_of(&world, &registry, "r1", |user| CLUSTER.self_id(user));
        let bob = (0..1000).map(|n| user(&format!("user{n}"))).find(|user| {
            let (view, shards) = (registry.view().borrow().clone(), world.config("any").shards);
            let owner = |id: &ConversationId| view.owner(shards.shard_of(id)).map(|owner| owner.as_str().to_owned());
            owner(&CLUSTER.self_id(user)).as_deref() == Some("r2")
                && owner(&CLUSTER.direct_id(&alice, user)).as_deref() == Some("r1")
        });
        let bob = bob.expect("such a user");
        let mut sender = world.gateway("g1", &routers[0]).await;
        let mut receiver = world.link("g1", &routers[1]).await;
        sender.open(&world, 1, alice.as_str(), "a1").await;
        receiver.open(&world, 2, bob.as_str(), "b1").await;
        let id = CLUSTER.direct_id(&alice, &bob);
        let [first, _] = handles;
        Self { world, mesh, first, routers, sender, receiver, id, bob }
    }

    async fn send(&mut self, name: &'static str, after: &'static str) {
        self.sender.send(1, self.id, message(self.bob.as_str(), name, name, after, 0)).await;
        self.sender.ack(name).await;
    }

    /// The ids of the conversation's messages that came to the receiver since the last time.
    async fn received(&mut self) -> Vec<Bytes> {
        self.receiver.gather().await;
        let frames = self.receiver.inbox.drain(..).filter_map(|message| match message {
            Down::Deliver(deliver) => Some(deliver.frame),
            _ => None,
        });
        let messages = frames.flat_map(decode).filter(|message| message.conversation_id == self.id.to_bytes());
        messages.map(|message| message.client_message_id).collect()
    }

    /// Whether the conversation's busy row stands: the next owner would open it unasked.
    async fn is_busy(&self) -> bool {
        let shard = self.world.config("any").shards.shard_of(&self.id);
        self.world.store.read(Table::Busy, &shard.0.to_be_bytes(), self.id.as_bytes()).await.unwrap().is_some()
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_ends_once_its_entries_have_arrived_at_the_other_routers() {
    let mut pair = Pair::new().await;
    pair.send("m1", "").await;
    assert_eq!(pair.received().await, ["m1"]);
    tokio::time::sleep(Duration::from_secs(65)).await;
    assert!(!pair.is_busy().await, "everything has arrived");
    pair.mesh.cut("r1", "r2");
    pair.send("m2", "m1").await;
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert!(pair.is_busy().await, "m2 waits for r2");
    pair.mesh.mend();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(pair.received().await, ["m2"]);
    assert!(!pair.is_busy().await, "m2 has arrived");
}

/// Also if the conversation was dropped from memory meanwhile.
#[tokio::test(start_paused = true)]
async fn a_burst_of_a_conversation_that_left_memory_ends_when_its_entries_have_arrived() {
    let mut pair = Pair::new().await;
    pair.send("m0", "").await;
    assert_eq!(pair.received().await, ["m0"]);
    pair.mesh.cut("r1", "r2");
    pair.send("m1", "m0").await;
    tokio::time::sleep(Duration::from_secs(8 * 60)).await;
    assert!(pair.is_busy().await);
    let described = pair.routers[0].describe().await.join("\n");
    assert!(described.contains("1 conversations left memory"), "{described}");
    pair.mesh.mend();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(pair.received().await, ["m1"]);
    assert!(!pair.is_busy().await);
}

/// However long ago: also if the conversation was dropped from memory meanwhile.
#[tokio::test(start_paused = true)]
async fn what_waited_for_a_router_when_its_owner_died_is_delivered_by_the_next_owner() {
    for minutes in [2, 8] {
        let mut pair = Pair::new().await;
        // Else its own effect, the entry in bob's list, would hold the burst.
        pair.send("m0", "").await;
        assert_eq!(pair.received().await, ["m0"]);
        pair.mesh.cut("r1", "r2");
        pair.send("m1", "m0").await;
        pair.send("m2", "m1").await;
        tokio::time::sleep(Duration::from_secs(60 * minutes)).await;
        assert!(pair.received().await.is_empty());
        pair.first.set_reach(Reach::Refused);
        tokio::time::sleep(Duration::from_secs(20)).await;
        // A client asks for what is before it.
        assert_eq!(pair.received().await, ["m2"], "after {minutes} minutes");
    }
}
