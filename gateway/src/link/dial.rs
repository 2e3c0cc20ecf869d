//! The task of one link: dials with back-off, exchanges hellos, replays, then carries batches both ways until the link breaks.
//!
//! Sending never blocks receiving: two full directions would wait for each other for ever.

use std::{sync::Arc, time::Duration};

use im_proto::{
    link::{
        Arrival, Batch as _, Incoming, Outgoing,
        channel::{GatewayEnd, LinkItem},
        received_of_boot,
    },
    v1,
};
use tokio::{
    sync::mpsc::Permit,
    task::yield_now,
    time::{Instant, MissedTickBehavior, interval_at, sleep, timeout},
};
use v1::gateway_message::Message;

use super::{Link, inbox};
use crate::gateway::Shared;

/// Batches taken from the router before connections are woken.
const RECEIVE_RUN: usize = 16;
/// Messages received after which the router is told so at once, that its replay buffer stays small.
const ACKNOWLEDGE_MESSAGES: u64 = 1024;
/// A link that lived this long is dialled again without a growing pause.
const STABLE: Duration = Duration::from_secs(10);

/// What survives a broken connection.
struct Numbers {
    outgoing: Outgoing<Arc<v1::GatewayBatch>>,
    incoming: Incoming,
    router_boot: u64,
    acknowledged: u64,
}

/// Keeps the link up until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, link: Arc<Link>) {
    let mut numbers = Numbers {
        outgoing: Outgoing::new(shared.config.link_replay_bytes_max),
        incoming: Incoming::default(),
        router_boot: 0,
        acknowledged: 0,
    };
    let stopped = link.stop.clone();
    tokio::select! {
        biased;
        () = stopped.cancelled() => {}
        () = keep_up(&shared, &link, &mut numbers) => {}
    }
    set_down(&shared, &link);
}

async fn keep_up(shared: &Shared, link: &Arc<Link>, numbers: &mut Numbers) {
    let config = &shared.config;
    let mut backoff = config.link_backoff_min;
    loop {
        let started = Instant::now();
        match timeout(config.link_dial_timeout, dial(shared, link, numbers)).await {
            Ok(Ok((mut end, hello))) => {
                if let Err(reason) = carry(shared, link, numbers, &mut end, &hello).await {
                    tracing::info!(router = %link.router, reason, "the link broke");
                }
                set_down(shared, link);
            }
            Ok(Err(reason)) => tracing::debug!(router = %link.router, reason, "cannot dial the router"),
            Err(_) => tracing::debug!(router = %link.router, "the router does not answer"),
        }
        shared.metrics.link_failures.increment(1);
        if started.elapsed() >= STABLE {
            backoff = config.link_backoff_min;
        }
        sleep(backoff / 2 + shared.environment.jitter(backoff / 2)).await;
        backoff = (backoff * 2).min(config.link_backoff_max);
    }
}

async fn dial(shared: &Shared, link: &Link, numbers: &Numbers) -> Result<(GatewayEnd, v1::LinkHello), String> {
    let connecting = shared.connector.connect(&link.router, &link.address);
    let mut end = connecting.await.map_err(|error| error.to_string())?;
    let hello = v1::LinkHello {
        instance_id: shared.instance.as_str().to_owned(),
        boot_id: shared.boot.0,
        peer_boot_id: numbers.router_boot,
        received_through: numbers.incoming.received_through(),
        cluster_id: shared.config.cluster_id.clone(),
        shards: shared.shards.get(),
        to_instance_id: link.router.as_str().to_owned(),
    };
    end.sender.send(LinkItem::Hello(hello)).await.map_err(|_| "closed before the hello".to_owned())?;
    let Some(LinkItem::Hello(hello)) = end.receiver.recv().await else {
        return Err("no hello from the router".to_owned());
    };
    if hello.cluster_id != shared.config.cluster_id {
        return Err(format!("it belongs to the cluster {:?}", hello.cluster_id));
    }
    if hello.shards != shared.shards.get() {
        return Err(format!("it counts {} shards and this gateway {}", hello.shards, shared.shards.get()));
    }
    if hello.instance_id != link.router.as_str() {
        return Err(format!("it is the instance {:?}", hello.instance_id));
    }
    Ok((end, hello))
}

fn set_down(shared: &Shared, link: &Link) {
    if link.is_up() {
        link.set_up(false);
        shared.metrics.links_up.decrement(1.0);
        // Calls on their way get their answer now.
        shared.routing.touch();
    }
}

/// What was sent or received under the old token may be lost: sessions send and sync again.
fn lose(shared: &Shared, link: &Link) {
    shared.metrics.link_losses.increment(1);
    tracing::info!(router = %link.router, "the link lost messages beyond replay; sessions are announced again");
    link.reset();
    shared.routing.touch();
}

