//! What of the roles' own configurations can be configured. The defaults of the gateway are the gateway's own.

use std::time::Duration;

use im_gateway::GatewayConfig;
use im_proto::limits;
use im_router::RouterConfig;

use super::{
    setting::{Setting, Slot},
    tree::{DAY, HOUR, MINUTE, SECOND, setting},
};

const MILLISECOND: Duration = Duration::from_millis(1);
const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// What of a router's configuration can be configured; keys and names are not.
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
    pub user_sends_max: u32,
    pub user_call_cost_max: u32,
}

impl Default for RouterTuning {
    fn default() -> Self {
        Self {
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
            user_sends_max: 100_000,
            user_call_cost_max: 20_000,
        }
    }
}

impl RouterTuning {
    /// A router's configuration with these settings.
    pub fn tune(&self, token_lifetime_max: Duration, config: RouterConfig) -> RouterConfig {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        RouterConfig {
            token_lifetime_max,
            workers: if self.workers == 0 { cores() } else { self.workers },
            conversation_queue_max: self.conversation_queue_max,
            opening_queue_max: self.opening_queue_max,
            opens_max: self.opens_max,
            dedupe_entries: self.dedupe_entries,
            quiet_after: self.quiet_after,
            evict_after: self.evict_after,
            append_patience: self.append_patience,
            resync_spread: self.resync_spread,
            link_queue_bytes_max: self.link_queue_bytes_max,
            sessions_per_user_max: self.sessions_per_user_max,
            user_sends_max: self.user_sends_max,
            user_call_cost_max: self.user_call_cost_max,
            ..config
        }
    }
}

