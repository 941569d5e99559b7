//! The make-up of a VM's memory, in numbers: `GET /v1/vms/{name}/stats`.

use std::fs;

use axum::extract::Path as UrlPath;
use axum::{Extension, Json};

use crate::rpc::with_vm_host;
use crate::vm_host::{VmEntry, WeakVmHost};
use clade_api::http::Answer;
use clade_api::{CopyStats, DaemonError, LayerInfo, MemoryStats, PauseStats, PinStats, ProcessStats, VmInfo, VmStats};
use clade_memory::PageMap;
use clade_vmm::vm::Vm;

/// Returns the layers of a page map, with the places of their bytes.
pub(super) fn layers(map: &PageMap) -> Vec<LayerInfo> {
    map.layers.iter().map(LayerInfo::from).collect()
}

fn memory(vm: &Vm) -> Result<MemoryStats, DaemonError> {
    let stats = vm.memory_stats()?;
    let map = vm.page_map()?;
    let layers = layers(&map);
    let shown = |alone: Option<bool>| {
        layers.iter().filter(|layer| layer.alone == alone).map(|layer| layer.shown_pages).sum::<u64>()
    };
    Ok(MemoryStats {
        pages: map.totals().into(),
        private_kib: stats.private_kib,
        alone_pages: shown(Some(true)),
        unknown_pages: shown(None),
        backing: vm.context().store().backing().name().to_owned(),
        mappings: stats.mappings,
        table_kib: stats.table_bytes.div_ceil(1024),
        layers,
    })
}

/// Returns the value of `key` in a file of `key: value kB` lines.
fn kib(text: &str, key: &str) -> Option<u64> {
    let value = |line: &str| line.strip_prefix(key)?.strip_prefix(':')?.split_whitespace().next()?.parse().ok();
    text.lines().find_map(value)
}

/// Reads the kernel's counts for this process. None if they are missing.
fn process() -> Option<ProcessStats> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    Some(ProcessStats {
        page_tables_kib: kib(&status, "VmPTE")?,
        anonymous_kib: kib(&status, "RssAnon")?,
        memory_files_kib: kib(&status, "RssShmem")?,
        proportional_kib: kib(&rollup, "Pss")?,
    })
}

fn stats(entry: &VmEntry) -> Result<VmStats, DaemonError> {
    let vm = &entry.vm;
    let info = VmInfo::from(entry);
    let cow = vm.cow_counts()?;
    let pins = vm.ram().pin_counts();
    let pauses = vm.pauses();
    Ok(VmStats {
        name: info.name,
        pid: info.pid,
        state: info.state,
        parent: info.parent,
        generation: info.generation,
        age_s: info.age_s,
        memory: memory(vm)?,
        copies: CopyStats {
            guest: cow.guest,
            pin: cow.pin,
            adopt: cow.adopt,
            ahead: cow.ahead,
            freeze: cow.freeze,
            freeze_pinned: cow.freeze_pinned,
            freeze_ahead: cow.freeze_ahead,
        },
        pins: PinStats {
            now: pins.now,
            reading: pins.reading,
            locked: pins.locked,
            long: pins.long,
            long_total: pins.long_total,
            longest_s: pins.longest.as_secs_f64(),
        },
        pauses: PauseStats {
            fork: pauses.fork.counts().into(),
            snapshot: pauses.snapshot.counts().into(),
            reset: pauses.reset.counts().into(),
        },
        process: process(),
        nets: info.nets,
        disks: info.disks,
    })
}

/// Shows a VM's memory, copies, pins and pauses in numbers.
#[utoipa::path(get, path = "/v1/vms/{name}/stats", responses((status = 200, description = "Done.", body = VmStats)))]
pub(super) async fn show_stats(
    Extension(vm_host): Extension<WeakVmHost>,
    UrlPath(name): UrlPath<String>,
) -> Answer<VmStats> {
    Ok(Json(with_vm_host(vm_host, move |vm_host| stats(&vm_host.get(&name)?)).await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_that_of_its_key_alone() {
        let text = "VmPTE:\t     144 kB\nVmPTEs: 1 kB\nRssAnon:\t 7 kB\nPss_Dirty: 9 kB\nPss:  12 kB\n";
        assert_eq!((kib(text, "VmPTE"), kib(text, "RssAnon"), kib(text, "Pss")), (Some(144), Some(7), Some(12)));
        assert_eq!((kib(text, "Rss"), kib("VmPTE: x kB", "VmPTE")), (None, None));
        let own = process().unwrap();
        assert!(own.page_tables_kib > 0 && own.anonymous_kib > 0, "{own:?}");
    }
}
