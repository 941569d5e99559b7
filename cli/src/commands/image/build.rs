//! `clade image build`: the steps of a Dockerfile in a VM of its base image. The files that they
//! have changed are the layer of a new image.
//!
//! The layer comes from the guest, and is checked like one of a registry.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use clade_api::Client;
use clade_oci::{Image, ImageChanges, ImageName, ImageStore, PullError, ReferenceError, SourceError, SparseWriter};
use jiff::Timestamp;
use tokio::task::spawn_blocking;

use super::{Bars, limits, pull_failure, shown, store_failure};
use crate::commands::build::guest::BuildGuest;
use crate::commands::build::recipe::{DOCKERFILE, Recipe};
use crate::commands::build::{BuildVmArgs, boot, carry_out, expect_local, stop, until_signal};
use crate::commands::image_vm::{ImageVm, Tools};
use crate::commands::run::{request, say};
use crate::commands::serve::ensure;
use crate::commands::{Failure, Outcome, print_json};

/// Time limit of a listing of the guest's files: its kernel may be interpreted.
const LISTING: Duration = Duration::from_secs(900);

#[derive(Debug, clap::Args)]
pub(crate) struct ImageBuildArgs {
    /// The directory that COPY takes files of.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    // In the attribute: brackets would become links in the documentation.
    #[arg(
        long,
        short = 't',
        value_name = "NAME",
        help = "The image's name: [HOST[:PORT]/]NAME[:TAG]. An older image of the name loses it when this one is complete"
    )]
    tag: String,
    /// The Dockerfile. Default: Dockerfile in DIR.
    #[arg(long, short = 'f', value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    vm: BuildVmArgs,
    /// Print JSON: the image. The output of its programs goes to standard error in any case.
    #[arg(long)]
    json: bool,
}

pub(super) fn main(store: &ImageStore, args: &ImageBuildArgs) -> Outcome {
    // Before any fetch or boot.
    let name: ImageName = args.tag.parse().map_err(|error: ReferenceError| Failure::input(error))?;
    if !args.dir.is_dir() {
        return Err(Failure::Input(anyhow!("{} is not a directory", args.dir.display())));
    }
    let path = args.file.clone().unwrap_or_else(|| args.dir.join(DOCKERFILE));
    let recipe = Recipe::of_dockerfile(&args.vm, &args.dir, &path, store)?;
    let layer = match recipe.plan.steps.is_empty() {
        true => None,
        false => Some(layer_of(store, args, &recipe)?),
    };
    let plan = recipe.plan;
    let changes = ImageChanges {
        layer,
        config: plan.config,
        labels: plan.labels,
        ports: plan.ports,
        instructions: plan.instructions,
        created: Timestamp::now().to_string(),
    };
    let (limits, own, is_quiet) = (limits(&args.vm.pull), store.clone(), args.json);
    let make = move || Bars::show(is_quiet, |progress| own.build(&recipe.image, changes, &name, limits, progress));
    // On another thread, so that a signal ends the command meanwhile: the next writer removes what it leaves.
    let made = async { spawn_blocking(make).await.map_err(Failure::run)?.map_err(of_build) };
    let image = until_signal(made, async |_| {}).map_err(|failure| failure.named(&args.tag))?;
    print(store, image, args.json)
}

fn print(store: &ImageStore, image: Image, is_json: bool) -> Outcome {
    if is_json {
        let names = store.references().map_err(store_failure)?;
        return print_json(&shown(store, image, &names)).map_err(Failure::run);
    }
    writeln!(io::stdout(), "{}", image.digest).map_err(Failure::run)
}

/// Carries out the steps in a VM. Returns the archive of the changed files.
fn layer_of(store: &ImageStore, args: &ImageBuildArgs, recipe: &Recipe) -> Result<File, Failure> {
    let client = Client::default();
    expect_local(&client)?;
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
    let vm = format!("build-{}-{since:x}", std::process::id());
    let run_args = args.vm.run_args(&recipe.source, vm);
    let tools = Tools::find(&run_args)?;
    let of_image = ImageVm::idle(&run_args, &tools, (store, &recipe.image))?;
    let request = request(&run_args, Some(&of_image))?;
    // Without a name: a killed build leaves no file.
    let root = store.root();
    let spool = tempfile::tempfile_in(root).with_context(|| root.display().to_string()).map_err(Failure::Run)?;
    ensure()?;
    let build = async {
        let guest = boot(&client, &request, recipe).await?;
        let agent = guest.patient_agent(LISTING);
        agent.begin_layer().await.map_err(Failure::run)?;
        carry_out(&guest, recipe).await?;
        receive(&guest, spool, args.vm.pull.max_image).await
    };
    until_signal(build, async |is_built| stop(&client, &request.name, is_built).await)
}

fn of_build(error: PullError) -> Failure {
    match error {
        // The archive's file is this command's own.
        PullError::Source(SourceError::File { .. }) => Failure::run(error),
        other => pull_failure(other),
    }
}

/// Receives the layer, of at most `limit` bytes.
async fn receive(guest: &BuildGuest, spool: File, limit: u64) -> Result<File, Failure> {
    let mut archive = guest.patient_agent(LISTING).layer().await.map_err(Failure::run)?;
    let mut writer = SparseWriter::new(&spool, 0);
    while let Some(piece) = archive.next().await.map_err(Failure::run)? {
        if writer.position() + piece.len() as u64 > limit {
            return Err(Failure::Input(anyhow!("the changed files have more than the {limit} bytes of --max-image")));
        }
        writer.write_all(&piece).context("the layer cannot be kept").map_err(Failure::Run)?;
    }
    say!("{:.1} MiB of changed files", writer.position() as f64 / f64::from(1 << 20));
    writer.finish().context("the layer cannot be kept").map_err(Failure::Run)?;
    Ok(spool)
}
