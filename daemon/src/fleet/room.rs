//! Checks that the host has room for a number of VMs, before the first is made.
//!
//! Three limits end a large fork half-way: descriptors, threads and memory mappings. Each is read
//! from the kernel, and compared with the needs of the VMs. Guest memory is not counted: a child's
//! is shared until written.

use std::fs;

use rustix::process::{Resource, getrlimit};
use thiserror::Error;

use clade_vmm::vm::VmConfig;

/// Descriptors left for requests, logs and layers.
const SPARE_DESCRIPTORS: u64 = 256;
/// Threads left for the rest of the host.
const SPARE_THREADS: u64 = 512;

/// Threads of a worker beside its VM's: its sockets, its requests, its memory's upkeep.
const WORKER_THREADS: u64 = 8;

/// The host has too little of a resource.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("they need about {needed} {what}, and {left} of {limit} are left ({setting})")]
pub struct RoomError {
    /// The resource.
    pub what: &'static str,
    /// The number that is needed.
    pub needed: u64,
    /// The number that is left, less a reserve.
    pub left: u64,
    /// The most that the host allows.
    pub limit: u64,
    /// The name of that limit.
    pub setting: &'static str,
}

/// The resources that one VM uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Needs {
    pub(crate) descriptors: u64,
    pub(crate) threads: u64,
    pub(crate) mappings: u64,
}

impl Needs {
    /// The needs of a VM with this configuration in a fleet. A test (`way_in.rs` of the command
    /// line) compares them with measured ones.
    pub(crate) fn of(config: &VmConfig) -> Self {
        let cpus = u64::from(config.cpus());
        let disks = config.disks.len() as u64;
        let nets: u64 = config.nets.iter().map(|net| u64::from(net.queues)).sum();
        let queues: u64 = config.virtio_queues().map(|queues| queues as u64).sum();
        let devices = config.virtio_queues().count() as u64;
        let hvc = u64::from(config.virtio_console);
        // The VM, the serial line's interrupt, the generation's, the lock, and the control, the
        // image and the console socket.
        let vm = 7 + cpus;
        // One interrupt per device and one notification per queue; each is registered with its
        // worker once it is driven.
        let wiring = devices + queues;
        // A worker's poll set and wake-up; a disk's ring and overlay; a TAP's queues; claims and
        // sockets.
        let worked = 2 * devices + 3 * disks + 2 * nets + 3 * u64::from(config.vsock.is_some()) + hvc;
        Self { descriptors: vm + wiring + worked, threads: cpus + devices, mappings: 2 * (cpus + 2) }
    }

    /// The needs of the same VM in a process of its own, as the process sees them that starts it.
    pub(crate) fn of_worker(config: &VmConfig) -> Self {
        // Its socket, its process, its flight record and its name's lock, until it runs.
        Self { descriptors: 4, threads: Self::of(config).threads + WORKER_THREADS, mappings: 0 }
    }
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Refuses `count` VMs that each need `needs` if the host has no room for all.
///
/// # Errors
/// [`RoomError`]. A limit that the kernel does not report is not checked.
pub(crate) fn check(count: usize, needs: Needs) -> Result<(), RoomError> {
    let count = count as u64;
    let compare = |what, setting, limit: u64, used: u64, needed: u64| {
        let left = limit.saturating_sub(used);
        if needed > left { Err(RoomError { what, needed, left, limit, setting }) } else { Ok(()) }
    };
    if let (Some(limit), Ok(open)) = (getrlimit(Resource::Nofile).current, fs::read_dir("/proc/self/fd")) {
        let used = open.count() as u64 + SPARE_DESCRIPTORS;
        compare("descriptors", "RLIMIT_NOFILE", limit, used, count.saturating_mul(needs.descriptors))?;
    }
    // The fourth field of /proc/loadavg is "running/all".
    let loads = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let threads = loads.split([' ', '/']).nth(4).and_then(|all| all.parse::<u64>().ok());
    if let Some(threads) = threads {
        let used = threads + SPARE_THREADS;
        for (setting, path) in
            [("kernel.threads-max", "/proc/sys/kernel/threads-max"), ("kernel.pid_max", "/proc/sys/kernel/pid_max")]
        {
            if let Some(limit) = number(path) {
                compare("threads", setting, limit, used, count.saturating_mul(needs.threads))?;
            }
        }
    }
    if let (Some(limit), Ok(maps)) = (number("/proc/sys/vm/max_map_count"), fs::read("/proc/self/maps")) {
        let used = maps.iter().filter(|byte| **byte == b'\n').count() as u64;
        compare("memory mappings", "vm.max_map_count", limit, used, count.saturating_mul(needs.mappings))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_too_little_of_is_named_with_its_numbers() {
        let needs = Needs { descriptors: 10, threads: 1, mappings: 1 };
        check(1, needs).unwrap();
        let limit = getrlimit(Resource::Nofile).current.unwrap();
        let refused = check(1, Needs { descriptors: limit, ..needs }).unwrap_err();
        assert_eq!((refused.what, refused.limit, refused.needed), ("descriptors", limit, limit));
        let refused = check(1 << 23, Needs { descriptors: 0, ..needs }).unwrap_err();
        assert_eq!((refused.what, refused.needed), ("threads", 1 << 23), "{refused}");
        let refused = check(1 << 40, Needs { descriptors: 0, threads: 0, ..needs }).unwrap_err();
        assert!(refused.to_string().contains("vm.max_map_count"), "{refused}");
    }
}
