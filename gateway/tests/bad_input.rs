//! What the network may throw at a gateway: each costs its sender a status or the connection, and nobody else anything.

use std::time::Duration;

use bytes::Bytes;
use im_proto::{StatusCode, body, v1};

use crate::support::*;

fn prefixed(payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).expect("short").to_be_bytes().to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

/// A frame whose only member has a number that no version knows.
const UNKNOWN_FRAME: &[u8] = &[0xfa, 0x07, 0x01, 0x00]; // field 127, length 1

#[tokio::test(start_paused = true)]
async fn bytes_that_are_no_frames_end_their_connection_alone() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut bystander, _) = bench.login(&mut router, "bystander").await;
    let cases: [(&str, Vec<u8>, StatusCode); 7] = [
        ("length 0", vec![0; 4], StatusCode::Malformed),
        ("length 4 GiB", vec![0xff; 4], StatusCode::TooLarge),
        ("a byte over the limit", (64 * 1024_u32 + 1).to_be_bytes().to_vec(), StatusCode::TooLarge),
        ("http", b"GET / HTTP/1.1\r\n\r\n".to_vec(), StatusCode::TooLarge),
        ("garbage of the right length", prefixed(&[0xff; 40]), StatusCode::Malformed),
        ("a field that ends early", prefixed(&[0x0a, 0x7f, 1, 2]), StatusCode::Malformed),
        ("a wrong wire type", prefixed(&[0x08, 0x01]), StatusCode::Malformed),
    ];
    for (name, bytes, code) in cases {
        println!("{name}");
        let metric = format!("im_gateway_closes_total{{status={}}}", code.text());
        let before = bench.counts.of(&metric);
        let mut client = bench.connect();
        client.send_bytes(&bytes).await;
        client.is_closed_with(code).await;
        assert_eq!(bench.counts.of(&metric), before + 1, "{name}");
        bystander.is_alive().await;
    }
    router.is_silent(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn the_same_bytes_end_a_live_connection() {
    let (bench, mut router) = Bench::with_router(config()).await;
    for (bytes, code) in [
        (vec![0; 4], StatusCode::Malformed),
        ((1024 * 1024_u32 + 1).to_be_bytes().to_vec(), StatusCode::TooLarge),
        (prefixed(&[0xff; 40]), StatusCode::Malformed),
    ] {
        let (mut client, session_id) = bench.login(&mut router, "ann").await;
        client.send_bytes(&bytes).await;
        client.is_closed_with(code).await;
        drop(client);
        assert_eq!(router.next().await, FromGateway::Close(v1::SessionClose { session_id }));
    }
}

#[tokio::test(start_paused = true)]
async fn what_came_before_a_bad_frame_counts() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let mut bytes = encode(ClientFrame::Send(send(bench.conversation_in(1, 0), "before"))).to_vec();
    bytes.extend_from_slice(&[0; 4]);
    client.send_bytes(&bytes).await;
    assert_eq!(router.next_send().await.send.expect("a send").client_message_id, "before");
    client.is_closed_with(StatusCode::Malformed).await;
}

#[tokio::test(start_paused = true)]
async fn a_truncated_frame_is_waited_for_until_the_deadline() {
    let (bench, _router) = Bench::with_router(config()).await;
    let mut client = bench.connect();
    let hello = encode(bench.hello("ann"));
    client.send_bytes(&hello[..hello.len() - 1]).await;
    client.is_closed_with(StatusCode::TimedOut).await;
}

#[tokio::test(start_paused = true)]
async fn before_hello_only_hello_and_pings_are_taken() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let conversation = bench.conversation_in(1, 0);
    let frames = [
        encode(ClientFrame::Send(send(conversation, "m"))),
        encode(ClientFrame::Call(v1::Call::default())),
        encode(ClientFrame::Pong(v1::Pong::default())),
        encode(ClientFrame::Renew(v1::Renew { token: bench.token("ann") })),
        Bytes::from(prefixed(UNKNOWN_FRAME)),
    ];
    for frame in frames {
        let mut client = bench.connect();
        client.is_alive().await;
        client.send_bytes(&frame).await;
        client.is_closed_with(StatusCode::Malformed).await;
    }
    router.is_silent(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_second_hello_ends_the_connection() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut live, _) = bench.login(&mut router, "ann").await;
    live.send(bench.hello("ann")).await;
    live.is_closed_with(StatusCode::Malformed).await;
    let mut opening = bench.connect();
    opening.send(bench.hello("bob")).await;
    opening.send(bench.hello("bob")).await;
    opening.is_closed_with(StatusCode::Malformed).await;
}

