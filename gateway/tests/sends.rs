//! Sends: forwarded in order, kept until an owner answers, sent again wherever ownership moves.

use std::time::Duration;

use bytes::Bytes;
use im_proto::{StatusCode, v1};
use prost::Message as _;

use crate::support::*;

#[tokio::test(start_paused = true)]
async fn a_send_is_forwarded_and_answered_by_the_owner() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session) = bench.login(&mut router, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    client.send(ClientFrame::Send(send(conversation, "m1"))).await;
    let forwarded = router.next_send().await;
    assert_eq!(forwarded.session_id, session);
    assert_eq!(forwarded.conversation_id, conversation.to_bytes());
    router.acknowledge(&forwarded, 9).await;
    let ack = client.ack().await;
    assert_eq!((ack.seq, ack.status, ack.client_message_id), (9, None, Bytes::from_static(b"m1")));
}

#[tokio::test(start_paused = true)]
async fn a_peer_is_turned_into_the_direct_conversation() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    for (peer, expected) in
        [("bob", bench.secret.direct_id(&user("ann"), &user("bob"))), ("ann", bench.secret.self_id(&user("ann")))]
    {
        let target = Some(v1::send::Target::PeerUserId(peer.to_owned()));
        client.send(ClientFrame::Send(v1::Send { target, ..send(expected, "m") })).await;
        let forwarded = router.next_send().await;
        assert_eq!(forwarded.conversation_id, expected.to_bytes());
        router.acknowledge(&forwarded, 1).await;
        assert_eq!(client.ack().await.conversation_id, expected.to_bytes());
    }
}

#[tokio::test(start_paused = true)]
async fn at_most_256_sends_wait_for_an_answer() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    for number in 0..257 {
        client.send(ClientFrame::Send(send(conversation, &format!("{number}")))).await;
    }
    let ack = client.ack().await;
    assert_eq!(ack.client_message_id, "256");
    assert_eq!(status_of(ack.status.as_ref()), Some(StatusCode::Overloaded));
    assert!(ack.status.expect("a status").retry_after_ms > 0);
    let first = router.next_send().await;
    router.acknowledge(&first, 1).await;
    assert_eq!(client.ack().await.client_message_id, "0");
    client.send(ClientFrame::Send(send(conversation, "after"))).await;
    for _ in 0..255 {
        router.next_send().await;
    }
    assert_eq!(router.next_send().await.send.expect("a send").client_message_id, "after");
}

#[tokio::test(start_paused = true)]
async fn sends_of_a_session_can_be_limited_by_rate() {
    let (bench, mut router) =
        Bench::with_router(im_gateway::GatewayConfig { sends_per_second_max: 5, ..config() }).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    for number in 0..6 {
        client.send(ClientFrame::Send(send(conversation, &format!("{number}")))).await;
    }
    let status = client.ack().await.status.expect("a refusal");
    assert_eq!(status_of(Some(&status)), Some(StatusCode::RateLimited));
    tokio::time::sleep(Duration::from_millis(status.retry_after_ms.into())).await;
    client.send(ClientFrame::Send(send(conversation, "again"))).await;
    for _ in 0..5 {
        router.next_send().await;
    }
    assert_eq!(router.next_send().await.send.expect("a send").client_message_id, "again");
}

