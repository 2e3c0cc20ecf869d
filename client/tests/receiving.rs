//! Entries come in order, without holes and without duplicates, whatever the server pushes, drops or repeats.

use std::{ops::RangeInclusive, time::Duration};

use im_client::{Client, Event, FollowAll, Position, Target};
use im_proto::{
    ConversationId, StatusCode, body,
    v1::{self, server_frame, system_event},
};

use crate::server::{Connection, Events, Server, conversation, joined, message, own_event, own_log, row};

const QUIET: Duration = Duration::from_secs(5);

fn range(id: ConversationId, seqs: RangeInclusive<u64>) -> Vec<(ConversationId, u64)> {
    seqs.map(|seq| (id, seq)).collect()
}

/// A client that follows conversation 1, of which it has everything up to 3.
async fn following(server: &Server) -> (Client, Connection, Events) {
    let client = Client::start(server.config());
    let events = Events::of(&client);
    let mut connection = server.accept().await;
    connection.sync(0, vec![row(conversation(1), 3)]).await;
    let follow = client.follow(conversation(1).into(), Position::Now);
    let answer = async {
        let (id, request) = connection.expect_history().await;
        assert!(request.newest);
        connection.reply_history(id, conversation(1), 3..=3, 3).await;
    };
    let (followed, ()) = tokio::join!(follow, answer);
    assert_eq!(followed.unwrap(), Some(conversation(1)));
    (client, connection, events)
}

#[tokio::test(start_paused = true)]
async fn pushes_in_order_are_events_in_order_and_repeats_are_dropped() {
    let server = Server::new();
    let (_client, mut connection, mut events) = following(&server).await;
    for seq in [4, 5, 5, 3, 4, 6] {
        connection.push(conversation(1), seq).await;
    }
    assert_eq!(events.entries(3).await, range(conversation(1), 4..=6));
    connection.expect_silence(QUIET).await;
    events.expect_no_entry(QUIET).await;
}

#[tokio::test(start_paused = true)]
async fn a_gap_is_read_from_history_before_what_is_beyond_it() {
    let server = Server::new();
    let (_client, mut connection, mut events) = following(&server).await;
    connection.push(conversation(1), 7).await;
    let (id, request) = connection.expect_history().await;
    assert_eq!((request.from, request.to, request.newest), (4, 0, false));
    events.expect_no_entry(Duration::from_secs(1)).await;
    // Pushed while the history is under way.
    connection.push(conversation(1), 8).await;
    // A short page: the rest is asked for.
    connection.reply_history(id, conversation(1), 4..=5, 8).await;
    assert_eq!(events.entries(2).await, range(conversation(1), 4..=5));
    let (id, request) = connection.expect_history().await;
    assert_eq!(request.from, 6);
    connection.reply_history(id, conversation(1), 6..=6, 8).await;
    assert_eq!(events.entries(3).await, range(conversation(1), 6..=8));
    connection.expect_silence(QUIET).await;
}

#[tokio::test(start_paused = true)]
async fn a_history_that_cannot_be_read_now_is_read_later() {
    let server = Server::new();
    let (_client, mut connection, mut events) = following(&server).await;
    connection.push(conversation(1), 5).await;
    let (id, _) = connection.expect_history().await;
    connection.refuse_call(id, StatusCode::Unavailable).await;
    let (id, _) = connection.expect_history().await;
    // An answer that brings nothing is no reason to ask at once again.
    let conversation_id = conversation(1).to_bytes();
    connection.reply(id, &v1::HistoryReply { conversation_id, head: 5, ..v1::HistoryReply::default() }).await;
    connection.expect_silence(Duration::from_millis(400)).await;
    let (id, _) = connection.expect_history().await;
    connection.reply_history(id, conversation(1), 4..=5, 5).await;
    assert_eq!(events.entries(2).await, range(conversation(1), 4..=5));
}

#[tokio::test(start_paused = true)]
async fn entries_before_the_first_kept_one_are_stepped_over_and_said() {
    let server = Server::new();
    let (_client, mut connection, mut events) = following(&server).await;
    connection.push(conversation(1), 9).await;
    let (id, _) = connection.expect_history().await;
    let entries = vec![v1::HistoryEntry { message: Some(message(conversation(1), 8)), gone_reason: 0 }];
    let conversation_id = conversation(1).to_bytes();
    connection.reply(id, &v1::HistoryReply { conversation_id, entries, head: 9, first_seq: 8 }).await;
    loop {
        match events.next().await {
            Event::Gone { through, .. } => break assert_eq!(through, 7),
            Event::Message(entry) => panic!("{entry:?}"),
            _ => {}
        }
    }
    assert_eq!(events.entries(2).await, range(conversation(1), 8..=9));
}

