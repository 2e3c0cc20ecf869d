//! Opening a conversation: find the committed head, write its batch again under the new epoch, check the fence, load the state.
//!
//! The steps and their order are those of ARCHITECTURE.md ("Open"). Rows of two requests to one bucket are never combined; a
//! re-write is repeated with the rows of its first read until it is confirmed.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::future::{try_join, try_join3};
use im_proto::{ConversationId, Epoch, Timestamp, UserId, body, limits, v1};
use im_storage::{AppendRequest, Batch, BucketId, Row, RowKey, StateRow, StateWrite, StoreError, StoredRow, Table};
use prost::Message as _;
use tokio::sync::mpsc;

use crate::{
    cluster::Cluster,
    conversation::Cursor,
    deadline::StoreCalls,
    fence::FenceService,
    message::Effect,
    state::{self, ConversationValue, Kind, ListRow, ListValue, Member, MemberValue, State},
    worker::{
        idle::{APPLIED, HeadValue, OUTBOX},
        input::Input,
    },
};

/// Rows of one scan of a state table.
const SCAN_ROWS: usize = 512;
/// Entries of one read while entries are applied again.
const REPLAY_ROWS: usize = 512;

/// Everything that a conversation needs to go on.
pub struct Opened {
    pub head: u64,
    pub counted: u64,
    /// The running number of mentions of all, at the head.
    pub all: u64,
    pub newest_counted: u64,
    pub newest_mention: u64,
    pub first_seq: u64,
    pub last_sent_at: Timestamp,
    pub state: State,
    /// Written again under the new epoch: to be delivered again.
    pub rewritten: Vec<Row>,
    /// Effects of entries that the outbox mark does not cover.
    pub effects: Vec<Effect>,
    /// One's own message moves one's cursor: the last ones above the applied mark.
    pub cursors: BTreeMap<UserId, Cursor>,
    pub applied: u64,
    /// The last heavy entry that was applied again.
    pub heavy: u64,
    pub keys: Vec<RowKey>,
    /// All entries above this one are among `keys`.
    pub keys_floor: u64,
    /// The first seq of the burst whose busy row stands, `None` if the head row says it all.
    pub busy_since: Option<u64>,
}

/// Why a conversation could not be opened.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("the shard is no longer held, or the router has ended")]
    Lost,
    #[error(
        "an entry has epoch {found:?}, above the owner's {own:?}; if the registry was restored or lost, run `imd cluster recover`"
    )]
    EpochAhead { found: Epoch, own: Epoch },
    #[error("the log is damaged: {0}")]
    Damaged(String),
}

/// An open under way.
pub struct Open {
    pub cluster: Arc<Cluster>,
    pub store: StoreCalls,
    pub fence: FenceService,
    pub id: ConversationId,
    pub epoch: Epoch,
    /// Set when the shard is lost: the task then ends without effect.
    pub cancelled: Arc<AtomicBool>,
    /// Which open of the worker this is.
    pub attempt: u64,
    /// Answers of the store that were none.
    pub failures: AtomicU32,
}

/// Failures after which an open is one that gets no answer.
const FAILURES: u32 = 2;

/// What came of applying entries again.
#[derive(Default)]
struct Replayed {
    writes: Vec<StateWrite>,
    effects: Vec<Effect>,
    cursors: BTreeMap<UserId, Cursor>,
    newest_counted: u64,
    newest_mention: u64,
    heavy: u64,
}

/// The end of a log as it was read.
struct Tail {
    /// From `low` (the greatest committed mark below) to the head, ascending.
    rows: BTreeMap<u64, StoredRow>,
    head: u64,
    committed: u64,
}

impl Tail {
    /// All entries from a seq to the head, if all are here.
    fn since(&self, seq: u64) -> Option<Vec<StoredRow>> {
        // Nothing is above the head.
        let rows: Vec<StoredRow> = self.rows.range(seq..).map(|(_, row)| row.clone()).collect();
        (rows.len() as u64 == (self.head + 1).saturating_sub(seq)).then_some(rows)
    }
}

