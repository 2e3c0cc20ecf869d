//! The conversation list that people see: previews, unread, mentions, how far others have come; the signals that keep it fresh.

use std::time::Duration;

use bytes::Bytes;
use im_proto::{ConversationId, StatusCode, body, frame, limits, method::Method, v1};
use im_router::Router;
use im_storage::{Memory, Store};
use prost::Message as _;

use crate::support::{CLUSTER, TestGateway, World, message, to, user};

use im_proto::v1::{
    gateway_message::Message as Up, mention::Whom, router_message::Message as Down, server_frame::Frame,
    signal::Signal as Kind,
};

fn world() -> World {
    World::new(Store::from(Memory::new()))
}

fn text(mentions: &[&str]) -> v1::Text {
    let whom = |name: &&str| match *name {
        "all" => Whom::All(true),
        name => Whom::UserId(name.to_owned()),
    };
    let mention = |name| v1::Mention { whom: Some(whom(name)), offset_bytes: 0, length_bytes: 1 };
    v1::Text { text: "hello".to_owned(), mentions: mentions.iter().map(mention).collect() }
}

fn mentioning(mentions: &[&str]) -> Bytes {
    body::encode(v1::body::Content::Text(text(mentions)))
}

fn answer(seq: u64, mentions: &[&str]) -> Bytes {
    body::encode(v1::body::Content::Quote(v1::Quote { seq, text: Some(text(mentions)) }))
}

/// Sends and waits for the ack.
async fn post(
    gateway: &mut TestGateway,
    session: u64,
    id: ConversationId,
    name: &'static str,
    body: Bytes,
) -> Result<u64, StatusCode> {
    let target = Some(v1::send::Target::ConversationId(id.to_bytes()));
    let client_message_id = Bytes::from_static(name.as_bytes());
    gateway.send(session, id, v1::Send { target, client_message_id, body, ..v1::Send::default() }).await;
    let ack = gateway.ack(name).await;
    match ack.status {
        Some(status) => Err(StatusCode::from_number(status.code).unwrap()),
        None => Ok(ack.seq),
    }
}

async fn group(gateway: &mut TestGateway, session: u64, members: &[&str]) -> ConversationId {
    let members = members.iter().map(|name| (*name).to_owned()).collect();
    let create = v1::GroupCreateRequest { key: "k".into(), name: "g".to_owned(), members };
    let reply: v1::GroupCreateReply = gateway.call(session, Method::GroupCreate, &create).await.unwrap();
    ConversationId::from_slice(&reply.conversation_id).unwrap()
}

/// All pages of a sync, with the version of the first.
async fn list(
    gateway: &mut TestGateway,
    session: u64,
    version: u64,
    have: &[v1::SyncHave],
) -> (u64, Vec<v1::ConversationRow>) {
    let (mut page, mut rows, mut first) = (Bytes::new(), Vec::new(), None);
    loop {
        let request = v1::SyncRequest { version, have: have.to_vec(), page, limit: 0, details: true };
        let reply: v1::SyncReply = gateway.call(session, Method::ConversationSync, &request).await.unwrap();
        assert!(reply.conversations.len() <= limits::SYNC_CONVERSATIONS_MAX as usize);
        first.get_or_insert(reply.version);
        rows.extend(reply.conversations);
        if reply.next.is_empty() {
            return (first.unwrap(), rows);
        }
        page = reply.next;
    }
}

