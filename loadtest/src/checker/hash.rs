//! Hashes that are the same in every run and on every machine.

use std::hash::{BuildHasherDefault, Hasher};

use xxhash_rust::xxh3;

/// For maps whose keys are hashes or small numbers: no second hash, and an order that is the same each time.
pub(super) type ByHash = BuildHasherDefault<KeyIsHash>;

/// Spreads an integer by one multiplication.
#[derive(Default)]
pub(super) struct KeyIsHash(u64);

impl Hasher for KeyIsHash {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3::xxh3_64_with_seed(bytes, self.0);
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    }
}

/// Of a user id, as the seed of that user's message ids.
pub(super) fn user(user: &str) -> u64 {
    xxh3::xxh3_64(user.as_bytes())
}

/// Of sender and client message id. An entry without a client message id has none: 0.
pub(super) fn message(user: u64, client_message_id: &[u8]) -> u64 {
    if client_message_id.is_empty() {
        return 0;
    }
    xxh3::xxh3_64_with_seed(client_message_id, user).max(1)
}

/// Of a body.
pub(super) fn body(body: &[u8]) -> u64 {
    xxh3::xxh3_64(body)
}
