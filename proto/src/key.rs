//! Secrets that derive ids and sign capabilities. Both are keyed BLAKE3.

use std::fmt;

use bytes::Bytes;
use prost::Message as _;

use crate::{
    hex,
    id::{ConversationId, UserId},
    v1,
};

/// Why bytes are no secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a secret is {SECRET_BYTES} bytes, written as {} hexadecimal digits", 2 * SECRET_BYTES)]
pub struct SecretError;

/// Length of each secret.
pub const SECRET_BYTES: usize = 32;

/// Protects conversation ids from being guessed, nothing else. All roles of a cluster have it.
#[derive(Clone)]
pub struct ClusterSecret([u8; SECRET_BYTES]);

/// Signs capabilities. Routers alone have it.
#[derive(Clone)]
pub struct RouterSecret([u8; SECRET_BYTES]);

impl fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterSecret")
    }
}

impl fmt::Debug for RouterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RouterSecret")
    }
}

/// The secret in 64 hexadecimal digits, white space around it ignored.
pub fn parse_secret(text: &str) -> Result<[u8; SECRET_BYTES], SecretError> {
    hex::decode(text.trim().as_bytes()).ok_or(SecretError)
}

impl ClusterSecret {
    /// From 32 random bytes.
    pub const fn new(secret: [u8; SECRET_BYTES]) -> Self {
        Self(secret)
    }

    /// The conversation of two users, whoever asks. For one and the same user it is that user's self log.
    pub fn direct_id(&self, one: &UserId, other: &UserId) -> ConversationId {
        if one == other {
            return self.self_id(one);
        }
        let (low, high) = if one < other { (one, other) } else { (other, one) };
        self.derive(b"direct", &[low.as_str().as_bytes(), high.as_str().as_bytes()])
    }

    /// The group that a user created with a key.
    pub fn group_id(&self, creator: &UserId, key: &[u8]) -> ConversationId {
        self.derive(b"group", &[creator.as_str().as_bytes(), key])
    }

    /// The channel that a user created with a key.
    pub fn channel_id(&self, creator: &UserId, key: &[u8]) -> ConversationId {
        self.derive(b"channel", &[creator.as_str().as_bytes(), key])
    }

    /// A user's own log.
    pub fn self_id(&self, user: &UserId) -> ConversationId {
        self.derive(b"self", &[user.as_str().as_bytes()])
    }

    /// Tells whether two processes have the same secret, without telling the secret.
    pub fn fingerprint(&self) -> [u8; ConversationId::BYTES] {
        *self.derive(b"fingerprint", &[]).as_bytes()
    }

    /// Keyed BLAKE3 over the parts, each behind its length as 4 bytes big-endian; the first 16 bytes.
    fn derive(&self, kind: &[u8], parts: &[&[u8]]) -> ConversationId {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for part in std::iter::once(&kind).chain(parts) {
            hasher.update(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
            hasher.update(part);
        }
        let mut id = [0; ConversationId::BYTES];
        hasher.finalize_xof().fill(&mut id);
        ConversationId::from_bytes(id)
    }
}

impl RouterSecret {
    /// From 32 random bytes.
    pub const fn new(secret: [u8; SECRET_BYTES]) -> Self {
        Self(secret)
    }

    /// Proof that a router registered this session.
    pub fn capability(&self, identity: &v1::Identity) -> v1::Capability {
        let identity = Bytes::from(identity.encode_to_vec());
        let mac = Bytes::copy_from_slice(self.mac(&identity).as_bytes());
        v1::Capability { identity, mac }
    }

    /// The identity of a capability, if it was made with this secret. The caller checks gateway, boot id and expiry.
    pub fn verify(&self, capability: &v1::Capability) -> Option<v1::Identity> {
        let mac: [u8; 32] = capability.mac.as_ref().try_into().ok()?;
        // The comparison of `blake3::Hash` takes the same time whatever differs.
        if self.mac(&capability.identity) != blake3::Hash::from_bytes(mac) {
            return None;
        }
        v1::Identity::decode(capability.identity.as_ref()).ok()
    }

    fn mac(&self, identity: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(b"capability");
        hasher.update(identity);
        hasher.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(id: &str) -> UserId {
        UserId::parse(id).expect("a user id")
    }

    #[test]
    fn a_direct_conversation_is_the_same_whoever_asks() {
        let secret = ClusterSecret::new([1; 32]);
        assert_eq!(secret.direct_id(&user("a"), &user("b")), secret.direct_id(&user("b"), &user("a")));
        assert_eq!(secret.direct_id(&user("a"), &user("a")), secret.self_id(&user("a")));
    }

    #[test]
    fn no_two_kinds_parts_or_secrets_share_an_id() {
        let (one, two) = (ClusterSecret::new([1; 32]), ClusterSecret::new([2; 32]));
        let ids = [
            one.direct_id(&user("ab"), &user("c")),
            one.direct_id(&user("a"), &user("bc")),
            one.group_id(&user("ab"), b"c"),
            one.group_id(&user("a"), b"bc"),
            one.group_id(&user("abc"), b""),
            one.channel_id(&user("ab"), b"c"),
            one.self_id(&user("abc")),
            two.self_id(&user("abc")),
            two.direct_id(&user("ab"), &user("c")),
        ];
        for (i, id) in ids.iter().enumerate() {
            assert!(!ids[..i].contains(id), "{i}");
        }
    }

    #[test]
    fn a_capability_holds_for_its_secret_and_its_exact_bytes_only() {
        let secret = RouterSecret::new([3; 32]);
        let identity = v1::Identity { user_id: "a".to_owned(), session_id: 7, ..v1::Identity::default() };
        let good = secret.capability(&identity);
        assert_eq!(secret.verify(&good), Some(identity));
        assert_eq!(RouterSecret::new([4; 32]).verify(&good), None);
        assert_eq!(secret.verify(&v1::Capability::default()), None);
        for part in 0..2 {
            let whole = if part == 0 { &good.identity } else { &good.mac };
            for at in 0..whole.len() {
                let mut bytes = whole.to_vec();
                bytes[at] ^= 1;
                let mut bad = good.clone();
                *(if part == 0 { &mut bad.identity } else { &mut bad.mac }) = bytes.into();
                assert_eq!(secret.verify(&bad), None, "part {part} byte {at}");
                let mut short = good.clone();
                *(if part == 0 { &mut short.identity } else { &mut short.mac }) = whole.slice(..at);
                assert_eq!(secret.verify(&short), None, "part {part} cut at {at}");
            }
        }
    }

    #[test]
    fn a_secret_is_64_hexadecimal_digits() {
        let digits = "0123456789abcdef".repeat(4);
        let secret = parse_secret(&format!(" {digits}\n")).expect("a secret");
        assert_eq!(secret[..8], [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
        for bad in ["", &digits[1..], &format!("{digits}0"), &"+f".repeat(32), &"0x".repeat(32), &"é".repeat(32)] {
            assert_eq!(parse_secret(bad), Err(SecretError), "{bad:?}");
        }
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        assert_eq!(format!("{:?}", ClusterSecret::new([5; 32])), "ClusterSecret");
        assert_eq!(format!("{:?}", RouterSecret::new([5; 32])), "RouterSecret");
    }
}
