//! `clade template build`: boots an image, sets it up through its agent, starts its program, and
//! keeps it when that is ready.
//!
//! A failed build leaves nothing: the VM is stopped, and the checkpoint and the snapshot are
//! removed. The VM of a killed builder ends by its time to live.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::anyhow;
use clade_agent_client::proto::api::Init;
use clade_api::{
    BootRequest, CheckpointInfo, CheckpointRequest, Client, SnapshotAnswer, SnapshotRequest, StopRequest, VmInfo,
};
use clade_e2b::{Draft, Template, TemplateSpec, TemplateStore, check_template_name};
use clade_oci::{Action, BuildStep};
use clade_worker::jail::Confinement;
use hyper::Method;
use tokio::task::spawn_blocking;

use super::copy::copy;
use super::guest::{BuildGuest, GuestProgram, StartedProgram, described};
use super::recipe::{Recipe, of_step, shell};
use super::{BuildArgs, TemplateInfo, drop_checkpoint, failure as store_failure};
use crate::commands::args::RunArgs;
use crate::commands::image::open_store;
use crate::commands::image_vm::{ImageVm, Tools};
use crate::commands::oci_template::{TRIAL_TIMEOUT, try_child};
use crate::commands::remote::failure;
use crate::commands::run::{request, say, with_runtime};
use crate::commands::serve::ensure;
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::{Failure, Outcome, print_json};

/// Interval of the runs of the ready command.
const READY_POLL: std::time::Duration = std::time::Duration::from_millis(500);

/// Default time limit of the ready command.
const READY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);

