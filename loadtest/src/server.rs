//! The server under test: an own `imd up` process in a temporary directory, or one that runs already.
//!
//! The harness never links a server. It starts the binary, waits for `ready.json` with a living pid, and from then on uses what a
//! client uses. Tokens are signed with the server's signing key, as an identity service would.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use im_proto::token::{Claims, SigningKey};
use serde::Deserialize;
use tokio::process::{Child, Command};

use crate::{stream::Transport, usage::usage};

/// How long a server may take until it accepts connections. Recovery of a large store is part of it.
const READY_WITHIN: Duration = Duration::from_secs(120);
const READY_POLL: Duration = Duration::from_millis(5);
/// How long a server may take to drain.
const STOP_WITHIN: Duration = Duration::from_secs(30);
/// Long enough for any run, below the server's limit.
const TOKEN_LIFETIME_SECONDS: i64 = 24 * 3600;

/// What `ready.json` says.
#[derive(Clone, Debug, Deserialize)]
struct Ready {
    pid: u32,
    #[serde(default)]
    version: String,
    tcp: Option<String>,
    tls: Option<String>,
    quic: Option<String>,
    ca: Option<PathBuf>,
}

/// What `cluster.json` says.
#[derive(Clone, Debug, Deserialize)]
struct Cluster {
    cluster_id: String,
    issuer: String,
}

/// Signs tokens for the clients of the run.
pub struct Credentials {
    key: SigningKey,
    cluster: Cluster,
}

/// Where clients connect.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// `host:port`, for the run's transport; clients are spread over them.
    pub addresses: Vec<String>,
    pub ca: Option<PathBuf>,
    pub version: String,
}

/// A server that the harness started. It is killed when this is dropped.
pub struct ServerProcess {
    child: Child,
    command: SpawnOptions,
    directory: PathBuf,
    /// Keeps the temporary directory until the end.
    _temporary: Option<tempfile::TempDir>,
}

/// How to start a server.
#[derive(Clone, Debug, Default)]
pub struct SpawnOptions {
    /// The binary; else `$IMD`, else beside this program, else `target/release/imd`.
    pub binary: Option<PathBuf>,
    /// An existing data directory; else a temporary one.
    pub data: Option<PathBuf>,
    /// A configuration file for `imd up`.
    pub config: Option<PathBuf>,
    /// Single settings, `KEY=VALUE`.
    pub settings: Vec<String>,
    /// The same, used where the server knows the key and nothing else says a value for it.
    pub raised: Vec<String>,
}

impl Credentials {
    /// From the signing key (PKCS#8 DER) and `cluster.json`.
    pub fn load(key: &Path, cluster: &Path) -> anyhow::Result<Self> {
        let read = |option: &str, path: &Path| {
            std::fs::read(path).map_err(|error| usage(format!("{option} {}: {error}", path.display())))
        };
        let (der, text) = (read("--key", key)?, read("--cluster", cluster)?);
        let wrong = |option: &str, path: &Path, error: &dyn std::fmt::Display| {
            usage(format!("{option} {}: {error}", path.display()))
        };
        let key = SigningKey::from_pkcs8(&der).map_err(|error| wrong("--key", key, &error))?;
        let cluster = serde_json::from_slice(&text).map_err(|error| wrong("--cluster", cluster, &error))?;
        Ok(Self { key, cluster })
    }

    /// `cluster.json` of a data directory whose `keys` folder holds the key.
    pub fn cluster_beside(key: &Path) -> PathBuf {
        let folder = key.parent().unwrap_or(Path::new("."));
        folder.parent().filter(|_| folder.ends_with("keys")).unwrap_or(folder).join("cluster.json")
    }

    /// A token for one device of a user.
    pub fn token(&self, user: &str, device: &str) -> anyhow::Result<String> {
        let iat = i64::try_from(crate::measure::unix_time().as_secs()).context("read the clock")?;
        let claims = Claims {
            sub: user.to_owned(),
            device: device.to_owned(),
            platform: "terminal".to_owned(),
            iss: self.cluster.issuer.clone(),
            aud: self.cluster.cluster_id.clone(),
            iat,
            exp: iat + TOKEN_LIFETIME_SECONDS,
        };
        Ok(self.key.sign(&claims)?)
    }
}

