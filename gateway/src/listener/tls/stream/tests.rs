use std::io::Write as _;

use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::ring, version::TLS13};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio_rustls::{TlsConnector, client};

use super::*;
use crate::listener::{ALPN, certificate::Certificate};

/// Bytes that the streams below hold at a time. With less than the six of its first answer the client would wait for a server that waits for it.
const CUTS: [usize; 4] = [7, 100, 5_000, 200_000];

fn configs() -> (Arc<ServerConfig>, Arc<ClientConfig>) {
    let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let key = signed.signing_key.serialize_der().try_into().expect("a key");
    let server = Certificate { chain: vec![signed.cert.der().clone()], key }.tls_config().expect("a configuration");
    let mut roots = RootCertStore::empty();
    roots.add(signed.cert.der().clone()).expect("a root");
    let client =
        ClientConfig::builder_with_provider(Arc::new(ring::default_provider())).with_protocol_versions(&[&TLS13]);
    let mut client = client.expect("TLS 1.3").with_root_certificates(roots).with_no_client_auth();
    client.alpn_protocols = vec![ALPN.to_vec()];
    (Arc::new(server), Arc::new(client))
}

type Client = client::TlsStream<DuplexStream>;

async fn connected(cut: usize) -> (TlsStream<DuplexStream>, Client) {
    let (server, client) = configs();
    let (theirs, ours) = duplex(cut);
    let connector = TlsConnector::from(client);
    let connecting = connector.connect("localhost".try_into().expect("a name"), theirs);
    let (accepted, connected) = tokio::join!(TlsStream::accept(server, ours), connecting);
    let accepted = accepted.expect("a handshake");
    assert_eq!(accepted.agreed().alpn_protocol(), Some(ALPN));
    (accepted, connected.expect("a handshake"))
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|index| (index * 31 % 251) as u8).collect()
}

fn is_empty_at_rest<S>(stream: &TlsStream<S>) -> bool {
    let Session { partial, plain, sealed, .. } = &stream.session;
    [partial.capacity(), plain.bytes.capacity(), sealed.bytes.capacity()] == [0; 3]
}

/// Each side writes as much as it can while it reads.
async fn exchange(server: &mut TlsStream<DuplexStream>, client: &mut Client, count: usize) {
    let sent = bytes(count);
    let (mut from_server, mut from_client) = (vec![0; count], vec![0; count]);
    let (mut server_reads, mut server_writes) = tokio::io::split(server);
    let (mut client_reads, mut client_writes) = tokio::io::split(client);
    let server_says = async {
        server_writes.write_all(&sent).await?;
        server_writes.flush().await
    };
    let client_says = async {
        client_writes.write_all(&sent).await?;
        client_writes.flush().await
    };
    let (said, answered, heard, received) = tokio::join!(
        server_says,
        client_says,
        client_reads.read_exact(&mut from_server),
        server_reads.read_exact(&mut from_client)
    );
    said.and(answered).expect("written");
    heard.and(received).expect("read");
    assert!(from_server == sent && from_client == sent, "{count} bytes arrive as they were sent");
}

#[tokio::test]
async fn bytes_arrive_whole_both_ways_however_the_stream_is_cut_and_nothing_is_kept_at_rest() {
    for cut in CUTS {
        let (mut server, mut client) = connected(cut).await;
        let counts: &[usize] = if cut < 100 { &[1, 100, 1_000] } else { &[1, 100, 16_384, 16_385, 300_000] };
        for &count in counts {
            exchange(&mut server, &mut client, count).await;
            assert!(is_empty_at_rest(&server), "cut at {cut}, {count} bytes");
        }
    }
}

#[tokio::test]
async fn a_reader_with_little_room_gets_the_rest_later_in_order() {
    let (mut server, mut client) = connected(100_000).await;
    let sent = bytes(40_000);
    client.write_all(&sent).await.expect("written");
    client.flush().await.expect("written");
    let mut got = Vec::new();
    let mut part = [0; 999];
    while got.len() < sent.len() {
        let count = server.read(&mut part).await.expect("read");
        got.extend_from_slice(&part[..count]);
    }
    assert_eq!(got, sent);
    assert!(is_empty_at_rest(&server));
}

#[tokio::test]
async fn keys_change_in_mid_stream() {
    for cut in CUTS {
        let (mut server, mut client) = connected(cut).await;
        for _ in 0..3 {
            client.get_mut().1.refresh_traffic_keys().expect("TLS 1.3");
            exchange(&mut server, &mut client, 2_000).await;
        }
        assert!(is_empty_at_rest(&server));
    }
}