/// Returns the arguments of a run for the VM of a build.
fn run_args(args: &BuildArgs, name: String) -> RunArgs {
    RunArgs {
        kernel: args.kernel.clone(),
        image: Some(args.source.clone()),
        modules: args.modules.clone(),
        pull: args.pull.clone(),
        fresh: true,
        command: Vec::new(),
        initrd: None,
        cmdline: None,
        append: args.append.clone(),
        machine: args.machine.clone(),
        name: Some(name),
        label: Vec::new(),
        ttl: None,
        suspend_after: None,
        memory_limit: args.memory_limit,
        cpu_limit: args.cpu_limit,
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

pub(super) fn main(args: &BuildArgs, store: &TemplateStore) -> Outcome {
    // Before any fetch or boot.
    check_template_name(&args.name).map_err(store_failure)?;
    let client = Client::default();
    if client.is_remote() {
        return Err(Failure::input(anyhow!(
            "a template is built on the supervisor's host: its guest is reached there"
        )));
    }
    let id = store.new_id().map_err(store_failure)?;
    let vm = format!("build-{id}");
    let run_args = run_args(args, vm.clone());
    let tools = Tools::find(&run_args)?;
    let images = open_store()?;
    let recipe = Recipe::read(args, &images)?;
    let of_image = ImageVm::idle(&run_args, &tools, (&images, &recipe.image))?;
    let boot = request(&run_args, Some(&of_image))?;
    ensure()?;
    let build = Build { args, recipe: &recipe, store: store.clone(), client, id, boot: &boot };
    let mut done = None;
    with_runtime(|runtime| {
        let shutdown = ShutdownSignal::listen(runtime).map_err(Failure::run)?;
        runtime.block_on(async {
            let built = tokio::select! {
                built = build.run() => built,
                () = shutdown.wait() => Err(Failure::Signal(shutdown.signal().unwrap_or_default())),
            };
            build.clear_up(built.is_ok()).await;
            done = Some(built?);
            Ok(())
        })
    })?;
    let Some(template) = done else { return Ok(()) };
    if args.json {
        let id = template.id.clone();
        return print_json(&TemplateInfo::new(store, template, &[id])).map_err(Failure::run);
    }
    writeln!(io::stdout(), "{}", template.id).map_err(Failure::run)
}

struct Build<'a> {
    args: &'a BuildArgs,
    recipe: &'a Recipe,
    store: TemplateStore,
    client: Client,
    id: String,
    boot: &'a BootRequest,
}

impl Build<'_> {
    async fn run(&self) -> Result<Template, Failure> {
        let begun = Instant::now();
        let vm: VmInfo = self.client.supervisor(Method::POST, "/v1/vms", Some(self.boot)).await.map_err(failure)?;
        let guest = BuildGuest::of(&self.client, &vm).await?;
        say!("{} is booted after {:.1} s", self.recipe.image.digest, begun.elapsed().as_secs_f64());
        // Working directories of images are made on demand.
        for dir in [self.recipe.image.config.working_dir.as_str()].iter().filter(|dir| !dir.is_empty()) {
            guest.make_dir(dir).await?;
        }
        for step in &self.recipe.plan.steps {
            say!("line {}: {}", step.line, step.text);
            self.step(&guest, step).await.map_err(|failure| of_step(step, failure))?;
        }
        let started = self.start(&guest).await?;
        self.await_ready(&guest, started).await?;
        let init = Init {
            env_vars: Some(self.recipe.env.clone()),
            default_user: Some(self.recipe.user().to_owned()),
            default_workdir: self.recipe.workdir().map(str::to_owned),
            ..Init::default()
        };
        guest.agent().init(&init).await.map_err(crate::commands::agent::agent_failure)?;
        let template = self.keep(&guest).await?;
        say!("{} is built after {:.1} s", template.name, begun.elapsed().as_secs_f64());
        Ok(template)
    }

    async fn step(&self, guest: &BuildGuest, step: &BuildStep) -> Result<(), Failure> {
        match (&step.action, &self.recipe.context) {
            (Action::Run(argv), _) => {
                let (env, workdir, user) = (&step.env, Some(step.workdir.as_str()), step.user.as_str());
                guest.run(GuestProgram { argv, env, workdir, user }).await
            }
            (Action::MakeDir(dir), _) => guest.make_dir(dir).await.map(drop),
            (Action::Copy(files), Some(context)) => copy(guest, context, files).await,
            // A plan with files has a directory.
            (Action::Copy(_), None) => Err(Failure::run(anyhow!("there is no directory to copy from"))),
        }
    }

    fn program<'a>(&'a self, argv: &'a [String]) -> GuestProgram<'a> {
        GuestProgram { argv, env: &self.recipe.env, workdir: self.recipe.workdir(), user: self.recipe.user() }
    }

    async fn start(&self, guest: &BuildGuest) -> Result<Option<StartedProgram>, Failure> {
        let start = &self.recipe.start;
        if start.is_empty() {
            return Ok(None);
        }
        say!("start: {}", start.join(" "));
        guest.start(self.program(start)).await.map(Some).map_err(|failure| failure.named("the start command"))
    }

    /// Runs the ready command until it succeeds. The started program must not have failed by then.
    async fn await_ready(&self, guest: &BuildGuest, mut started: Option<StartedProgram>) -> Result<(), Failure> {
        let Some(ready) = &self.args.ready_cmd else { return Ok(()) };
        let (argv, begun, limit) = (shell(ready), Instant::now(), self.args.ready_timeout.unwrap_or(READY_TIMEOUT));
        let mut last = "it has not ended".to_owned();
        loop {
            if let Some(StartedProgram { tail, .. }) = &started {
                let tail = tail.clone();
                let end = match &mut started {
                    Some(started) => started.end().await,
                    None => None,
                };
                match end {
                    Some(Ok(end)) if end.shell_code() != 0 => {
                        return Err(Failure::Run(anyhow!("the start command has ended: {}", described(&end, &tail))));
                    }
                    Some(Err(error)) => return Err(Failure::run(error).named("the start command")),
                    // A program in the background has not failed.
                    Some(Ok(_)) => started = None,
                    None => {}
                }
            }
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                let limit = limit.as_secs_f64();
                return Err(Failure::Run(anyhow!("the ready command has not succeeded within {limit} s: {last}")));
            }
            match guest
                .try_run(self.program(&argv), left)
                .await
                .map_err(|failure| failure.named("the ready command"))?
            {
                None => {
                    say!("ready after {:.1} s", begun.elapsed().as_secs_f64());
                    return Ok(());
                }
                Some(why) => last = why,
            }
            tokio::time::sleep(READY_POLL.min(limit.saturating_sub(begun.elapsed()))).await;
        }
    }

    /// Takes the checkpoint and the snapshot, both of one instant, and publishes them as the
    /// template.
    async fn keep(&self, guest: &BuildGuest) -> Result<Template, Failure> {
        let (store, name, id) = (self.store.clone(), self.args.name.clone(), self.id.clone());
        let draft: Result<Draft, _> = spawn_blocking(move || store.draft(&name, &id)).await.map_err(Failure::run)?;
        let draft = draft.map_err(store_failure)?;
        // A hook of the guest may fail in each child: every create would fail, and nothing say why.
        let limit = self.args.ready_timeout.unwrap_or(TRIAL_TIMEOUT);
        let tried = try_child(&self.client, &self.boot.name, limit).await;
        tried.map_err(|why| Failure::Run(anyhow!("sandboxes of it cannot be made ready: {why}")))?;
        let vm = guest.pause().await?;
        let path = |action: &str| format!("/v1/vms/{}/{action}", vm.name);
        let request = CheckpointRequest { name: Some(self.id.clone()), detach: true, ..CheckpointRequest::default() };
        let taken = self.client.supervisor(Method::POST, &path("checkpoint"), Some(&request)).await;
        let _: CheckpointInfo = taken.map_err(failure)?;
        let request = SnapshotRequest { dir: draft.dir(), incremental: false, zstd: false, replace: false };
        let saved = self.client.supervisor(Method::POST, &path("snapshot"), Some(&request)).await;
        let saved: SnapshotAnswer = saved.map_err(failure)?;
        say!("{:.1} MiB of memory are saved in {:.1} s", saved.data_pages as f64 / 256.0, saved.total_us / 1e6);
        let (template, old) = draft.publish(self.spec(&vm)).map_err(store_failure)?;
        if let Some(old) = old
            && let Err(error) = drop_checkpoint(&self.client, &old.id).await
        {
            say!("clade: the checkpoint of the older template stays: {error}");
        }
        Ok(template)
    }

    fn spec(&self, vm: &VmInfo) -> TemplateSpec {
        TemplateSpec {
            source: self.recipe.source.clone(),
            image: self.recipe.image.digest.to_string(),
            start: self.recipe.start.clone(),
            ready: self.args.ready_cmd.clone(),
            env: self.recipe.env.clone(),
            user: self.recipe.user().to_owned(),
            workdir: self.recipe.workdir().unwrap_or_default().to_owned(),
            cpus: vm.cpus,
            mib: self.args.machine.mem >> 20,
        }
    }

    /// Stops the VM, and removes the checkpoint of an unfinished template.
    async fn clear_up(&self, is_built: bool) {
        let stopped = clade_supervisor::stop(&self.client, &self.boot.name, StopRequest::default()).await;
        if let Err(error) = stopped.map_err(failure)
            && is_built
        {
            say!("clade: the VM of the build does not stop: {error}");
        }
        if !is_built && let Err(error) = drop_checkpoint(&self.client, &self.id).await {
            say!("clade: the checkpoint of the build stays: {error}");
        }
    }
}
