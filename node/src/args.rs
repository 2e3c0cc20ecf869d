//! The command line, as commands.md of the documentation has it.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use im_proto::{ConversationId, ShardCount};

use crate::{config, links::tls::is_host};

mod servers;

pub use servers::{GatewayArguments, RouterArguments, ToolArguments, TransferArguments, UpArguments};

/// The IM server: gateway, router and store in one process, or one of them in a cluster.
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
    /// One router of a cluster: owns conversations, numbers and stores messages.
    #[command(
        after_help = "Example:\n  imd router --etcd http://127.0.0.1:2379 --cql 127.0.0.1:9042 --secrets ./cluster --data ./router1"
    )]
    Router(RouterArguments),
    /// One gateway of a cluster: holds the connections of clients.
    #[command(
        after_help = "Example:\n  imd gateway --etcd http://127.0.0.1:2379 --secrets ./cluster --tcp 127.0.0.1:7100 --data ./gateway1"
    )]
    Gateway(GatewayArguments),
    /// What the whole cluster does, and its recovery after etcd was lost.
    #[command(
        subcommand,
        after_help = "Example:\n  imd cluster status --etcd http://127.0.0.1:2379 --secrets ./cluster"
    )]
    Cluster(ClusterCommand),
    /// The tables of the CQL store.
    #[command(subcommand, after_help = "Example:\n  imd schema status --cql 127.0.0.1:9042")]
    Schema(SchemaCommand),
    /// Write all data of a cluster that does not run into one file.
    #[command(
        after_help = "Example:\n  imd export --data ./data --to backup.im\n  imd export --cql 127.0.0.1:9042 --secrets ./cluster --to backup.im"
    )]
    Export {
        /// The file to create; if the command is cut off, the same command goes on.
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
        #[command(flatten)]
        transfer: TransferArguments,
    },
    /// Read a file of `imd export` into a store that was never used.
    #[command(
        after_help = "Example:\n  imd schema apply --cql 127.0.0.1:9042 --secrets ./data\n  imd import --from backup.im --cql 127.0.0.1:9042"
    )]
    Import {
        /// The file to read; if the command is cut off, the same command goes on.
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
        #[command(flatten)]
        transfer: TransferArguments,
    },
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
    /// Make the keys, secrets and certificates of a cluster; what is there already stays.
    #[command(
        after_help = "Example:\n  imd secrets --out ./cluster\n  imd gateway --secrets ./cluster --etcd http://127.0.0.1:2379"
    )]
    Secrets(SecretsArguments),
    /// Make a token for a user.
    #[command(after_help = "Example:\n  imd token --user alice --data ./data")]
    Token(TokenArguments),
    /// Check, explain and show the configuration.
    #[command(subcommand, after_help = "Example:\n  imd config defaults > im.toml")]
    Config(ConfigCommand),
    /// Print what makes a shell complete the commands and options of imd.
    #[command(after_help = "Example:\n  imd completions bash > /etc/bash_completion.d/imd")]
    Completions { shell: clap_complete::Shell },
    /// Write a manual page for each command.
    #[command(after_help = "Example:\n  imd man --out /usr/local/share/man/man1")]
    Man {
        /// The directory, which is created if it does not exist.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Print the version.
    #[command(after_help = "Example:\n  imd version --json")]
    Version {
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args, Debug)]
pub struct SimulateArguments {
    /// Run this seed alone.
    #[arg(long, value_name = "N", conflicts_with_all = ["seeds", "from"])]
    pub seed: Option<u64>,
    /// Run so many seeds.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_many)]
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

#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Routers, gateways, load, who owns how many shards.
    #[command(after_help = "Example:\n  imd cluster status --etcd http://127.0.0.1:2379 --secrets ./cluster --shards")]
    Status {
        #[command(flatten)]
        tool: ToolArguments,
        /// Each shard by its owner, with epoch and next owner.
        #[arg(long)]
        shards: bool,
        /// Which router owns this conversation (`im list` prints ids).
        #[arg(long, value_name = "ID")]
        conversation: Option<ConversationId>,
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// After etcd was lost, or restored from a snapshot: fences everything that was started before, and lets routers claim again.
    #[command(
        after_help = "Example:\n  imd cluster recover --etcd http://127.0.0.1:2379 --cql 127.0.0.1:9042 --secrets ./cluster"
    )]
    Recover(ToolArguments),
}

#[derive(Debug, Subcommand)]
pub enum SchemaCommand {
    /// Create or update the tables, and found the cluster in a store that belongs to none.
    #[command(after_help = "Example:\n  imd schema apply --cql 127.0.0.1:9042 --secrets ./cluster")]
    Apply {
        #[command(flatten)]
        tool: ToolArguments,
        /// Copies of each row, if the keyspace has to be created.
        #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=16))]
        replication: u32,
    },
    /// What is there, and what weakens it.
    #[command(after_help = "Example:\n  imd schema status --cql 127.0.0.1:9042")]
    Status(ToolArguments),
}

#[derive(Args, Debug)]
pub struct SecretsArguments {
    /// The directory to create.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Units of ownership, fixed for the life of the cluster.
    #[arg(long, value_name = "N", default_value_t = ShardCount::default().get(), value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub shards: u32,
    /// A host name or address of the certificates that are made, beside those of this machine; may be repeated.
    #[arg(long, value_name = "HOST", value_parser = parse_host)]
    pub host: Vec<String>,
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
    /// How long it lasts; servers refuse more than their token.lifetime_max [default: 30d, as imd up takes; 1h with --key, as routers take]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub expires: Option<Duration>,
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

fn parse_many(text: &str) -> Result<u64, String> {
    text.parse().ok().filter(|many| *many > 0).ok_or_else(|| "expected a whole number from 1 on".to_owned())
}

fn parse_host(text: &str) -> Result<String, String> {
    if is_host(text) {
        Ok(text.to_owned())
    } else {
        Err("expected a host name or an address, without a port".to_owned())
    }
}

fn parse_setting(text: &str) -> Result<String, String> {
    let is_one = text.split_once('=').is_some_and(|(key, _)| !key.is_empty());
    if is_one {
        Ok(text.to_owned())
    } else {
        Err("expected KEY=VALUE; `imd config defaults` lists the keys".to_owned())
    }
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    config::parse_duration(text).ok_or_else(|| "expected a duration such as 30s, 5m, 12h or 30d".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::Arguments;

    fn without_example(command: &clap::Command, path: &str, found: &mut Vec<String>) {
        let path = format!("{path}{} ", command.get_name());
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        if !help.contains("Example") {
            found.push(path.clone());
        }
        command.get_subcommands().for_each(|inner| without_example(inner, &path, found));
    }

    #[test]
    fn every_command_has_an_example_in_its_help() {
        let mut found = Vec::new();
        without_example(&Arguments::command(), "", &mut found);
        assert!(found.is_empty(), "{found:?}");
    }
}
