//! What can be asked of `loadtest`.

mod ranges;

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use im_proto::limits;

use self::ranges::{
    CONNECTIONS_MAX, FILL_MAX, FLOOD_RATE_MAX, HOUR_SECONDS, KILLS_MAX, PAIRS_MAX, PID_MAX, PROCESSES_MAX, RATE_MAX,
    READS_MAX, SECONDS_MAX, TEXT_BYTES_MAX, number, setting, whole, zero_or,
};
use crate::{ceiling::Workload, peer::Peer, scenario::flood::Flood, stream::Transport};

/// Load tests with a judgement: starts a server (or uses a running one), drives it, and checks every promise of the protocol.
#[derive(Debug, Parser)]
#[command(name = "loadtest", version, after_help = EXAMPLES)]
pub struct Options {
    #[command(subcommand)]
    pub scenario: Scenario,
}

const EXAMPLES: &str = "Examples:
  loadtest chat --pairs 100 --window 16 --seconds 10
  loadtest fanout --members 1000 --json fanout.json
  loadtest crash --kills 50
  loadtest ceiling --durable
  loadtest peer redis-stream --pairs 100
  loadtest chat --pairs 1000 --seconds 60 --fill 10000000 --data /var/tmp/store --peer redis-stream --repeat 3
  loadtest chat --rate-of 0.25
  loadtest soak --server tcp://127.0.0.1:7200 --key signing.pk8 --seconds 60

Exit codes: 0 done, 1 it could not run, 2 wrong usage, 3 a promise did not hold or the generator was the limit.";

