//! Inputs in any order.

use super::*;

fn any_command() -> impl Strategy<Value = Command> {
    prop_oneof![
        any::<char>().prop_map(Command::Insert),
        Just(Command::Newline),
        Just(Command::Submit),
        Just(Command::Cancel),
        Just(Command::Go(Move::WordLeft)),
        Just(Command::Delete(Move::Left)),
        Just(Command::Up),
        Just(Command::Down),
        Just(Command::PageUp),
        Just(Command::PageDown),
        Just(Command::Top),
        Just(Command::Bottom),
        Just(Command::NextConversation),
        Just(Command::PreviousConversation),
        Just(Command::NextUnread),
        Just(Command::Reply),
        Just(Command::Open),
        Just(Command::Help),
    ]
}

#[derive(Clone, Debug)]
enum Step {
    Command(Command),
    Size(u16, u16),
    Message(u8, bool, String),
    Paste(String),
    Lost,
    Back,
    /// The answers to what was asked for come.
    Answers,
    Time(i64),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => any_command().prop_map(Step::Command),
        1 => (0_u16..140, 0_u16..50).prop_map(|(columns, lines)| Step::Size(columns, lines)),
        4 => (1_u8..5, any::<bool>(), "(\\PC|\n|你|👩‍👩‍👧|\u{301}){0,60}").prop_map(|(to, own, text)| Step::Message(to, own, text)),
        1 => "(\\PC|\n){0,200}".prop_map(Step::Paste),
        1 => Just(Step::Lost),
        1 => Just(Step::Back),
        3 => Just(Step::Answers),
        1 => (0_i64..5_000).prop_map(Step::Time),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    /// Whatever happens, in whatever order and at whatever size, however late answers come: nothing panics, every answer fits, a log
    /// that can be seen goes to its end, what is drawn is within the screen, and unread never counts what was read.
    #[test]
    fn any_order_of_inputs_leaves_a_chat_that_can_be_drawn(steps in proptest::collection::vec(any_step(), 1..40)) {
        let mut chat = loaded();
        let mut heads = [0, 10, 5, 0, 0_u64];
        let mut now = 0;
        let mut late = Vec::new();
        for step in steps {
            let answers = matches!(step, Step::Answers);
            let input = match step {
                Step::Command(command) => Input::Command(command),
                Step::Size(columns, lines) => Input::Size(columns, lines),
                Step::Message(to, own, text) => {
                    let head = &mut heads[usize::from(to)];
                    *head += 1;
                    Input::Event(Event::Message(entry(to, *head, if own { "alice" } else { "bob" }, &text)))
                }
                Step::Paste(text) => Input::Paste(text),
                Step::Lost => Input::Event(Event::Disconnected { reason: "lost".to_owned() }),
                Step::Back => Input::Event(Event::Connected { endpoint: "tcp://x:1".to_owned() }),
                Step::Time(millis) => {
                    now += millis;
                    Input::Tick(at(now))
                }
                Step::Answers => Input::Tick(at(now)),
            };
            let answers = if answers { std::mem::take(&mut late) } else { Vec::new() };
            for effect in answers.into_iter().chain([input]).flat_map(|input| chat.on(input)).collect::<Vec<_>>() {
                late.push(match effect {
                    Effect::Page { index, to, .. } => {
                        let Some(place) = chat.conversations[index].id else { continue };
                        let number = place.to_bytes()[0];
                        let Some(head) = heads.get(usize::from(number)).copied() else { continue };
                        let last = if to == 0 { head } else { to };
                        let entries = (last.saturating_sub(3).max(1)..=last).map(|seq| entry(number, seq, "bob", "old"));
                        Input::Paged(index, Ok(page(number, entries.collect(), head)))
                    }
                    Effect::MarkRead { index, seq, .. } => {
                        prop_assert!(seq <= chat.conversations[index].head);
                        Input::Marked(index, Ok(v1::MarkReadReply { read_seq: seq, ..v1::MarkReadReply::default() }))
                    }
                    _ => continue,
                });
            }
            for conversation in &chat.conversations {
                let last_seq = conversation.log.last_seq();
                prop_assert!(!conversation.log.opened || last_seq == conversation.head, "{last_seq} of {}", conversation.head);
                prop_assert!(conversation.unread <= conversation.head);
                prop_assert!(conversation.head > conversation.read_seq || conversation.unread == 0);
            }
            let view = chat.view();
            prop_assert!(view.lines.len() <= usize::from(view.size.1));
            if view.size.0 > 0 && view.size.1 > 0 {
                screen(&chat);
            }
        }
    }
}
