//! What one connection, one user and one address may do, and that nobody else notices when they do more.

use std::time::Duration;

use im_gateway::{GatewayConfig, Transport};
use im_proto::StatusCode;
use tokio::{io::DuplexStream, time::Instant};

use crate::support::*;

const ROOM: usize = 64 * 1024;
const STRANGER: [u8; 4] = [192, 0, 2, 1];

async fn sends_taken(client: &mut Client<DuplexStream>, bench: &Bench, count: usize) -> (usize, Option<Duration>) {
    let conversation = bench.conversation_in(1, 0);
    for number in 0..count {
        client.send(ClientFrame::Send(send(conversation, &format!("{number}")))).await;
    }
    client.send(ClientFrame::Ping(im_proto::v1::Ping::default())).await;
    let (mut taken, mut wait) = (count, None);
    while let ServerFrame::SendAck(ack) = client.next().await {
        let status = ack.status.expect("a refusal");
        assert_eq!(status_of(Some(&status)), Some(StatusCode::RateLimited));
        taken -= 1;
        wait = Some(Duration::from_millis(status.retry_after_ms.into()));
    }
    (taken, wait)
}

#[tokio::test(start_paused = true)]
async fn every_limit_is_in_the_welcome_as_it_is_set() {
    // Another value for each, so that none stands for another.
    let config = GatewayConfig {
        frame_bytes_max: 300_001,
        pending_sends_max: 202,
        calls_in_flight_max: 13,
        sends_per_second_max: 5_004,
        user_sends_per_second_max: 10_005,
        frames_per_second_max: 20_006,
        bytes_per_second_max: 8_000_007,
        address_connects_per_second_max: 108,
        address_connections_max: 10_009,
        address_failures_per_second_max: 10,
        locates_per_second_max: 11,
        connections_max: 100_012,
        handshakes_max: 10_013,
        handshake_deadline: Duration::from_millis(10_014),
        handshake_cpu_percent: 25,
        outbox_bytes_max: 1_000_016,
        reply_bytes_max: 4_000_017,
        ..config()
    };
    let (bench, mut router) = Bench::with_router(config).await;
    let mut client = bench.connect();
    client.send(bench.hello("ann")).await;
    let FromGateway::Open(open) = router.next().await else { panic!("an open") };
    router.say(bench.opened(&open, "ann")).await;
    // Without `..`: a field that is added to the message must be added here.
    let expected = im_proto::v1::Limits {
        frame_bytes: 300_001,
        body_bytes: 64 * 1024,
        pending_sends: 202,
        calls_in_flight: 13,
        sends_per_second: 5_004,
        user_sends_per_second: 10_005,
        frames_per_second: 20_006,
        bytes_per_second: 8_000_007,
        // As the user's owner says.
        user_sends_per_ten_seconds: 100_000,
        user_call_cost_per_ten_seconds: 20_000,
        address_connects_per_second: 108,
        address_connections: 10_009,
        address_failures_per_second: 10,
        address_locates_per_second: 11,
        connections: 100_012,
        handshakes: 10_013,
        handshake_deadline_ms: 10_014,
        handshake_cpu_percent: 25,
        outbox_bytes: 1_000_016,
        reply_bytes: 4_000_017,
    };
    assert_eq!(client.welcome().await.limits, Some(expected));
}

#[tokio::test(start_paused = true)]
async fn a_session_over_its_rate_is_told_when_to_come_back_and_then_taken() {
    let (bench, mut router) = Bench::with_router(GatewayConfig { sends_per_second_max: 20, ..config() }).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let (mut other, _) = bench.login(&mut router, "bob").await;
    let (taken, wait) = sends_taken(&mut client, &bench, 50).await;
    assert_eq!(taken, 20);
    assert_eq!(sends_taken(&mut other, &bench, 20).await, (20, None), "another user is not concerned");
    tokio::time::sleep(wait.expect("told when")).await;
    let (taken, _) = sends_taken(&mut client, &bench, 50).await;
    assert!((1..=3).contains(&taken), "what a tenth of a second brings: {taken}");
    assert_eq!(bench.counts.of("im_gateway_limited_total{limit=sends}"), 2);
}

#[tokio::test(start_paused = true)]
async fn all_sessions_of_a_user_share_its_rate() {
    let (bench, mut router) = Bench::with_router(GatewayConfig { user_sends_per_second_max: 30, ..config() }).await;
    let (mut one, _) = bench.login(&mut router, "ann").await;
    let (mut two, _) = bench.login(&mut router, "ann").await;
    let (mut other, _) = bench.login(&mut router, "bob").await;
    assert_eq!(sends_taken(&mut one, &bench, 20).await, (20, None));
    let (taken, wait) = sends_taken(&mut two, &bench, 20).await;
    assert_eq!(taken, 10);
    assert!(wait.is_some_and(|wait| wait >= Duration::from_millis(100)), "{wait:?}");
    assert_eq!(sends_taken(&mut other, &bench, 20).await, (20, None));
    assert_eq!(bench.counts.of("im_gateway_limited_total{limit=user sends}"), 1);
    drop((one, two));
    for _ in 0..2 {
        while !matches!(router.next().await, FromGateway::Close(_)) {}
    }
    let (mut again, _) = bench.login(&mut router, "ann").await;
    assert_eq!(sends_taken(&mut again, &bench, 1).await.0, 0, "a new connection is no new budget");
}

