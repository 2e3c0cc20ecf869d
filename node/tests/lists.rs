//! What people see of each other, on a real server and across a kill: unread, mentions, receipts, typing, replies, forwards; by
//! clients and by another service.

use std::time::Duration;

use bytes::Bytes;
use im_client::{
    Client, ClientConfig, Endpoint, Event, FollowAll, ForwardError, SendError, Target, Transport, Trust, compose,
};
use im_proto::{
    ConversationId, StatusCode, UserId,
    v1::{
        self, conversation_service_client::ConversationServiceClient, message_service_client::MessageServiceClient,
        signal::Signal as Kind,
    },
};
use tokio::sync::mpsc;
use tonic::{Code, Request, transport::Channel};

use crate::server::{ANY, Server, imd, stdout};

fn token(server: &Server, user: &str, device: &str) -> String {
    let data = server.data.to_str().unwrap();
    let output = imd(&["token", "--user", user, "--device", device, "--data", data]);
    stdout(&output).trim().to_owned()
}

/// A client on a device of its own, with its events.
async fn device(server: &Server, user: &str, device: &str) -> (Client, mpsc::Receiver<Event>) {
    let endpoint = Endpoint::new(Transport::Tcp, server.address("tcp")).unwrap();
    let token = token(server, user, device);
    let mut config = ClientConfig::new(vec![endpoint], token, &Trust::SystemRoots).unwrap();
    config.follow_all = FollowAll::FromNow;
    let client = Client::connect(config).await.unwrap();
    let mut events = client.events().unwrap();
    while events.recv().await.unwrap() != Event::Resynced {}
    (client, events)
}

