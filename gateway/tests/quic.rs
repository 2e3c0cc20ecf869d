//! What QUIC has that streams have not: clients that change their address, data before the handshake, addresses that must be proven.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use im_gateway::{GatewayConfig, Transport};
use im_proto::v1;
use quinn::crypto::rustls::QuicClientConfig;
use tokio::net::UdpSocket;

use crate::{
    support::*,
    transports::{LOOPBACK, Sockets},
};

type Joined = tokio::io::Join<quinn::RecvStream, quinn::SendStream>;

fn endpoint(sockets: &Sockets, early: bool) -> quinn::Endpoint {
    let mut tls = rustls::ClientConfig::clone(&sockets.client);
    tls.enable_early_data = early;
    let crypto = QuicClientConfig::try_from(tls).expect("TLS 1.3");
    let mut endpoint = quinn::Endpoint::client(LOOPBACK).expect("a socket");
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    endpoint
}

async fn open(connection: &quinn::Connection) -> Client<Joined> {
    let (send, receive) = connection.open_bi().await.expect("a stream");
    Client::new(tokio::io::join(receive, send))
}

/// Between one client and the server: keeps what the client sent, and may hold it back.
struct Wire {
    address: SocketAddr,
    sent: Mutex<Vec<Vec<u8>>>,
    holds_back: AtomicBool,
    retries_seen: AtomicUsize,
}

impl Wire {
    async fn to(server: SocketAddr) -> Arc<Self> {
        let near = UdpSocket::bind(LOOPBACK).await.expect("a socket");
        let far = UdpSocket::bind(LOOPBACK).await.expect("a socket");
        far.connect(server).await.expect("connected");
        let wire = Arc::new(Self {
            address: near.local_addr().expect("an address"),
            sent: Mutex::default(),
            holds_back: AtomicBool::new(false),
            retries_seen: AtomicUsize::new(0),
        });
        let carrying = wire.clone();
        tokio::spawn(async move {
            let (mut up, mut down) = ([0; 2048], [0; 2048]);
            let mut client = None;
            loop {
                tokio::select! {
                    Ok((count, from)) = near.recv_from(&mut up) => {
                        client = Some(from);
                        carrying.sent.lock().expect("not poisoned").push(up[..count].to_vec());
                        if !carrying.holds_back.load(Ordering::Relaxed) {
                            let _ = far.send(&up[..count]).await;
                        }
                    }
                    Ok(count) = far.recv(&mut down) => {
                        // A long header of type 3.
                        let is_retry = down[0] & 0xf0 == 0xf0;
                        carrying.retries_seen.fetch_add(usize::from(is_retry), Ordering::Relaxed);
                        if let Some(client) = client {
                            let _ = near.send_to(&down[..count], client).await;
                        }
                    }
                }
            }
        });
        wire
    }

    fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut *self.sent.lock().expect("not poisoned"))
    }
}

/// Somebody who has only what passed on the wire, from three addresses.
async fn replay(packets: &[Vec<u8>], server: SocketAddr) {
    for _ in 0..3 {
        let stranger = UdpSocket::bind(LOOPBACK).await.expect("a socket");
        for packet in packets {
            stranger.send_to(packet, server).await.expect("sent");
        }
    }
}

#[tokio::test]
async fn a_client_that_changes_its_address_keeps_its_session() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let sockets = Sockets::listen(&bench);
    let endpoint = endpoint(&sockets, false);
    let connection = endpoint.connect(sockets.quic, "localhost").expect("valid").await.expect("a handshake");
    let mut client = open(&connection).await;
    let session = bench.login_over(&mut router, &mut client, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    for round in 1..=3_u64 {
        let before = endpoint.local_addr().expect("an address");
        endpoint.rebind(std::net::UdpSocket::bind(LOOPBACK).expect("a socket")).expect("rebound");
        assert_ne!(endpoint.local_addr().expect("an address"), before);
        // In the middle of the conversation, in both directions.
        client.send(ClientFrame::Send(send(conversation, &format!("{round}")))).await;
        let forwarded = router.next_send().await;
        assert_eq!(forwarded.session_id, session, "the same session, and no word of another");
        router.acknowledge(&forwarded, round).await;
        assert_eq!(client.ack().await.seq, round);
        router.say(deliver(&[session], round, 3000)).await;
        let ServerFrame::Message(message) = client.next().await else { panic!("a message") };
        assert_eq!(message.seq, round);
    }
    assert_eq!(bench.gateway.load().connections, 1);
}

