//! The rules of the protocol, each of which can be left out, and the bounds of an exploration.
//!
//! A rule is worth its cost only if the protocol breaks without it. So every rule has a name here, and the model
//! consults [`Rules`] at the one place where the rule acts.

use std::fmt;
use std::str::FromStr;

use crate::owner::CLAIMS;
use crate::state::EPOCHS_IN_A_GENERATION;
use crate::storage::SEQS;

/// One rule of the protocol, named after what is missing when it is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum LeaveOut {
    Rewrite,
    Fence,
    Predecessors,
    Guard,
    Whole,
    Timestamp,
    Committed,
    Freed,
    Reopen,
    Split,
    Repair,
    OldGeneration,
    Recover,
    Identity,
    ReadOrder,
    CheckOrder,
    AlarmOrder,
    OwnCheck,
}

impl LeaveOut {
    /// All that the model can leave out.
    pub const ALL: [Self; 18] = [
        Self::Rewrite,
        Self::Fence,
        Self::Predecessors,
        Self::Guard,
        Self::Whole,
        Self::Timestamp,
        Self::Committed,
        Self::Freed,
        Self::Reopen,
        Self::Split,
        Self::Repair,
        Self::OldGeneration,
        Self::Recover,
        Self::Identity,
        Self::ReadOrder,
        Self::CheckOrder,
        Self::AlarmOrder,
        Self::OwnCheck,
    ];

    /// The name on the command line and in docs/ownership.md.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rewrite => "rewrite",
            Self::Fence => "fence",
            Self::Predecessors => "predecessors",
            Self::Guard => "guard",
            Self::Whole => "whole",
            Self::Timestamp => "ts",
            Self::Committed => "committed",
            Self::Freed => "freed",
            Self::Reopen => "reopen",
            Self::Split => "split",
            Self::Repair => "repair",
            Self::OldGeneration => "old-generation",
            Self::Recover => "recover",
            Self::Identity => "identity",
            Self::ReadOrder => "read-order",
            Self::CheckOrder => "check-order",
            Self::AlarmOrder => "alarm-order",
            Self::OwnCheck => "own-check",
        }
    }

    /// What a router does that lacks the rule.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Rewrite => "an open serves the tail it read without writing it again under its own epoch",
            Self::Fence => "a new owner writes no fence rows and a commit does not look for one",
            Self::Predecessors => "a new owner fences only the last instance on the predecessor list",
            Self::Guard => "the predecessor list is cut without requiring one's own claim unchanged",
            Self::Whole => "a batch is one write a row, so a replica may hold a part of it",
            Self::Timestamp => "rows carry the time of their arrival instead of the epoch, so the last delivery wins",
            Self::Committed => "an open takes and rewrites only the top row instead of going down to committed(top)",
            Self::Freed => "the seqs of a refused batch are used again under the same epoch",
            Self::Reopen => "a conversation whose rewrite is not confirmed is read again under the same epoch",
            Self::Split => "the tail is read in two requests: the top row, then all rows up to it",
            Self::Repair => "a LIMIT 1 read precedes the open, and its read repair copies one row of a batch",
            Self::OldGeneration => "the fence check of a commit ignores the generation",
            Self::Recover => "the registry is restored and the generation is not raised, so epochs repeat",
            Self::Identity => "a guard compares the revision of the claim key, but not whose claim it is",
            Self::ReadOrder => "the tail is read before a quorum holds the fence rows",
            Self::CheckOrder => "the fence is read before the batch is confirmed, not after",
            Self::AlarmOrder => "an open looks for missing seqs before it looks for an epoch above its own",
            Self::OwnCheck => "a router that has claimed the shard does not look for its own fence before it goes on",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|leave_out| leave_out.name() == name)
    }
}

impl fmt::Display for LeaveOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The rules in force: all of them, less those left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    left_out: u32,
}

impl Rules {
    /// The protocol as designed.
    pub fn all() -> Self {
        Self::default()
    }

    pub fn without(leave_out: LeaveOut) -> Self {
        Self { left_out: 1 << leave_out as u8 }
    }

    /// Whether states are searched for a pair (epoch, seq) that was used twice. That alone is no harm done yet, so
    /// without the rules that protect the pair the search goes on to the harm.
    pub fn forbid_reuse(self) -> bool {
        self == Self::all() || self.lack(LeaveOut::OwnCheck)
    }

    pub fn lack(self, leave_out: LeaveOut) -> bool {
        self.left_out & (1 << leave_out as u8) != 0
    }
}

/// How much of everything there is. Replicas are always three, with quorums of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Claims of the shard, each by an instance of its own unless a released instance claims again. At most
    /// [`crate::CLAIMS`].
    pub claims: u8,
    /// Messages that senders may send, and send again to every owner. At most [`crate::SEQS`].
    pub messages: u8,
    /// Rows a batch may hold: 1 or 2.
    pub batch_rows: u8,
    /// Planned releases.
    pub releases: u8,
    /// Epochs raised by an owner whose batch or rewrite is hopeless.
    pub raises: u8,
    /// Opens that are begun again.
    pub retries: u8,
    /// Registries restored from an old snapshot, each followed by `imd cluster recover`. 0 or 1.
    pub recoveries: u8,
}

impl Bounds {
    /// The bounds that the protocol is to be exhausted in, and every leave-out refuted in.
    pub const REQUIRED: Self =
        Self { claims: 3, messages: 3, batch_rows: 2, releases: 1, raises: 1, retries: 1, recoveries: 1 };

    fn are_representable(&self) -> bool {
        let budgets = [self.releases, self.raises, self.retries];
        // The state packs each budget into two bits, and a generation has room for four epochs.
        (1..=CLAIMS).contains(&usize::from(self.claims))
            && (1..=SEQS).contains(&usize::from(self.messages))
            && (1..=2).contains(&self.batch_rows)
            && budgets.into_iter().all(|budget| budget <= 3)
            && self.claims + self.raises < EPOCHS_IN_A_GENERATION
            && self.recoveries <= 1
    }
}

impl FromStr for Bounds {
    type Err = String;

    /// Reads the seven numbers in the order of the fields.
    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Vec<u8> = text.split(',').map_while(|number| number.parse().ok()).collect();
        let [claims, messages, batch_rows, releases, raises, retries, recoveries] = numbers[..] else {
            return Err(format!("{text}: seven small numbers are needed"));
        };
        let bounds = Self { claims, messages, batch_rows, releases, raises, retries, recoveries };
        if bounds.are_representable() { Ok(bounds) } else { Err(format!("{text}: beyond what the model can hold")) }
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { claims, messages, batch_rows, releases, raises, retries, recoveries } = self;
        write!(
            f,
            "claims {claims}, messages {messages}, batch rows {batch_rows}, releases {releases}, raises {raises}, \
             retries {retries}, recoveries {recoveries}"
        )
    }
}

/// How much one step of the model does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Grain {
    /// A write arrives at a replica only when a tail read or a confirmation needs to know, and steps that commute are
    /// one step.
    #[default]
    Coarse,
    /// Every arrival, every half of every read, and every read repair is a step of its own.
    Fine,
}
