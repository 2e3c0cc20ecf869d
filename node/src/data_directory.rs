//! The data directory of one server: who may use it, the keys in it, and the counter that orders its starts.
//!
//! Invariants: one server at a time (a file lock, which the system drops with the process); every file appears whole or not at
//! all; secrets are readable by their owner only; a secret that messages on disk depend on is never replaced by a new one; the start
//! number grows with every start and is on disk before it is used, so that no epoch is ever used twice.
//! Opening a directory that is complete changes nothing in it; only [`DataDirectory::next_start`] does.
//!
//! It does not read messages, and it does not know the store that lives in `store/`.

mod certificate;
mod file;
mod keys;

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use im_proto::key::{ClusterSecret, RouterSecret, SECRET_BYTES};
use im_proto::token::VerifyKey;
use serde::{Deserialize, Serialize};

pub use keys::{Cluster, read_secret, read_signing_key, read_verify_keys};

/// Revisions of the registry set aside for each start. A start uses one for each shard, and one for each claim that is raised later:
/// a million leaves room for both. 2^40 revisions of a generation hold as many starts again, then the next generation begins.
const REVISIONS_PER_START: u64 = 1 << 20;
const STARTS_PER_GENERATION: u64 = 1 << 20;

/// How long a second server waits before it says that there is a first.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// Why a data directory cannot be used. Nothing was changed that a next start would miss.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("the data directory {} is in use by another server{}; stop that one or choose another with --data", .root.display(), holder(.pid))]
    InUse { root: PathBuf, pid: Option<u32> },
    #[error("cannot {action} {}: {source}; choose another directory or change its permissions", .path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is damaged: {reason}; restore it from a copy", .path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("{} is missing although the directory was used before: restore it from a copy, nothing can be found without it", .0.display())]
    Missing(PathBuf),
    #[error("{}: of {name} {missing} is missing, and {found} is there; put back what is missing, or, to have all of it made anew, remove {found}", .root.display())]
    Part { root: PathBuf, name: &'static str, missing: String, found: String },
    #[error("{} was created with {created} shards and the configuration says {configured}: the number never changes", .root.display())]
    Shards { root: PathBuf, created: u32, configured: u32 },
    #[error("{} belongs to the cluster {own}; choose a directory that does not exist yet", .root.display())]
    OtherCluster { root: PathBuf, own: String },
}

fn holder(pid: &Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// A data directory that no other server can take.
#[derive(Debug)]
pub struct DataLock {
    root: PathBuf,
    /// Held, never read.
    _lock: File,
}

/// A data directory with everything in it that a server needs.
#[derive(Debug)]
pub struct DataDirectory {
    lock: DataLock,
    pub cluster: Cluster,
    pub cluster_secret: ClusterSecret,
    pub router_secret: RouterSecret,
    /// Ends QUIC connections of earlier starts.
    pub reset_key: [u8; 32],
    pub verify_keys: Vec<VerifyKey>,
}

/// One start of a server on its data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// 1 for the first.
    pub number: u64,
}

/// Where a running server can be reached, for scripts and for `im --as`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    pub pid: u32,
    pub version: String,
    /// `router` or `gateway`, if the process is one role of a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// As it is registered when the file is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quic: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// What signed the certificate that clients see.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    pub data: PathBuf,
}

