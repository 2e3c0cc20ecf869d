//! The tree itself: types, defaults, and the list of settings with the reason of each default.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use im_proto::{ShardCount, limits};
use tracing_subscriber::EnvFilter;

use super::setting::{Choice, Setting, Slot};

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

/// Everything that can be configured.
#[derive(Clone, Debug)]
pub struct Config {
    pub data: PathBuf,
    pub tcp: Option<SocketAddr>,
    pub tls: Option<SocketAddr>,
    pub quic: Option<SocketAddr>,
    pub api: Option<SocketAddr>,
    pub http: Option<SocketAddr>,
    pub plaintext: Plaintext,
    pub drain_timeout: Duration,
    pub shards: usize,
    pub token: TokenConfig,
    pub router: RouterTuning,
    pub log: LogConfig,
}

#[derive(Clone, Debug)]
pub struct TokenConfig {
    pub lifetime_max: Duration,
}

/// What of `im_router::RouterConfig` can be configured.
#[derive(Clone, Debug)]
pub struct RouterTuning {
    pub workers: usize,
    pub conversation_queue_max: usize,
    pub opening_queue_max: usize,
    pub opens_max: usize,
    pub dedupe_entries: usize,
    pub quiet_after: Duration,
    pub evict_after: Duration,
    pub append_patience: Duration,
    pub resync_spread: Duration,
    pub link_queue_bytes_max: usize,
    pub sessions_per_user_max: usize,
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
            plaintext: Plaintext::Loopback,
            drain_timeout: Duration::from_secs(10),
            shards: ShardCount::default().get() as usize,
            token: TokenConfig { lifetime_max: Duration::from_secs(30 * 24 * 3600) },
            router: RouterTuning {
                workers: 0,
                conversation_queue_max: 4096,
                opening_queue_max: 4096,
                opens_max: 64,
                dedupe_entries: limits::DEDUPE_ENTRIES,
                quiet_after: Duration::from_secs(60),
                evict_after: Duration::from_secs(300),
                append_patience: Duration::from_secs(15),
                resync_spread: Duration::from_millis(500),
                link_queue_bytes_max: 64 * 1024 * 1024,
                sessions_per_user_max: 64,
            },
            log: LogConfig { filter: "info".to_owned(), format: LogFormat::Text },
        }
    }
}

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

impl Config {
    /// Every setting, in the order of a printed file: those without a table first.
    pub fn settings(&mut self) -> Vec<Setting<'_>> {
        let Self { data, tcp, tls, quic, api, http, plaintext, drain_timeout, shards, token, router, log } = self;
        let mut settings = vec![
            setting(
                "data",
                "Where this server keeps everything: keys, certificate, messages. One server at a time.",
                Slot::Path(data),
            ),
            setting("tcp", "Clients over TCP without TLS.", Slot::Listen(tcp)),
            setting("tls", "Clients over TCP with TLS 1.3.", Slot::Listen(tls)),
            setting("quic", "Clients over QUIC. It is UDP, so it shares its number with tls.", Slot::Listen(quic)),
            setting("api", "gRPC for other services, without TLS.", Slot::Listen(api)),
            setting("http", "/metrics, /healthz and /readyz, without TLS.", Slot::Listen(http)),
            setting(
                "plaintext",
                "Where tcp and api may listen. Tokens pass them readable for everybody on the way, so only this machine by default.",
                Slot::Choice(plaintext),
            ),
            setting(
                "drain_timeout",
                "How long connections get to take what was committed for them before they are cut on shutdown.\n\
                 10 s: the slowest reader gets 1 MiB, its whole outbox, over 1 Mbit/s in 8.4 s; and 30 s is when most supervisors kill.",
                Slot::Duration(drain_timeout, SECOND..=10 * MINUTE),
            ),
            setting(
                "shards",
                "Units of ownership. Fixed when the data directory is created.\n\
                 1024: a cluster of 64 routers still has 16 shards each, so that a lost one is spread over all others.",
                Slot::Count(shards, 1..=65_536),
            ),
            setting(
                "token.lifetime_max",
                "The longest lifetime of a token that is accepted, whatever the token says.\n\
                 30 d: one machine has no service that renews tokens. Where one exists, 1 h.",
                Slot::Duration(&mut token.lifetime_max, MINUTE..=366 * DAY),
            ),
        ];
        settings.extend(router.settings());
        settings.extend(log.settings());
        settings
    }

    /// Settings that are fine one by one and wrong together: the key to blame, and what is wrong.
    pub fn contradictions(&self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        if self.plaintext == Plaintext::Loopback {
            for (key, address) in [("tcp", self.tcp), ("api", self.api)] {
                if let Some(address) = address.filter(|address| !address.ip().is_loopback()) {
                    found.push((key, format!("{key} = \"{address}\" has no TLS and is not this machine alone: use tls, or say plaintext = \"anywhere\"")));
                }
            }
        }
        let streams = [("tcp", self.tcp), ("tls", self.tls), ("api", self.api), ("http", self.http)];
        for (index, (key, address)) in streams.iter().enumerate() {
            let taken = streams[..index].iter().find(|(_, other)| other == address);
            if let (Some(address), Some((other, _))) = (address.filter(|address| address.port() != 0), taken) {
                found.push((*key, format!("{key} = \"{address}\" is also the address of {other}")));
            }
        }
        if self.tcp.or(self.tls).or(self.quic).is_none() {
            found.push(("tcp", "tcp, tls and quic are all off: no client could connect".to_owned()));
        }
        found
    }
}

