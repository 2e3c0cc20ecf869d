//! Which device `im --as USER` is: the first of `im-PLACE-1`, `im-PLACE-2`, … that no other process has now.
//!
//! The server stores a user's devices, and a new session of a device takes the place of its older one. So commands that run one after the
//! other are one device, and those that run at the same time are several. A device is taken by the lock of an empty file in the data
//! directory; the system gives it back when the process ends, however it ends. PLACE stands for the machine and the directory: several
//! directories may belong to one cluster, and each has its own locks.

use std::{
    fs::{self, File, TryLockError},
    path::Path,
};

use im_proto::{UserId, environment::Environment, limits};

/// Where the files are, in the data directory.
const FOLDER: &str = "terminals";

/// A device that is this process's until it is dropped.
#[derive(Debug)]
pub(super) struct DevicePlace {
    place: u32,
    number: usize,
    _locked: File,
}

impl DevicePlace {
    /// `None` where nothing can be written or locked, or if all are taken.
    pub(super) fn take(root: &Path, user: &UserId) -> Option<Self> {
        let folder = root.join(FOLDER);
        fs::create_dir_all(&folder).ok()?;
        // A user's name may have what no name of a file may have.
        let name: String = user.as_str().bytes().map(|byte| format!("{byte:02x}")).collect();
        let place = place(&root.canonicalize().ok()?);
        for number in 1..=limits::DEVICES_MAX {
            let file = File::create(folder.join(format!("{name}.{number}"))).ok()?;
            match file.try_lock() {
                Ok(()) => return Some(Self { place, number, _locked: file }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(_)) => return None,
            }
        }
        None
    }

    pub(super) fn device(&self) -> String {
        format!("im-{:08x}-{}", self.place, self.number)
    }
}

/// FNV-1a (RFC 9923) of the machine's name and the directory: the same for each command, whatever compiler it was built with.
fn place(root: &Path) -> u32 {
    let machine = rustix::system::uname();
    let named = machine.nodename().to_bytes().iter().chain(root.as_os_str().as_encoded_bytes());
    named.fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// For one command alone.
pub(super) fn made_up(environment: &Environment) -> String {
    format!("im-{:016x}", environment.random.next_u64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(root: &Path, user: &str) -> DevicePlace {
        DevicePlace::take(root, &user.parse().unwrap()).expect("a device")
    }

    #[test]
    fn one_after_the_other_is_one_device_and_at_the_same_time_are_several() {
        let folder = tempfile::tempdir().unwrap();
        let device = take(folder.path(), "alice").device();
        assert!(device.ends_with("-1") && device.parse::<im_proto::DeviceId>().is_ok(), "{device}");
        for _ in 0..200 {
            assert_eq!(take(folder.path(), "alice").device(), device);
        }
        let (first, second) = (take(folder.path(), "alice"), take(folder.path(), "alice"));
        assert_eq!(first.device(), device);
        assert_eq!(second.device().strip_suffix("-2"), device.strip_suffix("-1"));
        assert_eq!(take(folder.path(), "bob").device(), device, "another user's are others");
        drop(first);
        assert_eq!(take(folder.path(), "alice").device(), device, "the first that is free");
        assert_eq!(take(folder.path(), "../ä/b:c").device(), device, "whatever the name has in it");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is outside of its folder");
        let elsewhere = tempfile::tempdir().unwrap();
        assert_ne!(take(elsewhere.path(), "alice").device(), device, "another directory of the same cluster");
    }

    #[test]
    fn where_nothing_can_be_written_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FOLDER), "").unwrap();
        assert!(DevicePlace::take(folder.path(), &"alice".parse().unwrap()).is_none());
    }
}
