mod any_order;
mod notices;
mod pages;

use im_proto::{StatusCode, body};
use proptest::prelude::*;
use ratatui::{
    buffer::{Buffer, Cell},
    layout::Rect,
};

use super::*;
use crate::{
    error::{ClosedReason, SendError, Status},
    event::Entry,
    terminal::chat::{editor::Move, render},
};

fn user(name: &str) -> UserId {
    UserId::parse(name).unwrap()
}

fn id(number: u8) -> ConversationId {
    ConversationId::from_slice(&[number; 16]).unwrap()
}

const OWN_LOG: u8 = 9;
const WITH_BOB: u8 = 1;
const GROUP: u8 = 2;

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(1_764_000_000_000 + millis)
}

fn entry(conversation: u8, seq: u64, sender: &str, text: &str) -> Entry {
    let message = v1::Message {
        conversation_id: id(conversation).to_bytes(),
        seq,
        sender: sender.to_owned(),
        sent_at_ms: at(i64::try_from(seq).unwrap()).as_millis(),
        body: body::text(text),
        kind: v1::EntryKind::Message.into(),
        flags: 1,
        ..v1::Message::default()
    };
    Entry::from_wire(message, 0, Some(&user("alice"))).unwrap()
}

fn page(conversation: u8, entries: Vec<Entry>, head: u64) -> Page {
    Page { conversation: id(conversation), entries, head, first_seq: 1 }
}

fn row(conversation: u8, peer: &str, name: &str, head: u64, unread: u64) -> v1::ConversationRow {
    let kind = if peer.is_empty() { v1::ConversationKind::Group } else { v1::ConversationKind::Direct };
    v1::ConversationRow {
        conversation_id: id(conversation).to_bytes(),
        kind: kind.into(),
        name: name.to_owned(),
        peer_user_id: peer.to_owned(),
        head,
        unread,
        read_seq: head - unread,
        ..v1::ConversationRow::default()
    }
}

fn online(chat: &mut Chat) -> Vec<Effect> {
    let mut effects = chat.on(Input::Event(Event::Connected { endpoint: "tcp://127.0.0.1:7100".to_owned() }));
    effects.extend(chat.on(Input::Identified(user("alice"), id(OWN_LOG))));
    effects.extend(chat.on(Input::Event(Event::Resynced)));
    effects.extend(chat.on(Input::Tick(at(0))));
    effects
}

/// Alice, with Bob's conversation (10 entries, 2 unread) open and a group with 3 unread.
fn chat() -> Chat {
    let mut chat = Chat::new(Some(Target::Peer(user("bob"))), at(0), 0, (80, 24));
    assert!(online(&mut chat).contains(&Effect::List));
    chat.on(Input::Listed(Ok(vec![row(WITH_BOB, "bob", "", 10, 2), row(GROUP, "", "trip", 5, 3)])));
    chat
}

/// The same with Bob's page loaded.
fn loaded() -> Chat {
    let mut chat = chat();
    let entries = (1..=10).map(|seq| entry(WITH_BOB, seq, "bob", &format!("line {seq}"))).collect();
    let here = index(&chat, WITH_BOB);
    chat.on(Input::Paged(here, Ok(page(WITH_BOB, entries, 10))));
    chat
}

fn index(chat: &Chat, conversation: u8) -> usize {
    chat.by_id[&id(conversation)]
}

fn press(chat: &mut Chat, command: Command) -> Vec<Effect> {
    chat.on(Input::Command(command))
}

fn write(chat: &mut Chat, text: &str) -> Vec<Effect> {
    text.chars().flat_map(|c| press(chat, Command::Insert(c))).collect()
}

/// What is on the screen, a line each, without styles.
fn screen(chat: &Chat) -> Vec<String> {
    let view = chat.view();
    let mut buffer = Buffer::empty(Rect::new(0, 0, view.size.0, view.size.1));
    render::paint(&view, &mut buffer);
    let width = usize::from(buffer.area.width);
    let lines = buffer.content.chunks(width);
    lines.map(|line| line.iter().map(Cell::symbol).collect::<String>().trim_end().to_owned()).collect()
}

fn shows(chat: &Chat, text: &str) -> bool {
    screen(chat).iter().any(|line| line.contains(text))
}

