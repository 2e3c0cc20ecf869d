//! Leaving: everybody is told within the window, what was committed is acknowledged, then each is closed.

use std::time::Duration;

use im_proto::StatusCode;
use tokio::time::Instant;

use crate::support::*;

#[tokio::test(start_paused = true)]
async fn clients_are_told_spread_over_the_window() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let mut clients = Vec::new();
    for number in 0..20 {
        clients.push(bench.login(&mut router, &format!("user{number}")).await.0);
    }
    let started = Instant::now();
    let gateway = bench.gateway.clone();
    let draining = tokio::spawn(async move { gateway.drain(Duration::from_secs(10)).await });
    let mut ends = Vec::new();
    for mut client in clients {
        ends.push(tokio::spawn(async move {
            let ServerFrame::GoAway(go_away) = client.next().await else { panic!("go away") };
            let told = started.elapsed();
            client.is_closed_with(StatusCode::Draining).await;
            (told, go_away.reconnect_after_ms)
        }));
    }
    let mut told = Vec::new();
    for end in ends {
        told.push(end.await.expect("told").0);
    }
    told.sort();
    assert!(told[0] < Duration::from_secs(3) && told[19] > Duration::from_secs(7), "{told:?}");
    assert!(told[19] <= Duration::from_secs(10));
    draining.await.expect("drained");
    assert_eq!(bench.gateway.load().connections, 0);
    assert!(bench.gateway.load().draining);
}

#[tokio::test(start_paused = true)]
async fn what_is_on_its_way_is_acknowledged_before_the_close() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    client.send(ClientFrame::Send(send(bench.conversation_in(1, 0), "m"))).await;
    let taken = router.next_send().await;
    let gateway = bench.gateway.clone();
    let draining = tokio::spawn(async move { gateway.drain(Duration::ZERO).await });
    let ServerFrame::GoAway(_) = client.next().await else { panic!("go away") };
    tokio::time::sleep(Duration::from_secs(2)).await;
    router.acknowledge(&taken, 1).await;
    assert_eq!(client.ack().await.seq, 1);
    client.is_closed_with(StatusCode::Draining).await;
    drop(client);
    draining.await.expect("drained");
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_at_its_deadline_whoever_stays() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let mut stalled = bench.connect_with_room(64);
    bench.login_over(&mut router, &mut stalled, "stalled").await;
    stalled.send(ClientFrame::Send(send(bench.conversation_in(1, 0), "never answered"))).await;
    router.next_send().await;
    let started = Instant::now();
    bench.gateway.drain(Duration::from_secs(1)).await;
    let took = started.elapsed();
    assert!(took >= Duration::from_secs(5) && took < Duration::from_secs(10), "{took:?}");
    assert_eq!(bench.gateway.load().connections, 0);
}

#[tokio::test(start_paused = true)]
async fn newcomers_are_sent_elsewhere_during_a_drain() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    client.send(ClientFrame::Send(send(bench.conversation_in(1, 0), "m"))).await;
    router.next_send().await;
    let gateway = bench.gateway.clone();
    tokio::spawn(async move { gateway.drain(Duration::ZERO).await });
    let ServerFrame::GoAway(_) = client.next().await else { panic!("go away") };
    let mut late = bench.connect();
    let ServerFrame::GoAway(_) = late.next().await else { panic!("go away") };
    late.is_closed_with(StatusCode::Draining).await;
}
