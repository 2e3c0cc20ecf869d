//! TCP, TLS and QUIC over loopback sockets run one behaviour suite; then what only a real transport can be fed.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use im_gateway::{
    GatewayConfig, Transport,
    listener::{certificate::Certificate, quic, tcp, tls},
};
use im_proto::{StatusCode, v1};
use rustls::{RootCertStore, crypto::ring, pki_types::PrivateKeyDer, version::TLS13};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
};

use crate::support::*;

pub const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Where a gateway listens, and what a client needs to connect.
pub struct Sockets {
    pub tcp: SocketAddr,
    pub tls: SocketAddr,
    pub quic: SocketAddr,
    pub client: Arc<rustls::ClientConfig>,
}

impl Sockets {
    pub fn listen(bench: &Bench) -> Self {
        let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
        let key = PrivateKeyDer::try_from(signed.signing_key.serialize_der()).expect("a key");
        let certificate = Certificate { chain: vec![signed.cert.der().clone()], key };
        let tcp = tcp::bind(LOOPBACK).expect("tcp");
        let tls = tls::bind(LOOPBACK, certificate.clone()).expect("tls");
        let quic = quic::bind(LOOPBACK, certificate).expect("quic");
        let mut roots = RootCertStore::empty();
        roots.add(signed.cert.der().clone()).expect("a root");
        let mut client = rustls::ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = vec![b"im/1".to_vec()];
        let sockets = Self { tcp: tcp.address(), tls: tls.address(), quic: quic.address(), client: Arc::new(client) };
        tokio::spawn(tcp.run(bench.gateway.clone()));
        tokio::spawn(tls.run(bench.gateway.clone()));
        tokio::spawn(quic.run(bench.gateway.clone()));
        sockets
    }

    pub async fn connect(&self, transport: Transport) -> Client<Box<dyn Stream>> {
        let stream: Box<dyn Stream> = match transport {
            Transport::Tcp => Box::new(TcpStream::connect(self.tcp).await.expect("connected")),
            Transport::Tls => {
                let stream = TcpStream::connect(self.tls).await.expect("connected");
                let name = "localhost".try_into().expect("a name");
                let connector = tokio_rustls::TlsConnector::from(self.client.clone());
                Box::new(connector.connect(name, stream).await.expect("a handshake"))
            }
            _ => {
                let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(self.client.clone()).expect("TLS 1.3");
                let mut endpoint = quinn::Endpoint::client(LOOPBACK).expect("a socket");
                endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
                let connection = endpoint.connect(self.quic, "localhost").expect("valid").await.expect("a handshake");
                let (send, receive) = connection.open_bi().await.expect("a stream");
                Box::new(tokio::io::join(receive, send))
            }
        };
        Client::new(stream)
    }
}

async fn suite(transport: Transport) {
    let (bench, mut router) = Bench::with_router(config()).await;
    let sockets = Sockets::listen(&bench);

    // Hello to Welcome, a send and its ack.
    let mut client = sockets.connect(transport).await;
    client.is_alive().await;
    client.send(bench.hello("ann")).await;
    let FromGateway::Open(open) = router.next().await else { panic!("an open") };
    assert_eq!(open.transport, transport.as_str());
    assert!(open.remote_address.starts_with("127.0.0.1:"));
    router.say(bench.opened(&open, "ann")).await;
    client.welcome().await;
    let conversation = bench.conversation_in(1, 0);
    client.send(ClientFrame::Send(send(conversation, "m"))).await;
    let forwarded = router.next_send().await;
    router.acknowledge(&forwarded, 1).await;
    assert_eq!(client.ack().await.seq, 1);

    // Many live messages of odd sizes, in order.
    let sizes = (1..=300).map(|seq| (seq, usize::try_from(seq * 7919 % 5_000).expect("small")));
    for (seq, size) in sizes.clone() {
        router.say(deliver(&[open.session_id], seq, size)).await;
    }
    for (seq, size) in sizes {
        let ServerFrame::Message(message) = client.next().await else { panic!("a message") };
        assert_eq!((message.seq, message.body.len()), (seq, size));
    }

    // A frame of nearly the limit after Welcome passes, in many pieces.
    let mut large = send(conversation, "large");
    large.after = vec![1; 900_000].into();
    client.send(ClientFrame::Send(large)).await;
    assert_eq!(status_of(client.ack().await.status.as_ref()), Some(StatusCode::TooLarge));

    // A close reaches a client that still sends.
    client.send_bytes(&[0, 0, 0, 0, 1, 2, 3]).await;
    client.is_closed_with(StatusCode::Malformed).await;
    assert_eq!(router.next().await, FromGateway::Close(v1::SessionClose { session_id: open.session_id }));

    // A client that vanishes is reported.
    let mut client = sockets.connect(transport).await;
    let session_id = bench.login_over(&mut router, &mut client, "bob").await;
    drop(client);
    assert_eq!(router.next().await, FromGateway::Close(v1::SessionClose { session_id }));

    // A drain ends it: go away, close, end.
    let mut client = sockets.connect(transport).await;
    bench.login_over(&mut router, &mut client, "bob").await;
    let gateway = bench.gateway.clone();
    let draining = tokio::spawn(async move { gateway.drain(Duration::from_millis(10)).await });
    let ServerFrame::GoAway(_) = client.next().await else { panic!("go away") };
    client.is_closed_with(StatusCode::Draining).await;
    drop(client);
    draining.await.expect("drained");
    assert_eq!(bench.gateway.load().connections, 0);
}

