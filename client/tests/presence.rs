//! Watching presence: the server forgets it with the session, and what an application does not read in time is not lost.

use std::time::Duration;

use im_client::{CallError, Client, Event, FollowAll, Target};
use im_proto::{
    StatusCode, UserId,
    method::Method,
    v1::{self, client_frame, server_frame::Frame, signal::Signal, system_event::Event as Happened},
};
use prost::Message as _;

use crate::server::{Connection, Events, Server, conversation, own_event, row};

fn users(names: &[&str]) -> Vec<UserId> {
    names.iter().map(|name| UserId::parse(name).unwrap()).collect()
}

fn seen(name: &str, online: bool) -> v1::UserPresence {
    v1::UserPresence { user_id: name.to_owned(), online, last_seen_ms: 7, invisible: false }
}

async fn expect_subscribe(connection: &mut Connection) -> (u32, Vec<String>) {
    let call = connection.expect_call(Method::PresenceSubscribe);
    let call = tokio::time::timeout(Duration::from_secs(60), call).await.expect("a subscription");
    (call.request_id, v1::PresenceSubscribeRequest::decode(call.request).unwrap().user_ids)
}

async fn push(connection: &mut Connection, name: &str, online: bool) {
    let presence = Some(Signal::Presence(v1::Presence { online, last_seen_ms: 7 }));
    let signal = v1::Signal { target: None, sender: name.to_owned(), signal: presence };
    connection.send(Frame::Signal(signal)).await;
}

