//! Hot state of a cluster, in Redis.
//!
//! One task has the connection: it takes what waits, sends it as one pipeline, and hands out the answers, while the next pipeline
//! gathers. No answer, a wrong answer, an error, a full queue, no connection: all of it is *unknown*, told within
//! [`RedisOptions::patience`]. While there is no connection requests are answered at once, and the task tries again with growing pauses.
//! Errors are counted by kind. A server that says that it is the wrong one, a replica above all, is left like one that is gone: behind the
//! address there may be another one by now.
//!
//! It talks to one server, and does not follow a Redis Cluster to the node that has a key.
//!
//! Keys: `PREFIX:h:{HEX}` the head of a conversation, `PREFIX:p:{HEX}` a user's presence, `PREFIX:l:{HEX}:N` what a subject used in its
//! window N; HEX is the id in hexadecimal digits, in braces, so that all keys of one script share a tag, as a proxy that spreads keys
//! over servers needs. Every key expires. A hint is text: its version in 20 digits, two numbers.

mod command;
mod connection;
mod refusal;

use std::{fmt, sync::Arc, time::Duration};

use im_proto::environment::{Clock, Environment};
use metrics::{Counter, Gauge, Histogram};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use self::{
    command::{Counts, Request},
    refusal::Refusals,
};
use super::{Charge, Hint, HintKey, HotState, Limit, SUBJECT_BYTES_MAX};
use crate::model::StoreError;

/// Keys of one request, so that no single one fills a pipeline.
const KEYS_MAX: usize = 256;

/// How to reach Redis.
#[derive(Clone)]
pub struct RedisOptions {
    /// `redis://[user:password@]host:port[/database]`, `rediss://` for TLS by a certificate that this machine trusts.
    pub url: String,
    /// In place of one in the URL.
    pub password: Option<String>,
    /// What all keys begin with: one for each cluster that shares the Redis.
    pub prefix: String,
    /// The most that anybody waits for an answer.
    pub patience: Duration,
    /// A connection that does not answer a pipeline for so long is given up.
    pub response_timeout: Duration,
    pub connect_timeout: Duration,
    /// Requests that may wait; beyond it they are dropped, and reads answered with *unknown*.
    pub queue: usize,
}

impl Default for RedisOptions {
    fn default() -> Self {
        Self {
            url: "redis://127.0.0.1:6379".into(),
            password: None,
            prefix: "im".into(),
            patience: Duration::from_millis(100),
            response_timeout: Duration::from_millis(500),
            connect_timeout: Duration::from_secs(1),
            queue: 16 << 10,
        }
    }
}

impl fmt::Debug for RedisOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The address may hold a password.
        f.debug_struct("RedisOptions").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// The backend. Clones share the connection; with the last one it is closed.
#[derive(Clone)]
pub struct RedisHot {
    requests: mpsc::Sender<Request>,
    patience: Duration,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
}

/// Handles, registered once.
struct Metrics {
    requests: Counter,
    /// Requests that were not answered, whatever the reason.
    unknown: Counter,
    /// Requests that found the queue full.
    dropped: Counter,
    /// Commands that were answered with an error.
    refusals: Refusals,
    connected: Gauge,
    queued: Gauge,
    pipeline_seconds: Histogram,
    pipeline_requests: Histogram,
}

impl Metrics {
    fn new() -> Self {
        let connected = metrics::gauge!("im_storage_redis_connected");
        connected.set(0.0);
        Self {
            requests: metrics::counter!("im_storage_redis_requests_total"),
            unknown: metrics::counter!("im_storage_redis_unknown_total"),
            dropped: metrics::counter!("im_storage_redis_dropped_total"),
            refusals: Refusals::new(),
            connected,
            queued: metrics::gauge!("im_storage_redis_queued_requests"),
            pipeline_seconds: metrics::histogram!("im_storage_redis_pipeline_seconds"),
            pipeline_requests: metrics::histogram!("im_storage_redis_pipeline_requests"),
        }
    }
}

impl RedisHot {
    /// Starts the connection as a task of `environment`. Needs no Redis to be there: until there is one, nothing is known. Errors:
    /// [`StoreError::Open`] for an address that is none.
    pub fn start(options: RedisOptions, environment: &Environment) -> Result<Self, StoreError> {
        let metrics = Arc::new(Metrics::new());
        let (sender, receiver) = mpsc::channel(options.queue.max(1));
        let (patience, clock) = (options.patience, environment.clock.clone());
        let task = connection::Task::new(options, receiver, metrics.clone(), environment.clone())?;
        environment.spawn(task.run());
        Ok(Self { requests: sender, patience, clock, metrics })
    }

    fn send(&self, request: Request) {
        self.metrics.requests.increment(1);
        if self.requests.try_send(request).is_err() {
            self.metrics.dropped.increment(1);
        }
    }

    /// Sends a request that is answered, or not.
    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
        let (sender, answer) = oneshot::channel();
        self.send(request(sender));
        let answer = timeout(self.patience, answer).await.ok().and_then(Result::ok);
        if answer.is_none() {
            self.metrics.unknown.increment(1);
        }
        answer
    }
}

impl fmt::Debug for RedisHot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisHot").finish_non_exhaustive()
    }
}

impl HotState for RedisHot {
    fn raise(&self, hints: Vec<(HintKey, Hint, Duration)>) {
        let mut hints = hints.into_iter().peekable();
        while hints.peek().is_some() {
            self.send(Request::Raise(hints.by_ref().take(KEYS_MAX).collect()));
        }
    }

    async fn read(&self, keys: Vec<HintKey>) -> Vec<Option<Hint>> {
        let part = async |keys: &[HintKey]| {
            let read = self.ask(|answer| Request::Read { keys: keys.to_vec(), answer }).await;
            read.unwrap_or_else(|| vec![None; keys.len()])
        };
        let parts = futures::future::join_all(keys.chunks(KEYS_MAX).map(part)).await;
        parts.into_iter().flatten().collect()
    }

    async fn charge(&self, subject: &str, cost: u32, limit: Limit) -> Charge {
        if subject.len() > SUBJECT_BYTES_MAX {
            return Charge::Unknown;
        }
        let now = self.clock.now();
        let (window, lifetime) = (limit.window_of(now), limit.lifetime());
        let counted =
            self.ask(|answer| Request::Count { subject: subject.to_owned(), cost, window, lifetime, answer }).await;
        match counted {
            Some(Counts { current, previous }) => limit.judge(now, current, previous),
            None => Charge::Unknown,
        }
    }
}