/// What can be told a gateway.
#[expect(clippy::too_many_lines, reason = "a list, not a procedure")]
pub fn gateway(config: &mut GatewayConfig) -> [Setting<'_>; 29] {
    [
        setting(
            "gateway.connections_max",
            "Connections at once; more are told to go away. 100,000 idle ones take about 250 MB of gateway and router memory over TCP (2.5 KiB each), 650 MB with TLS.",
            Slot::Count(&mut config.connections_max, 1..=10_000_000),
        ),
        setting(
            "gateway.handshakes_max",
            "Connections that are not welcomed yet, TLS handshakes included.\n\
             10,000: each may hold 64 KiB, 640 MB at worst.",
            Slot::Count(&mut config.handshakes_max, 1..=1_000_000),
        ),
        setting(
            "gateway.handshake_deadline",
            "From the first byte of a connection to its welcome.\n\
             10 s: four round trips of a phone with 1 s each, and as much again.",
            Slot::Duration(&mut config.handshake_deadline, SECOND..=5 * MINUTE),
        ),
        setting(
            "gateway.heartbeat_interval",
            "A client that sent nothing for this long sends a heartbeat. One of whom nothing came for one and a half times this is asked, and given up after two and a half times.\n\
             30 s: below the 60 s after which many home routers forget a connection; 100,000 clients make 3,300 heartbeats a second.",
            Slot::Duration(&mut config.heartbeat_interval, SECOND..=30 * MINUTE),
        ),
        setting(
            "gateway.frame_bytes_max_before_hello",
            "A frame of a client that is not authenticated yet. 64 KiB: sixteen times the largest token seen.",
            Slot::Bytes(&mut config.frame_bytes_max_before_hello, 4 * KIB..=MIB),
        ),
        setting(
            "gateway.frame_bytes_max",
            "A frame of an authenticated client. 1 MiB: a call with 1,000 members of 64 bytes, or a body of 64 KiB, many times over.\n\
             At most 8 MiB: with what shares its batch it must fit into an item of a link (16 MiB), or the link breaks for ever.",
            Slot::Bytes(&mut config.frame_bytes_max, 128 * KIB..=8 * MIB),
        ),
        setting(
            "gateway.pending_sends_max",
            "Sends of a session that have no answer yet; more are answered overloaded.\n\
             256: at 1 ms a commit, 256,000 messages a second of one session.",
            Slot::Count(&mut config.pending_sends_max, 1..=limits::PENDING_SENDS_MAX),
        ),
        setting(
            "gateway.calls_in_flight_max",
            "Calls of a connection that have no answer yet. 16: a client that catches up reads that many conversations at a time.",
            Slot::Count(&mut config.calls_in_flight_max, 1..=limits::CALLS_IN_FLIGHT_MAX),
        ),
        setting(
            "gateway.sends_per_second_max",
            "Sends of a session in one second, a whole second's worth at once after a pause; more are answered rate limited.\n\
             5,000: a file piped at full speed, and a fiftieth of what two cores carry. 0: no limit.",
            Slot::Rate(&mut config.sends_per_second_max, 0..=10_000_000),
        ),
        setting(
            "gateway.user_sends_per_second_max",
            "The same for all sessions of a user on this gateway together. 10,000: two devices at their limit. 0: no limit.",
            Slot::Rate(&mut config.user_sends_per_second_max, 0..=10_000_000),
        ),
        setting(
            "gateway.locates_per_second_max",
            "Locate of one address before Hello in one second, not counted for the machine itself; 0 is no limit.\n\
             10: a start of the client takes one.",
            Slot::Rate(&mut config.locates_per_second_max, 0..=1_000_000),
        ),
        setting(
            "gateway.frames_per_second_max",
            "Frames of a connection in one second, beyond which it is not read until the rate allows; 0 is no limit.\n\
             20,000: four times the sends, and a tenth of what fills a core.",
            Slot::Rate(&mut config.frames_per_second_max, 0..=10_000_000),
        ),
        setting(
            "gateway.bytes_per_second_max",
            "Bytes from a connection in one second, beyond which it is not read until the rate allows; 0B is no limit.\n\
             8 MiB: 67 Mbit/s, or 128 of the largest messages.",
            Slot::Bytes(&mut config.bytes_per_second_max, 0..=1024 * MIB),
        ),
        setting(
            "gateway.address_connects_per_second_max",
            "Connects of one address (IPv4, or IPv6 network of 64 bits) in one second; 0 is no limit.\n\
             50: an office of 1,000 comes back within twenty seconds; so many TLS handshakes that one address begins\n\
             are not felt by others.",
            Slot::Rate(&mut config.address_connects_per_second_max, 0..=1_000_000),
        ),
        setting(
            "gateway.address_connections_max",
            "Connections of one address at a time; 0 is no limit.\n\
             10,000: a tenth of all, for networks in which thousands share one address.",
            Slot::Count(&mut config.address_connections_max, 0..=10_000_000),
        ),
        setting(
            "gateway.address_failures_per_second_max",
            "Handshakes of one address in one second that fail by its own fault, beyond which it may not connect for a while; 0 is no limit.\n\
             10: 100 clients of one address with an expired token, each of which tries again every ten seconds.",
            Slot::Rate(&mut config.address_failures_per_second_max, 0..=1_000_000),
        ),
        setting(
            "gateway.address_limits_loopback",
            "Whether limits of an address hold for the machine itself too. false: tests and proxies on it stand for many.",
            Slot::Flag(&mut config.address_limits_loopback),
        ),
        setting(
            "gateway.handshake_cpu_percent",
            "The share of all cores for connections that are not welcomed yet; what is beyond it waits. 100: no bound.\n\
             25: of two cores some 2,000 TLS handshakes a second, and three quarters stay for users who are in.",
            Slot::Count(&mut config.handshake_cpu_percent, 1..=100),
        ),
        setting(
            "gateway.outbox_bytes_max",
            "Bytes that wait for one connection before live pushes to it are dropped and it is told to sync.\n\
             1 MiB: 10,000 short messages. At twice this much the connection is closed.",
            Slot::Bytes(&mut config.outbox_bytes_max, 64 * KIB..=64 * MIB),
        ),
        setting(
            "gateway.reply_bytes_max",
            "Bytes of replies that wait for one connection, beyond which calls are answered overloaded.\n\
             4 MiB: four history pages of 1,000 entries of 1 KiB.",
            Slot::Bytes(&mut config.reply_bytes_max, 64 * KIB..=256 * MIB),
        ),
        setting(
            "gateway.resync_spread_one",
            "Over how long clients spread their sync after something that concerns one of them.\n\
             1 s: nobody notices, and a burst of them becomes a stream.",
            Slot::Duration(&mut config.resync_spread_one, MILLISECOND..=MINUTE),
        ),
        setting(
            "gateway.resync_spread_all",
            "The same after something that concerns all sessions of a link. 10 s: 100,000 syncs become 10,000 a second.",
            Slot::Duration(&mut config.resync_spread_all, MILLISECOND..=10 * MINUTE),
        ),
        setting(
            "gateway.close_linger",
            "How long a connection that was told to close may take to read that. 2 s: one retransmission on a bad line.",
            Slot::Duration(&mut config.close_linger, MILLISECOND..=MINUTE),
        ),
        setting(
            "gateway.link_replay_bytes_max",
            "Unacknowledged batches that each link keeps to send them again. 16 MiB: a second of 100,000 short sends.",
            Slot::Bytes(&mut config.link_replay_bytes_max, MIB..=1024 * MIB),
        ),
        setting(
            "gateway.link_queue_messages_max",
            "Messages that wait for a link beyond which ephemeral ones are dropped. 65,536: half a second of a busy gateway.",
            Slot::Count(&mut config.link_queue_messages_max, 1024..=1 << 24),
        ),
        setting(
            "gateway.link_dial_timeout",
            "The longest time for reaching a router. 5 s: half a lease, so that a dead router is not waited for twice.",
            Slot::Duration(&mut config.link_dial_timeout, 100 * MILLISECOND..=MINUTE),
        ),
        setting(
            "gateway.send_retry_delay",
            "How long a send that a router gave back waits, unless the owner changes sooner. 100 ms: some ten tries in a failover.",
            Slot::Duration(&mut config.send_retry_delay, MILLISECOND..=10 * SECOND),
        ),
        setting(
            "gateway.load_interval",
            "How often routers are told how full this gateway is. 1 s: placement is exact to a second's worth of connects.",
            Slot::Duration(&mut config.load_interval, 100 * MILLISECOND..=MINUTE),
        ),
        setting(
            "gateway.drain_grace",
            "After the window of a drain, how long connections may wait for answers to what they sent.\n\
             5 s: many commits, less than what supervisors wait before they kill.",
            Slot::Duration(&mut config.drain_grace, 100 * MILLISECOND..=5 * MINUTE),
        ),
    ]
}

