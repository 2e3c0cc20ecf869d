//! Calls: to the user's owner, replies in parts between live frames, an answer for each whatever happens.

use std::time::Duration;

use bytes::Bytes;
use im_proto::{StatusCode, v1};

use crate::support::*;

fn call(request_id: u32) -> ClientFrame {
    ClientFrame::Call(v1::Call { request_id, method: 258, request: Bytes::from_static(b"request") })
}

async fn next_call(router: &mut Router) -> v1::Call {
    match router.next().await {
        FromGateway::Call(call) => call.call.expect("a call"),
        other => panic!("expected a call, found {other:?}"),
    }
}

fn reply(session_id: u64, call: &v1::Call, reply: impl Into<Bytes>) -> FromRouter {
    let reply = reply.into();
    FromRouter::CallReply(v1::CallReply {
        session_id,
        request_id: call.request_id,
        status: None,
        reply,
        in_order: false,
    })
}

async fn reply_of(client: &mut Client<tokio::io::DuplexStream>) -> v1::Reply {
    match client.next().await {
        ServerFrame::Reply(reply) => reply,
        other => panic!("expected a reply, found {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_reply_finds_its_call() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session) = bench.login(&mut router, "ann").await;
    for request_id in [70, 80] {
        client.send(call(request_id)).await;
    }
    let (first, second) = (next_call(&mut router).await, next_call(&mut router).await);
    assert_eq!(first.request, "request");
    router.say(reply(session, &second, "second")).await;
    router.say(reply(session, &first, "")).await;
    let (one, two) = (reply_of(&mut client).await, reply_of(&mut client).await);
    assert_eq!((one.request_id, &one.payload[..], one.last, one.status), (80, &b"second"[..], true, None));
    assert_eq!((two.request_id, two.payload.len(), two.last), (70, 0, true));
    // The same reply twice is one too many.
    router.say(reply(session, &first, "late")).await;
    client.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_call_keeps_its_status() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    client.send(call(1)).await;
    let request_id = next_call(&mut router).await.request_id;
    let status = Some(StatusCode::NotFound.to_status());
    router
        .say(FromRouter::CallReply(v1::CallReply {
            session_id,
            request_id,
            status,
            reply: Bytes::new(),
            in_order: false,
        }))
        .await;
    assert_eq!(status_of(reply_of(&mut client).await.status.as_ref()), Some(StatusCode::NotFound));
}

#[tokio::test(start_paused = true)]
async fn a_router_that_does_not_know_who_calls_is_told_and_the_repeated_call_follows() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session_id) = bench.login(&mut router, "ann").await;
    client.send(call(1)).await;
    let request_id = next_call(&mut router).await.request_id;
    let wanted = v1::CapabilityWanted { session_id, ..v1::CapabilityWanted::default() };
    let status = Some(StatusCode::Unavailable.to_status());
    router
        .say_all(vec![
            FromRouter::CapabilityWanted(wanted),
            FromRouter::CallReply(v1::CallReply {
                session_id,
                request_id,
                status,
                reply: Bytes::new(),
                in_order: false,
            }),
        ])
        .await;
    assert_eq!(status_of(reply_of(&mut client).await.status.as_ref()), Some(StatusCode::Unavailable));
    client.send(call(2)).await;
    let FromGateway::Announce(announce) = router.next().await else { panic!("the session first") };
    assert_eq!((announce.session_id, announce.capability), (session_id, Some(capability("ann"))));
    next_call(&mut router).await;
}

