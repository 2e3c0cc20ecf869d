//! `im`, a terminal client. Everything is in [`im_client::terminal`].

use std::process::ExitCode;

fn main() -> ExitCode {
    im_client::terminal::main()
}
