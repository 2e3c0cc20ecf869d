use proptest::{collection::vec, prelude::*, sample::Index};
use prost::Message as _;

use super::*;
use crate::v1::body::Content;

fn mention(offset_bytes: u32, length_bytes: u32) -> v1::Mention {
    v1::Mention { whom: Some(v1::mention::Whom::UserId("bob".to_owned())), offset_bytes, length_bytes }
}

fn text_with(text: &str, mentions: Vec<v1::Mention>) -> bytes::Bytes {
    encode(Content::Text(v1::Text { text: text.to_owned(), mentions }))
}

fn forward(body: bytes::Bytes) -> bytes::Bytes {
    let entry = v1::ForwardedEntry { sender: "ann".to_owned(), sent_at_ms: 1, body };
    encode(Content::Forward(v1::Forward { title: "t".to_owned(), entries: vec![entry.clone(), entry] }))
}

fn edited(seq: u64, body: bytes::Bytes) -> bytes::Bytes {
    encode(Content::Edited(v1::Edited { seq, body }))
}

fn reaction(seq: u64, emoji: &str) -> bytes::Bytes {
    encode(Content::Reaction(v1::Reaction { seq, emoji: emoji.to_owned(), removed: false }))
}

fn location(latitude_degrees: f64, longitude_degrees: f64) -> bytes::Bytes {
    encode(Content::Location(v1::Location { latitude_degrees, longitude_degrees, ..v1::Location::default() }))
}

