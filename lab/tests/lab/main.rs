//! The `clade-lab` command as people and programs see it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bad_input;
mod bench;
mod check;
mod stress;

use std::process::Output;

use serde_json::Value;

/// The binary under test.
const LAB: &str = env!("CARGO_BIN_EXE_clade-lab");

/// Returns whether this host has KVM. Panics if it is required and missing.
fn kvm() -> bool {
    let host = clade_vmm::kvm::Host::open();
    host.map_err(|error| clade_test_support::skip("kvm", &clade_vmm::error_chain(&error))).is_ok()
}

/// The result of a command.
#[derive(Debug)]
struct Answer {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

impl Answer {
    fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}
