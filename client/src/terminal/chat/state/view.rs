//! What is to be seen, as text with roles: the renderer only paints it. Here is also what the size decides: layout and scrolling.

use im_proto::{Timestamp, v1};

use super::{
    super::{
        blocks::{self, Context},
        conversation::Conversation,
        editor::EditorView,
        keys,
        log::{Anchor, Loading},
        text,
    },
    Chat, Link, Mode, SMALLEST,
};

/// Columns of the list, and the least that the messages need beside it.
const LIST_COLUMNS: u16 = 26;
const LOG_COLUMNS_MIN: u16 = 34;
/// Lines that a draft may take.
const COMPOSE_LINES_MAX: usize = 6;

/// What a piece of text is, for the renderer to choose how it looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in super::super) enum Role {
    #[default]
    Plain,
    Dim,
    Strong,
    /// Of the user's own name.
    Own,
    /// Somebody's name; the number chooses a colour.
    Person(u8),
    /// A mention of this user.
    Mention,
    Good,
    Bad,
    Warning,
    /// A key.
    Key,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Span {
    pub(in super::super) text: String,
    pub(in super::super) role: Role,
}

/// A line of the messages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Line {
    pub(in super::super) spans: Vec<Span>,
    /// At the right end.
    pub(in super::super) mark: Option<Span>,
    pub(in super::super) centred: bool,
    pub(in super::super) selected: bool,
}

impl Span {
    pub(in super::super) fn new(text: impl Into<String>, role: Role) -> Self {
        Self { text: text.into(), role }
    }
}

impl Line {
    pub(in super::super) fn of(spans: Vec<Span>) -> Self {
        Self { spans, ..Self::default() }
    }

    /// Across the middle.
    pub(in super::super) fn centred(text: impl Into<String>, role: Role) -> Self {
        Self { spans: vec![Span::new(text, role)], centred: true, ..Self::default() }
    }
}

/// A row of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Row {
    pub(in super::super) title: String,
    pub(in super::super) preview: String,
    pub(in super::super) unread: u64,
    pub(in super::super) mentions: u64,
    pub(in super::super) open: bool,
    /// Somebody is typing, or a draft waits.
    pub(in super::super) typing: bool,
    pub(in super::super) drafted: bool,
}

/// Everything on the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct View {
    pub(in super::super) size: (u16, u16),
    /// The terminal is too small for anything.
    pub(in super::super) too_small: bool,
    pub(in super::super) header: Vec<Span>,
    /// The state of the session, at the right end of the header.
    pub(in super::super) link: Span,
    /// Rows of the list that fit, two lines each. Empty columns: the list is not shown.
    pub(in super::super) list_columns: u16,
    pub(in super::super) rows: Vec<Row>,
    /// Conversations above and below those that fit.
    pub(in super::super) rows_hidden: (usize, usize),
    pub(in super::super) title: Vec<Span>,
    pub(in super::super) lines: Vec<Line>,
    /// Who types, what went wrong, where the view stands: above the draft.
    pub(in super::super) status: Span,
    pub(in super::super) prompt: Span,
    pub(in super::super) draft: EditorView,
    pub(in super::super) help: Option<&'static [(&'static str, &'static str)]>,
    pub(in super::super) keys: Vec<(&'static str, &'static str)>,
}

/// How the screen is divided.
#[derive(Clone, Copy)]
struct Layout {
    list_columns: u16,
    log_columns: usize,
    log_lines: usize,
    compose_lines: usize,
    /// Of the list: two lines each.
    rows: usize,
}

impl Chat {
    fn layout(&self) -> Layout {
        let (columns, lines) = self.size;
        let list_columns = if columns >= LIST_COLUMNS + 1 + LOG_COLUMNS_MIN { LIST_COLUMNS } else { 0 };
        let beside = if list_columns > 0 { list_columns + 1 } else { 0 };
        let log_columns = usize::from(columns.saturating_sub(beside)).max(2);
        let draft = self.open.map_or(1, |index| self.draft_view(index, log_columns).lines.len());
        let compose_lines = draft.clamp(1, COMPOSE_LINES_MAX.min(usize::from(lines / 3).max(1)));
        // Header, title, status, help.
        let log_lines = usize::from(lines).saturating_sub(4 + compose_lines);
        Layout { list_columns, log_columns, log_lines, compose_lines, rows: usize::from(lines.saturating_sub(3)) / 2 }
    }

