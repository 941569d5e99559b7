//! Images made with a Dockerfile.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::image::{Images, guest, write_layout, write_root};
use crate::tool::{Answer, kvm};

/// Writes a build's directory. `LAYOUT` in the Dockerfile is the base image.
fn context(images: &Images, dockerfile: &str, files: &[(&str, &str)]) -> PathBuf {
    let dir = images.path("context");
    let base = format!("oci:{}:1", images.path("layout").display());
    for (name, text) in files.iter().chain(&[("Dockerfile", &*dockerfile.replace("LAYOUT", &base))]) {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn build(images: &Images, dir: &Path, args: &[&str]) -> Answer {
    images.command(&["image", "build", dir.to_str().unwrap()]).args(args).output().unwrap().into()
}

fn base(images: &Images, write: impl FnOnce(&Path)) {
    let root = images.path("root");
    fs::create_dir_all(root.join("etc")).unwrap();
    write(&root);
    let config = json!({"Env": ["PATH=/bin"], "Entrypoint": ["/bin/entry"], "Cmd": ["a"], "Labels": {"kept": "yes"}});
    write_layout(&images.path("layout"), &root, &config);
}

/// Returns the output of a command of debugfs, which reads a disk without the kernel.
fn debugfs(disk: &str, request: &str) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let done = Command::new("debugfs").args(["-R", request, disk]).env("PATH", path).output().unwrap();
    String::from_utf8_lossy(&done.stdout).into_owned()
}

#[test]
fn settings_alone_need_no_vm() {
    let images = Images::new();
    base(&images, |root| fs::write(root.join("etc/motd"), "hello\n").unwrap());
    let dir = context(&images, "FROM LAYOUT\nARG V\nENV A=$V\nLABEL v=$V\nEXPOSE 80\nCMD [\"b\"]\n", &[]);
    let built = build(&images, &dir, &["-t", "app", "--build-arg", "V=1", "--json"]);
    assert_eq!(built.code, Some(0), "{built:?}");
    let built = built.json();
    assert_eq!((&built["names"], &built["layers"]), (&json!(["app:latest"]), &json!(1)));
    let config = &built["config"];
    assert_eq!((&config["Entrypoint"], &config["Cmd"]), (&json!(["/bin/entry"]), &json!(["b"])));
    assert!(config["Env"].as_array().unwrap().contains(&json!("A=1")), "{config}");
    // Another file, upon the image that was just built, under a name with a registry.
    let other = images.path("Other");
    fs::write(&other, "FROM app\nUSER 7\n").unwrap();
    let more = build(&images, &dir, &["-t", "localhost:5000/app:2", "-f", other.to_str().unwrap(), "--json"]).json();
    assert_eq!((&more["names"], &more["config"]["User"]), (&json!(["localhost:5000/app:2"]), &json!("7")));
    assert!(more["config"]["Env"].as_array().unwrap().contains(&json!("A=1")), "{more}");
    assert_eq!(images.clade(&["image", "rm", "app"]).code, Some(0));
    assert!(images.clade(&["image", "inspect", "app"]).code == Some(2));
    assert!(!images.runtime.api().exists(), "no supervisor was started");
}

#[test]
fn what_cannot_be_an_image_is_refused_before_anything_runs() {
    let images = Images::new();
    base(&images, |_| {});
    for (dockerfile, named) in [
        ("FROM LAYOUT\nADD http://a /b\n", "line 2: ADD: "),
        ("FROM LAYOUT\nEXPOSE 70000\n", "line 2: EXPOSE: "),
        ("FROM LAYOUT\nLABEL\n", "line 2: LABEL: "),
        ("FROM LAYOUT\nCOPY nothing /x\n", "line 2: COPY: "),
        ("FROM oci:/nowhere\n", "oci:/nowhere"),
    ] {
        build(&images, &context(&images, dockerfile, &[]), &["-t", "app"]).expect_refusal(named);
    }
    let dir = context(&images, "FROM LAYOUT\nRUN true\n", &[]);
    for name in ["App", "app@sha256:0", "oci:/a:b"] {
        build(&images, &dir, &["-t", name]).expect_refusal(name);
    }
    build(&images, &images.path("nothing"), &["-t", "app"]).expect_refusal("nothing");
    build(&images, &dir, &["-t", "app", "-f", "/nowhere/Dockerfile"]).expect_refusal("/nowhere/Dockerfile");
    let remote =
        images.command(&["image", "build", dir.to_str().unwrap(), "-t", "app"]).env("CLADE_API", "a:1").output();
    Answer::from(remote.unwrap()).expect_refusal("supervisor's host");
    assert!(images.clade(&["image", "inspect", "app"]).code == Some(2) && !images.runtime.api().exists());
}

const DOCKERFILE: &str = "FROM LAYOUT
ARG WORD
LABEL note=\"$WORD\"
WORKDIR /work
COPY files/ ./files/
# In the place of a link to the program of this shell, and through a link that is named itself.
COPY programs/ /bin/
COPY files/a /direct
RUN busybox ln -s busybox /bin/chown
COPY --chown=7 files/a /owned/by/
USER 7
WORKDIR /home7/deep
USER root
WORKDIR /work
RUN echo \"$WORD $0\" > built && cat built > sub && busybox ln built hard && busybox chown 7:20 built
RUN busybox rm /etc/group && busybox rm -r /srv && busybox mv /opt/old /opt/new && busybox chmod 640 /etc/passwd
RUN busybox mount -t tmpfs none /tmp && echo no > /tmp/lost && busybox mkfifo pipe && busybox ln -s built link
RUN busybox mount --bind /opt /bound && ls /bound/new
# A program that is left behind does not keep its instruction waiting, and writes nothing more.
RUN while true; do echo more > spinning; done & echo begun > begun
USER app
ENV COLOUR=blue
CMD [\"serve\"]
";

#[test]
fn an_image_is_built_of_the_files_that_its_steps_have_changed() {
    if !kvm() {
        return;
    }
    let Some((linux, agent)) = guest() else { return };
    let images = Images::new();
    base(&images, |root| {
        write_root(root, &linux);
        fs::create_dir_all(root.join("opt/old/deep")).unwrap();
        fs::write(root.join("opt/old/deep/file"), "moved\n").unwrap();
        fs::write(root.join("srv/gone"), "").unwrap();
        fs::write(root.join("tmp/kept"), "").unwrap();
        fs::create_dir(root.join("bound")).unwrap();
        fs::write(root.join("bound/below"), "").unwrap();
        symlink("opt/target", root.join("direct")).unwrap();
    });
    let kernel = linux.join("vmlinux");
    let machine = ["--kernel", kernel.to_str().unwrap(), "--mem", "128M"];
    let build = |dir: &Path, args: &[&str]| -> Answer {
        let mut command = images.command(&["image", "build", dir.to_str().unwrap()]);
        command.args(args).args(machine).env("CLADE_AGENT", &agent).output().unwrap().into()
    };
    let dir = context(
        &images,
        DOCKERFILE,
        &[("files/a", "a\n"), ("files/sub/b", "b\n"), ("programs/id", "#!/bin/sh\necho mine\n")],
    );
    for (name, mode) in [("files/sub", 0o2750), ("programs/id", 0o4755)] {
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let built = build(&dir, &["-t", "app", "--build-arg", "WORD=given", "--json"]);
    assert_eq!(built.code, Some(0), "{built:?}");
    let built = built.json();
    assert_eq!((&built["names"], &built["layers"]), (&json!(["app:latest"]), &json!(2)));
    assert_eq!((&built["config"]["User"], &built["config"]["WorkingDir"]), (&json!("app"), &json!("/work")));
    assert_eq!(images.runtime.names(), Vec::<String>::new(), "the VM of the build has ended");
    let disk = built["disk"].as_str().unwrap();
    assert_eq!(debugfs(disk, "cat /work/built"), "given /bin/sh\n");
    assert_eq!(debugfs(disk, "cat /work/files/sub/b"), "b\n");
    assert!(debugfs(disk, "stat /work/files/sub").contains("Mode:  02750"));
    assert_eq!(
        (debugfs(disk, "cat /bin/id"), debugfs(disk, "cat /opt/target")),
        ("#!/bin/sh\necho mine\n".into(), "a\n".into())
    );
    assert!(
        debugfs(disk, "stat /bin/id").contains("Mode:  04755") && debugfs(disk, "stat /direct").contains("symlink")
    );
    assert_eq!(debugfs(disk, "cat /opt/new/deep/file"), "moved\n");
    let root = debugfs(disk, "ls /");
    assert!(!root.contains("srv") && root.contains("work") && !debugfs(disk, "ls /opt").contains("old"), "{root}");
    assert!(!debugfs(disk, "ls /etc").contains("group"), "a removed file");
    let tmp = debugfs(disk, "ls /tmp");
    assert!(tmp.contains("kept") && !tmp.contains("lost"), "another file system is in no layer: {tmp}");
    let bound = debugfs(disk, "ls /bound");
    assert!(bound.contains("below") && !bound.contains("new"), "a bind mount hides nothing in the image: {bound}");
    assert_eq!(debugfs(disk, "cat /work/begun"), "begun\n");
    let file = debugfs(disk, "stat /work/hard");
    assert!(file.contains("Links: 2") && file.contains("User:     7   Group:    20"), "{file}");
    assert!(debugfs(disk, "stat /etc/passwd").contains("Mode:  0640"));
    // As with Docker: a user's number is the group's too, new directories are the owner's, and a user's are his own.
    for entry in ["/owned", "/owned/by", "/owned/by/a", "/home7", "/home7/deep"] {
        let stat = debugfs(disk, &format!("stat {entry}"));
        let group = if entry.starts_with("/owned") { "7" } else { "" };
        assert!(stat.contains("User:     7 ") && stat.contains(&format!("Group:     {group}")), "{entry}: {stat}");
    }
    assert!(debugfs(disk, "stat /work/pipe").contains("FIFO") && debugfs(disk, "stat /work/link").contains("symlink"));
    // Files without changes are in the base image's layer alone.
    let layers = images.path("images").join("blobs/sha256");
    let largest = fs::read_dir(layers).unwrap().map(|blob| blob.unwrap().metadata().unwrap().len()).max().unwrap();
    let all = built["fetched_bytes"].as_u64().unwrap();
    assert!(all < largest + (100 << 10), "{all} bytes, of which the base image's layer is {largest}");
    // The image is a VM's, of which a further one is not made: a step fails, and the name stays.
    let failing =
        "FROM app\nUSER root\nWORKDIR /made\nRUN cd /work; echo \"seen $COLOUR $(cat built) $(ls /etc)\"; exit 7\n";
    let failed = build(&context(&images, failing, &[]), &["-t", "app"]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    assert!(failed.stderr.contains("line 4: RUN: exit status 7"), "{failed:?}");
    assert!(failed.stderr.contains("seen blue given /bin/sh"), "{failed:?}");
    let linked = context(&images, "FROM app\nUSER root\nCOPY links/ /\n", &[("links/new", "")]);
    symlink("work", linked.join("links/opt")).unwrap();
    let refused = build(&linked, &["-t", "app"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("line 3: COPY: /opt is a directory, which"), "{refused:?}");
    let still = images.clade(&["image", "inspect", "app", "--json"]).json();
    assert_eq!((&still["digest"], images.runtime.names().len()), (&built["digest"], 0));
}
