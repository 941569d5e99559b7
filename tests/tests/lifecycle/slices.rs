//! Scheduling of the threads of vCPUs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clade_host_io::realtime::Scheduling;
use clade_test_support::{skipped, wait_eq, wait_until};
use clade_tests::{Guest, in_a_process_of_its_own};
use clade_vmm::kvm::Quirks;
use clade_vmm::vm::{ChildOptions, Vm};

use crate::{counting, expect_running, turn};

/// The shortest slice that the scheduler takes, in nanoseconds.
const SHORTEST: u64 = 100_000;

/// The slice of a task, in nanoseconds. None if the task has ended, or the kernel does not show it.
fn slice(task: &Path) -> Option<u64> {
    let schedule = fs::read_to_string(task.join("sched")).ok()?;
    let line = schedule.lines().find(|line| line.starts_with("se.slice"))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// The slices of this process's vCPUs.
fn vcpu_slices() -> Vec<u64> {
    vcpu_tasks().iter().filter_map(|task| slice(task)).collect()
}

/// The threads of this process's vCPUs.
fn vcpu_tasks() -> Vec<PathBuf> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let is_vcpu = |task: &Path| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.starts_with("clade-vcpu"));
    tasks.filter(|task| is_vcpu(task)).collect()
}

/// The thread of this process's only vCPU, and its id.
fn only_vcpu() -> (PathBuf, u32) {
    let [vcpu] = vcpu_tasks().try_into().unwrap();
    let tid = vcpu.file_name().unwrap().to_str().unwrap().parse().unwrap();
    (vcpu, tid)
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

#[test]
fn a_vcpu_that_was_raised_for_its_start_has_a_short_slice_until_its_guest_exits() {
    const NAME: &str = "slices::a_vcpu_that_was_raised_for_its_start_has_a_short_slice_until_its_guest_exits";
    if !in_a_process_of_its_own(NAME) {
        return;
    }
    let Some((_turn, context)) = turn() else { return };
    let parent = counting(&context, 1);
    let (image, _) = parent.fork().unwrap();
    parent.stop();
    assert!(parent.wait(Duration::MAX).is_some());
    drop(parent);
    wait_eq("vCPUs", &0, || vcpu_tasks().len());
    context.prepare_vms(image.config(), 1).unwrap();
    let (vcpu, tid) = only_vcpu();
    if slice(&vcpu).is_none() {
        skipped("this kernel shows no slices");
        return;
    }
    if let Err(error) = Scheduling::of(tid).unwrap().raise(tid, 1) {
        skipped(&format!("no real-time priority: {error}"));
        return;
    }
    let options = ChildOptions { paused: false, erase: &[], before_start: None };
    let child = Vm::from_image(&context, "child", &image, options).unwrap();
    assert_eq!(vcpu_tasks(), std::slice::from_ref(&vcpu), "another thread runs it");
    expect_running(&child, 1);
    assert!(!Scheduling::of(tid).unwrap().is_raised(&[1]), "it has the priority in its guest");
    // It computes, and has no exits.
    assert_eq!(slice(&vcpu), Some(SHORTEST));
    child.end_start();
    wait_until("the slice of other vCPUs", || slice(&vcpu).unwrap() > SHORTEST);
    expect_running(&child, 1);
    assert_eq!(child.stopped(), None);
}

#[test]
fn a_vcpu_that_was_raised_for_a_pause_has_no_priority_in_its_guest() {
    const NAME: &str = "slices::a_vcpu_that_was_raised_for_a_pause_has_no_priority_in_its_guest";
    if !in_a_process_of_its_own(NAME) {
        return;
    }
    let Some((_turn, context)) = turn() else { return };
    let vm = counting(&context, 1);
    expect_running(&vm, 1);
    let (_, tid) = only_vcpu();
    let scheduling = || Scheduling::of(tid).unwrap();
    let raise = || scheduling().raise(tid, 1);
    if let Err(error) = raise() {
        skipped(&format!("no real-time priority: {error}"));
        return;
    }
    vm.pause().unwrap();
    assert!(scheduling().is_raised(&[1]), "its pause takes the priority of the caller");
    vm.resume().unwrap();
    expect_running(&vm, 1);
    assert!(!scheduling().is_raised(&[1]), "raised before the pause");
    vm.pause().unwrap();
    raise().unwrap();
    vm.resume().unwrap();
    expect_running(&vm, 1);
    assert!(!scheduling().is_raised(&[1]), "raised in the pause");
}
