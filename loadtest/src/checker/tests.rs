//! A run in which every promise held is judged clean; the same run with one thing wrong is not.

use proptest::prelude::*;

use super::*;

const CLIENTS: usize = 4;
const CONVERSATIONS: usize = 2;

#[derive(Clone, Debug)]
struct Seen {
    seq: u64,
    sender: usize,
    message: Vec<u8>,
    body: Vec<u8>,
}

#[derive(Clone, Debug)]
enum Step {
    Sent { client: usize, conversation: usize, message: Vec<u8>, body: Vec<u8> },
    Acknowledged { client: usize, conversation: usize, message: Vec<u8>, seq: u64 },
    Delivered { client: usize, conversation: usize, entry: Seen },
    Lost { client: usize },
    Started { client: usize },
    Stored { conversation: usize, entry: Seen },
    StoredThrough { conversation: usize, head: u64 },
}

fn name(client: usize) -> String {
    format!("user-{client}")
}

fn conversation_id(conversation: usize) -> ConversationId {
    ConversationId::from_bytes([u8::try_from(conversation).unwrap(); 16])
}

impl Seen {
    fn record(&self, with: impl FnOnce(Entry<'_>)) {
        with(Entry {
            seq: self.seq,
            sender: &name(self.sender),
            client_message_id: &self.message,
            body: &self.body,
            event: self.message.is_empty(),
        });
    }
}

fn record(steps: &[Step]) -> History {
    let mut history = History::new();
    let conversations: Vec<_> = (0..CONVERSATIONS).map(|c| history.conversation(conversation_id(c))).collect();
    let clients: Vec<_> = (0..CLIENTS).map(|client| history.client(&name(client))).collect();
    let mut views = Vec::new();
    for &client in &clients {
        for &conversation in &conversations {
            let view = history.view(client, conversation);
            history.follows(view, 0);
            views.push(view);
        }
    }
    let view = |client: usize, conversation: usize| views[client * CONVERSATIONS + conversation];
    for step in steps {
        match step {
            Step::Sent { client, conversation, message, body } => {
                history.sent(view(*client, *conversation), message, body);
            }
            Step::Acknowledged { client, conversation, message, seq } => {
                history.acknowledged(view(*client, *conversation), message, *seq);
            }
            Step::Delivered { client, conversation, entry } => {
                entry.record(|entry| history.delivered(view(*client, *conversation), entry));
            }
            Step::Lost { client } => history.session_lost(clients[*client]),
            Step::Started { client } => history.session_started(clients[*client]),
            Step::Stored { conversation, entry } => {
                entry.record(|entry| history.stored(conversations[*conversation], entry));
            }
            Step::StoredThrough { conversation, head } => {
                history.stored_through(conversations[*conversation], *head);
            }
        }
    }
    history
}

fn judge(steps: &[Step]) -> Verdict {
    record(steps).judge()
}

/// A system without a fault: a log a conversation, clients that send, reconnect, re-send and catch up.
#[derive(Default)]
struct Model {
    steps: Vec<Step>,
    logs: Vec<Vec<Seen>>,
    next_message: u64,
    have: Vec<Vec<u64>>,
}

impl Model {
    fn new() -> Self {
        let mut model = Self {
            logs: vec![Vec::new(); CONVERSATIONS],
            have: vec![vec![0; CONVERSATIONS]; CLIENTS],
            ..Self::default()
        };
        for log in &mut model.logs {
            log.push(Seen { seq: 1, sender: 0, message: Vec::new(), body: b"created".to_vec() });
        }
        model.steps.extend((0..CLIENTS).map(|client| Step::Started { client }));
        model
    }

    fn new_message(&mut self, client: usize, conversation: usize) -> Seen {
        self.next_message += 1;
        let message = self.next_message.to_be_bytes().to_vec();
        let body = format!("body {}", self.next_message).into_bytes();
        self.steps.push(Step::Sent { client, conversation, message: message.clone(), body: body.clone() });
        Seen { seq: 0, sender: client, message, body }
    }

