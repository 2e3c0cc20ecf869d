//! The window of client message ids and the outbox, against simple models.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use im_proto::{ConversationId, Timestamp, UserId};
use proptest::prelude::*;

use super::{Dedupe, Outbox, Seen};
use crate::message::Effect;

fn seen(seq: u64) -> Seen {
    Seen { seq, sent_at: Timestamp::from_millis(0), body_hash: None }
}

proptest! {
    #[test]
    fn the_window_holds_all_above_its_floor_and_everything_uncommitted(
        limit in 1usize..20,
        steps in proptest::collection::vec((any::<bool>(), 0u64..5), 1..200),
    ) {
        let mut window = Dedupe::new(limit, 0);
        let (mut assigned, mut committed) = (0u64, 0u64);
        for (assign, advance) in steps {
            if assign {
                assigned += 1;
                window.insert(u128::from(assigned), seen(assigned), committed);
            } else {
                committed = (committed + advance).min(assigned);
            }
            for seq in 1..=assigned {
                let held = window.get(u128::from(seq)).map(|seen| seen.seq) == Some(seq);
                prop_assert_eq!(held, seq > window.floor, "seq {} floor {}", seq, window.floor);
                prop_assert!(held || seq <= committed, "an uncommitted entry was forgotten");
            }
        }
    }

    #[test]
    fn a_target_has_one_effect_on_its_way_and_gets_all_in_order(
        steps in proptest::collection::vec((0u8..3, 0u8..3, any::<bool>()), 1..300),
    ) {
        let mut outbox = Outbox::default();
        let mut expected: BTreeMap<u8, VecDeque<u64>> = BTreeMap::new();
        let mut flying: BTreeMap<u8, u64> = BTreeMap::new();
        let mut next = 0;
        for (step, target, done) in steps {
            match step {
                0 => {
                    next += 1;
                    outbox.push(effect(target, next));
                    expected.entry(target).or_default().push_back(next);
                }
                1 => {
                    for effect in outbox.take_sendable(usize::MAX) {
                        let target = effect.target.as_bytes()[0];
                        prop_assert!(flying.insert(target, effect.origin_seq).is_none(), "two on their way");
                        prop_assert_eq!(expected[&target].front(), Some(&effect.origin_seq));
                    }
                }
                _ => {
                    if let Some(seq) = flying.remove(&target) {
                        outbox.answered(&id(target), seq, done);
                        if done && let Some(queue) = expected.get_mut(&target) {
                            queue.pop_front();
                        }
                    }
                }
            }
            let first = expected.values().filter_map(|queue| queue.front().copied()).min();
            prop_assert_eq!(outbox.first_waiting(), first);
            prop_assert_eq!(outbox.is_empty(), first.is_none());
        }
    }
}

fn id(target: u8) -> ConversationId {
    ConversationId::from_bytes([target; 16])
}

fn effect(target: u8, origin_seq: u64) -> Effect {
    Effect {
        target: id(target),
        target_user: UserId::parse("someone").unwrap(),
        origin: id(99),
        origin_seq,
        body: Bytes::new(),
    }
}

#[test]
fn sender_and_client_message_id_do_not_run_into_each_other() {
    let ab = UserId::parse("ab").unwrap();
    let a = UserId::parse("a").unwrap();
    assert_ne!(Dedupe::key(&ab, b"c"), Dedupe::key(&a, b"bc"));
    assert_ne!(Dedupe::key(&a, b"1"), Dedupe::key(&a, b"2"));
}

/// What XXH3-128 without a key takes for the same, as anybody can work out.
#[test]
fn no_other_sender_can_make_an_id_that_counts_as_ones_own() {
    let id: [u8; 56] = [
        0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0xa4, 0xce,
        0x05, 0xcc, 0x42, 0x99, 0x84, 0x7a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xde, 0xd4, 0x6d, 0xe9,
        0x83, 0x90, 0x97, 0xdb, 0xc7, 0x41, 0x8d, 0x77, 0x9c, 0x1e, 0xaa, 0x79,
    ];
    let unkeyed = |sender: &str, id: &[u8]| xxhash_rust::xxh3::xxh3_128(&[sender.as_bytes(), &[0], id].concat());
    assert_eq!(unkeyed("mallory", &id), unkeyed("alicia7", b"0003"));
    let [mallory, alicia] = ["mallory", "alicia7"].map(|name| UserId::parse(name).unwrap());
    assert_ne!(Dedupe::key(&mallory, &id), Dedupe::key(&alicia, b"0003"));
}

#[test]
fn effects_that_fail_do_not_hold_up_those_of_other_targets() {
    let mut outbox = Outbox::default();
    for target in 1..=4 {
        outbox.push(effect(target, 1));
    }
    let mut tried = std::collections::BTreeSet::new();
    for _ in 0..2 {
        let sent = outbox.take_sendable(2);
        assert_eq!(sent.len(), 2);
        assert!(outbox.take_sendable(2).is_empty(), "two are on their way");
        for effect in sent {
            tried.insert(effect.target);
            outbox.answered(&effect.target, 1, false);
        }
    }
    assert_eq!(tried.len(), 4);
}