#[tokio::test]
async fn only_the_peers_word_is_an_end() {
    let (mut server, mut client) = connected(1_000).await;
    client.shutdown().await.expect("said");
    assert_eq!(server.read(&mut [0; 10]).await.expect("an end"), 0);
    assert_eq!(server.read(&mut [0; 10]).await.expect("still"), 0);
    server.write_all(b"one more").await.expect("the other way is open");
    server.shutdown().await.expect("said");
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.expect("an end in form");
    assert_eq!(rest, b"one more");

    let (mut server, client) = connected(1_000).await;
    drop(client);
    let cut = server.read(&mut [0; 10]).await.expect_err("nobody said so");
    assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn what_is_not_tls_is_invalid_and_told_by_an_alert() {
    let (server, _) = configs();
    let (mut theirs, ours) = duplex(10_000);
    theirs.write_all(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n").await.expect("room");
    let refused = TlsStream::accept(server.clone(), ours).await.err().expect("refused");
    assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    let mut told = Vec::new();
    theirs.read_to_end(&mut told).await.expect("read");
    assert_eq!(told.first(), Some(&21), "an alert, not {told:?}");

    let (theirs, ours) = duplex(10_000);
    drop(theirs);
    let ended = TlsStream::accept(server, ours).await.err().expect("ended");
    assert_eq!(ended.kind(), io::ErrorKind::UnexpectedEof);
}

/// A client whose records can be changed on their way.
async fn by_hand() -> (TlsStream<DuplexStream>, ClientConnection, DuplexStream) {
    let (server, client) = configs();
    let (mut theirs, ours) = duplex(100_000);
    let mut tls = ClientConnection::new(client, "localhost".try_into().expect("a name")).expect("a client");
    let shakes_hands = async {
        while tls.is_handshaking() {
            while tls.wants_write() {
                let mut sealed = Vec::new();
                tls.write_tls(&mut sealed).expect("in memory");
                theirs.write_all(&sealed).await.expect("room");
            }
            if tls.is_handshaking() {
                let mut read = vec![0; 10_000];
                let count = theirs.read(&mut read).await.expect("read");
                tls.read_tls(&mut &read[..count]).expect("in memory");
                tls.process_new_packets().expect("TLS");
            }
        }
        let mut sealed = Vec::new();
        while tls.wants_write() {
            tls.write_tls(&mut sealed).expect("in memory");
        }
        theirs.write_all(&sealed).await.expect("room");
    };
    let (accepted, ()) = tokio::join!(TlsStream::accept(server, ours), shakes_hands);
    (accepted.expect("a handshake"), tls, theirs)
}

#[tokio::test]
async fn a_record_that_was_changed_ends_the_stream_after_those_before_it() {
    let (mut server, mut tls, mut theirs) = by_hand().await;
    let mut sealed = Vec::new();
    for text in [b"good", b"bad!"] {
        tls.writer().write_all(text).expect("in memory");
        tls.write_tls(&mut sealed).expect("in memory");
    }
    *sealed.last_mut().expect("records") ^= 1;
    theirs.write_all(&sealed).await.expect("room");
    let mut read = [0; 100];
    let mut good = Vec::new();
    let error = loop {
        match server.read(&mut read).await {
            Ok(count) => good.extend_from_slice(&read[..count]),
            Err(error) => break error,
        }
        assert!(good.len() <= 4, "only what was sealed");
    };
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert_eq!(good, b"good");
    assert_eq!(server.read(&mut read).await.map_err(|error| error.kind()).err(), Some(io::ErrorKind::InvalidData));
}

#[tokio::test]
async fn a_writer_that_nobody_reads_waits_with_one_write() {
    let (mut server, client) = connected(1_000).await;
    let data = bytes(10 * WRITE_BYTES);
    let mut taken = 0;
    let blocked = poll_fn(|cx| {
        loop {
            match Pin::new(&mut server).poll_write(cx, &data[taken..]) {
                Poll::Ready(Ok(count)) => taken += count,
                Poll::Ready(Err(error)) => panic!("{error}"),
                Poll::Pending => return Poll::Ready(()),
            }
        }
    });
    blocked.await;
    assert_eq!(taken, WRITE_BYTES);
    assert!(server.session.sealed.waiting().len() <= WRITE_BYTES + SEAL_BYTES);
    let (mut reads, mut got) = (client, vec![0; data.len()]);
    let rest = async {
        server.write_all(&data[taken..]).await?;
        server.flush().await
    };
    let (written, read) = tokio::join!(rest, reads.read_exact(&mut got));
    written.expect("written");
    read.expect("read");
    assert_eq!(got, data);
    assert!(is_empty_at_rest(&server));
}

/// What a server makes of bytes, and the first byte that it answers with.
async fn answer_to(bytes: Vec<u8>) -> (io::ErrorKind, Option<u8>) {
    let (server, _) = configs();
    let (mut theirs, ours) = duplex(10_000);
    let says = async {
        // It may stop listening.
        let _ = theirs.write_all(&bytes).await;
        let mut told = Vec::new();
        theirs.read_to_end(&mut told).await.expect("read");
        told.first().copied()
    };
    let accepts = async { TlsStream::accept(server, ours).await.err().expect("refused").kind() };
    tokio::join!(accepts, says)
}

#[tokio::test]
async fn a_message_that_is_too_long_or_is_broken_off_is_refused_and_panics_nothing() {
    // A ClientHello of 64 KiB.
    let too_long = vec![0x16, 3, 1, 0, 4, 1, 1, 0, 0];
    assert_eq!(answer_to(too_long).await.0, io::ErrorKind::InvalidData);
    // The beginning of one of 4 KiB, then what is no record.
    let mut broken_off = vec![0x16, 3, 1, 0, 5, 1, 0, 0x10, 0, 7];
    broken_off.extend([0xff; 20]);
    assert_eq!(answer_to(broken_off).await.0, io::ErrorKind::InvalidData);
}

#[tokio::test]
async fn a_message_in_very_many_records_is_refused() {
    let mut records = Vec::new();
    let hello = [1, 0, 0xea, 0x60].into_iter().chain(std::iter::repeat_n(7, 60_000));
    for byte in hello {
        records.extend([0x16, 3, 1, 0, 1, byte]);
    }
    assert!(records.len() > 4 * PARTIAL_BYTES_MAX);
    assert_eq!(answer_to(records).await.0, io::ErrorKind::InvalidData);
}