#[tokio::test(start_paused = true)]
async fn kept_sends_follow_the_owner_in_order() {
    let (mut bench, mut first) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut first, "ann").await;
    let conversations = [bench.conversation_in(2, 0), bench.conversation_in(2, 1)];
    for number in 0..20 {
        client.send(ClientFrame::Send(send(conversations[number % 2], &format!("{number}")))).await;
    }
    let mut taken = Vec::new();
    for _ in 0..20 {
        taken.push(first.next_send().await);
    }
    // The first two are answered before the owner of the even shards is another.
    first.acknowledge(&taken[0], 1).await;
    first.acknowledge(&taken[1], 1).await;
    for expected in ["0", "1"] {
        assert_eq!(client.ack().await.client_message_id, expected);
    }
    let user_shard = bench.user_shard("ann");
    bench.owners(|shard| Some(if shard % 2 == 0 && shard != user_shard { "r2" } else { "r1" }.to_owned()));
    let mut second = bench.router().await;
    let announced = second.next().await;
    assert_eq!(
        announced,
        FromGateway::Present(v1::SessionPresent { session_id, capability: Some(capability("ann")) }),
        "the session is presented before its first message"
    );
    // New ones come while the old ones are on their way.
    client.send(ClientFrame::Send(send(conversations[0], "new"))).await;
    for number in (2..20).step_by(2).map(|number| number.to_string()).chain(["new".to_owned()]) {
        let again = second.next_send().await;
        assert_eq!(again.conversation_id, conversations[0].to_bytes());
        assert_eq!(again.send.expect("a send").client_message_id, number);
    }
    second.is_silent(Duration::from_secs(1)).await;
    first.is_silent(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn only_the_present_owner_may_refuse_but_any_may_acknowledge() {
    let (mut bench, mut first) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut first, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    for id in ["a", "b"] {
        client.send(ClientFrame::Send(send(conversation, id))).await;
    }
    let (a, b) = (first.next_send().await, first.next_send().await);
    bench.owner("r2");
    let mut second = bench.router().await;
    assert!(matches!(second.next().await, FromGateway::Announce(_)));
    second.next_send().await;
    let b_again = second.next_send().await;
    first.say(refusal(&b, StatusCode::Unavailable)).await;
    first.acknowledge(&a, 7).await;
    let ack = client.ack().await;
    assert_eq!((ack.client_message_id, ack.seq), (Bytes::from_static(b"a"), 7));
    second.say(refusal(&b_again, StatusCode::NotAMember)).await;
    assert_eq!(status_of(client.ack().await.status.as_ref()), Some(StatusCode::NotAMember));
    // Answered is answered.
    second.acknowledge(&b_again, 8).await;
    client.is_alive().await;
}

/// The next send of the gateway, announced sessions left out.
async fn send_at(router: &mut Router) -> v1::SessionSend {
    loop {
        if let FromGateway::Send(send) = router.next().await {
            return send;
        }
    }
}

/// An owner may have a send twice, and answer the one before something changes and the other after it.
#[tokio::test(start_paused = true)]
async fn only_the_answer_to_the_last_attempt_may_refuse() {
    let (mut bench, mut first) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut first, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    client.send(ClientFrame::Send(send(conversation, "m"))).await;
    let once = send_at(&mut first).await;
    bench.owner("r2");
    let mut second = bench.router().await;
    let elsewhere = send_at(&mut second).await;
    bench.owner("r1");
    let again = send_at(&mut first).await;
    assert_eq!([once.attempt, elsewhere.attempt, again.attempt], [1, 2, 3]);
    first.say(refusal(&once, StatusCode::NotFound)).await;
    second.say(refusal(&elsewhere, StatusCode::NotFound)).await;
    let returned = v1::SendReturned {
        session_id: once.session_id,
        conversation_id: once.conversation_id,
        client_message_id: Bytes::from_static(b"m"),
        attempt: 1,
    };
    first.say(FromRouter::SendReturned(returned)).await;
    client.is_alive().await;
    first.is_silent(Duration::from_secs(5)).await;
    first.acknowledge(&again, 9).await;
    let ack = client.ack().await;
    assert_eq!((ack.seq, ack.status), (9, None));
}

/// The release before this one does not say which attempt it answers.
#[tokio::test(start_paused = true)]
async fn a_router_that_counts_no_attempts_may_refuse_what_went_its_way_last() {
    let (mut bench, mut first) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut first, "ann").await;
    client.send(ClientFrame::Send(send(bench.conversation_in(1, 0), "m"))).await;
    let once = v1::SessionSend { attempt: 0, ..send_at(&mut first).await };
    bench.owner("r2");
    let mut second = bench.router().await;
    let again = v1::SessionSend { attempt: 0, ..send_at(&mut second).await };
    first.say(refusal(&once, StatusCode::NotFound)).await;
    client.is_alive().await;
    second.say(refusal(&again, StatusCode::Forbidden)).await;
    assert_eq!(status_of(client.ack().await.status.as_ref()), Some(StatusCode::Forbidden));
}

