//! The program, from its start to its end.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clade_agent_proto::Entrypoint;
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::Agent;
use crate::children::Child;
use crate::forward;
use crate::listen::{Listener, serve};
use crate::lock::lock;
use crate::log::log;
use crate::notice;
use crate::options::{Options, UsageError};
use crate::process::output::end_event;
use crate::program::{Program, SpawnEnv};
use crate::shutdown::{GRACE, end_guest};
use crate::system::{prepare, raise_file_limit};
use crate::users;

/// Threads for files. A file system that does not answer may block each of them.
const FILE_THREADS: usize = 16;
/// Time for the last answer to leave before the guest ends.
const LAST_ANSWER: Duration = Duration::from_millis(100);
const IDLE_THREAD: Duration = Duration::from_secs(5);

/// The exit status of an entrypoint that cannot be started, as in shells.
const CANNOT_START: u8 = 127;
/// The kind of the terminal behind the console, as under docker.
const CONSOLE_TERM: &str = "xterm";

/// Runs the agent until it ends, or the guest does.
#[must_use]
pub fn run(options: Result<Options, UsageError>) -> ExitCode {
    let is_init = std::process::id() == 1;
    let entrypoint = if is_init { prepare() } else { None };
    raise_file_limit();
    let options = match options {
        Ok(options) => options,
        // The kernel passes unknown words of its command line to PID 1.
        Err(_) if is_init => Options::of_a_guest(),
        Err(error) => {
            log!("{error}");
            return ExitCode::from(2);
        }
    };
    let runtime = Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(FILE_THREADS)
        .thread_keep_alive(IDLE_THREAD)
        .build();
    let ended = runtime.and_then(|runtime| runtime.block_on(live(options, is_init, entrypoint)));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn live(options: Options, is_init: bool, entrypoint: Option<Entrypoint>) -> io::Result<()> {
    let agent = Agent::new()?;
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::user_defined2()] {
        let (agent, mut signals) = (Arc::clone(&agent), signal(kind)?);
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                agent.ask_for_end(GRACE);
            }
        });
    }
    let listeners = match Listener::open(&options).await {
        Ok(listeners) => listeners,
        // PID 1 continues: its entrypoint may be sufficient.
        Err(error) if is_init => {
            log!("nobody can reach the agent: {error}");
            Vec::new()
        }
        Err(error) => return Err(io::Error::new(error.kind(), format!("the agent cannot listen: {error}"))),
    };
    if let Some(entrypoint) = entrypoint {
        if entrypoint.share_env {
            let mut settings = agent.settings();
            settings.envs = Arc::new(entrypoint.env.clone());
            settings.workdir.clone_from(&entrypoint.cwd);
        }
        // Images may refer to directories that do not exist yet. The start of a program reports any error.
        entrypoint.cwd.iter().for_each(|cwd| drop(std::fs::create_dir_all(cwd)));
        let agent = Arc::clone(&agent);
        tokio::spawn(async move { agent.run_entrypoint(entrypoint).await });
    }
    log!("{} listens", env!("CARGO_PKG_VERSION"));
    if options.vsock.is_some() && !listeners.is_empty() {
        tokio::spawn(notice::send("READY=1\n"));
    }
    tokio::spawn(serve(Arc::clone(&agent), listeners));
    match Listener::open_forward(&options) {
        Ok(Some(listener)) => drop(tokio::spawn(forward::serve(Arc::clone(&agent), listener))),
        Ok(None) => {}
        // Everything else works without it.
        Err(error) => log!("nobody can reach the guest's ports: {error}"),
    }
    let grace = agent.end().await;
    tokio::time::sleep(LAST_ANSWER).await;
    if is_init {
        return Err(end_guest(&agent, grace).await);
    }
    agent.end_processes(grace).await;
    for path in options.unix.iter().chain(&options.forward_unix) {
        // Another agent may have bound the path meanwhile.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// The terminal behind the console, on which the entrypoint is in the foreground: Ctrl-C and job control need one.
/// It is the agent's, which outlives the entrypoint: the end of a session hangs its terminal up, and output that is
/// on its way would be lost. None if the console is no terminal, or the agent is not PID 1.
fn console() -> Option<OwnedFd> {
    let is_init = std::process::id() == 1;
    let active = std::fs::read_to_string("/sys/class/tty/console/active").ok().filter(|_| is_init)?;
    let path = format!("/dev/{}", active.split_whitespace().last()?);
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let console = rustix::fs::open(&path, flags, Mode::empty()).and_then(|console| {
        // PID 1 leads no session that it was started in.
        let _ = rustix::process::setsid();
        rustix::process::ioctl_tiocsctty(&console)?;
        Ok(console)
    });
    console.inspect_err(|error| log!("{path}: {error}")).ok()
}

impl Agent {
    /// Starts the entrypoint.
    fn start_entrypoint(&self, entrypoint: &Entrypoint, program: &str) -> io::Result<Child> {
        let name = entrypoint.user.as_deref().unwrap_or("root");
        let unknown = || io::Error::new(io::ErrorKind::NotFound, format!("the user {name:?} is not known"));
        let user = users::find_with_group(name).ok_or_else(unknown)?;
        let none = BTreeMap::new();
        let spawn_env = SpawnEnv { user: &user, envs: &none, workdir: None };
        let cwd = Path::new(entrypoint.cwd.as_deref().unwrap_or("/"));
        let (mut env, console) = (entrypoint.env.clone(), console());
        if console.is_some() {
            env.entry("TERM".to_owned()).or_insert_with(|| CONSOLE_TERM.to_owned());
        }
        let args = entrypoint.args.get(1..).unwrap_or_default();
        let mut program = Program::new(program, args, &env, cwd, &spawn_env)?;
        console.map_or(Ok(()), |console| program.in_foreground(console))?;
        self.children.spawn(&program)
    }

    /// Runs the entrypoint beside the agent, on the console.
    async fn run_entrypoint(&self, entrypoint: Entrypoint) {
        let Some(program) = entrypoint.args.first() else { return };
        let (code, text) = match self.start_entrypoint(&entrypoint, program) {
            Ok(Child { pid, end, .. }) => {
                let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
                let signal = entrypoint.stop_signal.unwrap_or(libc::SIGTERM);
                *lock(&self.entrypoint) = pid.map(|pid| (pid, signal));
                let end = end_event(end.await.ok());
                (end.shell_code(), format!("{program}: {}", end.status))
            }
            Err(error) => (CANNOT_START, format!("{program} cannot be started: {error}")),
        };
        log!("{text}");
        if entrypoint.power_off {
            notice::send(&format!("EXIT_STATUS={code}\nSTATUS={text}\n")).await;
            self.ask_for_end(GRACE);
        }
        // Last: the guest ends when the host has its status.
        *lock(&self.entrypoint) = None;
    }
}
