//! `clade-lab bench answer`: forks of a VM with a warm interpreter, to their first answers.
//!
//! A supervisor is started as by a user, and boots one VM of the image. The image has a running
//! interpreter, and a program `answer` that sends it an expression (`resources/python-image`). A
//! time runs from a request for ready children until `answer` has ended in one of them with the
//! right value, started through its agent as by `clade exec`. As many children of a request as the
//! host has processors, twice over, are asked at a time.
//!
//! The baseline is another interpreter: `python3 -c` in the running VM, as many times, and the boot
//! of the image once.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clade_agent_client::proto::PORT;
use clade_agent_client::proto::process::{ProcessConfig, StartRequest};
use clade_agent_client::{Client as Agent, Endpoint};
use clade_api::{Client, ForkAnswer, ForkRequest, LogsAnswer, VmInfo};
use hyper::Method;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::args::BenchArgs;
use crate::bench::supervisor::BenchSupervisor;
use crate::bench::{BenchRow, Sample};
use clade::Failure;

/// Children at once, up to the requested number.
const AT_ONCE: [usize; 3] = [1, 10, 100];
/// Interpreters started for the baseline: in turn, and together. A hundred together in one VM would
/// take a quarter of an hour where guest kernels are interpreted.
const BASELINES: usize = 10;
/// Time limit until the image's interpreter answers.
const BOOT_TIMEOUT: Duration = Duration::from_secs(600);
/// Time limit of one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(50);
const PARENT: &str = "parent";
/// The line on the interpreter's console once it listens.
const LISTENS: &str = "python answers";
const EXPRESSION: &str = "6 * 7";
const VALUE: &str = "42\n";

const OTHER: &str = "python3 -c in the parent";
const BOOT: &str = "run --image --fresh";

/// Runs `clade-lab bench answer`.
pub(crate) fn run(args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let image = args.image.as_deref().ok_or_else(|| Failure::input(anyhow!("answer needs --image IMAGE")))?;
    let most = args.count.unwrap_or(AT_ONCE[AT_ONCE.len() - 1]);
    if most == 0 {
        return Err(Failure::input(anyhow!("0 children answer nothing")));
    }
    let bench = Bench { supervisor: BenchSupervisor::start(&[], &[])? };
    let boot = bench.boot(args, image)?;
    let (mut rows, mut first) = (Vec::new(), Sample::default());
    let mut other = bench.other(1, args.samples.min(BASELINES))?;
    let mut others = 1;
    for count in AT_ONCE.into_iter().filter(|count| *count <= most) {
        let times = bench.forks(count, args.samples.div_ceil(count))?;
        if count.min(BASELINES) != others {
            others = count.min(BASELINES);
            other = bench.other(others, 1)?;
        }
        rows.push(BenchRow::new(format!("answer_{count}"), "ms", &times.answers).against(OTHER, &other));
        rows.push(BenchRow::new(format!("ready_{count}"), "ms", &times.ready));
        if count == 1 {
            first = times.answers;
        }
    }
    rows.push(BenchRow::new("answer_1_boot", "ms", &first).against(BOOT, &boot));
    Ok(rows)
}

/// Times of forks, from their requests.
#[derive(Default)]
struct Times {
    /// Until each child's answer.
    answers: Sample,
    /// Until all children of a request were activated.
    ready: Sample,
}

struct Bench {
    supervisor: BenchSupervisor,
}

