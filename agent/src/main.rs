//! `clade-agent`: PID 1 of a guest, or a service in it.

use std::process::ExitCode;

use clade_agent::{Options, run};

fn main() -> ExitCode {
    run(Options::parse(std::env::args().skip(1)))
}
