//! The devices of a user: which there are, which are connected, what is stored of them at which cost, and the end of the session of one.

use std::time::Duration;

use im_proto::{
    ConversationId, InstanceId, ShardCount, StatusCode, limits,
    method::Method,
    v1::{self, gateway_message::Message as Up, router_message::Message as Down},
};
use im_registry::{AnyRegistry, Reach, Registry as _};
use im_router::{Ended, RouterConfig};
use im_storage::{Directory as _, FaultPlan, Memory, StateRow, Store, Table};
use prost::Message as _;

use crate::{
    lifecycle::faulty,
    support::{CLUSTER, Mesh, TestGateway, World, user},
};

fn world() -> World {
    World::new(Store::from(Memory::new()))
}

/// What is told of a device: id, platform, client, whether it is connected.
type Told = (String, String, String, bool);

async fn list(gateway: &mut TestGateway, session: u64) -> Vec<v1::Device> {
    let reply: Result<v1::DeviceListReply, _> =
        gateway.call(session, Method::DeviceList, &v1::DeviceListRequest {}).await;
    reply.unwrap().devices
}

fn told(devices: &[v1::Device]) -> Vec<Told> {
    let told = |device: &v1::Device| {
        let client = format!("{} {}", device.client_name, device.client_version).trim().to_owned();
        (device.device_id.clone(), device.platform.clone(), client, device.connected)
    };
    devices.iter().map(told).collect()
}

fn names(devices: &[v1::Device]) -> Vec<&str> {
    devices.iter().map(|device| device.device_id.as_str()).collect()
}

async fn kick(gateway: &mut TestGateway, session: u64, device: &str) -> Result<bool, StatusCode> {
    let request = v1::DeviceKickRequest { device_id: device.to_owned() };
    let reply = gateway.call::<v1::DeviceKickReply>(session, Method::DeviceKick, &request).await;
    reply.map(|reply| reply.was_connected).map_err(|status| StatusCode::from_number(status.code).unwrap())
}

/// Sessions that were told to go, and why.
async fn kicked(gateway: &mut TestGateway) -> Vec<(u64, u32)> {
    gateway.gather().await;
    let kick = |message: &Down| match message {
        Down::Kick(kick) => Some((kick.session_id, kick.status.as_ref().map_or(0, |status| status.code))),
        _ => None,
    };
    gateway.inbox.drain(..).filter_map(|message| kick(&message)).collect()
}

const KICKED: u32 = StatusCode::KickedByAnotherDevice.number();

/// A session of a client that says what it is.
async fn open(gateway: &mut TestGateway, world: &World, session_id: u64, who: [&str; 3], client: &str) {
    let [user, device, platform] = who;
    let (client_name, client_version) = client.split_once(' ').unwrap_or((client, ""));
    let open = v1::SessionOpen {
        session_id,
        token: world.token(user, device, platform),
        client_name: client_name.to_owned(),
        client_version: client_version.to_owned(),
        opened_at_ms: world.environment.clock.now().as_millis(),
        ..v1::SessionOpen::default()
    };
    gateway.push(vec![Up::Open(open)]).await;
    let opened = |message: &Down| matches!(message, Down::Opened(opened) if opened.session_id == session_id);
    gateway.expect("session opened", |message| opened(message).then_some(())).await;
}

async fn close(gateway: &mut TestGateway, session_id: u64) {
    gateway.push(vec![Up::Close(v1::SessionClose { session_id })]).await;
}

async fn rows(world: &World, name: &str) -> Vec<StateRow> {
    let self_id = CLUSTER.self_id(&user(name));
    world.store.scan(Table::Devices, self_id.as_bytes(), None, 1_000).await.unwrap()
}

