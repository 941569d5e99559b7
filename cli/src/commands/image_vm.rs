//! `clade run --image`: the disk of an image, an initramfs with the agent, and the image's program.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clade_agent_client::proto::{ENTRYPOINT_PATH, Entrypoint};
use clade_api::{check_name, runtime_dir};
use clade_block::DiskConfig;
use clade_devices::virtio::block::BlockOptions;
use clade_devices::virtio::vsock::VsockOptions;
use clade_oci::{Image, ImageStore, RunConfig};
use clade_vmm::vm::DiskSpec;
use tempfile::NamedTempFile;

use crate::commands::args::{ProgramFlags, RunArgs};
use crate::commands::devices::random_cid;
use crate::commands::image::{PullFlags, open_store, parse, pull};
use crate::commands::modules::{self, Module};
use crate::commands::run::name;
use crate::commands::{Failure, guest_agent};
use crate::linux_guest::LinuxGuest;

/// Words for the kernel's command line: the agent's option, and critical messages alone on the console, which is the
/// program's.
pub(super) const KERNEL_WORDS: [&str; 2] = ["clade.root=/dev/vda", "loglevel=3"];

const INITRAMFS_PREFIX: &str = ".initramfs-";

/// Signals that end programs in order: nginx by QUIT, PostgreSQL by INT, httpd by WINCH, systemd by RTMIN+3.
const SIGNALS: [(&str, i32); 9] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("KILL", 9),
    ("USR1", 10),
    ("USR2", 12),
    ("TERM", 15),
    ("WINCH", 28),
    ("RTMIN+3", 37),
];

/// The parts of an image's VM.
#[derive(Debug)]
pub(super) struct ImageVm {
    pub(super) kernel: PathBuf,
    /// Removed when dropped.
    pub(super) initrd: NamedTempFile,
    pub(super) disk: DiskSpec,
    pub(super) vsock: VsockOptions,
}

/// The agent's program to run.
fn entrypoint_of(config: &RunConfig, command: &[String], flags: &ProgramFlags) -> Entrypoint {
    let given = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    // The image's arguments are those of its own entrypoint.
    let (entrypoint, own) = match &flags.entrypoint {
        Some(entrypoint) => (given(entrypoint).into_iter().collect(), &[][..]),
        None => (config.entrypoint.clone(), &config.cmd[..]),
    };
    let cmd = if command.is_empty() { own } else { command };
    let variables = config.env.iter().filter_map(|variable| variable.split_once('='));
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    Entrypoint {
        args: entrypoint.iter().chain(cmd).cloned().collect(),
        env: variables.chain(flags.env.iter().cloned()).collect(),
        cwd: flags.workdir.clone().or_else(|| given(&config.working_dir)),
        user: flags.user.clone().or_else(|| given(&config.user)),
        stop_signal: signal_of(&config.stop_signal),
        share_env: true,
        power_off: true,
    }
}

/// The number of a signal, of its name or its number as images have them. None if it is neither.
fn signal_of(text: &str) -> Option<i32> {
    let name = text.strip_prefix("SIG").unwrap_or(text);
    let named = SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    named.or_else(|| text.parse().ok()).filter(|number| (1..=64).contains(number))
}

/// The requirements of any image's VM.
#[derive(Debug)]
pub(super) struct Tools {
    agent: PathBuf,
    kernel: PathBuf,
    modules: Vec<Module>,
}

impl Tools {
    /// # Errors
    /// When one of them is missing.
    pub(super) fn find(args: &RunArgs) -> Result<Self, Failure> {
        // The name becomes a part of a path.
        check_name(&name(args)).map_err(Failure::input)?;
        let agent = guest_agent::find_or_build()?;
        let kernel = match &args.kernel {
            Some(kernel) => kernel.clone(),
            None => LinuxGuest::build().map_err(Failure::run)?.kernel,
        };
        let modules = args.modules.as_deref().map(modules::needed).transpose().map_err(Failure::input)?;
        Ok(Self { agent, kernel, modules: modules.unwrap_or_default() })
    }
}

/// Returns the image of that name. A missing image is pulled.
pub(super) fn fetch(store: &ImageStore, image: &str, flags: &PullFlags) -> Result<Image, Failure> {
    match store.find(image) {
        Ok(image) => Ok(image),
        Err(clade_oci::ImageError::NotFound(_)) => pull(store, &parse(image)?, (flags, None), false),
        Err(error) => Err(Failure::input(error)),
    }
}

