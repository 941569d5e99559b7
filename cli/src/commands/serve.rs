//! `clade serve`: the supervisor of a runtime directory.

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clade_api::{
    Client, ClientError, DaemonError, KeptSettings, MergingVm, SupervisorInfo, SupervisorKept, Token, log_path,
    open_log, runtime_dir, supervisor_path,
};
use clade_supervisor::{Supervisor, SupervisorOptions, TcpPort, vms_in};
use clade_worker::jail::Confinement;

use hyper::Method;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::commands::args::ServeArgs;
use crate::commands::kept::checkpoint_dir;
use crate::commands::notify::{READY, STOPPING, notify};
use crate::commands::remote::ask;
use crate::commands::run::{say, with_server_runtime};
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::{Failure, Outcome, limits};

/// Interval of the checks for the end.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Time limit of the start of a supervisor in the background.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit of another supervisor that already has the directory.
const OTHER_TIMEOUT: Duration = Duration::from_secs(1);

/// With `--until-idle`: the time without a request that changes something after which the supervisor
/// ends, if it has no VM, and no checkpoint that is not on disk. A command asks it to stay first, and
/// has as much time for its request.
const IDLE_TIME: Duration = Duration::from_secs(2);
/// Time limit of one request for its state.
const STATE_TIMEOUT: Duration = Duration::from_secs(10);

/// Time that `clade serve --stop` waits for the end.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the running supervisor.
fn running() -> Result<SupervisorInfo, Failure> {
    ask(Client::default().supervisor(Method::GET, "/v1/supervisor", None::<&()>))
}

fn status() -> Outcome {
    let SupervisorInfo { pid, version, dir, vms, checkpoints, kept, prepared, merging, until_idle } = running()?;
    println!("process {pid}, version {version}");
    println!("directory {}", dir.display());
    println!("{vms} VMs, {checkpoints} checkpoints ({kept} on disk), {prepared} prepared processes");
    if until_idle {
        println!("it ends with the last VM, and the last checkpoint that is not on disk");
    }
    for MergingVm { name, waits, failed, .. } in merging {
        match (failed, waits) {
            (true, _) => println!("{name} has ended; its disk lacks writes since a fork: see clade.log"),
            (_, true) => {
                println!("{name} has ended; its disk gets the writes since a fork once no VM or checkpoint uses it");
            }
            _ => println!("{name} has ended; its disk gets the writes since a fork"),
        }
    }
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
    limits::keep_descriptors_from_children();
    with_server_runtime(|runtime| {
        // Before there is anything to clean up.
        let shutdown = ShutdownSignal::listen(runtime).map_err(Failure::run)?;
        let dir = runtime_dir();
        let token = args.token_file.as_deref().map(Token::read_or_create).transpose().map_err(Failure::input)?;
        let (confinement, cgroup, net_hook) = (args.confine, args.cgroup.clone(), args.net_hook.clone());
        let (pool, ahead_mib) = (args.pool, args.ahead);
        let until_idle = args.until_idle;
        let kept = checkpoint_dir(&dir);
        let options = SupervisorOptions {
            pool,
            confinement,
            cgroup,
            net_hook,
            ahead_mib,
            until_idle,
            kept,
            worker_env: Vec::new(),
        };
        wait_for_idle_end(&dir, &shutdown);
        // Before the supervisor answers: a command that starts it must not find one that cannot stay.
        // But not beside a supervisor that runs, whose ports and files these may be. The directory is
        // checked first.
        KeptSettings::kept(&dir).map_err(Failure::input)?;
        let bind =
            || Ok((args.tcp.map(TcpPort::bind).transpose().map_err(Failure::input)?, args.e2b.bind(&dir, runtime)?));
        let early = if answers(&dir) { None } else { Some(bind()?) };
        let supervisor = Supervisor::start(&dir, &options, runtime).map_err(|error| match error {
            DaemonError::Worker { .. } => Failure::run(error),
            _ => Failure::input(error),
        })?;
        let ports = early.map_or_else(bind, Ok);
        let (tcp, e2b) = ports.inspect_err(|_| supervisor.close())?;
        if let Some((port, token)) = tcp.zip(token) {
            let listening = supervisor.listen(port, token).inspect_err(|_| supervisor.close());
            say!("the API is at tcp://{}", listening.map_err(Failure::input)?);
        }
        let e2b = e2b.map(|bound| bound.serve(&supervisor, runtime));
        // The settings of a supervisor that ends by itself are of no use to the next one.
        if !until_idle {
            keep_settings(&dir);
        }
        say!("VMs in {} are supervised", dir.display());
        notify(READY);
        while shutdown.signal().is_none() && !(until_idle && supervisor.ends_if_idle(IDLE_TIME)) {
            std::thread::sleep(POLL_INTERVAL);
        }
        notify(STOPPING);
        // Before the next supervisor may start.
        if !until_idle && let Err(error) = KeptSettings::forget(&dir) {
            tracing::warn!(%error, "the next supervisor has the settings of this one");
        }
        supervisor.close();
        e2b.iter().for_each(|served| served.finish(runtime));
        shutdown.signal().map_or(Ok(()), |number| Err(Failure::Signal(number)))
    })
}

/// Keeps the settings of this process for the next supervisor, if this one is killed.
fn keep_settings(dir: &Path) {
    // Without arguments there are no settings.
    if std::env::args_os().len() <= 2 {
        if let Err(error) = KeptSettings::forget(dir) {
            tracing::warn!(%error, "the settings of an earlier supervisor stay");
        }
        return;
    }
    let args = std::env::args_os().skip(1).map(OsString::into_string).collect::<Result<Vec<_>, _>>();
    let settings = args
        .map_err(|arg| anyhow!("{arg:?} is not UTF-8"))
        .and_then(|args| Ok(KeptSettings { args, working_dir: std::env::current_dir()? }));
    if let Err(error) = settings.and_then(|settings| Ok(settings.keep(dir)?)) {
        tracing::warn!(%error, "the settings are not kept for the next supervisor");
    }
}

