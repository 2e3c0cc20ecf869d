//! What the server says: entries, signals, the state of the session, and the answers to what was asked.

use im_proto::{ConversationId, UserId, v1};

use crate::{
    client::{Page, Sent},
    error::CallError,
    event::{Entry, Event},
};

use super::{
    super::{
        conversation::{Conversation, Cursor},
        log::{Content, Item, Loading},
        text,
    },
    AGAIN_MS, Chat, Link,
};

/// Cells of a preview that are kept; no list is wider.
const PREVIEW_CELLS: usize = 80;

impl Chat {
    pub(super) fn event(&mut self, event: Event) {
        match event {
            Event::Message(entry) => self.message(&entry),
            Event::Gone { .. } => self.want_list(),
            Event::Unreadable { conversation, status } => {
                if let Some(index) = self.by_id.get(&conversation) {
                    self.conversations[*index].log.unreadable = Some(status.to_string());
                }
            }
            Event::Signal(signal) => self.signal(&signal),
            Event::Presence(users) => self.seen(users),
            Event::Connected { endpoint } => {
                if let Link::Away { since, .. } = &self.link {
                    let seconds = (self.now.as_millis() - since.as_millis()).max(0) / 1000;
                    self.notify(format!("connected again after {seconds} s, nothing is lost"));
                }
                self.link = Link::Online { endpoint };
            }
            Event::Resynced => {
                self.list_due = Some(self.now);
                for conversation in &mut self.conversations {
                    conversation.members_asked = !conversation.members.is_empty();
                    if conversation.log.loading != Loading::InFlight {
                        conversation.log.loading = Loading::No;
                    }
                }
            }
            Event::Disconnected { reason } => {
                self.losses += 1;
                self.link = Link::Away { since: self.now, reason };
            }
            Event::Closed(reason) => self.link = Link::Closed { reason: reason.to_string() },
        }
    }

    fn message(&mut self, entry: &Entry) {
        let index = match self.by_id.get(&entry.conversation) {
            Some(index) => *index,
            None => {
                self.want_list();
                self.of_id(entry.conversation)
            }
        };
        if self.me.as_ref().is_some_and(|(_, own_log)| *own_log == entry.conversation) {
            self.own_log_entry(entry);
        }
        let item = self.item(entry);
        let now = self.now;
        let conversation = &mut self.conversations[index];
        if entry.seq > conversation.head {
            conversation.head = entry.seq;
            conversation.active_at = Some(entry.sent_at);
            describe(conversation, &item);
            if item.counts {
                conversation.unread += 1;
                conversation.mentions += u64::from(item.mentions_me);
            }
        }
        if let Some(sender) = entry.sender.clone().filter(|_| !entry.own) {
            conversation.types(&sender, false, now);
            if conversation.cursors.contains_key(&sender) {
                conversation.cursor(sender, Cursor { delivered: entry.seq, read: entry.seq });
            }
        }
        if item.own {
            settle(conversation, entry.seq, &item);
        }
        conversation.log.arrived(entry.seq, item);
    }

    /// The user's own log says which conversations there are.
    fn own_log_entry(&mut self, entry: &Entry) {
        use v1::{body::Content as Body, system_event::Event as Happened};
        let Some(Body::Event(event)) = entry.decode_body().and_then(|body| body.content) else { return };
        match event.event {
            Some(Happened::ConversationJoined(joined)) => {
                let Ok(id) = ConversationId::from_slice(&joined.conversation_id) else { return };
                let index = match UserId::parse(&joined.peer_user_id) {
                    Ok(peer) => self.join(id, &peer),
                    Err(_) => self.of_id(id),
                };
                let conversation = &mut self.conversations[index];
                conversation.kind = joined.kind();
                conversation.name = joined.name;
                conversation.hidden = false;
                conversation.active_at = conversation.active_at.max(Some(entry.sent_at));
            }
            Some(Happened::ConversationLeft(left)) => {
                let id = ConversationId::from_slice(&left.conversation_id).ok();
                if let Some(index) = id.and_then(|id| self.by_id.get(&id)) {
                    self.conversations[*index].hidden = true;
                }
            }
            _ => {}
        }
    }

