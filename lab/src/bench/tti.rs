//! `clade-lab bench tti`: the time to interactive, from a request for a sandbox to a command's first
//! answer.
//!
//! A supervisor with E2B's API is started as by a user, and a template is built from the image. A
//! time runs from the request until a shell in the new sandbox has printed the expected answer. The
//! method is ComputeSDK's: one after another, staggered by 200 ms, and all at once.
//!
//! | row | request | the shell is asked |
//! |---|---|---|
//! | `create_` | `POST /v2/sandboxes` | through the API's address, by the agent's protocol |
//! | `fork_` | `POST /sandboxes/{id}/fork` | the same |
//! | `native_` | `POST /v1/checkpoints/{name}/fork` with `ready` | by the guest's socket, as `clade exec` does |
//!
//! The baseline of `native_` is the same command in a running VM; that of the others is `native_`.

mod http;

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clade_api::{Client, ForkAnswer, ForkRequest};
use clade_e2b::{ApiKeys, Scope};
use hyper::Method;
use serde_json::Value;
use tokio::task::JoinSet;

use self::http::{Api, Sandbox};
use crate::args::BenchArgs;
use crate::bench::answer::exec;
use crate::bench::supervisor::BenchSupervisor;
use crate::bench::supervisor::available_kib;
use crate::bench::{BenchRow, Sample};
use clade::Failure;

/// Default number of sandboxes at once.
const AT_ONCE: usize = 100;
/// Interval of staggered requests.
const STAGGER: Duration = Duration::from_millis(200);
/// Time limit of one sandbox, from its request to its answer.
const TIMEOUT: Duration = Duration::from_secs(300);
/// Commands in a running VM, for the baseline.
const BASELINES: usize = 10;
const TEMPLATE: &str = "tti";
const PARENT: &str = "parent";
const SCRIPT: [&str; 3] = ["/bin/sh", "-c", "echo 42"];
const SAID: &str = "42\n";

const RUNNING: &str = "the command in a VM that runs";
const NATIVE: &str = "native";

/// Runs `clade-lab bench tti`.
pub(crate) fn run(args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let image = args.image.as_deref().ok_or_else(|| Failure::input(anyhow!("tti needs --image IMAGE")))?;
    let wanted = args.at_once.unwrap_or(AT_ONCE);
    if wanted == 0 {
        return Err(Failure::input(anyhow!("0 sandboxes are never interactive")));
    }
    let bench = Bench::start(args, image)?;
    // Each sandbox may come to own all its memory.
    let fitting = usize::try_from((available_kib() << 10) / args.mem[0]).unwrap_or(usize::MAX);
    let many = wanted.min(fitting.max(1));
    let running = bench.running()?;
    let mut rows = Vec::new();
    for mode in [Mode::Sequential(args.samples), Mode::Staggered(many), Mode::AtOnce(many)] {
        let native = bench.measure(mode, Way::Native)?;
        rows.extend(native.rows(mode, Way::Native, (RUNNING, &running)));
        for way in [Way::Create, Way::Fork] {
            let times = bench.measure(mode, way)?;
            rows.extend(times.rows(mode, way, (NATIVE, &native.answers)));
        }
    }
    Ok(rows)
}

/// Schedule of the requests.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Sequential(usize),
    Staggered(usize),
    AtOnce(usize),
}

/// Kind of the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Native,
    Create,
    Fork,
}

impl Mode {
    fn count(self) -> usize {
        match self {
            Self::Sequential(count) | Self::Staggered(count) | Self::AtOnce(count) => count,
        }
    }

    fn name(self, way: Way) -> String {
        let way = match way {
            Way::Native => "native",
            Way::Create => "create",
            Way::Fork => "fork",
        };
        match self {
            Self::Sequential(_) => format!("{way}_sequential"),
            Self::Staggered(count) => format!("{way}_staggered_{count}"),
            Self::AtOnce(count) => format!("{way}_at_once_{count}"),
        }
    }
}

/// Times of the sandboxes of one mode.
#[derive(Default)]
struct Times {
    /// Times until their answers.
    answers: Sample,
    /// Sandboxes without an answer.
    failed: usize,
}

