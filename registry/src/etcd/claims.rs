//! Claims: one transaction for up to 64 shards, in which each shard is decided by a nested transaction of its own.
//!
//! All of it hangs on the cluster record (see `lineage`), which an etcd that lost its data does not have. A transaction that is
//! guarded by a claim compares the claim's value, which names one start of one process under one lease, and its revision: after a
//! restore revisions repeat.
//!
//! Predecessor lists are never deleted, only emptied, so that a late copy of a transaction finds their revision changed.

use std::collections::{BTreeMap, BTreeSet};

use etcd_client::{Compare, CompareOp, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse};
use im_proto::{Epoch, InstanceId, ShardId};

use super::{
    keys::{self, ClaimValue},
    leases::Identity,
    mirror::ListRow,
    shared::{Shared, lease_number, revision},
    transport::{CallError, origin},
};
use crate::{CLAIMS_PER_CALL_MAX, Claim, ClaimOutcome, Lease, RegistryError};

/// A list is taken from the mirror first, then as the transaction found it. Nobody changes it so often.
const ATTEMPTS: usize = 3;
/// Bytes of one transaction; etcd takes 1.5 MiB. Only lists of hundreds of dead instances come near it.
const TXN_BYTES_MAX: usize = 512 << 10;
/// What a nested transaction needs besides lists: four keys and a claim value, each a few times.
const STEP_BYTES: usize = 1 << 10;

/// What one shard's part of a transaction said.
type Answer = (ShardId, TxnResponse);

/// One shard's part of a transaction.
struct Step {
    shard: ShardId,
    txn: Txn,
    bytes: usize,
}

/// Who claims, as it stands in the values of claims.
struct Claimer {
    owner: InstanceId,
    lease: i64,
    generation: u64,
    value: Vec<u8>,
}

impl Claimer {
    fn new(identity: &Identity, generation: u64) -> Self {
        let instance = identity.instance();
        let (lease, owner) = (lease_number(identity.lease), instance.id.clone());
        let value = ClaimValue { instance: instance.id, boot: instance.boot, lease, generation };
        Self { owner, lease: identity.lease, generation, value: value.encode() }
    }

    fn claim(&self, shard: ShardId, at: u64, list: &[InstanceId]) -> Claim {
        let predecessors = list.iter().filter(|listed| **listed != self.owner).cloned().collect();
        Claim { shard, owner: self.owner.clone(), epoch: Epoch::new(self.generation, at), predecessors }
    }
}

impl Shared {
    pub(super) async fn claim(&self, lease: &Lease, shards: &[ShardId]) -> Result<Vec<ClaimOutcome>, RegistryError> {
        check_count(shards.len())?;
        let identity = self.identity(lease)?;
        let claimer = Claimer::new(&identity, self.generation.unwrap_or(0));
        let mut pending: BTreeMap<ShardId, ListRow> = {
            let mirror = self.mirror.lock();
            shards.iter().map(|shard| (*shard, mirror.list(*shard))).collect()
        };
        let mut claimed = BTreeMap::new();
        for _ in 0..ATTEMPTS {
            let steps = pending.iter().map(|(shard, list)| self.claim_step(&claimer, *shard, list)).collect();
            let answers = match self.under_record(steps).await {
                Ok(answers) => answers,
                Err(StepsError::LeaseNotFound) => return Err(self.lease_not_found(&identity, &lease.instance).await),
                Err(StepsError::Failed(error)) => return Err(error),
            };
            let lists = std::mem::take(&mut pending);
            for (at, (shard, answer)) in answers {
                if answer.succeeded() {
                    let list = lists.get(&shard).map_or(&[][..], |list| &list.instances);
                    claimed.insert(shard, claimer.claim(shard, checked(at)?, list));
                    continue;
                }
                match self.judge(&claimer, shard, &answer)? {
                    Found::Ours { at, list } => {
                        claimed.insert(shard, claimer.claim(shard, checked(at)?, &list.instances));
                    }
                    Found::Free(list) => {
                        pending.insert(shard, list);
                    }
                    Found::Taken => {}
                }
            }
            if pending.is_empty() {
                break;
            }
        }
        self.metrics.claims.increment(claimed.len() as u64);
        let outcomes: Vec<ClaimOutcome> = shards
            .iter()
            .map(|shard| claimed.get(shard).cloned().map_or(ClaimOutcome::Taken(*shard), ClaimOutcome::Claimed))
            .collect();
        let taken = outcomes.iter().filter(|outcome| matches!(outcome, ClaimOutcome::Taken(_))).count();
        self.metrics.claims_taken.increment(taken as u64);
        Ok(outcomes)
    }

