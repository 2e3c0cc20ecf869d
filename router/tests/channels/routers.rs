//! A channel on several routers: what a post costs, who follows where, moves and deaths of owners; and subscriptions that are cut short.

use super::*;

impl Cluster {
    async fn channel_of(&mut self, creator: &str, owner: usize, writers: &[&str]) -> ConversationId {
        let key = (0..1000).map(|n| &*Box::leak(format!("key{n}").into_boxed_str()));
        let is_there = |key: &&str| self.owner(&CLUSTER.channel_id(&user(creator), key.as_bytes())) == owner;
        let key = key.clone().find(is_there).expect("a key of this router");
        let created: v1::ChannelCreateReply =
            self.call(creator, Method::ChannelCreate, &create(key, writers)).await.unwrap();
        ConversationId::from_slice(&created.conversation_id).unwrap()
    }

    async fn join(&mut self, name: &str, id: ConversationId) {
        loop {
            match self.call::<v1::ChannelSubscribeReply>(name, Method::ChannelSubscribe, &subscribe(id, "join")).await {
                Ok(_) => return,
                Err(status) => assert_eq!(status.code, StatusCode::Unavailable.number(), "{status:?}"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn leave(&mut self, name: &str) {
        let (home, session) = self.sessions[&user(name)];
        self.gateways[home].push(vec![Up::Close(v1::SessionClose { session_id: session })]).await;
    }
}

/// What a post costs: messages between routers, to gateways, calls of the store, bytes between routers.
type Cost = (BTreeMap<&'static str, usize>, usize, u64, usize);

/// A channel with so many subscribers, of whom these many are there. The cost of the first post after everything was quiet, and of
/// four more.
async fn cost_of_posts(subscribers: usize, there: usize) -> [Cost; 2] {
    let mut cluster = Cluster::new(3).await;
    cluster.come("creator").await;
    let id = cluster.channel_of("creator", 0, &[]).await;
    let names = names(subscribers);
    for name in &names {
        cluster.come(name).await;
        cluster.join(name, id).await;
        if !names[..there].contains(name) {
            cluster.leave(name).await;
        }
    }
    // Every log is quiet, the channel is out of memory.
    tokio::time::sleep(Duration::from_secs(1000)).await;
    cluster.pushed(id).await;
    let mut costs = Vec::new();
    for posts in [["first"].as_slice(), &["settle"], &["one", "two", "three", "four"]] {
        cluster.mesh.take();
        let calls = cluster.store.calls();
        let mut seqs = Vec::new();
        for text in posts {
            seqs.push(cluster.send("creator", id, text).await);
        }
        let (mut got, to_gateways) = cluster.pushed(id).await;
        let calls = cluster.store.calls() - calls;
        // An owner that opens a log sends the last batch of it again, to who posts too.
        got.retain(|_, found| found.ends_with(&seqs));
        assert_eq!(got.len(), there, "everybody who is there but who posts");
        let (between, bytes) = cluster.mesh.take();
        costs.push((between, to_gateways, calls, bytes));
    }
    [costs.swap_remove(0), costs.swap_remove(0)]
}

#[tokio::test(start_paused = true)]
async fn a_post_costs_the_same_with_thirty_subscribers_and_with_five_hundred() {
    let few = cost_of_posts(30, 30).await;
    let many = cost_of_posts(500, 30).await;
    for (few, many) in few.iter().zip(&many) {
        assert_eq!((&few.0, few.1, few.2), (&many.0, many.1, many.2));
        // Numbers of requests are longer by a byte or two.
        assert!(many.3 <= few.3 + 64, "{} and {} bytes between routers", few.3, many.3);
    }
    let [_, (between, to_gateways, calls, _)] = many;
    assert_eq!((between.get("deliver"), between.get("audience deliver"), to_gateways), (None, Some(&8), 12));
    // An append and a fence read each, and a mark or two in half a minute.
    assert!(calls <= 4 * 3, "{calls} calls of the store for four posts");
}

#[tokio::test(start_paused = true)]
async fn subscribers_get_everything_in_order_when_the_channel_and_their_own_shards_move() {
    let mut cluster = Cluster::new(3).await;
    let creator = cluster.come_to(&[1], 1).await.remove(0);
    let id = cluster.channel_of(&creator, 0, &[]).await;
    let mut readers = cluster.come_to(&[0, 1, 2], 20).await;
    readers.retain(|name| *name != creator);
    for name in &readers {
        cluster.join(name, id).await;
    }
    let before = send_all(&mut cluster, &creator, id, "before", 5).await;
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &readers, &before);
    // A planned move of the channel and of some readers, while others come.
    let (stopping, homes) = (cluster.routers[0].clone(), cluster.sessions.clone());
    let joining = async {
        let late = cluster.come_to(&[1, 2], 30).await;
        for name in &late {
            cluster.join(name, id).await;
        }
        late
    };
    let (stopped, late) = tokio::join!(stopping.stop(Duration::from_secs(30)), joining);
    assert!(stopped);
    let moved = readers.iter().filter(|name| homes[&user(name)].0 == 0);
    let moved: Vec<String> = moved.cloned().collect();
    assert!(!moved.is_empty());
    for name in &moved {
        cluster.come(name).await;
    }
    let after = send_all(&mut cluster, &creator, id, "after", 5).await;
    assert_eq!(after[0], before[4] + 1);
    let (got, _) = cluster.pushed(id).await;
    readers.extend(late.into_iter().filter(|name| *name != creator));
    assert_got(&cluster, &got, &readers, &after);
}

#[tokio::test(start_paused = true)]
async fn who_may_have_missed_a_post_of_a_dead_owner_sees_the_gap_or_is_told_to_sync() {
    let mut cluster = Cluster::new(3).await;
    let there = cluster.come_to(&[1, 2], 20).await;
    let id = cluster.channel_of(&there[0], 0, &[]).await;
    for name in &there[1..] {
        cluster.join(name, id).await;
    }
    send_all(&mut cluster, &there[0], id, "before", 1).await;
    cluster.pushed(id).await;
    let (sender_home, _) = cluster.sessions[&user(&there[0])];
    let deaf = 3 - sender_home;
    cluster.mesh.cut("r0", &format!("r{deaf}"));
    let unheard = send_all(&mut cluster, &there[0], id, "unheard", 5).await;
    cluster.pushed(id).await;
    cluster.handles[0].set_reach(Reach::Refused);
    tokio::time::sleep(Duration::from_secs(30)).await;
    // The last batch of the dead owner comes again, with a post or without.
    let resynced = resynced(&mut cluster).await;
    let (got, _) = cluster.pushed(id).await;
    for name in there[1..].iter().filter(|name| cluster.sessions[&user(name)].0 == deaf) {
        let session = cluster.session(name);
        let sees = got.get(&session).is_some_and(|seqs| seqs.contains(unheard.last().unwrap()));
        assert!(sees || resynced.contains(&session), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_router_where_nobody_follows_gets_one_post_of_an_open_channel_and_no_more() {
    let mut cluster = Cluster::new(3).await;
    let there = cluster.come_to(&[1], 5).await;
    let id = cluster.channel_of(&there[0], 0, &[]).await;
    for name in &there[1..] {
        cluster.join(name, id).await;
    }
    send_all(&mut cluster, &there[0], id, "first", 1).await;
    cluster.pushed(id).await;
    cluster.mesh.take();
    send_all(&mut cluster, &there[0], id, "post", 3).await;
    assert_eq!(cluster.mesh.take().0.get("audience deliver"), Some(&3), "to the one router where somebody follows");
    // One who subscribes there brings it back, one who leaves ends it.
    let guest = cluster.come_to(&[2], 1).await.remove(0);
    cluster.join(&guest, id).await;
    let seqs = send_all(&mut cluster, &there[0], id, "guest", 3).await;
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, std::slice::from_ref(&guest), &seqs);
    cluster.leave(&guest).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    send_all(&mut cluster, &there[0], id, "unheard", 1).await;
    cluster.pushed(id).await;
    cluster.mesh.take();
    send_all(&mut cluster, &there[0], id, "last", 3).await;
    assert_eq!(cluster.mesh.take().0.get("audience deliver"), Some(&3));
}

#[tokio::test(start_paused = true)]
async fn who_follows_at_a_router_that_starts_later_misses_nothing() {
    let mut cluster = Cluster::new(2).await;
    let there = cluster.come_to(&[0, 1], 6).await;
    let id = cluster.channel_of(&there[0], 0, &[]).await;
    for name in &there[1..] {
        cluster.join(name, id).await;
    }
    send_all(&mut cluster, &there[0], id, "before", 1).await;
    cluster.mesh.take();
    cluster.start("r2", "g2").await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(
        cluster.mesh.take().0.get("audience resync") >= Some(&1),
        "what was sent before there was a way may be missed"
    );
    let guest = cluster.come_to(&[2], 1).await.remove(0);
    cluster.join(&guest, id).await;
    let seqs = send_all(&mut cluster, &there[0], id, "after", 3).await;
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &[guest], &seqs);
}

/// The channel's owner answers, the user's own log cannot be written: the call is repeated until it can.
#[tokio::test(start_paused = true)]
async fn a_subscription_that_was_cut_short_is_made_by_its_repetition() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name, device) in SESSIONS {
        gateway.open(&world, session, name, device).await;
    }
    let id = channel(&mut gateway, 1, &[]).await;
    // No cursor can be stored: nobody is subscribed without one.
    store.set_plan(FaultPlan { refused_table: Some(Table::Cursors), ..FaultPlan::none() });
    let call = subscribe(id, "s1");
    let answer = gateway.call::<v1::ChannelSubscribeReply>(2, Method::ChannelSubscribe, &call).await;
    assert_eq!(code(answer), StatusCode::Unavailable);
    assert_eq!(row(&mut gateway, 2, id).await, None);
    store.set_plan(FaultPlan::none());
    gateway.call::<v1::ChannelSubscribeReply>(2, Method::ChannelSubscribe, &call).await.unwrap();
    assert_eq!(got_by(&mut gateway, 3, id, "m2").await, Some(2));
    assert_eq!(row(&mut gateway, 2, id).await.map(|row| (row.unread, row.left)), Some((1, false)));
}

#[tokio::test(start_paused = true)]
async fn a_list_that_is_long_enough_takes_no_more_channels() {
    let world = World::new(Store::from(Memory::new()));
    let mut config = world.config("r1");
    config.subscribe_list_max = 2;
    let router = world.router(config).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name) in [(1, "alice"), (2, "bob")] {
        gateway.open(&world, session, name, "d").await;
    }
    let mut ids = Vec::new();
    for key in ["one", "two", "three"] {
        let made: v1::ChannelCreateReply = gateway.call(1, Method::ChannelCreate, &create(key, &[])).await.unwrap();
        ids.push(ConversationId::from_slice(&made.conversation_id).unwrap());
    }
    join(&mut gateway, 2, ids[0]).await;
    join(&mut gateway, 2, ids[1]).await;
    let answer = gateway.call::<v1::ChannelSubscribeReply>(2, Method::ChannelSubscribe, &subscribe(ids[2], "")).await;
    assert_eq!(code(answer), StatusCode::TooLarge);
    end(&mut gateway, 2, ids[1], "").await.unwrap();
    assert_eq!(join(&mut gateway, 2, ids[1]).await, 4, "what was in it may come again");
}

/// What a router says that has sent entries while it had no way to this one.
#[tokio::test(start_paused = true)]
async fn whoever_follows_anything_is_told_to_sync_by_a_router_that_could_not_reach_it() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name, device) in SESSIONS {
        gateway.open(&world, session, name, device).await;
    }
    let id = channel(&mut gateway, 1, &[]).await;
    join(&mut gateway, 2, id).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    gateway.gather().await;
    gateway.inbox.clear();
    let (other, far) = pair(64);
    router.accept_peer(far);
    other.sender.send(peer_hello("r2")).await.unwrap();
    let message = Some(v1::peer_message::Message::AudienceResync(v1::PeerAudienceResync::default()));
    let messages = vec![v1::PeerMessage { shard: 0, request_id: 0, message }];
    let batch = v1::PeerBatch { first_number: 1, acknowledged_through: 0, messages };
    other.sender.send(LinkItem::Batch(Arc::new(batch))).await.unwrap();
    let told = gateway
        .expect("resync", |message| match message {
            Down::Resync(resync) => Some(resync.session_ids.clone()),
            _ => None,
        })
        .await;
    assert_eq!(told, [1, 2, 3], "the writer and the reader's devices, and nobody who follows nothing");
}

