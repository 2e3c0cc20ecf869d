//! A process of its own that writes to a store: this very test binary, started again with an order in its environment.
//!
//! It prints a line for each acknowledgement as soon as it has it, and only then submits the next batch of that conversation.

use std::{
    collections::BTreeMap,
    env,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    time::Duration,
};

use im_proto::{ConversationId, limits};
use im_storage::{
    AppendRequest, Batch, BucketId, Directory as _, Embedded, EmbeddedOptions, MessageLog as _, Row, StateWrite,
    StoreError, Table,
    conformance::{batch, row},
};

use crate::files;

/// Conversations that a child writes to.
pub const CONVERSATIONS: u8 = 6;

/// What a child is to do.
#[derive(Clone, Debug, Default)]
pub struct Order {
    pub root: PathBuf,
    pub image: PathBuf,
    pub seed: u64,
    /// Batches to be acknowledged before it ends by itself.
    pub batches: u64,
    /// Bodies of 60 kB, so that the journal is rotated.
    pub large: bool,
    /// Whether the file layer is put under it.
    pub layer: bool,
    pub power_fails_at: Option<u64>,
    pub syncs_fail_from: Option<u64>,
    pub space_bytes: Option<u64>,
}

/// What was acknowledged: the last seq of each conversation, and the last timestamp of the state row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acknowledged {
    pub seqs: BTreeMap<u8, u64>,
    pub state: u64,
    /// What the child said when the store stopped.
    pub stopped: Option<String>,
}

pub fn conversation(number: u8) -> ConversationId {
    ConversationId::from_bytes([number; 16])
}

/// The row that stands at a seq, in whatever run.
pub fn expected_row(seq: u64, large: bool) -> Row {
    let row = row(seq, 1);
    if large { Row { body: vec![seq as u8; 60_000].into(), ..row } } else { row }
}

/// Small memtables, so that a short run has flushes and compactions.
pub fn options(large: bool) -> EmbeddedOptions {
    EmbeddedOptions { memtable_bytes: if large { 8 << 20 } else { 256 << 10 }, ..EmbeddedOptions::default() }
}

const VARIABLE: &str = "IM_STORAGE_TEST_CHILD";

impl Order {
    pub fn start(&self) -> Child {
        let number = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
        let order = [
            self.root.display().to_string(),
            self.image.display().to_string(),
            self.seed.to_string(),
            self.batches.to_string(),
            self.large.to_string(),
            self.layer.to_string(),
            number(self.power_fails_at),
            number(self.syncs_fail_from),
            number(self.space_bytes),
        ];
        Command::new(env::current_exe().expect("this binary"))
            .args(["child::writes_when_ordered_to", "--exact", "--nocapture", "--test-threads=1"])
            .env(VARIABLE, order.join("\n"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a child")
    }

    fn parse(text: &str) -> Self {
        let fields: Vec<_> = text.split('\n').collect();
        let number = |field: &str| field.parse().ok();
        Self {
            root: fields[0].into(),
            image: fields[1].into(),
            seed: fields[2].parse().expect("a seed"),
            batches: fields[3].parse().expect("a number"),
            large: fields[4] == "true",
            layer: fields[5] == "true",
            power_fails_at: number(fields[6]),
            syncs_fail_from: number(fields[7]),
            space_bytes: number(fields[8]),
        }
    }
}

/// Reads what a child says until it is gone.
pub fn listen(child: &mut Child, mut each: impl FnMut(&mut Child, &Acknowledged)) -> (Acknowledged, Option<i32>) {
    let mut acknowledged = Acknowledged::default();
    let output = child.stdout.take().expect("piped");
    for line in BufReader::new(output).lines() {
        // A last line that was cut off acknowledges nothing.
        let line = line.unwrap_or_default();
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["ack", conversation, last, "."] => {
                let conversation = conversation.parse().expect("a number");
                let known = acknowledged.seqs.entry(conversation).or_default();
                *known = last.parse::<u64>().expect("a seq").max(*known);
            }
            ["state", timestamp, "."] => acknowledged.state = timestamp.parse().expect("a timestamp"),
            [first, ..] if first.starts_with("stopped") => acknowledged.stopped = Some(line),
            _ => continue,
        }
        each(child, &acknowledged);
    }
    let status = child.wait().expect("a status");
    (acknowledged, status.code())
}

fn say(line: &str) {
    std::io::stdout().lock().write_all(line.as_bytes()).expect("somebody listens");
}

/// Not a test by itself: without an order it does nothing.
#[test]
fn writes_when_ordered_to() {
    let Ok(order) = env::var(VARIABLE) else { return };
    let order = Order::parse(&order);
    // Ends the line on which the test runner announces this test.
    say("\n");
    if order.layer {
        files::install(files::Plan {
            root: order.root.clone(),
            image: order.image.clone(),
            seed: order.seed,
            power_fails_at: order.power_fails_at,
            syncs_fail_from: order.syncs_fail_from,
            space_bytes: order.space_bytes,
        });
    }
    match Embedded::open(&order.root, options(order.large)) {
        Ok(store) => work(&store, &order),
        Err(error) => say(&format!("stopped at open: {error}\n")),
    }
}

/// What a conversation holds: the last seq, found as an owner finds it.
pub async fn head(store: &Embedded, conversation: ConversationId) -> u64 {
    let mut head = 0;
    for bucket in 0.. {
        match store.read_tail(conversation, BucketId(bucket)).await.expect("readable").first() {
            Some(row) => head = row.row.seq,
            None => break,
        }
    }
    head
}

fn next_batch(number: u8, head: u64, random: &mut u64, large: bool) -> Batch {
    *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    let rows = if large { 8 } else { (*random >> 40) % limits::BATCH_ROWS_MAX as u64 + 1 };
    let last = (head + rows).min(BucketId::of(head + 1).last_seq());
    let mut batch = batch(conversation(number), 1, head + 1..=last);
    batch.rows.iter_mut().for_each(|row| *row = expected_row(row.seq, large));
    batch
}

fn work(store: &Embedded, order: &Order) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let mut random = order.seed;
    let mut heads: Vec<u64> = (0..CONVERSATIONS).map(|n| runtime.block_on(head(store, conversation(n)))).collect();
    let (outcomes, received) = mpsc::sync_channel(64);
    let done = Arc::new(move |answers: Vec<(u64, Result<(), StoreError>)>| {
        for answer in answers {
            // The loop below may have seen enough.
            let _ = outcomes.send(answer);
        }
    });
    let mut in_flight = BTreeMap::new();
    let mut submit = |number: u8, heads: &[u64], in_flight: &mut BTreeMap<u8, u64>| {
        let batch = next_batch(number, heads[usize::from(number)], &mut random, order.large);
        in_flight.insert(number, batch.last_seq());
        store.submit(vec![AppendRequest { token: number.into(), batch: Arc::new(batch) }], done.clone());
    };
    (0..CONVERSATIONS).for_each(|number| submit(number, &heads, &mut in_flight));
    for written in 1..=order.batches {
        // A store that stops must say so: silence for so long is a failure of the test.
        let (token, outcome) = received.recv_timeout(Duration::from_secs(30)).expect("an answer");
        let number = u8::try_from(token).expect("a conversation");
        if let Err(error) = outcome {
            return stopped(store, &runtime, error, &received, in_flight.len() - 1);
        }
        heads[usize::from(number)] = in_flight.remove(&number).expect("it was in flight");
        say(&format!("ack {number} {} .\n", heads[usize::from(number)]));
        if written % 7 == 0 {
            let timestamp: u64 = heads.iter().sum();
            if let Err(error) = runtime.block_on(store.write(vec![state(timestamp)])) {
                return stopped(store, &runtime, error, &received, in_flight.len());
            }
            say(&format!("state {timestamp} .\n"));
        }
        submit(number, &heads, &mut in_flight);
    }
}