/// The next event that a predicate picks.
async fn next<T>(events: &mut mpsc::Receiver<Event>, what: &str, pick: impl Fn(&Event) -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(picked) = pick(&events.recv().await.expect("the client goes on")) {
                return picked;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.unwrap_or_else(|_| panic!("no {what}"))
}

fn receipt_of(event: &Event, user: &str) -> Option<(u64, u64)> {
    match event {
        Event::Signal(signal) if signal.sender == user => match &signal.signal {
            Some(Kind::Receipt(receipt)) => Some((receipt.received_seq, receipt.read_seq)),
            _ => None,
        },
        _ => None,
    }
}

async fn row(client: &Client, id: ConversationId) -> v1::ConversationRow {
    for _ in 0..600 {
        let rows = client.conversations().await.unwrap();
        if let Some(row) = rows.into_iter().find(|row| row.conversation_id == id.to_bytes()) {
            return row;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the conversation does not come into the list");
}

fn user(name: &str) -> UserId {
    UserId::parse(name).unwrap()
}

fn refused(outcome: Result<im_client::Sent, SendError>) -> Option<StatusCode> {
    match outcome {
        Err(SendError::Refused(status)) => status.code,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn unread_mentions_and_receipts_are_the_same_on_all_devices_and_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let (alice, mut alice_events) = device(&server, "alice", "a1").await;
    let (bob, bob_events) = device(&server, "bob", "b1").await;
    let (tablet, mut tablet_events) = device(&server, "bob", "b2").await;
    let id = alice.create_group("trip", &[user("bob"), user("carol")]).await.unwrap();
    let group = Target::Conversation(id);
    let texts = [
        compose::Text::new("hello").body(),
        compose::Text::new("hello ").mention(&user("bob")).body(),
        compose::Text::new("hello ").mention_all().body(),
    ];
    for body in texts {
        alice.send(group.clone(), body).await.unwrap();
    }
    let refusal = alice.send(group.clone(), compose::Text::new("").mention(&user("mallory")).body()).await;
    assert_eq!(refused(refusal), Some(StatusCode::NotAMember));
    assert_eq!(refused(alice.reply(group.clone(), 99, "to nothing").await), Some(StatusCode::NotFound));
    let last = alice.reply(group.clone(), 2, "to the first").await.unwrap().seq;
    assert_eq!(last, 5);

    // Delivered to both devices; the client says so by itself.
    next(&mut alice_events, "delivery", |event| receipt_of(event, "bob").filter(|mark| *mark == (last, 1))).await;
    for client in [&bob, &tablet] {
        let row = row(client, id).await;
        assert_eq!((row.unread, row.mentions, row.mentioned_seqs.as_slice()), (4, 2, [3].as_slice()));
        assert_eq!(row.preview.map(|preview| preview.seq), Some(last));
    }
    let read = bob.mark_read(group.clone(), 3).await.unwrap();
    assert_eq!((read.read_seq, read.unread, read.mentions), (3, 2, 1));
    for events in [&mut alice_events, &mut tablet_events] {
        next(events, "read mark", |event| receipt_of(event, "bob").filter(|mark| *mark == (last, 3))).await;
    }
    bob.typing(group.clone(), true).await.unwrap();
    let typing = |event: &Event| match event {
        Event::Signal(signal) if signal.sender == "bob" => {
            (signal.signal == Some(Kind::Typing(v1::Typing { active: true }))).then_some(())
        }
        _ => None,
    };
    next(&mut alice_events, "typing", typing).await;
    drop((alice, alice_events, bob, bob_events, tablet, tablet_events));

    drop(server);
    let server = Server::start(&folder.path().join("data"), &ANY);
    let (alice, _alice_events) = device(&server, "alice", "a1").await;
    for name in ["b1", "b2"] {
        let (bob, _events) = device(&server, "bob", name).await;
        let list = bob.conversations_since(0, &[]).await.unwrap();
        let row = list.rows.iter().find(|row| row.conversation_id == id.to_bytes()).unwrap();
        assert_eq!((row.unread, row.mentions, row.read_seq, row.mentioned_seqs.len()), (2, 1, 3, 0));
        let have = |row: &v1::ConversationRow| {
            let conversation_id = row.conversation_id.clone();
            v1::SyncHave { conversation_id, seq: row.head, read_seq: row.read_seq }
        };
        let have: Vec<_> = list.rows.iter().map(have).collect();
        assert_eq!(bob.conversations_since(list.version, &have).await.unwrap().rows, []);
    }
    let cursors = row(&alice, id).await.cursors;
    let of = |name: &str| cursors.iter().find(|cursor| cursor.user_id == name).map(|cursor| cursor.read_seq);
    assert_eq!((of("bob"), of("carol"), of("alice")), (Some(3), Some(1), None));
}

#[tokio::test]
async fn what_one_may_read_can_be_forwarded_to_many_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let (alice, _alice_events) = device(&server, "alice", "a1").await;
    let (bob, _bob_events) = device(&server, "bob", "b1").await;
    let (mallory, _mallory_events) = device(&server, "mallory", "m1").await;
    let to_bob = Target::peer("bob").unwrap();
    let first = alice.send(to_bob.clone(), compose::Text::new("one").body()).await.unwrap();
    alice.send(to_bob, compose::Text::new("two").body()).await.unwrap();
    let from = Target::Conversation(first.conversation);
    let to = [Target::peer("carol").unwrap(), Target::peer("dave").unwrap()];
    let sent = bob.forward(from.clone(), &[1, 2], &to, "what alice said").await.unwrap();
    assert_eq!(sent.len(), 2);
    for (target, sent) in to.iter().zip(&sent) {
        let page = bob.history(target.clone(), sent.seq, sent.seq, 1, false).await.unwrap();
        let Some(v1::body::Content::Forward(forward)) = page.entries[0].decode_body().unwrap().content else {
            panic!("not a forward");
        };
        let texts: Vec<_> = forward.entries.iter().map(|entry| (entry.sender.as_str(), entry.body.clone())).collect();
        let expected = ["one", "two"].map(|text| ("alice", compose::Text::new(text).body()));
        assert_eq!((forward.title.as_str(), texts), ("what alice said", expected.to_vec()));
    }
    let stolen = mallory.forward(from.clone(), &[1], &[Target::peer("carol").unwrap()], "").await;
    assert!(
        matches!(&stolen, Err(ForwardError::Read(error)) if error.code() == Some(StatusCode::NotFound)),
        "{stolen:?}"
    );
    let missing = bob.forward(from, &[1, 3], &to, "").await;
    assert_eq!(missing, Err(ForwardError::NothingThere { seq: 3 }));
}

fn as_user<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

fn to(id: &Bytes) -> Option<v1::Target> {
    Some(v1::Target { target: Some(v1::target::Target::ConversationId(id.clone())) })
}

#[tokio::test]
async fn another_service_mentions_replies_reads_lists_and_signals() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let channel = Channel::from_shared(format!("http://{}", server.address("api"))).unwrap().connect().await.unwrap();
    let mut messages = MessageServiceClient::new(channel.clone());
    let mut conversations = ConversationServiceClient::new(channel);
    let (alice, bob) = (server.token("alice"), server.token("bob"));
    let send = |name: &str, body: Bytes| v1::SendRequest {
        target: Some(v1::Target { target: Some(v1::target::Target::PeerUserId("bob".to_owned())) }),
        client_message_id: Bytes::copy_from_slice(name.as_bytes()),
        body,
        known_seq: 0,
    };
    let mention = |name: &str| compose::Text::new("hello ").mention(&user(name));
    let id =
        messages.send(as_user(&alice, send("1", mention("bob").body()))).await.unwrap().into_inner().conversation_id;
    messages.send(as_user(&alice, send("2", mention("bob").reply(1)))).await.unwrap();
    let stranger = messages.send(as_user(&alice, send("3", mention("mallory").body()))).await.unwrap_err();
    assert_eq!(stranger.code(), Code::PermissionDenied);
    let nothing = messages.send(as_user(&alice, send("4", mention("bob").reply(3)))).await.unwrap_err();
    assert_eq!(nothing.code(), Code::NotFound);

    let read = v1::MarkReadRequest { target: to(&id), seq: 1 };
    let reply = conversations.mark_read(as_user(&bob, read.clone())).await.unwrap().into_inner();
    assert_eq!((reply.read_seq, reply.unread, reply.mentions), (1, 1, 1));
    let stranger = server.token("mallory");
    assert_eq!(conversations.mark_read(as_user(&stranger, read)).await.unwrap_err().code(), Code::NotFound);
    let row = loop {
        let ask = v1::SyncRequest { details: true, ..v1::SyncRequest::default() };
        let list = conversations.sync(as_user(&bob, ask)).await.unwrap().into_inner();
        match list.conversations.into_iter().next() {
            Some(row) => break row,
            None => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    assert_eq!((row.unread, row.mentions, row.mentioned_seqs.as_slice()), (1, 1, [2].as_slice()));
    assert_eq!(row.preview.map(|preview| preview.seq), Some(2));
    let read_by_alice = v1::MemberCursor { user_id: "alice".to_owned(), read_seq: 2, received_seq: 2 };
    assert_eq!(row.cursors, [read_by_alice]);

    let (_client, mut events) = device(&server, "bob", "b1").await;
    let typing = Some(v1::signal_request::Signal::Typing(v1::Typing { active: true }));
    let typing = v1::SignalRequest { target: to(&id), signal: typing };
    conversations.signal(as_user(&alice, typing.clone())).await.unwrap();
    next(&mut events, "typing", |event| match event {
        Event::Signal(signal) if signal.sender == "alice" => {
            matches!(signal.signal, Some(Kind::Typing(_))).then_some(())
        }
        _ => None,
    })
    .await;
    assert_eq!(conversations.signal(as_user(&stranger, typing)).await.unwrap_err().code(), Code::NotFound);
}