#[tokio::test(start_paused = true)]
async fn a_returned_send_is_tried_again_and_nothing_overtakes_it() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    for id in ["1", "2"] {
        client.send(ClientFrame::Send(send(conversation, id))).await;
        let taken = router.next_send().await;
        let returned = v1::SendReturned {
            session_id,
            conversation_id: taken.conversation_id,
            client_message_id: Bytes::copy_from_slice(id.as_bytes()),
            attempt: taken.attempt,
        };
        if id == "1" {
            router.say(FromRouter::SendReturned(returned)).await;
            client.is_alive().await;
            client.send(ClientFrame::Send(send(conversation, "2"))).await;
            client.is_alive().await;
            break;
        }
    }
    let before = tokio::time::Instant::now();
    assert_eq!(router.next_send().await.send.expect("a send").client_message_id, "1");
    assert!(before.elapsed() >= Duration::from_millis(50), "not at once");
    assert_eq!(router.next_send().await.send.expect("a send").client_message_id, "2");
    router.is_silent(Duration::from_secs(5)).await;
}

#[tokio::test(start_paused = true)]
async fn a_returned_send_goes_to_a_new_owner_at_once() {
    let (mut bench, mut first) =
        Bench::with_router(im_gateway::GatewayConfig { send_retry_delay: Duration::from_secs(3600), ..config() }).await;
    let (mut client, session_id) = bench.login(&mut first, "ann").await;
    client.send(ClientFrame::Send(send(bench.conversation_in(1, 0), "m"))).await;
    let taken = first.next_send().await;
    let returned = v1::SendReturned {
        session_id,
        conversation_id: taken.conversation_id.clone(),
        client_message_id: Bytes::from_static(b"m"),
        attempt: taken.attempt,
    };
    first.say(FromRouter::SendReturned(returned)).await;
    first.is_silent(Duration::from_secs(10)).await;
    bench.owner("r2");
    let mut second = bench.router().await;
    assert!(matches!(second.next().await, FromGateway::Announce(_)));
    assert_eq!(second.next_send().await, v1::SessionSend { attempt: 2, ..taken });
}

#[tokio::test(start_paused = true)]
async fn a_router_that_wants_the_capability_gets_it_and_the_send_again() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    client.send(ClientFrame::Send(send(bench.conversation_in(1, 0), "m"))).await;
    let mut taken = router.next_send().await;
    for round in 0..6 {
        let wanted = v1::CapabilityWanted {
            session_id,
            conversation_id: taken.conversation_id.clone(),
            client_message_id: Bytes::from_static(b"m"),
            attempt: taken.attempt,
        };
        router.say(FromRouter::CapabilityWanted(wanted)).await;
        let FromGateway::Announce(announce) = router.next().await else { panic!("the session first") };
        assert_eq!(announce.capability, Some(capability("ann")));
        let before = tokio::time::Instant::now();
        taken = v1::SessionSend { attempt: taken.attempt + 1, ..taken };
        assert_eq!(router.next_send().await, taken);
        assert_eq!(before.elapsed() > Duration::from_millis(50), round >= 2, "after some rounds with a pause");
    }
}

#[tokio::test(start_paused = true)]
async fn without_an_owner_sends_wait() {
    let (mut bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    bench.owners(|_| None);
    client.is_alive().await;
    let conversation = bench.conversation_in(1, 0);
    for id in ["1", "2", "3"] {
        client.send(ClientFrame::Send(send(conversation, id))).await;
    }
    router.is_silent(Duration::from_secs(20)).await;
    bench.owner("r2");
    let mut second = bench.router().await;
    assert!(matches!(second.next().await, FromGateway::Announce(_)));
    for id in ["1", "2", "3"] {
        assert_eq!(second.next_send().await.send.expect("a send").client_message_id, id);
    }
}

#[tokio::test(start_paused = true)]
async fn receipts_and_signals_are_forwarded_and_never_kept() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    let received = v1::Received { conversation_id: conversation.to_bytes(), seq: 4 };
    client.send(ClientFrame::Received(received.clone())).await;
    assert_eq!(
        router.next().await,
        FromGateway::Received(v1::SessionReceived { session_id, received: Some(received.clone()) })
    );
    let signal = v1::Signal {
        target: Some(v1::signal::Target::PeerUserId("bob".to_owned())),
        signal: Some(v1::signal::Signal::Typing(v1::Typing { active: true })),
        ..v1::Signal::default()
    };
    client.send(ClientFrame::Signal(signal.clone())).await;
    let FromGateway::Signal(forwarded) = router.next().await else { panic!("a signal") };
    let direct = bench.secret.direct_id(&user("ann"), &user("bob"));
    assert_eq!((forwarded.conversation_id, forwarded.signal), (direct.to_bytes(), Some(signal)));
    bench.owners(|_| None);
    client.is_alive().await;
    client.send(ClientFrame::Received(received)).await;
    client.is_alive().await;
    bench.owner("r1");
    assert!(matches!(router.next().await, FromGateway::Announce(_)), "it had lost the shard meanwhile");
    router.is_silent(Duration::from_secs(5)).await;
}

