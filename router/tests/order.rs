//! `after` against a model: a send is accepted if and only if it names nothing, or one that is stored or about to be.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use im_proto::{
    StatusCode,
    method::Method,
    v1::{self, router_message::Message as Down},
};
use im_router::RouterConfig;
use im_storage::{FaultPlan, Memory, Store};
use proptest::prelude::*;

use crate::{
    lifecycle::faulty,
    support::{CLUSTER, TestGateway, World, message, to, user},
};

/// A user (0 or 1), the number of a message, the number of the one that it names.
type Sent = (u64, u8, Option<u8>);

#[derive(Clone, Debug)]
enum Step {
    /// At once, so that the later ones meet the former ones as pending.
    Sends(Vec<Sent>),
    /// While the store takes nothing: what gets a number loses it again with the epoch.
    Lost(Vec<Sent>),
    /// Another owner reads the log.
    Restart,
}

fn sent() -> impl Strategy<Value = Sent> {
    (0..2_u64, 0..10_u8, prop::option::weighted(0.7, 0..10_u8))
}

fn steps(burst: usize, loses: bool) -> impl Strategy<Value = Vec<Step>> {
    let sends = || prop::collection::vec(sent(), 1..=burst);
    let lost = sends().prop_map(move |sends| if loses { Step::Lost(sends) } else { Step::Sends(sends) });
    prop::collection::vec(prop_oneof![8 => sends().prop_map(Step::Sends), 1 => lost, 1 => Just(Step::Restart)], 1..20)
}

/// What became of a send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    At(u64),
    OutOfOrder,
    Returned,
}

type Key = (u64, u8);

/// What the owner has.
#[derive(Default)]
struct Model {
    stored: BTreeMap<Key, u64>,
    /// Got a number, and will lose it.
    pending: BTreeSet<Key>,
    /// What each client knew of the log when it first tried.
    known: BTreeMap<Key, u64>,
}

impl Model {
    fn take(&mut self, (user, number, after): Sent, loses: bool) -> Fate {
        if let Some(seq) = self.stored.get(&(user, number)) {
            return Fate::At(*seq);
        }
        if self.pending.contains(&(user, number)) {
            return Fate::Returned;
        }
        let is_there = |after: u8| self.stored.contains_key(&(user, after)) || self.pending.contains(&(user, after));
        if !after.is_none_or(is_there) {
            return Fate::OutOfOrder;
        }
        if loses {
            self.pending.insert((user, number));
            return Fate::Returned;
        }
        let seq = self.stored.len() as u64 + 1;
        self.stored.insert((user, number), seq);
        Fate::At(seq)
    }
}

fn name(number: u8) -> String {
    format!("m{number}")
}

/// The fates of sends that were said, in any order.
async fn fates(gateway: &mut TestGateway, count: usize) -> Vec<(u64, String, Fate)> {
    let mut fates = Vec::new();
    while fates.len() < count {
        let fate = gateway
            .expect("what became of a send", |message| match message {
                Down::SendReturned(v1::SendReturned { session_id, client_message_id, .. }) => {
                    Some((*session_id, client_message_id.clone(), Fate::Returned))
                }
                Down::SendResult(v1::SendResult { session_id, ack: Some(ack), .. }) => {
                    let fate = match &ack.status {
                        None => Fate::At(ack.seq),
                        Some(status) if status.code == StatusCode::OutOfOrder.number() => Fate::OutOfOrder,
                        Some(status) => panic!("{status:?}"),
                    };
                    Some((*session_id, ack.client_message_id.clone(), fate))
                }
                _ => None,
            })
            .await;
        fates.push((fate.0, String::from_utf8(fate.1.to_vec()).unwrap(), fate.2));
    }
    fates.sort();
    fates
}

async fn run(steps: Vec<Step>, remembered: usize) {
    let mut world = World::new(Store::from(Memory::new()));
    let store = faulty(&mut world);
    let config = |name: &str| RouterConfig {
        dedupe_entries: remembered,
        append_patience: Duration::from_secs(2),
        ..world.config(name)
    };
    let mut router = world.router(config("r0")).await;
    let mut gateway = world.gateway("g0", &router).await;
    let mut restarts = 0;
    for (session, name) in [(0, "alice"), (1, "bob")] {
        gateway.open(&world, session + 1, name, "d").await;
    }
    let id = CLUSTER.direct_id(&user("alice"), &user("bob"));
    let mut model = Model::default();
    for step in steps {
        let (sends, loses) = match step {
            Step::Sends(sends) => (sends, false),
            Step::Lost(sends) => (sends, true),
            Step::Restart => {
                restarts += 1;
                assert!(router.stop(Duration::from_secs(30)).await);
                router = world.router(config(&format!("r{restarts}"))).await;
                gateway = world.gateway(&format!("g{restarts}"), &router).await;
                for (session, name) in [(0, "alice"), (1, "bob")] {
                    gateway.open(&world, session + 1, name, "d").await;
                }
                continue;
            }
        };
        if loses {
            // It is open, so that numbers are given out without the store.
            let request = v1::HistoryRequest { target: to(id), ..v1::HistoryRequest::default() };
            let _ = gateway.call::<v1::HistoryReply>(1, Method::MessageHistory, &request).await;
            store.set_plan(FaultPlan { refused_permille: 1000, ..FaultPlan::none() });
        }
        let head = model.stored.len() as u64;
        let mut expected = Vec::new();
        for sent in &sends {
            let (from, number, after) = *sent;
            let known_seq = *model.known.entry((from, number)).or_insert(head);
            expected.push((from + 1, name(number), model.take(*sent, loses)));
            let peer = if from == 0 { "bob" } else { "alice" };
            let mut send = message(peer, "", "text", "", known_seq);
            send.client_message_id = name(number).into();
            send.after = after.map(name).unwrap_or_default().into();
            gateway.send(from + 1, id, send).await;
        }
        expected.sort();
        if loses {
            tokio::time::sleep(Duration::from_secs(10)).await;
            store.set_plan(FaultPlan::none());
        }
        let fates = fates(&mut gateway, sends.len()).await;
        // What is stored cannot be compared without the store by an owner that has only seen its id.
        let is_as_expected = |(fate, expected): (&(u64, String, Fate), &(u64, String, Fate))| {
            fate == expected || (loses && matches!((fate.2, expected.2), (Fate::Returned, Fate::At(_))))
        };
        assert!(fates.iter().zip(&expected).all(is_as_expected), "{fates:?} instead of {expected:?}");
        model.pending.clear();
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Bursts, with owners that lose what they have numbered and owners that come later.
    #[test]
    fn a_send_is_accepted_if_what_it_names_is_stored_or_pending(steps in steps(6, true)) {
        runtime().block_on(run(steps, 1024));
    }

    /// The same where the owner remembers two entries and looks for all others in the log.
    #[test]
    fn a_send_is_accepted_if_what_it_names_is_in_the_log(steps in steps(1, false)) {
        runtime().block_on(run(steps, 2));
    }
}
