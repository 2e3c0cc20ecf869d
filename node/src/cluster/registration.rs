//! Keeps a gateway registered.
//!
//! A gateway that lost its lease is the same gateway: nobody fences it, its clients are still connected. So it registers again under
//! the same id, as soon as etcd lets it, and routers get to know its sessions again.

use std::{sync::Arc, time::Duration};

use im_proto::environment::Environment;
use im_registry::{AnyRegistry, Instance, Lease, Registry as _, RegistryError};
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};

/// Pauses between attempts grow up to this.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How long a stop waits for etcd; without an answer the lease runs out.
const FAREWELL: Duration = Duration::from_secs(2);

/// A gateway's place in the registry.
#[derive(Clone)]
pub struct Registration {
    registry: AnyRegistry,
    state: Arc<Mutex<State>>,
}

struct State {
    instance: Instance,
    lease: Option<Lease>,
    ended: bool,
}

impl Registration {
    /// Registers, and sees to it that it stays so.
    pub async fn start(
        registry: AnyRegistry,
        instance: Instance,
        ttl: Duration,
        environment: &Environment,
    ) -> Result<Self, RegistryError> {
        let lease = registry.register(instance.clone(), ttl).await?;
        let state = Arc::new(Mutex::new(State { instance, lease: Some(lease.clone()), ended: false }));
        let registration = Self { registry, state };
        environment.spawn(registration.clone().keep(lease, ttl));
        Ok(registration)
    }

    async fn keep(self, mut lease: Lease, ttl: Duration) {
        loop {
            // An error means that nobody keeps the lease alive any more.
            let _ = lease.lost().wait_for(|lost| *lost).await;
            if self.state.lock().ended {
                return;
            }
            tracing::warn!(gateway = %lease.instance(), "the lease was lost; registering again");
            lease = self.register_again(ttl).await;
        }
    }

    async fn register_again(&self, ttl: Duration) -> Lease {
        let mut pause = Duration::from_millis(100);
        loop {
            let instance = self.state.lock().instance.clone();
            match self.registry.register(instance, ttl).await {
                Ok(lease) => {
                    self.state.lock().lease = Some(lease.clone());
                    tracing::info!(gateway = %lease.instance(), "registered again");
                    return lease;
                }
                // In use: an attempt whose answer was lost; its lease runs out.
                Err(error) => tracing::warn!(%error, "cannot register; trying again"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Tells everybody that this gateway takes nobody new.
    pub async fn drain(&self) {
        let (instance, lease) = {
            let mut state = self.state.lock();
            state.instance.draining = true;
            (state.instance.clone(), state.lease.clone())
        };
        if let Some(lease) = lease
            && let Some(error) = failure(timeout(FAREWELL, self.registry.update(&lease, instance)).await)
        {
            tracing::debug!(
                error,
                "the registry does not know that this gateway drains; routers learn it on their links"
            );
        }
    }

    /// Leaves the registry.
    pub async fn end(&self) {
        let lease = {
            let mut state = self.state.lock();
            state.ended = true;
            state.lease.take()
        };
        if let Some(lease) = lease
            && let Some(error) = failure(timeout(FAREWELL, self.registry.revoke(&lease)).await)
        {
            tracing::debug!(error, "the registration could not be ended; it runs out");
        }
    }
}

fn failure<E: std::fmt::Display>(outcome: Result<Result<(), RegistryError>, E>) -> Option<String> {
    match outcome {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(late) => Some(late.to_string()),
    }
}
