//! `imd secrets`: the directory that a cluster's processes take keys, secrets and certificates from.
//!
//! The layout is that of a data directory, with `services/` beside it. Which process needs which file is in docs/cluster.md.

use std::io::Write as _;

use crate::{args::SecretsArguments, data_directory::DataLock, failure::Failure, print};

/// Creates what is missing, and says on standard error what is not as it was wished because of what is there.
pub fn make(arguments: &SecretsArguments) -> Result<(), Failure> {
    let lock = DataLock::take(&arguments.out).map_err(Failure::usage)?;
    let notes = lock.create_secrets(arguments.shards, &arguments.host).map_err(Failure::usage)?;
    for note in notes {
        // Nobody may be left to read it.
        let _ = writeln!(std::io::stderr(), "imd: {note}");
    }
    print(&format!("{}\n", arguments.out.display()))
}
