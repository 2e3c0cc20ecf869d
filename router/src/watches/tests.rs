use std::{
    future::Future as _,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use im_proto::{
    BootId, SessionId, Timestamp,
    environment::{Clock, Environment, Random, Spawn, Task},
    key::{ClusterSecret, RouterSecret},
};
use tokio::sync::oneshot;

use super::*;
use crate::config::RouterConfig;

struct Still;

impl Clock for Still {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1_700_000_000_000)
    }

    fn since_boot(&self) -> Duration {
        Duration::ZERO
    }
}

impl Random for Still {
    fn next_u64(&self) -> u64 {
        0
    }
}

impl Spawn for Still {
    fn spawn(&self, _: Task) {}
}

pub fn cluster() -> Cluster {
    let still = Arc::new(Still);
    let environment = Environment { clock: still.clone(), random: still.clone(), tasks: still };
    let instance = InstanceId::parse("r1").expect("an id");
    let secrets = (ClusterSecret::new([7; 32]), RouterSecret::new([9; 32]));
    Cluster::new(RouterConfig::new(instance, BootId(1), secrets.0, secrets.1), environment, Vec::new())
}

fn subscription(cluster: &Cluster, number: u64, users: &[&str]) -> Subscription {
    let gateway = InstanceId::parse("g1").expect("an id");
    let parse = |name: &&str| UserId::parse(name).expect("an id");
    let users = users.iter().map(parse).map(|user| (cluster.shard_of_user(&user), user, None));
    Subscription {
        key: SessionKey { gateway, session: SessionId(1) },
        watcher: UserId::parse("alice").expect("an id"),
        number,
        users: users.collect(),
        own: None,
    }
}

/// Woken when the answer is there; counts the times when nothing could be learnt meanwhile.
struct WhileLocked(Arc<Cluster>, AtomicUsize);

impl Wake for WhileLocked {
    fn wake(self: Arc<Self>) {
        self.1.fetch_add(usize::from(self.0.watches.state.is_locked()), Ordering::Relaxed);
    }
}

/// Else what is told by another thread between the look and the answer would come before the answer, which does not know of it.
#[test]
fn nothing_is_told_between_what_a_subscription_finds_and_its_answer() {
    let cluster = Arc::new(cluster());
    let seen = Arc::new(WhileLocked(cluster.clone(), AtomicUsize::new(0)));
    let waker = Waker::from(seen.clone());
    for (number, answers) in [(2, 1), (1, 2)] {
        let (sender, receiver) = oneshot::channel();
        let mut receiver = pin!(receiver);
        assert!(receiver.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        cluster.watches.subscribe(&cluster, subscription(&cluster, number, &["bob"]), ReplyTo::Task(sender));
        let answer = receiver.as_mut().poll(&mut Context::from_waker(&waker));
        assert!(matches!(answer, Poll::Ready(Ok(Ok(AnswerValue::ReplyInOrder(_))))));
        assert_eq!(seen.1.load(Ordering::Relaxed), answers);
    }
}

/// A router that takes many shards over at once, or sees many taken over, names all who are watched there, in bounded steps.
#[test]
fn owners_are_told_of_everybody_once_and_of_few_at_a_time() {
    let now = Instant::now();
    let user = |shard: u32, n: u32| UserId::parse(&format!("u{shard}x{n}")).expect("an id");
    let owner = |name: &str| (InstanceId::parse(name).expect("an id"), Epoch(1));
    let [first, second]: [&'static (InstanceId, Epoch); 2] =
        ["r1", "r2"].map(|name| &*Box::leak(Box::new(owner(name))));
    let mut state = State::default();
    for shard in 0..3 {
        let users = (0..10).map(|n| (user(shard, n), Watched::default())).collect();
        let of_shard = OfShard { users, asked: None, ask_at: now, renewed_through: None, heard: None };
        state.shards.insert(ShardId(shard), of_shard);
    }
    let mut told = |owner_of: &dyn Fn(ShardId) -> Option<&'static (InstanceId, Epoch)>, now: Instant| {
        let (mut told, mut steps) = (BTreeMap::new(), 0);
        loop {
            let due = state.due(owner_of, now, || RENEW, 7);
            if due.is_empty() {
                return (told, steps);
            }
            steps += 1;
            assert!(due.iter().map(|(_, users)| users.len()).sum::<usize>() <= 7);
            for named in due.into_iter().flat_map(|(shard, users)| users.into_iter().map(move |user| (shard, user))) {
                *told.entry(named).or_insert(0) += 1;
            }
        }
    };
    let all: BTreeMap<_, _> =
        (0..3).flat_map(|shard| (0..10).map(move |n| ((ShardId(shard), user(shard, n)), 1))).collect();
    assert_eq!(told(&|_| Some(first), now), (all.clone(), 5));
    let of_one: BTreeMap<_, _> =
        all.iter().filter(|((shard, _), _)| shard.0 == 1).map(|(named, n)| (named.clone(), *n)).collect();
    assert_eq!(told(&|shard| Some(if shard.0 == 1 { second } else { first }), now), (of_one, 2));
    assert_eq!(told(&|shard| Some(if shard.0 == 1 { second } else { first }), now + RENEW), (all, 5));
    assert_eq!(told(&|_| None, now + 2 * RENEW), (BTreeMap::new(), 0));
}

fn told(online: bool) -> v1::UserPresence {
    v1::UserPresence { user_id: "bob".to_owned(), online, ..v1::UserPresence::default() }
}

/// Else the owner's word would be no news to a session of which the answer had nothing.
#[test]
fn what_hot_state_says_to_one_session_is_still_news_from_the_owner_to_another() {
    let cluster = cluster();
    let hot = Some(Seen { online: true, last_seen_ms: 0 });
    let second = |hot| {
        let mut subscription = subscription(&cluster, 2, &["bob"]);
        subscription.key.session = SessionId(2);
        subscription.users[0].2 = hot;
        subscription
    };
    cluster.watches.subscribe(&cluster, subscription(&cluster, 1, &["bob"]), ReplyTo::Nobody);
    cluster.watches.subscribe(&cluster, second(hot), ReplyTo::Nobody);
    let mut state = cluster.watches.state.lock();
    let of_shard = state.shards.first_entry().expect("one is watched").into_mut();
    let watched = of_shard.users.values_mut().next().expect("one is watched");
    assert!(watched.learn(&told(true)).is_some());
    assert!(watched.learn(&told(true)).is_none());
}

#[test]
fn a_check_of_an_older_subscription_ends_no_newer_one() {
    let cluster = cluster();
    let bob = BTreeSet::from([UserId::parse("bob").expect("an id")]);
    cluster.watches.subscribe(&cluster, subscription(&cluster, 2, &["bob"]), ReplyTo::Nobody);
    let check = |number| {
        let Subscription { key, watcher, .. } = subscription(&cluster, number, &[]);
        Check { key, watcher, number, users: Vec::new() }
    };
    cluster.watches.restrict(&cluster, &check(1), &bob);
    assert_eq!(cluster.watches.state.lock().count, 1);
    cluster.watches.restrict(&cluster, &check(2), &bob);
    assert_eq!(cluster.watches.state.lock().count, 0);
}
