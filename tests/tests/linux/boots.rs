//! Tests with a boot of their own: another kernel file, a disk that is not a fork's, two vCPUs.

use std::process::Command;
use std::time::Duration;

use clade_block::{Disk, DiskConfig};
use clade_devices::virtio::block::BlockOptions;
use clade_memory::Backing;
use clade_tests::{Linux, PROMPT, Turn, checked, ext4, formatted, rerun};
use clade_vmm::kvm::Quirks;
use clade_vmm::vm::{Context, DiskSpec, Vm};

use crate::{PAUSED, ask, finish, forked_in_flight};

/// Long enough for a fork to find requests in flight.
const LATENCY: Duration = Duration::from_millis(30);

#[test]
fn a_bzimage_on_ext4_is_forked_while_it_writes() {
    let Some(turn) = Turn::take() else { return };
    let Some(linux) = Linux::find() else { return };
    rerun(|| is_forked_while_it_writes(&turn, &linux));
}

fn is_forked_while_it_writes(turn: &Turn, linux: &Linux) {
    let dir = tempfile::tempdir().unwrap();
    // A slow disk, so that a fork finds requests in flight.
    let path = dir.path().join("disk.img");
    if !formatted(&path) {
        return;
    }
    let disk = DiskConfig { latency: Some(LATENCY), ..DiskConfig::new(&path) };
    let context = turn.context(Backing::Huge);
    let mut config = Linux::config(1);
    config.disks = vec![DiskSpec { disk, device: BlockOptions::default() }];
    let parent = linux.boot_as(&context, "bzImage", "earlyprintk=serial", config);
    let console = Linux::expect(&parent, 0, PROMPT);
    assert!(console.contains("Linux version 6.1"), "{console}");
    assert!(console.contains("virtio_blk"), "the disk is found:\n{console}");
    parent.pause().unwrap();

    assert_eq!(ask(&parent, "mkdir -p /tmp/d && mount -t ext4 /dev/vda /tmp/d && echo mounted"), "mounted");
    assert_eq!(ask(&parent, "echo before >/tmp/d/file && sync && echo synced"), "synced");

    // In the middle of writes. Where guest kernels are interpreted this takes seconds.
    parent.resume().unwrap();
    let write = "dd if=/bin/busybox of=/tmp/d/big bs=64k count=6 conv=fsync 2>/dev/null";
    let (image, from) = forked_in_flight(&parent, [write; 2], || true);
    let _ = finish(&parent, from);
    parent.pause().unwrap();

    let child = Vm::from_image(&context, "child", &image, PAUSED).unwrap();
    child.resume().unwrap();
    let _ = finish(&child, 0);
    child.pause().unwrap();
    for (vm, mark) in [(&parent, "parent"), (&child, "child")] {
        assert_eq!(ask(vm, "cat /tmp/d/file"), "before");
        assert_eq!(ask(vm, "echo 3 >/proc/sys/vm/drop_caches; echo ok"), "ok");
        let compared = ask(vm, "cmp -n 393216 /bin/busybox /tmp/d/big && wc -c </tmp/d/big");
        assert_eq!(compared, "393216", "{mark}'s copy, read from its disk");
        assert_eq!(ask(vm, &format!("echo {mark} >/tmp/d/who && sync && echo ok")), "ok");
    }
    assert_eq!(ask(&parent, "cat /tmp/d/who"), "parent");
    assert_eq!(ask(&child, "cat /tmp/d/who"), "child");
    checked(&image, &dir.path().join("at-the-fork"));
    for (vm, name) in [(&parent, "parent.img"), (&child, "child.img")] {
        assert_eq!(ask(vm, "umount /tmp/d && echo gone"), "gone");
        let (image, _) = vm.fork().unwrap();
        let export = dir.path().join(name);
        image.disks().next().unwrap().export(&export).unwrap();
        assert!(ext4("e2fsck", &["-fn"], &export), "{name}");
    }

    // The parent's flushed writes are in its image, whatever the parent's end.
    drop((parent, child, image));
    drop(Disk::open(&DiskConfig::new(&path)).unwrap());
    assert!(ext4("e2fsck", &["-fn"], &path), "the image itself");
    let who = Command::new("debugfs").args(["-R", "cat /who"]).arg(&path).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&who.stdout), "parent\n");
}

/// Boots with two vCPUs. On kvm-pvm, with busy processors, the first program of a guest has died
/// before any fork. There each failed boot is printed; elsewhere it is a failure.
fn two_vcpus(linux: &Linux, context: &Context) -> Vm {
    let attempts = if context.host().quirks() == Quirks::Pvm { 4 } else { 1 };
    for attempt in 1..=attempts {
        let vm = linux.boot(context, "vmlinux", 2, "");
        let console = Linux::expect_any(&vm, 0, &[PROMPT, "Kernel panic"]);
        if console.contains("Attempted to kill init") && attempt < attempts {
            println!("boot {attempt} of {attempts}: this host's KVM broke the guest's user space; again");
            continue;
        }
        assert!(console.contains(PROMPT), "no prompt ({:?}):\n{console}", vm.stopped());
        return vm;
    }
    unreachable!("the last attempt returns or fails")
}

#[test]
fn linux_with_two_vcpus_is_forked() {
    let Some(turn) = Turn::take() else { return };
    let Some(linux) = Linux::find() else { return };
    let context = turn.context(Backing::Huge);
    let parent = two_vcpus(&linux, &context);
    let (image, _) = parent.fork().unwrap();
    let child = Vm::from_image(&context, "two-vcpus", &image, PAUSED).unwrap();
    assert_eq!(ask(&child, "nproc"), "2");
    // The timers of both go on.
    let ticks = |vm: &Vm| -> Vec<u64> {
        let line = "while read -r kind rest; do [ $kind = LOC: ] && echo $rest; done </proc/interrupts";
        let text = ask(vm, line);
        text.split_whitespace().take(2).map(|word| word.parse().unwrap_or_else(|_| panic!("{text:?}"))).collect()
    };
    let before = ticks(&child);
    let after = ticks(&child);
    assert!(before.iter().zip(&after).all(|(before, after)| before < after), "{before:?} then {after:?}");
}
