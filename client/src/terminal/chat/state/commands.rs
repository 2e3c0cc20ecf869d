//! What a person does: writing, sending, choosing, scrolling.

use im_proto::{UserId, body, v1};

use crate::config::Target;

use super::{
    super::{
        editor::{Editor, Move, TEXT_BYTES_MAX},
        keys::Command,
        log::{Content, PENDING_MAX, Pending},
    },
    Chat, Effect, Mode, TYPING_AGAIN_MS,
};

impl Chat {
    pub(super) fn command(&mut self, command: Command) {
        let drafting = !self.draft_is_empty();
        match (&mut self.mode, command) {
            (_, Command::Quit) => {
                self.stop_typing();
                self.effects.push(Effect::Quit);
            }
            (_, Command::Redraw) => self.effects.push(Effect::Redraw),
            (_, Command::Suspend) => self.effects.push(Effect::Suspend),
            (Mode::Help, _) => self.mode = Mode::Compose,
            (_, Command::Help) => self.mode = Mode::Help,
            (Mode::Select(_), Command::Up) => self.select(false),
            (Mode::Select(_), Command::Down) => self.select(true),
            (Mode::Select(seq), Command::Submit | Command::Reply) => {
                let seq = *seq;
                self.mode = Mode::Compose;
                if let Some(index) = self.open {
                    self.conversations[index].replying = Some(seq);
                }
            }
            (Mode::Select(_) | Mode::Open(_), Command::Cancel) => self.mode = Mode::Compose,
            (Mode::Open(editor), Command::Submit) => {
                let text = editor.take();
                self.open_named(text.trim());
            }
            (_, Command::Cancel) => self.cancel(),
            (_, Command::Open) => self.mode = Mode::Open(Editor::default()),
            (_, Command::Reply) => self.begin_reply(),
            (_, Command::NextConversation) => self.step(1),
            (_, Command::PreviousConversation) => self.step(-1),
            (Mode::Compose, Command::NextUnread) if !drafting => self.next_unread(),
            (_, Command::NextUnread) => self.edit(|editor| editor.delete(Move::LineStart)),
            (_, Command::Up) => self.scroll(1),
            (_, Command::Down) => self.scroll(-1),
            (_, Command::PageUp) => self.scroll(self.page_lines()),
            (_, Command::PageDown) => self.scroll(-self.page_lines()),
            (_, Command::Top) => self.scroll(isize::MAX),
            (_, Command::Bottom) => self.go_to_end(),
            (_, Command::Insert(c)) => self.insert(c.encode_utf8(&mut [0; 4])),
            (_, Command::Newline) => self.insert("\n"),
            (_, Command::Go(to)) => self.edit(|editor| editor.go(to)),
            (_, Command::Delete(to)) => self.edit(|editor| editor.delete(to)),
            (_, Command::Submit) => self.submit(),
        }
    }

    fn draft_is_empty(&self) -> bool {
        self.open.is_none_or(|index| self.conversations[index].draft.is_empty())
    }

    /// The editor that has the cursor.
    fn edit(&mut self, change: impl FnOnce(&mut Editor)) {
        match (&mut self.mode, self.open) {
            (Mode::Open(editor), _) => change(editor),
            (_, Some(index)) => change(&mut self.conversations[index].draft),
            (_, None) => {}
        }
    }

    pub(super) fn insert(&mut self, text: &str) {
        match &mut self.mode {
            Mode::Help => self.mode = Mode::Compose,
            Mode::Open(editor) => {
                editor.insert(&text.replace(['\n', '\r'], " "));
                return;
            }
            Mode::Select(_) => self.mode = Mode::Compose,
            Mode::Compose => {}
        }
        let Some(index) = self.open else {
            self.notify("none is open: ^O opens @user, me or an id");
            return;
        };
        if !self.conversations[index].draft.insert(text) {
            self.notify(format!("left out: a message has at most {TEXT_BYTES_MAX} bytes"));
            return;
        }
        self.tell_typing(index);
    }

    fn tell_typing(&mut self, index: usize) {
        let now = self.now;
        let online = self.is_online();
        let conversation = &mut self.conversations[index];
        let recent = conversation.typing_told.is_some_and(|told| now.as_millis() - told.as_millis() < TYPING_AGAIN_MS);
        // To nobody in one's own log, to too many in a channel.
        let quiet = matches!(conversation.kind, v1::ConversationKind::Self_ | v1::ConversationKind::Channel);
        let to_others = !quiet && conversation.head > 0;
        if !online || recent || !to_others {
            return;
        }
        if let Some(target) = conversation.target() {
            conversation.typing_told = Some(now);
            self.effects.push(Effect::Typing { target, active: true });
        }
    }

    /// Of the open conversation, if others were told that the user types.
    pub(super) fn stop_typing(&mut self) {
        let Some(index) = self.open else { return };
        let conversation = &mut self.conversations[index];
        if conversation.typing_told.take().is_some()
            && let Some(target) = conversation.target()
        {
            self.effects.push(Effect::Typing { target, active: false });
        }
    }

    fn cancel(&mut self) {
        let Some(index) = self.open else { return };
        if self.conversations[index].replying.take().is_none() {
            self.go_to_end();
        }
    }

