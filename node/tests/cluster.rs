//! A cluster of real processes on real services, under load, while parts of it are killed, stopped and restarted.
//!
//! Needs etcd and a CQL server: `deploy/test.sh` runs it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use im_client::{Client, ClientConfig, Endpoint, Event, FollowAll, PendingSend, Target, Transport, Trust};
use im_proto::body;
use tokio::{
    sync::{Mutex, MutexGuard},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::server::{Server, code, imd, stderr, stdout};

/// For anything that should happen at all. A failover takes a lease and some.
const PATIENCE: Duration = Duration::from_secs(60);
const LEASE: Duration = Duration::from_secs(3);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

fn service(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| {
        panic!("{variable} is not set: run this through deploy/test.sh, or start deploy/local/services")
    })
}

/// Copies of each row: `IM_TEST_CQL_REPLICATION`, or one on each of the nodes, at most three.
fn replication(nodes: &str) -> String {
    std::env::var("IM_TEST_CQL_REPLICATION").unwrap_or_else(|_| nodes.split(',').count().min(3).to_string())
}

/// One cluster at a time: two of them on two cores would measure patience.
pub async fn alone() -> MutexGuard<'static, ()> {
    static ONE: OnceLock<Mutex<()>> = OnceLock::new();
    ONE.get_or_init(Mutex::default).lock().await
}

/// Keys, names and addresses of a cluster; its processes belong to the test.
pub struct Cluster {
    folder: tempfile::TempDir,
    secrets: PathBuf,
    etcd: String,
    /// CQL nodes and keyspace; none: the embedded store.
    cql: Option<(String, String)>,
}

