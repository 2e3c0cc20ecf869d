//! Where clients are told to go: `Locate` before `Hello`, and the endpoints of `GoAway`.

use std::{collections::BTreeSet, time::Duration};

use im_gateway::Transport;
use im_proto::{StatusCode, method::Method, v1};
use prost::Message as _;
use tokio::io::DuplexStream;

use crate::support::*;

const ROOM: usize = 64 * 1024;

async fn ask(client: &mut Client<DuplexStream>, request_id: u32) -> v1::Reply {
    let method = Method::PlacementLocate.number();
    client.send(ClientFrame::Call(v1::Call { request_id, method, ..v1::Call::default() })).await;
    let ServerFrame::Reply(reply) = client.next().await else { panic!("a reply") };
    assert_eq!(reply.request_id, request_id);
    reply
}

fn names(reply: &v1::Reply) -> BTreeSet<String> {
    let reply = v1::LocateReply::decode(&reply.payload[..]).expect("an answer");
    assert!(reply.endpoints.iter().all(|endpoint| endpoint.transport != "http"));
    reply.endpoints.into_iter().map(|endpoint| endpoint.gateway_id).collect()
}

#[tokio::test(start_paused = true)]
async fn locate_before_hello_names_gateways_of_the_same_zone_first_and_none_that_drains() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let others = [("g1", "a", false), ("g2", "a", false), ("g3", "b", false), ("g4", "a", true), ("g5", "a", false)];
    bench.gateways(&others);
    let mut client = bench.connect();
    let reply = ask(&mut client, 7).await;
    assert_eq!(names(&reply), ["g1", "g2", "g5"].map(str::to_owned).into());
    // It says nothing of who the client is: the hello still follows.
    bench.login_over(&mut router, &mut client, "ann").await;
}

#[tokio::test(start_paused = true)]
async fn another_call_before_hello_is_malformed() {
    let (bench, _router) = Bench::with_router(config()).await;
    let mut client = bench.connect();
    let method = Method::MessageHistory.number();
    client.send(ClientFrame::Call(v1::Call { request_id: 1, method, ..v1::Call::default() })).await;
    client.is_closed_with(StatusCode::Malformed).await;
}

#[tokio::test(start_paused = true)]
async fn locate_before_hello_is_limited_per_address_and_not_for_the_machine_itself() {
    let (bench, _router) = Bench::with_router(config()).await;
    bench.gateways(&[("g1", "", false)]);
    let mut refused = 0;
    for request in 0..3 {
        // Connections do not matter, the address does.
        let mut client = bench.connect_as(ROOM, Transport::Tcp, [192, 0, 2, 1]);
        for more in 0..5 {
            let status = ask(&mut client, request * 5 + more).await.status.unwrap_or_default();
            refused += u32::from(status.code == StatusCode::RateLimited.number());
        }
    }
    assert_eq!(refused, 5, "10 of 15");
    assert_eq!(bench.counts.of("im_gateway_limited_total{limit=locates}"), 5, "who is refused is counted");
    assert_eq!(names(&ask(&mut bench.connect_as(ROOM, Transport::Tcp, [192, 0, 2, 77]), 1).await).len(), 1);
    let mut local = bench.connect();
    for request in 0..30 {
        assert!(ask(&mut local, request).await.status.is_none());
    }
    assert_eq!(bench.counts.of("im_gateway_limited_total{limit=locates}"), 5);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let again = ask(&mut bench.connect_as(ROOM, Transport::Tcp, [192, 0, 2, 1]), 1).await;
    assert!(again.status.is_none(), "a second later");
}

#[tokio::test(start_paused = true)]
async fn a_drain_names_other_gateways_by_the_transport_of_the_client_only() {
    let (bench, mut router) = Bench::with_router(config()).await;
    bench.gateways(&[("g1", "", false), ("g2", "", false), ("g3", "", true)]);
    let mut client = bench.connect_as(ROOM, Transport::Tls, [127, 0, 0, 1]);
    bench.login_over(&mut router, &mut client, "ann").await;
    let gateway = bench.gateway.clone();
    tokio::spawn(async move { gateway.drain(Duration::ZERO).await });
    let ServerFrame::GoAway(go_away) = client.next().await else { panic!("go away") };
    assert_eq!(go_away.endpoints, ["tls://g2.tls:1"]);
    let mut late = bench.connect_as(ROOM, Transport::Quic, [127, 0, 0, 1]);
    let ServerFrame::GoAway(go_away) = late.next().await else { panic!("go away") };
    assert_eq!(go_away.endpoints, ["quic://g2.quic:1"]);
}