async fn row(gateway: &mut TestGateway, session: u64, id: ConversationId) -> v1::ConversationRow {
    for _ in 0..100 {
        let (_, rows) = list(gateway, session, 0, &[]).await;
        if let Some(row) = rows.into_iter().find(|row| row.conversation_id == id.to_bytes()) {
            return row;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the conversation does not come into the list");
}

async fn mark_read(gateway: &mut TestGateway, session: u64, id: ConversationId, seq: u64) -> v1::MarkReadReply {
    let request = v1::MarkReadRequest { target: to(id), seq };
    gateway.call(session, Method::ConversationMarkRead, &request).await.unwrap()
}

async fn received(gateway: &mut TestGateway, session_id: u64, id: ConversationId, seq: u64) {
    let received = Some(v1::Received { conversation_id: id.to_bytes(), seq });
    gateway.push(vec![Up::Received(v1::SessionReceived { session_id, received })]).await;
}

async fn signal(gateway: &mut TestGateway, session_id: u64, id: ConversationId, kind: Kind) {
    let signal = Some(v1::Signal { signal: Some(kind), ..v1::Signal::default() });
    let conversation_id = id.to_bytes();
    gateway.push(vec![Up::Signal(v1::SessionSignal { session_id, conversation_id, signal })]).await;
}

fn signals_of(message: &Down, session: u64) -> Vec<v1::Signal> {
    let Down::Deliver(deliver) = message else { return Vec::new() };
    if !deliver.session_ids.contains(&session) {
        return Vec::new();
    }
    let mut input = bytes::BytesMut::from(&deliver.frame[..]);
    let mut out = Vec::new();
    while let Some(payload) = frame::split_frame(&mut input, 1 << 20).unwrap() {
        if let Some(Frame::Signal(signal)) = v1::ServerFrame::decode(payload).unwrap().frame {
            out.push(signal);
        }
    }
    out
}

/// The next receipt of somebody at a session: received, read, and the running number of what counts.
async fn receipt(gateway: &mut TestGateway, session: u64, of: &str) -> (u64, u64, u64) {
    gateway
        .expect("receipt", |message| {
            signals_of(message, session).iter().find_map(|signal| match &signal.signal {
                Some(Kind::Receipt(receipt)) if signal.sender == of => {
                    Some((receipt.received_seq, receipt.read_seq, receipt.read_counted))
                }
                _ => None,
            })
        })
        .await
}

/// All signals that have come for a session.
async fn signals(gateway: &mut TestGateway, session: u64) -> Vec<v1::Signal> {
    gateway.gather().await;
    gateway.inbox.drain(..).flat_map(|message| signals_of(&message, session)).collect()
}

async fn next_router(world: &World, name: &str, before: &Router) -> (Router, TestGateway) {
    assert!(before.stop(Duration::from_secs(30)).await);
    let router = world.router(world.config(name)).await;
    let gateway = world.gateway(&format!("gateway-{name}"), &router).await;
    (router, gateway)
}

#[tokio::test(start_paused = true)]
async fn unread_and_mentions_are_exact_on_two_devices_across_owners_and_in_a_conversation_that_is_not_open() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name, device) in [(1, "alice", "a1"), (2, "bob", "b1"), (3, "bob", "b2"), (4, "carol", "c1")] {
        gateway.open(&world, session, name, device).await;
    }
    let id = group(&mut gateway, 1, &["bob", "carol"]).await;
    let bodies: [(&str, Bytes); 6] = [
        ("m2", mentioning(&[])),
        ("m3", mentioning(&["bob", "alice"])),
        ("m4", mentioning(&["all", "bob"])),
        ("m5", mentioning(&["carol"])),
        ("m6", answer(3, &["bob"])),
        ("m7", mentioning(&[])),
    ];
    for (name, body) in bodies {
        post(&mut gateway, 1, id, name, body).await.unwrap();
    }
    for session in [2, 3] {
        let row = row(&mut gateway, session, id).await;
        assert_eq!((row.head, row.counted, row.unread, row.mentions, row.read_seq), (7, 6, 6, 3, 1));
        assert_eq!(row.mentioned_seqs, [3, 6], "what mentions all is not by name");
        let preview = row.preview.expect("a preview");
        assert_eq!((preview.seq, preview.sender.as_str(), preview.flags), (7, "alice", 1));
    }
    let own = row(&mut gateway, 1, id).await;
    assert_eq!((own.unread, own.mentions, own.read_seq), (0, 0, 7), "one's own message moves one's cursor");
    let read = mark_read(&mut gateway, 2, id, 4).await;
    assert_eq!((read.read_seq, read.unread, read.mentions), (4, 3, 1));
    assert_eq!(receipt(&mut gateway, 3, "bob").await, (4, 4, 3), "the other device learns it live");
    let read = mark_read(&mut gateway, 3, id, 2).await;
    assert_eq!((read.read_seq, read.unread, read.mentions), (4, 3, 1), "a cursor moves forward only");

    let mut last = router;
    for (name, pause) in [("r2", 1), ("r3", 70), ("r4", 1000)] {
        let (router, mut gateway) = next_router(&world, name, &last).await;
        for (session, name, device) in [(1, "alice", "a1"), (2, "bob", "b1"), (3, "bob", "b2"), (4, "carol", "c1")] {
            gateway.open(&world, session, name, device).await;
        }
        for again in 0..2 {
            for session in [2, 3] {
                let row = row(&mut gateway, session, id).await;
                assert_eq!((row.unread, row.mentions, row.read_seq), (3, 1, 4), "{name} {again}");
                assert_eq!((row.mentioned_seqs, row.preview.map(|preview| preview.seq)), (vec![6], Some(7)));
                let cursors: Vec<_> =
                    row.cursors.iter().map(|cursor| (cursor.user_id.as_str(), cursor.read_seq)).collect();
                assert_eq!(cursors, [("alice", 7), ("carol", 1)], "{name} {again}");
            }
            let row = row(&mut gateway, 4, id).await;
            assert_eq!((row.unread, row.mentions, row.mentioned_seqs), (6, 2, vec![5]), "{name} {again}");
            let read = mark_read(&mut gateway, 2, id, 1).await;
            assert_eq!((read.read_seq, read.unread, read.mentions), (4, 3, 1), "{name} {again}");
            // Long enough to end the burst, or to leave memory.
            tokio::time::sleep(Duration::from_secs(pause)).await;
        }
        last = router;
    }
}

