//! Shards that move between live routers: nobody is fenced, so each side must stop by itself.

use std::{sync::Arc, time::Duration};

use im_proto::{
    ConversationId, InstanceId, ShardId, UserId,
    link::channel::{Connecting, Connector, LinkError, LinkItem, PeerEnd, pair},
    shard::rendezvous_owner,
    v1::{self, peer_message::Message as Peer, router_message::Message as Down},
};
use im_registry::{AnyRegistry, InProcessHandle, Reach, Registry as _};
use im_router::Router;
use im_storage::{FaultPlan, Faulty, Memory, Store, Table};
use tokio::sync::mpsc;

use crate::support::{CLUSTER, SHARDS, TestGateway, World, message, user};

/// The first of many users whose conversation belongs to a router.
pub fn user_of(
    world: &World,
    registry: &AnyRegistry,
    owner: &str,
    conversation: impl Fn(&UserId) -> ConversationId,
) -> UserId {
    let (view, shards) = (registry.view().borrow().clone(), world.config("any").shards);
    let owner = InstanceId::parse(owner).unwrap();
    (0..1000)
        .map(|n| user(&format!("user{n}")))
        .find(|user| view.owner(shards.shard_of(&conversation(user))) == Some(&owner))
        .expect("a user of this router")
}

fn faulty(world: &mut World, refused_permille: u32) -> Faulty {
    let plan = FaultPlan { refused_permille, ..FaultPlan::none() };
    let store = Faulty::new(world.store.clone(), 1, plan, world.environment.tasks.clone());
    world.store = Store::from(store.clone());
    store
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_was_given_up_before_it_was_served_is_not_served_later() {
    let memory = Store::from(Memory::new());
    let mut world = World::new(memory.clone());
    // The first router claims all shards, but cannot read which conversations are busy.
    let store = faulty(&mut world, 1000);
    let first = world.router(world.config("r1")).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.store = memory;
    let _second = world.router(world.config("r2")).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    store.set_plan(FaultPlan::none());
    tokio::time::sleep(Duration::from_secs(5)).await;
    let registry = AnyRegistry::from(world.registry.handle("observer", world.environment.clone()));
    let alice = user_of(&world, &registry, "r1", |user| CLUSTER.self_id(user));
    let bob = user_of(&world, &registry, "r2", |user| CLUSTER.direct_id(&alice, user));
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, alice.as_str(), "a1").await;
    gateway.send(1, CLUSTER.direct_id(&alice, &bob), message(bob.as_str(), "m1", "m1", "", 0)).await;
    gateway
        .expect("send returned", |message| match message {
            Down::SendReturned(returned) if returned.client_message_id == "m1" => Some(()),
            _ => None,
        })
        .await;
}

/// Hands the far ends of dialled links to the test.
struct Dialled(mpsc::Sender<PeerEnd>);

impl Connector<PeerEnd> for Dialled {
    fn connect(&self, to: &InstanceId, _address: &str) -> Connecting<PeerEnd> {
        let (near, far) = pair(64);
        let sent = self.0.try_send(far).map_err(|_| LinkError { to: to.clone(), reason: "one is enough".to_owned() });
        Box::pin(async move { sent.map(|()| near) })
    }
}

pub fn peer_hello(name: &str) -> LinkItem<v1::PeerBatch> {
    LinkItem::Hello(v1::LinkHello {
        instance_id: name.to_owned(),
        boot_id: 7,
        cluster_id: "im".to_owned(),
        shards: SHARDS,
        ..v1::LinkHello::default()
    })
}

/// A push for a user of a shard, as a router sends it.
fn push(first_number: u64, shard: u32, user: &UserId) -> LinkItem<v1::PeerBatch> {
    let deliver = v1::PeerDeliver { user_ids: vec![user.to_string()], ..v1::PeerDeliver::default() };
    let message = v1::PeerMessage { shard, request_id: 0, message: Some(Peer::Deliver(deliver)) };
    LinkItem::Batch(Arc::new(v1::PeerBatch { first_number, acknowledged_through: 0, messages: vec![message] }))
}

#[tokio::test(start_paused = true)]
async fn a_push_that_comes_to_the_former_owner_ends_in_a_resync_at_the_present_one() {
    let mut world = World::new(Store::from(Memory::new()));
    let _second = world.router(world.config("r2")).await;
    let (dialled, mut links) = mpsc::channel(1);
    world.peers = Arc::new(Dialled(dialled));
    let first = world.router(world.config("r1")).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let registry = AnyRegistry::from(world.registry.handle("observer", world.environment.clone()));
    let bob = user_of(&world, &registry, "r2", |user| CLUSTER.self_id(user));
    let shard = world.config("any").shards.shard_of(&CLUSTER.self_id(&bob));
    let mut to_second = links.recv().await.expect("the first router dials the second");
    assert!(matches!(to_second.receiver.recv().await, Some(LinkItem::Hello(_))));
    to_second.sender.send(peer_hello("r2")).await.unwrap();
    let (third, far) = pair(64);
    first.accept_peer(far);
    third.sender.send(peer_hello("r3")).await.unwrap();
    third.sender.send(push(1, shard.0, &bob)).await.unwrap();
    let batch = tokio::time::timeout(Duration::from_secs(5), to_second.receiver.recv()).await;
    let Ok(Some(LinkItem::Batch(batch))) = batch else { panic!("no resync came: {batch:?}") };
    assert!(matches!(&batch.messages[..], [v1::PeerMessage { shard: named, message: Some(Peer::ResyncShard(_)), .. }]
        if *named == shard.0));
}

