//! Sends: order, window, repeats after refusals and reconnects, never twice.

use std::time::Duration;

use bytes::Bytes;
use im_client::{Client, ClosedReason, Event, FollowAll, PendingSend, SendError, Target};
use im_proto::{
    StatusCode, body,
    v1::{self, server_frame},
};

use crate::server::{Connection, Events, Server, conversation, message, own_log, row};

const QUIET: Duration = Duration::from_secs(5);

fn bob() -> Target {
    Target::peer("bob").unwrap()
}

async fn enqueue(client: &Client, target: impl Into<Target>, text: &str) -> PendingSend {
    client.enqueue(target.into(), body::text(text)).await.unwrap()
}

async fn three(client: &Client, connection: &mut Connection) -> ([PendingSend; 3], [v1::Send; 3]) {
    let pending = [
        enqueue(client, conversation(1), "a").await,
        enqueue(client, conversation(1), "b").await,
        enqueue(client, conversation(1), "c").await,
    ];
    let sends = [connection.expect_send().await, connection.expect_send().await, connection.expect_send().await];
    (pending, sends)
}

fn ids(sends: &[v1::Send]) -> Vec<Bytes> {
    sends.iter().map(|send| send.client_message_id.clone()).collect()
}

#[tokio::test(start_paused = true)]
async fn sends_wait_for_the_sync_and_name_what_is_before_them_and_what_is_known() {
    let server = Server::new();
    let client = Client::start(server.config());
    let early = enqueue(&client, conversation(1), "early").await;
    let mut connection = server.accept().await;
    let (id, _) = connection.expect_sync().await;
    connection.expect_silence(Duration::from_secs(1)).await;
    let conversations = vec![row(conversation(1), 41)];
    connection.reply(id, &v1::SyncReply { version: 0, conversations, ..v1::SyncReply::default() }).await;
    let first = connection.expect_send().await;
    assert_eq!((first.after.len(), first.known_seq), (0, 41));
    let later = enqueue(&client, conversation(1), "later").await;
    let second = connection.expect_send().await;
    assert_eq!((&second.after, second.known_seq), (&first.client_message_id, 41));
    // Another conversation has an order of its own.
    let _other = enqueue(&client, conversation(2), "other").await;
    let third = connection.expect_send().await;
    assert_eq!((third.after.len(), third.known_seq), (0, 0));
    connection.ack(&first, conversation(1), 42).await;
    connection.ack(&second, conversation(1), 43).await;
    assert_eq!((early.await.unwrap().seq, later.await.unwrap().seq), (42, 43));
    // Nothing unacknowledged before it: no `after`.
    let _last = enqueue(&client, conversation(1), "last").await;
    let fourth = connection.expect_send().await;
    assert_eq!((fourth.after.len(), fourth.known_seq), (0, 43));
}

#[tokio::test(start_paused = true)]
async fn after_a_reconnect_what_is_pending_is_sent_again_oldest_first_after_the_sync() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept().await;
    connection.sync(0, vec![row(conversation(1), 10)]).await;
    let (mut pending, sends) = three(&client, &mut connection).await;
    connection.ack(&sends[0], conversation(1), 11).await;
    assert_eq!((&mut pending[0]).await.unwrap().seq, 11);
    drop(connection);

    let mut connection = server.accept().await;
    connection.sync(0, vec![row(conversation(1), 20)]).await;
    let again = [connection.expect_send().await, connection.expect_send().await];
    assert_eq!(ids(&again), ids(&sends[1..]));
    assert_eq!(again[0].after.len(), 0);
    assert_eq!(again[1].after, again[0].client_message_id);
    // What was known when they were first tried, although more is known now.
    assert_eq!((again[0].known_seq, again[1].known_seq), (10, 10));
    assert_eq!(again[0].body, sends[1].body);
    connection.ack(&again[0], conversation(1), 12).await;
    connection.ack(&again[1], conversation(1), 21).await;
    let [_, second, third] = pending;
    assert_eq!((second.await.unwrap().seq, third.await.unwrap().seq), (12, 21));
    connection.expect_silence(QUIET).await;
}

