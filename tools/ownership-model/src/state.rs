//! One state of the whole system: replicas, registry, owners, and what has been committed.

use std::hash::{Hash, Hasher};

use crate::owner::{CLAIMS, Owner, Phase};
use crate::rules::{Bounds, LeaveOut, Rules};
use crate::storage::{Cell, EVERY_REPLICA, NO_ROWS, REPLICAS, Replicas, Rows, SEQS, Storage, packed};

/// Epochs of one generation: the model's `2^40`.
pub const EPOCHS_IN_A_GENERATION: u8 = 5;

/// How an invariant was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Violation {
    /// Some pair of replicas does not give back the committed entry, or will not once a write that is under way
    /// arrives.
    Lost { seq: u8 },
    /// One message was committed at two seqs.
    TwoSeqs { message: u8 },
    /// The owner of this claim found a seq missing at or below the head.
    Hole { owner: u8 },
    /// Two messages were committed at one seq.
    TwoEntries { seq: u8 },
    /// Two rows differ that carry one epoch and one seq, so that a replica may mix their columns.
    Reused { seq: u8 },
}

/// A committed entry that a pair of replicas does not give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    pub seq: u8,
    pub pair: [usize; 2],
    /// The write whose arrival at one of the pair does it; none if the replicas are there already.
    pub after: Option<Rows>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub storage: Storage,
    pub owners: [Owner; CLAIMS],
    pub registry: Registry,
    pub fences: Fences,
    /// Instances and messages are numbered in the order of their first use, so that no two states differ by names only.
    pub instances: u8,
    pub messages: u8,
    /// The committed message at each seq, from seq 1.
    pub committed: [u8; SEQS],
    pub left: Budget,
    /// Deliveries so far; only for the leave-out `ts`.
    pub clock: u8,
    pub violation: Option<Violation>,
    pub names: ReplicaNames,
}

/// The registry: one claim key, one predecessor list, one counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Registry {
    /// Number of the claim, from 1, whose holder the registry names; 0 if none.
    pub claim: u8,
    /// The counter when the claim key was last put. Kept only for the leave-out `identity`.
    pub claim_revision: u8,
    /// Instances in the order of their claims; 0 beyond the end.
    pub predecessors: [u8; CLAIMS],
    /// The revision, as far as epochs are concerned.
    pub counter: u8,
}

impl Registry {
    pub fn append(&mut self, instance: u8) {
        self.remove(instance);
        if let Some(free) = self.predecessors.iter_mut().find(|listed| **listed == 0) {
            *free = instance;
        }
    }

    pub fn remove(&mut self, instance: u8) {
        let kept = self.predecessors.into_iter().filter(|listed| *listed != instance && *listed != 0);
        let mut predecessors = [0; CLAIMS];
        for (slot, listed) in predecessors.iter_mut().zip(kept) {
            *slot = listed;
        }
        self.predecessors = predecessors;
    }

    pub fn cut_to(&mut self, instance: u8) {
        self.predecessors = [0; CLAIMS];
        self.predecessors[0] = instance;
    }
}

/// The fence partitions: which replicas hold the fence row of an instance, and which the generation.
///
/// The coarse grain knows all replicas or none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Fences {
    /// Instances whose fence row was written, as a bit set. Fine grain only.
    pub written: u8,
    /// By instance, which counts from 1.
    pub on: [Replicas; CLAIMS + 1],
    pub generation: u8,
    pub generation_on: Replicas,
}

impl Fences {
    pub fn confirmed(&self, instances: u8) -> bool {
        (1..=CLAIMS).filter(|instance| instances & 1 << instance != 0).all(|instance| is_quorum(self.on[instance]))
    }
}

pub fn is_quorum(replicas: Replicas) -> bool {
    replicas.count_ones() >= 2
}

/// What may still happen a bounded number of times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    pub releases: u8,
    pub raises: u8,
    pub retries: u8,
    pub recoveries: u8,
}

/// The printed name of each replica. The replicas of a state are sorted, because their names do not matter to the
/// protocol; this remembers which is which for the reader of a schedule, and is no part of the state's identity.
#[derive(Clone, Copy, Debug)]
pub struct ReplicaNames(pub [char; REPLICAS]);

impl PartialEq for ReplicaNames {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for ReplicaNames {}

impl State {
    pub fn initial(bounds: &Bounds) -> Self {
        Self {
            storage: Storage::default(),
            owners: [Owner::default(); CLAIMS],
            registry: Registry::default(),
            fences: Fences { generation_on: EVERY_REPLICA, ..Fences::default() },
            instances: 0,
            messages: 0,
            committed: [0; SEQS],
            left: Budget {
                releases: bounds.releases,
                raises: bounds.raises,
                retries: bounds.retries,
                recoveries: bounds.recoveries,
            },
            clock: 0,
            violation: None,
            names: ReplicaNames(['a', 'b', 'c']),
        }
    }