/// Until there are so many rows of a user.
async fn until_rows(world: &World, name: &str, count: usize) {
    for _ in 0..1_000 {
        if rows(world, name).await.len() == count {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{} rows of {name}, not {count}", rows(world, name).await.len());
}

#[tokio::test(start_paused = true)]
async fn the_list_tells_of_every_device_what_its_client_is_and_whether_it_is_connected() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let (mut one, mut other) = (world.gateway("g1", &router).await, world.gateway("g2", &router).await);
    open(&mut one, &world, 1, ["alice", "laptop", "desktop"], "app 1.0").await;
    open(&mut other, &world, 2, ["alice", "pixel", "phone"], "").await;
    open(&mut other, &world, 3, ["bob", "tower", "desktop"], "app 1.0").await;
    let begin = world.environment.clock.now().as_millis();
    let text = |id: &str, platform: &str, client: &str, connected| {
        (id.to_owned(), platform.to_owned(), client.to_owned(), connected)
    };
    // At once, before anything is stored.
    let devices = list(&mut one, 1).await;
    let both = [text("laptop", "desktop", "app 1.0", true), text("pixel", "phone", "", true)];
    assert_eq!(told(&devices), both);
    assert!(devices.iter().all(|device| device.current == (device.device_id == "laptop")));
    until_rows(&world, "alice", 2).await;
    assert_eq!(told(&list(&mut other, 2).await), both);
    tokio::time::sleep(Duration::from_secs(3_000)).await;
    close(&mut one, 1).await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    let away = [text("pixel", "phone", "", true), text("laptop", "desktop", "app 1.0", false)];
    let devices = list(&mut other, 2).await;
    assert_eq!(told(&devices), away);
    let late = |millis: i64, seconds: i64| (millis - begin - seconds * 1000).abs() < 60_000;
    assert!(late(devices[0].last_seen_ms, 3_300) && late(devices[0].first_seen_ms, 0), "{devices:?}");
    assert!(late(devices[1].last_seen_ms, 3_000) && late(devices[1].first_seen_ms, 0), "{devices:?}");
    // The next owner knows the same.
    assert!(router.stop(Duration::from_secs(30)).await);
    let router = world.router(world.config("r2")).await;
    let mut other = world.link("g2", &router).await;
    open(&mut other, &world, 2, ["alice", "pixel", "phone"], "app 2.0").await;
    let again = list(&mut other, 2).await;
    assert_eq!(told(&again), [text("pixel", "phone", "app 2.0", true), away[1].clone()]);
    assert_eq!(again[1], devices[1]);
    assert_eq!(again[0].first_seen_ms, devices[0].first_seen_ms);
}

#[tokio::test(start_paused = true)]
async fn a_kick_ends_the_session_of_that_device_at_its_gateway_and_no_other() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let (mut one, mut other) = (world.gateway("g1", &router).await, world.gateway("g2", &router).await);
    open(&mut one, &world, 1, ["alice", "laptop", "desktop"], "").await;
    open(&mut other, &world, 2, ["alice", "pixel", "phone"], "").await;
    open(&mut other, &world, 3, ["alice", "t1", "terminal"], "").await;
    open(&mut other, &world, 4, ["bob", "pixel", "phone"], "").await;
    assert_eq!(kick(&mut one, 1, "pixel").await, Ok(true));
    assert_eq!(kicked(&mut other).await, [(2, KICKED)]);
    assert_eq!(kicked(&mut one).await, []);
    // It is over at once, whatever its gateway says later; and there is nothing to end any more.
    assert_eq!(told(&list(&mut one, 1).await).iter().filter(|told| told.3).count(), 2);
    close(&mut other, 2).await;
    assert_eq!(kick(&mut one, 1, "pixel").await, Ok(false));
    tokio::time::sleep(Duration::from_secs(2_000)).await;
    assert_eq!(kick(&mut one, 1, "pixel").await, Ok(false), "it is stored");
    for unknown in ["tower", "Pixel"] {
        assert_eq!(kick(&mut one, 1, unknown).await, Err(StatusCode::NotFound), "{unknown}");
    }
    let long = "x".repeat(limits::ID_BYTES_MAX + 1);
    for malformed in ["", "a b", long.as_str()] {
        assert_eq!(kick(&mut one, 1, malformed).await, Err(StatusCode::Malformed), "{malformed}");
    }
    assert_eq!(kick(&mut other, 4, "laptop").await, Err(StatusCode::NotFound), "a device of somebody else");
    // The one that asks gets its answer, then its end.
    assert_eq!(kick(&mut one, 1, "laptop").await, Ok(true));
    assert_eq!(kicked(&mut one).await, [(1, KICKED)]);
    assert_eq!(kicked(&mut other).await, [], "nobody else was concerned");
}