#[tokio::test(start_paused = true)]
async fn who_joins_late_has_nothing_unread_of_before_also_when_the_group_is_quiet() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.open(&world, 2, "dave", "d1").await;
    let id = group(&mut gateway, 1, &["bob"]).await;
    for name in ["m2", "m3"] {
        post(&mut gateway, 1, id, name, mentioning(&["all"])).await.unwrap();
    }
    let invite = v1::GroupInviteRequest {
        conversation_id: id.to_bytes(),
        members: vec!["dave".to_owned()],
        client_message_id: "i".into(),
    };
    gateway.call::<v1::GroupInviteReply>(1, Method::GroupInvite, &invite).await.unwrap();
    post(&mut gateway, 1, id, "m5", mentioning(&["all"])).await.unwrap();
    for pause in [0, 100, 1000] {
        tokio::time::sleep(Duration::from_secs(pause)).await;
        let row = row(&mut gateway, 2, id).await;
        assert_eq!((row.unread, row.mentions, row.read_seq), (1, 1, 4), "after {pause} s");
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_mentioned_must_be_a_member_and_what_is_answered_must_exist() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let direct = CLUSTER.direct_id(&user("alice"), &user("bob"));
    let send = v1::Send { body: mentioning(&["mallory"]), ..message("bob", "d0", "", "", 0) };
    gateway.send(1, direct, send).await;
    assert_eq!(gateway.ack("d0").await.status.unwrap().code, StatusCode::NotAMember.number());
    let send = v1::Send { body: mentioning(&["bob", "alice"]), ..message("bob", "d1", "", "", 0) };
    gateway.send(1, direct, send).await;
    assert_eq!(gateway.ack("d1").await.seq, 1, "the first message of two may mention both");

    let id = group(&mut gateway, 1, &["bob"]).await;
    assert_eq!(post(&mut gateway, 1, id, "m1", mentioning(&["bob", "mallory"])).await, Err(StatusCode::NotAMember));
    assert_eq!(post(&mut gateway, 1, id, "m2", answer(1, &["mallory"])).await, Err(StatusCode::NotAMember));
    assert_eq!(post(&mut gateway, 1, id, "m3", answer(2, &[])).await, Err(StatusCode::NotFound));
    assert_eq!(post(&mut gateway, 1, id, "m4", answer(u64::MAX, &[])).await, Err(StatusCode::NotFound));
    assert_eq!(post(&mut gateway, 1, id, "m5", answer(1, &["bob", "all"])).await, Ok(2));
    // By a call it is the same.
    let request = v1::SendRequest {
        target: to(id),
        client_message_id: "c1".into(),
        body: answer(99, &[]),
        ..v1::SendRequest::default()
    };
    let refused = gateway.call::<v1::SendReply>(1, Method::MessageSend, &request).await.unwrap_err();
    assert_eq!(refused.code, StatusCode::NotFound.number());
    // Who was invited in the moment before may be mentioned.
    let invite = v1::GroupInviteRequest {
        conversation_id: id.to_bytes(),
        members: vec!["mallory".to_owned()],
        client_message_id: "i".into(),
    };
    gateway.call::<v1::GroupInviteReply>(1, Method::GroupInvite, &invite).await.unwrap();
    assert_eq!(post(&mut gateway, 1, id, "m7", mentioning(&["mallory"])).await, Ok(4));
}

