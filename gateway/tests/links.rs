//! Links: numbered, replayed after a break, and made good when something is lost for good.

use std::time::Duration;

use im_proto::v1;

use crate::support::*;

async fn link_lost(client: &mut Client<tokio::io::DuplexStream>) {
    let ServerFrame::Resync(resync) = client.next().await else { panic!("a resync") };
    assert_eq!(resync.reason(), v1::ResyncReason::LinkLost);
    assert!(resync.spread_ms > 0);
}

#[tokio::test(start_paused = true)]
async fn a_reconnect_replays_what_was_not_received_and_nothing_else() {
    let (mut bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session) = bench.login(&mut router, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    client.send(ClientFrame::Send(send(conversation, "1"))).await;
    let first = router.next_send().await;
    let received_through = router.received_through;
    client.send(ClientFrame::Send(send(conversation, "2"))).await;
    client.is_alive().await;
    drop(router); // with the second in the channel
    client.is_alive().await;
    client.send(ClientFrame::Send(send(conversation, "3"))).await;
    let mut router = bench.router_of_boot(21, received_through).await;
    let hello = router.peer.clone().expect("a hello");
    assert_eq!((hello.peer_boot_id, hello.received_through), (21, 1), "the gateway says what it has");
    for expected in ["2", "3"] {
        assert_eq!(router.next_send().await.send.expect("a send").client_message_id, expected);
    }
    router.continue_at(2);
    router.acknowledge(&first, 1).await;
    assert_eq!(client.ack().await.client_message_id, "1");
    router.say(deliver(&[session], 5, 1)).await;
    assert!(matches!(client.next().await, ServerFrame::Message(_)), "no resync: nothing was lost");
}

#[tokio::test(start_paused = true)]
async fn repeated_batches_are_handled_once() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session) = bench.login(&mut router, "ann").await;
    router.say_numbered(2, vec![deliver(&[session], 1, 1), deliver(&[session], 2, 1)]).await;
    router.say_numbered(3, vec![deliver(&[session], 2, 1), deliver(&[session], 3, 1)]).await;
    for seq in 1..=3 {
        let ServerFrame::Message(message) = client.next().await else { panic!("a message") };
        assert_eq!(message.seq, seq);
    }
    client.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn a_gap_resets_the_link() {
    let (mut bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session) = bench.login(&mut router, "ann").await;
    router.say_numbered(9, vec![deliver(&[session], 1, 1)]).await;
    assert!(router.next_or_end().await.is_none(), "the link is closed");
    let received_through = router.received_through;
    let mut router = bench.router_of_boot(21, received_through).await;
    assert_eq!(router.peer.clone().expect("a hello").received_through, 1);
    router.say_numbered(2, vec![deliver(&[session], 1, 1)]).await;
    assert!(matches!(client.next().await, ServerFrame::Message(_)), "replayed");
}

