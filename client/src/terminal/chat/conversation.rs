//! One conversation as a person sees it: its row in the list, its log, who types, how far others are.

use std::collections::BTreeMap;

use im_proto::{ConversationId, Timestamp, UserId, v1};

use crate::config::Target;

use super::{
    editor::Editor,
    log::{Content, Log, Pending},
    text,
};

/// Milliseconds after which somebody who was typing no longer is, unless it is said again.
const TYPING_MS: i64 = 6_000;
/// People whose typing is kept; more would not fit on a line.
const TYPING_MAX: usize = 16;

/// How far a member is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    pub(super) delivered: u64,
    pub(super) read: u64,
}

#[derive(Debug, Default)]
pub(super) struct Conversation {
    /// `None` until somebody has written in a direct conversation.
    pub(super) id: Option<ConversationId>,
    pub(super) kind: v1::ConversationKind,
    pub(super) name: String,
    pub(super) peer: Option<UserId>,
    /// Whether the peer is there, as far as that is known.
    pub(super) seen: Option<v1::UserPresence>,
    pub(super) head: u64,
    pub(super) unread: u64,
    pub(super) mentions: u64,
    pub(super) read_seq: u64,
    /// Of the newest entry; `None` if it is not known.
    pub(super) active_at: Option<Timestamp>,
    /// The newest message in a few words.
    pub(super) preview: String,
    /// The user is no longer in it, or it turned out to be another one.
    pub(super) hidden: bool,
    /// The place of the one that it turned out to be.
    pub(super) joined_into: Option<usize>,
    pub(super) log: Log,
    pub(super) draft: Editor,
    /// The entry that the draft answers.
    pub(super) replying: Option<u64>,
    pub(super) typing: BTreeMap<UserId, Timestamp>,
    /// Of the others.
    pub(super) cursors: BTreeMap<UserId, Cursor>,
    /// Of a group.
    pub(super) members: Vec<UserId>,
    /// They are known, or on their way.
    pub(super) members_asked: bool,
    /// A read cursor is on its way to the server.
    pub(super) marking: bool,
    /// Not again before this time.
    pub(super) mark_after: Timestamp,
    /// When the server was last told that the user types here.
    pub(super) typing_told: Option<Timestamp>,
}

impl Conversation {
    /// How the server knows it.
    pub(super) fn target(&self) -> Option<Target> {
        match (self.id, &self.peer) {
            _ if self.kind == v1::ConversationKind::Self_ => Some(Target::Me),
            (Some(id), _) => Some(Target::Conversation(id)),
            (None, Some(peer)) => Some(Target::Peer(peer.clone())),
            (None, None) => None,
        }
    }

    /// What people call it.
    pub(super) fn title(&self) -> String {
        let name = text::one_line(&self.name);
        match (&self.peer, self.kind) {
            (_, v1::ConversationKind::Self_) => "me (notes)".to_owned(),
            (Some(peer), _) => format!("@{peer}"),
            (None, _) if !name.trim().is_empty() => format!("#{name}"),
            (None, _) => self.id.map_or_else(String::new, |id| id.to_string().chars().take(8).collect()),
        }
    }

    /// Whether the peer is there, in words, and whether that is so.
    pub(super) fn seen_words(&self, now: Timestamp) -> Option<(String, bool)> {
        let v1::UserPresence { online, last_seen_ms, .. } = self.seen.as_ref()?;
        let minutes = (now.as_millis() - last_seen_ms).max(0) / 60_000;
        let words = match minutes {
            _ if *online => "online".to_owned(),
            _ if *last_seen_ms == 0 => "offline".to_owned(),
            0 => "last seen just now".to_owned(),
            1..60 => format!("last seen {minutes} min ago"),
            60..1_440 => format!("last seen {} h ago", minutes / 60),
            _ => format!("last seen {} d ago", minutes / 1_440),
        };
        Some((words, *online))
    }

    pub(super) fn is_group(&self) -> bool {
        !matches!(self.kind, v1::ConversationKind::Direct | v1::ConversationKind::Self_) && self.peer.is_none()
    }

    /// What the server's list says of it.
    pub(super) fn update(&mut self, row: &v1::ConversationRow) {
        self.id = ConversationId::from_slice(&row.conversation_id).ok().or(self.id);
        self.kind = row.kind();
        self.name.clone_from(&row.name);
        self.peer = UserId::parse(&row.peer_user_id).ok();
        self.hidden = row.left;
        // A list that is older than what came live, or than what was read meanwhile, says nothing new.
        let older = row.head < self.head || row.read_seq < self.read_seq || self.marking;
        self.head = self.head.max(row.head);
        self.read_seq = self.read_seq.max(row.read_seq);
        if !older {
            (self.unread, self.mentions) = (row.unread, row.mentions);
        }
        for cursor in &row.cursors {
            if let Ok(user) = UserId::parse(&cursor.user_id) {
                self.cursor(user, Cursor { delivered: cursor.received_seq, read: cursor.read_seq });
            }
        }
    }

