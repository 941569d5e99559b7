//! `clade run -d --image`: boots the first VM of an image. Once a trial child of it has been made
//! ready, a checkpoint is taken. The next VMs are children of the checkpoint.
//!
//! The checkpoint's name is a hash of all boot parameters: image, command, kernel, agent, memory,
//! limits. The supervisor holds it like any other, and it ends with the supervisor.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clade_agent_client::Client as Agent;
use clade_agent_client::Endpoint;
use clade_agent_client::proto::PORT;
use clade_api::Labels;
use clade_api::{
    BootRequest, CheckpointInfo, CheckpointRequest, Client, ClientError, ForkAnswer, ForkRequest, ProblemKind,
    ReadyAnswer, StopRequest, VmInfo,
};
use clade_vmm::vm::{NetSpec, UserNet, VsockChoice};
use hyper::Method;
use tokio::time::timeout;

use crate::commands::agent::{block_on, keep_awake};
use crate::commands::args::RunArgs;
use crate::commands::remote::failure;
use crate::commands::run::say;
use crate::commands::{Failure, Outcome};

/// Time limit until an agent answers: where guests' kernels are interpreted, a boot takes minutes on a busy host.
pub(super) const BOOT_TIMEOUT: Duration = Duration::from_secs(900);
const RETRY: Duration = Duration::from_millis(20);
/// A command that waits longer prints a line.
const REPORT_AFTER: Duration = Duration::from_secs(1);
/// Time limit until the entrypoint lets a trial child be made ready.
pub(super) const TRIAL_TIMEOUT: Duration = Duration::from_secs(300);
/// Interval of the trials: doubled from the first to the longest. Each stops the VM for a moment.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A guest has settled when its process has used at most so many hundredths of a second in an interval.
const SETTLED_TICKS: u64 = 3;
const SETTLE_INTERVAL: Duration = Duration::from_millis(500);
/// The longest wait for that: a program may be busy for ever.
const MAX_SETTLE: Duration = Duration::from_secs(10);

/// Returns whether VMs of these arguments can be children of one. Other arguments give each VM
/// resources of its own: writable images, interfaces, addresses.
fn is_wanted(args: &RunArgs) -> bool {
    // A secret of one VM would be in the others' memory.
    let has_secrets = !args.secret.is_empty() || !args.secret_env.is_empty();
    args.image.is_some()
        && !args.fresh
        && !has_secrets
        && args.disk.is_empty()
        && args.machine.net.iter().all(|net| *net == NetSpec::by_passt(UserNet::default()))
        && args.vsock.is_none()
}

/// A VM in the background.
#[derive(Debug)]
pub(super) struct StartedVm {
    pub(super) name: String,
    /// The pid of its process, if it was booted. A child is ready.
    booted: Option<u32>,
    /// The name of the checkpoint for later VMs, if they can be its children.
    checkpoint: Option<String>,
}

/// Makes the VM of `request`, and does not wait for its guest.
pub(super) fn start(args: &RunArgs, request: &BootRequest) -> Result<StartedVm, Failure> {
    let client = Client::default();
    let checkpoint = is_wanted(args).then(|| name_of(request)).transpose()?;
    block_on(async {
        if let Some(checkpoint) = &checkpoint
            && let Some(name) = child_of(&client, checkpoint, request).await?
        {
            return Ok(StartedVm { name, booted: None, checkpoint: None });
        }
        let vm: VmInfo = client.supervisor(Method::POST, "/v1/vms", Some(request)).await.map_err(failure)?;
        Ok(StartedVm { name: vm.name, booted: Some(vm.pid), checkpoint })
    })
}

/// Forks the checkpoint. Returns the child's name; None without a checkpoint whose child is ready.
async fn child_of(client: &Client, checkpoint: &str, request: &BootRequest) -> Result<Option<String>, Failure> {
    match fork(client, checkpoint, request).await {
        Err(ClientError::Refused { status: 404, .. }) => Ok(None),
        Err(error) if is_not_ready(&error) => {
            say!("clade: removing {checkpoint}, whose child is not ready: {error}");
            let path = format!("/v1/checkpoints/{checkpoint}");
            // Another command may have removed it.
            let _ = client.supervisor::<CheckpointInfo>(Method::DELETE, &path, None::<&()>).await;
            Ok(None)
        }
        forked => Ok(Some(forked.map_err(failure)?.children.into_iter().next().unwrap_or_default())),
    }
}

