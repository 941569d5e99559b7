//! The `clade-lab` command: benchmarks, stress tests and host checks.

mod args;
mod bench;
mod check;
mod limit;
mod stress;

use std::process::ExitCode;

use args::{Cli, Command};
use clap::Parser;

/// Commands of `clade` that this program runs too. Benches, the supervisor and the zygote start
/// their processes as /proc/self/exe.
const OF_CLADE: [&str; 4] = ["run", "serve", "template", "zygote"];

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| OF_CLADE.iter().any(|command| word == *command)) {
        return clade::main();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are not failures; clap distinguishes them.
        Err(error) => error.exit(),
    };
    let runs_vms = matches!(cli.command, Command::Stress(_));
    clade::program("clade-lab", runs_vms, || match cli.command {
        Command::Bench(args) => bench::main(&args),
        Command::Stress(args) => stress::main(&args),
        Command::Check(args) => check::main(&args),
    })
}
