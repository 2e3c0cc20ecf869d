//! What the allocator is told.

use std::{env, os::unix::process::CommandExt as _, process::Command};

/// How long a page that was freed stays because another beside it was freed just now.
const EXTEND_DELAY: &str = "MIMALLOC_PURGE_EXTEND_DELAY";

/// Makes the allocator give freed pages back ten milliseconds after they were freed, also while there is always another that was freed
/// just now: where senders outrun the disk that is a third of the memory, for no CPU that could be measured (docs/performance.md).
///
/// The allocator reads its environment before `main`, and asking it otherwise is `unsafe`. So a server that was not told starts itself
/// again, in the same process. Where that is not possible it goes on and may need more memory.
pub fn give_back_in_time() {
    if env::var_os(EXTEND_DELAY).is_some() {
        return;
    }
    let Ok(program) = env::current_exe() else { return };
    let mut arguments = env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    // Comes back only if it failed.
    let _ = command.args(arguments).env(EXTEND_DELAY, "0").exec();
}
