//! A replicated store for deterministic simulation.
//!
//! Three replicas that merge by timestamp, row by row. A write goes to all of them, and each delivery is prompt, late, by hint long
//! after, or never; two prompt enough confirm it. A read looks at two replicas at two moments and merges; what it returned, and only
//! that, is copied back to both (read repair). One call may be attempted twice and then reports what became of the second attempt.
//! So an error says nothing about effects, and what is seen once need not be seen again. A replica applies a batch whole or not at
//! all.
//!
//! Deliveries are tasks of the store: they outlive the client that wrote. Time is tokio's, chance comes from the seed; the same seed
//! and the same calls give the same run.

mod client;
mod network;

use std::{collections::BTreeMap, fmt, ops::RangeInclusive, sync::Arc, time::Duration};

use bytes::Bytes;
use im_proto::{ConversationId, InstanceId, environment::Spawn};
use parking_lot::Mutex;

pub use self::client::SimHandle;
use crate::{
    cells::{Cells, StateKey, state_row},
    dice::Dice,
    model::{Batch, StateRow, StoredRow, Table},
    order::{StateCell, row_beats},
};

/// Copies of everything.
pub const REPLICAS: usize = 3;

/// What goes wrong, how often (in a thousand) and how long things take.
#[derive(Clone, Debug)]
pub struct SimFaults {
    /// One way, from a client through a coordinator to a replica or back.
    pub latency: RangeInclusive<Duration>,
    /// Deliveries to a replica that take `late_by` longer.
    pub late_permille: u32,
    pub late_by: RangeInclusive<Duration>,
    /// Deliveries that come by hint: after `hint_after`, counted by nobody.
    pub hint_permille: u32,
    pub hint_after: RangeInclusive<Duration>,
    /// Deliveries that never come.
    pub lost_permille: u32,
    /// Answers of the store that never reach the client.
    pub answer_lost_permille: u32,
    /// Writes that are sent again after `again_after`, and report the second attempt only.
    pub again_permille: u32,
    pub again_after: RangeInclusive<Duration>,
    /// When a client gives a call up.
    pub timeout: Duration,
}

impl SimFaults {
    /// Nothing goes wrong; calls take a moment.
    pub fn none() -> Self {
        let millis = |from, to| Duration::from_millis(from)..=Duration::from_millis(to);
        Self {
            latency: millis(1, 2),
            late_permille: 0,
            late_by: millis(10, 500),
            hint_permille: 0,
            hint_after: millis(2_000, 20_000),
            lost_permille: 0,
            answer_lost_permille: 0,
            again_permille: 0,
            again_after: millis(1, 300),
            timeout: Duration::from_secs(2),
        }
    }

    /// Everything goes wrong at times; most calls still succeed.
    pub fn rough() -> Self {
        Self {
            late_permille: 150,
            hint_permille: 60,
            lost_permille: 40,
            answer_lost_permille: 10,
            again_permille: 50,
            ..Self::none()
        }
    }
}

/// The store, as the simulation holds it. Clones share it.
#[derive(Clone)]
pub struct SimStore {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    tasks: Arc<dyn Spawn>,
}

struct State {
    replicas: [Cells; REPLICAS],
    dice: Dice,
    faults: SimFaults,
    links: BTreeMap<String, Link>,
    /// See [`SimStore::stale_deliveries`].
    stale_deliveries: u64,
}

/// The way between a client and the store.
#[derive(Clone, Copy, Debug, Default)]
struct Link {
    requests_cut: bool,
    answers_cut: bool,
    slower_by: Duration,
    /// Requests to write rows of state tables vanish; the log's and the fences' arrive.
    state_cut: bool,
}

