//! The gateway against a scripted router and scripted clients, in paused time; the listeners over loopback sockets.

mod support;

mod bad_input;
mod handshake;
mod sends;
mod transports;
