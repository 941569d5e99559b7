//! `clade restore`: starts VMs from a snapshot.

use std::io::{self, Write};
use std::time::Instant;

use clade_api::{Client, ForkAnswer, ForkRequest, Labels, RestoreRequest, SavedSource};
use clade_vmm::vm::RestoreLoad;
use hyper::Method;

use crate::commands::args::RestoreArgs;
use crate::commands::remote::ask;
use crate::commands::run::{say, with_runtime};
use crate::commands::serve::ensure;
use crate::commands::session::CommandSession;
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::times::{limit, suspend_after};
use crate::commands::{Failure, Outcome, print_json};

/// Builds the request from the arguments.
fn request(args: &RestoreArgs) -> Result<RestoreRequest, Failure> {
    let load = match (args.preload, args.working_set) {
        (true, _) => RestoreLoad::Preload,
        (_, true) => RestoreLoad::WorkingSet,
        _ => RestoreLoad::Lazy,
    };
    // Absolute, but with links unresolved: the path stays the user's.
    let dir = std::path::absolute(&args.dir).map_err(Failure::input)?;
    let parents: Result<_, _> = args.parents.dirs.iter().map(std::path::absolute).collect();
    let parents = parents.map_err(Failure::input)?;
    let overlays = args.overlays.as_ref().map(std::path::absolute).transpose().map_err(Failure::input)?;
    let vms = ForkRequest {
        count: args.count,
        name: args.pattern.clone(),
        paused: args.child.paused,
        ready: args.ready,
        without_secrets: false,
        labels: (!args.label.is_empty()).then(|| Labels::of(&args.label)).transpose().map_err(Failure::input)?,
        nets: args.child.net.clone(),
        network: args.child.network.map(Into::into),
        egress: args.child.egress.clone(),
        vsock: args.child.vsock.clone(),
        ahead_mib: None,
        overcommit: args.overcommit,
        detach: false,
    };
    Ok(RestoreRequest { saved: SavedSource { dir, load, overlays, parents }, vms, session: None })
}

pub(crate) fn main(args: &RestoreArgs) -> Outcome {
    let begun = Instant::now();
    let mut request = request(args)?;
    if args.background {
        if !Client::default().is_remote() {
            ensure()?;
        }
        let made: ForkAnswer = ask(Client::default().supervisor(Method::POST, "/v1/restore", Some(&request)))?;
        let timed = limit(&made.children, args.times.ttl).and(suspend_after(&made.children, args.times.suspend_after));
        if args.json {
            return print_json(&made).map_err(Failure::run).and(timed);
        }
        list(&made.children, args, begun);
        return timed;
    }
    with_runtime(|runtime| {
        // Before there is anything to clean up.
        let shutdown = ShutdownSignal::listen(runtime).map_err(Failure::run)?;
        let session = CommandSession::begin(args.confine, runtime, &shutdown)?;
        request.session = Some(session.name().to_owned());
        let made = session.make("/v1/restore", &request, |made: ForkAnswer| made.children)?;
        if let [name] = made.as_slice() {
            let took = begun.elapsed().as_secs_f64() * 1e3;
            say!("{name} restored from {} in {took:.1} ms\r", request.saved.dir.display());
            return session.foreground(name, args.detached);
        }
        list(&made, args, begun);
        say!("they run until they end by themselves, or until Ctrl-C, which ends all {}", made.len());
        session.wait_for_each(&made)
    })
}

fn list(made: &[String], args: &RestoreArgs, begun: Instant) {
    for name in made {
        drop(writeln!(io::stdout(), "{name}"));
    }
    let took = begun.elapsed().as_secs_f64() * 1e3;
    let count = made.len();
    let what = if count == 1 { "1 VM".to_owned() } else { format!("{count} VMs") };
    say!("{what} restored from {} in {took:.1} ms", args.dir.display());
}
