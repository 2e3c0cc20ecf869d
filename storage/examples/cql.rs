//! What the store costs on top of its driver: rows a second that the driver reaches by itself and through `MessageLog`, on the same
//! table, with the same rows a batch, in one run, in turns.
//!
//! ```text
//! cargo run --release -p im-storage --example cql -- 127.0.0.1:9042 [ROWS 32] [AT_ONCE 16] [BODY_BYTES 200] [SECONDS 5] [ROUNDS 3]
//! ```
//!
//! Makes a keyspace of its own and drops it. Exits with 1 if the store reaches less than 60 % of the driver.

#![allow(clippy::disallowed_methods, reason = "a program of its own: time and tasks are real ones")]

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use im_proto::{
    ConversationId, Epoch, Timestamp, UserId,
    environment::{Clock, Environment, Random, Spawn, Task},
    v1::EntryKind,
};
use im_storage::{
    AppendDone, AppendOutcome, AppendRequest, Batch, BucketId, MessageLog as _, Row, Scylla, ScyllaOptions,
    scylla::schema,
};
use scylla::{
    client::{session::Session, session_builder::SessionBuilder},
    statement::{
        Consistency,
        batch::{Batch as CqlBatch, BatchType},
    },
    value::CqlTimestamp,
};
use tokio::{sync::mpsc, time::Instant};

/// The share of the driver's rate that the store must reach.
const SHARE: f64 = 0.6;
const WARM_UP: Duration = Duration::from_secs(2);

const INSERT: &str = "INSERT INTO {keyspace}.messages (conversation_id, bucket, seq, committed, counted, sender, \
                      client_message_id, sent_at, kind, flags, body, meta) \
                      VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) USING TIMESTAMP ?";

#[derive(Clone)]
struct Plan {
    node: String,
    keyspace: String,
    rows: u64,
    at_once: u8,
    body_bytes: usize,
    seconds: Duration,
    rounds: u32,
}

struct Surroundings;

impl Clock for Surroundings {
    fn now(&self) -> Timestamp {
        Timestamp::default()
    }
    fn since_boot(&self) -> Duration {
        Duration::ZERO
    }
}

impl Random for Surroundings {
    fn next_u64(&self) -> u64 {
        4
    }
}