impl Cluster {
    fn on_etcd() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let secrets = folder.path().join("secrets");
        let made = imd(&["secrets", "--out", secrets.to_str().unwrap(), "--shards", "64"]);
        assert_eq!(code(&made), 0, "{}", stderr(&made));
        Self { folder, secrets, etcd: service("IM_TEST_ETCD"), cql: None }
    }

    pub fn on_etcd_and_cql() -> Self {
        Self::on_etcd().with_keyspace()
    }

    /// The same in a keyspace of its own.
    fn with_keyspace(self) -> Self {
        static KEYSPACES: AtomicU32 = AtomicU32::new(0);
        let number = KEYSPACES.fetch_add(1, Ordering::Relaxed);
        let keyspace = format!("im_node_{}_{number}", std::process::id());
        let cluster = Self { cql: Some((service("IM_TEST_CQL"), keyspace)), ..self };
        let applied = cluster.apply();
        assert_eq!(code(&applied), 0, "{}", stderr(&applied));
        cluster
    }

    /// The cluster of an existing directory of secrets.
    pub fn of_secrets(secrets: &Path) -> Self {
        let (folder, etcd) = (tempfile::tempdir().unwrap(), service("IM_TEST_ETCD"));
        Self { folder, secrets: secrets.to_owned(), etcd, cql: None }.with_keyspace()
    }

    fn stored(&self, words: &[&str]) -> Output {
        let (cql, keyspace) = self.cql.clone().unwrap();
        let mut arguments = words.to_vec();
        arguments.extend(["--cql", &cql, "--keyspace", &keyspace]);
        self.tool(&arguments)
    }

    pub fn import(&self, file: &str) {
        let output = self.stored(&["import", "--from", file]);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
    }

    pub fn export(&self, file: &str) -> String {
        let output = self.stored(&["export", "--to", file]);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        stdout(&output)
    }

    pub fn refuse_export(&self, file: &str, says: &str) {
        let output = self.stored(&["export", "--to", file]);
        assert!(code(&output) == 2 && stderr(&output).contains(says), "{}", stderr(&output));
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn etcd(&self) -> &str {
        &self.etcd
    }

    /// The cluster's name in etcd.
    pub fn id(&self) -> String {
        let text = std::fs::read(self.secrets.join("cluster.json")).unwrap();
        let cluster: serde_json::Value = serde_json::from_slice(&text).unwrap();
        cluster["cluster_id"].as_str().unwrap().to_owned()
    }

    pub fn secrets(&self) -> String {
        self.secrets.to_str().unwrap().to_owned()
    }

    pub fn data(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn apply(&self) -> Output {
        let (cql, keyspace) = self.cql.clone().unwrap();
        let secrets = self.secrets();
        let copies = replication(&cql);
        imd(&[
            "schema",
            "apply",
            "--cql",
            &cql,
            "--keyspace",
            &keyspace,
            "--secrets",
            &secrets,
            "--replication",
            &copies,
        ])
    }

    fn common(&self, name: &str) -> Vec<String> {
        let lease = format!("lease_ttl={}s", LEASE.as_secs());
        let (etcd, data, secrets) = (self.etcd.clone(), self.path(name), self.secrets());
        let options =
            ["--etcd", &etcd, "--data", &data, "--secrets", &secrets, "--http", "127.0.0.1:0", "--set", &lease];
        options.map(str::to_owned).to_vec()
    }

    fn router_arguments(&self, name: &str) -> Vec<String> {
        let mut arguments = vec!["router".to_owned()];
        arguments.extend(self.common(name));
        arguments.extend(["--link", "127.0.0.1:0", "--api", "127.0.0.1:0"].map(str::to_owned));
        if let Some((nodes, keyspace)) = &self.cql {
            arguments.extend(["--cql", nodes, "--keyspace", keyspace].map(str::to_owned));
        }
        arguments
    }

    fn run(&self, name: &str, arguments: Vec<String>) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_imd"));
        command.args(arguments);
        Server::run(&self.data(name), command)
    }

    pub fn router(&self, name: &str) -> Server {
        self.run(name, self.router_arguments(name))
    }

    pub fn gateway(&self, name: &str) -> Server {
        let mut arguments = vec!["gateway".to_owned()];
        arguments.extend(self.common(name));
        arguments.extend(["--tcp", "127.0.0.1:0", "--tls", "off", "--quic", "off"].map(str::to_owned));
        self.run(name, arguments)
    }

    fn tool(&self, words: &[&str]) -> Output {
        let secrets = self.secrets();
        let mut arguments = words.to_vec();
        arguments.extend(["--etcd", &self.etcd, "--secrets", &secrets]);
        imd(&arguments)
    }

    fn status(&self) -> serde_json::Value {
        let output = self.tool(&["cluster", "status", "--json"]);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub fn token(&self, user: &str) -> String {
        let key = self.secrets.join("keys/signing.pk8");
        let output = imd(&["token", "--user", user, "--expires", "1h", "--key", key.to_str().unwrap()]);
        stdout(&output).trim().to_owned()
    }

    /// A client that tries the gateways in that order.
    pub async fn client(&self, user: &str, gateways: &[&Server]) -> Client {
        let endpoints: Vec<Endpoint> =
            gateways.iter().map(|gateway| Endpoint::new(Transport::Tcp, gateway.address("tcp")).unwrap()).collect();
        let mut config = ClientConfig::new(endpoints, self.token(user), &Trust::SystemRoots).unwrap();
        config.follow_all = FollowAll::FromStart;
        config.ready_timeout = PATIENCE;
        config.call_timeout = PATIENCE;
        Client::connect(config).await.unwrap()
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(LOOK_INTERVAL).await;
    }
}

/// Ends a process as an operator does, and starts it again.
async fn restart(server: &mut Server, again: impl FnOnce() -> Server) {
    server.signal("TERM");
    until("a clean stop", || server.child.try_wait().unwrap().is_some()).await;
    assert_eq!(server.child.wait().unwrap().code(), Some(0), "{}", server.said());
    assert!(!server.data.join("ready.json").exists());
    *server = again();
}

/// One user who says numbers to another without pause, until told to stop.
struct Talk {
    speaker: Client,
    listener: Client,
    stop: Arc<AtomicBool>,
    /// What was acknowledged at which seq.
    speaking: JoinSet<BTreeMap<u64, String>>,
    hearing: JoinSet<Vec<(u64, String)>>,
    name: String,
}

const LAST_WORD: &str = "the last word";
/// Sends in flight.
const WINDOW: usize = 16;
/// Some hundred messages a second from all talks: the faults are of interest, not the load.
const SEND_PAUSE: Duration = Duration::from_millis(10);

impl Talk {
    async fn start(cluster: &Cluster, number: usize, first: &Server, second: &Server) -> Self {
        let (from, to) = (format!("speaker{number}"), format!("listener{number}"));
        let speaker = cluster.client(&from, &[first, second]).await;
        let listener = cluster.client(&to, &[second, first]).await;
        let stop = Arc::new(AtomicBool::new(false));
        let events = listener.events().unwrap();
        let (mut speaking, mut hearing) = (JoinSet::new(), JoinSet::new());
        speaking.spawn(speak(speaker.clone(), Target::peer(&to).unwrap(), stop.clone()));
        hearing.spawn(hear(events, from));
        Self { speaker, listener, stop, speaking, hearing, name: to }
    }

    /// Every acknowledged message is in the history once, at its seq, in the order in which it was said; the listener saw exactly the
    /// history, each seq once and in order. Returns how many messages there are.
    async fn judge(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let acknowledged = timeout(PATIENCE, self.speaking.join_next()).await.expect("all sends are answered");
        let acknowledged = acknowledged.unwrap().unwrap();
        let heard =
            timeout(PATIENCE, self.hearing.join_next()).await.expect("the last word is heard").unwrap().unwrap();
        let target = Target::peer(&self.name).unwrap();
        let mut history: Vec<(u64, String)> = Vec::new();
        loop {
            let from = history.len() as u64 + 1;
            let page = self.speaker.history(target.clone(), from, 0, 1000, false).await.unwrap();
            history.extend(page.entries.iter().map(|entry| (entry.seq, text_of(&entry.body))));
            if history.len() as u64 >= page.head {
                break;
            }
        }
        let seqs: Vec<u64> = history.iter().map(|(seq, _)| *seq).collect();
        assert_eq!(seqs, (1..=history.len() as u64).collect::<Vec<_>>(), "no hole");
        let mut numbers: Vec<u64> = history.iter().filter_map(|(_, text)| text.parse().ok()).collect();
        assert_eq!(numbers.len() + 1, history.len(), "the last word and numbers");
        assert!(numbers.is_sorted(), "in the order in which they were said");
        numbers.dedup();
        assert_eq!(numbers.len() + 1, history.len(), "each once");
        for (seq, said) in &acknowledged {
            assert_eq!(history.get(*seq as usize - 1), Some(&(*seq, said.clone())), "acknowledged at that seq");
        }
        assert_eq!(acknowledged.len(), history.len(), "everything was acknowledged in the end");
        assert_eq!(heard, history, "the listener saw the history");
        self.listener.close().await;
        self.speaker.close().await;
        history.len()
    }
}

async fn speak(speaker: Client, target: Target, stop: Arc<AtomicBool>) -> BTreeMap<u64, String> {
    let mut acknowledged = BTreeMap::new();
    let mut pending: Vec<(String, PendingSend)> = Vec::new();
    for number in 1_u64.. {
        let said = if stop.load(Ordering::Relaxed) { LAST_WORD.to_owned() } else { number.to_string() };
        let sent = speaker.enqueue(target.clone(), body::text(&said)).await.unwrap();
        pending.push((said.clone(), sent));
        if said == LAST_WORD {
            break;
        }
        while pending.len() >= WINDOW {
            let (said, sent) = pending.remove(0);
            acknowledged.insert(sent.await.unwrap().seq, said);
        }
        sleep(SEND_PAUSE).await;
    }
    for (said, sent) in pending {
        acknowledged.insert(sent.await.unwrap().seq, said);
    }
    acknowledged
}

async fn hear(mut events: tokio::sync::mpsc::Receiver<Event>, from: String) -> Vec<(u64, String)> {
    let mut heard = Vec::new();
    while let Some(event) = events.recv().await {
        if let Event::Message(entry) = event
            && entry.sender.as_ref().is_some_and(|sender| sender.as_str() == from)
        {
            let text = text_of(&entry.body);
            let is_last = text == LAST_WORD;
            heard.push((entry.seq, text));
            if is_last {
                break;
            }
        }
    }
    heard
}

pub fn text_of(body: &bytes::Bytes) -> String {
    let decoded = <im_proto::v1::Body as prost::Message>::decode(body.clone()).unwrap();
    match decoded.content {
        Some(im_proto::v1::body::Content::Text(text)) => text.text,
        other => panic!("{other:?}"),
    }
}

/// Two routers, two gateways, four talks across them.
struct Running {
    cluster: Cluster,
    routers: [Server; 2],
    gateways: [Server; 2],
    talks: Vec<Talk>,
}

impl Running {
    async fn start() -> Self {
        let cluster = Cluster::on_etcd_and_cql();
        let routers = [cluster.router("router1"), cluster.router("router2")];
        let gateways = [cluster.gateway("gateway1"), cluster.gateway("gateway2")];
        let mut talks = Vec::new();
        for number in 0..4 {
            talks.push(Talk::start(&cluster, number, &gateways[number % 2], &gateways[(number + 1) % 2]).await);
        }
        let running = Self { cluster, routers, gateways, talks };
        running.until_shared(2).await;
        running.more_is_said().await;
        running
    }

    /// So many routers own all shards, and none has nothing.
    async fn until_shared(&self, routers: usize) {
        until("routers share the shards", || {
            let status = self.cluster.status();
            let shares: Vec<u64> =
                status["routers"].as_array().unwrap().iter().map(|router| router["shards"].as_u64().unwrap()).collect();
            shares.len() == routers && shares.iter().all(|share| *share > 0) && shares.iter().sum::<u64>() == 64
        })
        .await;
    }

    /// The load goes on: another hundred messages are committed.
    async fn more_is_said(&self) {
        let head = async |talk: &Talk| {
            let target = Target::peer(&talk.name).unwrap();
            talk.speaker.history(target, 1, 1, 1, false).await.unwrap().head
        };
        for talk in &self.talks {
            let before = head(talk).await;
            let deadline = Instant::now() + PATIENCE;
            while head(talk).await < before + 25 {
                assert!(Instant::now() < deadline, "nothing is said any more");
                sleep(LOOK_INTERVAL).await;
            }
        }
    }

    async fn judge(self) {
        for talk in self.talks {
            assert!(talk.judge().await > 25);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs etcd and CQL: run through deploy/test.sh"]
async fn a_killed_router_and_a_killed_gateway_lose_nothing() {
    let _alone = alone().await;
    let mut running = Running::start().await;
    running.routers[0].child.kill().unwrap();
    running.routers[0].child.wait().unwrap();
    running.until_shared(1).await;
    running.more_is_said().await;
    running.gateways[0].child.kill().unwrap();
    running.gateways[0].child.wait().unwrap();
    running.more_is_said().await;
    running.routers[0] = running.cluster.router("router1");
    running.until_shared(2).await;
    running.more_is_said().await;
    running.judge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs etcd and CQL: run through deploy/test.sh"]
async fn a_rolling_restart_of_everything_loses_nothing() {
    let _alone = alone().await;
    let mut running = Running::start().await;
    for index in 0..2 {
        let name = format!("router{}", index + 1);
        restart(&mut running.routers[index], || running.cluster.router(&name)).await;
        running.until_shared(2).await;
        running.more_is_said().await;
    }
    // On the addresses that clients know.
    for index in 0..2 {
        let address = running.gateways[index].address("tcp");
        let name = format!("gateway{}", index + 1);
        let again = || {
            let mut arguments = vec!["gateway".to_owned()];
            arguments.extend(running.cluster.common(&name));
            arguments.extend(["--tcp", &address, "--tls", "off", "--quic", "off"].map(str::to_owned));
            running.cluster.run(&name, arguments)
        };
        restart(&mut running.gateways[index], again).await;
        running.more_is_said().await;
    }
    running.judge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs etcd and CQL: run through deploy/test.sh"]
async fn a_router_that_stood_still_longer_than_its_lease_gets_nothing_in_and_starts_again() {
    let _alone = alone().await;
    let mut running = Running::start().await;
    for _ in 0..2 {
        let instance = running.routers[0].ready()["instance"].clone();
        running.routers[0].signal("STOP");
        running.until_shared(1).await;
        running.more_is_said().await;
        running.routers[0].signal("CONT");
        let router = &running.routers[0];
        until("another instance id", || {
            let now = router.ready()["instance"].clone();
            now.is_string() && now != instance
        })
        .await;
        running.until_shared(2).await;
        running.more_is_said().await;
        assert!(running.routers[0].child.try_wait().unwrap().is_none(), "it is the same process");
        running.routers.swap(0, 1);
    }
    running.judge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs etcd and CQL: run through deploy/test.sh"]
async fn a_process_that_is_configured_otherwise_is_refused_with_one_line() {
    let _alone = alone().await;
    let cluster = Cluster::on_etcd_and_cql();
    let refused = |cluster: &Cluster, says: &str| {
        let arguments = cluster.router_arguments("refused");
        let output = imd(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let said = stderr(&output);
        assert_eq!(code(&output), 2, "{said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.starts_with("imd: ") && last.contains(says), "{says:?} is not in {last:?}");
    };
    let other = Cluster { cql: cluster.cql.clone(), ..Cluster::on_etcd() };
    refused(&other, "belongs to the cluster");
    assert_eq!(code(&other.apply()), 2, "a store is founded once");

    // The same cluster, counted otherwise.
    let json = cluster.secrets.join("cluster.json");
    let text = std::fs::read_to_string(&json).unwrap();
    std::fs::write(&json, text.replace("64", "65")).unwrap();
    refused(&cluster, "64 shards");
    std::fs::write(&json, text).unwrap();

    // A store without tables.
    let (nodes, _) = cluster.cql.clone().unwrap();
    let bare = Cluster { cql: Some((nodes, "im_node_nothing".to_owned())), ..Cluster::on_etcd() };
    refused(&bare, "imd schema apply");

    // Another store beside that of the cluster.
    let router = cluster.router("router1");
    let beside = Cluster { cql: None, ..cluster };
    refused(&beside, "all routers of a cluster share one");
    drop(router);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn one_router_on_the_embedded_store_serves_several_gateways() {
    let _alone = alone().await;
    let cluster = Cluster::on_etcd();
    let mut router = cluster.router("router1");
    let gateways = [cluster.gateway("gateway1"), cluster.gateway("gateway2")];
    let talk = Talk::start(&cluster, 0, &gateways[0], &gateways[1]).await;
    sleep(LEASE / 3).await;

    let arguments = cluster.router_arguments("router2");
    let second = imd(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(code(&second), 2);
    assert!(stderr(&second).contains("the embedded store admits one"), "{}", stderr(&second));

    router.child.kill().unwrap();
    router.child.wait().unwrap();
    // The lease of the killed one has to run out first.
    let deadline = Instant::now() + PATIENCE;
    let again = loop {
        let mut command = Command::new(env!("CARGO_BIN_EXE_imd"));
        command.args(cluster.router_arguments("router1"));
        match Server::try_run(&cluster.data("router1"), command) {
            Ok(server) => break server,
            Err(said) => assert!(said.contains("the embedded store admits one") && Instant::now() < deadline, "{said}"),
        }
        sleep(LEASE / 10).await;
    };
    assert!(talk.judge().await > 1);
    drop(again);
}

/// Each says that it leaves before it goes, so that nobody takes it for a trouble of etcd, the last one not even itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_cluster_that_is_stopped_one_by_one_raises_no_alarm() {
    let _alone = alone().await;
    let cluster = Cluster::on_etcd();
    let router = cluster.router("router1");
    let gateways = ["gateway1", "gateway2", "gateway3"].map(|name| cluster.gateway(name));
    for mut server in gateways.into_iter().chain([router]) {
        server.signal("TERM");
        assert_eq!(server.child.wait().unwrap().code(), Some(0));
        assert!(!server.said().contains("ERROR"), "{}", server.said());
    }
}
