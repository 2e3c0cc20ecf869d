//! Where transports end. Each listener turns what it accepts into a byte stream for [`crate::Gateway::serve_stream`].
//!
//! Binding and running are apart, so that the process knows its addresses before anything is accepted.

pub mod tcp;