async fn next_presence(events: &mut Events) -> Vec<v1::UserPresence> {
    let wait = async {
        loop {
            if let Event::Presence(users) = events.next().await {
                return users;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("a word")
}

#[tokio::test(start_paused = true)]
async fn a_subscription_is_made_again_after_each_sync_and_only_then() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut events = Events::of(&client);
    let mut connection = server.accept_ready().await;
    let both = users(&["bob", "carol"]);
    let answered = async {
        let (id, asked) = expect_subscribe(&mut connection).await;
        assert_eq!(asked, ["bob", "carol"]);
        connection.reply(id, &v1::PresenceSubscribeReply { users: vec![seen("bob", true)] }).await;
    };
    let (known, ()) = tokio::join!(client.watch_presence(&both), answered);
    assert_eq!(known.unwrap(), [seen("bob", true)]);
    push(&mut connection, "carol", true).await;
    assert_eq!(next_presence(&mut events).await, [seen("carol", true)]);
    // Of whom it does not watch it wants to know nothing.
    push(&mut connection, "mallory", true).await;
    push(&mut connection, "bob", false).await;
    assert_eq!(next_presence(&mut events).await, [seen("bob", false)]);
    connection.send(Frame::Resync(v1::Resync { reason: 3, spread_ms: 0 })).await;
    connection.sync(1, vec![]).await;
    let (id, asked) = expect_subscribe(&mut connection).await;
    assert_eq!(asked, ["bob", "carol"]);
    // Not now: once more, a while later. What is so already is no news.
    connection.refuse_call(id, StatusCode::Unavailable).await;
    let (id, _) = expect_subscribe(&mut connection).await;
    connection.reply(id, &v1::PresenceSubscribeReply { users: vec![seen("bob", true), seen("carol", true)] }).await;
    assert_eq!(next_presence(&mut events).await, [seen("bob", true)]);
    drop(connection);
    let mut connection = server.accept_ready().await;
    let (id, asked) = expect_subscribe(&mut connection).await;
    assert_eq!(asked, ["bob", "carol"]);
    // One that the server does not take is not tried again.
    connection.refuse_call(id, StatusCode::UnknownMethod).await;
    connection.expect_silence(Duration::from_secs(5)).await;
}

#[tokio::test(start_paused = true)]
async fn an_application_that_does_not_read_learns_the_newest_of_each_user() {
    let server = Server::new();
    let mut config = server.config();
    config.event_queue = 2;
    let client = Client::start(config);
    let mut connection = server.accept().await;
    connection.sync(1, vec![row(conversation(1), 3)]).await;
    let names: Vec<String> = (0..100).map(|n| format!("u{n}")).collect();
    let many = users(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let answered = async {
        let (id, _) = expect_subscribe(&mut connection).await;
        connection.reply(id, &v1::PresenceSubscribeReply::default()).await;
    };
    let (known, ()) = tokio::join!(client.watch_presence(&many), answered);
    known.unwrap();
    for round in 0..3 {
        for n in 0..100 {
            push(&mut connection, &format!("u{n}"), round == 1).await;
        }
        // Taken before the next round.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let mut events = Events::of(&client);
    let mut known = std::collections::BTreeMap::new();
    while known.len() < 100 || known.values().any(|online| *online) {
        for user in next_presence(&mut events).await {
            known.insert(user.user_id, user.online);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn while_its_user_is_invisible_a_client_tells_nothing_by_itself_and_makes_good_for_it_later() {
    let server = Server::new();
    let mut config = server.config();
    config.receipts = true;
    config.follow_all = FollowAll::FromNow;
    let client = Client::start(config);
    let mut events = Events::of(&client);
    let mut connection = server.accept().await;
    let (id, _) = connection.expect_sync().await;
    let reply = v1::SyncReply {
        version: 2,
        invisible: true,
        conversations: vec![row(conversation(1), 3)],
        ..v1::SyncReply::default()
    };
    connection.reply(id, &reply).await;
    connection.push(conversation(1), 4).await;
    connection.push(conversation(1), 5).await;
    assert_eq!(events.entries(2).await.len(), 2);
    connection.expect_silence(Duration::from_secs(1)).await;
    client.typing(Target::Conversation(conversation(1)), true).await.unwrap();
    connection.expect_silence(Duration::from_secs(1)).await;
    let visible = Happened::VisibilityChanged(v1::VisibilityChanged { invisible: false });
    connection.send(Frame::Message(own_event(3, visible))).await;
    let client_frame::Frame::Received(received) = connection.expect().await else { panic!("no receipt") };
    assert_eq!((received.conversation_id, received.seq), (conversation(1).to_bytes(), 5));
    client.typing(Target::Conversation(conversation(1)), true).await.unwrap();
    assert!(matches!(connection.expect().await, client_frame::Frame::Signal(_)));
}

/// The server gets the last one last, whatever becomes of the others, also over a reconnect.
#[tokio::test(start_paused = true)]
async fn of_overlapping_calls_to_watch_the_last_one_counts() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let sets = [users(&["bob"]), users(&["carol"]), users(&["dave"]), users(&[])];
    let mut first = Box::pin(client.watch_presence(&sets[0]));
    let (id, asked) = tokio::select! {
        biased;
        _ = &mut first => panic!("nobody has answered"),
        call = expect_subscribe(&mut connection) => call,
    };
    assert_eq!(asked, ["bob"]);
    let serve = async {
        // One at a time; the second one is never made.
        connection.expect_silence(Duration::from_secs(1)).await;
        connection.reply(id, &v1::PresenceSubscribeReply { users: vec![seen("bob", true)] }).await;
        let (id, asked) = expect_subscribe(&mut connection).await;
        assert_eq!(asked, ["dave"]);
        // Refused for now: it comes again, unless another one is asked for.
        connection.refuse_call(id, StatusCode::Unavailable).await;
        let (_, asked) = expect_subscribe(&mut connection).await;
        assert_eq!(asked, ["dave"]);
        drop(connection);
        let mut connection = server.accept_ready().await;
        let (id, asked) = expect_subscribe(&mut connection).await;
        assert_eq!(asked, ["dave"]);
        connection.reply(id, &v1::PresenceSubscribeReply { users: vec![seen("dave", true)] }).await;
        connection.expect_silence(Duration::from_secs(5)).await;
        connection
    };
    let calls = async { tokio::join!(biased; first, client.watch_presence(&sets[1]), client.watch_presence(&sets[2])) };
    let ((first, second, third), mut connection) = tokio::join!(calls, serve);
    assert_eq!((first, second), (Err(CallError::Replaced), Err(CallError::Replaced)));
    assert_eq!(third, Ok(vec![seen("dave", true)]));
    // Nobody is somebody to ask for, too; and what nobody waits for is done all the same.
    let mut left = Box::pin(client.watch_presence(&sets[3]));
    assert!(tokio::time::timeout(Duration::from_secs(1), &mut left).await.is_err());
    drop(left);
    let (id, asked) = expect_subscribe(&mut connection).await;
    assert_eq!(asked, Vec::<String>::new());
    connection.reply(id, &v1::PresenceSubscribeReply::default()).await;
    connection.send(Frame::Resync(v1::Resync { reason: 3, spread_ms: 0 })).await;
    connection.sync(1, vec![]).await;
    connection.expect_silence(Duration::from_secs(5)).await;
}

/// The application takes the answer first and reads its events later: the older event is not the last word.
#[tokio::test(start_paused = true)]
async fn what_an_event_told_before_the_answer_is_told_anew() {
    let server = Server::new();
    let client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    for (set, known) in [(&["bob"][..], vec![]), (&["bob", "carol"], vec![seen("bob", false), seen("carol", true)])] {
        let set = users(set);
        let answered = async {
            let (id, _) = expect_subscribe(&mut connection).await;
            connection.reply(id, &v1::PresenceSubscribeReply { users: known.clone() }).await;
        };
        let (answer, ()) = tokio::join!(client.watch_presence(&set), answered);
        assert_eq!(answer.unwrap(), known);
        if known.is_empty() {
            push(&mut connection, "bob", true).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
    let mut events = Events::of(&client);
    assert_eq!(next_presence(&mut events).await, [seen("bob", true)]);
    assert_eq!(next_presence(&mut events).await, [seen("bob", false)]);
}

/// The sync was answered before the entry was made that the client has read meanwhile.
#[tokio::test(start_paused = true)]
async fn an_old_answer_to_a_sync_does_not_undo_that_its_user_is_invisible() {
    let server = Server::new();
    let mut config = server.config();
    config.receipts = true;
    config.follow_all = FollowAll::FromNow;
    let client = Client::start(config);
    let mut events = Events::of(&client);
    let mut connection = server.accept().await;
    connection.sync(2, vec![row(conversation(1), 3)]).await;
    connection.send(Frame::Resync(v1::Resync { reason: 3, spread_ms: 0 })).await;
    let (id, _) = connection.expect_sync().await;
    let invisible = Happened::VisibilityChanged(v1::VisibilityChanged { invisible: true });
    connection.send(Frame::Message(own_event(3, invisible))).await;
    let reply = v1::SyncReply { version: 2, invisible: false, ..v1::SyncReply::default() };
    connection.reply(id, &reply).await;
    connection.push(conversation(1), 4).await;
    assert_eq!(events.entries(1).await.len(), 1);
    connection.expect_silence(Duration::from_secs(5)).await;
    client.typing(Target::Conversation(conversation(1)), true).await.unwrap();
    connection.expect_silence(Duration::from_secs(1)).await;
}
