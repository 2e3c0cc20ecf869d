//! The commands of `im`: one module each for what they share (arguments, connection, output) and for the longer ones.
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 the operation failed, 2 wrong usage or
//! environment. It keeps nothing on disk but, with `--as`, the files that say which devices are taken (`data_directory/device.rs`).

mod args;
mod chat;
mod connect;
mod data_directory;
mod distrust;
mod failure;
mod history;
mod interrupt;
mod output;
mod pipe;
mod presence;
pub mod shell;
mod short;
mod tail;

use std::{ffi::OsString, process::ExitCode};

use clap::{CommandFactory as _, Parser as _};

use im_proto::limits;

use crate::client::Client;
use args::{Arguments, Command};
use failure::Failure;
use interrupt::Interrupt;
use output::Output;

/// The longest text of a message: tag and two lengths stand around it in its body.
const TEXT_BYTES_MAX: usize = limits::BODY_BYTES_MAX - 16;

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    main_with(std::env::args_os())
}

/// Runs a command, the name of the program first.
pub fn main_with(arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help that nobody reads to its end is no failure.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    // The client runs on the worker; this thread may wait for a slow reader of standard output meanwhile.
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::Failed(format!("cannot start the runtime: {error}")).report(),
    };
    let outcome = runtime.block_on(run(arguments));
    // A reader of standard input may still wait for it.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

async fn run(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { connection, format, command } = arguments;
    let mut output = Output::new(format);
    match &command {
        // They ask no server.
        Command::Completions { shell } => {
            output.line_as_it_is(shell::completions(Arguments::command(), *shell).trim_end())?;
            return output.flush();
        }
        Command::Man { out } => return shell::man(Arguments::command(), out).map_err(Failure::Failed),
        Command::History { from: Some(from), to: Some(to), .. } if from > to => {
            return Err(Failure::Usage(format!("--from {from} is after --to {to}; write the smaller seq first")));
        }
        _ => {}
    }
    let (config, distrust) = connect::config(&connection)?;
    if let Command::Chat { target } = command {
        // It has the terminal, and signals, to itself.
        return chat::run(config, target).await;
    }
    let interrupt = Interrupt::listen(&config.environment);
    let timeout = connection.timeout();
    let client = tokio::select! {
        biased;
        client = Client::connect(config) => client?,
        failure = distrust.of_all() => return Err(failure),
        () = interrupt.requested() => return Err(Failure::interrupted()),
    };
    let outcome = match command {
        Command::Pipe { target } => pipe::run(&client, target, &interrupt).await,
        Command::Presence { users, watch: true } => presence::watch(&client, &users, &mut output, &interrupt).await,
        Command::Tail { target, from, count } => tail::run(&client, target, from, count, &mut output, &interrupt).await,
        command => tokio::select! {
            biased;
            outcome = short::run(&client, command, timeout, &mut output) => outcome,
            () = interrupt.requested() => Err(Failure::interrupted()),
        },
    };
    let outcome = outcome.and_then(|()| output.flush());
    client.close().await;
    outcome
}
