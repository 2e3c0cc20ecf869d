//! Named sets of sessions, and sessions that routers send elsewhere.

use im_gateway::Transport;
use im_proto::{ConversationId, StatusCode, v1};

use crate::support::*;

const ID: ConversationId = ConversationId::from_bytes([5; 16]);

fn set(from_version: u64, version: u64, joined: &[u64], left: &[u64]) -> FromRouter {
    FromRouter::AudienceSet(v1::AudienceSet {
        conversation_id: ID.to_bytes(),
        version,
        from_version,
        joined: joined.to_vec(),
        left: left.to_vec(),
    })
}

fn to_audience(version: u64, except_session_id: u64, seq: u64) -> FromRouter {
    let FromRouter::Deliver(deliver) = deliver(&[], seq, 20) else { panic!("a delivery") };
    FromRouter::AudienceDeliver(v1::AudienceDeliver {
        conversation_id: ID.to_bytes(),
        version,
        frame: deliver.frame,
        except_session_id,
    })
}

async fn message<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(client: &mut Client<S>) -> u64 {
    match client.next().await {
        ServerFrame::Message(message) => message.seq,
        other => panic!("expected a message, found {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_to_an_audience_reaches_all_of_it_but_the_sender() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut ann, ann_session) = bench.login(&mut router, "ann").await;
    let (mut bob, bob_session) = bench.login(&mut router, "bob").await;
    router.say_all(vec![set(0, 1, &[ann_session, bob_session], &[]), to_audience(1, ann_session, 1)]).await;
    assert_eq!(message(&mut bob).await, 1);
    ann.is_alive().await;
    let (mut eve, eve_session) = bench.login(&mut router, "eve").await;
    router.say_all(vec![set(1, 2, &[eve_session], &[bob_session]), to_audience(2, 0, 2)]).await;
    assert_eq!(message(&mut ann).await, 2);
    assert_eq!(message(&mut eve).await, 2);
    bob.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn an_audience_of_another_version_is_asked_for_once_and_resynced() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut ann, ann_session) = bench.login(&mut router, "ann").await;
    router.say_all(vec![set(0, 1, &[ann_session], &[]), to_audience(3, 0, 1), to_audience(3, 0, 2)]).await;
    let FromGateway::AudienceWanted(wanted) = router.next().await else { panic!("it asks") };
    assert_eq!(wanted.conversation_id, ID.to_bytes());
    ann.is_alive().await;
    router.say_all(vec![set(0, 3, &[ann_session], &[]), to_audience(3, 0, 3)]).await;
    let ServerFrame::Resync(resync) = ann.next().await else { panic!("a resync before anything live") };
    assert!(resync.spread_ms > 0);
    assert_eq!(message(&mut ann).await, 3);
    // Asked once: nothing else came before this.
    let mut other = bench.connect();
    bench.login_over(&mut router, &mut other, "other").await;
}

#[tokio::test(start_paused = true)]
async fn sessions_are_sent_elsewhere_by_their_own_transport_and_stay_until_they_go() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let mut client = bench.connect_as(64 * 1024, Transport::Quic, [127, 0, 0, 1]);
    let session = bench.login_over(&mut router, &mut client, "ann").await;
    let go_away = v1::GoAway {
        reason: Some(StatusCode::Overloaded.to_status()),
        reconnect_after_ms: 250,
        endpoints: ["tcp://g2:1", "quic://g2:2", "tls://g2:3"].map(str::to_owned).into(),
    };
    router.say(FromRouter::Move(v1::SessionsMove { session_ids: vec![session], go_away: Some(go_away) })).await;
    let ServerFrame::GoAway(told) = client.next().await else { panic!("go away") };
    assert_eq!((told.endpoints, told.reconnect_after_ms), (vec!["quic://g2:2".to_owned()], 250));
    client.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn above_its_bound_a_gateway_sends_newcomers_elsewhere_until_the_bound_is_forgotten() {
    let (bench, mut router) = Bench::with_router(config()).await;
    bench.gateways(&[("g1", "", false), ("g2", "", false)]);
    let (mut ann, _) = bench.login(&mut router, "ann").await;
    router.say(FromRouter::Bound(v1::LoadBound { connections: 1 })).await;
    // Time passes only when everything that can happen has happened.
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    ann.is_alive().await;
    let mut late = bench.connect_as(64 * 1024, Transport::Tcp, [127, 0, 0, 1]);
    let ServerFrame::GoAway(told) = late.next().await else { panic!("go away") };
    assert_eq!(told.endpoints, ["tcp://g2.tcp:1"]);
    late.is_closed_with(StatusCode::Overloaded).await;
    tokio::time::sleep(std::time::Duration::from_secs(10)).await;
    bench.login(&mut router, "late").await;
}