/// Returns whether a supervisor answers for the runtime directory `dir`.
pub(super) fn answers(dir: &Path) -> bool {
    UnixStream::connect(supervisor_path(dir)).is_ok()
}

/// Returns whether a supervisor runs: it answers once it has started completely. Its end is put off.
fn keep() -> bool {
    let client = Client::default();
    let request = client.supervisor::<SupervisorKept>(Method::POST, "/v1/supervisor", None::<&()>);
    match ask(async { Ok(tokio::time::timeout(STATE_TIMEOUT, request).await) }) {
        // It runs, and answers the next request when it can.
        Ok(Ok(Ok(_)) | Err(_)) => true,
        // So does one of another version, which does not know the request. One that ends has a 409.
        Ok(Ok(Err(ClientError::Refused { status, .. }))) => status != 409,
        Ok(Ok(Err(_))) | Err(_) => false,
    }
}

/// Waits for the end of a supervisor of `dir` that a command has started, and that has nothing left.
/// A signal ends the wait.
fn wait_for_idle_end(dir: &Path, shutdown: &ShutdownSignal) {
    let (client, deadline) = (Client::new(dir), Instant::now() + STATE_TIMEOUT);
    let info = || {
        let request = client.supervisor::<SupervisorInfo>(Method::GET, "/v1/supervisor", None::<&()>);
        ask(async { Ok(tokio::time::timeout(STATE_TIMEOUT, request).await) }).ok()?.ok()?.ok()
    };
    let is_idle = |info: &SupervisorInfo| {
        let is_merging = info.merging.iter().any(|vm| !vm.failed);
        info.until_idle && info.checkpoints == info.kept && !is_merging && vms_in(dir).is_ok_and(|vms| vms.is_empty())
    };
    while answers(dir)
        && info().as_ref().is_some_and(is_idle)
        && shutdown.signal().is_none()
        && Instant::now() < deadline
    {
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Starts a supervisor in the background, unless one runs.
pub(super) fn ensure() -> Outcome {
    ensure_with(&[], Confinement::Auto)
}

/// The same, with these arguments and this confinement for a supervisor that is started.
pub(super) fn ensure_with(args: &[&str], confinement: Confinement) -> Outcome {
    let dir = runtime_dir();
    if keep() {
        return Ok(());
    }
    let log = open_log(&dir).map_err(Failure::input)?;
    let earlier = log.metadata().map_err(Failure::run)?.len();
    let kept = KeptSettings::kept(&dir).map_err(Failure::input)?;
    let with = kept.as_ref().map_or_else(String::new, |kept| {
        let args = kept.args.join(" ");
        format!(" with the settings of one that was killed (`clade {args}`; another clade serve replaces them)")
    });
    let mut command = Command::new("/proc/self/exe");
    command.arg0("clade").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    // The directory may be relative to another working directory.
    command.env("CLADE_RUNTIME_DIR", std::path::absolute(&dir).map_err(Failure::input)?);
    match &kept {
        Some(kept) if confinement == Confinement::Require && !requires_confinement(&kept.args) => {
            return Err(Failure::input(anyhow!("--confine require: the supervisor would start{with}, without it")));
        }
        Some(kept) => command.args(&kept.args).current_dir(&kept.working_dir),
        // Defaults are no settings to be kept.
        None if confinement == Confinement::Auto => command.arg("serve").args(args),
        None => command.args(["serve", "--confine", &confinement.to_string()]).args(args),
    };
    // Keys of this terminal must not signal it.
    command.process_group(0);
    limits::keep_descriptors_from_children();
    let mut started = command.spawn().map_err(|error| Failure::run(anyhow!("no supervisor starts{with}: {error}")))?;
    let (mut deadline, mut ended) = (Instant::now() + START_TIMEOUT, None);
    while !keep() {
        // Another may have been quicker, and answers in a moment.
        if ended.is_none() {
            ended = started.try_wait().map_err(Failure::run)?;
            deadline = ended.map_or(deadline, |_| Instant::now() + OTHER_TIMEOUT);
        }
        if Instant::now() > deadline {
            let Some(status) = ended else {
                return Err(Failure::run(anyhow!("the supervisor does not answer after {START_TIMEOUT:?}")));
            };
            let error = anyhow!("{}", read_error(&dir, earlier, &with));
            return Err(if status.code() == Some(2) { Failure::Input(error) } else { Failure::Run(error) });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn requires_confinement(args: &[String]) -> bool {
    args.iter().any(|arg| arg == "--confine=require") || args.windows(2).any(|two| two == ["--confine", "require"])
}

/// Returns the error of a supervisor that could not start, `with` some settings: the last line that
/// it has logged. `earlier` is the length of the log before.
fn read_error(dir: &Path, earlier: u64, with: &str) -> String {
    let log = std::fs::read(log_path(dir)).unwrap_or_default();
    let text = String::from_utf8_lossy(log.get(earlier as usize..).unwrap_or_default()).into_owned();
    match text.lines().rev().find_map(|line| line.strip_prefix("clade: ")) {
        Some(error) => format!("the supervisor could not start{with}: {error}"),
        None => format!("the supervisor has exited{with}; see {}", log_path(dir).display()),
    }
}
