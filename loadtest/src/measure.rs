//! What processes, disks and the machine did meanwhile, from `/proc` and `/sys`.

mod disk;

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;
use tokio::time::Instant;

pub use self::disk::{Disk, Flushes};

/// Clock ticks a second in `/proc`; fixed by the kernel's interface on Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// Counters at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    at: Instant,
    server_ticks: u64,
    generator_ticks: u64,
    machine_busy_ticks: u64,
}

/// What happened between two readings.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Usage {
    pub seconds: f64,
    pub server_cores: f64,
    pub generator_cores: f64,
    /// Everything else on the machine: a run is quiet below 0.15.
    pub other_cores: f64,
}

impl Reading {
    /// Now; `servers` are the server's processes, as far as the harness knows them.
    pub fn take(servers: &[u32]) -> Self {
        Self::with_generators(servers, &[])
    }

    /// The same with further processes of the generator.
    pub fn with_generators(servers: &[u32], generators: &[u32]) -> Self {
        Self {
            at: Instant::now(),
            server_ticks: ticks_of(servers),
            generator_ticks: process_ticks("/proc/self/stat") + ticks_of(generators),
            machine_busy_ticks: machine_busy_ticks(),
        }
    }

    /// What happened since `earlier`.
    pub fn since(&self, earlier: &Reading) -> Usage {
        let seconds = self.at.duration_since(earlier.at).as_secs_f64().max(1e-9);
        let cores = |now: u64, then: u64| now.saturating_sub(then) as f64 / TICKS_PER_SECOND / seconds;
        let server_cores = cores(self.server_ticks, earlier.server_ticks);
        let generator_cores = cores(self.generator_ticks, earlier.generator_ticks);
        let busy = cores(self.machine_busy_ticks, earlier.machine_busy_ticks);
        Usage { seconds, server_cores, generator_cores, other_cores: (busy - server_cores - generator_cores).max(0.0) }
    }
}

fn ticks_of(processes: &[u32]) -> u64 {
    processes.iter().map(|pid| process_ticks(&format!("/proc/{pid}/stat"))).sum()
}

/// User and system time of a process or thread.
fn process_ticks(stat: &str) -> u64 {
    let text = fs::read_to_string(stat).unwrap_or_default();
    // The command name, in parentheses, may hold spaces.
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    [11, 12].iter().filter_map(|&field| fields.get(field)?.parse::<u64>().ok()).sum()
}

/// Time that any core of the machine was not idle.
fn machine_busy_ticks() -> u64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let numbers: Vec<u64> =
        text.lines().next().unwrap_or_default().split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    // user nice system [idle iowait] irq softirq steal
    numbers.iter().take(8).enumerate().filter(|(field, _)| ![3, 4].contains(field)).map(|(_, ticks)| ticks).sum()
}

/// Time since 1970.
#[expect(clippy::disallowed_methods, reason = "real servers check real tokens: the harness has no clock to inject")]
pub fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Resident memory of processes in bytes.
pub fn rss_bytes(processes: &[u32]) -> u64 {
    processes.iter().map(|pid| status_kib(&format!("/proc/{pid}/status"), "VmRSS:") * 1024).sum()
}

/// The most resident memory of processes while a future runs, and what the future gave.
pub async fn peak_rss<T>(processes: &[u32], meanwhile: impl Future<Output = T>) -> (u64, T) {
    let mut peak = rss_bytes(processes);
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    let mut meanwhile = std::pin::pin!(meanwhile);
    loop {
        tokio::select! {
            biased;
            given = &mut meanwhile => return (peak.max(rss_bytes(processes)), given),
            _ = ticks.tick() => peak = peak.max(rss_bytes(processes)),
        }
    }
}

/// Memory of the kernel's own objects in bytes: sockets live there.
pub fn slab_bytes() -> u64 {
    status_kib("/proc/meminfo", "Slab:") * 1024
}

fn status_kib(path: &str, key: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// The machine of a report.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_bytes: u64,
    pub kernel: String,
    /// Of the directory with the server's data, or of the temporary directory.
    pub filesystem: String,
    pub descriptors_max: u64,
}

impl Machine {
    /// This machine, with the file system of a directory.
    pub fn describe(directory: &Path) -> Self {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cpu: cpu.map(|(_, name)| name.trim().to_owned()).unwrap_or_default(),
            cores: cores(),
            memory_bytes: status_kib("/proc/meminfo", "MemTotal:") * 1024,
            kernel: kernel.trim().to_owned(),
            filesystem: filesystem(directory),
            descriptors_max: rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX),
        }
    }
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The type of the file system that holds a directory.
fn filesystem(directory: &Path) -> String {
    let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mount_of(&mounts, &directory).map(|(_, kind)| kind.to_owned()).unwrap_or_default()
}

/// Source and type of the mount that holds a directory: the one with the longest prefix.
fn mount_of<'a>(mounts: &'a str, directory: &Path) -> Option<(&'a str, &'a str)> {
    let candidates = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (source, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
        directory.starts_with(point).then_some((point.len(), (source, kind)))
    });
    // The last of several at one point is the one that is seen.
    candidates.max_by_key(|(length, _)| *length).map(|(_, found)| found)
}

/// Lets the calling thread run on one core only. Where that is not allowed it runs on any.
pub fn pin_to_core(core: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core);
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_time_and_memory() {
        let before = Reading::take(&[]);
        let started = Instant::now();
        let mut number = 1u64;
        while process_ticks("/proc/self/stat") < before.generator_ticks + 2 && started.elapsed().as_secs() < 20 {
            number = std::hint::black_box(number.wrapping_mul(3));
        }
        let usage = Reading::take(&[]).since(&before);
        assert!(usage.generator_cores > 0.0, "{usage:?}");
        assert!(rss_bytes(&[std::process::id()]) > 1024 * 1024);
        let machine = Machine::describe(Path::new("/tmp"));
        assert!(machine.cores > 0 && machine.memory_bytes > 0 && !machine.filesystem.is_empty(), "{machine:?}");
    }
}