impl StartedVm {
    /// Waits until the agent answers, if the arguments or the image need that, and takes the checkpoint for later VMs.
    pub(super) fn wait(&self, args: &RunArgs, request: &BootRequest) -> Outcome {
        let (Some(pid), client) = (self.booted, Client::default()) else { return Ok(()) };
        let of_image = args.image.as_ref().map(|_| BOOT_TIMEOUT);
        let Some(limit) = args.wait.or(of_image) else { return Ok(()) };
        let work = async {
            let answered = agent_answers(&client, request, &self.name, limit).await;
            if let (Err(why), Some(_)) = (&answered, args.wait) {
                return Err(Failure::run(anyhow!("{why}")));
            }
            // The VM runs, or has already done its work.
            let Some(checkpoint) = &self.checkpoint else {
                if let Err(why) = answered {
                    say!("clade: {why}");
                }
                return Ok(());
            };
            let kept = match answered {
                Ok(()) => keep(&client, checkpoint, &self.name, pid).await,
                Err(why) => Err(why),
            };
            if let Err(why) = kept {
                say!("clade: the next VM of the image is booted as well: {why}");
            }
            Ok(())
        };
        // The VM may be suspended when it has been idle.
        block_on(keep_awake(&self.name, work))
    }
}

async fn fork(client: &Client, checkpoint: &str, request: &BootRequest) -> Result<ForkAnswer, ClientError> {
    let vsock = request.config.vsock.as_ref();
    let fork = ForkRequest {
        name: Some(request.name.clone()),
        labels: Some(request.labels.clone()),
        ready: true,
        vsock: vsock.map(|vsock| VsockChoice { cid: Some(vsock.cid), socket: Some(vsock.socket.clone()) }),
        ..ForkRequest::default()
    };
    client.supervisor(Method::POST, &format!("/v1/checkpoints/{checkpoint}/fork"), Some(&fork)).await
}

fn is_not_ready(error: &ClientError) -> bool {
    let ClientError::Refused { problem, .. } = error else { return false };
    ProblemKind::of_urn(&problem.kind) == Some(ProblemKind::NotReady)
}

