//! `clade-lab bench processes`: as many processes as asked for, made by fork, with a VM each.
//!
//! A program of its own, since it is forked: it opens KVM, and nothing else of Clade. The other
//! benches start it, and read a line for each sample: microseconds until the last guest's report, of processes that are made when
//! asked for, and of processes that have their VM and lack only its memory and its registers.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clade::Failure;
use kvm_ioctls::Kvm;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{read, retry_on_intr, write};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_parent_process_death_signal, waitpid};

use super::{Limits, Touch};
use crate::args::BenchArgs;

/// A process that reports nothing for so long has failed.
const SILENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };
const READY: u8 = b'r';
const DONE: u8 = b'd';

/// The times of processes with a VM each, until the last report.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Processes {
    pub(crate) cold: Duration,
    pub(crate) prepared: Duration,
}

/// Measures `count` processes whose guests have this much RAM and write `pages` pages, by a program of its own.
pub(crate) fn measure(count: usize, samples: usize, ram: u64, pages: u64) -> Result<Vec<Processes>, Failure> {
    let mut program = Command::new("/proc/self/exe");
    program.args(["bench", "processes", "--count", &count.to_string(), "--samples", &samples.to_string()]);
    program.args(["--mem", &ram.to_string(), "--pages", &pages.to_string()]);
    let mut program = program.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(Failure::run)?;
    let mut text = String::new();
    let mut out = program.stdout.take().ok_or_else(|| Failure::Run(anyhow::anyhow!("no output")))?;
    let got = out.read_to_string(&mut text);
    let ended = program.wait().map_err(Failure::run)?;
    got.map_err(Failure::run)?;
    if !ended.success() {
        return Err(Failure::Run(anyhow::anyhow!("{count} processes with a VM each have ended with {ended}")));
    }
    parse(&text).map_err(Failure::Run)
}

fn parse(text: &str) -> Result<Vec<Processes>> {
    let times = |line: &str| {
        let (cold, prepared) = line.split_once(' ').with_context(|| format!("no two times: {line:?}"))?;
        let time = |text: &str| anyhow::Ok(Duration::from_micros(text.parse()?));
        Ok(Processes { cold: time(cold)?, prepared: time(prepared)? })
    };
    text.lines().map(times).collect()
}

/// Runs `clade-lab bench processes`.
pub(crate) fn main(args: &BenchArgs) -> Result<(), Failure> {
    // They end with the bench.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Failure::run)?;
    let limits = Limits::new(args.mem[0]).map_err(Failure::Run)?;
    for _ in 0..args.samples {
        let time = |prepared| sample(&limits, args.count.unwrap_or(1), prepared, args.pages).map_err(Failure::Run);
        println!("{} {}", time(false)?.as_micros(), time(true)?.as_micros());
    }
    Ok(())
}

/// The pipes that processes report by, and wait at.
struct Pipes {
    reports: (OwnedFd, OwnedFd),
    go: (OwnedFd, OwnedFd),
}

fn sample(limits: &Limits, count: usize, prepared: bool, pages: u64) -> Result<Duration> {
    let pipes = Pipes { reports: pipe_with(PipeFlags::CLOEXEC)?, go: pipe_with(PipeFlags::CLOEXEC)? };
    let mut begun = Instant::now();
    let mut processes = Vec::with_capacity(count);
    let made = (0..count).try_for_each(|_| {
        processes.push(fork(limits, &pipes, prepared, pages)?);
        Ok(())
    });
    let measured = made.and_then(|()| {
        if prepared {
            await_all(&pipes, count, READY)?;
            begun = Instant::now();
            for _ in 0..count {
                write(&pipes.go.1, b"g")?;
            }
        }
        await_all(&pipes, count, DONE)?;
        Ok(begun.elapsed())
    });
    // All before the first is waited for: the end of a VM takes a while.
    for process in &processes {
        let _ = kill_process(*process, Signal::KILL);
    }
    for process in processes {
        let _ = waitpid(Some(process), WaitOptions::empty());
    }
    measured
}

/// Waits until each process has reported.
fn await_all(pipes: &Pipes, count: usize, report: u8) -> Result<()> {
    let mut bytes = [0; 256];
    let mut left = count;
    while left > 0 {
        let most = left.min(bytes.len());
        let mut polled = [PollFd::new(&pipes.reports.0, PollFlags::IN)];
        if retry_on_intr(|| poll(&mut polled, Some(&SILENCE)))? == 0 {
            bail!("{left} processes with a VM have not reported");
        }
        let got = retry_on_intr(|| read(&pipes.reports.0, &mut bytes[..most]))?;
        if got == 0 || bytes[..got].iter().any(|byte| *byte != report) {
            bail!("a process with a VM has failed");
        }
        left -= got;
    }
    Ok(())
}

fn fork(limits: &Limits, pipes: &Pipes, prepared: bool, pages: u64) -> Result<Pid> {
    // SAFETY: the child calls the kernel, and the allocator, which glibc makes usable in it. Another
    // lock is taken only when it fails, and the parent ends silent processes. The child exits here.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("fork"),
        0 => {
            // A panic must not come out: the stack is a copy of the parent's.
            let made = std::panic::catch_unwind(AssertUnwindSafe(|| child(limits, pipes, prepared, pages)));
            let failed = !matches!(made, Ok(Ok(())));
            let _ = write(&pipes.reports.1, if failed { b"e" } else { b"d" });
            // SAFETY: `pause` takes no arguments, and `_exit` does not return. The parent ends a process that has reported.
            unsafe { wait_and_exit() }
        }
        pid => Pid::from_raw(pid).context("fork returned no process"),
    }
}

/// # Safety
///
/// Only for a process that was forked: no destructor runs.
unsafe fn wait_and_exit() -> ! {
    // SAFETY: it takes no arguments.
    unsafe { libc::pause() };
    // SAFETY: the process was forked and owns nothing that must be flushed.
    unsafe { libc::_exit(0) }
}

fn child(limits: &Limits, pipes: &Pipes, prepared: bool, pages: u64) -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Each process has opened KVM itself, as ours do.
    let mut vm = limits.prepare_by(&Kvm::new()?)?;
    if prepared {
        write(&pipes.reports.1, &[READY])?;
        retry_on_intr(|| read(&pipes.go.0, &mut [0]))?;
    }
    limits.answer(&mut vm, Touch::Write, pages)?;
    // The VM lives as long as the process.
    std::mem::forget(vm);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::kvm;
    use super::*;

    #[test]
    fn processes_with_a_vm_each_are_made_and_ended() {
        if !kvm() {
            return;
        }
        let limits = Limits::new(64 << 20).unwrap();
        for prepared in [false, true] {
            assert!(sample(&limits, 3, prepared, 2).unwrap() > Duration::ZERO);
        }
        let (cold, prepared) = (Duration::from_micros(15), Duration::from_micros(2));
        assert_eq!(parse("15 2\n").unwrap(), [Processes { cold, prepared }]);
        parse("15\n").unwrap_err();
    }
}
