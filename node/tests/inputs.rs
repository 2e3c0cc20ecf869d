//! Every kind of body, and bad input of every kind, on a real server: the same request as a call over TCP, as a call over QUIC and over
//! gRPC, bodies also as `Send` frames. What SPEC.md says is answered, and nothing of it stays.

use std::ops::RangeInclusive;

use bytes::Bytes;
use im_client::{CallError, Client, ClientConfig, Endpoint, SendError, Target, Transport, Trust};
use im_proto::{
    StatusCode, body, limits,
    method::Method,
    status::GRPC_METADATA,
    v1::{
        self, body::Content, group_service_client::GroupServiceClient, message_service_client::MessageServiceClient,
        presence_service_client::PresenceServiceClient, target::Target as Named,
    },
};
use prost::Message;
use tonic::{Request, Response, Status, transport::Channel};

use crate::{
    api::{as_user, channel, to},
    server::{ANY, Server, imd, stdout},
};

/// What was answered: nothing to complain of, or a status.
type Outcome = Result<(), StatusCode>;

#[derive(Clone, Debug)]
enum Ask {
    Send(v1::SendRequest),
    History(v1::HistoryRequest),
    Create(v1::GroupCreateRequest),
    Invite(v1::GroupInviteRequest),
    Presence(v1::PresenceReadRequest),
    Watch(v1::PresenceSubscribeRequest),
}

/// One user at one server, by every way there is.
struct Ways {
    clients: Vec<(&'static str, Client)>,
    api: Channel,
    token: String,
}

fn of_call<A>(outcome: Result<A, CallError>) -> Outcome {
    match outcome {
        Ok(_) => Ok(()),
        Err(CallError::Refused(status)) => Err(status.code.expect("a status of this version")),
        Err(other) => panic!("{other}"),
    }
}

fn of_grpc<A>(outcome: Result<Response<A>, Status>) -> Outcome {
    let Err(status) = outcome else { return Ok(()) };
    let number = status.metadata().get(GRPC_METADATA).unwrap_or_else(|| panic!("no status of ours: {status}"));
    let code = StatusCode::from_number(number.to_str().unwrap().parse().unwrap()).unwrap();
    assert_eq!(status.message(), code.text(), "the text is that of the table");
    Err(code)
}

impl Ways {
    async fn of(server: &Server, user: &str) -> Self {
        let ca = std::fs::read(server.data.join(server.address("ca"))).unwrap();
        let mut clients = Vec::new();
        for (name, transport) in [("tcp", Transport::Tcp), ("quic", Transport::Quic)] {
            let data = server.data.to_str().unwrap();
            let token = stdout(&imd(&["token", "--user", user, "--device", name, "--data", data])).trim().to_owned();
            let endpoint = Endpoint::new(transport, server.address(name)).unwrap();
            let config = ClientConfig::new(vec![endpoint], token, &Trust::Pinned(ca.clone())).unwrap();
            clients.push((name, Client::connect(config).await.unwrap()));
        }
        Self { clients, api: channel(server).await, token: server.token(user) }
    }

    fn request<T>(&self, message: &T) -> Request<T>
    where
        T: Clone,
    {
        as_user(&self.token, message.clone())
    }

    async fn ask(&self, ask: &Ask) -> Vec<(&'static str, Outcome)> {
        let mut outcomes = Vec::new();
        for (name, client) in &self.clients {
            let outcome = match ask {
                Ask::Send(request) => call::<_, v1::SendReply>(client, Method::MessageSend, request).await,
                Ask::History(request) => call::<_, v1::HistoryReply>(client, Method::MessageHistory, request).await,
                Ask::Create(request) => call::<_, v1::GroupCreateReply>(client, Method::GroupCreate, request).await,
                Ask::Invite(request) => call::<_, v1::GroupInviteReply>(client, Method::GroupInvite, request).await,
                Ask::Presence(request) => call::<_, v1::PresenceReadReply>(client, Method::PresenceRead, request).await,
                Ask::Watch(request) => {
                    call::<_, v1::PresenceSubscribeReply>(client, Method::PresenceSubscribe, request).await
                }
            };
            outcomes.push((*name, outcome));
        }
        let mut messages = MessageServiceClient::new(self.api.clone());
        let mut groups = GroupServiceClient::new(self.api.clone());
        let mut presence = PresenceServiceClient::new(self.api.clone());
        outcomes.push((
            "gRPC",
            match ask {
                Ask::Send(request) => of_grpc(messages.send(self.request(request)).await),
                Ask::History(request) => of_grpc(messages.history(self.request(request)).await),
                Ask::Create(request) => of_grpc(groups.create(self.request(request)).await),
                Ask::Invite(request) => of_grpc(groups.invite(self.request(request)).await),
                Ask::Presence(request) => of_grpc(presence.read(self.request(request)).await),
                Ask::Watch(request) => of_grpc(presence.subscribe(self.request(request)).await),
            },
        ));
        outcomes
    }

