//! The simulated network: ways between processes, and relays that carry links and byte streams over them.
//!
//! What travels keeps its order and arrives late, or not at all because the connection breaks: then everything under way is lost,
//! and the two ends learn of it at different moments. A cut way holds what is on it; a connection that is cut for longer than
//! [`KEEPALIVE`] breaks.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use im_proto::{
    environment::Spawn as _,
    link::channel::{LinkEnd, LinkItem},
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf},
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};

use super::{chance::Dice, executor::ProcessTasks};

/// A connection over a way that is cut for longer breaks.
const KEEPALIVE: Duration = Duration::from_secs(4);
/// Items under way in one direction.
const UNDER_WAY_MAX: usize = 64;
/// How long a connection attempt over a cut way takes to fail.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// One way without slowness.
const LATENCY_MS: (u64, u64) = (0, 3);
/// The second end of a broken connection learns of it this much later at most.
const LATE_NOTICE_MS: u64 = 900;

/// All ways. Clones are the same network.
#[derive(Clone)]
pub struct Network {
    shared: Arc<Shared>,
}

struct Shared {
    ways: Mutex<BTreeMap<(String, String), WayState>>,
    dice: Mutex<Dice>,
    changed: watch::Sender<u64>,
    tasks: ProcessTasks,
}

#[derive(Clone, Copy, Debug, Default)]
struct WayState {
    cut: bool,
    slower_ms: u64,
    breaks: u64,
}

/// The way of one connection.
#[derive(Clone)]
struct Way {
    network: Network,
    key: (String, String),
    breaks: u64,
}

fn key(one: &str, other: &str) -> (String, String) {
    let (low, high) = if one < other { (one, other) } else { (other, one) };
    (low.to_owned(), high.to_owned())
}

impl Network {
    /// All ways are open. Relays are tasks of `tasks`.
    pub fn new(dice: Dice, tasks: ProcessTasks) -> Self {
        let shared = Shared { ways: Mutex::default(), dice: Mutex::new(dice), changed: watch::Sender::new(0), tasks };
        Self { shared: Arc::new(shared) }
    }

    /// Nothing passes between two processes until it is healed.
    pub fn cut(&self, one: &str, other: &str, cut: bool) {
        self.change(one, other, |way| way.cut = cut);
    }

    /// Everything between two processes takes up to this much longer.
    pub fn slow(&self, one: &str, other: &str, slower_ms: u64) {
        self.change(one, other, |way| way.slower_ms = slower_ms);
    }

    /// Breaks all connections between two processes.
    pub fn reset(&self, one: &str, other: &str) {
        self.change(one, other, |way| way.breaks += 1);
    }

    /// All ways are open and fast.
    pub fn heal(&self) {
        for way in self.shared.ways.lock().values_mut() {
            (way.cut, way.slower_ms) = (false, 0);
        }
        self.shared.changed.send_modify(|changes| *changes += 1);
    }

    fn change(&self, one: &str, other: &str, change: impl FnOnce(&mut WayState)) {
        change(self.shared.ways.lock().entry(key(one, other)).or_default());
        self.shared.changed.send_modify(|changes| *changes += 1);
    }

    fn way(&self, one: &str, other: &str) -> Way {
        let key = key(one, other);
        let breaks = self.shared.ways.lock().get(&key).map_or(0, |way| way.breaks);
        Way { network: self.clone(), key, breaks }
    }

    /// What a connection attempt takes; false if it fails.
    pub async fn reach(&self, from: &str, to: &str) -> bool {
        let way = self.way(from, to);
        let mut changes = self.shared.changed.subscribe();
        let open = async {
            while way.state().cut {
                let _ = changes.changed().await;
            }
        };
        let opened = tokio::time::timeout(CONNECT_TIMEOUT, open).await.is_ok();
        sleep(way.latency()).await;
        opened
    }

    /// Joins two halves of a link.
    pub fn join_link<A, B>(&self, one: &str, other: &str, near: LinkEnd<A, B>, far: LinkEnd<B, A>)
    where
        A: Send + Sync + 'static,
        B: Send + Sync + 'static,
    {
        let way = self.way(one, other);
        self.shared.tasks.spawn(Box::pin(async move {
            let there = carry_items(&way, near.receiver, far.sender);
            let back = carry_items(&way, far.receiver, near.sender);
            let ((near_receiver, far_sender), (far_receiver, near_sender)) = tokio::join!(there, back);
            let (near, far) = ((near_receiver, near_sender), (far_receiver, far_sender));
            way.close(near, far).await;
        }));
    }