#[tokio::test]
async fn tcp_behaves() {
    suite(Transport::Tcp).await;
}

#[tokio::test]
async fn tls_behaves() {
    suite(Transport::Tls).await;
}

#[tokio::test]
async fn quic_behaves() {
    suite(Transport::Quic).await;
}

#[tokio::test]
async fn garbage_instead_of_a_handshake_harms_nobody() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let sockets = Sockets::listen(&bench);
    let mut live = Vec::new();
    for transport in [Transport::Tcp, Transport::Tls, Transport::Quic] {
        let mut client = sockets.connect(transport).await;
        bench.login_over(&mut router, &mut client, transport.as_str()).await;
        live.push(client);
    }
    // Not TLS: the connection ends.
    let mut stream = TcpStream::connect(sockets.tls).await.expect("connected");
    stream.write_all(&[0xff; 2000]).await.expect("written");
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    // TLS without the protocol's name: refused by the server.
    let mut nameless = rustls::ClientConfig::clone(&sockets.client);
    nameless.alpn_protocols.clear();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(nameless));
    let stream = TcpStream::connect(sockets.tls).await.expect("connected");
    if let Ok(mut stream) = connector.connect("localhost".try_into().expect("a name"), stream).await {
        assert_eq!(stream.read(&mut [0; 16]).await.unwrap_or(0), 0, "closed without a byte");
    }
    // Packets from nowhere.
    let socket = UdpSocket::bind(LOOPBACK).await.expect("a socket");
    for length in [0, 1, 20, 200, 1200, 1472] {
        for first in [0x00, 0x40, 0xc0, 0xff] {
            socket.send_to(&vec![first; length], sockets.quic).await.expect("sent");
        }
    }
    for client in &mut live {
        client.is_alive().await;
    }
    assert_eq!(bench.counts.of("im_gateway_transport_handshake_failures_total"), 2, "both that spoke TCP");
}

#[tokio::test]
async fn the_task_of_a_tcp_connection_is_small() {
    let (bench, _router) = Bench::with_router(config()).await;
    let listening = tokio::net::TcpListener::bind(LOOPBACK).await.expect("bound");
    let stream = TcpStream::connect(listening.local_addr().expect("an address")).await.expect("connected");
    let remote_address = stream.local_addr().expect("an address");
    let connection =
        bench.gateway.serve_stream(stream, im_gateway::PeerInfo { transport: Transport::Tcp, remote_address });
    let bytes = size_of_val(&connection);
    println!("{bytes} bytes");
    assert!(bytes <= 512, "an idle connection holds no buffer: {bytes} bytes");
}

/// Others have a turn between newcomers, however many of them came at once.
#[tokio::test]
async fn a_burst_of_connects_is_accepted_a_few_at_a_time() {
    const BURST: u64 = 100;
    let (bench, _router) = Bench::with_router(config()).await;
    let listener = tcp::bind(LOOPBACK).expect("a socket");
    // They wait in the kernel before the listener runs.
    let address = listener.address();
    let connect = |_| std::net::TcpStream::connect(address).expect("connected");
    let burst: Vec<std::net::TcpStream> = (0..BURST).map(connect).collect();
    tokio::spawn(listener.run(bench.gateway.clone()));
    let (mut accepted, mut most) = (0, 0);
    let watching = async {
        while accepted < BURST {
            tokio::task::yield_now().await;
            let now = bench.gateway.load().connections;
            most = most.max(now - accepted);
            accepted = now;
        }
    };
    tokio::time::timeout(PATIENCE, watching).await.expect("all are accepted");
    assert!(most <= 8, "{most} in one go");
    drop(burst);
}

#[tokio::test]
async fn over_tls_an_address_over_its_limit_is_closed_before_a_handshake_and_its_place_is_free_again_after_one() {
    let limited = GatewayConfig { address_connections_max: 1, address_limits_loopback: true, ..config() };
    let (bench, _router) = Bench::with_router(limited).await;
    let sockets = Sockets::listen(&bench);
    let first = TcpStream::connect(sockets.tls).await.expect("connected");
    let mut second = TcpStream::connect(sockets.tls).await.expect("connected");
    assert_eq!(second.read(&mut [0]).await.unwrap_or(0), 0, "closed without a word");
    assert_eq!(bench.counts.of("im_gateway_limited_total{limit=address connections}"), 1);
    drop(first);
    let connector = tokio_rustls::TlsConnector::from(sockets.client.clone());
    let let_in = async {
        loop {
            let stream = TcpStream::connect(sockets.tls).await.expect("connected");
            if connector.connect("localhost".try_into().expect("a name"), stream).await.is_ok() {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, let_in).await.expect("the place is free");
}
