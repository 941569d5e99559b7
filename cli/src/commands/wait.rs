//! `clade wait`: waits for the ends of VMs, and shows the reasons.

use std::time::{Duration, Instant};

use clade_api::{Client, ClientError, EndedVm, VmInfo, check_name, socket_path};
use hyper::Method;
use serde::Serialize;

use crate::commands::remote::{ask, failure};
use crate::commands::serve::answers;
use crate::commands::units::parse_duration;
use crate::commands::{Failure, Outcome, print_json};

/// Interval of the checks of VMs.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Time limit of the record for a VM whose process was killed. The supervisor writes it, for the
/// VMs that it knows.
const RECORD_TIMEOUT: Duration = Duration::from_secs(60);
/// The same without a supervisor that answers: one may just be starting.
const NO_SUPERVISOR_TIMEOUT: Duration = Duration::from_secs(5);
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
    let is_supervised = client.is_remote() || answers(client.dir());
    let limit = if is_supervised { RECORD_TIMEOUT } else { NO_SUPERVISOR_TIMEOUT };
    let deadline = deadline.min(Instant::now() + limit);
    loop {
        // Before the record is read: that is written before the socket goes.
        let is_there = client.is_remote() || socket_path(client.dir(), name).exists();
        if let Some(record) = record(client, name).await? {
            let in_order = record.stopped.is_in_order();
            return Ok(Some(Ended { name: name.to_owned(), reason: record.reason, in_order }));
        }
        // Without a record the VM was stopped, and its files were cleared up.
        is_dead &= is_there;
        if !is_dead || Instant::now() > deadline {
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
                // An answer that breaks off means that the VM is ending. A supervisor reports this
                // for a VM's process.
                let breaks_off = matches!(error, ClientError::Http(_) | ClientError::Refused { status: 502, .. });
                let is_dead = breaks_off || matches!(error, ClientError::Dead { .. });
                let is_gone = matches!(error, ClientError::NoSuchVm { .. } | ClientError::Refused { status: 404, .. });
                if !is_dead && !is_gone {
                    return Err(failure(error));
                }
                // A VM that ends at the first check existed then.
                was_seen |= breaks_off;
                if breaks_off && Instant::now() < deadline {
                    tokio::time::sleep(POLL_INTERVAL).await;
                    continue;
                }
                let ended = end_of(&client, &name, (was_seen, is_dead), deadline).await?;
                return ended.map(Some).ok_or_else(|| failure(error));
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