impl Replayed {
    /// What any entry does: it moves its sender's cursor, counts as unread, mentions.
    fn note(&mut self, id: &ConversationId, row: &Row) {
        if let Some(sender) = &row.sender {
            self.cursors.insert(sender.clone(), Cursor::at(row));
        }
        if row.flags & body::FLAG_COUNTED != 0 {
            self.newest_counted = row.seq;
        }
        let mentioned = state::mentioned(row);
        if !mentioned.is_empty() {
            self.newest_mention = row.seq;
            self.writes.extend(state::mention_writes(id, row, &mentioned));
        }
    }
}

impl Open {
    /// Runs all steps. Unconfirmed reads and writes are repeated while the shard is held.
    pub async fn run(self) -> Result<Opened, OpenError> {
        let head_row = self.head_row().await?;
        let tail = match self.read_tail(&head_row).await {
            Err(OpenError::EpochAhead { found, own }) => {
                // A fenced owner stops quietly, as in any failover. Else somebody has lost the registry's state.
                self.check_fence().await?;
                return Err(OpenError::EpochAhead { found, own });
            }
            tail => tail?,
        };
        let Some(tail) = tail else {
            self.check_fence().await?;
            return Ok(empty());
        };
        // The registry may have been restored: then this epoch may have been given out before, and a row written under it would tie
        // with another. An owner of an older generation learns that here, before it writes anything.
        self.check_fence().await?;
        self.rewrite(&tail).await?;
        self.check_fence().await?;
        self.load(tail, head_row).await
    }

    async fn head_row(&self) -> Result<HeadValue, OpenError> {
        let row = self.retry(|| self.store.read(Table::Heads, self.id.as_bytes(), b"")).await?;
        // One that cannot be read is not one that is missing: the log has entries.
        let value = row.map(|row| HeadValue::decode(row.value)).transpose();
        Ok(value.map_err(|_| self.alarm("the head row cannot be read".to_owned()))?.unwrap_or_default())
    }

    /// The newest rows, and what of them is committed; `None` for a log without entries.
    async fn read_tail(&self, head_row: &HeadValue) -> Result<Option<Tail>, OpenError> {
        let mut bucket = BucketId::of(head_row.head.max(head_row.first_seq).max(1));
        let mut top = self.bucket_tail(bucket).await?;
        loop {
            let next = self.bucket_tail(BucketId(bucket.0 + 1)).await?;
            if next.is_empty() {
                break;
            }
            (bucket, top) = (BucketId(bucket.0 + 1), next);
        }
        let Some(last) = top.keys().next_back().copied() else {
            if head_row.head > 0 || head_row.first_seq > 1 {
                return Err(self.alarm(format!("the head row says {}, the log has no entry there", head_row.head)));
            }
            return Ok(None);
        };
        let low = top.get(&last).map_or(0, |row| row.committed);
        let mut rows = top;
        if low > 0 && BucketId::of(low) != bucket {
            rows.extend(self.bucket_tail(BucketId::of(low)).await?);
        }
        self.judge(rows, low).map(Some)
    }

    /// E is the greatest epoch among the rows from `low` up; the head is the greatest seq with epoch E; what is above are leftovers
    /// of fenced owners.
    fn judge(&self, mut rows: BTreeMap<u64, StoredRow>, low: u64) -> Result<Tail, OpenError> {
        let span = || rows.range(low..);
        let found = span().map(|(_, row)| row.epoch).max().unwrap_or(Epoch(0));
        if found > self.epoch {
            return Err(OpenError::EpochAhead { found, own: self.epoch });
        }
        let head = span().filter(|(_, row)| row.epoch == found).map(|(seq, _)| *seq).max().unwrap_or(0);
        let committed = rows.get(&head).map_or(0, |row| row.committed);
        rows.split_off(&(head + 1));
        let missing = (committed + 1..=head).find(|seq| !rows.contains_key(seq));
        match missing {
            Some(seq) => Err(self.alarm(format!("entry {seq} is missing below the head {head}"))),
            None => Ok(Tail { rows, head, committed }),
        }
    }