    /// The same answer by all ways.
    async fn expect(&self, what: &str, ask: &Ask, expected: Outcome) {
        for (way, outcome) in self.ask(ask).await {
            assert_eq!(outcome, expected, "{what}, over {way}");
        }
    }

    /// A body as a `Send` frame.
    async fn send_frames(&self, what: &str, peer: &str, body: &Bytes, expected: Outcome) {
        for (way, client) in &self.clients {
            let outcome = match client.send(Target::peer(peer).unwrap(), body.clone()).await {
                Ok(_) => Ok(()),
                Err(SendError::Refused(status)) => Err(status.code.expect("a status of this version")),
                // The SDK does not even try.
                Err(SendError::BodySize { .. }) => continue,
                Err(other) => panic!("{what}: {other}"),
            };
            assert_eq!(outcome, expected, "{what}, as a frame over {way}");
        }
    }
}

async fn call<Q: Message, A: Message + Default>(client: &Client, method: Method, request: &Q) -> Outcome {
    of_call(client.call::<Q, A>(method, request).await)
}

fn send(peer: &str, id: &str, body: Bytes) -> v1::SendRequest {
    let client_message_id = Bytes::from(id.to_owned());
    v1::SendRequest { target: to(Named::PeerUserId(peer.to_owned())), client_message_id, body, known_seq: 0 }
}

fn text(text: &str) -> Content {
    Content::Text(v1::Text { text: text.to_owned(), mentions: Vec::new() })
}

fn media() -> v1::Media {
    v1::Media {
        name: "a.bin".to_owned(),
        size_bytes: 1 << 40,
        mime_type: "application/octet-stream".to_owned(),
        url: "https://example.org/a.bin".to_owned(),
        thumbnail_url: "https://example.org/a.png".to_owned(),
        width_pixels: 1,
        height_pixels: 2,
        duration_ms: 3,
        content_hash: Bytes::from_static(&[7; 32]),
    }
}

fn forward(body: Bytes) -> Content {
    let entry = v1::ForwardedEntry { sender: "carol".to_owned(), sent_at_ms: 5, body };
    Content::Forward(v1::Forward { title: "t".to_owned(), entries: vec![entry] })
}

fn mention(offset_bytes: u32, length_bytes: u32, user: &str) -> Content {
    let whom = Some(v1::mention::Whom::UserId(user.to_owned()));
    let mentions = vec![v1::Mention { whom, offset_bytes, length_bytes }];
    Content::Text(v1::Text { text: "@bob grüßt".to_owned(), mentions })
}

fn sticker(emoji: &str) -> Content {
    Content::Sticker(v1::Sticker { emoji: emoji.to_owned(), pack_id: "p".to_owned(), sticker_id: "s".to_owned() })
}

fn location(latitude_degrees: f64, longitude_degrees: f64) -> Content {
    Content::Location(v1::Location {
        latitude_degrees,
        longitude_degrees,
        name: "n".to_owned(),
        address: "a".to_owned(),
    })
}

fn contact(user: &str) -> Content {
    Content::Contact(v1::ContactCard { user_id: user.to_owned(), display_name: "C".to_owned() })
}

fn quote(seq: u64) -> Content {
    Content::Quote(v1::Quote { seq, text: Some(v1::Text { text: "so?".to_owned(), mentions: Vec::new() }) })
}

fn custom(name: &str) -> Content {
    Content::Custom(v1::Custom { r#type: name.to_owned(), data: Bytes::from_static(&[0, 255]) })
}

fn edited(seq: u64, body: Bytes) -> Content {
    Content::Edited(v1::Edited { seq, body })
}

fn reaction(seq: u64, emoji: &str) -> Content {
    Content::Reaction(v1::Reaction { seq, emoji: emoji.to_owned(), removed: false })
}

/// Content of a field that this version does not know.
const NEWER: &[u8] = &[0xa2, 0x06, 3, b'n', b'e', b'w'];

/// Each kind of body as SPEC.md lets it pass.
fn good_bodies() -> Vec<(&'static str, Bytes)> {
    let call = v1::CallRecord { call_id: "c".to_owned(), video: true, duration_ms: 9, outcome: 1 };
    let mut bodies: Vec<(&'static str, Bytes)> = [
        text("grüße 你好 👋\t\u{202e}\0"),
        Content::Image(media()),
        Content::Video(media()),
        Content::Audio(media()),
        Content::File(v1::Media { content_hash: Bytes::new(), ..media() }),
        sticker("👍"),
        sticker(""),
        location(-90.0, 180.0),
        contact("nobody-yet"),
        quote(1),
        forward(body::encode(text("inner"))),
        forward(Bytes::new()),
        Content::CallRecord(call),
        custom("com.example.poll"),
        mention(0, 4, "bob"),
    ]
    .into_iter()
    .map(|content| (body::type_name(&v1::Body { content: Some(content.clone()) }), body::encode(content)))
    .collect();
    bodies.push(("newer than this server", Bytes::from_static(NEWER)));
    bodies.push(("with a newer field", [body::text("known").as_ref(), NEWER].concat().into()));
    // A text of the largest size: two headers of four bytes each.
    let largest = body::text("x".repeat(limits::BODY_BYTES_MAX - 8));
    assert_eq!(largest.len(), limits::BODY_BYTES_MAX);
    bodies.push(("as large as it may be", largest));
    bodies
}

/// Bodies inside bodies.
fn nested(depth: usize) -> Bytes {
    (0..depth).fold(body::text("inside"), |inner, _| body::encode(forward(inner)))
}

fn bad_bodies() -> Vec<(&'static str, Bytes, StatusCode)> {
    use StatusCode::{Forbidden, Malformed, NotAMember, NotFound, TooLarge};
    let event = || body::event(v1::system_event::Event::MemberLeft(v1::MemberLeft { user_id: "bob".to_owned() }));
    let known = body::text("one");
    vec![
        ("empty", Bytes::new(), Malformed),
        ("a byte too long", body::text("x".repeat(limits::BODY_BYTES_MAX - 7)), TooLarge),
        ("garbage", vec![0xff; 9].into(), Malformed),
        ("cut off", known.slice(..known.len() - 1), Malformed),
        ("text that is no UTF-8", vec![0x0a, 3, 0x0a, 1, 0xff].into(), Malformed),
        ("a group", vec![0x0b, 0x0c].into(), Malformed),
        ("a field twice", [known.as_ref(), known.as_ref()].concat().into(), Malformed),
        ("two members of a oneof", [known.as_ref(), &body::encode(sticker("👍"))].concat().into(), Malformed),
        ("a system event", event(), Forbidden),
        ("a system event inside", body::encode(forward(event())), Forbidden),
        ("nested too deep", nested(limits::BODY_NESTING_MAX + 1), Malformed),
        ("an edit inside", body::encode(forward(body::encode(edited(1, body::text("x"))))), Malformed),
        ("an edit without a body", body::encode(edited(1, Bytes::new())), Malformed),
        ("an edit of nothing", body::encode(edited(0, body::text("x"))), Malformed),
        ("a recall of nothing", body::encode(Content::Recalled(v1::Recalled { seq: 0 })), Malformed),
        ("a reaction without emoji", body::encode(reaction(1, "")), Malformed),
        ("a reaction of 65 bytes", body::encode(reaction(1, &"x".repeat(65))), Malformed),
        ("a sticker of 65 bytes", body::encode(sticker(&"x".repeat(65))), Malformed),
        ("a quote of nothing", body::encode(quote(0)), Malformed),
        ("a quote of what is not there", body::encode(quote(1 << 40)), NotFound),
        ("91 degrees north", body::encode(location(91.0, 0.0)), Malformed),
        ("181 degrees west", body::encode(location(0.0, -181.0)), Malformed),
        ("no number of degrees", body::encode(location(f64::NAN, 0.0)), Malformed),
        ("a contact that is nobody", body::encode(contact("")), Malformed),
        ("a contact with a line break", body::encode(contact("a\nb")), Malformed),
        ("a contact of 10 kB", body::encode(contact(&"x".repeat(10_000))), Malformed),
        (
            "a hash of 31 bytes",
            body::encode(Content::File(v1::Media { content_hash: vec![1; 31].into(), ..media() })),
            Malformed,
        ),
        ("a custom body without a type", body::encode(custom("")), Malformed),
        ("a custom type of 129 bytes", body::encode(custom(&"x".repeat(129))), Malformed),
        ("a mention beyond the text", body::encode(mention(0, 99, "bob")), Malformed),
        ("a mention in the middle of a character", body::encode(mention(0, 8, "bob")), Malformed),
        ("a mention of no id", body::encode(mention(0, 4, "a b")), Malformed),
        ("a mention of somebody who is not here", body::encode(mention(0, 4, "mallory")), NotAMember),
    ]
}

#[tokio::test]
async fn every_kind_of_body_passes_by_every_way_and_bad_ones_are_refused_by_all() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let ways = Ways::of(&server, "alice").await;
    let mut expected = Vec::new();
    for (number, (what, body)) in good_bodies().into_iter().enumerate() {
        // Three times the same message, so it stands there once.
        ways.expect(what, &Ask::Send(send("bob", &format!("good {number}"), body.clone())), Ok(())).await;
        expected.push(body.clone());
        // Two messages.
        ways.send_frames(what, "bob", &body, Ok(())).await;
        expected.extend([body.clone(), body]);
    }
    for (what, body, code) in bad_bodies() {
        ways.expect(what, &Ask::Send(send("bob", what, body.clone())), Err(code)).await;
        ways.send_frames(what, "bob", &body, Err(code)).await;
    }
    let bob = server.client("bob").await;
    let stored = bob.history(Target::peer("alice").unwrap(), 1, 0, 1000, false).await.unwrap();
    let bodies: Vec<&Bytes> = stored.entries.iter().map(|entry| &entry.body).collect();
    assert_eq!(bodies, expected.iter().collect::<Vec<_>>(), "what passed, byte for byte, and nothing else");
}

#[tokio::test]
async fn ids_that_are_none_are_refused_by_every_way() {
    use StatusCode::{Malformed, NotFound, TooLarge};
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let ways = Ways::of(&server, "alice").await;
    let long = "x".repeat(10_000);
    let good = send("bob", "id", body::text("hello"));
    let with_target = |target| v1::SendRequest { target, ..good.clone() };
    let with_id = |id: &str| v1::SendRequest { client_message_id: Bytes::from(id.to_owned()), ..good.clone() };
    let conversation = |id: Vec<u8>| to(Named::ConversationId(id.into()));
    for (what, peer) in [
        ("nobody", ""),
        ("a line break", "a\nb"),
        ("a control character", "a\u{0}"),
        ("another control character", "a\u{85}"),
        ("white space", "a b"),
        ("65 bytes", &"x".repeat(65)),
        ("10 kB", &long),
    ] {
        let target = to(Named::PeerUserId(peer.to_owned()));
        ways.expect(what, &Ask::Send(with_target(target.clone())), Err(Malformed)).await;
        let history = v1::HistoryRequest { target, ..v1::HistoryRequest::default() };
        ways.expect(what, &Ask::History(history), Err(Malformed)).await;
        let members = vec!["bob".to_owned(), peer.to_owned()];
        let create =
            v1::GroupCreateRequest { key: Bytes::from_static(b"k"), name: "g".to_owned(), members: members.clone() };
        ways.expect(what, &Ask::Create(create), Err(Malformed)).await;
        let users = members.clone();
        ways.expect(what, &Ask::Presence(v1::PresenceReadRequest { user_ids: members }), Err(Malformed)).await;
        ways.expect(what, &Ask::Watch(v1::PresenceSubscribeRequest { user_ids: users }), Err(Malformed)).await;
    }
    for (what, target, code) in [
        ("no target", None, Malformed),
        ("an empty target", Some(v1::Target { target: None }), Malformed),
        ("15 bytes", conversation(vec![1; 15]), Malformed),
        ("17 bytes", conversation(vec![1; 17]), Malformed),
        ("10 kB", conversation(vec![1; 10_000]), Malformed),
        ("one that nobody made", conversation(vec![1; 16]), NotFound),
    ] {
        ways.expect(what, &Ask::Send(with_target(target.clone())), Err(code)).await;
        let history = v1::HistoryRequest { target, ..v1::HistoryRequest::default() };
        ways.expect(what, &Ask::History(history), Err(code)).await;
    }
    ways.expect("no message id", &Ask::Send(with_id("")), Err(Malformed)).await;
    ways.expect("a message id of 65 bytes", &Ask::Send(with_id(&"x".repeat(65))), Err(TooLarge)).await;
    ways.expect("a message id of 10 kB", &Ask::Send(with_id(&long)), Err(TooLarge)).await;

    let create = |key: &str, name: &str, members: Vec<String>| {
        Ask::Create(v1::GroupCreateRequest { key: Bytes::from(key.to_owned()), name: name.to_owned(), members })
    };
    ways.expect("no key", &create("", "g", Vec::new()), Err(Malformed)).await;
    ways.expect("a key of 10 kB", &create(&long, "g", Vec::new()), Err(TooLarge)).await;
    ways.expect("a name of 10 kB", &create("k", &long, Vec::new()), Err(TooLarge)).await;
    let many = (0..=limits::MEMBERS_PER_CALL_MAX).map(|number| format!("member{number}")).collect();
    ways.expect("too many members", &create("k", "g", many), Err(TooLarge)).await;
    let invite = v1::GroupInviteRequest {
        conversation_id: Bytes::from_static(&[1; 16]),
        members: vec!["bob".to_owned()],
        client_message_id: long.clone().into(),
    };
    ways.expect("an invitation with an id of 10 kB", &Ask::Invite(invite.clone()), Err(TooLarge)).await;
    let invite = v1::GroupInviteRequest { client_message_id: Bytes::new(), ..invite };
    ways.expect("an invitation to what nobody made", &Ask::Invite(invite), Err(NotFound)).await;
    let users = (0..=limits::PRESENCE_USERS_MAX).map(|number| format!("user{number}")).collect();
    ways.expect("too many users", &Ask::Presence(v1::PresenceReadRequest { user_ids: users }), Err(TooLarge)).await;
    let users = (0..=limits::PRESENCE_WATCHED_MAX).map(|number| format!("user{number}")).collect();
    ways.expect("too many users", &Ask::Watch(v1::PresenceSubscribeRequest { user_ids: users }), Err(TooLarge)).await;

    // Nothing of it is there.
    let list = ways.clients[0].1.conversations().await.unwrap();
    assert!(list.iter().all(|row| row.kind() == v1::ConversationKind::Self_), "{list:?}");
    ways.expect("and a good one is", &Ask::Send(good), Ok(())).await;
}

#[tokio::test]
async fn ranges_of_history_that_are_none_are_refused_and_wide_ones_give_one_page() {
    const MESSAGES: u64 = 1_200;
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let ways = Ways::of(&server, "alice").await;
    let mut pending = Vec::new();
    for number in 1..=MESSAGES {
        let body = body::text(number.to_string());
        pending.push(ways.clients[0].1.enqueue(Target::peer("bob").unwrap(), body).await.unwrap());
    }
    for sent in pending {
        sent.await.unwrap();
    }
    let range = |from, to, limit| v1::HistoryRequest { target: to_bob(), from, to, limit, newest: false };
    for (what, from, to) in [
        ("reversed", 9, 1),
        ("a negative beginning", -1, 9),
        ("a negative end", 1, -1),
        ("the least number", i64::MIN, i64::MIN),
        ("from the greatest to the least", i64::MAX, i64::MIN),
    ] {
        ways.expect(what, &Ask::History(range(from, to, 0)), Err(StatusCode::Malformed)).await;
    }
    let page = u64::from(limits::HISTORY_ENTRIES_MAX);
    let billion = 1_000_000_000;
    for (what, request, seqs) in [
        ("10^9 entries", range(1, billion, 0), 1..=page),
        ("10^9 entries, and as many asked for", range(1, billion, u32::MAX), 1..=page),
        (
            "the newest of 10^9",
            v1::HistoryRequest { newest: true, ..range(1, billion, 0) },
            MESSAGES - page + 1..=MESSAGES,
        ),
        ("everything", range(0, i64::MAX, 0), 1..=page),
        ("all from the last one on", range(1_200, i64::MAX, 0), MESSAGES..=MESSAGES),
        ("beyond the head", range(billion, 2 * billion, 0), RangeInclusive::new(1, 0)),
        ("the greatest number", range(i64::MAX, i64::MAX, 0), RangeInclusive::new(1, 0)),
    ] {
        let expected: Vec<u64> = seqs.collect();
        for (way, client) in &ways.clients {
            let reply: v1::HistoryReply = client.call(Method::MessageHistory, &request).await.unwrap();
            assert_eq!(seqs_of(&reply), expected, "{what}, over {way}");
        }
        let mut messages =
            MessageServiceClient::new(ways.api.clone()).max_decoding_message_size(limits::FRAME_BYTES_MAX * 80);
        let reply = messages.history(ways.request(&request)).await.unwrap().into_inner();
        assert_eq!(seqs_of(&reply), expected, "{what}, over gRPC");
    }
}

fn to_bob() -> Option<v1::Target> {
    to(Named::PeerUserId("bob".to_owned()))
}

fn seqs_of(reply: &v1::HistoryReply) -> Vec<u64> {
    reply.entries.iter().map(|entry| entry.message.as_ref().map_or(0, |message| message.seq)).collect()
}
