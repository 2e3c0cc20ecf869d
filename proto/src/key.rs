//! Secrets that derive ids and sign capabilities. Both are keyed BLAKE3.

use std::fmt;

use bytes::Bytes;
use prost::Message as _;

use crate::{
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
    let text = text.trim().as_bytes();
    let mut secret = [0; SECRET_BYTES];
    if text.len() != 2 * SECRET_BYTES {
        return Err(SecretError);
    }
    for (byte, digits) in secret.iter_mut().zip(text.chunks_exact(2)) {
        let digits = std::str::from_utf8(digits).map_err(|_| SecretError)?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| SecretError)?;
    }
    Ok(secret)
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

    /// A user's own log.
    pub fn self_id(&self, user: &UserId) -> ConversationId {
        self.derive(b"self", &[user.as_str().as_bytes()])
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