#[tokio::test(start_paused = true)]
async fn an_unknown_frame_is_refused_and_the_connection_goes_on() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    client.send_bytes(&prefixed(UNKNOWN_FRAME)).await;
    let ServerFrame::Refused(refused) = client.next().await else { panic!("refused") };
    assert_eq!(refused.frame, 127);
    assert_eq!(status_of(refused.status.as_ref()), Some(StatusCode::UnknownFrame));
    assert_eq!(bench.counts.of("im_gateway_frames_unknown_total"), 1);
    client.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn tokens_of_bad_form_or_age_never_reach_a_router() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let good = bench.token("ann");
    let mut old = bench.claims("ann");
    (old.iat, old.exp) = (old.iat - 200, old.iat - 100);
    let mut nobody = bench.claims("ann");
    nobody.sub = "a\u{7}b".to_owned();
    let mut long = bench.claims("ann");
    long.sub = "x".repeat(10_000);
    let unsigned = {
        let payload = good.split('.').nth(1).expect("three parts");
        format!("eyJhbGciOiJub25lIn0.{payload}.") // {"alg":"none"}
    };
    let cases = [
        ("empty", String::new(), StatusCode::Unauthenticated),
        ("text", "token".to_owned(), StatusCode::Unauthenticated),
        ("unsigned", unsigned, StatusCode::Unauthenticated),
        ("cut", good[..good.len() / 2].to_owned(), StatusCode::Unauthenticated),
        ("expired", bench.sign(&old), StatusCode::TokenExpired),
        ("control characters", bench.sign(&nobody), StatusCode::Unauthenticated),
        ("10 kB user id", bench.sign(&long), StatusCode::Unauthenticated),
        ("60 kB", "a".repeat(60_000), StatusCode::Unauthenticated),
    ];
    for (name, token, code) in cases {
        println!("{name}");
        let mut client = bench.connect();
        client.send(hello(token)).await;
        client.is_closed_with(code).await;
    }
    assert_eq!(bench.counts.of("im_gateway_closes_total{status=unauthenticated}"), 7);
    assert_eq!(bench.counts.of("im_gateway_closes_total{status=token expired}"), 1);
    router.is_silent(Duration::from_secs(1)).await;
}

/// Whose signature or audience is wrong only the owner can tell.
#[tokio::test(start_paused = true)]
async fn a_token_that_the_owner_refuses_ends_its_connection_alone() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut bystander, _) = bench.login(&mut router, "bystander").await;
    let mut elsewhere = bench.claims("ann");
    elsewhere.aud = "another cluster".to_owned();
    let foreign = Bench::new(config()).token("ann");
    for token in [bench.sign(&elsewhere), foreign] {
        let mut client = bench.connect();
        client.send(hello(token.clone())).await;
        let FromGateway::Open(open) = router.next().await else { panic!("the owner judges") };
        assert_eq!(open.token, token, "it gets the token as it came");
        let status = Some(StatusCode::Unauthenticated.to_status());
        router.say(FromRouter::Refused(v1::SessionRefused { session_id: open.session_id, status })).await;
        client.is_closed_with(StatusCode::Unauthenticated).await;
        bystander.is_alive().await;
    }
    assert_eq!(bench.counts.of("im_gateway_closes_total{status=unauthenticated}"), 2);
}

