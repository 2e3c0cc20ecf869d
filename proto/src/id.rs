//! Identifiers as newtypes. What comes from a peer is parsed once, here, and is valid from then on.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

use crate::{hex, limits};

/// Why a text is no identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("an id must not be empty")]
    Empty,
    #[error("an id has at most {limit} bytes, this one has {found}")]
    TooLong { found: usize, limit: usize },
    #[error("an id must not hold control characters or white space")]
    Character,
    #[error("a conversation id is {} bytes, or {} hexadecimal digits", ConversationId::BYTES, 2 * ConversationId::BYTES)]
    Conversation,
}

/// Whether a text could be a [`UserId`] and the like, without making one.
pub(crate) fn check_text(text: &str, limit: usize) -> Result<(), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty);
    }
    if text.len() > limit {
        return Err(IdError::TooLong { found: text.len(), limit });
    }
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(IdError::Character);
    }
    Ok(())
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// 1 to 64 bytes of UTF-8 without control characters and white space.
            pub fn parse(text: &str) -> Result<Self, IdError> {
                check_text(text, limits::ID_BYTES_MAX)?;
                Ok(Self(Arc::from(text)))
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::parse(text)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", &self.0)
            }
        }
    };
}

text_id! {
    /// A user, as the issuer of tokens names them.
    UserId
}
text_id! {
    /// One installation of a client; unique for its user.
    DeviceId
}
text_id! {
    /// The kind of device, for the device policy: `phone`, `desktop`, `terminal`, …
    Platform
}
text_id! {
    /// One start of a gateway or router process. A restarted process has a new one.
    InstanceId
}

/// A conversation: a keyed 128-bit hash (see [`crate::key::ClusterSecret`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConversationId([u8; Self::BYTES]);

impl ConversationId {
    /// Length on the wire.
    pub const BYTES: usize = 16;

    /// From its bytes.
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// From bytes on the wire.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, IdError> {
        bytes.try_into().map(Self).map_err(|_| IdError::Conversation)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// For a field of a message.
    pub fn to_bytes(self) -> bytes::Bytes {
        bytes::Bytes::copy_from_slice(&self.0)
    }
}

/// 32 lower-case hexadecimal digits.
impl fmt::Display for ConversationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ConversationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ConversationId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        hex::decode(text.as_bytes()).map(Self).ok_or(IdError::Conversation)
    }
}

/// A session of a client at a gateway; unique for one boot of that gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// One start of a process; 0 is never used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootId(pub u64);

/// The number of a shard claim: `generation · 2^40 + revision`. It is the write timestamp of everything the owner writes to the
/// message log, so it must stay below the present in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl Epoch {
    /// Bits of the registry's revision below the generation.
    pub const REVISION_BITS: u32 = 40;

    /// Of a generation and the revision of a claim. Never smaller for a greater generation or revision, whatever their size; the
    /// bits are only kept apart below generation 2^24 and revision 2^40.
    pub const fn new(generation: u64, revision: u64) -> Self {
        Self(generation.saturating_mul(1 << Self::REVISION_BITS).saturating_add(revision))
    }

    /// The generation it was made in.
    pub const fn generation(self) -> u64 {
        self.0 >> Self::REVISION_BITS
    }

    /// The revision of the claim.
    pub const fn revision(self) -> u64 {
        self.0 & ((1 << Self::REVISION_BITS) - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_1_to_64_bytes_without_control_characters_and_white_space() {
        for good in ["a", "user:1@example.com", "Ünï©ødé", "用户", &"x".repeat(64)] {
            assert_eq!(UserId::parse(good).map(|id| id.to_string()), Ok(good.to_owned()));
        }
        assert_eq!(UserId::parse(""), Err(IdError::Empty));
        assert_eq!(UserId::parse(&"x".repeat(65)), Err(IdError::TooLong { found: 65, limit: 64 }));
        assert_eq!(UserId::parse(&"é".repeat(33)), Err(IdError::TooLong { found: 66, limit: 64 }));
        for bad in ["a b", "a\n", "\u{0}", "\u{7f}", "a\u{85}", "\u{2028}", "\u{a0}", "\t"] {
            assert_eq!(UserId::parse(bad), Err(IdError::Character), "{bad:?}");
        }
    }

    #[test]
    fn conversation_ids_round_trip_through_text() {
        let id = ConversationId::from_bytes(*b"0123456789abcdef");
        assert_eq!(id.to_string(), "30313233343536373839616263646566");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
        assert_eq!(ConversationId::from_slice(&id.to_bytes()), Ok(id));
    }

    #[test]
    fn what_is_no_conversation_id_is_refused() {
        // `+f` is a number to the standard library.
        for bad in ["", "00", &"+f".repeat(16), &"0".repeat(31), &"0".repeat(33), &"g".repeat(32), &"é".repeat(16)] {
            assert_eq!(bad.parse::<ConversationId>(), Err(IdError::Conversation), "{bad:?}");
        }
        for length in [0, 15, 17, 10_000] {
            assert_eq!(ConversationId::from_slice(&vec![0; length]), Err(IdError::Conversation));
        }
    }

    #[test]
    fn epochs_order_by_generation_then_revision_and_never_wrap() {
        assert_eq!(Epoch::new(3, 5).0, 3 * (1 << 40) + 5);
        assert_eq!(Epoch::new(3, 5).generation(), 3);
        assert!(Epoch::new(1, 0) > Epoch::new(0, (1 << 40) - 1));
        assert!(Epoch::new(u64::MAX, u64::MAX) >= Epoch::new(1 << 24, 0));
        assert!(Epoch::new(1, 1 << 41) > Epoch::new(1, 1 << 40));
    }
}
