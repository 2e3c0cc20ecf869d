//! A gRPC channel to whatever live instance of a role: fed by the registry, balanced, with ejection, deadlines and a retry budget.
//!
//! It is a `tower` service like tonic's own channel, so generated clients are made over it:
//!
//! ```ignore
//! let channel = BalancedChannel::new(registry.view(), ChannelOptions::new(Role::Router, "api"), environment);
//! let mut messages = MessageServiceClient::new(channel.clone());
//! ```
//!
//! `examples/api.rs` is a whole program.
//!
//! - Each call goes to the less loaded of two random instances ([power of two choices](https://doi.org/10.1109/71.963420)).
//! - A call for which no connection could be made was not sent, and goes to another instance. One that may have arrived is repeated
//!   only if the caller put [`Idempotent`] into its extensions. Both within the retry budget.
//! - Each call ends by its deadline: the caller's (`Request::set_timeout`) or the channel's. A stream that is meant to stay has
//!   [`LongLived`] in its extensions and only the caller's, if any.
//! - An instance that fails several times in a row, or cannot be connected to, gets no calls for a while. A router that answers the
//!   status `unavailable` is not failing: it says that somebody else, the owner or the store, cannot answer now.
//!
//! It does not send calls to a *certain* instance (an owner of a shard): links do that (docs/adr/0006).

mod body;
mod budget;
mod health;
mod members;
mod metrics;

use std::{
    error::Error,
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, HeaderValue, Request, Response};
use im_proto::{StatusCode, environment::Environment, status::GRPC_METADATA};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tonic::{Code, ConnectError, Status, body::Body, transport::ClientTlsConfig};
use tower_service::Service;

use self::{
    body::{Tape, Watched},
    budget::Budget,
    health::Outcome,
    members::{InFlight, Member, Members},
};
use crate::{Role, View};

pub use health::Ejection;

/// In a request's extensions: doing it twice is as good as once, so it may be repeated although it may have arrived.
#[derive(Clone, Copy, Debug)]
pub struct Idempotent;

/// In a request's extensions: it stays open for as long as it likes.
#[derive(Clone, Copy, Debug)]
pub struct LongLived;

/// Whom a channel reaches, and how patiently.
#[derive(Clone, Debug)]
pub struct ChannelOptions {
    pub role: Role,
    /// Which endpoint of an instance, by its transport: `api`, `link`.
    pub transport: String,
    pub tls: Option<ClientTlsConfig>,
    /// For a call that brings no deadline of its own.
    pub deadline: Duration,
    /// For one attempt of a call that can be repeated: leaves time for another.
    pub attempt: Duration,
    /// Attempts of one call, the first included.
    pub attempts: usize,
    pub connect_timeout: Duration,
    /// A connection with calls on it is asked for a sign of life after so long, and given up after as long again.
    pub ping: Duration,
    /// Retries per call, over all calls, and how many at once.
    pub retry_ratio: f64,
    pub retry_burst: u32,
    pub ejection: Ejection,
    /// How often the view is taken over without having changed.
    pub reconcile_interval: Duration,
}

impl ChannelOptions {
    /// With defaults for calls that take milliseconds: an answer that is not there after 2 s comes from elsewhere or not at all.
    pub fn new(role: Role, transport: &str) -> Self {
        Self {
            role,
            transport: transport.to_owned(),
            tls: None,
            deadline: Duration::from_secs(5),
            attempt: Duration::from_secs(2),
            attempts: 3,
            connect_timeout: Duration::from_secs(1),
            ping: Duration::from_secs(2),
            retry_ratio: 0.1,
            retry_burst: 10,
            ejection: Ejection::default(),
            reconcile_interval: Duration::from_secs(30),
        }
    }
}

/// The channel. Clones share members, health and budget.
#[derive(Clone)]
pub struct BalancedChannel {
    members: Arc<Members>,
    budget: Arc<Budget>,
    /// Ends the task that follows the view when the last clone is dropped.
    _task: Arc<watch::Sender<()>>,
}

impl BalancedChannel {
    /// Follows `view` in a task of `environment`.
    pub fn new(view: watch::Receiver<Arc<View>>, options: ChannelOptions, environment: Environment) -> Self {
        let budget = Arc::new(Budget::new(options.retry_ratio, options.retry_burst));
        let members = Arc::new(Members::new(options, environment.clone()));
        members.reconcile(&view.borrow());
        let task = watch::Sender::new(());
        environment.spawn(follow(members.clone(), view, task.subscribe()));
        Self { members, budget, _task: Arc::new(task) }
    }

