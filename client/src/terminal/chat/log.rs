//! The part of a conversation's log that is on hand, and where the view of it stands.
//!
//! Invariants:
//! - The entries are without a hole; whatever would leave one drops what is older, which is loaded again on demand.
//! - At most [`ENTRIES_MAX`] entries; beyond it nothing older is loaded (`im history` has it all).
//! - The view stands at the end, or on a line of an entry, and stays there when others arrive.

use std::collections::BTreeMap;

use im_proto::{StatusCode, Timestamp, UserId, v1};

use crate::event::Entry;

use super::text;

/// Entries kept of one conversation: some megabytes of ordinary texts.
pub(super) const ENTRIES_MAX: usize = 10_000;
/// Entries kept that come while the newest page is on its way. Beyond it the oldest are dropped, and loaded on demand like any other.
const EARLY_MAX: usize = 100;
/// Sends without an outcome that are kept, in one conversation. Refused beyond it: nobody types that fast.
pub(super) const PENDING_MAX: usize = 200;

/// Of [`Entry::flags`].
const FLAG_COUNTS: u32 = 1;

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Text(String),
    /// An answer to the entry at this seq.
    Reply(u64, String),
    /// Something that happened, told in the third person.
    Note(String),
    /// A kind of message that a terminal cannot show.
    Other(String),
}

impl Content {
    /// The words of a message.
    pub(super) fn words(&self) -> &str {
        match self {
            Content::Text(text) | Content::Reply(_, text) | Content::Note(text) | Content::Other(text) => text,
        }
    }
}

/// An entry as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) sender: Option<UserId>,
    pub(super) own: bool,
    pub(super) at: Timestamp,
    pub(super) content: Content,
    /// It mentions this user, or everybody.
    pub(super) mentions_me: bool,
    /// It counts as unread until it was read.
    pub(super) counts: bool,
}

impl Item {
    pub(super) fn new(entry: &Entry, me: Option<&UserId>) -> Self {
        let (content, mentions_me) = if entry.gone_reason != 0 {
            (Content::Note(gone(entry.gone_reason).to_owned()), false)
        } else {
            content(entry, me)
        };
        let counts = entry.flags & FLAG_COUNTS != 0 && !entry.own;
        Self { sender: entry.sender.clone(), own: entry.own, at: entry.sent_at, content, mentions_me, counts }
    }
}

fn gone(reason: u32) -> &'static str {
    match reason {
        1 => "a message was recalled",
        2 => "a message has expired",
        3 => "a message was removed",
        _ => "a message is gone",
    }
}

fn content(entry: &Entry, me: Option<&UserId>) -> (Content, bool) {
    use v1::body::Content as Body;
    let Some(body) = entry.decode_body() else {
        return (Content::Other("a message that this version cannot read".to_owned()), false);
    };
    match body.content {
        Some(Body::Text(words)) => {
            let mentioned = mentions(&words, me);
            (Content::Text(text::clean(&words.text)), mentioned)
        }
        Some(Body::Quote(quote)) => {
            let words = quote.text.unwrap_or_default();
            let mentioned = mentions(&words, me);
            (Content::Reply(quote.seq, text::clean(&words.text)), mentioned)
        }
        Some(Body::Event(event)) => (Content::Note(happened(event)), false),
        Some(Body::Image(media)) => (attached("image", &media), false),
        Some(Body::Video(media)) => (attached("video", &media), false),
        Some(Body::Audio(media)) => (attached("audio", &media), false),
        Some(Body::File(media)) => (attached("file", &media), false),
        Some(Body::Sticker(sticker)) if !sticker.emoji.is_empty() => {
            (Content::Text(text::clean(&sticker.emoji)), false)
        }
        Some(Body::Location(place)) => {
            let words =
                format!("[location] {} {:.5}, {:.5}", place.name, place.latitude_degrees, place.longitude_degrees);
            (Content::Other(text::one_line(&words)), false)
        }
        Some(Body::Contact(card)) => {
            (Content::Other(text::one_line(&format!("[contact] @{} {}", card.user_id, card.display_name))), false)
        }
        content => {
            let kind = im_proto::body::type_name(&v1::Body { content });
            (Content::Other(format!("[{kind}]")), false)
        }
    }
}

