//! Live pushes, and what becomes of those who do not read them.

use std::time::Duration;

use im_gateway::GatewayConfig;
use im_proto::{StatusCode, v1};
use tokio::time::Instant;

use crate::support::*;

#[tokio::test(start_paused = true)]
async fn live_messages_are_written_as_the_owner_encoded_them() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut ann, ann_session) = bench.login(&mut router, "ann").await;
    let (mut bob, bob_session) = bench.login(&mut router, "bob").await;
    router.say_all((1..=100).map(|seq| deliver(&[ann_session, bob_session, 999], seq, 50)).collect()).await;
    for client in [&mut ann, &mut bob] {
        for seq in 1..=100 {
            let ServerFrame::Message(message) = client.next().await else { panic!("a message") };
            assert_eq!(message.seq, seq);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_is_told_to_resync_and_delays_nobody() {
    let (bench, mut router) = Bench::with_router(GatewayConfig { outbox_bytes_max: 10_000, ..config() }).await;
    let mut slow = bench.connect_with_room(512);
    let slow_session = bench.login_over(&mut router, &mut slow, "slow").await;
    let (mut quick, quick_session) = bench.login(&mut router, "quick").await;
    for seq in 1..=200 {
        let sent = Instant::now();
        router.say(deliver(&[slow_session, quick_session], seq, 1000)).await;
        let ServerFrame::Message(message) = quick.next().await else { panic!("a message") };
        assert_eq!(message.seq, seq);
        assert!(sent.elapsed() < Duration::from_millis(1), "the slow one does not delay it");
    }
    // It reads on: what fitted, then the news that something did not.
    let mut last = 0;
    let resync = loop {
        match slow.next().await {
            ServerFrame::Message(message) => {
                assert_eq!(message.seq, last + 1, "what is delivered has no hole before the resync");
                last = message.seq;
            }
            ServerFrame::Resync(resync) => break resync,
            other => panic!("unexpected {other:?}"),
        }
    };
    assert!((5..50).contains(&last), "bounded by the outbox: {last}");
    assert_eq!(resync.reason(), v1::ResyncReason::SlowConsumer);
    assert!(resync.spread_ms > 0);
    slow.is_alive().await;
    router.say(deliver(&[slow_session], 201, 10)).await;
    let ServerFrame::Message(message) = slow.next().await else { panic!("live again") };
    assert_eq!(message.seq, 201);
}

#[tokio::test(start_paused = true)]
async fn acks_are_not_dropped_when_pushes_are() {
    let (bench, mut router) = Bench::with_router(GatewayConfig { outbox_bytes_max: 10_000, ..config() }).await;
    let mut slow = bench.connect_with_room(512);
    let session = bench.login_over(&mut router, &mut slow, "slow").await;
    slow.send(ClientFrame::Send(send(bench.conversation_in(1, 0), "m"))).await;
    let taken = router.next_send().await;
    for seq in 1..=50 {
        router.say(deliver(&[session], seq, 1000)).await;
    }
    router.acknowledge(&taken, 3).await;
    let mut acked = false;
    loop {
        match slow.next().await {
            ServerFrame::SendAck(ack) => acked = ack.seq == 3,
            ServerFrame::Resync(_) => break,
            _ => {}
        }
    }
    if !acked {
        assert_eq!(slow.ack().await.seq, 3);
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_never_reads_is_closed_and_its_memory_bounded() {
    let (bench, mut router) = Bench::with_router(GatewayConfig { outbox_bytes_max: 10_000, ..config() }).await;
    let mut silent = bench.connect_with_room(256);
    let session_id = bench.login_over(&mut router, &mut silent, "silent").await;
    let (mut other, _) = bench.login(&mut router, "other").await;
    let resync = v1::Resync { reason: v1::ResyncReason::OwnerMoved.into(), spread_ms: 1 };
    for _ in 0..5000 {
        // An answer that may not be dropped, though nobody reads it.
        router
            .say(FromRouter::Resync(v1::SessionsResync { session_ids: vec![session_id], resync: Some(resync) }))
            .await;
    }
    other.is_alive().await;
    assert_eq!(router.next().await, FromGateway::Close(v1::SessionClose { session_id }), "closed without its reading");
    drop(silent);
    other.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn one_that_sends_and_never_reads_stops_being_read() {
    let (bench, mut router) = Bench::with_router(GatewayConfig { outbox_bytes_max: 2000, ..config() }).await;
    let mut silent = bench.connect_with_room(256);
    let session_id = bench.login_over(&mut router, &mut silent, "silent").await;
    let ping = encode(ClientFrame::Ping(v1::Ping { echo: vec![1; 200].into() }));
    let started = Instant::now();
    let mut bytes_taken = 0;
    while tokio::time::timeout(Duration::from_secs(1), silent.try_send_bytes(&ping)).await.is_ok() {
        bytes_taken += ping.len();
    }
    assert!(bytes_taken < 10_000, "it is read no further: {bytes_taken}");
    silent.flood(&ping).await;
    assert!(started.elapsed() < Duration::from_secs(80), "and given up in the end: {:?}", started.elapsed());
    assert_eq!(router.next().await, FromGateway::Close(v1::SessionClose { session_id }));
}

#[tokio::test(start_paused = true)]
async fn a_resync_of_the_router_reaches_its_sessions() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut ann, ann_session) = bench.login(&mut router, "ann").await;
    let (mut bob, _) = bench.login(&mut router, "bob").await;
    let resync = v1::Resync { reason: v1::ResyncReason::OwnerMoved.into(), spread_ms: 77 };
    router
        .say(FromRouter::Resync(v1::SessionsResync { session_ids: vec![ann_session, 12345], resync: Some(resync) }))
        .await;
    assert_eq!(ann.next().await, ServerFrame::Resync(resync));
    bob.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn a_close_is_the_last_word_after_what_was_queued() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let mut client = bench.connect_with_room(512);
    let session_id = bench.login_over(&mut router, &mut client, "ann").await;
    let status = Some(StatusCode::Revoked.to_status());
    let mut messages: Vec<_> = (1..=20).map(|seq| deliver(&[session_id], seq, 500)).collect();
    messages.push(FromRouter::Kick(v1::SessionKick { session_id, status }));
    messages.push(deliver(&[session_id], 21, 1));
    router.say_all(messages).await;
    for seq in 1..=20 {
        let ServerFrame::Message(message) = client.next().await else { panic!("a message") };
        assert_eq!(message.seq, seq);
    }
    client.is_closed_with(StatusCode::Revoked).await;
}
