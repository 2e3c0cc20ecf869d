//! The fjall database under the embedded store: opening it, and reading from it.
//!
//! Opening is strict. fjall by itself cuts its journal at the first byte that it cannot parse and creates what it misses, which is
//! right for a torn tail and silent loss for damage; so the directory is checked first ([`super::journal`]) and a new database is
//! built under another name and renamed when it is complete.

use std::{
    fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use fjall::{
    CompressionType, Database, Guard, Keyspace, KeyspaceCreateOptions, KvSeparationOptions,
    config::{BlockSizePolicy, FilterPolicy, FilterPolicyEntry},
};
use im_proto::InstanceId;

use super::{EmbeddedOptions, journal, record};
use crate::{model::StoreError, order::StateCell};

const LOG: &str = "log";
const STATE: &str = "state";
/// What compaction compresses, checks and writes at once, and a read reads. With 4 KiB, the engine's own default, a message costs a fifth
/// more CPU under full load (ADR 0002); a page of a hundred short messages is one or two of these. A store keeps what it was created with.
const LOG_BLOCK_BYTES: u32 = 16 * 1024;
const DIRECTORY: &str = "fjall";
const DIRECTORY_NEW: &str = "fjall.new";

/// An open database.
pub(super) struct Engine {
    pub(super) database: Database,
    pub(super) log: Keyspace,
    pub(super) state: Keyspace,
}

impl Engine {
    /// Opens what is in a directory, or creates it.
    pub(super) fn open(directory: &Path, options: &EmbeddedOptions) -> Result<Self, StoreError> {
        let path = directory.join(DIRECTORY);
        if path.try_exists().map_err(|error| cannot_open(&path, &error))? {
            journal::check_directory(&path)?;
        } else {
            create(directory, options)?;
        }
        Self::open_database(&path, options)
    }

    fn open_database(path: &Path, options: &EmbeddedOptions) -> Result<Self, StoreError> {
        // Some checks of the engine are assertions; damage must not take the process down without a word.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let database = Database::builder(path)
                .cache_size(options.cache_bytes)
                .journal_compression(CompressionType::None)
                .worker_threads(options.worker_threads.max(2))
                .open()?;
            let log = database.keyspace(LOG, || log_options(options))?;
            let state = database.keyspace(STATE, || KeyspaceCreateOptions::default().max_memtable_size(8 << 20))?;
            Ok(Self { database, log, state })
        }));
        match opened {
            Ok(Ok(engine)) => Ok(engine),
            Ok(Err(error)) => Err(open_error(path, error)),
            Err(_) => Err(restore(path, "the engine could not make sense of it")),
        }
    }

    /// The newest version of a state row, by its stored key.
    pub(super) fn state_cell(&self, key: &[u8]) -> Result<Option<StateCell>, StoreError> {
        let value = self.state.get(key).map_err(read_error)?;
        value.map(|value| record::decode_state(&value)).transpose()
    }

    /// All fenced instances.
    pub(super) fn fences(&self) -> Result<Vec<InstanceId>, StoreError> {
        let instance = |entry: Guard| {
            let key = entry.key().map_err(read_error)?;
            let text = std::str::from_utf8(&key[record::FENCE_PREFIX.len()..]).ok();
            text.and_then(|text| InstanceId::parse(text).ok())
                .ok_or_else(|| StoreError::Damaged("a fence row names no instance; restore from a backup".into()))
        };
        self.state.prefix(record::FENCE_PREFIX).map(instance).collect()
    }

    /// The generation of the cluster, 0 if it was never raised.
    pub(super) fn generation(&self) -> Result<u64, StoreError> {
        let Some(value) = self.state.get(record::GENERATION_KEY).map_err(read_error)? else { return Ok(0) };
        let bytes = value[..].try_into();
        bytes.map(u64::from_be_bytes).map_err(|_| StoreError::Damaged("the generation row is no number".into()))
    }
}

/// Rows are only read by ranges, so filters would be dead weight; long runs are kept out of the tree, so that compaction moves keys
/// and not messages.
fn log_options(options: &EmbeddedOptions) -> KeyspaceCreateOptions {
    let separation = options
        .blob_threshold_bytes
        .map(|bytes| KvSeparationOptions::default().separation_threshold(bytes).compression(CompressionType::None));
    KeyspaceCreateOptions::default()
        .max_memtable_size(options.memtable_bytes)
        .filter_policy(FilterPolicy::all(FilterPolicyEntry::None))
        .data_block_size_policy(BlockSizePolicy::all(LOG_BLOCK_BYTES))
        .with_kv_separation(separation)
}

/// Builds a new database aside and puts it in place whole: a crash on the way leaves nothing that looks like a store.
fn create(directory: &Path, options: &EmbeddedOptions) -> Result<(), StoreError> {
    let (path, building) = (directory.join(DIRECTORY), directory.join(DIRECTORY_NEW));
    let io = |error: io::Error| cannot_open(directory, &error);
    fs::create_dir_all(directory).map_err(io)?;
    match fs::remove_dir_all(&building) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
        _ => {}
    }
    drop(Engine::open_database(&building, options)?);
    fs::rename(&building, &path).map_err(io)?;
    fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(io)
}

/// An error of a read.
pub(super) fn read_error(error: fjall::Error) -> StoreError {
    StoreError::Damaged(format!("a read failed: {error}; check the disk, restore the data directory from a backup"))
}

pub(super) fn restore(path: &Path, what: &str) -> StoreError {
    StoreError::Damaged(format!("{}: {what}; restore the data directory from a backup", path.display()))
}

pub(super) fn cannot_open(path: &Path, error: &io::Error) -> StoreError {
    StoreError::Open(format!("{}: {error}", path.display()))
}

fn open_error(path: &Path, error: fjall::Error) -> StoreError {
    match error {
        fjall::Error::Locked => StoreError::InUse(format!("{}", path.display())),
        fjall::Error::Io(error) | fjall::Error::Storage(fjall::LsmError::Io(error)) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof => {
                restore(path, &format!("a file is missing or short ({error})"))
            }
            _ => cannot_open(path, &error),
        },
        other => restore(path, &other.to_string()),
    }
}
