//! The bare router: what the ceiling is measured with. It trusts its clients and keeps nothing.

use std::{
    fs::File,
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    rc::Rc,
    sync::mpsc,
    task::Waker,
};

use anyhow::Context as _;
use tokio::{net::TcpListener, task::LocalSet, time::Instant};

use super::frames;
use crate::{
    crowd::MessageId,
    driver::{Crowd, Micros, Stage},
    measure,
    stream::Stream,
};

/// Connections at most.
const CONNECTIONS_MAX: usize = 20_000;
/// The bare log is a ring of this size, allocated beforehand: a flush then has no size to record.
const LOG_BYTES: u64 = 512 * 1024 * 1024;
/// A batch is handed to the disk when the one before is done, so neither side ever waits for room.
const BATCHES_IN_FLIGHT: usize = 1;

/// How the bare router runs.
#[derive(Clone, Debug)]
pub struct RouterOptions {
    pub ack_bytes: usize,
    pub message_bytes: usize,
    /// Write every message to a file in this directory, with one fdatasync a batch, before anything is answered.
    pub log: Option<PathBuf>,
}

struct Router {
    options: RouterOptions,
    /// The connection of each client number.
    connection_of: Vec<Option<usize>>,
    connections: usize,
    out: Vec<Vec<u8>>,
    wakers: Vec<Option<Waker>>,
    log: Option<Log>,
}

/// Frames wait here for their flush.
struct Log {
    to_disk: mpsc::SyncSender<Vec<u8>>,
    syncing: bool,
    bytes: Vec<u8>,
    waiting: Outboxes,
    in_flight: Outboxes,
}

/// Bytes by connection, and which connections have some.
#[derive(Default)]
struct Outboxes {
    bytes: Vec<Vec<u8>>,
    touched: Vec<usize>,
}

/// Runs the router until the process is killed; prints its address first.
pub fn serve(options: RouterOptions) -> anyhow::Result<()> {
    measure::pin_to_core(measure::cores() - 1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async move {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (done, mut flushed) = tokio::sync::mpsc::channel(BATCHES_IN_FLIGHT);
        let log = match &options.log {
            None => None,
            Some(directory) => Some(Log::start(directory, done)?),
        };
        let router =
            Router { options, connection_of: Vec::new(), connections: 0, out: Vec::new(), wakers: Vec::new(), log };
        let stage = Stage::new(router, CONNECTIONS_MAX, Instant::now());
        let mut output = std::io::stdout();
        writeln!(output, "{}", listener.local_addr()?)?;
        output.flush()?;
        loop {
            tokio::select! {
                biased;
                Some(()) = flushed.recv() => stage.crowd.borrow_mut().flushed(),
                accepted = listener.accept() => {
                    let (stream, _) = accepted?;
                    stream.set_nodelay(true)?;
                    let connection = stage.crowd.borrow_mut().accept();
                    tokio::task::spawn_local(serve_one(Rc::clone(&stage), connection, Stream::Tcp(stream)));
                }
            }
        }
    })
}

async fn serve_one(stage: Rc<Stage<Router>>, connection: usize, mut stream: Stream) {
    stage.drive(connection, &mut stream).await;
    stage.crowd.borrow_mut().wakers[connection] = None;
}

impl Router {
    fn accept(&mut self) -> usize {
        self.out.push(Vec::new());
        self.wakers.push(None);
        self.connections += 1;
        self.connections - 1
    }

    /// A batch is on disk: its frames go out, and what came meanwhile is the next batch.
    fn flushed(&mut self) {
        let Some(log) = &mut self.log else { return };
        for connection in log.in_flight.touched.drain(..) {
            let bytes = &mut log.in_flight.bytes[connection];
            self.out[connection].append(bytes);
            if let Some(waker) = &self.wakers[connection] {
                waker.wake_by_ref();
            }
        }
        log.syncing = false;
        log.flush();
    }