    fn commit(&mut self, conversation: usize, mut entry: Seen, acknowledge: bool) {
        entry.seq = self.logs[conversation].len() as u64 + 1;
        if acknowledge {
            let (client, message, seq) = (entry.sender, entry.message.clone(), entry.seq);
            self.steps.push(Step::Acknowledged { client, conversation, message, seq });
        }
        self.logs[conversation].push(entry);
    }

    /// Three messages at once; with `broken` the connection is lost after the first commit and all three are sent again.
    fn send(&mut self, client: usize, conversation: usize, broken: bool) {
        let batch: Vec<Seen> = (0..3).map(|_| self.new_message(client, conversation)).collect();
        let mut batch = batch.into_iter();
        if broken {
            let first = batch.next().unwrap();
            self.commit(conversation, first.clone(), false);
            self.steps.push(Step::Lost { client });
            self.steps.push(Step::Started { client });
            // Catching up shows the own message whose ack was lost; the repeat is acknowledged at the same seq.
            self.catch_up(client, conversation);
            let (message, body) = (first.message.clone(), first.body.clone());
            self.steps.push(Step::Sent { client, conversation, message: message.clone(), body });
            let seq = self.logs[conversation].len() as u64;
            self.steps.push(Step::Acknowledged { client, conversation, message, seq });
        }
        for entry in batch {
            self.commit(conversation, entry, true);
        }
    }

    /// Everything new reaches the client, its own acknowledged messages aside.
    fn catch_up(&mut self, client: usize, conversation: usize) {
        let have = &mut self.have[client][conversation];
        for entry in &self.logs[conversation][usize::try_from(*have).unwrap()..] {
            let acknowledged = self.steps.iter().any(|step| {
                matches!(step, Step::Acknowledged { client: c, conversation: v, seq, .. }
                    if (*c, *v, *seq) == (client, conversation, entry.seq))
            });
            if !acknowledged {
                self.steps.push(Step::Delivered { client, conversation, entry: entry.clone() });
            }
        }
        *have = self.logs[conversation].len() as u64;
    }

    fn finish(mut self) -> Vec<Step> {
        for conversation in 0..CONVERSATIONS {
            for client in 0..CLIENTS {
                self.catch_up(client, conversation);
            }
            for entry in self.logs[conversation].clone() {
                self.steps.push(Step::Stored { conversation, entry });
            }
            let head = self.logs[conversation].len() as u64;
            self.steps.push(Step::StoredThrough { conversation, head });
        }
        self.steps
    }
}

/// Runs in which every conversation gets messages of two clients and everybody catches up.
fn clean_run() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec((0..CLIENTS, 0..CONVERSATIONS, 0..3u8), 0..12).prop_map(|choices| {
        let mut model = Model::new();
        for conversation in 0..CONVERSATIONS {
            model.send(0, conversation, false);
            model.send(1, conversation, false);
        }
        for (client, conversation, kind) in choices {
            match kind {
                0 => model.send(client, conversation, false),
                1 => model.send(client, conversation, true),
                _ => model.catch_up(client, conversation),
            }
        }
        model.finish()
    })
}

/// The place of one step of a kind, chosen by a number.
fn pick(steps: &[Step], choice: usize, wanted: impl Fn(&Step) -> bool) -> usize {
    let places: Vec<usize> = (0..steps.len()).filter(|&at| wanted(&steps[at])).collect();
    places[choice % places.len()]
}

fn has(verdict: &Verdict, violation: Violation) -> bool {
    verdict.findings.iter().any(|finding| finding.violation == violation)
}

/// A delivery that its client is owed: its own messages reach it by their acks.
fn is_owed(step: &Step) -> bool {
    matches!(step, Step::Delivered { client, entry, .. } if entry.sender != *client || entry.message.is_empty())
}

fn is_stored_message(step: &Step) -> bool {
    matches!(step, Step::Stored { entry, .. } if !entry.message.is_empty())
}