    /// If the shard is free and its list as read: creates the claim and appends the claimer to the list.
    fn claim_step(&self, claimer: &Claimer, shard: ShardId, list: &ListRow) -> Step {
        let (claim_key, list_key) = (self.keys.claim(shard), self.keys.list(shard));
        let mut appended = list.instances.clone();
        if !appended.contains(&claimer.owner) {
            appended.push(claimer.owner.clone());
        }
        let mut when = vec![Compare::create_revision(claim_key.clone(), CompareOp::Equal, 0)];
        when.extend(list_as_read(&list_key, list));
        let lists = keys::encode_list(&appended);
        let bytes = STEP_BYTES + list.bytes.len() + lists.len();
        let options = PutOptions::new().with_lease(claimer.lease);
        let txn = Txn::new()
            .when(when)
            .and_then([
                TxnOp::put(claim_key.clone(), claimer.value.clone(), Some(options)),
                TxnOp::put(list_key.clone(), lists, None),
            ])
            .or_else([TxnOp::get(claim_key, None), TxnOp::get(list_key, None)]);
        Step { shard, txn, bytes }
    }

    /// Reads what a step found in place of what it required.
    fn judge(&self, claimer: &Claimer, shard: ShardId, answer: &TxnResponse) -> Result<Found, RegistryError> {
        let found = answer.op_responses();
        let [TxnOpResponse::Get(claim), TxnOpResponse::Get(list)] = &found[..] else {
            return Err(RegistryError::Unavailable("etcd answered other than asked".to_owned()));
        };
        let list = match list.kvs().first() {
            None => ListRow::default(),
            // Whom to fence is not known: the shard must stay without owner until somebody looks.
            Some(found) => ListRow::read(found.value(), revision(found.mod_revision())).map_err(|error| {
                let key = self.keys.list(shard);
                RegistryError::Refused(format!("the predecessor list {key} cannot be read: {error}"))
            })?,
        };
        Ok(match claim.kvs().first() {
            None => Found::Free(list),
            Some(claim) if claim.value() == claimer.value && claim.lease() == claimer.lease => {
                Found::Ours { at: revision(claim.mod_revision()), list }
            }
            Some(_) => Found::Taken,
        })
    }

    pub(super) async fn cut_predecessors(&self, claims: &[Claim]) -> Result<Vec<bool>, RegistryError> {
        check_count(claims.len())?;
        let guarded = self.guards(claims);
        let steps = guarded.iter().map(|(shard, (claimer, guard))| {
            let alone = keys::encode_list(std::slice::from_ref(&claimer.owner));
            let txn = Txn::new().when(guard.to_vec()).and_then([TxnOp::put(self.keys.list(*shard), alone, None)]);
            Step { shard: *shard, txn, bytes: STEP_BYTES }
        });
        let answers = self.under_record(steps.collect()).await.map_err(StepsError::unbound)?;
        let cut: BTreeSet<ShardId> =
            answers.into_iter().filter(|(_, (_, answer))| answer.succeeded()).map(|(_, (shard, _))| shard).collect();
        Ok(claims.iter().map(|claim| cut.contains(&claim.shard)).collect())
    }

    pub(super) async fn release(&self, claims: &[Claim]) -> Result<(), RegistryError> {
        check_count(claims.len())?;
        let guarded = self.guards(claims);
        let mut pending: BTreeMap<ShardId, ListRow> = {
            let mirror = self.mirror.lock();
            guarded.keys().map(|shard| (*shard, mirror.list(*shard))).collect()
        };
        for _ in 0..ATTEMPTS {
            let steps = pending.iter().filter_map(|(shard, list)| {
                let (claimer, guard) = guarded.get(shard)?;
                Some(self.release_step(claimer, *shard, guard, list))
            });
            // Also where nothing may be claimed: whoever gives up does no harm.
            let answers = self.run(steps.collect(), None).await.map_err(StepsError::unbound)?;
            let retried = std::mem::take(&mut pending);
            for (_, (shard, answer)) in answers.into_iter().filter(|(_, (_, answer))| !answer.succeeded()) {
                let Some((claimer, _)) = guarded.get(&shard) else { continue };
                // If the claim stands after all, the list was not as read: in the next attempt it is.
                if let Found::Ours { list, .. } = self.judge(claimer, shard, &answer)?
                    && retried.get(&shard).is_some_and(|read| *read != list)
                {
                    pending.insert(shard, list);
                }
            }
            if pending.is_empty() {
                return Ok(());
            }
        }
        Err(RegistryError::Unavailable("the predecessor lists change all the time".to_owned()))
    }