#[tokio::test(start_paused = true)]
async fn a_connection_over_its_bytes_is_read_more_slowly_and_others_are_not() {
    let (bench, mut router) = Bench::with_router(GatewayConfig { bytes_per_second_max: 10_000, ..config() }).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let (mut other, _) = bench.login(&mut router, "bob").await;
    let started = Instant::now();
    let ping = encode(ClientFrame::Ping(im_proto::v1::Ping { echo: vec![1; 240].into() }));
    for _ in 0..200 {
        client.send_bytes(&ping).await;
        let ServerFrame::Pong(_) = client.next().await else { panic!("a pong") };
        let asked = Instant::now();
        other.is_alive().await;
        assert!(asked.elapsed() < Duration::from_millis(1));
    }
    // 50,000 bytes at 10,000 a second, one second's worth at once.
    assert!(started.elapsed() >= Duration::from_millis(3900), "{:?}", started.elapsed());
    assert!(bench.counts.of("im_gateway_limited_total{limit=bytes}") > 100);
}

async fn refused(bench: &Bench, address: [u8; 4]) -> Duration {
    let mut client = bench.connect_as(ROOM, Transport::Tcp, address);
    let ServerFrame::Close(close) = client.next().await else { panic!("a close") };
    assert_eq!(status_of(close.status.as_ref()), Some(StatusCode::RateLimited));
    let wait = Duration::from_millis(close.status.expect("a status").retry_after_ms.into());
    assert!(!wait.is_zero(), "told when to come back");
    assert!(client.next_or_end().await.is_none());
    wait
}

#[tokio::test(start_paused = true)]
async fn an_address_connects_only_so_often_and_the_machine_itself_as_often_as_it_likes() {
    let (bench, _router) = Bench::with_router(GatewayConfig { address_connects_per_second_max: 3, ..config() }).await;
    for _ in 0..3 {
        bench.connect_as(ROOM, Transport::Tcp, STRANGER).is_alive().await;
    }
    let wait = refused(&bench, STRANGER).await;
    assert_eq!(bench.counts.of("im_gateway_limited_total{limit=address connects}"), 1);
    bench.connect_as(ROOM, Transport::Tcp, [192, 0, 2, 2]).is_alive().await;
    for _ in 0..20 {
        bench.connect().is_alive().await;
    }
    tokio::time::sleep(wait).await;
    bench.connect_as(ROOM, Transport::Tcp, STRANGER).is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn the_machine_itself_is_limited_if_the_configuration_says_so() {
    let limited = GatewayConfig { address_connects_per_second_max: 1, address_limits_loopback: true, ..config() };
    let (bench, _router) = Bench::with_router(limited).await;
    bench.connect().is_alive().await;
    refused(&bench, [127, 0, 0, 1]).await;
}

#[tokio::test(start_paused = true)]
async fn an_address_holds_only_so_many_connections() {
    let (bench, _router) = Bench::with_router(GatewayConfig { address_connections_max: 2, ..config() }).await;
    let mut first = bench.connect_as(ROOM, Transport::Tcp, STRANGER);
    first.is_alive().await;
    let mut second = bench.connect_as(ROOM, Transport::Tcp, STRANGER);
    second.is_alive().await;
    refused(&bench, STRANGER).await;
    assert_eq!(bench.counts.of("im_gateway_limited_total{limit=address connections}"), 1);
    drop(first);
    tokio::time::sleep(Duration::from_secs(1)).await;
    bench.connect_as(ROOM, Transport::Tcp, STRANGER).is_alive().await;
    second.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn who_fails_handshake_after_handshake_is_not_let_in_for_a_while() {
    let (bench, mut router) =
        Bench::with_router(GatewayConfig { address_failures_per_second_max: 4, ..config() }).await;
    let mut live = bench.connect_as(ROOM, Transport::Tcp, STRANGER);
    bench.login_over(&mut router, &mut live, "ann").await;
    for _ in 0..4 {
        let mut client = bench.connect_as(ROOM, Transport::Tcp, STRANGER);
        client.send(hello("nonsense".to_owned())).await;
        client.is_closed_with(StatusCode::Unauthenticated).await;
    }
    let wait = refused(&bench, STRANGER).await;
    assert_eq!(bench.counts.of("im_gateway_limited_total{limit=address failures}"), 1);
    live.is_alive().await;
    tokio::time::sleep(wait).await;
    let mut again = bench.connect_as(ROOM, Transport::Tcp, STRANGER);
    bench.login_over(&mut router, &mut again, "bob").await;
}

#[tokio::test(start_paused = true)]
async fn those_who_are_refused_hold_a_bounded_number_of_places() {
    let (bench, mut router) = Bench::with_router(GatewayConfig { connections_max: 1, ..config() }).await;
    let (mut live, _) = bench.login(&mut router, "ann").await;
    let mut refused: Vec<_> = (0..1_200).map(|_| bench.connect_with_room(1024)).collect();
    let mut told = 0;
    for client in &mut refused {
        told += usize::from(client.next_or_end().await.is_some());
    }
    assert_eq!(told, 1_000, "the others are closed without a word");
    assert_eq!(bench.counts.of("im_gateway_connections_dropped_total"), 200);
    live.is_alive().await;
}