impl SpawnOptions {
    pub fn find_binary(&self) -> anyhow::Result<PathBuf> {
        if let Some(binary) = &self.binary {
            return Ok(binary.clone());
        }
        let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(|folder| folder.join("imd")));
        let named = std::env::var_os("IMD").map(PathBuf::from);
        let candidates = [named, beside, Some(PathBuf::from("target/release/imd"))];
        candidates.into_iter().flatten().find(|path| path.is_file()).ok_or_else(|| {
            usage("there is no imd to start: `cargo build --release -p im-node` makes it, --imd or $IMD names it")
        })
    }

    fn given(&self, key: &str) -> Option<&str> {
        self.settings.iter().rev().find_map(|setting| setting.strip_prefix(key)?.strip_prefix('='))
    }

    /// The text of `imd config defaults`.
    fn defaults(&self) -> String {
        let output = self.find_binary().and_then(|binary| {
            Ok(std::process::Command::new(binary).args(["config", "defaults"]).stdin(Stdio::null()).output()?)
        });
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    }

    /// Takes in the raised settings that the server knows. A configuration file has its own: it is left alone.
    fn raise(&mut self) {
        if self.raised.is_empty() || self.config.is_some() {
            return;
        }
        let defaults = self.defaults();
        for raised in std::mem::take(&mut self.raised) {
            let Some((key, _)) = raised.split_once('=') else { continue };
            if self.given(key).is_none() && default_of(&defaults, key).is_some() {
                self.settings.push(raised);
            }
        }
    }

    fn start(&self, directory: &Path) -> anyhow::Result<Child> {
        let binary = self.find_binary()?;
        let log = std::fs::File::options().create(true).append(true).open(directory.join("imd.log"))?;
        let mut command = Command::new(&binary);
        command.arg("up").arg("--data").arg(directory);
        for listener in ["--tcp", "--tls", "--quic", "--api", "--http"] {
            command.args([listener, "127.0.0.1:0"]);
        }
        if let Some(config) = &self.config {
            command.arg("--config").arg(config);
        }
        for setting in &self.settings {
            command.args(["--set", setting]);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
        command.spawn().with_context(|| format!("start {}", binary.display()))
    }
}

impl ServerProcess {
    /// Starts a server and waits until it accepts connections.
    pub async fn spawn(mut options: SpawnOptions) -> anyhow::Result<Self> {
        options.raise();
        let (directory, temporary) = match &options.data {
            Some(data) => {
                std::fs::create_dir_all(data)?;
                (data.clone(), None)
            }
            None => {
                let temporary = tempfile::Builder::new().prefix("loadtest-").tempdir()?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let child = options.start(&directory)?;
        let mut server = Self { child, command: options, directory, _temporary: temporary };
        server.ready().await?;
        Ok(server)
    }

    /// Waits until the process that was started last says that every listener accepts.
    async fn ready(&mut self) -> anyhow::Result<Ready> {
        let path = self.directory.join("ready.json");
        let deadline = tokio::time::Instant::now() + READY_WITHIN;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("the server ended with {status} before it was ready:\n{}", self.log_tail());
            }
            let ready = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Ready>(&text).ok());
            if let Some(ready) = ready.filter(|ready| Some(ready.pid) == self.child.id()) {
                return Ok(ready);
            }
            if tokio::time::Instant::now() > deadline {
                bail!("the server was not ready within {READY_WITHIN:?}:\n{}", self.log_tail());
            }
            tokio::time::sleep(READY_POLL).await;
        }
    }

    /// Where clients connect, as the running process says.
    pub async fn endpoints(&mut self, transport: Transport) -> anyhow::Result<Endpoints> {
        let ready = self.ready().await?;
        let address = match transport {
            Transport::Tcp => ready.tcp,
            Transport::Tls => ready.tls,
            Transport::Quic => ready.quic,
        };
        let address = address.with_context(|| format!("the server does not listen on {transport:?}"))?;
        Ok(Endpoints { addresses: vec![address], ca: ready.ca, version: ready.version })
    }

    /// Signs tokens with the server's own key.
    pub fn credentials(&self) -> anyhow::Result<Credentials> {
        Credentials::load(&self.key_file(), &self.directory.join("cluster.json"))
    }

    /// The process id.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// A setting as the configuration writes it: what it was started with, else the default.
    pub fn setting(&self, key: &str) -> Option<String> {
        self.command.given(key).map(str::to_owned).or_else(|| default_of(&self.command.defaults(), key))
    }

    /// The single settings that it was started with.
    pub fn settings(&self) -> &[String] {
        &self.command.settings
    }

    /// The signing key.
    pub fn key_file(&self) -> PathBuf {
        self.directory.join("keys/signing.pk8")
    }

    /// The data directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Ends the process without any chance to clean up, and waits until it is gone.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("kill the server")
    }

    /// Starts the server again on the same data and waits until it accepts connections.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.child = self.command.start(&self.directory)?;
        self.ready().await?;
        Ok(())
    }

    /// Whether the process is still there.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks the server to drain and end; whether it did so with exit code 0 in time.
    pub async fn stop(mut self) -> anyhow::Result<bool> {
        if let Some(pid) =
            self.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw)
        {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        Ok(tokio::time::timeout(STOP_WITHIN, self.child.wait())
            .await
            .is_ok_and(|status| status.is_ok_and(|s| s.success())))
    }

    /// The last lines that the server wrote.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read(self.directory.join("imd.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

/// The value of `section.name` in the text of `imd config defaults`.
fn default_of(text: &str, key: &str) -> Option<String> {
    let (section, name) = key.rsplit_once('.').unwrap_or(("", key));
    let mut within = "";
    for line in text.lines() {
        if let Some(header) = line.strip_prefix('[') {
            within = header.trim_end_matches(']');
        } else if let Some((found, value)) = line.split_once(" = ")
            && within == section
            && found == name
        {
            return Some(value.trim_matches('"').to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_default_is_found_in_its_section() {
        let text = "a = \"1\"\n[gateway]\n# a = 2\na = \"1 MiB\"\n[router]\na = 3\n";
        assert_eq!(super::default_of(text, "gateway.a").as_deref(), Some("1 MiB"));
        assert_eq!(super::default_of(text, "a").as_deref(), Some("1"));
        assert_eq!(super::default_of(text, "router.b"), None);
    }
}