impl Times {
    fn take(&mut self, one: anyhow::Result<Duration>) {
        match one {
            Ok(time) => self.answers.push(time.as_secs_f64() * 1e3),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "a sandbox has not answered");
                self.failed += 1;
            }
        }
    }

    /// Refuses times of nothing: the bench has failed.
    fn expect_answers(&self, name: &str) -> Result<(), Failure> {
        if self.answers.is_empty() {
            return Err(Failure::Run(anyhow!("{name}: none of {} sandboxes has answered", self.failed)));
        }
        Ok(())
    }

    fn rows(&self, mode: Mode, way: Way, (name, baseline): (&'static str, &Sample)) -> [BenchRow; 2] {
        let mut failed = Sample::default();
        failed.push(self.failed as f64);
        [
            BenchRow::new(mode.name(way), "ms", &self.answers).against(name, baseline),
            BenchRow::new(format!("{}_failed", mode.name(way)), "of them", &failed),
        ]
    }
}

struct Bench {
    supervisor: BenchSupervisor,
    api: Arc<Api>,
    /// The template's checkpoint.
    checkpoint: String,
    _dir: tempfile::TempDir,
}

/// Waits for one future, within the time limit.
async fn in_time<T>(one: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let late = |_| anyhow!("no answer within {} s", TIMEOUT.as_secs());
    tokio::time::timeout(TIMEOUT, one).await.map_err(late)?
}

fn check(said: &str) -> anyhow::Result<()> {
    anyhow::ensure!(said == SAID, "the shell says {said:?} instead of {SAID:?}");
    Ok(())
}

impl Bench {
    /// Starts a supervisor with E2B's API, and builds the template.
    fn start(args: &BenchArgs, image: &str) -> Result<Self, Failure> {
        let dir = tempfile::tempdir().map_err(Failure::run)?;
        let keys = dir.path().join("keys.json");
        let key = ApiKeys::new(&keys).add("bench", None, Scope::All).map_err(Failure::run)?;
        // Free now, and unlikely to be taken by another process.
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = free.map_err(Failure::run)?;
        let templates = dir.path().join("templates").display().to_string();
        let variables = [("CLADE_TEMPLATE_DIR", templates.as_str())];
        let e2b = ["--e2b", &address.to_string(), "--keys", &keys.display().to_string()];
        let supervisor = BenchSupervisor::start(&e2b, &variables)?;
        let mut command = Command::new("/proc/self/exe");
        command.args(["template", "build", image, "--name", TEMPLATE, "--start-cmd", "", "--json"]);
        command.args(["--mem", &args.mem[0].to_string()]).envs(variables);
        if let Some(kernel) = &args.kernel {
            command.arg("--kernel").arg(kernel);
        }
        command.env("CLADE_RUNTIME_DIR", supervisor.dir()).env_remove("CLADE_API").stdin(Stdio::null());
        let done = command.output().context("clade template build").map_err(Failure::Run)?;
        if !done.status.success() {
            let why = String::from_utf8_lossy(&done.stderr);
            let why = why.trim().lines().last().unwrap_or_default();
            let failure = if done.status.code() == Some(2) { Failure::Input } else { Failure::Run };
            return Err(failure(anyhow!("{}", why.strip_prefix("clade: ").unwrap_or(why))));
        }
        let built: Value = serde_json::from_slice(&done.stdout).map_err(Failure::run)?;
        let checkpoint = built["id"].as_str().unwrap_or_default().to_owned();
        Ok(Self { supervisor, api: Arc::new(Api { address, key }), checkpoint, _dir: dir })
    }

    /// Measures the command in a running VM: the part of a time without the sandbox's start.
    fn running(&self) -> Result<Sample, Failure> {
        let mut sample = Sample::default();
        let client = self.supervisor.client.clone();
        let measured = async {
            let names = native(&client, &self.checkpoint, PARENT, 1).await?;
            // The first command is the guest's first.
            for at in 0..=BASELINES {
                let begun = Instant::now();
                check(&in_time(exec(&client, PARENT, &SCRIPT)).await?)?;
                if at > 0 {
                    sample.push(begun.elapsed().as_secs_f64() * 1e3);
                }
            }
            anyhow::Ok(names)
        };
        let names = self.supervisor.runtime.block_on(measured).map_err(Failure::Run)?;
        self.supervisor.stop(&names, 0)?;
        Ok(sample)
    }