fn attached(kind: &str, media: &v1::Media) -> Content {
    Content::Other(text::one_line(&format!("[{kind}] {} ({} bytes) {}", media.name, media.size_bytes, media.url)))
}

fn mentions(words: &v1::Text, me: Option<&UserId>) -> bool {
    use v1::mention::Whom;
    words.mentions.iter().any(|mention| match &mention.whom {
        Some(Whom::All(all)) => *all,
        Some(Whom::UserId(user)) => me.is_some_and(|me| me.as_str() == user),
        None => false,
    })
}

fn happened(event: v1::SystemEvent) -> String {
    use v1::system_event::Event;
    let people = |users: &[String]| match users {
        [] => "nobody".to_owned(),
        users if users.len() > 5 => format!("{} and {} more", users[..4].join(", "), users.len() - 4),
        users => users.join(", "),
    };
    let said = match event.event {
        Some(Event::GroupCreated(group)) => {
            format!("{} created the group “{}” with {}", group.creator, group.name, people(&group.members))
        }
        Some(Event::ChannelCreated(channel)) => format!("{} created the channel “{}”", channel.creator, channel.name),
        Some(Event::MembersJoined(joined)) if joined.members == [joined.invited_by.clone()] => {
            format!("{} joined", joined.invited_by)
        }
        Some(Event::MembersJoined(joined)) => format!("{} invited {}", joined.invited_by, people(&joined.members)),
        Some(Event::MemberLeft(left)) => format!("{} left", left.user_id),
        Some(Event::ConversationJoined(joined)) if joined.peer_user_id.is_empty() => {
            format!("you came into “{}”", joined.name)
        }
        Some(Event::ConversationJoined(joined)) => format!("a conversation with @{} began", joined.peer_user_id),
        Some(Event::ConversationLeft(_)) => "you left a conversation".to_owned(),
        Some(Event::VisibilityChanged(changed)) if changed.invisible => "others see you offline from now on".to_owned(),
        Some(Event::VisibilityChanged(_)) => "others see again when you are online".to_owned(),
        None => "something happened that this version does not know".to_owned(),
    };
    text::one_line(&said)
}

/// A message on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    pub(super) local: u64,
    pub(super) at: Timestamp,
    pub(super) content: Content,
    /// Its place, once that is known and its entry has not come yet.
    pub(super) stored: Option<u64>,
    /// Why it was not sent.
    pub(super) failed: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loading {
    /// Nothing was asked for.
    No,
    InFlight,
    /// Not again before this time.
    Failed(Timestamp),
}

/// Where the lowest line of the view is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Anchor {
    pub(super) seq: u64,
    /// Lines of that entry below the view.
    pub(super) below: usize,
}

#[derive(Debug)]
pub(super) struct Log {
    items: BTreeMap<u64, Item>,
    pub(super) pending: Vec<Pending>,
    /// Whether the newest page was loaded.
    pub(super) opened: bool,
    pub(super) loading: Loading,
    /// The page that is on its way is one of a log that was forgotten meanwhile.
    outdated: bool,
    /// What came while the newest page was on its way. That may have been read before.
    early: BTreeMap<u64, Item>,
    /// The first seq that the server still has.
    first_kept: u64,
    /// `None`: at the end.
    pub(super) anchor: Option<Anchor>,
    /// Why the log cannot be read.
    pub(super) unreadable: Option<String>,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            items: BTreeMap::new(),
            pending: Vec::new(),
            opened: false,
            loading: Loading::No,
            outdated: false,
            early: BTreeMap::new(),
            first_kept: 1,
            anchor: None,
            unreadable: None,
        }
    }
}

