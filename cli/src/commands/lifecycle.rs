//! Commands that take several names: `pause`, `resume`, `suspend`, `wake`, `stop`, `reset`,
//! `reidentify`, `rm`.
//!
//! A failure does not stop the others. Each failure is printed with its name, and the exit code is
//! that of the first.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clade_api::{
    CheckpointInfo, Client, ClientError, ProblemKind, ReadyAnswer, ResetAnswer, ResetRequest, RollbackRequest,
    ShutdownInfo, StopAnswer, StopRequest, SuspendAnswer, SuspendRequest, VmInfo, VmState, WakeAnswer,
};
use hyper::Method;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::commands::progress::shown;
use crate::commands::remote::{ask, failure, state_name};
use crate::commands::units::parse_duration;
use crate::commands::{Failure, Outcome, print_json};

/// Requests at a time.
const MAX_ASKED: usize = 16;
/// Requests at a time that kill processes.
const MAX_KILLED: usize = 256;

#[derive(Debug, clap::Args)]
pub(crate) struct LifecycleArgs {
    /// The names.
    #[arg(value_name = "NAME", required_unless_present = "all", conflicts_with = "all")]
    names: Vec<String>,
    /// All existing ones.
    #[arg(long)]
    all: bool,
    /// Print JSON: an object for one name, otherwise an array of those that succeed.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct StopArgs {
    #[command(flatten)]
    vms: LifecycleArgs,
    /// Press the power button first, and give the guest this time to power itself off. After that
    /// its power is cut.
    #[arg(long, value_name = "TIME", value_parser = parse_duration, num_args = 0..=1, default_missing_value = "30s")]
    graceful: Option<Duration>,
}

pub(super) fn stop(args: &StopArgs) -> Outcome {
    let graceful_s = args.graceful.map(|time| time.as_secs_f64());
    main(&args.vms, &Verb::Stop(StopRequest { graceful_s, at_once: args.vms.all }))
}

#[derive(Debug, clap::Args)]
pub(crate) struct ResetArgs {
    #[command(flatten)]
    vms: LifecycleArgs,
    /// Have the agent in the guest renew its identity afterwards: its clock, random numbers, tokens and
    /// hooks. Returns when it is ready. The VM stays reset if it is not.
    #[arg(long)]
    ready: bool,
}

pub(super) fn reset(args: &ResetArgs) -> Outcome {
    main(&args.vms, &Verb::Reset(ResetRequest { ready: args.ready }))
}

#[derive(Debug, clap::Args)]
pub(crate) struct RollbackArgs {
    /// The VM.
    #[arg(value_name = "VM")]
    vm: String,
    /// The checkpoint.
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,
    /// Have the agent in the guest renew its identity afterwards: its clock, random numbers, tokens and
    /// hooks. Returns when it is ready. The VM stays rolled back if it is not.
    #[arg(long)]
    ready: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn rollback(args: &RollbackArgs) -> Outcome {
    let vms = LifecycleArgs { names: vec![args.vm.clone()], all: false, json: args.json };
    main(&vms, &Verb::Rollback(RollbackRequest { checkpoint: args.checkpoint.clone(), ready: args.ready }))
}

#[derive(Debug, clap::Args)]
pub(crate) struct SuspendArgs {
    #[command(flatten)]
    vms: LifecycleArgs,
    /// The directory on a disk for their memory, in unnamed files. Default: /var/tmp.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(super) fn suspend(args: &SuspendArgs) -> Outcome {
    let absolute = |dir: &PathBuf| {
        let named = |error| Failure::input(anyhow::Error::new(error).context(dir.display().to_string()));
        std::path::absolute(dir).map_err(named)
    };
    let dir = args.dir.as_ref().map(absolute).transpose()?;
    main(&args.vms, &Verb::Suspend(SuspendRequest { dir }))
}

/// The action on each.
#[derive(Clone, Debug)]
pub(super) enum Verb {
    Pause,
    Resume,
    Suspend(SuspendRequest),
    Wake,
    Stop(StopRequest),
    Reset(ResetRequest),
    Rollback(RollbackRequest),
    Reidentify,
    Remove,
}

impl Verb {
    fn name(&self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Suspend(_) => "suspend",
            Self::Wake => "wake",
            Self::Stop(_) => "stop",
            Self::Reset(_) => "reset",
            Self::Rollback(_) => "rollback",
            Self::Reidentify => "reidentify",
            Self::Remove => "rm",
        }
    }
}

/// A ready guest.
#[derive(Debug, Serialize)]
struct NamedReady {
    name: String,
    #[serde(flatten)]
    ready: ReadyAnswer,
}

/// An answer.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Done {
    Vm(Box<VmInfo>),
    Stopped(Box<StopAnswer>),
    Reset(Box<ResetAnswer>),
    RolledBack(Box<ResetAnswer>),
    Ready(NamedReady),
    Suspended(SuspendAnswer),
    Woken(Box<WakeAnswer>),
    Removed(CheckpointInfo),
}