#[tokio::test]
async fn under_pressure_an_address_is_proven_before_anything_is_computed() {
    let (bench, mut router) = Bench::with_router(GatewayConfig { handshakes_max: 16, ..config() }).await;
    let sockets = Sockets::listen(&bench);
    let mut silent = Vec::new();
    for _ in 0..3 {
        let mut client = sockets.connect(Transport::Tcp).await;
        client.is_alive().await;
        silent.push(client);
    }
    let wire = Wire::to(sockets.quic).await;
    let endpoint = endpoint(&sockets, false);
    let connection = endpoint.connect(wire.address, "localhost").expect("valid").await.expect("a handshake");
    assert_eq!(wire.retries_seen.load(Ordering::Relaxed), 1);
    assert_eq!(bench.counts.of("im_gateway_quic_retries_total"), 1);
    let mut client = open(&connection).await;
    bench.login_over(&mut router, &mut client, "ann").await;
    // The first packet again, from an address that does not answer: again a retry, no handshake.
    replay(&wire.take()[..1], sockets.quic).await;
    let asked = std::time::Instant::now();
    while bench.counts.of("im_gateway_quic_retries_total") < 2 {
        assert!(asked.elapsed() < PATIENCE, "another retry");
        client.is_alive().await;
    }
    assert_eq!(bench.gateway.load().connections, 4);
}

/// A connection whose ticket is good for data before the next handshake.
async fn ticket(bench: &Bench, router: &mut Router, endpoint: &quinn::Endpoint, wire: &Wire) {
    let connection = endpoint.connect(wire.address, "localhost").expect("valid").await.expect("a handshake");
    let mut client = open(&connection).await;
    let session_id = bench.login_over(router, &mut client, "ann").await;
    connection.close(0_u32.into(), b"");
    assert_eq!(router.next().await, FromGateway::Close(v1::SessionClose { session_id }));
    wire.take();
}

#[tokio::test]
async fn a_hello_in_the_first_flight_opens_a_session_and_its_replay_does_nothing() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let sockets = Sockets::listen(&bench);
    let wire = Wire::to(sockets.quic).await;
    let endpoint = endpoint(&sockets, true);
    ticket(&bench, &mut router, &endpoint, &wire).await;
    let connecting = endpoint.connect(wire.address, "localhost").expect("valid");
    let Ok((connection, accepted)) = connecting.into_0rtt() else { panic!("no ticket for early data") };
    let mut client = open(&connection).await;
    bench.login_over(&mut router, &mut client, "ann").await;
    assert!(accepted.await, "the hello came with the first flight");
    replay(&wire.take(), sockets.quic).await;
    router.is_silent(Duration::from_millis(500)).await;
    client.is_alive().await;
    assert_eq!(bench.gateway.load().connections, 1);
}

#[tokio::test]
async fn a_first_flight_that_was_held_back_and_is_sent_by_another_does_nothing() {
    let quick = GatewayConfig { handshake_deadline: Duration::from_secs(2), ..config() };
    let (bench, mut router) = Bench::with_router(quick).await;
    let sockets = Sockets::listen(&bench);
    let wire = Wire::to(sockets.quic).await;
    let endpoint = endpoint(&sockets, true);
    ticket(&bench, &mut router, &endpoint, &wire).await;
    let mut live = sockets.connect(Transport::Tcp).await;
    bench.login_over(&mut router, &mut live, "ann").await;
    wire.holds_back.store(true, Ordering::Relaxed);
    let connecting = endpoint.connect(wire.address, "localhost").expect("valid");
    let Ok((connection, _)) = connecting.into_0rtt() else { panic!("no ticket for early data") };
    let mut client = open(&connection).await;
    client.send(bench.hello("ann")).await;
    let asked = std::time::Instant::now();
    let flight = loop {
        let sent = wire.sent.lock().expect("not poisoned").clone();
        // An initial packet and one of data that came before the handshake.
        if sent.iter().any(|packet| packet.len() >= 1200) && sent.len() >= 2 {
            break sent;
        }
        assert!(asked.elapsed() < PATIENCE, "a first flight");
        tokio::task::yield_now().await;
    };
    // The server may read it: the ticket was not used yet. But whoever sent it cannot finish the handshake.
    replay(&flight, sockets.quic).await;
    let failures = || bench.counts.of("im_gateway_transport_handshake_failures_total");
    while failures() == 0 {
        assert!(asked.elapsed() < PATIENCE, "given up at the deadline");
        router.is_silent(Duration::from_millis(100)).await;
        live.is_alive().await;
    }
    assert_eq!(bench.gateway.load().connections, 1, "nobody came in and nobody was kicked");
}

#[tokio::test]
async fn a_tls_client_that_comes_back_resumes_and_the_server_remembers_nothing() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let sockets = Sockets::listen(&bench);
    let connector = tokio_rustls::TlsConnector::from(sockets.client.clone());
    let mut kinds = Vec::new();
    for _ in 0..2 {
        let stream = tokio::net::TcpStream::connect(sockets.tls).await.expect("connected");
        let stream = connector.connect("localhost".try_into().expect("a name"), stream).await.expect("a handshake");
        kinds.push(stream.get_ref().1.handshake_kind().expect("done"));
        // The ticket comes with the first bytes of the server.
        let mut client = Client::new(stream);
        bench.login_over(&mut router, &mut client, "ann").await;
        drop(client);
        let FromGateway::Close(_) = router.next().await else { panic!("a close") };
    }
    assert_eq!(kinds, [rustls::HandshakeKind::Full, rustls::HandshakeKind::Resumed]);
}
