//! The two halves against a reference: a list of all messages ever sent, over connections that break anywhere.

use std::{collections::VecDeque, sync::Arc};

use proptest::{collection::vec, prelude::*};

use super::*;

/// Messages are their own numbers in the order of sending, so that the reference needs no numbering.
type TestBatch = Arc<Vec<u64>>;

impl Batch for TestBatch {
    fn messages(&self) -> usize {
        self.len()
    }

    fn bytes(&self) -> usize {
        10 * self.len()
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// The sender puts this many messages into a batch.
    Send(usize),
    /// The receiver takes the oldest batch on its way.
    Take,
    /// The sender learns what was received.
    Acknowledge,
    /// The connection breaks with all that is on its way; a new one is made.
    Reconnect,
    /// The receiver is another process from now on.
    RestartReceiver,
    /// A batch on its way vanishes without a broken connection: the receiver must notice.
    Vanish,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0_usize..5).prop_map(Step::Send),
        6 => Just(Step::Take),
        2 => Just(Step::Acknowledge),
        2 => Just(Step::Reconnect),
        1 => Just(Step::RestartReceiver),
        1 => Just(Step::Vanish),
    ]
}

const LIMIT_BYTES: usize = 120;

struct World {
    outgoing: Outgoing<TestBatch>,
    incoming: Incoming,
    on_the_way: VecDeque<(u64, TestBatch)>,
    /// How many messages were ever sent.
    sent: u64,
    /// What this receiver has handled, ascending.
    handled: Vec<u64>,
    /// The message from which on nothing may be missing: raised by each loss that the sender was told of.
    promised_from: u64,
}

impl World {
    fn new() -> Self {
        Self {
            outgoing: Outgoing::new(LIMIT_BYTES),
            incoming: Incoming::default(),
            on_the_way: VecDeque::new(),
            sent: 0,
            handled: Vec::new(),
            promised_from: 0,
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Send(count) => {
                let batch: TestBatch = Arc::new((0..*count as u64).map(|i| self.sent + i).collect());
                self.sent += *count as u64;
                let first = self.outgoing.push(batch.clone());
                self.on_the_way.push_back((first, batch));
                assert!(self.outgoing.kept_bytes() <= LIMIT_BYTES.max(40), "the buffer is bounded");
            }
            Step::Take => self.take(),
            Step::Acknowledge => self.outgoing.acknowledge(self.incoming.received_through()),
            Step::Reconnect => self.reconnect(),
            Step::RestartReceiver => {
                self.incoming = Incoming::default();
                self.handled.clear();
                self.promised_from = self.sent;
                // A new process has no use for messages to the old one, but must not be harmed by them.
                self.reconnect();
            }
            Step::Vanish => {
                // The carrier is a stream: it never loses the first batch and carries the next. Later the numbers would tell.
                if !self.incoming.first_of_connection {
                    self.on_the_way.pop_front();
                }
            }
        }
    }

    fn take(&mut self) {
        let Some((first, batch)) = self.on_the_way.pop_front() else { return };
        match self.incoming.arrive(first, batch.len()) {
            Arrival::Handle { skip } => self.handled.extend(&batch[skip..]),
            Arrival::Gap => self.reconnect(),
        }
    }

    fn reconnect(&mut self) {
        self.on_the_way.clear();
        self.incoming.reconnected();
        match self.outgoing.replay(self.incoming.received_through()) {
            Some(batches) => self.on_the_way.extend(batches),
            None => self.promised_from = self.sent,
        }
    }