/// Forks trial children of the VM until one has been made ready, for `limit` at most, and stops
/// that one. A hook may need the entrypoint, which may start more slowly than the agent: children
/// of an earlier instant would all fail.
pub(super) async fn try_child(client: &Client, vm: &str, limit: Duration) -> Result<(), String> {
    let (begun, mut pause, mut is_reported) = (Instant::now(), FIRST_PAUSE, false);
    let trial = ForkRequest { ready: true, ..ForkRequest::default() };
    loop {
        let forked: Result<ForkAnswer, _> =
            client.supervisor(Method::POST, &format!("/v1/vms/{vm}/fork"), Some(&trial)).await;
        match forked {
            Ok(answer) => {
                for child in answer.children {
                    let stopped = clade_supervisor::stop(client, &child, StopRequest::default()).await;
                    stopped.map_err(|error| clade_vmm::error_chain(&error))?;
                }
                return Ok(());
            }
            Err(error) if is_not_ready(&error) && begun.elapsed() < limit => {
                if !is_reported {
                    say!("clade: waiting until children of {vm} can be made ready: {error}");
                    is_reported = true;
                }
            }
            Err(error) => return Err(clade_vmm::error_chain(&error)),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Has the agent of the VM renew its identity as in a child. Children made afterwards are ready
/// sooner: they share the memory that the agent and the kernel need for it, and have none of the
/// page faults of a first time.
pub(super) async fn rehearse(client: &Client, vm: &str) -> Result<(), String> {
    let path = format!("/v1/vms/{vm}/ready");
    let ready = client.supervisor::<ReadyAnswer>(Method::POST, &path, None::<&()>).await;
    ready.map(drop).map_err(|error| clade_vmm::error_chain(&error))
}

/// Waits until a VM's process on this host uses little of a processor, for [`MAX_SETTLE`] at most.
/// Each child repeats the work that its guest has begun and not ended, such as the start of the
/// entrypoint.
pub(super) async fn settle(pid: u32) {
    let begun = Instant::now();
    let Some(mut before) = clade_supervisor::used_ticks(pid) else { return };
    while begun.elapsed() < MAX_SETTLE {
        tokio::time::sleep(SETTLE_INTERVAL).await;
        // A process that has ended is noticed by the next request.
        let Some(now) = clade_supervisor::used_ticks(pid) else { return };
        if now.saturating_sub(before) <= SETTLED_TICKS {
            return;
        }
        before = now;
    }
}

/// Waits until the agent of the VM booted by `request` answers.
async fn agent_answers(client: &Client, request: &BootRequest, vm: &str, limit: Duration) -> Result<(), String> {
    let Some(vsock) = &request.config.vsock else { return Err(format!("{vm} has no socket device for an agent")) };
    let agent = Agent::new(Endpoint::Vsock { socket: vsock.socket.clone(), port: PORT });
    let (begun, mut is_reported) = (Instant::now(), false);
    let left = || limit.saturating_sub(begun.elapsed());
    // An attempt may take longer than the limit.
    while !matches!(timeout(left(), agent.health()).await, Ok(Ok(()))) {
        let state = client.request::<VmInfo>(Method::GET, vm, "", None::<&()>).await;
        if let Err(error) = state {
            return Err(format!("{vm} has ended: {error}"));
        }
        if left().is_zero() {
            return Err(format!("the agent of {vm} has not answered for {} s", limit.as_secs_f64()));
        }
        if !is_reported && begun.elapsed() > REPORT_AFTER {
            say!("clade: waiting for the agent of {vm}");
            is_reported = true;
        }
        tokio::time::sleep(RETRY).await;
    }
    Ok(())
}

/// Takes the checkpoint once a trial child of the VM was made ready. An error is the reason why there
/// is no checkpoint.
async fn keep(client: &Client, checkpoint: &str, vm: &str, pid: u32) -> Result<(), String> {
    try_child(client, vm, TRIAL_TIMEOUT).await?;
    rehearse(client, vm).await?;
    if !client.is_remote() {
        settle(pid).await;
    }
    let path = format!("/v1/vms/{vm}/checkpoint");
    // Later VMs of the image must not depend on the first one's process.
    let taken = CheckpointRequest { name: Some(checkpoint.to_owned()), detach: true, ..CheckpointRequest::default() };
    match client.supervisor::<CheckpointInfo>(Method::POST, &path, Some(&taken)).await {
        // Another command was quicker.
        Err(ClientError::Refused { status: 409, .. }) | Ok(_) => Ok(()),
        Err(error) => Err(clade_vmm::error_chain(&error)),
    }
}

/// Returns the checkpoint's name, which differs with every boot parameter.
fn name_of(request: &BootRequest) -> Result<String, Failure> {
    let mut hash = DefaultHasher::new();
    let mut of_all = request.clone();
    of_all.name = String::new();
    of_all.labels = Labels::default();
    of_all.initrd = None;
    of_all.config.vsock = None;
    serde_json::to_string(&of_all).map_err(Failure::run)?.hash(&mut hash);
    // Its agent, with the program to run.
    request.initrd.iter().chain([&request.kernel]).try_for_each(|path| hash_file(path, &mut hash))?;
    Ok(format!("image-{:016x}", hash.finish()))
}

fn hash_file(path: &Path, hash: &mut DefaultHasher) -> Outcome {
    let failed = |error| Failure::input(anyhow::Error::new(error).context(path.display().to_string()));
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(failed)?;
    bytes.hash(hash);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clade_api::VmLimits;
    use clade_devices::virtio::vsock::VsockOptions;
    use clade_vmm::vm::VmConfig;

    use super::*;

    #[test]
    fn a_checkpoint_is_called_by_what_was_booted_and_not_by_what_each_vm_has_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let request = BootRequest {
            name: "a".to_owned(),
            config: VmConfig::bare(32 << 20, 1).unwrap(),
            kernel: file("kernel", "k"),
            initrd: Some(file("one", "agent")),
            cmdline: "c".to_owned(),
            labels: Labels::default(),
            paused: false,
            reports_ready: true,
            session: None,
            limits: VmLimits::default(),
            secrets: Vec::new(),
        };
        let name = |change: &dyn Fn(&mut BootRequest)| {
            let mut other = request.clone();
            change(&mut other);
            name_of(&other).unwrap()
        };
        let same = name(&|_| {});
        assert_eq!(same, name(&|other| other.name = "b".to_owned()));
        let (vsock, again) = (VsockOptions { cid: 9, socket: "/x".into() }, file("two", "agent"));
        assert_eq!(same, name(&|other| other.config.vsock = Some(vsock.clone())));
        assert_eq!(same, name(&|other| other.initrd = Some(again.clone())));
        let (agent, kernel) = (file("three", "another agent"), file("four", "another kernel"));
        assert_ne!(same, name(&|other| other.initrd = Some(agent.clone())));
        assert_ne!(same, name(&|other| other.kernel.clone_from(&kernel)));
        assert_ne!(same, name(&|other| other.cmdline = "d".to_owned()));
        assert_ne!(same, name(&|other| other.config = VmConfig::bare(64 << 20, 1).unwrap()));
        assert_ne!(same, name(&|other| other.limits.cpus = Some(1.0)));
    }
}
