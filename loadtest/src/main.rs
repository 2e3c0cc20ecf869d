//! `loadtest`: parses, runs one scenario, writes the report.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    im_loadtest::main(im_loadtest::Options::parse())
}
