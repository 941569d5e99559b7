//! The command line of `clade`. `clade-lab` measures and stresses the supervisor and the workers of
//! this library.

mod commands;
mod linux_guest;

pub use commands::{
    ANSWER_PAGES, ANSWER_SEED, ANSWERING, BARE, DevSupervisor, Failure, KernelSource, MEASURE, RemoteVm, SPINNING,
    Table, exit_on_signal, for_each, main, parse_size, print_json, program,
};
