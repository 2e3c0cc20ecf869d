//! The server of the demonstration: this very program as a child process.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::data_directory::Ready;

const START_PATIENCE: Duration = Duration::from_secs(60);
const STOP_PATIENCE: Duration = Duration::from_secs(30);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// A running server; it is killed when this is dropped.
pub struct Server {
    data: PathBuf,
    child: Child,
    pub ready: Ready,
}

impl Server {
    /// Starts a server on free ports and waits until it is ready.
    pub async fn start(data: &Path) -> anyhow::Result<Self> {
        let any = "127.0.0.1:0".to_owned();
        let mut child = spawn(data, &[("tcp", &any), ("tls", &any), ("quic", &any), ("api", &any), ("http", &any)])?;
        let ready = until_ready(data, &mut child).await?;
        Ok(Self { data: data.to_owned(), child, ready })
    }

    /// Starts it again on the same ports and the same data.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        let ready = &self.ready;
        let addresses = [
            ("tcp", &ready.tcp),
            ("tls", &ready.tls),
            ("quic", &ready.quic),
            ("api", &ready.api),
            ("http", &ready.http),
        ];
        let addresses: Vec<_> =
            addresses.into_iter().filter_map(|(name, address)| Some((name, address.as_ref()?))).collect();
        self.child = spawn(&self.data, &addresses)?;
        self.ready = until_ready(&self.data, &mut self.child).await?;
        Ok(())
    }

    /// SIGKILL: it gets no chance to write anything more.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("kill the server")
    }

    /// SIGTERM, and it must end with 0.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let id = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        kill_process(id.context("the server is gone")?, Signal::TERM).context("stop the server")?;
        let status: ExitStatus =
            timeout(STOP_PATIENCE, self.child.wait()).await.context("the server did not stop in time")??;
        anyhow::ensure!(status.success(), "the server stopped with {status}");
        Ok(())
    }

    /// The end of the server's log.
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(log(&self.data)).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }
}

fn log(data: &Path) -> PathBuf {
    data.with_extension("log")
}

fn spawn(data: &Path, addresses: &[(&str, &String)]) -> anyhow::Result<Child> {
    let log = File::options().create(true).append(true).open(log(data)).context("create the server's log")?;
    let mut command = Command::new(std::env::current_exe().context("find this program")?);
    command.arg("up").arg("--data").arg(data);
    for (name, address) in addresses {
        command.arg(format!("--{name}")).arg(address);
    }
    // Settings of whoever looks on are not those of the demonstration.
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("IM_")) {
        command.env_remove(variable);
    }
    // A group of its own: Ctrl-C is for the demonstration, which ends the server itself.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0).kill_on_drop(true);
    command.spawn().context("start the server")
}

async fn until_ready(data: &Path, child: &mut Child) -> anyhow::Result<Ready> {
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        if let Some(status) = child.try_wait()? {
            bail!("the server ended with {status}: {}", fs::read_to_string(log(data)).unwrap_or_default());
        }
        let ready = fs::read(data.join("ready.json")).ok().and_then(|text| serde_json::from_slice::<Ready>(&text).ok());
        // A file of the server that was killed names another process.
        if let Some(ready) = ready.filter(|ready| Some(ready.pid) == child.id()) {
            return Ok(ready);
        }
        anyhow::ensure!(Instant::now() < deadline, "the server was not ready in time");
        sleep(LOOK_INTERVAL).await;
    }
}
