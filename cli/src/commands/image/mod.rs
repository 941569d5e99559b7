//! `clade image`: the images for VMs, in the cache.

mod build;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clade_oci::{
    Credentials, Descriptor, Digest, Image, ImageError, ImageLimits, ImageStore, ImageStoreError, LayerError, Progress,
    PullError, PullOptions, Reference, ReferenceError, RunConfig, SourceError,
};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use zeroize::Zeroizing;

use crate::commands::units::{parse_size, show_size};
use crate::commands::{Failure, Outcome, Table, print_json};

/// Most bytes of a password.
const MAX_PASSWORD: usize = 4096;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum ImageCommand {
    /// Fetch images, check them, and make a disk of each.
    Pull(PullArgs),
    /// Make an image of another one with a Dockerfile, whose steps run in a VM.
    Build(Box<build::ImageBuildArgs>),
    /// List the images that have disks.
    Ls(ImageListArgs),
    /// Show an image's program, and the path of its disk.
    Inspect(ImageInspectArgs),
    /// Remove names of images, and images without a name. Images in use stay.
    Rm(ImageRemoveArgs),
}

/// Options of a pull.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct PullFlags {
    /// Ask the registry by HTTP, without TLS. Always so for one on this machine.
    #[arg(long)]
    pub(crate) insecure: bool,
    /// A file of certificates (PEM) that the registry's must be signed by. The connection uses TLS.
    #[arg(long, value_name = "FILE", conflicts_with = "insecure")]
    pub(crate) ca: Option<PathBuf>,
    /// Most bytes of all layers together, unpacked.
    #[arg(long, value_name = "SIZE", default_value = "64G", value_parser = parse_size)]
    pub(crate) max_image: u64,
}

impl PullFlags {
    /// Returns the options for `reference`, with the given credentials, or docker's.
    fn options(&self, reference: &Reference, given: Option<&Credentials>) -> Result<PullOptions, Failure> {
        let credentials = match (given, reference) {
            (Some(given), _) => Some(given.clone()),
            (None, Reference::Registry { host, .. }) => Credentials::of_docker(host).map_err(Failure::input)?,
            (None, _) => None,
        };
        let (is_insecure, limits) = (self.insecure, limits(self));
        Ok(PullOptions { is_insecure, credentials, ca: self.ca.clone(), limits, stall: None })
    }
}

fn limits(flags: &PullFlags) -> ImageLimits {
    ImageLimits { bytes: flags.max_image, ..ImageLimits::default() }
}

#[derive(Debug, clap::Args)]
pub(crate) struct PullArgs {
    // In the attribute: brackets would become links in the documentation.
    #[arg(
        value_name = "IMAGE",
        required = true,
        help = "An image: HOST[:PORT]/NAME[:TAG|@DIGEST], oci:DIR[:TAG] or docker-archive:FILE. Names without a host are of the registry that CLADE_REGISTRY names"
    )]
    images: Vec<String>,
    #[command(flatten)]
    flags: PullFlags,
    /// A user of the registry. Default: from "auths" of docker's configuration, if that has the
    /// registry.
    #[arg(long, value_name = "NAME", requires = "password_stdin")]
    username: Option<String>,
    /// Read the user's password from standard input.
    #[arg(long, requires = "username")]
    password_stdin: bool,
    /// Print JSON: an array of the images.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ImageListArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ImageInspectArgs {
    /// Its name, its digest, or the digest's first six digits or more.
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ImageRemoveArgs {
    /// Their names, or digests as for inspect.
    #[arg(value_name = "IMAGE", required_unless_present = "all", conflicts_with = "all")]
    images: Vec<String>,
    /// All images that are not in use.
    #[arg(long)]
    all: bool,
    /// Remove an image named by its digest, even if it has several names.
    #[arg(long)]
    force: bool,
    /// Print JSON: an array of the removed images.
    #[arg(long)]
    json: bool,
}

/// An image in the form of `--json`.
#[derive(Debug, Serialize)]
struct ImageInfo {
    digest: Digest,
    names: Vec<String>,
    disk: PathBuf,
    disk_bytes: u64,
    /// Space of the disk's file on the host.
    host_bytes: u64,
    layers: usize,
    fetched_bytes: u64,
    skipped: u64,
    config: RunConfig,
}

/// A removed image in the form of `clade image rm --json`.
#[derive(Debug, Serialize)]
struct Gone {
    image: Option<Digest>,
    names: Vec<String>,
    bytes: u64,
}