impl Done {
    fn print(&self) {
        match self {
            Self::Vm(vm) => println!("{} is {}", vm.name, state_name(vm.state)),
            Self::Stopped(answer) => {
                println!("{} is {}", answer.vm.name, state_name(answer.vm.state));
                if answer.killed {
                    eprintln!("its process did not answer, and was killed");
                }
                match answer.shutdown {
                    None => {}
                    Some(ShutdownInfo { by_itself: true, .. }) => eprintln!("its guest has ended by itself"),
                    Some(ShutdownInfo { noticed: true, .. }) => {
                        eprintln!("its guest was still running when the time was over: its power was cut");
                    }
                    Some(_) => eprintln!("its guest has not noticed the power button: its power was cut"),
                }
            }
            Self::Ready(guest) => println!("{} is ready", guest.name),
            Self::Suspended(answer) => {
                println!("{} is {}", answer.name, state_name(VmState::Suspended));
                if answer.was_suspended {
                    return;
                }
                eprintln!("{} pages written in {:.0} us", answer.written_pages, answer.total_us);
            }
            Self::Woken(answer) => {
                println!("{} is {}", answer.vm.name, state_name(answer.vm.state));
                if answer.was_suspended {
                    eprintln!("woken in {:.0} us: {} pages read ahead", answer.total_us, answer.working_set_pages);
                }
            }
            Self::Removed(checkpoint) => println!("{} is removed", checkpoint.name),
            Self::Reset(answer) | Self::RolledBack(answer) => {
                println!("{} is {}", answer.vm.name, state_name(answer.vm.state));
                let done = if matches!(self, Self::Reset(_)) { "reset" } else { "rolled back" };
                eprintln!(
                    "{done} in {:.0} us (memory {:.0} us): {} pages dropped, {} restored, {} mapped anew",
                    answer.total_us,
                    answer.memory_us,
                    answer.dropped_pages,
                    answer.restored_pages,
                    answer.remapped_pages,
                );
            }
        }
    }
}

async fn one(client: Client, verb: Verb, name: String) -> Result<Done, ClientError> {
    let vm = |action| client.request(Method::POST, &name, action, None::<&()>);
    match verb {
        Verb::Pause => vm("/pause").await.map(Done::Vm),
        Verb::Resume => vm("/resume").await.map(Done::Vm),
        Verb::Suspend(request) => {
            let path = format!("/v1/vms/{name}/suspend");
            client.supervisor(Method::POST, &path, Some(&request)).await.map(Done::Suspended)
        }
        Verb::Wake => {
            let woken = client.request(Method::POST, &name, "/wake", None::<&()>).await?;
            Ok(Done::Woken(Box::new(woken)))
        }
        Verb::Stop(request) => {
            clade_supervisor::stop(&client, &name, request).await.map(|answer| Done::Stopped(Box::new(answer)))
        }
        // By the VM's process alone.
        Verb::Reset(ResetRequest { ready: false }) => {
            client.request(Method::POST, &name, "/reset", None::<&()>).await.map(Done::Reset)
        }
        Verb::Reset(request) => {
            let path = format!("/v1/vms/{name}/reset");
            client.supervisor(Method::POST, &path, Some(&request)).await.map(Done::Reset)
        }
        Verb::Rollback(request) => {
            let path = format!("/v1/vms/{name}/rollback");
            client.supervisor(Method::POST, &path, Some(&request)).await.map(Done::RolledBack)
        }
        Verb::Reidentify => {
            let path = format!("/v1/vms/{name}/ready");
            let ready = client.supervisor(Method::POST, &path, None::<&()>).await?;
            Ok(Done::Ready(NamedReady { name, ready }))
        }
        Verb::Remove => {
            let path = format!("/v1/checkpoints/{name}");
            client.supervisor(Method::DELETE, &path, None::<&()>).await.map(Done::Removed)
        }
    }
}

/// Returns the names of all that `verb` applies to.
async fn everyone(client: &Client, verb: &Verb) -> Result<Vec<String>, ClientError> {
    match verb {
        Verb::Pause
        | Verb::Resume
        | Verb::Suspend(_)
        | Verb::Wake
        | Verb::Stop(_)
        | Verb::Reset(_)
        | Verb::Rollback(_)
        | Verb::Reidentify => client.all_names().await,
        Verb::Remove => {
            let all: Vec<CheckpointInfo> = client.supervisor(Method::GET, "/v1/checkpoints", None::<&()>).await?;
            Ok(all.into_iter().map(|checkpoint| checkpoint.name).collect())
        }
    }
}

/// Calls `each` for all names, a few at a time. Returns the results in the names' order.
pub async fn for_each<T, W>(names: &[String], each: impl Fn(String) -> W) -> Vec<Result<T, ClientError>>
where
    T: Send + 'static,
    W: Future<Output = Result<T, ClientError>> + Send + 'static,
{
    for_each_of(names, MAX_ASKED, each).await
}

