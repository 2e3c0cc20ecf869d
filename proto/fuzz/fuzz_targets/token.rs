//! A token: as it comes, and with header and claims of any bytes. None passes without a key.
#![no_main]

use std::time::Duration;

use im_proto::{
    Timestamp,
    token::{Verifier, VerifyKey, inspect},
};
use libfuzzer_sys::fuzz_target;

const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);
const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

fn base64url(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..=chunk.len() {
            out.push(char::from(DIGITS[(bits >> (18 - 6 * digit) & 63) as usize]));
        }
    }
    out
}

fn check(token: &str) {
    let _ = inspect(token, NOW);
    let key = VerifyKey::from_public(&[7; 32]).expect("32 bytes");
    let verifier = Verifier::new(&[key], "issuer", "cluster", Duration::from_secs(3600));
    assert!(verifier.verify(token, NOW).is_err());
}

fuzz_target!(|data: (&[u8], &[u8])| {
    let (header, claims) = data;
    if let Ok(token) = std::str::from_utf8(claims) {
        check(token);
    }
    check(&format!("{}.{}.{}", base64url(header), base64url(claims), base64url(&[1; 64])));
    // A header that is right, so that the claims are looked at.
    check(&format!("{}.{}.{}", base64url(br#"{"typ":"JWT","alg":"EdDSA","kid":"a"}"#), base64url(claims), "AAAA"));
});