pub fn state(timestamp: u64) -> StateWrite {
    StateWrite {
        table: Table::Heads,
        partition: "all".into(),
        key: "".into(),
        value: Some(timestamp.to_string().into()),
        timestamp,
    }
}

/// After a failure nothing is acknowledged any more, whatever is tried, and the reason can be seen.
fn stopped(
    store: &Embedded,
    runtime: &tokio::runtime::Runtime,
    error: StoreError,
    received: &mpsc::Receiver<(u64, Result<(), StoreError>)>,
    outstanding: usize,
) {
    let is_stop = |outcome: &Result<(), StoreError>| matches!(outcome, Err(StoreError::Stopped(_)));
    assert!(is_stop(&Err(error.clone())), "{error:?}");
    for _ in 0..outstanding {
        // What was outstanding fails, or was committed just before.
        let (_, outcome) = received.recv_timeout(Duration::from_secs(30)).expect("an answer");
        assert!(outcome.is_ok() || is_stop(&outcome), "{outcome:?}");
    }
    let (late, later) = mpsc::sync_channel(1);
    let request = AppendRequest { token: 0, batch: Arc::new(batch(conversation(99), 1, 1..=1)) };
    store.submit(vec![request], Arc::new(move |mut answers| late.send(answers.remove(0).1).expect("waits")));
    assert!(is_stop(&later.recv_timeout(Duration::from_secs(30)).expect("an answer")));
    assert!(is_stop(&runtime.block_on(store.write(vec![state(u64::MAX)]))));
    let reason = store.stopped().borrow().clone().expect("a reason");
    say(&format!("stopped: {reason}\n"));
}

/// Opens what is left and checks it: everything that was acknowledged is there, and nothing is there that was not submitted.
pub fn verify(root: &Path, acknowledged: &Acknowledged, large: bool, context: &str) {
    let store = Embedded::open(root, options(large)).unwrap_or_else(|error| panic!("{context}: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    for number in 0..CONVERSATIONS {
        let rows = store.read_range(conversation(number), 1, u64::MAX, 100_000);
        let rows = runtime.block_on(rows).unwrap_or_else(|error| panic!("{context}: {error}"));
        for (stored, seq) in rows.iter().zip(1..) {
            assert_eq!(stored.row, expected_row(seq, large), "{context}: conversation {number}");
        }
        let last = acknowledged.seqs.get(&number).copied().unwrap_or(0);
        assert!(rows.len() as u64 >= last, "{context}: conversation {number} has {} of {last} rows", rows.len());
    }
    let row = runtime.block_on(store.read(Table::Heads, b"all", b"")).expect("readable");
    let timestamp = row.map_or(0, |row| row.timestamp);
    assert!(timestamp >= acknowledged.state, "{context}: state {timestamp} of {}", acknowledged.state);
}
