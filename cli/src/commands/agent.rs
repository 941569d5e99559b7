//! The agent in a VM's guest.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;
use clade_agent_client::proto::PORT;
use clade_agent_client::{Client, ClientError, Endpoint};
use clade_daemon::control::{Client as Control, VmInfo, VmState, WakeAnswer};
use hyper::Method;

use crate::commands::Failure;
use crate::commands::remote::failure;
use crate::commands::units::parse_duration;

/// How often work that needs the guest looks whether the VM is suspended.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Who asks the agent.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct AgentArgs {
    /// The user of the guest. Default: the agent's, which is root unless it was told another.
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// The file of the agent's token, if it was given one.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// How long to wait for an agent that does not answer yet, such as 90s or 5m. Default: 30s.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    wait: Option<Duration>,
}

impl AgentArgs {
    /// A client of the agent in `vm`.
    pub(super) async fn client(&self, vm: &str) -> Result<Client, Failure> {
        let control = Control::default();
        let info = control.request::<VmInfo>(Method::GET, vm, "", None::<&()>).await.map_err(failure)?;
        // A suspended one is woken by the connection.
        if !matches!(info.state, VmState::Running | VmState::Suspended) {
            return Err(Failure::input(anyhow!("{vm} does not run, so nothing in it answers")));
        }
        let socket = control.agent_socket(vm).await.map_err(failure)?.ok_or_else(|| {
            Failure::input(anyhow!("{vm} has no vsock device to reach its agent by: give it one with --vsock"))
        })?;
        let read = |path: &PathBuf| {
            let text = std::fs::read_to_string(path);
            text.map_err(|error| Failure::input(anyhow::Error::new(error).context(path.display().to_string())))
        };
        let token = self.token_file.as_ref().map(read).transpose()?.map(|text| text.trim().to_owned());
        let client = Client::new(Endpoint::Vsock { socket, port: PORT });
        let client = client.with_user(self.user.clone()).with_token(token);
        Ok(match self.wait {
            Some(wait) => client.with_wait(wait),
            None => client,
        })
    }
}

/// Does `work`, which needs the guest of `vm`, and wakes the VM if it is suspended meanwhile.
///
/// A connection wakes a suspended VM, and so do bytes on a connection. But a VM that is suspended with
/// all of a request in its memory waits for nothing from outside, and its client for the answer.
pub(super) async fn keep_awake<T>(vm: &str, work: impl Future<Output = T>) -> T {
    let control = Control::default();
    let wakes = async {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let info = control.request::<VmInfo>(Method::GET, vm, "", None::<&()>).await;
            if info.is_ok_and(|info| info.state == VmState::Suspended) {
                // A VM that cannot be woken shows in the work.
                let _ = control.request::<WakeAnswer>(Method::POST, vm, "/wake", None::<&()>).await;
            }
        }
    };
    tokio::select! {
        done = work => done,
        () = wakes => unreachable!("the loop has no end"),
    }
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
