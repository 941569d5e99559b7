//! Requests to a running VM. `logs` also reads the records of ended VMs.

use std::future::Future;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use hyper::Method;

use crate::commands::args::{BalloonArgs, ConsoleArgs, ForkArgs, LogsArgs};
use crate::commands::progress::shown;
use crate::commands::serve::ensure;
use crate::commands::shutdown::exit_on_signal;
use crate::commands::terminal::{Escape, EscapeFilter, RawMode};
use crate::commands::times::{limit, suspend_after};
use crate::commands::units::{show_age, show_pause};
use crate::commands::{Failure, Outcome, Table, print_bytes, print_json};
use clade_api::flight::FlightEvent;
use clade_api::{
    BalloonInfo, BalloonRequest, Client, ClientError, ErasedInfo, ForkAnswer, ForkRequest, LogsAnswer, VmInfo, VmState,
};
use clade_api::{Labels, check_name, console_path, runtime_dir, virtio_console_path};

pub(super) fn ask<T>(question: impl Future<Output = Result<T, ClientError>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::run)?;
    runtime.block_on(question).map_err(failure)
}

/// Classifies an error: a bad request, or a failure of its receiver.
pub(super) fn failure(error: ClientError) -> Failure {
    match error {
        ClientError::NoSuchVm { .. }
        | ClientError::Dead { .. }
        | ClientError::Forbidden { .. }
        | ClientError::Name(_)
        | ClientError::NoSupervisor { .. }
        | ClientError::Address { .. }
        | ClientError::NoToken
        | ClientError::Token(_)
        | ClientError::NoAnswer { .. }
        | ClientError::Refused { status: 400..500, .. } => Failure::input(error),
        _ => Failure::run(error),
    }
}

pub(super) fn state_name(state: VmState) -> &'static str {
    match state {
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Suspended => "suspended",
        VmState::Stopped => "stopped",
    }
}

fn children(count: usize) -> String {
    if count == 1 { "1 child".into() } else { format!("{count} children") }
}

/// A client of the supervisor, which is started if there is none, for what is called `name`.
pub(super) fn supervised(name: &str) -> Result<Client, Failure> {
    check_name(name).map_err(Failure::input)?;
    let client = Client::default();
    if !client.is_remote() {
        ensure()?;
    }
    Ok(client)
}

pub(crate) fn fork(args: &ForkArgs) -> Outcome {
    let request = ForkRequest {
        count: args.count,
        name: args.pattern.clone(),
        paused: args.child.paused,
        ready: args.ready,
        without_secrets: args.without_secrets,
        labels: (!args.label.is_empty()).then(|| Labels::of(&args.label)).transpose().map_err(Failure::input)?,
        nets: args.child.net.clone(),
        network: args.child.network.map(Into::into),
        egress: args.child.egress.clone(),
        vsock: args.child.vsock.clone(),
        ahead_mib: args.ahead,
        overcommit: args.overcommit,
        detach: args.detach,
    };
    let client = supervised(&args.name)?;
    let forked = async {
        let fork = |of: &str| format!("/v1/{of}/{}/fork", args.name);
        match client.supervisor(Method::POST, &fork("vms"), Some(&request)).await {
            Err(ClientError::Refused { status: 404, .. }) => {
                client.supervisor(Method::POST, &fork("checkpoints"), Some(&request)).await
            }
            answer => answer,
        }
    };
    let message = || format!("forking {} ({} wanted)", args.name, children(args.count));
    let answer: ForkAnswer = if args.json { ask(forked)? } else { ask(shown(forked, message))? };
    let limited = limit(&answer.children, args.ttl).and(suspend_after(&answer.children, args.suspend_after));
    if args.json {
        return print_json(&answer).map_err(Failure::run).and(limited);
    }
    for child in &answer.children {
        println!("{child}");
    }
    eprintln!(
        "{} in {:.1} ms; {} was paused for {}",
        children(answer.children.len()),
        answer.total_us / 1000.0,
        args.name,
        show_pause(answer.pause_us),
    );
    if let Some(ErasedInfo { whole, parts }) = answer.erased {
        let parts = if parts == 0 { String::new() } else { format!(" and {parts} parts of copies") };
        eprintln!("the secrets are erased in each child: {whole} copies{parts}");
    }
    limited
}

