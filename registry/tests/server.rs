//! An etcd of the test's own, to be killed, restarted, emptied and restored.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;
use tokio::time::{Instant, sleep};

const PATIENCE: Duration = Duration::from_secs(30);

struct Member {
    name: String,
    client_port: u16,
    peer_port: u16,
    process: Option<Child>,
}

/// One or several members on ports of their own.
pub struct Etcd {
    folder: TempDir,
    members: Vec<Member>,
    scheme: &'static str,
    arguments: Vec<String>,
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").port()
}

impl Etcd {
    pub async fn start(count: usize) -> Self {
        Self::start_with(count, "http", |_| Vec::new()).await
    }

    /// `arguments` are made from the folder of the members.
    pub async fn start_with(count: usize, scheme: &'static str, arguments: impl Fn(&Path) -> Vec<String>) -> Self {
        let folder = tempfile::Builder::new().prefix("registry-etcd-").tempdir().expect("a folder");
        let member = |number: usize| Member {
            name: format!("m{number}"),
            client_port: free_port(),
            peer_port: free_port(),
            process: None,
        };
        let members = (0..count).map(member).collect();
        let arguments = arguments(folder.path());
        let mut etcd = Self { folder, members, scheme, arguments };
        for index in 0..count {
            etcd.spawn(index);
        }
        etcd.ready().await;
        etcd
    }

    pub fn url(&self, index: usize) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.members[index].client_port)
    }

    pub fn urls(&self) -> Vec<String> {
        (0..self.members.len()).map(|index| self.url(index)).collect()
    }

    fn data(&self, index: usize) -> PathBuf {
        self.folder.path().join(&self.members[index].name)
    }

    fn initial_cluster(&self) -> String {
        let members = self.members.iter();
        let members: Vec<String> =
            members.map(|member| format!("{}=http://127.0.0.1:{}", member.name, member.peer_port)).collect();
        members.join(",")
    }

    fn spawn(&mut self, index: usize) {
        let log = std::fs::File::options().create(true).append(true).open(self.data(index).with_extension("log"));
        let member = &self.members[index];
        let (client, peer) = (self.url(index), format!("http://127.0.0.1:{}", member.peer_port));
        let process = Command::new("etcd")
            .arg("--name")
            .arg(&member.name)
            .arg("--data-dir")
            .arg(self.data(index))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.initial_cluster(), "--log-level", "warn"])
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(log.expect("a log"))
            .spawn()
            .expect("etcd is installed (Debian: etcd-server)");
        self.members[index].process = Some(process);
    }

    /// Waits until a client port accepts. Whether there is a leader is for the callers to find out.
    async fn ready(&self) {
        let until = Instant::now() + PATIENCE;
        for member in self.members.iter().filter(|member| member.process.is_some()) {
            while tokio::net::TcpStream::connect(("127.0.0.1", member.client_port)).await.is_err() {
                assert!(Instant::now() < until, "etcd does not start; its log is in {:?}", self.folder.path());
                sleep(Duration::from_millis(50)).await;
            }
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self, index: usize) {
        if let Some(mut process) = self.members[index].process.take() {
            process.kill().expect("it runs");
            process.wait().expect("it ends");
        }
    }

    /// Starts a killed member on the data that it left.
    pub async fn restart(&mut self, index: usize) {
        self.spawn(index);
        self.ready().await;
    }

    /// Starts a killed member without data.
    pub async fn restart_empty(&mut self, index: usize) {
        std::fs::remove_dir_all(self.data(index)).expect("it had data");
        self.restart(index).await;
    }

    fn etcdctl(&self, arguments: &[&str]) {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.url(0)])
            .args(arguments)
            .output()
            .expect("etcdctl is installed (Debian: etcd-client)");
        assert!(output.status.success(), "etcdctl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Saves what the only member holds.
    pub fn save(&self, name: &str) {
        let file = self.folder.path().join(name);
        self.etcdctl(&["snapshot", "save", &file.to_string_lossy()]);
    }

    /// Kills the only member and starts it from what was saved, as a cluster with this token.
    pub async fn restore(&mut self, name: &str, token: &str) {
        self.kill(0);
        std::fs::remove_dir_all(self.data(0)).expect("it had data");
        let file = self.folder.path().join(name);
        let peer = format!("http://127.0.0.1:{}", self.members[0].peer_port);
        let (file, data) = (file.to_string_lossy().into_owned(), self.data(0).to_string_lossy().into_owned());
        self.etcdctl(&[
            "snapshot",
            "restore",
            &file,
            "--name",
            &self.members[0].name,
            "--data-dir",
            &data,
            "--initial-cluster",
            &self.initial_cluster(),
            "--initial-advertise-peer-urls",
            &peer,
            "--initial-cluster-token",
            token,
        ]);
        self.restart(0).await;
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for index in 0..self.members.len() {
            self.kill(index);
        }
    }
}
