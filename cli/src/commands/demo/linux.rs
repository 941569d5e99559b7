//! The Linux guest's part: boot it once, fork its shell, type a different command into each child.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::progress;
use crate::commands::{DEFAULT_CMDLINE, DemoArgs, DevSupervisor, Failure, KernelSource, Table};
use crate::linux_guest::LinuxGuest;
use clade_vmm::vm::VmConfig;

/// A boot takes under a second with hardware virtualization and half a minute without, on a busy
/// machine many times that.
const BOOT: Duration = Duration::from_secs(1200);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);
const MEMORY: u64 = 128 << 20;

/// The commands typed into the children; every answer must differ.
const COMMANDS: [&str; 10] = [
    "echo $((6 * 7))",
    "uname -r",
    "echo I am the third child",
    "cat /proc/sys/kernel/ostype",
    "ls -d /proc/self",
    "echo $$ is my shell",
    "cat /proc/cmdline",
    "basename /a/b/eight",
    "expr 3 '*' 3",
    "pwd",
];

#[derive(Debug, Serialize)]
pub(crate) struct LinuxReport {
    boot_s: f64,
    children: usize,
    answers: Vec<Answer>,
    pause_us: f64,
    /// Answers that were missing, or equal to another's.
    pub(crate) wrong_answers: u64,
}

#[derive(Debug, Serialize)]
struct Answer {
    command: &'static str,
    answer: String,
}

/// Shortens an answer to fit a table of 80 columns.
fn shortened(answer: &str) -> String {
    const WIDTH: usize = 32;
    match answer.char_indices().nth(WIDTH) {
        None => answer.to_owned(),
        Some((at, _)) => format!("{}...", &answer[..at]),
    }
}

impl LinuxReport {
    pub(crate) fn print(&self) -> io::Result<()> {
        writeln!(
            io::stdout(),
            "\nLinux: booted in {:.1} s, its shell forked {} times in one pause of {:.0} us",
            self.boot_s,
            self.children,
            self.pause_us
        )?;
        let mut table = Table::new(["typed into", "command", "answer"]);
        for (n, answer) in (1..).zip(&self.answers) {
            table.words([format!("child {n}"), answer.command.into(), shortened(&answer.answer)]);
        }
        table.print()
    }
}

/// The Linux guest, if it is built already or `args` allow building it.
fn guest(args: &DemoArgs) -> Result<Option<LinuxGuest>, Failure> {
    match (args.no_linux, args.linux) {
        (true, _) => Ok(None),
        (_, true) => LinuxGuest::build().map(Some).map_err(Failure::run),
        _ => LinuxGuest::find().map_err(Failure::input),
    }
}

pub(crate) fn run(vms: &DevSupervisor, args: &DemoArgs) -> Result<Option<LinuxReport>, Failure> {
    let Some(guest) = guest(args)? else { return Ok(None) };
    let config = VmConfig::new(MEMORY, 1).map_err(Failure::run)?;
    let source = KernelSource { kernel: &guest.kernel, initrd: Some(&guest.initrd), cmdline: DEFAULT_CMDLINE };
    let spin = progress::spinner(args, "booting Linux");
    let begun = Instant::now();
    let parent = vms.boot("linux", &config, source)?;
    parent.console()?.wait_for("clade# ", BOOT)?;
    let boot_s = begun.elapsed().as_secs_f64();
    spin.finish_and_clear();

    let (children, forked) = vms.fork(&format!("vms/{}", parent.name()), "linux-{n}", COMMANDS.len())?;
    // The parent has no more work, and processors are few.
    parent.pause()?;
    let bar = progress::bar(args, "ten shells, ten commands", children.len());
    let mut answers = Vec::new();
    // As many children at a time as processors. Where guest kernels are interpreted, a kernel with
    // less than a processor mostly serves its timer.
    let at_once = std::thread::available_parallelism().map_or(1, usize::from);
    for (children, commands) in children.chunks(at_once).zip(COMMANDS.chunks(at_once)) {
        let mut consoles = Vec::with_capacity(children.len());
        for (child, command) in children.iter().zip(commands) {
            let mut console = child.console()?;
            console.type_in(&format!("{command}\n"))?;
            child.resume()?;
            consoles.push(console);
        }
        for ((child, command), console) in children.iter().zip(commands).zip(&mut consoles) {
            let text = console.wait_for("[done ", ANSWER_TIMEOUT)?;
            answers.push(Answer { command, answer: answer_in(&text, command) });
            child.pause()?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let wrong = |n: usize| answers[n].answer.is_empty() || answers[..n].iter().any(|a| a.answer == answers[n].answer);
    let wrong_answers = (0..answers.len()).filter(|n| wrong(*n)).count() as u64;
    Ok(Some(LinuxReport { boot_s, children: children.len(), pause_us: forked.pause_us, answers, wrong_answers }))
}

/// The lines between the echoed command and the end mark.
fn answer_in(console: &str, command: &str) -> String {
    let before_mark = console.split("[done ").next().unwrap_or("");
    let lines = before_mark.lines().map(str::trim).filter(|l| !l.is_empty() && !l.ends_with(command));
    lines.collect::<Vec<_>>().join(" / ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_what_stands_between_echo_and_mark() {
        assert_eq!(answer_in("echo 42\r\n42\r\n[done 0]\r\nclade# ", "echo 42"), "42");
        assert_eq!(answer_in("clade# ls\r\na\r\nb\r\n[done 0]", "ls"), "a / b");
    }
}
