//! Whom the application watches: the server forgets it with the session, so it is told again after each sync.
//!
//! What changes waits here until the application has room for it, the newest for each user: nothing of it is lost, and it is bounded
//! by the number of those who are watched.
//!
//! One subscription is under way at a time, so that the server has the last one last. Of several that the application asks for meanwhile
//! only the newest is made.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use im_proto::{StatusCode, UserId, method::Method, v1};
use prost::Message as _;
use tokio::{sync::oneshot, time::Instant};

use crate::{
    calls::{Purpose, Request},
    config::Backoff,
    core::Core,
    error::{CallError, ClosedReason, Status},
    event::{Event, EventSink},
};

/// Waiting times after a subscription that the server could not take.
const RETRY: Backoff = Backoff { base: Duration::from_millis(500), max: Duration::from_secs(10) };

/// Where the application waits for how it is.
pub(crate) type WatchAnswer = oneshot::Sender<Result<Vec<v1::UserPresence>, CallError>>;

#[derive(Default)]
pub(crate) struct Watching {
    users: Vec<UserId>,
    /// Of the application's last call.
    number: u64,
    answer: Option<WatchAnswer>,
    /// When to subscribe.
    at: Option<Instant>,
    /// The subscription that is under way is for the users of this call.
    running: Option<u64>,
    retries: u32,
    /// What the application was told last of each, or is about to be.
    known: BTreeMap<String, v1::UserPresence>,
    /// What the application has to be told.
    news: BTreeMap<String, v1::UserPresence>,
}

impl Watching {
    /// The application watches these users from now on. Of those whom it watched before events may be waiting for it: what differs from
    /// them it is told again.
    pub(crate) fn watch(&mut self, users: Vec<UserId>, answer: WatchAnswer, now: Instant) {
        if let Some(former) = self.answer.replace(answer) {
            let _ = former.send(Err(CallError::Replaced));
        }
        self.number += 1;
        self.users = users;
        (self.at, self.retries) = (Some(now), 0);
        let is_watched = |user: &String| self.users.iter().any(|watched| watched.as_str() == user);
        self.known.retain(|user, _| is_watched(user));
        self.news.retain(|user, _| is_watched(user));
    }

    /// The server may have forgotten whom the application watches.
    pub(crate) fn want(&mut self, now: Instant) {
        if !self.users.is_empty() || self.answer.is_some() {
            self.at = Some(now);
        }
    }

    /// When to subscribe again.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.at.filter(|_| self.running.is_none())
    }

    pub(crate) fn disconnected(&mut self) {
        (self.at, self.running, self.retries) = (None, None, 0);
    }

    /// The client is over: nobody will answer.
    pub(crate) fn close(&mut self, reason: &ClosedReason) {
        if let Some(answer) = self.answer.take() {
            let _ = answer.send(Err(CallError::Closed(reason.clone())));
        }
    }

    /// What the server answers. Who asked for these users is told so, and learns by an event only what differs from an earlier one.
    fn answered(&mut self, number: Option<u64>, users: Vec<v1::UserPresence>) {
        let answer = self.answer.take_if(|_| number == Some(self.number));
        for user in &users {
            if answer.is_some() && !self.known.contains_key(&user.user_id) {
                self.known.insert(user.user_id.clone(), user.clone());
            } else {
                self.learn(user.clone());
            }
        }
        if let Some(answer) = answer {
            // The caller may have lost interest.
            let _ = answer.send(Ok(users));
        }
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
        (self.watching.at, self.watching.running) = (None, Some(self.watching.number));
        let user_ids = self.watching.users.iter().map(UserId::to_string).collect();
        let request = Bytes::from(v1::PresenceSubscribeRequest { user_ids }.encode_to_vec());
        self.calls.push(Request { method: Method::PresenceSubscribe, request, purpose: Purpose::Watch });
    }

    /// The server has answered.
    pub(crate) fn watching_replied(&mut self, reply: Result<Bytes, Status>, now: Instant) {
        let number = self.watching.running.take();
        let is_last = number == Some(self.watching.number);
        let reply = reply.and_then(|bytes| {
            v1::PresenceSubscribeReply::decode(bytes).map_err(|_| Status::from_code(StatusCode::Malformed))
        });
        match reply {
            Ok(reply) => {
                self.watching.retries = 0;
                self.watching.answered(number, reply.users);
            }
            // Others are asked for now.
            Err(_) if !is_last => {}
            Err(status) if status.is_transient() => {
                let delay = RETRY.delay(self.watching.retries, &self.environment).max(status.retry_after);
                self.watching.retries += 1;
                let at = now + delay;
                self.watching.at = Some(self.watching.at.map_or(at, |earlier| earlier.min(at)));
            }
            Err(status) => {
                // An older server, or users that it does not take.
                tracing::debug!(%status, "presence is not watched");
                if let Some(answer) = self.watching.answer.take() {
                    let _ = answer.send(Err(CallError::Refused(status)));
                }
            }
        }
    }
}
