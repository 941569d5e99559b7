//! The recipe of a build: the image to boot, and its steps.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, anyhow};
use clade_oci::{Action, BuildPlan, BuildStep, Dockerfile, Image, ImageStore, MAX_DOCKERFILE};

use super::BuildVmArgs;
use super::context::BuildContext;
use crate::commands::Failure;
use crate::commands::image_vm::fetch;

/// The file with the steps of a build.
pub(in crate::commands) const DOCKERFILE: &str = "Dockerfile";

/// A build before its VM.
pub(in crate::commands) struct Recipe {
    /// The user's name for it; a directory is absolute.
    pub(in crate::commands) source: String,
    pub(in crate::commands) image: Image,
    pub(in crate::commands) plan: BuildPlan,
    /// The directory that files are copied from.
    pub(super) context: Option<BuildContext>,
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
    /// Reads the source, a directory with a Dockerfile or an image, and fetches its image.
    pub(in crate::commands) fn read(args: &BuildVmArgs, source: &str, store: &ImageStore) -> Result<Self, Failure> {
        let dir = Path::new(source);
        if dir.is_dir() {
            return Self::of_dockerfile(args, dir, &dir.join(DOCKERFILE), store);
        }
        if let Some((name, _)) = args.build_arg.first() {
            return Err(Failure::Input(anyhow!("--build-arg {name}: an image has no ARG")));
        }
        let image = fetch(store, source, &args.pull)?;
        let plan = BuildPlan::of_image(&image.config);
        Ok(Self { source: source.to_owned(), image, plan, context: None })
    }

    /// Reads a Dockerfile, and fetches its image.
    pub(in crate::commands) fn of_dockerfile(
        args: &BuildVmArgs,
        dir: &Path,
        path: &Path,
        store: &ImageStore,
    ) -> Result<Self, Failure> {
        let given: BTreeMap<String, String> = args.build_arg.iter().cloned().collect();
        if !path.is_file() {
            let hint = "an OCI layout is oci:DIR";
            return Err(Failure::Input(anyhow!("there is no {}; {hint}", path.display())));
        }
        let refused = |error| Failure::input(error).named(&path.display().to_string());
        let file = Dockerfile::parse(&read_text(path)?).map_err(refused)?;
        let context = BuildContext::open(dir, path)?;
        let image = fetch(store, &file.base(&given).map_err(refused)?, &args.pull)?;
        let plan = file.plan(&image.config, &given).map_err(refused)?;
        check_files(&plan, &context)?;
        let absolute = std::path::absolute(dir).map_err(Failure::input)?;
        Ok(Self { source: absolute.display().to_string(), image, plan, context: Some(context) })
    }

    /// Returns the variables of all programs of the result.
    pub(in crate::commands) fn env(&self) -> BTreeMap<String, String> {
        let pairs = self.plan.config.env.iter().filter_map(|variable| variable.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// Returns the user of programs.
    pub(in crate::commands) fn user(&self) -> &str {
        user(&self.plan.config.user)
    }

    /// Returns the working directory of programs. Default: their users' homes.
    pub(in crate::commands) fn workdir(&self) -> Option<&str> {
        Some(self.plan.config.working_dir.as_str()).filter(|dir| !["", "/"].contains(dir))
    }
}

/// Refuses missing files, before there is a VM that waits for them.
fn check_files(plan: &BuildPlan, context: &BuildContext) -> Result<(), Failure> {
    for step in &plan.steps {
        if let Action::Copy(files) = &step.action {
            let count = files.sources.iter().try_fold(0, |sum, word| Ok(sum + context.sources(word)?.len()));
            match count.map_err(|failure| of_step(step, failure))? {
                2.. if !files.to.ends_with('/') => {
                    let why = "several sources go to a directory, which ends with a slash";
                    return Err(of_step(step, Failure::input(anyhow!("{:?}: {why}", files.to))));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Returns the same failure, with its instruction.
pub(super) fn of_step(step: &BuildStep, failure: Failure) -> Failure {
    failure.named(&format!("line {}: {}", step.line, step.instruction))
}

/// Returns the user of an image, with the group that it may name behind a colon.
pub(super) fn user(text: &str) -> &str {
    if text.is_empty() { "root" } else { text }
}

pub(in crate::commands) fn shell(text: &str) -> Vec<String> {
    ["/bin/sh", "-c", text].map(str::to_owned).to_vec()
}