    fn draft_view(&self, index: usize, columns: usize) -> EditorView {
        self.conversations[index].draft.view(columns.saturating_sub(3))
    }

    /// Conversations as the list has them: the latest activity first.
    pub(super) fn order(&self) -> Vec<usize> {
        let shown = |conversation: &Conversation, index: usize| {
            let known = conversation.kind != v1::ConversationKind::Unspecified || self.open == Some(index);
            let notes = conversation.kind == v1::ConversationKind::Self_;
            !conversation.hidden && known && !(notes && self.open != Some(index) && conversation.head == 0)
        };
        let mut order: Vec<usize> =
            (0..self.conversations.len()).filter(|index| shown(&self.conversations[*index], *index)).collect();
        order.sort_by_cached_key(|index| {
            let conversation = &self.conversations[*index];
            // Notes go last: every change of the list is an entry there.
            let notes = conversation.kind == v1::ConversationKind::Self_;
            let at = conversation.active_at.map_or(i64::MIN, Timestamp::as_millis);
            (notes, std::cmp::Reverse(at), conversation.title())
        });
        order
    }

    /// Whether the view is near enough to the oldest entry on hand that more should be there.
    pub(super) fn is_near_top(&self) -> bool {
        let Some(index) = self.open else { return false };
        let layout = self.layout();
        // A screen more than what is seen.
        let anchor = self.conversations[index].log.anchor;
        self.lines_up(index, anchor, layout.log_columns, layout.log_lines * 2).len() < layout.log_lines * 2
    }

    pub(super) fn page_lines(&self) -> isize {
        isize::try_from(self.layout().log_lines.saturating_sub(2).max(1)).unwrap_or(1)
    }