#[tokio::test(start_paused = true)]
async fn receipts_move_forward_reach_the_others_and_are_kept_and_strangers_have_none() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name) in [(1, "alice"), (2, "bob"), (3, "mallory")] {
        gateway.open(&world, session, name, "d").await;
    }
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    for name in ["m1", "m2", "m3"] {
        gateway.send(1, id, message("bob", name, name, "", 0)).await;
        gateway.ack(name).await;
    }
    received(&mut gateway, 2, id, 2).await;
    assert_eq!(receipt(&mut gateway, 1, "bob").await, (2, 0, 0));
    received(&mut gateway, 3, id, 3).await;
    received(&mut gateway, 2, id, 1).await;
    let request = v1::MarkReadRequest { target: to(id), seq: 3 };
    let refused = gateway.call::<v1::MarkReadReply>(3, Method::ConversationMarkRead, &request).await.unwrap_err();
    assert_eq!(refused.code, StatusCode::NotFound.number());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(signals(&mut gateway, 1).await, [], "nothing moved");
    assert_eq!(mark_read(&mut gateway, 2, id, 1).await.unread, 2);
    assert_eq!(receipt(&mut gateway, 1, "bob").await, (2, 1, 1));
    // More than there is means all that there is.
    received(&mut gateway, 2, id, 1_000).await;
    assert_eq!(receipt(&mut gateway, 1, "bob").await, (3, 1, 1));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let expected = v1::MemberCursor { user_id: "bob".to_owned(), read_seq: 1, received_seq: 3 };
    assert_eq!(row(&mut gateway, 1, id).await.cursors, std::slice::from_ref(&expected));
    let (_router, mut gateway) = next_router(&world, "r2", &router).await;
    gateway.open(&world, 1, "alice", "d").await;
    gateway.open(&world, 2, "bob", "d").await;
    assert_eq!(row(&mut gateway, 1, id).await.cursors, std::slice::from_ref(&expected));
    received(&mut gateway, 2, id, 2).await;
    tokio::time::sleep(Duration::from_secs(1000)).await;
    assert_eq!(row(&mut gateway, 1, id).await.cursors, [expected], "also of a conversation that is not open");
}

#[tokio::test(start_paused = true)]
async fn in_a_group_over_the_limit_a_read_cursor_is_its_users_own() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name, device) in [(1, "alice", "a1"), (2, "bob", "b1"), (3, "bob", "b2")] {
        gateway.open(&world, session, name, device).await;
    }
    let names: Vec<String> = (0..limits::RECEIPT_MEMBERS_MAX).map(|number| format!("user{number}")).collect();
    let members: Vec<&str> = std::iter::once("bob").chain(names.iter().map(String::as_str)).collect();
    let id = group(&mut gateway, 1, &members).await;
    post(&mut gateway, 1, id, "m2", mentioning(&["all"])).await.unwrap();
    received(&mut gateway, 2, id, 2).await;
    assert_eq!(mark_read(&mut gateway, 2, id, 2).await.unread, 0);
    assert_eq!(receipt(&mut gateway, 3, "bob").await, (2, 2, 1));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(signals(&mut gateway, 1).await, []);
    assert_eq!(row(&mut gateway, 1, id).await.cursors, []);
    assert_eq!(row(&mut gateway, 3, id).await.unread, 0);
}

