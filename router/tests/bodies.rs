//! Every type of content comes back as it was sent; who was away gets everything, in order, page by page.

use std::collections::BTreeMap;

use bytes::Bytes;
use im_proto::{
    ConversationId, body,
    method::Method,
    v1::{self, body::Content},
};
use im_storage::{Memory, Store};

use crate::support::{CLUSTER, TestGateway, World, message, to, user};

async fn history(
    gateway: &mut TestGateway,
    session: u64,
    id: ConversationId,
    range: (i64, i64),
    limit: u32,
    newest: bool,
) -> v1::HistoryReply {
    let request = v1::HistoryRequest { target: to(id), from: range.0, to: range.1, limit, newest };
    gateway.call(session, Method::MessageHistory, &request).await.unwrap()
}

fn contents() -> Vec<Bytes> {
    let media = || v1::Media {
        name: "a.bin".to_owned(),
        size_bytes: 1 << 40,
        mime_type: "application/octet-stream".to_owned(),
        url: "https://example.org/a.bin".to_owned(),
        thumbnail_url: "https://example.org/a.png".to_owned(),
        width_pixels: 1,
        height_pixels: 2,
        duration_ms: 3,
        content_hash: Bytes::from_static(&[7; 32]),
    };
    let text = || v1::Text { text: "grüße 你好 👋".to_owned(), mentions: Vec::new() };
    let forwarded = v1::ForwardedEntry { sender: "carol".to_owned(), sent_at_ms: 5, body: body::text("inner") };
    let contents = [
        Content::Text(text()),
        Content::Image(media()),
        Content::Video(media()),
        Content::Audio(media()),
        Content::File(media()),
        Content::Sticker(v1::Sticker { emoji: "👍".to_owned(), pack_id: "p".to_owned(), sticker_id: "s".to_owned() }),
        Content::Location(v1::Location {
            latitude_degrees: -89.5,
            longitude_degrees: 179.5,
            name: "n".to_owned(),
            address: "a".to_owned(),
        }),
        Content::Contact(v1::ContactCard { user_id: "carol".to_owned(), display_name: "Carol".to_owned() }),
        Content::Quote(v1::Quote { seq: 1, text: Some(text()) }),
        Content::Forward(v1::Forward { title: "t".to_owned(), entries: vec![forwarded] }),
        Content::CallRecord(v1::CallRecord { call_id: "c".to_owned(), video: true, duration_ms: 9, outcome: 1 }),
        Content::Custom(v1::Custom { r#type: "com.example.poll".to_owned(), data: Bytes::from_static(&[0, 255]) }),
    ];
    let mut bodies: Vec<Bytes> = contents.into_iter().map(body::encode).collect();
    // Content that is newer than this server, and a known one with a field that is.
    let unknown = [0xa2, 0x06, 3, b'n', b'e', b'w'];
    bodies.push(Bytes::copy_from_slice(&unknown));
    bodies.push([body::text("known").as_ref(), &unknown].concat().into());
    bodies
}

#[tokio::test(start_paused = true)]
async fn every_type_of_body_comes_back_as_it_was_sent_and_unknown_ones_are_kept() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    gateway.open(&world, 2, "bob", "b1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    let bodies = contents();
    for (number, body) in bodies.iter().enumerate() {
        let client_message_id = Bytes::from(format!("m{number}"));
        let send = v1::Send {
            client_message_id: client_message_id.clone(),
            body: body.clone(),
            ..message("bob", "", "", "", 0)
        };
        gateway.send(1, id, send).await;
        let ack = gateway
            .expect("ack", |message| match message {
                v1::router_message::Message::SendResult(v1::SendResult { ack: Some(ack), .. })
                    if ack.client_message_id == client_message_id =>
                {
                    Some(ack.clone())
                }
                _ => None,
            })
            .await;
        assert_eq!((ack.seq, ack.status), (number as u64 + 1, None), "{body:?}");
    }
    let mut live = BTreeMap::new();
    while live.len() < bodies.len() {
        let (sessions, pushed) = gateway.pushed().await;
        if sessions.contains(&2) {
            let own = pushed.into_iter().filter(|message| message.conversation_id == id.to_bytes());
            live.extend(own.map(|message| (message.seq, message)));
        }
    }
    let page = history(&mut gateway, 2, id, (1, 0), 0, false).await;
    let stored: Vec<v1::Message> = page.entries.into_iter().filter_map(|entry| entry.message).collect();
    assert_eq!(stored.iter().map(|message| message.body.clone()).collect::<Vec<_>>(), bodies);
    assert_eq!(live.into_values().collect::<Vec<_>>(), stored, "the same live and from history");
}

#[tokio::test(start_paused = true)]
async fn history_is_paged_in_both_directions() {
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    // Over the edge of a bucket.
    for number in 0..1_100 {
        let send = v1::Send { client_message_id: format!("m{number}").into(), ..message("bob", "", "hi", "", number) };
        gateway.send(1, id, send).await;
        if number % 200 == 199 || number == 1_099 {
            let seq = |message: &v1::router_message::Message| match message {
                v1::router_message::Message::SendResult(v1::SendResult { ack: Some(ack), .. }) => {
                    (ack.client_message_id == format!("m{number}")).then_some(ack.seq)
                }
                _ => None,
            };
            assert_eq!(gateway.expect("ack", seq).await, number + 1);
            gateway.inbox.clear();
        }
    }
    let seqs = |page: &v1::HistoryReply| -> Vec<i64> {
        page.entries.iter().map(|entry| entry.message.as_ref().map_or(0, |message| message.seq as i64)).collect()
    };
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    while forward.len() < 1_100 {
        let from = forward.last().map_or(1, |last| last + 1);
        forward.extend(seqs(&history(&mut gateway, 1, id, (from, 0), 70, false).await));
    }
    while backward.first() != Some(&1) {
        let until = backward.first().map_or(0, |first| first - 1);
        let page = seqs(&history(&mut gateway, 1, id, (1, until), 70, true).await);
        backward.splice(0..0, page);
    }
    assert_eq!((forward, backward), ((1..=1_100).collect(), (1..=1_100).collect()));
}

#[tokio::test(start_paused = true)]
async fn who_was_away_during_ten_thousand_messages_in_three_hundred_conversations_gets_them_all_in_order() {
    const CONVERSATIONS: u64 = 300;
    const EACH: u64 = 34;
    let world = World::new(Store::from(Memory::new()));
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    let names: Vec<String> = (0..CONVERSATIONS).map(|number| format!("user{number}")).collect();
    for (number, name) in names.iter().enumerate() {
        gateway.open(&world, number as u64 + 1, name, "d").await;
        let id = CLUSTER.direct_id(&user(name), &user("bob"));
        for message_number in 0..EACH {
            let text = format!("{name} {message_number}");
            let send = v1::Send { client_message_id: text.clone().into(), ..message("bob", "", &text, "", 0) };
            gateway.send(number as u64 + 1, id, send).await;
        }
        let last = format!("{name} {}", EACH - 1);
        gateway
            .expect("ack", |message| match message {
                v1::router_message::Message::SendResult(v1::SendResult { ack: Some(ack), .. }) => {
                    (ack.client_message_id == last).then_some(())
                }
                _ => None,
            })
            .await;
        gateway.inbox.clear();
    }
    let bob = CONVERSATIONS + 1;
    let mut found = BTreeMap::new();
    gateway.open(&world, bob, "bob", "b1").await;
    while found.len() < names.len() {
        let mut page = Bytes::new();
        loop {
            let request = v1::SyncRequest { page, limit: 70, ..v1::SyncRequest::default() };
            let reply: v1::SyncReply = gateway.call(bob, Method::ConversationSync, &request).await.unwrap();
            assert!(reply.conversations.len() <= 70);
            found.extend(reply.conversations.into_iter().map(|row| (row.peer_user_id.clone(), row)));
            if reply.next.is_empty() {
                break;
            }
            page = reply.next;
        }
    }
    for name in &names {
        let row = &found[name];
        assert_eq!((row.head, row.unread), (EACH, EACH));
        let id = ConversationId::from_slice(&row.conversation_id).unwrap();
        let mut bodies = Vec::new();
        while bodies.len() < EACH as usize {
            let page = history(&mut gateway, bob, id, (bodies.len() as i64 + 1, 0), 20, false).await;
            bodies.extend(page.entries.into_iter().filter_map(|entry| entry.message).map(|message| message.body));
        }
        let expected: Vec<Bytes> = (0..EACH).map(|number| body::text(format!("{name} {number}"))).collect();
        assert_eq!(bodies, expected);
    }
}