impl ImageVm {
    /// Pulls the image, if it is missing, and makes the parts of its VM.
    pub(super) fn prepare(args: &RunArgs, image: &str) -> Result<Self, Failure> {
        // Before an image is fetched that the kernel cannot run.
        let tools = Tools::find(args)?;
        let store = open_store()?;
        let image = fetch(&store, image, &args.pull)?;
        let entrypoint = entrypoint_of(&image.config, &args.command, &args.program);
        Self::of(args, &tools, &store.disk(&image.digest), &entrypoint)
    }

    /// The same for a VM whose agent starts no program.
    pub(super) fn idle(args: &RunArgs, tools: &Tools, (store, image): (&ImageStore, &Image)) -> Result<Self, Failure> {
        let own = entrypoint_of(&image.config, &[], &args.program);
        // Programs of a build name their directory, and sandboxes of a template have the template's.
        let entrypoint = Entrypoint { args: Vec::new(), cwd: None, power_off: false, ..own };
        Self::of(args, tools, &store.disk(&image.digest), &entrypoint)
    }

    fn of(args: &RunArgs, tools: &Tools, disk: &Path, entrypoint: &Entrypoint) -> Result<Self, Failure> {
        let mut disk = DiskConfig::new(disk);
        // Shared by all VMs: a VM's writes are in its overlay.
        disk.ephemeral = true;
        let dir = runtime_dir();
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string()).map_err(Failure::Input)?;
        let initrd = initramfs(&dir, &tools.agent, entrypoint, &tools.modules).map_err(Failure::Run)?;
        let socket = dir.join(format!("{}.vsock", name(args)));
        let vsock = VsockOptions { cid: random_cid(), socket };
        let disk = DiskSpec { disk, device: BlockOptions::default() };
        Ok(Self { kernel: tools.kernel.clone(), initrd, disk, vsock })
    }
}

/// An archive of cpio's newc format, which the kernel unpacks.
#[derive(Debug, Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = content.len();
        let fields: [usize; 13] = [
            self.entries as usize,
            mode as usize,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0 as usize,
            device.1 as usize,
            name.len() + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        fields.iter().for_each(|field| self.bytes.extend(format!("{field:08X}").as_bytes()));
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), b"");
        self.bytes
    }
}

/// Makes an initramfs: the agent as PID 1, a console, its program to run, and the modules that it
/// loads first, in order.
fn initramfs(dir: &Path, agent: &Path, entrypoint: &Entrypoint, modules: &[Module]) -> anyhow::Result<NamedTempFile> {
    let program = fs::read(agent).with_context(|| agent.display().to_string())?;
    let mut cpio = Cpio::default();
    for name in ["dev", "proc", "sys", "newroot", "etc", "etc/clade"] {
        cpio.add(name, 0o040_755, (0, 0), b"");
    }
    cpio.add("dev/console", 0o020_600, (5, 1), b"");
    cpio.add(ENTRYPOINT_PATH.trim_start_matches('/'), 0o100_600, (0, 0), &serde_json::to_vec(entrypoint)?);
    cpio.add("init", 0o100_755, (0, 0), &program);
    for dir in ["lib", "lib/clade", "lib/clade/modules"].iter().filter(|_| !modules.is_empty()) {
        cpio.add(dir, 0o040_755, (0, 0), b"");
    }
    for (at, Module { name, content }) in modules.iter().enumerate() {
        cpio.add(&format!("lib/clade/modules/{at:03}-{name}.ko"), 0o100_644, (0, 0), content);
    }
    let mut file = locked_file(dir).with_context(|| dir.display().to_string())?;
    file.write_all(&cpio.end()).with_context(|| file.path().display().to_string())?;
    Ok(file)
}

