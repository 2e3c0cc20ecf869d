//! Calls to etcd: each with a deadline, on one member at a time, and on the next one if that fails.
//!
//! Every call that goes through here may be attempted several times and may take effect although it failed: all transactions of
//! this backend are written so that a repeat does no harm.
//!
//! The client is given one endpoint at a time, because with several it would spread calls over live and dead ones alike.

use std::{
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use etcd_client::{Client, ConnectOptions, Error};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};
use tonic::Code;

use super::{lineage::Origin, metrics::Metrics};
use crate::RegistryError;

/// Members that one call tries at most.
const ATTEMPTS: usize = 3;

/// Why a call gave no answer.
#[derive(Debug)]
pub(super) enum CallError {
    /// Nobody answered: it may or may not have taken effect.
    Unavailable(String),
    /// The call names a lease that this etcd does not know.
    LeaseNotFound,
    /// The revision asked for was compacted away.
    Compacted,
    /// etcd refused it, and would again.
    Rejected(String),
    /// This is not the registry that it was, see `lineage`.
    Refused(String),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Unavailable(why) | CallError::Rejected(why) | CallError::Refused(why) => f.write_str(why),
            CallError::LeaseNotFound => f.write_str("the lease is not known"),
            CallError::Compacted => f.write_str("the revision was compacted"),
        }
    }
}

impl From<CallError> for RegistryError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(why) => RegistryError::Refused(why),
            error => RegistryError::Unavailable(error.to_string()),
        }
    }
}

struct Member {
    url: String,
    client: Mutex<Option<Client>>,
}

pub(super) struct Transport {
    members: Vec<Member>,
    /// Index of the member in use.
    current: AtomicUsize,
    options: ConnectOptions,
    pub(super) timeout: Duration,
    pub(super) metrics: Arc<Metrics>,
}

/// A connection to one member, to be reported if it fails.
pub(super) struct Connected {
    pub(super) client: Client,
    member: usize,
}

impl Transport {
    pub(super) fn new(urls: &[String], options: ConnectOptions, timeout: Duration, metrics: Arc<Metrics>) -> Self {
        let members = urls.iter().map(|url| Member { url: url.clone(), client: Mutex::default() }).collect();
        Self { members, current: AtomicUsize::new(0), options, timeout, metrics }
    }

    /// A connection to the member in use.
    pub(super) async fn connected(&self) -> Result<Connected, CallError> {
        let member = self.current.load(Ordering::Relaxed) % self.members.len();
        self.connect(member).await
    }

    async fn connect(&self, index: usize) -> Result<Connected, CallError> {
        let member = &self.members[index];
        let mut slot = member.client.lock().await;
        if let Some(client) = &*slot {
            return Ok(Connected { client: client.clone(), member: index });
        }
        let connecting = Client::connect([&member.url], Some(self.options.clone()));
        let client = match timeout(self.timeout, connecting).await {
            Ok(Ok(client)) => client,
            Ok(Err(error)) => return Err(self.explain(index, &error)),
            Err(_) => return Err(CallError::Unavailable(format!("{} does not answer", member.url))),
        };
        *slot = Some(client.clone());
        Ok(Connected { client, member: index })
    }

    /// Forgets a connection that failed and goes on with the next member, unless somebody did already.
    pub(super) async fn failed(&self, connected: &Connected) {
        self.leave(connected.member).await;
    }

    /// Goes on with the next member.
    pub(super) async fn next_member(&self) {
        self.leave(self.current.load(Ordering::Relaxed) % self.members.len()).await;
    }

    async fn leave(&self, index: usize) {
        let next = (index + 1) % self.members.len();
        let switched = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        *self.members[index].client.lock().await = None;
        if switched && next != index {
            self.metrics.endpoint_switches.increment(1);
            tracing::warn!(from = %self.members[index].url, to = %self.members[next].url, "an etcd member failed, using the next");
        }
    }

    /// The endpoints of the members.
    pub(super) fn urls(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| member.url.as_str())
    }

    /// Asks one certain member, once.
    pub(super) async fn ask<T, F>(&self, index: usize, operation: impl Fn(Client) -> F + Send) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        self.attempt(index, &operation).await
    }

    /// Runs a call until a member answers it, on at most [`ATTEMPTS`] members (or twice on an only one).
    pub(super) async fn call<T, F>(&self, operation: impl Fn(Client) -> F + Send) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        let mut last = CallError::Unavailable("no member of etcd was tried".to_owned());
        for _ in 0..self.members.len().clamp(2, ATTEMPTS) {
            let index = self.current.load(Ordering::Relaxed) % self.members.len();
            match self.attempt(index, &operation).await {
                Ok(answer) => return Ok(answer),
                Err(CallError::Unavailable(why)) => {
                    self.metrics.call_failures.increment(1);
                    self.leave(index).await;
                    last = CallError::Unavailable(why);
                }
                Err(definite) => return Err(definite),
            }
        }
        Err(last)
    }

    async fn attempt<T, F>(&self, index: usize, operation: impl Fn(Client) -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        let connected = self.connect(index).await?;
        let started = Instant::now();
        match timeout(self.timeout, operation(connected.client)).await {
            Ok(Ok(answer)) => {
                self.metrics.call_seconds.record(started.elapsed().as_secs_f64());
                Ok(answer)
            }
            Ok(Err(error)) => Err(self.explain(index, &error)),
            Err(_) => {
                let url = &self.members[index].url;
                Err(CallError::Unavailable(format!("{url} did not answer within {:?}", self.timeout)))
            }
        }
    }

    /// What an error of the client means.
    pub(super) fn explain_at(&self, connected: &Connected, error: &Error) -> CallError {
        self.explain(connected.member, error)
    }

    fn explain(&self, index: usize, error: &Error) -> CallError {
        let url = &self.members[index].url;
        match error {
            // What the client makes of a renewal that is answered with a TTL of 0.
            Error::LeaseKeepAliveError(why) if why.contains("not found") => CallError::LeaseNotFound,
            Error::GRpcStatus(status) => match status.code() {
                Code::NotFound if status.message().contains("lease") => CallError::LeaseNotFound,
                Code::OutOfRange if status.message().contains("compacted") => CallError::Compacted,
                Code::InvalidArgument
                | Code::NotFound
                | Code::AlreadyExists
                | Code::PermissionDenied
                | Code::FailedPrecondition
                | Code::OutOfRange
                | Code::Unimplemented => CallError::Rejected(format!("{url} refused the call: {}", status.message())),
                _ => CallError::Unavailable(format!("{url}: {}", status.message())),
            },
            error => CallError::Unavailable(format!("{url}: {error}")),
        }
    }
}

/// Where an answer comes from. Every answer of etcd says it.
pub(super) fn origin(header: Option<&etcd_client::ResponseHeader>) -> Result<Origin, CallError> {
    let header = header.ok_or_else(|| CallError::Unavailable("an answer without a header".to_owned()))?;
    Ok(Origin { etcd_cluster: header.cluster_id(), revision: u64::try_from(header.revision()).unwrap_or(0) })
}
