//! A file layer under the store: the functions of the C library through which this process writes, replaced.
//!
//! A definition of `write` or `fdatasync` in an executable takes the place of the library's, for the engine too. Here they do the
//! real thing and keep book of what a disk need not have kept yet: bytes written since the last sync of their file, and files
//! created, replaced or deleted since the last sync of their directory. At a chosen operation the power fails: the layer writes an
//! image of the directory as it may be found afterwards, and the process is gone. Syncs can fail, and the disk can be full.
//!
//! Bytes that were not synced are kept, dropped or replaced by garbage, sector by sector. Operations of directories are kept in
//! their order up to some point, as journaling file systems do. A sync of a file does not make its name durable.
//!
//! Off until [`install`]; child processes of the tests install it, the test process itself does not. Not seen: writes that go past
//! the C library or through maps; fjall has none. (A replaced file is renamed past the library, and taken as durable.)

#![allow(unsafe_code, reason = "symbols of the C library can only be replaced by unsafe ones")]

use std::{
    cell::Cell,
    collections::BTreeMap,
    ffi::{CStr, OsStr, c_char, c_int, c_void},
    fs, io,
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

/// The exit code of a process whose power failed.
pub const POWER_FAILED: i32 = 77;

/// What is to happen.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The directory under which files are watched, and where the image of it goes.
    pub root: PathBuf,
    pub image: PathBuf,
    pub seed: u64,
    /// The operation at which the power fails.
    pub power_fails_at: Option<u64>,
    /// The sync from which on every sync fails.
    pub syncs_fail_from: Option<u64>,
    /// Bytes that fit on the disk.
    pub space_bytes: Option<u64>,
}

struct Layer {
    plan: Plan,
    operations: u64,
    syncs: u64,
    written: u64,
    random: u64,
    /// Ranges of files written since their last sync, and the length that is durable.
    dirty: BTreeMap<PathBuf, Dirty>,
    names: Vec<Name>,
}

#[derive(Default)]
struct Dirty {
    ranges: Vec<(u64, u64)>,
    durable_length: u64,
}

/// What happened to a name since the last sync of its directory.
enum Name {
    Created(PathBuf),
    /// With a link to what it was.
    Removed(PathBuf, PathBuf),
}

impl Name {
    fn path(&self) -> &Path {
        match self {
            Self::Created(path) | Self::Removed(path, _) => path,
        }
    }
}

static ON: AtomicBool = AtomicBool::new(false);
static LAYER: Mutex<Option<Layer>> = Mutex::new(None);

thread_local! {
    /// The layer's own file operations pass through.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Puts the layer under this process, for good.
pub fn install(plan: Plan) {
    let random = plan.seed;
    let layer = Layer { plan, operations: 0, syncs: 0, written: 0, random, dirty: BTreeMap::new(), names: Vec::new() };
    *LAYER.lock().expect("not poisoned") = Some(layer);
    ON.store(true, Ordering::SeqCst);
}

/// The layer, for an operation on a path that it watches.
struct Entered {
    layer: MutexGuard<'static, Option<Layer>>,
    path: PathBuf,
}

impl Drop for Entered {
    fn drop(&mut self) {
        INSIDE.set(false);
    }
}

fn enter(path: impl FnOnce() -> Option<PathBuf>) -> Option<Entered> {
    if !ON.load(Ordering::Relaxed) || INSIDE.get() {
        return None;
    }
    INSIDE.set(true);
    let path = path();
    let layer = LAYER.lock().expect("not poisoned");
    let entered = Entered { layer, path: path.clone().unwrap_or_default() };
    let watched =
        path.is_some_and(|path| entered.layer.as_ref().is_some_and(|layer| path.starts_with(&layer.plan.root)));
    watched.then_some(entered)
}

fn path_of(fd: c_int) -> Option<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{fd}")).ok()
}

fn path_from(path: *const c_char) -> Option<PathBuf> {
    // Safety: callers of these functions pass a string, as the C library demands.
    let path = unsafe { CStr::from_ptr(path) };
    Some(PathBuf::from(OsStr::from_bytes(path.to_bytes())))
}

fn fail(errno: c_int) {
    // Safety: the location is this thread's own.
    unsafe { *libc::__errno_location() = errno };
}

#[unsafe(no_mangle)]
extern "C" fn write(fd: c_int, buffer: *const c_void, count: usize) -> isize {
    // Safety: the caller's own arguments are passed on.
    let real = |count: usize| unsafe { libc::syscall(libc::SYS_write, fd, buffer, count) as isize };
    let Some(mut entered) = enter(|| path_of(fd)) else { return real(count) };
    let path = entered.path.clone();
    let layer = entered.layer.as_mut().expect("installed");
    layer.operation();
    let mut count = count;
    if let Some(space) = layer.plan.space_bytes {
        let left = usize::try_from(space.saturating_sub(layer.written)).unwrap_or(usize::MAX);
        if left == 0 {
            fail(libc::ENOSPC);
            return -1;
        }
        count = count.min(left);
    }
    // Safety: plain queries of a descriptor that the caller holds.
    let (append, at) =
        unsafe { (libc::fcntl(fd, libc::F_GETFL) & libc::O_APPEND != 0, libc::lseek(fd, 0, libc::SEEK_CUR)) };
    let at = if append { fs::metadata(&path).map_or(0, |data| data.len()) } else { u64::try_from(at).unwrap_or(0) };
    let done = real(count);
    if let Ok(done) = u64::try_from(done) {
        layer.written += done;
        let dirty = layer.dirty.entry(path).or_insert_with(|| Dirty { ranges: vec![], durable_length: at });
        match dirty.ranges.last_mut() {
            Some((from, length)) if *from + *length == at => *length += done,
            _ => dirty.ranges.push((at, done)),
        }
    }
    done
}

