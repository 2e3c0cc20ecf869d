//! What can be configured of the embedded store. The defaults are the store's own.

use im_storage::EmbeddedOptions;

use super::{
    setting::{Setting, Slot},
    tree::setting,
};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Sizes of the embedded store, in memory.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub queue_bytes: usize,
    pub group_bytes: usize,
    pub memtable_bytes: usize,
    pub cache_bytes: usize,
}

impl Default for StoreConfig {
    fn default() -> Self {
        let options = EmbeddedOptions::default();
        let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        Self {
            queue_bytes: options.queue_bytes,
            group_bytes: options.group_bytes,
            memtable_bytes: size(options.memtable_bytes),
            cache_bytes: size(options.cache_bytes),
        }
    }
}

impl StoreConfig {
    /// The options of the store.
    pub fn options(&self) -> EmbeddedOptions {
        EmbeddedOptions {
            queue_bytes: self.queue_bytes,
            group_bytes: self.group_bytes,
            memtable_bytes: self.memtable_bytes as u64,
            cache_bytes: self.cache_bytes as u64,
            ..EmbeddedOptions::default()
        }
    }
}

/// What can be told the embedded store.
pub fn settings(config: &mut StoreConfig) -> [Setting<'_>; 4] {
    [
        setting(
            "store.queue_bytes",
            "Writes that wait for the disk, in the embedded store. Beyond it senders wait: what they send is tried again for\n\
             router.append_patience.\n\
             256 MiB: a disk that writes 100 MB/s is two and a half seconds behind. docs/limits.md has the whole memory.",
            Slot::Bytes(&mut config.queue_bytes, MIB..=16 * 1024 * MIB),
        ),
        setting(
            "store.group_bytes",
            "Where one commit stops collecting.\n\
             8 MiB: about 60,000 messages, and some 10 ms of a disk that writes 1 GB/s.",
            Slot::Bytes(&mut config.group_bytes, 64 * KIB..=1024 * MIB),
        ),
        setting(
            "store.memtable_bytes",
            "The newest part of the log, in memory and in the journal. Up to three times as much is in use while it is written out.\n\
             64 MiB: half a million messages in a file, so that compaction has few of them.",
            Slot::Bytes(&mut config.memtable_bytes, MIB..=16 * 1024 * MIB),
        ),
        setting(
            "store.cache_bytes",
            "Blocks of the log kept in memory for reads.\n\
             64 MiB: the last pages of some ten thousand conversations.",
            Slot::Bytes(&mut config.cache_bytes, MIB..=1024 * 1024 * MIB),
        ),
    ]
}
