//! Presence for those who watch: who is told of whom, when, through one router and through several, and what an invisible user lets
//! nobody see.

mod order;

use std::time::Duration;

use im_proto::{
    InstanceId, StatusCode, Timestamp, limits,
    method::Method,
    v1::{self, gateway_message::Message as Up, router_message::Message as Down, signal::Signal},
};
use im_registry::{AnyRegistry, InProcessHandle, Reach, Registry as _};
use im_router::{Router, RouterConfig};
use im_storage::{FaultPlan, Faulty, Hot, HotState as _, Memory, MemoryHot, Store};
use prost::Message as _;

use crate::{
    lifecycle::faulty,
    support::{CLUSTER, Mesh, TestGateway, World, message, user},
};

const SECOND: Duration = Duration::from_secs(1);
/// Half a second in which words are gathered, the same until it is known whether somebody is invisible, and the way.
const SOON: Duration = Duration::from_secs(2);
/// That, and the grace.
const GRACE: Duration = Duration::from_secs(7);
/// The next renewal.
const RENEWAL: Duration = Duration::from_secs(31);

/// What a session was told: whose presence, whether online, and when last seen.
type Told = (u64, String, bool, i64);

/// What has come for sessions of a gateway since the last time.
async fn told(gateway: &mut TestGateway) -> Vec<Told> {
    gateway.gather().await;
    let mut told = Vec::new();
    for message in gateway.inbox.drain(..) {
        let Down::Deliver(deliver) = message else { continue };
        let mut input = bytes::BytesMut::from(&deliver.frame[..]);
        while let Some(payload) = im_proto::frame::split_frame(&mut input, 1 << 20).unwrap() {
            let frame = v1::ServerFrame::decode(payload).unwrap().frame;
            let Some(v1::server_frame::Frame::Signal(signal)) = frame else { continue };
            let Some(Signal::Presence(presence)) = signal.signal else { continue };
            assert_eq!(signal.target, None);
            for session in &deliver.session_ids {
                told.push((*session, signal.sender.clone(), presence.online, presence.last_seen_ms));
            }
        }
    }
    told
}

/// The same without times, after a while.
async fn told_after(gateway: &mut TestGateway, wait: Duration) -> Vec<(u64, String, bool)> {
    tokio::time::sleep(wait).await;
    told(gateway).await.into_iter().map(|(session, user, online, _)| (session, user, online)).collect()
}

fn came(session: u64, name: &str) -> (u64, String, bool) {
    (session, name.to_owned(), true)
}

fn went(session: u64, name: &str) -> (u64, String, bool) {
    (session, name.to_owned(), false)
}

async fn try_subscribe(
    gateway: &mut TestGateway,
    session: u64,
    users: &[&str],
) -> Result<Vec<v1::UserPresence>, v1::Status> {
    let request = v1::PresenceSubscribeRequest { user_ids: users.iter().map(|user| (*user).to_owned()).collect() };
    let reply = gateway.call::<v1::PresenceSubscribeReply>(session, Method::PresenceSubscribe, &request).await;
    reply.map(|reply| reply.users)
}

/// Subscribes; gives what was answered: who is online.
async fn subscribe(gateway: &mut TestGateway, session: u64, users: &[&str]) -> Vec<(String, bool)> {
    let users = try_subscribe(gateway, session, users).await.unwrap();
    users.into_iter().map(|user| (user.user_id, user.online)).collect()
}

async fn read(gateway: &mut TestGateway, session: u64, name: &str) -> Option<v1::UserPresence> {
    let request = v1::PresenceReadRequest { user_ids: vec![name.to_owned()] };
    let reply: v1::PresenceReadReply = gateway.call(session, Method::PresenceRead, &request).await.unwrap();
    reply.users.into_iter().next()
}

async fn set_invisible(gateway: &mut TestGateway, session: u64, invisible: bool) -> u64 {
    let request = v1::PresenceSetVisibilityRequest { invisible };
    let call = gateway.call::<v1::PresenceSetVisibilityReply>(session, Method::PresenceSetVisibility, &request);
    call.await.unwrap().seq
}

async fn close(gateway: &mut TestGateway, session: u64) {
    gateway.push(vec![Up::Close(v1::SessionClose { session_id: session })]).await;
}