impl Spawn for Surroundings {
    fn spawn(&self, task: Task) {
        drop(tokio::spawn(task));
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: u64| arguments.get(index).map_or(Some(default), |text| text.parse().ok());
    let numbers = (number(1, 32), number(2, 16), number(3, 200), number(4, 5), number(5, 3));
    let (Some(node), (Some(rows @ 1..=128), Some(at_once), Some(body), Some(seconds), Some(rounds))) =
        (arguments.first(), numbers)
    else {
        eprintln!("usage: cql HOST:PORT [ROWS 1..128] [AT_ONCE] [BODY_BYTES] [SECONDS] [ROUNDS]");
        return ExitCode::from(2);
    };
    let plan = Plan {
        node: node.clone(),
        keyspace: format!("bench_{}", std::process::id()),
        rows,
        at_once: u8::try_from(at_once).unwrap_or(u8::MAX),
        body_bytes: usize::try_from(body).unwrap_or(0),
        seconds: Duration::from_secs(seconds),
        rounds: u32::try_from(rounds).unwrap_or(1),
    };
    match run(&plan).await {
        Ok(share) if share >= SHARE => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(plan: &Plan) -> Result<f64, Box<dyn std::error::Error>> {
    let options = ScyllaOptions {
        nodes: vec![plan.node.clone()],
        keyspace: plan.keyspace.clone(),
        replication_factor: 1,
        ..ScyllaOptions::default()
    };
    let report = schema::apply(&options, Timestamp::default()).await?;
    report.status.warnings.iter().for_each(|warning| println!("note: {warning}"));
    let environment =
        Environment { clock: Arc::new(Surroundings), random: Arc::new(Surroundings), tasks: Arc::new(Surroundings) };
    let store = Scylla::connect(options, environment).await?;
    let session = Arc::new(SessionBuilder::new().known_node(&plan.node).build().await?);
    let (mut driver, mut through) = (Vec::new(), Vec::new());
    // The first round warms both up and does not count.
    for round in 0..=plan.rounds {
        let long = if round == 0 { WARM_UP } else { plan.seconds };
        let raw = by_driver(plan, &session, long, round).await?;
        let ours = by_store(plan, &store, long, round).await?;
        if round > 0 {
            println!("round {round}: driver {raw:.0} rows/s, store {ours:.0} rows/s, share {:.2}", ours / raw);
            driver.push(raw);
            through.push(ours);
        }
    }
    session.query_unpaged(format!("DROP KEYSPACE {}", plan.keyspace), ()).await?;
    let share = median(&mut through) / median(&mut driver);
    println!(
        "{} rows of {} bytes a batch, {} batches at once: share {share:.2} (at least {SHARE} is wanted)",
        plan.rows, plan.body_bytes, plan.at_once
    );
    Ok(share)
}

fn median(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Batches of one conversation, one after the other, none across an edge of a bucket.
struct Batches {
    conversation: ConversationId,
    next: u64,
    rows: u64,
    body: Bytes,
    sender: UserId,
}

impl Batches {
    fn new(plan: &Plan, side: u8, round: u32, lane: u8) -> Self {
        let mut id = [side; 16];
        (id[0], id[1], id[2]) = (lane, u8::try_from(round).unwrap_or(0), 0xbe);
        let sender = UserId::parse("benchmark").unwrap_or_else(|_| unreachable!("a user id"));
        let conversation = ConversationId::from_bytes(id);
        Self { conversation, next: 1, rows: plan.rows, body: vec![7; plan.body_bytes].into(), sender }
    }

    fn next(&mut self) -> Batch {
        let last = (self.next + self.rows - 1).min(BucketId::of(self.next).last_seq());
        let row = |seq: u64| Row {
            seq,
            counted: seq,
            sender: Some(self.sender.clone()),
            client_message_id: Bytes::copy_from_slice(&seq.to_be_bytes()),
            sent_at: Timestamp::from_millis(1_700_000_000_000),
            kind: EntryKind::Message,
            flags: 0,
            body: self.body.clone(),
            meta: Bytes::new(),
        };
        let rows = (self.next..=last).map(row).collect();
        let batch = Batch { conversation: self.conversation, epoch: Epoch(1 << 40), committed: self.next - 1, rows };
        self.next = last + 1;
        batch
    }
}

async fn by_driver(
    plan: &Plan,
    session: &Arc<Session>,
    long: Duration,
    round: u32,
) -> Result<f64, Box<dyn std::error::Error>> {
    let mut insert = session.prepare(INSERT.replace("{keyspace}", &plan.keyspace)).await?;
    insert.set_consistency(Consistency::Quorum);
    insert.set_is_idempotent(true);
    let (written, begun) = (Arc::new(AtomicU64::new(0)), Instant::now());
    let lanes: Vec<_> = (0..plan.at_once)
        .map(|lane| {
            let (session, insert, written, plan) = (session.clone(), insert.clone(), written.clone(), plan.clone());
            tokio::spawn(async move {
                let mut batches = Batches::new(&plan, 1, round, lane);
                while begun.elapsed() < long {
                    let batch = batches.next();
                    let mut request = CqlBatch::new(BatchType::Unlogged);
                    batch.rows.iter().for_each(|_| request.append_statement(insert.clone()));
                    request.set_consistency(Consistency::Quorum);
                    request.set_is_idempotent(true);
                    let values: Vec<_> = batch.rows.iter().map(|row| values(&batch, row)).collect();
                    session.batch(&request, values).await.map_err(|error| error.to_string())?;
                    written.fetch_add(batch.rows.len() as u64, Ordering::Relaxed);
                }
                Ok::<_, String>(())
            })
        })
        .collect();
    for lane in lanes {
        lane.await??;
    }
    Ok(written.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64())
}

#[allow(clippy::type_complexity, reason = "the columns of a row")]
fn values<'a>(
    batch: &'a Batch,
    row: &'a Row,
) -> (&'a [u8], i64, i64, i64, i64, &'a str, &'a [u8], CqlTimestamp, i32, i32, &'a [u8], &'a [u8], i64) {
    let sender = row.sender.as_ref().map_or("", |sender| sender.as_str());
    let (bucket, seq, committed) = (batch.bucket().0 as i64, row.seq as i64, batch.committed as i64);
    let (sent_at, kind) = (CqlTimestamp(row.sent_at.as_millis()), i32::from(row.kind));
    let (conversation, id) = (&batch.conversation.as_bytes()[..], &row.client_message_id[..]);
    let (body, meta, epoch) = (&row.body[..], &row.meta[..], batch.epoch.0 as i64);
    (conversation, bucket, seq, committed, row.counted as i64, sender, id, sent_at, kind, 0, body, meta, epoch)
}

/// As a router does it: one submitter, which hands in the next batch of a conversation when the one before is confirmed.
async fn by_store(plan: &Plan, store: &Scylla, long: Duration, round: u32) -> Result<f64, Box<dyn std::error::Error>> {
    let (outcomes, mut received) = mpsc::channel::<Vec<AppendOutcome>>(1 << 12);
    let done: AppendDone = Arc::new(move |answers| {
        // One batch of a lane at a time: there is always room.
        let _ = outcomes.try_send(answers);
    });
    let mut lanes: Vec<_> = (0..plan.at_once).map(|lane| Batches::new(plan, 2, round, lane)).collect();
    let (mut written, begun) = (0, Instant::now());
    let (mut in_flight, mut sizes) = (0, vec![0; lanes.len()]);
    let mut submit = |lane: usize, sizes: &mut Vec<u64>| {
        let batch = lanes[lane].next();
        sizes[lane] = batch.rows.len() as u64;
        store.submit(vec![AppendRequest { token: lane as u64, batch: Arc::new(batch) }], done.clone());
    };
    for lane in 0..usize::from(plan.at_once) {
        submit(lane, &mut sizes);
        in_flight += 1;
    }
    while in_flight > 0 {
        for (token, outcome) in received.recv().await.ok_or("the store has ended")? {
            outcome?;
            let lane = usize::try_from(token)?;
            written += sizes[lane];
            if begun.elapsed() < long {
                submit(lane, &mut sizes);
            } else {
                in_flight -= 1;
            }
        }
    }
    Ok(written as f64 / begun.elapsed().as_secs_f64())
}
