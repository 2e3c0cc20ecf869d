//! Where to connect next and when: one rule for every transport.
//!
//! Endpoints named by a `GoAway` come first, then the configured ones in turn. After a lost session the first attempt comes at
//! once (within the base of the back-off, so that not all clients come together); each round of attempts without success waits
//! longer. A `GoAway` says when to come elsewhere: until then no endpoint is tried.

use std::{collections::VecDeque, time::Duration};

use im_proto::{environment::Environment, v1};
use tokio::time::Instant;

use crate::config::{Backoff, Endpoint, EndpointSource};

/// No server makes a client wait longer than this, whatever it says: one that means it says so again then.
const WAIT_MAX: Duration = Duration::from_secs(300);

/// What a `GoAway` says.
#[derive(Debug)]
pub(crate) struct Elsewhere {
    /// Not before.
    pub(crate) at: Instant,
    /// At one of these, if there are any.
    pub(crate) endpoints: Vec<Endpoint>,
}

impl Elsewhere {
    pub(crate) fn from_wire(go_away: &v1::GoAway, now: Instant) -> Self {
        let endpoints = go_away.endpoints.iter().filter_map(|text| text.parse().ok()).collect();
        Self { at: now + Duration::from_millis(go_away.reconnect_after_ms.into()), endpoints }
    }
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Dial(Endpoint),
    /// Ask again then.
    Wait(Instant),
}

pub(crate) struct Reconnect {
    backoff: Backoff,
    /// Offered by the server.
    offered: VecDeque<Endpoint>,
    /// No endpoint is tried before this time.
    not_before: Option<Instant>,
    /// Which of the configured endpoints is next.
    next: usize,
    /// Of the configured endpoints, as of the last look.
    count: usize,
    /// Since the last success.
    attempts: usize,
    had_session: bool,
}

impl Reconnect {
    pub(crate) fn new(backoff: Backoff) -> Self {
        Self { backoff, offered: VecDeque::new(), not_before: None, next: 0, count: 1, attempts: 0, had_session: false }
    }

    /// The next endpoint to try.
    pub(crate) fn next_endpoint(&mut self, source: &dyn EndpointSource, now: Instant) -> Result<Next, String> {
        if let Some(until) = self.not_before.filter(|until| *until > now) {
            return Ok(Next::Wait(until));
        }
        if let Some(endpoint) = self.offered.pop_front() {
            return Ok(Next::Dial(endpoint));
        }
        let endpoints = source.endpoints()?;
        self.count = endpoints.len().max(1);
        let place = self.next % self.count;
        endpoints.into_iter().nth(place).map(Next::Dial).ok_or_else(|| "no server address is known".to_owned())
    }

    /// How long to wait before that.
    pub(crate) fn delay(&self, environment: &Environment) -> Duration {
        match (self.attempts / self.count, self.attempts % self.count) {
            (0, 0) if !self.had_session => Duration::ZERO,
            (0, _) => environment.jitter(self.backoff.base),
            (round, 0) => self.backoff.delay(u32::try_from(round - 1).unwrap_or(u32::MAX), environment),
            (_, _) => environment.jitter(self.backoff.base),
        }
    }

    /// The attempt failed: the next one is elsewhere.
    pub(crate) fn failed(&mut self) {
        self.attempts += 1;
        self.next = self.next.wrapping_add(1);
    }

    /// The session came as far as its first sync. Whether its server is no longer there for a next one.
    pub(crate) fn succeeded(&mut self, is_leaving: bool) {
        self.attempts = 0;
        self.had_session = true;
        self.next = self.next.wrapping_add(is_leaving.into());
    }

    /// The server asked the client to go elsewhere.
    pub(crate) fn moved(&mut self, elsewhere: Elsewhere, now: Instant) {
        self.not_before = Some(elsewhere.at.min(now + WAIT_MAX));
        self.offered = elsewhere.endpoints.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Transport, environment};

    fn endpoints(count: u16) -> Vec<Endpoint> {
        (1..=count).map(|port| Endpoint::new(Transport::Tcp, format!("localhost:{port}")).unwrap()).collect()
    }

    /// The endpoint to be dialled now.
    fn dial(reconnect: &mut Reconnect, source: &Vec<Endpoint>, now: Instant) -> Endpoint {
        match reconnect.next_endpoint(source, now) {
            Ok(Next::Dial(endpoint)) => endpoint,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_endpoint_hands_over_to_the_next_at_once_and_rounds_wait_longer_up_to_the_limit() {
        let environment = environment::system();
        let backoff = Backoff { base: Duration::from_millis(100), max: Duration::from_secs(1) };
        let mut reconnect = Reconnect::new(backoff);
        let source = endpoints(3);
        let now = Instant::now();
        assert_eq!(reconnect.delay(&environment), Duration::ZERO);
        for round in 0..8_u32 {
            for endpoint in &source {
                assert_eq!(&dial(&mut reconnect, &source, now), endpoint);
                let delay = reconnect.delay(&environment);
                if round > 0 && endpoint == &source[0] {
                    let whole = Duration::from_millis(100 << (round - 1)).min(backoff.max);
                    assert!(delay >= whole / 2 && delay <= whole, "round {round}: {delay:?}");
                } else {
                    assert!(delay <= backoff.base);
                }
                reconnect.failed();
            }
        }
        reconnect.succeeded(false);
        assert!(reconnect.delay(&environment) <= backoff.base);
    }

    fn elsewhere(reconnect_after_ms: u32, endpoints: &[&str], now: Instant) -> Elsewhere {
        let endpoints = endpoints.iter().map(|endpoint| (*endpoint).to_owned()).collect();
        Elsewhere::from_wire(&v1::GoAway { reason: None, reconnect_after_ms, endpoints }, now)
    }

    #[tokio::test(start_paused = true)]
    async fn offered_endpoints_come_first_once_each_and_not_before_their_time() {
        let mut reconnect = Reconnect::new(Backoff::default());
        let source = endpoints(2);
        let now = Instant::now();
        reconnect.succeeded(true);
        reconnect.moved(elsewhere(4_000, &["quic://elsewhere:7", "no address"], now), now);
        let then = now + Duration::from_secs(4);
        assert_eq!(reconnect.next_endpoint(&source, now), Ok(Next::Wait(then)));
        assert_eq!(dial(&mut reconnect, &source, then), "quic://elsewhere:7".parse().unwrap());
        assert_eq!(dial(&mut reconnect, &source, then), source[1]);
    }

    #[tokio::test(start_paused = true)]
    async fn no_server_makes_a_client_wait_for_ever() {
        let mut reconnect = Reconnect::new(Backoff::default());
        let source = endpoints(1);
        let now = Instant::now();
        reconnect.moved(elsewhere(u32::MAX, &[], now), now);
        assert_eq!(reconnect.next_endpoint(&source, now), Ok(Next::Wait(now + WAIT_MAX)));
        assert_eq!(dial(&mut reconnect, &source, now + WAIT_MAX), source[0]);
    }
}
