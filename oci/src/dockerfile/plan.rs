//! The steps of a Dockerfile in a guest of its base image.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::expand::expand;
use super::expose::{MAX_PORTS, ports};
use super::{Command, Copy, Dockerfile, DockerfileError, Instruction, Placed};
use crate::limits::MAX_PATH;
use crate::manifest::RunConfig;

type Texts = BTreeMap<String, String>;

/// Most bytes of all labels together, so that a configuration is no longer than a registry takes.
const MAX_LABELS: usize = 1 << 20;
/// Most bytes of all variables. Each step after a change has a copy.
const MAX_VARIABLES: usize = 256 << 10;
/// Most steps in the guest.
const MAX_STEPS: usize = 1000;

/// Arguments that every build has, as BuildKit's. An `ARG` without a value in the image takes them.
const PLATFORM: [(&str, &str); 8] = [
    ("BUILDARCH", "amd64"),
    ("BUILDOS", "linux"),
    ("BUILDPLATFORM", "linux/amd64"),
    ("BUILDVARIANT", ""),
    ("TARGETARCH", "amd64"),
    ("TARGETOS", "linux"),
    ("TARGETPLATFORM", "linux/amd64"),
    ("TARGETVARIANT", ""),
];

/// Whether an argument names a proxy. It needs no `ARG`.
fn is_proxy(name: &str) -> bool {
    let proxies = ["HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"];
    proxies.iter().any(|proxy| proxy.eq_ignore_ascii_case(name))
}

/// The variables of programs for the given proxies, as BuildKit's: programs read one spelling or the other. Words
/// are not expanded with them, because their passwords do not belong into an image.
fn proxies_of(given: &Texts) -> Texts {
    let proxies = given.iter().filter(|(name, _)| is_proxy(name));
    proxies
        .flat_map(|(name, value)| {
            [name.to_ascii_uppercase(), name.to_ascii_lowercase()].map(|name| (name, value.clone()))
        })
        .collect()
}

/// Counts a name and a value against the bytes that are left for all.
fn take_room(room: &mut usize, name: &str, value: &str) -> Result<(), String> {
    let too_many = || format!("all words together have at most {MAX_VARIABLES} bytes");
    *room = room.checked_sub(name.len() + value.len()).ok_or_else(too_many)?;
    Ok(())
}

/// Files to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyFiles {
    /// Paths and patterns below the build's directory.
    pub sources: Vec<String>,
    /// The absolute path in the guest. A trailing slash means a directory.
    pub to: String,
    /// The owner, `user[:group]`. Default: root.
    pub owner: Option<String>,
    /// The permissions of all, in place of their own.
    pub mode: Option<u32>,
}

/// The action of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A program and its arguments.
    Run(Vec<String>),
    /// Copies files.
    Copy(CopyFiles),
    /// Makes a directory, which may exist already.
    MakeDir(String),
}

/// One step of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildStep {
    /// The line of the instruction.
    pub line: usize,
    /// Its name.
    pub instruction: &'static str,
    /// The text of the instruction, or its beginning.
    pub text: String,
    /// The action.
    pub action: Action,
    /// Variables of a program.
    pub env: Arc<Texts>,
    /// Its directory.
    pub workdir: String,
    /// Its user.
    pub user: String,
}

/// The plan of a Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildPlan {
    /// The steps, in order.
    pub steps: Vec<BuildStep>,
    /// The result's program, user, directory and variables.
    pub config: RunConfig,
    /// Labels of the result, beside those of its base image.
    pub labels: Texts,
    /// Ports of the result, with their protocols, beside those of its base image.
    pub ports: BTreeSet<String>,
    /// The texts of all instructions.
    pub instructions: Vec<String>,
}

impl BuildPlan {
    /// The plan of an image as it is.
    #[must_use]
    pub fn of_image(config: &RunConfig) -> Self {
        let (labels, ports) = (Texts::new(), BTreeSet::new());
        Self { steps: Vec::new(), config: config.clone(), labels, ports, instructions: Vec::new() }
    }
}

/// The program of a command. A text is run by the base image's `shell`, or that of Docker.
fn argv(command: &Command, shell: &[String]) -> Vec<String> {
    match command {
        Command::Shell(text) if shell.is_empty() => vec!["/bin/sh".to_owned(), "-c".to_owned(), text.clone()],
        Command::Shell(text) => shell.iter().chain([text]).cloned().collect(),
        Command::Exec(words) => words.clone(),
    }
}

/// `path` as an absolute path, taken below `dir` if it is relative.
fn below(dir: &str, path: &str) -> String {
    match path {
        absolute if absolute.starts_with('/') => absolute.to_owned(),
        relative => format!("{}/{}", dir.trim_end_matches('/'), relative.trim_start_matches("./")),
    }
}