proptest! {
    #[test]
    fn a_run_without_a_fault_is_clean(steps in clean_run()) {
        let verdict = judge(&steps);
        prop_assert!(verdict.is_clean(), "{verdict}");
        let stored = steps.iter().filter(|step| matches!(step, Step::Stored { .. })).count() as u64;
        prop_assert_eq!(verdict.stored, stored);
        prop_assert_eq!(verdict.acknowledged, verdict.sent);
    }

    #[test]
    fn two_threads_together_are_judged_like_one(steps in clean_run(), choice in 0usize..1000) {
        // Each client is recorded by one of two threads, as generator threads do.
        let of = |step: &Step, part: usize| match step {
            Step::Sent { client, .. } | Step::Acknowledged { client, .. } | Step::Delivered { client, .. }
            | Step::Lost { client } | Step::Started { client } => client % 2 == part,
            Step::Stored { .. } | Step::StoredThrough { .. } => part == 0,
        };
        let part = |part: usize, steps: &[Step]| {
            record(&steps.iter().filter(|step| of(step, part)).cloned().collect::<Vec<_>>())
        };
        let mut whole = part(0, &steps);
        whole.absorb(part(1, &steps));
        let whole = whole.judge();
        prop_assert!(whole.is_clean(), "{whole}");
        prop_assert_eq!(whole.stored, judge(&steps).stored);

        let mut broken = steps;
        broken.remove(pick(&broken, choice, is_owed));
        let mut whole = part(0, &broken);
        whole.absorb(part(1, &broken));
        prop_assert_eq!(whole.judge().lost, 1);
    }

    #[test]
    fn an_acknowledged_message_missing_from_the_history_is_lost(mut steps in clean_run(), choice in 0usize..1000) {
        steps.remove(pick(&steps, choice, is_stored_message));
        let verdict = judge(&steps);
        prop_assert!(has(&verdict, Violation::AcknowledgedNotStored) && has(&verdict, Violation::Hole), "{verdict}");
        prop_assert_eq!((verdict.lost, verdict.holes), (1, 1));
    }

    #[test]
    fn an_acknowledged_message_behind_the_head_of_the_history_is_lost(mut steps in clean_run()) {
        let last = pick(&steps, 0, |step| matches!(step, Step::StoredThrough { .. })) - 1;
        steps.remove(last);
        if let Step::StoredThrough { head, .. } = &mut steps[last] {
            *head -= 1;
        }
        let verdict = judge(&steps);
        prop_assert!(verdict.lost == 1 && verdict.holes == 0, "{verdict}");
    }

    #[test]
    fn an_acknowledged_message_at_another_seq_is_lost(mut steps in clean_run(), choice in 0usize..1000) {
        let at = pick(&steps, choice, |step| matches!(step, Step::Acknowledged { .. }));
        if let Step::Acknowledged { seq, .. } = &mut steps[at] {
            *seq += 1;
        }
        let verdict = judge(&steps);
        prop_assert!(verdict.lost > 0, "{verdict}");
    }

    #[test]
    fn a_message_that_a_connected_client_never_got_is_lost(mut steps in clean_run(), choice in 0usize..1000) {
        let at = pick(&steps, choice, is_owed);
        let Step::Delivered { client, .. } = steps.remove(at) else { unreachable!() };
        let verdict = judge(&steps);
        prop_assert!(verdict.lost == 1 && has(&verdict, Violation::NotDelivered), "{verdict}");
        // Gone for good, it is owed nothing.
        steps.push(Step::Lost { client });
        prop_assert_eq!(judge(&steps).lost, 0);
    }

    #[test]
    fn a_message_at_two_seqs_is_duplicated(mut steps in clean_run(), choice in 0usize..1000) {
        let at = pick(&steps, choice, is_stored_message);
        let Step::Stored { conversation, mut entry } = steps[at].clone() else { unreachable!() };
        let end = pick(&steps, 0, |step| matches!(step, Step::StoredThrough { conversation: c, .. } if *c == conversation));
        let Step::StoredThrough { head, .. } = &mut steps[end] else { unreachable!() };
        *head += 1;
        entry.seq = *head;
        steps.insert(end, Step::Stored { conversation, entry });
        let verdict = judge(&steps);
        prop_assert!(verdict.duplicated == 1 && has(&verdict, Violation::TwoSeqs), "{verdict}");
    }

    #[test]
    fn a_message_delivered_twice_as_new_is_duplicated(mut steps in clean_run(), choice in 0usize..1000) {
        let at = pick(&steps, choice, |step| matches!(step, Step::Delivered { .. }));
        steps.insert(at, steps[at].clone());
        let verdict = judge(&steps);
        prop_assert!(verdict.duplicated == 1 && has(&verdict, Violation::DeliveredTwice), "{verdict}");
        prop_assert_eq!(verdict.lost + verdict.reordered, 0);
    }

    #[test]
    fn messages_of_one_session_out_of_order_are_reordered(mut steps in clean_run(), choice in 0usize..1000) {
        // Two tries of one client to one conversation, with nothing between them, recorded the other way round.
        let pairs: Vec<usize> = (0..steps.len() - 1).filter(|&at| match (&steps[at], &steps[at + 1]) {
            (Step::Sent { client: a, conversation: x, .. }, Step::Sent { client: b, conversation: y, .. }) => {
                (a, x) == (b, y)
            }
            _ => false,
        }).collect();
        let at = pairs[choice % pairs.len()];
        steps.swap(at, at + 1);
        let verdict = judge(&steps);
        prop_assert!(verdict.reordered > 0 && has(&verdict, Violation::SessionOrder), "{verdict}");
    }

    #[test]
    fn a_member_who_saw_another_order_is_found(mut steps in clean_run(), choice in 0usize..1000) {
        let next_to_each_other = |steps: &[Step], at: usize| match (&steps[at], steps.get(at + 1)) {
            (
                Step::Delivered { client: a, conversation: x, .. },
                Some(Step::Delivered { client: b, conversation: y, .. }),
            ) => (a, x) == (b, y),
            _ => false,
        };
        let pairs: Vec<usize> = (0..steps.len()).filter(|&at| next_to_each_other(&steps, at)).collect();
        let at = pairs[choice % pairs.len()];
        // Shown in the other order under the true seqs.
        let mut late = steps.clone();
        late.swap(at, at + 1);
        let verdict = judge(&late);
        prop_assert!(verdict.reordered == 1 && has(&verdict, Violation::DeliveryOrder), "{verdict}");
        // Shown under each other's seqs.
        let (Step::Delivered { entry: one, .. }, Step::Delivered { entry: other, .. }) = (&late[at], &late[at + 1]) else {
            unreachable!()
        };
        let seqs = (one.seq, other.seq);
        for (step, seq) in [(at, seqs.1), (at + 1, seqs.0)] {
            if let Step::Delivered { entry, .. } = &mut steps[step] {
                *entry = Seen { seq, ..entry.clone() };
            }
        }
        steps.swap(at, at + 1);
        prop_assert!(!judge(&steps).is_clean());
    }

    #[test]
    fn other_bytes_are_found(mut steps in clean_run(), choice in 0usize..1000, live in any::<bool>()) {
        let wanted = |step: &Step| matches!(step, Step::Delivered { .. }) == live
            && matches!(step, Step::Delivered { entry, .. } | Step::Stored { entry, .. } if !entry.message.is_empty());
        let at = pick(&steps, choice, wanted);
        if let Step::Delivered { entry, .. } | Step::Stored { entry, .. } = &mut steps[at] {
            entry.body.push(b'!');
        }
        let verdict = judge(&steps);
        prop_assert!(verdict.corrupted > 0 && has(&verdict, Violation::Bytes), "{verdict}");
    }

    #[test]
    fn an_entry_that_nobody_sent_is_found(mut steps in clean_run()) {
        let end = pick(&steps, 0, |step| matches!(step, Step::StoredThrough { .. }));
        let Step::StoredThrough { conversation, head } = &mut steps[end] else { unreachable!() };
        *head += 1;
        let entry = Seen { seq: *head, sender: 0, message: b"invented".to_vec(), body: Vec::new() };
        let step = Step::Stored { conversation: *conversation, entry };
        steps.insert(end, step);
        let verdict = judge(&steps);
        prop_assert!(verdict.corrupted == 1 && has(&verdict, Violation::NobodySent), "{verdict}");
    }
}

