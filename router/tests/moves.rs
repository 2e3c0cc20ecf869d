//! Shards that move between live routers: nobody is fenced, so each side must stop by itself.

use std::time::Duration;

use im_proto::{ConversationId, InstanceId, UserId, v1::router_message::Message as Down};
use im_registry::{AnyRegistry, Registry as _};
use im_storage::{FaultPlan, Faulty, Memory, Store};

use crate::support::{CLUSTER, World, message, user};

/// The first of many users whose conversation belongs to a router.
fn user_of(
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
