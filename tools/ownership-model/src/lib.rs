//! The ownership protocol of docs/ownership.md as an exhaustive model.
//!
//! One conversation, three replicas of its rows, a registry, and as many routers as there are claims. The model knows
//! no time: a lease runs out whenever it likes, a router pauses wherever it likes, and a write arrives at a replica
//! whenever it likes or never. Five invariants are checked in every reachable state: no committed entry is lost, none
//! is committed at two seqs, the log has no hole, no seq has two committed entries, no pair (epoch, seq) is used twice.
//!
//! What the model leaves out on purpose: several conversations (they share fences and nothing else), retention and
//! erasure, state tables, and liveness.

mod enabled;
pub mod model;
pub mod owner;
pub mod rules;
pub mod schedule;
pub mod search;
pub mod state;
mod steps;
pub mod storage;

pub use owner::CLAIMS;
pub use storage::SEQS;
