//! Guests that were booted once on this host. Tests of programs restore their snapshots.

use std::fs;
use std::path::Path;

use clade_test_support::{CacheKey, Cid, TapName, wait_for_within, wait_until_within};
use clade_vmm::kvm::Host;

use crate::agent::{BOOT, WAIT};
use crate::image::{guest, resource};
use crate::python::layout;
use crate::tool::{Answer, Runtime, stem, taps, wait_until};

/// The snapshot, in a cached directory.
const SNAPSHOT: &str = "snapshot";
const INITRAMFS: &str = include_str!("../../../resources/agent/initramfs.sh");
const SERVER: &str = include_str!("ports_server.py");

/// Returns the kernel arguments for a guest on this host, beside its command line.
fn kernel_args() -> &'static str {
    Host::open().unwrap().quirks().kernel_args()
}

/// Refuses a snapshot of another format.
fn check(dir: &Path) -> Result<(), String> {
    let runtime = Runtime::new();
    let shown = runtime.clade(&["snapshot", "show", dir.join(SNAPSHOT).to_str().unwrap()]);
    (shown.code == Some(0)).then_some(()).ok_or(shown.stderr)
}

fn snapshot(runtime: &Runtime, vm: &str, dir: &Path) {
    let saved = runtime.clade(&["snapshot", vm, dir.join(SNAPSHOT).to_str().unwrap()]);
    assert_eq!(saved.code, Some(0), "{saved:?}");
}

/// Waits until the agent of a VM of this runtime answers. A guest that has ended is an error.
fn wait_for_agent(runtime: &Runtime, vm: &str) {
    wait_until("the VM's socket", || runtime.socket(vm).exists());
    wait_for_within(BOOT, "the agent answers", || {
        let answer = runtime.clade(&["exec", "--wait", WAIT, vm, "--", "true"]);
        assert!(answer.code == Some(0) || runtime.socket(vm).exists(), "{:?}", runtime.clade(&["logs", vm]));
        (answer.code == Some(0)).then_some(())
    });
}

/// Restores the small guest with the agent as PID 1, as `web`, with a socket and, where the host
/// has TAP interfaces, a network device. Returns when the agent answers; false if no guest is
/// built.
pub(crate) fn agent(runtime: &mut Runtime, cid: &Cid, tap: &TapName) -> bool {
    agent_of("256M", runtime, cid, tap)
}

/// The same with another size of memory.
pub(crate) fn agent_of(mem: &str, runtime: &mut Runtime, cid: &Cid, tap: &TapName) -> bool {
    let Some((linux, agent)) = guest() else { return false };
    let (kernel, initramfs, has_net) = (linux.join("vmlinux"), linux.join("initramfs.cpio"), taps());
    let key = CacheKey::new("agent", 1).file(&kernel).file(&initramfs).file(&agent).text(INITRAMFS).text(kernel_args());
    let cached = key.text(&has_net.to_string()).text(mem).get(check, |dir| {
        let mut runtime = Runtime::new();
        let initrd = dir.join("initramfs.cpio");
        resource("agent/initramfs.sh", &[linux.to_str().unwrap(), agent.to_str().unwrap(), initrd.to_str().unwrap()])
            .expect("an initramfs with the agent");
        let files = ["--kernel", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()];
        let (cid, tap) = (Cid::take(), TapName::take());
        with_devices(&mut runtime, &[&["run"], &files[..], &["--mem", mem]].concat(), &cid, &tap, has_net);
        wait_for_agent(&runtime, "web");
        snapshot(&runtime, "web", dir);
        fs::remove_file(initrd).unwrap();
        Some(())
    });
    let Some(cached) = cached else { return false };
    let saved = cached.join(SNAPSHOT);
    with_devices(runtime, &["restore", saved.to_str().unwrap()], cid, tap, has_net);
    wait_for_agent(runtime, "web");
    true
}

