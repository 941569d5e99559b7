//! The command line.

mod args;
mod checkpoint;
mod devices;
mod disk;
mod guest;
mod journal;
mod limits;
mod logging;
mod output;
mod pages;
mod ps;
mod remote;
mod restore;
mod run;
mod serve;
mod shutdown;
mod snapshot;
mod stats;
mod terminal;
mod tree;
mod units;
mod worker;
mod zygote;

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
pub(crate) use output::{Table, print_json};

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The input is invalid or cannot be used: exit code 2.
    Input(anyhow::Error),
    /// The command failed: exit code 1.
    Run(anyhow::Error),
    /// An orderly end by a signal: exit code 128 plus the signal's number, as in shells.
    Signal(i32),
}

impl Failure {
    pub(crate) fn input(error: impl Into<anyhow::Error>) -> Self {
        Self::Input(error.into())
    }
    pub(crate) fn run(error: impl Into<anyhow::Error>) -> Self {
        Self::Run(error.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input(error) | Self::Run(error) => f.write_str(&clade_vmm::error_chain(error.as_ref())),
            Self::Signal(number) => write!(f, "ended by signal {number}"),
        }
    }
}

type Outcome = Result<(), Failure>;

/// Parses the arguments, runs the command, and returns the exit code.
#[must_use]
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are not failures; clap distinguishes them.
        Err(error) => error.exit(),
    };
    limits::give_back_large_buffers();
    limits::raise();
    // These run VMs, or must restore the terminal from raw mode.
    let runs_vms = matches!(
        cli.command,
        Command::Run(_)
            | Command::Restore(_)
            | Command::Console(_)
            | Command::Serve(_)
            | Command::Zygote
            | Command::Worker
    );
    if !runs_vms {
        limits::end_at_closed_pipes();
    }
    let outcome = logging::init().and_then(|()| run(cli.command));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Standard error may be closed.
            let _ = writeln!(std::io::stderr(), "clade: {failure}");
            ExitCode::from(match failure {
                Failure::Run(_) => 1,
                Failure::Input(_) => 2,
                Failure::Signal(number) => 128 + number as u8,
            })
        }
    }
}

fn run(command: Command) -> Outcome {
    match command {
        Command::Demo(args) => crate::demo::main(&args),
        Command::Run(args) => run::main(&args),
        Command::Bench(args) => crate::bench::main(&args),
        Command::Stress(args) => crate::stress::main(&args),
        Command::Check(args) => crate::check::main(&args),
        Command::Guest(args) => guest::main(&args),
        Command::Ps(args) => ps::main(&args),
        Command::Pages(args) => pages::main(&args),
        Command::Stats(args) => stats::main(&args),
        Command::Tree(args) => tree::main(&args),
        Command::Fork(args) => remote::fork(&args),
        Command::Reset(args) => remote::reset(&args),
        Command::Balloon(args) => remote::balloon(&args),
        Command::Console(args) => remote::console(&args),
        Command::Pause(args) => remote::act(&args, "/pause"),
        Command::Resume(args) => remote::act(&args, "/resume"),
        Command::Stop(args) => remote::act(&args, "/stop"),
        Command::Logs(args) => remote::logs(&args),
        Command::Snapshot(args) => snapshot::main(args),
        Command::Restore(args) => restore::main(&args),
        Command::Disk(command) => journal::main(&command),
        Command::Serve(args) => serve::main(&args),
        Command::Checkpoint(args) => checkpoint::take(&args),
        Command::Checkpoints(args) => checkpoint::list(&args),
        Command::Rm(args) => checkpoint::remove(&args),
        Command::Worker => worker::main(),
        Command::Zygote => zygote::main(),
    }
}

pub(crate) use args::{BenchArgs, BenchName, CheckArgs, CheckName, DEFAULT_CMDLINE, DemoArgs, StressArgs, StressName};
pub(crate) use worker::MEASURE;
