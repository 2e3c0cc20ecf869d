//! From the first byte to `Welcome`, heartbeats, expiry.

use std::time::Duration;

use bytes::Bytes;
use im_proto::{StatusCode, v1};
use tokio::{io::DuplexStream, time::Instant};

use crate::support::*;

#[tokio::test(start_paused = true)]
async fn welcome_comes_only_after_the_owner_has_recorded_the_session() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let mut client = bench.connect();
    client.send(bench.hello("ann")).await;
    let FromGateway::Open(open) = router.next().await else { panic!("an open") };
    assert_eq!((open.transport.as_str(), open.client_name.as_str()), ("memory", "test"));
    client.is_alive().await; // and nothing was there before the pong
    router.say(bench.opened(&open, "ann")).await;
    let welcome = client.welcome().await;
    assert_eq!(welcome.user_id, "ann");
    assert_eq!(welcome.sync_version, 5);
    assert_eq!(welcome.heartbeat_interval_ms, 30_000);
    assert_eq!(welcome.version, 1);
    assert_eq!(welcome.self_conversation_id, bench.secret.self_id(&user("ann")).to_bytes());
    assert_eq!(welcome.limits.expect("limits").pending_sends, 256);
}

#[tokio::test(start_paused = true)]
async fn a_session_is_not_opened_in_the_future() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let now = bench.environment.clock.now().as_millis();
    // A clock that is a little fast is believed: the order of the logins of its device is what counts.
    for (said, taken) in [(i64::MAX, now + 60_000), (now + 50_000, now + 50_000), (1, 1), (0, now), (i64::MIN, now)] {
        let ClientFrame::Hello(hello) = bench.hello("ann") else { unreachable!() };
        let mut client = bench.connect();
        client.send(ClientFrame::Hello(v1::Hello { opened_at_ms: said, ..hello })).await;
        let FromGateway::Open(open) = router.next().await else { panic!("an open") };
        assert_eq!(open.opened_at_ms, taken, "of {said}");
        drop(client);
        assert!(matches!(router.next().await, FromGateway::Close(_)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_closes_with_its_status() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let mut client = bench.connect();
    client.send(bench.hello("ann")).await;
    let FromGateway::Open(open) = router.next().await else { panic!("an open") };
    let status = Some(StatusCode::Revoked.to_status());
    router.say(FromRouter::Refused(v1::SessionRefused { session_id: open.session_id, status })).await;
    client.is_closed_with(StatusCode::Revoked).await;
}

#[tokio::test(start_paused = true)]
async fn who_says_nothing_is_timed_out_at_the_deadline() {
    let (bench, _router) = Bench::with_router(config()).await;
    let started = Instant::now();
    bench.connect().is_closed_with(StatusCode::TimedOut).await;
    let waited = started.elapsed();
    assert!(waited >= Duration::from_secs(10) && waited < Duration::from_secs(11), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn without_an_owner_a_hello_waits_until_there_is_one_or_the_deadline() {
    let mut bench = Bench::new(config());
    let (mut early, mut late) = (bench.connect(), bench.connect());
    early.send(bench.hello("ann")).await;
    early.is_alive().await;
    early.is_closed_with(StatusCode::Unavailable).await;
    late = {
        drop(late);
        bench.connect()
    };
    late.send(bench.hello("ann")).await;
    late.is_alive().await;
    bench.owner("r1");
    let mut router = bench.router().await;
    let FromGateway::Open(open) = router.next().await else { panic!("an open") };
    router.say(bench.opened(&open, "ann")).await;
    late.welcome().await;
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_cannot_answer_now_is_asked_again() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let mut client = bench.connect();
    client.send(bench.hello("ann")).await;
    let FromGateway::Open(open) = router.next().await else { panic!("an open") };
    let status = Some(StatusCode::Unavailable.to_status());
    router.say(FromRouter::Refused(v1::SessionRefused { session_id: open.session_id, status })).await;
    let FromGateway::Open(again) = router.next().await else { panic!("an open again") };
    assert_eq!(again, open);
    router.say(bench.opened(&open, "ann")).await;
    client.welcome().await;
}

/// Asked twice, because the shard moved away and back, the owner lets the session in with its first answer and refuses it with the
/// second: it does not know it any more.
#[tokio::test(start_paused = true)]
async fn a_session_that_its_owner_refuses_after_the_welcome_is_announced() {
    let (mut bench, mut first) = Bench::with_router(config()).await;
    let mut client = bench.connect();
    client.send(bench.hello("ann")).await;
    let FromGateway::Open(open) = first.next().await else { panic!("an open") };
    bench.owner("r2");
    let mut second = bench.router().await;
    assert!(matches!(first.next().await, FromGateway::Close(_)));
    assert!(matches!(second.next().await, FromGateway::Open(_)));
    bench.owner("r1");
    assert!(matches!(second.next().await, FromGateway::Close(_)));
    assert_eq!(first.next().await, FromGateway::Open(open.clone()));
    first.say(bench.opened(&open, "ann")).await;
    client.welcome().await;
    let refused = |code: StatusCode| {
        let status = Some(code.to_status());
        FromRouter::Refused(v1::SessionRefused { session_id: open.session_id, status })
    };
    // Who was left has nothing to say about it.
    second.say(refused(StatusCode::Unavailable)).await;
    first.is_silent(Duration::from_secs(5)).await;
    for code in [StatusCode::Unavailable, StatusCode::Overloaded] {
        first.say(refused(code)).await;
        let FromGateway::Announce(announce) = first.next().await else { panic!("an announcement") };
        assert_eq!((announce.session_id, announce.capability), (open.session_id, Some(capability("ann"))));
    }
    client.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_asked_and_a_dead_one_given_up() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session) = bench.login(&mut router, "ann").await;
    let started = Instant::now();
    let ServerFrame::Ping(ping) = client.next().await else { panic!("a ping") };
    assert_eq!(started.elapsed().as_secs(), 45, "asked after one and a half intervals");
    client.send(ClientFrame::Pong(v1::Pong { echo: ping.echo })).await;
    let answered = Instant::now();
    let ServerFrame::Ping(_) = client.next().await else { panic!("a ping") };
    client.is_closed_with(StatusCode::TimedOut).await;
    assert_eq!(answered.elapsed().as_secs(), 75, "given up after two and a half");
    drop(client);
    assert_eq!(router.next().await, FromGateway::Close(v1::SessionClose { session_id: session }));
}

#[tokio::test(start_paused = true)]
async fn a_client_whose_heartbeats_are_up_to_half_an_interval_late_is_never_asked() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    for late in 0..15 {
        tokio::time::sleep(Duration::from_secs(30 + late)).await;
        client.is_alive().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_ends_the_live_connection_unless_it_is_renewed() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let mut claims = bench.claims("ann");
    claims.exp = claims.iat + 100;
    let token = bench.sign(&claims);
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut client = bench.connect();
        client.send(hello(token.clone())).await;
        let FromGateway::Open(open) = router.next().await else { panic!("an open") };
        router.say(bench.opened(&open, "ann")).await;
        client.welcome().await;
        clients.push((client, open.session_id));
    }
    let (mut renewing, session) = clients.remove(0);
    let (mut ending, _) = clients.remove(0);
    claims.exp = claims.iat + 1000;
    let token = bench.sign(&claims);
    renewing.send(ClientFrame::Renew(v1::Renew { token: token.clone() })).await;
    assert_eq!(router.next().await, FromGateway::Renew(v1::SessionRenew { session_id: session, token }));
    let identity = v1::Identity { user_id: "ann".to_owned(), expires_at_ms: claims.exp * 1000, ..Default::default() };
    let capability = Some(capability("ann"));
    router
        .say(FromRouter::Renewed(v1::SessionRenewed {
            session_id: session,
            status: None,
            identity: Some(identity),
            capability,
        }))
        .await;
    let ServerFrame::Renewed(renewed) = renewing.next().await else { panic!("renewed") };
    assert_eq!((renewed.status, renewed.token_expires_at_ms), (None, claims.exp * 1000));
    let started = Instant::now();
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(25)).await;
        ending.is_alive().await;
        renewing.is_alive().await;
    }
    ending.is_closed_with(StatusCode::TokenExpired).await;
    assert!(started.elapsed() <= Duration::from_secs(101), "{:?}", started.elapsed());
    renewing.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn a_token_that_ends_sooner_than_the_one_it_renews_ends_the_connection_when_it_does() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session) = bench.login(&mut router, "ann").await;
    let (frame, ends_at) = lasting(&bench, 4);
    client.send(frame).await;
    let FromGateway::Renew(_) = router.next().await else { panic!("a renewal") };
    router.say(judged(session, Ok(ends_at))).await;
    assert_eq!(renewed(&mut client).await, Ok(ends_at));
    let begun = Instant::now();
    client.is_closed_with(StatusCode::TokenExpired).await;
    assert!(begun.elapsed() <= Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_renewal_for_somebody_else_is_refused_and_changes_nothing() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    for (token, code) in [(bench.token("bob"), StatusCode::Forbidden), ("x".to_owned(), StatusCode::Unauthenticated)] {
        client.send(ClientFrame::Renew(v1::Renew { token })).await;
        let ServerFrame::Renewed(renewed) = client.next().await else { panic!("an answer") };
        assert_eq!(status_of(renewed.status.as_ref()), Some(code));
    }
    router.is_silent(Duration::from_secs(5)).await;
    client.is_alive().await;
}

