//! Measures durable commits: the embedded store against a bare preallocated segment log on the same disk in the same run.
//!
//! ```text
//! cargo run --release -p im-storage --example engine -- [seconds] [messages already stored] [directory] [blob threshold, 0 for none]
//! ```
//!
//! Both get the same work: 100-byte messages in batches of 16, over 10,000 conversations, each with one batch in flight at a time,
//! 512 batches in flight together. Both gather what waits while the last sync runs. Prints one JSON object a line and engine.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::Duration,
};

use bytes::Bytes;
use im_proto::{ConversationId, Epoch, Timestamp, UserId, v1::EntryKind};
use im_storage::{AppendDone, AppendRequest, Batch, Embedded, EmbeddedOptions, MessageLog as _, Row, StoreError};
use tokio::time::Instant;

const CONVERSATIONS: u64 = 10_000;
const ROWS: u64 = 16;
const IN_FLIGHT: u64 = 512;
const BODY_BYTES: usize = 100;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| arguments.get(at).map_or(Ok(default), |text| text.parse());
    let (seconds, stored, blobs) = (number(0, 60)?, number(1, 10_000_000)?, number(3, 0)?);
    let directory = arguments.get(2).map_or_else(|| std::env::temp_dir().join("im-storage-engine"), PathBuf::from);
    std::fs::create_dir_all(&directory)?;
    let blob_threshold_bytes = u32::try_from(blobs).ok().filter(|bytes| *bytes > 0);
    let options = EmbeddedOptions { blob_threshold_bytes, ..EmbeddedOptions::default() };
    let place = tempfile_in(&directory, "embedded")?;
    let store = Embedded::open(&place, options)?;
    report("embedded", blobs, stored, &drive(&store_submit(&store), stored, seconds));
    store.close();
    drop(store);
    std::fs::remove_dir_all(&place)?;
    let place = tempfile_in(&directory, "segments")?;
    let log = SegmentLog::start(&place)?;
    report("segment log", 0, stored, &drive(&log, stored, seconds));
    drop(log);
    std::fs::remove_dir_all(&place)?;
    Ok(())
}

fn tempfile_in(directory: &Path, name: &str) -> io::Result<PathBuf> {
    let place = directory.join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir_all(&place)?;
    Ok(place)
}

type Submit = dyn Fn(AppendRequest, AppendDone);

fn store_submit(store: &Embedded) -> Box<Submit> {
    let store = store.clone();
    Box::new(move |request, done| store.submit(vec![request], done))
}

/// What was measured.
struct Measured {
    messages: u64,
    seconds: f64,
    cpu_seconds: f64,
    /// Of each batch, from its submission to its acknowledgement.
    latencies_us: Vec<u32>,
    /// The longest time in which nothing was acknowledged.
    stall_us: u32,
}

/// Prefills a store, then measures it.
fn drive(submit: &Submit, stored: u64, seconds: u64) -> Measured {
    let mut heads = vec![0_u64; usize::try_from(CONVERSATIONS).unwrap_or(0)];
    phase(submit, &mut heads, |messages, _| messages >= stored);
    let end = Duration::from_secs(seconds);
    phase(submit, &mut heads, |_, elapsed| elapsed >= end)
}

