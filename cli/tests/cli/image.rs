//! OCI images: in the cache, from a registry, and as VMs.

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use clade_test_support::Port;
use rustix::fs::XattrFlags;
use serde_json::{Value, json};

use crate::agent::WAIT;
use crate::tool::{Answer, Runtime, kvm, wait_until};

fn sha256(path: &Path) -> String {
    let done = Command::new("sha256sum").arg(path).output().unwrap();
    let text = String::from_utf8(done.stdout).unwrap();
    format!("sha256:{}", text.split(' ').next().unwrap())
}

/// Puts a file among the layout's blobs, and describes it.
fn blob(layout: &Path, media_type: &str, content: &Path) -> Value {
    let digest = sha256(content);
    let place = layout.join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap());
    fs::copy(content, place).unwrap();
    json!({"mediaType": media_type, "digest": digest, "size": fs::metadata(content).unwrap().len()})
}

fn document(layout: &Path, media_type: &str, content: &Value) -> Value {
    let path = layout.join("document");
    fs::write(&path, content.to_string()).unwrap();
    blob(layout, media_type, &path)
}

/// Writes a layout of one image: the directory `root` as its layer, and its program.
pub(crate) fn write_layout(layout: &Path, root: &Path, config: &Value) {
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let tar = layout.join("layer.tar");
    let done = Command::new("tar")
        .args(["--owner=0", "--group=0", "--numeric-owner", "--xattrs", "--xattrs-include=security.capability", "-cf"])
        .arg(&tar)
        .arg("-C")
        .arg(root)
        .arg(".")
        .status();
    assert!(done.unwrap().success());
    let layer = blob(layout, "application/vnd.oci.image.layer.v1.tar", &tar);
    let config = json!({"architecture": "amd64", "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}});
    let config = document(layout, "application/vnd.oci.image.config.v1+json", &config);
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]});
    let mut manifest = document(layout, kind, &manifest);
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "1"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
}

/// Images in a cache of their own, and a registry to pull them from. A drop ends both.
pub(crate) struct Images {
    pub(crate) runtime: Runtime,
    registry: Option<(Child, Port)>,
}

impl Drop for Images {
    fn drop(&mut self) {
        if let Some((registry, _)) = &mut self.registry {
            let _ = registry.kill();
            let _ = registry.wait();
        }
    }
}

impl Images {
    pub(crate) fn new() -> Self {
        Self { runtime: Runtime::new(), registry: None }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.runtime.dir().join(name)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = self.runtime.command(args);
        command.env("CLADE_IMAGE_DIR", self.path("images")).env_remove("CLADE_REGISTRY");
        command
    }

    pub(crate) fn clade(&self, args: &[&str]) -> Answer {
        self.command(args).output().unwrap().into()
    }

    /// Starts Debian's registry, and copies the layout's image of that tag to it. None without the
    /// tools.
    pub(crate) fn push(&mut self, layout: &Path, tag: &str) -> Option<String> {
        for tool in ["docker-registry", "skopeo"] {
            if Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
                clade_test_support::skipped(&format!("{tool} is not installed; the image comes from its layout"));
                return None;
            }
        }
        let claim = Port::take();
        let port = claim.number();
        let config = self.path("registry.yml");
        let storage = self.path("registry");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n",
            storage.display()
        );
        fs::write(&config, text).unwrap();
        let quiet = || File::create(self.path("registry.log")).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).stdin(Stdio::null()).stdout(quiet()).stderr(quiet());
        self.registry = Some((command.spawn().unwrap(), claim));
        wait_until("the registry", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        let name = format!("127.0.0.1:{port}/clade/image:{tag}");
        let copied = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:{tag}", layout.display()))
            .arg(format!("docker://{name}"))
            .output()
            .unwrap();
        assert!(copied.status.success(), "{copied:?}");
        Some(name)
    }
}