#[tokio::test(start_paused = true)]
async fn a_kicked_device_may_come_again_with_its_token() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    open(&mut gateway, &world, 1, ["alice", "laptop", "desktop"], "").await;
    open(&mut gateway, &world, 2, ["alice", "pixel", "phone"], "").await;
    assert_eq!(kick(&mut gateway, 1, "pixel").await, Ok(true));
    assert_eq!(kicked(&mut gateway).await, [(2, KICKED)]);
    open(&mut gateway, &world, 3, ["alice", "pixel", "phone"], "").await;
    assert_eq!(kicked(&mut gateway).await, []);
    assert!(list(&mut gateway, 1).await.iter().all(|device| device.connected));
}

/// The shard has moved; the word of a gateway that it has a session is still on its way when the user ends that session.
#[tokio::test(start_paused = true)]
async fn a_session_that_is_announced_after_its_device_was_kicked_is_ended_then() {
    let world = world();
    let first = world.router(world.config("r1")).await;
    let mut one = world.gateway("g1", &first).await;
    open(&mut one, &world, 1, ["alice", "laptop", "desktop"], "").await;
    let phone = one.open_on(&world, 2, "alice", "pixel", "phone").await;
    let tablet = one.open_on(&world, 4, "alice", "tab", "tablet").await;
    until_rows(&world, "alice", 3).await;
    assert!(first.stop(Duration::from_secs(30)).await);
    let second = world.router(world.config("r2")).await;
    let (mut one, mut other) = (world.link("g1", &second).await, world.gateway("g2", &second).await);
    open(&mut other, &world, 1, ["alice", "laptop", "desktop"], "").await;
    assert_eq!(kick(&mut other, 1, "pixel").await, Ok(false));
    assert_eq!(kick(&mut other, 1, "tab").await, Ok(false));
    // The tablet has come again since, so what is announced now is no reason to end it.
    open(&mut other, &world, 5, ["alice", "tab", "tablet"], "").await;
    for opened in [&phone, &tablet] {
        let announce = v1::SessionAnnounce { session_id: opened.session_id, capability: opened.capability.clone() };
        one.push(vec![Up::Announce(announce)]).await;
    }
    assert_eq!(kicked(&mut one).await, [(2, KICKED), (4, StatusCode::TimedOut.number())]);
    assert_eq!(kicked(&mut other).await, []);
    let devices = list(&mut other, 1).await;
    assert_eq!(names(&devices[..2]), ["laptop", "tab"]);
    assert!(devices[..2].iter().all(|device| device.connected) && !devices[2].connected);
}

