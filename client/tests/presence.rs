//! Watching presence: the server forgets it with the session, and what an application does not read in time is not lost.

use std::time::Duration;

use im_client::{Client, Event, FollowAll, Target};
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