    /// Whether a transaction of `owner` that is guarded by its own claim would go through.
    pub fn holds_claim(&self, owner: usize, rules: Rules) -> bool {
        if rules.lack(LeaveOut::Identity) {
            let revision = self.owners[owner].epoch % EPOCHS_IN_A_GENERATION;
            return self.registry.claim != 0 && revision == self.registry.claim_revision;
        }
        usize::from(self.registry.claim) == owner + 1
    }

    /// Puts the claim key for `owner`, which gives it an epoch.
    pub fn put_claim(&mut self, owner: usize, generation: u8, rules: Rules) -> u8 {
        self.registry.counter += 1;
        self.registry.claim = owner as u8 + 1;
        if rules.lack(LeaveOut::Identity) {
            self.registry.claim_revision = self.registry.counter;
        }
        generation * EPOCHS_IN_A_GENERATION + self.registry.counter
    }

    /// Whether any fence read that `owner` begins now finds a fence. Before a quorum holds the row or the generation
    /// a read may miss it, so this one moment stands for both halves of a read (docs/ownership.md, "What the model
    /// covers").
    pub fn is_fenced(&self, owner: usize, rules: Rules) -> bool {
        self.sees_fence(owner, rules, is_quorum)
    }

    /// Whether the fence read of `owner` finds a fence at this replica.
    pub fn is_fenced_at(&self, owner: usize, replica: usize, rules: Rules) -> bool {
        self.sees_fence(owner, rules, |on| on & 1 << replica != 0)
    }

    fn sees_fence(&self, owner: usize, rules: Rules, sees: impl Fn(Replicas) -> bool) -> bool {
        let Owner { instance, generation, .. } = self.owners[owner];
        let old = generation != self.fences.generation && sees(self.fences.generation_on);
        let old = old && !rules.lack(LeaveOut::OldGeneration);
        !rules.lack(LeaveOut::Fence) && (old || sees(self.fences.on[usize::from(instance)]))
    }

    /// Records that the log of `owner` is committed from seq 1 to its head.
    pub fn commit_log(&mut self, owner: usize) {
        let log = self.owners[owner].log;
        for (index, message) in log.into_iter().enumerate().take_while(|(_, message)| *message != 0) {
            if self.committed[index] == 0 {
                self.committed[index] = message;
            } else if self.committed[index] != message {
                self.violation = Some(Violation::TwoEntries { seq: index as u8 + 1 });
                return;
            }
            if self.committed.iter().filter(|committed| **committed == message).count() > 1 {
                self.violation = Some(Violation::TwoSeqs { message });
                return;
            }
        }
    }

    /// A committed entry that some pair of replicas does not give back, or would not after one more arrival. The
    /// owners take no part in an arrival, so nothing can keep it from happening next.
    pub fn loss(&self, arrival_decides: bool) -> Option<Loss> {
        let replicas = &self.storage.replicas;
        for (index, message) in self.committed.iter().enumerate().filter(|(_, message)| **message != 0) {
            for (first, second) in [(0, 1), (0, 2), (1, 2)] {
                let read = replicas[first][index].max(replicas[second][index]);
                let pair = 1 << first | 1 << second;
                let loss = Loss { seq: index as u8 + 1, pair: [first, second], after: None };
                if read.message() != *message {
                    return Some(loss);
                }
                let foreign = self.storage.writes.iter().find(|write| {
                    let cell = write.rows[index];
                    let differs = !cell.is_empty() && cell.message() != *message;
                    differs && write.on & pair != pair && (arrival_decides || cell > read)
                });
                if let Some(write) = foreign {
                    return Some(Loss { after: Some(write.rows), ..loss });
                }
            }
        }
        None
    }

    /// A seq at which two rows differ although they carry one epoch.
    pub fn reused_pair(&self) -> Option<u8> {
        let held = self.storage.replicas.iter();
        let rows = || held.clone().chain(self.storage.writes.iter().map(|write| &write.rows));
        (0..SEQS).find_map(|index| {
            let cells = || rows().map(|rows| rows[index]).filter(|cell| !cell.is_empty());
            let differ = |cell: Cell| cells().any(|other| other.epoch() == cell.epoch() && other != cell);
            cells().any(differ).then_some(index as u8 + 1)
        })
    }