#[tokio::test(start_paused = true)]
async fn list_and_kick_work_through_another_router_than_the_users() {
    let mesh = Mesh::default();
    let mut world = World { shards: 64, ..world() };
    let mut routers = Vec::new();
    for name in ["r1", "r2"] {
        world.peers = mesh.of(name);
        let router = world.router(world.config(name)).await;
        mesh.add(name, &router);
        routers.push(router);
    }
    let handle = AnyRegistry::from(world.registry.handle("watcher", world.environment.clone()));
    let ids = ["r1", "r2"].map(|name| InstanceId::parse(name).unwrap());
    let mut view = handle.view();
    let is_shared = |view: &im_registry::View| {
        view.claims.len() == 64 && ids.iter().all(|id| view.claims.values().any(|claim| claim.owner == *id))
    };
    let shared = tokio::time::timeout(Duration::from_secs(60), view.wait_for(|view| is_shared(view))).await;
    let shared = shared.expect("both own shards").unwrap().clone();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let self_id: ConversationId = CLUSTER.self_id(&user("alice"));
    let owner = shared.owner(ShardCount::new(64).unwrap().shard_of(&self_id)).unwrap();
    let home = usize::from(*owner == ids[1]);
    // The laptop is at one gateway, which has links to both routers; the phone at another.
    let mut links = [world.gateway("g1", &routers[0]).await, world.link("g1", &routers[1]).await];
    let mut phones = world.gateway("g2", &routers[home]).await;
    let opened = links[home].open_on(&world, 1, "alice", "laptop", "desktop").await;
    phones.open_on(&world, 7, "alice", "pixel", "phone").await;
    let present = v1::SessionPresent { session_id: 1, capability: opened.capability };
    let elsewhere = &mut links[1 - home];
    elsewhere.push(vec![Up::Present(present)]).await;
    assert_eq!(names(&list(elsewhere, 1).await), ["laptop", "pixel"]);
    assert_eq!(kick(elsewhere, 1, "pixel").await, Ok(true));
    assert_eq!(kicked(&mut phones).await, [(7, KICKED)]);
    assert_eq!(kick(elsewhere, 1, "pixel").await, Ok(false));
    assert_eq!(kick(elsewhere, 1, "tower").await, Err(StatusCode::NotFound));
}

#[tokio::test(start_paused = true)]
async fn a_device_that_comes_and_goes_is_written_once_in_ten_minutes() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    open(&mut gateway, &world, 1, ["alice", "pixel", "phone"], "app 1.0").await;
    until_rows(&world, "alice", 1).await;
    let (mut before, mut written) = (rows(&world, "alice").await, 0);
    let minutes = 60;
    for number in 0..minutes * 6 {
        close(&mut gateway, number + 1).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        open(&mut gateway, &world, number + 2, ["alice", "pixel", "phone"], "app 1.0").await;
        tokio::time::sleep(Duration::from_secs(7)).await;
        let now = rows(&world, "alice").await;
        written += usize::from(now != before);
        before = now;
    }
    assert!((3..=6).contains(&written), "{written} writes in an hour with 360 reconnects");
}

#[tokio::test(start_paused = true)]
async fn the_row_of_a_device_that_stays_connected_is_an_hour_old_at_most() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open_on(&world, 1, "alice", "pixel", "phone").await;
    until_rows(&world, "alice", 1).await;
    let mut written = Vec::new();
    for _ in 0..36 {
        tokio::time::sleep(Duration::from_secs(600)).await;
        written.push(rows(&world, "alice").await[0].timestamp);
        let now = u64::try_from(world.environment.clock.now().as_millis()).unwrap();
        assert!(now - written.last().unwrap() <= 4_200_000, "an hour and a round");
    }
    written.dedup();
    assert!(written.len() <= 7, "{} writes in six hours", written.len());
}

#[tokio::test(start_paused = true)]
async fn a_storm_of_new_devices_is_stored_at_a_pace_and_shown_at_once() {
    const USERS: u64 = 400;
    let mut world = world();
    let store = faulty(&mut world);
    // Until all are there, so that they wait together.
    store.set_plan(FaultPlan { refused_table: Some(Table::Devices), ..FaultPlan::none() });
    let router = world.router(RouterConfig { workers: 1, ..world.config("r1") }).await;
    let mut gateway = world.gateway("g1", &router).await;
    let name = |number: u64| format!("user{number}");
    let opens = (0..USERS).map(|number| {
        Up::Open(v1::SessionOpen {
            session_id: number + 1,
            token: world.token(&name(number), "d", "phone"),
            opened_at_ms: world.environment.clock.now().as_millis(),
            ..v1::SessionOpen::default()
        })
    });
    gateway.push(opens.collect()).await;
    for _ in 0..USERS {
        gateway.expect("session opened", |message| matches!(message, Down::Opened(_)).then_some(())).await;
    }
    assert_eq!(names(&list(&mut gateway, USERS).await), ["d"]);
    store.set_plan(FaultPlan::none());
    let begin = tokio::time::Instant::now();
    let mut stored = 0;
    while stored < USERS {
        tokio::time::sleep(Duration::from_millis(500)).await;
        stored = 0;
        for number in 0..USERS {
            stored += rows(&world, &name(number)).await.len() as u64;
        }
        // 128 users a tick.
        let ticks = begin.elapsed().as_millis() as u64 / 500 + 1;
        assert!(stored <= ticks * 128, "{stored} after {:?}", begin.elapsed());
        assert!(begin.elapsed() < Duration::from_secs(60), "{stored} stored");
    }
}

