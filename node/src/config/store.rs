//! What can be configured of the embedded store. The defaults are the store's own.

use im_storage::EmbeddedOptions;

use super::{
    setting::{Setting, Slot},
    tree::setting,
};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Sizes of the embedded store, in memory, and its threads.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub queue_bytes: usize,
    pub group_bytes: usize,
    pub memtable_bytes: usize,
    pub cache_bytes: usize,
    pub worker_threads: usize,
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
            worker_threads: options.worker_threads,
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
            worker_threads: self.worker_threads,
            ..EmbeddedOptions::default()
        }
    }
}

/// What can be told the embedded store.
pub fn settings(config: &mut StoreConfig) -> [Setting<'_>; 5] {
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
            "The newest part of the log, in memory and in the journal. Up to five times as much is in use while it is written out.\n\
             64 MiB: half a million messages in a file, so that compaction has few of them. A store keeps what it was created with.",
            Slot::Bytes(&mut config.memtable_bytes, MIB..=16 * 1024 * MIB),
        ),
        setting(
            "store.cache_bytes",
            "Blocks of the log kept in memory for reads.\n\
             64 MiB: the last pages of some four thousand conversations.",
            Slot::Bytes(&mut config.cache_bytes, MIB..=1024 * 1024 * MIB),
        ),
        setting(
            "store.worker_threads",
            "Threads that write out what the journal holds, and compact it. They rest unless there is work.\n\
             4: one that is always free to write out, and enough others that requests to compact do not go round in circles; two use up\n\
             to a core more while a compaction runs.",
            Slot::Count(&mut config.worker_threads, 2..=64),
        ),
    ]
}