#[tokio::test(start_paused = true)]
async fn an_overloaded_server_gets_the_rest_again_in_order_after_a_while() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let (pending, sends) = three(&client, &mut connection).await;
    let before = tokio::time::Instant::now();
    connection.refuse(&sends[0], StatusCode::Overloaded.retry_after(Duration::from_secs(3))).await;
    // New sends of the conversation wait behind it; those of others do not.
    let fourth = enqueue(&client, conversation(1), "d").await;
    connection.refuse(&sends[1], StatusCode::OutOfOrder.to_status()).await;
    connection.expect_silence(Duration::from_secs(1)).await;
    connection.refuse(&sends[2], StatusCode::OutOfOrder.to_status()).await;
    let mut again = Vec::new();
    for seq in 1..=4 {
        let send = connection.expect_send().await;
        connection.ack(&send, conversation(1), seq).await;
        again.push(send);
    }
    assert!(before.elapsed() >= Duration::from_secs(3));
    assert_eq!(ids(&again[..3]), ids(&sends));
    assert_eq!(again[0].after.len(), 0);
    for (pending, seq) in pending.into_iter().chain([fourth]).zip(1..) {
        assert_eq!(pending.await.unwrap().seq, seq);
    }
    connection.expect_silence(QUIET).await;
}

#[tokio::test(start_paused = true)]
async fn out_of_order_starts_again_with_the_oldest_and_no_after() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let (pending, sends) = three(&client, &mut connection).await;
    connection.ack(&sends[0], conversation(1), 1).await;
    // The owner forgot the first one.
    connection.refuse(&sends[1], StatusCode::OutOfOrder.to_status()).await;
    connection.refuse(&sends[2], StatusCode::OutOfOrder.to_status()).await;
    let again = [connection.expect_send().await, connection.expect_send().await];
    assert_eq!(ids(&again), ids(&sends[1..]));
    assert_eq!((again[0].after.len(), &again[1].after), (0, &again[0].client_message_id));
    connection.ack(&again[0], conversation(1), 2).await;
    connection.ack(&again[1], conversation(1), 3).await;
    for (pending, seq) in pending.into_iter().zip(1..) {
        assert_eq!(pending.await.unwrap().seq, seq);
    }
}

#[tokio::test(start_paused = true)]
async fn a_definite_refusal_is_told_and_the_rest_goes_on() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let ([first, second, third], sends) = three(&client, &mut connection).await;
    connection.refuse(&sends[0], StatusCode::Muted.to_status()).await;
    connection.refuse(&sends[1], StatusCode::OutOfOrder.to_status()).await;
    connection.refuse(&sends[2], StatusCode::OutOfOrder.to_status()).await;
    match first.await {
        Err(SendError::Refused(status)) => assert_eq!(status.code, Some(StatusCode::Muted)),
        other => panic!("{other:?}"),
    }
    for seq in 1..=2 {
        let send = connection.expect_send().await;
        connection.ack(&send, conversation(1), seq).await;
    }
    assert_eq!((second.await.unwrap().seq, third.await.unwrap().seq), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn sync_first_reads_the_log_and_finds_what_was_stored() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept().await;
    connection.sync(0, vec![row(conversation(1), 10)]).await;
    let ([first, second, third], sends) = three(&client, &mut connection).await;
    connection.refuse(&sends[0], StatusCode::SyncFirst.to_status()).await;
    connection.refuse(&sends[1], StatusCode::OutOfOrder.to_status()).await;
    connection.refuse(&sends[2], StatusCode::OutOfOrder.to_status()).await;
    let entry = |seq: u64, own: Option<&v1::Send>| {
        let mut message = message(conversation(1), seq);
        if let Some(send) = own {
            message.sender = "alice".to_owned();
            message.client_message_id = send.client_message_id.clone();
        }
        v1::HistoryEntry { message: Some(message), gone_reason: 0 }
    };
    let reply =
        |entries| v1::HistoryReply { conversation_id: conversation(1).to_bytes(), entries, head: 14, first_seq: 1 };
    // In two pages, the first of the three was stored; somebody else used the second one's id.
    let (id, request) = connection.expect_history().await;
    assert_eq!(request.from, 11);
    connection.reply(id, &reply(vec![entry(11, None), entry(12, Some(&sends[0]))])).await;
    let (id, request) = connection.expect_history().await;
    assert_eq!(request.from, 13);
    let mut foreign = entry(13, Some(&sends[1]));
    foreign.message.as_mut().unwrap().sender = "mallory".to_owned();
    connection.reply(id, &reply(vec![foreign, entry(14, None)])).await;
    assert_eq!(first.await.unwrap().seq, 12);
    let again = [connection.expect_send().await, connection.expect_send().await];
    assert_eq!(ids(&again), ids(&sends[1..]));
    // Searched up to there.
    assert_eq!((again[0].known_seq, again[1].known_seq), (14, 14));
    assert_eq!(again[0].after.len(), 0);
    connection.ack(&again[0], conversation(1), 15).await;
    connection.ack(&again[1], conversation(1), 16).await;
    assert_eq!((second.await.unwrap().seq, third.await.unwrap().seq), (15, 16));
}

