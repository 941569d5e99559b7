//! The agent in a VM's guest.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;
use clade_agent_client::proto::PORT;
use clade_agent_client::{Client, ClientError, Endpoint};
use clade_api::{Client as Control, VmInfo, VmState, WakeAnswer};
use hyper::Method;

use crate::commands::Failure;
use crate::commands::remote::failure;
use crate::commands::units::parse_duration;

/// Interval of the checks whether a VM is suspended during work that needs its guest.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The identity of a client of the agent.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct AgentArgs {
    /// The user of the guest. Default: the agent's, which is root unless it was set otherwise.
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// The file of the agent's token, if it was given one.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Time to wait for an agent that does not answer yet, such as 90s or 5m. Default: 30s.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    wait: Option<Duration>,
}

impl AgentArgs {
    /// Returns a client of the agent in `vm`.
    pub(super) async fn client(&self, vm: &str) -> Result<Client, Failure> {
        let control = Control::default();
        let info = control.request::<VmInfo>(Method::GET, vm, "", None::<&()>).await.map_err(failure)?;
        // The connection wakes a suspended VM.
        if !matches!(info.state, VmState::Running | VmState::Suspended) {
            return Err(Failure::input(anyhow!("{vm} does not run, so nothing in it answers")));
        }
        let socket = clade_supervisor::agent_socket(&control, vm).await.map_err(failure)?.ok_or_else(|| {
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

/// Runs `work`, which needs the guest of `vm`, and wakes the VM if it is suspended meanwhile.
///
/// A connection wakes a suspended VM, and so do bytes on a connection. But a VM that is suspended
/// with a whole request in its memory waits for nothing from outside, while its client waits for
/// the answer.
pub(super) async fn keep_awake<T>(vm: &str, work: impl Future<Output = T>) -> T {
    let control = Control::default();
    let wakes = async {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let info = control.request::<VmInfo>(Method::GET, vm, "", None::<&()>).await;
            if info.is_ok_and(|info| info.state == VmState::Suspended) {
                // The work fails if the VM cannot be woken.
                let _ = control.request::<WakeAnswer>(Method::POST, vm, "/wake", None::<&()>).await;
            }
        }
    };
    tokio::select! {
        done = work => done,
        () = wakes => unreachable!("the loop has no end"),
    }
}

/// Classifies an error: a bad request, or a failure of the guest.
pub(super) fn agent_failure(error: ClientError) -> Failure {
    match &error {
        ClientError::Socket { .. } | ClientError::NoAgent { .. } => Failure::input(error),
        ClientError::Rpc(rpc) if (400..500).contains(&rpc.code.status()) => Failure::input(error),
        ClientError::Refused { status: 400..500, .. } => Failure::input(error),
        _ => Failure::run(error),
    }
}

/// Runs work on the asynchronous runtime. Leftover tasks are not waited for: a read of the terminal
/// may never end.
pub(super) fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::run)?;
    let done = runtime.block_on(work);
    runtime.shutdown_background();
    done
}