    async fn run(self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (mut head, body) = request.into_parts();
        let options = self.members.options();
        let idempotent = head.extensions.get::<Idempotent>().is_some();
        let limit = match (head.extensions.get::<LongLived>(), timeout_of(&head.headers)) {
            (Some(_), own) => own,
            (None, Some(own)) => Some(own),
            (None, None) => {
                // The server shall drop what nobody waits for, but not answer before the deadline does.
                head.headers.insert(TIMEOUT_HEADER, timeout_header(options.deadline + GRACE));
                Some(options.deadline)
            }
        };
        let deadline = limit.map(|limit| Instant::now() + limit);
        let tape = Tape::new(body);
        let mut tried: Vec<Arc<Member>> = Vec::new();
        self.budget.deposit();
        self.members.metrics().calls.increment(1);
        loop {
            let Some(member) = self.members.pick(&tried) else {
                return Err(Status::unavailable(format!("no instance of the role {:?} is left to ask", options.role)));
            };
            let attempt_limit = idempotent.then(|| Instant::now() + options.attempt);
            let until = [deadline, attempt_limit].into_iter().flatten().min();
            let request = Request::from_parts(head.clone(), tape.hand_out());
            let failure = match self.attempt(&member, request, until, deadline).await {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            self.members.metrics().failures.increment(1);
            self.members.note(&member, failure.outcome);
            tried.push(member);
            let unsent = failure.outcome == Outcome::NotConnected;
            let repeatable = tape.is_whole() && (unsent || idempotent);
            let late = deadline.is_some_and(|deadline| deadline <= Instant::now());
            if !repeatable || late || tried.len() >= options.attempts {
                return failure.answer;
            }
            if !self.budget.withdraw() {
                self.members.metrics().retries_refused.increment(1);
                return failure.answer;
            }
            self.members.metrics().retries.increment(1);
        }
    }

    /// Sends the request to one instance. What comes back with `Ok` goes to the caller.
    async fn attempt(
        &self,
        member: &Arc<Member>,
        request: Request<Body>,
        until: Option<Instant>,
        deadline: Option<Instant>,
    ) -> Result<Response<Body>, Failure> {
        let in_flight = InFlight::at(member);
        let mut channel = member.channel.clone();
        let sending = async {
            poll_fn(|context| channel.poll_ready(context)).await?;
            channel.call(request).await
        };
        let answered = match until {
            Some(until) => timeout_at(until, sending).await,
            None => Ok(sending.await),
        };
        let response = match answered {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                let outcome = if was_not_sent(&error) { Outcome::NotConnected } else { Outcome::Failed };
                return Err(Failure { outcome, answer: Err(Status::from_error(Box::new(error))) });
            }
            Err(_) => {
                let status = Status::deadline_exceeded(format!("{} did not answer in time", member.id));
                return Err(Failure { outcome: Outcome::Failed, answer: Err(status) });
            }
        };
        if is_unavailable(response.headers()) {
            return Err(Failure { outcome: outcome_of(response.headers()), answer: Ok(response) });
        }
        let sleep = deadline.map(|deadline| Box::pin(sleep_until(deadline)));
        let members = self.members.clone();
        Ok(response.map(|body| Body::new(Watched { body, deadline: sleep, in_flight, members, told: false })))
    }
}

impl Service<Request<Body>> for BalancedChannel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Status>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.clone().run(request))
    }
}

/// An attempt without the answer that was asked for.
struct Failure {
    /// What it tells of the instance. If it could not be connected to, no byte of the call left this process.
    outcome: Outcome,
    /// What the caller gets if this was the last attempt.
    answer: Result<Response<Body>, Status>,
}

async fn follow(members: Arc<Members>, mut view: watch::Receiver<Arc<View>>, mut stop: watch::Receiver<()>) {
    loop {
        let now = view.borrow_and_update().clone();
        members.reconcile(&now);
        tokio::select! {
            biased;
            _ = stop.changed() => return,
            changed = view.changed() => {
                if changed.is_err() {
                    // The registry is gone: what is known stays.
                    return;
                }
            }
            () = sleep(members.options().reconcile_interval) => {}
        }
    }
}

/// Whether an error says that there was no connection to send on.
fn was_not_sent(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<ConnectError>() {
            return true;
        }
        next = error.source();
    }
    false
}

/// Whether headers or trailers carry the gRPC status "unavailable".
fn is_unavailable(headers: &HeaderMap) -> bool {
    let code = headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()));
    code == Some(Code::Unavailable)
}

/// What the end of a call tells of the instance that answered. One that names the status `unavailable` is well and speaks of others:
/// while the shards of a dead router have no owner, every router answers so, and to leave them for it would leave nobody.
fn outcome_of(headers: &HeaderMap) -> Outcome {
    let of_others = StatusCode::Unavailable.number();
    let named = headers.get(GRPC_METADATA).and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    if is_unavailable(headers) && named != Some(of_others) { Outcome::Failed } else { Outcome::Answered }
}

const TIMEOUT_HEADER: &str = "grpc-timeout";
/// How long a server goes on with a call after its caller has given up without saying so.
const GRACE: Duration = Duration::from_secs(1);

/// The deadline that a request brings along: at most 8 digits and a unit.
fn timeout_of(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(TIMEOUT_HEADER)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3_600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

fn timeout_header(limit: Duration) -> HeaderValue {
    // 8 digits of milliseconds are 27 hours.
    let millis = limit.as_millis().clamp(1, 99_999_999);
    HeaderValue::try_from(format!("{millis}m")).unwrap_or_else(|_| HeaderValue::from_static("1S"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_and_written_as_grpc_has_them() {
        for (text, expected) in [
            ("5S", Some(Duration::from_secs(5))),
            ("1H", Some(Duration::from_secs(3_600))),
            ("250m", Some(Duration::from_millis(250))),
            ("99999999u", Some(Duration::from_micros(99_999_999))),
            ("123456789S", None),
            ("-1S", None),
            ("S", None),
            ("", None),
            ("5x", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(TIMEOUT_HEADER, HeaderValue::from_static(text));
            assert_eq!(timeout_of(&headers), expected, "{text}");
        }
        for limit in [Duration::ZERO, Duration::from_millis(1_500), Duration::from_secs(1 << 40)] {
            let mut headers = HeaderMap::new();
            headers.insert(TIMEOUT_HEADER, timeout_header(limit));
            assert!(timeout_of(&headers).is_some(), "{limit:?}");
        }
    }

    #[test]
    fn only_a_failed_connection_means_that_nothing_was_sent() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] Box<dyn Error + Send + Sync>);
        let connect = ConnectError("refused".into());
        assert!(was_not_sent(&Outer(Box::new(connect))));
        assert!(!was_not_sent(&Outer("reset".into())));
    }
}
