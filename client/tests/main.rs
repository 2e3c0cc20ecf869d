//! The SDK against servers in memory: a scripted one, frame by frame, for each rule, and a model of an owner with random faults
//! for all of them together. Time is paused.

mod model;
mod presence;
mod receiving;
mod reconnecting;
mod sending;
mod server;
mod session;
mod transports;
