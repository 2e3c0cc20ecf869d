//! Other servers under the same traffic: what this machine reaches with programs that people already use.
//!
//! Each is Debian's, started here with a configuration of its own in a temporary directory, driven by the same crowd as the bare
//! router through a minimal codec of its protocol, and ended by its process id. A peer is a denominator, so it gets the settings
//! that suit it: no authentication, no encryption, no limits of queues, nothing logged.

mod mosquitto;
mod nats;
mod redis_stream;

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde::Serialize;
use tokio::{
    process::{Child, Command},
    time::Instant,
};

use crate::{
    bench::{self, Wire},
    ceiling::{Ceiling, Measurement},
    usage::usage,
};

/// How long a peer may take until it accepts connections.
const READY_WITHIN: Duration = Duration::from_secs(20);
const READY_POLL: Duration = Duration::from_millis(20);

/// A server that is no chat server of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// Redis: XADD with appendfsync always, delivered by XREAD BLOCK. On disk before it is acknowledged.
    RedisStream,
    /// NATS core: PUB with +OK. Nothing is stored.
    Nats,
    /// mosquitto: MQTT 3.1.1, QoS 1. Nothing is stored.
    Mosquitto,
}

/// What a peer reached, and which one it was.
#[derive(Clone, Debug, Serialize)]
pub struct PeerFigures {
    pub name: String,
    /// As the program says it.
    pub version: String,
    pub on_disk_before_ack: bool,
    #[serde(flatten)]
    pub reached: Ceiling,
}

/// A peer's process. It is killed when this is dropped.
struct Running {
    child: Child,
    address: String,
    _directory: tempfile::TempDir,
}