/// As [`for_each`], `at_a_time`.
async fn for_each_of<T, W>(
    names: &[String],
    at_a_time: usize,
    each: impl Fn(String) -> W,
) -> Vec<Result<T, ClientError>>
where
    T: Send + 'static,
    W: Future<Output = Result<T, ClientError>> + Send + 'static,
{
    let mut results: Vec<Option<Result<T, ClientError>>> = names.iter().map(|_| None).collect();
    let (mut asked, mut waiting) = (JoinSet::new(), names.iter().enumerate());
    loop {
        while asked.len() < at_a_time {
            let Some((at, name)) = waiting.next() else { break };
            let work = each(name.clone());
            asked.spawn(async move { (at, work.await) });
        }
        match asked.join_next().await {
            Some(Ok((at, result))) => results[at] = Some(result),
            Some(Err(panic)) => std::panic::resume_unwind(panic.into_panic()),
            None => break,
        }
    }
    results.into_iter().flatten().collect()
}

/// Prints all failures but the first, which the caller prints.
pub(super) fn first_failure(failures: Vec<(&String, ClientError)>, is_alone: bool) -> Outcome {
    let named = |(name, error): (&String, ClientError)| {
        let failed = failure(error);
        if is_alone { failed } else { failed.named(name) }
    };
    let mut failures = failures.into_iter().map(named);
    let first = failures.next();
    failures.for_each(|failure| eprintln!("clade: {failure}"));
    first.map_or(Ok(()), Err)
}

pub(super) fn main(args: &LifecycleArgs, verb: &Verb) -> Outcome {
    let client = Client::default();
    let (names, results) = ask(async {
        let names = if args.all { everyone(&client, verb).await? } else { args.names.clone() };
        let done = Arc::new(AtomicUsize::new(0));
        let each = |name| {
            let (work, done) = (one(client.clone(), verb.clone(), name), Arc::clone(&done));
            async move {
                let result = work.await;
                // Relaxed: a number to be shown, by which nothing is ordered.
                done.fetch_add(1, Ordering::Relaxed);
                result
            }
        };
        let message = || format!("{}: {} of {}", verb.name(), done.load(Ordering::Relaxed), names.len());
        // Processes that compute leave no processor to those that end: the sooner all are killed
        // the better.
        let at_a_time =
            if matches!(verb, Verb::Stop(StopRequest { at_once: true, .. })) { MAX_KILLED } else { MAX_ASKED };
        let all = for_each_of(&names, at_a_time, each);
        let results = if args.json { all.await } else { shown(all, message).await };
        Ok((names, results))
    })?;
    let is_alone = !args.all && names.len() == 1;
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    for (name, result) in names.iter().zip(results) {
        match result {
            Ok(answer) => done.push(answer),
            // Ended meanwhile, or a dead process has left its socket. A supervisor's answer is the same.
            Err(error) if args.all && has_ended(&error) => {}
            Err(error) => failures.push((name, error)),
        }
    }
    match (args.json, done.as_slice()) {
        (true, [one]) if is_alone => print_json(one).map_err(Failure::run)?,
        (true, []) if is_alone => {}
        (true, done) => print_json(&done).map_err(Failure::run)?,
        (false, done) => done.iter().for_each(Done::print),
    }
    first_failure(failures, is_alone)
}

/// Whether the VM or the checkpoint of a request is no more.
fn has_ended(error: &ClientError) -> bool {
    matches!(error.problem(), ProblemKind::NoSuchVm | ProblemKind::NoSuchCheckpoint | ProblemKind::VmGone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_has_ended_is_known_by_any_answer() {
        let refused = |kind: ProblemKind| {
            let problem = serde_json::json!({ "type": kind.urn(), "title": "", "status": 404, "detail": "" });
            ClientError::Refused { status: 404, problem: serde_json::from_value(problem).unwrap() }
        };
        assert!(has_ended(&ClientError::NoSuchVm { name: "web".to_owned(), path: PathBuf::new() }));
        for kind in [ProblemKind::NoSuchVm, ProblemKind::VmGone, ProblemKind::NoSuchCheckpoint] {
            assert!(has_ended(&refused(kind)), "{kind:?}");
        }
        assert!(!has_ended(&refused(ProblemKind::WrongState)) && !has_ended(&refused(ProblemKind::VmSilent)));
    }

    #[test]
    fn results_are_in_the_order_of_the_names_though_they_come_in_another() {
        let names: Vec<String> = (0..40).map(|n| n.to_string()).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let results = runtime.block_on(for_each(&names, |name| async move {
            let n: u64 = name.parse().unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(40 - n)).await;
            Ok(n)
        }));
        let results: Vec<u64> = results.into_iter().map(Result::unwrap).collect();
        assert_eq!(results, (0..40).collect::<Vec<_>>());
    }
}
