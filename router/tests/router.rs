//! A router as its gateways see it, on an in-memory store. Time is paused; the tests say what must come, not when.

mod support;

mod balance;
mod bodies;
mod channels;
mod conversations;
mod correlation;
mod device_list;
mod devices;
mod handshakes;
mod hot;
mod large;
mod lifecycle;
mod lists;
mod moves;
mod order;
mod ownership;
mod patience;
mod presence;
mod repeats;
mod tables;