pub(super) fn main(command: &ImageCommand) -> Outcome {
    let store = open_store()?;
    match command {
        ImageCommand::Pull(args) => pull_all(&store, args),
        ImageCommand::Build(args) => build::main(&store, args),
        ImageCommand::Ls(args) => list(&store, args),
        ImageCommand::Inspect(args) => inspect(&store, args),
        ImageCommand::Rm(args) => remove(&store, args),
    }
}

pub(super) fn open_store() -> Result<ImageStore, Failure> {
    ImageStore::open_default().map_err(Failure::input)
}

fn store_failure(error: ImageStoreError) -> Failure {
    Failure::run(error)
}

fn image_failure(error: ImageError) -> Failure {
    match error {
        ImageError::Store(error) => store_failure(error),
        other => Failure::input(other),
    }
}

/// A bad image cannot be used; a failed network may work later.
fn pull_failure(error: PullError) -> Failure {
    match error {
        PullError::Store(ImageStoreError::File { .. } | ImageStoreError::Content { .. })
        | PullError::Disk(_)
        | PullError::Layer { source: LayerError::Spool { .. }, .. }
        | PullError::Source(SourceError::Http { .. } | SourceError::Answer { .. } | SourceError::NoToken(_)) => {
            Failure::run(error)
        }
        other => Failure::input(other),
    }
}

pub(super) fn parse(text: &str) -> Result<Reference, Failure> {
    text.parse().map_err(|error: ReferenceError| Failure::input(error))
}

/// Progress bars on a terminal; nothing elsewhere.
struct Bars(RefCell<ProgressBar>);

impl Bars {
    /// Shows the progress of `work`, unless it is quiet.
    fn show<T>(is_quiet: bool, work: impl FnOnce(&dyn Progress) -> T) -> T {
        let bars = Self(RefCell::new(ProgressBar::hidden()));
        let done = work(if is_quiet { &() } else { &bars });
        bars.0.borrow().finish_and_clear();
        done
    }

    fn set(&self, bar: ProgressBar, style: &str, message: String) {
        let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
        let old = self.0.replace(bar.with_style(style).with_message(message));
        old.finish_and_clear();
    }

    fn spin(&self, message: String) {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(100));
        self.set(bar, "{msg:34} {spinner} {elapsed}", message);
    }
}

impl Progress for Bars {
    fn fetch(&self, what: &Descriptor) {
        let name = what.digest.hex().chars().take(12).collect();
        self.set(ProgressBar::new(what.size), "{msg:34} {wide_bar:.cyan/blue} {bytes:>10}/{total_bytes}", name);
    }
    fn fetched(&self, bytes: u64) {
        self.0.borrow().inc(bytes);
    }
    fn unpack(&self, layer: usize, of: usize) {
        self.spin(format!("layer {layer} of {of}"));
    }
    fn write(&self) {
        self.spin("disk".to_owned());
    }
}

/// Pulls one image. The registry is asked for its manifest even if the image is in the cache.
pub(super) fn pull(
    store: &ImageStore,
    reference: &Reference,
    (flags, credentials): (&PullFlags, Option<&Credentials>),
    is_quiet: bool,
) -> Result<Image, Failure> {
    let options = flags.options(reference, credentials)?;
    let image = Bars::show(is_quiet, |progress| store.pull(reference, &options, progress));
    image.map_err(|error| pull_failure(error).named(&reference.to_string()))
}

fn shown(store: &ImageStore, image: Image, names: &BTreeMap<String, Digest>) -> ImageInfo {
    use std::os::unix::fs::MetadataExt;
    let disk = store.disk(&image.digest);
    let host_bytes = std::fs::metadata(&disk).map_or(0, |file| file.blocks() * 512);
    ImageInfo {
        names: names.iter().filter(|(_, digest)| **digest == image.digest).map(|(name, _)| name.clone()).collect(),
        disk,
        disk_bytes: image.disk_bytes,
        host_bytes,
        // A manifest and a configuration come before them.
        layers: image.blobs.len().saturating_sub(2),
        fetched_bytes: image.blobs.iter().map(|blob| blob.size).sum(),
        skipped: image.skipped,
        config: image.config,
        digest: image.digest,
    }
}

/// Calls `one` for each name, prints each failure with its name, and returns the first.
fn each<T>(names: &[String], mut one: impl FnMut(&str) -> Result<T, Failure>) -> (Vec<T>, Outcome) {
    let (mut done, mut first) = (Vec::new(), None);
    for name in names {
        match one(name) {
            Ok(value) => done.push(value),
            Err(failure) if first.is_none() => first = Some(failure),
            Err(failure) => eprintln!("clade: {failure}"),
        }
    }
    (done, first.map_or(Ok(()), Err))
}