async fn carry(
    shared: &Shared,
    link: &Arc<Link>,
    numbers: &mut Numbers,
    end: &mut GatewayEnd,
    hello: &v1::LinkHello,
) -> Result<(), &'static str> {
    for (first, batch) in resume(shared, link, numbers, hello) {
        debug_assert_eq!(batch.first_number, first, "a batch is kept under its number");
        end.sender.send(LinkItem::Batch(batch)).await.map_err(|_| "closed during the replay")?;
    }
    link.set_up(true);
    shared.metrics.links_up.increment(1.0);
    shared.routing.touch();
    tracing::info!(router = %link.router, "the link is up");
    pump(shared, link, numbers, end).await
}

/// Brings the numbers in line with the router's hello; returns what it has not received.
fn resume(
    shared: &Shared,
    link: &Link,
    numbers: &mut Numbers,
    hello: &v1::LinkHello,
) -> Vec<(u64, Arc<v1::GatewayBatch>)> {
    let is_first = numbers.router_boot == 0;
    if numbers.router_boot == hello.boot_id {
        numbers.incoming.reconnected();
        return numbers.outgoing.replay(received_of_boot(hello, shared.boot)).unwrap_or_else(|| {
            lose(shared, link);
            Vec::new()
        });
    }
    // A new process knows nothing of what the old one was told.
    numbers.router_boot = hello.boot_id;
    numbers.incoming = Incoming::default();
    numbers.acknowledged = 0;
    numbers.outgoing.acknowledge(u64::MAX);
    if !is_first {
        lose(shared, link);
    }
    Vec::new()
}

async fn pump(
    shared: &Shared,
    link: &Arc<Link>,
    numbers: &mut Numbers,
    end: &mut GatewayEnd,
) -> Result<(), &'static str> {
    let mut received = Vec::with_capacity(RECEIVE_RUN);
    let mut load = interval_at(Instant::now(), shared.config.load_interval);
    load.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let waits = !link.is_empty();
        tokio::select! {
            biased;
            count = end.receiver.recv_many(&mut received, RECEIVE_RUN) => {
                if count == 0 {
                    return Err("closed by the router");
                }
                receive(shared, link, numbers, &mut received)?;
                // Receiving must not starve sending.
                while !link.is_empty() {
                    let Ok(permit) = end.sender.try_reserve() else { break };
                    send(link, numbers, permit);
                }
                acknowledge(numbers, end);
            }
            permit = end.sender.reserve(), if waits => {
                send(link, numbers, permit.map_err(|_| "closed by the router")?);
            }
            // Connections that are ready run first, so that one batch carries what all of them have.
            () = link.filled.notified(), if !waits => yield_now().await,
            _ = load.tick() => link.push_one(Message::Load(shared.load())),
        }
    }
}

fn send(link: &Link, numbers: &mut Numbers, permit: Permit<'_, LinkItem<v1::GatewayBatch>>) {
    let messages = link.take();
    if messages.is_empty() {
        return;
    }
    numbers.acknowledged = numbers.incoming.received_through();
    let batch = Arc::new(v1::GatewayBatch {
        first_number: numbers.outgoing.next_number(),
        acknowledged_through: numbers.acknowledged,
        messages,
    });
    numbers.outgoing.push(batch.clone());
    permit.send(LinkItem::Batch(batch));
}

/// A batch without messages takes no number.
fn acknowledge(numbers: &mut Numbers, end: &GatewayEnd) {
    if numbers.incoming.received_through() - numbers.acknowledged < ACKNOWLEDGE_MESSAGES {
        return;
    }
    if let Ok(permit) = end.sender.try_reserve() {
        numbers.acknowledged = numbers.incoming.received_through();
        permit.send(LinkItem::Batch(Arc::new(v1::GatewayBatch {
            first_number: numbers.outgoing.next_number(),
            acknowledged_through: numbers.acknowledged,
            messages: Vec::new(),
        })));
    }
}

fn receive(
    shared: &Shared,
    link: &Arc<Link>,
    numbers: &mut Numbers,
    items: &mut Vec<LinkItem<v1::RouterBatch>>,
) -> Result<(), &'static str> {
    let mut inbox = inbox::Inbox::new(shared, link);
    for item in items.drain(..) {
        let LinkItem::Batch(batch) = item else { return Err("a second hello from the router") };
        numbers.outgoing.acknowledge(batch.acknowledged_through);
        let before = numbers.incoming.received_through();
        match numbers.incoming.arrive(batch.first_number, batch.messages()) {
            Arrival::Gap => return Err("numbers are missing"),
            Arrival::Handle { skip } => {
                if batch.first_number > before + 1 && batch.messages() > 0 {
                    lose(shared, link);
                    inbox = inbox::Inbox::new(shared, link);
                }
                batch.messages.iter().skip(skip).for_each(|message| inbox.handle(message));
            }
        }
    }
    Ok(())
}
