//! A token: as it comes, and with header and claims of any bytes. None passes without a key.
#![no_main]

use std::time::Duration;

use im_proto::{
    Timestamp,
    token::{Verifier, VerifyKey, inspect},
};
use libfuzzer_sys::fuzz_target;

const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);
const PUBLIC: [u8; 32] = [
    0xd7, 0x5a, 0x98, 0x01, 0x82, 0xb1, 0x0a, 0xb7, 0xd5, 0x4b, 0xfe, 0xd3, 0xc9, 0x64, 0x07, 0x3a, 0x0e, 0xe1, 0x72, 0xf3, 0xda, 0xa6,
    0x23, 0x25, 0xaf, 0x02, 0x1a, 0x68, 0xf7, 0x07, 0x51, 0x1a,
];
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
    // RFC 8032, test 1, under the key id that a token below names: its signature is looked at.
    let key = VerifyKey { key_id: "a".to_owned(), public: PUBLIC.to_vec() };
    let verifier = Verifier::new(&[key], "issuer", "cluster", Duration::from_secs(3600));
    assert!(verifier.verify(token, NOW).is_err());
}

fuzz_target!(|data: (&[u8], &[u8])| {
    let (header, claims) = data;
    if let Ok(token) = std::str::from_utf8(claims) {
        check(token);
    }
    check(&format!("{}.{}.{}", base64url(header), base64url(claims), base64url(&[1; 64])));
    // A header that is right, so that the claims are looked at; and claims that are, so that the signature is.
    let right = base64url(br#"{"typ":"JWT","alg":"EdDSA","kid":"a"}"#);
    check(&format!("{right}.{}.{}", base64url(claims), "AAAA"));
    let plain = br#"{"sub":"u","device":"d","platform":"p","iss":"issuer","aud":"cluster","iat":1800000000,"exp":1800000600}"#;
    check(&format!("{right}.{}.{}", base64url(plain), base64url(header)));
    if let Ok(signature) = std::str::from_utf8(header) {
        check(&format!("{right}.{}.{signature}", base64url(plain)));
    }
});
