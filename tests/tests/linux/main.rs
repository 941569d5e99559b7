//! Linux, with one device of every kind: booted once on this host, and restored by each run. Every
//! test runs in a fork of that. Where guest kernels are interpreted a boot takes most of a minute.
//! `boots` has the test that boots.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod boots;
mod clones;
mod cloud;
mod devices;
mod selfcheck;
mod shell;

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use clade_tests::{BootedLinux, Linux, PROMPT, Turn};
use clade_vmm::vm::{ChildOptions, ForkImage, Vm};

const PAUSED: ChildOptions<'static> = ChildOptions { paused: true, erase: &[], before_start: None };

/// Returns the cached Linux, restored by the first test that needs it.
fn booted(turn: &Turn) -> Option<BootedLinux> {
    static BOOTED: Mutex<Option<BootedLinux>> = Mutex::new(None);
    let mut booted = BOOTED.lock().unwrap_or_else(PoisonError::into_inner);
    if booted.is_none() {
        *booted = Some(BootedLinux::get(turn, directory())?);
    }
    booted.clone()
}

/// Returns a directory of this process, empty at first. A test program drops nothing at its end, so the
/// files of the last process with this directory are removed now.
fn directory() -> &'static Path {
    static OURS: OnceLock<(PathBuf, File)> = OnceLock::new();
    let (dir, _lock) = OURS.get_or_init(|| {
        let within = Path::new(env!("CARGO_TARGET_TMPDIR"));
        // By `cargo nextest` each test has a process, and two run at a time.
        let free = (0..).find_map(|number| {
            let lock = File::create(within.join(format!("linux-{number}.lock"))).unwrap();
            match lock.try_lock() {
                Ok(()) => Some((within.join(format!("linux-{number}")), lock)),
                Err(TryLockError::WouldBlock) => None,
                Err(TryLockError::Error(error)) => panic!("the lock of directory {number}: {error}"),
            }
        });
        let (dir, lock) = free.unwrap();
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{}: {error}", dir.display()),
            _ => {}
        }
        fs::create_dir(&dir).unwrap();
        (dir, lock)
    });
    dir
}

/// Asks a paused VM's shell, and pauses it again.
fn ask_all(vm: &Vm, line: &str) -> String {
    vm.resume().unwrap();
    let answer = Linux::ask(vm, line);
    vm.pause().unwrap();
    answer
}

/// Returns the last line of the answer: kernel messages may come before it.
fn ask(vm: &Vm, line: &str) -> String {
    ask_all(vm, line).lines().last().unwrap_or_default().to_owned()
}

/// Waits for the end of a typed line of a running VM, and for the prompt behind it; returns the
/// output.
fn finish(vm: &Vm, from: u64) -> String {
    let text = Linux::expect(vm, from, &format!("]\r\n{PROMPT}"));
    assert!(text.contains("[done 0]"), "{text}");
    text
}

/// Types a line that writes to a disk, and forks the running VM until a fork has requests in flight,
/// the line had not ended by then, and `is_ready` held before. A line that ends earlier is followed
/// by another. Returns the image, and the console's position before the last line.
fn forked_in_flight(vm: &Vm, [first, next]: [&str; 2], is_ready: impl Fn() -> bool) -> (Arc<ForkImage>, u64) {
    let begin = |line: &str| {
        let from = vm.console().position();
        vm.type_in(format!("{line}\n").as_bytes());
        from
    };
    let mut from = begin(first);
    clade_test_support::wait_for("a fork with requests in flight", || {
        let is_ready = is_ready();
        let (image, report) = vm.fork().unwrap();
        // After the fork: the child prints all that is not here.
        let seen = vm.console().since(from);
        let seen = String::from_utf8_lossy(&seen);
        if seen.contains(&format!("]\r\n{PROMPT}")) {
            from = begin(next);
            return None;
        }
        let has_output = !seen.ends_with('\n') || ["\nfile-", "[done "].iter().any(|text| seen.contains(text));
        if !is_ready || report.in_flight == 0 || has_output {
            return None;
        }
        println!("forked with {} requests in flight", report.in_flight);
        Some((image, from))
    })
}
