//! Checks that the host has room for a number of VMs, before the first is made.
//!
//! Two limits end a large fork half-way: descriptors and threads. Both are read from the kernel,
//! and compared with the needs of the VMs. Without overcommit the number of running VMs is limited
//! too, and the host's available memory has to have room for each child's own: guest memory is not
//! counted, as a child shares it until it writes.

use std::fs;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::{LazyLock, OnceLock};
use std::thread;

use clade_api::HostLimitError;
use rustix::process::{Resource, getrlimit};

use clade_vmm::vm::VmConfig;

/// Descriptors left for requests, logs and layers.
const SPARE_DESCRIPTORS: u64 = 256;
/// Threads left for the rest of the host.
const SPARE_THREADS: u64 = 512;

/// Running VMs for each processor. Idle guests take next to nothing, but as many that compute get 2
/// ms of each second.
const VMS_OF_A_PROCESSOR: u64 = 500;
/// What a child takes of the host before it writes: page tables, KVM's structures, its process.
const MIB_OF_A_CHILD: u64 = 1;
/// Memory left for the rest of the host.
const SPARE_MIB: u64 = 256;

/// Threads of a worker beside its VM's: its sockets, its requests, its memory's upkeep.
const WORKER_THREADS: u64 = 8;

/// Resources that a VM takes from its starter's process and from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourceDemand {
    /// Descriptors of the starter.
    pub descriptors: u64,
    /// Threads of the host.
    pub threads: u64,
}

impl ResourceDemand {
    /// The needs of a VM with this configuration.
    pub fn of(config: &VmConfig) -> Self {
        let devices = config.virtio_queues().count() as u64;
        let threads = u64::from(config.cpus()) + devices + WORKER_THREADS;
        // Its worker's socket, its process, its flight record and its name's lock, until it runs.
        Self { descriptors: 5, threads }
    }
}

/// A file of the kernel, which makes the text anew for each read from the beginning. It stays open: a fork reads
/// several, and to open one takes longer than to read it.
struct KernelFile {
    path: &'static str,
    file: OnceLock<File>,
}

impl KernelFile {
    const fn new(path: &'static str) -> Self {
        Self { path, file: OnceLock::new() }
    }

    /// The beginning of the text.
    fn read(&self) -> Option<String> {
        let mut bytes = [0; 256];
        let file = match self.file.get() {
            Some(file) => file,
            None => {
                let opened = File::open(self.path).ok()?;
                self.file.get_or_init(|| opened)
            }
        };
        let read = file.read_at(&mut bytes, 0).ok()?;
        Some(str::from_utf8(&bytes[..read]).ok()?.to_owned())
    }
}

static MEMORY: KernelFile = KernelFile::new("/proc/meminfo");
static LOAD: KernelFile = KernelFile::new("/proc/loadavg");
static THREAD_LIMITS: [(&str, KernelFile); 2] = [
    ("kernel.threads-max", KernelFile::new("/proc/sys/kernel/threads-max")),
    ("kernel.pid_max", KernelFile::new("/proc/sys/kernel/pid_max")),
];

/// The first line of a short file.
fn first_line(path: &str) -> Option<String> {
    let mut bytes = [0; 256];
    let read = File::open(path).ok()?.read(&mut bytes).ok()?;
    Some(str::from_utf8(&bytes[..read]).ok()?.lines().next()?.to_owned())
}

/// Refuses `count` more VMs if they exceed the host's available memory or, with `running` VMs
/// there, its processors. `running` is None for VMs that start paused.
///
/// # Errors
/// [`HostLimitError`]. A number that the kernel does not report is not checked.
pub fn check_share(count: usize, running: Option<usize>) -> Result<(), HostLimitError> {
    check_share_of(count as u64, running.map(|running| running as u64), most_running(), mib_of_memory())
}

/// The number of running VMs beyond which a fork needs `overcommit`.
pub(crate) fn most_running() -> u64 {
    VMS_OF_A_PROCESSOR.saturating_mul(processors() as u64)
}

/// The number of processors that this process may use.
pub(crate) fn processors() -> usize {
    // Each count reads files of control groups: too dear for each fork.
    static PROCESSORS: LazyLock<usize> = LazyLock::new(|| thread::available_parallelism().map_or(1, usize::from));
    *PROCESSORS
}

fn check_share_of(
    count: u64,
    running: Option<u64>,
    limit: u64,
    memory: Option<(u64, u64)>,
) -> Result<(), HostLimitError> {
    if let Some(running) = running {
        let left = limit.saturating_sub(running);
        if count > left {
            let (what, setting) = ("running VMs", "500 for each processor, without overcommit");
            return Err(HostLimitError { what, needed: count, left, limit, setting });
        }
    }
    if let Some((total, available)) = memory {
        let (needed, left) = (count.saturating_mul(MIB_OF_A_CHILD), available.saturating_sub(SPARE_MIB));
        if needed > left {
            let (what, setting) = ("MiB of memory", "MemAvailable, without overcommit");
            return Err(HostLimitError { what, needed, left, limit: total, setting });
        }
    }
    Ok(())
}

/// The host's memory and the part that is available, in MiB.
fn mib_of_memory() -> Option<(u64, u64)> {
    // Both are in its first three lines.
    let text = MEMORY.read()?;
    let mib = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        Some(line.trim_start_matches(':').trim().split(' ').next()?.parse::<u64>().ok()? >> 10)
    };
    Some((mib("MemTotal")?, mib("MemAvailable")?))
}

/// Pages of memory that copies may take, less a reserve for the rest of the host. Not limited if the
/// kernel does not report it.
pub(crate) fn pages_available() -> u64 {
    mib_of_memory().map_or(u64::MAX, |(_, available)| available.saturating_sub(SPARE_MIB) << 8)
}

