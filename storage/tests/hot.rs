//! Hot state: the suite on every backend, and on a Redis that is killed, flushed, frozen and restarted all the time.

use std::{
    io::{BufRead, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use im_proto::{
    ConversationId, Timestamp,
    environment::{Clock, Environment},
};
use im_storage::{
    Hot, HotHead, HotState as _, MemoryHot, RedisHot, RedisOptions, StoreError, conformance::hot, hot::Charge,
    hot::Limit,
};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

use crate::counters::Counters;

/// A clock that goes.
struct RunningClock(Instant);

impl Clock for RunningClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1_700_000_000_000).saturating_add(self.0.elapsed())
    }

    fn since_boot(&self) -> Duration {
        self.0.elapsed()
    }
}

fn environment() -> Environment {
    Environment { clock: Arc::new(RunningClock(Instant::now())), ..crate::environment() }
}

#[tokio::test]
async fn hot_state_in_memory_conforms() {
    let memory = Hot::from(MemoryHot::new(&environment()));
    hot::all(&memory, 1).await;
    let begun = Instant::now();
    let share = hot::sound(&memory, 2, || begun.elapsed() > Duration::from_millis(100)).await;
    assert!(share > 0.999, "memory always answers");
}

#[tokio::test]
async fn without_a_redis_nothing_is_known_and_nobody_waits() {
    // A port that nobody listens on.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    let options = RedisOptions { url: format!("redis://127.0.0.1:{port}"), ..RedisOptions::default() };
    let redis = Hot::from(RedisHot::start(options, &environment()).expect("starts without a Redis"));
    let begun = Instant::now();
    let share = hot::sound(&redis, 1, || begun.elapsed() > Duration::from_millis(300)).await;
    assert!(share == 0.0, "{share}");
    for url in ["", "http://127.0.0.1", "127.0.0.1:6379"] {
        let options = RedisOptions { url: url.into(), ..RedisOptions::default() };
        assert!(matches!(RedisHot::start(options, &environment()), Err(StoreError::Open(_))), "{url}");
    }
}

/// What a server says to a `GET` of the conversation of zeros, to any other, and to a script.
type Script = [&'static str; 3];

const NOTHING: &str = "$-1\r\n";
/// A hint of version 7.
const SEVEN: &str = "$24\r\n00000000000000000007 3 0\r\n";
const COUNTED: &str = "*2\r\n:1\r\n:0\r\n";
const READ_ONLY: &str = "-READONLY You can't write against a read only replica. script: f, on @user_script:1.\r\n";
const NO_PERMISSION: &str = "-NOPERM User default has no permissions to run the 'get' command\r\n";
const WRONG_TYPE: &str = "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n";

/// Speaks as much of the protocol as a test needs, and says what the test wants to hear.
#[derive(Clone)]
struct Puppet {
    script: Arc<Mutex<Script>>,
    connections: Arc<AtomicU32>,
    url: String,
}

impl Puppet {
    fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("redis://{}", listener.local_addr().expect("an address"));
        let puppet = Self { script: Arc::new(Mutex::new(script)), connections: Arc::default(), url };
        let this = puppet.clone();
        // Ends with the process: it holds nothing that a test waits for.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                this.connections.fetch_add(1, Ordering::SeqCst);
                let this = this.clone();
                thread::spawn(move || this.serve(&stream));
            }
        });
        puppet
    }

    /// Until the client goes away.
    fn serve(&self, mut stream: &TcpStream) {
        let mut reader = BufReader::new(stream);
        while let Some(words) = command(&mut reader) {
            let script = *self.script.lock();
            let answer = match words[0].as_str() {
                "GET" if words[1].contains(&"0".repeat(32)) => script[0],
                "GET" => script[1],
                "EVAL" => script[2],
                _ => "+OK\r\n",
            };
            if stream.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    }

    fn connections(&self) -> u32 {
        self.connections.load(Ordering::SeqCst)
    }

    fn client(&self, counters: &Counters) -> Hot {
        // No answer of these is a late one, however busy the machine is.
        let patience = Duration::from_secs(20);
        let options = RedisOptions {
            url: self.url.clone(),
            patience,
            response_timeout: patience,
            connect_timeout: patience,
            ..RedisOptions::default()
        };
        metrics::with_local_recorder(counters, || {
            Hot::from(RedisHot::start(options, &environment()).expect("an address"))
        })
    }
}

