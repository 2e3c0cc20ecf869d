//! The command line, as commands.md of the documentation has it.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

use crate::config::{self, Overrides};

/// The IM server: gateway, router and store in one process.
#[derive(Debug, Parser)]
#[command(
    name = "imd",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Without a command: `imd up`.\n\nExample:\n  imd up --data ./data\n  imd token --user alice --data ./data"
)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub up: UpArguments,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start everything in one process; stop it with Ctrl-C.
    #[command(after_help = "Example:\n  imd up --data ./data --tcp 127.0.0.1:7100")]
    Up(UpArguments),
    /// A guided run on free ports: three users, three transports, a server that is killed and started again.
    #[command(after_help = "Example:\n  imd demo")]
    Demo {
        /// Keep what the server stores in this directory, which must not exist [default: a temporary one, removed at the end]
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
    },
    /// Run the whole system in one deterministic process, with faults, and judge its promises.
    #[command(after_help = "Example:\n  imd simulate --seeds 200\n  imd simulate --seed 17 --trace")]
    Simulate(SimulateArguments),
    /// Make a token for a user.
    #[command(after_help = "Example:\n  imd token --user alice --data ./data")]
    Token(TokenArguments),
    /// Check, explain and show the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the version.
    #[command(after_help = "Example:\n  imd version --json")]
    Version {
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args, Clone, Debug, Default)]
pub struct UpArguments {
    /// A configuration file; `imd config defaults` prints one.
    #[arg(long, value_name = "FILE", env = "IM_CONFIG")]
    pub config: Option<PathBuf>,
    /// Where keys, certificate and messages are kept [default: ./data]
    #[arg(long, value_name = "DIR")]
    pub data: Option<String>,
    /// Clients over TCP without TLS [default: 127.0.0.1:7100]
    #[arg(long, value_name = "HOST:PORT")]
    pub tcp: Option<String>,
    /// Clients over TLS [default: 127.0.0.1:7101]
    #[arg(long, value_name = "HOST:PORT")]
    pub tls: Option<String>,
    /// Clients over QUIC [default: 127.0.0.1:7101]
    #[arg(long, value_name = "HOST:PORT")]
    pub quic: Option<String>,
    /// gRPC for other services [default: 127.0.0.1:7102]
    #[arg(long, value_name = "HOST:PORT")]
    pub api: Option<String>,
    /// Metrics and health [default: 127.0.0.1:7103]
    #[arg(long, value_name = "HOST:PORT")]
    pub http: Option<String>,
    /// Any other setting; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

#[derive(Args, Debug)]
pub struct SimulateArguments {
    /// Run this seed alone.
    #[arg(long, value_name = "N", conflicts_with_all = ["seeds", "from"])]
    pub seed: Option<u64>,
    /// Run so many seeds.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seeds: u64,
    /// The first of them.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub from: u64,
    /// Print what happens.
    #[arg(long)]
    pub trace: bool,
    /// Go on after a broken promise.
    #[arg(long)]
    pub keep_going: bool,
}

#[derive(Args, Debug)]
pub struct TokenArguments {
    /// The user, 1 to 64 bytes without white space.
    #[arg(long, value_name = "USER")]
    pub user: String,
    /// The device: a new session of the same device replaces the old one.
    #[arg(long, value_name = "DEVICE", default_value = "terminal")]
    pub device: String,
    /// The platform: of phone, tablet, desktop and web a user has one session each, of others many.
    #[arg(long, value_name = "PLATFORM", default_value = "terminal")]
    pub platform: String,
    /// How long it lasts. The server refuses more than its token.lifetime_max.
    #[arg(long, value_name = "DURATION", default_value = "30d", value_parser = parse_duration)]
    pub expires: Duration,
    /// The data directory that holds the signing key.
    #[arg(long, value_name = "DIR", default_value = "./data", env = "IM_DATA")]
    pub data: PathBuf,
    /// A signing key (PKCS#8 Ed25519) instead of that of the data directory.
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// The cluster.json that goes with --key, if it is not beside it or in the folder above.
    #[arg(long, value_name = "FILE", requires = "key")]
    pub cluster: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Report everything that is wrong with configuration files.
    #[command(after_help = "Example:\n  imd config check im.toml")]
    Check {
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Print every setting with its default, range and reason, as a file that can be used.
    #[command(after_help = "Example:\n  imd config defaults > im.toml")]
    Defaults,
    /// Print what would be in force, and where each value comes from.
    #[command(after_help = "Example:\n  IM_DATA=/srv/im imd config show --config im.toml")]
    Show(UpArguments),
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    config::parse_duration(text).ok_or_else(|| "expected a duration such as 30s, 5m, 12h or 30d".to_owned())
}

impl UpArguments {
    /// The settings that the command line names. An entry of `--set` without `=` becomes a setting that does not exist.
    pub fn overrides(&self) -> Overrides {
        let named = [
            ("data", &self.data),
            ("tcp", &self.tcp),
            ("tls", &self.tls),
            ("quic", &self.quic),
            ("api", &self.api),
            ("http", &self.http),
        ];
        let named = named
            .into_iter()
            .filter_map(|(key, value)| value.clone().map(|value| (format!("--{key}"), key.to_owned(), value)));
        let set = self.set.iter().map(|entry| {
            let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
            ("--set".to_owned(), key.to_owned(), value.to_owned())
        });
        Overrides { file: self.config.clone(), options: set.chain(named).collect() }
    }
}
