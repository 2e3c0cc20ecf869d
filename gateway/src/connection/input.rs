//! From what was read to whole frames. A connection keeps a partial frame only; the read buffer belongs to the worker.

use std::cell::RefCell;

use bytes::{Buf, Bytes, BytesMut};
use im_proto::frame::{self, FrameError, PREFIX_BYTES};

/// Bytes of one read. A socket holds more only if this process is behind.
const READ_BYTES: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
}

/// Lends the worker's read buffer. `read` must not call back into this function.
pub(crate) fn with_scratch<T>(read: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| read(scratch))
}

/// The frames of one read.
pub(crate) struct Frames {
    whole: Bytes,
    error: Option<FrameError>,
}

impl Iterator for Frames {
    type Item = Result<Bytes, FrameError>;

    /// Payloads in order, then what ended the stream.
    fn next(&mut self) -> Option<Self::Item> {
        if self.whole.is_empty() {
            return self.error.take().map(Err);
        }
        // `scan` has checked all of them against the limit.
        match frame::peek_length(&self.whole, usize::MAX) {
            Ok(Some(length)) if self.whole.len() >= PREFIX_BYTES + length => {
                self.whole.advance(PREFIX_BYTES);
                Some(Ok(self.whole.split_to(length)))
            }
            _ => {
                self.whole.clear();
                None
            }
        }
    }
}

/// The partial frame of a connection.
#[derive(Default)]
pub(crate) struct Input {
    partial: BytesMut,
}

impl Input {
    /// Takes what was read. All whole frames share one allocation; what is left waits for more. Memory grows with what arrived,
    /// never with what a prefix announces.
    pub fn accept(&mut self, read: &[u8], limit: usize) -> Frames {
        if self.partial.is_empty() {
            let (end, error) = scan(read, limit);
            let (whole, rest) = read.split_at(end);
            if error.is_none() && !rest.is_empty() {
                self.partial = BytesMut::from(rest);
            }
            return Frames { whole: Bytes::copy_from_slice(whole), error };
        }
        self.partial.extend_from_slice(read);
        let (end, error) = scan(&self.partial, limit);
        let whole = self.partial.split_to(end).freeze();
        // Do not keep the large buffer of frames that are complete for the sake of a few bytes of the next one.
        self.partial = match (end, error.is_some() || self.partial.is_empty()) {
            (0, false) => std::mem::take(&mut self.partial),
            (_, true) => BytesMut::new(),
            (_, false) => BytesMut::from(&self.partial[..]),
        };
        Frames { whole, error }
    }
}

/// Where the last whole frame ends, and what is wrong with the one after it.
fn scan(input: &[u8], limit: usize) -> (usize, Option<FrameError>) {
    let mut end = 0;
    loop {
        match frame::peek_length(&input[end..], limit) {
            Ok(Some(length)) if input.len() - end >= PREFIX_BYTES + length => end += PREFIX_BYTES + length,
            Ok(_) => return (end, None),
            Err(error) => return (end, Some(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(payloads: &[&[u8]]) -> Vec<u8> {
        let mut out = Vec::new();
        for payload in payloads {
            out.extend_from_slice(&u32::try_from(payload.len()).expect("short").to_be_bytes());
            out.extend_from_slice(payload);
        }
        out
    }

    #[test]
    fn frames_are_the_same_however_the_stream_is_cut() {
        let payloads: [&[u8]; 4] = [b"a", b"bcd", &[7; 300], b"e"];
        let stream = stream(&payloads);
        for piece in 1..stream.len() {
            let mut input = Input::default();
            let mut found = Vec::new();
            for part in stream.chunks(piece) {
                found.extend(input.accept(part, 1000).map(|frame| frame.expect("well formed")));
            }
            assert_eq!(found, payloads, "in pieces of {piece}");
            assert!(input.partial.is_empty());
        }
    }

    #[test]
    fn frames_before_a_bad_prefix_are_seen_and_nothing_is_kept() {
        let mut bytes = stream(&[b"ok"]);
        bytes.extend_from_slice(&u32::MAX.to_be_bytes());
        let mut input = Input::default();
        let mut frames = input.accept(&bytes, 64);
        assert_eq!(frames.next().expect("first").expect("good"), "ok");
        assert!(matches!(frames.next(), Some(Err(FrameError::TooLarge { announced: u32::MAX, limit: 64 }))));
        assert!(frames.next().is_none());
        assert_eq!(input.partial.capacity(), 0, "an announced length allocates nothing");
    }
}
