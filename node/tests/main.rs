//! What holds for the workspace as a whole, and what `imd` does as a process.

mod api;
mod channels;
mod chat;
mod cluster;
mod devices;
mod edges;
mod inputs;
mod lists;
mod metrics;
mod migration;
mod presence;
mod process;
mod secrets;
mod server;
mod service;
mod terminal;
mod tidy;
mod transfer;

use std::path::PathBuf;

/// The folder of the workspace.
fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace is there")
}