    fn signal(&mut self, signal: &v1::Signal) {
        use v1::signal::{Signal, Target};
        let Ok(sender) = UserId::parse(&signal.sender) else { return };
        let own = self.me.as_ref().is_some_and(|(me, _)| *me == sender);
        let index = match &signal.target {
            Some(Target::ConversationId(id)) => {
                ConversationId::from_slice(id).ok().and_then(|id| self.by_id.get(&id).copied())
            }
            Some(Target::PeerUserId(_)) | None => self.by_peer.get(&sender).copied(),
        };
        let Some(index) = index else { return };
        let now = self.now;
        let conversation = &mut self.conversations[index];
        match &signal.signal {
            Some(Signal::Typing(typing)) if !own => conversation.types(&sender, typing.active, now),
            Some(Signal::Receipt(receipt)) if !own => {
                conversation.cursor(sender, Cursor { delivered: receipt.received_seq, read: receipt.read_seq });
            }
            // Another device of this user has read on.
            Some(Signal::Receipt(receipt)) if receipt.read_seq > conversation.read_seq => {
                conversation.read_seq = receipt.read_seq;
                if conversation.head <= conversation.read_seq {
                    (conversation.unread, conversation.mentions) = (0, 0);
                } else {
                    self.want_list();
                }
            }
            _ => {}
        }
    }

    /// Who is there, and who is not.
    pub(super) fn seen(&mut self, users: Vec<v1::UserPresence>) {
        for user in users {
            if let Some(index) = self.by_peer.get(user.user_id.as_str()) {
                self.conversations[*index].seen = Some(user);
            }
        }
    }

    pub(super) fn on_list(&mut self, outcome: Result<Vec<v1::ConversationRow>, CallError>) {
        self.list_in_flight = false;
        let rows = match outcome {
            Ok(rows) => rows,
            Err(error) => {
                if self.is_online() {
                    self.notify(format!("no list: {error}"));
                }
                self.list_due = Some(self.later(AGAIN_MS));
                return;
            }
        };
        for row in &rows {
            let Ok(id) = ConversationId::from_slice(&row.conversation_id) else { continue };
            let index = match UserId::parse(&row.peer_user_id) {
                Ok(peer) => self.join(id, &peer),
                Err(_) => self.of_id(id),
            };
            self.conversations[index].update(row);
            let me = self.me.as_ref().map(|(me, _)| me);
            let newest = row.preview.clone().and_then(|message| Entry::from_wire(message, 0, me));
            let conversation = &mut self.conversations[index];
            if let Some(entry) = newest.filter(|entry| Some(entry.sent_at) >= conversation.active_at) {
                conversation.active_at = Some(entry.sent_at);
                let item = Item::new(&entry, me);
                describe(conversation, &item);
            }
        }
        if let (false, Some(open)) = (self.listed, self.open) {
            let conversation = &self.conversations[open];
            self.new_from = (conversation.unread > 0).then_some(conversation.read_seq + 1);
        }
        self.listed = true;
        if self.open.is_none() && self.wanted.is_none() {
            let first = self.order().first().copied();
            if let Some(index) = first {
                self.open(index);
            }
        }
    }

    pub(super) fn on_page(&mut self, index: usize, outcome: Result<Page, CallError>) {
        let again_at = self.later(AGAIN_MS);
        let mut is_useful = self.conversations[index].log.answered();
        match outcome {
            Ok(page) => {
                let peer = self.conversations[index].peer.clone();
                if let (None, Some(peer)) = (self.conversations[index].id, peer) {
                    self.join(page.conversation, &peer);
                    // Of what came before that was known, nothing was kept.
                    is_useful &= self.conversations[index].head <= page.head;
                }
                let items: Vec<(u64, Item)> = page.entries.iter().map(|entry| (entry.seq, self.item(entry))).collect();
                let conversation = &mut self.conversations[index];
                conversation.head = conversation.head.max(page.head);
                if let Some((_, item)) = items.last().filter(|(seq, _)| *seq == conversation.head) {
                    conversation.active_at = conversation.active_at.max(Some(item.at));
                    describe(conversation, item);
                }
                if is_useful {
                    conversation.log.loaded(items, page.first_seq);
                }
            }
            Err(_) if !is_useful => {}
            Err(error) => {
                let conversation = &mut self.conversations[index];
                conversation.log.load_failed(again_at, error.code(), error.to_string());
                if conversation.id.is_none() && conversation.peer.is_some() {
                    // Nobody has written yet: that is no error.
                    conversation.log.unreadable = None;
                }
            }
        }
    }

