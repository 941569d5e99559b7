//! A Debian registry for known users only, through TLS with a certificate of its own.

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use clade_test_support::{Port, certificate};
use serde_json::json;

use crate::image::{Images, write_layout};
use crate::tool::{Answer, wait_until};

const USER: &str = "reader";
const PASSWORD: &str = "s3cret-of-the-registry";
/// Their line of htpasswd.
const LINE: &str = "reader:$2y$05$abcdefghijklmnopqrstuuW1e3orFpi1hSyUIjjQsvB7886Cb.S5.\n";
/// Name and password, as docker stores them.
const AUTH: &str = "cmVhZGVyOnMzY3JldC1vZi10aGUtcmVnaXN0cnk=";

/// The registry's process, killed with this.
struct Registry(Child);

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_there(tool: &str, flag: &str) -> bool {
    let there = Command::new(tool).arg(flag).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !there {
        clade_test_support::skipped(&format!("{tool} is not installed"));
    }
    there
}

fn start(dir: &Path, port: u16) -> Registry {
    fs::write(dir.join("htpasswd"), LINE).unwrap();
    let config = json!({
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": dir.join("storage")}},
        "auth": {"htpasswd": {"realm": "clade", "path": dir.join("htpasswd")}},
        "http": {"addr": format!("127.0.0.1:{port}"),
            "tls": {"certificate": dir.join("cert.crt"), "key": dir.join("key.pem")}},
    });
    fs::write(dir.join("config.yml"), config.to_string()).unwrap();
    let log = File::create(dir.join("registry.log")).unwrap();
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(dir.join("config.yml")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let registry = Registry(command.spawn().unwrap());
    wait_until("the registry", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    registry
}

/// Pulls with a name and a password, which is read from standard input.
fn pull_as(images: &Images, args: &[&str], password: &str) -> Answer {
    let all = [&["image", "pull", "--username", USER, "--password-stdin"], args].concat();
    let mut command = images.command(&all);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A command that refuses earlier does not read it.
    let _ = child.stdin.take().unwrap().write_all(format!("{password}\n").as_bytes());
    child.wait_with_output().unwrap().into()
}

#[test]
fn an_image_of_a_private_registry_is_pulled_with_a_password() {
    if !(is_there("docker-registry", "--version") && is_there("skopeo", "--version")) {
        return;
    }
    let images = Images::new();
    let dir = images.path("private");
    fs::create_dir(&dir).unwrap();
    let Some((ca, _)) = certificate(&dir, &[]) else { return };
    let claim = Port::take();
    let port = claim.number();
    let _registry = start(&dir, port);
    let (root, layout) = (images.path("root"), images.path("layout"));
    fs::create_dir(&root).unwrap();
    fs::write(root.join("motd"), "hello\n").unwrap();
    write_layout(&layout, &root, &json!({"Cmd": ["/bin/sh"]}));
    let name = format!("127.0.0.1:{port}/clade/image:1");
    let pushed = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet", "--dest-creds", &format!("{USER}:{PASSWORD}")])
        .arg("--dest-cert-dir")
        .arg(&dir)
        .args([format!("oci:{}:1", layout.display()), format!("docker://{name}")])
        .output()
        .unwrap();
    assert!(pushed.status.success(), "{pushed:?}");
    let host = format!("127.0.0.1:{port}");
    let docker = images.path("docker");
    fs::create_dir(&docker).unwrap();
    let keep = |auth: &str| {
        fs::write(docker.join("config.json"), json!({"auths": {&host: {"auth": auth}}}).to_string()).unwrap();
    };
    let ca = ca.to_str().unwrap();
    let pull = |config: &Path, more: &[&str]| -> Answer {
        let args = [&["image", "pull", name.as_str()], more].concat();
        images.command(&args).env("DOCKER_CONFIG", config).output().unwrap().into()
    };
    // An unknown user, a wrong password, and an untrusted certificate.
    let nowhere = images.path("nowhere");
    let nobody = pull(&nowhere, &["--ca", ca]);
    nobody.expect_refusal(&host);
    assert!(nobody.stderr.contains("--password-stdin"), "{nobody:?}");
    let wrong = pull_as(&images, &["--ca", ca, &name], "another-password");
    wrong.expect_refusal(&host);
    assert!(wrong.stderr.contains("refuses") && !wrong.stderr.contains("another-password"), "{wrong:?}");
    let other = images.path("other");
    fs::create_dir(&other).unwrap();
    let (others, _) = certificate(&other, &[]).unwrap();
    let untrusted = pull_as(&images, &["--ca", others.to_str().unwrap(), &name], PASSWORD);
    assert!(untrusted.code == Some(1) && untrusted.stderr.contains(&host), "{untrusted:?}");
    // The same by docker's configuration.
    keep("cmVhZGVyOndyb25n");
    pull(&docker, &["--ca", ca]).expect_refusal("refuses");
    keep("of-no-use!");
    let broken = pull(&docker, &["--ca", ca]);
    broken.expect_refusal("config.json");
    assert!(!broken.stderr.contains("of-no-use") && broken.stderr.contains(&host), "{broken:?}");
    assert_eq!(images.clade(&["image", "ls", "--json"]).json(), json!([]));
    keep(AUTH);
    let kept = pull(&docker, &["--ca", ca]);
    assert_eq!(kept.code, Some(0), "{kept:?}");
    assert_eq!(images.clade(&["image", "rm", &name]).code, Some(0));
    let given = pull_as(&images, &["--ca", ca, &name], PASSWORD);
    assert_eq!((given.code, given.stdout), (Some(0), kept.stdout), "{}", given.stderr);
    // One password is not sent to two registries.
    let two = pull_as(&images, &[&name, "b.example/a"], PASSWORD);
    two.expect_refusal("b.example");
    let half = images.clade(&["image", "pull", "--username", USER, &name]);
    assert!(half.code == Some(2) && half.stderr.contains("--password-stdin"), "{half:?}");
}