/// More would only be late: each answering guest takes a processor.
fn asked_at_a_time() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from) * 2
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Bench {
    /// Boots the image. Returns the time to its first answer.
    fn boot(&self, args: &BenchArgs, image: &str) -> Result<Sample, Failure> {
        let begun = Instant::now();
        let mut command = Command::new("/proc/self/exe");
        command.args(["run", "-d", "--fresh", "--name", PARENT, "--image", image]);
        command.args(["--mem", &args.mem[0].to_string()]);
        if let Some(kernel) = &args.kernel {
            command.arg("--kernel").arg(kernel);
        }
        command.env("CLADE_RUNTIME_DIR", self.supervisor.dir()).env_remove("CLADE_API").stdin(Stdio::null());
        let done = command.output().context("clade run").map_err(Failure::Run)?;
        if !done.status.success() {
            let why = String::from_utf8_lossy(&done.stderr).trim().to_owned();
            let failure = if done.status.code() == Some(2) { Failure::Input } else { Failure::Run };
            return Err(failure(anyhow!("{}", why.strip_prefix("clade: ").unwrap_or(&why))));
        }
        loop {
            let logs: LogsAnswer = self.supervisor.ask(Method::GET, &format!("/v1/vms/{PARENT}/logs"), None::<&()>)?;
            if logs.console.contains(LISTENS) {
                break;
            }
            if begun.elapsed() > BOOT_TIMEOUT {
                let last = logs.console.lines().last().unwrap_or_default().to_owned();
                return Err(Failure::run(anyhow!(
                    "{image} does not say {LISTENS:?} within {} s, and at last: {last:?}",
                    BOOT_TIMEOUT.as_secs()
                )));
            }
            std::thread::sleep(POLL);
        }
        let client = self.supervisor.client.clone();
        self.supervisor.runtime.block_on(answer(&client, PARENT, &["answer", EXPRESSION])).map_err(Failure::Run)?;
        let mut sample = Sample::default();
        sample.push(milliseconds(begun.elapsed()));
        Ok(sample)
    }

    /// Starts interpreters in the parent, `count` of them together.
    fn other(&self, count: usize, rounds: usize) -> Result<Sample, Failure> {
        let mut sample = Sample::default();
        let script = format!("print({EXPRESSION})");
        for _ in 0..rounds {
            let begun = Instant::now();
            let names = vec![PARENT.to_owned(); count];
            self.all(&names, &["python3", "-c", &script], begun, &mut sample)?;
        }
        Ok(sample)
    }

    /// Makes forks with `count` children each.
    fn forks(&self, count: usize, rounds: usize) -> Result<Times, Failure> {
        let mut times = Times::default();
        let name = Some(format!("{PARENT}-{{n}}"));
        let request = ForkRequest { count, name, ready: true, ..ForkRequest::default() };
        for _ in 0..rounds {
            let begun = Instant::now();
            let forked: ForkAnswer =
                self.supervisor.ask(Method::POST, &format!("/v1/vms/{PARENT}/fork"), Some(&request))?;
            times.ready.push(milliseconds(begun.elapsed()));
            self.all(&forked.children, &["answer", EXPRESSION], begun, &mut times.answers)?;
            self.supervisor.stop(&forked.children, 1)?;
        }
        Ok(times)
    }

    /// Asks these VMs, [`asked_at_a_time`] at a time. Records the time of each answer.
    fn all(&self, names: &[String], command: &[&str], begun: Instant, sample: &mut Sample) -> Result<(), Failure> {
        let command: Vec<String> = command.iter().map(|&word| word.to_owned()).collect();
        let asked = async {
            let mut tasks = JoinSet::new();
            let turns = Arc::new(Semaphore::new(asked_at_a_time()));
            for name in names {
                let turns = Arc::clone(&turns);
                let (client, name, command) = (self.supervisor.client.clone(), name.clone(), command.clone());
                tasks.spawn(async move {
                    // The semaphore is never closed.
                    let _turn = turns.acquire().await;
                    let words: Vec<&str> = command.iter().map(String::as_str).collect();
                    answer(&client, &name, &words).await.map(|()| begun.elapsed())
                });
            }
            while let Some(time) = tasks.join_next().await {
                sample.push(milliseconds(time??));
            }
            Ok(())
        };
        self.supervisor.runtime.block_on(asked).map_err(Failure::Run)
    }
}

/// Runs a program in a VM as `clade exec` does, and checks that its output is the value.
async fn answer(client: &Client, vm: &str, command: &[&str]) -> anyhow::Result<()> {
    let asked = tokio::time::timeout(ANSWER_TIMEOUT, exec(client, vm, command)).await;
    let said = asked.map_err(|_| anyhow!("{vm} has not answered within {} s", ANSWER_TIMEOUT.as_secs()))?;
    let said = said.with_context(|| vm.to_owned())?;
    anyhow::ensure!(said == VALUE, "{vm} answers {said:?} instead of {VALUE:?}");
    Ok(())
}

/// Returns a program's output.
pub(super) async fn exec(client: &Client, vm: &str, command: &[&str]) -> anyhow::Result<String> {
    let info: VmInfo = client.request(Method::GET, vm, "", None::<&()>).await?;
    let vsock = info.vsock.ok_or_else(|| anyhow!("it has no vsock device"))?;
    // A client that tries again burdens a guest on busy processors further.
    let agent = Agent::new(Endpoint::Vsock { socket: vsock.socket, port: PORT });
    let agent = agent.with_patience(ANSWER_TIMEOUT, ANSWER_TIMEOUT);
    let mut words = command.iter().map(|&word| word.to_owned());
    let process =
        ProcessConfig { cmd: words.next().unwrap_or_default(), args: words.collect(), ..ProcessConfig::default() };
    let request = StartRequest { process, stdin: Some(false), ..StartRequest::default() };
    let mut process = agent.start(&request, None).await?;
    let mut said = Vec::new();
    while let Some(event) = process.next().await? {
        let data = event.data.unwrap_or_default();
        said.extend([data.stdout, data.stderr].into_iter().flatten().flat_map(|bytes| bytes.0));
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}
