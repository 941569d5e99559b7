//! The agent with the Python SDK of E2B. Skipped if the SDK is not installed: `pip install e2b`.
//!
//! `CLADE_E2B_PYTHON` is a Python that has it; otherwise `python3` is tried.

use std::process::Command;

use clade_test_support::{Port, skip};

use crate::Agent;

const SCRIPT: &str = include_str!("sdk.py");
/// The SDK's port of an agent in its debug mode.
const PORT: u16 = 49983;

#[test]
fn the_python_sdk_works_unchanged() {
    let python = std::env::var("CLADE_E2B_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has_sdk = Command::new(&python).args(["-c", "import e2b"]).output().is_ok_and(|found| found.status.success());
    if !has_sdk {
        clade_test_support::skipped(&format!("{python} has no e2b"));
        return;
    }
    // The SDK supports no other port, so tests of this port run one after another.
    let port = Port::wait_for(PORT);
    let address = format!("127.0.0.1:{}", port.number());
    if let Err(error) = std::net::TcpListener::bind(&address) {
        return skip("sdk", &format!("{address}: {error}"));
    }
    let agent = Agent::start_with(&["--tcp", &address]);
    let mut command = Command::new(&python);
    command.args(["-c", SCRIPT]).arg(agent.dir.path()).env("E2B_DEBUG", "true").env("E2B_API_KEY", "none");
    let done = command.output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{text}{}", String::from_utf8_lossy(&done.stderr));
    print!("{text}");
}
