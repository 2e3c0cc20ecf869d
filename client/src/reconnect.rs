//! Where to connect next and when: one rule for every transport.
//!
//! Endpoints named by a `GoAway` come first, then the configured ones in turn. After a lost session the first attempt comes at
//! once (within the base of the back-off, so that not all clients come together); each round of attempts without success waits
//! longer.
//!
//! "Not before" of SPEC.md, §4, means two things. A `GoAway` says when to come elsewhere: until then no endpoint is tried. The
//! `retry_after_ms` of a `Close` is what one server says of itself (this address connects too often there): until then that endpoint is
//! not tried, and the others in their turn are. If all have refused, the client waits for the first of them.

use std::{collections::VecDeque, time::Duration};

use im_proto::{environment::Environment, v1};
use tokio::time::Instant;

use crate::config::{Backoff, Endpoint, EndpointSource};

/// No server makes a client wait longer than this, whatever it says: one that means it says so again then.
const WAIT_MAX: Duration = Duration::from_secs(300);

/// Refusals that are remembered; beyond it the one that ends first is forgotten, and its server may refuse once more.
const REFUSALS_MAX: usize = 64;

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
    /// Nor these before theirs.
    refusals: Vec<(Endpoint, Instant)>,
    /// Which of the configured endpoints is next.
    next: usize,
    /// Of the configured endpoints that may be tried, as of the last look: so many attempts are a round.
    count: usize,
    /// Since the last success.
    attempts: usize,
    had_session: bool,
}

impl Reconnect {
    pub(crate) fn new(backoff: Backoff) -> Self {
        Self {
            backoff,
            offered: VecDeque::new(),
            not_before: None,
            refusals: Vec::new(),
            next: 0,
            count: 1,
            attempts: 0,
            had_session: false,
        }
    }

    /// The next endpoint to try.
    pub(crate) fn next_endpoint(&mut self, source: &dyn EndpointSource, now: Instant) -> Result<Next, String> {
        if let Some(until) = self.not_before.filter(|until| *until > now) {
            return Ok(Next::Wait(until));
        }
        self.refusals.retain(|(_, until)| *until > now);
        let configured = source.endpoints();
        for offered in &mut self.offered {
            let is_same =
                |endpoint: &&Endpoint| (endpoint.transport, &endpoint.address) == (offered.transport, &offered.address);
            if let Some(endpoint) = configured.iter().flatten().find(is_same) {
                *offered = endpoint.clone();
            }
        }
        if let Some(place) = self.offered.iter().position(|endpoint| self.refused_until(endpoint).is_none()) {
            return self.offered.remove(place).map(Next::Dial).ok_or_else(nothing_known);
        }
        let endpoints = configured?;
        let open = |endpoint: &&Endpoint| self.refused_until(endpoint).is_none();
        let count = endpoints.iter().filter(open).count().max(1);
        let mut in_turn = (self.next % endpoints.len().max(1)..endpoints.len()).chain(0..endpoints.len());
        if let Some(place) = in_turn.find(|place| open(&&endpoints[*place])) {
            (self.next, self.count) = (place, count);
            return Ok(Next::Dial(endpoints[place].clone()));
        }
        let known = self.offered.iter().chain(&endpoints);
        known.filter_map(|endpoint| self.refused_until(endpoint)).min().map(Next::Wait).ok_or_else(nothing_known)
    }

