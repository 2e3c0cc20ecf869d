//! Groups of any size on several routers: everybody who is there gets everything in order, and a message costs the same however many
//! members are not there.

mod leaving;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use im_proto::{
    ConversationId, InstanceId, StatusCode, UserId, method::Method, v1, v1::router_message::Message as Down,
};
use im_registry::{AnyRegistry, InProcessHandle, Reach, Registry as _};
use im_router::Router;
use im_storage::{FaultPlan, Faulty, Memory, Store, Table};

use crate::{
    lifecycle::faulty,
    support::{CLUSTER, Mesh, TestGateway, World, decode, to, user},
};

/// Several routers, with a gateway each.
pub struct Cluster {
    pub world: World,
    pub store: Faulty,
    pub mesh: Mesh,
    pub handles: Vec<InProcessHandle>,
    pub routers: Vec<Router>,
    pub gateways: Vec<TestGateway>,
    /// The gateway and the session of each user who is there.
    pub sessions: BTreeMap<UserId, (usize, u64)>,
    audiences: Vec<BTreeMap<ConversationId, Kept>>,
    next: u64,
}

/// A set as a gateway keeps it.
#[derive(Default)]
struct Kept {
    version: u64,
    sessions: BTreeSet<u64>,
}

impl Cluster {
    pub async fn new(routers: usize) -> Self {
        let mut world = World::new(Store::from(Memory::new()));
        let store = faulty(&mut world);
        world.shards = 32;
        let mesh = Mesh::default();
        let mut cluster = Self {
            world,
            store,
            mesh,
            handles: Vec::new(),
            routers: Vec::new(),
            gateways: Vec::new(),
            sessions: BTreeMap::new(),
            audiences: Vec::new(),
            next: 1,
        };
        for n in 0..routers {
            cluster.start(&format!("r{n}"), &format!("g{n}")).await;
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
        cluster
    }

    pub async fn start(&mut self, name: &str, gateway: &str) {
        self.world.peers = self.mesh.of(name);
        let handle = self.world.registry.handle(name, self.world.environment.clone());
        self.handles.push(handle.clone());
        let router = self.world.router_on(self.world.config(name), handle.into()).await;
        self.mesh.add(name, &router);
        self.gateways.push(self.world.gateway(gateway, &router).await);
        self.routers.push(router);
        self.audiences.push(BTreeMap::new());
    }

    pub fn owner(&self, id: &ConversationId) -> usize {
        let registry = AnyRegistry::from(self.world.registry.handle("observer", self.world.environment.clone()));
        let view = registry.view().borrow().clone();
        let owner = view.owner(self.world.config("any").shards.shard_of(id)).expect("an owner").clone();
        (0..self.routers.len()).find(|n| InstanceId::parse(&format!("r{n}")).unwrap() == owner).expect("a known router")
    }

    /// The user connects to the router of its shard, and syncs.
    pub async fn come(&mut self, name: &str) {
        let user = user(name);
        let home = self.owner(&CLUSTER.self_id(&user));
        let session = self.next;
        self.next += 1;
        self.gateways[home].open(&self.world, session, name, "d").await;
        self.sessions.insert(user, (home, session));
        self.sync(name).await;
    }

    pub async fn sync(&mut self, name: &str) -> v1::SyncReply {
        loop {
            match self.call(name, Method::ConversationSync, &v1::SyncRequest::default()).await {
                Ok(reply) => return reply,
                Err(status) => assert_eq!(status.code, StatusCode::Unavailable.number()),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    pub async fn call<A: prost::Message + Default>(
        &mut self,
        name: &str,
        method: Method,
        request: &impl prost::Message,
    ) -> Result<A, v1::Status> {
        let (home, session) = self.sessions[&user(name)];
        self.gateways[home].call(session, method, request).await
    }

    /// A group of this many members, with its creator.
    async fn group(&mut self, creator: &str, key: &'static str, members: &[String]) -> ConversationId {
        let mut chunks = members.chunks(900);
        let first = chunks.next().unwrap_or_default().to_vec();
        let create = v1::GroupCreateRequest { key: key.into(), name: "team".to_owned(), members: first };
        let created: v1::GroupCreateReply = self.call(creator, Method::GroupCreate, &create).await.unwrap();
        for members in chunks {
            let invite = v1::GroupInviteRequest {
                conversation_id: created.conversation_id.clone(),
                members: members.to_vec(),
                ..Default::default()
            };
            self.call::<v1::GroupInviteReply>(creator, Method::GroupInvite, &invite).await.unwrap();
        }
        ConversationId::from_slice(&created.conversation_id).unwrap()
    }

    pub async fn send(&mut self, name: &str, id: ConversationId, text: &str) -> u64 {
        let send = v1::SendRequest {
            target: to(id),
            client_message_id: text.to_owned().into(),
            body: im_proto::body::text(text),
            known_seq: 0,
        };
        loop {
            match self.call::<v1::SendReply>(name, Method::MessageSend, &send).await {
                Ok(reply) => return reply.seq,
                Err(status) => assert_eq!(status.code, StatusCode::Unavailable.number(), "{status:?}"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// What each session got of a conversation since the last time, in order, and how many messages the gateways got for it.
    pub async fn pushed(&mut self, id: ConversationId) -> (BTreeMap<u64, Vec<u64>>, usize) {
        let (mut got, mut messages) = (BTreeMap::<u64, Vec<u64>>::new(), 0);
        for (gateway, audiences) in self.gateways.iter_mut().zip(&mut self.audiences) {
            gateway.gather().await;
            for message in gateway.inbox.drain(..) {
                let (sessions, frame) = match message {
                    Down::Deliver(deliver) => (deliver.session_ids, deliver.frame),
                    Down::AudienceSet(set) => {
                        keep(audiences, &set);
                        continue;
                    }
                    Down::AudienceDeliver(deliver) => {
                        let named = ConversationId::from_slice(&deliver.conversation_id).unwrap();
                        let kept = audiences.get(&named).expect("a set that was named");
                        assert_eq!(kept.version, deliver.version);
                        let sessions = kept.sessions.iter().copied();
                        (sessions.filter(|session| *session != deliver.except_session_id).collect(), deliver.frame)
                    }
                    _ => continue,
                };
                let seqs: Vec<u64> =
                    decode(frame).iter().filter(|m| m.conversation_id == id.to_bytes()).map(|m| m.seq).collect();
                messages += usize::from(!seqs.is_empty());
                for session in sessions {
                    got.entry(session).or_default().extend(&seqs);
                }
            }
        }
        got.retain(|_, seqs| !seqs.is_empty());
        (got, messages)
    }
}

fn keep(audiences: &mut BTreeMap<ConversationId, Kept>, set: &v1::AudienceSet) {
    let kept = audiences.entry(ConversationId::from_slice(&set.conversation_id).unwrap()).or_default();
    if set.from_version == 0 {
        kept.sessions.clear();
    } else {
        assert_eq!(kept.version, set.from_version);
    }
    kept.version = set.version;
    set.left.iter().for_each(|session| assert!(kept.sessions.remove(session)));
    kept.sessions.extend(&set.joined);
}

pub fn names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("user{n}")).collect()
}

/// A group of this size; of its members these many are there. Returns messages between routers and to gateways, and bytes between
/// routers, for one message.
async fn cost_of_a_message(size: usize, there: usize) -> (BTreeMap<&'static str, usize>, usize, usize) {
    let mut cluster = Cluster::new(3).await;
    let members = names(size - 1);
    cluster.come("creator").await;
    let present = there.min(size - 1);
    // Half of those who are there come before the group is made, half afterwards.
    for name in &members[..present / 2] {
        cluster.come(name).await;
    }
    let id = cluster.group("creator", "k", &members).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    for name in &members[present / 2..present] {
        cluster.come(name).await;
    }
    let head = cluster.send("creator", id, "first").await;
    cluster.pushed(id).await;
    for name in &members[..present] {
        cluster.sync(name).await;
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    cluster.pushed(id).await;
    cluster.mesh.take();
    // One is settled, so that sets which have changed are out of the way.
    for (n, text) in ["settle", "one", "two", "three", "four"].into_iter().enumerate() {
        if n == 1 {
            cluster.pushed(id).await;
            cluster.mesh.take();
        }
        assert_eq!(cluster.send("creator", id, text).await, head + 1 + n as u64);
    }
    let (got, to_gateways) = cluster.pushed(id).await;
    let (between, bytes) = cluster.mesh.take();
    let expected: Vec<u64> = (head + 2..=head + 5).collect();
    assert_eq!(got.len(), present, "everybody who is there but who sent it, who has the reply");
    assert!(got.values().all(|seqs| *seqs == expected), "{got:?}");
    let request = v1::HistoryRequest { target: to(id), from: 1, ..v1::HistoryRequest::default() };
    let last = members[present - 1].clone();
    let history: v1::HistoryReply = cluster.call(&last, Method::MessageHistory, &request).await.unwrap();
    assert_eq!((history.entries.len() as u64, history.head), (head + 5, head + 5), "one copy of each is stored");
    (between, to_gateways, bytes)
}

#[tokio::test(start_paused = true)]
async fn a_group_of_three() {
    cost_of_a_message(3, 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_group_of_two_hundred() {
    cost_of_a_message(200, 60).await;
}

#[tokio::test(start_paused = true)]
async fn a_message_costs_the_same_however_many_members_are_away() {
    let thousand = cost_of_a_message(1_000, 60).await;
    let ten_thousand = cost_of_a_message(10_000, 60).await;
    assert_eq!(thousand.0.get("deliver"), None, "nobody is named");
    // Four messages to two other routers, and to three gateways.
    assert_eq!((thousand.0.get("audience deliver"), thousand.1), (Some(&8), 12));
    assert_eq!((thousand.0, thousand.1), (ten_thousand.0, ten_thousand.1));
    assert!(ten_thousand.2 <= thousand.2 + 64, "{} and {} bytes", thousand.2, ten_thousand.2);
}

impl Cluster {
    /// Users whose home is one of these routers, there and synced.
    pub async fn come_to(&mut self, homes: &[usize], count: usize) -> Vec<String> {
        let mut came = Vec::new();
        for name in (0..).map(|n| format!("user{n}")) {
            if homes.contains(&self.owner(&CLUSTER.self_id(&user(&name)))) {
                self.come(&name).await;
                came.push(name);
                if came.len() == count {
                    return came;
                }
            }
        }
        came
    }

    /// A key under which a group of this creator belongs to a router.
    fn key_at(&self, creator: &str, owner: usize) -> &'static str {
        let key = |n| &*Box::leak(format!("key{n}").into_boxed_str());
        (0..1000)
            .map(key)
            .find(|key| self.owner(&CLUSTER.group_id(&user(creator), key.as_bytes())) == owner)
            .expect("a key of this router")
    }

    pub fn session(&self, name: &str) -> u64 {
        self.sessions[&user(name)].1
    }
}

/// A group of 300 that belongs to the first of three routers; twenty of its members are at the two others.
async fn group_of_the_first(cluster: &mut Cluster) -> (ConversationId, Vec<String>) {
    let there = cluster.come_to(&[1, 2], 20).await;
    let key = cluster.key_at(&there[0], 0);
    let mut members = there[1..].to_vec();
    members.extend((0..280).map(|n| format!("away{n}")));
    let id = cluster.group(&there[0].clone(), key, &members).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    (id, there)
}

/// Everybody but the first, who sends, got all of these, in order; entries may come twice.
pub fn assert_got(cluster: &Cluster, got: &BTreeMap<u64, Vec<u64>>, who: &[String], seqs: &[u64]) {
    for name in who {
        let mut found = got.get(&cluster.session(name)).cloned().unwrap_or_default();
        let mut seen = BTreeSet::new();
        found.retain(|seq| seqs.contains(seq) && seen.insert(*seq));
        assert_eq!(found, seqs, "{name}");
    }
}

pub async fn send_all(cluster: &mut Cluster, name: &str, id: ConversationId, texts: &str, count: usize) -> Vec<u64> {
    let mut seqs = Vec::new();
    for n in 0..count {
        seqs.push(cluster.send(name, id, &format!("{texts}{n}")).await);
    }
    seqs
}

#[tokio::test(start_paused = true)]
async fn who_follows_a_large_group_gets_everything_when_its_owner_hands_over() {
    let mut cluster = Cluster::new(3).await;
    let (id, there) = group_of_the_first(&mut cluster).await;
    let before = send_all(&mut cluster, &there[0], id, "before", 5).await;
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &there[1..], &before);
    assert!(cluster.routers[0].stop(Duration::from_secs(30)).await);
    let after = send_all(&mut cluster, &there[0], id, "after", 5).await;
    assert_eq!(after[0], before[4] + 1);
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &there[1..], &after);
    // The new owner has learned who follows: nobody is named any more.
    cluster.mesh.take();
    let settled = send_all(&mut cluster, &there[0], id, "settled", 3).await;
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &there[1..], &settled);
    assert_eq!(cluster.mesh.take().0.get("deliver"), None);
}

#[tokio::test(start_paused = true)]
async fn nobody_misses_an_entry_while_a_group_becomes_large() {
    let mut cluster = Cluster::new(3).await;
    let there = cluster.come_to(&[0, 1, 2], 30).await;
    let members: Vec<String> = there[1..].iter().cloned().chain((0..200).map(|n| format!("away{n}"))).collect();
    let id = cluster.group(&there[0].clone(), "k", &members).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    cluster.pushed(id).await;
    let mut seqs = Vec::new();
    for round in 0..20 {
        let invite = v1::GroupInviteRequest {
            conversation_id: id.to_bytes(),
            members: (0..5).map(|n| format!("more{round}-{n}")).collect(),
            ..Default::default()
        };
        cluster.call::<v1::GroupInviteReply>(&there[0], Method::GroupInvite, &invite).await.unwrap();
        seqs.extend(send_all(&mut cluster, &there[0], id, &format!("round{round}-"), 2).await);
    }
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &there[1..], &seqs);
    cluster.mesh.take();
    send_all(&mut cluster, &there[0], id, "settled", 1).await;
    assert_eq!(cluster.mesh.take().0.get("deliver"), None);
}

#[tokio::test(start_paused = true)]
async fn who_comes_and_goes_and_leaves_is_followed_exactly() {
    let mut cluster = Cluster::new(3).await;
    let (id, there) = group_of_the_first(&mut cluster).await;
    cluster.pushed(id).await;
    // A new member who is there already, and one of the members who comes now.
    let guest = cluster.come_to(&[2], 30).await.pop().unwrap();
    let invite =
        v1::GroupInviteRequest { conversation_id: id.to_bytes(), members: vec![guest.clone()], ..Default::default() };
    cluster.call::<v1::GroupInviteReply>(&there[0], Method::GroupInvite, &invite).await.unwrap();
    let late = (0..280).map(|n| format!("away{n}")).find(|name| cluster.owner(&CLUSTER.self_id(&user(name))) == 1);
    let late = late.unwrap();
    cluster.come(&late).await;
    let seqs = send_all(&mut cluster, &there[0], id, "first", 3).await;
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &[guest.clone(), late.clone(), there[5].clone()], &seqs);
    // One leaves the group, one disconnects.
    let leave = v1::GroupLeaveRequest { conversation_id: id.to_bytes(), ..Default::default() };
    cluster.call::<v1::GroupLeaveReply>(&guest, Method::GroupLeave, &leave).await.unwrap();
    let (home, session) = cluster.sessions[&user(&late)];
    let close = v1::gateway_message::Message::Close(v1::SessionClose { session_id: session });
    cluster.gateways[home].push(vec![close]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    cluster.pushed(id).await;
    let seqs = send_all(&mut cluster, &there[0], id, "second", 3).await;
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &there[1..], &seqs);
    for gone in [&guest, &late] {
        assert_eq!(got.get(&cluster.session(gone)), None, "{gone}");
    }
    // When nobody is left at a router, it gets nothing any more.
    let homes: Vec<(usize, u64)> = cluster.sessions.values().copied().collect();
    let stays = cluster.sessions[&user(&there[0])].0;
    for (home, session) in homes.into_iter().filter(|(home, _)| *home != stays) {
        let close = v1::gateway_message::Message::Close(v1::SessionClose { session_id: session });
        cluster.gateways[home].push(vec![close]).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    send_all(&mut cluster, &there[0], id, "unheard", 2).await;
    cluster.mesh.take();
    send_all(&mut cluster, &there[0], id, "third", 3).await;
    assert_eq!(cluster.mesh.take().0.get("audience deliver"), Some(&3), "to the one router where somebody is");
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_misses_a_set_gets_it_whole() {
    let mut cluster = Cluster::new(1).await;
    let there = cluster.come_to(&[0], 20).await;
    let members: Vec<String> = there[1..].iter().cloned().chain((0..300).map(|n| format!("away{n}"))).collect();
    let id = cluster.group(&there[0].clone(), "k", &members).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    send_all(&mut cluster, &there[0], id, "m", 1).await;
    cluster.pushed(id).await;
    let unknown = ConversationId::from_bytes([4; 16]);
    for wanted in [id, unknown] {
        let wanted = v1::AudienceWanted { conversation_id: wanted.to_bytes() };
        cluster.gateways[0].push(vec![v1::gateway_message::Message::AudienceWanted(wanted)]).await;
    }
    for (named, sessions) in [(id, 20), (unknown, 0)] {
        let set = cluster.gateways[0]
            .expect("set", |message| match message {
                Down::AudienceSet(set) if set.conversation_id == named.to_bytes() => Some(set.clone()),
                _ => None,
            })
            .await;
        assert_eq!((set.from_version, set.joined.len()), (0, sessions));
        keep(&mut cluster.audiences[0], &set);
    }
    let seqs = send_all(&mut cluster, &there[0], id, "n", 1).await;
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &there[1..], &seqs);
}

/// Of six gateways only those hear of a message that have somebody who gets it.
#[tokio::test(start_paused = true)]
async fn a_message_goes_to_the_gateways_of_its_receivers_and_to_no_other() {
    let mut cluster = Cluster::new(3).await;
    for n in 3..6 {
        let router = cluster.routers[n - 3].clone();
        cluster.gateways.push(cluster.world.gateway(&format!("g{n}"), &router).await);
        cluster.audiences.push(BTreeMap::new());
    }
    let there = cluster.come_to(&[0, 1, 2], 12).await;
    let (one, other) = (there[0].clone(), there[11].clone());
    let direct = CLUSTER.direct_id(&user(&one), &user(&other));
    let send = v1::SendRequest {
        target: Some(v1::Target { target: Some(v1::target::Target::PeerUserId(other.clone())) }),
        client_message_id: "m".into(),
        body: im_proto::body::text("hi"),
        known_seq: 0,
    };
    cluster.call::<v1::SendReply>(&one, Method::MessageSend, &send).await.unwrap();
    let members: Vec<String> = there[1..4].to_vec();
    let group = cluster.group(&one, "k", &members).await;
    let large: Vec<String> = there[1..4].iter().cloned().chain((0..300).map(|n| format!("away{n}"))).collect();
    let large = cluster.group(&one, "large", &large).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    for (id, receivers) in [(direct, vec![other]), (group, members.clone()), (large, members)] {
        cluster.pushed(id).await;
        cluster.mesh.take();
        send_all(&mut cluster, &one, id, "x", 1).await;
        let (got, to_gateways) = cluster.pushed(id).await;
        let homes: BTreeSet<usize> = receivers.iter().map(|name| cluster.sessions[&user(name)].0).collect();
        assert_eq!(to_gateways, homes.len(), "one message to each gateway with a receiver");
        assert_eq!(
            got.keys().copied().collect::<BTreeSet<_>>(),
            receivers.iter().map(|n| cluster.session(n)).collect()
        );
        let sent = cluster.mesh.take().0;
        let between = sent.get("deliver").unwrap_or(&0) + sent.get("audience deliver").unwrap_or(&0);
        assert!(between <= 2, "at most one message to each other router: {sent:?}");
    }
}

/// A call whose answer is not waited for.
pub fn call(
    session_id: u64,
    request_id: u32,
    method: Method,
    request: &impl prost::Message,
) -> v1::gateway_message::Message {
    let call = v1::Call { request_id, method: method.number(), request: request.encode_to_vec().into() };
    v1::gateway_message::Message::Call(v1::SessionCall { session_id, call: Some(call) })
}

/// What an owner committed and could not pass on before it died is not among what its successor sends again.
#[tokio::test(start_paused = true)]
async fn who_may_have_missed_entries_of_a_dead_owner_is_told_to_sync() {
    let mut cluster = Cluster::new(3).await;
    let (id, there) = group_of_the_first(&mut cluster).await;
    send_all(&mut cluster, &there[0], id, "before", 1).await;
    cluster.pushed(id).await;
    // Whoever sends has another router than the one that is cut off.
    let (sender_home, _) = cluster.sessions[&user(&there[0])];
    let deaf = 3 - sender_home;
    cluster.mesh.cut("r0", &format!("r{deaf}"));
    send_all(&mut cluster, &there[0], id, "unheard", 5).await;
    cluster.pushed(id).await;
    cluster.handles[0].set_reach(Reach::Refused);
    tokio::time::sleep(Duration::from_secs(30)).await;
    let seqs = send_all(&mut cluster, &there[0], id, "after", 2).await;
    let resynced = resynced(&mut cluster).await;
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &there[1..], &seqs);
    for name in there.iter().filter(|name| cluster.sessions[&user(name)].0 == deaf) {
        assert!(resynced.contains(&cluster.session(name)), "{name}");
    }
}

/// The sessions that were told to sync.
pub async fn resynced(cluster: &mut Cluster) -> BTreeSet<u64> {
    let mut resynced = BTreeSet::new();
    for gateway in &mut cluster.gateways {
        gateway.gather().await;
        for message in &gateway.inbox {
            if let Down::Resync(resync) = message {
                resynced.extend(&resync.session_ids);
            }
        }
    }
    resynced
}
