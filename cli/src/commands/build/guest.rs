//! The VM of a build: its programs, and its time to live.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clade_agent_client::proto::process::{DataEvent, EndEvent, ProcessConfig, StartRequest};
use clade_agent_client::proto::{Code, PORT, RpcError};
use clade_agent_client::{Client as Agent, ClientError, Endpoint, Process};
use clade_api::{Client, TtlInfo, TtlRequest, VmInfo};
use hyper::Method;
use tokio::task::JoinHandle;

use super::recipe::user;
use crate::commands::Failure;
use crate::commands::agent::agent_failure;
use crate::commands::oci_template::BOOT_TIMEOUT;
use crate::commands::remote::failure;

const BOOT_POLL: Duration = Duration::from_millis(20);
/// Time limit of an agent for a connection, and then for an answer.
const CONNECTING: Duration = Duration::from_secs(60);
const ANSWERING: Duration = Duration::from_secs(120);
/// Time that a guest has beyond a program's limit to report that it was killed.
const GRACE: Duration = Duration::from_secs(30);
/// Time to live of the VM after the last renewal by this process, and the interval of the renewals.
const LEASE: Duration = Duration::from_secs(120);
const RENEW: Duration = Duration::from_secs(30);
/// Bytes kept of a program's output, to show if the program fails.
const MAX_TAIL: usize = 4 << 10;

/// A program, and its environment.
#[derive(Clone, Copy, Debug)]
pub(in crate::commands) struct GuestProgram<'a> {
    pub(in crate::commands) argv: &'a [String],
    pub(in crate::commands) env: &'a BTreeMap<String, String>,
    pub(in crate::commands) workdir: Option<&'a str>,
    pub(in crate::commands) user: &'a str,
}

/// The last output of a program.
#[derive(Clone, Debug, Default)]
pub(in crate::commands) struct OutputTail(Arc<Mutex<Vec<u8>>>);

impl OutputTail {
    fn add(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let beyond = kept.len().saturating_sub(MAX_TAIL);
        kept.drain(..beyond);
    }

    /// Returns the last line with text.
    pub(in crate::commands) fn line(&self) -> Option<String> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&kept);
        let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
        // The line becomes part of an error: control characters are removed.
        Some(line.chars().filter(|c| !c.is_control()).take(300).collect())
    }
}

/// Describes the end of a program, with its last output.
pub(in crate::commands) fn described(end: &EndEvent, tail: &OutputTail) -> String {
    let said = tail.line().map(|line| format!(": {line}")).unwrap_or_default();
    format!("{}{said}", if end.status.is_empty() { "exit status 0" } else { &end.status })
}

/// A program that was started and runs on.
#[derive(Debug)]
pub(in crate::commands) struct StartedProgram {
    pub(in crate::commands) tail: OutputTail,
    followed: JoinHandle<Result<EndEvent, ClientError>>,
}

impl StartedProgram {
    /// Returns the program's end, once it has ended.
    pub(in crate::commands) async fn end(&mut self) -> Option<Result<EndEvent, ClientError>> {
        if !self.followed.is_finished() {
            return None;
        }
        // The task is never cancelled meanwhile, and does not panic.
        (&mut self.followed).await.ok()
    }
}

impl Drop for StartedProgram {
    fn drop(&mut self) {
        // The program runs on, and its output is dropped.
        self.followed.abort();
    }
}

/// The VM of a build, with its agent.
#[derive(Debug)]
pub(in crate::commands) struct BuildGuest {
    client: Client,
    name: String,
    /// Its process.
    pub(in crate::commands) pid: u32,
    agent: Agent,
    lease: JoinHandle<()>,
}

impl Drop for BuildGuest {
    fn drop(&mut self) {
        self.lease.abort();
    }
}

/// Follows a program to its end.
async fn follow(mut process: Process, tail: OutputTail, is_shown: bool) -> Result<EndEvent, ClientError> {
    let mut end = None;
    while let Some(event) = process.next().await? {
        let DataEvent { stdout, stderr, pty } = event.data.unwrap_or_default();
        for bytes in [stdout, stderr, pty].into_iter().flatten() {
            tail.add(&bytes.0);
            if is_shown {
                // A build goes on without its terminal.
                let _ = io::stderr().write_all(&bytes.0);
            }
        }
        end = event.end.or(end);
    }
    end.ok_or(ClientError::Truncated)
}

impl BuildGuest {
    /// Returns the booted VM, once its agent answers. The VM ends soon after this process does.
    pub(in crate::commands) async fn of(client: &Client, vm: &VmInfo) -> Result<Self, Failure> {
        let vsock = vm.vsock.as_ref().ok_or_else(|| Failure::run(anyhow!("the VM of the build has ended already")))?;
        let agent = Agent::new(Endpoint::Vsock { socket: vsock.socket.clone(), port: PORT });
        let agent = agent.with_patience(CONNECTING, ANSWERING);
        let (leased, path) = (client.clone(), format!("/v1/vms/{}/ttl", vm.name));
        let lease = tokio::spawn(async move {
            let request = TtlRequest { seconds: LEASE.as_secs_f64() };
            loop {
                // The next step notices an ended VM.
                let _ = leased.supervisor::<TtlInfo>(Method::PUT, &path, Some(&request)).await;
                tokio::time::sleep(RENEW).await;
            }
        });
        let guest = Self { client: client.clone(), name: vm.name.clone(), pid: vm.pid, agent, lease };
        guest.wait().await?;
        Ok(guest)
    }

