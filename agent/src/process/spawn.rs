//! A child and the ends of its streams.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Once, OnceLock};

use clade_agent_proto::process::{Size, StartRequest};
use clade_agent_proto::{Code, RpcError};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Pid, Resource, Rlimit, Uid, getrlimit, setrlimit};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tokio::io::Interest;
use tokio::sync::oneshot;

use crate::children::Children;
use crate::log::log;
use crate::paths;
use crate::stream::{Stream, register};
use crate::users::User;

/// Search path for programs, if the agent's environment lacks one.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The shell used by E2B's SDKs, and the substitute in a guest without it.
const BASH: &str = "/bin/bash";
const SH: &str = "/bin/sh";
/// The variable with tunables of the C library.
const TUNABLES: &str = "GLIBC_TUNABLES";
/// Makes the kernel kill such a process before the agent, when memory runs out.
const OOM_SCORE: &[u8] = b"100";

/// The last real-time signal of the kernel.
const LAST_SIGNAL: i32 = 64;

/// The initial environment of a process.
#[derive(Debug)]
pub(crate) struct SpawnEnv<'a> {
    pub(crate) user: &'a User,
    pub(crate) envs: &'a BTreeMap<String, String>,
    pub(crate) workdir: Option<&'a str>,
}

/// A child that has just been started.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: u32,
    pub(crate) end: oneshot::Receiver<ExitStatus>,
    pub(crate) streams: Streams,
}

/// The agent's ends of its streams.
#[derive(Debug)]
pub(crate) enum Streams {
    /// A terminal.
    Pty(Stream),
    /// Pipes, or no standard input.
    Pipes { stdin: Option<Stream>, stdout: Stream, stderr: Stream },
}

/// The limit of open files at the agent's start, which its children get.
pub(crate) fn first_file_limit() -> Rlimit {
    static FIRST: OnceLock<Rlimit> = OnceLock::new();
    *FIRST.get_or_init(|| getrlimit(Resource::Nofile))
}

pub(crate) fn window(size: Size) -> Winsize {
    let small = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    Winsize { ws_row: small(size.rows), ws_col: small(size.cols), ws_xpixel: 0, ws_ypixel: 0 }
}

/// The command with its user, directory and environment, and without streams.
pub(crate) fn command(
    program: &str,
    args: &[String],
    envs: &BTreeMap<String, String>,
    cwd: &Path,
    spawn_env: &SpawnEnv<'_>,
    has_terminal: bool,
) -> Command {
    let mut command = Command::new(program);
    let path = std::env::var_os("PATH").filter(|path| !path.is_empty());
    command.args(args).env_clear().env("PATH", path.unwrap_or_else(|| DEFAULT_PATH.into()));
    // The host may have disabled processor features for the C library.
    command.envs(std::env::var_os(TUNABLES).map(|tunables| (TUNABLES, tunables)));
    command.env("HOME", &spawn_env.user.home).env("USER", &spawn_env.user.name).env("LOGNAME", &spawn_env.user.name);
    command.envs(spawn_env.envs).envs(envs);
    enter(&mut command, spawn_env.user, cwd, has_terminal);
    command
}

/// The child's steps before exec: a session and a terminal, or a group of its own; then its user;
/// then the directory, because the user must be allowed to enter it.
fn enter(command: &mut Command, user: &User, cwd: &Path, has_terminal: bool) {
    let is_other = rustix::process::geteuid().as_raw() != user.uid || rustix::process::getegid().as_raw() != user.gid;
    let is_root = rustix::process::geteuid().is_root();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let files = first_file_limit();
    // A path with a NUL was refused before, when it was looked up.
    let cwd = std::ffi::CString::new(cwd.as_os_str().as_encoded_bytes()).unwrap_or_default();
    let prepare = move || {
        if has_terminal {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        } else {
            rustix::process::setpgid(None::<Pid>, None::<Pid>)?;
        }
        default_signals();
        // The process also runs without these.
        if let Ok(file) = rustix::fs::open(c"/proc/self/oom_score_adj", OFlags::WRONLY, Mode::empty()) {
            let _ = rustix::io::write(&file, OOM_SCORE);
        }
        let _ = setrlimit(Resource::Nofile, files);
        if is_root {
            set_thread_groups(&groups)?;
        }
        if is_other {
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
        }
        rustix::process::chdir(cwd.as_c_str())?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls, on values copied before:
    // it takes no lock and no memory. The child has one thread, so settings of the thread are those
    // of the process.
    unsafe { command.pre_exec(prepare) };
}

/// Gives every signal its default disposition, and blocks none. The standard library resets only
/// SIGPIPE, and exec keeps signals ignored or blocked by the agent's starter.
fn default_signals() {
    // The kernel's structure: SIG_DFL, no flags, no restorer and no mask. The C library's function
    // refuses the two signals that the library uses itself.
    let action = [0_u64; 4];
    for number in 1..=LAST_SIGNAL {
        let (action, size) = (&raw const action, size_of::<u64>());
        // SAFETY: the kernel reads `action`, which lives on, and installs no handler. It refuses
        // SIGKILL and SIGSTOP with an error.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, number, action, 0_usize, size) };
    }
    let (mask, size) = (0_u64, size_of::<u64>());
    // SAFETY: the kernel reads `mask`, which lives on, and returns no old mask.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, 0_usize, size) };
}

fn pty(size: Size) -> io::Result<(OwnedFd, OwnedFd)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    tcsetwinsize(&slave, window(size))?;
    Ok((master, slave))
}

