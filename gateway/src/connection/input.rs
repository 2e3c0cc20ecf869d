//! From what was read to whole frames. A connection keeps a partial frame only; the read buffer belongs to the worker.

use std::cell::RefCell;

use bytes::{Buf, Bytes, BytesMut};
use im_proto::frame::{self, FrameError, PREFIX_BYTES};
use prost::Message;

/// Bytes of one read. A socket holds more only if this process is behind.
const READ_BYTES: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
}

/// Lends the worker's read buffer. `read` must not call back into this function.
pub(crate) fn with_scratch<T>(read: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| read(scratch))
}

/// Buffers up to this long are shared by all that came in them: twice the largest body, and what a read adds to a partial frame.
const SHARED_BYTES_MAX: usize = 2 * READ_BYTES;

/// What is kept of a frame, or goes on to routers and their queues. Its bytes are slices of the buffer that it came in, of so many
/// bytes: if that is much more than what is kept, because of other frames or of fields that nobody knows, it is copied out, so that a
/// message of one byte does not hold a megabyte.
pub(super) fn compact<M: Message + Default>(message: M, buffer_bytes: usize) -> M {
    if buffer_bytes <= SHARED_BYTES_MAX || buffer_bytes / 2 <= message.encoded_len() {
        return message;
    }
    M::decode(Bytes::from(message.encode_to_vec())).unwrap_or(message)
}

/// A frame without its prefix.
pub(crate) struct Payload {
    pub bytes: Bytes,
    /// Of the buffer that it is a part of.
    pub buffer_bytes: usize,
}

/// The frames of one read.
pub(crate) struct Frames {
    whole: Bytes,
    buffer_bytes: usize,
    error: Option<FrameError>,
}

impl Iterator for Frames {
    type Item = Result<Payload, FrameError>;

    /// Payloads in order, then what ended the stream.
    fn next(&mut self) -> Option<Self::Item> {
        if self.whole.is_empty() {
            return self.error.take().map(Err);
        }
        // `scan` has checked all of them against the limit.
        match frame::peek_length(&self.whole, usize::MAX) {
            Ok(Some(length)) if self.whole.len() >= PREFIX_BYTES + length => {
                self.whole.advance(PREFIX_BYTES);
                Some(Ok(Payload { bytes: self.whole.split_to(length), buffer_bytes: self.buffer_bytes }))
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
            return Frames { whole: Bytes::copy_from_slice(whole), buffer_bytes: end, error };
        }
        self.partial.extend_from_slice(read);
        let (end, error) = scan(&self.partial, limit);
        let buffer_bytes = self.partial.capacity();
        let whole = self.partial.split_to(end).freeze();
        // Do not keep the large buffer of frames that are complete for the sake of a few bytes of the next one.
        self.partial = match (end, error.is_some() || self.partial.is_empty()) {
            (0, false) => std::mem::take(&mut self.partial),
            (_, true) => BytesMut::new(),
            (_, false) => BytesMut::from(&self.partial[..]),
        };
        Frames { whole, buffer_bytes, error }
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
    use im_proto::{
        frame::{Decoded, decode_client_frame},
        v1::{self, client_frame::Frame as ClientFrame},
    };

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
                found.extend(input.accept(part, 1000).map(|frame| frame.expect("well formed").bytes));
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
        assert_eq!(frames.next().expect("first").expect("good").bytes, "ok");
        assert!(matches!(frames.next(), Some(Err(FrameError::TooLarge { announced: u32::MAX, limit: 64 }))));
        assert!(frames.next().is_none());
        assert_eq!(input.partial.capacity(), 0, "an announced length allocates nothing");
    }

    /// A send as it may be kept, and one with so many bytes of a field that nobody knows.
    fn send(body_bytes: usize, padding_bytes: usize) -> Vec<u8> {
        let send = v1::Send {
            client_message_id: Bytes::from_static(b"id"),
            body: vec![7; body_bytes].into(),
            ..v1::Send::default()
        };
        let mut inner = send.encode_to_vec();
        prost::encoding::bytes::encode(1000, &vec![7; padding_bytes], &mut inner);
        let mut frame = Vec::new();
        prost::encoding::bytes::encode(SEND_FIELD, &inner, &mut frame);
        frame
    }

    const SEND_FIELD: u32 = 4;

    /// What the sends of a stream hold once they are kept: the buffers, and the bytes of the sends themselves.
    fn held_by(payloads: &[&[u8]], piece: usize) -> (usize, Vec<v1::Send>) {
        let (mut input, mut kept, mut buffers) = (Input::default(), Vec::new(), Vec::new());
        for part in stream(payloads).chunks(piece) {
            let mut last = None;
            for payload in input.accept(part, 2 * 1024 * 1024) {
                let Payload { bytes, buffer_bytes } = payload.expect("well formed");
                if let Decoded::Frame(ClientFrame::Send(send)) = decode_client_frame(bytes.clone()).expect("a frame") {
                    kept.push(compact(send, buffer_bytes));
                }
                // All frames of a read are of one buffer.
                last = Some((bytes, buffer_bytes));
            }
            buffers.extend(last);
        }
        let held = buffers.iter().filter(|(bytes, _)| !bytes.is_unique()).map(|(_, length)| length).sum();
        (held, kept)
    }

    #[test]
    fn a_kept_send_holds_no_buffer_of_many_times_its_length() {
        let sends = 256;
        let (padded, small, other) = (send(1, 1_000_000), send(1, 0), vec![0x7a; 1_000_000]);
        // An unknown frame: a field of 1 MB.
        let mut unknown = Vec::new();
        prost::encoding::bytes::encode(999, &other, &mut unknown);
        let (padded, beside_another) = ([&padded[..]].repeat(sends), [&unknown[..], &small[..]].repeat(sends));
        for (what, payloads) in [("padded", padded), ("beside another frame", beside_another)] {
            let (held, kept) = held_by(&payloads, READ_BYTES);
            assert_eq!(kept.len(), sends, "{what}");
            assert!(kept.iter().all(|send| send.body == [7_u8][..] && send.client_message_id == "id"), "{what}");
            assert!(held <= sends * SHARED_BYTES_MAX, "{what}: {sends} sends hold {held} bytes");
        }
    }

    #[test]
    fn what_fills_its_buffer_is_not_copied() {
        let large = send(64 * 1024, 0);
        let mut input = Input::default();
        let stream = stream(&[&large]);
        let mut found = stream.chunks(READ_BYTES).flat_map(|part| input.accept(part, 1024 * 1024).collect::<Vec<_>>());
        let Payload { bytes, buffer_bytes } = found.next().expect("a frame").expect("well formed");
        let Ok(Decoded::Frame(ClientFrame::Send(send))) = decode_client_frame(bytes.clone()) else { panic!("a send") };
        let body = send.body.as_ptr();
        assert_eq!(compact(send, buffer_bytes).body.as_ptr(), body);
    }
}