    pub(in crate::commands) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Returns the agent for a call whose answer takes up to `answering`.
    pub(in crate::commands) fn patient_agent(&self, answering: Duration) -> Agent {
        self.agent.clone().with_patience(CONNECTING, answering)
    }

    async fn wait(&self) -> Result<(), Failure> {
        let begun = Instant::now();
        while self.agent.health().await.is_err() {
            let state = self.client.request::<VmInfo>(Method::GET, &self.name, "", None::<&()>).await;
            state.context("the VM of the build has ended").map_err(Failure::Run)?;
            if begun.elapsed() > BOOT_TIMEOUT {
                return Err(Failure::run(anyhow!("no agent has answered for {} s", BOOT_TIMEOUT.as_secs())));
            }
            tokio::time::sleep(BOOT_POLL).await;
        }
        Ok(())
    }

    /// Starts a program. With `kill_rest` its end is that of the programs that it has started, too.
    async fn begin(
        &self,
        program: GuestProgram<'_>,
        time: Option<Duration>,
        kill_rest: bool,
    ) -> Result<Process, Failure> {
        let (cmd, args) = program.argv.split_first().ok_or_else(|| Failure::run(anyhow!("no program is named")))?;
        let request = StartRequest {
            process: ProcessConfig {
                cmd: cmd.clone(),
                args: args.to_vec(),
                envs: program.env.clone(),
                cwd: Some(program.workdir.unwrap_or("/").to_owned()),
            },
            stdin: Some(false),
            kill_rest,
            ..StartRequest::default()
        };
        let agent = self.agent.clone().with_user(Some(user(program.user).to_owned()));
        let started = agent.start(&request, time).await;
        started.with_context(|| format!("{cmd} is not started")).map_err(Failure::Run)
    }

    /// Starts a program that runs on.
    pub(in crate::commands) async fn start(&self, program: GuestProgram<'_>) -> Result<StartedProgram, Failure> {
        let (process, tail) = (self.begin(program, None, false).await?, OutputTail::default());
        Ok(StartedProgram { tail: tail.clone(), followed: tokio::spawn(follow(process, tail, true)) })
    }

    /// Runs a program to its end. It fails if the program does. Programs that it leaves in its group
    /// are killed.
    pub(in crate::commands) async fn run(&self, program: GuestProgram<'_>) -> Result<(), Failure> {
        let (process, tail) = (self.begin(program, None, true).await?, OutputTail::default());
        let end = follow(process, tail.clone(), true).await.map_err(agent_failure)?;
        match end.shell_code() {
            0 => Ok(()),
            _ => Err(Failure::Run(anyhow!(described(&end, &tail)))),
        }
    }

    /// Runs a program that may fail, for a time. Returns why it has failed, if it has.
    pub(in crate::commands) async fn try_run(
        &self,
        program: GuestProgram<'_>,
        time: Duration,
    ) -> Result<Option<String>, Failure> {
        let tail = OutputTail::default();
        let ran = async {
            let process = self.begin(program, Some(time), false).await?;
            Ok(follow(process, tail.clone(), false).await)
        };
        match tokio::time::timeout(time.saturating_add(GRACE), ran).await {
            Err(_) => Ok(Some("it does not end".to_owned())),
            Ok(Err(failure)) => Err(failure),
            Ok(Ok(Ok(end))) if end.shell_code() == 0 => Ok(None),
            Ok(Ok(Ok(end))) => Ok(Some(described(&end, &tail))),
            Ok(Ok(Err(ClientError::Rpc(RpcError { code: Code::DeadlineExceeded, .. })))) => {
                Ok(Some("it takes longer than there is time".to_owned()))
            }
            Ok(Ok(Err(error))) => Err(agent_failure(error)),
        }
    }

    /// Makes a directory of root's. Returns false if it exists.
    pub(in crate::commands) async fn make_dir(&self, path: &str, mode: Option<u32>) -> Result<bool, Failure> {
        self.make_dir_of("root", path, mode).await
    }

    /// Makes a directory of a user's, with its parents. Returns false if it exists.
    pub(in crate::commands) async fn make_dir_of(
        &self,
        user: &str,
        path: &str,
        mode: Option<u32>,
    ) -> Result<bool, Failure> {
        match self.agent.clone().with_user(Some(user.to_owned())).make_dir(path, mode).await {
            Ok(_) => Ok(true),
            Err(ClientError::Rpc(RpcError { code: Code::AlreadyExists, .. })) => Ok(false),
            Err(error) => Err(agent_failure(error)),
        }
    }

    /// Pauses the VM, for the template.
    pub(in crate::commands) async fn pause(&self) -> Result<VmInfo, Failure> {
        let path = format!("/v1/vms/{}/pause", self.name);
        self.client.supervisor(Method::POST, &path, None::<&()>).await.map_err(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_an_output_is_kept() {
        let tail = OutputTail::default();
        assert_eq!(tail.line(), None);
        tail.add(&[b'x'; 2 * MAX_TAIL]);
        tail.add(b"\nerror: \x1b[31mno\x07\n \n");
        assert_eq!(tail.line().as_deref(), Some("error: [31mno"));
        assert_eq!(tail.0.lock().unwrap().len(), MAX_TAIL);
        let end = EndEvent { exit_code: 7, exited: true, status: "exit status 7".to_owned(), error: None };
        assert_eq!(described(&end, &tail), "exit status 7: error: [31mno");
        assert_eq!(described(&end, &OutputTail::default()), "exit status 7");
    }
}