fn sync(fd: c_int, call: libc::c_long) -> c_int {
    // Safety: the caller's own argument is passed on.
    let real = || unsafe { libc::syscall(call, fd) as c_int };
    let Some(mut entered) = enter(|| path_of(fd)) else { return real() };
    let path = entered.path.clone();
    let layer = entered.layer.as_mut().expect("installed");
    layer.operation();
    layer.syncs += 1;
    if layer.plan.syncs_fail_from.is_some_and(|from| layer.syncs >= from) {
        fail(libc::EIO);
        return -1;
    }
    // No real sync: the power of this machine does not fail, and the tests need not wait for its disk.
    if path.is_dir() {
        layer.names.retain(|name| name.path().parent() != Some(&path));
    } else {
        layer.dirty.remove(&path);
    }
    layer.operation();
    0
}

#[unsafe(no_mangle)]
extern "C" fn fsync(fd: c_int) -> c_int {
    sync(fd, libc::SYS_fsync)
}

#[unsafe(no_mangle)]
extern "C" fn fdatasync(fd: c_int) -> c_int {
    sync(fd, libc::SYS_fdatasync)
}

#[unsafe(no_mangle)]
extern "C" fn open64(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    // Safety: the caller's own arguments are passed on.
    let real = || unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags, mode) as c_int };
    if flags & libc::O_CREAT == 0 {
        return real();
    }
    let Some(mut entered) = enter(|| path_from(path)) else { return real() };
    let path = entered.path.clone();
    let existed = path.exists();
    let fd = real();
    if fd >= 0 && !existed {
        entered.layer.as_mut().expect("installed").names.push(Name::Created(path));
    }
    fd
}

#[unsafe(no_mangle)]
extern "C" fn unlink(path: *const c_char) -> c_int {
    // Safety: the caller's own argument is passed on.
    let real = || unsafe { libc::syscall(libc::SYS_unlinkat, libc::AT_FDCWD, path, 0) as c_int };
    let Some(mut entered) = enter(|| path_from(path)) else { return real() };
    let path = entered.path.clone();
    let layer = entered.layer.as_mut().expect("installed");
    layer.operation();
    let kept = layer.plan.root.with_extension(format!("kept-{}", layer.operations));
    let linked = fs::hard_link(&path, &kept).is_ok();
    let done = real();
    if done == 0 && linked {
        layer.names.push(Name::Removed(path, kept));
    }
    done
}

impl Layer {
    /// Counts an operation; at the chosen one the power fails.
    fn operation(&mut self) {
        self.operations += 1;
        if self.plan.power_fails_at == Some(self.operations) {
            let written = self.write_image();
            if let Err(error) = &written {
                eprintln!("the image could not be written: {error}");
            }
            // Safety: ends the process at once, as intended.
            unsafe { libc::_exit(if written.is_ok() { POWER_FAILED } else { 1 }) }
        }
    }

    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.random >> 33
    }

    /// The directory as it may be found when the power is back.
    fn write_image(&mut self) -> io::Result<()> {
        copy_tree(&self.plan.root, &self.plan.image)?;
        let root = self.plan.root.clone();
        let image = self.plan.image.clone();
        let in_image = |path: &Path| image.join(path.strip_prefix(&root).unwrap_or(path));
        let fate = self.random() % 5;
        for (path, dirty) in std::mem::take(&mut self.dirty) {
            if path.exists() {
                self.tear(&in_image(&path), &dirty, fate)?;
            }
        }
        let names = std::mem::take(&mut self.names);
        let kept = usize::try_from(self.random()).unwrap_or(0) % (names.len() + 1);
        for name in names[kept..].iter().rev() {
            match name {
                Name::Created(path) => drop(fs::remove_file(in_image(path))),
                Name::Removed(path, kept) => drop(fs::copy(kept, in_image(path))),
            }
        }
        Ok(())
    }

    /// Decides what became of the bytes that were not synced.
    fn tear(&mut self, path: &Path, dirty: &Dirty, fate: u64) -> io::Result<()> {
        const SECTOR: u64 = 512;
        let file = fs::OpenOptions::new().write(true).open(path)?;
        for &(from, length) in &dirty.ranges {
            let end = from + length;
            // Where a prefix ends.
            let cut = from + self.random() % (length + 1);
            let mut at = from;
            while at < end {
                let next = ((at / SECTOR + 1) * SECTOR).min(end);
                let (keep, garbage) = match fate {
                    0 => (false, false),
                    1 => (true, false),
                    2 => (next <= cut, false),
                    3 => (self.random().is_multiple_of(2), false),
                    _ => (self.random().is_multiple_of(2), true),
                };
                if !keep {
                    let bytes: Vec<u8> = (at..next).map(|_| if garbage { self.random() as u8 } else { 0 }).collect();
                    file.write_all_at(&bytes, at)?;
                }
                at = next;
            }
        }
        // A file that grew may be found short.
        let grown = dirty.ranges.iter().any(|(from, length)| from + length == file.metadata().map_or(0, |d| d.len()));
        if fate == 0 && grown {
            file.set_len(dirty.durable_length)?;
        }
        Ok(())
    }
}

/// Copies a directory, with holes where files end in zeros.
pub fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            let bytes = fs::read(entry.path())?;
            let content = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            fs::write(&target, &bytes[..content])?;
            fs::OpenOptions::new().write(true).open(&target)?.set_len(bytes.len() as u64)?;
        }
    }
    Ok(())
}
