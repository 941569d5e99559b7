//! Runs tests that consume resources of the whole process in a process of their own.

use std::process::Command;

/// Runs an ignored test of this program, by its full name.
pub(crate) fn alone(name: &str) {
    let exe = std::env::current_exe().unwrap();
    let output = Command::new(exe).args(["--exact", name, "--ignored", "--nocapture"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {}\n{said}\n{wrong}", output.status);
    assert!(said.contains("1 passed"), "{name} was not run\n{said}");
}
