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

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use clade_tests::{BootedLinux, Linux, Turn};
use clade_vmm::vm::{ChildOptions, Vm};

const PAUSED: ChildOptions<'static> = ChildOptions { paused: true, erase: &[], before_start: None };

/// Returns the cached Linux, restored by the first test that needs it.
fn booted(turn: &Turn) -> Option<BootedLinux> {
    static BOOTED: Mutex<Option<BootedLinux>> = Mutex::new(None);
    let mut booted = BOOTED.lock().unwrap_or_else(PoisonError::into_inner);
    if booted.is_none() {
        *booted = Some(BootedLinux::get(turn, &directory())?);
    }
    booted.clone()
}

/// Makes an empty directory of this run. A test program drops nothing at its end, so the files of
/// the last run are removed now.
fn directory() -> PathBuf {
    static OURS: OnceLock<File> = OnceLock::new();
    let within = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let ours = OURS.get_or_init(|| File::create(within.join("linux.lock")).unwrap());
    ours.lock().unwrap();
    let dir = within.join("linux");
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{}: {error}", dir.display()),
        _ => {}
    }
    fs::create_dir(&dir).unwrap();
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