impl Peer {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Peer::RedisStream => "redis-stream",
            Peer::Nats => "nats",
            Peer::Mosquitto => "mosquitto",
        }
    }

    /// The program, which is also the name of its Debian package.
    fn program(self) -> &'static str {
        match self {
            Peer::RedisStream => "redis-server",
            Peer::Nats => "nats-server",
            Peer::Mosquitto => "mosquitto",
        }
    }

    fn find(self) -> anyhow::Result<PathBuf> {
        let program = self.program();
        let path = std::env::var_os("PATH").unwrap_or_default();
        // Debian puts servers where a user's PATH does not look.
        let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
        folders.map(|folder| folder.join(program)).find(|path| path.is_file()).ok_or_else(|| {
            let name = self.name();
            usage(format!("peer {name} needs {program}: apt-get install -y --no-install-recommends {program}"))
        })
    }

    /// Whether its program is there, before anything is measured.
    pub fn check(self) -> anyhow::Result<()> {
        self.find().map(|_| ())
    }

    fn wire(self, measurement: &Measurement) -> Box<dyn Wire> {
        let body = measurement.body_bytes;
        match self {
            Peer::RedisStream => Box::new(redis_stream::RedisStream::new(body)),
            Peer::Nats => Box::new(nats::Nats::new(body)),
            Peer::Mosquitto => Box::new(mosquitto::Mosquitto::new(body)),
        }
    }

    fn command(self, program: &Path, directory: &Path, port: u16) -> anyhow::Result<Command> {
        let mut command = Command::new(program);
        match self {
            Peer::RedisStream => {
                command.args(["--bind", "127.0.0.1", "--port", &port.to_string()]);
                command.arg("--dir").arg(directory);
                command.args(["--appendonly", "yes", "--appendfsync", "always"]);
                // Rewriting the log meanwhile would only slow it down.
                command.args(["--auto-aof-rewrite-percentage", "0", "--save", "", "--loglevel", "warning"]);
            }
            Peer::Nats => _ = command.args(["-a", "127.0.0.1", "-p", &port.to_string()]),
            Peer::Mosquitto => {
                let file = directory.join("mosquitto.conf");
                let lines = [
                    &format!("listener {port} 127.0.0.1"),
                    "allow_anonymous true",
                    "persistence false",
                    "set_tcp_nodelay true",
                    "max_inflight_messages 0",
                    "max_queued_messages 0",
                    "log_type error",
                ];
                std::fs::write(&file, lines.join("\n") + "\n")?;
                command.arg("-c").arg(file);
            }
        }
        Ok(command)
    }

    async fn start(self, parent: &Path) -> anyhow::Result<Running> {
        let program = self.find()?;
        let directory = tempfile::Builder::new().prefix("loadtest-peer-").tempdir_in(parent)?;
        // mosquitto gives its privileges up when it has some, and must still read its configuration.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(directory.path(), open)?;
        let port = free_port()?;
        let log = std::fs::File::create(directory.path().join("log"))?;
        let mut command = self.command(&program, directory.path(), port)?;
        command.current_dir(directory.path()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.kill_on_drop(true).spawn().with_context(|| format!("start {}", program.display()))?;
        let mut running = Running { child, address: format!("127.0.0.1:{port}"), _directory: directory };
        running.ready(self.program(), SocketAddr::from(([127, 0, 0, 1], port))).await?;
        Ok(running)
    }

    /// What the program says of its version.
    fn version(self) -> String {
        let argument = if self == Peer::Mosquitto { "-h" } else { "--version" };
        let Ok(program) = self.find() else { return String::new() };
        let output = std::process::Command::new(program).arg(argument).stdin(Stdio::null()).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        text.lines().next().unwrap_or_default().trim().to_owned()
    }

    /// Starts the peer in a directory of its own below `parent`, drives it, and ends it.
    pub async fn measure(self, measurement: &Measurement, parent: &Path) -> anyhow::Result<PeerFigures> {
        let mut running = self.start(parent).await?;
        let (address, pid) = (running.address.clone(), Vec::from_iter(running.child.id()));
        let (driven, wire) = (measurement.clone(), self.wire(measurement));
        let driving = tokio::task::spawn_blocking(move || bench::drive(&driven, wire, &address, &pid));
        let reached = driving.await.context("the generator failed")?;
        running.child.kill().await.ok();
        Ok(PeerFigures {
            name: self.name().to_owned(),
            version: self.version(),
            on_disk_before_ack: self == Peer::RedisStream,
            reached: reached.with_context(|| format!("measure peer {}", self.name()))?,
        })
    }
}

impl Running {
    async fn ready(&mut self, program: &str, address: SocketAddr) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        while TcpStream::connect_timeout(&address, READY_POLL).is_err() {
            if let Some(status) = self.child.try_wait()? {
                let log = std::fs::read_to_string(self._directory.path().join("log")).unwrap_or_default();
                bail!("{program} ended with {status}:\n{log}");
            }
            anyhow::ensure!(Instant::now() < deadline, "{program} does not accept connections at {address}");
            tokio::time::sleep(READY_POLL).await;
        }
        Ok(())
    }
}

/// A port that nobody listens on now.
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A body that begins with the message's id, as bytes; never shorter than that.
fn put_body(out: &mut Vec<u8>, id: crate::crowd::MessageId, bytes: usize) {
    let start = out.len();
    out.extend_from_slice(&id.to_bytes());
    out.resize(start + body_bytes(bytes), b'x');
}

fn body_bytes(bytes: usize) -> usize {
    bytes.max(crate::crowd::MessageId::BYTES)
}

/// The id at the beginning of a body.
fn id_of(body: &[u8]) -> Option<crate::crowd::MessageId> {
    crate::crowd::MessageId::parse(body.get(..crate::crowd::MessageId::BYTES)?)
}

/// The line that begins here, without its CR LF, and where the next begins.
fn line(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let rest = bytes.get(at..)?;
    let end = rest.windows(2).position(|two| two == b"\r\n")?;
    Some((&rest[..end], at + end + 2))
}

fn number(digits: &[u8]) -> Option<usize> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests;