impl Log {
    pub(super) fn items(&self) -> &BTreeMap<u64, Item> {
        &self.items
    }

    pub(super) fn last_seq(&self) -> u64 {
        self.items.last_key_value().map_or(0, |(seq, _)| *seq)
    }

    fn first_seq(&self) -> Option<u64> {
        self.items.first_key_value().map(|(seq, _)| *seq)
    }

    /// The last seq that is still to be loaded, if any and if there is room.
    pub(super) fn older(&self) -> Option<u64> {
        let first = self.first_seq()?;
        (first > self.first_kept.max(1) && self.items.len() < ENTRIES_MAX).then(|| first - 1)
    }

    /// An entry that came live. Before the newest page was asked for nothing is kept: the page will have it.
    pub(super) fn arrived(&mut self, seq: u64, item: Item) {
        if !self.opened {
            if self.loading == Loading::InFlight {
                self.early.insert(seq, item);
            }
            if self.early.len() > EARLY_MAX {
                self.early.pop_first();
            }
            return;
        }
        let last = self.last_seq();
        if !self.items.is_empty() && seq > last + 1 {
            self.items.clear();
            self.anchor = None;
        }
        if self.first_seq().is_none_or(|first| seq >= first) {
            self.items.insert(seq, item);
        }
        while self.items.len() > ENTRIES_MAX && self.anchor.is_none() {
            self.items.pop_first();
        }
    }

    /// There is an answer to what was asked for. False if it is of no use, and is to be asked for anew.
    pub(super) fn answered(&mut self) -> bool {
        self.loading = Loading::No;
        !std::mem::take(&mut self.outdated)
    }

    /// A page that ends right before what is on hand, or the newest page.
    pub(super) fn loaded(&mut self, page: impl IntoIterator<Item = (u64, Item)>, first_kept: u64) {
        self.loading = Loading::No;
        self.opened = true;
        self.unreadable = None;
        self.first_kept = first_kept;
        let page: BTreeMap<u64, Item> = page.into_iter().collect();
        match (page.last_key_value().map(|(seq, _)| *seq), self.first_seq()) {
            (Some(last), Some(first)) if last + 1 < first => {}
            (Some(_), _) => self.items.extend(page),
            // Nothing is kept below.
            (None, Some(first)) => self.first_kept = self.first_kept.max(first),
            (None, None) => {}
        }
        for (seq, item) in std::mem::take(&mut self.early) {
            self.arrived(seq, item);
        }
    }

    pub(super) fn load_failed(&mut self, again_at: Timestamp, status: Option<StatusCode>, why: String) {
        let definite = matches!(
            status,
            Some(StatusCode::NotFound | StatusCode::NotAMember | StatusCode::Forbidden | StatusCode::Malformed)
        );
        if definite {
            self.opened = true;
            self.loading = Loading::No;
            self.unreadable = Some(why);
        } else {
            self.loading = Loading::Failed(again_at);
        }
    }

    /// Gives memory back; it is loaded again when it is opened. A page that is on its way then does not open it: it may be an old one.
    pub(super) fn forget(&mut self) {
        let outdated = self.loading == Loading::InFlight;
        self.start_over();
        if outdated {
            (self.loading, self.outdated) = (Loading::InFlight, true);
        }
    }

