//! The wire protocol of the IM backend, without I/O: frames, peer messages, the api, ids, statuses, limits.
//!
//! `SPEC.md` beside this crate is the normative text; the `.proto` files in `defs/` are its schema. Everything here is a pure
//! function or a value: no socket, no clock, no randomness. What the roles share of their surroundings (clock, randomness, task
//! spawning) is named by the traits of [`environment`], so that a simulation can replace it.

pub mod body;
pub mod environment;
pub mod frame;
mod hex;
pub mod id;
pub mod key;
pub mod limits;
pub mod link;
pub mod method;
pub mod shard;
pub mod status;
pub mod timestamp;
#[cfg(feature = "token")]
pub mod token;

/// The generated messages (and with the feature `grpc` the clients and servers) of package `im.v1`.
#[allow(
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    missing_docs,
    unused_qualifications,
    reason = "generated code"
)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/im.v1.rs"));

    /// What travels on links, named as in the schema.
    pub type GatewayLinkItem = crate::link::wire::WireItem<GatewayBatch>;
    pub type RouterLinkItem = crate::link::wire::WireItem<RouterBatch>;
    pub type PeerLinkItem = crate::link::wire::WireItem<PeerBatch>;
}

/// The file descriptors of all `.proto` files, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub use id::{BootId, ConversationId, DeviceId, Epoch, InstanceId, Platform, SessionId, UserId};
pub use shard::{ShardCount, ShardId};
pub use status::StatusCode;
pub use timestamp::Timestamp;

/// The versions of the client protocol that this build speaks, lowest and highest.
pub const PROTOCOL_VERSIONS: (u32, u32) = (1, 1);