/// A token of ann that lives for so many seconds, and when it ends.
fn lasting(bench: &Bench, seconds: i64) -> (ClientFrame, i64) {
    let mut claims = bench.claims("ann");
    claims.exp = claims.iat + seconds;
    (ClientFrame::Renew(v1::Renew { token: bench.sign(&claims) }), claims.exp * 1000)
}

/// What the owner answers to a renewal.
fn judged(session_id: u64, judgement: Result<i64, StatusCode>) -> FromRouter {
    let identity = judgement.ok().map(|expires_at_ms| v1::Identity { expires_at_ms, ..Default::default() });
    let status = judgement.err().map(StatusCode::to_status);
    FromRouter::Renewed(v1::SessionRenewed { session_id, status, identity, capability: Some(capability("ann")) })
}

async fn renewed(client: &mut Client<DuplexStream>) -> Result<i64, StatusCode> {
    let ServerFrame::Renewed(renewed) = client.next().await else { panic!("an answer to a renewal") };
    status_of(renewed.status.as_ref()).map_or(Ok(renewed.token_expires_at_ms), Err)
}

#[tokio::test(start_paused = true)]
async fn of_a_thousand_renewals_one_is_under_way_and_the_others_are_told_to_wait() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    let (renew, end) = lasting(&bench, 200_000);
    for _ in 0..1_000 {
        client.send(renew.clone()).await;
    }
    for _ in 0..999 {
        assert_eq!(renewed(&mut client).await, Err(StatusCode::RateLimited));
    }
    assert!(matches!(router.next().await, FromGateway::Renew(_)));
    router.is_silent(Duration::from_secs(1)).await;
    router.say(judged(session_id, Ok(end))).await;
    assert_eq!(renewed(&mut client).await, Ok(end));
    assert_eq!(bench.counts.of("im_gateway_limited_total{limit=renewals}"), 999);
}

