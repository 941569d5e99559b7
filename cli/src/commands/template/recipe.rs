//! The recipe of a build: the image to boot, its steps, and the program to run in the end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, anyhow};
use clade_oci::{Action, BuildPlan, BuildStep, Dockerfile, Image, ImageStore, MAX_DOCKERFILE, RunConfig};

use super::BuildArgs;
use super::context::BuildContext;
use crate::commands::Failure;
use crate::commands::image_vm::fetch;

const DOCKERFILE: &str = "Dockerfile";

/// A build before its VM.
pub(super) struct Recipe {
    /// The user's name for it; a directory is absolute.
    pub(super) source: String,
    pub(super) image: Image,
    pub(super) plan: BuildPlan,
    /// The directory that files are copied from.
    pub(super) context: Option<BuildContext>,
    /// The program to start, if any.
    pub(super) start: Vec<String>,
    /// Variables of all programs of the result.
    pub(super) env: BTreeMap<String, String>,
}

/// Reads a text of a bounded length.
pub(super) fn read_text(path: &Path) -> Result<String, Failure> {
    let named = || path.display().to_string();
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_DOCKERFILE as u64 + 1).read_to_string(&mut text));
    read.with_context(named).map_err(Failure::Input)?;
    match text.len() > MAX_DOCKERFILE {
        true => Err(Failure::Input(anyhow!("{} has more than {MAX_DOCKERFILE} bytes", named()))),
        false => Ok(text),
    }
}

impl Recipe {
    /// Reads the source, and fetches its image.
    pub(super) fn read(args: &BuildArgs, store: &ImageStore) -> Result<Self, Failure> {
        let dir = Path::new(&args.source);
        let given: BTreeMap<String, String> = args.build_arg.iter().cloned().collect();
        let (source, image, plan, context) = if dir.is_dir() {
            let path = dir.join(DOCKERFILE);
            if !path.is_file() {
                let hint = "an OCI layout is oci:DIR";
                return Err(Failure::Input(anyhow!("{} has no {DOCKERFILE}; {hint}", dir.display())));
            }
            let refused = |error| Failure::input(error).named(&path.display().to_string());
            let file = Dockerfile::parse(&read_text(&path)?).map_err(refused)?;
            let context = BuildContext::open(dir)?;
            let image = fetch(store, &file.base(&given).map_err(refused)?, &args.pull)?;
            let plan = file.plan(&image.config, &given).map_err(refused)?;
            check_files(&plan, &context)?;
            let absolute = std::path::absolute(dir).map_err(Failure::input)?;
            (absolute.display().to_string(), image, plan, Some(context))
        } else {
            if let Some(name) = given.keys().next() {
                return Err(Failure::Input(anyhow!("--build-arg {name}: an image has no ARG")));
            }
            let image = fetch(store, &args.source, &args.pull)?;
            let plan = BuildPlan { steps: Vec::new(), config: image.config.clone() };
            (args.source.clone(), image, plan, None)
        };
        let RunConfig { entrypoint, cmd, env, .. } = &plan.config;
        let start = match args.start_cmd.as_deref() {
            None => [&entrypoint[..], &cmd[..]].concat(),
            Some(text) if text.trim().is_empty() => Vec::new(),
            Some(text) => shell(text),
        };
        let pairs = env.iter().filter_map(|variable| variable.split_once('='));
        let env = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Ok(Self { source, image, plan, context, start, env })
    }

    /// Returns the user of programs. The agent knows no group of a request.
    pub(super) fn user(&self) -> &str {
        user(&self.plan.config.user)
    }

    /// Returns the working directory of programs. Default: their users' homes.
    pub(super) fn workdir(&self) -> Option<&str> {
        Some(self.plan.config.working_dir.as_str()).filter(|dir| !["", "/"].contains(dir))
    }
}

/// Refuses missing files, before there is a VM that waits for them.
fn check_files(plan: &BuildPlan, context: &BuildContext) -> Result<(), Failure> {
    for step in &plan.steps {
        if let Action::Copy(files) = &step.action {
            let found = files.sources.iter().try_for_each(|word| context.sources(word).map(drop));
            found.map_err(|failure| of_step(step, failure))?;
        }
    }
    Ok(())
}

/// Returns the same failure, with its instruction.
pub(super) fn of_step(step: &BuildStep, failure: Failure) -> Failure {
    failure.named(&format!("line {}: {}", step.line, step.instruction))
}

/// Returns the user without the group that an image may name behind a colon.
pub(super) fn user(text: &str) -> &str {
    match text.split_once(':').map_or(text, |(user, _)| user) {
        "" => "root",
        user => user,
    }
}

pub(super) fn shell(text: &str) -> Vec<String> {
    ["/bin/sh", "-c", text].map(str::to_owned).to_vec()
}
