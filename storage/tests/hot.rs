//! Hot state: the suite on every backend, and on a Redis that is killed, flushed, frozen and restarted all the time.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use im_proto::{
    Timestamp,
    environment::{Clock, Environment},
};
use im_storage::{Hot, MemoryHot, RedisHot, RedisOptions, StoreError, conformance::hot};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

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
