//! The Linux guest: where its files are, booting it, and its shell.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use clade_vmm::boot::{BootSource, Image};
use clade_vmm::vm::{Context, Vm, VmConfig};

use crate::{required, skip};

/// The shell's prompt.
pub const PROMPT: &str = "clade# ";
const MEMORY: u64 = 64 << 20;
/// What the command line's default is.
const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 tsc=reliable";

/// Whether a line is the kernel's own: on a busy host it now and then says how long a timer took.
fn is_kernels(line: &str) -> bool {
    line.starts_with("hrtimer: interrupt took")
}

/// The directory with the guest's files; built if it is required.
#[derive(Clone, Debug)]
pub struct Linux {
    dir: PathBuf,
}

impl Linux {
    /// `None`, having said so, when it is not built and not required.
    ///
    /// # Panics
    /// When it is required and cannot be built.
    #[must_use]
    pub fn find() -> Option<Self> {
        if let Some(dir) = std::env::var_os("CLADE_LINUX_GUEST").filter(|d| !d.is_empty()) {
            return Some(Self { dir: dir.into() });
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/linux/build.sh");
        let mut command = Command::new(script);
        if !required("linux") {
            command.arg("--path").stderr(Stdio::null());
        }
        let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().expect("the guest's build script");
        if !output.status.success() {
            skip("linux", "the Linux guest is not built (resources/linux/build.sh builds it)");
            return None;
        }
        let text = String::from_utf8_lossy(&output.stdout);
        Some(Self { dir: text.lines().last().expect("the guest's directory").into() })
    }

    /// Starts booting `kernel` (a file of the guest), with `extra` on the default command line.
    ///
    /// # Panics
    /// When it cannot be loaded.
    #[must_use]
    pub fn boot(&self, context: &Context, kernel: &str, cpus: u64, extra: &str) -> Vm {
        self.boot_as(context, kernel, extra, Self::config(cpus))
    }

    /// What it is booted with by default.
    ///
    /// # Panics
    /// When no VM can have so many vCPUs.
    #[must_use]
    pub fn config(cpus: u64) -> VmConfig {
        VmConfig::new(MEMORY, cpus).expect("a configuration")
    }

    /// Starts booting a VM of `config`.
    ///
    /// # Panics
    /// When it cannot be loaded.
    #[must_use]
    pub fn boot_as(&self, context: &Context, kernel: &str, extra: &str, config: VmConfig) -> Vm {
        let config = Arc::new(config);
        let source = BootSource {
            kernel: Image::File(self.dir.join(kernel)),
            initrd: Some(Image::File(self.dir.join("initramfs.cpio"))),
            cmdline: format!("{CMDLINE} {extra}").trim_end().to_owned(),
        };
        Vm::boot(context, "linux", &config, &source).expect("Linux is loaded")
    }

    /// Waits for `text` on the console after `position`; returns everything since.
    ///
    /// # Panics
    /// When it does not come.
    #[must_use]
    pub fn expect(vm: &Vm, position: u64, text: &str, patience: Duration) -> String {
        let (seen, found) = vm.console().wait_for(position, text, patience);
        assert!(found, "{} did not print {text:?} within {patience:?} ({:?}):\n{seen}", vm.name(), vm.stopped());
        seen
    }

    /// Types a line into the shell of a running VM, and returns what came up to the next prompt.
    ///
    /// # Panics
    /// When the shell does not answer.
    #[must_use]
    pub fn ask(vm: &Vm, line: &str, patience: Duration) -> String {
        let from = vm.console().position();
        assert_eq!(vm.type_in(format!("{line}\n").as_bytes()), line.len() + 1, "the console takes a line");
        // With the prompt, or its rest would be taken for the beginning of the next answer.
        let text = Self::expect(vm, from, &format!("]\r\n{PROMPT}"), patience);
        let lines = text.split("[done ").next().unwrap_or("").lines().map(str::trim);
        lines.filter(|l| !l.is_empty() && !l.ends_with(line) && !is_kernels(l)).collect::<Vec<_>>().join("\n")
    }
}
