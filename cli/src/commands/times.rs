//! Times of VMs: `clade ttl` and `clade suspend-after`, and those options of other commands.

use std::time::Duration;

use clade_api::{Client, ClientError, SuspendAfterInfo, SuspendAfterRequest, TtlInfo, TtlRequest};
use hyper::Method;

use crate::commands::lifecycle::{first_failure, for_each};
use crate::commands::remote::ask;
use crate::commands::units::{parse_duration, show_age};
use crate::commands::{Failure, Outcome, print_json};

/// A change of a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Set(Duration),
    Remove,
}

fn parse_change(text: &str) -> Result<Change, String> {
    if text == "none" { Ok(Change::Remove) } else { parse_duration(text).map(Change::Set) }
}

#[derive(Debug, clap::Args)]
pub(crate) struct TimeArgs {
    /// The VM.
    vm: String,
    /// The new time, from now on, or `none`. Without it the VM's time is only shown.
    #[arg(value_name = "TIME", value_parser = parse_change)]
    time: Option<Change>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl TimeArgs {
    /// Returns the method of the request, and the seconds for its body.
    fn request(&self) -> (Method, Option<f64>) {
        match self.time {
            None => (Method::GET, None),
            Some(Change::Set(time)) => (Method::PUT, Some(time.as_secs_f64())),
            Some(Change::Remove) => (Method::DELETE, None),
        }
    }
}

/// Shows or changes the time that a VM has to live.
pub(super) fn ttl(args: &TimeArgs) -> Outcome {
    let (method, seconds) = args.request();
    let body = seconds.map(|seconds| TtlRequest { seconds });
    let client = Client::default();
    let info: TtlInfo = ask(client.request(method, &args.vm, "/ttl", body.as_ref()))?;
    if args.json {
        return print_json(&info).map_err(Failure::run);
    }
    match info.seconds_left {
        Some(left) => println!("{} is stopped in {}", args.vm, show_age(left)),
        None => println!("{} has no time to live", args.vm),
    }
    Ok(())
}

/// Shows or changes the idle time after which a VM is suspended.
pub(super) fn idle(args: &TimeArgs) -> Outcome {
    let (method, seconds) = args.request();
    let body = seconds.map(|seconds| SuspendAfterRequest { seconds, dir: None });
    let (client, path) = (Client::default(), format!("/v1/vms/{}/suspend-after", args.vm));
    let info: SuspendAfterInfo = ask(client.supervisor(method, &path, body.as_ref()))?;
    if args.json {
        return print_json(&info).map_err(Failure::run);
    }
    match info.seconds {
        Some(seconds) => println!("{} is suspended after {} without work", args.vm, show_age(seconds)),
        None => println!("{} is not suspended by itself", args.vm),
    }
    Ok(())
}

/// Gives each VM a time to live, if there is one.
pub(super) fn limit(names: &[String], time: Option<Duration>) -> Outcome {
    set(names, time, |client, name, seconds| async move {
        let request = TtlRequest { seconds };
        client.request::<TtlInfo>(Method::PUT, &name, "/ttl", Some(&request)).await.map(drop)
    })
}

/// Has each VM suspended after an idle time, if there is one.
pub(super) fn suspend_after(names: &[String], time: Option<Duration>) -> Outcome {
    set(names, time, |client, name, seconds| async move {
        let (path, request) = (format!("/v1/vms/{name}/suspend-after"), SuspendAfterRequest { seconds, dir: None });
        client.supervisor::<SuspendAfterInfo>(Method::PUT, &path, Some(&request)).await.map(drop)
    })
}

/// Has `each` set a time of each VM, if there is one.
fn set<W>(names: &[String], time: Option<Duration>, each: impl Fn(Client, String, f64) -> W) -> Outcome
where
    W: Future<Output = Result<(), ClientError>> + Send + 'static,
{
    let Some(seconds) = time.map(|time| time.as_secs_f64()) else { return Ok(()) };
    let client = Client::default();
    let results = ask(async { Ok(for_each(names, |name| each(client.clone(), name, seconds)).await) })?;
    let failures = names.iter().zip(results).filter_map(|(name, result)| Some((name, result.err()?)));
    first_failure(failures.collect(), names.len() == 1)
}
