//! The command line.

mod agent;
mod args;
mod build;
mod checkpoint;
mod cp;
mod demo;
mod dev_supervisor;
mod devices;
mod disk;
mod e2b;
mod environment;
mod events;
mod exec;
mod generate;
mod guest;
mod guest_agent;
mod image;
mod image_vm;
mod journal;
mod kept;
mod lifecycle;
mod limits;
mod logging;
mod machine;
mod memory;
mod modules;
mod network;
mod notify;
mod oci_template;
mod output;
mod pages;
mod progress;
mod ps;
mod remote;
mod restore;
mod run;
mod serve;
mod session;
mod shutdown;
mod snapshot;
mod stats;
mod template;
mod terminal;
mod times;
mod tree;
mod units;
mod wait;
mod worker;
mod zygote;

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use image::ImageCommand;
use lifecycle::Verb;
pub use lifecycle::for_each;
pub use output::{Table, print_json};
use output::{print_bytes, printable};
pub use units::parse_size;

/// Maximum length of a printed error.
const MAX_ERROR: usize = 16 << 10;

/// Reason why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// The input is invalid or cannot be used: exit code 2.
    Input(anyhow::Error),
    /// The command failed: exit code 1.
    Run(anyhow::Error),
    /// The time limit has passed: exit code 124, like that of `timeout`.
    Timeout(anyhow::Error),
    /// A program of the guest ended with this code, or the code stands for the reason why it did
    /// not run.
    Exit(u8, Option<anyhow::Error>),
    /// An orderly end by a signal: exit code 128 plus the signal's number, as in shells.
    Signal(i32),
}

impl Failure {
    /// Returns a failure of an input.
    pub fn input(error: impl Into<anyhow::Error>) -> Self {
        Self::Input(error.into())
    }
    /// Returns a failure of a command.
    pub fn run(error: impl Into<anyhow::Error>) -> Self {
        Self::Run(error.into())
    }

    /// Returns the same failure, prefixed with a name.
    pub(crate) fn named(self, name: &str) -> Self {
        let named = |error: anyhow::Error| error.context(name.to_owned());
        match self {
            Self::Input(error) => Self::Input(named(error)),
            Self::Run(error) => Self::Run(named(error)),
            Self::Timeout(error) => Self::Timeout(named(error)),
            Self::Exit(code, error) => Self::Exit(code, error.map(named)),
            Self::Signal(number) => Self::Signal(number),
        }
    }

    /// Returns the process's exit code.
    fn code(&self) -> u8 {
        match self {
            Self::Run(_) => 1,
            Self::Input(_) => 2,
            Self::Timeout(_) => 124,
            Self::Exit(code, _) => *code,
            Self::Signal(number) => 128 + *number as u8,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input(error) | Self::Run(error) | Self::Timeout(error) | Self::Exit(_, Some(error)) => {
                // The text of a guest or of a VM's process may be in it.
                let text = printable(&clade_vmm::error_chain(error.as_ref()));
                let end = text.floor_char_boundary(MAX_ERROR);
                f.write_str(&text[..end])?;
                if end < text.len() { f.write_str(" ...") } else { Ok(()) }
            }
            Self::Exit(code, None) => write!(f, "ended with code {code}"),
            Self::Signal(number) => write!(f, "ended by signal {number}"),
        }
    }
}

type Outcome = Result<(), Failure>;

/// Parses the arguments of `clade`, runs the command, and returns the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).take(3).collect();
    if words == ["help", "environment"] {
        limits::end_at_closed_pipes();
        print!("{}", environment::text());
        return ExitCode::SUCCESS;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are not failures; clap distinguishes them.
        Err(error) => error.exit(),
    };
    // These run VMs or programs in them, or must restore the terminal from raw mode.
    let runs_vms = matches!(
        cli.command,
        Command::Run(_)
            | Command::Demo(_)
            | Command::Restore(_)
            | Command::Console(_)
            | Command::Exec(_)
            | Command::Shell(_)
            | Command::Cp(_)
            | Command::Template(_)
            | Command::Serve(_)
            | Command::Zygote(_)
    );
    program("clade", runs_vms, || run(cli.command))
}

/// Sets limits of this process and its log, runs a command of the program `name`, and returns the
/// exit code.
pub fn program(name: &str, runs_vms: bool, command: impl FnOnce() -> Outcome) -> ExitCode {
    limits::give_back_large_buffers();
    limits::raise();
    if !runs_vms {
        limits::end_at_closed_pipes();
    }
    let outcome = logging::init().and_then(|()| command());
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // The program has printed the reason.
        Err(Failure::Exit(code, None)) => ExitCode::from(code),
        Err(failure) => {
            // Standard error may be closed.
            let _ = writeln!(std::io::stderr(), "{name}: {failure}");
            ExitCode::from(failure.code())
        }
    }
}