#[tokio::test(start_paused = true)]
async fn a_user_has_a_bounded_number_of_devices_and_the_one_seen_longest_ago_is_forgotten() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    open(&mut gateway, &world, 1, ["alice", "first", "terminal"], "").await;
    let count = limits::DEVICES_MAX as u64 + 20;
    for number in 0..count {
        open(&mut gateway, &world, number + 2, ["alice", &format!("d{number}"), "terminal"], "").await;
        close(&mut gateway, number + 2).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(rows(&world, "alice").await.len(), limits::DEVICES_MAX);
    let devices = list(&mut gateway, 1).await;
    assert_eq!((devices.len(), devices[0].device_id.as_str()), (limits::DEVICES_MAX, "first"), "it is connected");
    let newest: Vec<String> = (21..count).rev().map(|number| format!("d{number}")).collect();
    assert_eq!(names(&devices[1..]), newest);
    assert_eq!(kick(&mut gateway, 1, "d20").await, Err(StatusCode::NotFound));
    assert_eq!(kick(&mut gateway, 1, "d21").await, Ok(false));
}

#[tokio::test(start_paused = true)]
async fn devices_that_cannot_be_stored_are_listed_and_come_later() {
    let mut world = world();
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    store.set_plan(FaultPlan { refused_table: Some(Table::Devices), ..FaultPlan::none() });
    open(&mut gateway, &world, 1, ["alice", "laptop", "desktop"], "app 1.0").await;
    open(&mut gateway, &world, 2, ["alice", "pixel", "phone"], "app 1.0").await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    close(&mut gateway, 2).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(rows(&world, "alice").await, []);
    let devices = list(&mut gateway, 1).await;
    assert_eq!(names(&devices), ["laptop", "pixel"]);
    assert!(devices.iter().all(|device| device.client_name == "app" && device.first_seen_ms > 0));
    assert_eq!(kick(&mut gateway, 1, "pixel").await, Ok(false), "it is known");
    store.set_plan(FaultPlan::none());
    until_rows(&world, "alice", 2).await;
    assert_eq!(told(&list(&mut gateway, 1).await), told(&devices));
}

/// An owner that was fenced and does not know it yet says nothing of what it remembers, and ends nothing.
#[tokio::test(start_paused = true)]
async fn past_the_lease_deadline_no_device_is_listed_or_kicked_from_memory_alone() {
    for method in [Method::DeviceList, Method::DeviceKick] {
        let world = world();
        let handle = world.registry.handle("r1", world.environment.clone());
        let first = world.router_on(world.config("r1"), handle.clone().into()).await;
        let mut gateway = world.gateway("g1", &first).await;
        open(&mut gateway, &world, 1, ["alice", "laptop", "desktop"], "").await;
        open(&mut gateway, &world, 2, ["alice", "pixel", "phone"], "").await;
        handle.set_reach(Reach::Refused);
        tokio::time::sleep(Duration::from_secs(12)).await;
        let second = world.router(world.config("r2")).await;
        let mut other = world.gateway("g2", &second).await;
        open(&mut other, &world, 3, ["alice", "tab", "tablet"], "").await;
        gateway.gather().await;
        gateway.inbox.clear();
        // What the list is not asked for it ignores.
        let request = v1::DeviceKickRequest { device_id: "pixel".to_owned() }.encode_to_vec().into();
        let call = v1::Call { request_id: 900, method: method.number(), request };
        gateway.push(vec![Up::Call(v1::SessionCall { session_id: 1, call: Some(call) })]).await;
        let mut ended = first.ended();
        let why = tokio::time::timeout(Duration::from_secs(60), ended.wait_for(Option::is_some)).await;
        let why = why.expect("it asks whether it is fenced").unwrap().clone();
        assert_eq!(why, Some(Ended::Fenced), "{method:?}");
        gateway.gather().await;
        for told in &gateway.inbox {
            match told {
                Down::CallReply(reply) => {
                    let code = reply.status.as_ref().map(|status| status.code);
                    assert_eq!(code, Some(StatusCode::Unavailable.number()), "{method:?}");
                }
                Down::Kick(_) => panic!("{method:?}: {told:?}"),
                _ => {}
            }
        }
    }
}

