//! Registrations: a key under a lease that this module keeps alive.
//!
//! The client renews nothing by itself. Each lease has a task that renews it every third of its TTL over a stream of its own and
//! moves the deadline by the *send* time of each answered renewal. A lease counts as lost only when the very registry that granted
//! it says so: no answer, another etcd or one that was restored leave it as it is, and its deadline passes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use etcd_client::{Compare, CompareOp, LeaseKeepAliveStream, LeaseKeeper, PutOptions, Txn, TxnOp, TxnOpResponse};
use im_proto::InstanceId;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    keys::{self, ROLES},
    shared::{Shared, lease_number},
    transport::{CallError, Connected},
};
use crate::{Instance, Lease, RegistryError, model::deadline_after};

/// A registration of this process.
pub(super) struct Identity {
    /// etcd's id of the lease.
    pub(super) lease: i64,
    /// What is registered now.
    instance: Mutex<Instance>,
    /// Turns true once the lease is dead.
    lost: watch::Sender<bool>,
}

impl Identity {
    pub(super) fn instance(&self) -> Instance {
        self.instance.lock().clone()
    }
}

/// A stream of renewals on one member.
struct Renewals {
    connected: Connected,
    keeper: LeaseKeeper,
    stream: LeaseKeepAliveStream,
}

impl Shared {
    /// The live registration that a lease stands for.
    pub(super) fn identity(&self, lease: &Lease) -> Result<Arc<Identity>, RegistryError> {
        let identity = self.identities.lock().get(&lease.instance).cloned();
        identity
            .filter(|identity| lease_number(identity.lease) == lease.id)
            .ok_or_else(|| RegistryError::LeaseLost(lease.instance.clone()))
    }

