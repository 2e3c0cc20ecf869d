//! Paints a view onto the cells of a terminal. It decides how things look, nothing else.

use ratatui::{
    buffer::Buffer,
    layout::{Position, Rect},
    style::{Color, Modifier, Style},
    widgets::{Block, BorderType, Clear, Widget as _},
};

use super::{
    state::{Line, Role, Row, Span, View},
    text,
};

/// Colours that can be told apart on dark and on light ground.
const PEOPLE: [Color; 6] =
    [Color::Cyan, Color::Magenta, Color::Yellow, Color::Blue, Color::LightRed, Color::LightMagenta];

fn style(role: Role) -> Style {
    match role {
        Role::Plain => Style::new(),
        Role::Dim => Style::new().fg(Color::DarkGray),
        Role::Strong => Style::new().add_modifier(Modifier::BOLD),
        Role::Own => Style::new().fg(Color::Green).add_modifier(Modifier::BOLD),
        Role::Person(number) => {
            let colour = PEOPLE[usize::from(number) % PEOPLE.len()];
            Style::new().fg(colour).add_modifier(Modifier::BOLD)
        }
        Role::Mention => Style::new().fg(Color::Yellow).add_modifier(Modifier::BOLD),
        Role::Good => Style::new().fg(Color::Green),
        Role::Bad => Style::new().fg(Color::Red),
        Role::Warning => Style::new().fg(Color::Yellow),
        Role::Key => Style::new().fg(Color::Cyan),
    }
}

/// The whole screen, onto blank cells. Returns where the cursor stands, if it is to be seen.
pub(super) fn paint(view: &View, buffer: &mut Buffer) -> Option<Position> {
    let area = buffer.area;
    if area.width == 0 || area.height == 0 {
        return None;
    }
    if view.too_small {
        buffer.set_stringn(0, 0, "24 x 8 at least", usize::from(area.width), Style::new());
        return None;
    }
    header(view, area, buffer);
    keys(view, area, buffer);
    let left = if view.list_columns > 0 {
        list(view, area, buffer);
        view.list_columns + 1
    } else {
        0
    };
    let right = Rect { x: left, y: 1, width: area.width.saturating_sub(left), height: area.height.saturating_sub(2) };
    let cursor = conversation(view, right, buffer);
    let Some(entries) = view.help else { return Some(cursor) };
    help(entries, area, buffer);
    None
}

/// Spans one after the other; where they end.
fn spans(spans: &[Span], mut x: u16, y: u16, end: u16, base: Style, buffer: &mut Buffer) -> u16 {
    for span in spans {
        let room = usize::from(end.saturating_sub(x));
        x = buffer.set_stringn(x, y, &span.text, room, base.patch(style(span.role))).0;
    }
    x
}

fn cells(text: &str) -> u16 {
    u16::try_from(text::width(text)).unwrap_or(u16::MAX)
}

fn header(view: &View, area: Rect, buffer: &mut Buffer) {
    let base = Style::new().add_modifier(Modifier::REVERSED);
    buffer.set_style(Rect { height: 1, ..area }, base);
    let end = spans(&view.header, 0, 0, area.width, base, buffer);
    let width = cells(&view.link.text);
    let x = area.width.saturating_sub(width).max(end.saturating_add(1));
    buffer.set_stringn(
        x,
        0,
        &view.link.text,
        usize::from(area.width.saturating_sub(x)),
        base.patch(style(view.link.role)),
    );
}

fn keys(view: &View, area: Rect, buffer: &mut Buffer) {
    let y = area.height - 1;
    let mut x = 1;
    for (key, word) in &view.keys {
        if x + cells(key) + cells(word) + 1 > area.width {
            break;
        }
        x = buffer.set_stringn(x, y, key, usize::from(area.width - x), style(Role::Key)).0;
        x = buffer.set_stringn(x + 1, y, word, usize::from(area.width - x - 1), style(Role::Dim)).0 + 2;
    }
}

fn list(view: &View, area: Rect, buffer: &mut Buffer) {
    let width = view.list_columns;
    for y in 1..area.height - 1 {
        buffer.set_stringn(width, y, "│", 1, style(Role::Dim));
    }
    let (above, below) = view.rows_hidden;
    let more = match (above, below) {
        (0, 0) => String::new(),
        (0, below) => format!("↓{below}"),
        (above, 0) => format!("↑{above}"),
        (above, below) => format!("↑{above} ↓{below}"),
    };
    buffer.set_stringn(1, 1, "conversations", usize::from(width) - 1, style(Role::Dim));
    let x = width.saturating_sub(cells(&more) + 1);
    buffer.set_stringn(x, 1, &more, usize::from(width - x), style(Role::Warning));
    let mut y = 2;
    for row in &view.rows {
        if y + 1 >= area.height - 1 {
            break;
        }
        list_row(row, Rect { x: 0, y, width, height: 2 }, buffer);
        y += 2;
    }
}