    fn check(&self) {
        assert!(self.handled.windows(2).all(|pair| pair[0] < pair[1]), "once and in order: {:?}", self.handled);
        let promised: Vec<u64> =
            self.handled.iter().copied().filter(|message| *message >= self.promised_from).collect();
        let expected: Vec<u64> = (self.promised_from..).take(promised.len()).collect();
        assert_eq!(promised, expected, "no hole but by a declared loss");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn messages_arrive_once_in_order_and_without_an_undeclared_hole(steps in vec(step(), 0..80)) {
        let mut world = World::new();
        for step in &steps {
            world.step(step);
            world.check();
        }
        // In the end all that was promised arrives.
        world.reconnect();
        while !world.on_the_way.is_empty() {
            world.take();
        }
        world.check();
        let last = world.handled.last().map_or(0, |last| last + 1);
        prop_assert!(world.promised_from == world.sent || last == world.sent);
    }

    #[test]
    fn hostile_numbers_neither_panic_nor_repeat_a_message(
        numbers in vec((prop_oneof![any::<u64>(), 0_u64..10, u64::MAX - 5..=u64::MAX], 0_usize..5, any::<bool>()), 0..30)
    ) {
        let mut incoming = Incoming::default();
        let mut outgoing: Outgoing<TestBatch> = Outgoing::new(LIMIT_BYTES);
        for (number, count, reconnect) in numbers {
            let before = incoming.received_through();
            if let Arrival::Handle { skip } = incoming.arrive(number, count) {
                prop_assert!(skip <= count);
                prop_assert!(skip == count || number + skip as u64 > before);
            }
            prop_assert!(incoming.received_through() >= before);
            outgoing.push(Arc::new(vec![0; count]));
            if reconnect {
                incoming.reconnected();
                outgoing.replay(number);
            } else {
                outgoing.acknowledge(number);
            }
        }
    }
}

fn batch(count: u64) -> TestBatch {
    Arc::new((0..count).collect())
}

#[test]
fn a_batch_that_was_received_in_part_is_replayed_whole_and_skipped_in_part() {
    let mut outgoing = Outgoing::new(1000);
    outgoing.push(batch(3));
    outgoing.push(batch(2));
    let replayed = outgoing.replay(2).expect("all is kept");
    assert_eq!(replayed.iter().map(|(first, _)| *first).collect::<Vec<_>>(), [1, 4]);
    let mut incoming = Incoming::default();
    incoming.reset(2);
    assert_eq!(incoming.arrive(1, 3), Arrival::Handle { skip: 2 });
    assert_eq!(incoming.arrive(4, 2), Arrival::Handle { skip: 0 });
    assert_eq!(incoming.received_through(), 5);
}

#[test]
fn after_a_loss_numbering_goes_on_and_the_next_connection_takes_the_jump() {
    let mut outgoing = Outgoing::new(20);
    let mut incoming = Incoming::default();
    assert_eq!(incoming.arrive(outgoing.push(batch(1)), 1), Arrival::Handle { skip: 0 });
    for _ in 0..5 {
        outgoing.push(batch(1));
    }
    incoming.reconnected();
    assert!(outgoing.replay(incoming.received_through()).is_none());
    let first = outgoing.push(batch(1));
    assert_eq!(first, 7);
    assert_eq!(incoming.arrive(first, 1), Arrival::Handle { skip: 0 });
    assert_eq!(incoming.arrive(9, 1), Arrival::Gap, "only the first batch of a connection may jump");
}

#[test]
fn a_gap_resets_the_link_so_the_batch_after_it_may_jump() {
    let mut incoming = Incoming::default();
    assert_eq!(incoming.arrive(1, 1), Arrival::Handle { skip: 0 });
    assert_eq!(incoming.arrive(3, 1), Arrival::Gap);
    assert_eq!(incoming.arrive(3, 1), Arrival::Handle { skip: 0 });
}

#[test]
fn a_batch_without_messages_is_neither_numbered_nor_kept_nor_judged() {
    let mut outgoing = Outgoing::new(1000);
    assert_eq!(outgoing.push(batch(0)), 1);
    assert_eq!(outgoing.push(batch(1)), 1);
    assert_eq!(outgoing.replay(0).map(|batches| batches.len()), Some(1));
    let mut incoming = Incoming::default();
    assert_eq!(incoming.arrive(0, 0), Arrival::Handle { skip: 0 });
    assert_eq!(incoming.arrive(u64::MAX, 0), Arrival::Handle { skip: 0 });
    assert_eq!(incoming.received_through(), 0);
}

#[test]
fn number_0_is_a_gap() {
    assert_eq!(Incoming::default().arrive(0, 1), Arrival::Gap);
}

#[test]
fn a_receiver_that_claims_more_than_was_sent_is_not_sent_what_it_would_skip() {
    let mut outgoing = Outgoing::new(1000);
    outgoing.push(batch(2));
    assert!(outgoing.replay(10).is_none());
    assert_eq!(outgoing.push(batch(1)), 11);
}

#[test]
fn what_a_hello_says_of_another_boot_counts_for_nothing() {
    let hello = v1::LinkHello { peer_boot_id: 7, received_through: 9, ..v1::LinkHello::default() };
    assert_eq!(received_of_boot(&hello, BootId(7)), 9);
    assert_eq!(received_of_boot(&hello, BootId(8)), 0);
}

#[test]
fn what_is_kept_weighs_no_less_than_it_is_on_the_wire() {
    use prost::Message as _;
    use v1::{gateway_message::Message as FromGateway, peer_message::Message as FromPeer, router_message};

    let long = "x".repeat(5_000);
    let custom = v1::CustomSignal { r#type: String::new(), data: vec![7; 5_000].into() };
    let signal =
        v1::Signal { signal: Some(v1::signal::Signal::Custom(custom)), sender: long.clone(), ..v1::Signal::default() };
    let received = v1::Received { conversation_id: vec![7; 5_000].into(), ..v1::Received::default() };
    let call = v1::Call { request: vec![7; 5_000].into(), ..v1::Call::default() };
    let capability = v1::Capability { identity: vec![7; 5_000].into(), mac: vec![7; 32].into() };
    let from_gateway = [
        FromGateway::Open(v1::SessionOpen { token: long.clone(), client_name: long.clone(), ..Default::default() }),
        FromGateway::Announce(v1::SessionAnnounce { session_id: 1, capability: Some(capability.clone()) }),
        FromGateway::Present(v1::SessionPresent { session_id: 1, capability: Some(capability) }),
        FromGateway::Renew(v1::SessionRenew { session_id: 1, token: long.clone() }),
        FromGateway::Call(v1::SessionCall { session_id: 1, call: Some(call) }),
        FromGateway::Received(v1::SessionReceived { session_id: 1, received: Some(received) }),
        FromGateway::Signal(v1::SessionSignal { signal: Some(signal), ..Default::default() }),
    ];
    for (number, message) in from_gateway.into_iter().enumerate() {
        let messages = vec![v1::GatewayMessage { message: Some(message) }];
        let batch = Arc::new(v1::GatewayBatch { messages, ..Default::default() });
        assert!(batch.bytes() >= batch.encoded_len(), "message {number}");
    }
    let status = Some(v1::Status { code: 1, text: long, ..Default::default() });
    let refused = router_message::Message::Refused(v1::SessionRefused { session_id: 1, status });
    let messages = vec![v1::RouterMessage { message: Some(refused) }];
    let batch = Arc::new(v1::RouterBatch { messages, ..Default::default() });
    assert!(batch.bytes() >= batch.encoded_len());
    let answer = Some(v1::peer_answer::Answer::Reply(vec![7; 5_000].into()));
    let answer = FromPeer::Answer(v1::PeerAnswer { answer, ..Default::default() });
    let messages = vec![v1::PeerMessage { message: Some(answer), ..Default::default() }];
    let batch = Arc::new(v1::PeerBatch { messages, ..Default::default() });
    assert!(batch.bytes() >= batch.encoded_len());
}
