//! Sessions: connecting, heartbeats, fail-over, how a client ends, calls across reconnects.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use im_client::{CallError, Client, ClosedReason, ConnectError, Endpoint, Event, TokenSource};
use im_proto::{
    ConversationId, StatusCode,
    method::Method,
    v1::{self, client_frame, server_frame},
};
use tokio::time::Instant;

use crate::server::{Events, Server, conversation, message, row, welcome};

fn endpoints() -> Vec<Endpoint> {
    vec!["tls://first:1".parse().unwrap(), "quic://second:2".parse().unwrap()]
}

#[tokio::test(start_paused = true)]
async fn connecting_ends_with_the_last_reason_when_nobody_answers_in_time() {
    let server = Server::new();
    let config = server.config();
    drop(server);
    let before = Instant::now();
    let error = Client::connect(config).await.err().unwrap();
    assert!(before.elapsed() <= Duration::from_secs(11));
    match error {
        ConnectError::TimedOut { last, .. } => assert_eq!(last, "tcp://first:1: connection refused"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_left_for_the_next() {
    let server = Server::new();
    let _client = Client::start(server.config_for(endpoints(), 1));
    let (endpoint, _silent) = server.accept_raw().await;
    assert_eq!(endpoint.address, "first:1");
    let before = Instant::now();
    let (endpoint, mut connection) = server.accept_raw().await;
    assert_eq!(endpoint.address, "second:2");
    assert!(before.elapsed() <= Duration::from_secs(6));
    connection.welcome(welcome()).await;
}

#[tokio::test(start_paused = true)]
async fn silence_is_met_with_a_ping_then_with_a_new_connection() {
    let server = Server::new();
    let _client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let before = Instant::now();
    assert!(matches!(connection.next().await, Some(client_frame::Frame::Ping(_))));
    assert_eq!(before.elapsed().as_secs(), 10);
    let mut pings = 1;
    while let Some(frame) = connection.next().await {
        assert!(matches!(frame, client_frame::Frame::Ping(_)));
        pings += 1;
    }
    assert_eq!((pings, before.elapsed().as_secs()), (2, 25));
    server.accept_ready().await;
}

#[tokio::test(start_paused = true)]
async fn pings_are_answered_with_their_echo_and_unknown_frames_skipped() {
    let server = Server::new();
    let _client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    connection.send(server_frame::Frame::Ping(v1::Ping { echo: Bytes::from_static(b"echo") })).await;
    match connection.expect().await {
        client_frame::Frame::Pong(pong) => assert_eq!(&pong.echo[..], b"echo"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_go_away_is_followed_in_time_to_where_it_points() {
    let server = Server::new();
    let client = Client::start(server.config_for(endpoints(), 1));
    let mut events = Events::of(&client);
    let mut connection = server.accept_ready().await;
    let before = Instant::now();
    let go_away = v1::GoAway { reason: None, reconnect_after_ms: 4_000, endpoints: vec!["tcp://third:3".to_owned()] };
    connection.send(server_frame::Frame::GoAway(go_away)).await;
    // Until then the session is as good as any.
    let pending = client.enqueue(conversation(1).into(), im_proto::body::text("x")).await.unwrap();
    let send = connection.expect_send().await;
    connection.ack(&send, conversation(1), 1).await;
    assert_eq!(pending.await.unwrap().seq, 1);
    connection.expect_end().await;
    assert_eq!(before.elapsed().as_secs(), 4);
    let (endpoint, mut connection) = server.accept_raw().await;
    assert_eq!(endpoint.address, "third:3");
    connection.welcome(welcome()).await;
    let mut kinds = Vec::new();
    while kinds.len() < 4 {
        match events.next().await {
            Event::Connected { endpoint } => kinds.push(endpoint),
            Event::Resynced => kinds.push("resynced".to_owned()),
            Event::Disconnected { .. } => kinds.push("disconnected".to_owned()),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(kinds, ["tls://first:1", "resynced", "disconnected", "tcp://third:3"]);
}

#[tokio::test(start_paused = true)]
async fn a_draining_server_is_left_and_found_again() {
    let server = Server::new();
    let _client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    connection.close(StatusCode::Draining).await;
    drop(connection);
    // Refused at the door, too.
    for _ in 0..3 {
        let (_, mut connection) = server.accept_raw().await;
        connection.expect().await;
        connection.close(StatusCode::Draining).await;
    }
    server.accept_ready().await;
}

#[tokio::test(start_paused = true)]
async fn statuses_that_no_reconnect_cures_end_the_client() {
    for code in [
        StatusCode::KickedByAnotherDevice,
        StatusCode::Revoked,
        StatusCode::WrongVersion,
        StatusCode::TokenExpired,
        StatusCode::Unauthenticated,
    ] {
        let server = Server::new();
        let client = Client::start(server.config());
        let mut events = Events::of(&client);
        let mut connection = server.accept_ready().await;
        connection.close(code).await;
        let reason = loop {
            if let Event::Closed(reason) = events.next().await {
                break reason;
            }
        };
        let ClosedReason::ByServer(status) = reason else { panic!("{reason:?}") };
        assert_eq!(status.code, Some(code));
        let error = client.locate().await.unwrap_err();
        assert!(matches!(error, CallError::Closed(ClosedReason::ByServer(_))), "{error:?}");
    }
}

struct Renewable(AtomicU32);

impl TokenSource for Renewable {
    fn token(&self) -> Pin<Box<dyn Future<Output = Result<String, String>> + Send + '_>> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Box::pin(std::future::ready(Ok("token".to_owned())))
    }

    fn is_renewable(&self) -> bool {
        true
    }
}

#[tokio::test(start_paused = true)]
async fn a_renewable_token_is_renewed_in_time_and_its_expiry_is_no_end() {
    let server = Server::new();
    let mut config = server.config();
    let source = Arc::new(Renewable(AtomicU32::new(0)));
    config.token = source.clone();
    let _client = Client::start(config);
    let (_, mut connection) = server.accept_raw().await;
    let before = Instant::now();
    let server_time_ms = 1_700_000_000_000;
    let token_expires_at_ms = server_time_ms + 100_000;
    connection.welcome(v1::Welcome { server_time_ms, token_expires_at_ms, ..welcome() }).await;
    connection.sync(0, vec![]).await;
    assert!(matches!(connection.expect().await, client_frame::Frame::Renew(_)));
    assert_eq!(before.elapsed().as_secs(), 90);
    assert_eq!(source.0.load(Ordering::Relaxed), 2);
    connection.close(StatusCode::TokenExpired).await;
    drop(connection);
    server.accept_ready().await;
    assert_eq!(source.0.load(Ordering::Relaxed), 3);
}

#[tokio::test(start_paused = true)]
async fn a_call_survives_a_reconnect_and_an_unavailable_server() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let script = async {
        connection.expect_call(Method::PlacementLocate).await;
        drop(connection);
        let mut connection = server.accept_ready().await;
        let call = connection.expect_call(Method::PlacementLocate).await;
        connection.refuse_call(call.request_id, StatusCode::Unavailable).await;
        let call = connection.expect_call(Method::PlacementLocate).await;
        connection
            .reply(call.request_id, &v1::LocateReply { reconnect_base_ms: 7, ..v1::LocateReply::default() })
            .await;
        connection
    };
    let (reply, _connection) = tokio::join!(client.locate(), script);
    assert_eq!(reply.unwrap().reconnect_base_ms, 7);
}

#[tokio::test(start_paused = true)]
async fn a_reply_in_parts_is_put_together_and_calls_keep_to_the_limit() {
    let server = Server::new();
    let client = Client::start(server.config());
    let (_, mut connection) = server.accept_raw().await;
    let limits = v1::Limits { calls_in_flight: 1, ..v1::Limits::default() };
    connection.welcome(v1::Welcome { limits: Some(limits), ..welcome() }).await;
    connection.sync(0, vec![]).await;
    let script = async {
        let call = connection.expect_call(Method::PlacementLocate).await;
        connection.expect_silence(Duration::from_secs(1)).await;
        let endpoint = v1::Endpoint { transport: "tcp".to_owned(), ..v1::Endpoint::default() };
        let reply = v1::LocateReply { endpoints: vec![endpoint; 3], ..v1::LocateReply::default() };
        let bytes = Bytes::from(prost::Message::encode_to_vec(&reply));
        for (place, part) in bytes.chunks(4).enumerate() {
            let last = (place + 1) * 4 >= bytes.len();
            let payload = Bytes::copy_from_slice(part);
            let part = v1::Reply { request_id: call.request_id, status: None, payload, last };
            connection.send(server_frame::Frame::Reply(part)).await;
            connection.push(conversation(1), 1).await;
        }
        let call = connection.expect_call(Method::PlacementLocate).await;
        connection.refuse_call(call.request_id, StatusCode::Forbidden).await;
    };
    let (first, second, ()) = tokio::join!(client.locate(), client.locate(), script);
    assert_eq!(first.unwrap().endpoints.len(), 3);
    assert_eq!(second.unwrap_err().code(), Some(StatusCode::Forbidden));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_no_frame_of_this_session_takes_is_refused_here_and_the_session_goes_on() {
    let server = Server::new();
    let client = Client::start(server.config());
    let (_, mut connection) = server.accept_raw().await;
    let limits = v1::Limits { frame_bytes: 128 * 1024, ..v1::Limits::default() };
    connection.welcome(v1::Welcome { limits: Some(limits), ..welcome() }).await;
    connection.sync(0, vec![]).await;
    let name = "x".repeat(128 * 1024);
    let error = client.create_group(&name, &[]).await.unwrap_err();
    assert!(matches!(error, CallError::RequestSize { limit: 131_072, found } if found > name.len()), "{error:?}");
    assert!(error.to_string().contains("131072"), "{error}");
    let (reply, ()) = tokio::join!(client.locate(), async {
        let call = connection.expect_call(Method::PlacementLocate).await;
        connection.reply(call.request_id, &v1::LocateReply::default()).await;
    });
    reply.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_sync_names_no_more_conversations_than_it_may_and_a_frame_takes() {
    for (frame_bytes, fits) in [(0, 10_000..=10_000), (128 * 1024, 4_000..=6_000)] {
        let server = Server::new();
        let _client = Client::start(server.config());
        let (_, mut connection) = server.accept_raw().await;
        let limits = v1::Limits { frame_bytes, ..v1::Limits::default() };
        connection.welcome(v1::Welcome { limits: Some(limits), ..welcome() }).await;
        let ids = (1..=12_000_u128).map(|number| ConversationId::from_bytes(number.to_be_bytes()));
        connection.sync(1, ids.map(|id| row(id, 1)).collect()).await;
        connection.send(server_frame::Frame::Resync(v1::Resync::default())).await;
        let call = connection.expect_call(Method::ConversationSync).await;
        let bytes = prost::Message::encoded_len(&v1::ClientFrame::from(client_frame::Frame::Call(call.clone())));
        let request: v1::SyncRequest = prost::Message::decode(call.request).unwrap();
        assert!(fits.contains(&request.have.len()), "{} of {fits:?}", request.have.len());
        assert!(frame_bytes == 0 || bytes <= 128 * 1024, "{bytes}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_without_an_answer_ends_in_time() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let before = Instant::now();
    let (reply, _) = tokio::join!(client.locate(), connection.expect_call(Method::PlacementLocate));
    assert!(matches!(reply, Err(CallError::TimedOut { .. })));
    assert_eq!(before.elapsed().as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_breaks_the_protocol_is_left() {
    for bytes in [&b"\0\0\0\0"[..], b"\xff\xff\xff\xff", b"\0\0\0\x02\xff\xff"] {
        let server = Server::new();
        let _client = Client::start(server.config());
        let mut connection = server.accept_ready().await;
        connection.send_raw(bytes).await;
        connection.expect_end().await;
        server.accept_ready().await;
    }
}

#[tokio::test(start_paused = true)]
async fn dropping_the_last_handle_ends_the_connection() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    drop(client);
    connection.expect_end().await;
}

#[tokio::test(start_paused = true)]
async fn a_push_in_front_of_the_welcome_delays_nothing() {
    let server = Server::new();
    let client = Client::start(server.config());
    let (_, mut connection) = server.accept_raw().await;
    assert!(matches!(connection.expect().await, client_frame::Frame::Hello(_)));
    // In one write, so that one read brings both.
    let mut bytes = bytes::BytesMut::new();
    let pushed = server_frame::Frame::Message(message(conversation(1), 1));
    for frame in [pushed, server_frame::Frame::Welcome(welcome())] {
        im_proto::frame::encode_frame(&v1::ServerFrame { frame: Some(frame) }, &mut bytes);
    }
    let before = Instant::now();
    connection.send_raw(&bytes).await;
    connection.expect_sync().await;
    assert_eq!(before.elapsed(), Duration::ZERO);
    drop(client);
}
