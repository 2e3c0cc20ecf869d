//! Kept sends under anything that happens to owners and links: in order, bounded, and answered at last.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use im_gateway::GatewayConfig;
use im_proto::{ConversationId, StatusCode, v1};
use proptest::{collection::vec, prelude::*};
use tokio::{io::DuplexStream, time::timeout};

use crate::support::*;

const ROUTERS: [&str; 2] = ["r1", "r2"];
const CONVERSATIONS: usize = 3;
const KEPT_MAX: usize = 6;
/// In paused time: everything that can happen has happened.
const QUIET: Duration = Duration::from_millis(1);
/// Longer than the gateway waits before it tries what was given back.
const RETRY: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
enum Step {
    Send(usize),
    /// A router answers the oldest of what it has, so many, whether it is the owner or was.
    Answer(usize, usize),
    /// The other router owns the conversation from now on.
    Move(usize),
    /// The owner gives back what it has of a conversation.
    Return(usize),
    /// The link breaks, the client sends meanwhile, and the router is back: as it was, or started anew.
    Break {
        router: usize,
        anew: bool,
        meanwhile: Vec<usize>,
    },
    Wait,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (conversation, router) = (0..CONVERSATIONS, 0..ROUTERS.len());
    let step = prop_oneof![
        6 => conversation.clone().prop_map(Step::Send),
        3 => (router.clone(), 1..4_usize).prop_map(|(router, count)| Step::Answer(router, count)),
        2 => conversation.clone().prop_map(Step::Move),
        1 => conversation.clone().prop_map(Step::Return),
        1 => (router, any::<bool>(), vec(conversation, 0..3))
            .prop_map(|(router, anew, meanwhile)| Step::Break { router, anew, meanwhile }),
        1 => Just(Step::Wait),
    ];
    vec(step, 0..40)
}

/// A client, two routers, and what each has seen.
struct World {
    bench: Bench,
    client: Client<DuplexStream>,
    conversations: Vec<ConversationId>,
    /// Of each conversation: its owner, the number of its next message, and those that no answer came for.
    owners: [usize; CONVERSATIONS],
    next: [u32; CONVERSATIONS],
    unanswered: [BTreeSet<u32>; CONVERSATIONS],
    routers: Vec<Router>,
    boots: [u64; 2],
    /// What each router has of each conversation since it started.
    received: [BTreeMap<(usize, u32), v1::SessionSend>; 2],
    refused: usize,
}

impl World {
    async fn new() -> Self {
        let mut bench = Bench::new(GatewayConfig { pending_sends_max: KEPT_MAX, ..config() });
        let home = bench.user_shard("ann");
        let conversations: Vec<_> = (0..16)
            .filter(|shard| *shard != home)
            .take(CONVERSATIONS)
            .map(|shard| bench.conversation_in(16, shard))
            .collect();
        bench.owners(|shard| Some(ROUTERS[usize::from(shard == (home + 1) % 16)].to_owned()));
        let mut routers = vec![bench.router().await, bench.router().await];
        routers.sort_by_key(|router| router.name.clone());
        let (client, _) = bench.login(&mut routers[0], "ann").await;
        let mut world = Self {
            bench,
            client,
            conversations,
            owners: [0; CONVERSATIONS],
            next: [0; CONVERSATIONS],
            unanswered: Default::default(),
            routers,
            boots: [21; 2],
            received: Default::default(),
            refused: 0,
        };
        world.claim();
        world.settle().await;
        world
    }

    /// Shows the owners to the gateway. The user's own shard, and with it everything else, stays with the first router.
    fn claim(&self) {
        let shards: Vec<u32> = self.conversations.iter().map(|id| self.bench.shards.shard_of(id).0).collect();
        self.bench.owners(|shard| {
            let conversation = shards.iter().position(|other| *other == shard);
            Some(ROUTERS[conversation.map_or(0, |conversation| self.owners[conversation])].to_owned())
        });
    }

    async fn send(&mut self, conversation: usize) {
        let number = self.next[conversation];
        self.next[conversation] += 1;
        self.unanswered[conversation].insert(number);
        let id = format!("{conversation}-{number}");
        self.client.send(ClientFrame::Send(send(self.conversations[conversation], &id))).await;
    }

    /// Reads whatever was sent, and judges it.
    async fn settle(&mut self) {
        let mut quiet = false;
        while !quiet {
            quiet = true;
            while let Ok(frame) = timeout(QUIET, self.client.next_or_end()).await {
                quiet = false;
                self.client_reads(frame.expect("it stays connected")).await;
            }
            for router in 0..ROUTERS.len() {
                while let Ok(message) = timeout(QUIET, self.routers[router].next_or_end()).await {
                    quiet = false;
                    if let FromGateway::Send(send) = message.expect("the link lives") {
                        self.router_reads(router, send);
                    }
                }
            }
        }
        let kept: usize = self.unanswered.iter().map(BTreeSet::len).sum();
        assert!(kept <= KEPT_MAX, "{kept} sends are kept");
    }