/// The words of one command: an array of texts.
fn command(reader: &mut impl BufRead) -> Option<Vec<String>> {
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|bytes| *bytes > 0).map(|_| line.trim_end().to_owned())
    };
    let words: usize = line()?.strip_prefix('*')?.parse().ok()?;
    // Each has its length before it; none holds a line's end.
    (0..words).map(|_| line().and_then(|_| line())).collect()
}

const ZEROS: ConversationId = ConversationId::from_bytes([0; 16]);
const ONES: ConversationId = ConversationId::from_bytes([0x11; 16]);

/// Repeats a step until it says that it is enough.
async fn until(what: &str, mut step: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !step().await {
        assert!(begun.elapsed() < Duration::from_secs(30), "never: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_server_that_became_a_replica_is_left_and_tried_again_with_growing_pauses() {
    let server = Puppet::start([NOTHING, NOTHING, READ_ONLY]);
    let counters = Counters::default();
    let redis = server.client(&counters);
    let seven = HotHead { seq: 7, counted: 3 };
    let begun = Instant::now();
    until("five connections", async || {
        redis.raise_heads([(ZEROS, seven)]);
        server.connections() >= 5
    })
    .await;
    // 50, 100, 200 and 400 ms lie between them, however fast the machine is.
    assert!(begun.elapsed() >= Duration::from_millis(750), "{:?}", begun.elapsed());
    let refused = counters.get("im_storage_redis_errors_total/read_only");
    assert!(refused >= 4, "{refused} of the writes were counted as refused");
    // The address leads to a server that takes writes again.
    *server.script.lock() = [SEVEN, NOTHING, COUNTED];
    until("an answer", async || redis.heads(&[ZEROS]).await == [Some(seven)]).await;
    let (connections, refused) = (server.connections(), counters.get("im_storage_redis_errors_total/read_only"));
    for _ in 0..20 {
        redis.raise_heads([(ZEROS, seven)]);
        assert_eq!(redis.heads(&[ZEROS]).await, [Some(seven)]);
    }
    assert_eq!(server.connections(), connections, "this one is kept");
    assert_eq!(counters.get("im_storage_redis_errors_total/read_only"), refused);
}

#[tokio::test]
async fn a_read_that_is_refused_is_unknown_and_not_absent() {
    let server = Puppet::start([SEVEN, NOTHING, COUNTED]);
    let counters = Counters::default();
    let redis = server.client(&counters);
    let unknown = || counters.get("im_storage_redis_unknown_total");
    until("a connection", async || redis.heads(&[ZEROS]).await[0].is_some()).await;
    let before = unknown();
    assert_eq!(redis.heads(&[ONES]).await, [None]);
    assert_eq!(unknown(), before, "Redis says that there is none");

    *server.script.lock() = [NO_PERMISSION; 3];
    assert_eq!(redis.heads(&[ZEROS, ONES]).await, [None, None]);
    assert_eq!(unknown(), before + 1, "nothing is known of them");
    let limit = Limit { amount: 1, window: Duration::from_secs(60) };
    assert_eq!(redis.charge("somebody", 1, limit).await, Charge::Unknown);
    assert_eq!(unknown(), before + 2);
    assert_eq!(counters.get("im_storage_redis_errors_total/no_permission"), 3);

    // One key that somebody else has written leaves the others their answers.
    *server.script.lock() = [SEVEN, WRONG_TYPE, COUNTED];
    assert_eq!(redis.heads(&[ONES, ZEROS]).await, [None, Some(HotHead { seq: 7, counted: 3 })]);
    assert_eq!(counters.get("im_storage_redis_errors_total/wrong_type"), 1);
    assert_eq!(server.connections(), 1, "another connection would not help");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Redis: run through deploy/test.sh"]
async fn redis_conforms() {
    let url =
        std::env::var("IM_TEST_REDIS").expect("IM_TEST_REDIS is the address of a Redis: run through deploy/test.sh");
    let prefix = format!("test-{}", std::process::id());
    let options = RedisOptions { url, prefix, patience: Duration::from_secs(1), ..RedisOptions::default() };
    let redis = Hot::from(RedisHot::start(options, &environment()).expect("an address"));
    hot::recovered(&redis, 1, Duration::from_secs(10)).await;
    hot::all(&redis, 2).await;
}

/// A Redis of this test's own.
struct Server {
    port: u16,
    directory: tempfile::TempDir,
    process: Child,
}

impl Server {
    fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
        let directory = tempfile::tempdir().expect("a directory");
        let process = Self::spawn(port, directory.path());
        Self { port, directory, process }
    }

    fn spawn(port: u16, directory: &Path) -> Child {
        Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"])
            .arg(directory)
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed: run through deploy/test.sh")
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    fn restart(&mut self) {
        self.end();
        self.process = Self::spawn(self.port, self.directory.path());
    }

    fn signal(&self, signal: Signal) {
        // A child that was not waited for: the pid is its own.
        kill_process(Pid::from_child(&self.process), signal).expect("sent");
    }

    fn end(&mut self) {
        self.process.kill().expect("killed");
        self.process.wait().expect("ended");
    }

    async fn command(&self, words: &[&str]) {
        let Ok(client) = redis::Client::open(self.url()) else { return };
        // It may be down, or frozen.
        let connection = client.get_multiplexed_async_connection();
        if let Ok(Ok(mut connection)) = tokio::time::timeout(Duration::from_millis(200), connection).await {
            let mut command = redis::cmd(words[0]);
            words[1..].iter().for_each(|word| {
                command.arg(*word);
            });
            let _ = command.query_async::<()>(&mut connection).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Redis: run through deploy/test.sh"]
async fn whatever_happens_to_redis_no_answer_is_wrong_or_late() {
    let mut server = Server::start();
    let options = RedisOptions { url: server.url(), ..RedisOptions::default() };
    let redis = Hot::from(RedisHot::start(options, &environment()).expect("an address"));
    hot::recovered(&redis, 1, Duration::from_secs(10)).await;
    let ended = Arc::new(AtomicBool::new(false));
    let users: Vec<_> = (10..14)
        .map(|run| {
            let (redis, ended) = (redis.clone(), ended.clone());
            tokio::task::spawn_blocking(move || {
                let runtime = tokio::runtime::Handle::current();
                runtime.block_on(hot::sound(&redis, run, || ended.load(Ordering::Relaxed)))
            })
        })
        .collect();
    let mut chance = 0x9e37_79b9_u32;
    for _ in 0..30 {
        // Xorshift: the same order of misfortunes in every run.
        chance ^= chance << 13;
        chance ^= chance >> 17;
        chance ^= chance << 5;
        match chance % 5 {
            0 => server.restart(),
            1 => server.command(&["FLUSHALL"]).await,
            2 => {
                server.signal(Signal::STOP);
                sleep(Duration::from_millis(u64::from(chance % 900))).await;
                server.signal(Signal::CONT);
            }
            3 => server.command(&["CLIENT", "KILL", "TYPE", "normal"]).await,
            // No room for anything new.
            _ => {
                server.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
                sleep(Duration::from_millis(50)).await;
                server.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
            }
        }
        sleep(Duration::from_millis(u64::from(chance % 300))).await;
    }
    server.restart();
    hot::recovered(&redis, 2, Duration::from_secs(20)).await;
    ended.store(true, Ordering::Relaxed);
    for user in users {
        let share = user.await.expect("every answer was right and in time");
        assert!(share > 0.05, "there were answers in between: {share}");
    }
    hot::all(&redis, 3).await;
}