    async fn bucket_tail(&self, bucket: BucketId) -> Result<BTreeMap<u64, StoredRow>, OpenError> {
        let rows = self.retry(|| self.store.read_tail(self.id, bucket)).await?;
        Ok(rows.into_iter().map(|row| (row.row.seq, row)).collect())
    }

    /// Writes `committed(head) + 1 … head` again, unchanged, under the new epoch.
    async fn rewrite(&self, tail: &Tail) -> Result<(), OpenError> {
        let rows: Vec<Row> = tail.rows.range(tail.committed + 1..).map(|(_, stored)| stored.row.clone()).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let batch = Arc::new(Batch { conversation: self.id, epoch: self.epoch, committed: tail.committed, rows });
        let mut pause = Duration::from_millis(20);
        loop {
            let (sender, mut receiver) = mpsc::channel(1);
            let request = AppendRequest { token: 0, batch: batch.clone() };
            self.store.submit(
                vec![request],
                Arc::new(move |results| {
                    // One request, one result.
                    let _ = sender.try_send(results);
                }),
            );
            // Past the deadline nobody listens any more: a late result of this attempt is lost, whatever it says.
            let answer = tokio::time::timeout(self.store.deadline(), receiver.recv()).await;
            match answer.ok().flatten().and_then(|results| results.into_iter().next()) {
                Some((_, Ok(()))) => return Ok(()),
                Some((_, Err(StoreError::Unconfirmed(_)))) | None => {}
                Some((_, Err(error))) => return Err(self.alarm(error.to_string())),
            }
            self.pause(&mut pause).await?;
        }
    }

    async fn check_fence(&self) -> Result<(), OpenError> {
        if self.fence.clean().await && !self.cancelled.load(Ordering::Acquire) { Ok(()) } else { Err(OpenError::Lost) }
    }

    /// State tables as far as they were applied, then the entries above, applied again.
    async fn load(&self, tail: Tail, head_row: HeadValue) -> Result<Opened, OpenError> {
        // Before the rows that they speak of.
        let (applied, outbox) = try_join(self.mark(APPLIED), self.mark(OUTBOX)).await?;
        let mut state = self.load_state().await?;
        let rewritten: Vec<Row> = tail.rows.range(tail.committed + 1..).map(|(_, row)| row.row.clone()).collect();
        // What the head row says of the log ends there.
        let from = (applied.min(outbox) + 1).min(tail.committed + 1).min(head_row.head + 1).max(1);
        let keys_floor = tail.head.saturating_sub(self.cluster.config.dedupe_entries as u64);
        let (replayed, keys, busy_since) = try_join3(
            self.replay(&mut state, from, outbox, &tail),
            self.keys(&tail, keys_floor),
            self.burst(&head_row, tail.head),
        )
        .await?;
        let Replayed { writes, effects, cursors, newest_counted, newest_mention, heavy } = replayed;
        for chunk in writes.chunks(SCAN_ROWS) {
            self.retry(|| self.store.write(chunk.to_vec())).await?;
        }
        let last = tail.rows.get(&tail.head).map(|stored| &stored.row);
        Ok(Opened {
            head: tail.head,
            counted: last.map_or(0, |row| row.counted),
            all: last.map_or(0, state::all_of),
            newest_counted: newest_counted.max(head_row.newest_counted),
            newest_mention: newest_mention.max(head_row.newest_mention),
            first_seq: head_row.first_seq.max(1),
            last_sent_at: last.map_or(Timestamp::default(), |row| row.sent_at),
            state,
            rewritten,
            effects,
            cursors,
            applied: applied.min(outbox),
            heavy,
            keys,
            keys_floor,
            busy_since,
        })
    }

    /// The keys of all entries above a seq: those of a short log are in its tail.
    async fn keys(&self, tail: &Tail, floor: u64) -> Result<Vec<RowKey>, OpenError> {
        if let Some(rows) = tail.since(floor + 1) {
            return Ok(rows.into_iter().map(RowKey::from).collect());
        }
        self.retry(|| self.store.read_keys(self.id, floor + 1, tail.head)).await
    }