#[test]
fn a_list_from_before_the_reading_does_not_bring_back_what_was_read() {
    let mut chat = loaded();
    let here = index(&chat, WITH_BOB);
    let old = || Input::Listed(Ok(vec![row(WITH_BOB, "bob", "", 10, 2)]));
    chat.on(old());
    assert_eq!(chat.conversations[here].unread, 0, "while the cursor moves");
    chat.on(Input::Marked(here, Ok(v1::MarkReadReply { read_seq: 10, ..v1::MarkReadReply::default() })));
    chat.on(old());
    assert_eq!(chat.conversations[here].unread, 0, "once it has moved");
}

#[test]
fn a_cursor_that_could_not_be_moved_has_the_list_say_what_is_unread() {
    let mut chat = loaded();
    let here = index(&chat, WITH_BOB);
    let mut effects = chat.on(Input::Marked(here, Err(CallError::Closed(ClosedReason::ByCaller))));
    effects.extend(chat.on(Input::Tick(at(60_000))));
    assert!(effects.contains(&Effect::List), "{effects:?}");
}

#[test]
fn the_conversation_that_was_named_is_opened_and_its_newest_page_loaded_once() {
    let mut chat = Chat::new(Some(Target::Peer(user("bob"))), at(0), 0, (80, 24));
    assert!(chat.on(Input::Tick(at(0))).is_empty(), "nothing is asked for without a session");
    let effects = online(&mut chat);
    let pages: Vec<_> = effects.iter().filter(|effect| matches!(effect, Effect::Page { .. })).collect();
    let expected = Effect::Page { index: 1, target: Target::Peer(user("bob")), to: 0, limit: PAGE_ENTRIES };
    assert_eq!(pages, [&expected]);
    assert!(shows(&chat, "loading …"));
}

#[test]
fn the_list_shows_names_unread_and_mentions_and_reading_clears_them() {
    let mut chat = chat();
    assert!(shows(&chat, "@bob") && shows(&chat, "#trip") && shows(&chat, "(3)"), "{:#?}", screen(&chat));
    assert!(shows(&chat, "5 unread"));
    let entries = (1..=10).map(|seq| entry(WITH_BOB, seq, "bob", &format!("line {seq}"))).collect();
    let effects = chat.on(Input::Paged(index(&chat, WITH_BOB), Ok(page(WITH_BOB, entries, 10))));
    let marks = |effect: &&Effect| matches!(effect, Effect::MarkRead { seq: 10, .. });
    assert_eq!(effects.iter().filter(marks).count(), 1, "{effects:?}");
    assert!(shows(&chat, "3 unread") && shows(&chat, "── new ──") && shows(&chat, "line 10"));
}

#[test]
fn a_message_elsewhere_counts_and_one_here_is_read_at_once() {
    let mut chat = loaded();
    let here = index(&chat, WITH_BOB);
    chat.on(Input::Marked(here, Ok(v1::MarkReadReply { read_seq: 10, ..v1::MarkReadReply::default() })));
    chat.on(Input::Event(Event::Message(entry(GROUP, 6, "carol", "elsewhere"))));
    assert!(shows(&chat, "(4)") && shows(&chat, "carol: elsewhere"), "{:#?}", screen(&chat));
    let effects = chat.on(Input::Event(Event::Message(entry(WITH_BOB, 11, "bob", "here"))));
    assert!(matches!(effects[..], [Effect::MarkRead { seq: 11, .. }]), "{effects:?}");
    assert!(shows(&chat, "here") && shows(&chat, "4 unread"));
}

#[test]
fn what_nobody_looks_at_is_not_read() {
    let mut chat = loaded();
    let here = index(&chat, WITH_BOB);
    chat.on(Input::Marked(here, Ok(v1::MarkReadReply { read_seq: 10, ..v1::MarkReadReply::default() })));
    chat.on(Input::Focus(false));
    assert!(chat.on(Input::Event(Event::Message(entry(WITH_BOB, 11, "bob", "unseen")))).is_empty());
    assert!(shows(&chat, "(1)"));
    let effects = chat.on(Input::Focus(true));
    assert!(matches!(effects[..], [Effect::MarkRead { seq: 11, .. }]), "{effects:?}");
    // Neither is what lies below the view.
    chat.on(Input::Marked(here, Ok(v1::MarkReadReply { read_seq: 11, ..v1::MarkReadReply::default() })));
    for seq in 12..40 {
        chat.on(Input::Event(Event::Message(entry(WITH_BOB, seq, "bob", "more"))));
    }
    chat.on(Input::Marked(here, Ok(v1::MarkReadReply { read_seq: 39, ..v1::MarkReadReply::default() })));
    press(&mut chat, Command::PageUp);
    assert!(chat.on(Input::Event(Event::Message(entry(WITH_BOB, 40, "bob", "below")))).is_empty());
    assert!(!shows(&chat, "below;  ") && shows(&chat, "1 new below"), "{:#?}", screen(&chat));
    let effects = press(&mut chat, Command::Cancel);
    assert!(matches!(effects[..], [Effect::MarkRead { seq: 40, .. }]), "{effects:?}");
}

