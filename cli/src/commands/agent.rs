//! The agent in a VM's guest.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::anyhow;
use clade_agent_client::proto::api::Generation;
use clade_agent_client::proto::{Base64, PORT};
use clade_agent_client::{Client, ClientError, Endpoint};
use clade_daemon::control::{Client as Control, VmInfo, VmState};
use hyper::Method;

use crate::commands::remote::failure;
use crate::commands::{Failure, Outcome};

/// Who asks the agent.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct AgentArgs {
    /// The user of the guest. Default: the agent's, which is root unless it was told another.
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// The file of the agent's token, if it was given one.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl AgentArgs {
    /// A client of the agent in `vm`.
    pub(super) async fn client(&self, vm: &str) -> Result<Client, Failure> {
        let info = Control::default().request::<VmInfo>(Method::GET, vm, "", None::<&()>).await.map_err(failure)?;
        if info.state != VmState::Running {
            return Err(Failure::input(anyhow!("{vm} does not run, so nothing in it answers")));
        }
        let device = info.vsock.ok_or_else(|| {
            Failure::input(anyhow!("{vm} has no vsock device to reach its agent by: give it one with --vsock"))
        })?;
        let read = |path: &PathBuf| {
            let text = std::fs::read_to_string(path);
            text.map_err(|error| Failure::input(anyhow::Error::new(error).context(path.display().to_string())))
        };
        let token = self.token_file.as_ref().map(read).transpose()?.map(|text| text.trim().to_owned());
        let client = Client::new(Endpoint::Vsock { socket: device.socket, port: PORT });
        Ok(client.with_user(self.user.clone()).with_token(token))
    }
}

/// Bytes for each guest's random number generator.
const ENTROPY: usize = 64;
/// Guests that are made ready at a time.
const MAX_ASKED: usize = 16;

/// How long a child may take until it takes a connection. It has to hear first that its parent's were reset.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(20);

/// Tells the agent in a VM that it is another one. It is told again if the connection breaks before it answers: it was one of
/// those that a child resets.
async fn change_generation(vm: String) -> Result<(), Failure> {
    let client = AgentArgs::default().client(&vm).await?;
    let mut entropy = vec![0; ENTROPY];
    rustix::rand::getrandom(&mut entropy[..], rustix::rand::GetRandomFlags::empty()).map_err(Failure::run)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(Failure::run)?;
    let request = Generation { name: vm, now_ns: Some(now.as_nanos().to_string()), entropy: Some(Base64(entropy)) };
    let deadline = Instant::now() + READY_TIMEOUT;
    let ready = loop {
        match client.change_generation(&request).await {
            Err(ClientError::NoAgent { .. } | ClientError::Http(_)) if Instant::now() < deadline => {
                tokio::time::sleep(RETRY).await;
            }
            answer => break answer.map_err(agent_failure)?,
        }
    };
    let failed = ready.hooks.iter().filter(|hook| hook.status != "exit status 0");
    let failed = failed.map(|hook| format!("the hook {}: {}", hook.name, hook.status));
    match ready.failed.iter().cloned().chain(failed).next() {
        None => Ok(()),
        Some(first) => Err(Failure::run(anyhow!("its agent is not ready: {first}"))),
    }
}

/// Has the agents in all these VMs make them other ones. The first failure is said, with its VM's name.
pub(super) fn make_ready(names: &[String]) -> Outcome {
    block_on(async {
        let mut failed = Ok(());
        for some in names.chunks(MAX_ASKED) {
            let tasks: Vec<_> = some.iter().map(|name| tokio::spawn(change_generation(name.clone()))).collect();
            for (name, task) in some.iter().zip(tasks) {
                let ready = task.await.map_err(Failure::run).flatten();
                failed = failed.and(ready.map_err(|failure| failure.named(name)));
            }
        }
        failed
    })
}

/// Whether the request was wrong, or the guest is.
pub(super) fn agent_failure(error: ClientError) -> Failure {
    match &error {
        ClientError::Socket { .. } | ClientError::NoAgent { .. } => Failure::input(error),
        ClientError::Rpc(rpc) if (400..500).contains(&rpc.code.status()) => Failure::input(error),
        ClientError::Refused { status: 400..500, .. } => Failure::input(error),
        _ => Failure::run(error),
    }
}

/// Does what needs the asynchronous runtime. What it left behind is not waited for: a read of the terminal may never end.
pub(super) fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::run)?;
    let done = runtime.block_on(work);
    runtime.shutdown_background();
    done
}