#[tokio::test(start_paused = true)]
async fn a_resync_waits_within_its_spread_then_syncs_and_reads_what_was_lost() {
    let server = Server::new();
    let (_client, mut connection, mut events) = following(&server).await;
    let before = tokio::time::Instant::now();
    connection.send(server_frame::Frame::Resync(v1::Resync { reason: 1, spread_ms: 2_000 })).await;
    let (id, request) = connection.expect_sync().await;
    assert!(before.elapsed() <= Duration::from_millis(2_001));
    assert!(request.have.contains(&v1::SyncHave { conversation_id: conversation(1).to_bytes(), seq: 3, read_seq: 0 }));
    let conversations = vec![row(conversation(1), 5)];
    connection.reply(id, &v1::SyncReply { version: 0, conversations, ..v1::SyncReply::default() }).await;
    let (id, request) = connection.expect_history().await;
    assert_eq!(request.from, 4);
    connection.reply_history(id, conversation(1), 4..=5, 5).await;
    assert_eq!(events.entries(2).await, range(conversation(1), 4..=5));
}

#[tokio::test(start_paused = true)]
async fn after_a_reconnect_only_what_is_new_comes() {
    let server = Server::new();
    let (_client, mut connection, mut events) = following(&server).await;
    connection.push(conversation(1), 4).await;
    assert_eq!(events.entries(1).await, range(conversation(1), 4..=4));
    drop(connection);
    let mut connection = server.accept().await;
    let request = connection.sync(0, vec![row(conversation(1), 6)]).await;
    assert!(request.have.contains(&v1::SyncHave { conversation_id: conversation(1).to_bytes(), seq: 4, read_seq: 0 }));
    let (id, request) = connection.expect_history().await;
    assert_eq!(request.from, 5);
    connection.reply_history(id, conversation(1), 5..=6, 6).await;
    connection.push(conversation(1), 6).await;
    connection.push(conversation(1), 7).await;
    assert_eq!(events.entries(3).await, range(conversation(1), 5..=7));
}

#[tokio::test(start_paused = true)]
async fn a_sync_is_read_to_its_last_page_and_the_next_one_starts_at_its_first_version() {
    let server = Server::new();
    let _client = Client::start(server.config());
    let mut connection = server.accept().await;
    let (id, request) = connection.expect_sync().await;
    assert_eq!(request.version, 0);
    let conversations = vec![row(conversation(1), 3)];
    connection.reply(id, &v1::SyncReply { version: 5, conversations, next: "more".into(), invisible: false }).await;
    let (id, request) = connection.expect_sync().await;
    assert_eq!(&request.page[..], b"more");
    // The list changed meanwhile: the change is in the user's own log from seq 6 on.
    let conversations = vec![row(conversation(2), 9)];
    connection.reply(id, &v1::SyncReply { version: 7, conversations, ..v1::SyncReply::default() }).await;
    drop(connection);
    let mut connection = server.accept().await;
    let request = connection.sync(5, vec![]).await;
    assert_eq!(request.version, 5);
    // Nothing is followed: of each conversation the head is named.
    let have: Vec<u64> = request.have.iter().map(|have| have.seq).collect();
    assert_eq!(have, [3, 9, 5]);
}

#[tokio::test(start_paused = true)]
async fn a_conversation_that_comes_to_be_is_followed_from_its_first_entry() {
    let server = Server::new();
    let mut config = server.config();
    config.follow_all = FollowAll::FromNow;
    let client = Client::start(config);
    let mut events = Events::of(&client);
    let mut connection = server.accept().await;
    connection.sync(2, vec![row(conversation(1), 3)]).await;
    // The first message comes before the word that the conversation exists.
    connection.push(conversation(2), 1).await;
    events.expect_no_entry(Duration::from_secs(1)).await;
    connection.send(server_frame::Frame::Message(joined(3, conversation(2), "bob"))).await;
    connection.push(conversation(1), 4).await;
    let mut entries = events.entries(3).await;
    entries.sort();
    assert_eq!(entries, [(conversation(1), 4), (conversation(2), 1), (own_log(), 3)]);
    connection.expect_silence(QUIET).await;
}