#[tokio::test(start_paused = true)]
async fn many_words_of_lost_pushes_make_one_resync_a_session() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let shard = world.config("any").shards.shard_of(&CLUSTER.self_id(&user("alice")));
    let (peer, far) = pair(64);
    router.accept_peer(far);
    peer.sender.send(peer_hello("r2")).await.unwrap();
    for number in 1..=20 {
        let message = Some(Peer::ResyncShard(v1::PeerResyncShard {}));
        let messages = vec![v1::PeerMessage { shard: shard.0, request_id: 0, message }];
        let batch = v1::PeerBatch { first_number: number, acknowledged_through: 0, messages };
        peer.sender.send(LinkItem::Batch(Arc::new(batch))).await.unwrap();
    }
    let resync = |message: &Down| matches!(message, Down::Resync(resync) if resync.session_ids == [1]).then_some(());
    gateway.expect("resync", resync).await;
    gateway.open(&world, 2, "bob", "b1").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    gateway.open(&world, 3, "carol", "c1").await;
    assert!(gateway.inbox.iter().all(|message| resync(message).is_none()), "{:?}", gateway.inbox);
}

#[tokio::test(start_paused = true)]
async fn two_full_directions_of_a_link_do_not_wait_for_each_other() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (mut peer, far) = pair(2);
    router.accept_peer(far);
    peer.sender.send(peer_hello("r2")).await.unwrap();
    // The other side sends all it has before it reads again, as one does whose own sending blocks its receiving.
    let sends = async {
        for number in 1..=50 {
            let request = v1::PeerHeads { user_id: "alice".to_owned(), ..v1::PeerHeads::default() };
            let message = v1::PeerMessage { shard: 0, request_id: number, message: Some(Peer::Heads(request)) };
            let batch = v1::PeerBatch { first_number: number, acknowledged_through: 0, messages: vec![message] };
            peer.sender.send(LinkItem::Batch(Arc::new(batch))).await.unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), sends).await.expect("the router goes on receiving");
    let (mut answers, deadline) = (0, tokio::time::Instant::now() + Duration::from_secs(60));
    while answers < 50 {
        match tokio::time::timeout_at(deadline, peer.receiver.recv()).await {
            Ok(Some(LinkItem::Batch(batch))) => answers += batch.messages.len(),
            Ok(Some(LinkItem::Hello(_))) => {}
            other => panic!("{answers} answers came, then {other:?}"),
        }
    }
}

/// A router that has all shards, on a store and a registry that can fail, and a session of alice there.
struct Alone {
    world: World,
    store: Faulty,
    handle: InProcessHandle,
    first: Router,
    gateway: TestGateway,
}

