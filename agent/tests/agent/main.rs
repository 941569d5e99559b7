//! The agent as a process of this host, on a Unix socket, and its client.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod abuse;
mod files;
mod forward;
mod hostile;
mod load;
mod process;
mod sdk;
mod settings;
mod watch;

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use clade_agent_client::proto::process::{EndEvent, ProcessConfig, StartRequest};
use clade_agent_client::{Client, ClientError, Endpoint, Process};
use clade_test_support::{Patience, Watchdog, wait_until};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};

/// Running time after which a test counts as hung.
const LIMIT: Duration = Duration::from_secs(300);

/// The agent's program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_clade-agent");

/// An agent, which ends with the test.
struct Agent {
    child: Child,
    heard: RefCell<Option<ChildStderr>>,
    dir: tempfile::TempDir,
}

impl Agent {
    fn start() -> Self {
        Self::start_with(&[])
    }

    fn start_with(arguments: &[&str]) -> Self {
        Self::start_as(arguments, Stdio::inherit())
    }

    fn start_as(arguments: &[&str], stderr: Stdio) -> Self {
        Self::start_by(Command::new(PROGRAM), arguments, stderr)
    }

    /// Starts an agent by a command that execs it.
    fn start_by(mut command: Command, arguments: &[&str], stderr: Stdio) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let mut child = without_the_clock(command.arg("--unix").arg(&socket).args(arguments).stderr(stderr));
        let heard = RefCell::new(child.stderr.take());
        let agent = Self { child, heard, dir };
        wait_until("the agent listens", || UnixStream::connect(&socket).is_ok());
        assert!(!agent.may_set_the_clock(), "no test may set the host's clock");
        agent
    }

    fn may_set_the_clock(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let held = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
        u64::from_str_radix(held.trim(), 16).unwrap() & CapabilitySet::SYS_TIME.bits() != 0
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn client(&self) -> Client {
        Client::new(Endpoint::Unix(self.socket()))
    }

    fn raw(&self) -> UnixStream {
        UnixStream::connect(self.socket()).unwrap()
    }

    /// Sends bytes, and reads all that comes back until the agent closes.
    fn say(&self, bytes: &[u8]) -> String {
        let _watchdog = Watchdog::new(LIMIT, || "the agent does not close a connection".to_owned());
        let mut stream = self.raw();
        // The agent may close before it has read all of it.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// The agent's memory, in KiB.
    fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

/// Starts a program that cannot set this host's clock, whoever runs the test.
fn without_the_clock(command: &mut Command) -> Child {
    let start = || {
        // The set is the thread's, and its children's. A user without the right to change it has no right to set the
        // clock either.
        let _ = remove_capability_from_bounding_set(CapabilitySet::SYS_TIME);
        command.spawn().unwrap()
    };
    std::thread::scope(|scope| scope.spawn(start).join().unwrap())
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _watchdog = Watchdog::new(LIMIT, || "an agent is used".to_owned());
    runtime.block_on(test)
}

fn shell(script: &str) -> StartRequest {
    let args = vec!["-c".to_owned(), script.to_owned()];
    let process = ProcessConfig { cmd: "/bin/sh".into(), args, ..ProcessConfig::default() };
    StartRequest { process, stdin: Some(false), ..StartRequest::default() }
}

/// The output of a process, and its end.
#[derive(Debug, Default)]
struct Outcome {
    stdout: String,
    stderr: String,
    pty: String,
    end: EndEvent,
}

async fn outcome(mut process: Process) -> Result<Outcome, ClientError> {
    let mut outcome = Outcome::default();
    let mut is_ended = false;
    while let Some(event) = process.next().await? {
        if let Some(data) = event.data {
            let text = |bytes: Option<clade_agent_client::proto::Base64>| {
                String::from_utf8_lossy(&bytes.unwrap_or_default().0).into_owned()
            };
            outcome.stdout.push_str(&text(data.stdout));
            outcome.stderr.push_str(&text(data.stderr));
            outcome.pty.push_str(&text(data.pty));
        }
        if let Some(end) = event.end {
            outcome.end = end;
            is_ended = true;
        }
    }
    assert!(is_ended, "the stream ended without an end");
    Ok(outcome)
}

async fn sh(client: &Client, script: &str) -> Outcome {
    outcome(client.start(&shell(script), None).await.unwrap()).await.unwrap()
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let mut patience = Patience::default();
    while !is_so().await {
        assert!(patience.tick(), "{what}: waited {:?} of running time", patience.limit());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