    /// The busy row that stands. Entries above the head row without one were written by an owner that died before its busy row was
    /// confirmed; they are committed now, so the row is written first.
    async fn burst(&self, head_row: &HeadValue, head: u64) -> Result<Option<u64>, OpenError> {
        let shard = self.cluster.shard_of(&self.id).0.to_be_bytes();
        let row = self.retry(|| self.store.read(Table::Busy, &shard, self.id.as_bytes())).await?;
        if let Some(row) = row {
            return Ok(Some(row.timestamp));
        }
        if head == head_row.head {
            return Ok(None);
        }
        let since = head_row.head + 1;
        let write = StateWrite {
            table: Table::Busy,
            partition: Bytes::copy_from_slice(&shard),
            key: self.id.to_bytes(),
            value: Some(Bytes::new()),
            timestamp: since,
        };
        self.retry(|| self.store.write(vec![write.clone()])).await?;
        Ok(Some(since))
    }

    async fn mark(&self, key: &'static [u8]) -> Result<u64, OpenError> {
        let row = self.retry(|| self.store.read(Table::Applied, self.id.as_bytes(), key)).await?;
        Ok(row.map_or(0, |row| row.timestamp))
    }

    async fn replay(&self, state: &mut State, from: u64, outbox: u64, tail: &Tail) -> Result<Replayed, OpenError> {
        let (mut out, head) = (Replayed::default(), tail.head);
        let mut next = from;
        while next <= head {
            let rows = match tail.since(next) {
                Some(rows) => rows,
                None => self.retry(|| self.store.read_range(self.id, next, head, REPLAY_ROWS)).await?,
            };
            if rows.first().is_none_or(|row| row.row.seq != next) {
                return Err(self.alarm(format!("entry {next} is missing below the head {head}")));
            }
            for stored in &rows {
                if stored.row.kind == v1::EntryKind::Event || stored.row.seq == 1 {
                    let done = state::apply(state, &self.id, &stored.row, &self.cluster.config.cluster_secret);
                    if done.is_heavy() {
                        out.heavy = stored.row.seq;
                    }
                    out.writes.extend(done.writes);
                    if stored.row.seq > outbox {
                        out.effects.extend(done.effects);
                    }
                }
                out.note(&self.id, &stored.row);
                next = stored.row.seq + 1;
            }
        }
        Ok(out)
    }

    async fn load_state(&self) -> Result<State, OpenError> {
        let mut state = State::default();
        let row = self.retry(|| self.store.read(Table::Conversations, self.id.as_bytes(), b"")).await?;
        let value = row.map(|row| ConversationValue::decode(row.value)).transpose();
        let value = value.map_err(|_| self.alarm("the row of the conversation cannot be read".to_owned()))?;
        let Some(value) = value else { return Ok(state) };
        let (one, other) = (UserId::parse(&value.one).ok(), UserId::parse(&value.other).ok());
        state.name = value.name;
        match (v1::ConversationKind::try_from(value.kind as i32), one, other) {
            (Ok(v1::ConversationKind::Direct), Some(one), Some(other)) => {
                for user in [&one, &other] {
                    state.members.insert(
                        user.clone(),
                        Member { role: v1::Role::Member, joined_seq: 0, joined_counted: 0, joined_all: 0 },
                    );
                }
                state.kind = Kind::Direct(one, other);
            }
            (Ok(v1::ConversationKind::Self_), Some(owner), _) => {
                state.members.insert(
                    owner.clone(),
                    Member { role: v1::Role::Owner, joined_seq: 0, joined_counted: 0, joined_all: 0 },
                );
                state.kind = Kind::SelfLog(owner);
                state.invisible = value.invisible;
                self.load_list(&mut state).await?;
            }
            (Ok(kind @ (v1::ConversationKind::Group | v1::ConversationKind::Channel)), ..) => {
                state.kind = if kind == v1::ConversationKind::Channel { Kind::Channel } else { Kind::Group };
                self.load_members(&mut state).await?;
            }
            _ => return Err(self.alarm("the conversation's kind cannot be read".to_owned())),
        }
        Ok(state)
    }

