//! One process's way to the core, which can break.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use im_proto::{ShardId, environment::Environment};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::Core;
use crate::{
    CLAIMS_PER_CALL_MAX, Claim, ClaimOutcome, Instance, Lease, Registry, RegistryError, View, model::deadline_after,
};

/// How a process reaches the core. Only `Up` carries news of changes and moves a lease's deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    Up,
    /// Calls fail at once and change nothing.
    Refused,
    /// Calls hang until the process is reconnected, or fail after [`CALL_TIMEOUT`].
    Silent,
    /// Calls take effect and fail all the same.
    AnswersLost,
}

/// The longest time that a call waits for a core that does not answer.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The registry as one process sees it. Clones are the same process.
#[derive(Clone)]
pub struct InProcessHandle {
    core: Arc<Core>,
    process: Arc<Process>,
    environment: Environment,
}

pub(super) struct Process {
    name: String,
    /// Of the cluster when this process was started.
    generation: u64,
    reach: watch::Sender<Reach>,
    view: watch::Sender<Arc<View>>,
}

impl Process {
    pub(super) fn publish(&self, view: &Arc<View>) {
        if *self.reach.borrow() == Reach::Up {
            self.view.send_replace(view.clone());
        }
    }

    fn unavailable(&self, why: &str) -> RegistryError {
        RegistryError::Unavailable(format!("{}: {why}", self.name))
    }
}

impl InProcessHandle {
    pub(super) fn start(core: Arc<Core>, name: &str, environment: Environment) -> Self {
        let (view, generation) = {
            let state = core.state.lock();
            (state.view(), state.generation())
        };
        let process = Arc::new(Process {
            name: name.to_owned(),
            generation,
            reach: watch::Sender::new(Reach::Up),
            view: watch::Sender::new(view),
        });
        core.state.lock().attach(&process);
        environment.spawn(expire_leases(core.clone()));
        Self { core, process, environment }
    }

    /// Cuts this process off from the core, or connects it again: then it sees at once all that it missed.
    pub fn set_reach(&self, reach: Reach) {
        let state = self.core.state.lock();
        self.process.reach.send_replace(reach);
        self.process.publish(&state.view());
    }

    /// Runs a call against the core as far as the process reaches it.
    async fn call<T>(&self, limit: Duration, operation: impl FnOnce(&Core) -> T + Send) -> Result<T, RegistryError> {
        let mut reach = self.process.reach.subscribe();
        let answering = timeout(limit, reach.wait_for(|reach| *reach != Reach::Silent)).await;
        let reach = match answering {
            Ok(Ok(reach)) => *reach,
            Ok(Err(_)) | Err(_) => return Err(self.process.unavailable("no answer in time")),
        };
        match reach {
            Reach::Up => Ok(operation(&self.core)),
            Reach::AnswersLost => {
                operation(&self.core);
                Err(self.process.unavailable("the answer was lost"))
            }
            Reach::Refused | Reach::Silent => Err(self.process.unavailable("not connected")),
        }
    }

    /// Renews a lease every third of its TTL until it is dead.
    fn keep_alive(&self, id: u64, ttl: Duration, deadline_ms: Arc<AtomicU64>, lost: watch::Sender<bool>) {
        let registry = self.clone();
        self.environment.spawn(async move {
            let mut pause = ttl / 3;
            loop {
                sleep(pause).await;
                let sent_at = registry.environment.clock.since_boot();
                let kept = registry.call(ttl / 3, |core| core.state.lock().keep_alive(id, Instant::now())).await;
                match kept {
                    Ok(true) => {
                        deadline_ms.store(deadline_after(sent_at, ttl), Ordering::Release);
                        pause = ttl / 3;
                    }
                    Ok(false) => {
                        lost.send_replace(true);
                        return;
                    }
                    Err(error) => {
                        tracing::debug!(%error, "cannot renew the lease");
                        pause = ttl / 10;
                    }
                }
            }
        });
    }
}

/// Each process watches all leases, so that one ends also when its own process is gone.
async fn expire_leases(core: Arc<Core>) {
    let mut grants = core.grants.subscribe();
    loop {
        let next = {
            let mut state = core.state.lock();
            state.expire(Instant::now());
            state.next_expiry()
        };
        let expiry = async {
            match next {
                Some(next) => sleep_until(next).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            granted = grants.changed() => if granted.is_err() { return },
            () = expiry => {}
        }
    }
}

fn check_count(found: usize) -> Result<(), RegistryError> {
    if found > CLAIMS_PER_CALL_MAX {
        return Err(RegistryError::TooManyShards { found });
    }
    Ok(())
}

impl Registry for InProcessHandle {
    async fn register(&self, instance: Instance, ttl: Duration) -> Result<Lease, RegistryError> {
        let id = instance.id.clone();
        let sent_at = self.environment.clock.since_boot();
        let registered = self.call(CALL_TIMEOUT, |core| {
            let lease = core.state.lock().register(instance, ttl, Instant::now())?;
            core.grants.send_modify(|grants| *grants += 1);
            Ok::<u64, RegistryError>(lease)
        });
        let lease = registered.await??;
        let deadline_ms = Arc::new(AtomicU64::new(deadline_after(sent_at, ttl)));
        let (lost, is_lost) = watch::channel(false);
        self.keep_alive(lease, ttl, deadline_ms.clone(), lost);
        Ok(Lease { instance: id, id: lease, deadline_ms, lost: is_lost })
    }

    async fn update(&self, lease: &Lease, instance: Instance) -> Result<(), RegistryError> {
        let id = lease.id;
        self.call(CALL_TIMEOUT, move |core| core.state.lock().update(id, instance, Instant::now())).await?
    }

    async fn revoke(&self, lease: &Lease) -> Result<(), RegistryError> {
        let id = lease.id;
        self.call(CALL_TIMEOUT, move |core| core.state.lock().revoke(id)).await
    }

    fn view(&self) -> watch::Receiver<Arc<View>> {
        self.process.view.subscribe()
    }

    async fn claim(&self, lease: &Lease, shards: &[ShardId]) -> Result<Vec<ClaimOutcome>, RegistryError> {
        check_count(shards.len())?;
        let generation = self.process.generation;
        self.call(CALL_TIMEOUT, |core| {
            core.state.lock().claim(lease.id, &lease.instance, generation, shards, Instant::now())
        })
        .await?
    }

    async fn cut_predecessors(&self, claims: &[Claim]) -> Result<Vec<bool>, RegistryError> {
        check_count(claims.len())?;
        self.call(CALL_TIMEOUT, |core| core.state.lock().cut_predecessors(claims, Instant::now())).await
    }

    async fn release(&self, claims: &[Claim]) -> Result<(), RegistryError> {
        check_count(claims.len())?;
        self.call(CALL_TIMEOUT, |core| core.state.lock().release(claims, Instant::now())).await
    }

    async fn raise_epoch(&self, claim: &Claim) -> Result<Option<Claim>, RegistryError> {
        self.call(CALL_TIMEOUT, |core| core.state.lock().raise_epoch(claim, Instant::now())).await
    }
}
