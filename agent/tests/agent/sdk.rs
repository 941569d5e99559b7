//! The agent with the Python SDK of E2B. Skipped if the SDK is not installed: `pip install e2b`.
//!
//! `CLADE_E2B_PYTHON` is a Python that has it; otherwise `python3` is tried.

use std::process::Command;

use clade_test_support::{Port, python_with_e2b, skip};

use crate::Agent;

const SCRIPT: &str = include_str!("sdk.py");
/// The SDK's port of an agent in its debug mode.
const PORT: u16 = 49983;

#[test]
fn the_python_sdk_works_unchanged() {
    let Some(python) = python_with_e2b() else { return };
    // The SDK supports no other port, so tests of this port run one after another.
    let port = Port::wait_for(PORT);
    let address = format!("127.0.0.1:{}", port.number());
    if let Err(error) = std::net::TcpListener::bind(&address) {
        return skip("e2b", &format!("{address}: {error}"));
    }
    let agent = Agent::start_with(&["--tcp", &address]);
    let mut command = Command::new(&python);
    command.args(["-c", SCRIPT]).arg(agent.dir.path()).env("E2B_DEBUG", "true").env("E2B_API_KEY", "none");
    let done = command.output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{text}{}", String::from_utf8_lossy(&done.stderr));
    print!("{text}");
}