#[tokio::test(start_paused = true)]
async fn at_most_256_are_unacknowledged_and_the_next_call_waits() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let mut pending = Vec::new();
    for _ in 0..256 {
        pending.push(enqueue(&client, conversation(1), "x").await);
    }
    let mut next = Box::pin(enqueue(&client, conversation(1), "next"));
    assert!(tokio::time::timeout(QUIET, &mut next).await.is_err());
    let first = connection.expect_send().await;
    for _ in 1..256 {
        connection.expect_send().await;
    }
    connection.expect_silence(QUIET).await;
    connection.ack(&first, conversation(1), 1).await;
    let _next = next.await;
    assert_eq!(body::text("next"), connection.expect_send().await.body);
}

#[tokio::test(start_paused = true)]
async fn a_smaller_window_of_the_server_is_kept() {
    let server = Server::new();
    let client = Client::start(server.config());
    let (_, mut connection) = server.accept_raw().await;
    let limits = v1::Limits { pending_sends: 2, ..v1::Limits::default() };
    connection.welcome(v1::Welcome { limits: Some(limits), ..crate::server::welcome() }).await;
    connection.sync(0, vec![]).await;
    let mut pending = Vec::new();
    for _ in 0..3 {
        pending.push(enqueue(&client, conversation(1), "x").await);
    }
    let first = connection.expect_send().await;
    connection.expect_send().await;
    connection.expect_silence(QUIET).await;
    connection.ack(&first, conversation(1), 1).await;
    connection.expect_send().await;
}

#[tokio::test(start_paused = true)]
async fn own_messages_are_events_once_wherever_the_session_saw_them() {
    let server = Server::new();
    let mut config = server.config();
    config.follow_all = FollowAll::FromNow;
    let client = Client::start(config);
    let mut events = Events::of(&client);
    let mut connection = server.accept().await;
    connection.sync(0, vec![row(conversation(1), 5)]).await;
    let pending = enqueue(&client, conversation(1), "mine").await;
    let send = connection.expect_send().await;
    // Somebody else's message came between; its push comes after the acknowledgement.
    connection.ack(&send, conversation(1), 7).await;
    connection.push(conversation(1), 6).await;
    assert_eq!(pending.await.unwrap().seq, 7);
    assert_eq!(events.entries(1).await, [(conversation(1), 6)]);
    let Event::Message(entry) = events.next().await else { panic!("no entry") };
    assert_eq!((entry.seq, entry.own, entry.body), (7, true, body::text("mine")));
    assert_eq!(entry.client_message_id, send.client_message_id);
    // Lost acknowledgement: the entry comes from history, then the repeat is acknowledged.
    let pending = enqueue(&client, conversation(1), "mine too").await;
    let send = connection.expect_send().await;
    drop(connection);
    let mut connection = server.accept().await;
    connection.sync(0, vec![row(conversation(1), 8)]).await;
    let mut stored = message(conversation(1), 8);
    stored.sender = "alice".to_owned();
    stored.client_message_id = send.client_message_id.clone();
    let entries = vec![v1::HistoryEntry { message: Some(stored), gone_reason: 0 }];
    let (id, _) = connection.expect_history().await;
    let conversation_id = conversation(1).to_bytes();
    let again = connection.expect_send().await;
    assert_eq!(again.client_message_id, send.client_message_id);
    connection.reply(id, &v1::HistoryReply { conversation_id, entries, head: 8, first_seq: 1 }).await;
    connection.ack(&again, conversation(1), 8).await;
    assert_eq!(pending.await.unwrap().seq, 8);
    assert_eq!(events.entries(1).await, [(conversation(1), 8)]);
    events.expect_no_entry(QUIET).await;
}

