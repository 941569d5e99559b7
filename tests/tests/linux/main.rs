//! Linux, with one device of every kind: booted once, and every test goes on in a fork of that.
//! Where guest kernels are interpreted a boot takes most of a minute. `boots` has the tests that
//! boot for themselves; they come first, so that no processor waits for the boot that is shared.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod boots;
mod clones;
mod cloud;
mod devices;
mod shell;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use clade_devices::disk::DiskConfig;
use clade_devices::virtio::block::BlockOptions;
use clade_devices::virtio::limiter::Limits;
use clade_devices::virtio::vsock::VsockOptions;
use clade_memory::Backing;
use clade_tests::{Linux, PROMPT, Turn, can_have_taps, ext4, skip};
use clade_vmm::vm::{ChildOptions, Context, DiskSpec, ForkImage, NetSpec, Vm};

/// How long a boot may take, on a machine with other things to do.
const BOOT: Duration = Duration::from_secs(300);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
/// What a test may take before it is ended.
const TIMEOUT: Duration = Duration::from_secs(1800);
const PAUSED: ChildOptions<'static> = ChildOptions { paused: true, erase: &[], before_start: None };
/// What a request to the shared disk takes at least, so that a fork finds some in flight.
const LATENCY: Duration = Duration::from_millis(10);

/// A shell at its prompt, in a VM with a disk, an interface, sockets, entropy, a balloon and two
/// consoles.
#[derive(Clone)]
struct Booted {
    context: Context,
    image: Arc<ForkImage>,
    /// What was on the console until then.
    console: Arc<str>,
    /// Where its disk and its sockets are.
    dir: PathBuf,
    taps: bool,
}

impl Booted {
    /// Boots it the first time.
    fn get(turn: &Turn) -> Option<Self> {
        static BOOTED: Mutex<Option<Booted>> = Mutex::new(None);
        let mut booted = BOOTED.lock().unwrap_or_else(PoisonError::into_inner);
        if booted.is_none() {
            *booted = Some(Self::boot(turn)?);
        }
        booted.clone()
    }

    fn boot(turn: &Turn) -> Option<Self> {
        let linux = Linux::find()?;
        let dir = directory();
        let disk = formatted(&dir, Some(LATENCY))?;
        let taps = can_have_taps();
        let context = turn.context(Backing::Huge);
        let mut config = Linux::config(1);
        config.disks = vec![disk];
        config.nets = if taps { vec![NetSpec::new("cladel%d")] } else { Vec::new() };
        let cid = 0x2000_0000 + u64::from(std::process::id()) * 64;
        config.vsock = Some(VsockOptions { cid, socket: dir.join("linux.vsock") });
        (config.rng, config.balloon, config.virtio_console) = (Some(Limits::default()), true, true);
        let vm = linux.boot_as(&context, "vmlinux", "", config);
        let console = Linux::expect(&vm, 0, PROMPT, BOOT).into();
        let (image, _) = vm.fork().unwrap();
        Some(Self { context, image, console, dir, taps })
    }

    fn child(&self, name: &str) -> Vm {
        Vm::from_image(&self.context, name, &self.image, PAUSED).unwrap()
    }
}

/// An empty directory of this run. Nothing is dropped at the end of a program with tests, so what
/// the last run left there goes now.
fn directory() -> PathBuf {
    static OURS: OnceLock<File> = OnceLock::new();
    let within = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let ours = OURS.get_or_init(|| File::create(within.join("linux.lock")).unwrap());
    ours.lock().unwrap();
    let dir = within.join("linux");
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{}: {error}", dir.display()),
        _ => {}
    }
    fs::create_dir(&dir).unwrap();
    dir
}

/// A disk with an empty ext4 in `dir`; `None`, having said so, where there is no mkfs.ext4.
fn formatted(dir: &Path, latency: Option<Duration>) -> Option<DiskSpec> {
    let path = dir.join("disk.img");
    File::create(&path).unwrap().set_len(32 << 20).unwrap();
    if !ext4("mkfs.ext4", &["-q", "-F"], &path) {
        skip("linux", "there is no mkfs.ext4");
        return None;
    }
    Some(DiskSpec { disk: DiskConfig { latency, ..DiskConfig::new(&path) }, device: BlockOptions::default() })
}

/// Asks a paused VM's shell, and pauses it again.
fn ask_all(vm: &Vm, line: &str) -> String {
    vm.resume().unwrap();
    let answer = Linux::ask(vm, line, ANSWER_TIMEOUT);
    vm.pause().unwrap();
    answer
}

/// The last line of the answer: the kernel has something to say before it at times.
fn ask(vm: &Vm, line: &str) -> String {
    ask_all(vm, line).lines().last().unwrap_or_default().to_owned()
}
