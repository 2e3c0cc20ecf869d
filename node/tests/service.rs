//! Another service on the api of a cluster, as `registry/examples/api.rs` shows it.
//!
//! Needs etcd and a CQL server: `deploy/test.sh` runs it.

// What README shows is what is tested.
#[allow(dead_code, reason = "its `main` reads standard input")]
#[path = "../../registry/examples/api.rs"]
mod api;

use std::path::PathBuf;

use im_client::Target;
use im_proto::{
    status::GRPC_METADATA,
    v1::{LocateRequest, link_service_client::LinkServiceClient, placement_service_client::PlacementServiceClient},
};
use tonic::{
    Code, Request,
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};

use crate::{
    cluster::{Cluster, alone},
    server::{Server, code, imd, stderr},
};

/// Messages before, while and after a router is dead.
const MESSAGES: u64 = 60;

async fn said(writer: &mut api::Writer, numbers: std::ops::RangeInclusive<u64>) {
    for number in numbers {
        let id = format!("id {number}");
        let seq = writer.send(&id, &number.to_string()).await.unwrap();
        assert_eq!(seq, number, "each once and in order");
        // As somebody who did not get the answer.
        if number % 10 == 0 {
            assert_eq!(writer.send(&id, &number.to_string()).await.unwrap(), number);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs etcd and CQL: run through deploy/test.sh"]
async fn a_service_goes_on_while_a_router_is_killed_and_nobody_without_a_certificate_is_answered() {
    let _alone = alone().await;
    let cluster = Cluster::on_etcd_and_cql();
    let mut routers = [cluster.router("router1"), cluster.router("router2")];
    let services = PathBuf::from(cluster.secrets()).join("services");
    let (ca, pem) = (services.join("ca.pem"), |name: &str| services.join(name));
    let (chain, key) = (pem("service.pem"), pem("service.key.pem"));
    let connect = async |ca, identity| api::connect(cluster.etcd(), &cluster.id(), ca, identity).await.unwrap();
    let service = connect(&ca, Some((&chain, &key))).await;

    let mut writers = Vec::new();
    // To several peers, so that each router owns something of it.
    for number in 0..8 {
        let (user, peer) = (format!("writer{number}"), format!("reader{number}"));
        writers.push((
            api::Writer::new(service.channel.clone(), &cluster.token(&user), &peer).await.unwrap(),
            user,
            peer,
        ));
    }
    for (writer, ..) in &mut writers {
        said(writer, 1..=MESSAGES / 3).await;
    }
    routers[0].child.kill().unwrap();
    routers[0].child.wait().unwrap();
    for (writer, ..) in &mut writers {
        said(writer, MESSAGES / 3 + 1..=2 * MESSAGES / 3).await;
    }
    routers[0] = cluster.router("router1");
    for (writer, ..) in &mut writers {
        said(writer, 2 * MESSAGES / 3 + 1..=MESSAGES).await;
    }
    let gateway = cluster.gateway("gateway1");
    for (_, user, peer) in &writers {
        let reader = cluster.client(peer, &[&gateway]).await;
        let page = reader.history(Target::peer(user).unwrap(), 1, 0, 1000, false).await.unwrap();
        let texts: Vec<String> = page.entries.iter().map(|entry| crate::cluster::text_of(&entry.body)).collect();
        assert_eq!(texts, (1..=MESSAGES).map(|number| number.to_string()).collect::<Vec<_>>());
        reader.close().await;
    }

    // Whoever has no certificate, or one of another authority, is not even asked for a token; and nobody else is taken for a router.
    let other = cluster.data("other");
    let made = imd(&["secrets", "--out", other.to_str().unwrap()]);
    assert_eq!(code(&made), 0, "{}", stderr(&made));
    let theirs = |name: &str| other.join("services").join(name);
    let (their_ca, their_chain, their_key) = (theirs("ca.pem"), theirs("service.pem"), theirs("service.key.pem"));
    for (ca, identity) in [(&ca, None), (&ca, Some((&*their_chain, &*their_key))), (&their_ca, Some((&*chain, &*key)))]
    {
        let stranger = connect(ca, identity).await;
        let mut placement = PlacementServiceClient::new(stranger.channel.clone());
        let refused = placement.locate(Request::new(LocateRequest {})).await.unwrap_err();
        // The connection ends before there is an answer; how that is told depends on who notices first.
        let of_transport = matches!(refused.code(), Code::Unavailable | Code::Cancelled | Code::Unknown);
        assert!(of_transport && refused.metadata().get(GRPC_METADATA).is_none(), "{identity:?}: {refused}");
    }
    let mut placement = PlacementServiceClient::new(service.channel.clone());
    assert!(placement.locate(Request::new(LocateRequest {})).await.is_ok(), "which is answered to whoever has one");
    refuses_plain_text(&routers[1]).await;
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(std::fs::read(&ca).unwrap()))
        .identity(Identity::from_pem(std::fs::read(&chain).unwrap(), std::fs::read(&key).unwrap()))
        .domain_name("im-router");
    opens_no_link(&routers[1], tls).await;
}

/// Whoever has a link can act for every user: that is not for other services.
async fn opens_no_link(router: &Server, tls: ClientTlsConfig) {
    let address = Channel::from_shared(format!("https://{}", router.address("link"))).unwrap();
    let channel = address.tls_config(tls).unwrap().connect().await.unwrap();
    let mut links = LinkServiceClient::new(channel);
    for refused in [
        links.gateway(tokio_stream::pending()).await.map(drop).unwrap_err(),
        links.peer(tokio_stream::pending()).await.map(drop).unwrap_err(),
    ] {
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    }
}

async fn refuses_plain_text(router: &Server) {
    let plain = Channel::from_shared(format!("http://{}", router.address("api"))).unwrap();
    let answer = match plain.connect().await {
        Ok(channel) => PlacementServiceClient::new(channel).locate(LocateRequest {}).await.map(drop),
        Err(_) => return,
    };
    assert!(answer.is_err(), "the api answers without TLS");
}
