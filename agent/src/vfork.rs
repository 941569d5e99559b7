//! Starts programs as `vfork` does: the child borrows the agent's memory until its exec.
//!
//! A fork would copy the agent's page tables, and the agent and the child would then fault on each
//! page that either writes. In a guest, each of these faults and each page-table write may leave the
//! guest. The standard library forks whenever steps of ours are to run before exec.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fs::{Access, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{DumpableBehavior, Pid, Resource, WaitOptions, set_dumpable_behavior, setrlimit, waitpid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::program::{Program, ProgramSession};

/// Bytes of a child's stack: its steps need a few hundred.
const STACK_SIZE: usize = 64 << 10;
/// Bytes below it that cannot be touched.
const GUARD_SIZE: usize = 4 << 10;
/// The last real-time signal of the kernel.
const LAST_SIGNAL: i32 = 64;
/// Makes the kernel kill such a process before the agent, when memory runs out.
const OOM_SCORE: &[u8] = b"100";
/// Runs a script that names no interpreter, as `execvp` does.
const SHELL: &CStr = c"/bin/sh";
/// Time limit in seconds from the change of the user to exec.
const EXEC_LIMIT: i64 = if cfg!(test) { 3 } else { 60 };
/// The exit status of a child that could not execute its program.
const NOT_STARTED: c_int = 127;

/// The stack of children, used by one at a time.
#[derive(Debug)]
pub(crate) struct ChildStack {
    start: *mut c_void,
}

// SAFETY: the memory belongs to this value alone, and any thread may use it.
unsafe impl Send for ChildStack {}

impl ChildStack {
    /// Maps a stack.
    pub(crate) fn new() -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::STACK);
        // SAFETY: the kernel chooses an address where nothing is mapped.
        let start = unsafe { mmap_anonymous(null_mut(), GUARD_SIZE + STACK_SIZE, access, flags) }?;
        let stack = Self { start };
        // SAFETY: the first page of the mapping made above, to which nothing refers.
        unsafe { mprotect(start, GUARD_SIZE, MprotectFlags::empty()) }?;
        Ok(stack)
    }

    fn top(&mut self) -> *mut c_void {
        self.start.wrapping_byte_add(GUARD_SIZE + STACK_SIZE)
    }
}