    fn measure(&self, mode: Mode, way: Way) -> Result<Times, Failure> {
        let measured = async {
            let parent = match way {
                Way::Fork => Some(in_time(self.api.create(TEMPLATE)).await?),
                Way::Native | Way::Create => None,
            };
            let mut times = Times::default();
            match (mode, &parent) {
                // One request for all: they are of one instant.
                (Mode::AtOnce(count), Some(parent)) => self.forked_at_once(parent, count, &mut times).await,
                _ => self.each(mode, way, parent.as_ref(), &mut times).await,
            }
            if let Some(parent) = parent {
                self.api.kill(&parent.id).await?;
            }
            anyhow::Ok(times)
        };
        let times = self.supervisor.runtime.block_on(measured).map_err(Failure::Run)?;
        // Failed sandboxes may still exist.
        let all: Vec<clade_api::VmInfo> = self.supervisor.ask(Method::GET, "/v1/vms", None::<&()>)?;
        let names: Vec<String> = all.into_iter().map(|vm| vm.name).collect();
        self.supervisor.stop(&names, 0)?;
        times.expect_answers(&mode.name(way))?;
        Ok(times)
    }

    /// Sends a request for each.
    async fn each(&self, mode: Mode, way: Way, parent: Option<&Sandbox>, times: &mut Times) {
        let mut tasks = JoinSet::new();
        for number in 0..mode.count() {
            let (api, client) = (Arc::clone(&self.api), self.supervisor.client.clone());
            let (checkpoint, parent) = (self.checkpoint.clone(), parent.map(|parent| parent.id.clone()));
            let one = async move {
                match (way, parent) {
                    (Way::Native, _) => in_time(one_native(&client, &checkpoint, number)).await,
                    (_, parent) => in_time(one_sandbox(&api, parent.as_deref())).await,
                }
            };
            match mode {
                Mode::Sequential(_) => times.take(one.await),
                Mode::Staggered(_) | Mode::AtOnce(_) => {
                    tasks.spawn(one);
                }
            }
            if matches!(mode, Mode::Staggered(_)) {
                tokio::time::sleep(STAGGER).await;
            }
        }
        while let Some(one) = tasks.join_next().await {
            times.take(one.unwrap_or_else(|error| Err(error.into())));
        }
    }

    async fn forked_at_once(&self, parent: &Sandbox, count: usize, times: &mut Times) {
        let begun = Instant::now();
        let children = match in_time(self.api.fork(&parent.id, count)).await {
            Ok(children) => children,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "a fork has failed");
                times.failed += count;
                return;
            }
        };
        let mut tasks = JoinSet::new();
        for child in children {
            let api = Arc::clone(&self.api);
            tasks.spawn(in_time(async move {
                let child = child?;
                check(&api.exec(&child, &SCRIPT).await?)?;
                Ok(begun.elapsed())
            }));
        }
        while let Some(one) = tasks.join_next().await {
            times.take(one.unwrap_or_else(|error| Err(error.into())));
        }
    }
}

/// Forks a checkpoint into ready children.
async fn native(client: &Client, checkpoint: &str, name: &str, count: usize) -> anyhow::Result<Vec<String>> {
    let request = ForkRequest { count, name: Some(name.to_owned()), ready: true, ..ForkRequest::default() };
    let path = format!("/v1/checkpoints/{checkpoint}/fork");
    let forked: ForkAnswer = client.supervisor(Method::POST, &path, Some(&request)).await?;
    Ok(forked.children)
}

async fn one_native(client: &Client, checkpoint: &str, number: usize) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let name = format!("native-{number}");
    native(client, checkpoint, &name, 1).await?;
    check(&exec(client, &name, &SCRIPT).await?)?;
    let took = begun.elapsed();
    expect_gone(clade_supervisor::stop(client, &name, clade_api::StopRequest::default()).await);
    Ok(took)
}

/// Measures one sandbox of the template, or of a running parent.
async fn one_sandbox(api: &Api, parent: Option<&str>) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let sandbox = match parent {
        Some(parent) => api.fork(parent, 1).await?.pop().context("a fork without a child")??,
        None => api.create(TEMPLATE).await?,
    };
    check(&api.exec(&sandbox, &SCRIPT).await?)?;
    let took = begun.elapsed();
    expect_gone(api.kill(&sandbox.id).await);
    Ok(took)
}

/// Logs why a sandbox that has answered in time was not ended: [`Bench::measure`] ends all that are left.
fn expect_gone<T, E: Into<anyhow::Error>>(ended: Result<T, E>) {
    if let Err(error) = ended {
        tracing::warn!(error = format!("{:#}", error.into()), "a sandbox that has answered stays");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_nothing_are_a_failure() {
        let mut times = Times::default();
        times.take(Err(anyhow!("late")));
        let refused = times.expect_answers("fork_at_once_1").unwrap_err().to_string();
        assert!(refused.contains("fork_at_once_1: none of 1 "), "{refused}");
        times.take(Ok(Duration::from_millis(3)));
        times.expect_answers("fork_at_once_1").unwrap();
    }
}
