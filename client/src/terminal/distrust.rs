//! A server whose certificate nobody here trusts will not be trusted by waiting: when every server is one, the wait for a connection
//! ends at once.

use std::{future::Future, pin::Pin, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    config::{Endpoint, EndpointSource},
    dial::{DialError, Dialer, Stream},
};

use super::failure::{Failure, advice, is_distrust};

/// Looks at what another dialer comes back with.
pub(super) struct Judging {
    dialer: Arc<dyn Dialer>,
    endpoints: Arc<dyn EndpointSource>,
    /// Of the endpoints, those that the last attempt found distrusted.
    distrusted: Mutex<Vec<Endpoint>>,
    verdict: watch::Sender<Option<String>>,
}

/// Whether there is a verdict.
pub(super) struct Distrust(watch::Receiver<Option<String>>);

impl Judging {
    pub(super) fn new(dialer: Arc<dyn Dialer>, endpoints: Arc<dyn EndpointSource>) -> (Self, Distrust) {
        let (verdict, receiver) = watch::channel(None);
        (Self { dialer, endpoints, distrusted: Mutex::default(), verdict }, Distrust(receiver))
    }

    fn judge(&self, endpoint: &Endpoint, outcome: &Result<Stream, DialError>) {
        let mut distrusted = self.distrusted.lock();
        distrusted.retain(|other| other != endpoint);
        let Some(error) = outcome.as_ref().err().filter(|error| is_distrust(&error.0)) else { return };
        let Ok(endpoints) = self.endpoints.endpoints() else { return };
        distrusted.push(endpoint.clone());
        // Those that a server named, or that are named no more, count for nothing.
        distrusted.retain(|other| endpoints.contains(other));
        if !endpoints.is_empty() && endpoints.iter().all(|known| distrusted.contains(known)) {
            self.verdict.send_replace(Some(format!("{endpoint}: {error}")));
        }
    }
}

impl Dialer for Judging {
    fn dial<'a>(
        &'a self,
        endpoint: &'a Endpoint,
    ) -> Pin<Box<dyn Future<Output = Result<Stream, DialError>> + Send + 'a>> {
        Box::pin(async move {
            let outcome = self.dialer.dial(endpoint).await;
            self.judge(endpoint, &outcome);
            outcome
        })
    }
}

impl Distrust {
    /// Finishes when no server is trusted.
    pub(super) async fn of_all(mut self) -> Failure {
        match self.0.wait_for(Option::is_some).await {
            Ok(verdict) => {
                let last = verdict.as_deref().unwrap_or_default();
                Failure::Failed(format!("no connection: {last}{}", advice(last)))
            }
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Duration;

    use super::*;
    use crate::{client::Client, config::ClientConfig, environment};

    const STRANGER: &str = "invalid peer certificate: UnknownIssuer";

    /// Fails as the address says.
    struct Failing;

    impl Dialer for Failing {
        fn dial<'a>(
            &'a self,
            endpoint: &'a Endpoint,
        ) -> Pin<Box<dyn Future<Output = Result<Stream, DialError>> + Send + 'a>> {
            let text = if endpoint.address.starts_with("stranger") { STRANGER } else { "Connection refused" };
            Box::pin(std::future::ready(Err(DialError(text.to_owned()))))
        }
    }

    /// How long the wait for a connection takes, and what is said then.
    async fn waited(endpoints: &[&str]) -> (Duration, String) {
        let endpoints: Vec<Endpoint> = endpoints.iter().map(|text| text.parse().unwrap()).collect();
        let endpoints: Arc<dyn EndpointSource> = Arc::new(endpoints);
        let (judging, distrust) = Judging::new(Arc::new(Failing), endpoints.clone());
        let token = Arc::new("token".to_owned());
        let config = ClientConfig::with_dialer(endpoints, token, Arc::new(judging), environment::system());
        let timeout = config.ready_timeout;
        let connecting = async {
            tokio::select! {
                biased;
                client = Client::connect(config) => client.map(drop).unwrap_err().into(),
                failure = distrust.of_all() => failure,
            }
        };
        let mut waited = Duration::ZERO;
        tokio::pin!(connecting);
        // Time is paused: it goes on by the waiting alone.
        loop {
            match tokio::time::timeout(Duration::from_millis(500), &mut connecting).await {
                Ok(Failure::Failed(text)) => return (waited, text),
                Ok(other) => panic!("{other:?}"),
                Err(_) => waited += Duration::from_millis(500),
            }
            assert!(waited <= timeout, "it ends by itself");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_for_servers_that_are_all_strangers_ends_at_once() {
        for endpoints in [&["tls://stranger:1"][..], &["tls://stranger:1", "quic://stranger:1"]] {
            let (waited, text) = waited(endpoints).await;
            assert_eq!(waited, Duration::ZERO, "{text}");
            assert!(text.starts_with("no connection: ") && text.contains(STRANGER), "{text}");
            assert!(text.ends_with(advice(STRANGER)), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_may_still_come_is_waited_for() {
        let (waited, text) = waited(&["tls://stranger:1", "tls://away:1"]).await;
        assert!(waited >= Duration::from_secs(9), "{waited:?}: {text}");
        assert!(text.starts_with("no connection within 10 s"), "{text}");
    }
}
