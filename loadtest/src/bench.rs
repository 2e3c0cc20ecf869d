//! The product's traffic against any other server: the bare router of the ceiling, or a peer.
//!
//! One crowd of connections with one window and one clock for all of them, so that figures compare; what differs is the [`Wire`], a
//! minimal codec of the server's protocol. A message leaves the window when its sender has the ack and every receiver has it.

use std::{
    collections::{BTreeSet, VecDeque},
    rc::Rc,
    task::Waker,
    time::Duration,
};

use anyhow::Context as _;
use tokio::{task::LocalSet, time::Instant};

use crate::{
    ceiling::{Ceiling, Measurement, Workload},
    crowd::{Flow, MessageId},
    driver::{Crowd, Micros, Stage},
    measure::{self, Disk, Flushes, Reading},
    report::{Latencies, Percentiles, round},
    stream::{Connector, Transport},
};

/// How long the connections may take to be there.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Time between two looks at heartbeats.
const TICK: Duration = Duration::from_millis(5);

/// What a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Sends messages of this flow.
    Sender(u32),
    /// Receives the messages of this flow.
    Receiver(u32),
    /// Only heartbeats.
    Idle,
}

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The server knows this connection.
    Ready,
    Ack(MessageId),
    /// The oldest message of this connection that was not acknowledged.
    AckOfOldest,
    Message(MessageId),
    /// The own message came back.
    Echo(MessageId),
}

/// One protocol, as far as the traffic needs it.
pub trait Wire: Send {
    /// What a new connection says.
    fn greet(&mut self, connection: usize, part: Part, out: &mut Vec<u8>);

    /// One message, or one heartbeat.
    fn send(&mut self, part: Part, id: MessageId, out: &mut Vec<u8>);

    /// Takes in every whole frame, and appends what has to be answered at once. The bytes used, or what is wrong.
    fn take(
        &mut self,
        connection: usize,
        part: Part,
        bytes: &[u8],
        seen: &mut Vec<Seen>,
        out: &mut Vec<u8>,
    ) -> Result<usize, usize>;
}

struct Clients {
    wire: Box<dyn Wire>,
    connections: Vec<Client>,
    flows: Vec<Flow>,
    window: u64,
    heartbeat: Option<Micros>,
    /// The next heartbeat of each connection.
    beats: BTreeSet<(Micros, usize)>,
    ready: usize,
    sending: bool,
    measuring: bool,
    closing: bool,
    acknowledged: u64,
    delivered: u64,
    ack: Latencies,
    delivery: Latencies,
    /// Kept, so that no read allocates.
    seen: Vec<Seen>,
}

struct Client {
    part: Part,
    greeted: bool,
    next_number: u32,
    /// Heartbeats that are due.
    beats: u32,
    /// Sent and not acknowledged, oldest first.
    unacknowledged: VecDeque<MessageId>,
    /// What has to be answered.
    control: Vec<u8>,
}

