//! `clade wait`: waits for the ends of VMs, and shows the reasons.

use std::time::Duration;

use clade_api::{Client, ClientError, EndedVm, ProblemKind, VmInfo, check_name, socket_path};
use hyper::Method;
use serde::Serialize;
use tokio::time::Instant;

use crate::commands::remote::{ask, failure};
use crate::commands::serve::answers;
use crate::commands::units::parse_duration;
use crate::commands::{Failure, Outcome, print_json};

/// Interval of the checks of VMs.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Time limit of the record for a VM whose process was killed. The supervisor writes it, for the
/// VMs that it knows.
const RECORD_TIMEOUT: Duration = Duration::from_secs(60);
/// The same while no supervisor answers: one may just be starting.
const NO_SUPERVISOR_TIMEOUT: Duration = Duration::from_secs(15);
/// The longest wait without `--timeout`: a century.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

#[derive(Debug, clap::Args)]
pub(crate) struct WaitArgs {
    /// The VMs.
    #[arg(value_name = "VM", required_unless_present = "all", conflicts_with = "all")]
    names: Vec<String>,
    /// All VMs that run now.
    #[arg(long)]
    all: bool,
    /// Time limit, such as 90s, 5m or 1h30m. Then the exit code is 124.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// Print JSON instead of lines.
    #[arg(long)]
    json: bool,
}

/// A VM that has ended.
#[derive(Debug, Serialize)]
struct Ended {
    name: String,
    /// The reason as text.
    reason: String,
    /// Whether the VM ended properly: on request, or because the guest switched itself off.
    in_order: bool,
}

async fn record(client: &Client, name: &str) -> Result<Option<EndedVm>, Failure> {
    Ok(client.ended().await.map_err(failure)?.into_iter().find(|ended| ended.name == name))
}