    fn context<'a>(&'a self, index: usize, columns: usize) -> Context<'a> {
        Context {
            conversation: &self.conversations[index],
            me: self.me.as_ref().map(|(me, _)| me),
            columns,
            utc_offset_seconds: self.utc_offset_seconds,
            new_from: self.new_from,
            selected: match self.mode {
                Mode::Select(seq) => Some(seq),
                _ => None,
            },
        }
    }

    /// Lines upwards from an anchor, the lowest first, until there are enough.
    fn lines_up(&self, index: usize, anchor: Option<Anchor>, columns: usize, enough: usize) -> Vec<Line> {
        let context = self.context(index, columns);
        let log = &self.conversations[index].log;
        let mut lines = Vec::new();
        let mut below = anchor.map_or(0, |anchor| anchor.below);
        if anchor.is_none() {
            let last = log.items().last_key_value().map(|(_, item)| item);
            let blocks = blocks::pending(&context, last);
            lines.extend(blocks.into_iter().flatten().rev());
        }
        let mut items = log.items().range(..=anchor.map_or(u64::MAX, |anchor| anchor.seq)).rev().peekable();
        while let Some((seq, item)) = items.next() {
            if lines.len() >= enough {
                break;
            }
            let block = blocks::entry(&context, *seq, item, items.peek().map(|(_, item)| *item));
            let skipped = std::mem::take(&mut below);
            lines.extend(block.into_iter().rev().skip(skipped));
        }
        lines
    }

    /// Lines of an entry.
    fn height(&self, index: usize, seq: u64, columns: usize) -> usize {
        let log = &self.conversations[index].log;
        let before = log.items().range(..seq).next_back().map(|(_, item)| item);
        log.items().get(&seq).map_or(0, |item| blocks::entry(&self.context(index, columns), seq, item, before).len())
    }

    /// Up if positive, down if negative.
    pub(super) fn scroll(&mut self, by: isize) {
        let Some(index) = self.open else { return };
        let layout = self.layout();
        let columns = layout.log_columns;
        let (up, down) = (usize::try_from(by).unwrap_or(0), usize::try_from(by.saturating_neg()).unwrap_or(0));
        let anchor = self.conversations[index].log.anchor;
        let moved = if up > 0 { self.up(index, anchor, up, layout) } else { self.down(index, anchor, down, columns) };
        self.conversations[index].log.anchor = moved;
    }

    fn up(&self, index: usize, anchor: Option<Anchor>, by: usize, layout: Layout) -> Option<Anchor> {
        let (columns, lines) = (layout.log_columns, layout.log_lines);
        let above = self.lines_up(index, anchor, columns, lines.saturating_add(by).min(1 << 20)).len();
        let by = by.min(above.saturating_sub(lines));
        if by == 0 {
            return anchor;
        }
        let log = &self.conversations[index].log;
        let last = log.items().last_key_value().map(|(seq, _)| *seq)?;
        let mut at = anchor.unwrap_or(Anchor { seq: last, below: 0 });
        let mut left = by;
        if anchor.is_none() {
            let pending = self.pending_lines(index, columns);
            if left <= pending {
                // Hidden sends are all or nothing.
                return Some(at);
            }
            left -= pending;
        }
        at.below += left;
        loop {
            let height = self.height(index, at.seq, columns);
            let before = log.items().range(..at.seq).next_back().map(|(seq, _)| *seq);
            match before {
                Some(seq) if at.below >= height => at = Anchor { seq, below: at.below - height },
                _ => return Some(at),
            }
        }
    }

    fn down(&self, index: usize, anchor: Option<Anchor>, by: usize, columns: usize) -> Option<Anchor> {
        let mut at = anchor?;
        let mut left = by;
        loop {
            if left <= at.below {
                at.below -= left;
                break;
            }
            left -= at.below;
            let next = self.conversations[index].log.items().range(at.seq + 1..).next().map(|(seq, _)| *seq)?;
            at = Anchor { seq: next, below: self.height(index, next, columns) };
        }
        let is_last = at.seq == self.conversations[index].log.last_seq() && at.below == 0;
        (!is_last || self.pending_lines(index, columns) > 0).then_some(at)
    }

    fn pending_lines(&self, index: usize, columns: usize) -> usize {
        let log = &self.conversations[index].log;
        let last = log.items().last_key_value().map(|(_, item)| item);
        blocks::pending(&self.context(index, columns), last).iter().map(Vec::len).sum()
    }

    pub(super) fn go_to_end(&mut self) {
        if let Some(index) = self.open {
            self.conversations[index].log.anchor = None;
        }
    }

    /// Scrolls so that the chosen entry is in view.
    pub(super) fn show_selected(&mut self) {
        let (Some(index), Mode::Select(seq)) = (self.open, &self.mode) else { return };
        let seq = *seq;
        let layout = self.layout();
        let anchor = self.conversations[index].log.anchor;
        if anchor.is_some_and(|anchor| anchor.seq < seq || (anchor.seq == seq && anchor.below > 0)) {
            self.conversations[index].log.anchor = Some(Anchor { seq, below: 0 });
            return;
        }
        let seen = self.lines_up(index, anchor, layout.log_columns, layout.log_lines);
        let seen = seen.iter().take(layout.log_lines).filter(|line| line.selected).count();
        let height = self.height(index, seq, layout.log_columns).min(layout.log_lines);
        if seen < height.min(1) || seen == 0 {
            self.conversations[index].log.anchor = Some(Anchor { seq, below: 0 });
        }
    }

    /// The whole screen.
    pub(in super::super) fn view(&self) -> View {
        let layout = self.layout();
        let (rows, rows_hidden) = self.rows(layout.rows);
        let (lines, title) = match self.open {
            Some(index) => (self.log_lines(index, layout), self.title(index, layout)),
            None => (self.welcome(layout), Vec::new()),
        };
        let (prompt, draft) = self.compose(layout);
        View {
            size: self.size,
            too_small: self.size.0 < SMALLEST.0 || self.size.1 < SMALLEST.1,
            header: self.header(),
            link: self.link_span(),
            list_columns: layout.list_columns,
            rows,
            rows_hidden,
            title,
            lines,
            status: self.status(),
            prompt,
            draft,
            help: (self.mode == Mode::Help).then_some(&keys::HELP[..]),
            keys: match self.mode {
                Mode::Compose => keys::HELP_LINE.to_vec(),
                Mode::Select(_) => vec![("Up Down", "choose a message"), ("Enter", "reply to it"), ("Esc", "cancel")],
                Mode::Open(_) => vec![("Enter", "open"), ("Esc", "cancel")],
                Mode::Help => vec![("any key", "back")],
            },
        }
    }

    fn rows(&self, fit: usize) -> (Vec<Row>, (usize, usize)) {
        let order = self.order();
        let open = self.open.and_then(|open| order.iter().position(|index| *index == open)).unwrap_or(0);
        let first = (open + 1).saturating_sub(fit).min(order.len().saturating_sub(fit));
        let rows = order.iter().skip(first).take(fit).map(|index| {
            let conversation = &self.conversations[*index];
            let open = self.open == Some(*index);
            Row {
                title: conversation.title(),
                preview: conversation.typing_line().unwrap_or_else(|| conversation.preview.clone()),
                unread: conversation.unread,
                mentions: conversation.mentions,
                open,
                typing: conversation.typing_line().is_some(),
                drafted: !open && !conversation.draft.is_empty(),
            }
        });
        (rows.collect(), (first, order.len().saturating_sub(first + fit)))
    }

    fn log_lines(&self, index: usize, layout: Layout) -> Vec<Line> {
        let log = &self.conversations[index].log;
        let mut lines = self.lines_up(index, log.anchor, layout.log_columns, layout.log_lines);
        if lines.len() < layout.log_lines {
            let (said, role) = match (&log.unreadable, log.loading) {
                (Some(why), _) => (format!("this conversation cannot be read: {why}"), Role::Bad),
                (None, Loading::InFlight) => ("loading …".to_owned(), Role::Dim),
                (None, Loading::Failed(_)) => ("could not be loaded; trying again".to_owned(), Role::Warning),
                (None, Loading::No) if !log.opened && !self.is_online() => ("connecting …".to_owned(), Role::Dim),
                (None, Loading::No) if log.opened && log.items().is_empty() => {
                    ("nothing here yet: write the first message".to_owned(), Role::Dim)
                }
                (None, Loading::No) if log.opened && log.older().is_none() => {
                    ("— the beginning —".to_owned(), Role::Dim)
                }
                (None, Loading::No) => (String::new(), Role::Dim),
            };
            let said = text::wrap(&said, layout.log_columns.saturating_sub(2));
            lines.extend(said.into_iter().rev().map(|said| Line::centred(said, role)));
        }
        lines.truncate(layout.log_lines);
        lines.reverse();
        lines
    }

    fn welcome(&self, layout: Layout) -> Vec<Line> {
        let words = match (&self.link, self.listed) {
            (Link::Closed { reason }, _) => reason.clone(),
            (_, true) => "No conversation yet. ^O opens one: @user, me (notes), or a conversation id.".to_owned(),
            (Link::Online { .. }, false) => "loading your conversations …".to_owned(),
            (Link::Connecting { .. } | Link::Away { .. }, false) => "connecting …".to_owned(),
        };
        let words = text::wrap(&words, layout.log_columns.saturating_sub(4));
        words.into_iter().map(|line| Line::centred(line, Role::Dim)).collect()
    }

    fn title(&self, index: usize, layout: Layout) -> Vec<Span> {
        let conversation = &self.conversations[index];
        let mut spans = vec![Span::new(text::cut(&conversation.title(), layout.log_columns / 2), Role::Strong)];
        if conversation.is_group() && !conversation.members.is_empty() {
            let names: Vec<&str> = conversation.members.iter().map(im_proto::UserId::as_str).collect();
            let all = format!("  {} members: {}", names.len(), names.join(", "));
            let room = layout.log_columns.saturating_sub(text::width(&spans[0].text) + 2);
            spans.push(Span::new(text::cut(&all, room), Role::Dim));
        }
        let watched = self.watched.as_ref().is_some_and(|(watched, _)| conversation.peer.as_ref() == Some(watched));
        if let Some((words, online)) = conversation.seen_words(self.now).filter(|_| watched) {
            spans.push(Span::new(format!("  {words}"), if online { Role::Good } else { Role::Dim }));
        }
        spans
    }

    fn header(&self) -> Vec<Span> {
        let mut spans = vec![Span::new(" im ", Role::Strong)];
        if let Some((me, _)) = &self.me {
            spans.push(Span::new(format!("{me}  "), Role::Own));
        }
        let shown = self.conversations.iter().filter(|conversation| !conversation.hidden);
        let (unread, mentions) = shown.fold((0, 0), |(unread, mentions), conversation| {
            (unread + conversation.unread, mentions + conversation.mentions)
        });
        if unread > 0 {
            spans.push(Span::new(format!("{unread} unread"), Role::Strong));
        }
        if mentions > 0 {
            spans.push(Span::new(format!("  @{mentions}"), Role::Mention));
        }
        spans
    }

    fn link_span(&self) -> Span {
        let seconds = |since: &Timestamp| (self.now.as_millis() - since.as_millis()).max(0) / 1000;
        let room = usize::from(self.size.0).saturating_sub(30).max(14);
        match &self.link {
            Link::Connecting { since } => Span::new(format!("◌ connecting {} s ", seconds(since)), Role::Warning),
            Link::Online { endpoint } => {
                let again = if self.losses > 0 { format!(", {}× again", self.losses) } else { String::new() };
                Span::new(format!("● online {}{again} ", text::cut(endpoint, room)), Role::Good)
            }
            Link::Away { since, reason } => {
                let text = format!("◌ reconnecting {} s: {}", seconds(since), text::one_line(reason));
                Span::new(format!("{} ", text::cut(&text, room)), Role::Warning)
            }
            Link::Closed { reason } => {
                Span::new(format!("{} ", text::cut(&format!("✗ {}", text::one_line(reason)), room)), Role::Bad)
            }
        }
    }

    fn status(&self) -> Span {
        if let Some((notice, _)) = &self.notice {
            return Span::new(text::one_line(notice), Role::Warning);
        }
        let Some(index) = self.open else { return Span::new("", Role::Dim) };
        let conversation = &self.conversations[index];
        if let Some(typing) = conversation.typing_line() {
            return Span::new(typing, Role::Good);
        }
        match conversation.log.anchor {
            Some(_) if conversation.unread > 0 => {
                Span::new(format!("↓ {} new below; Esc goes to the end", conversation.unread), Role::Warning)
            }
            Some(_) => Span::new("↓ more below; Esc goes to the end", Role::Dim),
            None => Span::new("", Role::Dim),
        }
    }

    fn compose(&self, layout: Layout) -> (Span, EditorView) {
        if let Mode::Open(editor) = &self.mode {
            let view = editor.view(layout.log_columns.saturating_sub(7));
            return (Span::new("open: ", Role::Key), last_lines(view, 1));
        }
        let Some(index) = self.open else {
            return (Span::new("> ", Role::Dim), EditorView { lines: vec![String::new()], cursor: (0, 0) });
        };
        let prompt = match self.conversations[index].replying {
            Some(_) => Span::new("↳ ", Role::Key),
            None => Span::new("> ", Role::Key),
        };
        (prompt, last_lines(self.draft_view(index, layout.log_columns), layout.compose_lines))
    }
}

/// So many lines around the cursor.
fn last_lines(view: EditorView, most: usize) -> EditorView {
    let EditorView { lines, cursor: (line, cell) } = view;
    let first = (line + 1).saturating_sub(most);
    let lines: Vec<String> = lines.into_iter().skip(first).take(most).collect();
    EditorView { lines, cursor: (line - first, cell) }
}
