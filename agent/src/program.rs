//! A program to run, with all that its process needs. It is allocated before the process exists.

use std::collections::BTreeMap;
use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Gid, Resource, Rlimit, Uid, getrlimit};

use crate::users::User;

/// Search path for programs, if the agent's environment lacks one.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The variable with tunables of the C library.
const TUNABLES: &str = "GLIBC_TUNABLES";

/// The initial environment of a process.
#[derive(Debug)]
pub(crate) struct SpawnEnv<'a> {
    pub(crate) user: &'a User,
    pub(crate) envs: &'a BTreeMap<String, String>,
    pub(crate) workdir: Option<&'a str>,
}

/// A program, its arguments and environment, and the settings of its process.
#[derive(Debug)]
pub(crate) struct Program {
    /// The paths to try: one, or one for each directory of the search path.
    pub(crate) paths: Vec<CString>,
    pub(crate) args: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: CString,
    /// The supplementary groups, which only root may set.
    pub(crate) groups: Option<Vec<Gid>>,
    /// The user and group, if they are not those of the agent.
    pub(crate) owner: Option<(Uid, Gid)>,
    pub(crate) files: Rlimit,
    /// Standard input, output and error. The agent's own where none is given.
    pub(crate) streams: [Option<OwnedFd>; 3],
    /// Its session.
    pub(crate) session: ProgramSession,
}

/// The session of a program. Each has a process group of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProgramSession {
    /// Of its own, without a terminal.
    Own,
    /// Of its own, with standard input as its terminal.
    OnTerminal,
    /// The agent's, whose terminal is standard input, in the foreground there.
    Foreground,
}

/// The limit of open files at the agent's start, which its children get.
pub(crate) fn first_file_limit() -> Rlimit {
    static FIRST: OnceLock<Rlimit> = OnceLock::new();
    *FIRST.get_or_init(|| getrlimit(Resource::Nofile))
}

/// The paths that `name` may mean: itself if it has a slash, or in each directory of `search`.
fn paths(name: &str, search: &[u8]) -> io::Result<Vec<CString>> {
    // No file has an empty name: a directory of the search path must not be taken for one.
    if name.is_empty() || name.contains('/') {
        return Ok(vec![CString::new(name)?]);
    }
    let in_directory = |directory: &[u8]| {
        // An empty entry of the search path is the current directory.
        let slash: &[u8] = if directory.is_empty() { b"" } else { b"/" };
        Ok(CString::new([directory, slash, name.as_bytes()].concat())?)
    };
    search.split(|byte| *byte == b':').map(in_directory).collect()
}

impl Program {
    /// The program `name` with `args`, in the directory `cwd`, with the agent's standard streams.
    pub(crate) fn new(
        name: &str,
        args: &[String],
        envs: &BTreeMap<String, String>,
        cwd: &Path,
        spawn_env: &SpawnEnv<'_>,
    ) -> io::Result<Self> {
        let user = spawn_env.user;
        let path = std::env::var_os("PATH").filter(|path| !path.is_empty());
        let mut env = BTreeMap::<OsString, OsString>::new();
        env.insert("PATH".into(), path.unwrap_or_else(|| DEFAULT_PATH.into()));
        // The host may have disabled processor features for the C library.
        env.extend(std::env::var_os(TUNABLES).map(|tunables| (TUNABLES.into(), tunables)));
        env.insert("HOME".into(), user.home.clone().into());
        env.insert("USER".into(), user.name.clone().into());
        env.insert("LOGNAME".into(), user.name.clone().into());
        env.extend(spawn_env.envs.iter().chain(envs).map(|(name, value)| (name.into(), value.into())));
        let search = env.get(&OsString::from("PATH")).cloned().unwrap_or_default().into_vec();
        let mut strings = vec![CString::new(name)?];
        for arg in args {
            strings.push(CString::new(arg.as_str())?);
        }
        let is_other =
            rustix::process::geteuid().as_raw() != user.uid || rustix::process::getegid().as_raw() != user.gid;
        let is_root = rustix::process::geteuid().is_root();
        Ok(Self {
            paths: paths(name, &search)?,
            args: strings,
            env: env
                .into_iter()
                .map(|(name, value)| Ok(CString::new([&name.into_vec()[..], b"=", &value.into_vec()].concat())?))
                .collect::<io::Result<_>>()?,
            cwd: CString::new(cwd.as_os_str().as_encoded_bytes())?,
            groups: is_root.then(|| user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect()),
            owner: is_other.then(|| (Uid::from_raw(user.uid), Gid::from_raw(user.gid))),
            files: first_file_limit(),
            streams: [None, None, None],
            session: ProgramSession::Own,
        })
    }

    /// Gives the process a session of its own on the terminal `slave`.
    pub(crate) fn on_terminal(&mut self, slave: OwnedFd) -> io::Result<()> {
        self.streams = [Some(slave.try_clone()?), Some(slave.try_clone()?), Some(slave)];
        self.session = ProgramSession::OnTerminal;
        Ok(())
    }

    /// Puts the process into the foreground of the agent's terminal.
    pub(crate) fn in_foreground(&mut self, terminal: OwnedFd) -> io::Result<()> {
        self.on_terminal(terminal)?;
        self.session = ProgramSession::Foreground;
        Ok(())
    }

    /// Lets the process read from `file`.
    pub(crate) fn stdin(&mut self, file: OwnedFd) {
        self.streams[0] = Some(file);
    }

    /// Lets the process read nothing.
    pub(crate) fn no_stdin(&mut self) -> io::Result<()> {
        self.stdin(rustix::fs::open(c"/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?);
        Ok(())
    }

    /// Sends the output of the process to `file`.
    pub(crate) fn stdout(&mut self, file: OwnedFd) {
        self.streams[1] = Some(file);
    }

    /// Sends the messages of the process to `file`.
    pub(crate) fn stderr(&mut self, file: OwnedFd) {
        self.streams[2] = Some(file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_slash_is_searched_for() {
        for (name, search, expected) in [
            ("/bin/a", "/x", vec!["/bin/a"]),
            ("./a", "/x", vec!["./a"]),
            ("a", "/x:/y", vec!["/x/a", "/y/a"]),
            ("a", "/x::/y", vec!["/x/a", "a", "/y/a"]),
            ("a", "", vec!["a"]),
            ("", "/x", vec![""]),
        ] {
            let found = paths(name, search.as_bytes()).unwrap();
            assert_eq!(
                found.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>(),
                expected,
                "{name} {search}"
            );
        }
        assert_eq!(paths("a\0b", b"/x").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
