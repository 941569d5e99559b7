//! A distribution's stock kernel: Debian's for clouds, fetched by its package's name, with our
//! userland, and a fork of it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clade_memory::Backing;
use clade_tests::{Linux, Turn};
use clade_vmm::vm::{ChildOptions, Vm, VmConfig};

const PACKAGE: &str = "linux-image-cloud-amd64";
/// Features that it can do without: several processors, wiping of pages that it hands out,
/// workarounds, its tracing's files, and tests of its ciphers: the one of Diffie-Hellman takes
/// hours where it is interpreted.
const EXTRA: &str = "nr_cpus=1 init_on_alloc=0 mitigations=off nowatchdog cryptomgr.notests \
                     initcall_blacklist=tracer_init_tracefs,trace_eval_init";

fn run(program: &str, args: &[&str], dir: &Path) -> String {
    let output = Command::new(program).args(args).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The kernel of the package that `PACKAGE` depends on, unpacked in `dir`.
fn fetch(dir: &Path) -> PathBuf {
    let depends = run("apt-cache", &["depends", PACKAGE], dir);
    let image = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-")).unwrap();
    run("apt-get", &["download", "-qq", &format!("linux-image-{image}")], dir);
    let package = std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
    run("dpkg-deb", &["-x", package.to_str().unwrap(), "."], dir);
    dir.join("boot").join(format!("vmlinuz-{image}"))
}

#[test]
#[ignore = "long: a quarter of an hour where guest kernels are interpreted"]
fn debians_cloud_kernel_boots() {
    let Some(linux) = Linux::find() else { return };
    let Some(turn) = Turn::take() else { return };
    let context = turn.context(Backing::Huge);
    let dir = tempfile::tempdir().unwrap();
    let kernel = fetch(dir.path());
    let config = VmConfig::new(256 << 20, 1).unwrap();
    let begun = Instant::now();
    let vm = linux.boot_as(&context, kernel.to_str().unwrap(), EXTRA, config);
    let seen = Linux::expect(&vm, 0, "clade-guest ready");
    println!("{}: ready after {:.0} s", kernel.display(), begun.elapsed().as_secs_f64());
    assert!(seen.contains("cloud-amd64"), "{seen}");
    let (image, _) = vm.fork().unwrap();
    let child = Vm::from_image(&context, "child", &image, ChildOptions::default()).unwrap();
    for vm in [&child, &vm] {
        let release = Linux::ask(vm, "read -r a b c d </proc/version; echo $c");
        assert!(release.ends_with("cloud-amd64"), "{release}");
    }
}