/// Starts a command that makes the VM `web`, with a socket and a network device of this test's.
fn with_devices(runtime: &mut Runtime, command: &[&str], cid: &Cid, tap: &TapName, has_net: bool) {
    let vsock = format!("cid={},socket={}", cid.number(), runtime.dir().join("web.vsock").display());
    let net = format!("tap={}%d", stem(tap));
    let net: &[&str] = if has_net { &["--net", &net] } else { &[] };
    runtime.spawn(&[command, &["--detached", "--name", "web", "--vsock", &vsock], net].concat());
}

/// Restores a VM of Python's image as `py`, under the runtime's supervisor. The server of
/// `ports_server.py` listens in it. False if no guest or image is built.
pub(crate) fn ports_server(runtime: &Runtime) -> bool {
    let Some(layout) = layout() else { return false };
    let Some((linux, agent)) = guest() else { return false };
    let kernel = linux.join("vmlinux");
    let key = CacheKey::new("ports", 1).file(&kernel).file(&linux.join("initramfs.cpio")).file(&agent);
    let cached = key.file(&layout.join("index.json")).text(SERVER).text(kernel_args()).get(check, |dir| {
        serve_ports(dir, &kernel, &layout, &agent);
        Some(())
    });
    let Some(cached) = cached else { return false };
    let (saved, dir) = (cached.join(SNAPSHOT), runtime.dir().join("overlays"));
    fs::create_dir(&dir).unwrap();
    let (saved, dir) = (saved.to_str().unwrap(), dir.to_str().unwrap());
    let vsock = format!("socket={}", runtime.dir().join("py.vsock").display());
    let restored = runtime.clade(&["restore", "-d", saved, "--name", "py", "--overlays", dir, "--vsock", &vsock]);
    assert_eq!(restored.code, Some(0), "{restored:?}");
    true
}

/// Boots Python's image with a cache of images in `dir`, starts the server, and writes the
/// snapshot.
fn serve_ports(dir: &Path, kernel: &Path, layout: &Path, agent: &Path) {
    let runtime = Runtime::new();
    let images = dir.join("images");
    let clade = |args: &[&str]| -> Answer {
        let mut command = runtime.command(args);
        command.env("CLADE_IMAGE_DIR", &images).env_remove("CLADE_REGISTRY").env("CLADE_AGENT", agent);
        command.output().unwrap().into()
    };
    let (name, script) = (format!("oci:{}:python", layout.display()), runtime.dir().join("ports_server.py"));
    let args = ["run", "-d", "--image", &name, "--mem", "256M", "--name", "py", "--fresh", "--kernel"];
    let booted = clade(&[&args[..], &[kernel.to_str().unwrap()]].concat());
    assert_eq!(booted.code, Some(0), "{booted:?}");
    wait_until_within(BOOT, "the interpreter answers", || {
        runtime.clade(&["logs", "py"]).stdout.contains("python answers")
    });
    fs::write(&script, SERVER).unwrap();
    let copied = runtime.clade(&["cp", script.to_str().unwrap(), "py:/srv/ports_server.py"]);
    assert_eq!(copied.code, Some(0), "{copied:?}");
    // The server outlives the command that starts it. The start may be slow where the guest's
    // processor is interpreted, and is repeated if it breaks off.
    let start = "/usr/bin/python3 /srv/ports_server.py > /srv/ports.log 2>&1 < /dev/null &";
    let open = runtime.dir().join("open");
    let mut looks = 0;
    wait_until_within(BOOT, "the server listens", || {
        if looks % 600 == 0 {
            println!("start {} of the server", 1 + looks / 600);
            let started = runtime.clade(&["exec", "--wait", WAIT, "py", "--", "sh", "-c", start]);
            assert_eq!(started.code, Some(0), "{started:?}");
        }
        looks += 1;
        runtime.clade(&["cp", "py:/srv/open", open.to_str().unwrap()]).code == Some(0)
    });
    snapshot(&runtime, "py", dir);
    assert_eq!(runtime.clade(&["stop", "--all"]).code, Some(0));
}
