//! Runs another program with default signals and few variables, without a copy of this process.
//!
//! The standard library has two ways. With a hook between fork and exec it copies this process, including guest memory,
//! under devices' pins. Without a hook it spawns the program, which then ignores and blocks the signals that this
//! process ignores and blocks, such as those that `nohup` sets.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawnp};
use nix::sys::signal::SigSet;
use rustix::io::retry_on_intr;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};

/// The variables of this process that a program has. A guest may break into a program that serves it, and this process
/// may have secrets in others.
const INHERITED: [&str; 4] = ["HOME", "LD_LIBRARY_PATH", "PATH", "TMPDIR"];

/// The end of a program.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Its exit code. None if a signal ended it.
    pub(super) code: Option<i32>,
    /// Its standard error.
    pub(super) said: Vec<u8>,
}

/// Runs a program to its end. `args` begins with its name, which is looked up in PATH.
///
/// # Errors
/// When the program cannot be started.
pub(super) fn run(args: &[CString], stdin: BorrowedFd<'_>) -> io::Result<Outcome> {
    let program = args.first().ok_or(io::ErrorKind::InvalidInput)?;
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    let mut streams = PosixSpawnFileActions::init()?;
    for (from, to) in [
        (stdin.as_raw_fd(), libc::STDIN_FILENO),
        (null.as_raw_fd(), libc::STDOUT_FILENO),
        (writer.as_raw_fd(), libc::STDERR_FILENO),
    ] {
        streams.add_dup2(from, to)?;
    }
    let mut signals = PosixSpawnAttr::init()?;
    signals.set_sigdefault(&all_signals())?;
    signals.set_sigmask(&SigSet::empty())?;
    signals.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK)?;
    let env = INHERITED.iter().filter_map(|name| {
        let value = std::env::var_os(name)?;
        Some([name.as_bytes(), value.as_bytes()].join(&b'='))
    });
    let env: Vec<CString> = env.map(CString::new).collect::<Result<_, _>>()?;
    let pid = posix_spawnp(program, &streams, &signals, args, &env)?;
    drop(writer);
    let mut said = Vec::new();
    let read = File::from(reader).read_to_end(&mut said);
    // Also after a failure to read: otherwise the process stays a zombie.
    let end = retry_on_intr(|| waitpid(Pid::from_raw(pid.as_raw()), WaitOptions::empty()))?;
    read?;
    Ok(Outcome { code: end.and_then(|(_, status)| status.exit_status()), said })
}

/// Not `SigSet::all`: it leaves out the two signals that the C library uses itself.
fn all_signals() -> SigSet {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the bytes of `all`, which is a set of bits.
    unsafe { all.as_mut_ptr().write_bytes(0xff, 1) };
    // SAFETY: initialized above.
    let all = unsafe { all.assume_init() };
    // SAFETY: every set of bits is a set of signals.
    unsafe { SigSet::from_sigset_t_unchecked(all) }
}