#[tokio::test(start_paused = true)]
async fn a_conversation_that_comes_to_be_during_the_first_sync_is_followed_too() {
    for follow_all in [FollowAll::FromNow, FollowAll::FromStart] {
        let server = Server::new();
        let mut config = server.config();
        config.follow_all = follow_all;
        let client = Client::start(config);
        let mut events = Events::of(&client);
        let mut connection = server.accept().await;
        let (id, _) = connection.expect_sync().await;
        // Both pushes come after the list was read and before it arrives.
        connection.push(conversation(2), 1).await;
        connection.send(server_frame::Frame::Message(joined(1, conversation(2), "bob"))).await;
        connection.reply(id, &v1::SyncReply::default()).await;
        let mut entries = events.entries(2).await;
        entries.sort();
        assert_eq!(entries, [(conversation(2), 1), (own_log(), 1)], "{follow_all:?}");
        // What came before the answer is not promised, and the answer does not have it.
        let (id, request) = connection.expect_history().await;
        assert_eq!(request.from, 2);
        connection.reply_history(id, conversation(2), RangeInclusive::new(2, 1), 1).await;
        connection.expect_silence(QUIET).await;
    }
}

/// A sync cannot tell of what is lost in a conversation that is not on the list yet.
#[tokio::test(start_paused = true)]
async fn what_was_lost_before_the_word_that_a_conversation_exists_is_read_at_that_word() {
    let server = Server::new();
    let mut config = server.config();
    config.follow_all = FollowAll::FromNow;
    let client = Client::start(config);
    let mut events = Events::of(&client);
    let mut connection = server.accept().await;
    connection.sync(2, vec![row(conversation(1), 3)]).await;
    connection.push(conversation(2), 1).await;
    // The second message is lost, and the sync says nothing of it.
    connection.send(server_frame::Frame::Resync(v1::Resync { reason: 1, spread_ms: 100 })).await;
    connection.sync(2, vec![]).await;
    connection.send(server_frame::Frame::Message(joined(3, conversation(2), "bob"))).await;
    let (id, request) = connection.expect_history().await;
    assert_eq!(request.from, 2);
    // Asked until it is answered.
    connection.refuse_call(id, StatusCode::Unavailable).await;
    let (_, request) = connection.expect_history().await;
    assert_eq!(request.from, 2);
    drop(connection);
    let mut connection = server.accept().await;
    connection.sync(3, vec![]).await;
    let (id, request) = connection.expect_history().await;
    assert_eq!(request.from, 2);
    connection.reply_history(id, conversation(2), 2..=2, 2).await;
    let mut entries = events.entries(3).await;
    entries.sort();
    assert_eq!(entries, [(conversation(2), 1), (conversation(2), 2), (own_log(), 3)]);
    connection.expect_silence(QUIET).await;
}

#[tokio::test(start_paused = true)]
async fn what_was_lost_before_the_word_that_one_is_in_a_group_again_is_read_at_that_word() {
    let server = Server::new();
    let mut config = server.config();
    config.follow_all = FollowAll::FromNow;
    let client = Client::start(config);
    let mut events = Events::of(&client);
    let mut connection = server.accept().await;
    connection.sync(2, vec![row(conversation(1), 3)]).await;
    let left = v1::ConversationLeft { conversation_id: conversation(1).to_bytes(), left_seq: 4 };
    connection.push(conversation(1), 4).await;
    let left = own_event(3, system_event::Event::ConversationLeft(left));
    connection.send(server_frame::Frame::Message(left)).await;
    // In it again by entry 5, then 6 is lost; the list is older.
    connection.push(conversation(1), 5).await;
    connection.send(server_frame::Frame::Resync(v1::Resync { reason: 1, spread_ms: 100 })).await;
    connection.sync(3, vec![v1::ConversationRow { left: true, left_seq: 4, ..row(conversation(1), 4) }]).await;
    let back = v1::ConversationJoined {
        conversation_id: conversation(1).to_bytes(),
        kind: v1::ConversationKind::Group.into(),
        joined_seq: 5,
        ..v1::ConversationJoined::default()
    };
    let back = own_event(4, system_event::Event::ConversationJoined(back));
    connection.send(server_frame::Frame::Message(back)).await;
    let (id, request) = connection.expect_history().await;
    assert_eq!(request.from, 6);
    connection.reply_history(id, conversation(1), 6..=6, 6).await;
    let entries = events.entries(5).await;
    let of = |id| entries.iter().filter(|entry| entry.0 == id).map(|entry| entry.1).collect::<Vec<u64>>();
    assert_eq!((of(conversation(1)), of(own_log())), (vec![4, 5, 6], vec![3, 4]));
    connection.expect_silence(QUIET).await;
}