    /// As it was before anything was asked for. A page that is on its way is as good as the one that is asked for now.
    pub(super) fn start_over(&mut self) {
        *self = Self { pending: std::mem::take(&mut self.pending), ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(text: &str) -> Item {
        Item {
            sender: None,
            own: false,
            at: Timestamp::from_millis(0),
            content: Content::Text(text.to_owned()),
            mentions_me: false,
            counts: true,
        }
    }

    fn seqs(log: &Log) -> Vec<u64> {
        log.items().keys().copied().collect()
    }

    #[test]
    fn pages_and_live_entries_make_one_log_without_holes_and_without_doubles() {
        let mut log = Log::default();
        log.arrived(9, item("before it was opened"));
        assert_eq!(seqs(&log), [0_u64; 0]);
        log.loaded([(8, item("a")), (9, item("b")), (10, item("c"))], 1);
        log.arrived(10, item("c"));
        log.arrived(11, item("d"));
        assert_eq!(seqs(&log), [8, 9, 10, 11]);
        assert_eq!(log.older(), Some(7));
        log.loaded((1..=7).map(|seq| (seq, item("x"))), 1);
        assert_eq!((seqs(&log), log.older()), ((1..=11).collect(), None));
        log.arrived(20, item("after a hole"));
        assert_eq!((seqs(&log), log.older()), (vec![20], Some(19)));
        log.loaded([(3, item("too old"))], 1);
        assert_eq!(seqs(&log), [20]);
    }

    #[test]
    fn what_comes_before_the_newest_page_follows_it_within_a_bound_and_without_a_hole() {
        let more = EARLY_MAX as u64 + 7;
        for (last, expected) in [(10, 10 - 2..=13), (more, more - 2..=more)] {
            let mut log = Log { loading: Loading::InFlight, ..Log::default() };
            (9..=13).for_each(|seq| log.arrived(seq, item("early")));
            log.loaded((last - 2..=last).map(|seq| (seq, item("page"))), 1);
            assert_eq!(seqs(&log), expected.collect::<Vec<_>>());
        }
        let mut log = Log { loading: Loading::InFlight, ..Log::default() };
        (11..=10 + more).for_each(|seq| log.arrived(seq, item("early")));
        log.loaded([(10, item("page"))], 1);
        assert_eq!((seqs(&log), log.older()), ((18..=10 + more).collect(), Some(17)));
    }

    #[test]
    fn what_is_no_longer_kept_is_not_asked_for_again() {
        let mut log = Log::default();
        log.loaded([(8, item("a"))], 8);
        assert_eq!(log.older(), None);
        let mut log = Log::default();
        log.loaded([(8, item("a"))], 1);
        log.loaded([], 1);
        assert_eq!(log.older(), None);
    }

    #[test]
    fn a_log_is_bounded() {
        let mut log = Log::default();
        log.loaded([(1, item("a"))], 1);
        for seq in 2..=(ENTRIES_MAX as u64 + 10) {
            log.arrived(seq, item("b"));
        }
        assert_eq!(log.items().len(), ENTRIES_MAX);
        assert_eq!((log.last_seq(), log.older()), (ENTRIES_MAX as u64 + 10, None));
    }

    #[test]
    fn bodies_of_every_kind_have_a_line() {
        let bytes = im_proto::body::encode(v1::body::Content::Quote(v1::Quote {
            seq: 3,
            text: Some(v1::Text {
                text: "hi\x1b[0m".to_owned(),
                mentions: vec![v1::Mention { whom: Some(v1::mention::Whom::All(true)), ..v1::Mention::default() }],
            }),
        }));
        let message = v1::Message {
            conversation_id: im_proto::ConversationId::from_slice(&[1; 16]).unwrap().to_bytes(),
            seq: 4,
            sender: "bob".to_owned(),
            body: bytes,
            kind: v1::EntryKind::Message.into(),
            flags: FLAG_COUNTS,
            ..v1::Message::default()
        };
        let mut entry = Entry::from_wire(message, 0, None).unwrap();
        let item = Item::new(&entry, None);
        assert_eq!((item.content, item.mentions_me, item.counts), (Content::Reply(3, "hi[0m".to_owned()), true, true));
        entry.body = bytes::Bytes::from_static(&[0xff]);
        assert!(matches!(Item::new(&entry, None).content, Content::Other(_)));
        entry.gone_reason = 1;
        assert!(matches!(Item::new(&entry, None).content, Content::Note(_)));
    }
}