#[tokio::test(start_paused = true)]
async fn one_send_in_64_is_timed_until_its_acknowledgement_is_written() {
    const ROUTERS_TIME: Duration = Duration::from_millis(250);
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    for number in 0..128 {
        client.send(ClientFrame::Send(send(conversation, &format!("{number}")))).await;
    }
    let mut forwarded = Vec::new();
    for _ in 0..128 {
        forwarded.push(router.next_send().await);
    }
    tokio::time::sleep(ROUTERS_TIME).await;
    assert_eq!(bench.counts.of("im_gateway_ack_seconds"), 0);
    // The acknowledgements that are measured come one by one: two that wait in one outbox are one sample.
    for send in &forwarded {
        router.acknowledge(send, 1).await;
        client.ack().await;
    }
    assert_eq!(bench.counts.of("im_gateway_ack_seconds"), 2);
    assert_eq!(bench.counts.of("im_gateway_ack_seconds in ms"), 500);
}

#[tokio::test(start_paused = true)]
async fn who_a_client_says_that_a_signal_is_from_goes_nowhere() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let conversation = bench.conversation_in(1, 0);
    let signal = v1::Signal {
        target: Some(v1::signal::Target::ConversationId(conversation.to_bytes())),
        sender: "s".repeat(1_000_000),
        signal: Some(v1::signal::Signal::Typing(v1::Typing { active: true })),
    };
    client.send(ClientFrame::Signal(signal.clone())).await;
    let FromGateway::Signal(forwarded) = router.next().await else { panic!("a signal") };
    assert!(forwarded.signal == Some(v1::Signal { sender: String::new(), ..signal }), "the sender goes on");
}

/// A send frame of a megabyte, nearly all of it a field that nobody knows.
fn padded(send: &v1::Send) -> Vec<u8> {
    let padding = 1_000_000;
    let mut inner = send.encode_to_vec();
    prost::encoding::bytes::encode(1000, &vec![7; padding], &mut inner);
    let mut payload = Vec::new();
    prost::encoding::bytes::encode(4, &inner, &mut payload);
    let mut frame = u32::try_from(payload.len()).expect("short").to_be_bytes().to_vec();
    frame.extend(payload);
    frame
}

#[tokio::test(start_paused = true)]
async fn a_kept_send_is_sent_without_what_its_frame_was_padded_with() {
    let (mut bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    let received_through = router.received_through;
    drop(router);
    client.is_alive().await;
    let sent = send(bench.conversation_in(1, 0), "padded");
    client.send_bytes(&padded(&sent)).await;
    let mut router = bench.router_of_boot(21, received_through).await;
    router.continue_at(2);
    let forwarded = router.next_send().await;
    assert_eq!(forwarded.send, Some(sent.clone()));
    router.acknowledge(&forwarded, 1).await;
    assert_eq!(client.ack().await.client_message_id, "padded");
    // The body alone is left of all that the gateway had: whatever room there is behind it was held with it.
    let body = forwarded.send.map(|send| send.body).expect("a send");
    drop(forwarded.conversation_id);
    let held = body.try_into_mut().expect("nobody else holds it").capacity();
    assert!(held < 1_000, "{held} bytes for a body of {}", sent.body.len());
}