#[tokio::test(start_paused = true)]
async fn a_session_renews_its_token_a_few_times_in_ten_seconds_however_soon_each_is_answered() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    let mut taken = 0;
    for number in 0..50 {
        let (renew, end) = lasting(&bench, 100_000 + number);
        client.send(renew).await;
        client.send(ClientFrame::Ping(v1::Ping::default())).await;
        match client.next().await {
            ServerFrame::Renewed(refused) => {
                let status = refused.status.expect("a refusal");
                assert_eq!(status_of(Some(&status)), Some(StatusCode::RateLimited));
                assert!((1..=10_000).contains(&status.retry_after_ms), "told when: {}", status.retry_after_ms);
                assert!(matches!(client.next().await, ServerFrame::Pong(_)));
            }
            _pong => {
                taken += 1;
                assert!(matches!(router.next().await, FromGateway::Renew(_)));
                router.say(judged(session_id, Ok(end))).await;
                assert_eq!(renewed(&mut client).await, Ok(end));
            }
        }
    }
    assert_eq!(taken, 5);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (renew, _) = lasting(&bench, 200_000);
    client.send(renew).await;
    assert!(matches!(router.next().await, FromGateway::Renew(_)), "it may again");
}

#[tokio::test(start_paused = true)]
async fn the_answer_to_one_renewal_is_not_taken_for_that_to_another() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    let (bad, _) = lasting(&bench, 100_000);
    let (good, end) = lasting(&bench, 200_000);
    client.send(bad).await;
    assert!(matches!(router.next().await, FromGateway::Renew(_)));
    client.send(good.clone()).await;
    assert_eq!(renewed(&mut client).await, Err(StatusCode::RateLimited), "one at a time");
    router.say(judged(session_id, Err(StatusCode::Forbidden))).await;
    assert_eq!(renewed(&mut client).await, Err(StatusCode::Forbidden));
    client.send(good).await;
    assert!(matches!(router.next().await, FromGateway::Renew(_)));
    router.say(judged(session_id, Ok(end))).await;
    assert_eq!(renewed(&mut client).await, Ok(end));
    client.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_nobody_answers_does_not_stand_in_the_way_for_ever() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    let (first, first_end) = lasting(&bench, 100_000);
    let (second, second_end) = lasting(&bench, 200_000);
    client.send(first).await;
    assert!(matches!(router.next().await, FromGateway::Renew(_)));
    tokio::time::sleep(Duration::from_secs(10)).await;
    client.send(second).await;
    assert!(matches!(router.next().await, FromGateway::Renew(_)));
    // It answers at last. That it accepts is true of either token, and each answer is the one to its own.
    router.say(judged(session_id, Ok(first_end))).await;
    assert_eq!(renewed(&mut client).await, Ok(first_end));
    router.say(judged(session_id, Ok(second_end))).await;
    assert_eq!(renewed(&mut client).await, Ok(second_end));
    router.say(judged(session_id, Ok(first_end))).await;
    client.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn a_renewal_goes_to_an_owner_that_has_its_shard_again() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    let (renew, end) = lasting(&bench, 200_000);
    client.send(renew).await;
    assert!(matches!(router.next().await, FromGateway::Renew(_)));
    // It drops what it is told of a shard that it does not have.
    bench.owner("r2");
    tokio::time::sleep(Duration::from_millis(10)).await;
    bench.owner("r1");
    assert!(matches!(router.next().await, FromGateway::Announce(_)));
    assert!(matches!(router.next().await, FromGateway::Renew(_)));
    router.say(judged(session_id, Ok(end))).await;
    assert_eq!(renewed(&mut client).await, Ok(end));
}

