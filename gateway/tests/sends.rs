//! Sends: checked, forwarded in order, answered only by owners.

use std::time::Duration;

use bytes::Bytes;
use im_proto::{StatusCode, body, v1};

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
async fn live_messages_are_written_as_the_owner_encoded_them() {
    let (bench, mut router) = Bench::with_router(config()).await;
    let (mut ann, ann_session) = bench.login(&mut router, "ann").await;
    let (mut bob, bob_session) = bench.login(&mut router, "bob").await;
    router.say_all((1..=100).map(|seq| deliver(&[ann_session, bob_session, 999], seq, 50)).collect()).await;
    for client in [&mut ann, &mut bob] {
        for seq in 1..=100 {
            let ServerFrame::Message(message) = client.next().await else { panic!("a message") };
            assert_eq!(message.seq, seq);
        }
    }
}