    fn refused_until(&self, endpoint: &Endpoint) -> Option<Instant> {
        self.refusals.iter().find(|(refused, _)| refused == endpoint).map(|(_, until)| *until)
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

    /// The server there said when to ask it again.
    pub(crate) fn refused(&mut self, endpoint: &Endpoint, retry_after: Duration, now: Instant) {
        self.refusals.retain(|(refused, until)| refused != endpoint && *until > now);
        if retry_after.is_zero() {
            return;
        }
        if self.refusals.len() == REFUSALS_MAX
            && let Some((first, _)) = self.refusals.iter().enumerate().min_by_key(|(_, (_, until))| *until)
        {
            self.refusals.swap_remove(first);
        }
        self.refusals.push((endpoint.clone(), now + retry_after.min(WAIT_MAX)));
    }

    /// The server there asked the client to go elsewhere. A URL has no server name: where the certificate of this server does not have
    /// the host of its address, that of its neighbour has this name, too, unless another one is configured for it.
    pub(crate) fn moved(&mut self, elsewhere: Elsewhere, from: &Endpoint, now: Instant) {
        self.not_before = Some(elsewhere.at.min(now + WAIT_MAX));
        let named = |endpoint| Endpoint { server_name: from.server_name.clone(), ..endpoint };
        self.offered = elsewhere.endpoints.into_iter().map(named).collect();
    }
}

fn nothing_known() -> String {
    "no server address is known".to_owned()
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
        reconnect.moved(elsewhere(4_000, &["quic://elsewhere:7", "no address"], now), &source[0], now);
        let then = now + Duration::from_secs(4);
        assert_eq!(reconnect.next_endpoint(&source, now), Ok(Next::Wait(then)));
        assert_eq!(dial(&mut reconnect, &source, then), "quic://elsewhere:7".parse().unwrap());
        assert_eq!(dial(&mut reconnect, &source, then), source[1]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_refused_is_passed_over_and_the_others_are_not_asked_more_often_for_it() {
        let environment = environment::system();
        let backoff = Backoff { base: Duration::from_millis(100), max: Duration::from_secs(5) };
        let mut reconnect = Reconnect::new(backoff);
        let source = endpoints(3);
        let now = Instant::now();
        for endpoint in &source {
            assert_eq!(dial(&mut reconnect, &source, now), *endpoint);
            if *endpoint != source[1] {
                reconnect.refused(endpoint, Duration::from_secs(30), now);
            }
            reconnect.failed();
        }
        let mut before = Duration::ZERO;
        for round in 0..8 {
            assert_eq!(dial(&mut reconnect, &source, now), source[1]);
            reconnect.failed();
            // Half of each is random: of two that follow each other the later one is never shorter.
            let delay = reconnect.delay(&environment);
            assert!(delay >= before.min(backoff.max / 2), "round {round}: {delay:?} after {before:?}");
            before = delay;
        }
        assert!(before >= backoff.max / 2);
        reconnect.refused(&source[1], Duration::from_secs(20), now);
        let then = now + Duration::from_secs(20);
        assert_eq!(reconnect.next_endpoint(&source, now), Ok(Next::Wait(then)));
        assert_eq!(dial(&mut reconnect, &source, then), source[1]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_offered_endpoint_that_refused_keeps_its_place_until_it_may_be_asked() {
        let mut reconnect = Reconnect::new(Backoff::default());
        let source = endpoints(1);
        let now = Instant::now();
        let offered: Endpoint = "quic://elsewhere:7".parse().unwrap();
        reconnect.refused(&offered, Duration::from_secs(3), now);
        reconnect.moved(elsewhere(0, &["quic://elsewhere:7"], now), &source[0], now);
        assert_eq!(dial(&mut reconnect, &source, now), source[0]);
        assert_eq!(dial(&mut reconnect, &source, now + Duration::from_secs(3)), offered);
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_are_bounded() {
        let mut reconnect = Reconnect::new(Backoff::default());
        let now = Instant::now();
        for (port, endpoint) in (1_u64..).zip(endpoints(200)) {
            reconnect.refused(&endpoint, Duration::from_secs(port), now);
        }
        assert_eq!(reconnect.refusals.len(), REFUSALS_MAX);
        assert!(reconnect.refused_until(&endpoints(200)[199]).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn an_offered_endpoint_has_the_server_name_that_is_configured_for_it_or_of_who_offered_it() {
        let named = |endpoint: &str, name: &str| Endpoint {
            server_name: Some(name.to_owned()),
            ..endpoint.parse::<Endpoint>().unwrap()
        };
        let source = vec![named("tls://10.0.0.1:1", "one"), named("tls://10.0.0.2:1", "two")];
        let mut reconnect = Reconnect::new(Backoff::default());
        let now = Instant::now();
        assert_eq!(dial(&mut reconnect, &source, now), source[0]);
        reconnect.moved(elsewhere(0, &["tls://10.0.0.2:1", "tls://10.0.0.3:1"], now), &source[0], now);
        assert_eq!(dial(&mut reconnect, &source, now), source[1]);
        assert_eq!(dial(&mut reconnect, &source, now), named("tls://10.0.0.3:1", "one"));
    }

    #[tokio::test(start_paused = true)]
    async fn no_server_makes_a_client_wait_for_ever() {
        let mut reconnect = Reconnect::new(Backoff::default());
        let source = endpoints(1);
        let now = Instant::now();
        reconnect.moved(elsewhere(u32::MAX, &[], now), &source[0], now);
        assert_eq!(reconnect.next_endpoint(&source, now), Ok(Next::Wait(now + WAIT_MAX)));
        assert_eq!(dial(&mut reconnect, &source, now + WAIT_MAX), source[0]);
        reconnect.refused(&source[0], Duration::MAX, now + WAIT_MAX);
        assert_eq!(dial(&mut reconnect, &source, now + WAIT_MAX * 2), source[0]);
    }
}
