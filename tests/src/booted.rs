//! One Linux boot for all tests of the host: a snapshot at the shell's prompt, in the cache
//! directory.
//!
//! Where guest kernels are interpreted a boot takes most of a minute, and a restore takes
//! milliseconds. The name of the snapshot's directory is a hash over everything that it depends on,
//! so another kernel, host or configuration uses another directory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clade_block::DiskConfig;
use clade_devices::virtio::block::BlockOptions;
use clade_devices::virtio::limiter::Limits;
use clade_devices::virtio::vsock::VsockOptions;
use clade_memory::Backing;
use clade_test_support::{CacheKey, Cid, skip};
use clade_vmm::vm::{
    ChildOptions, Context, DiskSpec, ForkImage, NetSpec, RestoreOptions, SnapshotOptions, Vm, VmConfig,
};

use crate::{Linux, PROMPT, Turn, can_have_taps, ext4};

/// The recipe's version: of the booted VM, and of the files beside the snapshot.
const VERSION: u32 = 2;
/// The snapshot's directory and the console's text, in the cached directory.
const SNAPSHOT: &str = "snapshot";
const CONSOLE: &str = "console";
const PAUSED: ChildOptions<'static> = ChildOptions { paused: true, erase: &[], before_start: None };
/// Least time of a disk request, so that a fork finds some in flight.
const LATENCY: std::time::Duration = std::time::Duration::from_millis(10);

/// A shell at its prompt, in a VM with an ext4 disk, an interface, sockets, entropy, a balloon and
/// two consoles.
#[derive(Clone, Debug)]
pub struct BootedLinux {
    /// The context of its children.
    pub context: Context,
    /// The image at the prompt.
    pub image: Arc<ForkImage>,
    /// The console's output until then.
    pub console: Arc<str>,
    /// The directory of its children's overlays and sockets.
    pub dir: PathBuf,
    /// Whether it has an interface.
    pub taps: bool,
}

impl BootedLinux {
    /// Restores it into a context of its own. Boots it if that has not been done on this host.
    /// `dir` is the directory of its children's overlays and sockets.
    ///
    /// `None`, after printing the reason, on a host that lacks a requirement.
    ///
    /// # Panics
    /// When it cannot be booted or restored.
    #[must_use]
    pub fn get(turn: &Turn, dir: &Path) -> Option<Self> {
        let taps = can_have_taps();
        let cached = booted(turn, taps)?;
        let context = turn.context(Backing::Huge);
        let image = restore(&context, &cached, dir).expect("a cached snapshot is restored");
        let console = fs::read_to_string(cached.join(CONSOLE)).expect("the cached console").into();
        Some(Self { context, image, console, dir: dir.to_owned(), taps })
    }

    /// Makes a child, paused at the prompt.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn child(&self, name: &str) -> Vm {
        Vm::from_image(&self.context, name, &self.image, PAUSED).expect("a child at the prompt")
    }
}

/// Returns the directory of the cached snapshot, of a VM with an interface or without. It is made
/// if it is missing, or cannot be restored. Tests of programs restore the `snapshot` in it.
///
/// `None`, after printing the reason, where Linux is not built or mkfs.ext4 is missing.
///
/// # Panics
/// When Linux cannot be booted.
#[must_use]
pub fn booted(turn: &Turn, taps: bool) -> Option<PathBuf> {
    let linux = Linux::find()?;
    // A snapshot of another version is refused, and made anew.
    let check = |dir: &Path| {
        let scratch = tempfile::tempdir().expect("a directory");
        restore(&turn.context(Backing::Huge), dir, scratch.path()).map(drop)
    };
    let quirks = turn.host().quirks();
    let settings = format!("{:?} {quirks:?} {}", config(Path::new("/"), taps, 0), quirks.kernel_args());
    let key = linux.files().iter().fold(CacheKey::new("booted", VERSION), |key, file| key.file(file));
    key.text(&settings).get(check, |dir| boot(turn, &linux, dir, taps))
}

/// A VM with every device, its disk and its socket in `dir`.
fn config(dir: &Path, taps: bool, cid: u64) -> VmConfig {
    let mut config = Linux::config(1);
    let disk = DiskConfig { latency: Some(LATENCY), ..DiskConfig::new(&dir.join("disk.img")) };
    config.disks = vec![DiskSpec { disk, device: BlockOptions::default() }];
    config.nets = if taps { vec![NetSpec::new("cladel%d")] } else { Vec::new() };
    config.vsock = Some(VsockOptions { cid, socket: dir.join("linux.vsock") });
    (config.rng, config.balloon, config.virtio_console) = (Some(Limits::default()), true, true);
    config
}

/// Boots it, and saves it in `dir` at its prompt.
fn boot(turn: &Turn, linux: &Linux, dir: &Path, taps: bool) -> Option<()> {
    let work = tempfile::tempdir().expect("a directory");
    if !formatted(&work.path().join("disk.img")) {
        return None;
    }
    let (context, cid) = (turn.context(Backing::Huge), Cid::take());
    let config = config(work.path(), taps, cid.number().into());
    let vm = linux.boot_as(&context, "vmlinux", "", config);
    let console = Linux::expect(&vm, 0, PROMPT);
    vm.snapshot(&dir.join(SNAPSHOT), SnapshotOptions::default()).expect("a snapshot of Linux");
    fs::write(dir.join(CONSOLE), console).expect("the console's text");
    Some(())
}

fn restore(context: &Context, cached: &Path, dir: &Path) -> Result<Arc<ForkImage>, String> {
    let (overlays, sockets) = (Some(dir.to_owned()), Some(dir.to_owned()));
    let options = RestoreOptions { overlays, sockets, ..RestoreOptions::default() };
    let image = ForkImage::restore(context, &cached.join(SNAPSHOT), &options);
    image.map_err(|error| clade_vmm::error_chain(&error))
}

/// Makes a disk with an empty ext4 at `path`; false, after printing the reason, where mkfs.ext4 is
/// missing.
///
/// # Panics
/// When the disk cannot be written.
#[must_use]
pub fn formatted(path: &Path) -> bool {
    File::create(path).and_then(|file| file.set_len(32 << 20)).expect("a disk");
    let is_there = ext4("mkfs.ext4", &["-q", "-F"], path);
    if !is_there {
        skip("linux", "mkfs.ext4 is missing");
    }
    is_there
}