#[test]
fn a_sent_message_shows_at_once_and_gets_its_marks() {
    let mut chat = loaded();
    let here = index(&chat, WITH_BOB);
    write(&mut chat, "hi Bob");
    let effects = press(&mut chat, Command::Submit);
    let Some(Effect::Send { local, target, body, .. }) = effects.first() else { panic!("{effects:?}") };
    assert_eq!((target, body), (&Target::Conversation(id(WITH_BOB)), &body::text("hi Bob")));
    let local = *local;
    let mark = |chat: &Chat| {
        let line = screen(chat).into_iter().find(|line| line.contains("hi Bob") && !line.contains("you: ")).unwrap();
        line.split_whitespace().skip_while(|word| *word != "Bob").skip(1).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(mark(&chat), "…");
    let sent = Sent { conversation: id(WITH_BOB), seq: 11, sent_at: at(11) };
    chat.on(Input::Sent(here, local, Ok(sent)));
    chat.on(Input::Event(Event::Message(entry(WITH_BOB, 11, "alice", "hi Bob"))));
    assert_eq!(mark(&chat), "✓");
    let bob = |delivered, read| crate::terminal::chat::conversation::Cursor { delivered, read };
    chat.conversations[here].cursor(user("bob"), bob(11, 10));
    assert_eq!(mark(&chat), "✓✓");
    chat.conversations[here].cursor(user("bob"), bob(11, 11));
    assert_eq!(mark(&chat), "✓✓ read");
}

#[test]
fn an_entry_that_comes_before_its_acknowledgement_is_not_shown_twice() {
    for acknowledged_first in [false, true] {
        let mut chat = loaded();
        let here = index(&chat, WITH_BOB);
        write(&mut chat, "once");
        let effects = press(&mut chat, Command::Submit);
        let Some(Effect::Send { local, .. }) = effects.first() else { panic!("{effects:?}") };
        let sent = Input::Sent(here, *local, Ok(Sent { conversation: id(WITH_BOB), seq: 11, sent_at: at(11) }));
        let message = Input::Event(Event::Message(entry(WITH_BOB, 11, "alice", "once")));
        let (first, second) = if acknowledged_first { (sent, message) } else { (message, sent) };
        for input in [first, second] {
            chat.on(input);
            let shown = screen(&chat).iter().filter(|line| line.contains("  once")).count();
            assert_eq!(shown, 1, "{:#?}", screen(&chat));
        }
        assert!(chat.conversations[here].log.pending.is_empty());
    }
}

#[test]
fn a_refused_message_comes_back_to_be_written_anew() {
    let mut chat = loaded();
    let here = index(&chat, WITH_BOB);
    write(&mut chat, "no");
    let effects = press(&mut chat, Command::Submit);
    let Some(Effect::Send { local, .. }) = effects.first() else { panic!("{effects:?}") };
    chat.on(Input::Sent(here, *local, Err("too large".to_owned())));
    assert_eq!(chat.conversations[here].draft.text(), "no");
    assert!(shows(&chat, "not sent: too large"), "{:#?}", screen(&chat));
}

#[test]
fn a_refused_reply_comes_back_as_a_reply() {
    let mut chat = loaded();
    let here = index(&chat, WITH_BOB);
    press(&mut chat, Command::Reply);
    press(&mut chat, Command::Submit);
    write(&mut chat, "right");
    let effects = press(&mut chat, Command::Submit);
    let Some(Effect::Send { local, body, .. }) = effects.first() else { panic!("{effects:?}") };
    let (local, body) = (*local, body.clone());
    chat.on(Input::Sent(here, local, Err("rate limited".to_owned())));
    assert_eq!(chat.conversations[here].replying, Some(10));
    assert!(shows(&chat, "↳ right"), "{:#?}", screen(&chat));
    let effects = press(&mut chat, Command::Submit);
    let Some(Effect::Send { local, body: again, .. }) = effects.first() else { panic!("{effects:?}") };
    let local = *local;
    assert_eq!(*again, body);

    // Meanwhile another message is to be answered: the words of the first one are no answer to that.
    press(&mut chat, Command::Reply);
    press(&mut chat, Command::Up);
    press(&mut chat, Command::Submit);
    chat.on(Input::Sent(here, local, Err("rate limited".to_owned())));
    assert_eq!(chat.conversations[here].replying, Some(9));
    assert!(chat.conversations[here].draft.is_empty() && shows(&chat, "✗ not sent"), "{:#?}", screen(&chat));
}

#[test]
fn a_conversation_that_was_named_by_its_id_is_open_before_there_is_a_session() {
    let mut chat = Chat::new(Some(Target::Conversation(id(GROUP))), at(0), 0, (80, 24));
    assert!(shows(&chat, "connecting …") && shows(&chat, "02020202"), "{:#?}", screen(&chat));
    write(&mut chat, "soon");
    let effects = press(&mut chat, Command::Submit);
    assert!(matches!(&effects[..], [Effect::Send { target: Target::Conversation(to), .. }] if *to == id(GROUP)));
    assert!(shows(&chat, "soon"));
    // Its entries and its members are asked for once there is one.
    let effects = online(&mut chat);
    let group = id(GROUP);
    let asks = |wanted: &dyn Fn(&Effect) -> bool| effects.iter().filter(|effect| wanted(effect)).count();
    assert_eq!(
        asks(&|effect| matches!(effect, Effect::Page { target: Target::Conversation(of), .. } if *of == group)),
        1
    );
    assert!(asks(&|effect| matches!(effect, Effect::Members { group: of, .. } if *of == group)) > 0, "{effects:?}");
    chat.on(Input::Listed(Ok(vec![row(WITH_BOB, "bob", "", 10, 2), row(GROUP, "", "trip", 5, 3)])));
    assert!(shows(&chat, "#trip") && chat.open == Some(index(&chat, GROUP)), "{:#?}", screen(&chat));
}

#[test]
fn members_that_could_not_be_read_are_asked_for_after_the_next_sync() {
    let mut chat = chat();
    let asks = |effects: Vec<Effect>| effects.iter().any(|effect| matches!(effect, Effect::Members { .. }));
    let group = index(&chat, GROUP);
    assert!(asks(press(&mut chat, Command::NextConversation)) && chat.open == Some(group));
    assert!(!asks(chat.on(Input::Members(group, Err(CallError::Malformed)))));
    assert!(!asks(chat.on(Input::Tick(at(5)))));
    assert!(asks(chat.on(Input::Event(Event::Resynced))));
    let member = v1::GroupMember { user_id: "carol".to_owned(), ..v1::GroupMember::default() };
    assert!(!asks(chat.on(Input::Members(group, Ok(vec![member])))));
    assert!(!asks(chat.on(Input::Event(Event::Resynced))) && shows(&chat, "1 members: carol"));
}

#[test]
fn history_is_loaded_as_one_scrolls_up_and_the_view_stays_where_it_is() {
    let mut chat = chat();
    let here = index(&chat, WITH_BOB);
    chat.conversations[here].head = 300;
    let entries =
        |from: u64, to: u64| (from..=to).map(|seq| entry(WITH_BOB, seq, "bob", &format!("line {seq}"))).collect();
    chat.on(Input::Paged(here, Ok(page(WITH_BOB, entries(201, 300), 300))));
    let mut asked = Vec::new();
    for _ in 0..8 {
        asked.extend(
            press(&mut chat, Command::PageUp).into_iter().filter(|effect| matches!(effect, Effect::Page { .. })),
        );
    }
    assert!(matches!(asked[..], [Effect::Page { to: 200, .. }]), "{asked:?}");
    let before = screen(&chat);
    chat.on(Input::Paged(here, Ok(page(WITH_BOB, entries(101, 200), 300))));
    chat.on(Input::Event(Event::Message(entry(WITH_BOB, 301, "bob", "newer"))));
    let text = |lines: &[String]| lines.iter().filter(|line| line.contains("line ")).cloned().collect::<Vec<_>>();
    let (before, after) = (text(&before), text(&screen(&chat)));
    assert_eq!(before.last(), after.last(), "the lowest line stays");
    press(&mut chat, Command::Bottom);
    assert!(shows(&chat, "newer"));
}

#[test]
fn who_types_is_shown_and_own_typing_is_told_now_and_then() {
    let mut chat = loaded();
    let signal = |active| {
        Input::Event(Event::Signal(v1::Signal {
            target: Some(v1::signal::Target::ConversationId(id(WITH_BOB).to_bytes())),
            sender: "bob".to_owned(),
            signal: Some(v1::signal::Signal::Typing(v1::Typing { active })),
        }))
    };
    chat.on(signal(true));
    assert!(shows(&chat, "bob is typing …"));
    chat.on(Input::Tick(at(10_000)));
    assert!(!shows(&chat, "is typing"));
    chat.on(signal(true));
    chat.on(signal(false));
    assert!(!shows(&chat, "is typing"));
    let told =
        |effects: Vec<Effect>| effects.into_iter().filter(|effect| matches!(effect, Effect::Typing { .. })).count();
    assert_eq!(told(write(&mut chat, "hello")), 1);
    chat.on(Input::Tick(at(14_000)));
    assert_eq!(told(write(&mut chat, "x")), 1);
    let effects = press(&mut chat, Command::NextConversation);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Typing { active: false, .. })), "{effects:?}");
}

