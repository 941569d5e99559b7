//! `resources/selfcheck` in a guest: a program that compares its registers, its memory and the
//! results of its system calls all the time, while its VM is forked, and in the children.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::{fs, iter};

use clade_memory::Backing;
use clade_test_support::wait_for;
use clade_tests::{Linux, PROMPT, Turn, skip};
use clade_vmm::boot::{BootImage, BootSource};
use clade_vmm::kvm::Quirks;
use clade_vmm::vm::{Context, Vm};

use crate::PAUSED;

/// Comparisons of all general registers that each VM must make.
const CHECKS: u64 = 1_000_000;
const FORKS: usize = 20;
const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 tsc=reliable";

/// A file of an initramfs, as the kernel unpacks it (`newc`).
fn packed(name: &str, mode: u32, data: &[u8]) -> Vec<u8> {
    let fields = [0, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    let mut bytes = b"070701".to_vec();
    bytes.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
    bytes.extend(name.bytes().chain(iter::once(0)));
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Returns the guest's initramfs with the program in it. `None` without a compiler; a skip is then
/// printed.
fn initramfs(linux: &Linux, dir: &Path) -> Option<PathBuf> {
    let (program, out) = (dir.join("selfcheck"), dir.join("initramfs"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/selfcheck/build.sh");
    let is_built = Command::new(script).arg(&program).status().is_ok_and(|status| status.success());
    if !is_built {
        skip("linux", "resources/selfcheck/build.sh fails: it needs gcc and a static C library");
        return None;
    }
    let mut bytes = fs::read(linux.file("initramfs.cpio")).unwrap();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(packed("bin/selfcheck", 0o100_755, &fs::read(program).unwrap()));
    bytes.extend(packed("TRAILER!!!", 0, &[]));
    fs::write(&out, bytes).unwrap();
    Some(out)
}

/// Returns a guest at its prompt, with the program.
fn booted(context: &Context, dir: &Path) -> Option<Vm> {
    let linux = Linux::find()?;
    let source = BootSource {
        kernel: BootImage::File(linux.file("vmlinux")),
        initrd: Some(BootImage::File(initramfs(&linux, dir)?)),
        cmdline: CMDLINE.to_owned(),
    };
    let vm = Vm::boot(context, "selfcheck", &Arc::new(Linux::config(1)), &source).unwrap();
    let _ = Linux::expect(&vm, 0, PROMPT);
    Some(vm)
}

/// Returns the console's output since `from`.
fn printed(vm: &Vm, from: u64) -> String {
    String::from_utf8_lossy(&vm.console().since(from)).into_owned()
}

/// Returns the number behind `name` in the last whole line of counts.
fn count(text: &str, name: &str) -> Option<u64> {
    let whole = &text[..text.rfind('\n')?];
    let line = whole.lines().rev().find(|line| line.starts_with("selfcheck: ") && line.contains(" s regs "))?;
    line.split_whitespace().skip_while(|word| *word != name).nth(1)?.parse().ok()
}

/// Waits until a VM's program has made [`CHECKS`] further comparisons, all of them right.
fn goes_on(vm: &Vm, from: u64, before: u64) {
    let made = wait_for("further checks", || {
        let text = printed(vm, from);
        assert_eq!(vm.stopped(), None, "{text}");
        count(&text, "regs").filter(|regs| *regs >= before + CHECKS).map(|_| text)
    });
    assert!(!made.contains("selfcheck: wrong") && !made.contains("selfcheck: died"), "{}:\n{made}", vm.name());
    for name in ["errors", "deaths"] {
        assert_eq!(count(&made, name), Some(0), "{made}");
    }
}

/// Whether programs see AVX, as selfcheck prints first.
fn sees_avx(text: &str) -> bool {
    const AVX: u64 = 1 << 2;
    let line = text.lines().find_map(|line| line.trim_end().strip_prefix("selfcheck: XCR0 "));
    let shown = line.unwrap_or_else(|| panic!("no XCR0 in {text}"));
    let xcr0 = u64::from_str_radix(shown.trim_start_matches("0x"), 16).unwrap_or_else(|_| panic!("{shown:?}"));
    xcr0 & AVX != 0
}

/// On kvm-pvm a program sees the CPU's AVX, whose registers the guest's kernel does not save, unless the CPU
/// lets KVM answer a program's CPUID. An argument of `Quirks` keeps the C library from using AVX: without it,
/// copies are wrong.
fn copies_need_the_tunables(vm: &Vm) {
    // Three programs on one processor: each is interrupted by the others.
    let from = vm.console().position();
    vm.type_in(b"selfcheck 8 lll\n");
    let kept = Linux::expect(vm, from, &format!("]\r\n{PROMPT}"));
    assert!(count(&kept, "libc").is_some_and(|copies| copies > 0), "{kept}");
    assert_eq!(count(&kept, "errors"), Some(0), "{kept}");
    if !sees_avx(&kept) {
        println!("programs of this host's guests see no AVX");
        return;
    }
    let from = vm.console().position();
    vm.type_in(b"GLIBC_TUNABLES= selfcheck 100000 lll\n");
    wait_for("a copy that is wrong", || count(&printed(vm, from), "errors").filter(|errors| *errors > 0));
    let from = vm.console().position();
    vm.type_in(b"\x03");
    let _ = Linux::expect(vm, from, PROMPT);
}

#[test]
fn programs_find_nothing_wrong_while_their_vm_is_forked_and_in_its_children() {
    let Some(turn) = Turn::take() else { return };
    let context = turn.context(Backing::Huge);
    let dir = tempfile::tempdir().unwrap();
    let Some(parent) = booted(&context, dir.path()) else { return };
    if context.host().quirks() == Quirks::Pvm {
        copies_need_the_tunables(&parent);
    }
    let from = parent.console().position();
    parent.type_in(b"selfcheck 100000 rtcmzl\n");
    let begun = wait_for("the first counts", || count(&printed(&parent, from), "regs"));
    let mut images = Vec::new();
    for _ in 0..FORKS {
        images = vec![parent.fork().unwrap().0];
    }
    let now = count(&printed(&parent, from), "regs").unwrap_or(begun);
    let child = Vm::from_image(&context, "child", &images[0], PAUSED).unwrap();
    let born = child.console().position();
    child.resume().unwrap();
    goes_on(&child, born, now);
    goes_on(&parent, from, now);
}