    async fn client_reads(&mut self, frame: ServerFrame) {
        match frame {
            ServerFrame::Ping(ping) => self.client.send(ClientFrame::Pong(v1::Pong { echo: ping.echo })).await,
            ServerFrame::SendAck(ack) => {
                let kept: usize = self.unanswered.iter().map(BTreeSet::len).sum();
                let (conversation, number) = name(&ack.client_message_id);
                assert!(self.unanswered[conversation].remove(&number), "{conversation}-{number} is answered twice");
                if let Some(status) = status_of(ack.status.as_ref()) {
                    assert_eq!(status, StatusCode::Overloaded);
                    assert!(kept > KEPT_MAX, "refused when only {kept} waited");
                    self.refused += 1;
                }
            }
            _ => {}
        }
    }

    /// What is older and waits for an answer was here before it.
    fn router_reads(&mut self, router: usize, send: v1::SessionSend) {
        let (conversation, number) = name(&send.send.as_ref().expect("a send").client_message_id);
        let received = &mut self.received[router];
        for older in self.unanswered[conversation].range(..number) {
            let is_here = received.contains_key(&(conversation, *older));
            assert!(is_here, "{}: {conversation}-{number} overtook {older}", ROUTERS[router]);
        }
        received.insert((conversation, number), send);
    }

    async fn answer(&mut self, router: usize, count: usize) {
        let open = |(conversation, number): &(usize, u32)| self.unanswered[*conversation].contains(number);
        let sends: Vec<_> = self.received[router].iter().filter(|(name, _)| open(name)).take(count).collect();
        let results: Vec<_> = sends.into_iter().map(|(_, send)| result(send, 1)).collect();
        self.routers[router].say_all(results).await;
    }

    async fn give_back(&mut self, conversation: usize) {
        let router = self.owners[conversation];
        let (back, stays) = std::mem::take(&mut self.received[router])
            .into_iter()
            .partition(|((of, number), _)| *of == conversation && self.unanswered[*of].contains(number));
        self.received[router] = stays;
        let back: BTreeMap<(usize, u32), v1::SessionSend> = back;
        let messages = back.into_values().map(|send| {
            let client_message_id = send.send.expect("a send").client_message_id;
            let (session_id, conversation_id) = (send.session_id, send.conversation_id);
            let attempt = send.attempt;
            FromRouter::SendReturned(v1::SendReturned { session_id, conversation_id, client_message_id, attempt })
        });
        self.routers[router].say_all(messages.collect()).await;
    }

    async fn break_link(&mut self, router: usize, anew: bool, meanwhile: &[usize]) {
        let (next_number, received_through) =
            (self.routers[router].next_number(), self.routers[router].received_through);
        let gone = self.routers.remove(router);
        drop(gone);
        for conversation in meanwhile {
            self.send(*conversation).await;
        }
        let mut back = self.bench.dialled().await;
        assert_eq!(back.name.as_str(), ROUTERS[router]);
        if anew {
            self.boots[router] += 1;
            self.received[router].clear();
            back.hello(self.boots[router], 0).await;
        } else {
            back.hello(self.boots[router], received_through).await;
            back.continue_at(next_number);
        }
        self.routers.insert(router, back);
    }

    async fn step(&mut self, step: Step) {
        match step {
            Step::Send(conversation) => self.send(conversation).await,
            Step::Answer(router, count) => self.answer(router, count).await,
            Step::Move(conversation) => {
                self.owners[conversation] = 1 - self.owners[conversation];
                self.claim();
            }
            Step::Return(conversation) => self.give_back(conversation).await,
            Step::Break { router, anew, meanwhile } => self.break_link(router, anew, &meanwhile).await,
            Step::Wait => tokio::time::sleep(RETRY).await,
        }
        self.settle().await;
    }
}

/// The conversation and the number of a message.
fn name(client_message_id: &[u8]) -> (usize, u32) {
    let text = std::str::from_utf8(client_message_id).expect("one of ours");
    let (conversation, number) = text.split_once('-').expect("one of ours");
    (conversation.parse().expect("a number"), number.parse().expect("a number"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn kept_sends_keep_their_order_and_their_bound_whatever_happens_to_owners_and_links(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("a runtime").block_on(async {
            let mut world = World::new().await;
            for step in steps {
                world.step(step).await;
            }
            // Once owners answer, everything is answered.
            for _ in 0..3 {
                world.step(Step::Wait).await;
                for router in 0..ROUTERS.len() {
                    world.step(Step::Answer(router, usize::MAX)).await;
                }
            }
            assert!(world.unanswered.iter().all(BTreeSet::is_empty), "{:?}", world.unanswered);
        });
    }
}