fn now(world: &World) -> Timestamp {
    world.environment.clock.now()
}

/// Gives users a conversation with the user of a session.
async fn befriend(gateway: &mut TestGateway, session: u64, name: &str, others: &[&'static str]) {
    for other in others {
        let id = CLUSTER.direct_id(&user(name), &user(other));
        gateway.send(session, id, message(other, other, "hello", "", 0)).await;
        gateway.ack(other).await;
    }
    tokio::time::sleep(SECOND).await;
}

/// One router, served for so long that it knows who is not there, and alice, who may know of bob and carol.
async fn one_router(configure: impl FnOnce(&mut RouterConfig)) -> (World, Router, TestGateway) {
    let world = World::new(Store::from(Memory::new()));
    let mut config = world.config("r1");
    configure(&mut config);
    let router = world.router(config).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    befriend(&mut gateway, 1, "alice", &["bob", "carol"]).await;
    tokio::time::sleep(11 * SECOND).await;
    (world, router, gateway)
}

#[tokio::test(start_paused = true)]
async fn a_watcher_is_told_who_comes_and_goes_and_nothing_of_a_stranger() {
    let (world, _router, mut gateway) = one_router(|_| {}).await;
    gateway.open(&world, 2, "bob", "d").await;
    gateway.open(&world, 4, "dave", "d").await;
    tokio::time::sleep(SOON).await;
    let known = subscribe(&mut gateway, 1, &["bob", "carol", "dave", "nobody", "alice"]).await;
    // Of carol, who was never there, hot state knows nothing. Her owner does.
    assert_eq!(known, [("bob".to_owned(), true), ("alice".to_owned(), true)]);
    assert_eq!(told_after(&mut gateway, SOON).await, [went(1, "carol")]);
    gateway.open(&world, 3, "carol", "d").await;
    assert_eq!(told_after(&mut gateway, SOON).await, [came(1, "carol")]);
    let left = now(&world);
    close(&mut gateway, 2).await;
    close(&mut gateway, 4).await;
    tokio::time::sleep(GRACE).await;
    let gone = told(&mut gateway).await;
    let [(1, name, false, last_seen)] = &gone[..] else { panic!("{gone:?}") };
    assert_eq!(name, "bob");
    assert!((0..=1_000).contains(&(last_seen - left.as_millis())), "as it left, not as that was told");
    // Whoever asks reads the same.
    let bob = read(&mut gateway, 1, "bob").await.unwrap();
    assert_eq!((bob.online, bob.last_seen_ms), (false, *last_seen));
    // Nothing is told twice, however often it is renewed.
    assert_eq!(told_after(&mut gateway, 200 * SECOND).await, []);
}

#[tokio::test(start_paused = true)]
async fn a_subscription_replaces_the_one_before_and_ends_with_its_session() {
    let (world, _router, mut gateway) = one_router(|_| {}).await;
    gateway.open(&world, 9, "alice", "d2").await;
    subscribe(&mut gateway, 1, &["bob"]).await;
    subscribe(&mut gateway, 9, &["bob"]).await;
    told_after(&mut gateway, SOON).await;
    // Of two sessions of a user each has its own.
    subscribe(&mut gateway, 1, &["carol"]).await;
    told_after(&mut gateway, SOON).await;
    gateway.open(&world, 2, "bob", "d").await;
    assert_eq!(told_after(&mut gateway, SOON).await, [came(9, "bob")]);
    gateway.open(&world, 3, "carol", "d").await;
    assert_eq!(told_after(&mut gateway, SOON).await, [came(1, "carol")]);
    subscribe(&mut gateway, 1, &[]).await;
    close(&mut gateway, 9).await;
    tokio::time::sleep(SOON).await;
    close(&mut gateway, 2).await;
    close(&mut gateway, 3).await;
    assert_eq!(told_after(&mut gateway, GRACE).await, []);
}

#[tokio::test(start_paused = true)]
async fn a_reconnect_within_the_grace_is_no_going_and_coming() {
    let (world, _router, mut gateway) = one_router(|_| {}).await;
    gateway.open(&world, 2, "bob", "d").await;
    subscribe(&mut gateway, 1, &["bob"]).await;
    told_after(&mut gateway, SOON).await;
    for turn in 0..20_u64 {
        close(&mut gateway, 2 + turn).await;
        tokio::time::sleep(Duration::from_millis(200 * turn)).await;
        gateway.open(&world, 3 + turn, "bob", "d").await;
        assert_eq!(told_after(&mut gateway, SECOND).await, [], "turn {turn}");
        assert!(read(&mut gateway, 1, "bob").await.unwrap().online, "turn {turn}");
    }
    // The last one stays away.
    close(&mut gateway, 22).await;
    assert_eq!(told_after(&mut gateway, Duration::from_secs(4)).await, []);
    assert_eq!(told_after(&mut gateway, Duration::from_secs(3)).await, [went(1, "bob")]);
}

#[tokio::test(start_paused = true)]
async fn watchers_of_who_was_on_a_gateway_that_died_are_told_within_its_lease() {
    let (world, router, mut gateway) = one_router(|_| {}).await;
    let handle = world.registry.handle("g2", world.environment.clone());
    let mut dying = world.gateway_on("g2", &router, handle.clone().into()).await;
    dying.open(&world, 1, "bob", "d").await;
    dying.open(&world, 2, "carol", "d1").await;
    // Carol is elsewhere too.
    gateway.open(&world, 2, "carol", "d2").await;
    subscribe(&mut gateway, 1, &["bob", "carol"]).await;
    told_after(&mut gateway, SOON).await;
    // Killed: nothing is said any more, neither on its links nor to the registry.
    handle.set_reach(Reach::Refused);
    let died = tokio::time::Instant::now();
    drop(dying);
    while told(&mut gateway).await.is_empty() {
        assert!(died.elapsed() < 60 * SECOND, "still online");
    }
    // A lease of ten seconds, and the half second in which words are gathered.
    assert!(died.elapsed() <= Duration::from_millis(10_900), "{:?}", died.elapsed());
    assert_eq!(told_after(&mut gateway, GRACE).await, [], "carol is still there");
}

#[tokio::test(start_paused = true)]
async fn at_their_bounds_subscriptions_are_refused_and_changes_come_with_the_renewal() {
    let (world, _router, mut gateway) = one_router(|config| {
        (config.presence_watches_max, config.presence_watched_max) = (3, 0);
    })
    .await;
    let many: Vec<String> = (0..=limits::PRESENCE_WATCHED_MAX).map(|number| format!("u{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let code = |refused: Result<_, v1::Status>| refused.map_err(|status| status.code);
    let too_large = code(try_subscribe(&mut gateway, 1, &many).await);
    assert_eq!(too_large, Err(StatusCode::TooLarge.number()));
    assert_eq!(code(try_subscribe(&mut gateway, 1, &["a b"]).await), Err(StatusCode::Malformed.number()));
    gateway.open(&world, 2, "alice", "d2").await;
    subscribe(&mut gateway, 1, &["bob", "carol"]).await;
    let overloaded = code(try_subscribe(&mut gateway, 2, &["bob", "carol"]).await);
    assert_eq!(overloaded, Err(StatusCode::Overloaded.number()));
    // What a session has counts for what it asks for instead.
    subscribe(&mut gateway, 1, &["carol", "bob"]).await;
    subscribe(&mut gateway, 2, &["bob"]).await;
    told_after(&mut gateway, SOON).await;
    // The owner has no room to remember who watches.
    gateway.open(&world, 3, "bob", "d").await;
    assert_eq!(told_after(&mut gateway, SOON).await, []);
    assert_eq!(told_after(&mut gateway, RENEWAL).await, [came(1, "bob"), came(2, "bob")]);
    close(&mut gateway, 2).await;
    close(&mut gateway, 1).await;
    tokio::time::sleep(SOON).await;
    gateway.open(&world, 4, "alice", "d").await;
    subscribe(&mut gateway, 4, &["bob", "carol"]).await;
}

/// Routers that share hot state, and a gateway with a link to each.
struct Cluster {
    world: World,
    mesh: Mesh,
    routers: Vec<Router>,
    handles: Vec<InProcessHandle>,
    links: Vec<TestGateway>,
}

impl Cluster {
    async fn new(routers: usize) -> Self {
        let mut world = World { shards: 64, ..World::new(Store::from(Memory::new())) };
        let (mesh, hot) = (Mesh::default(), Hot::from(MemoryHot::new(&world.environment)));
        let (mut started, mut handles) = (Vec::new(), Vec::new());
        for n in 0..routers {
            let name = format!("r{n}");
            world.peers = mesh.of(&name);
            let handle = world.registry.handle(&name, world.environment.clone());
            handles.push(handle.clone());
            let config = RouterConfig { hot: Some(hot.clone()), ..world.config(&name) };
            let router = world.router_on(config, handle.into()).await;
            mesh.add(&name, &router);
            started.push(router);
        }
        let mut links = vec![world.gateway("g1", &started[0]).await];
        for router in &started[1..] {
            links.push(world.link("g1", router).await);
        }
        tokio::time::sleep(25 * SECOND).await;
        Self { world, mesh, routers: started, handles, links }
    }

    /// Which router owns a user.
    fn home(&self, name: &str) -> usize {
        let registry = AnyRegistry::from(self.world.registry.handle("observer", self.world.environment.clone()));
        let (view, id) = (registry.view().borrow().clone(), CLUSTER.self_id(&user(name)));
        let owner = view.owner(self.world.config("any").shards.shard_of(&id)).expect("an owner");
        let is_owner = |n: &usize| InstanceId::parse(&format!("r{n}")).unwrap() == *owner;
        (0..self.routers.len()).find(is_owner).expect("a known router")
    }

    /// Users of a router.
    fn users_of(&self, router: usize) -> impl Iterator<Item = &'static str> + '_ {
        let names = (0..1_000).map(|n| &*Box::leak(format!("user{n}").into_boxed_str()));
        names.filter(move |name| self.home(name) == router)
    }

    /// Opens a session at the user's owner.
    async fn open(&mut self, session: u64, name: &str) -> v1::SessionOpened {
        let home = self.home(name);
        self.links[home].open(&self.world, session, name, "d").await
    }

    /// Gives two users a conversation, over the api of the first one's owner.
    async fn befriend(&mut self, session: u64, one: &str, other: &str) {
        let home = self.home(one);
        let send = v1::SendRequest {
            target: Some(v1::Target { target: Some(v1::target::Target::PeerUserId(other.to_owned())) }),
            client_message_id: other.to_owned().into(),
            body: im_proto::body::text("hello"),
            known_seq: 0,
        };
        self.links[home].call::<v1::SendReply>(session, Method::MessageSend, &send).await.unwrap();
        tokio::time::sleep(SECOND).await;
    }

    /// Kills a router: it reaches neither the registry nor the others nor the gateway.
    fn kill(&mut self, router: usize) {
        self.handles[router].set_reach(Reach::Refused);
        for other in (0..self.routers.len()).filter(|other| *other != router) {
            self.mesh.cut(&format!("r{router}"), &format!("r{other}"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_goes_from_the_owner_to_the_watching_router_and_to_no_other() {
    let mut cluster = Cluster::new(3).await;
    let alice = cluster.users_of(0).next().unwrap();
    let bob = cluster.users_of(1).next().unwrap();
    let carol = cluster.users_of(0).nth(1).unwrap();
    for (session, name) in [(1, alice), (2, carol)] {
        cluster.open(session, name).await;
        cluster.befriend(session, name, bob).await;
    }
    assert_eq!(subscribe(&mut cluster.links[0], 1, &[bob]).await, []);
    assert_eq!(told_after(&mut cluster.links[0], SOON).await, [went(1, bob)]);
    // What the router knows from the owner it tells at once.
    assert_eq!(subscribe(&mut cluster.links[0], 2, &[bob]).await, [(bob.to_owned(), false)]);
    cluster.mesh.take();
    cluster.open(3, bob).await;
    assert_eq!(told_after(&mut cluster.links[0], SOON).await, [came(1, bob), came(2, bob)]);
    assert_eq!(cluster.mesh.take().0.get("presence"), Some(&1), "one message for all who watch there");
    // What does not come is made good by the next renewal.
    close(&mut cluster.links[1], 3).await;
    tokio::time::sleep(GRACE).await;
    assert_eq!(told_after(&mut cluster.links[0], SOON).await, [went(1, bob), went(2, bob)]);
    cluster.mesh.take();
    let renewed = 90 * SECOND;
    tokio::time::sleep(renewed).await;
    let watches = cluster.mesh.take().0.get("watch").copied().unwrap_or_default();
    assert!((3..=6).contains(&watches), "{watches}: every half a minute, once for both");
    // Nobody watches any more: the owner hears no more of it, and forgets.
    close(&mut cluster.links[0], 1).await;
    close(&mut cluster.links[0], 2).await;
    tokio::time::sleep(100 * SECOND).await;
    cluster.mesh.take();
    cluster.open(4, bob).await;
    tokio::time::sleep(SOON).await;
    let sent = cluster.mesh.take().0;
    assert_eq!((sent.get("watch"), sent.get("presence")), (None, None));
}

#[tokio::test(start_paused = true)]
async fn watchers_hear_from_the_next_owner_and_of_nobody_who_is_still_there() {
    let mut cluster = Cluster::new(2).await;
    let alice = cluster.users_of(0).next().unwrap();
    let [bob, carol]: [&str; 2] = cluster.users_of(1).take(2).collect::<Vec<_>>().try_into().unwrap();
    cluster.open(1, alice).await;
    for name in [bob, carol] {
        cluster.befriend(1, alice, name).await;
    }
    let bob_opened = cluster.open(2, bob).await;
    cluster.open(3, carol).await;
    subscribe(&mut cluster.links[0], 1, &[bob, carol]).await;
    told_after(&mut cluster.links[0], SOON).await;
    cluster.kill(1);
    let died = tokio::time::Instant::now();
    while cluster.home(bob) != 0 {
        assert!(died.elapsed() < 60 * SECOND, "nobody takes over");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Carol's client goes with the router, bob's session is announced to the next owner, who is asked before that.
    assert_eq!(told_after(&mut cluster.links[0], 3 * SECOND).await, []);
    let announce = v1::SessionAnnounce { session_id: 2, capability: bob_opened.capability };
    cluster.links[0].push(vec![Up::Announce(announce)]).await;
    assert_eq!(told_after(&mut cluster.links[0], 20 * SECOND).await, [went(1, carol)]);
    close(&mut cluster.links[0], 2).await;
    assert_eq!(told_after(&mut cluster.links[0], GRACE).await, [went(1, bob)]);
    cluster.open(4, carol).await;
    assert_eq!(told_after(&mut cluster.links[0], SOON).await, [came(1, carol)]);
}

#[tokio::test(start_paused = true)]
async fn what_is_lost_between_routers_comes_with_the_next_renewal() {
    let mut cluster = Cluster::new(2).await;
    let (alice, bob) = (cluster.users_of(0).next().unwrap(), cluster.users_of(1).next().unwrap());
    cluster.open(1, alice).await;
    cluster.befriend(1, alice, bob).await;
    subscribe(&mut cluster.links[0], 1, &[bob]).await;
    told_after(&mut cluster.links[0], SOON).await;
    cluster.mesh.lose("presence");
    cluster.open(2, bob).await;
    assert_eq!(told_after(&mut cluster.links[0], RENEWAL).await, [came(1, bob)]);
}

#[tokio::test(start_paused = true)]
async fn an_invisible_user_comes_and_goes_unseen_and_sees_itself() {
    let hot = Cluster::new(1).await;
    let Cluster { world, routers, mut links, .. } = hot;
    let gateway = &mut links[0];
    gateway.open(&world, 1, "alice", "d").await;
    befriend(gateway, 1, "alice", &["bob"]).await;
    gateway.open(&world, 2, "bob", "d").await;
    tokio::time::sleep(SOON).await;
    assert_eq!(subscribe(gateway, 1, &["bob"]).await, [("bob".to_owned(), true)]);
    let vanished = now(&world);
    let seq = set_invisible(gateway, 2, true).await;
    assert!(seq > 0);
    assert_eq!(set_invisible(gateway, 2, true).await, 0, "it is so already");
    tokio::time::sleep(GRACE).await;
    let gone = told(gateway).await;
    let [(1, _, false, last_seen)] = gone[..] else { panic!("{gone:?}") };
    assert!((0..=1_000).contains(&(last_seen - vanished.as_millis())));
    // Whatever bob does, and however long that lasts.
    gateway.open(&world, 3, "bob", "d3").await;
    tokio::time::sleep(100 * SECOND).await;
    close(gateway, 2).await;
    close(gateway, 3).await;
    tokio::time::sleep(GRACE).await;
    gateway.open(&world, 4, "bob", "d").await;
    tokio::time::sleep(SOON).await;
    assert_eq!(told(gateway).await, []);
    let seen = read(gateway, 1, "bob").await.unwrap();
    assert_eq!((seen.online, seen.last_seen_ms, seen.invisible), (false, last_seen, false));
    assert_eq!(subscribe(gateway, 1, &["bob"]).await, [("bob".to_owned(), false)]);
    let own = read(gateway, 4, "bob").await.unwrap();
    assert!(own.online && own.invisible, "{own:?}");
    let all = try_subscribe(gateway, 4, &["bob"]).await.unwrap();
    assert!(all[0].online && all[0].invisible, "{all:?}");
    // The next owner knows it too.
    assert!(routers[0].stop(30 * SECOND).await);
    let router = world.router(world.config("r9")).await;
    let mut next = world.gateway("g9", &router).await;
    next.open(&world, 1, "alice", "d").await;
    next.open(&world, 2, "bob", "d").await;
    assert_eq!(subscribe(&mut next, 1, &["bob"]).await, []);
    assert_eq!(told_after(&mut next, 20 * SECOND).await, [went(1, "bob")]);
    assert_eq!(read(&mut next, 1, "bob").await, None, "no word of bob was said");
    // And seen again.
    assert!(set_invisible(&mut next, 2, false).await > seq);
    assert_eq!(told_after(&mut next, SOON).await, [came(1, "bob")]);
    assert!(read(&mut next, 1, "bob").await.unwrap().online);
}

/// Bob leaves and carol becomes invisible at the same moment; both come back, carol unseen, and bob later for good.
#[tokio::test(start_paused = true)]
async fn what_is_told_of_an_invisible_user_is_what_is_told_of_one_who_left() {
    let (world, _router, mut gateway) = one_router(|_| {}).await;
    gateway.open(&world, 2, "bob", "d").await;
    gateway.open(&world, 3, "carol", "d").await;
    // A request that is under way when the entry is committed shows no other time than the tick would.
    subscribe(&mut gateway, 1, &["bob", "carol"]).await;
    told_after(&mut gateway, SOON).await;
    let hidden = set_invisible(&mut gateway, 3, true).await;
    close(&mut gateway, 2).await;
    assert!(hidden > 0);
    let mut told_of: [Vec<(Duration, bool)>; 2] = Default::default();
    let begun = tokio::time::Instant::now();
    while begun.elapsed() < 60 * SECOND {
        for (_, name, online, _) in told(&mut gateway).await {
            told_of[usize::from(name == "carol")].push((begun.elapsed(), online));
        }
    }
    assert_eq!(told_of[0].len(), 1);
    assert_eq!(told_of[0], told_of[1], "at the same time, once");
    let both = try_subscribe(&mut gateway, 1, &["bob", "carol"]).await.unwrap();
    assert_eq!(both[0].online, both[1].online);
    assert!((both[0].last_seen_ms - both[1].last_seen_ms).abs() <= 500, "{both:?}");
    assert_eq!(told_after(&mut gateway, RENEWAL).await, []);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_said_of_who_may_be_invisible_before_that_is_known() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let hot = Hot::from(MemoryHot::new(&world.environment));
    let with_hot = |config| RouterConfig { hot: Some(hot.clone()), ..config };
    let first = world.router(with_hot(world.config("r1"))).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "alice", "d").await;
    befriend(&mut gateway, 1, "alice", &["bob", "carol"]).await;
    gateway.open(&world, 2, "bob", "d").await;
    set_invisible(&mut gateway, 2, true).await;
    // Nothing is open at the next owner, who asks the table.
    tokio::time::sleep(400 * SECOND).await;
    assert!(first.stop(30 * SECOND).await);
    let second = world.router(with_hot(world.config("r2"))).await;
    let mut gateway = world.gateway("g2", &second).await;
    gateway.open(&world, 1, "alice", "d").await;
    subscribe(&mut gateway, 1, &["bob", "carol"]).await;
    told_after(&mut gateway, 20 * SECOND).await;
    gateway.open(&world, 2, "bob", "d").await;
    gateway.open(&world, 3, "carol", "d").await;
    // They are let in, and nothing more of them can be read.
    store.set_plan(FaultPlan { refused_permille: 1000, ..FaultPlan::none() });
    assert_eq!(told_after(&mut gateway, RENEWAL).await, []);
    store.set_plan(FaultPlan::none());
    assert_eq!(told_after(&mut gateway, SOON).await, [came(1, "carol")]);
    assert_eq!(told_after(&mut gateway, RENEWAL).await, []);
}

/// The first entry of a log says whose it is, and may be this one.
#[tokio::test(start_paused = true)]
async fn who_was_never_there_may_be_invisible_from_the_start() {
    let world = World::new(Store::from(Memory::new()));
    let first = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &first).await;
    gateway.open(&world, 1, "erin", "d").await;
    assert_eq!(set_invisible(&mut gateway, 1, true).await, 1);
    tokio::time::sleep(400 * SECOND).await;
    assert!(first.stop(30 * SECOND).await);
    let second = world.router(world.config("r2")).await;
    let mut gateway = world.gateway("g2", &second).await;
    gateway.open(&world, 1, "erin", "d").await;
    let own = read(&mut gateway, 1, "erin").await.unwrap();
    assert!(own.invisible);
    let id = CLUSTER.self_id(&user("erin"));
    let request = v1::HistoryRequest {
        target: Some(v1::Target { target: Some(v1::target::Target::ConversationId(id.to_bytes())) }),
        from: 1,
        ..v1::HistoryRequest::default()
    };
    let history: v1::HistoryReply = gateway.call(1, Method::MessageHistory, &request).await.unwrap();
    assert_eq!(history.entries.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn who_shares_no_conversation_any_more_is_watched_no_longer() {
    let (world, _router, mut gateway) = one_router(|_| {}).await;
    gateway.open(&world, 4, "dave", "d").await;
    let create = v1::GroupCreateRequest {
        key: "team".into(),
        name: "team".to_owned(),
        members: vec!["bob".to_owned(), "dave".to_owned()],
    };
    let created: v1::GroupCreateReply = gateway.call(1, Method::GroupCreate, &create).await.unwrap();
    gateway.open(&world, 2, "bob", "d").await;
    tokio::time::sleep(SOON).await;
    subscribe(&mut gateway, 1, &["bob", "dave"]).await;
    told_after(&mut gateway, SOON).await;
    let leave = v1::GroupLeaveRequest { conversation_id: created.conversation_id, client_message_id: "l".into() };
    let _: v1::GroupLeaveReply = gateway.call(4, Method::GroupLeave, &leave).await.unwrap();
    // Bob has another conversation with alice. Dave is still there.
    tokio::time::sleep(900 * SECOND).await;
    let last = told(&mut gateway).await;
    assert_eq!(last, [(1, "dave".to_owned(), false, 0)], "and not when dave was last seen");
    close(&mut gateway, 4).await;
    close(&mut gateway, 2).await;
    assert_eq!(told_after(&mut gateway, GRACE).await, [went(1, "bob")]);
}

/// The store answers nothing for so long that the owner gives the entry up; it was stored all the same, and the next open commits it.
#[tokio::test(start_paused = true)]
async fn who_became_invisible_by_an_entry_that_an_open_committed_is_so() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let router = world.router(RouterConfig { append_patience: 2 * SECOND, ..world.config("r1") }).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    befriend(&mut gateway, 1, "alice", &["bob"]).await;
    gateway.open(&world, 2, "bob", "d").await;
    tokio::time::sleep(11 * SECOND).await;
    subscribe(&mut gateway, 1, &["bob"]).await;
    assert_eq!(told_after(&mut gateway, SOON).await, []);
    store.set_plan(FaultPlan { unknown_permille: 1000, ..FaultPlan::none() });
    let request = v1::PresenceSetVisibilityRequest { invisible: true };
    let call = v1::Call {
        request_id: 7_777,
        method: Method::PresenceSetVisibility.number(),
        request: request.encode_to_vec().into(),
    };
    gateway.push(vec![Up::Call(v1::SessionCall { session_id: 2, call: Some(call) })]).await;
    tokio::time::sleep(5 * SECOND).await;
    store.set_plan(FaultPlan::none());
    assert_eq!(told_after(&mut gateway, 20 * SECOND).await, [went(1, "bob")]);
    let own = read(&mut gateway, 2, "bob").await.unwrap();
    assert!(own.online && own.invisible, "{own:?}");
}