#[tokio::test(start_paused = true)]
async fn follow_all_from_the_start_reads_every_history() {
    let server = Server::new();
    let mut config = server.config();
    config.follow_all = FollowAll::FromStart;
    let client = Client::start(config);
    let mut events = Events::of(&client);
    let mut connection = server.accept().await;
    connection.sync(1, vec![row(conversation(1), 2), row(conversation(2), 1)]).await;
    for _ in 0..3 {
        let (id, request) = connection.expect_history().await;
        let Some(v1::target::Target::ConversationId(bytes)) = request.target.unwrap().target else { panic!("no id") };
        let conversation_id = ConversationId::from_slice(&bytes).unwrap();
        let head = if conversation_id == conversation(1) { 2 } else { 1 };
        connection.reply_history(id, conversation_id, 1..=head, head).await;
    }
    let mut entries = events.entries(4).await;
    entries.sort();
    assert_eq!(entries, [(conversation(1), 1), (conversation(1), 2), (conversation(2), 1), (own_log(), 1)]);
}

#[tokio::test(start_paused = true)]
async fn the_conversation_with_a_stranger_is_followed_once_it_exists() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut events = Events::of(&client);
    let mut connection = server.accept_ready().await;
    let target = Target::peer("bob").unwrap();
    let answer = async {
        let (id, request) = connection.expect_history().await;
        assert_eq!(request.target.unwrap().target, Some(v1::target::Target::PeerUserId("bob".to_owned())));
        connection.refuse_call(id, StatusCode::NotFound).await;
    };
    let (followed, ()) = tokio::join!(client.follow(target, Position::Now), answer);
    assert_eq!(followed.unwrap(), None);
    connection.push(conversation(9), 1).await;
    connection.send(server_frame::Frame::Message(joined(1, conversation(9), "bob"))).await;
    let (id, request) = connection.expect_history().await;
    assert_eq!(request.from, 1);
    connection.reply_history(id, conversation(9), 1..=1, 1).await;
    assert_eq!(events.entries(1).await, [(conversation(9), 1)]);
}

#[tokio::test(start_paused = true)]
async fn an_application_that_does_not_read_loses_nothing_and_delays_nobody() {
    let server = Server::new();
    let mut config = server.config();
    config.event_queue = 8;
    config.follow_all = FollowAll::FromNow;
    let client = Client::start(config);
    let mut events = Events::of(&client);
    let mut connection = server.accept().await;
    connection.sync(0, vec![row(conversation(1), 0), row(conversation(2), 0)]).await;
    for seq in 1..=100 {
        connection.push(conversation(1), seq).await;
    }
    // The queue is full: still sends are acknowledged, heartbeats answered.
    let sending = client.send(conversation(2).into(), body::text("hello"));
    let answer = async {
        let send = connection.expect_send().await;
        connection.ack(&send, conversation(2), 1).await;
    };
    let (sent, ()) = tokio::join!(sending, answer);
    assert_eq!(sent.unwrap().seq, 1);
    connection.expect_silence(QUIET).await;
    // When it reads again, everything is there.
    let serve = async {
        loop {
            let (id, request) = connection.expect_history().await;
            let Some(v1::target::Target::ConversationId(bytes)) = request.target.unwrap().target else {
                panic!("no id")
            };
            let conversation_id = ConversationId::from_slice(&bytes).unwrap();
            let head = if conversation_id == conversation(1) { 100 } else { 1 };
            let from = u64::try_from(request.from).unwrap();
            assert!(request.limit >= 1);
            let to = head.min(from + u64::from(request.limit) - 1);
            connection.reply_history(id, conversation_id, from..=to, head).await;
        }
    };
    let entries = tokio::select! {
        biased;
        entries = events.entries(101) => entries,
        () = serve => unreachable!(),
    };
    let of = |id| entries.iter().filter(|entry| entry.0 == id).map(|entry| entry.1).collect::<Vec<u64>>();
    assert_eq!(of(conversation(1)), (1..=100).collect::<Vec<u64>>());
    assert_eq!(of(conversation(2)), [1]);
}

#[tokio::test(start_paused = true)]
async fn a_conversation_that_may_not_be_read_any_more_is_said_once() {
    let server = Server::new();
    let (_client, mut connection, mut events) = following(&server).await;
    connection.push(conversation(1), 9).await;
    let (id, _) = connection.expect_history().await;
    connection.refuse_call(id, StatusCode::NotFound).await;
    loop {
        if let Event::Unreadable { conversation: id, status } = events.next().await {
            assert_eq!((id, status.code), (conversation(1), Some(StatusCode::NotFound)));
            break;
        }
    }
    connection.push(conversation(1), 10).await;
    connection.expect_silence(QUIET).await;
}