#[tokio::test(start_paused = true)]
async fn large_replies_come_in_parts_between_live_frames() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let mut client = bench.connect_with_room(1024);
    let session = bench.login_over(&mut router, &mut client, "ann").await;
    client.send(call(1)).await;
    client.send(call(2)).await;
    let calls = [next_call(&mut router).await, next_call(&mut router).await];
    for (call, byte) in calls.iter().zip([1_u8, 2]) {
        router.say(reply(session, call, vec![byte; 300_000])).await;
    }
    let (mut live, mut received, mut order) = (0, [0, 0], Vec::new());
    let mut ended = 0;
    while ended < 2 {
        match client.next().await {
            ServerFrame::Reply(part) => {
                assert!(part.payload.len() <= 65_536, "a part is at most 64 KiB");
                let index = usize::try_from(part.request_id).expect("small") - 1;
                received[index] += part.payload.len();
                assert!(part.payload.iter().all(|byte| usize::from(*byte) == index + 1));
                ended += usize::from(part.last);
                order.push(part.request_id);
                live += 1;
                router.say(deliver(&[session], live, 10)).await;
                // The gateway has taken it before the client reads on.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            ServerFrame::Message(_) => order.push(0),
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!(received, [300_000, 300_000]);
    assert_eq!(
        &order[..4],
        [1, 2, 0, 1],
        "replies take turns, and a live frame waits for two parts at most: {order:?}"
    );
    let longest = order.split(|kind| *kind == 0).map(<[u32]>::len).max();
    assert!(longest <= Some(2), "{order:?}");
}

#[tokio::test(start_paused = true)]
async fn at_most_16_calls_are_in_flight() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session) = bench.login(&mut router, "ann").await;
    for request_id in 0..17 {
        client.send(call(request_id)).await;
    }
    let refused = reply_of(&mut client).await;
    assert_eq!((refused.request_id, refused.last), (16, true));
    assert_eq!(status_of(refused.status.as_ref()), Some(StatusCode::Overloaded));
    let first = next_call(&mut router).await;
    router.say(reply(session, &first, "x")).await;
    assert_eq!(reply_of(&mut client).await.request_id, 0);
    client.send(call(17)).await;
    for _ in 1..=16 {
        next_call(&mut router).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_number_in_use_cannot_be_used_again() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, _) = bench.login(&mut router, "ann").await;
    client.send(call(1)).await;
    client.send(call(1)).await;
    assert_eq!(status_of(reply_of(&mut client).await.status.as_ref()), Some(StatusCode::AlreadyExists));
    next_call(&mut router).await;
    router.is_silent(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_link_breaks_or_whose_owner_moves_is_unavailable() {
    let (mut bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session) = bench.login(&mut router, "ann").await;
    client.send(call(1)).await;
    next_call(&mut router).await;
    let received_through = router.received_through;
    drop(router);
    assert_eq!(status_of(reply_of(&mut client).await.status.as_ref()), Some(StatusCode::Unavailable));
    client.send(call(2)).await;
    assert_eq!(
        status_of(reply_of(&mut client).await.status.as_ref()),
        Some(StatusCode::Unavailable),
        "while it is down"
    );
    let mut router = bench.router_of_boot(21, received_through).await;
    client.is_alive().await;
    client.send(call(3)).await;
    let third = next_call(&mut router).await;
    bench.owner("r2");
    assert_eq!(status_of(reply_of(&mut client).await.status.as_ref()), Some(StatusCode::Unavailable));
    // A reply that comes all the same is nobody's.
    router.continue_at(2);
    router.say(reply(session, &third, "late")).await;
    client.is_alive().await;
}

#[tokio::test(start_paused = true)]
async fn replies_that_pile_up_are_refused_one_by_one() {
    let config = im_gateway::GatewayConfig { reply_bytes_max: 100_000, ..config() };
    let (bench, mut router) = Bench::with_router(config).await;
    let mut client = bench.connect_with_room(1024);
    let session = bench.login_over(&mut router, &mut client, "ann").await;
    for request_id in 1..=3 {
        client.send(call(request_id)).await;
    }
    for _ in 0..3 {
        let call = next_call(&mut router).await;
        router.say(reply(session, &call, vec![0; 300_000])).await;
    }
    let mut outcomes = Vec::new();
    while outcomes.len() < 3 {
        let part = reply_of(&mut client).await;
        if part.last {
            outcomes.push((part.request_id, status_of(part.status.as_ref())));
        }
    }
    outcomes.sort();
    let overloaded = Some(StatusCode::Overloaded);
    assert_eq!(outcomes, [(1, None), (2, overloaded), (3, overloaded)]);
}

/// What is told after an answer about presence would else be undone by it.
#[tokio::test(start_paused = true)]
async fn what_is_live_does_not_overtake_a_reply_that_is_in_order() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut client, session) = bench.login(&mut router, "ann").await;
    client.send(call(1)).await;
    let call = next_call(&mut router).await;
    let FromRouter::CallReply(reply) = reply(session, &call, "as it is now") else { panic!("a reply") };
    let reply = FromRouter::CallReply(v1::CallReply { in_order: true, ..reply });
    router.say_all(vec![deliver(&[session], 1, 10), reply, deliver(&[session], 2, 10)]).await;
    assert!(matches!(client.next().await, ServerFrame::Message(message) if message.seq == 1));
    let answered = reply_of(&mut client).await;
    assert_eq!((answered.request_id, &answered.payload[..], answered.last), (1, &b"as it is now"[..], true));
    assert!(matches!(client.next().await, ServerFrame::Message(message) if message.seq == 2));
}