    fn put(&mut self, connection: usize, size: usize, kind: u8, id: &[u8; MessageId::BYTES]) {
        if let Some(log) = &mut self.log {
            let out = log.waiting.of(connection);
            frames::put(out, size, kind, 0, id);
            return;
        }
        let out = &mut self.out[connection];
        if out.is_empty()
            && let Some(waker) = &self.wakers[connection]
        {
            waker.wake_by_ref();
        }
        frames::put(out, size, kind, 0, id);
    }
}

impl Crowd for Router {
    fn frame(&mut self, connection: usize, payload: &[u8], _: Micros) {
        let Some((kind, destination, id)) = frames::parse(payload) else { return };
        let number = usize::try_from(destination).unwrap_or(usize::MAX);
        let (ack, message) = (self.options.ack_bytes, self.options.message_bytes);
        if let Some(log) = &mut self.log
            && kind != frames::HELLO
        {
            log.bytes.extend_from_slice(payload);
        }
        match kind {
            frames::HELLO if number < CONNECTIONS_MAX => {
                if self.connection_of.len() <= number {
                    self.connection_of.resize(number + 1, None);
                }
                self.connection_of[number] = Some(connection);
                // The client starts when the router knows it.
                frames::put(&mut self.out[connection], 0, frames::HELLO, destination, id);
            }
            frames::ECHO => self.put(connection, payload.len() + 4, frames::ECHO, id),
            frames::SEND => {
                self.put(connection, ack, frames::ACK, id);
                if let Some(Some(to)) = self.connection_of.get(number).copied() {
                    self.put(to, message, frames::MESSAGE, id);
                }
            }
            frames::FAN => {
                self.put(connection, ack, frames::ACK, id);
                for to in (0..self.connections).filter(|&to| to != connection) {
                    self.put(to, message, frames::MESSAGE, id);
                }
            }
            _ => {}
        }
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }

    fn fill(&mut self, connection: usize, out: &mut Vec<u8>, _: Micros) {
        std::mem::swap(out, &mut self.out[connection]);
    }

    fn wants_close(&self, _: usize) -> bool {
        false
    }

    fn tick(&mut self, _: Micros, _: &mut Vec<usize>) {}

    fn waker(&mut self, connection: usize, waker: &Waker) {
        let known = &mut self.wakers[connection];
        if !known.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *known = Some(waker.clone());
        }
    }
}

impl Outboxes {
    fn of(&mut self, connection: usize) -> &mut Vec<u8> {
        if self.bytes.len() <= connection {
            self.bytes.resize_with(connection + 1, Vec::new);
        }
        let bytes = &mut self.bytes[connection];
        if bytes.is_empty() {
            self.touched.push(connection);
        }
        bytes
    }
}

impl Log {
    fn start(directory: &Path, done: tokio::sync::mpsc::Sender<()>) -> anyhow::Result<Self> {
        let file = tempfile::tempfile_in(directory).context("create the bare log")?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, LOG_BYTES)
            .context("allocate the bare log")?;
        let (to_disk, batches) = mpsc::sync_channel::<Vec<u8>>(BATCHES_IN_FLIGHT);
        std::thread::Builder::new().name("bare-log".to_owned()).spawn(move || {
            let mut at = 0;
            for batch in batches {
                if write_batch(&file, &batch, &mut at).is_err() || done.blocking_send(()).is_err() {
                    return;
                }
            }
        })?;
        let (waiting, in_flight) = Default::default();
        Ok(Self { to_disk, syncing: false, bytes: Vec::new(), waiting, in_flight })
    }

    /// Sends what waits to the disk, if the disk is idle.
    fn flush(&mut self) {
        if self.syncing || self.bytes.is_empty() {
            return;
        }
        std::mem::swap(&mut self.waiting, &mut self.in_flight);
        self.syncing = self.to_disk.send(std::mem::take(&mut self.bytes)).is_ok();
    }
}

fn write_batch(file: &File, batch: &[u8], at: &mut u64) -> std::io::Result<()> {
    if *at + batch.len() as u64 > LOG_BYTES {
        *at = 0;
    }
    file.write_all_at(batch, *at)?;
    *at += batch.len() as u64;
    file.sync_data()
}
