//! Pages of history that come late, when something else has changed what they are for.

use super::*;

#[test]
fn what_arrives_while_the_newest_page_is_on_its_way_is_seen() {
    let mut chat = chat();
    let here = index(&chat, WITH_BOB);
    // The page was read at the head of that moment.
    let entries = (1..=10).map(|seq| entry(WITH_BOB, seq, "bob", &format!("line {seq}"))).collect();
    let page = page(WITH_BOB, entries, 10);
    chat.on(Input::Event(Event::Message(entry(WITH_BOB, 11, "bob", "just now"))));
    write(&mut chat, "so soon");
    let effects = press(&mut chat, Command::Submit);
    let local = effects.iter().find_map(|effect| match effect {
        Effect::Send { local, .. } => Some(*local),
        _ => None,
    });
    chat.on(Input::Sent(here, local.unwrap(), Ok(Sent { conversation: id(WITH_BOB), seq: 12, sent_at: at(12) })));
    chat.on(Input::Event(Event::Message(entry(WITH_BOB, 12, "alice", "so soon"))));
    chat.on(Input::Paged(here, Ok(page)));
    assert_eq!(chat.conversations[here].log.items().keys().copied().collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    assert!(shows(&chat, "line 10") && shows(&chat, "  just now") && shows(&chat, "  so soon"), "{:#?}", screen(&chat));
}

#[test]
fn a_page_that_comes_after_its_log_was_forgotten_is_asked_for_again() {
    let mut chat = chat();
    let here = index(&chat, WITH_BOB);
    let entries = |from: u64, to: u64| (from..=to).map(|seq| entry(WITH_BOB, seq, "bob", "line")).collect();
    chat.on(Input::Paged(here, Ok(page(WITH_BOB, entries(101, 200), 200))));
    let asked = (0..8).flat_map(|_| press(&mut chat, Command::PageUp));
    assert!(asked.collect::<Vec<_>>().iter().any(|effect| matches!(effect, Effect::Page { to: 100, .. })));
    chat.conversations[here].log.forget();
    let effects = chat.on(Input::Paged(here, Ok(page(WITH_BOB, entries(1, 100), 200))));
    assert!(matches!(effects[..], [Effect::Page { to: 0, .. }]), "{effects:?}");
    assert!(chat.conversations[here].log.items().is_empty());
}

#[test]
fn what_arrived_before_a_conversation_had_its_peer_is_seen() {
    let mut chat = Chat::new(Some(Target::Peer(user("bob"))), at(0), 0, (80, 24));
    online(&mut chat);
    let here = chat.open.unwrap();
    let entries: Vec<_> = (1..=10).map(|seq| entry(WITH_BOB, seq, "bob", "line")).collect();
    // It is not known yet whose conversation that is.
    chat.on(Input::Event(Event::Message(entry(WITH_BOB, 11, "bob", "just now"))));
    let effects = chat.on(Input::Paged(here, Ok(page(WITH_BOB, entries.clone(), 10))));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Page { to: 0, .. })), "{effects:?}");
    let entries = entries.into_iter().chain([entry(WITH_BOB, 11, "bob", "just now")]).collect();
    chat.on(Input::Paged(here, Ok(page(WITH_BOB, entries, 11))));
    assert!(shows(&chat, "  just now"), "{:#?}", screen(&chat));
}
