//! Reading history: to close gaps of followed conversations, and to look for one's own sends when the server cannot tell.

use bytes::Bytes;
use im_proto::{ConversationId, StatusCode, limits, method::Method, v1};
use prost::Message as _;
use tokio::time::Instant;

use crate::{
    calls::{Purpose, Request},
    config::Target,
    conversation::HistoryPage,
    core::Core,
    error::Status,
    pending::{LaneId, Outcome, SearchWanted},
};

/// Entries of one page. A page of usual messages is some ten kilobytes, so that pages of several conversations interleave well.
const PAGE_ENTRIES: usize = 500;

/// A search through the log for the sends of a lane.
pub(crate) struct Search {
    lane: LaneId,
    target: Target,
    next: u64,
}

/// A target on the wire. One's own log must have been resolved to its id.
pub(crate) fn wire_target(target: &Target) -> v1::Target {
    let target = match target {
        Target::Conversation(id) => Some(v1::target::Target::ConversationId(id.to_bytes())),
        Target::Peer(user) => Some(v1::target::Target::PeerUserId(user.as_str().to_owned())),
        Target::Me => None,
    };
    v1::Target { target }
}

impl Core {
    /// Asks for what is missing, as far as the application has room for it.
    pub(crate) fn start_fetches(&mut self, now: Instant) {
        loop {
            let wanted = self.conversations.next_fetch(&mut self.events);
            // Entries of the own log that came before the sync pass here, and name conversations that are behind, too.
            let is_list_changed = self.apply_own_log(now);
            match wanted {
                Some(wanted) => {
                    let limit = self.events.room().min(PAGE_ENTRIES);
                    let target = Target::Conversation(wanted.conversation);
                    self.request_history(&target, wanted.from, limit, Purpose::CatchUp(wanted.conversation));
                }
                None if is_list_changed => {}
                None => return,
            }
        }
    }

    fn request_history(&mut self, target: &Target, from: u64, limit: usize, purpose: Purpose) {
        let request = v1::HistoryRequest {
            target: Some(wire_target(target)),
            from: i64::try_from(from).unwrap_or(i64::MAX),
            to: 0,
            limit: u32::try_from(limit).unwrap_or(limits::HISTORY_ENTRIES_MAX),
            newest: false,
        };
        let request = Bytes::from(request.encode_to_vec());
        self.calls.push(Request { method: Method::MessageHistory, request, purpose });
    }

    fn history_page(&self, reply: Result<Bytes, Status>) -> Result<HistoryPage, Status> {
        let reply = v1::HistoryReply::decode(reply?).map_err(|_| Status::from_code(StatusCode::Internal))?;
        Ok(HistoryPage::from_wire(reply, self.me()))
    }

    /// The answer to a fetch.
    pub(crate) fn caught_up(&mut self, id: ConversationId, reply: Result<Bytes, Status>, now: Instant) {
        match self.history_page(reply) {
            Ok(page) => self.conversations.fetched(id, page, &mut self.events, now),
            Err(status) => self.conversations.fetch_failed(id, status, &mut self.events, now),
        }
        self.apply_own_log(now);
    }

    /// Starts the next search, one at a time.
    pub(crate) fn start_search(&mut self) {
        if self.search.is_none()
            && let Some(SearchWanted { lane, target, from }) = self.sends.next_search()
        {
            self.search = Some(Search { lane, target, next: from });
            self.request_search_page();
        }
    }

    fn request_search_page(&mut self) {
        let Some(search) = &self.search else { return };
        let (target, next, lane) = (search.target.clone(), search.next, search.lane);
        self.request_history(&target, next, limits::HISTORY_ENTRIES_MAX as usize, Purpose::Search(lane));
    }

    /// A page of a search.
    pub(crate) fn search_replied(&mut self, lane: LaneId, reply: Result<Bytes, Status>, now: Instant) {
        let page = self.history_page(reply);
        let Some(mut search) = self.search.take().filter(|search| search.lane == lane) else { return };
        let page = match page {
            Ok(page) => page,
            Err(status) => return self.sends.search_failed(lane, status, now),
        };
        let before = search.next;
        search.next = search.next.max(page.first_seq);
        let mut found = Vec::new();
        for entry in &page.entries {
            if entry.seq != search.next {
                break;
            }
            search.next += 1;
            found.extend(self.sends.recognise(entry).map(|number| (number, entry.seq, entry.sent_at)));
        }
        let done = search.next > page.head;
        let id = match (page.conversation, &search.target) {
            (Some(id), _) | (None, &Target::Conversation(id)) => Some(id),
            (None, _) => None,
        };
        let Some(id) = id.filter(|_| done || search.next > before) else {
            return self.sends.search_failed(lane, Status::from_code(StatusCode::Unavailable), now);
        };
        // Each page counts: if the next one cannot be read, the search goes on after this one.
        let outcomes = self.sends.searched(lane, id, &found, search.next - 1, done, now);
        if !done {
            self.search = Some(search);
            self.request_search_page();
        }
        outcomes.into_iter().for_each(|outcome| self.stored(outcome, now));
    }

    /// A send is durable: its entry joins the event stream.
    pub(crate) fn stored(&mut self, outcome: Outcome, now: Instant) {
        let Outcome::Stored(stored) = outcome else { return };
        if let Target::Peer(user) = &stored.target {
            self.sends.alias(&stored.target, stored.conversation, now);
            self.conversations.learn_peer(user, stored.conversation);
        }
        if let Some(me) = self.me().cloned() {
            self.conversations.arrived(stored.into_entry(me), &mut self.events);
            self.apply_own_log(now);
        }
    }
}
