//! E2B's API by TLS: with curl, and with the SDK by a domain, as it is used with E2B.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use clade_test_support::{Cid, Port, TapName, certificate};

use crate::cached;
use crate::e2b::{Host, python};
use crate::tool::{Runtime, kvm, required, wait_until};

/// Creates a sandbox, and names its agent in /etc/hosts, which the SDK reads when it starts.
const CREATE: &str = r#"
from e2b import Sandbox
sandbox = Sandbox.create("base")
with open("/etc/hosts", "a") as hosts:
    hosts.write(f"127.0.0.1 49983-{sandbox.sandbox_id}.box.test\n")
print(sandbox.get_host(8000).removeprefix(f"8000-{sandbox.sandbox_id}."))
print(sandbox.sandbox_id)
"#;
const USE: &str = r#"
import sys
from e2b import Sandbox
sandbox = Sandbox.connect(sys.argv[1])
print(sandbox.commands.run("echo hello").stdout.strip())
sandbox.files.write("/tmp/f", "by TLS")
print(sandbox.files.read("/tmp/f"))
print(sandbox.kill())
"#;

struct TlsHost {
    host: Host,
    port: u16,
    certificate: PathBuf,
}

impl TlsHost {
    /// At all addresses, as with TLS alone.
    fn start() -> Option<Self> {
        let runtime = Runtime::new();
        let Some((certificate, key)) = certificate(runtime.dir(), &["DNS:*.box.test"]) else {
            assert!(!required("e2b"), "e2b is required, and openssl is not installed");
            return None;
        };
        let files = format!("{},{}", certificate.display(), key.display());
        let mut bound = 0;
        let host = Host::start(runtime, "0.0.0.0", |port| {
            bound = port;
            ["--e2b-domain", &format!("box.test:{port}"), "--e2b-tls", &files].map(str::to_owned).into()
        });
        wait_until("the API", || {
            let text = fs::read_to_string(host.runtime.dir().join("serve.log")).unwrap();
            text.contains(&format!("E2B's API is at https://0.0.0.0:{bound}"))
        });
        Some(Self { host, port: bound, certificate })
    }

    /// Returns curl's exit code and the answer to a list of sandboxes.
    fn list(&self, scheme: &str, key: &str, trusts: bool) -> (Option<i32>, String) {
        let url = format!("{scheme}://127.0.0.1:{}/v2/sandboxes", self.port);
        let mut command = Command::new("curl");
        command.args(["--silent", "--max-time", "600", "--header", &format!("X-API-Key: {key}"), &url]);
        if trusts {
            command.arg("--cacert").arg(&self.certificate);
        }
        let done = command.output().unwrap();
        (done.status.code(), String::from_utf8(done.stdout).unwrap())
    }
}

#[test]
fn the_api_is_served_by_tls_at_any_address_and_not_without() {
    if Command::new("curl").arg("--version").stdout(Stdio::null()).status().is_err() {
        clade_test_support::skipped("curl is not installed");
        return;
    }
    let Some(host) = TlsHost::start() else { return };
    let key = host.host.key("me", "all");
    assert_eq!(host.list("https", &key, true), (Some(0), "[]".to_owned()));
    assert!(host.list("https", "e2b_no_such_key", true).1.contains("401"));
    // An unknown certificate is the client's to refuse (60); without TLS no answer comes.
    assert_eq!(host.list("https", &key, false), (Some(60), String::new()));
    let (code, text) = host.list("http", &key, true);
    assert!(code != Some(0) && text.is_empty(), "{code:?} {text}");

    let other = Runtime::new();
    let serve = |args: &[&str]| {
        let address = format!("0.0.0.0:{}", Port::take().number());
        other.clade(&[&["serve", "--e2b", &address, "--keys", "keys.json"], args].concat())
    };
    serve(&[]).expect_refusal("not a loopback address");
    let one = serve(&["--e2b-tls", "cert.pem"]);
    assert!(one.code == Some(2) && one.stderr.contains("is not two files"), "{one:?}");
    let absent = other.dir().join("absent.pem");
    serve(&["--e2b-tls", &format!("{0},{0}", absent.display())]).expect_refusal("absent.pem cannot be read");
    fs::set_permissions(&host.certificate, fs::Permissions::from_mode(0o644)).unwrap();
    let twice = format!("{0},{0}", host.certificate.display());
    serve(&["--e2b-tls", &twice]).expect_refusal("has the mode 644");
    serve(&["--e2b-domain", "box.test:x"]).expect_refusal("box.test:x");
}

/// As with E2B: the SDK gets a domain, and no URLs.
#[test]
fn the_sdk_reaches_sandboxes_by_a_domain() {
    if !kvm() {
        return;
    }
    let Some(python) = python() else { return };
    if !rustix::process::geteuid().is_root() {
        clade_test_support::skipped("only root can give a process an /etc/hosts of its own");
        return;
    }
    let Some(mut host) = TlsHost::start() else { return };
    let (claim, tap) = (Cid::take(), TapName::take());
    if !cached::agent(&mut host.host.runtime, &claim, &tap) {
        return;
    }
    host.host.runtime.clade(&["checkpoint", "web", "base", "--json"]).json();
    let hosts = host.host.runtime.dir().join("hosts");
    fs::write(&hosts, "127.0.0.1 localhost api.box.test\n").unwrap();
    let domain = format!("box.test:{}", host.port);
    let key = host.host.key("me", "all");
    let run = |script: &str, args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c"]);
        command.args(["mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"", "sh"]);
        command.arg(&hosts).args([&python, "-c", script]).args(args);
        command.env_remove("E2B_API_URL").env_remove("E2B_SANDBOX_URL").env("E2B_API_KEY", &key);
        command.env("E2B_DOMAIN", &domain).env("SSL_CERT_FILE", &host.certificate);
        let done = command.output().unwrap();
        let text = String::from_utf8(done.stdout).unwrap();
        assert!(done.status.success(), "{text}{}", String::from_utf8_lossy(&done.stderr));
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let made = run(CREATE, &[]);
    assert_eq!(made[0], domain);
    assert_eq!(run(USE, &[&made[1]]), ["hello", "by TLS", "True"]);
}
