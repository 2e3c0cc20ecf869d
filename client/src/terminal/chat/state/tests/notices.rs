//! What is told fits where it is told.

use super::*;
use crate::terminal::chat::{editor, log::PENDING_MAX, sends::why};

#[test]
fn a_notice_fits_beside_the_list_of_80_columns() {
    let whole = |chat: &Chat, text: &str| {
        assert!(shows(chat, &format!("─ {text} ─")), "{text}: {:#?}", screen(chat));
    };
    let mut chat = loaded();
    let here = index(&chat, WITH_BOB);
    press(&mut chat, Command::Open);
    write(&mut chat, "a name that nobody can have, and long as well");
    press(&mut chat, Command::Submit);
    assert!(shows(&chat, "write @user, me or a conversation id"), "{:#?}", screen(&chat));

    chat.conversations[here].draft.insert(&"x".repeat(editor::TEXT_BYTES_MAX));
    write(&mut chat, "x");
    whole(&chat, "left out: a message has at most 60000 bytes");
    chat.conversations[here].draft.take();

    chat.on(Input::Sent(here, 0, Err(why(&SendError::Refused(Status::from_code(StatusCode::NotFound))))));
    whole(&chat, "not sent: not found");
    chat.on(Input::Sent(here, 0, Err(why(&SendError::BodySize { found: 70_000 }))));
    whole(&chat, "not sent: it is too long, send it in parts");
    chat.on(Input::Sent(here, 0, Err(why(&SendError::Closed(ClosedReason::ByCaller)))));
    whole(&chat, "not sent: the client was closed");

    for _ in 0..=PENDING_MAX {
        write(&mut chat, "x");
        press(&mut chat, Command::Submit);
    }
    whole(&chat, "it stays here: 200 messages wait for the server");

    let mut chat = Chat::new(None, at(0), 0, (80, 24));
    write(&mut chat, "x");
    whole(&chat, "none is open: ^O opens @user, me or an id");
}

#[test]
fn a_terminal_that_is_too_small_says_how_large_it_must_be() {
    let chat = Chat::new(None, at(0), 0, (15, 8));
    assert_eq!(screen(&chat)[0], "24 x 8 at least");
}