/// Returns the given name and password. They belong to one registry.
fn credentials(args: &PullArgs) -> Result<Option<Credentials>, Failure> {
    let Some(username) = &args.username else { return Ok(None) };
    let mut registries = BTreeSet::new();
    for image in &args.images {
        if let Reference::Registry { host, .. } = parse(image)? {
            registries.insert(host);
        }
    }
    if registries.len() > 1 {
        let all = registries.into_iter().collect::<Vec<_>>().join(", ");
        return Err(Failure::Input(anyhow!("--username is a user of one registry, and the images are of {all}")));
    }
    let mut password = Zeroizing::new(String::with_capacity(MAX_PASSWORD + 1));
    let read = io::stdin().take(MAX_PASSWORD as u64 + 1).read_to_string(&mut password);
    read.context("the password").map_err(Failure::Input)?;
    if password.len() > MAX_PASSWORD {
        return Err(Failure::Input(anyhow!("the password has more than {MAX_PASSWORD} bytes")));
    }
    let length = password.trim_end_matches(['\r', '\n']).len();
    password.truncate(length);
    Credentials::new(username, password).map(Some).map_err(Failure::input)
}

fn pull_all(store: &ImageStore, args: &PullArgs) -> Outcome {
    let given = credentials(args)?;
    let (images, outcome) = each(&args.images, |name| {
        let image = pull(store, &parse(name)?, (&args.flags, given.as_ref()), args.json)?;
        if !args.json {
            println!("{}", image.digest);
        }
        if image.skipped > 0 {
            eprintln!("{name}: {} attributes and files of other systems are left out", image.skipped);
        }
        Ok(image)
    });
    if args.json {
        let names = store.references().map_err(store_failure)?;
        let images: Vec<ImageInfo> = images.into_iter().map(|image| shown(store, image, &names)).collect();
        print_json(&images).map_err(Failure::run)?;
    }
    outcome
}

fn list(store: &ImageStore, args: &ImageListArgs) -> Outcome {
    let names = store.references().map_err(store_failure)?;
    let images = store.images().map_err(store_failure)?;
    let images: Vec<ImageInfo> = images.into_iter().map(|image| shown(store, image, &names)).collect();
    if args.json {
        return print_json(&images).map_err(Failure::run);
    }
    let mut table = Table::new(["name", "digest", "layers", "fetched", "on disk"]);
    for image in images {
        let digest: String = image.digest.hex().chars().take(12).collect();
        let name = if image.names.is_empty() { "-".to_owned() } else { image.names.join("\n") };
        let sizes = [image.fetched_bytes, image.host_bytes].map(show_size);
        table.row([name, digest, image.layers.to_string()].into_iter().chain(sizes));
    }
    table.print().map_err(Failure::run)
}

fn inspect(store: &ImageStore, args: &ImageInspectArgs) -> Outcome {
    let image = store.find(&args.image).map_err(image_failure)?;
    let image = shown(store, image, &store.references().map_err(store_failure)?);
    if args.json {
        return print_json(&image).map_err(Failure::run);
    }
    let mut table = Table::new(["", ""]);
    let mut row = |name: &str, value: String| table.words([name.to_owned(), value]);
    row("digest", image.digest.to_string());
    row("names", image.names.join("\n"));
    row("disk", image.disk.display().to_string());
    row("on disk", show_size(image.host_bytes));
    row("entrypoint", image.config.entrypoint.join(" "));
    row("cmd", image.config.cmd.join(" "));
    row("env", image.config.env.join("\n"));
    row("directory", image.config.working_dir);
    row("user", image.config.user);
    table.print().map_err(Failure::run)
}

fn remove(store: &ImageStore, args: &ImageRemoveArgs) -> Outcome {
    let everyone: Vec<String> = if args.all {
        let images = store.images().map_err(store_failure)?;
        images.iter().map(|image| image.digest.to_string()).collect()
    } else {
        args.images.clone()
    };
    let (gone, outcome) = each(&everyone, |name| {
        let removed = store.remove(name, args.force || args.all).map_err(image_failure)?;
        if !args.json {
            println!("{name} is removed");
        }
        Ok(Gone { image: removed.image, names: removed.names, bytes: removed.bytes })
    });
    if args.all {
        // Content of no image has no name.
        store.sweep().map_err(image_failure)?;
    }
    if args.json {
        print_json(&gone).map_err(Failure::run)?;
    }
    outcome
}
