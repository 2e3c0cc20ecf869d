//! `imd demo`: the job in one command. A real server process, three real clients, and a check of every promise that is shown.
//!
//! It ends with 0 only if all of them held, and leaves neither process nor file behind (a directory named with `--data` is kept).

mod person;
mod scenes;
mod server;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tokio::runtime::Runtime;

use crate::{environment::Tasks, failure::Failure, signals::Signals};
use server::Server;

/// Where the demonstration keeps the server's data.
enum Place {
    Temporary(tempfile::TempDir),
    Kept(PathBuf),
}

impl Place {
    fn path(&self) -> PathBuf {
        match self {
            Self::Temporary(folder) => folder.path().join("data"),
            Self::Kept(path) => path.clone(),
        }
    }
}

/// Runs all scenes.
pub fn run(data: Option<PathBuf>) -> Result<(), Failure> {
    let place = match data {
        Some(path) if path.exists() => {
            return Err(Failure::Usage(format!(
                "--data {}: is there already; name a directory that is not",
                path.display()
            )));
        }
        Some(path) => Place::Kept(path),
        None => {
            let folder = tempfile::Builder::new().prefix("imd-demo-").tempdir();
            Place::Temporary(folder.context("create a temporary directory").map_err(Failure::usage)?)
        }
    };
    let runtime = Runtime::new().context("start the runtime").map_err(Failure::usage)?;
    let path = place.path();
    let outcome = runtime.block_on(async {
        let mut signals = Signals::listen().map_err(Failure::usage)?;
        tokio::select! {
            biased;
            // The server's process ends with the future that holds it.
            signal = signals.next() => Err(Failure::Operation(format!("stopped by {signal}"))),
            outcome = play(&path) => outcome.map_err(Failure::operation),
        }
    });
    runtime.shutdown_background();
    if let Place::Temporary(folder) = place {
        folder.close().context("remove the temporary directory").map_err(Failure::operation)?;
    }
    outcome
}

async fn play(data: &Path) -> anyhow::Result<()> {
    let tasks = Tasks::default();
    let mut server = Server::start(data).await?;
    let played = scenes::all(&mut server, &tasks.environment()).await;
    tasks.stop().await;
    match played {
        Ok(()) => {
            server.stop().await?;
            crate::print("\nAll of it held. The server has stopped.\n").map_err(|failure| anyhow::anyhow!("{failure}"))
        }
        Err(error) => {
            let log = server.last_words();
            server.kill().await?;
            Err(error.context(format!("a promise did not hold; the server's last words:\n{log}")))
        }
    }
}