/// Returns a VM's end, as far as it is known by the `deadline`. `was_seen`: it ran at the first
/// check.
async fn end_of(
    client: &Client,
    name: &str,
    (was_seen, mut is_dead): (bool, bool),
    deadline: Instant,
) -> Result<Option<Ended>, Failure> {
    let begun = Instant::now();
    loop {
        // Before the record is read: that is written before the socket goes.
        let is_there = client.is_remote() || socket_path(client.dir(), name).exists();
        if let Some(record) = record(client, name).await? {
            let in_order = record.stopped.is_in_order();
            return Ok(Some(Ended { name: name.to_owned(), reason: record.reason, in_order }));
        }
        // Without a record the VM was stopped, and its files were cleared up.
        is_dead &= is_there;
        let waited = begun.elapsed();
        let is_supervised = || client.is_remote() || answers(client.dir());
        let is_late = waited > RECORD_TIMEOUT || waited > NO_SUPERVISOR_TIMEOUT && !is_supervised();
        if !is_dead || is_late || Instant::now() > deadline {
            break;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    // A stopped VM leaves no record, and only a supervisor writes one for a process that has died.
    let reason = if is_dead { "its process has died" } else { "stopped as asked" };
    Ok(was_seen.then(|| Ended { name: name.to_owned(), reason: reason.to_owned(), in_order: !is_dead }))
}

/// Waits for the end of one VM.
async fn one(client: Client, name: String, deadline: Instant) -> Result<Option<Ended>, Failure> {
    check_name(&name).map_err(Failure::input)?;
    let mut was_seen = false;
    loop {
        let answer = client.request::<VmInfo>(Method::GET, &name, "", None::<&()>);
        let left = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, answer).await {
            Ok(Ok(VmInfo { stopped: Some(reason), .. })) => {
                let in_order = reason.is_in_order();
                return Ok(Some(Ended { name, reason: reason.to_string(), in_order }));
            }
            Ok(Ok(_)) => {
                if !std::mem::replace(&mut was_seen, true) {
                    tracing::debug!(name, "the VM runs, and its end is waited for");
                }
            }
            Ok(Err(error)) => {
                let refused = matches!(error, ClientError::Refused { .. }).then(|| error.problem());
                // The VM's process or its supervisor has no time: nothing has ended.
                let is_busy =
                    matches!(refused, Some(ProblemKind::VmSilent | ProblemKind::TooMany | ProblemKind::NoThread));
                // An answer that breaks off means that the VM is ending. A supervisor reports this
                // for a VM's process.
                let breaks_off = error.is_lost() || refused == Some(ProblemKind::VmGone);
                let is_dead = breaks_off || matches!(error, ClientError::Dead { .. });
                let is_gone = matches!(error, ClientError::NoSuchVm { .. } | ClientError::Refused { status: 404, .. });
                if !is_dead && !is_gone && !is_busy {
                    return Err(failure(error));
                }
                // A VM that ends at the first check existed then.
                was_seen |= breaks_off;
                if !is_busy && (!breaks_off || Instant::now() >= deadline) {
                    let ended = end_of(&client, &name, (was_seen, is_dead), deadline).await?;
                    return ended.map(Some).ok_or_else(|| failure(error));
                }
            }
            Err(_) => return Ok(None),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        tokio::time::sleep(left.min(POLL_INTERVAL)).await;
    }
}

pub(super) fn main(args: &WaitArgs) -> Outcome {
    let client = Client::default();
    let timeout = args.timeout.unwrap_or(FOR_EVER);
    let deadline = Instant::now() + timeout;
    // All at once: each wait lasts as long as its VM runs.
    let (names, results) = ask(async {
        let names = if args.all { client.all_names().await? } else { args.names.clone() };
        let mut waits = Vec::new();
        for name in &names {
            waits.push(tokio::spawn(one(client.clone(), name.clone(), deadline)));
        }
        let mut results = Vec::new();
        for wait in waits {
            results.push(wait.await);
        }
        Ok((names, results))
    })?;
    let (mut ended, mut first, mut late) = (Vec::new(), None, Vec::new());
    for (name, result) in names.iter().zip(results) {
        match result.map_err(Failure::run).and_then(|result| result) {
            Ok(Some(end)) => ended.push(end),
            Ok(None) => late.push(name.as_str()),
            Err(failed) => {
                let failed = if names.len() == 1 { failed } else { failed.named(name) };
                match &first {
                    None => first = Some(failed),
                    Some(_) => eprintln!("clade: {failed}"),
                }
            }
        }
    }
    if args.json {
        print_json(&ended).map_err(Failure::run)?;
    } else {
        ended.iter().for_each(|end| println!("{}: {}", end.name, end.reason));
    }
    if let Some(failed) = first {
        return Err(failed);
    }
    if !late.is_empty() {
        let seconds = timeout.as_secs_f64();
        return Err(Failure::Timeout(anyhow::anyhow!("still there after {seconds} s: {}", late.join(", "))));
    }
    match ended.iter().find(|end| !end.in_order) {
        Some(end) => Err(Failure::Run(anyhow::anyhow!("{} has not ended in order: {}", end.name, end.reason))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::thread;

    use clade_api::{KnownEnd, RuntimeDir, WorkerExit, record_end, supervisor_path};
    use clade_vmm::vm::StopReason;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Answers at the socket of the VM `web`: breaks off a request for each None. Removes the socket before it handles
    /// the last request, as a VM does that was stopped.
    fn answering(dir: &Path, answers: &'static [Option<ProblemKind>]) {
        let path = socket_path(dir, "web");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            for (number, answer) in answers.iter().enumerate() {
                let mut stream = listener.accept().unwrap().0;
                assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
                if number + 1 == answers.len() {
                    fs::remove_file(&path).unwrap();
                }
                if let Some(kind) = answer {
                    let body = format!(r#"{{"type":"{}","title":"","status":500,"detail":"it says so"}}"#, kind.urn());
                    let head = format!("HTTP/1.1 {}\r\ncontent-length: {}\r\n\r\n", kind.status(), body.len());
                    stream.write_all((head + &body).as_bytes()).unwrap();
                }
            }
        });
    }

    #[tokio::test]
    async fn a_vm_that_ends_at_the_first_check_has_been_there() {
        let far = Instant::now() + FOR_EVER;
        let rows: &[(&'static [Option<ProblemKind>], bool)] = &[
            (&[None], true),
            (&[Some(ProblemKind::VmGone)], true),
            (&[Some(ProblemKind::Ending)], true),
            // No answer of a busy host is the end of the VM.
            (&[Some(ProblemKind::VmSilent), Some(ProblemKind::TooMany), Some(ProblemKind::NoThread), None], true),
            (&[Some(ProblemKind::NoSuchVm)], false),
            (&[Some(ProblemKind::Internal)], false),
        ];
        for (answers, has_end) in rows {
            let dir = tempfile::tempdir().unwrap();
            answering(dir.path(), answers);
            let ended = one(Client::new(dir.path()), "web".into(), far).await;
            let reason = ended.as_ref().ok().and_then(Option::as_ref).map(|ended| (&*ended.reason, ended.in_order));
            assert_eq!(reason, has_end.then_some(("stopped as asked", true)), "{answers:?}");
            assert!(*has_end || ended.is_err(), "{answers:?}");
        }
    }

    /// Accepts connections at the socket of a supervisor.
    fn supervise(dir: &Path) {
        let listener = UnixListener::bind(supervisor_path(dir)).unwrap();
        thread::spawn(move || listener.incoming().for_each(drop));
    }

    /// Returns the known end of a VM whose process was killed, and the waited time. A supervisor begins to answer after
    /// the first time, and records the end after the second.
    async fn end_of_killed(supervisor: Option<Duration>, record: Option<Duration>) -> (Ended, Duration) {
        let dir = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(socket_path(dir.path(), "web")).unwrap());
        let begun = Instant::now();
        let (client, far) = (Client::new(dir.path()), begun + FOR_EVER);
        let supervisor = async {
            tokio::time::sleep(supervisor.unwrap_or(FOR_EVER)).await;
            supervise(dir.path());
            std::future::pending::<()>().await;
        };
        let recorder = async {
            tokio::time::sleep(record.unwrap_or(FOR_EVER)).await;
            let exit = WorkerExit { pid: 1, signal: Some(9), code: None };
            let stopped = StopReason::Process { signal: exit.signal, code: exit.code };
            record_end(
                &RuntimeDir::open(dir.path()).unwrap(),
                "web",
                stopped,
                KnownEnd { exit, parent: None, flight: Vec::new() },
            );
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            () = supervisor => unreachable!("it has no end"),
            () = recorder => unreachable!("it has no end"),
            ended = end_of(&client, "web", (true, true), far) => (ended.ok().flatten().unwrap(), begun.elapsed()),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_that_comes_late_is_waited_for() {
        let (at_once, soon, late) = (Some(Duration::ZERO), NO_SUPERVISOR_TIMEOUT - SECOND, RECORD_TIMEOUT - SECOND);
        for (supervisor, record, waited) in [
            (at_once, Some(late), late),
            (at_once, None, RECORD_TIMEOUT),
            (None, Some(soon), soon),
            (None, None, NO_SUPERVISOR_TIMEOUT),
            // One that was just starting.
            (Some(soon), Some(late), late),
        ] {
            let (ended, took) = end_of_killed(supervisor, record).await;
            let what = format!("{supervisor:?} {record:?}: {ended:?} after {took:?}");
            assert_eq!(ended.reason.contains("signal 9"), record.is_some(), "{what}");
            assert_eq!(ended.reason == "its process has died", record.is_none(), "{what}");
            assert!(!ended.in_order && took >= waited && took <= waited + 2 * POLL_INTERVAL, "{what}");
        }
    }
}
