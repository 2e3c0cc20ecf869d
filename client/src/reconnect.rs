//! Where to connect next and when: one rule for every transport.
//!
//! Endpoints named by a `GoAway` come first, then the configured ones in turn. After a lost session the first attempt comes at
//! once (within the base of the back-off, so that not all clients come together); each round of attempts without success waits
//! longer.

use std::{collections::VecDeque, time::Duration};

use im_proto::environment::Environment;

use crate::config::{Backoff, Endpoint, EndpointSource};

pub(crate) struct Reconnect {
    backoff: Backoff,
    /// Offered by the server.
    offered: VecDeque<Endpoint>,
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
        Self { backoff, offered: VecDeque::new(), next: 0, count: 1, attempts: 0, had_session: false }
    }

    /// The next endpoint to try.
    pub(crate) fn next_endpoint(&mut self, source: &dyn EndpointSource) -> Result<Endpoint, String> {
        if let Some(endpoint) = self.offered.pop_front() {
            return Ok(endpoint);
        }
        let endpoints = source.endpoints()?;
        self.count = endpoints.len().max(1);
        let place = self.next % self.count;
        endpoints.into_iter().nth(place).ok_or_else(|| "no server address is known".to_owned())
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

    /// The session came as far as its first sync.
    pub(crate) fn succeeded(&mut self) {
        self.attempts = 0;
        self.had_session = true;
    }

    /// The server asked the client to go elsewhere.
    pub(crate) fn moved(&mut self, offered: Vec<Endpoint>) {
        self.next = self.next.wrapping_add(1);
        self.offered(offered);
    }

    /// The server named endpoints to try first.
    pub(crate) fn offered(&mut self, offered: Vec<Endpoint>) {
        self.offered = offered.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Transport, environment};

    fn endpoints(count: u16) -> Vec<Endpoint> {
        (1..=count).map(|port| Endpoint::new(Transport::Tcp, format!("localhost:{port}")).unwrap()).collect()
    }

    #[test]
    fn a_failing_endpoint_hands_over_to_the_next_at_once_and_rounds_wait_longer_up_to_the_limit() {
        let environment = environment::system();
        let backoff = Backoff { base: Duration::from_millis(100), max: Duration::from_secs(1) };
        let mut reconnect = Reconnect::new(backoff);
        let source = endpoints(3);
        assert_eq!(reconnect.delay(&environment), Duration::ZERO);
        for round in 0..8_u32 {
            for endpoint in &source {
                assert_eq!(&reconnect.next_endpoint(&source).unwrap(), endpoint);
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
        reconnect.succeeded();
        assert!(reconnect.delay(&environment) <= backoff.base);
    }

    #[test]
    fn offered_endpoints_come_first_once_each() {
        let mut reconnect = Reconnect::new(Backoff::default());
        let source = endpoints(2);
        let offered = vec!["quic://elsewhere:7".parse::<Endpoint>().unwrap()];
        reconnect.moved(offered.clone());
        assert_eq!(reconnect.next_endpoint(&source).unwrap(), offered[0]);
        assert_eq!(reconnect.next_endpoint(&source).unwrap(), source[1]);
    }
}