    fn release_step(&self, claimer: &Claimer, shard: ShardId, guard: &[Compare], list: &ListRow) -> Step {
        let (claim_key, list_key) = (self.keys.claim(shard), self.keys.list(shard));
        let left: Vec<InstanceId> = list.instances.iter().filter(|id| **id != claimer.owner).cloned().collect();
        let mut when = guard.to_vec();
        when.extend(list_as_read(&list_key, list));
        let txn = Txn::new()
            .when(when)
            .and_then([
                TxnOp::delete(claim_key.clone(), None),
                TxnOp::put(list_key.clone(), keys::encode_list(&left), None),
            ])
            .or_else([TxnOp::get(claim_key, None), TxnOp::get(list_key, None)]);
        Step { shard, txn, bytes: STEP_BYTES + 2 * list.bytes.len() }
    }

    pub(super) async fn raise_epoch(&self, claim: &Claim) -> Result<Option<Claim>, RegistryError> {
        let mut guarded = self.guards(std::slice::from_ref(claim));
        let Some((claimer, guard)) = guarded.remove(&claim.shard) else { return Ok(None) };
        let options = PutOptions::new().with_lease(claimer.lease);
        let put = TxnOp::put(self.keys.claim(claim.shard), claimer.value.clone(), Some(options));
        let txn = Txn::new().when(guard).and_then([put]);
        let step = Step { shard: claim.shard, txn, bytes: STEP_BYTES };
        let answers = match self.under_record(vec![step]).await {
            Ok(answers) => answers,
            Err(StepsError::LeaseNotFound) => {
                let Some(identity) = self.identities.lock().get(&claim.owner).cloned() else { return Ok(None) };
                return Err(self.lease_not_found(&identity, &claim.owner).await);
            }
            Err(StepsError::Failed(error)) => return Err(error),
        };
        match answers.into_iter().next() {
            Some((at, (_, answer))) if answer.succeeded() => {
                Ok(Some(Claim { epoch: Epoch::new(claimer.generation, checked(at)?), ..claim.clone() }))
            }
            _ => Ok(None),
        }
    }

    /// What must hold for each claim to be unchanged. Claims that this process cannot hold any more have none.
    fn guards(&self, claims: &[Claim]) -> BTreeMap<ShardId, (Claimer, Vec<Compare>)> {
        let mut guards = BTreeMap::new();
        for claim in claims {
            let Some(identity) = self.identities.lock().get(&claim.owner).cloned() else { continue };
            let claimer = Claimer::new(&identity, self.generation.unwrap_or(0));
            if claim.epoch.generation() != claimer.generation {
                continue;
            }
            let key = self.keys.claim(claim.shard);
            let at = i64::try_from(claim.epoch.0 & REVISION_MASK).unwrap_or(i64::MAX);
            let guard = vec![
                Compare::value(key.clone(), CompareOp::Equal, claimer.value.clone()),
                Compare::mod_revision(key, CompareOp::Equal, at),
            ];
            guards.insert(claim.shard, (claimer, guard));
        }
        guards
    }

    /// Runs steps only if the cluster record is the one that this process may claim under.
    async fn under_record(&self, steps: Vec<Step>) -> Result<Vec<(u64, Answer)>, StepsError> {
        if steps.is_empty() {
            return Ok(Vec::new());
        }
        let record = match self.may_claim() {
            Ok(record) => record,
            Err(reason) => {
                // It may have been written a moment ago.
                self.reconcile_soon.notify_one();
                return Err(RegistryError::Refused(reason).into());
            }
        };
        self.run(steps, Some(record)).await
    }

