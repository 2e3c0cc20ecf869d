//! The rules, as a plain state machine: time comes in as an argument, nothing waits.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use im_proto::{Epoch, InstanceId, ShardId};
use tokio::time::Instant;

use super::handle::Process;
use crate::{Claim, ClaimOutcome, Instance, RegistryError, View};

pub(super) struct State {
    generation: u64,
    /// Claims were lost, and nobody has raised the generation since.
    is_lost: bool,
    revision: u64,
    leases: BTreeMap<u64, LeaseRow>,
    last_lease: u64,
    /// Which lease each claim in the view is bound to.
    holders: BTreeMap<ShardId, u64>,
    /// Keys without a lease.
    predecessors: BTreeMap<ShardId, Vec<InstanceId>>,
    view: Arc<View>,
    processes: Vec<Weak<Process>>,
}

struct LeaseRow {
    instance: InstanceId,
    ttl: Duration,
    expires_at: Instant,
}

impl State {
    pub(super) fn new(generation: u64, first_revision: u64) -> Self {
        Self {
            generation,
            is_lost: false,
            revision: first_revision,
            leases: BTreeMap::new(),
            last_lease: 0,
            holders: BTreeMap::new(),
            predecessors: BTreeMap::new(),
            view: Arc::new(View { revision: first_revision, ..View::default() }),
            processes: Vec::new(),
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn lose(&mut self, revision: u64) {
        self.is_lost = true;
        self.holders.clear();
        self.predecessors.clear();
        self.revision = revision;
        self.change(|view, _| view.claims.clear());
    }

    pub(super) fn recover(&mut self, generation: u64) {
        if generation > self.generation {
            self.is_lost = false;
            self.generation = generation;
        }
    }

    pub(super) fn view(&self) -> Arc<View> {
        self.view.clone()
    }

    /// From now on the process is told of each change.
    pub(super) fn attach(&mut self, process: &Arc<Process>) {
        self.processes.retain(|process| process.strong_count() > 0);
        self.processes.push(Arc::downgrade(process));
    }

    pub(super) fn register(&mut self, instance: Instance, ttl: Duration, now: Instant) -> Result<u64, RegistryError> {
        self.expire(now);
        if self.view.instances.contains_key(&instance.id) {
            return Err(RegistryError::InUse(format!("the instance id {} is registered already", instance.id)));
        }
        self.last_lease += 1;
        let row = LeaseRow { instance: instance.id.clone(), ttl, expires_at: now + ttl };
        self.leases.insert(self.last_lease, row);
        self.change(|view, _| {
            view.instances.insert(instance.id.clone(), instance);
        });
        Ok(self.last_lease)
    }

    pub(super) fn update(&mut self, lease: u64, instance: Instance, now: Instant) -> Result<(), RegistryError> {
        let owner = self.live(lease, &instance.id, now)?;
        if owner != instance.id {
            return Err(RegistryError::InUse(format!("the lease of {owner} cannot register {}", instance.id)));
        }
        self.change(|view, _| {
            view.instances.insert(instance.id.clone(), instance);
        });
        Ok(())
    }

    /// `false` if the lease is dead.
    pub(super) fn keep_alive(&mut self, lease: u64, now: Instant) -> bool {
        self.expire(now);
        match self.leases.get_mut(&lease) {
            Some(row) => {
                row.expires_at = now + row.ttl;
                true
            }
            None => false,
        }
    }

    pub(super) fn revoke(&mut self, lease: u64) {
        let Some(row) = self.leases.remove(&lease) else { return };
        let held: Vec<ShardId> =
            self.holders.iter().filter(|(_, holder)| **holder == lease).map(|(shard, _)| *shard).collect();
        for shard in &held {
            self.holders.remove(shard);
        }
        self.change(|view, _| {
            view.instances.remove(&row.instance);
            for shard in &held {
                view.claims.remove(shard);
            }
        });
    }

    /// Ends the leases whose time is over. Predecessor lists stay.
    pub(super) fn expire(&mut self, now: Instant) {
        let dead: Vec<u64> = self.leases.iter().filter(|(_, row)| row.expires_at <= now).map(|(id, _)| *id).collect();
        for lease in dead {
            self.revoke(lease);
        }
    }

    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|row| row.expires_at).min()
    }

