//! The Linux guest: its files, its boot, and its shell.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use clade_test_support::Patience;
use clade_vmm::boot::{BootImage, BootSource};
use clade_vmm::kvm::Quirks;
use clade_vmm::vm::{Context, Vm, VmConfig};

use crate::{required, skip};

/// The shell's prompt.
pub const PROMPT: &str = "clade# ";
const MEMORY: u64 = 64 << 20;
/// Limit of running time for the guest's answer. Where guest kernels are interpreted a boot has
/// taken 300 s on a busy machine.
const LIMIT: Duration = Duration::from_secs(1200);
/// Most repetitions of a program that died by SIGSEGV on kvm-pvm.
const MAX_AGAIN: u32 = 3;
/// Number of such deaths in this process.
static DEATHS: AtomicU32 = AtomicU32::new(0);
thread_local! {
    /// Whether this thread has seen such a death.
    static DIED_HERE: Cell<bool> = const { Cell::new(false) };
}
/// The default command line.
const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 tsc=reliable";

/// Returns whether a line is the kernel's own: on a busy host it sometimes reports a slow timer.
fn is_kernels(line: &str) -> bool {
    line.starts_with("hrtimer: interrupt took")
}

/// The directory with the guest's files; built if it is required.
#[derive(Clone, Debug)]
pub struct Linux {
    dir: PathBuf,
}

impl Linux {
    /// `None`, after printing the reason, when the guest is neither built nor required.
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

    /// Returns the path of a file of the guest.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Starts booting `kernel` (a file of the guest), with `extra` on the default command line.
    ///
    /// # Panics
    /// When it cannot be loaded.
    #[must_use]
    pub fn boot(&self, context: &Context, kernel: &str, cpus: u64, extra: &str) -> Vm {
        self.boot_as(context, kernel, extra, Self::config(cpus))
    }

    /// Returns the default configuration.
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
            kernel: BootImage::File(self.dir.join(kernel)),
            initrd: Some(BootImage::File(self.dir.join("initramfs.cpio"))),
            cmdline: format!("{CMDLINE} {extra}").trim_end().to_owned(),
        };
        Vm::boot(context, "linux", &config, &source).expect("Linux is loaded")
    }

    /// Returns the files that a boot of `vmlinux` reads.
    pub(crate) fn files(&self) -> [PathBuf; 2] {
        ["vmlinux", "initramfs.cpio"].map(|name| self.dir.join(name))
    }

    /// Waits for `text` on the console after `position`; returns everything since.
    ///
    /// # Panics
    /// When it does not come.
    #[must_use]
    pub fn expect(vm: &Vm, position: u64, text: &str) -> String {
        Self::expect_any(vm, position, &[text])
    }

    /// Waits for one of `texts` on the console after `position`; returns everything since.
    ///
    /// # Panics
    /// When no text comes.
    #[must_use]
    pub fn expect_any(vm: &Vm, position: u64, texts: &[&str]) -> String {
        let mut patience = Patience::new(LIMIT);
        loop {
            // Read before the console, so that no output comes after the last check.
            let stopped = vm.stopped();
            let (seen, _) = vm.console().wait_for(position, texts[0], Duration::from_millis(50));
            Self::has_died(vm, position);
            if texts.iter().any(|text| seen.contains(text)) {
                return seen;
            }
            let goes_on = stopped.is_none() && patience.tick();
            assert!(goes_on, "{} did not print one of {texts:?} ({stopped:?}):\n{seen}", vm.name());
        }
    }

    /// Types a line into the shell of a running VM, and returns the output up to the next prompt. A
    /// line whose program dies by SIGSEGV on kvm-pvm is typed again (`Linux::again`), so it must be
    /// safe to run twice.
    ///
    /// # Panics
    /// When the shell does not answer.
    #[must_use]
    pub fn ask(vm: &Vm, line: &str) -> String {
        Self::again(vm, line, || {
            let from = vm.console().position();
            assert_eq!(vm.type_in(format!("{line}\n").as_bytes()), line.len() + 1, "the console takes a line");
            // With the prompt, or its rest would be taken for the beginning of the next answer.
            let text = Self::expect(vm, from, &format!("]\r\n{PROMPT}"));
            let lines = text.split("[done ").next().unwrap_or("").lines().map(str::trim);
            lines.filter(|l| !l.is_empty() && !l.ends_with(line) && !is_kernels(l)).collect::<Vec<_>>().join("\n")
        })
    }

    /// Calls `once`. On kvm-pvm a guest's program sometimes dies by SIGSEGV, forked or not
    /// (docs/selfcheck.md): there, and only for that, `once` is repeated, at most [`MAX_AGAIN`]
    /// times. Each repetition is printed and counted.
    ///
    /// # Panics
    /// When the program dies every time.
    fn again<T>(vm: &Vm, what: &str, mut once: impl FnMut() -> T) -> T {
        for tried in 0.. {
            let from = vm.console().position();
            let done = once();
            if !Self::has_died(vm, from) {
                return done;
            }
            count_again(what);
            assert!(tried < MAX_AGAIN, "{what}: the guest's program has died {} times", tried + 1);
        }
        unreachable!("the last try returns or fails")
    }

    /// Returns whether a program of the guest has died by SIGSEGV on kvm-pvm, by the console's
    /// output after `from`. Notes it for [`rerun`].
    pub fn has_died(vm: &Vm, from: u64) -> bool {
        let seen = vm.console().since(from);
        let seen = String::from_utf8_lossy(&seen);
        let is_dead = vm.context().host().quirks() == Quirks::Pvm
            && ["Segmentation fault", "[done 139]"].iter().any(|text| seen.contains(text));
        if is_dead {
            DIED_HERE.set(true);
        }
        is_dead
    }
}

/// Runs a test whose lines cannot be repeated one by one. The test is run again when it fails and a
/// program of its guests has died (`Linux::has_died`), at most `MAX_AGAIN` times.
pub fn rerun(test: impl Fn()) {
    for tried in 0.. {
        DIED_HERE.set(false);
        let Err(panic) = catch_unwind(AssertUnwindSafe(&test)) else { return };
        if !DIED_HERE.get() || tried == MAX_AGAIN {
            resume_unwind(panic);
        }
        count_again(thread::current().name().unwrap_or("a test"));
    }
}

fn count_again(what: &str) {
    // Relaxed: a number that is printed.
    let count = DEATHS.fetch_add(1, Ordering::Relaxed) + 1;
    println!("a guest's program died by SIGSEGV on kvm-pvm, {count} so far in these tests; again: {what}");
}