/// Who was kicked, came again at another router and came back with the shard was not kicked since.
#[tokio::test(start_paused = true)]
async fn a_kick_ends_no_session_that_began_while_another_router_had_the_shard() {
    let mesh = Mesh::default();
    let mut world = World { shards: 64, peers: mesh.of("r1"), ..world() };
    let first = world.router(world.config("r1")).await;
    mesh.add("r1", &first);
    let mut one = world.gateway("g1", &first).await;
    let users: Vec<String> = (0..12).map(|number| format!("user{number}")).collect();
    for (number, name) in (0..).zip(&users) {
        open(&mut one, &world, 100 + number, [name, "laptop", "desktop"], "").await;
        open(&mut one, &world, 200 + number, [name, "pixel", "phone"], "").await;
        assert_eq!(kick(&mut one, 100 + number, "pixel").await, Ok(true));
    }
    assert_eq!(kicked(&mut one).await.len(), users.len());
    world.peers = mesh.of("r2");
    let second = world.router(world.config("r2")).await;
    mesh.add("r2", &second);
    tokio::time::sleep(Duration::from_secs(20)).await;
    let handle = AnyRegistry::from(world.registry.handle("watcher", world.environment.clone()));
    let view = handle.view().borrow().clone();
    let id = InstanceId::parse("r2").unwrap();
    let shard = |name: &str| ShardCount::new(64).unwrap().shard_of(&CLUSTER.self_id(&user(name)));
    let moved: Vec<&String> = users.iter().filter(|name| view.owner(shard(name)) == Some(&id)).collect();
    assert!(!moved.is_empty());
    let mut other = world.gateway("g2", &second).await;
    let mut phones = Vec::new();
    for (number, name) in (300..).zip(&moved) {
        phones.push(other.open_on(&world, number, name, "pixel", "phone").await);
    }
    assert!(second.stop(Duration::from_secs(30)).await);
    tokio::time::sleep(Duration::from_secs(20)).await;
    let mut other = world.link("g2", &first).await;
    for opened in &phones {
        let announce = v1::SessionAnnounce { session_id: opened.session_id, capability: opened.capability.clone() };
        other.push(vec![Up::Announce(announce)]).await;
    }
    assert_eq!(kicked(&mut other).await, []);
    for opened in &phones {
        assert!(list(&mut other, opened.session_id).await.iter().any(|device| device.current && device.connected));
    }
}

/// What waits for the damaged user waits no longer with the others of its batch.
#[tokio::test(start_paused = true)]
async fn one_users_damaged_rows_keep_nobody_elses_devices_unwritten() {
    let mut world = world();
    let store = faulty(&mut world);
    let router = world.router(RouterConfig { workers: 1, ..world.config("r1") }).await;
    let mut gateway = world.gateway("g1", &router).await;
    let damaged_partition = Some(CLUSTER.self_id(&user("bob")).to_bytes());
    store.set_plan(FaultPlan { damaged_partition, ..FaultPlan::none() });
    for (session, name) in [(1, "alice"), (2, "bob"), (3, "carol")] {
        open(&mut gateway, &world, session, [name, "laptop", "desktop"], "").await;
    }
    until_rows(&world, "carol", 1).await;
    until_rows(&world, "alice", 1).await;
    store.set_plan(FaultPlan::none());
    assert_eq!(rows(&world, "bob").await, []);
    assert_eq!(names(&list(&mut gateway, 2).await), ["laptop"]);
}