impl RouterTuning {
    fn settings(&mut self) -> [Setting<'_>; 11] {
        [
            setting(
                "router.workers",
                "Tasks that own shards. 0: one a core, because a worker never waits for anything but its inbox.",
                Slot::Count(&mut self.workers, 0..=256),
            ),
            setting(
                "router.conversation_queue_max",
                "Messages that wait in one conversation; beyond it senders are told to come back later.\n\
                 4096: 32 full batches of 128, about a second of a store that takes 30 ms a batch.",
                Slot::Count(&mut self.conversation_queue_max, limits::BATCH_ROWS_MAX..=1 << 20),
            ),
            setting(
                "router.opening_queue_max",
                "Requests that wait for one conversation to be read from the store.\n\
                 4096: as many as may wait once it is open.",
                Slot::Count(&mut self.opening_queue_max, 16..=1 << 20),
            ),
            setting(
                "router.opens_max",
                "Conversations that a worker reads from the store at a time.\n\
                 64: at 1 ms a read 64,000 a second, and a read never waits behind more than 64 others.",
                Slot::Count(&mut self.opens_max, 1..=4096),
            ),
            setting(
                "router.dedupe_entries",
                "Newest entries of an open conversation whose ids are kept in memory, to find repeated sends without the store.\n\
                 1024: four sessions with the full 256 unacknowledged sends each. 24 B each, 24 KiB a conversation.",
                Slot::Count(&mut self.dedupe_entries, 256..=65_536),
            ),
            setting(
                "router.quiet_after",
                "Without an entry for this long a conversation writes its head row, so that later reads need no search.\n\
                 60 s: longer than a pause between two messages, so that one write serves a whole talk.",
                Slot::Duration(&mut self.quiet_after, SECOND..=HOUR),
            ),
            setting(
                "router.evict_after",
                "A quiet conversation leaves memory after this long.\n\
                 5 m: people come back to a talk within minutes; opening it again costs one read.",
                Slot::Duration(&mut self.evict_after, SECOND..=DAY),
            ),
            setting(
                "router.append_patience",
                "A batch that the store has not confirmed for this long is given up and its senders are told to try again.\n\
                 15 s: longer than any stall of a disk that recovers, shorter than a person's patience with a spinner.",
                Slot::Duration(&mut self.append_patience, SECOND..=5 * MINUTE),
            ),
            setting(
                "router.resync_spread",
                "After lost live pushes clients wait a random part of this before they sync.\n\
                 500 ms: 10,000 clients make 20,000 syncs a second, and nobody notices half a second.",
                Slot::Duration(&mut self.resync_spread, MILLISECOND..=MINUTE),
            ),
            setting(
                "router.link_queue_bytes_max",
                "Bytes that wait for a gateway before live pushes to it are dropped and its sessions told to sync.\n\
                 64 MiB: half a second of 1 Gbit/s.",
                Slot::Bytes(&mut self.link_queue_bytes_max, MIB..=1024 * MIB),
            ),
            setting(
                "router.sessions_per_user_max",
                "Sessions of one user at a time; the oldest has to go.\n\
                 64: a person has a handful, a bot one a process; every message to the user costs one copy each.",
                Slot::Count(&mut self.sessions_per_user_max, 1..=4096),
            ),
        ]
    }
}

impl LogConfig {
    fn settings(&mut self) -> [Setting<'_>; 2] {
        [
            setting(
                "log.filter",
                "What is logged on standard error: a level, or TARGET=LEVEL divided by commas.\n\
                 info: starts, stops and what a person must know; a client that vanishes is debug.",
                Slot::Text(&mut self.filter, "a filter such as info or im_router=debug,info", |text| {
                    !text.is_empty() && EnvFilter::try_new(text).is_ok()
                }),
            ),
            setting(
                "log.format",
                "text for people, json for collectors: one object a line.",
                Slot::Choice(&mut self.format),
            ),
        ]
    }
}

fn setting<'a>(key: &'static str, comment: &'static str, slot: Slot<'a>) -> Setting<'a> {
    Setting { key, comment, slot }
}