#[tokio::test(start_paused = true)]
async fn typing_reaches_members_only_so_often_a_second_and_is_never_stored() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name) in [(1, "alice"), (2, "bob"), (3, "mallory")] {
        gateway.open(&world, session, name, "d").await;
    }
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    gateway.send(1, id, message("bob", "m1", "m1", "", 0)).await;
    gateway.ack("m1").await;
    signals(&mut gateway, 2).await;
    let typing = || Kind::Typing(v1::Typing { active: true });
    for _ in 0..100 {
        signal(&mut gateway, 1, id, typing()).await;
        signal(&mut gateway, 3, id, typing()).await;
    }
    let forged = v1::Receipt { received_seq: 9, read_seq: 9, read_counted: 9 };
    signal(&mut gateway, 2, id, Kind::Receipt(forged)).await;
    signal(&mut gateway, 2, id, Kind::Presence(v1::Presence { online: false, last_seen_ms: 9 })).await;
    gateway.gather().await;
    let inbox: Vec<_> = gateway.inbox.drain(..).collect();
    let of = |session| inbox.iter().flat_map(|message| signals_of(message, session)).collect::<Vec<_>>();
    assert_eq!(
        (of(1), of(3)),
        (vec![], vec![]),
        "not to the sender, not to strangers, no receipt and no presence of a client"
    );
    let got = of(2);
    assert_eq!(got.len(), limits::SIGNALS_PER_SECOND_MAX as usize);
    assert!(got.iter().all(|signal| signal.sender == "alice" && signal.signal == Some(typing())));
    // A call says what became of it.
    let asked = Some(v1::signal_request::Signal::Typing(v1::Typing { active: false }));
    let request = v1::SignalRequest { target: to(id), signal: asked };
    let refused = gateway.call::<v1::SignalReply>(3, Method::ConversationSignal, &request).await.unwrap_err();
    assert_eq!(refused.code, StatusCode::NotFound.number());
    let mut outcomes = Vec::new();
    for _ in 0..=limits::SIGNALS_PER_SECOND_MAX {
        let outcome = gateway.call::<v1::SignalReply>(2, Method::ConversationSignal, &request).await;
        outcomes.push(outcome.err().map(|status| status.code));
    }
    let last = outcomes.pop().unwrap();
    assert_eq!((outcomes, last), (vec![None; 5], Some(StatusCode::RateLimited.number())));
    let request = v1::HistoryRequest { target: to(id), from: 1, ..v1::HistoryRequest::default() };
    let history: v1::HistoryReply = gateway.call(1, Method::MessageHistory, &request).await.unwrap();
    assert_eq!((history.head, history.entries.len()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn an_old_version_gets_what_changed_and_an_unknown_one_gets_all() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    for (session, name, device) in [(1, "alice", "a1"), (2, "bob", "b1"), (3, "bob", "b2")] {
        gateway.open(&world, session, name, device).await;
    }
    let one = CLUSTER.direct_id(&user("alice"), &user("bob"));
    let other = CLUSTER.direct_id(&user("carol"), &user("bob"));
    gateway.open(&world, 4, "carol", "c1").await;
    gateway.send(1, one, message("bob", "m1", "m1", "", 0)).await;
    gateway.ack("m1").await;
    gateway.send(4, other, message("bob", "m2", "m2", "", 0)).await;
    gateway.ack("m2").await;
    row(&mut gateway, 2, one).await;
    row(&mut gateway, 2, other).await;
    let (version, rows) = list(&mut gateway, 2, 0, &[]).await;
    assert_eq!(rows.len(), 2);
    let have = |rows: &[v1::ConversationRow]| -> Vec<v1::SyncHave> {
        let have = |row: &v1::ConversationRow| {
            let conversation_id = row.conversation_id.clone();
            v1::SyncHave { conversation_id, seq: row.head, read_seq: row.read_seq }
        };
        rows.iter().map(have).collect()
    };
    let ids =
        |rows: &[v1::ConversationRow]| -> Vec<Bytes> { rows.iter().map(|row| row.conversation_id.clone()).collect() };
    let known = have(&rows);
    assert_eq!(list(&mut gateway, 2, version, &known).await, (version, vec![]));
    // Read on the other device.
    mark_read(&mut gateway, 3, one, 1).await;
    let (_, changed) = list(&mut gateway, 2, version, &known).await;
    assert_eq!((ids(&changed), changed[0].unread), (vec![one.to_bytes()], 0));
    // A new message, and a new conversation.
    gateway.send(4, other, message("bob", "m3", "m3", "", 0)).await;
    gateway.ack("m3").await;
    let (_, changed) = list(&mut gateway, 2, version, &known).await;
    assert_eq!(changed.len(), 2);
    let third = group(&mut gateway, 1, &["bob"]).await;
    row(&mut gateway, 2, third).await;
    let (_, all) = list(&mut gateway, 2, 0, &[]).await;
    let known: Vec<_> = have(&all).into_iter().filter(|have| have.conversation_id != third.to_bytes()).collect();
    let (now, changed) = list(&mut gateway, 2, version, &known).await;
    assert_eq!((ids(&changed), now > version), (vec![third.to_bytes()], true));
    // A version that is none, with all that there is.
    for unknown in [now + 1, u64::MAX] {
        let (told, rows) = list(&mut gateway, 2, unknown, &have(&all)).await;
        assert_eq!((told, ids(&rows)), (now, ids(&all)));
    }
}

#[tokio::test(start_paused = true)]
#[allow(clippy::disallowed_methods, reason = "the time of the runtime is paused; what is printed is real")]
async fn five_thousand_conversations_come_in_pages_each_once() {
    const CONVERSATIONS: usize = 5_000;
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    for chunk in (0..CONVERSATIONS).collect::<Vec<_>>().chunks(100) {
        for number in chunk {
            let peer = format!("user{number}");
            let id = CLUSTER.direct_id(&user("alice"), &user(&peer));
            gateway.send(1, id, message(&peer, "m", "hello", "", 0)).await;
        }
        for _ in chunk {
            assert_eq!(gateway.ack("m").await.seq, 1);
        }
        gateway.inbox.clear();
    }
    let rows = loop {
        let (_, rows) = list(&mut gateway, 1, 0, &[]).await;
        if rows.len() == CONVERSATIONS {
            break rows;
        }
        gateway.inbox.clear();
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    let ids: std::collections::BTreeSet<_> = rows.iter().map(|row| row.conversation_id.clone()).collect();
    assert_eq!(ids.len(), CONVERSATIONS);
    assert!(rows.iter().all(|row| row.head == 1 && row.unread == 0 && row.preview.is_some()));
    let begin = std::time::Instant::now();
    let request = v1::SyncRequest { details: true, ..v1::SyncRequest::default() };
    let reply: v1::SyncReply = gateway.call(1, Method::ConversationSync, &request).await.unwrap();
    println!("first page: {} rows in {:?}, {} bytes", reply.conversations.len(), begin.elapsed(), reply.encoded_len());
}

#[tokio::test(start_paused = true)]
async fn a_preview_with_a_long_body_comes_without_it() {
    let world = world();
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    let long = "x".repeat(limits::PREVIEW_BODY_BYTES_MAX);
    gateway.send(1, id, message("bob", "m1", &long, "", 0)).await;
    gateway.ack("m1").await;
    let preview = row(&mut gateway, 1, id).await.preview.unwrap();
    assert_eq!((preview.seq, preview.body.len()), (1, 0));
}
