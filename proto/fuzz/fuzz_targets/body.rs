//! A body from a client: what passes the check decodes, and is within its limits.
#![no_main]

use im_proto::{body, limits, v1};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|data: &[u8]| {
    let _ = body::entry_kind(data);
    if body::validate(data).is_ok() {
        assert!((1..=limits::BODY_BYTES_MAX).contains(&data.len()));
        let decoded = v1::Body::decode(data).expect("what passes decodes");
        assert!(!matches!(decoded.content, Some(v1::body::Content::Event(_))));
        let encoded = decoded.encode_to_vec();
        assert!(encoded.is_empty() || body::validate(&encoded).is_ok());
    }
});