#[test]
fn images_are_pulled_shown_and_removed() {
    let images = Images::new();
    let (root, layout) = (images.path("root"), images.path("layout"));
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/motd"), "hello\n").unwrap();
    symlink("/etc/motd", root.join("link")).unwrap();
    write_layout(&layout, &root, &json!({"Cmd": ["/bin/sh"], "Env": ["A=b"], "WorkingDir": "/srv"}));
    let name = format!("oci:{}:1", layout.display());
    let pulled = images.clade(&["image", "pull", &name, "--json"]).json();
    let digest = pulled[0]["digest"].as_str().unwrap().to_owned();
    assert_eq!((pulled[0]["names"][0].as_str(), pulled[0]["layers"].as_u64()), (Some(name.as_str()), Some(1)));
    let (again, plain) = (images.clade(&["image", "pull", &name]), images.clade(&["image", "ls"]));
    assert_eq!((again.code, again.stdout.trim()), (Some(0), digest.as_str()));
    assert!(plain.stdout.contains(&name) && plain.stdout.contains(&digest[7..19]), "{plain:?}");
    let shown = images.clade(&["image", "inspect", &digest[7..17], "--json"]).json();
    assert_eq!((&shown["config"]["Cmd"][0], &shown["config"]["WorkingDir"]), (&json!("/bin/sh"), &json!("/srv")));
    let disk = Path::new(shown["disk"].as_str().unwrap());
    assert_eq!(fs::metadata(disk).unwrap().permissions().mode() & 0o777, 0o444);
    assert_eq!(images.clade(&["image", "ls", "--json"]).json()[0]["digest"], digest);

    images.clade(&["image", "inspect", "nothing.example/x"]).expect_refusal("nothing.example/x");
    images.clade(&["image", "pull", "oci:/nowhere"]).expect_refusal("oci:/nowhere");
    images.clade(&["image", "pull", &format!("oci:{}:2", layout.display())]).expect_refusal("\"2\"");
    images.clade(&["image", "pull", "python:3.12"]).expect_refusal("CLADE_REGISTRY");
    let deaf = images.clade(&["image", "pull", "127.0.0.1:1/a"]);
    assert!(deaf.code == Some(1) && deaf.stderr.contains("127.0.0.1:1/a:latest"), "{deaf:?}");
    fs::write(root.join("more"), "x").unwrap();
    write_layout(&layout, &root, &json!({}));
    images.clade(&["image", "pull", &name, "--max-image", "1K"]).expect_refusal("more than 1024 bytes");

    let open = File::open(disk).unwrap();
    images.clade(&["image", "rm", &name]).expect_refusal("in use");
    drop(open);
    let both = images.clade(&["image", "rm", "nothing.example/x", &name]);
    assert_eq!(both.code, Some(2), "{both:?}");
    assert!(both.stderr.contains("nothing.example/x") && both.stdout.contains(&name), "{both:?}");
    assert!(!disk.exists() && images.clade(&["image", "ls", "--json"]).json() == json!([]));
}

/// Returns the last line printed by a script of `resources`, if it succeeds.
pub(crate) fn resource(script: &str, args: &[&str]) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources").join(script);
    let done = Command::new(path).args(args).stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&done.stdout).trim().lines().last().map(PathBuf::from);
    text.filter(|_| done.status.success())
}

/// The guest's kernel with its busybox, and the agent.
pub(crate) fn guest() -> Option<(PathBuf, PathBuf)> {
    let named = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty()).map(PathBuf::from);
    let linux = named("CLADE_LINUX_GUEST").or_else(|| resource("linux/build.sh", &["--path"]));
    let agent = linux.is_some().then(|| named("CLADE_AGENT").or_else(|| resource("agent/build.sh", &[]))).flatten();
    if agent.is_none() {
        clade_test_support::skip("linux", &format!("the guest is {linux:?}, its agent {agent:?}"));
    }
    linux.zip(agent)
}

