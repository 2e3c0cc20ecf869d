//! What every backend of hot state must do: all of it when nothing is lost, and what still holds when anything is.

use std::{collections::BTreeMap, time::Duration};

use im_proto::{ConversationId, Timestamp, UserId};
use tokio::time::{Instant, sleep};

use crate::hot::{Charge, Hint, HintKey, Hot, HotHead, HotState as _, Limit, Presence, SUBJECT_BYTES_MAX};

/// How long anybody may have to wait for an answer, with room for a busy machine.
const ANSWER_MAX: Duration = Duration::from_secs(2);

fn conversation(run: u8, number: u64) -> ConversationId {
    let mut bytes = [run; 16];
    bytes[8..].copy_from_slice(&number.to_be_bytes());
    ConversationId::from_bytes(bytes)
}

fn user(run: u8, name: &str) -> UserId {
    UserId::parse(&format!("{run}-{name}")).expect("a user id")
}

/// The whole suite, on a backend that loses nothing. Runs on the same one use different numbers.
pub async fn all(hot: &Hot, run: u8) {
    the_newest_head_stays(hot, run).await;
    presence_is_the_last_word(hot, run).await;
    hints_are_forgotten(hot, run).await;
    limits_are_kept(hot, run).await;
}

async fn the_newest_head_stays(hot: &Hot, run: u8) {
    let head = |seq: u64| HotHead { seq, counted: seq / 2 };
    let ids: Vec<_> = (0..1_000).map(|number| conversation(run, number)).collect();
    assert_eq!(hot.heads(&ids).await, vec![None; 1_000], "nothing is known");
    hot.raise_heads(ids.iter().map(|id| (*id, head(5))));
    // 9 and 10 are of different lengths, and the greatest number is no signed one.
    for seq in [9, 10, 8, 10] {
        hot.raise_heads([(ids[0], head(seq))]);
    }
    hot.raise_heads([(ids[1], head(u64::MAX)), (ids[1], head(6))]);
    let mut expected = vec![Some(head(5)); 1_000];
    (expected[0], expected[1]) = (Some(head(10)), Some(head(u64::MAX)));
    assert_eq!(hot.heads(&ids).await, expected);
    // The same version again is a later word.
    hot.raise_heads([(ids[0], HotHead { seq: 10, counted: 1 })]);
    assert_eq!(hot.heads(&ids[..1]).await, [Some(HotHead { seq: 10, counted: 1 })]);
    assert_eq!(hot.heads(&[]).await, []);
}

async fn presence_is_the_last_word(hot: &Hot, run: u8) {
    let at = Timestamp::from_millis;
    let presence = |until, seen| Presence { online_until: at(until), last_seen: at(seen) };
    let users = [user(run, "one"), user(run, "}{"), user(run, "nobody")];
    let both = [(users[0].clone(), presence(9_000, 1_000)), (users[1].clone(), presence(9_000, 1_000))];
    hot.put_presence(at(1_000), both);
    // Whoever left was last seen before that is said.
    hot.put_presence(at(2_000), [(users[0].clone(), presence(900, 900))]);
    hot.put_presence(at(1_500), [(users[0].clone(), presence(9_999, 1_500))]);
    let known = hot.presence(&users).await;
    assert_eq!(known, [Some(presence(900, 900)), Some(presence(9_000, 1_000)), None]);
    assert!(known[1].is_some_and(|presence| presence.is_online(at(8_999)) && !presence.is_online(at(9_000))));
}

async fn hints_are_forgotten(hot: &Hot, run: u8) {
    let key = HintKey::Head(conversation(run, 1 << 40));
    let hint = Hint { version: 3, numbers: [-4, i64::MIN] };
    let short = Duration::from_millis(300);
    hot.raise(vec![(key.clone(), hint, short)]);
    assert_eq!(hot.read(vec![key.clone()]).await, [Some(hint)]);
    let begun = Instant::now();
    while hot.read(vec![key.clone()]).await != [None] {
        assert!(begun.elapsed() < short + ANSWER_MAX, "never forgotten");
        sleep(Duration::from_millis(20)).await;
    }
    // Then an older version is news.
    let older = Hint { version: 2, ..hint };
    hot.raise(vec![(key.clone(), older, ANSWER_MAX)]);
    assert_eq!(hot.read(vec![key]).await, [Some(older)]);
}

