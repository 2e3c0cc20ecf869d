//! The balanced channel over real connections on loopback.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use im_proto::{StatusCode, status::GRPC_METADATA};
use im_registry::{
    BalancedChannel, ChannelOptions, Endpoint, Idempotent, Instance, LongLived, Role, View, channel::Ejection,
};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Status, service::interceptor::InterceptedService, transport::Server};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    proxy::{Proxy, Way},
    support::{Numbers, Surroundings, id, instance},
};

const PATIENCE: Duration = Duration::from_secs(20);

/// A gRPC server that counts its calls. It has a runtime of its own, so that its end closes every connection.
struct Fake {
    address: SocketAddr,
    calls: Arc<AtomicU32>,
    unavailable: Arc<AtomicBool>,
    /// It is not the one that is unavailable, as the status in its answers says.
    speaks_of_others: Arc<AtomicBool>,
    runtime: Option<Runtime>,
}

impl Fake {
    async fn start() -> Self {
        Self::start_at("127.0.0.1:0".parse().expect("an address")).await
    }

    async fn start_at(address: SocketAddr) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let calls = Arc::new(AtomicU32::new(0));
        let (unavailable, speaks_of_others) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (counted, refusing, of_others) = (calls.clone(), unavailable.clone(), speaks_of_others.clone());
        let intercept = move |request: Request<()>| {
            counted.fetch_add(1, Ordering::Relaxed);
            if !refusing.load(Ordering::Relaxed) {
                return Ok(request);
            }
            let mut status = Status::unavailable("on purpose");
            if of_others.load(Ordering::Relaxed) {
                status.metadata_mut().insert(GRPC_METADATA, StatusCode::Unavailable.number().into());
            }
            Err(status)
        };
        let (_, service) = tonic_health::server::health_reporter();
        let health = InterceptedService::new(service, intercept);
        let bound = runtime.spawn(TcpListener::bind(address)).await.expect("no panic");
        let listener = bound.expect("the port is free");
        let address = listener.local_addr().expect("an address");
        let serving = Server::builder().add_service(health).serve_with_incoming(TcpListenerStream::new(listener));
        runtime.spawn(serving);
        Self { address, calls, unavailable, speaks_of_others, runtime: Some(runtime) }
    }

    /// Every connection ends and nobody listens any more.
    async fn kill(self) -> SocketAddr {
        let address = self.address;
        drop(self);
        let gone = async {
            while TcpStream::connect(address).await.is_ok() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, gone).await.expect("it ends");
        address
    }

    fn taken(&self) -> u32 {
        self.calls.swap(0, Ordering::Relaxed)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The instances that a registry would show.
struct Registered {
    view: watch::Sender<Arc<View>>,
    surroundings: Arc<Surroundings>,
}

impl Registered {
    fn new(instances: impl IntoIterator<Item = Instance>) -> Self {
        let registered = Self { view: watch::Sender::default(), surroundings: Surroundings::new() };
        registered.set(instances);
        registered
    }

    fn set(&self, instances: impl IntoIterator<Item = Instance>) {
        let instances: BTreeMap<_, _> = instances.into_iter().map(|instance| (instance.id.clone(), instance)).collect();
        let revision = self.view.borrow().revision + 1;
        self.view.send_replace(Arc::new(View { revision, instances, ..View::default() }));
    }

    fn channel(&self, options: ChannelOptions) -> BalancedChannel {
        BalancedChannel::new(self.view.subscribe(), options, self.surroundings.environment())
    }
}

fn at(name: &str, address: &str) -> Instance {
    let endpoint = Endpoint { transport: "api".to_owned(), address: address.to_owned() };
    Instance { endpoints: vec![endpoint], ..instance(Role::Router, name) }
}

fn of(name: &str, fake: &Fake) -> Instance {
    at(name, &fake.address.to_string())
}

fn options() -> ChannelOptions {
    ChannelOptions::new(Role::Router, "api")
}

fn request() -> Request<HealthCheckRequest> {
    Request::new(HealthCheckRequest::default())
}

fn idempotent() -> Request<HealthCheckRequest> {
    let mut request = request();
    request.extensions_mut().insert(Idempotent);
    request
}

async fn call(channel: &BalancedChannel, request: Request<HealthCheckRequest>) -> Result<(), Status> {
    HealthClient::new(channel.clone()).check(request).await.map(drop)
}

async fn call_until_taken(channel: &BalancedChannel, fake: &Fake) {
    let took = async {
        while fake.calls.load(Ordering::Relaxed) == 0 {
            let _ = call(channel, request()).await;
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, took).await.expect("the instance gets calls");
}

#[tokio::test]
async fn calls_are_spread_and_follow_the_registry() {
    let (one, two, three) = (Fake::start().await, Fake::start().await, Fake::start().await);
    let other_role = Instance { role: Role::Gateway, ..of("d", &three) };
    let other_transport = Instance { endpoints: Vec::new(), ..instance(Role::Router, "e") };
    let registered = Registered::new([of("a", &one), of("b", &two), other_role, other_transport]);
    let channel = registered.channel(options());
    for _ in 0..200 {
        call(&channel, request()).await.expect("an answer");
    }
    let (first, second) = (one.taken(), two.taken());
    assert!(first + second == 200 && first > 50 && second > 50, "{first} and {second}");
    assert_eq!(three.taken(), 0);

    registered.set([of("b", &two), of("c", &three)]);
    call_until_taken(&channel, &three).await;
    one.taken();
    let draining = Instance { draining: true, ..of("b", &two) };
    registered.set([draining, of("c", &three)]);
    tokio::task::yield_now().await;
    two.taken();
    for _ in 0..50 {
        call(&channel, request()).await.expect("an answer");
    }
    assert_eq!((one.taken(), two.taken()), (0, 0), "who left or is draining gets nothing");

    registered.set([]);
    tokio::task::yield_now().await;
    let error = call(&channel, request()).await.expect_err("nobody is there");
    assert_eq!(error.code(), Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn what_no_change_has_told_is_taken_over_when_the_interval_is_over() {
    let registered = Registered::new([at("a", "127.0.0.1:1")]);
    let numbers = Numbers::default();
    let interval = Duration::from_secs(45);
    let options = ChannelOptions { reconcile_interval: interval, ..options() };
    let _channel = metrics::with_local_recorder(&numbers, || registered.channel(options));
    let members = || numbers.gauge("im_registry_channel_members");
    let begun = Instant::now();
    // It has looked once.
    sleep(Duration::from_secs(1)).await;
    for (count, reconciled) in (2..).zip(1..=3) {
        // The view is another one, and nobody is told.
        registered.view.send_if_modified(|view| {
            let instances: Vec<Instance> = (0..count).map(|n| at(&format!("i{n}"), "127.0.0.1:1")).collect();
            let instances = instances.into_iter().map(|instance| (instance.id.clone(), instance)).collect();
            *view = Arc::new(View { revision: view.revision + 1, instances, ..View::default() });
            false
        });
        let before = members();
        sleep(interval * reconciled - Duration::from_secs(1) - begun.elapsed()).await;
        assert_eq!(members(), before, "not before its time");
        sleep(Duration::from_secs(2)).await;
        assert_eq!(members(), f64::from(count));
    }
}

#[tokio::test]
async fn a_dead_instance_is_left_at_once_and_comes_back() {
    let (one, two) = (Fake::start().await, Fake::start().await);
    let registered = Registered::new([of("a", &one), of("b", &two)]);
    let channel = registered.channel(options());
    for _ in 0..20 {
        call(&channel, request()).await.expect("an answer");
    }
    let killed_at = Instant::now();
    let address = one.kill().await;
    let mut longest = Duration::ZERO;
    for _ in 0..200 {
        let started = Instant::now();
        call(&channel, idempotent()).await.expect("the other one answers");
        longest = longest.max(started.elapsed());
    }
    println!("killed: 200 calls succeeded in {:?}, the slowest took {longest:?}", killed_at.elapsed());
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    let back = Fake::start_at(address).await;
    call_until_taken(&channel, &back).await;
}

#[tokio::test]
async fn a_call_that_was_not_sent_goes_elsewhere_whatever_it_does() {
    let (one, two) = (Fake::start().await, Fake::start().await);
    let address = one.kill().await.to_string();
    let registered = Registered::new([at("a", &address), of("b", &two)]);
    let channel = registered.channel(options());
    for _ in 0..50 {
        call(&channel, request()).await.expect("nobody could be reached, so nothing was done twice");
    }
    assert_eq!(two.taken(), 50);
}

/// An attempt that nobody answers, far above what a busy machine needs for a call.
const SLOW: Duration = Duration::from_millis(500);

#[tokio::test]
async fn a_silent_instance_is_routed_around() {
    let (one, two) = (Fake::start().await, Fake::start().await);
    let proxy = Proxy::start(&one.address.to_string()).await;
    let registered = Registered::new([at("a", proxy.url.trim_start_matches("http://")), of("b", &two)]);
    let options = ChannelOptions { attempt: SLOW, ping: SLOW, ..options() };
    let channel = registered.channel(options);
    for _ in 0..20 {
        call(&channel, request()).await.expect("an answer");
    }
    proxy.set(Way::Silent);
    let silent_at = Instant::now();
    let (mut last_slow, mut slow) = (Duration::ZERO, 0);
    while silent_at.elapsed() < Duration::from_secs(3) {
        let started = Instant::now();
        call(&channel, idempotent()).await.expect("the other one answers in time");
        if started.elapsed() >= SLOW {
            (last_slow, slow) = (silent_at.elapsed(), slow + 1);
        }
    }
    println!("silent: {slow} calls were slow, the last one ended {last_slow:?} after the silence began");
    assert!(slow <= 6, "three to eject it and one after each ejection: {slow}");
    assert!(two.taken() > 50, "the others went on meanwhile");
}

#[tokio::test]
async fn what_may_have_arrived_is_repeated_only_if_it_is_idempotent() {
    let (one, two) = (Fake::start().await, Fake::start().await);
    one.unavailable.store(true, Ordering::Relaxed);
    let registered = Registered::new([of("a", &one), of("b", &two)]);
    // Longer than the test takes on any machine.
    let long = Duration::from_secs(600);
    let options =
        ChannelOptions { ejection: Ejection { first: long, longest: long, ..Ejection::default() }, ..options() };
    let channel = registered.channel(options.clone());
    let mut refused = 0;
    for _ in 0..50 {
        match call(&channel, request()).await {
            Ok(()) => {}
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable);
                refused += 1;
            }
        }
    }
    assert_eq!(refused, one.taken(), "each of them was told to its caller");
    assert_eq!(refused, 3, "three in a row, then it is ejected");
    let channel = registered.channel(options);
    for _ in 0..50 {
        call(&channel, idempotent()).await.expect("the other one answers");
    }
    assert_eq!(one.taken(), 3);
}

#[tokio::test]
async fn an_instance_that_says_that_others_are_unavailable_keeps_its_calls() {
    let (one, two) = (Fake::start().await, Fake::start().await);
    for flag in [&one.unavailable, &one.speaks_of_others] {
        flag.store(true, Ordering::Relaxed);
    }
    let registered = Registered::new([of("a", &one), of("b", &two)]);
    let channel = registered.channel(options());
    let mut told = 0;
    for _ in 0..50 {
        if let Err(status) = call(&channel, request()).await {
            assert_eq!(status.code(), Code::Unavailable);
            told += 1;
        }
    }
    assert_eq!(told, one.taken(), "each of them was told to its caller");
    assert!(told > 10, "it goes on being asked: {told}");
    for _ in 0..10 {
        call(&channel, idempotent()).await.expect("the other one answers");
    }
}

#[tokio::test]
async fn retries_stay_within_the_budget() {
    let (one, two) = (Fake::start().await, Fake::start().await);
    for fake in [&one, &two] {
        fake.unavailable.store(true, Ordering::Relaxed);
    }
    let registered = Registered::new([of("a", &one), of("b", &two)]);
    let channel = registered.channel(options());
    for _ in 0..300 {
        let error = call(&channel, idempotent()).await.expect_err("nobody is available");
        assert_eq!(error.code(), Code::Unavailable);
    }
    let taken = one.taken() + two.taken();
    assert!((300..=345).contains(&taken), "300 calls, 30 for a tenth and 10 at once: {taken}");
}

#[tokio::test]
async fn every_call_ends_with_its_deadline_unless_it_is_meant_to_stay() {
    let fake = Fake::start().await;
    let proxy = Proxy::start(&fake.address.to_string()).await;
    let registered = Registered::new([at("a", proxy.url.trim_start_matches("http://"))]);
    let options = ChannelOptions { deadline: Duration::from_millis(400), ping: Duration::from_secs(60), ..options() };
    let channel = registered.channel(options);
    let mut client = HealthClient::new(channel.clone());
    let mut long_lived = request();
    long_lived.extensions_mut().insert(LongLived);
    let mut staying = client.watch(long_lived).await.expect("a stream").into_inner();
    let mut ending = client.watch(request()).await.expect("a stream").into_inner();
    for stream in [&mut staying, &mut ending] {
        stream.message().await.expect("no error").expect("the present state");
    }
    let error = ending.message().await.expect_err("its deadline");
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(timeout(Duration::from_millis(800), staying.message()).await.is_err(), "it stays");

    proxy.set(Way::Silent);
    let started = Instant::now();
    let error = call(&channel, request()).await.expect_err("nobody answers");
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!((400..1_000).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
    let mut hasty = request();
    hasty.set_timeout(Duration::from_millis(50));
    let started = Instant::now();
    call(&channel, hasty).await.expect_err("nobody answers");
    assert!(started.elapsed() < Duration::from_millis(300), "the caller's own deadline counts");
}

#[tokio::test]
async fn an_instance_keeps_its_name_but_not_its_health_at_another_address() {
    let (one, two) = (Fake::start().await, Fake::start().await);
    let dead = one.kill().await.to_string();
    let registered = Registered::new([at("a", &dead)]);
    let channel = registered.channel(options());
    call(&channel, request()).await.expect_err("nobody listens");
    registered.set([of("a", &two)]);
    call_until_taken(&channel, &two).await;
    assert_eq!(registered.view.borrow().instances.keys().next(), Some(&id("a")));
}
