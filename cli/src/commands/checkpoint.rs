//! `clade checkpoint`, `checkpoints`: the supervisor's images for forks.

use clade_api::{
    CheckpointInfo, CheckpointRequest, Client, GuestState, KeepRequest, PrepareRequest, Prepared, VmInfo, check_name,
};
use hyper::Method;

use crate::commands::args::{CheckpointArgs, CheckpointsArgs, KeepArgs};
use crate::commands::remote::{ask, supervised};
use crate::commands::units::{show_age, show_pause};
use crate::commands::{Failure, Outcome, Table, print_json};

pub(super) fn take(args: &CheckpointArgs) -> Outcome {
    let client = supervised(&args.vm)?;
    let request = CheckpointRequest { name: args.name.clone(), keep: args.keep, detach: args.detach, full: args.full };
    let path = format!("/v1/vms/{}/checkpoint", args.vm);
    let info: CheckpointInfo = ask(client.supervisor(Method::POST, &path, Some(&request)))?;
    // The checkpoint stays, also if processes cannot be prepared for its children.
    show(args, &client, &info)?;
    if let Some(count) = args.prepare {
        let path = format!("/v1/checkpoints/{}/prepare", info.name);
        let _: Prepared = ask(client.supervisor(Method::POST, &path, Some(&PrepareRequest { count })))?;
    }
    Ok(())
}

/// Prints the answer to a request for a checkpoint.
fn show(args: &CheckpointArgs, client: &Client, info: &CheckpointInfo) -> Outcome {
    if args.json {
        return print_json(info).map_err(Failure::run);
    }
    println!("{}", info.name);
    eprintln!("{} was paused for {}", args.vm, show_pause(info.pause_us));
    if let Some(done) = info.detached {
        let (mib, disks) = (done.copied_pages as f64 / 256.0, done.disk_bytes as f64 / f64::from(1 << 20));
        eprintln!("{mib:.1} MiB of memory and {disks:.1} MiB of disks were copied in {}", show_pause(done.total_us));
    }
    warn_of_boot(client, &args.vm);
    Ok(())
}

/// Warns on standard error if a guest has not reported yet that it is ready.
fn warn_of_boot(client: &Client, name: &str) {
    // A VM that has ended since has no guest.
    let info = ask(client.request::<VmInfo>(Method::GET, name, "", None::<&()>)).ok();
    if info.and_then(|info| info.guest) == Some(GuestState::Booting) {
        eprintln!(
            "clade: the guest of {name} was still booting: children of the checkpoint boot on. `clade run -d --wait` returns when the guest is ready"
        );
    }
}

pub(super) fn keep(args: &KeepArgs) -> Outcome {
    check_name(&args.name).map_err(Failure::input)?;
    let client = Client::default();
    // Without a body if it can be: a supervisor of the version before reads none.
    let request = args.full.then_some(KeepRequest { full: true });
    let info: CheckpointInfo = ask(client.of_checkpoint(Method::POST, &args.name, "/keep", request.as_ref()))?;
    if args.json { print_json(&info).map_err(Failure::run) } else { Ok(()) }
}

pub(super) fn list(args: &CheckpointsArgs) -> Outcome {
    let all: Vec<CheckpointInfo> = ask(Client::default().supervisor(Method::GET, "/v1/checkpoints", None::<&()>))?;
    if args.json {
        return print_json(&all).map_err(Failure::run);
    }
    let mut table = Table::new(["name", "of", "generation", "vCPUs", "MiB", "age", "descriptors", "detached", "kept"]);
    for one in all {
        table.row([
            one.name,
            one.vm.or(one.snapshot.map(|dir| dir.display().to_string())).unwrap_or_default(),
            one.generation.to_string(),
            one.cpus.to_string(),
            one.mib.to_string(),
            show_age(one.age_s),
            one.descriptors.to_string(),
            if one.detached.is_some() { "yes" } else { "" }.to_owned(),
            if one.kept { "on disk" } else { "" }.to_owned(),
        ]);
    }
    table.print().map_err(Failure::run)
}
