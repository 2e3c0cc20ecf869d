//! The generator's side of the ceiling: the product's traffic in the bare router's frames.

use std::{rc::Rc, task::Waker, time::Duration};

use anyhow::Context as _;
use tokio::{task::LocalSet, time::Instant};

use super::{Ceiling, Counted, FrameSizes, Measurement, Workload, frames};
use crate::{
    crowd::{Flow, MessageId},
    driver::{Crowd, Micros, Stage},
    measure::{self, Reading},
    report::Latencies,
    stream::{Connector, Transport},
};

/// How long the connections may take to be there.
const READY_WITHIN: Duration = Duration::from_secs(60);

struct Clients {
    connections: Vec<Client>,
    flows: Vec<Flow>,
    send_bytes: usize,
    window: u64,
    ready: usize,
    sending: bool,
    measuring: bool,
    closing: bool,
    acknowledged: u64,
    delivered: u64,
    ack: Latencies,
    delivery: Latencies,
}

struct Client {
    greeted: bool,
    /// What it sends: kind, destination, flow, and the number of its next message.
    sends: Option<(u8, u32, u32)>,
    next_number: u32,
}

/// Drives the router at `address` from a thread of its own.
pub(super) fn drive(measurement: &Measurement, address: &str, server: Option<u32>) -> anyhow::Result<Ceiling> {
    // A thread that ends with the measurement: the pinning does too.
    std::thread::scope(|scope| {
        let generator = scope.spawn(|| {
            measure::pin_to_core(0);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            LocalSet::new().block_on(&runtime, drive_here(measurement, address, server))
        });
        generator.join().map_err(|_| anyhow::anyhow!("the generator of the ceiling panicked"))?
    })
}

async fn drive_here(measurement: &Measurement, address: &str, server: Option<u32>) -> anyhow::Result<Ceiling> {
    let clients = Clients::new(measurement);
    let count = clients.connections.len();
    let stage = Stage::new(clients, count, Instant::now());
    let connector = Connector::new(Transport::Tcp, None)?;
    let mut tasks = tokio::task::JoinSet::new();
    for connection in 0..count {
        let mut stream = connector.connect(address).await.context("connect to the bare router")?;
        let stage = Rc::clone(&stage);
        tasks.spawn_local(async move { stage.drive(connection, &mut stream).await });
    }
    let deadline = Instant::now() + READY_WITHIN;
    while stage.crowd.borrow().ready < count {
        anyhow::ensure!(Instant::now() < deadline, "the bare router does not answer");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stage.crowd.borrow_mut().sending = true;
    (0..count).for_each(|connection| stage.wake(connection));
    tokio::time::sleep(measurement.warmup).await;
    stage.crowd.borrow_mut().measuring = true;
    let before = Reading::take(server);
    tokio::time::sleep(measurement.time).await;
    let after = Reading::take(server);
    let counted = {
        let mut clients = stage.crowd.borrow_mut();
        (clients.measuring, clients.sending, clients.closing) = (false, false, true);
        Counted {
            acknowledged: clients.acknowledged,
            delivered: clients.delivered,
            ack_us: clients.ack.percentiles(),
            delivery_us: clients.delivery.percentiles(),
            before,
            after,
        }
    };
    drop(tasks);
    Ok(counted.ceiling(measurement))
}

impl Clients {
    fn new(measurement: &Measurement) -> Self {
        let size = measurement.size.max(1);
        let number = |index: usize| u32::try_from(index).unwrap_or(u32::MAX);
        let client = |sends| Client { greeted: false, sends, next_number: 0 };
        let (connections, flows): (Vec<Client>, Vec<Flow>) = match measurement.workload {
            Workload::Echo => (0..size).map(|i| (client(Some((frames::ECHO, 0, number(i)))), Flow::new(0))).unzip(),
            Workload::Pairs => {
                let sender = |pair: usize| client(Some((frames::SEND, number(size + pair), number(pair))));
                let connections = (0..size).map(sender).chain((0..size).map(|_| client(None))).collect();
                (connections, (0..size).map(|_| Flow::new(1)).collect())
            }
            Workload::Fanout => {
                let sender = client(Some((frames::FAN, 0, 0)));
                (std::iter::once(sender).chain((0..size).map(|_| client(None))).collect(), vec![Flow::new(size)])
            }
        };
        Self {
            connections,
            flows,
            send_bytes: FrameSizes::of(measurement.body_bytes).send,
            window: measurement.window,
            ready: 0,
            sending: false,
            measuring: false,
            closing: false,
            acknowledged: 0,
            delivered: 0,
            ack: Latencies::default(),
            delivery: Latencies::default(),
        }
    }
}

impl Crowd for Clients {
    fn frame(&mut self, _: usize, payload: &[u8], now: Micros) {
        let Some((kind, _, id)) = frames::parse(payload) else { return };
        if kind == frames::HELLO {
            self.ready += 1;
            return;
        }
        let Some(id) = MessageId::parse(id) else { return };
        self.flows[usize::try_from(id.flow).unwrap_or(0)].arrived(id.number);
        if !self.measuring {
            return;
        }
        let latency = now.saturating_sub(id.scheduled);
        if kind != frames::MESSAGE {
            self.acknowledged += 1;
            self.ack.record(latency);
        }
        if kind != frames::ACK {
            self.delivered += 1;
            self.delivery.record(latency);
        }
    }

    fn fill(&mut self, connection: usize, out: &mut Vec<u8>, now: Micros) {
        let client = &mut self.connections[connection];
        if !std::mem::replace(&mut client.greeted, true) {
            let number = u32::try_from(connection).unwrap_or(u32::MAX);
            frames::put(out, 0, frames::HELLO, number, &[0; MessageId::BYTES]);
        }
        let Some((kind, destination, flow)) = client.sends.filter(|_| self.sending) else { return };
        let state = &self.flows[usize::try_from(flow).unwrap_or(0)];
        while state.in_flight() < self.window {
            let id = MessageId { flow, number: client.next_number, scheduled: now };
            client.next_number = client.next_number.wrapping_add(1);
            state.begin(id.number);
            frames::put(out, self.send_bytes, kind, destination, &id.to_bytes());
        }
    }

    fn wants_close(&self, _: usize) -> bool {
        self.closing
    }

    fn tick(&mut self, _: Micros, _: &mut Vec<usize>) {}

    fn waker(&mut self, connection: usize, waker: &Waker) {
        if let Some((_, _, flow)) = self.connections[connection].sends {
            self.flows[usize::try_from(flow).unwrap_or(0)].waker.register(waker);
        }
    }
}
