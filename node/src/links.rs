//! Links between processes: what gateway and router know as a pair of channels, carried by one gRPC stream.
//!
//! Invariants: a link is one stream on one connection, dialled by its own side and never shared; both directions wait for the
//! slower side (a few batches in a channel, then HTTP/2 windows, then the channel of the other end); a peer that is dead, stopped or
//! cut off breaks its links within [`KEEPALIVE_INTERVAL`] + [`KEEPALIVE_TIMEOUT`]; with service certificates both sides prove their
//! role.
//!
//! Not here: numbering, replay and dialling again, which are the roles' own. A broken link is a closed channel.

mod dial;
mod pump;
mod serve;
pub mod tls;

#[cfg(test)]
mod tests;

use std::time::Duration;

pub use dial::Dialler;
pub use serve::{LINK_SERVICE, Serving, serve_api, serve_links};

/// Batches that wait in each direction on each side. A batch holds what gathered while the other side was busy, so a few keep both
/// sides at work; a batch holds about 1 MiB at most, so 16 MiB wait on a stalled link.
const BATCHES_WAITING_MAX: usize = 16;
/// Bytes of one item. A batch takes no further message beyond 1 MiB, and the largest messages are a history reply of 4 MiB and one
/// entry, and a client's frame of `gateway.frame_bytes_max`, 8 MiB at most.
const ITEM_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Bytes under way that the receiver has not taken: 4 MiB fill 10 Gbit/s at 3 ms there and back.
const WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// Bytes of one HTTP/2 frame: one system call for a batch of usual size, and a ping never waits for more than this.
const FRAME_BYTES_MAX: u32 = 256 * 1024;
/// Streams of one connection. A link uses one; health checks use others.
const STREAMS_MAX: u32 = 16;
/// A silent peer is asked after this.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// A peer that does not answer for this long is given up. Both together are less than a lease of 10 s.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// TCP, TLS and the first answer. Half a lease, so that a dead router is not waited for twice.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
