//! The newest client message ids of a conversation, so that a message that is sent again stays single.
//!
//! Entries are appended at one end of a ring and forgotten at the other; a table of ring positions finds them. Both ends of the ring
//! stay in the processor's cache however many conversations are busy, and the table is four bytes an entry: with entries in the table
//! itself each insertion missed the cache several times.

use std::{
    collections::{BTreeSet, VecDeque},
    hash::{BuildHasher as _, RandomState},
    sync::LazyLock,
};

use hashbrown::HashTable;
use im_proto::{Timestamp, UserId, limits, v1::EntryKind};
use im_storage::Row;
use xxhash_rust::xxh3::xxh3_64;

use crate::state;

/// What [`Dedupe::key`] is keyed with: nobody outside this process can know two senders and ids that have one hash. 128 bits of it are
/// the operating system's.
static SECRET: LazyLock<[u8; 32]> = LazyLock::new(|| {
    let random = RandomState::new();
    let mut secret = [0; 32];
    for (word, bytes) in (0_u64..).zip(secret.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&random.hash_one(word).to_be_bytes());
    }
    secret
});

/// What was sent under a client message id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub seq: u64,
    pub sent_at: Timestamp,
    /// What was sent, as [`Dedupe::print`] says; `None` if the entry was read back without its body.
    pub body_hash: Option<u64>,
}

/// The newest client message ids of a conversation.
#[derive(Debug, Default)]
pub struct Dedupe {
    /// In the order in which they came.
    entries: VecDeque<(u128, Seen)>,
    /// Places in `entries`, plus `forgotten`, modulo 2^32: far more than there are entries.
    places: HashTable<u32>,
    /// How many have left `entries`, modulo 2^32.
    forgotten: u32,
    /// All entries above this seq are remembered.
    pub floor: u64,
    limit: usize,
}

impl Dedupe {
    /// Remembers at most `limit` entries; knows everything above `floor`.
    pub fn new(limit: usize, floor: u64) -> Self {
        Self { limit, floor, ..Self::default() }
    }

    /// The 128-bit hash of a sender and a client message id: the first bytes of BLAKE3 over the sender, a zero byte and the id, keyed for
    /// this process. Ids are whatever clients like, and equal keys mean "sent already": with a hash that others can compute, a member
    /// could send a message whose key is that of what another is about to send.
    pub fn key(sender: &UserId, client_message_id: &[u8]) -> u128 {
        let mut input = [0; limits::ID_BYTES_MAX + 1 + limits::CLIENT_MESSAGE_ID_BYTES_MAX];
        let sender = sender.as_str().as_bytes();
        let length = sender.len() + 1 + client_message_id.len();
        let hash = if length > input.len() {
            blake3::keyed_hash(&SECRET, &[sender, &[0], client_message_id].concat())
        } else {
            input[..sender.len()].copy_from_slice(sender);
            input[sender.len() + 1..length].copy_from_slice(client_message_id);
            blake3::keyed_hash(&SECRET, &input[..length])
        };
        let (first, _) = hash.as_bytes().split_first_chunk().unwrap_or((&[0; 16], &[]));
        u128::from_be_bytes(*first)
    }

    /// XXH3-64 of a body.
    pub fn body_hash(body: &[u8]) -> u64 {
        xxh3_64(body)
    }

    /// What a call asks for under its id, whatever comes of it: XXH3-64 of its name and its operands, in order, each behind a zero byte.
    pub fn call_print<'a>(name: &str, operands: impl IntoIterator<Item = &'a str>) -> u64 {
        let operands: BTreeSet<&str> = operands.into_iter().collect();
        let mut input = name.as_bytes().to_vec();
        for operand in operands {
            input.push(0);
            input.extend_from_slice(operand.as_bytes());
        }
        xxh3_64(&input).max(1)
    }

    /// What an entry was sent as: the hash of its body, or what the call asked for that made it.
    pub fn print(row: &Row) -> u64 {
        match row.kind {
            EntryKind::Event => match state::meta(row).print {
                0 => Self::body_hash(&row.body),
                print => print,
            },
            _ => Self::body_hash(&row.body),
        }
    }

    /// What was sent under a key, if it is remembered.
    pub fn get(&self, key: u128) -> Option<Seen> {
        let place = self.find(key)?;
        self.entries.get(place).map(|(_, seen)| *seen)
    }

    /// Remembers the next entry; forgets the oldest over the limit, but never one that is not committed.
    pub fn insert(&mut self, key: u128, seen: Seen, committed: u64) {
        if let Some(known) = self.find(key).and_then(|place| self.entries.get_mut(place)) {
            known.1 = seen;
        } else {
            let place = self.forgotten.wrapping_add(u32::try_from(self.entries.len()).unwrap_or(u32::MAX));
            self.entries.push_back((key, seen));
            let (entries, forgotten) = (&self.entries, self.forgotten);
            self.places.insert_unique(hash(key), place, |place| {
                entries.get(index(*place, forgotten)).map_or(0, |(key, _)| hash(*key))
            });
        }
        while self.entries.len() > self.limit {
            let Some((key, oldest)) = self.entries.front().copied() else { break };
            if oldest.seq > committed {
                break;
            }
            self.floor = self.floor.max(oldest.seq);
            let forgotten = self.forgotten;
            if let Ok(place) = self.places.find_entry(hash(key), |place| *place == forgotten) {
                place.remove();
            }
            self.entries.pop_front();
            self.forgotten = forgotten.wrapping_add(1);
        }
    }

    /// Corrects what was read back, once its body was compared.
    pub fn set_body_hash(&mut self, key: u128, body_hash: u64, sent_at: Timestamp) {
        if let Some((_, seen)) = self.find(key).and_then(|place| self.entries.get_mut(place)) {
            seen.body_hash = Some(body_hash);
            seen.sent_at = sent_at;
        }
    }

    fn find(&self, key: u128) -> Option<usize> {
        let is_it = |place: &u32| {
            self.entries.get(index(*place, self.forgotten)).is_some_and(|(remembered, _)| *remembered == key)
        };
        self.places.find(hash(key), is_it).map(|place| index(*place, self.forgotten))
    }
}

/// Where in the ring.
fn index(place: u32, forgotten: u32) -> usize {
    usize::try_from(place.wrapping_sub(forgotten)).unwrap_or(usize::MAX)
}

/// The key is a good hash already; both its halves count.
fn hash(key: u128) -> u64 {
    (key ^ (key >> 64)) as u64
}
