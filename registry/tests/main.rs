//! The backends pass the suite, and each does what only it can do.

#![allow(clippy::disallowed_methods, reason = "tests own their tasks, channels and randomness")]

mod channel;
mod cluster;
mod etcd;
mod in_process;
mod proxy;
mod recovery;
mod server;
mod support;
