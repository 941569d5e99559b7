//! `/metrics`: processors, memory and the root file system.

use std::fs;
use std::io;
use std::sync::Mutex;

use clade_agent_proto::api::Metrics;

use crate::clock;
use crate::lock::lock;

/// The processors' times at the last call.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CpuTimes {
    busy: u64,
    all: u64,
}

/// The times of all processors, and their number.
fn cpu_times(stat: &str) -> (CpuTimes, u32) {
    let mut times = CpuTimes::default();
    let mut count = 0;
    for line in stat.lines().take_while(|line| line.starts_with("cpu")) {
        let mut fields = line.split_ascii_whitespace();
        if fields.next() != Some("cpu") {
            count += 1;
            continue;
        }
        // user nice system idle iowait irq softirq steal; the first two include the times of
        // guests.
        let fields: Vec<u64> = fields.take(8).map(|field| field.parse().unwrap_or(0)).collect();
        times.all = fields.iter().sum();
        times.busy = times.all - fields.iter().skip(3).take(2).sum::<u64>();
    }
    (times, count)
}

/// A line of `/proc/meminfo`, in bytes.
fn memory(info: &str, name: &str) -> u64 {
    let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = value.and_then(|value| value.split_ascii_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Reads the metrics. `last` has the times at the last call.
pub(crate) fn read_metrics(last: &Mutex<CpuTimes>) -> io::Result<Metrics> {
    let (stat, info) = (fs::read_to_string("/proc/stat")?, fs::read_to_string("/proc/meminfo")?);
    let (now, cpu_count) = cpu_times(&stat);
    let before = std::mem::replace(&mut *lock(last), now);
    let (busy, all) = (now.busy.saturating_sub(before.busy), now.all.saturating_sub(before.all));
    let percent = if all == 0 { 0.0 } else { busy as f64 * 100.0 / all as f64 };
    let mem_total = memory(&info, "MemTotal");
    let mem_used = mem_total.saturating_sub(memory(&info, "MemAvailable"));
    let disk = rustix::fs::statvfs("/")?;
    let disk_total = disk.f_blocks.saturating_mul(disk.f_frsize);
    Ok(Metrics {
        ts: i64::try_from(clock::now_ns() / clock::SECOND_NS).unwrap_or(0),
        cpu_count,
        cpu_used_pct: ((percent * 100.0).round() / 100.0) as f32,
        mem_total_mib: mem_total >> 20,
        mem_used_mib: mem_used >> 20,
        mem_total,
        mem_used,
        mem_cache: memory(&info, "Cached"),
        disk_used: disk_total.saturating_sub(disk.f_bavail.saturating_mul(disk.f_frsize)),
        disk_total,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let (times, count) = cpu_times("cpu  10 0 20 60 10 0 0 0 5 0\ncpu0 1 2\ncpu1 1 2\nintr 5\n");
        assert_eq!((times.busy, times.all, count), (30, 100, 2));
        assert_eq!(memory("MemTotal:  16 kB\nCached: 3 kB\n", "Cached"), 3072);
        assert_eq!(memory("MemTotal:  16 kB\n", "Cached"), 0);
    }
}