#[test]
fn a_reply_quotes_the_chosen_message() {
    let mut chat = loaded();
    press(&mut chat, Command::Reply);
    press(&mut chat, Command::Up);
    press(&mut chat, Command::Up);
    press(&mut chat, Command::Submit);
    write(&mut chat, "indeed");
    let effects = press(&mut chat, Command::Submit);
    let Some(Effect::Send { body, .. }) = effects.first() else { panic!("{effects:?}") };
    let quote = v1::Quote { seq: 8, text: Some(v1::Text { text: "indeed".to_owned(), mentions: Vec::new() }) };
    assert_eq!(*body, body::encode(v1::body::Content::Quote(quote)));
    assert!(shows(&chat, "↳ bob: line 8"), "{:#?}", screen(&chat));
}

#[test]
fn the_state_of_the_session_shows_with_its_reconnects() {
    let mut chat = Chat::new(None, at(0), 0, (80, 24));
    chat.on(Input::Tick(at(3_000)));
    assert!(shows(&chat, "◌ connecting 3 s"));
    online(&mut chat);
    assert!(shows(&chat, "● online tcp://127.0.0.1:7100"));
    chat.on(Input::Event(Event::Disconnected { reason: "connection reset".to_owned() }));
    chat.on(Input::Tick(at(4_000)));
    assert!(shows(&chat, "◌ reconnecting 4 s: connection reset"), "{:#?}", screen(&chat));
    assert!(press(&mut chat, Command::Redraw) == [Effect::Redraw], "keys work meanwhile");
    online(&mut chat);
    assert!(shows(&chat, "1× again") && shows(&chat, "connected again after"), "{:#?}", screen(&chat));
}

