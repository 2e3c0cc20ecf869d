//! One connection of a gateway: hellos, what must be sent again, then batches both ways.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
};

use im_proto::{
    InstanceId,
    link::channel::{LinkItem, RouterEnd},
    v1,
};
use tokio::{sync::mpsc, time::MissedTickBehavior};

use super::{GatewayLink, take_batch};
use crate::{cluster::Cluster, link_queue::ACKNOWLEDGE_EVERY};

/// Serves one connection of a gateway until it breaks.
pub async fn serve(cluster: Arc<Cluster>, mut end: RouterEnd) {
    let Some(LinkItem::Hello(hello)) = end.receiver.recv().await else { return };
    if cluster.config.is_somebody_else(&hello) {
        return drop(end.sender.send(LinkItem::Hello(cluster.config.hello())).await);
    }
    let Some(link) = admit(&cluster, &hello) else { return };
    let connection = link.connection.fetch_add(1, Ordering::AcqRel) + 1;
    // Retired between the two steps above: this connection would not be told.
    if !cluster.links.read().get(&link.instance).is_some_and(|known| Arc::ptr_eq(known, &link)) {
        return;
    }
    let replay = {
        let mut numbering = link.numbering.lock();
        let knows_us = hello.peer_boot_id == cluster.config.boot.0;
        let received = if knows_us { hello.received_through } else { 0 };
        numbering.incoming.reconnected();
        numbering.outgoing.replay(received)
    };
    let received_through = link.numbering.lock().incoming.received_through();
    let answer = v1::LinkHello { peer_boot_id: link.boot, received_through, ..cluster.config.hello() };
    if end.sender.send(LinkItem::Hello(answer)).await.is_err() {
        return;
    }
    let replay = replay.unwrap_or_else(|| {
        link.send(vec![link.resync_all(v1::ResyncReason::LinkLost)]);
        Vec::new()
    });
    let replay = replay.into_iter().map(|(_, batch)| batch).collect();
    pump(&cluster, &link, connection, replay, end).await;
}

fn admit(cluster: &Cluster, hello: &v1::LinkHello) -> Option<Arc<GatewayLink>> {
    let instance = InstanceId::parse(&hello.instance_id).ok()?;
    if hello.cluster_id != cluster.config.cluster_id {
        tracing::error!(gateway = %instance, theirs = %hello.cluster_id, "a gateway of another cluster was refused");
        return None;
    }
    if hello.shards != cluster.config.shards.get() {
        tracing::error!(gateway = %instance, theirs = hello.shards, "a gateway with another number of shards was refused");
        return None;
    }
    let mut links = cluster.links.write();
    match links.get(&instance) {
        Some(link) if link.boot == hello.boot_id => Some(link.clone()),
        _ => {
            let (room, dropped) = (cluster.config.link_queue_bytes_max, cluster.metrics.deliveries_dropped.clone());
            let link = Arc::new(GatewayLink::new(instance.clone(), hello.boot_id, room, dropped));
            if let Some(former) = links.insert(instance, link.clone()) {
                former.retire();
            }
            Some(link)
        }
    }
}

/// Sending never blocks receiving: two full directions would wait for each other for ever.
async fn pump(
    cluster: &Arc<Cluster>,
    link: &Arc<GatewayLink>,
    connection: u64,
    mut replay: VecDeque<Arc<v1::RouterBatch>>,
    mut end: RouterEnd,
) {
    // Messages may have been queued for this gateway before a wake was stored.
    let mut waits = true;
    let mut acknowledge = tokio::time::interval(ACKNOWLEDGE_EVERY);
    acknowledge.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ended = cluster.ended();
    loop {
        tokio::select! {
            biased;
            // A router that has ended answers nobody: its links break, so that gateways look for the next owner.
            () = async { let _ = ended.wait_for(Option::is_some).await; } => return,
            item = async { cluster.gateway_room().await; end.receiver.recv().await } => match item {
                Some(LinkItem::Batch(batch)) => {
                    if link.connection.load(Ordering::Acquire) != connection || !take_batch(cluster, link, &batch) {
                        return;
                    }
                    // Receiving must not starve sending.
                    waits = match end.sender.try_reserve() {
                        Ok(permit) => send_next(link, connection, &mut replay, permit),
                        Err(_) => true,
                    };
                }
                Some(LinkItem::Hello(_)) | None => return,
            },
            permit = end.sender.reserve(), if waits => match permit {
                Ok(permit) => waits = send_next(link, connection, &mut replay, permit),
                Err(_) => return,
            },
            () = link.wake.notified() => {
                if link.connection.load(Ordering::Acquire) != connection {
                    // A newer connection pumps; hand the wake on.
                    link.wake.notify_one();
                    return;
                }
                waits = true;
            }
            _ = acknowledge.tick() => {
                let numbering = &mut *link.numbering.lock();
                waits |= numbering.acknowledged.tick(&numbering.incoming);
            }
        }
    }
}

/// Sends one batch, what must be sent again first; `false` if nothing waits any more.
fn send_next(
    link: &GatewayLink,
    connection: u64,
    replay: &mut VecDeque<Arc<v1::RouterBatch>>,
    permit: mpsc::Permit<'_, LinkItem<v1::RouterBatch>>,
) -> bool {
    if let Some(batch) = replay.pop_front() {
        permit.send(LinkItem::Batch(batch));
        return true;
    }
    let mut numbering = link.numbering.lock();
    if link.connection.load(Ordering::Acquire) != connection {
        // A newer connection has taken the numbers over and sends what waits.
        link.wake.notify_one();
        return false;
    }
    let messages = link.take_queue();
    let numbering = &mut *numbering;
    if messages.is_empty() && !numbering.acknowledged.is_due() {
        return false;
    }
    let acknowledged_through = numbering.acknowledged.told(&numbering.incoming);
    let first_number = numbering.outgoing.next_number();
    let batch = Arc::new(v1::RouterBatch { first_number, acknowledged_through, messages });
    numbering.outgoing.push(batch.clone());
    permit.send(LinkItem::Batch(batch));
    true
}
