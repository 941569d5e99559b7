//! A child and the ends of its streams.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Once;

use clade_agent_proto::process::{Size, StartRequest};
use clade_agent_proto::{Code, RpcError};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;

use crate::children::{Child, Children};
use crate::log::log;
use crate::paths;
use crate::program::{Program, SpawnEnv};
use crate::stream::{Stream, register};

/// The shell used by E2B's SDKs, and the substitute in a guest without it.
const BASH: &str = "/bin/bash";
const SH: &str = "/bin/sh";

/// A child that has just been started.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) child: Child,
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

pub(crate) fn window(size: Size) -> Winsize {
    let small = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    Winsize { ws_row: small(size.rows), ws_col: small(size.cols), ws_xpixel: 0, ws_ypixel: 0 }
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

/// Whether a limit of the guest has been reached.
fn is_exhausted(error: &io::Error) -> bool {
    let error = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(error, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN))
}

fn failed(what: &str) -> impl Fn(io::Error) -> RpcError + '_ {
    move |error| {
        let code = if is_exhausted(&error) { Code::ResourceExhausted } else { Code::Internal };
        RpcError::new(code, format_args!("{what}: {error}"))
    }
}

fn not_started(program: &str, error: &io::Error) -> RpcError {
    let code = match error.kind() {
        _ if is_exhausted(error) => Code::ResourceExhausted,
        io::ErrorKind::NotFound => Code::NotFound,
        io::ErrorKind::PermissionDenied => Code::PermissionDenied,
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
fn named_or_substitute(named: &str) -> &str {
    static LOGGED: Once = Once::new();
    let runs = substitute(named, |path| fs::metadata(path).is_ok());
    if runs != named {
        LOGGED.call_once(|| log!("the guest lacks {named}: {runs} runs instead"));
    }
    runs
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
    let mut program = Program::new(named_or_substitute(&config.cmd), &config.args, &config.envs, &cwd, spawn_env)
        .map_err(|error| not_started(&config.cmd, &error))?;
    let run = |program: &Program| children.spawn(program).map_err(|error| not_started(&config.cmd, &error));
    if let Some(wanted) = request.pty {
        let (master, slave) = pty(wanted.size).map_err(failed("no terminal can be made"))?;
        let both = Interest::READABLE | Interest::WRITABLE;
        let streams = Streams::Pty(register(master, both).map_err(failed("no terminal can be made"))?);
        program.on_terminal(slave).map_err(failed("no terminal can be made"))?;
        return Ok(Started { child: run(&program)?, streams });
    }
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed("no pipe can be made")(error.into()));
    let register = |fd, interest| register(fd, interest).map_err(failed("no pipe can be made"));
    let stdin = if request.stdin.unwrap_or(true) {
        let (reader, writer) = pipe()?;
        program.stdin(reader);
        Some(register(writer, Interest::WRITABLE)?)
    } else {
        program.no_stdin().map_err(failed("/dev/null cannot be opened"))?;
        None
    };
    let (stdout, writer) = pipe()?;
    program.stdout(writer);
    let (stderr, writer) = pipe()?;
    program.stderr(writer);
    let (stdout, stderr) = (register(stdout, Interest::READABLE)?, register(stderr, Interest::READABLE)?);
    let child = run(&program)?;
    Ok(Started { child, streams: Streams::Pipes { stdin, stdout, stderr } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_reached_is_no_fault_of_the_request() {
        for (error, code) in [
            (Errno::MFILE, Code::ResourceExhausted),
            (Errno::NOMEM, Code::ResourceExhausted),
            (Errno::AGAIN, Code::ResourceExhausted),
            (Errno::NOENT, Code::NotFound),
            (Errno::ACCESS, Code::PermissionDenied),
            (Errno::NOTDIR, Code::InvalidArgument),
        ] {
            assert_eq!(not_started("a", &error.into()).code, code, "{error}");
        }
    }

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