fn run(command: Command) -> Outcome {
    match command {
        Command::Demo(args) => demo::main(&args),
        Command::Run(args) => run::main(&args),
        Command::Guest(args) => guest::main(&args),
        Command::Ps(args) => ps::main(&args),
        Command::Pages(args) => pages::main(&args),
        Command::Stats(args) => stats::main(&args),
        Command::Memory(command) => memory::main(&command),
        Command::Tree(args) => tree::main(&args),
        Command::Fork(args) => remote::fork(&args),
        Command::Reset(args) => lifecycle::reset(&args),
        Command::Rollback(args) => lifecycle::rollback(&args),
        Command::Reidentify(args) => lifecycle::main(&args, &Verb::Reidentify),
        Command::Balloon(args) => remote::balloon(&args),
        Command::Network(args) => network::main(&args),
        Command::Console(args) => remote::console(&args),
        Command::Exec(args) => exec::main(args),
        Command::Shell(args) => exec::shell(args),
        Command::Cp(args) => cp::main(&args),
        Command::Pause(args) => lifecycle::main(&args, &Verb::Pause),
        Command::Resume(args) => lifecycle::main(&args, &Verb::Resume),
        Command::Suspend(args) => lifecycle::suspend(&args),
        Command::Wake(args) => lifecycle::main(&args, &Verb::Wake),
        Command::Stop(args) => lifecycle::stop(&args),
        Command::Ttl(args) => times::ttl(&args),
        Command::SuspendAfter(args) => times::idle(&args),
        Command::Wait(args) => wait::main(&args),
        Command::Logs(args) => remote::logs(&args),
        Command::Snapshot(args) => snapshot::main(args),
        Command::Restore(args) => restore::main(&args),
        Command::Disk(command) => journal::main(&command),
        Command::Image(command) => image::main(&command),
        Command::Images(args) => image::main(&ImageCommand::Ls(args)),
        Command::Template(command) => template::main(&command),
        Command::Key(command) => e2b::key(&command),
        Command::Serve(args) => serve::main(&args),
        Command::Checkpoint(args) => checkpoint::take(&args),
        Command::Checkpoints(args) => checkpoint::list(&args),
        Command::Keep(args) => checkpoint::keep(&args),
        Command::Events(args) => events::main(&args),
        Command::Rm(args) => lifecycle::main(&args, &Verb::Remove),
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::man(&args),
        Command::Openapi => generate::openapi(),
        Command::Zygote(args) => zygote::main(&args),
    }
}

pub(crate) use args::{DEFAULT_CMDLINE, DemoArgs};
pub use dev_supervisor::{DevSupervisor, KernelSource, RemoteVm};
pub use shutdown::exit_on_signal;
pub use worker::{ANSWER_PAGES, ANSWER_SEED, ANSWERING, BARE, MEASURE, SPINNING};

#[cfg(test)]
mod tests {
    use super::*;

    /// The codes of the table in docs/operations.md, of which the last row is for signals.
    #[test]
    fn the_documented_exit_codes_are_those_of_failures() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (_, section) = text.split_once("\n## Exit codes\n").unwrap();
        let section = section.split("\n## ").next().unwrap();
        let rows = section.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
        let documented: Vec<&str> = rows.skip_while(|cell| *cell != "code").skip(1).collect();
        let error = || anyhow::anyhow!("why");
        let codes = [Failure::Run(error()), Failure::Input(error()), Failure::Timeout(error())].map(|one| one.code());
        let mut expected: Vec<String> = std::iter::once(0).chain(codes).map(|code| code.to_string()).collect();
        // Those of a program that was not run are `exec`'s own.
        expected.extend(["125, 126, 127".to_owned(), "a program's".to_owned()]);
        assert_eq!(Failure::Exit(7, None).code(), 7);
        let (signals, plain) = documented.split_last().unwrap();
        assert_eq!(plain, expected);
        assert!(signals.starts_with("128 and a signal"), "{signals}");
        for (number, code) in [(1, 129), (2, 130), (15, 143)] {
            assert_eq!(Failure::Signal(number).code(), code);
        }
    }

    /// The text of a guest or of a VM's process may be in it.
    #[test]
    fn a_printed_error_is_short_and_has_no_control_characters() {
        let text = format!("/srv/\u{1b}]0;owned\u{7}\né{}", "x".repeat(MAX_ERROR));
        let shown = Failure::run(anyhow::anyhow!(text)).to_string();
        assert!(shown.starts_with("/srv/\\u{1b}]0;owned\\u{7}\né") && shown.ends_with("x ..."), "{shown:.60}");
        assert_eq!(shown.len(), MAX_ERROR + 4);
    }

    #[test]
    fn a_failure_of_several_has_a_name() {
        let failed = Failure::input(anyhow::anyhow!("it has stopped")).named("web");
        assert_eq!((failed.to_string().as_str(), failed.code()), ("web: it has stopped", 2));
    }
}
