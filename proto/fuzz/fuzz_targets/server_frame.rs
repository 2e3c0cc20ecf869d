//! The payload of a frame from a server: what decodes, decodes again from its own encoding.
#![no_main]

use bytes::Bytes;
use im_proto::{
    frame::{Decoded, decode_server_frame},
    v1,
};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|data: &[u8]| {
    match decode_server_frame(Bytes::copy_from_slice(data)) {
        Ok(Decoded::Frame(frame)) => {
            let encoded = v1::ServerFrame::from(frame).encode_to_vec();
            let again = decode_server_frame(Bytes::from(encoded.clone()));
            let Ok(Decoded::Frame(again)) = again else { panic!("its own encoding is refused") };
            // Bytes, not values: a number that is not a number differs from itself.
            assert_eq!(v1::ServerFrame::from(again).encode_to_vec(), encoded);
        }
        Ok(Decoded::Unknown(field)) => assert!(field > 0 || data.is_empty()),
        Err(_) => {}
    }
});
