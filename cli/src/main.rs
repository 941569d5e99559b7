//! The `clade` command.

mod bench;
mod check;
mod commands;
mod demo;
mod linux_guest;
mod stress;

use std::process::ExitCode;

fn main() -> ExitCode {
    commands::main()
}