fn phase(submit: &Submit, heads: &mut [u64], ended: impl Fn(u64, Duration) -> bool) -> Measured {
    let (outcomes, received) = mpsc::sync_channel::<Vec<(u64, Result<(), StoreError>)>>(1 << 12);
    let done: AppendDone = Arc::new(move |answers| {
        // Whoever measures has seen enough.
        let _ = outcomes.send(answers);
    });
    let sender = UserId::parse("somebody").ok();
    let (begun, cpu) = (Instant::now(), cpu_seconds());
    let mut measured = Measured { messages: 0, seconds: 0.0, cpu_seconds: 0.0, latencies_us: Vec::new(), stall_us: 0 };
    let mut submitted = vec![begun; heads.len()];
    let mut idle: VecDeque<u64> = (0..CONVERSATIONS).collect();
    let (mut in_flight, mut last) = (0, begun);
    loop {
        let now = Instant::now();
        let stop = ended(measured.messages, now - begun);
        while !stop && in_flight < IN_FLIGHT {
            let Some(number) = idle.pop_front() else { break };
            let place = usize::try_from(number).unwrap_or(0);
            let batch = batch(number, heads[place], now, sender.clone());
            heads[place] = batch.last_seq();
            submitted[place] = now;
            submit(AppendRequest { token: number, batch: Arc::new(batch) }, done.clone());
            in_flight += 1;
        }
        if in_flight == 0 {
            break;
        }
        let Ok(answers) = received.recv() else { break };
        let now = Instant::now();
        measured.stall_us = measured.stall_us.max(micros(now - last));
        last = now;
        for (number, outcome) in answers {
            assert_eq!(outcome, Ok(()), "the engine failed");
            measured.latencies_us.push(micros(now - submitted[usize::try_from(number).unwrap_or(0)]));
            measured.messages += ROWS;
            in_flight -= 1;
            idle.push_back(number);
        }
    }
    measured.seconds = begun.elapsed().as_secs_f64();
    measured.cpu_seconds = cpu_seconds() - cpu;
    measured
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

fn batch(number: u64, head: u64, now: Instant, sender: Option<UserId>) -> Batch {
    // Spread over the keys as hashes are.
    let spread = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
    let mut id = [0; 16];
    id[..8].copy_from_slice(&spread);
    let rows = head + 1..=head + ROWS;
    let body = Bytes::from(vec![spread[7]; BODY_BYTES]);
    let sent_at = Timestamp::from_millis(i64::try_from(now.elapsed().as_millis()).unwrap_or(0));
    let row = |seq: u64| Row {
        seq,
        counted: seq,
        sender: sender.clone(),
        client_message_id: Bytes::copy_from_slice(&[seq.to_be_bytes(), spread].concat()),
        sent_at,
        kind: EntryKind::Message,
        flags: 0,
        body: body.clone(),
        meta: Bytes::new(),
    };
    Batch {
        conversation: ConversationId::from_bytes(id),
        epoch: Epoch(1),
        committed: head,
        rows: rows.map(row).collect(),
    }
}

fn report(engine: &str, blob_threshold_bytes: u64, stored: u64, measured: &Measured) {
    let mut latencies = measured.latencies_us.clone();
    latencies.sort_unstable();
    let at =
        |permille: usize| latencies.get((latencies.len() * permille / 1000).min(latencies.len().saturating_sub(1)));
    let at = |permille| at(permille).copied().unwrap_or(0);
    println!(
        "{{\"engine\":\"{engine}\",\"blob_threshold_bytes\":{blob_threshold_bytes},\"stored\":{stored},\"seconds\":{:.1},\
         \"messages_per_s\":{:.0},\"commit_us\":{{\"p50\":{},\"p99\":{},\"p999\":{},\"max\":{}}},\"stall_us\":{},\
         \"cpu_us_per_message\":{:.3}}}",
        measured.seconds,
        measured.messages as f64 / measured.seconds,
        at(500),
        at(990),
        at(999),
        at(1000),
        measured.stall_us,
        measured.cpu_seconds * 1e6 / measured.messages as f64,
    );
}

/// Processor time of this process, all threads, the load's own share included (about 0.5 µs a message).
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which may hold spaces, user and system time are the 12th and 13th field, in ticks of 10 ms.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// The least that is durable: preallocated segments, one write and one `fdatasync` a group, an index in memory of where each run is.
struct SegmentLog;

const SEGMENT_BYTES: u64 = 256 << 20;

impl SegmentLog {
    fn start(directory: &Path) -> io::Result<Box<Submit>> {
        let (queue, waiting) = mpsc::sync_channel::<(AppendRequest, AppendDone)>(1 << 12);
        let directory = directory.to_owned();
        // The next segment is made while this one is written.
        let (ready, segments) = mpsc::sync_channel(1);
        let make = move || (0..).map(|number| Self::segment(&directory, number)).try_for_each(|made| ready.send(made));
        std::thread::Builder::new().name("segments".into()).spawn(make)?;
        let next = move || segments.recv().unwrap_or_else(|_| Err(io::ErrorKind::NotFound.into()));
        let mut segment = next()?;
        let mut number = 0;
        let run = move || -> io::Result<()> {
            let mut index = std::collections::HashMap::<ConversationId, Vec<(u64, u64, u64)>>::new();
            let (mut buffer, mut acks, mut at) = (Vec::new(), Vec::new(), 0_u64);
            while let Ok(first) = waiting.recv() {
                buffer.clear();
                for (request, done) in std::iter::once(first).chain(waiting.try_iter()) {
                    let place = at + buffer.len() as u64;
                    let batch = &request.batch;
                    index.entry(batch.conversation).or_default().push((batch.first_seq(), number, place));
                    encode(&mut buffer, batch);
                    acks.push((request.token, done));
                }
                if at + buffer.len() as u64 > SEGMENT_BYTES {
                    (number, at) = (number + 1, 0);
                    segment = next()?;
                }
                segment.write_all_at(&buffer, at)?;
                segment.sync_data()?;
                at += buffer.len() as u64;
                let mut group = Vec::with_capacity(acks.len());
                let mut done = None;
                for (token, to) in acks.drain(..) {
                    group.push((token, Ok(())));
                    done = Some(to);
                }
                done.into_iter().for_each(|done| done(std::mem::take(&mut group)));
            }
            Ok(())
        };
        std::thread::Builder::new().name("segment-log".into()).spawn(run)?;
        Ok(Box::new(move |request, done| {
            // A log that failed answers nothing, which ends the measurement.
            let _ = queue.send((request, done));
        }))
    }

    /// A segment whose blocks are there already, so that a sync writes data only.
    fn segment(directory: &Path, number: u64) -> io::Result<File> {
        let file = File::create_new(directory.join(format!("{number}.log")))?;
        let zeros = vec![0; 1 << 20];
        for part in 0..SEGMENT_BYTES >> 20 {
            file.write_all_at(&zeros, part << 20)?;
        }
        file.sync_all()?;
        File::open(directory)?.sync_all()?;
        Ok(file)
    }
}

fn encode(buffer: &mut Vec<u8>, batch: &Batch) {
    let begin = buffer.len();
    buffer.extend_from_slice(&[0; 12]);
    buffer.extend_from_slice(batch.conversation.as_bytes());
    for number in [batch.epoch.0, batch.committed, batch.first_seq()] {
        buffer.extend_from_slice(&number.to_be_bytes());
    }
    for row in &batch.rows {
        let sender = row.sender.as_ref().map_or("", |sender| sender.as_str());
        for part in [sender.as_bytes(), &row.client_message_id, &row.body, &row.meta] {
            buffer.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
            buffer.extend_from_slice(part);
        }
        buffer.extend_from_slice(&row.sent_at.as_millis().to_be_bytes());
        buffer.extend_from_slice(&row.counted.to_be_bytes());
    }
    let checksum = xxhash_rust::xxh3::xxh3_64(&buffer[begin + 12..]);
    let length = u32::try_from(buffer.len() - begin).unwrap_or(u32::MAX);
    buffer[begin..begin + 4].copy_from_slice(&length.to_be_bytes());
    buffer[begin + 4..begin + 12].copy_from_slice(&checksum.to_be_bytes());
}
