//! The tree itself: types, defaults, and the list of settings with the reason of each default.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use im_gateway::GatewayConfig;
use im_proto::ShardCount;
use tracing_subscriber::EnvFilter;

use super::{
    cluster::{self, ClusterConfig},
    roles::{self, RouterTuning},
    setting::{Choice, Setting, Slot},
    store::{self, StoreConfig},
};

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($variant),* }

        impl Choice for $name {
            fn words(&self) -> &'static [&'static str] {
                &[$($word),*]
            }

            fn word(&self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }

            fn choose(&mut self, word: &str) -> bool {
                match word {
                    $($word => *self = Self::$variant,)*
                    _ => return false,
                }
                true
            }
        }
    };
}

choice! {
    /// Where listeners without TLS may listen.
    Plaintext { Loopback = "loopback", Anywhere = "anywhere" }
}

choice! {
    /// How log lines look.
    LogFormat { Text = "text", Json = "json" }
}

/// Which process a configuration is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// Everything in one.
    Up,
    Router,
    Gateway,
    /// A command that does something and ends.
    Tool,
}

/// Everything that can be configured.
#[derive(Clone, Debug)]
pub struct Config {
    pub data: PathBuf,
    pub tcp: Option<SocketAddr>,
    pub tls: Option<SocketAddr>,
    pub quic: Option<SocketAddr>,
    pub api: Option<SocketAddr>,
    pub http: Option<SocketAddr>,
    pub link: Option<SocketAddr>,
    pub plaintext: Plaintext,
    pub advertise: String,
    pub drain_window: Duration,
    pub drain_timeout: Duration,
    pub shards: usize,
    pub cluster: ClusterConfig,
    pub token: TokenConfig,
    pub gateway: GatewayConfig,
    pub router: RouterTuning,
    pub store: StoreConfig,
    pub log: LogConfig,
}

#[derive(Clone, Debug)]
pub struct TokenConfig {
    pub lifetime_max: Duration,
}

#[derive(Clone, Debug)]
pub struct LogConfig {
    pub filter: String,
    pub format: LogFormat,
}

impl Default for Config {
    fn default() -> Self {
        let local = |port| Some(SocketAddr::from(([127, 0, 0, 1], port)));
        Self {
            data: PathBuf::from("./data"),
            tcp: local(7100),
            tls: local(7101),
            quic: local(7101),
            api: local(7102),
            http: local(7103),
            link: local(7104),
            plaintext: Plaintext::Loopback,
            advertise: String::new(),
            drain_window: Duration::from_secs(1),
            drain_timeout: Duration::from_secs(10),
            shards: ShardCount::default().get() as usize,
            cluster: ClusterConfig::default(),
            token: TokenConfig { lifetime_max: Duration::from_secs(30 * 24 * 3600) },
            gateway: GatewayConfig::new(""),
            router: RouterTuning::default(),
            store: StoreConfig::default(),
            log: LogConfig { filter: "info,fjall=warn,lsm_tree=warn,scylla=error".to_owned(), format: LogFormat::Text },
        }
    }
}

pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const MINUTE: Duration = Duration::from_secs(60);
pub(super) const HOUR: Duration = Duration::from_secs(3600);
pub(super) const DAY: Duration = Duration::from_secs(86_400);

