//! Builds: the steps of a Dockerfile in a VM of its base image. A template and an image are made
//! from the result.
//!
//! The VM of a killed builder ends by its time to live.

mod context;
mod copy;
pub(super) mod guest;
pub(super) mod recipe;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::anyhow;
use clade_api::{BootRequest, Client, StopRequest, VmInfo};
use clade_oci::{Action, BuildStep};
use clade_worker::jail::Confinement;
use hyper::Method;

use crate::commands::args::{ProgramFlags, RunArgs, TimesArgs};
use crate::commands::build::copy::copy;
use crate::commands::build::guest::{BuildGuest, GuestProgram};
use crate::commands::build::recipe::{Recipe, of_step};
use crate::commands::image::PullFlags;
use crate::commands::machine::MachineArgs;
use crate::commands::remote::failure;
use crate::commands::run::{say, with_runtime};
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::units::parse_mib;
use crate::commands::{Failure, Outcome};

/// The arguments of any build: its base image, its VM.
#[derive(Debug, clap::Args)]
pub(super) struct BuildVmArgs {
    /// A value for an ARG of the Dockerfile. Repeatable.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_pair)]
    pub(super) build_arg: Vec<(String, String)>,
    /// The kernel. Default: that of clade guest linux.
    #[arg(long, value_name = "FILE")]
    pub(super) kernel: Option<PathBuf>,
    /// The modules of --kernel: its directory below /lib/modules.
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub(super) modules: Option<PathBuf>,
    /// Text to append to the command line of the kernel. Repeatable.
    #[arg(long, value_name = "TEXT")]
    pub(super) append: Vec<String>,
    /// Most memory of the VM's process, and of each VM made from it: whole MiB, such as 96M or 1G.
    /// Needs a supervisor with control groups.
    #[arg(long, value_name = "SIZE", value_parser = parse_mib)]
    pub(super) memory_limit: Option<u64>,
    /// Most processors for such a process, such as 0.5.
    #[arg(long, value_name = "N")]
    pub(super) cpu_limit: Option<f64>,
    #[command(flatten)]
    pub(super) machine: MachineArgs,
    #[command(flatten)]
    pub(super) pull: PullFlags,
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("NAME=VALUE is wanted".to_owned()),
    }
}

impl BuildVmArgs {
    /// Returns the arguments of a run for the VM of a build.
    pub(super) fn run_args(&self, source: &str, name: String) -> RunArgs {
        RunArgs {
            kernel: self.kernel.clone(),
            image: Some(source.to_owned()),
            modules: self.modules.clone(),
            pull: self.pull.clone(),
            program: ProgramFlags::default(),
            fresh: true,
            command: Vec::new(),
            initrd: None,
            cmdline: None,
            append: self.append.clone(),
            machine: self.machine.clone(),
            name: Some(name),
            label: Vec::new(),
            times: TimesArgs { ttl: None, suspend_after: None },
            memory_limit: self.memory_limit,
            cpu_limit: self.cpu_limit,
            secret: Vec::new(),
            secret_env: Vec::new(),
            disk: Vec::new(),
            vsock: None,
            detached: false,
            background: true,
            wait: None,
            confine: Confinement::default(),
        }
    }
}

/// Refuses a supervisor elsewhere, of whose guests the agents are not reached.
pub(super) fn expect_local(client: &Client) -> Outcome {
    match client.is_remote() {
        true => Err(Failure::input(anyhow!("a build is made on the supervisor's host: its guest is reached there"))),
        false => Ok(()),
    }
}

/// Does the work of a build until a signal ends it, and then `clear_up`, which learns whether the
/// work was done.
pub(super) fn until_signal<T>(
    work: impl Future<Output = Result<T, Failure>>,
    clear_up: impl AsyncFnOnce(bool),
) -> Result<T, Failure> {
    let mut done = None;
    with_runtime(|runtime| {
        let shutdown = ShutdownSignal::listen(runtime).map_err(Failure::run)?;
        runtime.block_on(async {
            let built = tokio::select! {
                built = work => built,
                () = shutdown.wait() => Err(Failure::Signal(shutdown.signal().unwrap_or_default())),
            };
            clear_up(built.is_ok()).await;
            done = Some(built?);
            Ok(())
        })
    })?;
    done.ok_or_else(|| Failure::run(anyhow!("the build has no result")))
}

/// Boots the VM of a build.
pub(super) async fn boot(client: &Client, request: &BootRequest, recipe: &Recipe) -> Result<BuildGuest, Failure> {
    let begun = Instant::now();
    let vm: VmInfo = client.supervisor(Method::POST, "/v1/vms", Some(request)).await.map_err(failure)?;
    let guest = BuildGuest::of(client, &vm).await?;
    say!("{} is booted after {:.1} s", recipe.image.digest, begun.elapsed().as_secs_f64());
    Ok(guest)
}

/// Carries out the steps of a recipe.
pub(super) async fn carry_out(guest: &BuildGuest, recipe: &Recipe) -> Outcome {
    // Working directories of images are made on demand.
    for dir in [recipe.image.config.working_dir.as_str()].iter().filter(|dir| !dir.is_empty()) {
        guest.make_dir(dir, None).await?;
    }
    for step in &recipe.plan.steps {
        say!("line {}: {}", step.line, step.text);
        self::step(guest, recipe, step).await.map_err(|failure| of_step(step, failure))?;
    }
    Ok(())
}

async fn step(guest: &BuildGuest, recipe: &Recipe, step: &BuildStep) -> Outcome {
    let done = match (&step.action, &recipe.context) {
        (Action::Run(argv), _) => {
            let (env, workdir, user) = (&step.env, Some(step.workdir.as_str()), step.user.as_str());
            guest.run(GuestProgram { argv, env, workdir, user }).await
        }
        (Action::MakeDir(dir), _) => guest.make_dir_of(&step.user, dir, None).await.map(drop),
        (Action::Copy(files), Some(context)) => copy(guest, context, files).await,
        // A plan with files has a directory.
        (Action::Copy(_), None) => Err(Failure::run(anyhow!("there is no directory to copy from"))),
    };
    // The arguments were checked before the VM was booted.
    done.map_err(|failure| match failure {
        Failure::Input(error) => Failure::Run(error),
        other => other,
    })
}

/// Stops the VM of a build. After a failed build it may not run any more.
pub(super) async fn stop(client: &Client, vm: &str, is_built: bool) {
    let stopped = clade_supervisor::stop(client, vm, StopRequest::default()).await;
    if let Err(error) = stopped.map_err(failure)
        && is_built
    {
        say!("clade: the VM of the build does not stop: {error}");
    }
}