#[tokio::test(start_paused = true)]
async fn who_is_made_a_writer_gets_posts_at_a_router_where_nobody_followed() {
    let mut cluster = Cluster::new(3).await;
    let creator = cluster.come_to(&[1], 1).await.remove(0);
    let id = cluster.channel_of(&creator, 0, &[]).await;
    send_all(&mut cluster, &creator, id, "before", 2).await;
    let writer = cluster.come_to(&[2], 1).await.remove(0);
    invite(&mut cluster, &creator, id, &writer).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    // What came before the list had it is made good by a sync.
    assert!(resynced(&mut cluster).await.contains(&cluster.session(&writer)));
    cluster.pushed(id).await;
    let seqs = send_all(&mut cluster, &creator, id, "after", 3).await;
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, std::slice::from_ref(&writer), &seqs);
}

/// The effect on the reader's own list is on its way: there the reader still writes.
#[tokio::test(start_paused = true)]
async fn who_subscribes_right_after_leaving_as_a_writer_is_subscribed() {
    let mut cluster = Cluster::new(2).await;
    let creator = cluster.come_to(&[0], 1).await.remove(0);
    let writer = cluster.come_to(&[1], 1).await.remove(0);
    let id = cluster.channel_of(&creator, 0, &[&writer]).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let leave = v1::GroupLeaveRequest { conversation_id: id.to_bytes(), ..v1::GroupLeaveRequest::default() };
    for (round, call) in ["s1", ""].into_iter().enumerate() {
        cluster.mesh.lose("effect");
        cluster.call::<v1::GroupLeaveReply>(&writer, Method::GroupLeave, &leave).await.unwrap();
        let reply: v1::ChannelSubscribeReply =
            cluster.call(&writer, Method::ChannelSubscribe, &subscribe(id, call)).await.unwrap();
        assert_ne!(reply.own_seq, 0, "an entry of the list says so");
        cluster.mesh.lose_nothing();
        // The effect comes again, and is of a time before the subscription.
        tokio::time::sleep(Duration::from_secs(60)).await;
        cluster.pushed(id).await;
        let seqs = send_all(&mut cluster, &creator, id, ["first", "second"][round], 2).await;
        let (got, _) = cluster.pushed(id).await;
        assert_got(&cluster, &got, std::slice::from_ref(&writer), &seqs);
        let (home, session) = cluster.sessions[&user(&writer)];
        let row = row(&mut cluster.gateways[home], session, id).await.expect("a row");
        assert_eq!((row.left, row.unread), (false, 2), "round {round}");
        invite(&mut cluster, &creator, id, &writer).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// The router of a new writer asks for the channel's head; the answer comes when the writer has left again.
#[tokio::test(start_paused = true)]
async fn who_left_a_channel_follows_it_no_more_whatever_was_asked_before() {
    let mut cluster = Cluster::new(2).await;
    let creator = cluster.come_to(&[0], 1).await.remove(0);
    let writer = cluster.come_to(&[1], 1).await.remove(0);
    let id = cluster.channel_of(&creator, 0, &[]).await;
    let (home, session) = cluster.sessions[&user(&writer)];
    cluster.mesh.hold_answers_to(Some("r1"));
    invite(&mut cluster, &creator, id, &writer).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let leave = v1::GroupLeaveRequest { conversation_id: id.to_bytes(), ..v1::GroupLeaveRequest::default() };
    cluster.gateways[home].push(vec![call(session, 701, Method::GroupLeave, &leave)]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    cluster.mesh.hold_answers_to(None);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(row(&mut cluster.gateways[home], session, id).await.expect("a row").left);
    cluster.pushed(id).await;
    send_all(&mut cluster, &creator, id, "after", 2).await;
    assert_eq!(cluster.pushed(id).await.0.get(&session), None);
}

/// The entry of the subscription is given up: its cursor was stored, then the store takes nothing more for a while.
#[tokio::test(start_paused = true)]
async fn a_subscription_that_was_given_up_is_followed_no_longer() {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let patience = Duration::from_secs(2);
    let config = im_router::RouterConfig { append_patience: patience, workers: 1, ..world.config("r1") };
    let router = world.router(config).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name, device) in SESSIONS {
        gateway.open(&world, session, name, device).await;
    }
    let id = channel(&mut gateway, 1, &[]).await;
    // A burst begins in the reader's log: the next entry is one append.
    let call_of_burst = v1::PresenceSetVisibilityRequest { invisible: true };
    let began = gateway.call::<v1::PresenceSetVisibilityReply>(2, Method::PresenceSetVisibility, &call_of_burst).await;
    assert_eq!(began.unwrap().seq, 1);
    let delay = Duration::from_millis(100)..=Duration::from_millis(100);
    store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    gateway.push(vec![call(2, 701, Method::ChannelSubscribe, &subscribe(id, "s1"))]).await;
    // The cursor is written and read, then comes the append.
    tokio::time::sleep(Duration::from_millis(150)).await;
    store.set_plan(FaultPlan { refused_permille: 1000, ..FaultPlan::none() });
    tokio::time::sleep(2 * patience).await;
    store.set_plan(FaultPlan::none());
    let refused = gateway.expect("an answer", |message| match message {
        Down::CallReply(reply) if reply.request_id == 701 => Some(reply.status.clone()),
        _ => None,
    });
    assert_eq!(refused.await.expect("refused").code, StatusCode::Unavailable.number());
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(history(&mut gateway, 2, CLUSTER.self_id(&user("bob"))).await, [1]);
    assert_eq!(got_by(&mut gateway, 3, id, "m2").await, None);
    join(&mut gateway, 2, id).await;
    assert_eq!(got_by(&mut gateway, 3, id, "m3").await, Some(3));
}
