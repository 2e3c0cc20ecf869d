//! The gateway against a scripted router and scripted clients, in paused time; the listeners over loopback sockets.

#![allow(clippy::disallowed_methods, reason = "tests own their tasks, channels and randomness")]

mod support;

mod audiences;
mod bad_input;
mod calls;
mod drain;
mod handshake;
mod limits;
mod links;
mod locate;
mod pushes;
mod quic;
mod sends;
mod sends_model;
mod transports;