/// Gives the program the capability `CAP_NET_RAW`, whoever runs it. Returns whether this host lets it have that.
fn give_capability(program: &Path) -> bool {
    const CAP_NET_RAW: u32 = 13;
    const EFFECTIVE: u32 = 1;
    const REVISION_2: u32 = 0x0200_0000;
    // The permitted and the inheritable ones, each with its upper half last.
    let words = [REVISION_2 | EFFECTIVE, 1 << CAP_NET_RAW, 0, 0, 0];
    let value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    rustix::fs::setxattr(program, "security.capability", &value, XattrFlags::empty()).is_ok()
}

/// A root with busybox, users, and a program that counts.
pub(crate) fn write_root(root: &Path, linux: &Path) {
    for dir in ["bin", "etc", "tmp", "srv"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    // The image's program is not root.
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    let archive = File::open(linux.join("initramfs.cpio")).unwrap();
    let mut extract = Command::new("cpio");
    let busybox = extract.args(["--quiet", "-i", "--to-stdout", "bin/busybox"]).stdin(archive).output().unwrap();
    let mut program = File::create(root.join("bin/busybox")).unwrap();
    program.write_all(&busybox.stdout).unwrap();
    program.set_permissions(fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["sh", "cat", "id", "echo", "sleep", "mount", "touch", "ls", "expr"] {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:7:7::/srv:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nstaff:x:20:\n").unwrap();
}

/// Runs the image with other settings than its own. Programs find what docker gives them, and the VM ends in order
/// by the image's signal.
fn settings_of_docker(images: &Images, name: &str, (linux, agent): (&Path, &Path), has_capability: bool) {
    // No program but the one that gets the signal would end the VM with this status.
    let script = "trap 'exit 9' QUIT; echo $COLOUR $(id -u) $(id -g) $PWD $TERM > /tmp/own; echo tty >/dev/tty; \
                  while true; do sleep 1; done";
    let mut command = images.command(&["run", "-d", "--fresh", "--image", name, "--mem", "128M", "--name", "other"]);
    command.args(["-e", "COLOUR=red", "-e", "HERE", "-u", "app", "-w", "/tmp", "--entrypoint", "/bin/sh", "--kernel"]);
    command.arg(linux.join("vmlinux")).args(["--", "-c", script]).env("CLADE_AGENT", agent).env("HERE", "there");
    let booted = Answer::from(command.output().unwrap());
    assert_eq!((booted.code, booted.stdout.as_str()), (Some(0), "other\n"), "{booted:?}");
    let exec = |arguments: &[&str], script: &str| {
        let done = images.clade(&[&["exec", "--wait", WAIT], arguments, &["other", "--", "sh", "-c", script]].concat());
        done.stdout
    };
    wait_until("what the image runs", || exec(&[], "cat /tmp/own") == "red 7 7 /tmp xterm\n");
    let seen = exec(
        &[],
        "echo $HERE $PWD; cat /etc/hosts /proc/sys/kernel/hostname /proc/sys/net/ipv4/ip_unprivileged_port_start; \
         ulimit -Sn; ulimit -Hn",
    );
    let expected = "there /tmp\n127.0.0.1\tlocalhost\n127.0.1.1\tclade\nclade\n0\n1024\n524288\n";
    assert_eq!(seen, expected);
    let seen = exec(&["-u", "7"], "echo $HOME $(id -g); echo error > /dev/stderr; echo output > /dev/stdout");
    assert_eq!(seen, "/srv 7\noutput\n", "a number of /etc/passwd");
    assert_eq!(exec(&["-u", "1000:20"], "id -u; id -G"), "1000\n20\n");
    let listens = "busybox httpd -p '[::]:8090' -h /tmp; busybox wget -q -O - http://127.0.0.1:8090/own";
    assert_eq!(exec(&[], listens), "red 7 7 /tmp xterm\n", "IPv4 reaches a listener at [::]");
    let interfaces = exec(&[], "cat /proc/net/if_inet6");
    assert!(interfaces.lines().all(|line| line.ends_with(" lo")) && interfaces.lines().count() == 1, "{interfaces}");
    if has_capability {
        let seen = exec(&["-u", "7"], "busybox-capable grep CapEff /proc/self/status");
        assert_eq!(seen, "CapEff:\t0000000000002000\n", "of the program's file");
    }
    let stopped = images.clade(&["stop", "other", "--graceful", "1h", "--json"]);
    assert_eq!(stopped.json()["shutdown"]["by_itself"], true, "{stopped:?}");
    let ended = images.clade(&["ps", "-a", "--json"]).json();
    let ended = ended["ended"].as_array().unwrap().iter().find(|vm| vm["name"] == "other").unwrap().clone();
    assert_eq!(ended["stopped"]["status"], 9, "{ended}");
    let mut unknown = images.command(&["run", "--image", name, "--mem", "128M", "--name", "unknown", "--no-terminal"]);
    unknown.args(["-u", "nosuch", "--kernel"]).arg(linux.join("vmlinux")).env("CLADE_AGENT", agent);
    let unknown = Answer::from(unknown.output().unwrap());
    assert!(unknown.code == Some(127) && unknown.stderr.contains("nosuch"), "{unknown:?}");
}

#[test]
fn an_image_is_a_vm_that_can_be_forked() {
    if !kvm() {
        return;
    }
    let Some((linux, agent)) = guest() else { return };
    let mut images = Images::new();
    let (root, layout) = (images.path("root"), images.path("layout"));
    write_root(&root, &linux);
    let capable = root.join("bin/busybox-capable");
    fs::copy(root.join("bin/busybox"), &capable).unwrap();
    let has_capability = give_capability(&capable);
    if !has_capability {
        eprintln!("skipped: capabilities of files, which this host does not let the test give");
    }
    // Children of an instant before the program's start are never ready.
    let hook = root.join("etc/clade/fork.d/10-started");
    fs::create_dir_all(hook.parent().unwrap()).unwrap();
    fs::write(&hook, "#!/bin/sh\ncat /tmp/started\n").unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    let config = json!({"Entrypoint": ["sh", "-c"], "Cmd": ["exit 1"], "Env": ["PATH=/bin", "COLOUR=blue"],
        "WorkingDir": "/work/made", "User": "app:staff", "StopSignal": "SIGQUIT"});
    write_layout(&layout, &root, &config);
    let name = images.push(&layout, "1").unwrap_or_else(|| format!("oci:{}:1", layout.display()));
    images.runtime.spawn(&["serve", "--pool", "0"]);
    wait_until("the supervisor", || images.clade(&["checkpoints"]).code == Some(0));
    // Three times: a message of the kernel may come in between.
    let script = "for i in 1 2 3; do id -u; id -g; echo $COLOUR; pwd; done; sleep 3; echo started > /tmp/started; \
                  exec sleep 100000";
    let run = |vm: &str| -> Answer {
        let mut command = images.command(&["run", "-d", "--image", &name, "--mem", "128M", "--name", vm]);
        command.arg("--kernel").arg(linux.join("vmlinux")).args(["--", script]).env("CLADE_AGENT", &agent);
        command.output().unwrap().into()
    };
    let booted = run("web");
    assert_eq!(
        (booted.code, booted.stdout.as_str()),
        (Some(0), "web\n"),
        "{booted:?} {:?}",
        images.clade(&["logs", "web"])
    );
    let state = |vm: &str| {
        images
            .clade(&["ps", "--json"])
            .json()
            .as_array()
            .unwrap()
            .iter()
            .find_map(|one| (one["name"] == vm).then(|| one["guest"].clone()))
    };
    wait_until("the guest to be ready", || state("web") == Some(json!("ready")));
    assert!(images.clade(&["ps"]).stdout.contains(" ready "), "{:?}", images.clade(&["ps"]));
    let exec = |vm: &str, script: &str| images.clade(&["exec", "--wait", WAIT, vm, "--", "sh", "-c", script]);
    wait_until("what the image runs", || exec("web", "cat /tmp/started").stdout == "started\n");
    let logs = images.clade(&["logs", "web"]).stdout.replace('\r', "");
    let end: Vec<&str> = logs.lines().rev().take(40).collect();
    assert!(logs.contains("7\n20\nblue\n/work/made\n"), "from its end: {end:#?}");
    // The image's root, its variables and directory, and nothing of the initramfs.
    let seen = exec("web", "echo $COLOUR $PWD; ls / /init; cat /proc/mounts");
    assert!(seen.stdout.starts_with("blue /work/made\n") && seen.stdout.contains("/dev/vda / ext4 rw"), "{seen:?}");
    assert!(!seen.stdout.contains("newroot") && seen.stderr.contains("/init"), "{seen:?}");
    // Its disk is in use, and stays without the VM's writes.
    images.clade(&["image", "rm", &name]).expect_refusal("in use");
    let file = images.path("file");
    fs::write(&file, "from here\n").unwrap();
    assert_eq!(images.clade(&["cp", "--wait", WAIT, file.to_str().unwrap(), "web:/srv/file"]).code, Some(0));
    let forked = images.clade(&["fork", "web", "--count", "2", "--ready", "--json"]).json();
    assert_eq!(forked["children"].as_array().unwrap().len(), 2);
    for vm in ["web", "web-1", "web-2"] {
        exec(vm, &format!("echo {vm} >> /srv/file"));
        assert_eq!(exec(vm, "cat /srv/file").stdout, format!("from here\n{vm}\n"), "alone on its disk");
    }
    // The next VM does not boot: it starts from the instant when the first one's agent had
    // answered.
    let begun = Instant::now();
    let warm = run("again");
    assert_eq!((warm.code, warm.stdout.as_str()), (Some(0), "again\n"), "{warm:?}");
    println!("the next VM of the image is ready after {:.0} ms", begun.elapsed().as_secs_f64() * 1e3);
    let again = images.clade(&["ps", "--json"]).json();
    let again = again.as_array().unwrap().iter().find(|vm| vm["name"] == "again").unwrap().clone();
    assert_eq!((again["generation"].as_u64(), again["parent"].as_str()), (Some(1), Some("web")), "{again}");
    // The agent may have answered before the program's start, which then happens in each VM.
    wait_until("what the image runs, in the next VM", || exec("again", "cat /tmp/started").stdout == "started\n");
    let seen = exec("again", "ls /srv && echo nothing");
    assert_eq!(seen.stdout, "nothing\n", "what the first has done since is not in it: {seen:?}");
    assert_eq!(state("again"), Some(Value::Null), "a child's agent has reported to the parent's host");
    // A program that dies: its status is the command's, and its end is the VM's reason.
    let mut dies = images.command(&["run", "--image", &name, "--mem", "128M", "--name", "dies", "--no-terminal"]);
    dies.arg("--kernel").arg(linux.join("vmlinux")).args(["--", "kill -SEGV $$"]).env("CLADE_AGENT", &agent);
    let died = Answer::from(dies.output().unwrap());
    assert_eq!(died.code, Some(139), "{died:?}");
    assert!(died.stderr.contains("dies: the guest's program has ended: sh: signal: "), "{died:?}");
    let ended = images.clade(&["ps", "-a", "--json"]).json();
    let ended = ended["ended"].as_array().unwrap().iter().find(|vm| vm["name"] == "dies").unwrap().clone();
    assert_eq!((&ended["stopped"]["kind"], &ended["stopped"]["status"]), (&json!("exited"), &json!(139)), "{ended}");
    settings_of_docker(&images, &name, (&linux, &agent), has_capability);
    let checkpoints = images.clade(&["checkpoints", "--json"]).json();
    let kept = checkpoints[0]["name"].as_str().unwrap();
    assert!(kept.starts_with("image-") && checkpoints.as_array().unwrap().len() == 1, "{checkpoints}");
    let removed = images.clade(&["rm", kept]);
    assert_eq!(removed.code, Some(0), "{removed:?}");
    let stopped = images.clade(&["stop", "--all"]);
    assert_eq!(stopped.code, Some(0), "{stopped:?}");
    let removed = images.clade(&["image", "rm", &name]);
    assert_eq!(removed.code, Some(0), "{removed:?}");
}