/// One good body of each kind that a client may send.
fn good() -> Vec<bytes::Bytes> {
    let media = v1::Media {
        name: "a.png".to_owned(),
        size_bytes: 9,
        mime_type: "image/png".to_owned(),
        url: "https://media.example/1".to_owned(),
        width_pixels: 3,
        content_hash: vec![7; 32].into(),
        ..v1::Media::default()
    };
    let text_message = v1::Text { text: "grüße".to_owned(), mentions: vec![mention(0, 2)] };
    vec![
        text(""),
        text("hello"),
        text_with("hi @bob, 你好", vec![mention(3, 4), mention(9, 6), mention(15, 0)]),
        encode(Content::Image(media.clone())),
        encode(Content::Video(media.clone())),
        encode(Content::Audio(media.clone())),
        encode(Content::File(v1::Media { content_hash: bytes::Bytes::new(), ..media })),
        encode(Content::Sticker(v1::Sticker { emoji: "👍🏽".to_owned(), ..v1::Sticker::default() })),
        location(-90.0, 180.0),
        encode(Content::Contact(v1::ContactCard { user_id: "bob".to_owned(), display_name: "Bob".to_owned() })),
        encode(Content::Quote(v1::Quote { seq: 5, text: Some(text_message) })),
        forward(text("inner")),
        forward(forward(forward(forward(text("four deep"))))),
        forward(bytes::Bytes::new()),
        encode(Content::CallRecord(v1::CallRecord { call_id: "c".to_owned(), ..v1::CallRecord::default() })),
        encode(Content::Recalled(v1::Recalled { seq: 1 })),
        edited(1, text("better")),
        reaction(1, "👍"),
        encode(Content::Custom(v1::Custom { r#type: "com.example.poll".to_owned(), data: vec![0xff, 0].into() })),
    ]
}

#[test]
fn every_kind_of_content_passes() {
    for body in good() {
        assert_eq!(validate(&body), Ok(()), "{:?}", v1::Body::decode(body));
    }
}

#[test]
fn content_and_fields_of_a_newer_version_pass() {
    let unknown_content = [0xa2, 0x06, 3, 1, 2, 3];
    assert_eq!(validate(&unknown_content), Ok(()));
    assert_eq!(validate(&[text("a").as_ref(), &unknown_content].concat()), Ok(()));
    // Text{text: "a", 100: varint, 101: fixed 32, 102: fixed 64}
    let inner = [&[0x0a, 1, b'a', 0xa0, 6, 1, 0xad, 6, 1, 2, 3, 4, 0xb1, 6][..], &[0; 8]].concat();
    assert_eq!(validate(&[&[0x0a, inner.len() as u8], inner.as_slice()].concat()), Ok(()));
}

#[test]
fn size_is_bounded_on_both_ends() {
    assert_eq!(validate(&[]), Err(BodyError::Empty));
    let longest = limits::BODY_BYTES_MAX - 8;
    assert_eq!(text("x".repeat(longest)).len(), limits::BODY_BYTES_MAX);
    assert_eq!(validate(&text("x".repeat(longest))), Ok(()));
    let error = validate(&text("x".repeat(longest + 1))).expect_err("one byte too many");
    assert_eq!(error, BodyError::TooLarge { found: limits::BODY_BYTES_MAX + 1 });
    assert_eq!(error.status(), StatusCode::TooLarge);
}

#[test]
fn system_events_are_the_servers_at_any_depth() {
    let event = event(v1::system_event::Event::MemberLeft(v1::MemberLeft { user_id: "bob".to_owned() }));
    for body in [event.clone(), forward(event.clone()), edited(1, forward(event))] {
        assert_eq!(validate(&body), Err(BodyError::SystemEvent));
    }
    assert_eq!(BodyError::SystemEvent.status(), StatusCode::Forbidden);
}

#[test]
fn bodies_nest_four_deep() {
    let four = forward(forward(forward(forward(text("x")))));
    assert_eq!(validate(&four), Ok(()));
    assert_eq!(validate(&forward(four)), Err(BodyError::TooDeep));
}

#[test]
fn mentions_are_ranges_of_the_text_on_the_edges_of_characters() {
    for (offset, length) in [(0, 4), (3, 1), (4, 0), (5, 0), (0, u32::MAX), (u32::MAX, u32::MAX), (u32::MAX, 0)] {
        let body = text_with("aé", vec![mention(0, 1), mention(offset, length)]);
        assert!(matches!(validate(&body), Err(BodyError::Rule { message: "Text", .. })), "{offset} {length}");
    }
    assert!(validate(&text_with("aé", vec![mention(2, 1)])).is_err(), "within a character");
    assert!(validate(&text_with("aé", vec![mention(1, 1)])).is_err(), "ends within a character");
    assert_eq!(validate(&text_with("aé", vec![mention(1, 2)])), Ok(()));
    let mut mentions = vec![mention(0, 1); limits::MENTIONS_MAX];
    assert_eq!(validate(&text_with("a", mentions.clone())), Ok(()));
    mentions.push(mention(0, 1));
    assert!(validate(&text_with("a", mentions)).is_err());
    // Mentions may stand before the text that they point into.
    assert_eq!(validate(&[0x0a, 7, 0x12, 2, 0x20, 1, 0x0a, 1, b'a']), Ok(()));
    // An offset over 32 bits is not cut down to a good one.
    assert!(validate(&[0x0a, 13, 0x12, 8, 0x18, 0x80, 0x80, 0x80, 0x80, 0x10, 0x20, 1, 0x0a, 1, b'a']).is_err());
}

#[test]
fn a_mention_names_an_id() {
    for bad in ["", "a b", &"x".repeat(10_000)] {
        let whom = Some(v1::mention::Whom::UserId(bad.to_owned()));
        let body = text_with("a", vec![v1::Mention { whom, ..v1::Mention::default() }]);
        assert!(matches!(validate(&body), Err(BodyError::Id { message: "Mention", .. })), "{bad:.10}");
    }
}

#[test]
fn each_kind_of_content_keeps_its_rule() {
    let contact = |user_id: &str| v1::ContactCard { user_id: user_id.to_owned(), ..v1::ContactCard::default() };
    let custom = |length: usize| v1::Custom { r#type: "t".repeat(length), ..v1::Custom::default() };
    let bad = [
        location(90.1, 0.0),
        location(0.0, -180.5),
        location(f64::NAN, 0.0),
        location(0.0, f64::INFINITY),
        encode(Content::Contact(contact(""))),
        encode(Content::Contact(contact("a\nb"))),
        encode(Content::Quote(v1::Quote::default())),
        encode(Content::Recalled(v1::Recalled { seq: 0 })),
        edited(0, text("x")),
        edited(1, bytes::Bytes::new()),
        edited(1, edited(1, text("x"))),
        edited(1, reaction(1, "x")),
        forward(encode(Content::Recalled(v1::Recalled { seq: 1 }))),
        reaction(0, "x"),
        reaction(1, ""),
        reaction(1, &"x".repeat(65)),
        encode(Content::Custom(custom(0))),
        encode(Content::Custom(custom(129))),
        encode(Content::Image(v1::Media { content_hash: vec![0; 31].into(), ..v1::Media::default() })),
    ];
    for body in bad {
        let error = validate(&body).expect_err("breaks a rule");
        assert!(matches!(error, BodyError::Rule { .. } | BodyError::Id { .. }), "{error}");
        assert_eq!(error.status(), StatusCode::Malformed);
    }
}

#[test]
fn what_two_decoders_could_read_differently_is_malformed() {
    let twice = [text("a"), text("b")].concat();
    let two_members = [text("a"), reaction(1, "x")].concat();
    let text_twice = [0x0a, 6, 0x0a, 1, b'a', 0x0a, 1, b'b'];
    let not_utf8 = [0x0a, 3, 0x0a, 1, 0xff];
    let wrong_wire_type = [0x08, 1];
    let group = [0xa3, 6, 0xa4, 6];
    let field_0 = [0x02, 0];
    let cut = [0x0a, 5, 0x0a, 1, b'a'];
    let endless = [0xff; 11];
    let huge_length = [0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    let bad: [&[u8]; 10] = [
        &twice,
        &two_members,
        &text_twice,
        &not_utf8,
        &wrong_wire_type,
        &group,
        &field_0,
        &cut,
        &endless,
        &huge_length,
    ];
    for body in bad {
        assert!(matches!(validate(body), Err(BodyError::Malformed(_))), "{body:?}");
    }
}

#[test]
fn every_cut_body_is_refused_or_still_a_body() {
    for body in good() {
        for length in 0..body.len() {
            if validate(&body[..length]).is_ok() {
                assert!(v1::Body::decode(&body[..length]).is_ok());
            }
        }
    }
}

#[test]
fn the_kind_of_an_entry_follows_its_content() {
    assert_eq!(entry_kind(&text("a")), v1::EntryKind::Message);
    assert_eq!(entry_kind(&edited(1, text("a"))), v1::EntryKind::Edit);
    assert_eq!(entry_kind(&encode(Content::Recalled(v1::Recalled { seq: 1 }))), v1::EntryKind::Recall);
    assert_eq!(entry_kind(&[&[0xa2, 6, 0][..], &reaction(1, "a")].concat()), v1::EntryKind::Reaction);
    let event = event(v1::system_event::Event::MemberLeft(v1::MemberLeft::default()));
    assert_eq!(entry_kind(&event), v1::EntryKind::Event);
    assert_eq!(entry_kind(&[0xa2, 6, 0]), v1::EntryKind::Message);
    assert_eq!(entry_kind(&[]), v1::EntryKind::Message);
}

/// The check is a decoder of its own: whatever it lets through, the generated decoder must read too, with nothing cut off.
fn agrees_with_the_generated_decoder(body: &[u8]) {
    if validate(body).is_ok() {
        let decoded = v1::Body::decode(body).expect("what passes decodes");
        let encoded = decoded.encode_to_vec();
        assert!(encoded.is_empty() || validate(&encoded).is_ok(), "what passes still passes without unknown fields");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn what_passes_decodes_whatever_was_done_to_it(
        kind in any::<Index>(),
        changes in vec((any::<Index>(), 0_u8..4, any::<u8>()), 1..6),
    ) {
        let mut body = kind.get(&good()).to_vec();
        for (at, change, byte) in changes {
            let at = at.index(body.len() + 1);
            match change {
                0 if at < body.len() => body[at] = byte,
                1 if at < body.len() => body[at] ^= 1 << (byte % 8),
                2 if at < body.len() => { body.remove(at); }
                _ => body.insert(at, byte),
            }
            agrees_with_the_generated_decoder(&body);
        }
    }

    #[test]
    fn garbage_never_panics(body in vec(any::<u8>(), 0..200)) {
        agrees_with_the_generated_decoder(&body);
        entry_kind(&body);
    }

    #[test]
    fn every_text_passes(content in any::<String>()) {
        prop_assert_eq!(validate(&text(content)), Ok(()));
    }
}

/// `cargo test -p im-proto --release -- --ignored --nocapture body` prints what a check costs beside a decoding.
#[test]
#[ignore = "a measurement"]
#[allow(clippy::disallowed_methods, reason = "it measures this machine")]
fn cost_of_a_check() {
    for (name, body) in
        [("100 bytes", text("x".repeat(100))), ("4 mentions", text_with("abcdef", vec![mention(0, 2); 4]))]
    {
        let rounds = 1_000_000_u32;
        let start = std::time::Instant::now();
        for _ in 0..rounds {
            assert_eq!(validate(std::hint::black_box(&body)), Ok(()));
        }
        let checked = start.elapsed() / rounds;
        let start = std::time::Instant::now();
        for _ in 0..rounds {
            assert!(v1::Body::decode(std::hint::black_box(body.clone())).is_ok());
        }
        println!("{name}: check {checked:?}, decode {:?}", start.elapsed() / rounds);
    }
}

#[test]
fn a_body_names_whom_its_own_text_mentions_each_once_and_the_entry_that_it_answers() {
    let mention = |whom| v1::Mention { whom: Some(whom), offset_bytes: 0, length_bytes: 1 };
    let user = |name: &str| mention(v1::mention::Whom::UserId(name.to_owned()));
    let text = |mentions| v1::Text { text: "text".to_owned(), mentions };
    assert_eq!(names(&super::text("plain")), Names::default());
    assert_eq!(names(&super::text("plain")).flags(), FLAG_COUNTED);

    let mentions = vec![user("bob"), user("alice"), user("bob"), mention(v1::mention::Whom::All(false))];
    let body = encode(Content::Text(text(mentions)));
    assert_eq!(names(&body), Names { quoted: None, all: false, users: vec!["alice", "bob"] });
    assert_eq!(names(&body).flags(), FLAG_COUNTED | FLAG_MENTIONS);

    let answer = v1::Quote { seq: 7, text: Some(text(vec![mention(v1::mention::Whom::All(true))])) };
    let answer = encode(Content::Quote(answer));
    assert_eq!(names(&answer), Names { quoted: Some(7), all: true, users: Vec::new() });
    assert_eq!(names(&answer).flags(), FLAG_COUNTED | FLAG_MENTIONS_ALL);

    let entry = v1::ForwardedEntry { sender: "alice".to_owned(), sent_at_ms: 1, body };
    let forward = v1::Forward { title: String::new(), entries: vec![entry] };
    assert_eq!(names(&encode(Content::Forward(forward))), Names::default());
}