    pub(super) fn on_members(&mut self, index: usize, outcome: Result<Vec<v1::GroupMember>, CallError>) {
        // Without them nobody can be mentioned; the rest goes on, and the next sync asks again.
        let Ok(members) = outcome else { return };
        let users = members.iter().filter_map(|member| UserId::parse(&member.user_id).ok());
        self.conversations[index].members = users.collect();
    }

    pub(super) fn on_sent(&mut self, index: usize, local: u64, outcome: Result<Sent, String>) {
        let index = self.place_now(index);
        match outcome {
            Ok(sent) => {
                let peer = self.conversations[index].peer.clone();
                if let (None, Some(peer)) = (self.conversations[index].id, peer) {
                    self.join(sent.conversation, &peer);
                }
                let conversation = &mut self.conversations[index];
                let there = conversation.log.items().contains_key(&sent.seq);
                let pending = &mut conversation.log.pending;
                if there {
                    pending.retain(|pending| pending.local != local);
                } else if let Some(pending) = pending.iter_mut().find(|pending| pending.local == local) {
                    // Its entry comes as soon as all before it have.
                    pending.stored = Some(sent.seq);
                }
            }
            Err(error) => {
                self.notify(format!("not sent: {error}"));
                let conversation = &mut self.conversations[index];
                let place = conversation.log.pending.iter().position(|pending| pending.local == local);
                let Some(place) = place else { return };
                if conversation.draft.is_empty() && conversation.replying.is_none() {
                    let pending = conversation.log.pending.remove(place);
                    conversation.draft.insert(pending.content.words());
                    if let Content::Reply(to, _) = pending.content {
                        conversation.replying = Some(to);
                    }
                } else {
                    conversation.log.pending[place].failed = Some(error);
                }
            }
        }
    }

    pub(super) fn on_marked(&mut self, index: usize, outcome: Result<v1::MarkReadReply, CallError>) {
        let again_at = self.later(AGAIN_MS);
        let conversation = &mut self.conversations[index];
        conversation.marking = false;
        match outcome {
            Ok(reply) => {
                conversation.read_seq = conversation.read_seq.max(reply.read_seq);
                if conversation.head <= conversation.read_seq {
                    (conversation.unread, conversation.mentions) = (0, 0);
                }
            }
            Err(_) => {
                conversation.mark_after = again_at;
                // What is unread is not known any more.
                self.want_list();
            }
        }
    }
}

/// An own entry is there: the send that it was is done.
fn settle(conversation: &mut Conversation, seq: u64, item: &Item) {
    let pending = &mut conversation.log.pending;
    let same = pending.iter().position(|pending| pending.stored == Some(seq)).or_else(|| {
        pending
            .iter()
            .position(|pending| pending.stored.is_none() && pending.failed.is_none() && pending.content == item.content)
    });
    if let Some(place) = same {
        pending.remove(place);
    }
}

/// The newest message in a few words.
fn describe(conversation: &mut Conversation, item: &Item) {
    let words = text::cut(&text::one_line(item.content.words()), PREVIEW_CELLS);
    conversation.preview = match (&item.content, &item.sender) {
        (Content::Note(_), _) | (_, None) => words,
        _ if item.own => format!("you: {words}"),
        (_, Some(sender)) if conversation.is_group() => format!("{sender}: {words}"),
        _ => words,
    };
}