fn failed(what: &str) -> impl Fn(io::Error) -> RpcError + '_ {
    move |error| match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN) => {
            RpcError::new(Code::ResourceExhausted, format_args!("{what}: {error}"))
        }
        _ => RpcError::internal(format_args!("{what}: {error}")),
    }
}

fn not_started(program: &str, error: &io::Error) -> RpcError {
    let code = match error.kind() {
        io::ErrorKind::NotFound => Code::NotFound,
        io::ErrorKind::PermissionDenied => Code::PermissionDenied,
        io::ErrorKind::OutOfMemory | io::ErrorKind::WouldBlock => Code::ResourceExhausted,
        _ => Code::InvalidArgument,
    };
    RpcError::new(code, format_args!("'{program}' cannot be started: {error}"))
}

fn directory(asked: Option<&str>, spawn_env: &SpawnEnv<'_>) -> Result<PathBuf, RpcError> {
    let cwd =
        paths::resolve(asked.unwrap_or_default(), spawn_env.user, spawn_env.workdir).map_err(RpcError::invalid)?;
    match fs::metadata(&cwd) {
        Ok(found) if found.is_dir() => Ok(cwd),
        Ok(_) => Err(RpcError::invalid(format_args!("cwd '{}' is no directory", cwd.display()))),
        // A user's home may not exist.
        Err(_) if asked.is_none_or(str::is_empty) && spawn_env.workdir.is_none() => Ok("/".into()),
        Err(_) => Err(RpcError::invalid(format_args!("cwd '{}' does not exist", cwd.display()))),
    }
}

/// The program to run for `named`: `/bin/sh` for a `/bin/bash` that the guest lacks.
fn substitute(named: &str, exists: impl Fn(&str) -> bool) -> &str {
    if named == BASH && !exists(BASH) && exists(SH) { SH } else { named }
}

/// [`substitute`] in this guest. The first substitution is logged.
fn program(named: &str) -> &str {
    static LOGGED: Once = Once::new();
    let program = substitute(named, |path| fs::metadata(path).is_ok());
    if program != named {
        LOGGED.call_once(|| log!("the guest lacks {named}: {program} runs instead"));
    }
    program
}

/// Starts the process of `request`.
pub(crate) fn start(
    children: &Children,
    request: &StartRequest,
    spawn_env: &SpawnEnv<'_>,
) -> Result<Started, RpcError> {
    let config = &request.process;
    if config.cmd.is_empty() {
        return Err(RpcError::invalid("no command is named"));
    }
    if config.envs.keys().any(|name| name.is_empty() || name.contains('=')) {
        return Err(RpcError::invalid("a variable has an empty name, or one with '='"));
    }
    let cwd = directory(config.cwd.as_deref(), spawn_env)?;
    let mut command = command(program(&config.cmd), &config.args, &config.envs, &cwd, spawn_env, request.pty.is_some());
    let run = |command: &mut Command| children.spawn(command).map_err(|error| not_started(&config.cmd, &error));
    if let Some(wanted) = request.pty {
        let (master, slave) = pty(wanted.size).map_err(failed("no terminal can be made"))?;
        let copy = || slave.try_clone().map(Stdio::from).map_err(failed("no terminal can be made"));
        command.stdin(copy()?).stdout(copy()?).stderr(Stdio::from(slave));
        let both = Interest::READABLE | Interest::WRITABLE;
        let streams = Streams::Pty(register(master, both).map_err(failed("no terminal can be made"))?);
        let (pid, end) = run(&mut command)?;
        return Ok(Started { pid, end, streams });
    }
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed("no pipe can be made")(error.into()));
    let register = |fd, interest| register(fd, interest).map_err(failed("no pipe can be made"));
    let stdin = if request.stdin.unwrap_or(true) {
        let (reader, writer) = pipe()?;
        command.stdin(Stdio::from(reader));
        Some(register(writer, Interest::WRITABLE)?)
    } else {
        command.stdin(Stdio::null());
        None
    };
    let (stdout, writer) = pipe()?;
    command.stdout(Stdio::from(writer));
    let (stderr, writer) = pipe()?;
    command.stderr(Stdio::from(writer));
    let (stdout, stderr) = (register(stdout, Interest::READABLE)?, register(stderr, Interest::READABLE)?);
    let (pid, end) = run(&mut command)?;
    Ok(Started { pid, end, streams: Streams::Pipes { stdin, stdout, stderr } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sh_runs_for_a_missing_bash_alone() {
        for (named, there, runs) in [
            (BASH, &[BASH, SH][..], BASH),
            (BASH, &[SH], SH),
            (BASH, &[], BASH),
            ("/bin/zsh", &[SH], "/bin/zsh"),
            ("bash", &[SH], "bash"),
        ] {
            assert_eq!(substitute(named, |path| there.contains(&path)), runs, "{named} with {there:?}");
        }
    }
}
