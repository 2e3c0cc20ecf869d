//! The model as `stateright` sees it: its steps, and the invariants.

use stateright::{Model, Property};

use crate::rules::{Bounds, Grain, LeaveOut, Rules};
use crate::state::{State, Violation};
use crate::storage::Replicas;

/// The ownership protocol of one shard, seen from one conversation in it.
#[derive(Clone, Debug)]
pub struct Ownership {
    pub rules: Rules,
    pub bounds: Bounds,
    pub grain: Grain,
}

/// Who makes the next claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimant {
    /// An instance started under the present generation.
    New,
    /// An instance that makes its first claim now but was started before the registry was restored.
    Old,
    /// The instance of this earlier claim, which it released.
    Again { claim: usize },
}

/// One step. `owner` counts claims from 0; `arriving` is a bit set of the numbers of pending writes that reach the
/// replica just before it answers.
///
/// A pause or a death needs no step: any owner may be passed over, for a while or for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Claim(Claimant),
    /// A quorum holds all fence rows, and the cut of the list is tried.
    FenceAndCut {
        owner: usize,
    },
    ReadFirst {
        owner: usize,
        replica: usize,
        arriving: u32,
    },
    ReadSecond {
        owner: usize,
        replica: usize,
        arriving: u32,
    },
    /// An open that has written nothing begins again.
    RestartOpen {
        owner: usize,
    },
    /// The write in flight reaches these replicas, which makes a quorum, and the fence read begun after that is clean.
    Commit {
        owner: usize,
        arriving_at: Replicas,
    },
    /// `batch` holds message numbers; 0 for no second row.
    Append {
        owner: usize,
        batch: [u8; 2],
    },
    Release {
        owner: usize,
    },
    /// The claim key is put again; the conversation is dropped and opened under the higher epoch.
    Raise {
        owner: usize,
    },
    /// The registry comes back empty, and `imd cluster recover` raises the generation.
    Recover,
    /// Leave-out `freed`: the batch is given up, its seqs are used again.
    Refuse {
        owner: usize,
    },
    /// Leave-out `reopen`: opened again under the same epoch although a rewrite is out.
    Reopen {
        owner: usize,
    },
    /// Leave-out `repair`: a LIMIT 1 read of two replicas, with its repair.
    RepairTop {
        owner: usize,
        first: usize,
        second: usize,
    },
    /// One arrival, apart from any read: fine grain, and the leave-outs `ts` and `repair`.
    Deliver {
        write: usize,
        replica: usize,
    },
    /// Leave-out `check-order`: a clean fence read while the rows are in flight.
    CheckEarly {
        owner: usize,
    },
    // The rest is of the fine grain.
    DeliverFence {
        instance: u8,
        replica: usize,
    },
    DeliverGeneration {
        replica: usize,
    },
    FenceConfirmed {
        owner: usize,
    },
    Cut {
        owner: usize,
    },
    /// The driver says that a quorum holds the rows in flight.
    Confirmed {
        owner: usize,
    },
    CheckFirst {
        owner: usize,
        replica: usize,
    },
    CheckSecond {
        owner: usize,
        replica: usize,
    },
}

impl Model for Ownership {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::initial(&self.bounds)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        // Nothing more is to be learnt beyond a violation.
        if state.violation.is_none() {
            self.enabled(state, actions);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.apply(&mut state, action);
        state.settle(self.rules, &self.bounds);
        if state.violation.is_none() {
            state.violation =
                state.loss(self.rules.lack(LeaveOut::Timestamp)).map(|loss| Violation::Lost { seq: loss.seq });
        }
        if state.violation.is_none() && self.rules.forbid_reuse() {
            state.violation = state.reused_pair().map(|seq| Violation::Reused { seq });
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no committed entry is lost", |_, state: &State| {
                !matches!(state.violation, Some(Violation::Lost { .. }))
            }),
            Property::always("no entry is committed at two seqs", |_, state: &State| {
                !matches!(state.violation, Some(Violation::TwoSeqs { .. }))
            }),
            Property::always("the log has no hole", |_, state: &State| {
                !matches!(state.violation, Some(Violation::Hole { .. }))
            }),
            Property::always("a pair of epoch and seq is used for one entry", |_, state: &State| {
                !matches!(state.violation, Some(Violation::Reused { .. }))
            }),
            Property::always("no seq has two committed entries", |_, state: &State| {
                !matches!(state.violation, Some(Violation::TwoEntries { .. }))
            }),
        ]
    }
}