#[test]
fn an_unacknowledged_message_may_be_stored_or_not() {
    let mut model = Model::new();
    model.send(0, 0, false);
    let kept = model.new_message(0, 0);
    model.new_message(0, 0);
    model.commit(0, kept, false);
    let verdict = judge(&model.finish());
    assert!(verdict.is_clean(), "{verdict}");
    assert_eq!((verdict.sent, verdict.acknowledged), (5, 3));
}

#[test]
fn a_seq_out_of_this_world_is_reported_and_costs_no_memory() {
    let mut model = Model::new();
    model.send(0, 0, false);
    let mut steps = model.finish();
    for seq in [0, u64::MAX, 1 << 40] {
        let entry = Seen { seq, sender: 1, message: b"odd".to_vec(), body: b"odd".to_vec() };
        steps.push(Step::Delivered { client: 0, conversation: 0, entry });
    }
    assert_eq!(judge(&steps).holes, 3);
}

#[test]
fn entries_older_than_the_run_are_not_judged() {
    let mut history = History::new();
    let conversation = history.conversation_after(conversation_id(0), 10);
    let client = history.client("user-0");
    let view = history.view(client, conversation);
    history.session_started(client);
    history.follows(view, 0);
    history.sent(view, b"m", b"body");
    history.acknowledged(view, b"m", 11);
    let entry =
        |seq, id: &'static [u8]| Entry { seq, sender: "user-0", client_message_id: id, body: b"body", event: false };
    history.stored(conversation, entry(10, b"old"));
    history.stored(conversation, entry(11, b"m"));
    history.stored_through(conversation, 11);
    let verdict = history.judge();
    assert!(verdict.is_clean(), "{verdict}");
    assert_eq!(verdict.stored, 1);
}

