//! The same small session over real sockets: TCP, TLS and QUIC, with a pinned certificate; and what is not trusted.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::BytesMut;
use im_client::{Client, ClientConfig, ConnectError, Endpoint, Target, Transport, Trust};
use im_proto::{
    body,
    frame::{self, Decoded},
    limits,
    v1::{self, client_frame, server_frame},
};
use prost::Message as _;
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::server::{conversation, environment, welcome};

/// A server for one connection: welcomes, syncs, acknowledges every send.
async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut input = BytesMut::new();
    let mut seq = 0;
    loop {
        loop {
            let payload = match frame::split_frame(&mut input, limits::FRAME_BYTES_MAX) {
                Ok(Some(payload)) => payload,
                Ok(None) => break,
                Err(_) => {
                    // The client, which may be one of another transport, closes or has closed.
                    let close = v1::ServerFrame::from(server_frame::Frame::Close(v1::Close::default()));
                    let _ = stream.write_all(&frame::frame_to_bytes(&close)).await;
                    // What is not read would take the answer away again.
                    while matches!(stream.read_buf(&mut input).await, Ok(1..)) {
                        input.clear();
                    }
                    return;
                }
            };
            let Decoded::Frame(frame) = frame::decode_client_frame(payload).unwrap() else { panic!("unknown frame") };
            let answer = match frame {
                client_frame::Frame::Hello(_) => server_frame::Frame::Welcome(welcome()),
                client_frame::Frame::Call(call) => {
                    let payload = v1::SyncReply::default().encode_to_vec().into();
                    server_frame::Frame::Reply(v1::Reply {
                        request_id: call.request_id,
                        status: None,
                        payload,
                        last: true,
                    })
                }
                client_frame::Frame::Send(send) => {
                    seq += 1;
                    server_frame::Frame::SendAck(v1::SendAck {
                        client_message_id: send.client_message_id,
                        conversation_id: conversation(1).to_bytes(),
                        seq,
                        ..v1::SendAck::default()
                    })
                }
                _ => continue,
            };
            let bytes = frame::frame_to_bytes(&v1::ServerFrame::from(answer));
            if stream.write_all(&bytes).await.is_err() {
                return;
            }
        }
        match stream.read_buf(&mut input).await {
            Ok(read) if read > 0 => {}
            _ => return,
        }
    }
}

struct Certificate {
    ca: Vec<u8>,
    server: rustls::ServerConfig,
}

fn certificate() -> Certificate {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(vec![]).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let leaf = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    let mut server = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
        .unwrap();
    server.alpn_protocols = vec![b"im/1".to_vec()];
    Certificate { ca: ca_pem.into_bytes(), server }
}

/// Listens on loopback and serves what comes, one connection after the other.
async fn listen(transport: Transport, server: rustls::ServerConfig) -> SocketAddr {
    let loopback: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let environment = environment(1);
    if transport == Transport::Quic {
        let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(server).unwrap();
        let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        let endpoint = quinn::Endpoint::server(config, loopback).unwrap();
        let address = endpoint.local_addr().unwrap();
        environment.spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let Ok(connection) = incoming.await else { continue };
                let (send, receive) = connection.accept_bi().await.unwrap();
                serve(tokio::io::join(receive, send)).await;
            }
        });
        return address;
    }
    let listener = tokio::net::TcpListener::bind(loopback).await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
    environment.spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if transport == Transport::Tcp {
                serve(stream).await;
            } else if let Ok(stream) = acceptor.accept(stream).await {
                serve(stream).await;
            }
        }
    });
    address
}

fn config(endpoint: Endpoint, trust: &Trust) -> ClientConfig {
    let mut config = ClientConfig::new(vec![endpoint], "token".to_owned(), trust).unwrap();
    // Real time: a busy machine is no failure.
    config.ready_timeout = Duration::from_secs(60);
    config
}

#[tokio::test]
async fn every_transport_carries_a_session_and_is_closed_in_order() {
    for transport in [Transport::Tcp, Transport::Tls, Transport::Quic] {
        let Certificate { ca, server } = certificate();
        let address = listen(transport, server).await;
        for host in ["127.0.0.1", "localhost"] {
            let endpoint = Endpoint::new(transport, format!("{host}:{}", address.port())).unwrap();
            let client = Client::connect(config(endpoint, &Trust::Pinned(ca.clone()))).await.unwrap();
            for seq in 1..=100 {
                let sent = client.send(Target::peer("bob").unwrap(), body::text("x".repeat(1000))).await.unwrap();
                assert_eq!(sent.seq, seq);
            }
            client.close().await;
        }
    }
}

/// Why there is no connection, of at least one attempt that has ended.
async fn why_not(config: &ClientConfig) -> String {
    let config = ClientConfig { ready_timeout: Duration::from_millis(500), ..config.clone() };
    for _ in 0..120 {
        match Client::connect(config.clone()).await {
            Err(ConnectError::TimedOut { last, .. }) if last == "no answer" => {}
            Err(ConnectError::TimedOut { last, .. }) => return last,
            Err(other) => panic!("{other:?}"),
            Ok(_) => panic!("connected"),
        }
    }
    panic!("no attempt ends");
}

#[tokio::test]
async fn a_server_that_is_not_trusted_or_has_another_name_is_refused() {
    for transport in [Transport::Tls, Transport::Quic] {
        let Certificate { ca, server } = certificate();
        let address = listen(transport, server).await;
        let endpoint = Endpoint::new(transport, address.to_string()).unwrap();
        let named = Endpoint { server_name: Some("elsewhere.example".to_owned()), ..endpoint.clone() };
        let stranger = Trust::Pinned(certificate().ca);
        for (endpoint, trust) in [(endpoint.clone(), stranger), (endpoint, Trust::Nobody), (named, Trust::Pinned(ca))] {
            let is_named = endpoint.server_name.is_some();
            let last = why_not(&config(endpoint, &trust)).await;
            assert!(last.contains("invalid peer certificate: "), "{last}");
            // `im` knows it by these words, and then waits no longer.
            let is_stranger = ["UnknownIssuer", "BadSignature"].iter().any(|word| last.contains(word));
            assert_eq!(is_stranger, !is_named, "{last}");
        }
    }
}

#[tokio::test]
async fn a_port_of_another_transport_is_known_by_its_answer() {
    // By these words `im` asks whether the transport is the right one.
    for (theirs, ours, words) in
        [(Transport::Tls, Transport::Tcp, "this one announces"), (Transport::Tcp, Transport::Tls, "InvalidContentType")]
    {
        let Certificate { ca, server } = certificate();
        let address = listen(theirs, server).await;
        let endpoint = Endpoint::new(ours, address.to_string()).unwrap();
        let last = why_not(&config(endpoint, &Trust::Pinned(ca))).await;
        assert!(last.contains(words), "{last}");
    }
}

#[test]
fn a_file_without_a_certificate_is_no_trust() {
    for pem in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        let endpoints = vec!["tls://localhost:1".parse::<Endpoint>().unwrap()];
        let trust = Trust::Pinned(pem.as_bytes().to_vec());
        assert!(ClientConfig::new(endpoints, "token".to_owned(), &trust).is_err());
    }
}
