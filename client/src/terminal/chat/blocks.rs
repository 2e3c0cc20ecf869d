//! Entries as lines: who and when where that changes, the words, marks of delivery, what divides days and what is new.

use im_proto::{Timestamp, UserId};

use super::{
    conversation::Conversation,
    log::{Content, Item},
    state::{Line, Role, Span},
    text,
};

/// After so long a sender is named again.
const AGAIN_MS: i64 = 5 * 60 * 1000;
/// Cells before the words.
const INDENT: &str = "  ";
/// Cells that marks may take at the end of a line.
const MARK_CELLS: usize = 12;

/// What lines depend on besides the entry.
pub(super) struct Context<'a> {
    pub(super) conversation: &'a Conversation,
    pub(super) me: Option<&'a UserId>,
    pub(super) columns: usize,
    pub(super) utc_offset_seconds: i64,
    pub(super) new_from: Option<u64>,
    pub(super) selected: Option<u64>,
}

/// An entry, below the one before it.
pub(super) fn entry(context: &Context<'_>, seq: u64, item: &Item, before: Option<&Item>) -> Vec<Line> {
    let mut lines = Vec::new();
    day(context, item.at, before, &mut lines);
    let new = context.new_from == Some(seq);
    if new {
        lines.push(Line::centred("── new ──", Role::Bad));
    }
    let first = lines.len();
    if let Content::Note(words) = &item.content {
        let wrapped = text::wrap(&format!("· {words} ·"), context.columns.saturating_sub(2));
        lines.extend(wrapped.into_iter().map(|words| Line::centred(words, Role::Dim)));
        return lines;
    }
    if !lines.is_empty() || heads(item, before) {
        lines.push(heading(context, item.own, item.sender.as_ref(), item.at));
    }
    let mark = item.own.then(|| reached(context, seq));
    body(context, &item.content, item.mentions_me, mark, &mut lines);
    if context.selected == Some(seq) {
        lines.iter_mut().skip(first).for_each(|line| line.selected = true);
    }
    lines
}

/// Messages on their way, below the last entry; one block each.
pub(super) fn pending(context: &Context<'_>, last: Option<&Item>) -> Vec<Vec<Line>> {
    let mut before = last.cloned();
    let mut blocks = Vec::new();
    for pending in &context.conversation.log.pending {
        let item = Item {
            sender: context.me.cloned(),
            own: true,
            at: pending.at,
            content: pending.content.clone(),
            mentions_me: false,
            counts: false,
        };
        let mut lines = Vec::new();
        day(context, item.at, before.as_ref(), &mut lines);
        if !lines.is_empty() || heads(&item, before.as_ref()) {
            lines.push(heading(context, true, None, item.at));
        }
        let mark = match &pending.failed {
            Some(_) => Span::new("✗ not sent", Role::Bad),
            None => Span::new("…", Role::Dim),
        };
        body(context, &item.content, false, Some(mark), &mut lines);
        before = Some(item);
        blocks.push(lines);
    }
    blocks
}

fn day(context: &Context<'_>, at: Timestamp, before: Option<&Item>, lines: &mut Vec<Line>) {
    let local = |at: Timestamp| at.as_millis().div_euclid(1000) + context.utc_offset_seconds;
    let day = local(at).div_euclid(86_400);
    if before.is_none_or(|before| local(before.at).div_euclid(86_400) != day) {
        lines.push(Line::centred(format!("── {} ──", date(day)), Role::Dim));
    }
}

/// Whether the sender is named.
fn heads(item: &Item, before: Option<&Item>) -> bool {
    before.is_none_or(|before| {
        matches!(before.content, Content::Note(_))
            || before.own != item.own
            || (!item.own && before.sender != item.sender)
            || item.at.as_millis() - before.at.as_millis() > AGAIN_MS
    })
}

fn heading(context: &Context<'_>, own: bool, sender: Option<&UserId>, at: Timestamp) -> Line {
    let name = match sender {
        _ if own => Span::new("you", Role::Own),
        Some(sender) => Span::new(text::cut(&text::one_line(sender.as_str()), 40), Role::Person(colour(sender))),
        None => Span::new("server", Role::Dim),
    };
    Line::of(vec![name, Span::new(format!("  {}", clock(context, at)), Role::Dim)])
}

/// The same person has the same colour everywhere.
fn colour(user: &UserId) -> u8 {
    user.as_str().bytes().fold(7_u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte))
}

fn body(context: &Context<'_>, content: &Content, mentions_me: bool, mark: Option<Span>, lines: &mut Vec<Line>) {
    let columns = context.columns.saturating_sub(INDENT.len() + 1);
    if let Content::Reply(to, _) = content {
        let quoted = match context.conversation.log.items().get(to) {
            Some(item) => {
                let who = if item.own { "you" } else { item.sender.as_ref().map_or("server", UserId::as_str) };
                format!("↳ {who}: {}", text::one_line(item.content.words()))
            }
            None => format!("↳ message {to}"),
        };
        lines.push(Line::of(vec![Span::new(INDENT, Role::Dim), Span::new(text::cut(&quoted, columns), Role::Dim)]));
    }
    let role = match content {
        _ if mentions_me => Role::Mention,
        Content::Other(_) => Role::Dim,
        _ => Role::Plain,
    };
    for words in text::wrap(content.words(), columns) {
        lines.push(Line::of(vec![Span::new(INDENT, Role::Plain), Span::new(words, role)]));
    }
    let (Some(mark), Some(last)) = (mark, lines.last_mut()) else { return };
    let used: usize = last.spans.iter().map(|span| text::width(&span.text)).sum();
    if used + text::width(&mark.text) + 2 <= context.columns {
        last.mark = Some(mark);
    } else {
        lines.push(Line { mark: Some(mark), ..Line::default() });
    }
}

/// Stored, delivered, read.
fn reached(context: &Context<'_>, seq: u64) -> Span {
    let conversation = context.conversation;
    let (delivered, read) = conversation.reached(seq);
    let others = conversation.cursors.len();
    let (text, role) = match (delivered, read) {
        (0, _) => ("✓".to_owned(), Role::Dim),
        (_, 0) if others <= 1 => ("✓✓".to_owned(), Role::Dim),
        (_, _) if others <= 1 => ("✓✓ read".to_owned(), Role::Good),
        (some, 0) => (format!("✓✓ {some}/{others}"), Role::Dim),
        (_, all) if all == others => ("✓✓ read".to_owned(), Role::Good),
        (_, some) => (format!("read {some}/{others}"), Role::Good),
    };
    Span::new(text::cut(&text, MARK_CELLS), role)
}

fn clock(context: &Context<'_>, at: Timestamp) -> String {
    let minutes = (at.as_millis().div_euclid(1000) + context.utc_offset_seconds).rem_euclid(86_400) / 60;
    format!("{:02}:{:02}", minutes / 60, minutes % 60)
}

/// A day since 1970-01-01.
fn date(day: i64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let weekday = usize::try_from(day.rem_euclid(7)).ok().and_then(|day| DAYS.get(day)).copied().unwrap_or_default();
    let (year, month, day) = super::super::output::civil(day);
    let month = usize::try_from(month - 1).ok().and_then(|month| MONTHS.get(month)).copied().unwrap_or_default();
    format!("{weekday}, {day} {month} {year}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_names() {
        assert_eq!(date(0), "Thursday, 1 January 1970");
        assert_eq!(date(20_783), "Thursday, 26 November 2026");
        assert_eq!(date(19_782), "Thursday, 29 February 2024");
    }
}
