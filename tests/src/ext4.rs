//! File systems of guests, made and checked by the host.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use clade_vmm::vm::ForkImage;

/// Time limit for the end of writes to a disk.
const SETTLE: Duration = Duration::from_secs(60);

/// Runs one of e2fsprogs' programs on `path`; false if the program is missing.
///
/// # Panics
/// When it fails.
#[must_use]
pub fn ext4(program: &str, args: &[&str], path: &Path) -> bool {
    let output = match Command::new(program).args(args).arg(path).stdin(Stdio::null()).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return false,
        output => output.expect(program),
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?} {}: {}\n{text}", path.display(), output.status);
    true
}

/// Writes the first disk of an image to the file `path`, replays its journal as a mount would, and
/// checks it.
///
/// # Panics
/// When it has faults.
pub fn checked(image: &ForkImage, path: &Path) {
    let disk = image.disks().next().expect("a disk");
    assert!(disk.settle(SETTLE), "its writes end");
    disk.export(path).expect("an export");
    // A disk of a running system: its journal is not empty. Replayed (1: errors corrected), it must
    // be without fault.
    let replay = Command::new("e2fsck").args(["-p", "-E", "journal_only"]).arg(path).stdin(Stdio::null()).output();
    let replay = replay.expect("e2fsck");
    assert!(matches!(replay.status.code(), Some(0 | 1)), "{replay:?}");
    assert!(ext4("e2fsck", &["-fn"], path));
}