#[tokio::test(start_paused = true)]
async fn one_conversation_has_one_order_by_whatever_name_it_is_addressed() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let first = enqueue(&client, bob(), "a").await;
    let send = connection.expect_send().await;
    assert_eq!(send.target, Some(v1::send::Target::PeerUserId("bob".to_owned())));
    connection.ack(&send, conversation(7), 1).await;
    assert_eq!(first.await.unwrap().conversation, conversation(7));
    // By id and by name: the id is known now.
    let _second = enqueue(&client, bob(), "b").await;
    let _third = enqueue(&client, conversation(7), "c").await;
    let (second, third) = (connection.expect_send().await, connection.expect_send().await);
    assert_eq!(second.target, Some(v1::send::Target::ConversationId(conversation(7).to_bytes())));
    assert_eq!((third.after, third.known_seq), (second.client_message_id, 1));
    // One's own log.
    let _note = enqueue(&client, Target::Me, "note").await;
    let note = connection.expect_send().await;
    assert_eq!(note.target, Some(v1::send::Target::ConversationId(own_log().to_bytes())));
}

#[tokio::test(start_paused = true)]
async fn a_connection_on_which_no_answer_comes_is_given_up() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let pending = enqueue(&client, conversation(1), "a").await;
    connection.expect_send().await;
    // Heartbeats are answered all the time.
    let before = tokio::time::Instant::now();
    while let Some(frame) = connection.next().await {
        if let v1::client_frame::Frame::Ping(ping) = frame {
            connection.send(server_frame::Frame::Pong(v1::Pong { echo: ping.echo })).await;
        }
    }
    assert!(before.elapsed() >= Duration::from_secs(29) && before.elapsed() <= Duration::from_secs(31));
    let mut connection = server.accept_ready().await;
    let send = connection.expect_send().await;
    connection.ack(&send, conversation(1), 1).await;
    assert_eq!(pending.await.unwrap().seq, 1);
}

#[tokio::test(start_paused = true)]
async fn what_fits_into_no_body_is_refused_at_once() {
    let server = Server::new();
    let client = Client::start(server.config());
    let refused = |body: Vec<u8>| client.send(bob(), body.into());
    assert_eq!(refused(vec![]).await, Err(SendError::BodySize { found: 0 }));
    assert_eq!(refused(vec![0; 65_537]).await, Err(SendError::BodySize { found: 65_537 }));
}

#[tokio::test(start_paused = true)]
async fn after_the_end_every_send_has_an_outcome() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let pending = enqueue(&client, conversation(1), "a").await;
    connection.expect_send().await;
    let ((), ()) = tokio::join!(client.close(), connection.expect_end());
    assert_eq!(pending.await, Err(SendError::Closed(ClosedReason::ByCaller)));
    let outcome = client.send(conversation(1).into(), body::text("b")).await;
    assert_eq!(outcome, Err(SendError::Closed(ClosedReason::ByCaller)));
}
