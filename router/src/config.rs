//! What a router can be told. Each default carries its reason.

use std::time::Duration;

use im_proto::{
    BootId, InstanceId, ShardCount,
    key::{ClusterSecret, RouterSecret},
    limits,
    token::VerifyKey,
    v1,
};
use im_storage::Hot;

/// Configuration of a router.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    pub instance: InstanceId,
    pub boot: BootId,
    pub cluster_id: String,
    pub shards: ShardCount,
    /// The generation that this router was started with; it stops when the store shows another.
    pub generation: u64,
    pub cluster_secret: ClusterSecret,
    pub router_secret: RouterSecret,
    pub verify_keys: Vec<VerifyKey>,
    pub issuer: String,
    /// The longest lifetime of a token that is accepted: 30 days suits one machine, clusters set 1 hour.
    pub token_lifetime_max: Duration,
    /// Tasks that own shards; one a core, at least one.
    pub workers: usize,
    /// Time without renewal after which others may take this router's shards.
    pub lease_ttl: Duration,
    /// Assigned entries that wait in one conversation. 4,096 is 32 full batches: about a second of a store with 30 ms a batch.
    pub conversation_queue_max: usize,
    /// Requests that wait for one conversation to be opened.
    pub opening_queue_max: usize,
    /// Opens at a time, for each worker: enough to hide the store's latency, few enough not to bury it after a failover.
    pub opens_max: usize,
    /// Entries whose client message ids are kept in memory, for each open conversation.
    pub dedupe_entries: usize,
    /// A conversation without an entry for this long writes its head row and gives up its busy row.
    pub quiet_after: Duration,
    /// A quiet conversation leaves memory after this long.
    pub evict_after: Duration,
    /// A batch that the store did not confirm for this long is given up by raising the epoch.
    pub append_patience: Duration,
    /// How long the store may take to answer a call; then it counts as unconfirmed and is tried again. Far above what a store takes that
    /// works, and below the patience with a batch, so that each batch is tried twice.
    pub store_timeout: Duration,
    /// How long an answer of another router is waited for.
    pub peer_timeout: Duration,
    /// Clients spread their sync over this after a resync.
    pub resync_spread: Duration,
    /// Bytes that wait for one gateway link before live pushes are dropped and its sessions resynced.
    pub link_queue_bytes_max: usize,
    /// Members of a group beyond which its entries go to registered routers instead of members.
    pub large_members: usize,
    /// Conversations that are or were in a user's list, up to which the user may subscribe to one more channel.
    pub subscribe_list_max: usize,
    /// Sessions of a gateway that follow a conversation from which on they are a named set: fewer are as short to list.
    pub named_sessions_min: usize,
    /// Sessions of one user.
    pub sessions_per_user_max: usize,
    /// Sends of one user in ten seconds, in the whole cluster; 0 is no limit.
    pub user_sends_max: u32,
    /// The cost of one user's calls in ten seconds, in the whole cluster; 0 is no limit.
    pub user_call_cost_max: u32,
    /// Users whose presence sessions at this router watch, counted for each session. A million takes about 200 MB; beyond it
    /// subscriptions are refused as overloaded.
    pub presence_watches_max: usize,
    /// Users of one worker who are watched from any router. A million takes about 300 MB; of others the routers learn with each renewal.
    pub presence_watched_max: usize,
    /// Where presence and counts for limits are shared; `None`: in this router's memory.
    pub hot: Option<Hot>,
}

impl RouterConfig {
    /// Defaults for one process; keys and names are the caller's.
    pub fn new(instance: InstanceId, boot: BootId, cluster_secret: ClusterSecret, router_secret: RouterSecret) -> Self {
        Self {
            instance,
            boot,
            cluster_id: "im".to_owned(),
            shards: ShardCount::default(),
            generation: 1,
            cluster_secret,
            router_secret,
            verify_keys: Vec::new(),
            issuer: "im".to_owned(),
            token_lifetime_max: Duration::from_secs(30 * 24 * 3600),
            workers: 1,
            lease_ttl: Duration::from_secs(10),
            conversation_queue_max: 4096,
            opening_queue_max: 4096,
            opens_max: 64,
            dedupe_entries: limits::DEDUPE_ENTRIES,
            quiet_after: Duration::from_secs(60),
            evict_after: Duration::from_secs(300),
            append_patience: Duration::from_secs(15),
            store_timeout: Duration::from_secs(10),
            peer_timeout: Duration::from_secs(10),
            resync_spread: Duration::from_millis(500),
            link_queue_bytes_max: 64 * 1024 * 1024,
            large_members: limits::LARGE_MEMBERS,
            subscribe_list_max: limits::SUBSCRIBE_LIST_MAX,
            named_sessions_min: 16,
            sessions_per_user_max: 64,
            user_sends_max: 100_000,
            user_call_cost_max: 20_000,
            presence_watches_max: 1 << 20,
            presence_watched_max: 1 << 20,
            hot: None,
        }
    }
}

impl RouterConfig {
    /// How this router greets on a link: nothing is known of the other side yet.
    pub(crate) fn hello(&self) -> v1::LinkHello {
        v1::LinkHello {
            instance_id: self.instance.to_string(),
            boot_id: self.boot.0,
            cluster_id: self.cluster_id.clone(),
            shards: self.shards.get(),
            ..v1::LinkHello::default()
        }
    }

    /// A link was meant for an instance that had this address before. It must not take the place of the one that its side has with
    /// this router.
    pub(crate) fn is_somebody_else(&self, hello: &v1::LinkHello) -> bool {
        !hello.to_instance_id.is_empty() && hello.to_instance_id != self.instance.as_str()
    }
}

/// Platforms on which a user has one session at a time. Others (a terminal, a bot) are bounded by the number of sessions only.
pub const EXCLUSIVE_PLATFORMS: [&str; 4] = ["phone", "tablet", "desktop", "web"];
