//! E2B's API as its Python SDK sees it, and under attack.
//!
//! `CLADE_E2B_PYTHON` names a Python with the SDK; the default is `python3`. `CLADE_E2B_NODE` names
//! a directory with `node_modules` that have the one for JavaScript.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clade_test_support::{Cid, PatientStream, Port, TapName, python_with_e2b};
use rustix::process::Signal;
use serde_json::Value;

use crate::cached;
use crate::tool::{Runtime, kill, kvm, taps, wait_until};

pub(crate) const SCRIPT: &str = include_str!("e2b_sdk.py");
/// The SDK for JavaScript by two URLs. By a domain it is used for all else.
const NODE_SCRIPT: &str = r#"
import assert from 'node:assert'
import { Sandbox } from 'e2b'
const patient = { requestTimeoutMs: 3_600_000, timeoutMs: 7_200_000 }
const box = await Sandbox.create('base', patient)
await box.files.write('/tmp/own', 'parent', patient)
const [child] = await box.fork(patient)
await child.files.write('/tmp/own', 'child', patient)
const texts = [box, child].map(one => one.files.read('/tmp/own', patient))
assert.deepEqual(await Promise.all(texts), ['parent', 'child'])
for (const one of [box, child]) assert.equal(await one.kill(patient), true)
"#;

/// The directory of the SDK for JavaScript and its dependencies.
pub(crate) fn node_modules() -> Option<PathBuf> {
    let dir = std::env::var_os("CLADE_E2B_NODE").map(|dir| Path::new(&dir).join("node_modules"));
    if dir.is_none() {
        clade_test_support::skip("e2b", "CLADE_E2B_NODE is not set");
    }
    dir
}

/// A program that uses the SDK for JavaScript. Node looks for modules beside the program.
pub(crate) struct NodeScript(tempfile::TempDir);

impl NodeScript {
    pub(crate) fn new(modules: &Path, text: &str) -> Self {
        let own = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(modules, own.path().join("node_modules")).unwrap();
        std::fs::write(own.path().join("program.mjs"), text).unwrap();
        Self(own)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("program.mjs")
    }
}

/// A supervisor with E2B's API, and its address.
pub(crate) struct Host {
    pub(crate) runtime: Runtime,
    pub(crate) address: String,
    /// Its options beside the address and the keys.
    options: Vec<String>,
    _port: Port,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::start(Runtime::new(), "127.0.0.1", |_| vec!["--e2b-domain".to_owned(), "box.test".to_owned()])
    }

    /// Serves the API at a port of an address, with the options for that port.
    pub(crate) fn start(runtime: Runtime, address: &str, options: impl FnOnce(u16) -> Vec<String>) -> Self {
        let port = Port::take();
        let (address, options) = (format!("{address}:{}", port.number()), options(port.number()));
        let mut host = Self { runtime, address, options, _port: port };
        host.serve();
        host
    }

    pub(crate) fn serve(&mut self) {
        let keys = self.runtime.dir().join("keys.json");
        let keys = keys.to_str().unwrap();
        let log = self.runtime.dir().join("serve.log");
        let mut command = self.runtime.command(&["serve", "--e2b", &self.address, "--keys", keys]);
        command.args(&self.options);
        let mut process = command.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
        wait_until("the port", || {
            let ended = process.try_wait().unwrap();
            assert!(ended.is_none(), "serve has ended: {}", std::fs::read_to_string(&log).unwrap());
            TcpStream::connect(&self.address).is_ok()
        });
        self.runtime.adopt(process);
    }

    pub(crate) fn key(&self, name: &str, scope: &str) -> String {
        let keys = self.runtime.dir().join("keys.json");
        let made = self.runtime.clade(&["key", "add", name, "--scope", scope, "--keys", keys.to_str().unwrap()]);
        assert_eq!(made.code, Some(0), "{made:?}");
        made.stdout.trim().to_owned()
    }

    /// Sends one literal request; returns its status and the bytes behind the head.
    fn says(&self, request: &str) -> (u16, String) {
        let mut stream = PatientStream::from(TcpStream::connect(&self.address).unwrap());
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        let status = answer.split(' ').nth(1).unwrap_or_else(|| panic!("{request:?}: {answer:?}")).parse().unwrap();
        (status, answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
    }

    /// Runs a program of an SDK that gets this host's address as two URLs, and prints its output.
    pub(crate) fn drive(&self, key: &str, command: &mut Command) {
        command.env("E2B_API_KEY", key);
        for name in ["E2B_API_URL", "E2B_SANDBOX_URL"] {
            command.env(name, format!("http://{}", self.address));
        }
        let done = command.output().unwrap();
        let text = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success(), "{text}{}", String::from_utf8_lossy(&done.stderr));
        print!("{text}");
    }

    pub(crate) fn call(&self, key: &str, method: &str, path: &str, body: &str) -> (u16, Value) {
        let (status, text) = self.says(&format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ));
        (status, serde_json::from_str(&text).unwrap_or_default())
    }
}

