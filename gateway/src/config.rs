//! What a gateway can be told. Every bound has a default with the arithmetic behind it.

use std::time::Duration;

use im_proto::limits;

/// Settings of a gateway.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// The cluster, as tokens and links name it.
    pub cluster_id: String,
    /// Connections at once; more are told to go away. 100,000 idle ones take about 250 MB of gateway
    /// and router memory over TCP (2.5 KiB each), 650 MB with TLS.
    pub connections_max: usize,
    /// Connections before their `Welcome`, TLS handshakes included. 10,000 of them may hold 64 KiB each: 640 MB at worst.
    pub handshakes_max: usize,
    /// From the first byte to `Welcome`.
    pub handshake_deadline: Duration,
    /// A client that sent nothing for this long sends a heartbeat. One of whom nothing came for one and a half times this is asked, and
    /// given up after two and a half times.
    pub heartbeat_interval: Duration,
    /// A frame before `Welcome`, in bytes.
    pub frame_bytes_max_before_hello: usize,
    /// A frame after `Welcome`, in bytes.
    pub frame_bytes_max: usize,
    /// Sends of a session that have no answer yet.
    pub pending_sends_max: usize,
    /// Calls of a connection that have no answer yet.
    pub calls_in_flight_max: usize,
    /// Sends of a session in one second; 0 is no limit. As all rates here: a whole second's worth may come at once after a pause.
    /// 5,000 is a file piped at full speed, and a fiftieth of what two cores carry.
    pub sends_per_second_max: u32,
    /// Sends of a user in one second, all its sessions on this gateway together; 0 is no limit. Two devices at their limit.
    pub user_sends_per_second_max: u32,
    /// Frames of a connection in one second, beyond which it is not read for a while; 0 is no limit. The default is four times the
    /// sends, and keeps one connection from filling a core.
    pub frames_per_second_max: u32,
    /// Bytes of a connection in one second, beyond which it is not read for a while; 0 is no limit. The default is 67 Mbit/s.
    pub bytes_per_second_max: usize,
    /// Connects of one address (IPv4, or IPv6 network of 64 bits) in one second; 0 is no limit. Limits of an address do not hold for
    /// the machine itself, unless `address_limits_loopback`. 50: an office of 1,000 that comes back in twenty
    /// seconds, and a hundredth of two cores for the TLS handshakes of one address (docs/performance.md).
    pub address_connects_per_second_max: u32,
    /// Connections of one address at a time; 0 is no limit. A tenth of all, for networks that share one address among thousands.
    pub address_connections_max: usize,
    /// Handshakes of one address in one second that lead to nothing by its own fault; beyond that it may not connect for a while.
    /// 0 is no limit. 10: a thousand clients of one address with expired tokens and a back-off of 10 s are ten times that, and are
    /// let in slowly.
    pub address_failures_per_second_max: u32,
    /// Whether limits of an address hold for the machine itself: behind a proxy on it, say.
    pub address_limits_loopback: bool,
    /// The share of all cores for connections that are not welcomed yet, in percent; what is beyond it waits. 100 is no bound. 25:
    /// of two cores some 2,000 TLS handshakes a second, and users that are in keep three quarters.
    pub handshake_cpu_percent: usize,
    /// `Locate` of one address before `Hello` in one second; 0 is no limit. Not for the machine itself.
    pub locates_per_second_max: u32,
    /// Bytes that wait to be written to one connection. Beyond them live pushes are dropped and end in a `Resync`; at twice this
    /// much the connection is closed. 1 MiB is 10,000 short messages.
    pub outbox_bytes_max: usize,
    /// Bytes of replies that wait to be written to one connection, beyond which calls are answered `overloaded`. One reply may be
    /// larger. 4 MiB is four history pages of 1,000 entries of 1 KiB.
    pub reply_bytes_max: usize,
    /// Over how long clients spread their sync after a `Resync` that concerns one of them.
    pub resync_spread_one: Duration,
    /// The same after a `Resync` that concerns all sessions of a link: 100,000 syncs over 10 s are 10,000 a second.
    pub resync_spread_all: Duration,
    /// How long a connection that was told `Close` may take to read it.
    pub close_linger: Duration,
    /// Bytes of unacknowledged batches that each link keeps for a replay. 16 MiB is a second of 100,000 short sends.
    pub link_replay_bytes_max: usize,
    /// Messages that wait for a link beyond which ephemeral ones are dropped.
    pub link_queue_messages_max: usize,
    /// The first pause before a link is dialled again; it doubles, with jitter, up to `link_backoff_max`.
    pub link_backoff_min: Duration,
    pub link_backoff_max: Duration,
    /// The longest time for dialling a router and for its hello.
    pub link_dial_timeout: Duration,
    /// How long a send that was returned by a router waits, unless the owner changes sooner.
    pub send_retry_delay: Duration,
    /// How often each router is told the load.
    pub load_interval: Duration,
    /// After the window of a drain, how long connections may wait for answers to what they sent.
    pub drain_grace: Duration,
}

impl GatewayConfig {
    /// The defaults.
    pub fn new(cluster_id: impl Into<String>) -> Self {
        Self {
            cluster_id: cluster_id.into(),
            connections_max: 100_000,
            handshakes_max: 10_000,
            handshake_deadline: Duration::from_secs(10),
            heartbeat_interval: Duration::from_secs(30),
            frame_bytes_max_before_hello: limits::FRAME_BYTES_MAX_BEFORE_HELLO,
            frame_bytes_max: limits::FRAME_BYTES_MAX,
            pending_sends_max: limits::PENDING_SENDS_MAX,
            calls_in_flight_max: limits::CALLS_IN_FLIGHT_MAX,
            sends_per_second_max: 5_000,
            user_sends_per_second_max: 10_000,
            frames_per_second_max: 20_000,
            bytes_per_second_max: 8 * 1024 * 1024,
            address_connects_per_second_max: 50,
            address_connections_max: 10_000,
            address_failures_per_second_max: 10,
            address_limits_loopback: false,
            handshake_cpu_percent: 25,
            locates_per_second_max: 10,
            outbox_bytes_max: 1024 * 1024,
            reply_bytes_max: 4 * 1024 * 1024,
            resync_spread_one: Duration::from_secs(1),
            resync_spread_all: Duration::from_secs(10),
            close_linger: Duration::from_secs(2),
            link_replay_bytes_max: 16 * 1024 * 1024,
            link_queue_messages_max: 65_536,
            link_backoff_min: Duration::from_millis(50),
            link_backoff_max: Duration::from_secs(5),
            link_dial_timeout: Duration::from_secs(5),
            send_retry_delay: Duration::from_millis(100),
            load_interval: Duration::from_secs(1),
            drain_grace: Duration::from_secs(5),
        }
    }
}
