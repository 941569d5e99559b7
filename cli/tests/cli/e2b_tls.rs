//! E2B's API by TLS: with curl, and with the SDK by a domain, as it is used with E2B.

use std::ffi::OsStr;
use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use clade_test_support::{Cid, Port, TapName, certificate, python_with_e2b};

use crate::cached;
use crate::e2b::{Host, NodeScript, node_modules};
use crate::tool::{Runtime, kvm, required, wait_until};

pub(crate) const NODE_SCRIPT: &str = include_str!("e2b_sdk.mjs");
/// Creates a sandbox, connects to it, and reaches a program in it by a WebSocket's handshake.
const PYTHON_SCRIPT: &str = r##"
import os, socket, ssl
import e2b.connection_config
from e2b import Sandbox
# The SDK gives a request a minute, which a busy machine may take for one.
e2b.connection_config.REQUEST_TIMEOUT = 3600.0
sandbox = Sandbox.connect(Sandbox.create("base", timeout=7200).sandbox_id)
print(sandbox.get_host(8000).removeprefix(f"8000-{sandbox.sandbox_id}."))
print(sandbox.commands.run("echo hello", timeout=0).stdout.strip())
sandbox.files.write("/tmp/f", "by TLS")
print(sandbox.files.read("/tmp/f"))
# The example of RFC 6455, then each line that comes.
sandbox.files.write("/tmp/socket", r"""#!/bin/sh
while read -r line && [ "$line" != "$(printf '\r')" ]; do :; done
printf 'HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n'
printf 'Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n'
exec cat
""")
sandbox.commands.run("chmod +x /tmp/socket", timeout=0)
sandbox.commands.run("busybox nc -ll -p 8000 -e /tmp/socket", background=True, timeout=0)
sandbox.commands.run("until busybox grep -q :1F40 /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done", timeout=0)
name, port = sandbox.get_host(8000).split(":")
trusting = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
stream = trusting.wrap_socket(socket.create_connection((name, int(port))), server_hostname=name)
lines = stream.makefile("rwb")
lines.write(f"GET /ws HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode())
lines.flush()
head = [lines.readline()]
while head[-1] not in (b"\r\n", b""):
    head.append(lines.readline())
print(head[0].decode().split()[1])
for text in [b"one\n", bytes(range(11, 256)) * 400 + b"\n"]:
    lines.write(text)
    lines.flush()
    print(lines.read(len(text)) == text)
print(sandbox.kill())
# The end of the sandbox cuts the connection.
print(lines.read(1))
"##;

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

/// DNS for a domain with all its names, and the programs that use it.
struct Resolver {
    /// A resolv.conf that names the server.
    file: PathBuf,
    _port: Port,
}

impl Resolver {
    /// Serves the domain on an address that no other test uses. None without dnsmasq.
    fn start(host: &mut Host) -> Option<Self> {
        // DNS has one port. The address is this test's own.
        let port = Port::take();
        let [high, low] = port.number().to_be_bytes();
        let address = format!("127.53.{high}.{low}");
        let mut command = Command::new("dnsmasq");
        command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file"]);
        command.args(["--bind-interfaces", "--user=root", "--local=/box.test/", "--address=/box.test/127.0.0.1"]);
        let Ok(server) = command.arg(format!("--listen-address={address}")).spawn() else {
            clade_test_support::skip("e2b", "dnsmasq is not installed");
            return None;
        };
        host.runtime.adopt(server);
        wait_until("the DNS server", || TcpStream::connect((address.as_str(), 53)).is_ok());
        let file = host.runtime.dir().join("resolv.conf");
        fs::write(&file, format!("nameserver {address}\n")).unwrap();
        Some(Self { file, _port: port })
    }

    /// A command to which the domain's names are known, and no other name.
    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c"]);
        command.args(["mount --bind \"$1\" /etc/resolv.conf && shift && exec \"$@\"", "sh"]);
        command.arg(&self.file).arg(program);
        command
    }
}

/// A host that SDKs reach by a domain, with a template `base`.
pub(crate) struct DomainHost {
    tls: TlsHost,
    resolver: Resolver,
    key: String,
    _claims: (Cid, TapName),
}

impl DomainHost {
    /// None, after the reason was printed, where it cannot be made.
    pub(crate) fn start() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            clade_test_support::skip("e2b", "only root can give a process a resolv.conf of its own");
            return None;
        }
        let mut tls = TlsHost::start()?;
        let resolver = Resolver::start(&mut tls.host)?;
        let claims = (Cid::take(), TapName::take());
        if !cached::agent(&mut tls.host.runtime, &claims.0, &claims.1) {
            return None;
        }
        tls.host.runtime.clade(&["checkpoint", "web", "base", "--json"]).json();
        let key = tls.host.key("me", "all");
        Some(Self { tls, resolver, key, _claims: claims })
    }

    pub(crate) fn domain(&self) -> String {
        format!("box.test:{}", self.tls.port)
    }

    pub(crate) fn key(&self, name: &str, scope: &str) -> String {
        self.tls.host.key(name, scope)
    }

    /// Runs a program of an SDK as with E2B: it gets a domain, and no URLs. Returns its output.
    pub(crate) fn run(&self, program: impl AsRef<OsStr>, arguments: &[&OsStr]) -> String {
        let mut command = self.resolver.command(program);
        command.args(arguments);
        command.env_remove("E2B_API_URL").env_remove("E2B_SANDBOX_URL").env("E2B_API_KEY", &self.key);
        command.env("E2B_DOMAIN", self.domain());
        command.env("SSL_CERT_FILE", &self.tls.certificate).env("NODE_EXTRA_CA_CERTS", &self.tls.certificate);
        let done = command.output().unwrap();
        let text = String::from_utf8(done.stdout).unwrap();
        assert!(done.status.success(), "{text}{}", String::from_utf8_lossy(&done.stderr));
        text
    }
}

#[test]
fn the_python_sdk_reaches_sandboxes_by_a_domain() {
    if !kvm() {
        return;
    }
    let Some(python) = python_with_e2b() else { return };
    let Some(host) = DomainHost::start() else { return };
    let said = host.run(python, &["-c".as_ref(), PYTHON_SCRIPT.as_ref()]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines, [&host.domain(), "hello", "by TLS", "101", "True", "True", "True", "b''"]);
}

/// Every method, and a program's port by its name.
#[test]
fn the_javascript_sdk_reaches_sandboxes_by_a_domain() {
    if !kvm() {
        return;
    }
    let Some(modules) = node_modules() else { return };
    let Some(host) = DomainHost::start() else { return };
    let (other, reader) = (host.key("other", "all"), host.key("reader", "read"));
    let script = NodeScript::new(&modules, NODE_SCRIPT);
    let said = host.run("node", &[script.path().as_ref(), other.as_ref(), reader.as_ref(), "base".as_ref()]);
    print!("{said}");
    assert!(!said.contains("has no"), "the newest SDK lacks methods: {said}");
}
