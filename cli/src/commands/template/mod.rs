//! `clade template`: an image that is set up, as a checkpoint in memory and a snapshot on the disk.

mod build;

use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clade_api::{CheckpointInfo, Client, ClientError, runtime_dir};
use clade_e2b::{Template, TemplateError, TemplateStore};
use hyper::Method;
use serde::Serialize;

use crate::commands::build::BuildVmArgs;
use crate::commands::remote::ask;
use crate::commands::serve::answers;
use crate::commands::units::{parse_duration, show_age, show_size};
use crate::commands::{Failure, Outcome, Table, print_json};

/// `clade template`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum TemplateCommand {
    /// Boot an image, set it up, start its program, and keep it when that is ready.
    Build(Box<BuildArgs>),
    /// List the templates.
    Ls(TemplateListArgs),
    /// Show a template.
    Inspect(TemplateInspectArgs),
    /// Remove templates: checkpoint and snapshot. Sandboxes of them run on.
    Rm(TemplateRemoveArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct BuildArgs {
    // In the attribute: brackets would become links in the documentation.
    #[arg(
        value_name = "SOURCE",
        help = "A directory with a Dockerfile, or an image as clade run --image has it: HOST[:PORT]/NAME[:TAG|@DIGEST], oci:DIR[:TAG] or docker-archive:FILE"
    )]
    source: String,
    /// The template's name. An existing template is replaced when this one is complete.
    #[arg(long, value_name = "NAME")]
    name: String,
    /// The command to start in it, by /bin/sh. Default: the image's. Empty: nothing.
    #[arg(long, value_name = "COMMAND")]
    start_cmd: Option<String>,
    /// The command that checks that it is ready, by /bin/sh: it is repeated until it exits with 0.
    #[arg(long, value_name = "COMMAND")]
    ready_cmd: Option<String>,
    /// Time limit of that, such as 90s or 5m, and of the trial child, which must be made ready. Default: 60s
    /// and 5m.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    ready_timeout: Option<Duration>,
    #[command(flatten)]
    vm: BuildVmArgs,
    /// Print JSON: the template. The output of its programs goes to standard error in any case.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct TemplateListArgs {
    /// Print JSON: an array of the templates.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct TemplateInspectArgs {
    /// Its name or its id.
    #[arg(value_name = "TEMPLATE")]
    template: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct TemplateRemoveArgs {
    /// Their names or ids.
    #[arg(value_name = "TEMPLATE", required = true)]
    templates: Vec<String>,
    /// Print JSON: an array of the removed templates.
    #[arg(long)]
    json: bool,
}

/// A template in the form of `--json`.
#[derive(Debug, Serialize)]
struct TemplateInfo {
    #[serde(flatten)]
    template: Template,
    snapshot: PathBuf,
    /// Space of the snapshot on the host.
    host_bytes: u64,
    /// Whether the supervisor of this runtime directory has its checkpoint.
    is_in_memory: bool,
}

impl TemplateInfo {
    fn new(store: &TemplateStore, template: Template, held: &[String]) -> Self {
        let snapshot = store.snapshot(&template.id);
        let is_in_memory = held.contains(&template.id);
        Self { host_bytes: host_bytes(&snapshot), snapshot, is_in_memory, template }
    }
}

/// Returns the space of a directory's files. A missing directory takes none.
fn host_bytes(dir: &Path) -> u64 {
    let of = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => host_bytes(&entry.path()),
        Ok(found) => found.blocks() * 512,
        Err(_) => 0,
    };
    std::fs::read_dir(dir).map_or(0, |entries| entries.flatten().map(of).sum())
}

fn failure(error: TemplateError) -> Failure {
    match error {
        TemplateError::File { .. } => Failure::run(error),
        _ => Failure::input(error),
    }
}

pub(super) fn main(command: &TemplateCommand) -> Outcome {
    let store = TemplateStore::of_user().map_err(failure)?;
    match command {
        TemplateCommand::Build(args) => build::main(args, &store),
        TemplateCommand::Ls(args) => list(args, &store),
        TemplateCommand::Inspect(args) => inspect(args, &store),
        TemplateCommand::Rm(args) => remove(args, &store),
    }
}

