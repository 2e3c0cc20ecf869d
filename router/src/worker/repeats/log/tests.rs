//! A sender's log against the whole one: it knows what it read and nothing else.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use im_proto::{ConversationId, Epoch, Timestamp, UserId, v1::EntryKind};
use im_storage::{AppendRequest, Batch, Memory, MessageLog as _, Row, Store};
use proptest::prelude::*;

use super::{Known, RefusedIds, SenderLog};
use crate::deadline::StoreCalls;

const ID: ConversationId = ConversationId::from_bytes([7; 16]);

fn user(n: u64) -> UserId {
    UserId::parse(&format!("u{}", n % 2)).unwrap()
}

/// A log of forty entries by two users in turn.
fn store() -> StoreCalls {
    let store = Store::from(Memory::new());
    let row = |seq: u64| Row {
        seq,
        counted: seq,
        sender: Some(user(seq)),
        client_message_id: Bytes::from(seq.to_string()),
        sent_at: Timestamp::default(),
        kind: EntryKind::Message,
        flags: 0,
        body: Bytes::new(),
        meta: Bytes::new(),
    };
    let batch = Batch { conversation: ID, epoch: Epoch(1), committed: 0, rows: (1..=40).map(row).collect() };
    store.submit(vec![AppendRequest { token: 1, batch: Arc::new(batch) }], Arc::new(|_| {}));
    StoreCalls::new(store, Duration::from_secs(1))
}

proptest! {
    #[test]
    fn it_knows_what_was_read_and_nothing_else(
        steps in proptest::collection::vec((1u64..=40, 0u64..20, proptest::option::of(1u64..=40)), 1..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (store, own) = (store(), user(0));
        let mut log = SenderLog::new(&own);
        for (low, length, wanted) in steps {
            let high = (low + length).min(40);
            let wanted = wanted.map(|seq| Bytes::from(seq.to_string()));
            let (extended, outcome) = runtime.block_on(log.extend(&store, ID, low, high, wanted.as_ref()));
            prop_assert!(outcome.is_ok());
            log = extended;
            for seq in low..=high {
                let id = seq.to_string();
                match log.look_up(id.as_bytes(), low, high) {
                    Known::At(at) => prop_assert!(at == seq && user(seq) == own),
                    Known::Absent => prop_assert!(user(seq) != own),
                    Known::Unread => prop_assert!(wanted.is_some(), "all was asked for"),
                }
            }
            if let Some(wanted) = &wanted {
                let is_there = (low..=high).any(|seq| seq.to_string().as_bytes() == wanted && user(seq) == own);
                prop_assert!(!is_there || matches!(log.look_up(wanted, low, high), Known::At(_)));
            }
            prop_assert_eq!(log.unread(low, high) == 0, (low..=high).all(|seq| log.unread(seq, seq) == 0));
        }
    }
}

#[test]
fn refused_ids_are_remembered_up_to_a_bound() {
    let mut refused = RefusedIds::default();
    for key in 0..2000 {
        refused.insert(key);
    }
    assert!(!refused.contains(100) && refused.contains(1999));
    refused.remove(1999);
    assert!(!refused.contains(1999));
    assert!(refused.ids.len() <= 1024 && refused.order.len() <= 1024);
}

#[test]
fn an_id_that_is_refused_again_is_as_young_as_its_last_refusal() {
    let mut refused = RefusedIds::default();
    for key in 0..1023 {
        refused.insert(key);
    }
    // Stored, then refused once more: of its first refusal nothing is left that could be the oldest.
    refused.remove(0);
    refused.insert(0);
    refused.insert(2000);
    assert!(refused.contains(0) && refused.contains(1), "there was room for all of them");
    refused.insert(2001);
    assert!(refused.contains(0) && !refused.contains(1), "the oldest goes");
}