    /// Joins two halves of a byte stream. What is read along is what arrives: from the near end at the far one, and back.
    pub fn join_stream(
        &self,
        one: &str,
        other: &str,
        (near, sent): (DuplexStream, impl FnMut(&[u8]) + Send + 'static),
        (far, heard): (DuplexStream, impl FnMut(&[u8]) + Send + 'static),
    ) {
        let way = self.way(one, other);
        self.shared.tasks.spawn(Box::pin(async move {
            let (near_read, near_write) = tokio::io::split(near);
            let (far_read, far_write) = tokio::io::split(far);
            let there = carry_bytes(&way, near_read, far_write, sent);
            let back = carry_bytes(&way, far_read, near_write, heard);
            let ((near_read, far_write), (far_read, near_write)) = tokio::join!(there, back);
            way.close((near_read, near_write), (far_read, far_write)).await;
        }));
    }
}

impl Way {
    fn state(&self) -> WayState {
        self.network.shared.ways.lock().get(&self.key).copied().unwrap_or_default()
    }

    fn is_broken(&self) -> bool {
        self.state().breaks != self.breaks
    }

    fn latency(&self) -> Duration {
        let slower = self.state().slower_ms;
        let mut dice = self.network.shared.dice.lock();
        dice.millis(LATENCY_MS.0, LATENCY_MS.1) + dice.millis(slower / 2, slower)
    }

    /// Drops the two ends at different moments.
    async fn close<A, B>(&self, near: A, far: B) {
        let (near_first, later) = {
            let mut dice = self.network.shared.dice.lock();
            (dice.percent(50), if dice.percent(50) { 0 } else { dice.between(1, LATE_NOTICE_MS) })
        };
        let later = Duration::from_millis(later);
        if near_first {
            drop(near);
            sleep(later).await;
            drop(far);
        } else {
            drop(far);
            sleep(later).await;
            drop(near);
        }
    }
}

/// When a connection over a cut way breaks.
async fn give_up(cut_since: Option<Instant>) {
    match cut_since {
        Some(since) => sleep_until(since + KEEPALIVE).await,
        None => std::future::pending().await,
    }
}

type Items<T> = (mpsc::Receiver<LinkItem<T>>, mpsc::Sender<LinkItem<T>>);

/// Carries one direction of a link until it breaks or one end is closed; gives the halves back, that the caller drops them.
async fn carry_items<T: Send + Sync + 'static>(
    way: &Way,
    mut from: mpsc::Receiver<LinkItem<T>>,
    to: mpsc::Sender<LinkItem<T>>,
) -> Items<T> {
    let mut changes = way.network.shared.changed.subscribe();
    let mut under_way: VecDeque<(Instant, LinkItem<T>)> = VecDeque::new();
    let (mut open, mut cut_since) = (true, None);
    while !way.is_broken() && (open || !under_way.is_empty()) {
        cut_since = way.state().cut.then(|| cut_since.unwrap_or_else(Instant::now));
        let is_cut = cut_since.is_some();
        let due = under_way.front().map(|(due, _)| *due);
        let arrival = async {
            sleep_until(due.unwrap_or_else(Instant::now)).await;
            to.reserve().await
        };
        tokio::select! {
            biased;
            _ = changes.changed() => {}
            () = give_up(cut_since) => break,
            () = to.closed() => break,
            permit = arrival, if due.is_some() && !is_cut => match (permit, under_way.pop_front()) {
                (Ok(permit), Some((_, item))) => permit.send(item),
                _ => break,
            },
            item = from.recv(), if open && under_way.len() < UNDER_WAY_MAX => match item {
                Some(item) => {
                    let due = Instant::now() + way.latency();
                    let due = under_way.back().map_or(due, |(last, _)| due.max(*last));
                    under_way.push_back((due, item));
                }
                None => open = false,
            },
        }
    }
    (from, to)
}

type Bytestream = (ReadHalf<DuplexStream>, WriteHalf<DuplexStream>);

/// The same for bytes.
async fn carry_bytes(
    way: &Way,
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
    mut tap: impl FnMut(&[u8]) + Send,
) -> Bytestream {
    let mut changes = way.network.shared.changed.subscribe();
    let mut under_way: VecDeque<(Instant, Bytes)> = VecDeque::new();
    let (mut open, mut cut_since) = (true, None);
    let mut buffer = BytesMut::new();
    while !way.is_broken() && (open || !under_way.is_empty()) {
        cut_since = way.state().cut.then(|| cut_since.unwrap_or_else(Instant::now));
        let is_cut = cut_since.is_some();
        let head = under_way.front().cloned();
        let (due, chunk) = head.unwrap_or_else(|| (Instant::now(), Bytes::new()));
        let arrival = async {
            sleep_until(due).await;
            to.write(&chunk).await
        };
        buffer.reserve(4096);
        tokio::select! {
            biased;
            _ = changes.changed() => {}
            () = give_up(cut_since) => break,
            written = arrival, if !under_way.is_empty() && !is_cut => {
                let Ok(written) = written else { break };
                tap(&chunk[..written]);
                if written == chunk.len() {
                    under_way.pop_front();
                } else if let Some((_, rest)) = under_way.front_mut() {
                    rest.advance(written);
                }
            }
            read = from.read_buf(&mut buffer), if open && under_way.len() < UNDER_WAY_MAX => match read {
                Ok(0) | Err(_) => open = false,
                Ok(_) => {
                    let due = Instant::now() + way.latency();
                    let due = under_way.back().map_or(due, |(last, _)| due.max(*last));
                    under_way.push_back((due, buffer.split().freeze()));
                }
            },
        }
    }
    let _ = to.shutdown().await;
    (from, to)
}