#[derive(Debug, Subcommand)]
pub enum Scenario {
    /// What this machine can do at most: a bare router in memory, with --durable behind a bare log with one flush a batch.
    #[command(after_help = "Example:  loadtest ceiling --durable --seconds 5")]
    Ceiling {
        #[command(flatten)]
        common: Common,
        /// Every message is on disk before it is acknowledged and delivered.
        #[arg(long)]
        durable: bool,
        /// Only this one of echo, pairs and fanout.
        #[arg(long, value_enum)]
        workload: Option<Workload>,
    },
    /// One-to-one: pairs of users, one sends, one receives.
    #[command(after_help = "Example:  loadtest chat --pairs 100 --window 16 --peer redis-stream")]
    Chat(Common),
    /// One sends to a group whose members are all online. --window 1: each message alone; more: several share a write.
    #[command(after_help = "Example:  loadtest fanout --members 1000 --window 1 --json fanout.json")]
    Fanout(Common),
    /// Authenticated connections that do nothing but answer heartbeats: memory a connection.
    #[command(after_help = "Example:  loadtest idle --connections 10000 --transport quic --seconds 60")]
    Idle(Common),
    /// Continuous load while the server is killed and started again.
    #[command(after_help = "Example:  loadtest crash --kills 200 --rate 600 --seed 7")]
    Crash {
        #[command(flatten)]
        common: Common,
        /// How often the server is killed.
        #[arg(long, default_value_t = 50, allow_negative_numbers = true, value_parser = whole(1, KILLS_MAX))]
        kills: u32,
    },
    /// Continuous load on a running cluster (--server) while somebody else breaks it; everything is judged at the end.
    #[command(after_help = "Example:  loadtest soak --server tcp://127.0.0.1:7200 --key signing.pk8 --seconds 60")]
    Soak {
        #[command(flatten)]
        common: Common,
        /// Each line of standard input is a mark in the timeline; the load ends with the input, not after --seconds.
        #[arg(long)]
        marks: bool,
        /// Seconds after the end of the load in which everything has to be back: every client, every ack, every message.
        #[arg(long, value_name = "S", default_value_t = 90.0, allow_negative_numbers = true, value_parser = number(0.0, HOUR_SECONDS))]
        settle: f64,
        /// After each mark that does not begin with `end:` no conversation may wait any more within this: judged as a goal.
        #[arg(long, value_name = "S", allow_negative_numbers = true, value_parser = number(0.0, HOUR_SECONDS))]
        goal_back: Option<f64>,
        /// No acknowledgement may be waited for longer than this, whatever is broken: else a promise did not hold (exit code 3).
        #[arg(long, value_name = "S", allow_negative_numbers = true, value_parser = number(1e-6, HOUR_SECONDS))]
        wait_max: Option<f64>,
    },
    /// CPU a message at 1 to 8 gateways and 1 to 4 routers, and in groups of up to 100,000 members, on a cluster of this machine.
    #[command(after_help = "Example:  loadtest scale --seconds 20 --html scale.html")]
    Scale {
        #[command(flatten)]
        common: Common,
        /// What starts the cluster; IM_CLUSTER_DIR and the other variables of it hold.
        #[arg(long, value_name = "FILE", default_value = "deploy/local/cluster")]
        tool: PathBuf,
    },
    /// All of it, one after the other, as one report.
    #[command(after_help = "Example:  loadtest suite --quick --html suite.html")]
    Suite {
        #[command(flatten)]
        common: Common,
        /// Small sizes: whether everything runs, not how fast it is.
        #[arg(long)]
        quick: bool,
    },
    /// One process of idle clients; `idle` starts it.
    #[command(hide = true)]
    IdleClients(Common),
    /// Latency over throughput, open loop: shares of the closed loop's rate, and the highest rate that leaves 30 % of the box free.
    #[command(after_help = "Example:  loadtest curve --pairs 100 --html curve.html")]
    Curve(Common),
    /// Connect, authenticate, welcome, and away again, as fast as it goes; over TLS and QUIC with and without resumption.
    #[command(after_help = "Example:  loadtest connect --transport tls --seconds 10")]
    Connect(Common),
    /// A group some of whose readers stop reading: what the others see of it, and what it costs the server in memory.
    #[command(after_help = "Example:  loadtest stall --members 1000 --stalled 100")]
    Stall {
        #[command(flatten)]
        common: Common,
        /// Members who stop reading.
        #[arg(long, default_value_t = 100, allow_negative_numbers = true, value_parser = whole(1, limits::GROUP_MEMBERS_MAX - 1))]
        stalled: usize,
        /// Instead: senders (--pairs of them, 32) who write more than the disk takes, 16 KiB a message; what waits for it in memory.
        #[arg(long)]
        slow_disk: bool,
    },
    /// Sync of many conversations after absence, and history pages of 100, under load.
    #[command(after_help = "Example:  loadtest sync --conversations 300")]
    Sync {
        #[command(flatten)]
        common: Common,
        /// Conversations of a user who comes back.
        #[arg(long, default_value_t = 300, allow_negative_numbers = true, value_parser = whole(1, limits::SYNC_HAVE_MAX))]
        conversations: usize,
    },
    /// Established users while others flood the server with connects, TLS handshakes begun and done, and garbage: --seconds of each, in
    /// turns.
    #[command(after_help = "Example:  loadtest flood --flood-rate 2000")]
    Flood {
        #[command(flatten)]
        common: Common,
        /// Attempts a second.
        #[arg(long, default_value_t = 2000.0, allow_negative_numbers = true, value_parser = number(0.1, FLOOD_RATE_MAX))]
        flood_rate: f64,
    },
    /// The flood itself; `flood` starts it.
    #[command(hide = true)]
    FloodClient {
        #[arg(long, value_enum)]
        kind: Flood,
        #[arg(long)]
        address: String,
        #[arg(long)]
        udp: Option<String>,
        #[arg(long)]
        rate: f64,
        /// Handshakes a second that a server of its own lets through.
        #[arg(long)]
        admitted: f64,
    },
    /// Another server under the same traffic, started and ended here: the program is Debian's.
    #[command(after_help = "Example:  loadtest peer redis-stream --pairs 100")]
    Peer {
        /// Which one.
        #[arg(value_enum)]
        name: Peer,
        #[command(flatten)]
        common: Common,
        /// pairs or fanout.
        #[arg(long, value_enum, default_value_t = Workload::Pairs)]
        workload: Workload,
    },
    /// The bare router itself; `ceiling` starts it.
    #[command(hide = true)]
    CeilingServer {
        #[arg(long)]
        ack: usize,
        #[arg(long)]
        message: usize,
        #[arg(long)]
        log: Option<PathBuf>,
    },
}

/// One sender stands for many here: no limit of what one user or connection may do. Limits of addresses do not hold on loopback.
const RAISED: [&str; 6] = [
    "gateway.sends_per_second_max=0",
    "gateway.user_sends_per_second_max=0",
    "gateway.frames_per_second_max=0",
    "gateway.bytes_per_second_max=0B",
    "router.user_sends_max=0",
    "router.user_call_cost_max=0",
];

/// Members of a group if the options do not say.
const MEMBERS: usize = 1000;
/// The server's own interval of heartbeats.
const HEARTBEAT_SECONDS: f64 = 30.0;