    fn submit(&mut self) {
        let Some(index) = self.open else { return self.insert("") };
        let conversation = &mut self.conversations[index];
        if conversation.draft.text().trim().is_empty() {
            return;
        }
        if conversation.log.pending.len() >= PENDING_MAX {
            return self.notify(format!("it stays here: {PENDING_MAX} messages wait for the server"));
        }
        let Some(target) = conversation.target() else { return };
        let text = conversation.draft.take();
        let text = text.trim_end().to_owned();
        let mentions = mentions(&text, conversation.is_group(), &conversation.members);
        let words = v1::Text { text: text.clone(), mentions };
        let (content, wire) = match conversation.replying.take() {
            Some(seq) => {
                let quote = v1::Quote { seq, text: Some(words) };
                (Content::Reply(seq, text), v1::body::Content::Quote(quote))
            }
            None => (Content::Text(text), v1::body::Content::Text(words)),
        };
        self.next_local += 1;
        let local = self.next_local;
        conversation.log.pending.push(Pending { local, at: self.now, content, stored: None, failed: None });
        conversation.log.anchor = None;
        conversation.typing_told = None;
        self.new_from = None;
        self.effects.push(Effect::Send { index, local, target, body: body::encode(wire) });
    }

    fn open_named(&mut self, text: &str) {
        let named = if text.is_empty() { None } else { Some(text.parse::<Target>()) };
        match named {
            None => self.mode = Mode::Compose,
            Some(Ok(target)) => {
                self.mode = Mode::Compose;
                self.wanted = Some(target);
                self.open_wanted();
            }
            Some(Err(_)) => {
                self.mode = Mode::Compose;
                self.notify(format!("write @user, me or a conversation id; {text:?} names nobody"));
            }
        }
    }

    /// Goes to the next or the previous conversation of the list.
    fn step(&mut self, by: isize) {
        let order = self.order();
        if order.is_empty() {
            return;
        }
        let here = self.open.and_then(|open| order.iter().position(|index| *index == open));
        let length = isize::try_from(order.len()).unwrap_or(isize::MAX);
        let next = match here {
            Some(here) => (isize::try_from(here).unwrap_or(0) + by).rem_euclid(length),
            None => 0,
        };
        self.open(order[usize::try_from(next).unwrap_or(0)]);
    }

    fn next_unread(&mut self) {
        let order = self.order();
        let unread = |index: &&usize| self.conversations[**index].unread > 0 && self.open != Some(**index);
        let mentioned = order.iter().filter(unread).find(|index| self.conversations[**index].mentions > 0);
        match mentioned.or_else(|| order.iter().find(unread)).copied() {
            Some(index) => self.open(index),
            None => self.notify("nothing is unread"),
        }
    }

    fn begin_reply(&mut self) {
        let Some(index) = self.open else { return };
        let newest = self.selectable(index).next_back();
        match newest {
            Some(seq) => {
                self.mode = Mode::Select(seq);
                self.show_selected();
            }
            None => self.notify("there is no message to reply to"),
        }
    }

    fn select(&mut self, later: bool) {
        let (Some(index), Mode::Select(seq)) = (self.open, &self.mode) else { return };
        let seq = *seq;
        let next = if later {
            self.selectable(index).find(|other| *other > seq)
        } else {
            self.selectable(index).rfind(|other| *other < seq)
        };
        if let Some(next) = next {
            self.mode = Mode::Select(next);
        }
        self.show_selected();
    }

    fn selectable(&self, index: usize) -> impl DoubleEndedIterator<Item = u64> {
        let items = self.conversations[index].log.items().iter();
        items.filter(|(_, item)| !matches!(item.content, Content::Note(_))).map(|(seq, _)| *seq)
    }
}

/// `@name` of a member and `@all`, where a word begins.
fn mentions(text: &str, group: bool, members: &[UserId]) -> Vec<v1::Mention> {
    let mut found = Vec::new();
    if !group {
        return found;
    }
    let mut before = ' ';
    for (at, c) in text.char_indices() {
        let starts = c == '@' && !before.is_alphanumeric();
        before = c;
        if !starts {
            continue;
        }
        let word = text[at + 1..].split(char::is_whitespace).next().unwrap_or_default();
        // "@bob," and "@bob." name bob, unless somebody is called so.
        let mut names = std::iter::successors(Some(word), |word| {
            word.strip_suffix(|c: char| !c.is_alphanumeric()).filter(|shorter| !shorter.is_empty())
        });
        let whom = names.find_map(|name| {
            let whom = if members.iter().any(|member| member.as_str() == name) {
                v1::mention::Whom::UserId(name.to_owned())
            } else if name == "all" {
                v1::mention::Whom::All(true)
            } else {
                return None;
            };
            Some((whom, name.len() + 1))
        });
        if let Some((whom, length)) = whom {
            let (Ok(offset_bytes), Ok(length_bytes)) = (u32::try_from(at), u32::try_from(length)) else { continue };
            found.push(v1::Mention { whom: Some(whom), offset_bytes, length_bytes });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_and_all_are_mentioned_where_a_word_begins() {
        let members: Vec<UserId> = ["bob", "carol.x"].iter().map(|name| UserId::parse(name).unwrap()).collect();
        let found = mentions("@bob, mail a@bob or (@carol.x) @nobody @all!", true, &members);
        let ranges: Vec<(u32, u32)> = found.iter().map(|found| (found.offset_bytes, found.length_bytes)).collect();
        assert_eq!(ranges, [(0, 4), (21, 8), (39, 4)]);
        assert_eq!(found[2].whom, Some(v1::mention::Whom::All(true)));
        assert!(mentions("@bob", false, &members).is_empty());
    }
}
