//! Templates: built from a Dockerfile, forked by E2B's API, and available after a restart of the
//! supervisor.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::agent::WAIT;
use crate::e2b::Host;
use crate::image::{guest, write_layout, write_root};
use crate::tool::{Answer, Runtime, kill, kvm, wait_until};

/// A supervisor with E2B's API, an image, and a guest's files.
struct Bench {
    host: Host,
    kernel: String,
    agent: String,
}

impl Bench {
    fn new() -> Option<Self> {
        let (linux, agent) = guest()?;
        let bench = Self {
            host: Host::new(),
            kernel: linux.join("vmlinux").display().to_string(),
            agent: agent.display().to_string(),
        };
        let root = bench.path("root");
        write_root(Path::new(&root), &linux);
        let config = json!({"Env": ["PATH=/bin", "BASE=yes"], "Cmd": ["sleep", "1000000"]});
        write_layout(Path::new(&bench.path("layout")), Path::new(&root), &config);
        Some(bench)
    }

    fn path(&self, name: &str) -> String {
        self.host.runtime.dir().join(format!("clade.{name}")).display().to_string()
    }

    /// A directory with these files.
    fn context(&self, name: &str, files: &[(&str, &str)]) -> String {
        let dir = self.path(name);
        for (file, text) in files {
            let path = Path::new(&dir).join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn build(&self, args: &[&str]) -> Answer {
        let mut command = self.host.runtime.command(&["template", "build"]);
        command.args(args).args(["--kernel", &self.kernel, "--mem", "128M"]);
        command.env("CLADE_IMAGE_DIR", self.path("images")).env("CLADE_AGENT", &self.agent);
        command.env_remove("CLADE_REGISTRY").output().unwrap().into()
    }

    /// Returns the existing VMs, checkpoints and files of templates.
    fn left(&self) -> (Vec<String>, Vec<String>, BTreeSet<String>) {
        let checkpoints = self.host.runtime.clade(&["checkpoints", "--json"]).json();
        let names = checkpoints.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned());
        let files = fs::read_dir(self.host.runtime.templates()).into_iter().flatten().flatten();
        let files = files.map(|file| file.file_name().into_string().unwrap());
        // For disks' overlays; removed with the last one.
        let files = files.filter(|file| file != ".clade-overlays").collect();
        (self.host.runtime.names(), names.collect(), files)
    }

    fn create(&self, key: &str, template: &str, more: &str) -> (String, String) {
        let body = format!(r#"{{"templateID": "{template}", "timeout": 7200{more}}}"#);
        let begun = Instant::now();
        let (status, made) = self.host.call(key, "POST", "/v2/sandboxes", &body);
        assert_eq!(status, 201, "{made}");
        println!("a sandbox of {template} after {:.0} ms", begun.elapsed().as_secs_f64() * 1e3);
        let text = |name: &str| made[name].as_str().unwrap().to_owned();
        (text("sandboxID"), text("envdAccessToken"))
    }

    /// Returns the output of a sandbox's shell.
    fn exec(&self, (id, token): &(String, String), script: &str) -> String {
        let file = self.path("token");
        fs::write(&file, token).unwrap();
        let args = ["exec", "--wait", WAIT, "--token-file", &file, id, "--", "sh", "-c", script];
        let answer = self.host.runtime.clade(&args);
        assert_eq!(answer.code, Some(0), "{answer:?}");
        answer.stdout
    }
}

const DOCKERFILE: &str = r#"# syntax=docker/dockerfile:1
ARG TAG=none
FROM oci:LAYOUT:${TAG}
ARG WORD=none
ENV COLOUR=blue
ENV SHADE="dark $COLOUR"
WORKDIR /work
RUN busybox ln -s busybox /bin/ln && ln -s busybox /bin/chown
# Files, and a link among them.
COPY --chown=app files/ ./files/
COPY one.txt t*.txt /srv/
RUN echo "$WORD $COLOUR $BASE" \
    > built.txt && id -u >> built.txt
USER app
CMD ["sh", "-c", "sleep 2; echo $SHADE; echo $SHADE > /tmp/started; exec sleep 100000"]
EXPOSE 8000
"#;

#[test]
fn a_template_is_built_of_a_dockerfile_and_outlives_its_supervisor() {
    if !kvm() {
        return;
    }
    let Some(mut bench) = Bench::new() else { return };
    let dockerfile = DOCKERFILE.replace("LAYOUT", &bench.path("layout"));
    let context = bench.context(
        "context",
        &[
            ("Dockerfile", &dockerfile),
            (".dockerignore", "**/*.log\n"),
            ("one.txt", "1\n"),
            ("two.txt", "2\n"),
            ("files/a", "a\n"),
            ("files/sub/b", "b\n"),
            ("files/x.log", "no\n"),
        ],
    );
    std::os::unix::fs::symlink("a", Path::new(&context).join("files/link")).unwrap();
    let args = [&context[..], "--name", "base", "--build-arg", "TAG=1", "--build-arg", "WORD=given"];
    let ready = ["--ready-cmd", "cat /tmp/started", "--ready-timeout", "1h", "--json"];
    let begun = Instant::now();
    let built = bench.build(&[&args[..], &ready].concat());
    println!("built after {:.1} s", begun.elapsed().as_secs_f64());
    assert!(built.stderr.contains("dark blue"), "what it says is shown: {built:?}");
    let built = built.json();
    let id = built["id"].as_str().unwrap();
    assert_eq!((&built["name"], &built["user"], &built["workdir"]), (&json!("base"), &json!("app"), &json!("/work")));
    assert_eq!((built["mib"].as_u64(), built["env"]["COLOUR"].as_str()), (Some(128), Some("blue")), "{built}");
    assert!(built["env"].get("WORD").is_none(), "an ARG is of the build alone: {built}");
    let files = BTreeSet::from(["base.json".to_owned(), "lock".to_owned(), id.to_owned()]);
    assert_eq!(bench.left(), (vec![], vec![id.to_owned()], files), "its VM is gone");

    let key = bench.host.key("me", "all");
    let sandbox = bench.create(&key, "base", r#", "envVars": {"MINE": "1"}"#);
    assert_sandbox(&bench, &sandbox);
    assert_eq!(bench.exec(&sandbox, "echo $MINE"), "1\n");
    let templates = bench.host.call(&key, "GET", "/templates", "").1;
    assert_eq!(templates.as_array().unwrap().len(), 1, "{templates}");
    assert_eq!((&templates[0]["templateID"], &templates[0]["names"][0]), (&json!(id), &json!("base")));
    assert_eq!(bench.host.call(&key, "GET", "/templates/aliases/base", "").1["templateID"], id);
    // A snapshot cannot replace it, and its owner is the host.
    for name in ["base", id] {
        let body = format!(r#"{{"name": "{name}"}}"#);
        let taken = bench.host.call(&key, "POST", &format!("/sandboxes/{}/snapshots", sandbox.0), &body);
        assert_eq!(taken.0, 409, "{taken:?}");
        assert_eq!(bench.host.call(&key, "DELETE", &format!("/templates/{name}"), "").0, 404);
    }
    assert_eq!(bench.host.call(&key, "DELETE", &format!("/sandboxes/{}", sandbox.0), "").0, 204);

    kill(bench.host.runtime.pid(), Signal::KILL);
    wait_until("its end", || TcpStream::connect(&bench.host.address).is_err());
    bench.host.serve();
    assert_eq!(bench.left().1, [] as [String; 0]);
    let list = bench.host.runtime.clade(&["template", "ls", "--json"]).json();
    assert_eq!((&list[0]["id"], &list[0]["is_in_memory"]), (&json!(id), &json!(false)));
    // Several requests at once open it once.
    let both = std::thread::scope(|scope| {
        let made = [id, "base:default"].map(|name| scope.spawn(|| bench.create(&key, name, "")));
        made.map(|made| made.join().unwrap())
    });
    both.iter().for_each(|sandbox| assert_sandbox(&bench, sandbox));
    assert_eq!(bench.left().1, [id]);
    let listed = bench.host.call(&key, "GET", &format!("/v2/sandboxes?template={id}"), "").1;
    assert_eq!(listed.as_array().unwrap().len(), 2, "by either of its names: {listed}");
    assert_eq!(listed[0]["templateID"], "base", "{listed}");

    fails_and_leaves_nothing(&bench, id);
    let inspected = bench.host.runtime.clade(&["template", "inspect", "base"]);
    assert!(inspected.code == Some(0) && inspected.stdout.contains("cat /tmp/started"), "{inspected:?}");
    assert_eq!(bench.host.runtime.clade(&["template", "rm", "base"]).stdout, "base is removed\n");
    let (vms, checkpoints, files) = bench.left();
    assert_eq!((vms.len(), checkpoints.len(), files), (2, 0, BTreeSet::from(["lock".to_owned()])));
    let body = r#"{"templateID": "base"}"#;
    assert_eq!(bench.host.call(&key, "POST", "/v2/sandboxes", body).0, 404);
    // Its sandboxes run on.
    assert_eq!(bench.exec(&both[0], "cat /srv/one.txt"), "1\n");
}

/// Checks the files, variables and user of the Dockerfile, and its started program.
fn assert_sandbox(bench: &Bench, sandbox: &(String, String)) {
    let script =
        "cat /tmp/started /work/built.txt; id -un; echo $COLOUR $BASE; busybox pidof sleep > /dev/null && echo runs";
    assert_eq!(bench.exec(sandbox, script), "dark blue\ngiven blue yes\n0\napp\nblue yes\nruns\n");
    let script = "cat /srv/one.txt /srv/two.txt files/link files/sub/b; busybox stat -c %U files/a; ls files";
    assert_eq!(bench.exec(sandbox, &format!("cd /work; {script}")), "1\n2\na\nb\napp\na\nlink\nsub\n");
}

/// Fails in a step, and by a program that is never ready: only the older template stays.
fn fails_and_leaves_nothing(bench: &Bench, id: &str) {
    let before = bench.left();
    let from = format!("FROM oci:{}:1\n", bench.path("layout"));
    let context =
        bench.context("failing", &[("Dockerfile", &format!("{from}RUN echo before\nRUN echo why; exit 7\n"))]);
    let failed = bench.build(&[&context, "--name", "base"]);
    assert_eq!((failed.code, failed.stdout.as_str()), (Some(1), ""), "{failed:?}");
    assert!(failed.stderr.ends_with("clade: line 3: RUN: exit status 7: why\n"), "{failed:?}");
    assert_eq!(bench.left(), before);
    let name = format!("oci:{}:1", bench.path("layout"));
    let args = [
        &name[..],
        "--name",
        "base",
        "--start-cmd",
        "echo bad news; exit 3",
        "--ready-cmd",
        "cat /nothing",
        "--ready-timeout",
        "1h",
    ];
    let failed = bench.build(&args);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    assert!(failed.stderr.contains("the start command has ended: exit status 3: bad news"), "{failed:?}");
    let args = [&name[..], "--name", "base", "--ready-cmd", "cat /nothing", "--ready-timeout", "2s"];
    let failed = bench.build(&args);
    assert!(failed.code == Some(1) && failed.stderr.contains("within 2 s"), "{failed:?}");
    // A hook that fails in each child: no sandbox of it would ever be ready.
    let hook = "/etc/clade/fork.d/10-bad";
    let start =
        format!("mkdir -p /etc/clade/fork.d; printf '#!/bin/sh\\nexit 3\\n' > {hook}; chmod +x {hook}; sleep 100000");
    let ready = format!("busybox test -x {hook}");
    // The time-out is the guest's for the command, and then that of the trial. A slow guest needs a longer one.
    let mut seconds = 20;
    wait_until("a build whose ready command succeeds", || {
        let limit = format!("{seconds}s");
        let args =
            [&name[..], "--name", "base", "--start-cmd", &start, "--ready-cmd", &ready, "--ready-timeout", &limit];
        let failed = bench.build(&args);
        if failed.stderr.contains("has not succeeded within") {
            seconds *= 2;
            return false;
        }
        assert!(failed.stderr.contains("cannot be made ready") && failed.stderr.contains("10-bad"), "{failed:?}");
        true
    });
    assert_eq!(bench.left(), before);
    let list = bench.host.runtime.clade(&["template", "ls", "--json"]).json();
    assert_eq!((list.as_array().unwrap().len(), list[0]["id"].as_str()), (1, Some(id)), "{list}");
}

#[test]
fn what_cannot_be_built_is_refused_before_anything_runs() {
    let Some((_, agent)) = guest() else { return };
    let runtime = Runtime::new();
    let (root, layout) = (runtime.dir().join("root"), runtime.dir().join("layout"));
    fs::create_dir_all(root.join("bin")).unwrap();
    write_layout(&layout, &root, &json!({}));
    let build = |dockerfile: &str, name: &str| -> Answer {
        let context = runtime.dir().join("context");
        fs::create_dir_all(&context).unwrap();
        fs::write(context.join("Dockerfile"), dockerfile.replace("LAYOUT", &format!("oci:{}:1", layout.display())))
            .unwrap();
        let mut command = runtime.command(&["template", "build", context.to_str().unwrap(), "--name", name]);
        command.env("CLADE_IMAGE_DIR", runtime.dir().join("images")).env("CLADE_AGENT", &agent);
        command.args(["--kernel", "/nowhere/vmlinux"]).output().unwrap().into()
    };
    fs::write(runtime.dir().join("outside"), "x").unwrap();
    for (dockerfile, named) in [
        ("FROM LAYOUT\n\nADD http://a /b\n", "line 3: ADD: "),
        ("FROM LAYOUT\nFROM LAYOUT\n", "line 2: FROM: several stages"),
        ("FROM LAYOUT\nHEALTHCHECK CMD x\n", "line 2: HEALTHCHECK: "),
        ("FROM LAYOUT\nCOPY ../outside /x\n", "line 2: COPY: "),
        ("FROM LAYOUT\nCOPY nothing /x\n", "line 2: COPY: "),
        ("FROM LAYOUT\nRUN --mount=type=cache x\n", "line 2: RUN: --mount"),
        ("FROM oci:/nowhere\n", "oci:/nowhere"),
    ] {
        build(dockerfile, "base").expect_refusal(named);
    }
    build("FROM LAYOUT\n", "a/b").expect_refusal("\"a/b\"");
    build("FROM LAYOUT\n", "t0123456789abcdef01").expect_refusal("t0123456789abcdef01");
    runtime.clade(&["template", "inspect", "nothing"]).expect_refusal("\"nothing\"");
    runtime.clade(&["template", "rm", "nothing"]).expect_refusal("\"nothing\"");
    assert_eq!(runtime.clade(&["template", "ls", "--json"]).json(), Value::Array(Vec::new()));
    // No supervisor was started for it, and no VM.
    assert!(!runtime.api().exists() && !runtime.templates().exists());
}
