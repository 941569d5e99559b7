//! `clade template build`: boots an image, sets it up through its agent, starts its program, and
//! keeps it when that is ready.
//!
//! A failed build leaves nothing: the VM is stopped, and the checkpoint and the snapshot are
//! removed. The VM of a killed builder ends by its time to live.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Instant;

use anyhow::anyhow;
use clade_agent_client::proto::api::Init;
use clade_api::{BootRequest, CheckpointInfo, CheckpointRequest, Client, SnapshotAnswer, SnapshotRequest, VmInfo};
use clade_e2b::{Draft, Template, TemplateSpec, TemplateStore, check_template_name};
use clade_oci::RunConfig;
use hyper::Method;
use tokio::task::spawn_blocking;

use super::{BuildArgs, TemplateInfo, drop_checkpoint, failure as store_failure};
use crate::commands::build::guest::{BuildGuest, GuestProgram, StartedProgram, described};
use crate::commands::build::recipe::{Recipe, shell};
use crate::commands::build::{boot, carry_out, expect_local, stop, until_signal};
use crate::commands::image::open_store;
use crate::commands::image_vm::{ImageVm, Tools};
use crate::commands::oci_template::{TRIAL_TIMEOUT, rehearse, settle, try_child};
use crate::commands::remote::failure;
use crate::commands::run::{request, say};
use crate::commands::serve::ensure;
use crate::commands::{Failure, Outcome, print_json};

/// Interval of the runs of the ready command.
const READY_POLL: std::time::Duration = std::time::Duration::from_millis(500);

/// Default time limit of the ready command.
const READY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);

pub(super) fn main(args: &BuildArgs, store: &TemplateStore) -> Outcome {
    // Before any fetch or boot.
    check_template_name(&args.name).map_err(store_failure)?;
    let client = Client::default();
    expect_local(&client)?;
    let id = store.new_id().map_err(store_failure)?;
    let vm = format!("build-{id}");
    let run_args = args.vm.run_args(&args.source, vm);
    let tools = Tools::find(&run_args)?;
    let images = open_store()?;
    let recipe = Recipe::read(&args.vm, &args.source, &images)?;
    let (env, start) = (recipe.env(), start_command(args, &recipe));
    let of_image = ImageVm::idle(&run_args, &tools, (&images, &recipe.image))?;
    let boot = request(&run_args, Some(&of_image))?;
    ensure()?;
    let build = Build { args, recipe: &recipe, env, start, store: store.clone(), client, id, boot: &boot };
    let template = until_signal(build.run(), async |is_built| build.clear_up(is_built).await)?;
    if args.json {
        let id = template.id.clone();
        return print_json(&TemplateInfo::new(store, template, &[id])).map_err(Failure::run);
    }
    writeln!(io::stdout(), "{}", template.id).map_err(Failure::run)
}

/// Returns the program to start: the given one, or the image's.
fn start_command(args: &BuildArgs, recipe: &Recipe) -> Vec<String> {
    let RunConfig { entrypoint, cmd, .. } = &recipe.plan.config;
    match args.start_cmd.as_deref() {
        None => [&entrypoint[..], &cmd[..]].concat(),
        Some(text) if text.trim().is_empty() => Vec::new(),
        Some(text) => shell(text),
    }
}

struct Build<'a> {
    args: &'a BuildArgs,
    recipe: &'a Recipe,
    /// Variables of all programs of the result.
    env: BTreeMap<String, String>,
    /// The program to start, if any.
    start: Vec<String>,
    store: TemplateStore,
    client: Client,
    id: String,
    boot: &'a BootRequest,
}

impl Build<'_> {
    async fn run(&self) -> Result<Template, Failure> {
        let begun = Instant::now();
        let guest = boot(&self.client, self.boot, self.recipe).await?;
        carry_out(&guest, self.recipe).await?;
        let started = self.start(&guest).await?;
        self.await_ready(&guest, started).await?;
        let init = Init {
            env_vars: Some(self.env.clone()),
            default_user: Some(self.recipe.user().to_owned()),
            default_workdir: self.recipe.workdir().map(str::to_owned),
            ..Init::default()
        };
        guest.agent().init(&init).await.map_err(crate::commands::agent::agent_failure)?;
        let template = self.keep(&guest).await?;
        say!("{} is built after {:.1} s", template.name, begun.elapsed().as_secs_f64());
        Ok(template)
    }

    fn program<'a>(&'a self, argv: &'a [String]) -> GuestProgram<'a> {
        GuestProgram { argv, env: &self.env, workdir: self.recipe.workdir(), user: self.recipe.user() }
    }

    async fn start(&self, guest: &BuildGuest) -> Result<Option<StartedProgram>, Failure> {
        let start = &self.start;
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
        rehearse(&self.client, &self.boot.name).await.map_err(|why| Failure::Run(anyhow!(why)))?;
        settle(guest.pid).await;
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
            start: self.start.clone(),
            ready: self.args.ready_cmd.clone(),
            env: self.env.clone(),
            user: self.recipe.user().to_owned(),
            workdir: self.recipe.workdir().unwrap_or_default().to_owned(),
            cpus: vm.cpus,
            mib: self.args.vm.machine.mem >> 20,
        }
    }

    /// Stops the VM, and removes the checkpoint of an unfinished template.
    async fn clear_up(&self, is_built: bool) {
        stop(&self.client, &self.boot.name, is_built).await;
        if !is_built && let Err(error) = drop_checkpoint(&self.client, &self.id).await {
            say!("clade: the checkpoint of the build stays: {error}");
        }
    }
}
