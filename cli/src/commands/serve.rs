//! `clade serve`: the supervisor of a runtime directory.

use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clade_daemon::control::{Client, SupervisorInfo, Token};
use clade_daemon::fleet::{FleetError, open_log, runtime_dir, supervisor_path};
use clade_daemon::supervisor::{Supervisor, SupervisorOptions};

use hyper::Method;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::commands::args::ServeArgs;
use crate::commands::notify::{READY, STOPPING, notify};
use crate::commands::remote::ask;
use crate::commands::run::{say, with_runtime};
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::{Failure, Outcome};

/// Interval of the checks for the end.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Time limit of the start of a supervisor in the background.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit of another supervisor that already has the directory.
const OTHER_TIMEOUT: Duration = Duration::from_secs(1);

/// Time that `clade serve --stop` waits for the end.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the running supervisor.
fn running() -> Result<SupervisorInfo, Failure> {
    ask(Client::default().supervisor(Method::GET, "/v1/supervisor", None::<&()>))
}

fn status() -> Outcome {
    let SupervisorInfo { pid, version, dir, vms, checkpoints, prepared } = running()?;
    println!("process {pid}, version {version}");
    println!("directory {}", dir.display());
    println!("{vms} VMs, {checkpoints} checkpoints, {prepared} prepared processes");
    Ok(())
}

fn stop() -> Outcome {
    if Client::default().is_remote() {
        return Err(Failure::input(anyhow!("CLADE_API is set: only a supervisor of this host can be stopped")));
    }
    let supervisor = running()?;
    let pid = i32::try_from(supervisor.pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Failure::run(anyhow!("the supervisor reports an invalid pid")))?;
    // A pidfd of the process: its pid may be reused before the signal is sent.
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(Failure::run)?;
    if running()?.pid != supervisor.pid {
        return Err(Failure::run(anyhow!("another supervisor has just started: try again")));
    }
    pidfd_send_signal(&process, Signal::TERM).map_err(Failure::run)?;
    let timeout = Timespec { tv_sec: STOP_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout)).map_err(Failure::run)?;
    if ended == 0 {
        return Err(Failure::run(anyhow!("process {} has not ended after {STOP_TIMEOUT:?}", supervisor.pid)));
    }
    println!("the supervisor has ended: process {}", supervisor.pid);
    Ok(())
}

pub(super) fn main(args: &ServeArgs) -> Outcome {
    if args.status {
        return status();
    }
    if args.stop {
        return stop();
    }
    with_runtime(|runtime| {
        // Before there is anything to clean up.
        let shutdown = ShutdownSignal::listen(runtime).map_err(Failure::run)?;
        let dir = runtime_dir();
        let token = args.token_file.as_deref().map(Token::read_or_create).transpose().map_err(Failure::input)?;
        let (confinement, cgroup, net_hook) = (args.confine, args.cgroup.clone(), args.net_hook.clone());
        let (pool, ahead_mib) = (args.pool, args.ahead);
        let options = SupervisorOptions { pool, confinement, cgroup, net_hook, ahead_mib, session: None };
        let supervisor = Supervisor::start(&dir, &options, runtime).map_err(|error| match error {
            FleetError::Worker { .. } => Failure::run(error),
            _ => Failure::input(error),
        })?;
        if let Some((address, token)) = args.tcp.zip(token) {
            let listening = supervisor.listen(address, token).inspect_err(|_| supervisor.close());
            say!("the API is at tcp://{}", listening.map_err(Failure::input)?);
        }
        args.e2b.serve(&dir, runtime).inspect_err(|_| supervisor.close())?;
        say!("VMs in {} are supervised", dir.display());
        notify(READY);
        while shutdown.signal().is_none() {
            std::thread::sleep(POLL_INTERVAL);
        }
        notify(STOPPING);
        supervisor.close();
        shutdown.signal().map_or(Ok(()), |number| Err(Failure::Signal(number)))
    })
}

/// Returns whether a supervisor answers for the runtime directory `dir`.
pub(super) fn answers(dir: &Path) -> bool {
    UnixStream::connect(supervisor_path(dir)).is_ok()
}

/// Starts a supervisor in the background, unless one runs.
pub(super) fn ensure() -> Outcome {
    let dir = runtime_dir();
    let answers = || answers(&dir);
    if answers() {
        return Ok(());
    }
    let log = open_log(&dir).map_err(Failure::input)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("clade").arg("serve").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    // Keys of this terminal must not signal it.
    command.process_group(0);
    let mut started = command.spawn().map_err(Failure::run)?;
    let (mut deadline, mut has_ended) = (Instant::now() + START_TIMEOUT, false);
    while !answers() {
        // Another may have been quicker, and answers in a moment.
        if !has_ended && started.try_wait().map_err(Failure::run)?.is_some() {
            (has_ended, deadline) = (true, Instant::now() + OTHER_TIMEOUT);
        }
        if Instant::now() > deadline {
            let dir = dir.display();
            return Err(Failure::Run(match has_ended {
                true => anyhow::anyhow!("the supervisor has exited; see clade.log in {dir}"),
                false => anyhow::anyhow!("the supervisor does not answer after {START_TIMEOUT:?}"),
            }));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