#[test]
fn a_direct_conversation_that_begins_is_one_row_whoever_knew_it_first() {
    // It is opened before it exists, then Bob writes, and only then the list says whose it is.
    let mut chat = Chat::new(Some(Target::Peer(user("bob"))), at(0), 0, (80, 24));
    online(&mut chat);
    let status = Status::from_code(StatusCode::NotFound);
    chat.on(Input::Paged(1, Err(CallError::Refused(status))));
    assert!(shows(&chat, "write the first message"), "{:#?}", screen(&chat));
    chat.on(Input::Event(Event::Message(entry(WITH_BOB, 1, "bob", "hello"))));
    let effects = chat.on(Input::Listed(Ok(vec![row(WITH_BOB, "bob", "", 1, 1)])));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Page { to: 0, .. })), "{effects:?}");
    chat.on(Input::Paged(1, Ok(page(WITH_BOB, vec![entry(WITH_BOB, 1, "bob", "hello")], 1))));
    assert_eq!(chat.order().len(), 1, "{:#?}", screen(&chat));
    assert!(shows(&chat, "  hello"));
}

#[test]
fn two_rows_that_become_one_keep_what_was_written_in_both() {
    let mut chat = Chat::new(Some(Target::Peer(user("bob"))), at(0), 0, (80, 24));
    online(&mut chat);
    let with_peer = chat.by_peer[&user("bob")];
    let sent_in = |chat: &mut Chat, text: &str| {
        write(chat, text);
        let effects = press(chat, Command::Submit);
        let sent = effects.iter().find_map(|effect| match effect {
            Effect::Send { index, local, .. } => Some((*index, *local)),
            _ => None,
        });
        sent.unwrap()
    };
    // Before the list says whose it is, it is written to under both names.
    sent_in(&mut chat, "to the peer");
    write(&mut chat, "draft to the peer");
    chat.on(Input::Event(Event::Message(entry(WITH_BOB, 1, "bob", "hello"))));
    let with_id = index(&chat, WITH_BOB);
    assert_ne!(with_id, with_peer);
    chat.open(with_id);
    let to_stored = sent_in(&mut chat, "to the id, stored");
    let to_refused = sent_in(&mut chat, "to the id, refused");
    write(&mut chat, "draft to the id");
    chat.conversations[with_id].replying = Some(1);
    chat.on(Input::Listed(Ok(vec![row(WITH_BOB, "bob", "", 1, 1)])));

    assert_eq!((index(&chat, WITH_BOB), chat.open), (with_peer, Some(with_peer)));
    let kept = |chat: &Chat| chat.conversations[with_peer].log.pending.clone();
    let words: Vec<_> = kept(&chat).iter().map(|pending| pending.content.words().to_owned()).collect();
    assert_eq!(words, ["to the peer", "to the id, stored", "to the id, refused"]);
    let conversation = &chat.conversations[with_peer];
    assert_eq!(conversation.draft.text(), "draft to the peer\ndraft to the id");
    assert_eq!(conversation.replying, Some(1));
    // Answers to what was sent at the other place find it here.
    let stored = Sent { conversation: id(WITH_BOB), seq: 2, sent_at: at(2) };
    chat.on(Input::Sent(to_stored.0, to_stored.1, Ok(stored)));
    chat.on(Input::Sent(to_refused.0, to_refused.1, Err("no".to_owned())));
    assert_eq!(kept(&chat).iter().map(|pending| pending.stored).collect::<Vec<_>>(), [None, Some(2), None]);
    assert_eq!(kept(&chat)[2].failed.as_deref(), Some("no"));
}