impl Drop for ChildStack {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`; no child uses it, as `spawn` returns after the child's exec.
        let _ = unsafe { munmap(self.start, GUARD_SIZE + STACK_SIZE) };
    }
}

/// Everything a child needs. The agent's thread is suspended until the child executes its program or
/// ends.
struct Plan<'a> {
    program: &'a Program,
    args: Vec<*const c_char>,
    /// Arguments of the shell for a script: the shell, a place for the path, and the script's own.
    script_args: Vec<*const c_char>,
    env: Vec<*const c_char>,
    /// The error number of the step that failed.
    error: AtomicI32,
    /// The agent's end of the pipe that a program's start closes.
    started: OwnedFd,
}

fn pointers(strings: &[CString]) -> impl Iterator<Item = *const c_char> {
    strings.iter().map(|string| string.as_ptr())
}

/// Starts `program`. Returns once its process has executed it and closed the agent's files, or failed
/// to.
pub(crate) fn spawn(program: &Program, stack: &mut ChildStack) -> io::Result<Pid> {
    // The thread runs on while the kernel still closes the child's copies of the agent's files. A
    // file that the agent then closes and executes would be busy: the copy could still write it.
    let (closed, started) = pipe_with(PipeFlags::CLOEXEC)?;
    let end = || std::iter::once(null());
    let own = program.args.get(1..).unwrap_or_default();
    let mut plan = Plan {
        program,
        args: pointers(&program.args).chain(end()).collect(),
        script_args: [SHELL.as_ptr(), null()].into_iter().chain(pointers(own)).chain(end()).collect(),
        env: pointers(&program.env).chain(end()).collect(),
        error: AtomicI32::new(0),
        started,
    };
    // A handler of the agent that ran in the child would act on the agent's memory.
    let mask = set_mask(u64::MAX);
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the child runs `child` on a stack of its own, which `stack` lends for the time. This
    // thread is suspended until the child leaves the shared memory, so `plan` lives on and nothing
    // else refers to it. Other threads run on: the child takes no lock and no memory.
    let pid = unsafe { libc::clone(child, stack.top(), flags, (&raw mut plan).cast()) };
    let failed = io::Error::last_os_error();
    set_mask(mask);
    let pid = Pid::from_raw(pid.max(0)).ok_or(failed)?;
    drop(plan.started);
    // Ends with the last copy, also that of a child that has been killed.
    let _ = rustix::io::retry_on_intr(|| rustix::io::read(&closed, &mut [0_u8; 1]));
    match plan.error.load(Ordering::Relaxed) {
        0 => Ok(pid),
        error => {
            // The child ends at once. Another reaper of all children may have seen its end first.
            let _ = waitpid(Some(pid), WaitOptions::empty());
            Err(io::Error::from_raw_os_error(error))
        }
    }
}

/// The child's life until exec.
extern "C" fn child(plan: *mut c_void) -> c_int {
    // SAFETY: `spawn` gives a plan that lives on while its thread is suspended.
    let plan = unsafe { &mut *plan.cast::<Plan<'_>>() };
    let error = match prepare(plan.program) {
        Ok(()) => execute(plan),
        Err(error) => error,
    };
    plan.error.store(error.raw_os_error(), Ordering::Relaxed);
    // SAFETY: ends this process without handlers, buffers and destructors, which are the agent's.
    unsafe { libc::_exit(NOT_STARTED) }
}

/// The steps before exec: the streams; a session, and a terminal for some; then the
/// user; then the directory, because the user must be allowed to enter it.
///
/// They only make system calls, on values made before. The child has one thread, so settings of the
/// thread are those of the process.
fn prepare(program: &Program) -> Result<(), Errno> {
    for (number, stream) in (0..).zip(&program.streams) {
        let Some(stream) = stream else { continue };
        // SAFETY: no wrapper owns a standard stream. The file's own number is above all three:
        // the standard library opens those that are closed at the agent's start.
        if unsafe { libc::dup2(stream.as_raw_fd(), number) } < 0 {
            return Err(last_error());
        }
    }
    match program.session {
        ProgramSession::Own => {
            rustix::process::setsid()?;
        }
        ProgramSession::OnTerminal => {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        ProgramSession::Foreground => {
            rustix::process::setpgid(None::<Pid>, None::<Pid>)?;
            // SIGTTOU, which this causes from the background, is blocked.
            rustix::termios::tcsetpgrp(rustix::stdio::stdin(), rustix::process::getpid())?;
        }
    }
    default_signals();
    // The process also runs without these.
    if let Ok(file) = rustix::fs::open(c"/proc/self/oom_score_adj", OFlags::WRONLY, Mode::empty()) {
        let _ = rustix::io::write(&file, OOM_SCORE);
    }
    let _ = setrlimit(Resource::Nofile, program.files);
    if let Some(groups) = &program.groups {
        set_thread_groups(groups)?;
    }
    if let Some((uid, gid)) = program.owner {
        // The user may open its streams by their names in /dev. Those that are the agent's own stay so, and a
        // device that all programs share is no stream of one.
        for (stream, file) in
            program.streams.iter().zip([rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()])
        {
            if stream.is_some() && !is_null(file) {
                let _ = rustix::fs::fchown(file, Some(uid), None);
            }
        }
        set_thread_res_gid(gid, gid, gid)?;
        limit_exec();
        set_thread_res_uid(uid, uid, uid)?;
        // The user must not trace a process with the agent's memory, nor have it dumped. The setting
        // is the memory's, so the agent keeps it: the kernel sets it here as well by default.
        set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    }
    rustix::process::chdir(program.cwd.as_c_str())?;
    #[cfg(test)]
    tests::stop_if_asked();
    // Last: until here the user's signals would end a process with the agent's memory.
    set_mask(0);
    Ok(())
}

/// Whether a file is /dev/null.
fn is_null(file: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(file).is_ok_and(|found| found.st_rdev == rustix::fs::makedev(1, 3))
}

/// Executes the first path that can be executed. Returns only with an error.
fn execute(plan: &mut Plan<'_>) -> Errno {
    let searched = plan.program.paths.len() > 1;
    let mut error = Errno::NOENT;
    for path in &plan.program.paths {
        // A failed exec may cost the kernel an address space; a look does not.
        let found = if searched { rustix::fs::access(path.as_c_str(), Access::EXISTS) } else { Ok(()) };
        let mut failed = match found {
            Ok(()) => exec(path, &plan.args, &plan.env),
            Err(failed) => failed,
        };
        if failed == Errno::NOEXEC {
            if let Some(place) = plan.script_args.get_mut(1) {
                *place = path.as_ptr();
            }
            failed = exec(SHELL, &plan.script_args, &plan.env);
        }
        match failed {
            // Another directory may have one for this user.
            Errno::ACCESS => error = Errno::ACCESS,
            Errno::NOENT | Errno::NOTDIR | Errno::STALE | Errno::NODEV | Errno::TIMEDOUT => {
                if error != Errno::ACCESS {
                    error = failed;
                }
            }
            _ => return failed,
        }
    }
    error
}

fn exec(path: &CStr, args: &[*const c_char], env: &[*const c_char]) -> Errno {
    // SAFETY: a path, and lists that end with null, of strings that live on.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    last_error()
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Has the kernel kill the child if it does not execute its program in time. From the change of the user on, the user can
/// stop the child, which stops the agent. Exec deletes the timer.
fn limit_exec() {
    // SAFETY: all of its fields may be zero.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_SIGNAL, libc::SIGKILL);
    let mut timer: c_int = 0;
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let limit = libc::itimerspec { it_interval: none, it_value: libc::timespec { tv_sec: EXEC_LIMIT, tv_nsec: 0 } };
    let (event, id) = (&raw const event, &raw mut timer);
    // SAFETY: the kernel reads `event` and writes `timer`, which live on.
    if unsafe { libc::syscall(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, event, id) } == 0 {
        // SAFETY: the kernel reads `limit`, which lives on.
        unsafe { libc::syscall(libc::SYS_timer_settime, timer, 0, &raw const limit, null_mut::<c_void>()) };
    }
}

/// Gives every signal its default disposition: exec keeps signals ignored by the agent's starter.
fn default_signals() {
    // The kernel's structure: SIG_DFL, no flags, no restorer and no mask. The C library's function
    // refuses the two signals that the library uses itself.
    let action = [0_u64; 4];
    for number in 1..=LAST_SIGNAL {
        let (action, size) = (&raw const action, size_of::<u64>());
        // SAFETY: the kernel reads `action`, which lives on, and installs no handler. It refuses
        // SIGKILL and SIGSTOP with an error. Dispositions are the child's own, unlike the memory.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, number, action, 0_usize, size) };
    }
}

/// Blocks the signals of `mask` in this thread, among them those of the C library. Returns the mask
/// of before.
fn set_mask(mask: u64) -> u64 {
    let (mut before, size) = (0_u64, size_of::<u64>());
    let (mask, old) = (&raw const mask, &raw mut before);
    // SAFETY: the kernel reads `mask` and writes `before`, which both live on.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, mask, old, size) };
    before
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use rustix::process::{Gid, Uid};

    use super::*;
    use crate::program::first_file_limit;

    thread_local! {
        /// Of the agent's thread, whose memory the child has.
        static STOPS: Cell<bool> = const { Cell::new(false) };
    }

    /// Stops the child as its user can.
    pub(super) fn stop_if_asked() {
        if STOPS.get() {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
        }
    }

    #[test]
    fn a_child_that_its_user_stops_before_exec_does_not_stop_the_agent() {
        if !rustix::process::geteuid().is_root() {
            return clade_test_support::skipped("only root starts programs of other users");
        }
        let program = Program {
            paths: vec![c"/bin/true".into()],
            args: vec![c"true".into()],
            env: Vec::new(),
            cwd: c"/".into(),
            groups: Some(Vec::new()),
            owner: Some((Uid::from_raw(65534), Gid::from_raw(65534))),
            files: first_file_limit(),
            streams: [None, None, None],
            session: ProgramSession::Own,
        };
        let mut stack = ChildStack::new().unwrap();
        // Another test of this process may reap it first.
        let mut end_of = || {
            let pid = spawn(&program, &mut stack).unwrap();
            waitpid(Some(pid), WaitOptions::empty()).ok().flatten().map(|(_, status)| status)
        };
        end_of();
        STOPS.set(true);
        let killed = end_of();
        assert!(killed.is_none_or(|end| end.terminating_signal() == Some(libc::SIGKILL)), "{killed:?}");
    }
}