/// Makes the file of an initramfs, and removes those of commands that a signal has ended. The lock shows that this
/// command has not ended.
fn locked_file(dir: &Path) -> io::Result<NamedTempFile> {
    for entry in fs::read_dir(dir)?.filter_map(Result::ok) {
        let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(INITRAMFS_PREFIX));
        // A file that cannot be opened, locked or removed is another user's, or has been removed meanwhile.
        if is_ours && File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok()) {
            let _ = fs::remove_file(entry.path());
        }
    }
    loop {
        let file = NamedTempFile::with_prefix_in(INITRAMFS_PREFIX, dir)?;
        // Another command may have removed the file before it was locked.
        if file.as_file().try_lock().is_ok() && file.as_file().metadata()?.nlink() > 0 {
            return Ok(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_command_takes_the_place_of_cmd_and_not_of_the_entrypoint() {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let config = RunConfig {
            entrypoint: texts(&["/bin/entry"]),
            cmd: texts(&["a"]),
            env: texts(&["A=b=c", "nothing"]),
            working_dir: "/srv".into(),
            user: String::new(),
            stop_signal: "SIGQUIT".into(),
            ..RunConfig::default()
        };
        let none = ProgramFlags::default();
        let own = entrypoint_of(&config, &[], &none);
        assert_eq!((own.args, own.cwd, own.user), (texts(&["/bin/entry", "a"]), Some("/srv".into()), None));
        assert_eq!((own.env, own.stop_signal), (BTreeMap::from([("A".into(), "b=c".into())]), Some(3)));
        for (text, number) in
            [("", None), ("15", Some(15)), ("SIGRTMIN+3", Some(37)), ("INT", Some(2)), ("0", None), ("X", None)]
        {
            assert_eq!(signal_of(text), number, "{text}");
        }
        assert_eq!(entrypoint_of(&config, &texts(&["b", "c"]), &none).args, texts(&["/bin/entry", "b", "c"]));
    }

    #[test]
    fn flags_take_the_place_of_the_images_settings() {
        let config = RunConfig {
            entrypoint: vec!["/bin/entry".into()],
            cmd: vec!["a".into()],
            env: vec!["A=1".into(), "B=2".into()],
            working_dir: "/srv".into(),
            user: "app".into(),
            ..RunConfig::default()
        };
        let env = vec![("A".to_owned(), "3".to_owned()), ("C".to_owned(), String::new())];
        let flags = ProgramFlags {
            env,
            user: Some("0:7".into()),
            workdir: Some("/tmp".into()),
            entrypoint: Some("/bin/sh".into()),
        };
        let own = entrypoint_of(&config, &["-c".into()], &flags);
        assert_eq!(
            (own.args, own.cwd, own.user),
            (vec!["/bin/sh".into(), "-c".into()], flags.workdir.clone(), flags.user.clone())
        );
        let env = [("A", "3"), ("B", "2"), ("C", "")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(own.env, BTreeMap::from(env));
        assert_eq!(entrypoint_of(&config, &[], &flags).args, ["/bin/sh"], "cmd is the image's own entrypoint's");
        let flags = ProgramFlags { entrypoint: Some(String::new()), ..ProgramFlags::default() };
        let words = ["x", "", "y"].map(str::to_owned);
        assert_eq!(entrypoint_of(&config, &words, &flags).args, words, "no entrypoint");
    }

    #[test]
    fn an_initramfs_of_a_command_that_was_killed_is_removed_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let running = locked_file(dir.path()).unwrap();
        for name in [".initramfs-killed", "initramfs-of-a-user"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let next = locked_file(dir.path()).unwrap();
        let names: BTreeSet<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        let user = dir.path().join("initramfs-of-a-user");
        assert_eq!(names, BTreeSet::from([running.path().to_owned(), next.path().to_owned(), user]));
    }

    #[test]
    fn an_initramfs_is_one_to_cpio() {
        let dir = tempfile::tempdir().unwrap();
        let agent = dir.path().join("agent");
        fs::write(&agent, "a program").unwrap();
        let entrypoint = entrypoint_of(&RunConfig::default(), &[], &ProgramFlags::default());
        let module = |name: &str| Module { name: name.to_owned(), content: name.as_bytes().to_vec() };
        let modules = [module("virtio"), module("virtio_ring")];
        let file = initramfs(dir.path(), &agent, &entrypoint, &modules).unwrap();
        let list = Command::new("cpio").args(["-itv", "--quiet"]).stdin(Stdio::from(file.reopen().unwrap())).output();
        let Ok(list) = list else {
            clade_test_support::skipped("cpio is not installed");
            return;
        };
        let list = String::from_utf8(list.stdout).unwrap();
        let line = |name: &str| list.lines().find(|line| line.ends_with(name)).unwrap_or_else(|| panic!("{list}"));
        assert!(line(" init").starts_with("-rwxr-xr-x") && line(" init").contains(" 9 "), "{list}");
        assert!(line(" dev/console").starts_with("crw-------") && line(" dev/console").contains("5,   1"), "{list}");
        assert!(line(" lib/clade/modules/000-virtio.ko").starts_with("-rw-r--r--"), "{list}");
        assert!(line(" lib/clade/modules/001-virtio_ring.ko").contains(" 11 "), "{list}");
        assert_eq!(list.lines().count(), 14, "{list}");
    }
}
