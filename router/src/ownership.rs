//! Which shards this router owns: claims what rendezvous hashing gives it, fences predecessors before anything is read, gives up what
//! another router should have.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::future::try_join;
use im_proto::{ConversationId, Epoch, InstanceId, ShardId, shard::rendezvous_owner};
use im_registry::{
    AnyRegistry, CLAIMS_PER_CALL_MAX, Claim, ClaimOutcome, Instance, Lease, Registry as _, RegistryError, Role, View,
};
use im_storage::{StoreError, note_claim};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    cluster::{Cluster, Ended},
    deadline::StoreCalls,
    worker::{bursts::busy_conversations, input::Input},
};

/// How often claims are tried again without a change of the view.
const RETRY: Duration = Duration::from_millis(250);
/// How long a router that stops waits for the registry to take note.
const FAREWELL: Duration = Duration::from_secs(2);

/// A worker asks for a greater epoch, because a batch of this conversation was given up.
pub struct RaiseRequest {
    pub claim: Claim,
    pub conversation: ConversationId,
}

/// Takes over each new view, and ends the router when its lease is dead, unless it gave the lease up itself. Never waits for
/// anything else.
pub async fn follow_view(cluster: Arc<Cluster>, registry: AnyRegistry, lease: Lease, stop: watch::Receiver<bool>) {
    let mut view = registry.view();
    let mut lost = lease.lost();
    loop {
        let now = view.borrow_and_update().clone();
        cluster.set_view(&now);
        tokio::select! {
            biased;
            _ = lost.wait_for(|lost| *lost) => {
                if !*stop.borrow() {
                    cluster.end(Ended::LeaseLost);
                }
                return;
            }
            changed = view.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// What came of putting a claim again.
enum Raised {
    /// `None`: the claim is lost.
    Outcome(Option<Claim>),
    /// Nobody knows, and nobody needs to any more.
    Stopping,
}

/// A claim whose shard was released.
struct Finished {
    claim: Claim,
    /// Nothing is in flight any more.
    settled: bool,
}

/// The part of a router that owns its claims.
pub struct Ownership {
    cluster: Arc<Cluster>,
    store: StoreCalls,
    registry: AnyRegistry,
    lease: Lease,
    held: BTreeMap<ShardId, Claim>,
    /// Of shards that were released, the epoch that they were served under.
    released_under: BTreeMap<ShardId, Epoch>,
    /// Shards that finish what is in flight, and will be given up then.
    releasing: BTreeSet<ShardId>,
    /// Each of them comes here when it has finished, or has had the time for it.
    finished: mpsc::Receiver<Finished>,
    finishes: mpsc::Sender<Finished>,
    /// Instances whose fence rows this router has confirmed: one fence covers all their shards.
    fenced: BTreeSet<InstanceId>,
    raises: mpsc::UnboundedReceiver<RaiseRequest>,
    stop: watch::Receiver<bool>,
    /// Turns true once everything is given up.
    released: watch::Sender<bool>,
}

impl Ownership {
    pub fn new(
        cluster: Arc<Cluster>,
        store: StoreCalls,
        registry: AnyRegistry,
        lease: Lease,
        raises: mpsc::UnboundedReceiver<RaiseRequest>,
        stop: watch::Receiver<bool>,
        released: watch::Sender<bool>,
    ) -> Self {
        let (finishes, finished) = mpsc::channel(CLAIMS_PER_CALL_MAX);
        Self {
            cluster,
            store,
            registry,
            lease,
            held: BTreeMap::new(),
            released_under: BTreeMap::new(),
            releasing: BTreeSet::new(),
            finished,
            finishes,
            fenced: BTreeSet::new(),
            raises,
            stop,
            released,
        }
    }

    /// Runs until the router stops or has ended.
    pub async fn run(mut self) {
        let mut view = self.registry.view();
        let mut ended = self.cluster.ended();
        loop {
            let now = view.borrow_and_update().clone();
            if *self.stop.borrow() {
                self.release_all().await;
                self.released.send_replace(true);
                return;
            }
            self.reconcile(&now).await;
            tokio::select! {
                biased;
                () = async { let _ = ended.wait_for(Option::is_some).await; } => return,
                // Nobody may be left who could stop it: that is no change.
                Ok(()) = self.stop.changed() => {}
                Some(request) = self.raises.recv() => self.raise(request).await,
                Some(finished) = self.finished.recv() => self.give_up_finished(finished).await,
                changed = view.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    /// Puts a claim again under a greater epoch. If the answer of an earlier try was lost, claiming again tells the present epoch.
    async fn raise(&mut self, request: RaiseRequest) {
        let RaiseRequest { claim, conversation } = request;
        let shard = claim.shard;
        if self.releasing.contains(&shard) {
            // The conversation was closed with the release.
            return;
        }
        let current = self.held.get(&shard).cloned();
        let raised = match current {
            // Raised for another conversation meanwhile: that epoch is greater than the one of the batch.
            Some(current) if current.epoch > claim.epoch => Some(current),
            Some(current) => match self.raise_claim(&current).await {
                Raised::Outcome(outcome) => outcome,
                // The conversation is closed already and goes with its shard.
                Raised::Stopping => return,
            },
            None => None,
        };
        match &raised {
            Some(claim) => {
                self.held.insert(shard, claim.clone());
            }
            None => {
                self.held.remove(&shard);
            }
        }
        self.tell(shard, move |worker| worker.epoch_raised(conversation, raised));
    }

    /// Tries until the registry answers or the router stops.
    async fn raise_claim(&mut self, claim: &Claim) -> Raised {
        let mut pause = Duration::from_millis(50);
        loop {
            match self.registry.raise_epoch(claim).await {
                Ok(Some(raised)) => return Raised::Outcome(Some(raised)),
                Ok(None) => match self.registry.claim(&self.lease, &[claim.shard]).await {
                    // Still ours: an earlier raise had taken effect.
                    Ok(outcomes) => {
                        return Raised::Outcome(outcomes.into_iter().find_map(|outcome| match outcome {
                            ClaimOutcome::Claimed(found) if found.epoch > claim.epoch => Some(found),
                            _ => None,
                        }));
                    }
                    Err(RegistryError::LeaseLost(_)) => return Raised::Outcome(None),
                    Err(RegistryError::Refused(reason)) => self.ask_own_fence(&reason).await,
                    Err(_) => {}
                },
                Err(RegistryError::LeaseLost(_)) => return Raised::Outcome(None),
                Err(RegistryError::Refused(reason)) => self.ask_own_fence(&reason).await,
                Err(_) => {}
            }
            if self.pause(&mut pause).await {
                return Raised::Stopping;
            }
        }
    }

    /// Waits before something is tried again; `true` if the router stops or has ended.
    async fn pause(&mut self, pause: &mut Duration) -> bool {
        let jitter = self.cluster.environment.jitter(*pause);
        let mut ended = self.cluster.ended();
        tokio::select! {
            biased;
            _ = ended.wait_for(Option::is_some) => return true,
            // Nobody may be left who could stop it: that is no stop.
            Ok(_) = self.stop.wait_for(|stop| *stop) => return true,
            () = tokio::time::sleep(*pause + jitter) => {}
        }
        *pause = (*pause * 2).min(Duration::from_secs(1));
        false
    }

    async fn reconcile(&mut self, view: &View) {
        let me = self.cluster.config.instance.clone();
        let routers: Vec<&InstanceId> =
            view.of_role(Role::Router).filter(|router| !router.draining).map(|router| &router.id).collect();
        if !routers.contains(&&me) {
            // Not visible to ourselves yet.
            return;
        }
        let (mut wanted, mut unwanted, mut forgotten) = (Vec::new(), Vec::new(), Vec::new());
        for shard in self.cluster.config.shards.shards() {
            if self.releasing.contains(&shard) {
                continue;
            }
            let mine = rendezvous_owner(shard, routers.iter().copied()) == Some(&me);
            match (self.held.contains_key(&shard), mine) {
                // A claim of ours that we do not hold: the answer to the claim was lost, or it could not be given up.
                (false, true) if view.owner(shard).is_none_or(|owner| *owner == me) => wanted.push(shard),
                (true, false) => unwanted.push(shard),
                // A claim that we have stopped to use, but could not give up, or did not know of.
                (false, false) => forgotten.extend(view.claims.get(&shard).filter(|claim| claim.owner == me).cloned()),
                _ => {}
            }
        }
        self.drop_lost(view);
        // A view may lag behind a new claim. It also looks like this after a recovery, which drops the claims of the generation before:
        // nobody routes anything here any more, so that no commit would tell.
        if self.held.keys().any(|shard| !view.claims.contains_key(shard)) {
            self.ask_own_fence("the registry does not show all claims of this router").await;
        }
        self.release(&mut unwanted);
        for claims in forgotten.chunks(CLAIMS_PER_CALL_MAX) {
            self.give_up(claims).await;
        }
        for shards in wanted.chunks(CLAIMS_PER_CALL_MAX) {
            self.claim(shards).await;
        }
        self.cluster.metrics.shards_owned.set(self.held.len() as f64);
    }

    /// A claim that the registry shows as somebody else's, with a greater epoch, is lost.
    fn drop_lost(&mut self, view: &View) {
        let lost: Vec<ShardId> = self
            .held
            .iter()
            .filter(|(shard, claim)| {
                view.claims.get(shard).is_some_and(|seen| seen.owner != claim.owner && seen.epoch > claim.epoch)
            })
            .map(|(shard, _)| *shard)
            .collect();
        for shard in lost {
            self.held.remove(&shard);
            self.tell(shard, move |worker| worker.shard_lost(shard));
        }
    }

    async fn claim(&mut self, shards: &[ShardId]) {
        let outcomes = match self.registry.claim(&self.lease, shards).await {
            Ok(outcomes) => outcomes,
            Err(RegistryError::LeaseLost(_)) => return self.cluster.end(Ended::LeaseLost),
            Err(RegistryError::Refused(reason)) => {
                tracing::error!(reason, "shards cannot be claimed; trying again");
                return self.ask_own_fence(&reason).await;
            }
            // The view will show what became of it.
            Err(error) => return tracing::warn!(%error, "shards could not be claimed; trying again"),
        };
        let mut claims: Vec<Claim> = Vec::with_capacity(outcomes.len());
        for outcome in outcomes {
            let ClaimOutcome::Claimed(claim) = outcome else { continue };
            match self.never_served(claim).await {
                Raised::Outcome(claim) => claims.extend(claim),
                Raised::Stopping => return,
            }
        }
        for claim in &claims {
            let (shard, epoch) = (claim.shard, claim.epoch);
            self.tell(shard, move |worker| worker.shard_claimed(shard, epoch));
        }
        if !self.fence_predecessors(&claims).await {
            return;
        }
        self.activate(claims).await;
    }

    /// A claim that could not be given up is still this router's, under its old epoch, when it is to have the shard again. But what
    /// it dropped at the release may have left writes under way (of opens, raises, and batches whose patience had ended), and two
    /// incarnations of a conversation must not write under one epoch: it needs a greater one, as a batch that was given up does.
    async fn never_served(&mut self, claim: Claim) -> Raised {
        if self.released_under.get(&claim.shard).is_none_or(|released| claim.epoch > *released) {
            return Raised::Outcome(Some(claim));
        }
        tracing::info!(shard = claim.shard.0, "a shard that could not be given up is had again; its epoch is raised");
        self.raise_claim(&claim).await
    }

    /// A router without traffic commits nothing, and so would never learn from its commits that it has to start again.
    async fn ask_own_fence(&self, reason: &str) {
        match self.store.read_fence(&self.cluster.config.instance).await {
            Ok(fence) if fence.fenced || fence.generation > self.cluster.config.generation => {
                self.cluster.end(Ended::Fenced);
            }
            Ok(_) => tracing::debug!(reason, "this router is not fenced"),
            Err(error) => tracing::debug!(reason, %error, "the own fence cannot be read; trying again"),
        }
    }

    /// Before anything of a shard is read, every other instance on its predecessor list is fenced, and the store knows of the claim: a
    /// registry that does not any more is found out by whoever starts.
    async fn fence_predecessors(&mut self, claims: &[Claim]) -> bool {
        let Some(greatest) = claims.iter().map(|claim| claim.epoch).max() else { return true };
        let predecessors: BTreeSet<InstanceId> = claims
            .iter()
            .flat_map(|claim| &claim.predecessors)
            .filter(|id| !self.fenced.contains(*id))
            .cloned()
            .collect();
        let list: Vec<InstanceId> = predecessors.iter().cloned().collect();
        let mut pause = Duration::from_millis(20);
        loop {
            let fences = async { if list.is_empty() { Ok(()) } else { self.store.write_fences(&list).await } };
            match try_join(fences, self.store.write(vec![note_claim(greatest)])).await {
                Ok(((), ())) => break,
                Err(StoreError::Unconfirmed(_)) => {}
                Err(error) => {
                    self.cluster.end(Ended::StoreStopped(error.to_string()));
                    return false;
                }
            }
            if self.pause(&mut pause).await {
                return false;
            }
        }
        if !list.is_empty() {
            tracing::info!(fenced = list.len(), "predecessors are fenced");
        }
        self.fenced.extend(predecessors);
        true
    }

    /// Cuts the predecessor lists, each only if the claim is unchanged, and hands the shards to their workers.
    async fn activate(&mut self, claims: Vec<Claim>) {
        let mut pause = Duration::from_millis(20);
        let cut = loop {
            match self.registry.cut_predecessors(&claims).await {
                Ok(cut) => break cut,
                Err(error) => tracing::debug!(%error, "the predecessor lists could not be cut; trying again"),
            }
            if self.pause(&mut pause).await {
                return;
            }
        };
        for (claim, unchanged) in claims.into_iter().zip(cut) {
            let shard = claim.shard;
            if !unchanged {
                self.tell(shard, move |worker| worker.shard_lost(shard));
                continue;
            }
            self.held.insert(shard, claim.clone());
            // Before anybody can see that it is served.
            self.cluster.metrics.shards_owned.set(self.held.len() as f64);
            self.spawn_activation(claim);
        }
    }

    /// Reads which conversations the last owner left busy, then the shard is served.
    fn spawn_activation(&self, claim: Claim) {
        let (store, cluster) = (self.store.clone(), self.cluster.clone());
        self.cluster.environment.spawn(async move {
            let mut pause = Duration::from_millis(20);
            let busy = loop {
                match busy_conversations(&store, claim.shard).await {
                    Ok(busy) => break busy,
                    Err(StoreError::Unconfirmed(_)) => {
                        tokio::time::sleep(pause + cluster.environment.jitter(pause)).await;
                        pause = (pause * 2).min(Duration::from_secs(1));
                    }
                    Err(error) => return cluster.end(Ended::StoreStopped(error.to_string())),
                }
            };
            let worker = cluster.worker_of(claim.shard);
            cluster.to_worker(worker, Input::Run(Box::new(move |worker| worker.shard_active(claim, busy))));
        });
    }

    /// The last of these shards, as many as may be given up at once, take nothing new from now on and finish what is in flight; the
    /// others are served meanwhile. One that the store does not let finish is as good as lost after the time that a batch may take,
    /// and its next owner begins above its epoch.
    fn release(&mut self, shards: &mut Vec<ShardId>) {
        let room = CLAIMS_PER_CALL_MAX.saturating_sub(self.releasing.len());
        for shard in shards.split_off(shards.len().saturating_sub(room)) {
            let Some(claim) = self.held.remove(&shard) else { continue };
            self.released_under.insert(shard, claim.epoch);
            self.releasing.insert(shard);
            let (done, settled) = oneshot::channel();
            self.tell(shard, move |worker| worker.shard_releasing(shard, done));
            let (patience, finishes) = (self.cluster.config.append_patience, self.finishes.clone());
            self.cluster.environment.spawn(async move {
                // A channel without a sender: the worker has lost the shard, or has ended.
                let settled = tokio::time::timeout(patience, settled).await.is_ok();
                let _ = finishes.send(Finished { claim, settled }).await;
            });
        }
    }

    /// Gives up the claim of a shard that has finished, and of all others that have finished by now.
    async fn give_up_finished(&mut self, first: Finished) {
        let mut finished = vec![first];
        finished.extend(std::iter::from_fn(|| self.finished.try_recv().ok()));
        let mut claims = Vec::with_capacity(finished.len());
        for Finished { claim, settled } in finished {
            let shard = claim.shard;
            if !settled {
                tracing::warn!(shard = shard.0, "a shard is given up with writes that the store has not confirmed");
                self.tell(shard, move |worker| worker.shard_lost(shard));
            }
            self.releasing.remove(&shard);
            claims.push(claim);
        }
        self.give_up(&claims).await;
    }

    async fn give_up(&self, claims: &[Claim]) {
        if let Err(error) = self.registry.release(claims).await {
            tracing::warn!(%error, "claims could not be given up; trying again while the view shows them");
        }
    }

    /// Others stop choosing this router before it gives anything up; what it gives up then has a next owner at once. Without an answer
    /// they learn it from the end of its registration.
    async fn mark_draining(&self) {
        let me = &self.cluster.config.instance;
        let Some(instance) = self.registry.view().borrow().instances.get(me).cloned() else { return };
        let update = self.registry.update(&self.lease, Instance { draining: true, ..instance });
        match tokio::time::timeout(FAREWELL, update).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the registry does not know that this router drains"),
            Err(_) => tracing::debug!("the registry was not told in time that this router drains"),
        }
    }

    async fn release_all(&mut self) {
        self.mark_draining().await;
        let mut shards: Vec<ShardId> = self.held.keys().copied().collect();
        loop {
            self.release(&mut shards);
            if self.releasing.is_empty() {
                break;
            }
            let Some(finished) = self.finished.recv().await else { break };
            self.give_up_finished(finished).await;
        }
        if let Err(error) = self.registry.revoke(&self.lease).await {
            tracing::debug!(%error, "the lease could not be revoked; it runs out");
        }
    }

    fn tell(&self, shard: ShardId, step: impl FnOnce(&mut crate::worker::Worker) + Send + 'static) {
        self.cluster.to_worker(self.cluster.worker_of(shard), Input::Run(Box::new(step)));
    }
}