    /// It turned out to be the conversation with this id, of which something was seen already. Nothing that a person wrote in
    /// either is lost.
    pub(super) fn absorb(&mut self, id: ConversationId, seen: Conversation) {
        self.id = Some(id);
        self.log.forget();
        self.log.pending.extend(seen.log.pending);
        if !self.draft.append(seen.draft.text()) {
            // Together they are more than a message may be: it stays where it can be seen.
            self.log.pending.push(Pending {
                local: 0,
                at: seen.active_at.unwrap_or_default(),
                content: Content::Text(seen.draft.text().to_owned()),
                stored: None,
                failed: Some("it is too long to go on with in one draft".to_owned()),
            });
        }
        self.log.pending.sort_by_key(|pending| pending.local);
        self.replying = self.replying.or(seen.replying);
        self.head = self.head.max(seen.head);
        self.read_seq = self.read_seq.max(seen.read_seq);
        (self.unread, self.mentions) = (self.unread + seen.unread, self.mentions + seen.mentions);
        self.active_at = self.active_at.max(seen.active_at);
        self.cursors.extend(seen.cursors);
        if !seen.preview.is_empty() {
            self.preview = seen.preview;
        }
    }

    pub(super) fn types(&mut self, user: &UserId, active: bool, now: Timestamp) {
        if !active {
            self.typing.remove(user);
        } else if self.typing.len() < TYPING_MAX || self.typing.contains_key(user) {
            self.typing.insert(user.clone(), Timestamp::from_millis(now.as_millis().saturating_add(TYPING_MS)));
        }
    }

    /// Forgets who stopped without saying so. True if somebody did.
    pub(super) fn expire_typing(&mut self, now: Timestamp) -> bool {
        let before = self.typing.len();
        self.typing.retain(|_, until| *until > now);
        before != self.typing.len()
    }

    /// "bob is typing".
    pub(super) fn typing_line(&self) -> Option<String> {
        let names: Vec<&str> = self.typing.keys().map(UserId::as_str).collect();
        match names[..] {
            [] => None,
            [one] => Some(format!("{one} is typing …")),
            [one, two] => Some(format!("{one} and {two} are typing …")),
            [one, two, ..] => Some(format!("{one}, {two} and {} more are typing …", names.len() - 2)),
        }
    }

    /// How many of the others have an entry, and have read it.
    pub(super) fn reached(&self, seq: u64) -> (usize, usize) {
        let count = |test: &dyn Fn(&Cursor) -> bool| self.cursors.values().filter(|cursor| test(cursor)).count();
        (count(&|cursor| cursor.delivered.max(cursor.read) >= seq), count(&|cursor| cursor.read >= seq))
    }

    /// Cursors only move forward.
    pub(super) fn cursor(&mut self, user: UserId, moved: Cursor) {
        let cursor = self.cursors.entry(user).or_default();
        cursor.delivered = cursor.delivered.max(moved.delivered).max(moved.read);
        cursor.read = cursor.read.max(moved.read);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> UserId {
        UserId::parse(name).unwrap()
    }

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    #[test]
    fn who_types_is_named_until_told_otherwise_or_for_six_seconds() {
        let mut conversation = Conversation::default();
        conversation.types(&user("bob"), true, at(0));
        conversation.types(&user("carol"), true, at(1_000));
        assert_eq!(conversation.typing_line().unwrap(), "bob and carol are typing …");
        assert!(conversation.expire_typing(at(6_500)));
        assert_eq!(conversation.typing_line().unwrap(), "carol is typing …");
        conversation.types(&user("carol"), false, at(6_600));
        assert_eq!(conversation.typing_line(), None);
    }

    #[test]
    fn cursors_only_move_forward_and_who_read_it_has_it() {
        let mut conversation = Conversation::default();
        conversation.cursor(user("bob"), Cursor { delivered: 5, read: 3 });
        conversation.cursor(user("bob"), Cursor { delivered: 4, read: 2 });
        conversation.cursor(user("carol"), Cursor { delivered: 0, read: 4 });
        assert_eq!(
            (conversation.reached(3), conversation.reached(4), conversation.reached(5)),
            ((2, 2), (2, 1), (1, 0))
        );
    }
}
