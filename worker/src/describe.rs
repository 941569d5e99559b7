//! Descriptions of this process's VM for clients.

use std::time::Duration;

use clade_api::{
    DiskInfo, EgressInfo, GuestState, IdentityInfo, MemoryInfo, NetInfo, ResetAnswer, ShutdownInfo, VmInfo, VmState,
    VsockInfo, flight,
};
use clade_devices::virtio::net::EgressRule;
use clade_host_io::CachePolicy;

use crate::vm_host::{Shutdown, VmEntry};
use clade_vmm::vm::{ResetReport, Vm};

fn egress(vm: &Vm, at: usize) -> Vec<Vec<EgressInfo>> {
    let info = |(rule, packets): (EgressRule, u64)| EgressInfo { rule: rule.to_string(), packets };
    let layers = vm.egress_packets(at).unwrap_or_default().into_iter();
    layers.map(|layer| layer.into_iter().map(info).collect()).collect()
}

fn disks(vm: &Vm) -> Vec<DiskInfo> {
    let info = |at| {
        vm.with_disk(at, |disk| {
            let health = disk.health();
            DiskInfo {
                path: disk.config().path.clone(),
                no_room: health.no_room,
                lost: health.lost,
                direct: disk.policy() == CachePolicy::Direct,
            }
        })
    };
    (0..vm.config().disks.len()).filter_map(info).collect()
}

fn nets(vm: &Vm) -> Vec<NetInfo> {
    let info = |(at, own): (usize, &clade_vmm::vm::NetIdentity)| {
        let stats = vm.net_stats(at).unwrap_or_default();
        NetInfo {
            tap: own.tap.clone(),
            mac: own.mac,
            received_bytes: stats.received_bytes,
            sent_bytes: stats.sent_bytes,
            dropped: stats.dropped,
            network: vm.network(at).unwrap_or_default(),
            blocked_received: stats.blocked_received,
            blocked_sent: stats.blocked_sent,
            egress_dropped: stats.egress_dropped,
            egress: egress(vm, at),
            egress_inherited: vm.inherited_egress(at).unwrap_or_default(),
        }
    };
    vm.identity().nets.iter().enumerate().map(info).collect()
}

fn memory(vm: &Vm) -> Option<MemoryInfo> {
    vm.memory_stats().ok().map(|stats| MemoryInfo {
        mib: vm.config().layout().bytes() >> 20,
        reference_pages: stats.reference,
        shared_pages: stats.shared,
        exclusive_pages: stats.exclusive,
        pinned_pages: stats.pinned,
        private_kib: stats.private_kib,
        shared_kib: stats.shared_kib,
    })
}

impl From<&VmEntry> for VmInfo {
    fn from(entry: &VmEntry) -> Self {
        Self { memory: memory(&entry.vm), ..without_memory(entry) }
    }
}

/// Describes a VM without its memory: counting its pages takes longer than a fork or a reset.
pub(crate) fn without_memory(entry: &VmEntry) -> VmInfo {
    let vm = &entry.vm;
    let stopped = vm.stopped();
    let state = match (&stopped, vm.is_paused()) {
        (Some(_), _) => VmState::Stopped,
        (None, _) if vm.is_suspended() => VmState::Suspended,
        (None, true) => VmState::Paused,
        (None, false) => VmState::Running,
    };
    let is_ready = vm.guest_notice().is_some_and(|notice| notice.is_ready);
    let guest = match (is_ready, entry.reports_ready) {
        (true, _) => Some(GuestState::Ready),
        (false, true) => Some(GuestState::Booting),
        (false, false) => None,
    };
    VmInfo {
        name: vm.name().to_owned(),
        pid: std::process::id(),
        state,
        paused: stopped.is_none() && vm.is_paused(),
        guest,
        stopped,
        parent: entry.parent.clone(),
        labels: entry.labels.clone(),
        secrets: entry.secrets.names(),
        generation: vm.generation(),
        cpus: vm.config().cpus(),
        age_s: vm.age().as_secs_f64(),
        memory: None,
        nets: nets(vm),
        disks: disks(vm),
        vsock: VsockInfo::of(vm.identity()),
    }
}

impl From<Shutdown> for ShutdownInfo {
    fn from(Shutdown { by_itself, noticed }: Shutdown) -> Self {
        Self { by_itself, noticed }
    }
}

/// Reports a reset or a rollback, and notes it in the VM's flight record.
pub(crate) fn reset_answer(entry: &VmEntry, report: &ResetReport, what: &str) -> ResetAnswer {
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let memory = &report.memory;
    let (dropped_pages, restored_pages, remapped_pages) = (memory.dropped, memory.restored, memory.remapped);
    let took = report.total.as_micros();
    let pages = format!("{dropped_pages} pages dropped, {restored_pages} restored, {remapped_pages} remapped");
    flight::note(&format!("{what} in {took} us: {pages}"));
    let (memory_us, total_us) = (us(report.drop), us(report.total));
    ResetAnswer { vm: without_memory(entry), dropped_pages, restored_pages, remapped_pages, memory_us, total_us }
}

/// Returns the identity of `vm`, or None if it has no network or socket device.
pub(crate) fn identity(vm: &Vm) -> Option<IdentityInfo> {
    let (nets, vsock) = (nets(vm), VsockInfo::of(vm.identity()));
    (!nets.is_empty() || vsock.is_some()).then_some(IdentityInfo { nets, vsock })
}