/// Options of every scenario.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Start an own `imd up` in a temporary directory. The default without --server.
    #[arg(long, conflicts_with = "server")]
    pub spawn: bool,
    /// A running server: tcp://host:port, tls://… or quic://…; several of one cluster.
    #[arg(long, value_name = "URL", num_args = 1.., requires = "key")]
    pub server: Vec<String>,
    /// The signing key of that server (PKCS#8 DER): the harness issues its users' tokens itself.
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// That server's cluster.json; else the one in the data directory of the key.
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,
    /// The certificate authority of that server, for TLS and QUIC.
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// The process ids of that server on this machine, to measure its CPU and memory.
    #[arg(long, value_name = "PID", num_args = 1.., allow_negative_numbers = true, value_parser = whole(1, PID_MAX))]
    pub server_pid: Vec<u32>,
    /// The server binary to start; else $IMD, else the one beside this program, else target/release/imd.
    #[arg(long, value_name = "FILE")]
    pub imd: Option<PathBuf>,
    /// Start the server on this data directory and keep it, instead of on a temporary one.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// The configuration file for the server to start.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A setting for the server to start; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    pub set: Vec<String>,
    /// Crash and soak: reads a second of random parts of histories while they grow, all clients together; each is judged.
    #[arg(long, value_name = "R", default_value_t = 20.0, allow_negative_numbers = true, value_parser = number(0.0, READS_MAX))]
    pub reads: f64,
    /// Further limits that a scenario raises.
    #[arg(skip)]
    pub also_raised: Vec<String>,
    /// How clients connect to a server that is started here.
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    pub transport: Transport,
    /// Connections; for chat two a pair.
    #[arg(long, allow_negative_numbers = true, value_parser = whole(1, CONNECTIONS_MAX))]
    pub connections: Option<usize>,
    /// Servers for idle connections, each with two processes of clients; else as many as their descriptors take.
    #[arg(long, allow_negative_numbers = true, value_parser = whole(1, PROCESSES_MAX))]
    pub processes: Option<usize>,
    /// Pairs of users.
    #[arg(long, allow_negative_numbers = true, value_parser = whole(1, PAIRS_MAX))]
    pub pairs: Option<usize>,
    /// Members of the group besides the sender (1000); of `soak` all of them, of whom six send (6).
    #[arg(long, allow_negative_numbers = true, value_parser = whole(1, limits::GROUP_MEMBERS_MAX))]
    pub members: Option<usize>,
    /// Of those members so many are connected; the others never were. All, if it is not said.
    #[arg(long, allow_negative_numbers = true, value_parser = whole(1, limits::GROUP_MEMBERS_MAX))]
    pub online: Option<usize>,
    /// Closed loop: messages of a sender that are not yet acknowledged and delivered to all.
    #[arg(long, default_value_t = 16, allow_negative_numbers = true, value_parser = whole(1, limits::PENDING_SENDS_MAX as u64))]
    pub window: u64,
    /// Open loop: messages a second, all senders together, scheduled ahead; latency counts from the scheduled moment.
    #[arg(long, allow_negative_numbers = true, value_parser = number(0.001, RATE_MAX))]
    pub rate: Option<f64>,
    /// Seconds between two heartbeats of an idle connection; a server that is started here is told the same.
    #[arg(long, value_name = "S", default_value_t = HEARTBEAT_SECONDS, allow_negative_numbers = true, value_parser = number(ranges::HEARTBEAT_SECONDS[0], ranges::HEARTBEAT_SECONDS[1]))]
    pub heartbeat: f64,
    /// Open loop at this share of what the closed loop reaches, measured first in the same run.
    #[arg(long, value_name = "SHARE", conflicts_with = "rate", allow_negative_numbers = true, value_parser = number(0.001, 10.0))]
    pub rate_of: Option<f64>,
    /// Messages that the store holds before the run, filled in through the server; with --data kept for the next run.
    #[arg(long, value_name = "MESSAGES", default_value_t = 0, conflicts_with = "server", allow_negative_numbers = true, value_parser = whole(0, FILL_MAX))]
    pub fill: u64,
    /// Measure this server first, in the same run: it is the denominator of `ratio`.
    #[arg(long, value_enum, value_name = "PEER")]
    pub peer: Option<Peer>,
    /// Bytes of text in a message.
    #[arg(long, default_value_t = 100, allow_negative_numbers = true, value_parser = whole(1, TEXT_BYTES_MAX))]
    pub body: usize,
    /// Seconds of load before measuring.
    #[arg(long, default_value_t = 2.0, allow_negative_numbers = true, value_parser = number(0.0, HOUR_SECONDS))]
    pub warmup: f64,
    /// Seconds of measuring.
    #[arg(long, default_value_t = 10.0, allow_negative_numbers = true, value_parser = number(0.1, SECONDS_MAX))]
    pub seconds: f64,
    /// Seconds of measuring the ceiling before the run, in memory and durable each; 0: no ceiling, no ratio.
    #[arg(long, default_value_t = 3.0, allow_negative_numbers = true, value_parser = zero_or(0.1, HOUR_SECONDS))]
    pub ceiling: f64,
    /// Run this many times; the median run is reported, with the spread.
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, value_parser = whole(1, 99_u32))]
    pub repeat: u32,
    /// Threads of the generator.
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, value_parser = whole(1, 64_u16))]
    pub generator_threads: u16,
    /// Pin the generator's threads to the first cores.
    #[arg(long)]
    pub pin: bool,
    /// Do not read the histories back after the load.
    #[arg(long)]
    pub no_read_back: bool,
    /// Decides what the harness decides by chance: when to kill.
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, value_parser = whole(0, u64::MAX))]
    pub seed: u64,
    /// Write the report to this file too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the report with its plots to this file: one page that needs nothing else.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