#[test]
fn the_python_sdk_makes_forks_and_ends_sandboxes() {
    if !kvm() {
        return;
    }
    let Some(python) = python_with_e2b() else { return };
    let mut host = Host::new();
    let (claim, tap) = (Cid::take(), TapName::take());
    if !cached::agent(&mut host.runtime, &claim, &tap) {
        return;
    }
    // The SDKs run commands by a shell that this guest lacks.
    assert_eq!(host.runtime.clade(&["exec", "web", "--", "test", "-e", "/bin/bash"]).code, Some(1));
    host.runtime.clade(&["checkpoint", "web", "base", "--json"]).json();
    let [me, other, reader] =
        [("me", "all"), ("other", "all"), ("reader", "read")].map(|(name, scope)| host.key(name, scope));
    host.drive(&me, Command::new(python).args(["-c", SCRIPT, &other, &reader, "base"]));
    if let Some(modules) = node_modules() {
        host.drive(&me, Command::new("node").arg(NodeScript::new(&modules, NODE_SCRIPT).path()));
    }
    wait_until("the end of its sandboxes", || host.runtime.names() == ["web"]);
    reaches_nothing_else(&host, &me);
    sends_where_it_may(&host, &me);
    outlives_its_supervisor(&mut host, &me);
}

/// The next supervisor has the sandboxes, their tokens and their owner's metadata, and their snapshots.
fn outlives_its_supervisor(host: &mut Host, key: &str) {
    let body = r#"{"templateID": "base", "timeout": 7200, "metadata": {"a": "b"}}"#;
    let (status, made) = host.call(key, "POST", "/v2/sandboxes", body);
    assert_eq!(status, 201, "{made}");
    let (id, token) = (made["sandboxID"].as_str().unwrap(), made["envdAccessToken"].as_str().unwrap());
    let (status, taken) = host.call(key, "POST", &format!("/sandboxes/{id}/snapshots"), r#"{"name": "lasts"}"#);
    assert_eq!(status, 201, "{taken}");
    let supervisor = host.runtime.pid();
    kill(supervisor, Signal::KILL);
    wait_until("its end", || TcpStream::connect(&host.address).is_err());
    host.serve();
    let (status, all) = host.call(key, "GET", "/snapshots", "");
    assert_eq!((status, &all[0]["names"][0]), (200, &"lasts".into()), "{all}");
    let body = r#"{"count": 2, "timeout": 7200, "metadata": {"a": "fork"}}"#;
    let (status, forks) = host.call(key, "POST", "/snapshots/lasts/fork", body);
    assert_eq!(status, 201, "{forks}");
    for fork in forks.as_array().unwrap() {
        let fork = fork["sandbox"]["sandboxID"].as_str().unwrap_or_else(|| panic!("{forks}"));
        let (status, info) = host.call(key, "GET", &format!("/sandboxes/{fork}"), "");
        assert_eq!((status, &info["metadata"]["a"], &info["templateID"]), (200, &"fork".into(), &"lasts".into()));
        assert_eq!(host.call(key, "DELETE", &format!("/sandboxes/{fork}"), "").0, 204);
    }
    assert_eq!(host.call(key, "POST", "/snapshots/none/fork", "{}").0, 404);
    assert_eq!(host.call(key, "DELETE", "/templates/lasts", "").0, 204);
    assert_eq!(host.call(key, "POST", "/snapshots/lasts/fork", "{}").0, 404);
    let (status, info) = host.call(key, "GET", &format!("/sandboxes/{id}"), "");
    assert_eq!((status, &info["metadata"]["a"], &info["envdAccessToken"]), (200, &"b".into(), &token.into()), "{info}");
    let ask = format!("GET /envs HTTP/1.1\r\nhost: x\r\ne2b-sandbox-id: {id}\r\nx-access-token: {token}");
    assert_eq!(host.says(&format!("{ask}\r\nconnection: close\r\n\r\n")).0, 200);
    // A paused sandbox gives its memory back.
    assert_eq!(host.call(key, "POST", &format!("/sandboxes/{id}/pause"), "{}").0, 204);
    let state = |id: &str| host.runtime.http("GET", &format!("/v1/vms/{id}"), "").1["state"].clone();
    assert_eq!(state(id), "suspended");
    // Its forks run, and have its state; it stays as it is.
    let (status, forks) = host.call(key, "POST", &format!("/sandboxes/{id}/fork"), r#"{"timeout": 7200}"#);
    assert_eq!(status, 201, "{forks}");
    let fork = &forks[0]["sandbox"];
    let (fork, token) = (fork["sandboxID"].as_str().unwrap(), fork["envdAccessToken"].as_str().unwrap());
    let ask = format!("GET /envs HTTP/1.1\r\nhost: x\r\ne2b-sandbox-id: {fork}\r\nx-access-token: {token}");
    assert_eq!(host.says(&format!("{ask}\r\nconnection: close\r\n\r\n")).0, 200);
    assert_eq!(state(id), "suspended");
    assert_eq!(host.call(key, "GET", &format!("/sandboxes/{id}"), "").1["state"], "paused");
    assert_eq!(host.call(key, "DELETE", &format!("/sandboxes/{fork}"), "").0, 204);
    assert_eq!(host.call(key, "POST", &format!("/sandboxes/{id}/connect"), r#"{"timeout": 7200}"#).0, 201);
    // A sandbox ended by another command is forgotten.
    assert_eq!(host.runtime.clade(&["stop", id]).code, Some(0));
    wait_until("it to be forgotten", || host.call(key, "GET", &format!("/sandboxes/{id}"), "").0 == 404);
}

/// Requests that name other owners' resources, or two targets.
fn reaches_nothing_else(host: &Host, key: &str) {
    let made = host.call(key, "POST", "/sandboxes", r#"{"templateID": "base", "timeout": 7200}"#);
    assert_eq!(made.0, 201, "{made:?}");
    let (id, token) = (made.1["sandboxID"].as_str().unwrap(), made.1["envdAccessToken"].as_str().unwrap());
    let ask = |head: &str| host.says(&format!("{head}\r\nconnection: close\r\n\r\n")).0;
    let own = format!("e2b-sandbox-id: {id}\r\nx-access-token: {token}");
    assert_eq!(ask(&format!("GET /envs HTTP/1.1\r\nhost: x\r\n{own}")), 200);
    assert_eq!(ask(&format!("GET /envs HTTP/1.1\r\nhost: 49983-{id}.box.test\r\nx-access-token: {token}")), 200);
    // A native VM is not a sandbox, and the host's calls stay the host's.
    assert_eq!(ask("GET /envs HTTP/1.1\r\nhost: x\r\ne2b-sandbox-id: web"), 502);
    assert_eq!(ask(&format!("GET /envs HTTP/1.1\r\nhost: x\r\ne2b-sandbox-id: {id}")), 401);
    for path in ["/init", "/clade/shutdown", "/clade/generation"] {
        assert_eq!(ask(&format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n{own}")), 403, "{path}");
    }
    for path in ["//clade/shutdown", "/x/../clade/shutdown", "/%63lade/shutdown", "/clade%2fshutdown"] {
        let status = ask(&format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n{own}"));
        assert!([400, 404].contains(&status), "{path}: {status}");
    }
    // By an address in the request's line, which may name only this host.
    assert_eq!(ask(&format!("POST http://x/clade/shutdown HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n{own}")), 403);
    for wrong in [
        format!("GET /envs HTTP/1.1\r\nhost: 49983-other.box.test\r\n{own}"),
        format!("GET /envs HTTP/1.1\r\nhost: x\r\ne2b-sandbox-id: web\r\n{own}"),
        format!("GET /envs HTTP/1.1\r\nhost: x\r\ne2b-sandbox-port: ../22\r\n{own}"),
        format!("POST /files HTTP/1.1\r\nhost: x\r\n{own}\r\ncontent-length: 3\r\ncontent-length: 4"),
    ] {
        assert_eq!(ask(&wrong), 400, "{wrong}");
    }
    assert_eq!(ask(&format!("GET / HTTP/1.1\r\nhost: x\r\n{own}\r\ne2b-sandbox-port: 22")), 502);
    assert_eq!(ask(&format!("GET /sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\norigin: http://x")), 403);
    assert_eq!(ask("GET /sandboxes HTTP/1.1\r\nhost: x"), 401);
    // A request within another's body stays there.
    let inner = "GET /envs HTTP/1.1\r\nhost: x\r\n\r\n";
    let outer = format!(
        "GET /envs HTTP/1.1\r\nhost: x\r\n{own}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{inner}",
        inner.len()
    );
    let (status, body) = host.says(&outer);
    assert!(status == 200 && !body.contains("HTTP/1.1"), "{status} {body}");
    // The sandbox is still there, and this key cannot reach another of that name.
    for (method, path, status) in [
        ("GET", format!("/sandboxes/{id}"), 200),
        ("GET", "/sandboxes/web".to_owned(), 404),
        ("DELETE", "/sandboxes/web".to_owned(), 404),
        ("DELETE", "/templates/base".to_owned(), 404),
        ("POST", "/sandboxes/..%2f..%2fweb/pause".to_owned(), 404),
        ("PATCH", "/sandboxes".to_owned(), 405),
        ("GET", "/nothing".to_owned(), 404),
        ("DELETE", format!("/sandboxes/{id}"), 204),
        ("DELETE", format!("/sandboxes/{id}"), 404),
    ] {
        let answer = host.call(key, method, &path, "");
        assert_eq!(answer.0, status, "{method} {path}: {answer:?}");
        assert!(status < 400 || answer.1["code"] == status, "{method} {path}: {answer:?}");
    }
    assert_eq!(host.runtime.clade(&["exec", "web", "--", "true"]).code, Some(0));
}

/// Rules of a request become a layer of the VM's own, and its children have it too.
fn sends_where_it_may(host: &Host, key: &str) {
    if !taps() {
        return;
    }
    let rules = r#"{"denyOut": ["10.0.0.0/8"], "allowOut": ["10.0.0.1"]}"#;
    let body = format!(r#"{{"templateID": "base", "timeout": 7200, "network": {rules}}}"#);
    let (status, made) = host.call(key, "POST", "/sandboxes", &body);
    assert_eq!(status, 201, "{made}");
    let id = made["sandboxID"].as_str().unwrap();
    let (status, forked) = host.call(key, "POST", &format!("/sandboxes/{id}/fork"), r#"{"timeout": 7200}"#);
    assert_eq!(status, 201, "{forked}");
    let child = forked[0]["sandbox"]["sandboxID"].as_str().unwrap();
    for name in [id, child] {
        let (_, vm) = host.runtime.http("GET", &format!("/v1/vms/{name}"), "");
        let layer = vm["nets"][0]["egress"][0].as_array().unwrap_or_else(|| panic!("{vm}"));
        let rules: Vec<&str> = layer.iter().map(|rule| rule["rule"].as_str().unwrap()).collect();
        assert_eq!(rules, ["allow:10.0.0.1/32", "deny:10.0.0.0/8", "allow:0.0.0.0/0", "allow:::/0"], "{vm}");
        assert_eq!(vm["nets"][0]["network"], "open", "{vm}");
        assert_eq!(host.call(key, "DELETE", &format!("/sandboxes/{name}"), "").0, 204);
    }
    replaces_its_own_rules(host, key);
}

/// Replaces rules of a running sandbox, except those of its template.
fn replaces_its_own_rules(host: &Host, key: &str) {
    let clade = |args: &[&str]| assert_eq!(host.runtime.clade(args).code, Some(0), "{args:?}");
    clade(&["network", "web", "--egress", "deny:192.0.2.0/24"]);
    clade(&["checkpoint", "web", "ruled"]);
    clade(&["network", "web", "--no-egress"]);
    let (status, made) = host.call(key, "POST", "/sandboxes", r#"{"templateID": "ruled", "timeout": 7200}"#);
    assert_eq!(status, 201, "{made}");
    let id = made["sandboxID"].as_str().unwrap().to_owned();
    let layers = |id: &str| {
        let (_, vm) = host.runtime.http("GET", &format!("/v1/vms/{id}"), "");
        let rules = |layer: &Value| {
            let rules = layer.as_array().unwrap().iter();
            rules.map(|rule| rule["rule"].as_str().unwrap().to_owned()).collect::<Vec<_>>().join(",")
        };
        let layers: Vec<String> = vm["nets"][0]["egress"].as_array().unwrap().iter().map(rules).collect();
        (vm["nets"][0]["network"].as_str().unwrap().to_owned(), layers.join(";"))
    };
    let put = |id: &str, rules: &str| host.call(key, "PUT", &format!("/sandboxes/{id}/network"), rules).0;
    let (open, closed, templates) = ("open".to_owned(), "closed".to_owned(), "deny:192.0.2.0/24".to_owned());
    assert_eq!(layers(&id), (open.clone(), templates.clone()));
    assert_eq!(put(&id, r#"{"denyOut": ["10.0.0.0/8"]}"#), 204);
    assert_eq!(layers(&id), (open.clone(), format!("{templates};deny:10.0.0.0/8")));
    let (_, forked) = host.call(key, "POST", &format!("/sandboxes/{id}/fork"), r#"{"timeout": 7200}"#);
    let child = forked[0]["sandbox"]["sandboxID"].as_str().unwrap_or_else(|| panic!("{forked}")).to_owned();
    assert_eq!(layers(&child), layers(&id), "a fork has the rules of the moment");
    assert_eq!(put(&child, r#"{"denyOut": ["10.1.0.0/16"]}"#), 204);
    assert_eq!(layers(&child), (open.clone(), format!("{templates};deny:10.1.0.0/16")));
    assert_eq!(layers(&id).1, format!("{templates};deny:10.0.0.0/8"), "its parent has its own");
    assert_eq!(put(&id, r#"{"denyOut": ["10.0.0.1/8"]}"#), 400);
    assert_eq!(put(&id, r#"{"allow_internet_access": false}"#), 204);
    assert_eq!(layers(&id), (closed, templates.clone()));
    let (_, shown) = host.call(key, "GET", &format!("/sandboxes/{child}"), "");
    assert_eq!(
        shown["network"],
        serde_json::json!({"allowPublicTraffic": true, "denyOut": ["10.1.0.0/16"]}),
        "{shown}"
    );
    let (_, shown) = host.call(key, "GET", &format!("/sandboxes/{id}"), "");
    assert_eq!((&shown["allowInternetAccess"], &shown["network"]["denyOut"]), (&false.into(), &Value::Null), "{shown}");
    assert_eq!(put(&id, "{}"), 204);
    assert_eq!(layers(&id), (open, templates));
    for name in [&id, &child] {
        assert_eq!(host.call(key, "DELETE", &format!("/sandboxes/{name}"), "").0, 204);
    }
    clade(&["rm", "ruled"]);
}

#[test]
fn keys_are_shown_once_and_taken_back_at_once() {
    if !kvm() {
        return;
    }
    let host = Host::new();
    let key = host.key("me", "all");
    assert_eq!(host.call(&key, "GET", "/v2/sandboxes", "").0, 200);
    let keys = host.runtime.dir().join("keys.json");
    let with = |args: &[&str]| host.runtime.clade(&[args, &["--keys", keys.to_str().unwrap()]].concat());
    assert_eq!(with(&["key", "ls", "--json"]).json()[0]["name"], "me");
    assert!(!with(&["key", "ls"]).stdout.contains(&key[4..]));
    with(&["key", "add", "me"]).expect_refusal("\"me\"");
    with(&["key", "add", "a/b"]).expect_refusal("\"a/b\"");
    with(&["key", "rm", "you"]).expect_refusal("\"you\"");
    assert_eq!(with(&["key", "rm", "me"]).code, Some(0));
    let (status, body) = host.call(&key, "GET", "/v2/sandboxes", "");
    assert_eq!((status, body["code"].as_u64()), (401, Some(401)), "{body}");
    // A burst of calls is limited.
    let key = host.key("busy", "read");
    let statuses: Vec<u16> = (0..900).map(|_| host.call(&key, "GET", "/v2/sandboxes", "").0).collect();
    assert!(statuses.iter().all(|status| [200, 429].contains(status)));
    let other = Runtime::new();
    other.clade(&["serve", "--e2b", "192.0.2.1:0"]).expect_refusal("192.0.2.1:0");
    other.clade(&["serve", "--e2b", &host.address]).expect_refusal(&host.address);
}

#[test]
fn a_missing_directory_of_templates_is_logged_with_its_reason() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let keys = runtime.dir().join("keys.json");
    let mut command = runtime.command(&["serve", "--e2b", "127.0.0.1:0", "--keys", keys.to_str().unwrap()]);
    for variable in ["CLADE_TEMPLATE_DIR", "XDG_DATA_HOME", "HOME"] {
        command.env_remove(variable);
    }
    let process = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    runtime.adopt(process);
    let log = runtime.heard_until("E2B's API is at ");
    assert!(log.contains("WARN") && log.contains("no directory for templates: set CLADE_TEMPLATE_DIR"), "{log}");
    runtime.signal(Signal::TERM);
    assert_eq!(runtime.ended(), Some(143));
}