fn list_row(row: &Row, area: Rect, buffer: &mut Buffer) {
    let base = if row.open { Style::new().add_modifier(Modifier::REVERSED) } else { Style::new() };
    buffer.set_style(area, base);
    let mut badge = Vec::new();
    if row.mentions > 0 {
        badge.push(Span::new(format!("@{} ", row.mentions), Role::Mention));
    }
    if row.unread > 0 {
        badge.push(Span::new(format!("({})", row.unread), Role::Own));
    } else if row.drafted {
        badge.push(Span::new("draft", Role::Warning));
    }
    let badge_cells: u16 = badge.iter().map(|span| cells(&span.text)).sum();
    let end = area.width.saturating_sub(badge_cells + 1);
    let title = text::cut(&row.title, usize::from(end.saturating_sub(2)));
    let weight = if row.unread > 0 || row.open { Role::Strong } else { Role::Plain };
    buffer.set_stringn(1, area.y, &title, usize::from(end), base.patch(style(weight)));
    spans(&badge, end, area.y, area.width, base, buffer);
    let room = usize::from(area.width).saturating_sub(3);
    let role = if row.typing { Role::Good } else { Role::Dim };
    let role = if row.open { Style::new() } else { style(role) };
    buffer.set_stringn(2, area.y + 1, text::cut(&row.preview, room), room, base.patch(role));
}

/// The open conversation. Returns where the cursor stands.
fn conversation(view: &View, area: Rect, buffer: &mut Buffer) -> Position {
    let end = area.right();
    spans(&view.title, area.x + 1, area.y, end, Style::new(), buffer);
    let compose = u16::try_from(view.draft.lines.len()).unwrap_or(1).max(1);
    let log = Rect { y: area.y + 1, height: area.height.saturating_sub(2 + compose), ..area };
    // Messages stand at the bottom, as if they had come from there.
    let first = log.bottom().saturating_sub(u16::try_from(view.lines.len()).unwrap_or(u16::MAX)).max(log.y);
    for (line, y) in view.lines.iter().zip(first..log.bottom()) {
        message_line(line, Rect { y, height: 1, ..area }, buffer);
    }
    let status = log.bottom();
    let rule = "─".repeat(usize::from(area.width));
    buffer.set_stringn(area.x, status, &rule, usize::from(area.width), style(Role::Dim));
    if !view.status.text.is_empty() {
        let text = format!(" {} ", text::cut(&view.status.text, usize::from(area.width).saturating_sub(4)));
        buffer.set_stringn(area.x + 1, status, text, usize::from(area.width) - 1, style(view.status.role));
    }
    let indent = cells(&view.prompt.text);
    buffer.set_stringn(area.x, status + 1, &view.prompt.text, usize::from(area.width), style(view.prompt.role));
    for (line, y) in view.draft.lines.iter().zip(status + 1..area.bottom()) {
        buffer.set_stringn(area.x + indent, y, line, usize::from(area.width.saturating_sub(indent)), Style::new());
    }
    let (line, cell) = view.draft.cursor;
    let x = area.x + indent + u16::try_from(cell).unwrap_or(0);
    Position { x: x.min(end.saturating_sub(1)), y: status + 1 + u16::try_from(line).unwrap_or(0) }
}

fn message_line(line: &Line, area: Rect, buffer: &mut Buffer) {
    let base = if line.selected { Style::new().add_modifier(Modifier::REVERSED) } else { Style::new() };
    buffer.set_style(area, base);
    let width: u16 = line.spans.iter().map(|span| cells(&span.text)).fold(0, u16::saturating_add);
    let x = if line.centred { area.x + area.width.saturating_sub(width) / 2 } else { area.x };
    spans(&line.spans, x, area.y, area.right(), base, buffer);
    if let Some(mark) = &line.mark {
        let x = area.right().saturating_sub(cells(&mark.text) + 1).max(area.x);
        buffer.set_stringn(x, area.y, &mark.text, usize::from(area.right() - x), base.patch(style(mark.role)));
    }
}

fn help(entries: &[(&str, &str)], area: Rect, buffer: &mut Buffer) {
    let width = area.width.min(76);
    let height = area.height.min(u16::try_from(entries.len()).unwrap_or(u16::MAX).saturating_add(2));
    let within = Rect { x: (area.width - width) / 2, y: (area.height - height) / 2, width, height };
    Clear.render(within, buffer);
    let block = Block::bordered().border_type(BorderType::Rounded).title(" keys ");
    let inner = block.inner(within);
    block.render(within, buffer);
    for ((key, word), y) in entries.iter().zip(inner.y..inner.bottom()) {
        let room = usize::from(inner.width.saturating_sub(1));
        buffer.set_stringn(inner.x + 1, y, key, room, style(Role::Key));
        let x = inner.x + 28.min(inner.width);
        buffer.set_stringn(x, y, word, usize::from(inner.right().saturating_sub(x)), Style::new());
    }
}