#[test]
fn a_draft_that_has_no_room_beside_the_other_stays_in_sight() {
    use crate::terminal::chat::{conversation::Conversation, editor::TEXT_BYTES_MAX};
    let of = |text: &str| {
        let mut conversation = Conversation::default();
        assert!(conversation.draft.insert(text));
        conversation
    };
    let long = "x".repeat(TEXT_BYTES_MAX);
    let mut kept = of(&long);
    kept.absorb(id(WITH_BOB), of("short"));
    assert_eq!(kept.draft.text(), long);
    assert_eq!(kept.log.pending[0].content.words(), "short");
    assert!(kept.log.pending[0].failed.is_some());
    let mut kept = of("");
    kept.absorb(id(WITH_BOB), of("short"));
    assert_eq!((kept.draft.text(), kept.log.pending.len()), ("short", 0));
}

#[test]
fn the_end_said_by_the_server_is_shown() {
    let mut chat = loaded();
    chat.on(Input::Event(Event::Closed(ClosedReason::ByCaller)));
    assert!(shows(&chat, "✗ the client was closed"));
}

#[test]
fn paste_keeps_its_lines_and_is_not_sent_by_them() {
    let mut chat = loaded();
    let effects = chat.on(Input::Paste("first\r\nsecond\x1b[31m".to_owned()));
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Send { .. })));
    assert_eq!(chat.conversations[index(&chat, WITH_BOB)].draft.text(), "first\nsecond[31m");
    assert!(shows(&chat, "> first") && shows(&chat, "  second[31m"), "{:#?}", screen(&chat));
}

#[test]
fn wide_characters_stand_where_they_are_counted() {
    let mut chat = loaded();
    chat.on(Input::Event(Event::Message(entry(WITH_BOB, 11, "bob", &"你好".repeat(20)))));
    // A cell after each wide character belongs to it; ratatui fills it with a space.
    let wide: usize = screen(&chat).iter().map(|line| line.matches('你').count()).sum();
    assert_eq!(wide, 20 + 6, "all in the messages, some in the list: {:#?}", screen(&chat));
    assert!(screen(&chat).iter().all(|line| text_width(line) <= 80 * 2));
}

