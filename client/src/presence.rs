//! Whom the application watches: the server forgets it with the session, so it is told again after each sync.
//!
//! What changes waits here until the application has room for it, the newest for each user: nothing of it is lost, and it is bounded
//! by the number of those who are watched.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use im_proto::{StatusCode, UserId, method::Method, v1};
use prost::Message as _;
use tokio::time::Instant;

use crate::{
    calls::{Purpose, Request},
    config::Backoff,
    core::Core,
    error::Status,
    event::{Event, EventSink},
};

/// Waiting times after a subscription that the server could not take.
const RETRY: Backoff = Backoff { base: Duration::from_millis(500), max: Duration::from_secs(10) };

#[derive(Default)]
pub(crate) struct Watching {
    users: Vec<UserId>,
    /// When to subscribe again.
    at: Option<Instant>,
    running: bool,
    retries: u32,
    /// What the server said last of each.
    known: BTreeMap<String, v1::UserPresence>,
    /// What the application has to be told.
    news: BTreeMap<String, v1::UserPresence>,
}

impl Watching {
    /// The application watches these users from now on. It subscribes by itself, once; the client only does it again.
    pub(crate) fn watch(&mut self, users: Vec<UserId>) {
        self.users = users;
        self.known.clear();
        self.news.clear();
    }

    /// The server may have forgotten whom the application watches.
    pub(crate) fn want(&mut self, now: Instant) {
        if !self.users.is_empty() {
            self.at = Some(now);
        }
    }

    /// When to subscribe again.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.at.filter(|_| !self.running)
    }

    pub(crate) fn disconnected(&mut self) {
        (self.at, self.running, self.retries) = (None, false, 0);
    }

    /// A user came or went.
    pub(crate) fn told(&mut self, user: &str, presence: v1::Presence) {
        let v1::Presence { online, last_seen_ms } = presence;
        self.learn(v1::UserPresence { user_id: user.to_owned(), online, last_seen_ms, invisible: false });
    }

    fn learn(&mut self, user: v1::UserPresence) {
        if !self.users.iter().any(|watched| watched.as_str() == user.user_id) {
            return;
        }
        let known = self.known.insert(user.user_id.clone(), user.clone());
        // Somebody who is still there is no news.
        if known.is_none_or(|known| known != user && !(known.online && user.online)) {
            self.news.insert(user.user_id.clone(), user);
        }
    }

    /// Tells the application what there is, if it has room.
    pub(crate) fn tell(&mut self, events: &mut EventSink) {
        if self.has_news() && events.room() > 0 {
            let news = std::mem::take(&mut self.news).into_values().collect();
            // There is room.
            let _ = events.deliver(Event::Presence(news));
        }
    }

    /// Whether anything waits for room.
    pub(crate) fn has_news(&self) -> bool {
        !self.news.is_empty()
    }
}

impl Core {
    /// Subscribes again if that is due.
    pub(crate) fn start_watching(&mut self, now: Instant) {
        if self.watching.due().is_none_or(|at| at > now) {
            return;
        }
        (self.watching.at, self.watching.running) = (None, true);
        let user_ids = self.watching.users.iter().map(UserId::to_string).collect();
        let request = Bytes::from(v1::PresenceSubscribeRequest { user_ids }.encode_to_vec());
        self.calls.push(Request { method: Method::PresenceSubscribe, request, purpose: Purpose::Watch });
    }

    /// The server has answered.
    pub(crate) fn watching_replied(&mut self, reply: Result<Bytes, Status>, now: Instant) {
        self.watching.running = false;
        let reply = reply.and_then(|bytes| {
            v1::PresenceSubscribeReply::decode(bytes).map_err(|_| Status::from_code(StatusCode::Malformed))
        });
        match reply {
            Ok(reply) => {
                self.watching.retries = 0;
                reply.users.into_iter().for_each(|user| self.watching.learn(user));
            }
            Err(status) if status.is_transient() => {
                let delay = RETRY.delay(self.watching.retries, &self.environment).max(status.retry_after);
                self.watching.retries += 1;
                let at = now + delay;
                self.watching.at = Some(self.watching.at.map_or(at, |earlier| earlier.min(at)));
            }
            // An older server, or users that it does not take: the application was told when it asked.
            Err(status) => tracing::debug!(%status, "presence is not watched any more"),
        }
    }
}
