//! What keys mean. One table in words is in the help; both stand here.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::editor::Move;

/// What a person wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Insert(char),
    Newline,
    Submit,
    Cancel,
    Go(Move),
    Delete(Move),
    Up,
    Down,
    PageUp,
    PageDown,
    Top,
    Bottom,
    NextConversation,
    PreviousConversation,
    NextUnread,
    Reply,
    Open,
    Help,
    Suspend,
    Redraw,
    Quit,
}

/// The line at the bottom.
pub(super) const HELP_LINE: [(&str, &str); 7] = [
    ("Enter", "send"),
    ("Tab", "next"),
    ("PgUp", "history"),
    ("^R", "reply"),
    ("^O", "open"),
    ("F1", "help"),
    ("^C", "quit"),
];

/// All keys, for the help.
pub(super) const HELP: [(&str, &str); 15] = [
    ("Enter", "send"),
    ("Alt-Enter, ^J", "new line"),
    ("Tab, ^N, Alt-Down", "next conversation"),
    ("Shift-Tab, ^P, Alt-Up", "previous conversation"),
    ("^U", "next unread (when nothing is written)"),
    ("^O", "open @user, me or a conversation id"),
    ("^R, then Up, Down, Enter", "reply to a message"),
    ("@name, @all in a group", "mention"),
    ("Up, Down, PgUp, PgDn", "scroll; history loads as you go"),
    ("^Home, ^End", "oldest on hand, newest"),
    ("^A ^E Alt-B Alt-F", "move in the text"),
    ("^W ^U ^K", "delete a word, to the start, to the end"),
    ("Esc", "cancel"),
    ("^L  ^Z", "draw anew, suspend"),
    ("^C, ^Q", "quit"),
];

/// `None` for keys without a meaning.
pub(super) fn command(key: KeyEvent) -> Option<Command> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let alt = key.modifiers.contains(KeyModifiers::ALT);
    Some(match key.code {
        KeyCode::Enter if alt || key.modifiers.contains(KeyModifiers::SHIFT) => Command::Newline,
        KeyCode::Enter => Command::Submit,
        KeyCode::Esc => Command::Cancel,
        KeyCode::Tab => Command::NextConversation,
        KeyCode::BackTab => Command::PreviousConversation,
        KeyCode::Up if alt => Command::PreviousConversation,
        KeyCode::Down if alt => Command::NextConversation,
        KeyCode::Up => Command::Up,
        KeyCode::Down => Command::Down,
        KeyCode::PageUp => Command::PageUp,
        KeyCode::PageDown => Command::PageDown,
        KeyCode::Home if control => Command::Top,
        KeyCode::End if control => Command::Bottom,
        KeyCode::Home => Command::Go(Move::LineStart),
        KeyCode::End => Command::Go(Move::LineEnd),
        KeyCode::Left if control || alt => Command::Go(Move::WordLeft),
        KeyCode::Right if control || alt => Command::Go(Move::WordRight),
        KeyCode::Left => Command::Go(Move::Left),
        KeyCode::Right => Command::Go(Move::Right),
        KeyCode::Backspace if control || alt => Command::Delete(Move::WordLeft),
        KeyCode::Backspace => Command::Delete(Move::Left),
        KeyCode::Delete => Command::Delete(Move::Right),
        KeyCode::F(1) => Command::Help,
        KeyCode::Char(c) if control => with_control(c.to_ascii_lowercase())?,
        KeyCode::Char('b') if alt => Command::Go(Move::WordLeft),
        KeyCode::Char('f') if alt => Command::Go(Move::WordRight),
        KeyCode::Char('d') if alt => Command::Delete(Move::WordRight),
        KeyCode::Char(c) if !alt => Command::Insert(c),
        _ => return None,
    })
}

fn with_control(c: char) -> Option<Command> {
    Some(match c {
        'c' | 'q' => Command::Quit,
        'd' => Command::Delete(Move::Right),
        'h' => Command::Delete(Move::Left),
        'j' => Command::Newline,
        'n' => Command::NextConversation,
        'p' => Command::PreviousConversation,
        'r' => Command::Reply,
        'o' => Command::Open,
        'g' => Command::Help,
        'l' => Command::Redraw,
        'z' => Command::Suspend,
        'a' => Command::Go(Move::LineStart),
        'e' => Command::Go(Move::LineEnd),
        'b' => Command::Go(Move::Left),
        'f' => Command::Go(Move::Right),
        'w' => Command::Delete(Move::WordLeft),
        'u' => Command::NextUnread,
        'k' => Command::Delete(Move::LineEnd),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(code: KeyCode, modifiers: KeyModifiers) -> Option<Command> {
        command(KeyEvent::new(code, modifiers))
    }

    #[test]
    fn letters_write_and_control_commands() {
        assert_eq!(key(KeyCode::Char('é'), KeyModifiers::NONE), Some(Command::Insert('é')));
        assert_eq!(key(KeyCode::Char('Q'), KeyModifiers::SHIFT), Some(Command::Insert('Q')));
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::CONTROL), Some(Command::Quit));
        assert_eq!(key(KeyCode::Enter, KeyModifiers::NONE), Some(Command::Submit));
        assert_eq!(key(KeyCode::Enter, KeyModifiers::ALT), Some(Command::Newline));
        assert_eq!(key(KeyCode::Char('y'), KeyModifiers::CONTROL), None);
    }

    #[test]
    fn a_key_that_is_let_go_does_nothing() {
        let mut event = KeyEvent::new(KeyCode::Char('a'), KeyModifiers::NONE);
        event.kind = KeyEventKind::Release;
        assert_eq!(command(event), None);
    }

    #[test]
    fn the_help_fits_on_the_smallest_common_terminal() {
        let line: usize = HELP_LINE.iter().map(|(key, word)| key.len() + word.len() + 3).sum();
        assert!(line <= 80, "{line}");
        assert!(HELP.len() <= 18 && HELP.iter().all(|(key, word)| key.len() <= 26 && word.len() <= 46));
    }
}