/// The state of a build between two instructions.
struct Builder<'a> {
    given: &'a Texts,
    /// `ARG` before `FROM`: the values of an `ARG` without one.
    global: Texts,
    args: Texts,
    env: Texts,
    /// Variables of programs alone, in both spellings.
    proxies: Texts,
    /// The variables of a step. None after a change.
    variables: Option<Arc<Texts>>,
    config: RunConfig,
    workdir: String,
    user: String,
    /// Whether `CMD` was set by this Dockerfile.
    has_cmd: bool,
    labels: Texts,
    ports: BTreeSet<String>,
    steps: Vec<BuildStep>,
}

impl Dockerfile {
    /// The base image. `given` are values for `ARG`.
    ///
    /// # Errors
    /// When its name cannot be expanded.
    pub fn base(&self, given: &Texts) -> Result<String, DockerfileError> {
        let (line, image) = &self.from;
        let global = self.global(given)?;
        let image = expand(image, &|name| global.get(name).cloned());
        let image = image.map_err(|why| DockerfileError::new(*line, "FROM", why))?;
        if image.is_empty() { Err(DockerfileError::new(*line, "FROM", "is empty")) } else { Ok(image) }
    }

    /// `ARG` before `FROM`.
    fn global(&self, given: &Texts) -> Result<Texts, DockerfileError> {
        let mut all: Texts = PLATFORM.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        // A build may be given another value of these, too.
        for (name, value) in &mut all {
            if let Some(given) = given.get(name) {
                value.clone_from(given);
            }
        }
        let mut room = MAX_VARIABLES;
        for (line, name, value) in &self.before {
            let value = match (given.get(name), value) {
                (Some(given), _) => given.clone(),
                (None, Some(value)) => expand(value, &|name| all.get(name).cloned())
                    .map_err(|why| DockerfileError::new(*line, "ARG", why))?,
                (None, None) => continue,
            };
            take_room(&mut room, name, &value).map_err(|why| DockerfileError::new(*line, "ARG", why))?;
            all.insert(name.clone(), value);
        }
        Ok(all)
    }

    /// The steps in a guest of the base image, whose configuration is `base`. `given` are values
    /// for `ARG`.
    ///
    /// # Errors
    /// When a variable is invalid, or a value of `given` belongs to no `ARG`.
    pub fn plan(&self, base: &RunConfig, given: &Texts) -> Result<BuildPlan, DockerfileError> {
        let global = self.global(given)?;
        let known = |wanted: &String| {
            let own = self.rest.iter().filter_map(|placed| match &placed.instruction {
                Instruction::Arg(args) => Some(args),
                _ => None,
            });
            own.flatten().any(|(name, _)| name == wanted)
                || self.before.iter().any(|(_, name, _)| name == wanted)
                || PLATFORM.iter().any(|(name, _)| name == wanted)
                || is_proxy(wanted)
        };
        if let Some(name) = given.keys().find(|name| !known(name)) {
            return Err(DockerfileError::new(self.from.0, "ARG", format!("there is none of the name {name:?}")));
        }
        if let Some(instruction) = base.on_build.first() {
            let why = format!("the base image wants {instruction:?} (ONBUILD), which is not supported");
            return Err(DockerfileError::new(self.from.0, "FROM", why));
        }
        let env = base.env.iter().filter_map(|variable| variable.split_once('='));
        let or = |text: &str, otherwise: &str| if text.is_empty() { otherwise.to_owned() } else { text.to_owned() };
        let mut builder = Builder {
            given,
            global,
            proxies: proxies_of(given),
            args: Texts::new(),
            env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            variables: None,
            config: base.clone(),
            workdir: or(&base.working_dir, "/"),
            user: or(&base.user, "root"),
            has_cmd: false,
            labels: Texts::new(),
            ports: BTreeSet::new(),
            steps: Vec::new(),
        };
        for placed in &self.rest {
            builder.take(placed).map_err(|why| DockerfileError::new(placed.line, placed.name, why))?;
        }
        let Builder { env, mut config, workdir, user, labels, ports, steps, .. } = builder;
        config.env = env.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        (config.working_dir, config.user) = (workdir, user);
        let instructions = self.rest.iter().map(|placed| placed.text.clone()).collect();
        Ok(BuildPlan { steps, config, labels, ports, instructions })
    }
}