async fn limits_are_kept(hot: &Hot, run: u8) {
    let limit = Limit { amount: 10, window: Duration::from_secs(60) };
    let subject = format!("{run}/user:}}{{");
    // The window may turn while this runs, in one of some thousand runs: what was used before then counts in part.
    for _ in 0..5 {
        assert_eq!(hot.charge(&subject, 2, limit).await, Charge::Allowed);
    }
    assert_eq!(hot.charge(&format!("{subject}/other"), 10, limit).await, Charge::Allowed);
    let refused = hot.charge(&subject, 1, limit).await;
    assert!(matches!(refused, Charge::Exceeded { retry_after } if retry_after <= 2 * limit.window), "{refused:?}");
    let long = "s".repeat(SUBJECT_BYTES_MAX + 1);
    assert_eq!(hot.charge(&long, 1, limit).await, Charge::Unknown);
    assert_eq!(hot.charge(&long[1..], 1, limit).await, Charge::Allowed);

    // Who waits as long as told is let in.
    let limit = Limit { amount: 3, window: Duration::from_millis(200) };
    let subject = format!("{run}/patient");
    let mut refusals = 0;
    for _ in 0..30 {
        if let Charge::Exceeded { retry_after } = hot.charge(&subject, 1, limit).await {
            refusals += 1;
            sleep(retry_after).await;
        }
    }
    assert!((1..30).contains(&refusals), "{refusals}");
}

/// Uses a backend while anything may happen to it, until `ended`: whatever is answered is right, and in time. Gives the share of
/// questions that had an answer.
pub async fn sound(hot: &Hot, run: u8, ended: impl Fn() -> bool) -> f64 {
    let limit = Limit { amount: 5, window: Duration::from_secs(3_600) };
    let mut raised = BTreeMap::<u64, u64>::new();
    let (mut asked, mut known, mut round) = (0_u32, 0_u32, 0_u64);
    while !ended() {
        round += 1;
        let number = round % 7;
        // Versions go up and down.
        let version = round ^ (round % 3);
        let head = HotHead { seq: version, counted: version * 2 };
        hot.raise_heads([(conversation(run, number), head)]);
        let greatest = raised.entry(number).or_insert(0);
        *greatest = version.max(*greatest);
        let begun = Instant::now();
        let heads = hot.heads(&[conversation(run, number), conversation(run, 1 << 50)]).await;
        assert!(begun.elapsed() < ANSWER_MAX, "an answer took {:?}", begun.elapsed());
        assert_eq!(heads[1], None, "nobody ever raised it");
        if let Some(head) = heads[0] {
            assert!(head.seq <= raised[&number] && head.counted == head.seq * 2, "{head:?}");
            known += 1;
        }
        let subject = format!("{run}/{}", round / 5);
        let begun = Instant::now();
        let charge = hot.charge(&subject, 1, limit).await;
        assert!(begun.elapsed() < ANSWER_MAX, "an answer took {:?}", begun.elapsed());
        // Five charges of a limit of five, and no request is ever sent twice.
        assert!(!matches!(charge, Charge::Exceeded { .. }), "refused within the limit");
        known += u32::from(charge == Charge::Allowed);
        asked += 2;
        sleep(Duration::from_millis(1)).await;
    }
    f64::from(known) / f64::from(asked.max(1))
}

/// Waits until a backend answers again.
pub async fn recovered(hot: &Hot, run: u8, patience: Duration) {
    let begun = Instant::now();
    let head = HotHead { seq: 1, counted: 1 };
    loop {
        hot.raise_heads([(conversation(run, 1 << 51), head)]);
        if hot.heads(&[conversation(run, 1 << 51)]).await == [Some(head)] {
            return;
        }
        assert!(begun.elapsed() < patience, "no answer after {patience:?}");
        sleep(Duration::from_millis(20)).await;
    }
}