/// Ranges of a history and a repeated send with another body are judged by the owner; what it says reaches the client as it is.
#[tokio::test(start_paused = true)]
async fn a_refusal_of_the_owner_reaches_its_client_alone() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let (mut bystander, _) = bench.login(&mut router, "bystander").await;
    client.send(ClientFrame::Send(send(bench.conversation_in(1, 0), "m"))).await;
    let forwarded = router.next_send().await;
    router.say(refusal(&forwarded, StatusCode::PreconditionFailed)).await;
    assert_eq!(status_of(client.ack().await.status.as_ref()), Some(StatusCode::PreconditionFailed));
    client.is_alive().await;
    bystander.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_of_another_version_is_told_so() {
    let (bench, _router) = Bench::with_router(config()).await;
    for (version_min, version_max) in [(2, 9), (0, 0), (5, 1)] {
        let ClientFrame::Hello(hello) = bench.hello("ann") else { unreachable!() };
        let mut client = bench.connect();
        client.send(ClientFrame::Hello(v1::Hello { version_min, version_max, ..hello })).await;
        client.is_closed_with(StatusCode::WrongVersion).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_bad_send_is_answered_and_not_forwarded() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let good = send(bench.conversation_in(1, 0), "good");
    let to_peer = |peer: &str| v1::Send { target: Some(v1::send::Target::PeerUserId(peer.to_owned())), ..good.clone() };
    let event = body::event(v1::system_event::Event::MemberLeft(v1::MemberLeft { user_id: "bob".to_owned() }));
    let cases = [
        ("no target", v1::Send { target: None, ..good.clone() }, StatusCode::Malformed),
        (
            "a short conversation id",
            v1::Send { target: Some(v1::send::Target::ConversationId(Bytes::from_static(b"x"))), ..good.clone() },
            StatusCode::Malformed,
        ),
        ("an empty peer", to_peer(""), StatusCode::Malformed),
        ("a peer with control characters", to_peer("a\nb"), StatusCode::Malformed),
        ("a peer of 10 kB", to_peer(&"x".repeat(10_000)), StatusCode::Malformed),
        ("no id", v1::Send { client_message_id: Bytes::new(), ..good.clone() }, StatusCode::Malformed),
        ("a long id", v1::Send { client_message_id: vec![1; 65].into(), ..good.clone() }, StatusCode::TooLarge),
        ("a long after", v1::Send { after: vec![1; 65].into(), ..good.clone() }, StatusCode::TooLarge),
        ("an empty body", v1::Send { body: Bytes::new(), ..good.clone() }, StatusCode::Malformed),
        ("a large body", v1::Send { body: body::text("x".repeat(70_000)), ..good.clone() }, StatusCode::TooLarge),
        ("garbage as body", v1::Send { body: vec![0xff; 9].into(), ..good.clone() }, StatusCode::Malformed),
        (
            "text that is no UTF-8",
            v1::Send { body: vec![0x0a, 3, 0x0a, 1, 0xff].into(), ..good.clone() },
            StatusCode::Malformed,
        ),
        ("a system event", v1::Send { body: event, ..good.clone() }, StatusCode::Forbidden),
    ];
    for (name, send, code) in cases {
        println!("{name}");
        client.send(ClientFrame::Send(send)).await;
        assert_eq!(status_of(client.ack().await.status.as_ref()), Some(code), "{name}");
    }
    router.is_silent(Duration::from_secs(1)).await;
    client.send(ClientFrame::Send(good)).await;
    router.next_send().await;
}

#[tokio::test(start_paused = true)]
async fn other_frames_with_bad_fields_are_refused() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let own = |signal| {
        let target = Some(v1::signal::Target::PeerUserId("bob".to_owned()));
        ClientFrame::Signal(v1::Signal { target, sender: String::new(), signal: Some(signal) })
    };
    let frames = [
        (
            5,
            ClientFrame::Received(v1::Received { conversation_id: Bytes::from_static(b"x"), seq: 1 }),
            StatusCode::Malformed,
        ),
        (6, ClientFrame::Signal(v1::Signal::default()), StatusCode::Malformed),
        // What the server alone says.
        (6, own(v1::signal::Signal::Receipt(v1::Receipt::default())), StatusCode::Forbidden),
        (6, own(v1::signal::Signal::Presence(v1::Presence::default())), StatusCode::Forbidden),
    ];
    for (field, frame, code) in frames {
        client.send(frame).await;
        let ServerFrame::Refused(refused) = client.next().await else { panic!("refused") };
        assert_eq!((refused.frame, status_of(refused.status.as_ref())), (field, Some(code)));
    }
    router.is_silent(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_sends_at_once_cost_their_sender_alone() {
    // Without the limits of rates, which would refuse most of them before they wait.
    let unlimited = im_gateway::GatewayConfig {
        sends_per_second_max: 0,
        user_sends_per_second_max: 0,
        frames_per_second_max: 0,
        bytes_per_second_max: 0,
        ..config()
    };
    let (bench, mut router) = Bench::with_router(unlimited).await;
    let (mut bystander, _) = bench.login(&mut router, "bystander").await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    let flood = async {
        let mut refused = 0_u64;
        for round in 0..1000_u64 {
            let mut bytes = Vec::new();
            for number in 0..100 {
                bytes.extend_from_slice(&encode(ClientFrame::Send(send(conversation, &format!("{round}.{number}")))));
            }
            client.send_bytes(&bytes).await;
            while round * 100 + 99 > 255 + refused {
                assert_eq!(status_of(client.ack().await.status.as_ref()), Some(StatusCode::Overloaded));
                refused += 1;
            }
        }
        refused
    };
    let others = async {
        for _ in 0..50 {
            bystander.is_alive().await;
            tokio::task::yield_now().await;
        }
    };
    let (refused, ()) = tokio::join!(flood, others);
    assert_eq!(refused, 100_000 - 256);
    assert_eq!(bench.counts.of("im_gateway_sends_refused_total"), refused);
    for _ in 0..256 {
        router.next_send().await;
    }
    router.is_silent(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_sends_too_fast_is_read_more_slowly() {
    let (bench, mut router) =
        Bench::with_router(im_gateway::GatewayConfig { frames_per_second_max: 10, ..config() }).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let started = tokio::time::Instant::now();
    for _ in 0..50 {
        client.is_alive().await;
    }
    assert!(started.elapsed() >= Duration::from_secs(3), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_stranger_who_only_pings_is_not_served_for_long() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let mut client = bench.connect();
    for _ in 0..32 {
        client.is_alive().await;
    }
    let ping = v1::client_frame::Frame::Ping(v1::Ping { echo: Bytes::new() });
    client.send(ping).await;
    client.is_closed_with(StatusCode::Malformed).await;
    router.is_silent(Duration::from_secs(1)).await;
}