#[tokio::test(start_paused = true)]
async fn a_disconnect_is_reported_once() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (client, session) = bench.login(&mut router, "ann").await;
    drop(client);
    assert_eq!(router.next().await, FromGateway::Close(v1::SessionClose { session_id: session }));
    router.is_silent(Duration::from_secs(100)).await;
    assert_eq!(bench.gateway.load().connections, 0);
}

#[tokio::test(start_paused = true)]
async fn a_kick_closes_with_its_status() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session) = bench.login(&mut router, "ann").await;
    let status = Some(StatusCode::KickedByAnotherDevice.to_status());
    router.say(FromRouter::Kick(v1::SessionKick { session_id: session, status })).await;
    client.is_closed_with(StatusCode::KickedByAnotherDevice).await;
}

#[tokio::test(start_paused = true)]
async fn more_connections_than_allowed_are_told_to_go_away() {
    let (bench, mut router) = Bench::with_router(im_gateway::GatewayConfig { connections_max: 1, ..config() }).await;
    let (client, _) = bench.login(&mut router, "ann").await;
    let mut second = bench.connect();
    let ServerFrame::GoAway(go_away) = second.next().await else { panic!("go away") };
    assert!(go_away.reconnect_after_ms > 0);
    second.is_closed_with(StatusCode::Overloaded).await;
    drop(client);
    router.next().await;
    let (mut third, _) = bench.login(&mut router, "ann").await;
    third.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn handshakes_are_bounded_apart() {
    let (bench, mut router) = Bench::with_router(im_gateway::GatewayConfig { handshakes_max: 1, ..config() }).await;
    let (_live, _) = bench.login(&mut router, "ann").await;
    let mut silent = bench.connect();
    silent.is_alive().await;
    let mut second = bench.connect();
    let ServerFrame::GoAway(_) = second.next().await else { panic!("go away") };
    second.is_closed_with(StatusCode::Overloaded).await;
    silent.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn a_ping_is_answered_with_its_echo() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    client.is_alive().await;
    client.send(ClientFrame::Ping(v1::Ping { echo: Bytes::from(vec![1; 10_000]) })).await;
    let ServerFrame::Refused(refused) = client.next().await else { panic!("refused") };
    assert_eq!(status_of(refused.status.as_ref()), Some(StatusCode::TooLarge));
    client.is_alive().await;
}
