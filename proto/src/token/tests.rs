use proptest::prelude::*;
use ring::{rand::SystemRandom, signature::Ed25519KeyPair};

use super::*;

/// An Ed25519 key pair as `openssl genpkey -algorithm ed25519 -outform DER` writes it (RFC 8032, test 1).
const PKCS8: [u8; 48] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20, 0x9d, 0x61, 0xb1,
    0x9d, 0xef, 0xfd, 0x5a, 0x60, 0xba, 0x84, 0x4a, 0xf4, 0x92, 0xec, 0x2c, 0xc4, 0x44, 0x49, 0xc5, 0x69, 0x7b, 0x32,
    0x69, 0x19, 0x70, 0x3b, 0xac, 0x03, 0x1c, 0xae, 0x7f, 0x60,
];
const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);
const NOW_SECONDS: i64 = 1_800_000_000;
const HOUR: Duration = Duration::from_secs(3600);

fn key() -> SigningKey {
    SigningKey::from_pkcs8(&PKCS8).expect("a key")
}

fn claims() -> Claims {
    Claims {
        sub: "ann".to_owned(),
        device: "laptop".to_owned(),
        platform: "terminal".to_owned(),
        iss: "issuer".to_owned(),
        aud: "cluster".to_owned(),
        iat: NOW_SECONDS - 10,
        exp: NOW_SECONDS + 600,
    }
}

fn verifier() -> Verifier {
    Verifier::new(&[key().verify_key()], "issuer", "cluster", HOUR)
}

fn verify(claims: &Claims) -> Result<Verified, TokenError> {
    verifier().verify(&key().sign(claims).expect("signed"), NOW)
}

#[test]
fn a_good_token_names_user_device_platform_and_times() {
    let token = key().sign(&claims()).expect("signed");
    let verified = verifier().verify(&token, NOW).expect("good");
    assert_eq!(verified.user.as_str(), "ann");
    assert_eq!(verified.device.as_str(), "laptop");
    assert_eq!(verified.platform.as_str(), "terminal");
    assert_eq!(verified.issued_at.as_millis(), (NOW_SECONDS - 10) * 1000);
    assert_eq!(verified.expires_at.as_millis(), (NOW_SECONDS + 600) * 1000);
    assert_eq!(inspect(&token, NOW), Ok(verified));
}

#[test]
fn keys_of_ring_and_of_openssl_both_sign() {
    let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key pair");
    let key = SigningKey::from_pkcs8(pkcs8.as_ref()).expect("a key");
    let verifier = Verifier::new(&[self::key().verify_key(), key.verify_key()], "issuer", "cluster", HOUR);
    assert!(verifier.verify(&key.sign(&claims()).expect("signed"), NOW).is_ok());
    assert!(verifier.verify(&self::key().sign(&claims()).expect("signed"), NOW).is_ok());
    assert!(SigningKey::from_pkcs8(b"no key").is_err());
}

#[test]
fn the_key_id_is_the_first_8_bytes_of_blake3_of_the_public_key() {
    let key = key().verify_key();
    assert_eq!(key.public[..4], [0xd7, 0x5a, 0x98, 0x01], "RFC 8032, test 1");
    assert_eq!(key.key_id, blake3::hash(&key.public).to_hex()[..16]);
    assert_eq!(key.key_id, "6c31041268f47160");
    assert_eq!(VerifyKey::from_public(&key.public), Ok(key));
    assert!(VerifyKey::from_public(&[0; 31]).is_err());
}

#[test]
fn what_is_no_key_is_refused_and_a_key_with_which_anybody_could_sign() {
    let refused = |public: [u8; 32]| VerifyKey::from_public(&public).map_err(|error| error.to_string());
    assert!(refused([7; 32]).expect_err("no point").contains("no point of the curve"));
    let mut neutral = [0; 32];
    neutral[0] = 1;
    assert!(refused(neutral).expect_err("of order one").contains("anybody could sign"));
}

#[test]
fn a_signature_has_one_way_to_be_written() {
    let good = key().sign(&claims()).expect("signed");
    assert!(verifier().verify(&good, NOW).is_ok());
    // 64 bytes are 86 digits, of the last of which two bits count.
    let (rest, last) = good.split_at(good.len() - 1);
    for other in ["A", "B", "Q", "R", "g", "h", "w", "x"].into_iter().filter(|other| *other != last) {
        assert!(verifier().verify(&format!("{rest}{other}"), NOW).is_err(), "{other}");
    }
    for tail in ["=", "==", "A", "+", " ", "\n", "."] {
        assert!(verifier().verify(&format!("{good}{tail}"), NOW).is_err(), "{tail:?}");
    }
}

#[test]
fn a_token_of_another_issuer_cluster_or_key_is_refused() {
    let refused = |claims| matches!(verify(&claims), Err(TokenError::Refused(_)));
    assert!(refused(Claims { iss: "other".to_owned(), ..claims() }));
    assert!(refused(Claims { aud: "other".to_owned(), ..claims() }));
    let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key pair");
    let mut foreign = SigningKey::from_pkcs8(pkcs8.as_ref()).expect("a key");
    let token = foreign.sign(&claims()).expect("signed");
    assert!(matches!(verifier().verify(&token, NOW), Err(TokenError::UnknownKey(_))));
    foreign.key_id = key().key_id;
    let token = foreign.sign(&claims()).expect("signed");
    assert!(matches!(verifier().verify(&token, NOW), Err(TokenError::Refused(_))));
    assert_eq!(
        verify(&Claims { iss: "other".to_owned(), ..claims() }).map_err(|e| e.status()),
        Err(StatusCode::Unauthenticated)
    );
}