    async fn load_members(&self, state: &mut State) -> Result<(), OpenError> {
        for row in self.scan(Table::Members).await? {
            let user = std::str::from_utf8(&row.key).ok().and_then(|text| UserId::parse(text).ok());
            let (Some(user), Ok(value)) = (user, MemberValue::decode(row.value)) else {
                return Err(self.alarm("the row of a member cannot be read".to_owned()));
            };
            if !value.left {
                let role = value.role.try_into().unwrap_or(v1::Role::Member);
                let MemberValue { joined_seq, joined_counted, joined_all, .. } = value;
                let member = Member { role, joined_seq, joined_counted, joined_all };
                state.members.insert(user, member);
            }
        }
        Ok(())
    }

    async fn load_list(&self, state: &mut State) -> Result<(), OpenError> {
        for row in self.scan(Table::UserConversations).await? {
            let (Ok(id), Ok(value)) = (ConversationId::from_slice(&row.key), ListValue::decode(row.value)) else {
                return Err(self.alarm("a row of the conversation list cannot be read".to_owned()));
            };
            let entry = ListRow {
                kind: value.kind.try_into().unwrap_or(v1::ConversationKind::Unspecified),
                name: value.name,
                peer_user_id: value.peer_user_id,
                joined_seq: value.joined_seq,
                left_seq: value.left_seq,
                subscribed: value.subscribed,
                ended: value.ended,
                version: row.timestamp,
            };
            state.list.insert(id, Arc::new(entry));
        }
        Ok(())
    }

    async fn scan(&self, table: Table) -> Result<Vec<StateRow>, OpenError> {
        let mut all: Vec<StateRow> = Vec::new();
        loop {
            let after: Option<Bytes> = all.last().map(|row| row.key.clone());
            let rows = self.retry(|| self.store.scan(table, self.id.as_bytes(), after.as_deref(), SCAN_ROWS)).await?;
            let last = rows.len() < SCAN_ROWS;
            all.extend(rows);
            if last {
                return Ok(all);
            }
        }
    }

    /// Repeats a request until the store answers or the shard is lost.
    async fn retry<T, F>(&self, request: impl Fn() -> F) -> Result<T, OpenError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut pause = Duration::from_millis(20);
        loop {
            match request().await {
                Ok(answer) => return Ok(answer),
                Err(StoreError::Unconfirmed(_)) => self.pause(&mut pause).await?,
                Err(error) => return Err(self.alarm(error.to_string())),
            }
        }
    }

    async fn pause(&self, pause: &mut Duration) -> Result<(), OpenError> {
        if self.failures.fetch_add(1, Ordering::Relaxed) + 1 == FAILURES {
            let (worker, attempt) = (self.cluster.worker_of(self.cluster.shard_of(&self.id)), self.attempt);
            self.cluster.to_worker(worker, Input::Run(Box::new(move |worker| worker.open_gets_no_answer(attempt))));
        }
        tokio::time::sleep(*pause + self.cluster.environment.jitter(*pause)).await;
        *pause = (*pause * 2).min(Duration::from_secs(1));
        if self.cancelled.load(Ordering::Acquire) { Err(OpenError::Lost) } else { Ok(()) }
    }

    fn alarm(&self, what: String) -> OpenError {
        self.cluster.metrics.alarms.increment(1);
        OpenError::Damaged(what)
    }
}

fn empty() -> Opened {
    Opened {
        head: 0,
        counted: 0,
        all: 0,
        newest_counted: 0,
        newest_mention: 0,
        first_seq: 1,
        last_sent_at: Timestamp::default(),
        state: State::default(),
        rewritten: Vec::new(),
        effects: Vec::new(),
        cursors: BTreeMap::new(),
        applied: 0,
        heavy: 0,
        keys: Vec::new(),
        keys_floor: 0,
        busy_since: None,
    }
}

/// The most that a tail read must cover: two batches and one row.
const _: () = assert!(im_storage::TAIL_ROWS_MAX > 2 * limits::BATCH_ROWS_MAX);
