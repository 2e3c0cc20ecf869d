//! Applying entries: idempotent, and the same from the tables as from the log.

use bytes::Bytes;
use im_proto::{
    ConversationId, Timestamp, UserId, body,
    key::ClusterSecret,
    v1::{self, EntryKind, system_event::Event},
};
use im_storage::{Row, Table};
use proptest::prelude::*;

use super::{ConversationValue, EntryMeta, Kind, State, apply};

const SECRET: ClusterSecret = ClusterSecret::new([1; 32]);

fn event_row(seq: u64, event: Event) -> Row {
    Row {
        seq,
        counted: 0,
        sender: UserId::parse("u0").ok(),
        client_message_id: Bytes::new(),
        sent_at: Timestamp::from_millis(0),
        kind: EntryKind::Event,
        flags: 0,
        body: body::event(event),
        meta: Bytes::new(),
    }
}

/// A group's log: created by u0, then joins and leaves.
fn log(steps: &[(bool, u8)]) -> Vec<Row> {
    let created = v1::GroupCreated {
        name: "g".to_owned(),
        creator: "u0".to_owned(),
        members: vec!["u0".to_owned(), "u1".to_owned()],
    };
    let mut rows = vec![event_row(1, Event::GroupCreated(created))];
    for (index, (joins, user)) in steps.iter().enumerate() {
        let user_id = format!("u{user}");
        let event = if *joins {
            Event::MembersJoined(v1::MembersJoined { invited_by: "u0".to_owned(), members: vec![user_id] })
        } else {
            Event::MemberLeft(v1::MemberLeft { user_id })
        };
        rows.push(event_row(index as u64 + 2, event));
    }
    rows
}

proptest! {
    #[test]
    fn a_log_applied_again_from_any_entry_gives_the_same_members(
        steps in proptest::collection::vec((any::<bool>(), 0u8..5), 0..40),
        again_from in 0usize..40,
    ) {
        let id = ConversationId::from_bytes([5; 16]);
        let rows = log(&steps);
        let mut once = State::default();
        for row in &rows {
            apply(&mut once, &id, row, &SECRET);
        }
        let mut twice = once.clone();
        for row in rows.iter().skip(again_from) {
            apply(&mut twice, &id, row, &SECRET);
        }
        let names = |state: &State| state.members.keys().cloned().collect::<Vec<_>>();
        prop_assert_eq!(names(&once), names(&twice));
        prop_assert_eq!(&twice.kind, &Kind::Group);
    }

    #[test]
    fn every_effect_of_an_entry_is_one_for_each_target(
        steps in proptest::collection::vec((any::<bool>(), 0u8..5), 0..40),
    ) {
        let id = ConversationId::from_bytes([5; 16]);
        let mut state = State::default();
        for row in log(&steps) {
            let effects = apply(&mut state, &id, &row, &SECRET).effects;
            let mut targets: Vec<_> = effects.iter().map(|effect| effect.target).collect();
            targets.sort_unstable();
            targets.dedup();
            prop_assert_eq!(targets.len(), effects.len());
            for effect in &effects {
                prop_assert_eq!(effect.target, SECRET.self_id(&effect.target_user));
                prop_assert_eq!((effect.origin, effect.origin_seq), (id, row.seq));
            }
        }
    }
}

/// The first entry of a log says whose it is, and may say this: one entry touches a row once, and what was said last stays.
#[test]
fn visibility_is_one_row_an_entry_and_the_same_applied_again() {
    let id = ConversationId::from_bytes([5; 16]);
    let row = |seq, invisible| event_row(seq, Event::VisibilityChanged(v1::VisibilityChanged { invisible }));
    let meta = EntryMeta { user_id: "u0".to_owned(), ..EntryMeta::default() };
    let first = Row { meta: prost::Message::encode_to_vec(&meta).into(), ..row(1, true) };
    let rows = [first, row(2, false), row(3, true)];
    let (mut state, mut stored) = (State::default(), Vec::new());
    for row in rows.iter().chain(&rows) {
        let done = apply(&mut state, &id, row, &SECRET);
        assert_eq!(done.invisible, Some(row.seq != 2));
        let [write] = &done.writes[..] else { panic!("{:?}", done.writes) };
        assert_eq!((write.table, write.timestamp), (Table::Conversations, row.seq));
        let value: ConversationValue = prost::Message::decode(write.value.clone().unwrap()).unwrap();
        stored.push((value.one, value.invisible));
    }
    assert!(state.invisible && state.kind == Kind::SelfLog(UserId::parse("u0").unwrap()));
    let expected = [true, false, true].map(|invisible| ("u0".to_owned(), invisible));
    assert_eq!(stored, [expected.clone(), expected].concat());
}
