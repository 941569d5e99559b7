//! `clade zygote`: forks workers, for the process that started this one.

use crate::commands::args::ZygoteArgs;
use crate::commands::limits::{close_inherited_descriptors, one_arena};
use crate::commands::worker::{context, standard_input, work};
use crate::commands::{Failure, Outcome};
use clade_worker::zygote::{ZygoteRole, mount, serve};

pub(super) fn main(args: &ZygoteArgs) -> Outcome {
    close_inherited_descriptors();
    one_arena();
    let socket = standard_input().map_err(Failure::run)?;
    // Once, for all workers: KVM's features and the MSRs of a vCPU are probed here.
    let context = context(mount(&socket).map_err(Failure::run)?)?;
    context.warm_up().map_err(Failure::input)?;
    match serve(socket, args.confine, args.huge_text).map_err(Failure::run)? {
        ZygoteRole::Zygote => Ok(()),
        ZygoteRole::Worker(socket) => work(&context, socket),
    }
}