fn text_width(line: &str) -> usize {
    crate::terminal::chat::text::width(line)
}

#[test]
fn receipts_move_marks_and_those_of_another_own_device_what_is_unread() {
    let mut chat = loaded();
    let here = index(&chat, WITH_BOB);
    let receipt = |to: u8, sender: &str, received_seq, read_seq| {
        let receipt = v1::Receipt { received_seq, read_seq, ..v1::Receipt::default() };
        Input::Event(Event::Signal(v1::Signal {
            target: Some(v1::signal::Target::ConversationId(id(to).to_bytes())),
            sender: sender.to_owned(),
            signal: Some(v1::signal::Signal::Receipt(receipt)),
        }))
    };
    chat.on(Input::Event(Event::Message(entry(WITH_BOB, 11, "alice", "mine"))));
    let mark = |chat: &Chat| screen(chat).into_iter().find(|line| line.contains("  mine")).unwrap();
    assert!(mark(&chat).ends_with(" ✓"));
    chat.on(receipt(WITH_BOB, "bob", 11, 9));
    assert!(mark(&chat).ends_with("✓✓"));
    chat.on(receipt(WITH_BOB, "bob", 11, 11));
    assert!(mark(&chat).ends_with("✓✓ read"));
    assert_eq!(chat.conversations[here].reached(11), (1, 1));
    assert!(shows(&chat, "#trip                (3)"), "{:#?}", screen(&chat));
    chat.on(receipt(GROUP, "alice", 5, 5));
    assert!(!shows(&chat, "(3)"));
}

#[test]
fn the_list_brings_previews_mentions_and_cursors() {
    let mut chat = chat();
    let newest = entry(GROUP, 7, "carol", "@alice look");
    let preview = v1::Message {
        conversation_id: id(GROUP).to_bytes(),
        seq: 7,
        sender: "carol".to_owned(),
        sent_at_ms: newest.sent_at.as_millis(),
        body: newest.body,
        kind: v1::EntryKind::Message.into(),
        ..v1::Message::default()
    };
    let cursors = vec![v1::MemberCursor { user_id: "carol".to_owned(), read_seq: 3, received_seq: 4 }];
    let row = v1::ConversationRow { preview: Some(preview), mentions: 1, cursors, ..row(GROUP, "", "trip", 7, 5) };
    chat.on(Input::Listed(Ok(vec![row])));
    assert!(shows(&chat, "@1 (5)") && shows(&chat, "carol: @alice look"), "{:#?}", screen(&chat));
    assert_eq!(chat.conversations[index(&chat, GROUP)].reached(4), (1, 0));
}

#[test]
fn the_title_says_whether_the_other_one_is_there_and_only_the_open_ones_peer_is_watched() {
    let mut chat = Chat::new(Some(Target::Peer(user("bob"))), at(0), 0, (80, 24));
    let effects = online(&mut chat);
    let watch = |name: &str| Effect::Watch { peer: user(name) };
    let watched: Vec<&Effect> = effects.iter().filter(|effect| matches!(effect, Effect::Watch { .. })).collect();
    assert_eq!(watched, [&watch("bob")]);
    let title = |chat: &Chat| -> String { chat.view().title.into_iter().map(|span| span.text).collect() };
    assert_eq!(title(&chat), "@bob");
    let seen = |online: bool, ago_ms: i64| v1::UserPresence {
        user_id: "bob".to_owned(),
        online,
        last_seen_ms: at(-ago_ms).as_millis(),
        invisible: false,
    };
    chat.on(Input::Watched(Ok(vec![seen(true, 0)])));
    assert_eq!(title(&chat), "@bob  online");
    for (ago_ms, words) in [(5_000, "just now"), (3 * 60_000, "3 min ago"), (2 * 3_600_000, "2 h ago")] {
        chat.on(Input::Event(Event::Presence(vec![seen(false, ago_ms)])));
        assert_eq!(title(&chat), format!("@bob  last seen {words}"));
    }
    // The first message makes the conversation, in which more may be known.
    let sent = Sent { conversation: id(WITH_BOB), seq: 1, sent_at: at(0) };
    let index = chat.by_peer[&user("bob")];
    assert!(chat.on(Input::Sent(index, 0, Ok(sent))).contains(&watch("bob")));
}
