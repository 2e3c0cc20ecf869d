//! What the allocator is told.

use std::{env, ffi::OsStr, os::unix::process::CommandExt as _, process::Command};

/// How long pages that were freed stay because others beside them were freed just now.
const EXTEND_DELAY: &str = "MIMALLOC_PURGE_EXTEND_DELAY";
/// A program by another name is not taken for this one.
const NAME: &str = env!("CARGO_BIN_NAME");

/// Makes the allocator give freed pages back 10 ms after they were freed (100 ms if a whole segment is free; in both cases when it is
/// called next), also while there are always others that were freed just now: where senders outrun the disk that is a third of the
/// memory, for no CPU that could be measured (docs/performance.md).
///
/// The allocator reads its environment before `main`, and asking it otherwise is `unsafe`. So a server that was not told starts itself
/// again, in the same process. Where that is not possible it goes on and may need more memory.
pub fn give_back_in_time() {
    if env::var_os(EXTEND_DELAY).is_some() {
        return;
    }
    // Not if this file is gone, or is run by a loader that is the program.
    let Some(program) = env::current_exe().ok().filter(|program| program.file_name() == Some(OsStr::new(NAME))) else {
        return;
    };
    let mut arguments = env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    // Comes back only if it failed; that SIGPIPE then ends the process is mended where signals are listened to.
    let _ = command.args(arguments).env(EXTEND_DELAY, "0").exec();
}
