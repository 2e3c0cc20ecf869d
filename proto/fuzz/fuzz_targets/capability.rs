//! A capability: any bytes are refused, and any identity that a router signed is read without a panic.
#![no_main]

use bytes::Bytes;
use im_proto::{key::RouterSecret, v1};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|data: &[u8]| {
    let secret = RouterSecret::new([7; 32]);
    if let Ok(capability) = v1::Capability::decode(data) {
        assert_eq!(secret.verify(&capability), None, "nobody guesses a MAC");
    }
    let mac = blake3::Hasher::new_keyed(&[7; 32]).update(b"capability").update(data).finalize();
    let mac = Bytes::copy_from_slice(mac.as_bytes());
    let signed = v1::Capability { identity: Bytes::copy_from_slice(data), mac };
    if let Some(identity) = secret.verify(&signed) {
        assert_eq!(secret.verify(&secret.capability(&identity)), Some(identity));
    }
});
