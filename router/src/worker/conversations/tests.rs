//! What has time costs nothing, and a shard's conversations are found without looking at others.

use std::{collections::VecDeque, time::Duration};

use im_proto::{ConversationId, ShardCount, ShardId};
use tokio::time::Instant;

use super::{Conversations, Schedule};
use crate::{conversation::Conversation, worker::waiting::Slot};

fn id(n: u32) -> ConversationId {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    ConversationId::from_bytes(bytes)
}

fn conversation(n: u32) -> Conversation {
    Conversation::new(id(n), ShardId(0), im_proto::Epoch(1))
}

#[tokio::test(start_paused = true)]
async fn each_is_looked_at_once_at_its_earliest_moment() {
    let (mut schedule, start) = (Schedule::default(), Instant::now());
    let mut all: Vec<Conversation> = (0..1000).map(conversation).collect();
    for (n, conversation) in all.iter_mut().enumerate() {
        let minute = Duration::from_secs(60);
        schedule.look_by(conversation, start + minute);
        // Sooner counts, later does not.
        if n % 10 == 0 {
            schedule.look_by(conversation, start + minute / 2);
        }
        schedule.look_by(conversation, start + minute * 2);
    }
    schedule.forget(&mut all[5]);
    assert_eq!(schedule.next_due(start), None, "nobody is looked at before its time");
    let due = |schedule: &mut Schedule, seconds| {
        std::iter::from_fn(|| schedule.next_due(start + Duration::from_secs(seconds))).count()
    };
    assert_eq!(due(&mut schedule, 30), 100);
    assert_eq!(due(&mut schedule, 59), 0);
    assert_eq!(due(&mut schedule, 60), 899);
    assert_eq!(due(&mut schedule, 600), 0);
}

#[test]
fn the_conversations_of_a_shard_are_those_and_no_others() {
    let shards = ShardCount::new(16).unwrap();
    let mut conversations = Conversations::new(shards);
    let slot = || Slot::Raising { waiting: VecDeque::new() };
    for n in 0..1000 {
        conversations.insert(id(n), slot());
    }
    for n in (0..1000).step_by(2) {
        assert!(conversations.remove(&id(n)).is_some());
    }
    let mut found = 0;
    for shard in shards.shards() {
        let of_shard = conversations.of_shard(shard);
        assert!(of_shard.iter().all(|id| shards.shard_of(id) == shard && conversations.contains_key(id)));
        found += of_shard.len();
    }
    assert_eq!(found, 500);
}
