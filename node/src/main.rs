//! `imd`: parses the command line, builds what it asks for, waits for a signal, drains.
//!
//! Exit codes: 0 done, 1 the operation failed, 2 wrong usage, configuration or environment and nothing was changed, 3 a promise of
//! the system did not hold.

mod allocator;
mod args;
mod cluster;
mod config;
mod data_directory;
mod demo;
mod environment;
mod failure;
mod http;
mod links;
mod listen;
mod process;
mod schema;
mod secrets;
mod signals;
mod simulate;
mod telemetry;
mod token;
mod transfer;
mod up;
mod watch;

use std::{io::Write as _, process::ExitCode};

use args::{Arguments, ClusterCommand, Command, ConfigCommand, SchemaCommand};
use clap::{CommandFactory as _, Parser as _};
use config::{ConfigError, Loaded, Overrides, Process};
use environment::Tasks;
use failure::Failure;
use im_client::terminal::shell;

/// What it was compared with: docs/performance.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if matches!(arguments.command, None | Some(Command::Up(_) | Command::Router(_) | Command::Gateway(_))) {
        allocator::give_back_in_time();
    }
    // Idle connections are many small objects that live long; huge pages keep what lay between them. docs/performance.md has figures.
    // A kernel that refuses costs memory, nothing else.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Nobody may be left to read it.
            let _ = writeln!(std::io::stderr(), "imd: {failure}");
            ExitCode::from(failure.code())
        }
    }
}

fn run(arguments: Arguments) -> Result<(), Failure> {
    match arguments.command.unwrap_or(Command::Up(arguments.up)) {
        Command::Up(options) => up::run(load(&options.overrides(), Process::Up)?, options.server.watch),
        Command::Router(options) => {
            cluster::router::run(load(&options.overrides(), Process::Router)?, options.server.watch)
        }
        Command::Gateway(options) => {
            cluster::gateway::run(load(&options.overrides(), Process::Gateway)?, options.server.watch)
        }
        Command::Cluster(ClusterCommand::Status { tool, json, shards, conversation }) => {
            let details = cluster::status::Details { shards, conversation };
            cluster::admin::status(&load(&tool.overrides(), Process::Tool)?.config, json, details)
        }
        Command::Cluster(ClusterCommand::Recover(tool)) => {
            cluster::admin::recover(&load(&tool.overrides(), Process::Tool)?.config)
        }
        Command::Schema(SchemaCommand::Apply { tool, replication }) => {
            schema::apply(&load(&tool.overrides(), Process::Tool)?.config, replication)
        }
        Command::Schema(SchemaCommand::Status(tool)) => schema::status(&load(&tool.overrides(), Process::Tool)?.config),
        Command::Export { to, transfer } => {
            transfer::export(&transfer, &load(&transfer.tool.overrides(), Process::Tool)?.config, &to)
        }
        Command::Import { from, transfer } => {
            transfer::import(&transfer, &load(&transfer.tool.overrides(), Process::Tool)?.config, &from)
        }
        Command::Demo { data } => demo::run(data),
        Command::Simulate(options) => simulate::command(&options),
        Command::Secrets(options) => secrets::make(&options),
        Command::Token(options) => {
            let token = token::make(&options, &Tasks::default().environment()).map_err(Failure::usage)?;
            print(&format!("{token}\n"))
        }
        Command::Config(ConfigCommand::Check { files }) => check(&files),
        Command::Config(ConfigCommand::Defaults) => print(&config::defaults()),
        Command::Config(ConfigCommand::Show(options)) => {
            print(&config::show(&mut load(&options.overrides(), Process::Up)?))
        }
        Command::Completions { shell } => print(&shell::completions(Arguments::command(), shell)),
        Command::Man { out } => shell::man(Arguments::command(), &out).map_err(Failure::Operation),
        Command::Version { json } => print(&version(json)),
    }
}

fn load(overrides: &Overrides, process: Process) -> Result<Loaded, Failure> {
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    config::load(overrides, &environment, process).map_err(Failure::usage)
}

fn check(files: &[std::path::PathBuf]) -> Result<(), Failure> {
    let mut problems = Vec::new();
    for file in files {
        match config::check(file) {
            Ok(()) => print(&format!("{}: ok\n", file.display()))?,
            Err(ConfigError(found)) => problems.extend(found),
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Failure::Usage(ConfigError(problems).to_string())) }
}

fn version(json: bool) -> String {
    let (low, high) = im_proto::PROTOCOL_VERSIONS;
    let version = env!("CARGO_PKG_VERSION");
    if json {
        format!("{}\n", serde_json::json!({ "version": version, "protocol_min": low, "protocol_max": high }))
    } else {
        format!("imd {version} (protocol {low} to {high})\n")
    }
}

/// A closed pipe ends the program quietly.
fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::Operation(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}