impl Config {
    /// Every setting, in the order of a printed file: those without a table first.
    pub fn settings(&mut self) -> Vec<Setting<'_>> {
        let Self {
            data,
            tcp,
            tls,
            quic,
            api,
            http,
            link,
            plaintext,
            advertise,
            drain_window,
            drain_timeout,
            shards,
            cluster,
            token,
            gateway,
            router,
            store,
            log,
        } = self;
        let mut settings = vec![
            setting(
                "data",
                "Where this server keeps everything: keys, certificate, messages. One server at a time.",
                Slot::Path(data),
            ),
            setting("tcp", "Clients over TCP without TLS.", Slot::Listen(tcp)),
            setting("tls", "Clients over TCP with TLS 1.3.", Slot::Listen(tls)),
            setting("quic", "Clients over QUIC. It is UDP, so it shares its number with tls.", Slot::Listen(quic)),
            setting(
                "api",
                "gRPC for other services. Without TLS, unless a cluster has service certificates.",
                Slot::Listen(api),
            ),
            setting("http", "/metrics, /healthz and /readyz, without TLS.", Slot::Listen(http)),
            setting(
                "link",
                "Gateways and other routers, to a router of a cluster; imd up does not listen there.",
                Slot::Listen(link),
            ),
            setting(
                "plaintext",
                "Where tcp and api may listen. Tokens pass them readable for everybody on the way, so only this machine by default.",
                Slot::Choice(plaintext),
            ),
            setting(
                "advertise",
                "The host name or address by which others reach this process: clients a gateway, gateways a router.\n\
                 Empty: the address listened on, which is right for one machine.",
                Slot::Text(advertise, "a host without port, or nothing", |text| {
                    text.len() <= 253 && text.chars().all(|c| c.is_ascii_alphanumeric() || "-.:[]".contains(c))
                }),
            ),
        ];
        settings.extend(lasting(drain_window, drain_timeout, shards));
        settings.extend(cluster::settings(cluster));
        settings.push(setting(
            "token.lifetime_max",
            "The longest lifetime of a token that is accepted, whatever the token says.\n\
             30 d: one machine has no service that renews tokens. imd router has 1 h, for clusters have one.",
            Slot::Duration(&mut token.lifetime_max, MINUTE..=366 * DAY),
        ));
        settings.extend(roles::gateway(gateway));
        settings.extend(roles::router(router));
        settings.extend(store::settings(store));
        settings.extend(log.settings());
        settings
    }

    /// The defaults of a process.
    pub fn of(process: Process) -> Self {
        let mut config = Self::default();
        if process == Process::Router {
            config.token.lifetime_max = HOUR;
        }
        config
    }

    /// Settings that are fine one by one and wrong together: the key to blame, and what is wrong.
    pub fn contradictions(&self, process: Process) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let (tcp, tls, api, http) = (("tcp", self.tcp), ("tls", self.tls), ("api", self.api), ("http", self.http));
        let streams: &[_] = match process {
            Process::Up => &[tcp, tls, api, http],
            Process::Router => &[api, http, ("link", self.link)],
            Process::Gateway => &[tcp, tls, http],
            Process::Tool => return found,
        };
        for (index, (key, address)) in streams.iter().enumerate() {
            let taken = streams[..index].iter().find(|(_, other)| other == address);
            if let (Some(address), Some((other, _))) = (address.filter(|address| address.port() != 0), taken) {
                found.push((*key, format!("{key} = \"{address}\" is also the address of {other}")));
            }
        }
        // With service certificates the api of a router needs none of this; the router looks at that itself.
        let plain = streams.iter().filter(|(key, _)| *key == "tcp" || (*key == "api" && process == Process::Up));
        for (key, address) in plain.filter(|_| self.plaintext == Plaintext::Loopback) {
            if let Some(address) = address.filter(|address| !address.ip().is_loopback()) {
                found.push((*key, format!("{key} = \"{address}\" has no TLS and is not this machine alone: use tls, or say plaintext = \"anywhere\"")));
            }
        }
        if process != Process::Router && self.tcp.or(self.tls).or(self.quic).is_none() {
            found.push(("tcp", "tcp, tls and quic are all off: no client could connect".to_owned()));
        }
        self.cluster.contradictions(process, &mut found);
        found
    }
}

fn lasting<'a>(
    drain_window: &'a mut Duration,
    drain_timeout: &'a mut Duration,
    shards: &'a mut usize,
) -> [Setting<'a>; 3] {
    [
        setting(
            "drain_window",
            "Over how long clients are told to leave on shutdown, so that they do not come back elsewhere as one wave.\n\
             1 s: 10,000 clients make 10,000 connects a second, and Ctrl-C is not held up.",
            Slot::Duration(drain_window, Duration::ZERO..=10 * MINUTE),
        ),
        setting(
            "drain_timeout",
            "After that, how long the whole shutdown may take before what is left is cut.\n\
             10 s: the slowest reader gets 1 MiB, its whole outbox, over 1 Mbit/s in 8.4 s; and 30 s is when most supervisors kill.",
            Slot::Duration(drain_timeout, SECOND..=10 * MINUTE),
        ),
        setting(
            "shards",
            "Units of ownership. Fixed when the data directory is created.\n\
             1024: a cluster of 64 routers still has 16 shards each, so that a lost one is spread over all others.",
            Slot::Count(shards, 1..=65_536),
        ),
    ]
}

/// Written out, for who mistakes a level.
const LOG_FILTER: &str =
    "a filter such as info or im_router=debug,info, with the levels off, error, warn, info, debug, trace";

impl LogConfig {
    fn settings(&mut self) -> [Setting<'_>; 2] {
        [
            setting(
                "log.filter",
                "What is logged on standard error: a level (off, error, warn, info, debug, trace), or\n\
                 TARGET=LEVEL divided by commas.\n\
                 info: starts, stops and what a person must know; a client that vanishes is debug. The engines of\n\
                 stores speak when something is wrong.",
                Slot::Text(&mut self.filter, LOG_FILTER, |text| !text.is_empty() && EnvFilter::try_new(text).is_ok()),
            ),
            setting(
                "log.format",
                "text for people, json for collectors: one object a line.",
                Slot::Choice(&mut self.format),
            ),
        ]
    }
}

pub(super) fn setting<'a>(key: &'static str, comment: &'static str, slot: Slot<'a>) -> Setting<'a> {
    Setting { key, comment, slot }
}