impl DataLock {
    /// Creates the directory if it is missing, and takes it.
    pub fn take(root: &Path) -> Result<Self, DataError> {
        file::create_directory(root)?;
        let root = root.canonicalize().map_err(file::failed("find", root))?;
        let path = root.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(file::failed("open", &path))?;
        match lock_within(&lock, LOCK_PATIENCE) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DataError::InUse { pid: running(&root), root }),
            Err(TryLockError::Error(error)) => return Err(file::failed("lock", &path)(error)),
        }
        // What a killed server left behind would make scripts believe that it still listens.
        file::remove_if_there(&root.join("ready.json"))?;
        Ok(Self { root, _lock: lock })
    }

    /// Creates what the processes of a cluster need, beside what [`Self::open`] creates. Certificates that are made now are for this
    /// machine and `hosts`; says what may not be as it was wished.
    pub fn create_secrets(self, shards: u32, hosts: &[String]) -> Result<Vec<String>, DataError> {
        let root = self.root.clone();
        certificate::refuse_parts(&root)?;
        certificate::create_if_missing(&root, hosts)?;
        certificate::create_services_if_missing(&root, hosts)?;
        drop(self.open(shards)?);
        let mut notes: Vec<String> = hosts.iter().filter_map(|host| host_note(&root, host)).collect();
        if !root.join("keys").join("signing.pk8").exists() {
            notes.push(
                "keys/signing.pk8 is not here: no token can be made with this directory, and the keys of keys/verify.json stay in \
                 force; put it back, or remove keys/verify.json for a new pair, which ends all tokens"
                    .to_owned(),
            );
        }
        Ok(notes)
    }

    /// Creates a directory for a cluster that exists elsewhere, with keys of its own. One that was created so before is left as it is.
    pub fn found(self, cluster: &Cluster, cluster_secret: [u8; SECRET_BYTES]) -> Result<DataLock, DataError> {
        let path = self.root.join("cluster.json");
        match file::read_json_if_there::<Cluster>(&path)? {
            Some(own) if own == *cluster => {}
            Some(own) => return Err(DataError::OtherCluster { root: self.root, own: own.cluster_id }),
            None => {
                keys::write_secret(&self.root.join("cluster.secret"), cluster_secret)?;
                file::write_json(&path, cluster, file::Access::Everybody)?;
            }
        }
        let data = self.open(cluster.shards)?;
        // A store without a count of starts would be taken for one that has lost it.
        if !data.root().join("epoch").exists() {
            data.next_start()?;
        }
        Ok(data.into_lock())
    }

    /// Creates what is missing.
    pub fn open(self, shards: u32) -> Result<DataDirectory, DataError> {
        let root = self.root.clone();
        let used = root.join("store").exists() || root.join("epoch").exists();
        let cluster = Cluster::read_or_create(&root, shards, used)?;
        if cluster.shards != shards {
            return Err(DataError::Shards { root, created: cluster.shards, configured: shards });
        }
        let cluster_secret = ClusterSecret::new(keys::secret(&root.join("cluster.secret"), used)?);
        // Capabilities end with the sessions of this process: a new secret would do no harm.
        let router_secret = RouterSecret::new(keys::secret(&root.join("router.secret"), false)?);
        let reset_key = keys::secret(&root.join("tls").join("reset.secret"), false)?;
        let verify_keys = keys::verify_keys(&root)?;
        certificate::create_if_missing(&root, &[])?;
        if root.join("store").exists() && !root.join("epoch").exists() {
            return Err(DataError::Missing(root.join("epoch")));
        }
        Ok(DataDirectory { lock: self, cluster, cluster_secret, router_secret, reset_key, verify_keys })
    }
}

/// Certificates that were there before stay as they are, whatever hosts are asked for.
fn host_note(root: &Path, host: &str) -> Option<String> {
    let lacking = certificate::lacking(root, host);
    (!lacking.is_empty()).then(|| {
        format!(
            "--host {host} had no effect on {}: what is there stays; docs/cluster.md says how to add a host",
            lacking.join(", ")
        )
    })
}

/// A server that was just killed holds its lock until the system has taken it apart.
fn lock_within(lock: &File, patience: Duration) -> Result<(), TryLockError> {
    for _ in 0..patience.as_millis() / LOCK_INTERVAL.as_millis() {
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_INTERVAL),
            decided => return decided,
        }
    }
    lock.try_lock()
}

impl DataLock {
    /// The absolute path.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Tells scripts that every listener accepts.
    pub fn write_ready(&self, ready: &Ready) -> Result<(), DataError> {
        file::write_json(&self.root.join("ready.json"), ready, file::Access::Everybody)
    }

    /// The server is about to stop.
    pub fn remove_ready(&self) -> Result<(), DataError> {
        file::remove_if_there(&self.root.join("ready.json"))
    }
}

impl DataDirectory {
    /// Gives up what was read; the directory stays taken.
    pub fn into_lock(self) -> DataLock {
        self.lock
    }

    /// The lock on it, which is where `ready.json` is written.
    pub fn lock(&self) -> &DataLock {
        &self.lock
    }

    /// The absolute path.
    pub fn root(&self) -> &Path {
        &self.lock.root
    }

    /// Where the store lives.
    pub fn store(&self) -> PathBuf {
        self.lock.root.join("store")
    }

    /// What signed the server's certificate, for clients; nothing if its operator left it away.
    pub fn ca(&self) -> Option<PathBuf> {
        Some(self.lock.root.join("ca.pem")).filter(|path| path.exists())
    }

    /// The server's certificate chain.
    pub fn certificate(&self) -> PathBuf {
        self.lock.root.join("tls").join("cert.pem")
    }

    /// The private key of the certificate.
    pub fn certificate_key(&self) -> PathBuf {
        self.lock.root.join("tls").join("key.pem")
    }

    /// Raises the start number; on disk when this returns.
    pub fn next_start(&self) -> Result<Start, DataError> {
        Start::next(&self.lock.root.join("epoch"))
    }
}

