//! Scheduling of the threads of vCPUs.

use std::fs;
use std::path::Path;

use clade_test_support::{skipped, wait_eq};
use clade_tests::{Guest, in_a_process_of_its_own};
use clade_vmm::kvm::Quirks;

use crate::{counting, expect_running, turn};

/// The slice of a task, in nanoseconds. None if the task has ended, or the kernel does not show it.
fn slice(task: &Path) -> Option<u64> {
    let schedule = fs::read_to_string(task.join("sched")).ok()?;
    let line = schedule.lines().find(|line| line.starts_with("se.slice"))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// The slices of this process's vCPUs.
fn vcpu_slices() -> Vec<u64> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let is_vcpu = |task: &Path| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.starts_with("clade-vcpu"));
    tasks.filter(|task| is_vcpu(task)).filter_map(|task| slice(&task)).collect()
}

#[test]
fn the_threads_of_vcpus_have_the_slice_of_their_kvm() {
    if !in_a_process_of_its_own("slices::the_threads_of_vcpus_have_the_slice_of_their_kvm") {
        return;
    }
    let Some((_turn, context)) = turn() else { return };
    let Some(kernels) = slice(Path::new("/proc/self")) else {
        skipped("this kernel shows no slices");
        return;
    };
    let expected = if context.host().quirks() == Quirks::Pvm { 5_000_000 } else { kernels };
    let vm = counting(&context, 2);
    let of_guests = || vcpu_slices().into_iter().filter(|slice| *slice == expected).count();
    // Each is boosted until it runs its guest, and so are those that wait for a child.
    wait_eq("slices of a parent", &2, of_guests);
    let (image, _) = vm.fork().unwrap();
    let child = Guest::child(&context, &image).into_vm();
    child.resume().unwrap();
    expect_running(&child, 2);
    wait_eq("slices after a fork, and of the child", &4, of_guests);
}