impl Builder<'_> {
    fn expand(&self, word: &str) -> Result<String, String> {
        expand(word, &|name| self.env.get(name).or_else(|| self.args.get(name)).cloned())
    }

    /// The variables of the next step.
    fn variables(&mut self) -> Arc<Texts> {
        let merged = || {
            // ENV takes precedence over ARG.
            let mut all = self.args.clone();
            all.extend(self.env.clone());
            all.extend(self.proxies.clone());
            Arc::new(all)
        };
        Arc::clone(self.variables.get_or_insert_with(merged))
    }

    /// Notes a change of the variables.
    fn changed(&mut self) -> Result<(), String> {
        self.variables = None;
        let bytes: usize = self.args.iter().chain(&self.env).map(|(name, value)| name.len() + value.len()).sum();
        if bytes > MAX_VARIABLES {
            return Err(format!("all variables together have at most {MAX_VARIABLES} bytes"));
        }
        Ok(())
    }

    fn step(&mut self, placed: &Placed, action: Action) -> Result<(), String> {
        if self.steps.len() >= MAX_STEPS {
            return Err(format!("at most {MAX_STEPS} instructions run in the guest"));
        }
        let env = self.variables();
        self.steps.push(BuildStep {
            line: placed.line,
            instruction: placed.name,
            text: placed.text.clone(),
            action,
            env,
            workdir: self.workdir.clone(),
            user: self.user.clone(),
        });
        Ok(())
    }

    fn take(&mut self, placed: &Placed) -> Result<(), String> {
        match &placed.instruction {
            Instruction::Run(command) => self.step(placed, Action::Run(argv(command, &self.config.shell)))?,
            Instruction::Copy(copy) => {
                let files = self.files(copy)?;
                self.step(placed, Action::Copy(files))?;
            }
            Instruction::Workdir(path) => {
                let path = self.expand(path)?;
                self.workdir = below(&self.workdir, &path);
                if self.workdir.len() > MAX_PATH {
                    return Err(format!("a path has at most {MAX_PATH} bytes"));
                }
                let dir = self.workdir.clone();
                self.step(placed, Action::MakeDir(dir))?;
            }
            Instruction::User(user) => {
                let user = self.expand(user)?;
                if user.is_empty() || user.contains([':', ' ']) {
                    return Err(format!("{user:?}: the name or the number of a user is wanted"));
                }
                self.user = user;
            }
            Instruction::Env(pairs) => {
                // The pairs of one instruction see only the variables before it.
                let (mut values, mut room) = (Vec::new(), MAX_VARIABLES);
                for (name, value) in pairs {
                    let value = self.expand(value)?;
                    take_room(&mut room, name, &value)?;
                    values.push((name.clone(), value));
                }
                self.env.extend(values);
                self.changed()?;
            }
            Instruction::Arg(pairs) => {
                for (name, value) in pairs {
                    let value = match (self.given.get(name), value) {
                        (Some(given), _) => given.clone(),
                        (None, Some(value)) => self.expand(value)?,
                        (None, None) => match self.global.get(name) {
                            Some(value) => value.clone(),
                            None => continue,
                        },
                    };
                    self.args.insert(name.clone(), value);
                    self.changed()?;
                }
            }
            Instruction::Cmd(command) => {
                self.config.cmd = argv(command, &self.config.shell);
                self.has_cmd = true;
            }
            Instruction::Entrypoint(command) => {
                self.config.entrypoint = argv(command, &self.config.shell);
                // The base image's arguments belong to its own entrypoint, and a shell's text has
                // no arguments.
                if !self.has_cmd || matches!(command, Command::Shell(_)) {
                    self.config.cmd.clear();
                }
            }
            Instruction::Label(pairs) => {
                for (name, value) in pairs {
                    self.labels.insert(self.expand(name)?, self.expand(value)?);
                    let bytes: usize = self.labels.iter().map(|(name, value)| name.len() + value.len()).sum();
                    if bytes > MAX_LABELS {
                        return Err(format!("all labels together have at most {MAX_LABELS} bytes"));
                    }
                }
            }
            Instruction::Expose(words) => {
                for word in words {
                    self.ports.extend(ports(&self.expand(word)?)?);
                    if self.ports.len() > MAX_PORTS {
                        return Err(format!("at most {MAX_PORTS} ports are wanted in all"));
                    }
                }
            }
        }
        Ok(())
    }

    fn files(&self, copy: &Copy) -> Result<CopyFiles, String> {
        let (mut sources, mut room) = (Vec::new(), MAX_VARIABLES);
        for source in &copy.sources {
            let source = self.expand(source)?;
            take_room(&mut room, "", &source)?;
            sources.push(source);
        }
        let to = self.expand(&copy.to)?;
        // A trailing `.` means the directory itself, even without a slash.
        let is_here = to.is_empty() || to == "." || to.ends_with("/.");
        let to = below(&self.workdir, if is_here { to.trim_end_matches('.') } else { &to });
        if sources.len() > 1 && !to.ends_with('/') {
            return Err(format!("{to:?}: several sources go to a directory, which ends with a slash"));
        }
        let owner = copy.owner.as_deref().map(|owner| self.expand(owner)).transpose()?;
        if let Some(owner) = owner.as_deref().filter(|owner| owner.is_empty() || owner.starts_with('-')) {
            return Err(format!("--chown={owner}: a user is wanted"));
        }
        let octal = |mode: &String| {
            let mode = self.expand(mode)?;
            let digits = u32::from_str_radix(&mode, 8).ok().filter(|bits| *bits <= 0o777);
            digits.ok_or_else(|| format!("--chmod={mode}: octal digits up to 777 are wanted"))
        };
        let mode = copy.mode.as_ref().map(octal).transpose()?;
        Ok(CopyFiles { sources, to, owner, mode })
    }
}
