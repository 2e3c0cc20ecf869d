//! The SDK of native clients: one long-lived connection over TCP, TLS or QUIC, sends that survive reconnects, and one stream of
//! events, in order per conversation, without holes and without duplicates.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use im_client::{Client, ClientConfig, Endpoint, Target, Trust};
//!
//! let endpoints: Vec<Endpoint> = vec!["tcp://127.0.0.1:7100".parse()?];
//! let config = ClientConfig::new(endpoints, "the token".to_owned(), &Trust::SystemRoots)?;
//! let client = Client::connect(config).await?;
//! let sent = client.send(Target::peer("bob")?, im_proto::body::text("hello")).await?;
//! println!("stored at {}", sent.seq);
//! # Ok(()) }
//! ```
//!
//! Invariants, which the tests and the simulation of the whole system check:
//! - A send is tried again, under the same client message id, until it is acknowledged or definitely refused; sends to one
//!   conversation keep the order of the calls.
//! - For each followed conversation the events are the entries `from, from + 1, …`, each once. What was missed is read from history.
//! - Everything is bounded: 256 unacknowledged sends, [`ClientConfig::event_queue`] events. An application that does not read its
//!   events delays nobody: what does not fit is left on the server and read from history later.
//! - Time is `tokio::time`, randomness and tasks come from the [`im_proto::environment::Environment`].
//!
//! It does not store anything: an application that wants to go on where it stopped passes the next seq to [`Client::follow`].

mod calls;
mod catch_up;
mod client;
pub mod compose;
mod config;
mod connection;
mod conversation;
mod core;
mod dial;
mod engine;
pub mod environment;
mod error;
mod event;
mod pending;
mod presence;
mod receipts;
mod reconnect;
mod sync;
#[cfg(feature = "terminal")]
pub mod terminal;

pub use client::{Client, ConversationList, Page, PendingSend, Position, Sent};
pub use config::{Backoff, ClientConfig, Endpoint, EndpointSource, FollowAll, Target, TokenSource, Transport};
pub use dial::{ByteStream, DialError, Dialer, NetDialer, Stream, Trust};
pub use error::{CallError, ClosedReason, ConfigError, ConnectError, ForwardError, SendError, Status};
pub use event::{Entry, Event};
