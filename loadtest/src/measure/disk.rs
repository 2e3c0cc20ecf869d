//! Cache flushes of the device below a directory: without one, what is acknowledged may be in a cache that loses power.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde::Serialize;

/// Device mappers and RAIDs below one another: more is a loop.
const LAYERS_MAX: usize = 8;
/// The column of `stat` with the flushes that were completed.
const FLUSHES: usize = 15;

/// The disks that hold a directory.
#[derive(Clone, Debug)]
pub struct Disk(Result<Vec<PathBuf>, String>);

/// How often a disk flushed its cache within some time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Flushes {
    pub device: String,
    pub count: Option<u64>,
    /// Why there is no count.
    pub unknown: Option<String>,
}

/// A count that has begun.
pub struct Watch {
    disk: Disk,
    begun: Option<u64>,
}

impl Disk {
    /// The disks below a directory of this machine.
    pub fn of(directory: &Path) -> Self {
        Self(number(directory).and_then(|number| devices(Path::new("/sys"), number)))
    }

    /// Nobody knows which disk it is.
    pub fn unknown(why: &str) -> Self {
        Self(Err(why.to_owned()))
    }

    /// Counts from now on.
    pub fn watch(self) -> Watch {
        let begun = self.flushes();
        Watch { disk: self, begun }
    }

    fn flushes(&self) -> Option<u64> {
        self.0.as_ref().ok()?.iter().map(|device| flushes(device)).sum()
    }
}

impl Watch {
    /// Until now.
    pub fn until_now(&self) -> Flushes {
        let count = self.disk.flushes().zip(self.begun).map(|(now, begun)| now.saturating_sub(begun));
        match &self.disk.0 {
            Ok(devices) => {
                let names: Vec<String> = devices.iter().map(|device| name(device)).collect();
                let unknown = count.is_none().then(|| "the kernel does not show its counters any more".to_owned());
                Flushes { device: names.join(", "), count, unknown }
            }
            Err(why) => Flushes { device: String::new(), count: None, unknown: Some(why.clone()) },
        }
    }
}

/// Major and minor number of the block device below a directory.
fn number(directory: &Path) -> Result<(u32, u32), String> {
    let split = |device: u64| (rustix::fs::major(device), rustix::fs::minor(device));
    let found = fs::metadata(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    if rustix::fs::major(found.dev()) != 0 {
        return Ok(split(found.dev()));
    }
    // A file system with numbers of its own (btrfs) says in its mount which device it is on; others are on none.
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    let mounted = super::mount_of(&mounts, &directory).map(|(source, kind)| (PathBuf::from(source), kind.to_owned()));
    let (source, kind) = mounted.unwrap_or_default();
    let device = fs::metadata(&source).map(|found| found.rdev()).unwrap_or(0);
    if source.starts_with("/dev") && device != 0 {
        return Ok(split(device));
    }
    Err(format!("{} is on a file system ({kind}) whose device is not known", directory.display()))
}

/// The whole disks below a block device.
fn devices(sys: &Path, (major, minor): (u32, u32)) -> Result<Vec<PathBuf>, String> {
    let device = sys.join(format!("dev/block/{major}:{minor}")).canonicalize();
    let device = device.map_err(|_| format!("the kernel shows no block device {major}:{minor}"))?;
    let mut found = Vec::new();
    below(device, LAYERS_MAX, &mut found)?;
    Ok(found)
}

fn below(mut device: PathBuf, layers: usize, found: &mut Vec<PathBuf>) -> Result<(), String> {
    // Flushes are counted for whole disks only.
    if device.join("partition").exists() {
        device.pop();
    }
    let slaves = fs::read_dir(device.join("slaves")).into_iter().flatten().flatten();
    let slaves: Vec<PathBuf> = slaves.filter_map(|slave| slave.path().canonicalize().ok()).collect();
    if let (false, Some(layers)) = (slaves.is_empty(), layers.checked_sub(1)) {
        return slaves.into_iter().try_for_each(|slave| below(slave, layers, found));
    }
    let cache = fs::read_to_string(device.join("queue/write_cache")).unwrap_or_default();
    if cache.trim() == "write through" {
        return Err(format!(
            "{} says that it has no cache that could lose power, so it is never flushed",
            name(&device)
        ));
    }
    if flushes(&device).is_none() {
        return Err(format!("the kernel counts no flushes of {}", name(&device)));
    }
    if !found.contains(&device) {
        found.push(device);
    }
    Ok(())
}

fn flushes(device: &Path) -> Option<u64> {
    fs::read_to_string(device.join("stat")).ok()?.split_whitespace().nth(FLUSHES)?.parse().ok()
}

fn name(device: &Path) -> String {
    device.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const STAT: &str = "1 0 8 1 2 0 16 2 0 3 3 0 0 0 0 41 5\n";
    const STAT_OF_OLD_KERNELS: &str = "1 0 8 1 2 0 16 2 0 3 3\n";

    /// A `/sys` with one block device 8:0, another 8:1 that may be its partition, and 253:0 on top of that.
    fn sys(stat: &str, cache: &str) -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let disk = sys.path().join("devices/sda");
        for folder in ["devices/sda/queue", "devices/sda/sda1", "devices/dm-0/slaves", "dev/block"] {
            fs::create_dir_all(sys.path().join(folder)).unwrap();
        }
        fs::write(disk.join("stat"), stat).unwrap();
        fs::write(disk.join("queue/write_cache"), cache).unwrap();
        fs::write(disk.join("sda1/partition"), "1\n").unwrap();
        symlink(disk.join("sda1"), sys.path().join("devices/dm-0/slaves/sda1")).unwrap();
        for (number, device) in [("8:0", "sda"), ("8:1", "sda/sda1"), ("253:0", "dm-0")] {
            symlink(sys.path().join("devices").join(device), sys.path().join("dev/block").join(number)).unwrap();
        }
        sys
    }

    #[test]
    fn the_whole_disk_is_found_below_partitions_and_mappers() {
        let sys = sys(STAT, "write back\n");
        for number in [(8, 0), (8, 1), (253, 0)] {
            let disk = Disk(devices(sys.path(), number));
            assert_eq!(disk.flushes(), Some(41), "{number:?}");
            let watch = disk.watch();
            fs::write(sys.path().join("devices/sda/stat"), STAT.replace("41", "43")).unwrap();
            assert_eq!(watch.until_now(), Flushes { device: "sda".to_owned(), count: Some(2), unknown: None });
            fs::write(sys.path().join("devices/sda/stat"), STAT).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_counted_says_why() {
        let why = |stat: &str, cache: &str, number| devices(sys(stat, cache).path(), number).unwrap_err();
        assert!(why(STAT_OF_OLD_KERNELS, "write back\n", (8, 1)).contains("counts no flushes of sda"));
        assert!(why(STAT, "write through\n", (253, 0)).contains("sda says that it has no cache"));
        assert!(why(STAT, "write back\n", (9, 9)).contains("no block device 9:9"));
        assert!(number(Path::new("/proc")).unwrap_err().contains("proc"));
        assert_eq!(Disk::unknown("it is elsewhere").watch().until_now().unknown.as_deref(), Some("it is elsewhere"));
    }
}