    /// Runs steps in as few transactions as etcd allows. Each answer comes with the revision of its transaction.
    async fn run(&self, steps: Vec<Step>, record: Option<Vec<u8>>) -> Result<Vec<(u64, Answer)>, StepsError> {
        let mut answers = Vec::with_capacity(steps.len());
        for steps in batches(steps) {
            let (shards, operations): (Vec<ShardId>, Vec<TxnOp>) =
                steps.into_iter().map(|step| (step.shard, TxnOp::txn(step.txn))).unzip();
            let record_key = self.keys.cluster();
            let mut txn = Txn::new();
            if let Some(record) = &record {
                txn = txn.when([Compare::value(record_key.clone(), CompareOp::Equal, record.clone())]);
            }
            let txn = txn.and_then(operations).or_else([TxnOp::get(record_key, None)]);
            let answer = match self.txn(txn).await {
                Ok(answer) => answer,
                Err(CallError::LeaseNotFound) => return Err(StepsError::LeaseNotFound),
                Err(error) => return Err(RegistryError::from(error).into()),
            };
            let responses = answer.op_responses();
            if !answer.succeeded() {
                return Err(self.record_differs(first_found(&responses)).into());
            }
            let at = origin(answer.header()).map_err(RegistryError::from)?.revision;
            for (shard, response) in shards.into_iter().zip(responses) {
                if let TxnOpResponse::Txn(response) = response {
                    answers.push((at, (shard, response)));
                }
            }
        }
        Ok(answers)
    }
}

/// Why steps were not run.
enum StepsError {
    /// etcd does not know the lease that a claim was to be bound to.
    LeaseNotFound,
    Failed(RegistryError),
}

impl From<RegistryError> for StepsError {
    fn from(error: RegistryError) -> Self {
        StepsError::Failed(error)
    }
}

impl StepsError {
    /// Of steps that are bound to no lease.
    fn unbound(self) -> RegistryError {
        match self {
            StepsError::Failed(error) => error,
            StepsError::LeaseNotFound => {
                RegistryError::Unavailable("etcd speaks of a lease that is not asked for".to_owned())
            }
        }
    }
}

/// What stands in place of what a step required.
enum Found {
    /// The very claim that it would have made, or guards it.
    Ours {
        at: u64,
        list: ListRow,
    },
    /// No claim; the list differs from what was read.
    Free(ListRow),
    Taken,
}

const REVISION_MASK: u64 = (1 << Epoch::REVISION_BITS) - 1;

fn list_as_read(key: &str, list: &ListRow) -> Vec<Compare> {
    let at = i64::try_from(list.mod_revision).unwrap_or(i64::MAX);
    let mut compares = vec![Compare::mod_revision(key, CompareOp::Equal, at)];
    if list.mod_revision > 0 {
        compares.push(Compare::value(key, CompareOp::Equal, list.bytes.clone()));
    }
    compares
}

fn first_found(responses: &[TxnOpResponse]) -> Option<&KeyValue> {
    match responses.first()? {
        TxnOpResponse::Get(found) => found.kvs().first(),
        _ => None,
    }
}

/// At most 64 steps and [`TXN_BYTES_MAX`] bytes each, a single step aside.
fn batches(steps: Vec<Step>) -> Vec<Vec<Step>> {
    let mut batches: Vec<Vec<Step>> = Vec::new();
    let mut bytes = 0;
    for step in steps {
        match batches.last_mut() {
            Some(batch) if batch.len() < CLAIMS_PER_CALL_MAX && bytes + step.bytes <= TXN_BYTES_MAX => {
                bytes += step.bytes;
                batch.push(step);
            }
            _ => {
                bytes = step.bytes;
                batches.push(vec![step]);
            }
        }
    }
    batches
}

/// An epoch has room for 2^40 revisions: 34 years at 1,000 a second.
fn checked(revision: u64) -> Result<u64, RegistryError> {
    if revision > REVISION_MASK {
        return Err(RegistryError::Refused(format!(
            "etcd is at revision {revision}, beyond what an epoch can hold: replace it by an empty one and run `imd cluster recover`"
        )));
    }
    Ok(revision)
}

pub(super) fn check_count(found: usize) -> Result<(), RegistryError> {
    if found > CLAIMS_PER_CALL_MAX {
        return Err(RegistryError::TooManyShards { found });
    }
    Ok(())
}
