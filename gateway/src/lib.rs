//! The gateway: connections in, frames out.
//!
//! Transports end at the listeners; above them there are only frames, and one loop for every connection ([`connection`]). A session
//! is registered with the router that owns its user's shard before it is welcomed; sends are kept until the owner of their
//! conversation answers and follow the owner when it moves. Whatever may have cost a client a live push ends in a `Resync`.
//!
//! A gateway holds no state that a reconnect of its clients does not rebuild. It verifies no signature, numbers nothing and never
//! invents an answer.

mod addresses;
mod admission;
mod config;
pub mod connection;
mod drain;
mod effort;
mod error;
mod gateway;
mod limits;
mod link;
pub mod listener;
mod metrics;
mod neighbours;
mod rate;
mod routing;
mod session;
mod sessions;
mod table;

pub use config::GatewayConfig;
pub use connection::Transport;
pub use error::ListenError;
pub use gateway::{Gateway, PeerInfo};
