//! The load harness: scenarios that drive servers started as processes, and the checker that judges what the clients saw.

pub mod checker;
