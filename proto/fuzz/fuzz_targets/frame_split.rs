//! A stream of frames, cut into pieces: it is consumed as it arrives, and no piece changes what comes out.
#![no_main]

use bytes::BytesMut;
use im_proto::frame::{PREFIX_BYTES, peek_length, split_frame};
use libfuzzer_sys::fuzz_target;

const LIMIT: usize = 300;

fuzz_target!(|data: (u8, &[u8])| {
    let (piece, stream) = (usize::from(data.0) + 1, data.1);
    let mut whole = BytesMut::from(stream);
    let mut expected = Vec::new();
    let end = loop {
        let before = whole.len();
        match split_frame(&mut whole, LIMIT) {
            Ok(Some(payload)) => {
                assert!((1..=LIMIT).contains(&payload.len()));
                assert_eq!(whole.len() + PREFIX_BYTES + payload.len(), before);
                expected.push(payload);
            }
            Ok(None) => break None,
            Err(error) => {
                assert_eq!(peek_length(&whole, LIMIT), Err(error.clone()));
                break Some(error);
            }
        }
    };
    let (mut input, mut found) = (BytesMut::new(), Vec::new());
    for piece in stream.chunks(piece) {
        input.extend_from_slice(piece);
        loop {
            match split_frame(&mut input, LIMIT) {
                Ok(Some(payload)) => found.push(payload),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(found, expected);
                    assert_eq!(Some(error), end);
                    return;
                }
            }
        }
    }
    assert_eq!((found, None), (expected, end));
});