impl Common {
    pub fn warmup(&self) -> Duration {
        Duration::from_secs_f64(self.warmup)
    }

    pub fn time(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    pub fn heartbeat(&self) -> Duration {
        Duration::from_secs_f64(self.heartbeat)
    }

    /// The same for another server, whose data lies beside.
    pub fn with_data_beside(&self, number: usize) -> Self {
        let beside = |data: &PathBuf| {
            let mut name = data.clone().into_os_string();
            name.push(format!("-{number}"));
            PathBuf::from(name)
        };
        Self { data: self.data.as_ref().map(beside), ..self.clone() }
    }

    /// Limits of a single user or connection, which a load test is not about, for a server that is started here.
    pub fn raised(&self) -> Vec<String> {
        RAISED.iter().map(|setting| (*setting).to_owned()).chain(self.also_raised.clone()).collect()
    }

    /// Settings for a server that is started here: those of the options, and the interval of heartbeats.
    pub fn settings(&self) -> Vec<String> {
        let mut settings = Vec::new();
        if self.heartbeat != HEARTBEAT_SECONDS {
            settings.push(format!("gateway.heartbeat_interval={}ms", self.heartbeat().as_millis()));
        }
        settings.extend(self.set.iter().cloned());
        settings
    }

    /// How long a peer beside the product is measured.
    pub fn peer_time(&self) -> Duration {
        self.time()
    }

    /// Where data lies that must be on the same disk as the store.
    pub fn store_parent(&self) -> PathBuf {
        let parent = self.data.as_deref().and_then(|data| data.parent()).filter(|path| !path.as_os_str().is_empty());
        parent.filter(|path| path.is_dir()).map_or_else(std::env::temp_dir, PathBuf::from)
    }

    /// Members of the group besides the sender.
    pub fn members(&self) -> usize {
        self.members.unwrap_or(MEMBERS)
    }

    pub fn threads(&self) -> usize {
        usize::from(self.generator_threads)
    }

    /// Pairs of users, from whichever option says it.
    pub fn pair_count(&self, default: usize) -> usize {
        self.pairs.or(self.connections.map(|connections| connections / 2)).unwrap_or(default).max(1)
    }

    /// What the report says of the options.
    pub fn parameters(&self) -> serde_json::Value {
        serde_json::json!({
            "pairs": self.pairs, "members": self.members(), "online": self.online, "window": self.window, "rate": self.rate,
            "rate_of": self.rate_of, "fill": self.fill, "peer": self.peer, "heartbeat": self.heartbeat,
            "settings": self.settings(),
            "body_bytes": self.body, "warmup": self.warmup, "seconds": self.seconds, "repeat": self.repeat,
            "generator_threads": self.generator_threads, "pin": self.pin, "seed": self.seed,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn every_scenario_has_an_example_that_it_takes() {
        for command in Options::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let example = help.strip_prefix("Example:  ").unwrap_or_else(|| panic!("{} has none", command.get_name()));
            let words: Vec<&str> = example.split(' ').collect();
            assert_eq!(words[..2], ["loadtest", command.get_name()]);
            let parsed = Options::try_parse_from(&words);
            assert!(parsed.is_ok(), "{example}: {}", parsed.unwrap_err());
        }
    }
}
