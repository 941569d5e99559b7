//! The `clade` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    clade::main()
}