/// Returns the client of a running supervisor. Does not start one to look at templates.
fn supervisor() -> Option<Client> {
    let client = Client::default();
    (client.is_remote() || answers(&runtime_dir())).then_some(client)
}

/// Returns the names of the supervisor's checkpoints, or none if it does not answer.
fn held() -> Vec<String> {
    let Some(client) = supervisor() else { return Vec::new() };
    let all = ask(client.supervisor::<Vec<CheckpointInfo>>(Method::GET, "/v1/checkpoints", None::<&()>));
    all.unwrap_or_default().into_iter().map(|one| one.name).collect()
}

/// Removes the checkpoint of a template, if there is one.
async fn drop_checkpoint(client: &Client, id: &str) -> Result<(), ClientError> {
    let path = format!("/v1/checkpoints/{id}");
    match client.supervisor::<CheckpointInfo>(Method::DELETE, &path, None::<&()>).await {
        Ok(_) | Err(ClientError::Refused { status: 404, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn age(template: &Template) -> f64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.as_secs_f64() - template.created_at.as_second() as f64
}

fn list(args: &TemplateListArgs, store: &TemplateStore) -> Outcome {
    let (all, held) = (store.list().map_err(failure)?, held());
    let all: Vec<TemplateInfo> = all.into_iter().map(|template| TemplateInfo::new(store, template, &held)).collect();
    if args.json {
        return print_json(&all).map_err(Failure::run);
    }
    let mut table = Table::new(["name", "id", "vCPUs", "MiB", "on disk", "age", "in memory", "source"]);
    for TemplateInfo { template, host_bytes, is_in_memory, .. } in all {
        table.row([
            template.name.clone(),
            template.id.clone(),
            template.spec.cpus.to_string(),
            template.spec.mib.to_string(),
            show_size(host_bytes),
            show_age(age(&template)),
            if is_in_memory { "yes" } else { "no" }.to_owned(),
            template.spec.source,
        ]);
    }
    table.print().map_err(Failure::run)
}

fn inspect(args: &TemplateInspectArgs, store: &TemplateStore) -> Outcome {
    let shown = TemplateInfo::new(store, store.find(&args.template).map_err(failure)?, &held());
    if args.json {
        return print_json(&shown).map_err(Failure::run);
    }
    let age = show_age(age(&shown.template));
    let Template { name, id, spec, .. } = shown.template;
    let mut table = Table::new(["", ""]);
    let mut row = |name: &str, value: String| table.words([name.to_owned(), value]);
    row("name", name);
    row("id", id);
    row("source", spec.source);
    row("image", spec.image);
    row("start", spec.start.join(" "));
    row("ready", spec.ready.unwrap_or_default());
    row("env", spec.env.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("\n"));
    row("user", spec.user);
    row("directory", spec.workdir);
    row("machine", format!("{} vCPUs, {} MiB", spec.cpus, spec.mib));
    row("snapshot", shown.snapshot.display().to_string());
    row("on disk", show_size(shown.host_bytes));
    row("in memory", if shown.is_in_memory { "yes" } else { "no" }.to_owned());
    row("age", age);
    table.print().map_err(Failure::run)
}

/// Removes each template, prints each failure with its name, and returns the first.
fn remove(args: &TemplateRemoveArgs, store: &TemplateStore) -> Outcome {
    let (mut gone, mut first) = (Vec::new(), None);
    for name in &args.templates {
        let removed = store.remove(name).map_err(failure).and_then(|template| {
            // Its children run on.
            supervisor().map_or(Ok(()), |client| ask(drop_checkpoint(&client, &template.id)))?;
            Ok(template)
        });
        match removed {
            Ok(template) => gone.push(template),
            Err(failure) if first.is_none() => first = Some(failure),
            Err(failure) => drop(writeln!(io::stderr(), "clade: {failure}")),
        }
    }
    let printed = if args.json {
        print_json(&gone)
    } else {
        gone.iter().try_for_each(|template| writeln!(io::stdout(), "{} is removed", template.name))
    };
    printed.map_err(Failure::run)?;
    first.map_or(Ok(()), Err)
}