/// Drives the server at `address` from a thread of its own.
pub fn drive(measurement: &Measurement, wire: Box<dyn Wire>, address: &str, server: &[u32]) -> anyhow::Result<Ceiling> {
    // A thread that ends with the measurement: the pinning does too.
    std::thread::scope(|scope| {
        let generator = scope.spawn(|| {
            if measurement.pin {
                measure::pin_to_core(0);
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            LocalSet::new().block_on(&runtime, drive_here(measurement, wire, address, server))
        });
        generator.join().map_err(|_| anyhow::anyhow!("the generator panicked"))?
    })
}

async fn drive_here(
    measurement: &Measurement,
    wire: Box<dyn Wire>,
    address: &str,
    server: &[u32],
) -> anyhow::Result<Ceiling> {
    let clients = Clients::new(measurement, wire);
    let count = clients.connections.len();
    let stage = Stage::new(clients, count, Instant::now());
    let connector = Connector::new(Transport::Tcp, None)?;
    let mut tasks = tokio::task::JoinSet::new();
    for connection in 0..count {
        let mut stream = connector.connect(address).await.with_context(|| format!("connect to {address}"))?;
        let stage = Rc::clone(&stage);
        tasks.spawn_local(async move { stage.drive(connection, &mut stream).await });
    }
    let deadline = Instant::now() + READY_WITHIN;
    while stage.crowd.borrow().ready < count {
        anyhow::ensure!(Instant::now() < deadline, "the server at {address} does not answer");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let disk = measurement.durable.then(|| {
        let directory = measurement.directory.clone().unwrap_or_else(std::env::temp_dir);
        Disk::of(&directory).watch()
    });
    stage.crowd.borrow_mut().begin(stage.now());
    (0..count).for_each(|connection| stage.wake(connection));
    pass(&stage, measurement.warmup).await;
    stage.crowd.borrow_mut().measuring = true;
    let before = Reading::take(server);
    pass(&stage, measurement.time).await;
    let after = Reading::take(server);
    if let Some(ended) = tasks.try_join_next() {
        anyhow::bail!("the server at {address} ended a connection: {:?}", ended?);
    }
    let counted = stage.crowd.borrow_mut().end(before, after);
    // In this order: what was acknowledged by now was on disk before.
    let flushes = disk.map(|disk| disk.until_now());
    drop(tasks);
    Ok(counted.ceiling(measurement, flushes))
}

/// Lets time pass, with a tick now and then if there is something to be done at a time.
async fn pass(stage: &Rc<Stage<Clients>>, time: Duration) {
    if stage.crowd.borrow().heartbeat.is_none() {
        return tokio::time::sleep(time).await;
    }
    let end = Instant::now() + time;
    while Instant::now() < end {
        tokio::time::sleep(TICK).await;
        stage.tick();
    }
}

impl Clients {
    fn new(measurement: &Measurement, wire: Box<dyn Wire>) -> Self {
        let size = measurement.size.max(1);
        let flow = |index: usize| u32::try_from(index).unwrap_or(u32::MAX);
        let (parts, flows): (Vec<Part>, Vec<Flow>) = match measurement.workload {
            Workload::Echo => (0..size).map(|index| (Part::Sender(flow(index)), Flow::new(0))).unzip(),
            Workload::Pairs => {
                let senders = (0..size).map(|pair| Part::Sender(flow(pair)));
                let parts = senders.chain((0..size).map(|pair| Part::Receiver(flow(pair)))).collect();
                (parts, (0..size).map(|_| Flow::new(1)).collect())
            }
            Workload::Fanout => {
                let receivers = (0..size).map(|_| Part::Receiver(0));
                (std::iter::once(Part::Sender(0)).chain(receivers).collect(), vec![Flow::new(size)])
            }
            Workload::Idle => (vec![Part::Idle; size], Vec::new()),
        };
        let client = |part| Client {
            part,
            greeted: false,
            next_number: 0,
            beats: 0,
            unacknowledged: VecDeque::new(),
            control: Vec::new(),
        };
        Self {
            wire,
            connections: parts.into_iter().map(client).collect(),
            flows,
            window: measurement.window,
            heartbeat: measurement.heartbeat.map(|every| u64::try_from(every.as_micros()).unwrap_or(u64::MAX).max(1)),
            beats: BTreeSet::new(),
            ready: 0,
            sending: false,
            measuring: false,
            closing: false,
            acknowledged: 0,
            delivered: 0,
            ack: Latencies::default(),
            delivery: Latencies::default(),
            seen: Vec::new(),
        }
    }

    fn begin(&mut self, now: Micros) {
        self.sending = true;
        if let Some(every) = self.heartbeat {
            let count = self.connections.len() as u64;
            self.beats = (0..self.connections.len()).map(|index| (now + every * index as u64 / count, index)).collect();
        }
    }

    fn end(&mut self, before: Reading, after: Reading) -> Counted {
        (self.measuring, self.sending, self.closing) = (false, false, true);
        Counted {
            acknowledged: self.acknowledged,
            delivered: self.delivered,
            ack_us: self.ack.percentiles(),
            delivery_us: self.delivery.percentiles(),
            before,
            after,
        }
    }

    fn saw(&mut self, connection: usize, seen: Seen, now: Micros) {
        let client = &mut self.connections[connection];
        let (id, acks, messages) = match seen {
            Seen::Ready => {
                self.ready += 1;
                return;
            }
            Seen::AckOfOldest => match client.unacknowledged.pop_front() {
                Some(id) => (id, true, false),
                None => return,
            },
            Seen::Ack(id) => (id, true, false),
            Seen::Message(id) => (id, false, true),
            Seen::Echo(id) => (id, true, true),
        };
        if let Some(flow) = self.flows.get(usize::try_from(id.flow).unwrap_or(usize::MAX)) {
            flow.arrived(id.number);
        }
        if !self.measuring {
            return;
        }
        let latency = now.saturating_sub(id.scheduled);
        if acks {
            self.acknowledged += 1;
            self.ack.record(latency);
        }
        if messages {
            self.delivered += 1;
            self.delivery.record(latency);
        }
    }
}

impl Crowd for Clients {
    fn frame(&mut self, _: usize, _: &[u8], _: Micros) {}

    fn frames(&mut self, connection: usize, bytes: &[u8], now: Micros) -> Result<usize, usize> {
        let mut seen = std::mem::take(&mut self.seen);
        let client = &mut self.connections[connection];
        let used = self.wire.take(connection, client.part, bytes, &mut seen, &mut client.control);
        for one in seen.drain(..) {
            self.saw(connection, one, now);
        }
        self.seen = seen;
        used
    }

    fn fill(&mut self, connection: usize, out: &mut Vec<u8>, now: Micros) {
        let client = &mut self.connections[connection];
        if !std::mem::replace(&mut client.greeted, true) {
            self.wire.greet(connection, client.part, out);
        }
        out.append(&mut client.control);
        if !self.sending {
            return;
        }
        let id = |flow, number| MessageId { flow, number, scheduled: now };
        for _ in 0..std::mem::take(&mut client.beats) {
            self.wire.send(client.part, id(u32::MAX, client.next_number), out);
            client.next_number = client.next_number.wrapping_add(1);
        }
        let Part::Sender(flow) = client.part else { return };
        let state = &self.flows[usize::try_from(flow).unwrap_or(0)];
        while state.in_flight() < self.window {
            let id = id(flow, client.next_number);
            client.next_number = client.next_number.wrapping_add(1);
            client.unacknowledged.push_back(id);
            if client.unacknowledged.len() > self.window.max(1) as usize {
                // The protocol names the message in its ack: nobody takes from here.
                client.unacknowledged.pop_front();
            }
            state.begin(id.number);
            self.wire.send(client.part, id, out);
        }
    }

    fn wants_close(&self, _: usize) -> bool {
        self.closing
    }

    fn tick(&mut self, now: Micros, wake: &mut Vec<usize>) {
        let Some(every) = self.heartbeat else { return };
        while let Some(&(at, connection)) = self.beats.first()
            && at <= now
        {
            self.beats.pop_first();
            self.beats.insert((at + every, connection));
            self.connections[connection].beats += 1;
            wake.push(connection);
        }
    }

    fn waker(&mut self, connection: usize, waker: &Waker) {
        if let Part::Sender(flow) = self.connections[connection].part {
            self.flows[usize::try_from(flow).unwrap_or(0)].waker.register(waker);
        }
    }
}

/// What the generator counted while the server was measured.
struct Counted {
    acknowledged: u64,
    delivered: u64,
    ack_us: Percentiles,
    delivery_us: Percentiles,
    before: Reading,
    after: Reading,
}

impl Counted {
    fn ceiling(&self, of: &Measurement, flushes: Option<Flushes>) -> Ceiling {
        let usage = self.after.since(&self.before);
        let per_s = |count: u64| round(count as f64 / usage.seconds);
        Ceiling {
            workload: of.workload,
            size: of.size,
            window: of.window,
            durable: of.durable,
            acked_per_s: per_s(self.acknowledged),
            delivered_per_s: per_s(self.delivered),
            ack_us: self.ack_us,
            delivery_us: self.delivery_us,
            usage,
            acknowledged: self.acknowledged,
            flushes,
            delivered_per_server_core_s: round(self.delivered as f64 / usage.seconds / usage.server_cores.max(0.01)),
        }
    }
}
