//! Fills a store with messages before a run, through the server itself: in a full store, indexes, caches and compaction cost what
//! they cost in use.

use std::{path::Path, sync::Arc, sync::atomic::Ordering, time::Duration};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{LIVE_WITHIN, ProgressLine, SETTLE_WITHIN, Target, chat};
use crate::{
    load::{Load, total},
    measure::Reading,
    options::Common,
};

/// Messages of one round; each has its own users, and what the checker remembers goes with it.
const ROUND: u64 = 1_000_000;
const PAIRS: usize = 64;
const WINDOW: u64 = 64;
/// A round that makes no progress for this long is broken.
const PROGRESS_WITHIN: Duration = Duration::from_secs(60);
/// After filling, the store's work in the background has this long to come to rest.
const REST_WITHIN: Duration = Duration::from_secs(180);
const REST_CORES: f64 = 0.05;
const FILE: &str = "loadtest-fill.json";

/// What was filled in so far, kept beside the data.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
struct Filled {
    messages: u64,
}

fn read(directory: &Path) -> Filled {
    let text = std::fs::read(directory.join(FILE)).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

/// Sends until the store holds what the options ask for.
pub async fn fill(target: &mut Target, options: &Common) -> anyhow::Result<()> {
    let directory = target.directory();
    let mut filled = read(&directory);
    while filled.messages < options.fill {
        let wanted = (options.fill - filled.messages).min(ROUND);
        filled.messages += round(target, options, wanted).await.context("fill the store")?;
        std::fs::write(directory.join(FILE), serde_json::to_vec(&filled)?)?;
    }
    rest(&target.pids()).await;
    Ok(())
}

async fn round(target: &mut Target, options: &Common, wanted: u64) -> anyhow::Result<u64> {
    target.next_users();
    let options = Common { rate: None, window: WINDOW, ..options.clone() };
    let load = Load::start(chat::plan(target, &options, PAIRS)?, target.endpoints.clone())?;
    let line = ProgressLine::start("fill", Arc::clone(&load.progress));
    load.all_live(LIVE_WITHIN).await?;
    load.switches.sending.store(true, Ordering::Relaxed);
    let (mut last, mut moved) = (0, Instant::now());
    while last < wanted {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = total(&load.progress.acknowledged);
        if now > last {
            (last, moved) = (now, Instant::now());
        }
        anyhow::ensure!(moved.elapsed() < PROGRESS_WITHIN, "nothing is acknowledged for {PROGRESS_WITHIN:?}");
    }
    load.switches.sending.store(false, Ordering::Relaxed);
    anyhow::ensure!(load.settled(SETTLE_WITHIN).await, "not everything arrived within {SETTLE_WITHIN:?}");
    let messages = total(&load.progress.acknowledged);
    drop(line);
    load.finish()?;
    Ok(messages)
}

/// Waits until the server does nothing by itself any more.
async fn rest(pids: &[u32]) {
    let deadline = Instant::now() + REST_WITHIN;
    loop {
        let before = Reading::take(pids);
        tokio::time::sleep(Duration::from_secs(2)).await;
        if Reading::take(pids).since(&before).server_cores < REST_CORES || Instant::now() > deadline {
            return;
        }
    }
}