/// Returns whether the host has a processor without a runnable thread, the caller's aside. False if the
/// kernel does not report it.
#[must_use]
pub fn has_free_processor() -> bool {
    // All of the host's, as its threads: this process may be limited to some.
    static ONLINE: LazyLock<Option<u64>> = LazyLock::new(|| count_of(&first_line("/sys/devices/system/cpu/online")?));
    runnable_threads().zip(*ONLINE).is_some_and(|(runnable, online)| runnable <= online)
}

/// The length of a list of ranges, such as `0-3,8`.
fn count_of(ranges: &str) -> Option<u64> {
    let lengths = ranges.split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        (last + 1).checked_sub(first)
    });
    lengths.sum()
}

/// The host's runnable threads.
#[must_use]
pub fn runnable_threads() -> Option<u64> {
    threads_of_host().map(|(runnable, _)| runnable)
}

/// The host's runnable threads, and all of them: the fourth field of `/proc/loadavg`.
fn threads_of_host() -> Option<(u64, u64)> {
    let loads = LOAD.read()?;
    let (runnable, all) = loads.split(' ').nth(3)?.split_once('/')?;
    Some((runnable.parse().ok()?, all.parse().ok()?))
}

/// The number of descriptors of this process. The directory's size, since Linux 6.2: with a thousand VMs its entries take
/// longer than a fork to count.
fn open_descriptors() -> Option<u64> {
    const DIR: &str = "/proc/self/fd";
    let size = fs::metadata(DIR).ok()?.len();
    if size > 0 { Some(size) } else { Some(fs::read_dir(DIR).ok()?.count() as u64) }
}

/// Refuses `count` VMs that each need `demand` if the host has no room for all.
///
/// # Errors
/// [`HostLimitError`]. A limit that the kernel does not report is not checked.
pub fn check_host_limits(count: usize, demand: ResourceDemand) -> Result<(), HostLimitError> {
    let count = count as u64;
    let compare = |what, setting, limit: u64, used: u64, needed: u64| {
        let left = limit.saturating_sub(used);
        if needed > left { Err(HostLimitError { what, needed, left, limit, setting }) } else { Ok(()) }
    };
    if let (Some(limit), Some(open)) = (getrlimit(Resource::Nofile).current, open_descriptors()) {
        let used = open + SPARE_DESCRIPTORS;
        compare("descriptors", "RLIMIT_NOFILE", limit, used, count.saturating_mul(demand.descriptors))?;
    }
    if let Some((_, threads)) = threads_of_host() {
        let used = threads + SPARE_THREADS;
        for (setting, file) in &THREAD_LIMITS {
            if let Some(limit) = file.read().and_then(|text| text.trim().parse().ok()) {
                compare("threads", setting, limit, used, count.saturating_mul(demand.threads))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_kernel_is_read_anew_each_time() {
        let uptime = KernelFile::new("/proc/uptime");
        let first = uptime.read().unwrap();
        clade_test_support::wait_until("another uptime", || uptime.read().unwrap() != first);
        assert!(runnable_threads().unwrap() > 0, "this thread is one");
        for (_, file) in &THREAD_LIMITS {
            assert!(file.read().unwrap().trim().parse::<u64>().unwrap() > 0);
        }
        assert_eq!(KernelFile::new("/proc/no such file").read(), None);
    }

    #[test]
    fn processors_are_counted_by_their_ranges() {
        for (ranges, count) in [("0", Some(1)), ("0-1", Some(2)), ("0-3,8,10-11", Some(7)), ("3-1", None), ("", None)] {
            assert_eq!(count_of(ranges), count, "{ranges}");
        }
        assert!(count_of(&first_line("/sys/devices/system/cpu/online").unwrap()).unwrap() >= processors() as u64);
    }

    #[test]
    fn a_fork_beyond_the_processors_or_the_memory_is_refused_with_its_numbers() {
        let memory = Some((24_000, 20_000));
        check_share_of(1000, Some(0), 1000, memory).unwrap();
        let refused = check_share_of(2000, Some(1), 1000, memory).unwrap_err();
        assert_eq!((refused.what, refused.needed, refused.left, refused.limit), ("running VMs", 2000, 999, 1000));
        check_share_of(2000, None, 1000, memory).unwrap();
        let refused = check_share_of(2000, None, 1000, Some((4_000, 2_000))).unwrap_err();
        assert_eq!((refused.what, refused.needed, refused.left), ("MiB of memory", 2000, 1744));
        let (total, available) = mib_of_memory().unwrap();
        assert!(0 < available && available <= total);
    }

    #[test]
    fn descriptors_are_counted() {
        let before = open_descriptors().unwrap();
        let _files: Vec<_> = (0..100).map(|_| File::open("/dev/null").unwrap()).collect();
        // Other tests of this process open files, too.
        let opened = open_descriptors().unwrap() - before;
        assert!((50..200).contains(&opened), "{opened}");
    }

    #[test]
    fn what_there_is_too_little_of_is_named_with_its_numbers() {
        let demand = ResourceDemand { descriptors: 10, threads: 1 };
        check_host_limits(1, demand).unwrap();
        let limit = getrlimit(Resource::Nofile).current.unwrap();
        let refused = check_host_limits(1, ResourceDemand { descriptors: limit, ..demand }).unwrap_err();
        assert_eq!((refused.what, refused.limit, refused.needed), ("descriptors", limit, limit));
        let refused = check_host_limits(1 << 23, ResourceDemand { descriptors: 0, ..demand }).unwrap_err();
        assert_eq!((refused.what, refused.needed), ("threads", 1 << 23), "{refused}");
    }
}