    pub(super) async fn register(
        self: &Arc<Self>,
        instance: Instance,
        ttl: Duration,
        stop: watch::Receiver<()>,
    ) -> Result<Lease, RegistryError> {
        if let Some(reason) = self.outdated() {
            return Err(RegistryError::Refused(reason));
        }
        let id = instance.id.clone();
        let sent_at = self.environment.clock.since_boot();
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX).max(1);
        let call = self.transport.call(|mut client| async move { client.lease_grant(seconds, None).await });
        let granted = call.await?;
        self.check_cluster(granted.header()).await?;
        let lease = granted.id();
        let identity = Arc::new(Identity { lease, instance: Mutex::new(instance), lost: watch::Sender::new(false) });
        if !self.put_if_absent(&identity).await? {
            let revoke = self.transport.call(|mut client| async move { client.lease_revoke(lease).await });
            if let Err(error) = revoke.await {
                tracing::debug!(%error, "an unused lease is left to run out");
            }
            return Err(RegistryError::InUse(format!("the instance id {id} is registered already")));
        }
        let deadline_ms = Arc::new(AtomicU64::new(deadline_after(sent_at, ttl)));
        let lost = identity.lost.subscribe();
        self.identities.lock().insert(id.clone(), identity.clone());
        let renewing = keep_alive(self.clone(), identity, ttl, deadline_ms.clone(), stop);
        self.environment.spawn(renewing);
        Ok(Lease { instance: id, id: lease_number(lease), deadline_ms, lost })
    }

    /// Puts the key of an instance unless its id is in use by another lease, under any role.
    async fn put_if_absent(&self, identity: &Identity) -> Result<bool, RegistryError> {
        let instance = identity.instance();
        let absent =
            ROLES.map(|role| Compare::create_revision(self.keys.instance(role, &instance.id), CompareOp::Equal, 0));
        let key = self.keys.instance(instance.role, &instance.id);
        let txn =
            Txn::new().when(absent).and_then([self.put_instance(identity, &instance)]).or_else([TxnOp::get(key, None)]);
        let answer = match self.txn(txn).await {
            Ok(answer) => answer,
            Err(CallError::LeaseNotFound) => return Err(self.lease_not_found(identity, &instance.id).await),
            Err(error) => return Err(error.into()),
        };
        // An earlier attempt of this call may have been answered to nobody.
        let ours = |response: &TxnOpResponse| match response {
            TxnOpResponse::Get(found) => found.kvs().iter().any(|found| found.lease() == identity.lease),
            _ => false,
        };
        Ok(answer.succeeded() || answer.op_responses().iter().any(ours))
    }

    fn put_instance(&self, identity: &Identity, instance: &Instance) -> TxnOp {
        let key = self.keys.instance(instance.role, &instance.id);
        let options = PutOptions::new().with_lease(identity.lease);
        TxnOp::put(key, keys::encode_instance(instance), Some(options))
    }

    pub(super) async fn update(&self, lease: &Lease, instance: Instance) -> Result<(), RegistryError> {
        let identity = self.identity(lease)?;
        let registered = identity.instance();
        if (&registered.id, registered.role) != (&instance.id, instance.role) {
            let (id, other) = (&registered.id, &instance.id);
            return Err(RegistryError::InUse(format!("the lease of {id} cannot register {other}")));
        }
        let key = self.keys.instance(instance.role, &instance.id);
        let txn = Txn::new()
            .when([Compare::lease(key, CompareOp::Equal, identity.lease)])
            .and_then([self.put_instance(&identity, &instance)]);
        match self.txn(txn).await {
            Ok(answer) if answer.succeeded() => {
                *identity.instance.lock() = instance;
                Ok(())
            }
            Ok(_) | Err(CallError::LeaseNotFound) => Err(self.lease_not_found(&identity, &lease.instance).await),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn revoke(&self, lease: &Lease) -> Result<(), RegistryError> {
        let Ok(identity) = self.identity(lease) else { return Ok(()) };
        // Before it is seen to go.
        self.hold.lock().leaves(&lease.instance);
        let id = identity.lease;
        match self.transport.call(|mut client| async move { client.lease_revoke(id).await }).await {
            Ok(_) | Err(CallError::LeaseNotFound) => {
                self.end(&identity);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn end(&self, identity: &Identity) {
        let id = identity.instance.lock().id.clone();
        self.identities.lock().retain(|known, live| *known != id || live.lease != identity.lease);
        identity.lost.send_replace(true);
    }

    /// Ends all registrations of a process of an earlier generation: it can never claim again, and who sees it would wait for it
    /// to own shards.
    pub(super) fn end_if_outdated(self: &Arc<Self>) {
        let Some(reason) = self.outdated() else { return };
        let identities: Vec<Arc<Identity>> = self.identities.lock().values().cloned().collect();
        for identity in identities {
            tracing::error!(reason, instance = %identity.instance().id, "a registration ends");
            self.metrics.leases_lost.increment(1);
            self.end(&identity);
            let (shared, id) = (self.clone(), identity.lease);
            self.environment.spawn(async move {
                let revoked = shared.transport.call(|mut client| async move { client.lease_revoke(id).await });
                if let Err(error) = revoked.await {
                    tracing::debug!(%error, "a lease of an earlier generation is left to run out");
                }
            });
        }
    }

    /// Some member does not know a lease: finds out whether it is dead, and says what to answer to the caller.
    pub(super) async fn lease_not_found(&self, identity: &Identity, id: &InstanceId) -> RegistryError {
        match self.end_if_dead(identity).await {
            Ok(true) => RegistryError::LeaseLost(id.clone()),
            Ok(false) => RegistryError::Unavailable(format!("etcd is not sure about the lease of {id}")),
            Err(error) => error.into(),
        }
    }

    /// Ends a registration if the registry that granted its lease says that the lease is dead.
    async fn end_if_dead(&self, identity: &Identity) -> Result<bool, CallError> {
        let lease = identity.lease;
        let call = self.transport.call(|mut client| async move { client.lease_time_to_live(lease, None).await });
        match call.await {
            Ok(answer) => {
                self.check_cluster(answer.header()).await?;
                if answer.ttl() > 0 {
                    return Ok(false);
                }
            }
            Err(CallError::LeaseNotFound) => {}
            Err(error) => return Err(error),
        }
        // An etcd that lost its data knows no leases either. It must not end the routers before somebody has recovered it.
        self.read(&self.keys.cluster()).await?;
        self.metrics.leases_lost.increment(1);
        self.end(identity);
        Ok(true)
    }

    /// Puts registrations again whose lease lives but whose key somebody has deleted.
    pub(super) async fn repair_registrations(&self) {
        let identities: Vec<Arc<Identity>> = self.identities.lock().values().cloned().collect();
        for identity in identities {
            let instance = identity.instance();
            let lease = lease_number(identity.lease);
            if self.mirror.lock().is_registered(instance.role, &instance.id, lease) {
                continue;
            }
            match self.put_if_absent(&identity).await {
                Ok(true) => {
                    self.metrics.registrations_repaired.increment(1);
                    tracing::warn!(instance = %instance.id, "a registration was gone while its lease lived; it is back");
                }
                Ok(false) => tracing::error!(instance = %instance.id, "another process uses this instance id"),
                Err(error) => tracing::debug!(%error, "a registration could not be repaired"),
            }
        }
    }

    /// One renewal. The first on a stream is two: the client hides from where the first answer comes.
    async fn renew(&self, lease: i64, renewals: &mut Option<Renewals>) -> Result<(), CallError> {
        let open = match renewals {
            Some(open) => open,
            None => {
                let mut connected = self.transport.connected().await?;
                let (keeper, stream) = match connected.client.lease_keep_alive(lease).await {
                    Ok(open) => open,
                    Err(error) => {
                        let error = self.transport.explain_at(&connected, &error);
                        if matches!(error, CallError::Unavailable(_)) {
                            self.transport.failed(&connected).await;
                        }
                        return Err(error);
                    }
                };
                renewals.insert(Renewals { connected, keeper, stream })
            }
        };
        let answer = match open.keeper.keep_alive().await {
            Ok(()) => open.stream.message().await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(Some(answer)) => {
                self.check_cluster(answer.header()).await?;
                if answer.ttl() > 0 { Ok(()) } else { Err(CallError::LeaseNotFound) }
            }
            Ok(None) => Err(CallError::Unavailable("the stream of renewals ended".to_owned())),
            Err(error) => Err(self.transport.explain_at(&open.connected, &error)),
        }
    }
}

/// Renews a lease until it is dead or the registry is dropped.
async fn keep_alive(
    shared: Arc<Shared>,
    identity: Arc<Identity>,
    ttl: Duration,
    deadline_ms: Arc<AtomicU64>,
    mut stop: watch::Receiver<()>,
) {
    let mut lost = identity.lost.subscribe();
    let mut renewals: Option<Renewals> = None;
    let mut pause = ttl / 3;
    loop {
        tokio::select! {
            biased;
            _ = stop.changed() => return,
            _ = lost.wait_for(|lost| *lost) => return,
            () = sleep(pause) => {}
        }
        let sent_at = shared.environment.clock.since_boot();
        let limit = shared.transport.timeout.min(ttl / 3);
        let renewed = timeout(limit, shared.renew(identity.lease, &mut renewals)).await;
        let renewed = renewed.unwrap_or_else(|_| Err(CallError::Unavailable("no answer in time".to_owned())));
        let Err(error) = renewed else {
            deadline_ms.fetch_max(deadline_after(sent_at, ttl), Ordering::AcqRel);
            shared.metrics.renewals.increment(1);
            pause = ttl / 3;
            continue;
        };
        shared.metrics.renewal_failures.increment(1);
        tracing::debug!(%error, "cannot renew the lease");
        pause = ttl / 10;
        match (error, renewals.take()) {
            (CallError::LeaseNotFound, _) => match shared.end_if_dead(&identity).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "etcd does not know the lease, but is not to be believed"),
            },
            (CallError::Unavailable(_), Some(Renewals { connected, .. })) => shared.transport.failed(&connected).await,
            (CallError::Unavailable(_), None) => shared.transport.next_member().await,
            _ => {}
        }
    }
}