    pub(super) fn claim(
        &mut self,
        lease: u64,
        instance: &InstanceId,
        generation: u64,
        shards: &[ShardId],
        now: Instant,
    ) -> Result<Vec<ClaimOutcome>, RegistryError> {
        let owner = self.live(lease, instance, now)?;
        if self.is_lost || generation != self.generation {
            let found = self.generation;
            let why = format!("it lost its data, or is at generation {found} and this process at {generation}");
            return Err(RegistryError::Refused(why));
        }
        let free: Vec<ShardId> = shards.iter().copied().filter(|shard| !self.holders.contains_key(shard)).collect();
        if !free.is_empty() {
            for shard in &free {
                self.holders.insert(*shard, lease);
                let list = self.predecessors.entry(*shard).or_default();
                if !list.contains(&owner) {
                    list.push(owner.clone());
                }
            }
            self.change(|view, epoch| {
                for shard in &free {
                    let claim = Claim { shard: *shard, owner: owner.clone(), epoch, predecessors: Vec::new() };
                    view.claims.insert(*shard, claim);
                }
            });
        }
        Ok(shards.iter().map(|shard| self.outcome(lease, *shard)).collect())
    }

    fn outcome(&self, lease: u64, shard: ShardId) -> ClaimOutcome {
        match self.view.claims.get(&shard) {
            Some(claim) if self.holders.get(&shard) == Some(&lease) => {
                let list = self.predecessors.get(&shard).into_iter().flatten();
                let predecessors = list.filter(|instance| **instance != claim.owner).cloned().collect();
                ClaimOutcome::Claimed(Claim { predecessors, ..claim.clone() })
            }
            _ => ClaimOutcome::Taken(shard),
        }
    }

    pub(super) fn cut_predecessors(&mut self, claims: &[Claim], now: Instant) -> Vec<bool> {
        self.expire(now);
        let unchanged: Vec<bool> = claims.iter().map(|claim| self.is_unchanged(claim)).collect();
        for (claim, _) in claims.iter().zip(&unchanged).filter(|(_, unchanged)| **unchanged) {
            self.predecessors.insert(claim.shard, vec![claim.owner.clone()]);
        }
        unchanged
    }

    pub(super) fn release(&mut self, claims: &[Claim], now: Instant) {
        self.expire(now);
        let released: Vec<&Claim> = claims.iter().filter(|claim| self.is_unchanged(claim)).collect();
        if released.is_empty() {
            return;
        }
        for claim in &released {
            self.holders.remove(&claim.shard);
            if let Some(list) = self.predecessors.get_mut(&claim.shard) {
                list.retain(|instance| *instance != claim.owner);
            }
        }
        self.change(|view, _| {
            for claim in released {
                view.claims.remove(&claim.shard);
            }
        });
    }

    pub(super) fn raise_epoch(&mut self, claim: &Claim, now: Instant) -> Option<Claim> {
        self.expire(now);
        if !self.is_unchanged(claim) {
            return None;
        }
        let mut raised = claim.clone();
        self.change(|view, epoch| {
            raised.epoch = epoch;
            view.claims.insert(claim.shard, Claim { predecessors: Vec::new(), ..raised.clone() });
        });
        Some(raised)
    }

    /// The claim stands as its holder last saw it: the same owner at the same revision.
    fn is_unchanged(&self, claim: &Claim) -> bool {
        let standing = self.view.claims.get(&claim.shard);
        standing.is_some_and(|standing| standing.owner == claim.owner && standing.epoch == claim.epoch)
    }

    fn live(&mut self, lease: u64, instance: &InstanceId, now: Instant) -> Result<InstanceId, RegistryError> {
        self.expire(now);
        let row = self.leases.get(&lease).ok_or_else(|| RegistryError::LeaseLost(instance.clone()))?;
        Ok(row.instance.clone())
    }

    /// Gives a change its revision and tells the processes.
    fn change(&mut self, apply: impl FnOnce(&mut View, Epoch)) {
        self.revision += 1;
        let view = Arc::make_mut(&mut self.view);
        view.revision = self.revision;
        apply(view, Epoch::new(self.generation, self.revision));
        for process in self.processes.iter().filter_map(Weak::upgrade) {
            process.publish(&self.view);
        }
    }
}