impl Start {
    /// Raises the counter in a file; on disk when this returns.
    fn next(path: &Path) -> Result<Self, DataError> {
        let number = match file::read_if_there(path)? {
            None => 1,
            Some(text) => {
                text.trim().parse::<u64>().ok().and_then(|last| last.checked_add(1)).ok_or_else(|| {
                    DataError::Damaged { path: path.to_owned(), reason: "it holds no number".to_owned() }
                })?
            }
        };
        file::write(path, format!("{number}\n").as_bytes(), file::Access::Everybody)?;
        Ok(Self { number })
    }

    /// The generation of the epochs of this start.
    pub fn generation(self) -> u64 {
        1 + self.number / STARTS_PER_GENERATION
    }

    /// Every revision of the registry in this start is above this one, and every revision of earlier starts of the generation is not.
    pub fn first_revision(self) -> u64 {
        (self.number % STARTS_PER_GENERATION) * REVISIONS_PER_START
    }
}

/// Who wrote `ready.json`.
fn running(root: &Path) -> Option<u32> {
    let text = fs::read_to_string(root.join("ready.json")).ok()?;
    serde_json::from_str::<Ready>(&text).ok().map(|ready| ready.pid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use im_proto::{Epoch, UserId};

    use super::*;

    fn open(root: &Path) -> Result<DataDirectory, DataError> {
        DataLock::take(root)?.open(16)
    }

    #[test]
    fn a_second_server_is_refused_and_the_first_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let first = open(root.path()).unwrap();
        let ready = Ready {
            pid: 7,
            version: String::new(),
            role: None,
            instance: None,
            tcp: None,
            tls: None,
            quic: None,
            api: None,
            http: None,
            link: None,
            ca: first.ca(),
            data: first.root().to_owned(),
        };
        first.lock().write_ready(&ready).unwrap();
        assert!(matches!(open(root.path()), Err(DataError::InUse { pid: Some(7), .. })));
        assert!(root.path().join("ready.json").exists());
        drop(first);
        open(root.path()).unwrap();
        assert!(!root.path().join("ready.json").exists(), "left by a killed server");
    }

    #[test]
    fn another_start_finds_the_same_ids_and_keys_and_a_later_epoch() {
        let root = tempfile::tempdir().unwrap();
        let user = UserId::parse("alice").unwrap();
        let look = || {
            let data = open(root.path()).unwrap();
            let start = data.next_start().unwrap();
            let epoch = Epoch::new(start.generation(), start.first_revision());
            (data.cluster_secret.self_id(&user), data.verify_keys.clone(), data.cluster.clone(), epoch)
        };
        let first = look();
        let second = look();
        assert_eq!((first.0, &first.1, &first.2), (second.0, &second.1, &second.2));
        assert!(second.3 > first.3);
    }

    #[test]
    fn epochs_grow_over_the_edge_of_a_generation() {
        let epoch = |number| {
            let start = Start { number };
            (Epoch::new(start.generation(), start.first_revision()), start.first_revision() + REVISIONS_PER_START)
        };
        for number in [1, STARTS_PER_GENERATION - 2, STARTS_PER_GENERATION - 1, STARTS_PER_GENERATION, 5 << 20] {
            assert!(epoch(number).0 < epoch(number + 1).0, "{number}");
            assert!(epoch(number).1 <= 1 << Epoch::REVISION_BITS, "{number}");
        }
    }

    #[test]
    fn secrets_are_readable_by_their_owner_only() {
        let root = tempfile::tempdir().unwrap();
        let _data = open(root.path()).unwrap();
        for name in ["cluster.secret", "router.secret", "keys/signing.pk8", "tls/key.pem", "tls/reset.secret"] {
            let mode = fs::metadata(root.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn what_messages_depend_on_is_never_made_anew() {
        for name in ["cluster.secret", "cluster.json", "epoch"] {
            let root = tempfile::tempdir().unwrap();
            open(root.path()).unwrap().next_start().unwrap();
            fs::create_dir(root.path().join("store")).unwrap();
            fs::remove_file(root.path().join(name)).unwrap();
            assert!(matches!(open(root.path()), Err(DataError::Missing(path)) if path.ends_with(name)), "{name}");
        }
    }

    #[test]
    fn damage_is_named() {
        for name in ["cluster.secret", "cluster.json", "epoch", "keys/signing.pk8", "keys/verify.json"] {
            let root = tempfile::tempdir().unwrap();
            drop(open(root.path()).unwrap());
            fs::write(root.path().join(name), "x").unwrap();
            let outcome = open(root.path()).and_then(|data| data.next_start());
            assert!(matches!(outcome, Err(DataError::Damaged { path, .. }) if path.ends_with(name)), "{name}");
        }
    }

    #[test]
    fn another_number_of_shards_is_refused() {
        let root = tempfile::tempdir().unwrap();
        drop(open(root.path()).unwrap());
        let error = DataLock::take(root.path()).unwrap().open(17).unwrap_err();
        assert!(matches!(error, DataError::Shards { created: 16, configured: 17, .. }));
    }
}