impl SimStore {
    /// An empty store, whose deliveries run as `tasks` that no crash of a client ends.
    pub fn new(seed: u64, faults: SimFaults, tasks: Arc<dyn Spawn>) -> Self {
        let state = State {
            replicas: Default::default(),
            dice: Dice::new(seed),
            faults,
            links: BTreeMap::new(),
            stale_deliveries: 0,
        };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), tasks }) }
    }

    /// The store as one client process sees it. A restarted process takes the handle of the same name.
    pub fn handle(&self, client: &str) -> SimHandle {
        SimHandle::new(self.shared.clone(), client)
    }

    /// Cuts a client off: its requests, or the answers to it, vanish. What is under way to the replicas arrives.
    pub fn cut(&self, client: &str, requests: bool, answers: bool) {
        let mut state = self.shared.state.lock();
        let link = state.links.entry(client.to_owned()).or_default();
        (link.requests_cut, link.answers_cut) = (requests, answers);
    }

    /// A client's writes to state tables vanish while those to logs arrive: other partitions have other replicas.
    pub fn cut_state(&self, client: &str, cut: bool) {
        self.shared.state.lock().links.entry(client.to_owned()).or_default().state_cut = cut;
    }

    /// How many times a batch reached a replica that had a row of a greater epoch at one of its seqs.
    pub fn stale_deliveries(&self) -> u64 {
        self.shared.state.lock().stale_deliveries
    }

    /// Makes every request of a client, and every answer to it, take that much longer.
    pub fn slow(&self, client: &str, by: Duration) {
        self.shared.state.lock().links.entry(client.to_owned()).or_default().slower_by = by;
    }

    /// Ends all cuts and slowness. What goes wrong by chance goes on; see [`Self::set_faults`].
    pub fn heal(&self) {
        self.shared.state.lock().links.clear();
    }

    /// From now on other things go wrong.
    pub fn set_faults(&self, faults: SimFaults) {
        self.shared.state.lock().faults = faults;
    }

    /// The rows of a conversation, ascending, as they are once all replicas agree: every write that any replica has, merged. For
    /// checkers, which look when nothing is under way.
    pub fn committed_view(&self, conversation: ConversationId) -> Vec<StoredRow> {
        let state = self.shared.state.lock();
        let copies = state.replicas.iter().map(|replica| replica.range(conversation, 0, u64::MAX, usize::MAX));
        merge_rows(copies.flatten()).into_values().collect()
    }

    /// The rows of a conversation as one replica has them, ascending.
    pub fn replica_view(&self, replica: usize, conversation: ConversationId) -> Vec<StoredRow> {
        let state = self.shared.state.lock();
        state.replicas.get(replica).map(|cells| cells.range(conversation, 0, u64::MAX, usize::MAX)).unwrap_or_default()
    }

    /// The rows of a partition of a state table, ascending, as they are once all replicas agree.
    pub fn state_view(&self, table: Table, partition: &[u8]) -> Vec<StateRow> {
        let state = self.shared.state.lock();
        let copies = state.replicas.iter().flat_map(|replica| replica.partition(table, partition, None));
        let merged = merge_cells(copies.map(|(key, cell)| (key.clone(), cell.clone())));
        merged.iter().filter_map(|(key, cell)| state_row(key, cell)).collect()
    }
}

impl fmt::Debug for SimStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimStore").finish_non_exhaustive()
    }
}

/// What a replica applies whole or not at all.
#[derive(Clone)]
enum Mutation {
    Batch(Arc<Batch>),
    /// Rows copied by read repair.
    Rows(ConversationId, Arc<Vec<StoredRow>>),
    Cells(Arc<Vec<(StateKey, StateCell)>>),
    Fence(InstanceId),
    Generation {
        partition: u8,
        generation: u64,
    },
}

impl Mutation {
    /// A batch that comes after rows of a greater epoch at its seqs.
    fn is_stale(&self, cells: &Cells) -> bool {
        let Self::Batch(batch) = self else { return false };
        let (Some(first), Some(last)) = (batch.rows.first(), batch.rows.last()) else { return false };
        let there = cells.range(batch.conversation, first.seq, last.seq, batch.rows.len());
        there.iter().any(|stored| stored.epoch > batch.epoch)
    }

    fn apply(&self, cells: &mut Cells) {
        match self {
            Self::Batch(batch) => cells.apply_batch(batch),
            Self::Rows(conversation, rows) => rows.iter().for_each(|row| cells.apply_row(*conversation, row.clone())),
            Self::Cells(rows) => rows.iter().for_each(|(key, cell)| cells.apply_cell(key.clone(), cell.clone())),
            Self::Fence(instance) => cells.fence(instance.clone()),
            Self::Generation { partition, generation } => cells.raise_generation(*partition, *generation),
        }
    }
}

fn merge_rows(rows: impl IntoIterator<Item = StoredRow>) -> BTreeMap<u64, StoredRow> {
    let mut merged = BTreeMap::<u64, StoredRow>::new();
    for row in rows {
        if merged.get(&row.row.seq).is_none_or(|other| row_beats(&row, other)) {
            merged.insert(row.row.seq, row);
        }
    }
    merged
}

fn merge_cells(cells: impl IntoIterator<Item = (Bytes, StateCell)>) -> BTreeMap<Bytes, StateCell> {
    let mut merged = BTreeMap::<Bytes, StateCell>::new();
    for (key, cell) in cells {
        if merged.get(&key).is_none_or(|other| cell.beats(other)) {
            merged.insert(key, cell);
        }
    }
    merged
}