async fn alone() -> Alone {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world, 0);
    let handle = world.registry.handle("r1", world.environment.clone());
    let first = world.router_on(world.config("r1"), handle.clone().into()).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "a1").await;
    Alone { world, store, handle, first, gateway }
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_could_not_be_given_up_is_given_up_later() {
    let Alone { world, store, handle, first: _first, mut gateway } = alone().await;
    // Every shard has something in flight, so that the move waits for the store.
    let delay = Duration::from_secs(3)..=Duration::from_secs(3);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    for n in 0..32 {
        let id = CLUSTER.direct_id(&user("alice"), &user(&format!("bob{n}")));
        gateway.send(1, id, message(&format!("bob{n}"), "m1", "m1", "", 0)).await;
    }
    tokio::time::sleep(Duration::from_secs(120)).await;
    for n in 0..32 {
        let id = CLUSTER.direct_id(&user("alice"), &user(&format!("bob{n}")));
        gateway.send(1, id, message(&format!("bob{n}"), "m2", "m2", "", 1)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let _second = world.router(world.config("r2")).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    handle.set_reach(Reach::Refused);
    tokio::time::sleep(Duration::from_secs(6)).await;
    handle.set_reach(Reach::Up);
    store.set_plan(FaultPlan::none());
    tokio::time::sleep(Duration::from_secs(10)).await;
    let registry = AnyRegistry::from(world.registry.handle("observer", world.environment.clone()));
    let view = registry.view().borrow().clone();
    assert!(view.instances.contains_key(&InstanceId::parse("r1").unwrap()), "its lease lives");
    let routers = [InstanceId::parse("r1").unwrap(), InstanceId::parse("r2").unwrap()];
    for shard in world.config("any").shards.shards() {
        assert_eq!(view.owner(shard), rendezvous_owner(shard, routers.iter()), "{shard:?}");
    }
}

/// A peer of alice whose conversation with her is the second router's as soon as there is one.
fn moved_peer(world: &World) -> (UserId, ShardId) {
    let routers = [InstanceId::parse("r1").unwrap(), InstanceId::parse("r2").unwrap()];
    let shards = world.config("any").shards;
    (0..1000)
        .map(|n| user(&format!("user{n}")))
        .map(|peer| (shards.shard_of(&CLUSTER.direct_id(&user("alice"), &peer)), peer))
        .find(|(shard, _)| rendezvous_owner(*shard, routers.iter()) == Some(&routers[1]))
        .map(|(shard, peer)| (peer, shard))
        .expect("a peer whose conversation moves")
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_could_not_be_given_up_is_served_again_only_under_a_greater_epoch() {
    let Alone { world, store, handle, first: _first, mut gateway } = alone().await;
    let (peer, shard) = moved_peer(&world);
    let id = CLUSTER.direct_id(&user("alice"), &peer);
    let registry = AnyRegistry::from(world.registry.handle("observer", world.environment.clone()));
    let epoch = |registry: &AnyRegistry| {
        let claim = registry.view().borrow().claims.get(&shard).cloned().expect("claimed");
        assert_eq!(claim.owner, InstanceId::parse("r1").unwrap());
        claim.epoch
    };
    let before = epoch(&registry);
    gateway.send(1, id, message(peer.as_str(), "m0", "m0", "", 0)).await;
    gateway.ack("m0").await;
    // The release waits for this, and the registry is gone by then.
    let delay = Duration::from_secs(3)..=Duration::from_secs(3);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    gateway.send(1, id, message(peer.as_str(), "m1", "m1", "", 1)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let second = world.router(world.config("r2")).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    handle.set_reach(Reach::Refused);
    store.set_plan(FaultPlan::none());
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(epoch(&registry), before, "the claim stands");
    assert!(second.stop(Duration::from_secs(1)).await);
    handle.set_reach(Reach::Up);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(epoch(&registry) > before);
    gateway.send(1, id, message(peer.as_str(), "m2", "m2", "", 2)).await;
    gateway.ack("m2").await;
}

#[tokio::test(start_paused = true)]
async fn a_shard_whose_writes_are_never_confirmed_holds_back_no_other_and_is_given_up_in_time() {
    let Alone { world, store, first: _first, mut gateway, .. } = alone().await;
    let (peer, stuck) = moved_peer(&world);
    store.set_plan(FaultPlan { refused_table: Some(Table::Busy), ..FaultPlan::none() });
    gateway.send(1, CLUSTER.direct_id(&user("alice"), &peer), message(peer.as_str(), "m1", "m1", "", 0)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let _second = world.router(world.config("r2")).await;
    let registry = AnyRegistry::from(world.registry.handle("observer", world.environment.clone()));
    let routers = [InstanceId::parse("r1").unwrap(), InstanceId::parse("r2").unwrap()];
    let not_moved = || -> Vec<ShardId> {
        let view = registry.view().borrow().clone();
        let shards = world.config("any").shards.shards();
        shards.filter(|shard| view.owner(*shard) != rendezvous_owner(*shard, routers.iter())).collect()
    };
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(not_moved(), [stuck]);
    tokio::time::sleep(Duration::from_secs(17)).await;
    assert_eq!(not_moved(), []);
}

/// The same between routers, on either side.
#[tokio::test(start_paused = true)]
async fn a_peer_link_meant_for_a_former_instance_leaves_the_one_that_serves() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    // A new view would end the link of a router that is in none.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (mut good, far) = pair::<v1::PeerBatch, v1::PeerBatch>(64);
    router.accept_peer(far);
    good.sender.send(peer_hello("r9")).await.unwrap();
    assert!(matches!(good.receiver.recv().await, Some(LinkItem::Hello(_))));
    let (mut stale, far) = pair::<v1::PeerBatch, v1::PeerBatch>(64);
    router.accept_peer(far);
    let LinkItem::Hello(hello) = peer_hello("r9") else { panic!("a hello") };
    let hello = v1::LinkHello { to_instance_id: "r0".to_owned(), ..hello };
    stale.sender.send(LinkItem::Hello(hello)).await.unwrap();
    assert!(matches!(stale.receiver.recv().await, Some(LinkItem::Hello(_))));
    assert!(stale.receiver.recv().await.is_none(), "it is not served");
    let ends = async { while good.receiver.recv().await.is_some() {} };
    assert!(tokio::time::timeout(Duration::from_secs(5), ends).await.is_err(), "the good link was ended");
}

#[tokio::test(start_paused = true)]
async fn a_router_does_not_talk_to_another_one_at_the_address_of_a_peer() {
    let mut world = World::new(Store::from(Memory::new()));
    let _second = world.router(world.config("r2")).await;
    let (dialled, mut links) = mpsc::channel(1);
    world.peers = Arc::new(Dialled(dialled));
    let _first = world.router(world.config("r1")).await;
    let mut link = links.recv().await.unwrap();
    let Some(LinkItem::Hello(hello)) = link.receiver.recv().await else { panic!("no hello") };
    assert_eq!(hello.to_instance_id, "r2");
    link.sender.send(peer_hello("r3")).await.unwrap();
    assert!(link.receiver.recv().await.is_none(), "it talks to r3 as if it were r2");
}