/// A log of ten entries that all were acknowledged, and a read of it: seqs with the message that stands there.
fn verdict_of_a_read(range: ReadRange, head: u64, read: &[(u64, u8)]) -> Verdict {
    let mut history = History::new();
    let conversation = history.conversation(conversation_id(1));
    let client = history.client("u");
    let view = history.view(client, conversation);
    history.session_started(client);
    for message in 1..=10u8 {
        history.sent(view, &[message], b"body");
        history.acknowledged(view, &[message], u64::from(message));
    }
    let entries: Vec<(u64, [u8; 1])> = read.iter().map(|&(seq, message)| (seq, [message])).collect();
    let entries = entries.iter().map(|(seq, message)| Entry {
        seq: *seq,
        sender: "u",
        client_message_id: message,
        body: b"body",
        event: false,
    });
    history.read(conversation, range, head, 1, entries);
    history.judge()
}

#[test]
fn a_read_in_the_middle_of_a_run_shows_what_was_known_without_a_hole() {
    let range = ReadRange { from: 3, to: 6, newest: false, known: 9 };
    let newest = ReadRange { from: 1, to: 0, newest: true, known: 9 };
    for (range, read) in [
        (range, vec![(3, 3), (4, 4), (5, 5), (6, 6)]),
        // Shorter than what was asked for.
        (range, vec![(3, 3)]),
        (newest, vec![(9, 9), (10, 10)]),
        // Beyond the head there is nothing to be read.
        (ReadRange { from: 12, to: 20, ..range }, vec![]),
    ] {
        let verdict = verdict_of_a_read(range, 10, &read);
        assert!(verdict.is_clean(), "{range:?} {read:?}: {verdict}");
    }
    let found = |range, head, read: &[(u64, u8)]| {
        let verdict = verdict_of_a_read(range, head, read);
        verdict.findings.iter().map(|finding| finding.violation).collect::<Vec<_>>()
    };
    assert_eq!(found(range, 8, &[(3, 3)]), [Violation::HeadWentBack]);
    assert_eq!(found(range, 10, &[(3, 3), (5, 5)]), [Violation::Hole]);
    assert_eq!(found(range, 10, &[(4, 4), (5, 5)]), [Violation::Hole]);
    assert_eq!(found(range, 10, &[]), [Violation::Hole]);
    assert_eq!(found(newest, 10, &[(8, 8), (9, 9)]), [Violation::Hole]);
    assert_eq!(found(range, 10, &[(3, 4)])[0], Violation::AcknowledgedElsewhere);
}