#[tokio::test(start_paused = true)]
async fn what_the_router_could_not_replay_ends_in_a_resync() {
    let (mut bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    client.send(ClientFrame::Send(send(bench.conversation_in(1, 0), "m"))).await;
    let taken = router.next_send().await;
    let received_through = router.received_through;
    drop(router);
    let mut router = bench.router_of_boot(21, received_through).await;
    // Number 2 is gone: it may have been the answer, or a push.
    router.say_numbered(3, vec![deliver(&[session_id], 1, 1)]).await;
    let announced = FromGateway::Announce(v1::SessionAnnounce { session_id, capability: Some(capability("ann")) });
    assert_eq!(router.next().await, announced);
    assert_eq!(router.next_send().await, v1::SessionSend { attempt: 2, ..taken });
    let mut found = [client.next().await, client.next().await].map(|frame| matches!(frame, ServerFrame::Resync(_)));
    found.sort_unstable();
    assert_eq!(found, [false, true]);
}

/// What the router is told until it is told of both.
async fn announced_and_closed(router: &mut Router, announced: u64, closed: u64) {
    let mut awaited = vec![
        FromGateway::Announce(v1::SessionAnnounce { session_id: announced, capability: Some(capability("ann")) }),
        FromGateway::Close(v1::SessionClose { session_id: closed }),
    ];
    while !awaited.is_empty() {
        let message = router.next().await;
        let position = awaited.iter().position(|known| *known == message);
        awaited.swap_remove(position.unwrap_or_else(|| panic!("expected {awaited:?}, found {message:?}")));
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_that_ended_while_the_link_was_down_is_closed_whatever_the_router_lost() {
    let (mut bench, mut router) = Bench::with_router(config()).await;
    let (_ann, ann_session) = bench.login(&mut router, "ann").await;
    let (bob, bob_session) = bench.login(&mut router, "bob").await;
    let received_through = router.received_through;
    drop(router);
    drop(bob);
    let mut router = bench.router_of_boot(21, received_through).await;
    // Numbers 3 and 4 are gone. The router has everything that was said to it, and forgets nothing by itself.
    router.say_numbered(5, vec![deliver(&[ann_session], 1, 1)]).await;
    announced_and_closed(&mut router, ann_session, bob_session).await;
}

#[tokio::test(start_paused = true)]
async fn a_session_that_ends_just_after_a_loss_is_closed_too() {
    let (mut bench, mut router) = Bench::with_router(config()).await;
    let (_ann, ann_session) = bench.login(&mut router, "ann").await;
    let (bob, bob_session) = bench.login(&mut router, "bob").await;
    let received_through = router.received_through;
    drop(router);
    let mut router = bench.router_of_boot(21, received_through).await;
    router.say_numbered(5, vec![deliver(&[ann_session], 1, 1)]).await;
    // The link sees the loss before the connection sees its end, and that before the sessions are visited.
    drop(bob);
    announced_and_closed(&mut router, ann_session, bob_session).await;
}

#[tokio::test(start_paused = true)]
async fn a_router_that_lost_something_hears_of_the_end_of_sessions_that_were_only_presented() {
    let mut bench = Bench::new(config());
    let home_shard = bench.user_shard("ann");
    bench.owners(|shard| Some(if shard == home_shard { "r1" } else { "r2" }.to_owned()));
    let mut routers = [bench.router().await, bench.router().await];
    routers.sort_by(|one, other| one.name.cmp(&other.name));
    let [mut home, mut other] = routers;
    let (mut client, session_id) = bench.login(&mut home, "ann").await;
    let conversation = bench.conversation_in(bench.shards.get(), u32::from(home_shard == 0));
    client.send(ClientFrame::Send(send(conversation, "m"))).await;
    assert!(matches!(other.next().await, FromGateway::Present(_)));
    let taken = other.next_send().await;
    other.acknowledge(&taken, 1).await;
    client.ack().await;
    let received_through = other.received_through;
    drop(other);
    let mut other = bench.router_of_boot(21, received_through).await;
    other.say_numbered(5, vec![deliver(&[session_id], 1, 1)]).await;
    assert!(matches!(client.next().await, ServerFrame::Message(_)));
    drop(client);
    assert_eq!(home.next().await, FromGateway::Close(v1::SessionClose { session_id }));
    assert_eq!(other.next().await, FromGateway::Close(v1::SessionClose { session_id }));
}

#[tokio::test(start_paused = true)]
async fn a_router_that_started_again_gets_everything_anew() {
    let (mut bench, mut router) = Bench::with_router(config()).await;
    let (mut ann, ann_session) = bench.login(&mut router, "ann").await;
    let (mut bob, bob_session) = bench.login(&mut router, "bob").await;
    ann.send(ClientFrame::Send(send(bench.conversation_in(1, 0), "m"))).await;
    let taken = router.next_send().await;
    drop(router);
    let mut router = bench.router_of_boot(22, 0).await;
    let announce = |session_id, user| {
        FromGateway::Announce(v1::SessionAnnounce { session_id, capability: Some(capability(user)) })
    };
    assert_eq!(router.next().await, announce(ann_session, "ann"));
    let taken = v1::SessionSend { attempt: 2, ..taken };
    assert_eq!(router.next_send().await, taken);
    assert_eq!(router.next().await, announce(bob_session, "bob"));
    router.is_silent(Duration::from_secs(1)).await;
    link_lost(&mut ann).await;
    link_lost(&mut bob).await;
    router.acknowledge(&taken, 1).await;
    assert_eq!(ann.ack().await.seq, 1);
}

#[tokio::test(start_paused = true)]
async fn an_overflow_of_the_replay_buffer_is_made_good() {
    let small = im_gateway::GatewayConfig { link_replay_bytes_max: 300, ..config() };
    let (mut bench, mut router) = Bench::with_router(small).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    let mut taken = Vec::new();
    for number in 0..20 {
        client.send(ClientFrame::Send(send(conversation, &number.to_string()))).await;
        taken.push(router.next_send().await);
    }
    drop(router);
    // It says that it received only the first of all.
    let mut router = bench.router_of_boot(21, 1).await;
    let announced = FromGateway::Announce(v1::SessionAnnounce { session_id, capability: Some(capability("ann")) });
    assert_eq!(router.next().await, announced);
    for first in taken {
        assert_eq!(router.next_send().await, v1::SessionSend { attempt: first.attempt + 20, ..first });
    }
    link_lost(&mut client).await;
}

#[tokio::test(start_paused = true)]
async fn the_users_owner_moves_and_learns_of_the_sessions() {
    let (mut bench, mut first) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut first, "ann").await;
    bench.owner("r2");
    let mut second = bench.router().await;
    let announced = FromGateway::Announce(v1::SessionAnnounce { session_id, capability: Some(capability("ann")) });
    assert_eq!(second.next().await, announced);
    // The new owner tells it to sync, not the gateway.
    client.is_alive().await;
    second.say(deliver(&[session_id], 1, 1)).await;
    assert!(matches!(client.next().await, ServerFrame::Message(_)));
    drop(client);
    assert_eq!(second.next().await, FromGateway::Close(v1::SessionClose { session_id }));
    assert_eq!(first.next().await, FromGateway::Close(v1::SessionClose { session_id }), "all that know it are told");
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_gets_a_shard_back_is_told_of_the_sessions_again() {
    let (bench, mut first) = Bench::with_router(config()).await;
    let (_client, session_id) = bench.login(&mut first, "ann").await;
    // The owner between them is never reached.
    bench.owner("r2");
    tokio::time::sleep(Duration::from_millis(10)).await;
    bench.owner("r1");
    let announced = FromGateway::Announce(v1::SessionAnnounce { session_id, capability: Some(capability("ann")) });
    assert_eq!(first.next().await, announced);
    first.is_silent(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn the_owner_moves_during_the_handshake() {
    let (mut bench, mut first) = Bench::with_router(config()).await;
    let mut client = bench.connect();
    client.send(bench.hello("ann")).await;
    let FromGateway::Open(open) = first.next().await else { panic!("an open") };
    bench.owner("r2");
    let mut second = bench.router().await;
    assert_eq!(second.next().await, FromGateway::Open(open.clone()));
    assert_eq!(first.next().await, FromGateway::Close(v1::SessionClose { session_id: open.session_id }));
    first.say(bench.opened(&open, "ann")).await;
    client.is_alive().await;
    second.say(bench.opened(&open, "ann")).await;
    client.welcome().await;
}

#[tokio::test(start_paused = true)]
async fn a_router_that_leaves_the_registry_is_dialled_no_more() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    bench.remove_router("r1");
    assert!(router.next_or_end().await.is_none(), "the link is closed");
    client.is_alive().await;
    drop(router);
    tokio::time::sleep(Duration::from_secs(20)).await;
    client.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn a_router_of_another_cluster_is_not_spoken_to() {
    let mut bench = Bench::new(config());
    bench.owner("r1");
    for _ in 0..3 {
        let mut stranger = bench.dialled().await;
        stranger.hello_of_cluster("other", 21, 0).await;
        assert!(stranger.next_or_end().await.is_none());
    }
    let mut router = bench.router().await;
    bench.login(&mut router, "ann").await;
}

#[tokio::test(start_paused = true)]
async fn the_load_is_told_each_second() {
    let (bench, mut router) = Bench::with_router(im_gateway::GatewayConfig { connections_max: 50, ..config() }).await;
    let (_client, _) = bench.login(&mut router, "ann").await;
    for _ in 0..3 {
        let load = router.next_load().await;
        assert_eq!((load.capacity, load.draining), (50, false));
    }
    assert_eq!(router.next_load().await.connections, 1);
}