    /// Brings the state into the one form that stands for all states that differ only in names or in what has no
    /// effect.
    pub fn settle(&mut self, rules: Rules, bounds: &Bounds) {
        self.storage.settle(rules.lack(LeaveOut::Timestamp));
        for number in 0..CLAIMS {
            if self.is_without_effect(number, rules, bounds) {
                self.owners[number].end(Phase::Stopped);
            }
        }
        self.sort_replicas();
    }

    fn is_without_effect(&self, number: usize, rules: Rules, bounds: &Bounds) -> bool {
        let owner = &self.owners[number];
        let goes_on_when_fenced = [LeaveOut::Reopen, LeaveOut::Freed, LeaveOut::CheckOrder];
        if self.holds_claim(number, rules) || goes_on_when_fenced.into_iter().any(|leave_out| rules.lack(leave_out)) {
            return false;
        }
        match owner.phase {
            Phase::Rewriting | Phase::Appending => self.is_fenced(number, rules),
            Phase::Serving => owner.head() >= usize::from(bounds.messages),
            _ => false,
        }
    }

    /// Sorts the replicas by everything that the state says of them. Those that still compare equal are
    /// interchangeable.
    fn sort_replicas(&mut self) {
        let key = |number: usize| {
            let writes =
                self.storage.writes.iter().fold(0u32, |bits, write| bits << 1 | u32::from(write.on >> number & 1));
            let first_answers = self.owners.iter().fold(0u8, |bits, owner| {
                bits << 1 | u8::from(owner.awaits_second_answer() && usize::from(owner.replica) == number)
            });
            let fences = self.fences.on.iter().chain([&self.fences.generation_on]);
            let fences = fences.fold(0u8, |bits, on| bits << 1 | on >> number & 1);
            (packed(&self.storage.replicas[number]), writes, first_answers, fences)
        };
        let keys = [key(0), key(1), key(2)];
        let mut order = [0, 1, 2];
        order.sort_by_key(|number: &usize| keys[*number]);
        if order != [0, 1, 2] {
            self.rename_replicas(order);
        }
    }

    fn rename_replicas(&mut self, order: [usize; REPLICAS]) {
        let renamed = |set: Replicas| (0..REPLICAS).fold(0, |bits, to| bits | (set >> order[to] & 1) << to);
        self.storage.replicas = order.map(|from| self.storage.replicas[from]);
        self.names.0 = order.map(|from| self.names.0[from]);
        for write in &mut self.storage.writes {
            write.on = renamed(write.on);
        }
        self.fences.on = self.fences.on.map(renamed);
        self.fences.generation_on = renamed(self.fences.generation_on);
        for owner in self.owners.iter_mut().filter(|owner| owner.awaits_second_answer()) {
            owner.replica = order.iter().position(|from| *from == usize::from(owner.replica)).unwrap_or(0) as u8;
        }
    }
}

impl Hash for State {
    /// Packs the state into few words: the checker hashes every state it generates, and does little else.
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        for replica in &self.storage.replicas {
            hasher.write_u64(packed(replica));
        }
        for write in &self.storage.writes {
            hasher.write_u64(packed(&write.rows));
            hasher.write_u8(write.on);
        }
        for owner in &self.owners {
            hasher.write_u64(u64::from_le_bytes([
                owner.phase as u8,
                owner.instance,
                owner.generation << 4 | owner.replica,
                owner.epoch,
                owner.fences,
                owner.log[0] << 4 | owner.log[1],
                owner.log[2] << 4 | owner.log[3],
                u8::from(owner.is_checked) << 2 | u8::from(owner.rows != NO_ROWS) << 1 | u8::from(owner.top != NO_ROWS),
            ]));
            for rows in [&owner.rows, &owner.top].into_iter().filter(|rows| **rows != NO_ROWS) {
                hasher.write_u64(packed(rows));
            }
        }
        let Registry { claim, claim_revision, predecessors, counter } = self.registry;
        let list = predecessors.iter().fold(0, |bits, listed| bits << 2 | listed);
        hasher.write_u64(u64::from_le_bytes([
            claim << 4 | counter,
            list,
            self.instances << 4 | self.messages,
            claim_revision,
            self.committed[0] << 4 | self.committed[1],
            self.committed[2] << 4 | self.committed[3],
            self.left.releases << 6 | self.left.raises << 4 | self.left.retries << 2 | self.left.recoveries,
            self.clock,
        ]));
        let Fences { written, on, generation, generation_on } = self.fences;
        let on = on.iter().fold(0u32, |bits, on| bits << 3 | u32::from(*on));
        hasher.write_u64(
            u64::from(on) << 32 | u64::from(written) << 16 | u64::from(generation) << 8 | u64::from(generation_on),
        );
        self.violation.hash(hasher);
    }
}