#[test]
fn a_token_ends_at_its_expiry() {
    let ends = |exp| verify(&Claims { exp, ..claims() }).map(|_| ()).map_err(|error| error.status());
    assert_eq!(ends(NOW_SECONDS + 1), Ok(()));
    assert_eq!(ends(NOW_SECONDS), Err(StatusCode::TokenExpired));
    assert_eq!(ends(1), Err(StatusCode::TokenExpired));
    let token = key().sign(&Claims { exp: NOW_SECONDS, ..claims() }).expect("signed");
    assert_eq!(inspect(&token, NOW), Err(TokenError::Expired));
}

#[test]
fn the_longest_lifetime_is_the_servers_not_the_tokens_word() {
    let lives = |iat, exp| verify(&Claims { iat, exp, ..claims() }).map(|_| ());
    assert_eq!(lives(NOW_SECONDS, NOW_SECONDS + 3600), Ok(()));
    assert_eq!(lives(NOW_SECONDS, NOW_SECONDS + 3601), Err(TokenError::LifetimeTooLong));
    assert_eq!(lives(i64::MIN, i64::MAX), Err(TokenError::LifetimeTooLong));
    // A late `iat` does not make a long life short.
    let in_a_year = NOW_SECONDS + 31_536_000;
    assert_eq!(lives(in_a_year - 60, in_a_year), Err(TokenError::IssuedInTheFuture));
    assert_eq!(lives(i64::MAX, i64::MAX), Err(TokenError::IssuedInTheFuture));
    assert_eq!(lives(NOW_SECONDS + 60, NOW_SECONDS + 120), Ok(()), "an issuer's clock may be a little ahead");
}

#[test]
fn ids_of_a_token_are_parsed() {
    for bad in ["", "a b", "a\u{0}", &"x".repeat(65)] {
        for claims in [
            Claims { sub: bad.to_owned(), ..claims() },
            Claims { device: bad.to_owned(), ..claims() },
            Claims { platform: bad.to_owned(), ..claims() },
        ] {
            assert!(matches!(verify(&claims), Err(TokenError::Malformed(_))), "{bad:?}");
        }
    }
}

#[test]
fn size_and_form_are_checked_before_anything_is_decoded() {
    let fits = "x".repeat(limits::TOKEN_BYTES_MAX);
    for bad in ["", ".", "..", "...", "a.b.c", "a.b.c.d", "\u{0}", "é.é.é", &fits, &(fits.clone() + "x")] {
        assert!(matches!(inspect(bad, NOW), Err(TokenError::Malformed(_))), "{bad:.20}");
        assert!(matches!(verifier().verify(bad, NOW), Err(TokenError::Malformed(_))), "{bad:.20}");
    }
    let large = key().sign(&Claims { iss: "i".repeat(limits::TOKEN_BYTES_MAX), ..claims() }).expect("signed");
    assert!(matches!(inspect(&large, NOW), Err(TokenError::Malformed(_))));
}

#[test]
fn only_eddsa_with_a_plain_header_will_do() {
    let secret = EncodingKey::from_secret(&key().public);
    let mut header = Header::new(Algorithm::HS256);
    header.kid = Some(key().key_id);
    let confused = jsonwebtoken::encode(&header, &claims(), &secret).expect("signed");
    let good = key().sign(&claims()).expect("signed");
    // {"alg":"none","typ":"JWT"}
    let unsigned = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{}.", good.split('.').nth(1).unwrap_or_default());
    let signed_with = |change: fn(&mut Header)| {
        let mut header = Header::new(Algorithm::EdDSA);
        header.kid = Some(key().key_id);
        change(&mut header);
        jsonwebtoken::encode(&header, &claims(), &key().key).expect("signed")
    };
    let critical = signed_with(|header| header.crit = Some(vec!["exp".to_owned()]));
    let long_key_id = signed_with(|header| header.kid = Some("k".repeat(65)));
    for bad in [confused, unsigned, critical, long_key_id] {
        assert!(matches!(verifier().verify(&bad, NOW), Err(TokenError::Malformed(_))), "{bad}");
        assert!(matches!(inspect(&bad, NOW), Err(TokenError::Malformed(_))), "{bad}");
    }
    let no_key_id = signed_with(|header| header.kid = None);
    assert_eq!(verifier().verify(&no_key_id, NOW), Err(TokenError::UnknownKey(String::new())));
}

#[test]
fn a_key_of_a_wrong_length_is_left_out() {
    let broken = VerifyKey { key_id: key().key_id, public: vec![1, 2, 3] };
    let verifier = Verifier::new(&[broken], "issuer", "cluster", HOUR);
    let token = key().sign(&claims()).expect("signed");
    assert!(matches!(verifier.verify(&token, NOW), Err(TokenError::UnknownKey(_))));
}

proptest! {
    // A verification takes milliseconds without optimisation.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_changed_token_is_refused_and_never_panics(at in any::<prop::sample::Index>(), byte in 0_u8..0x80) {
        let good = key().sign(&claims()).expect("signed");
        let at = at.index(good.len());
        let mut bytes = good.clone().into_bytes();
        bytes[at] = byte;
        let bad = String::from_utf8(bytes).expect("ASCII");
        let _ = inspect(&bad, NOW);
        prop_assert_eq!(verifier().verify(&bad, NOW).is_ok(), bad == good);
        let _ = inspect(&good[..at], NOW);
        prop_assert!(verifier().verify(&good[..at], NOW).is_err());
    }
}