pub(crate) fn balloon(args: &BalloonArgs) -> Outcome {
    let client = Client::default();
    let info: BalloonInfo = match args.target.map(|target_mib| BalloonRequest { target_mib }) {
        Some(request) => ask(client.request(Method::POST, &args.name, "/balloon", Some(&request)))?,
        None => ask(client.request(Method::GET, &args.name, "/balloon", None::<&()>))?,
    };
    if args.json {
        return print_json(&info).map_err(Failure::run);
    }
    let mut table = Table::new(["balloon", ""]);
    let mib = |mib: f64| format!("{mib:.1} MiB");
    table.row(["asked for".into(), mib(info.target_mib)]);
    table.row(["given up".into(), mib(info.actual_mib)]);
    table.row(["pages discarded so far".into(), info.discarded_pages.to_string()]);
    table.row(["pages kept, pinned".into(), info.pinned_pages.to_string()]);
    if let Some(guest) = info.guest {
        let kib = |kib: u64| format!("{:.1} MiB", kib as f64 / 1024.0);
        table.row(["guest: total".into(), kib(guest.total_kib)]);
        table.row(["guest: free".into(), kib(guest.free_kib)]);
        table.row(["guest: available".into(), kib(guest.available_kib)]);
        table.row(["guest: disk caches".into(), kib(guest.caches_kib)]);
    }
    table.print().map_err(Failure::run)?;
    if !info.answered {
        eprintln!("{} has not answered: what it says of its memory is old, or nothing", args.name);
    }
    Ok(())
}

pub(crate) fn console(args: &ConsoleArgs) -> Outcome {
    check_name(&args.name).map_err(Failure::input)?;
    let path = if args.is_virtio { virtio_console_path } else { console_path };
    let path = path(&runtime_dir(), &args.name);
    let gone = |source| Failure::input(ClientError::unreachable(&args.name, path.clone(), source));
    let mut from_guest = UnixStream::connect(&path).map_err(gone)?;
    let mut to_guest = from_guest.try_clone().map_err(Failure::run)?;
    eprintln!("[console of {}; Ctrl-A x leaves]", args.name);
    // A signal ends raw mode too.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(Failure::run)?;
    exit_on_signal(runtime.handle(), || {}).map_err(Failure::run)?;
    let raw = RawMode::enter().map_err(Failure::run)?;
    // Reads the keyboard until the user leaves or the VM ends. The thread dies with the process.
    std::thread::spawn(move || {
        let mut filter = EscapeFilter::default();
        let mut bytes = [0; 1024];
        while let Ok(typed @ 1..) = io::stdin().lock().read(&mut bytes) {
            let mut keys = Vec::new();
            let escape = filter.feed(&bytes[..typed], &mut keys);
            if to_guest.write_all(&keys).is_err() || escape == Some(Escape::Leave) {
                let _ = to_guest.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    });
    let mut bytes = [0; 4096];
    let mut stdout = io::stdout();
    while let Ok(got @ 1..) = from_guest.read(&mut bytes) {
        stdout.write_all(&bytes[..got]).and_then(|()| stdout.flush()).map_err(Failure::run)?;
    }
    drop(raw);
    eprintln!("\n[left]");
    Ok(())
}

/// Prints a flight record: the time of day (UTC) and the event.
fn print_flight(events: &[FlightEvent]) -> Outcome {
    let mut stdout = io::stdout().lock();
    let mut print = |event: &FlightEvent| {
        let (second, millis) = (event.at as u64 % 86_400, (event.at.fract() * 1e3) as u64);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        writeln!(stdout, "{hour:02}:{minute:02}:{second:02}.{millis:03} {}", event.event)
    };
    events.iter().try_for_each(&mut print).map_err(Failure::run)
}

/// Prints the console of a running VM until the VM ends.
fn follow(client: &Client, name: &str) -> Outcome {
    let mut printed = Ok(());
    let followed = client.follow_console(name, |bytes| {
        printed = print_bytes(bytes);
        printed.is_ok()
    });
    let followed = ask(async {
        match followed.await {
            // The process of a VM ends with it, and may leave the body without its end.
            Err(lost) if lost.is_lost() => match client.request::<VmInfo>(Method::GET, name, "", None::<&()>).await {
                Ok(VmInfo { stopped: None, .. }) | Err(ClientError::NoAnswer { .. }) => Err(lost),
                _ => Ok(()),
            },
            followed => followed,
        }
    });
    printed.map_err(Failure::run)?;
    followed
}

pub(crate) fn logs(args: &LogsArgs) -> Outcome {
    let client = Client::default();
    if args.follow {
        let followed = follow(&client, &args.name);
        // A VM that has ended has a record: its output is shown as without `--follow`.
        if !matches!(followed, Err(Failure::Input(_))) {
            return followed;
        }
    }
    let running = ask(client.request::<LogsAnswer>(Method::GET, &args.name, "/logs", None::<&()>));
    let refused = match running {
        Ok(answer) if args.json => return print_json(&answer).map_err(Failure::run),
        Ok(answer) if args.flight => return print_flight(&answer.flight),
        Ok(answer) => return print_bytes(answer.console.as_bytes()).map_err(Failure::run),
        Err(refused) => refused,
    };
    let ended = ask(client.ended())?.into_iter().find(|ended| ended.name == args.name);
    let Some(ended) = ended else { return Err(refused) };
    if args.json {
        return print_json(&ended).map_err(Failure::run);
    }
    if args.flight {
        return print_flight(&ended.flight);
    }
    print_bytes(ended.console.as_bytes()).map_err(Failure::run)?;
    eprintln!("{} ended after {}: {}", ended.name, show_age(ended.age_s), ended.reason);
    Ok(())
}
