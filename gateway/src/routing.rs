//! Which link leads to the owner of a shard, and the task that follows the registry.
//!
//! [`Routing::version`] grows with every change that may move a session, a send or a call to another link. Sessions remember the
//! version they were reconciled with; the task visits all of them after a change, and a connection reconciles its own session
//! before it sends anything new, so that nothing new overtakes what must be sent again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use im_proto::{Epoch, InstanceId, SessionId, ShardId};
use im_registry::{Role, View};
use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};

use crate::{
    gateway::Shared,
    link::{Link, dial},
};

/// Sessions visited between two chances for other tasks.
const VISIT_RUN: usize = 256;

/// The owners of all shards as far as links lead to them.
#[derive(Default)]
pub(crate) struct Routes {
    owners: Vec<Option<(Arc<Link>, Epoch)>>,
}

impl Routes {
    /// The link to the owner of a shard, whether it is up or not.
    pub fn owner(&self, shard: ShardId) -> Option<&Arc<Link>> {
        let index = usize::try_from(shard.0).ok()?;
        self.owners.get(index)?.as_ref().map(|(link, _)| link)
    }

    /// The epoch of the owner's claim. An owner that lost a shard and has it again has forgotten the shard's sessions.
    pub fn epoch(&self, shard: ShardId) -> Option<Epoch> {
        let index = usize::try_from(shard.0).ok()?;
        self.owners.get(index)?.as_ref().map(|(_, epoch)| *epoch)
    }
}

/// The present routes.
#[derive(Default)]
pub(crate) struct Routing {
    routes: RwLock<Arc<Routes>>,
    version: AtomicU64,
    changed: Notify,
    /// Sessions with something that a router gave back.
    retries: Mutex<BTreeSet<SessionId>>,
    retry: Notify,
}

impl Routing {
    pub fn routes(&self) -> Arc<Routes> {
        self.routes.read().clone()
    }

    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Something changed: all sessions will be reconciled.
    pub fn touch(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_one();
    }

    /// A session has something to try again after a while.
    pub fn retry_later(&self, session: SessionId) {
        if self.retries.lock().insert(session) {
            self.retry.notify_one();
        }
    }
}

/// Follows the registry until the gateway stops.
pub(crate) async fn follow(shared: Arc<Shared>, mut view: watch::Receiver<Arc<View>>) {
    let mut links = BTreeMap::new();
    let mut last_index = 0;
    let mut retry_at = None;
    let routing = &shared.routing;
    loop {
        let seen = view.borrow_and_update().clone();
        shared.neighbours.update(&seen, &shared.instance);
        if update(&shared, &seen, &mut links, &mut last_index) {
            routing.version.fetch_add(1, Ordering::AcqRel);
            visit_all(&shared).await;
        }
        tokio::select! {
            biased;
            () = shared.stop.cancelled() => return,
            changed = view.changed() => if changed.is_err() {
                // The registry is gone for good; what is known goes on being used.
                shared.stop.cancelled().await;
                return;
            },
            () = routing.changed.notified() => visit_all(&shared).await,
            () = routing.retry.notified() => {
                retry_at.get_or_insert(Instant::now() + shared.config.send_retry_delay);
            }
            () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => {
                retry_at = None;
                retry(&shared);
            }
        }
    }
}

/// Brings links and routes in line with a view; `false` if no route changed.
fn update(
    shared: &Arc<Shared>,
    view: &View,
    links: &mut BTreeMap<InstanceId, Arc<Link>>,
    last_index: &mut u32,
) -> bool {
    links.retain(|router, link| {
        let lives = view.instances.get(router).is_some_and(|instance| link_address(instance) == Some(&link.address));
        if !lives {
            link.stop.cancel();
        }
        lives
    });
    for instance in view.of_role(Role::Router) {
        let Some(address) = link_address(instance) else { continue };
        if !links.contains_key(&instance.id) {
            *last_index += 1;
            let (limit, stop) = (shared.config.link_queue_messages_max, shared.stop.child_token());
            let link = Arc::new(Link::new(*last_index, instance.id.clone(), address.clone(), limit, stop));
            shared.environment.spawn(dial::run(shared.clone(), link.clone()));
            links.insert(instance.id.clone(), link);
        }
    }
    let owner = |shard| {
        let claim = view.claims.get(&shard)?;
        Some((links.get(&claim.owner)?.clone(), claim.epoch))
    };
    let owners: Vec<Option<(Arc<Link>, Epoch)>> = shared.shards.shards().map(owner).collect();
    let known = shared.routing.routes();
    let claim = |owner: &Option<(Arc<Link>, Epoch)>| owner.as_ref().map(|(link, epoch)| (link.token().index(), *epoch));
    if known.owners.len() == owners.len() && known.owners.iter().zip(&owners).all(|(a, b)| claim(a) == claim(b)) {
        return false;
    }
    *shared.routing.routes.write() = Arc::new(Routes { owners });
    true
}

fn link_address(instance: &im_registry::Instance) -> Option<&String> {
    instance.endpoints.iter().find(|endpoint| endpoint.transport == "link").map(|endpoint| &endpoint.address)
}

async fn visit_all(shared: &Arc<Shared>) {
    for (count, session) in shared.sessions.all().into_iter().enumerate() {
        session.reconcile(shared);
        if count % VISIT_RUN == VISIT_RUN - 1 {
            tokio::task::yield_now().await;
        }
    }
}

fn retry(shared: &Arc<Shared>) {
    let sessions = std::mem::take(&mut *shared.routing.retries.lock());
    for id in sessions {
        if let Some(session) = shared.sessions.find(id) {
            session.retry(shared);
        }
    }
}
