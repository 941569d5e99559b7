//! Linux on a disk: ext4 made by the host, written by a guest, forked in the middle of writes, and checked by the host.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use clade_devices::disk::{Disk, DiskConfig};
use clade_devices::virtio::block::BlockOptions;
use clade_memory::Backing;
use clade_tests::{Linux, PROMPT, Turn, checked, ext4, skip};
use clade_vmm::vm::{ChildOptions, DiskSpec, ForkImage, Vm};

const BOOT: Duration = Duration::from_secs(300);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(180);
const TIMEOUT: Duration = Duration::from_secs(900);
const PAUSED: ChildOptions<'static> = ChildOptions { paused: true, before_start: None };

fn ask(vm: &Vm, line: &str) -> String {
    vm.resume().unwrap();
    let answer = Linux::ask(vm, line, ANSWER_TIMEOUT);
    vm.pause().unwrap();
    // The kernel has something to say about mounts, before it.
    answer.lines().last().unwrap_or_default().to_owned()
}

#[test]
fn linux_on_ext4_is_forked_while_it_writes() {
    let Some(turn) = Turn::take(TIMEOUT) else { return };
    let Some(linux) = Linux::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root.img");
    std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
    if !ext4("mkfs.ext4", &["-q", "-F"], &path) {
        return skip("linux", "there is no mkfs.ext4");
    }
    let context = turn.context(Backing::Huge);
    // A slow disk, so that a fork finds requests in flight.
    let slow = DiskConfig { latency: Some(Duration::from_millis(30)), ..DiskConfig::new(&path) };
    let disk = DiskSpec { disk: slow, device: BlockOptions::default() };
    let parent = linux.boot_with(&context, "vmlinux", 1, "", vec![disk]);
    let console = Linux::expect(&parent, 0, PROMPT, BOOT);
    assert!(console.contains("virtio_blk"), "the disk is found:\n{console}");
    parent.pause().unwrap();

    assert_eq!(ask(&parent, "mkdir /tmp/d && mount -t ext4 /dev/vda /tmp/d && echo mounted"), "mounted");
    assert_eq!(ask(&parent, "echo before >/tmp/d/file && sync && echo synced"), "synced");

    // In the middle of writes. Where guest kernels are interpreted this takes seconds.
    parent.resume().unwrap();
    let from = parent.console().position();
    parent.type_in(b"dd if=/bin/busybox of=/tmp/d/big bs=64k count=6 conv=fsync 2>/dev/null\n");
    // With the prompt, or its rest would be taken for the beginning of the next answer.
    let done = format!("[done 0]\r\n{PROMPT}");
    let (image, in_flight) = forked_in_flight(&parent);
    println!("{in_flight} requests in flight at the fork");
    let _ = Linux::expect(&parent, from, &done, ANSWER_TIMEOUT);
    parent.pause().unwrap();

    let child = Vm::from_image(&context, "child", &image, PAUSED).unwrap();
    child.resume().unwrap();
    let _ = Linux::expect(&child, 0, &done, ANSWER_TIMEOUT);
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

    // What the parent has flushed is its image's, whatever becomes of the parent.
    drop((parent, child, image));
    drop(Disk::open(&DiskConfig::new(&path)).unwrap());
    assert!(ext4("e2fsck", &["-fn"], &path), "the image itself");
    let who = Command::new("debugfs").args(["-R", "cat /who"]).arg(&path).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&who.stdout), "parent\n");
}

/// Forks `vm` until there are requests in flight.
fn forked_in_flight(vm: &Vm) -> (Arc<ForkImage>, usize) {
    for _ in 0..2000 {
        let (image, report) = vm.fork().unwrap();
        if report.in_flight > 0 {
            return (image, report.in_flight);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("it never writes");
}
