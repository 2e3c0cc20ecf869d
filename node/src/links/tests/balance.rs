//! Gateways that are not balanced become so, with the product's own routers, gateways and clients.

use std::collections::BTreeSet;

use tokio::time::sleep;

use super::*;

const CLIENTS: u64 = 30;
const MESSAGES: u64 = 12;
/// Hysteresis, pace and reconnects take ten seconds of an idle machine.
const BALANCED: Duration = Duration::from_secs(90);

/// Small, so that a difference of two connections matters.
fn config() -> GatewayConfig {
    GatewayConfig { connections_max: 100, ..GatewayConfig::new(CLUSTER) }
}

fn loads(gateways: &[&Gateway]) -> Vec<u64> {
    gateways.iter().map(|gateway| gateway.load().connections).collect()
}

/// Returns once no gateway has more than this and all clients are there.
async fn until_at_most(most: u64, gateways: &[&Gateway]) {
    let deadline = Instant::now() + BALANCED;
    loop {
        let loads = loads(gateways);
        if loads.iter().all(|load| *load <= most) && loads.iter().sum::<u64>() == CLIENTS {
            return;
        }
        assert!(Instant::now() < deadline, "{loads:?}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unbalanced_gateways_become_balanced_one_that_joins_gets_its_share_and_nothing_is_lost() {
    let world = World::new(None);
    let (one, other) = (world.router("r1").await, world.router("r2").await);
    let (first, _first_lease, address) = world.gateway_with("g1", config()).await;
    let (second, _second_lease, _) = world.gateway_with("g2", config()).await;
    let (third, _third_lease, _) = world.gateway_with("g3", config()).await;
    let (mut clients, mut events) = (Vec::new(), Vec::new());
    for number in 0..CLIENTS {
        let client = world.client(&format!("user{number}"), &address).await;
        events.push(client.events().unwrap());
        clients.push(client);
    }
    assert_eq!(loads(&[&first, &second, &third])[0], CLIENTS);
    let members: Vec<_> =
        (1..CLIENTS).map(|number| im_proto::UserId::parse(&format!("user{number}")).unwrap()).collect();
    let group = in_time(clients[0].create_group("all", &members)).await.unwrap();
    let talk = clients.iter().map(|client| async move {
        let mut seqs = Vec::new();
        for number in 0..MESSAGES {
            let sent = timeout(BALANCED, client.send(Target::Conversation(group), body::text(format!("{number}"))));
            seqs.push(sent.await.expect("an answer in time").expect("an ack").seq);
            sleep(Duration::from_millis(800)).await;
        }
        seqs
    });
    let talk = async { futures_of(talk.collect()).await };
    // The creation and every message. Read while the senders send, so that nobody's events wait until they are full.
    let shown = events.iter_mut().map(|events| shown(events, group, 1 + CLIENTS * MESSAGES));
    let shown = async { futures_of(shown.collect()).await };
    let gateways = [&first, &second, &third];
    // The share is 10 and the threshold 11.
    let ((), seqs, shown) = tokio::join!(until_at_most(11, &gateways), talk, shown);
    let acked: BTreeSet<u64> = seqs.iter().flatten().copied().collect();
    assert_eq!(acked.len() as u64, CLIENTS * MESSAGES, "each has a seq of its own");
    let (least, most) = (acked.first().unwrap(), acked.last().unwrap());
    assert_eq!(most - least + 1, CLIENTS * MESSAGES, "without a hole");
    assert!(seqs.iter().all(|seqs| seqs.is_sorted()), "in the order in which they were sent");
    let all: Vec<u64> = (1..=1 + CLIENTS * MESSAGES).collect();
    for (number, shown) in shown.iter().enumerate() {
        assert_eq!(*shown, all, "user{number} is shown everything once and in order, wherever it was moved meanwhile");
    }
    for mut events in events {
        world.environment().spawn(async move { while events.recv().await.is_some() {} });
    }

    let (fourth, _fourth_lease, _) = world.gateway_with("g4", config()).await;
    let gateways = [&first, &second, &third, &fourth];
    // The share is 8 and the threshold 9.
    until_at_most(9, &gateways).await;
    let newcomer = fourth.load().connections;
    assert!((3..=9).contains(&newcomer), "{:?}", loads(&gateways));
    for router in [one, other] {
        assert!(in_time(router.stop(PATIENCE)).await);
    }
    world.tasks.stop().await;
}

/// The seqs of a conversation as a client is shown them, until there are so many.
async fn shown(events: &mut mpsc::Receiver<Event>, conversation: im_proto::ConversationId, count: u64) -> Vec<u64> {
    let mut seqs = Vec::new();
    let deadline = Instant::now() + BALANCED;
    while (seqs.len() as u64) < count {
        match tokio::time::timeout_at(deadline, events.recv()).await {
            Ok(Some(Event::Message(entry))) if entry.conversation == conversation => seqs.push(entry.seq),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => break,
        }
    }
    seqs
}

async fn futures_of<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut done: Vec<Option<F::Output>> = running.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (future, done) in running.iter_mut().zip(&mut done) {
            if done.is_none()
                && let std::task::Poll::Ready(output) = future.as_mut().poll(context)
            {
                *done = Some(output);
            }
        }
        if done.iter().all(Option::is_some) { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    done.into_iter().flatten().collect()
}