/// What can be told a router.
#[expect(clippy::too_many_lines, reason = "a list, not a procedure")]
pub fn router(tuning: &mut RouterTuning) -> [Setting<'_>; 13] {
    [
        setting(
            "router.workers",
            "Tasks that own shards. 0: one a core, because a worker never waits for anything but its inbox.",
            Slot::Count(&mut tuning.workers, 0..=256),
        ),
        setting(
            "router.conversation_queue_max",
            "Messages that wait in one conversation; beyond it senders are told to come back later.\n\
             4096: 32 full batches of 128, about a second of a store that takes 30 ms a batch.",
            Slot::Count(&mut tuning.conversation_queue_max, limits::BATCH_ROWS_MAX..=1 << 20),
        ),
        setting(
            "router.opening_queue_max",
            "Requests that wait for one conversation to be read from the store.\n\
             4096: as many as may wait once it is open.",
            Slot::Count(&mut tuning.opening_queue_max, 16..=1 << 20),
        ),
        setting(
            "router.opens_max",
            "Conversations that a worker reads from the store at a time.\n\
             64: at 1 ms a read 64,000 a second, and a read never waits behind more than 64 others.",
            Slot::Count(&mut tuning.opens_max, 1..=4096),
        ),
        setting(
            "router.dedupe_entries",
            "Newest entries of an open conversation whose ids are kept in memory, to find repeated sends without the store.\n\
             1024: four sessions with the full 256 unacknowledged sends each. 24 B each, 24 KiB a conversation.",
            Slot::Count(&mut tuning.dedupe_entries, 256..=65_536),
        ),
        setting(
            "router.quiet_after",
            "Without an entry for this long a conversation writes its head row, so that later reads need no search.\n\
             60 s: longer than a pause between two messages, so that one write serves a whole talk.",
            Slot::Duration(&mut tuning.quiet_after, SECOND..=HOUR),
        ),
        setting(
            "router.evict_after",
            "A quiet conversation leaves memory after this long.\n\
             5 m: people come back to a talk within minutes; opening it again costs one read.",
            Slot::Duration(&mut tuning.evict_after, SECOND..=DAY),
        ),
        setting(
            "router.append_patience",
            "A batch that the store has not confirmed for this long is given up and its senders are told to try again.\n\
             15 s: longer than any stall of a disk that recovers, shorter than a person's patience with a spinner.",
            Slot::Duration(&mut tuning.append_patience, SECOND..=5 * MINUTE),
        ),
        setting(
            "router.resync_spread",
            "After lost live pushes clients wait a random part of this before they sync.\n\
             500 ms: 10,000 clients make 20,000 syncs a second, and nobody notices half a second.",
            Slot::Duration(&mut tuning.resync_spread, MILLISECOND..=MINUTE),
        ),
        setting(
            "router.link_queue_bytes_max",
            "Bytes that wait for a gateway before live pushes to it are dropped and its sessions told to sync.\n\
             64 MiB: half a second of 1 Gbit/s.",
            Slot::Bytes(&mut tuning.link_queue_bytes_max, MIB..=1024 * MIB),
        ),
        setting(
            "router.sessions_per_user_max",
            "Sessions of one user at a time; one more is refused as overloaded.\n\
             64: a person has a handful, a bot one a process; every message to the user costs one copy each.",
            Slot::Count(&mut tuning.sessions_per_user_max, 1..=4096),
        ),
        setting(
            "router.user_sends_max",
            "Messages of one user in ten seconds, in the whole cluster (counted in Redis); more are answered rate limited. 0: no limit.\n\
             100,000: ten seconds of what one gateway lets a user send. 200 would suit people: nobody types faster.",
            Slot::Rate(&mut tuning.user_sends_max, 0..=1_000_000),
        ),
        setting(
            "router.user_call_cost_max",
            "The cost of one user's calls in ten seconds, in the whole cluster; what a call costs is in the method table. 0: no limit.\n\
             20,000: a first sync of 5,000 conversations with the history of each takes 5,100, and four devices may do so at once.",
            Slot::Rate(&mut tuning.user_call_cost_max, 0..=1_000_000),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Keys and defaults of the table behind a heading of docs/limits.md.
    fn documented(prefix: &str) -> BTreeMap<String, String> {
        let text = include_str!("../../../docs/limits.md");
        let header = format!("| key (`{prefix}.`) |");
        let table = text.lines().skip_while(|line| !line.starts_with(&header)).take_while(|line| line.starts_with('|'));
        let rows = table.filter_map(|line| line.strip_prefix("| `"));
        rows.filter_map(|row| {
            let mut cells = row.split(" | ");
            Some((format!("{prefix}.{}", cells.next()?.trim_end_matches('`')), cells.next()?.to_owned()))
        })
        .collect()
    }

    #[test]
    fn the_table_of_limits_says_what_is_configured() {
        let (mut config, mut tuning) = (GatewayConfig::new(""), RouterTuning::default());
        let gateway = gateway(&mut config).map(|setting| (setting.key.to_owned(), setting.slot.to_string()));
        let router = router(&mut tuning).map(|setting| (setting.key.to_owned(), setting.slot.to_string()));
        for (prefix, settings) in [("gateway", Vec::from(gateway)), ("router", Vec::from(router))] {
            let (settings, documented) = (BTreeMap::from_iter(settings), documented(prefix));
            assert!(!documented.is_empty(), "docs/limits.md has no table for {prefix}");
            for (key, default) in &documented {
                assert_eq!(settings.get(key), Some(default), "{key}");
            }
            let is_limit = |key: &&String| {
                let ends = ["per_second_max", "connections_max", "_sends_max", "_cost_max", "_user_max"];
                ends.iter().any(|end| key.ends_with(end))
            };
            for key in settings.keys().filter(is_limit) {
                assert!(documented.contains_key(key), "docs/limits.md has no row for {key}");
            }
        }
    }

    #[test]
    fn limits_of_users_are_on_by_default_in_the_library_and_the_command_alike() {
        use im_proto::{
            BootId, InstanceId,
            key::{ClusterSecret, RouterSecret},
        };
        let (cluster, router) = (ClusterSecret::new([7; 32]), RouterSecret::new([9; 32]));
        let config = RouterConfig::new(InstanceId::parse("r").unwrap(), BootId(1), cluster, router);
        let tuning = RouterTuning::default();
        assert_eq!(
            (tuning.user_sends_max, tuning.user_call_cost_max),
            (config.user_sends_max, config.user_call_cost_max)
        );
        let per_second = GatewayConfig::new("").user_sends_per_second_max;
        assert_eq!(tuning.user_sends_max, 10 * per_second, "ten seconds of what one gateway lets a user send");
    }
}
