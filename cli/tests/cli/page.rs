//! The page of the supervisor's port: its sessions, and its rendering in a browser.
//!
//! `CLADE_PAGE_PYTHON` names a Python with playwright, and `CLADE_PAGE_AXE` the file `axe.min.js`
//! of axe-core. The browser is Debian's `chromium`. With `page` in `CLADE_REQUIRE` all must be
//! there.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use clade_test_support::PatientStream;
use rustix::process::Signal;
use serde_json::Value;

use crate::guest::{ECHO_PAGES, write_echo_guest};
use crate::tool::{Runtime, kill, kvm, wait_until};

const SCRIPT: &str = include_str!("page.py");

/// A supervisor with a port, and its token.
struct Port {
    runtime: Runtime,
    address: String,
    token: String,
    _claim: clade_test_support::Port,
}

/// An answer: its status, its head, its body.
struct Said {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Said {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The value of a header.
    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

impl Port {
    fn new() -> Self {
        let claim = clade_test_support::Port::take();
        let address = format!("127.0.0.1:{}", claim.number());
        let mut port = Self { runtime: Runtime::new(), address, token: String::new(), _claim: claim };
        port.serve();
        port.token = std::fs::read_to_string(port.runtime.dir().join("token")).unwrap().trim().to_owned();
        port
    }

    fn serve(&mut self) {
        let file = self.runtime.dir().join("token");
        self.runtime.spawn(&["serve", "--pool", "2", "--tcp", &self.address, "--token-file", file.to_str().unwrap()]);
        wait_until("the port", || TcpStream::connect(&self.address).is_ok());
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> PatientStream<TcpStream> {
        let mut stream = PatientStream::from(TcpStream::connect(&self.address).unwrap());
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        stream
    }

    fn ask(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Said {
        let mut bytes = Vec::new();
        self.send(method, path, headers, body).read_to_end(&mut bytes).unwrap();
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Said { status, head, body: bytes[end + 4..].to_vec() }
    }

    /// Returns the first headers of a page's request.
    fn own(&self) -> String {
        format!("host: {0}\r\norigin: http://{0}\r\n", self.address)
    }

    /// Logs in. Returns the cookie and the key as headers.
    fn log_in(&self) -> (String, String) {
        let headers = format!("{}content-type: application/json\r\n", self.own());
        let body = serde_json::json!({ "token": self.token }).to_string();
        let said = self.ask("POST", "/v1/session", &headers, body.as_bytes());
        assert_eq!(said.status, 200, "{}", said.head);
        let cookie = said.header("set-cookie").unwrap();
        assert!(cookie.contains("; HttpOnly; SameSite=Strict") && !cookie.contains(&self.token), "{cookie}");
        let cookie = cookie.split(';').next().unwrap();
        let key = said.json()["key"].as_str().unwrap().to_owned();
        (format!("cookie: {cookie}\r\n"), format!("clade-session-key: {key}\r\n"))
    }
}

#[test]
fn a_session_is_the_pages_alone_and_ends() {
    if !kvm() {
        return;
    }
    let mut port = Port::new();
    let host = format!("host: {}\r\n", port.address);
    let page = port.ask("GET", "/", &host, b"");
    assert_eq!(page.status, 200, "{}", page.head);
    let policy = page.header("content-security-policy").unwrap();
    for rule in ["default-src 'none'", "script-src 'self'", "form-action 'none'", "frame-ancestors 'none'"] {
        assert!(policy.contains(rule), "{policy}");
    }
    assert_eq!(port.ask("GET", "/", "host: evil.example\r\n", b"").status, 403);
    let (cookie, key) = port.log_in();
    let vms = |headers: &str| port.ask("GET", "/v1/vms", headers, b"").status;
    assert_eq!(vms(&format!("{host}{cookie}{key}")), 200);
    for (headers, status) in [
        (host.clone(), 401),
        (format!("{host}{cookie}"), 401),
        (format!("{host}{key}"), 401),
        (format!("{host}cookie: clade-1=x\r\n{key}"), 401),
        (format!("{host}{cookie}{key}origin: http://127.0.0.1:1\r\n"), 403),
        (format!("{host}{cookie}{key}sec-fetch-site: cross-site\r\n"), 403),
        (format!("host: evil.example\r\n{cookie}{key}"), 403),
    ] {
        assert_eq!(vms(&headers), status, "{headers}");
    }
    let pause = |headers: &str| port.ask("POST", "/v1/vms/nobody/pause", headers, b"").status;
    assert_eq!(pause(&format!("{host}{cookie}{key}")), 403, "it does not say where it comes from");
    assert_eq!(pause(&format!("{}{cookie}{key}", port.own())), 404, "there is nobody");
    // A stream ends with the session.
    let mut events = port.send("GET", "/v1/events", &format!("{host}{cookie}{key}"), b"");
    let mut begun = [0; 12];
    events.read_exact(&mut begun).unwrap();
    assert_eq!(&begun, b"HTTP/1.1 200");
    assert_eq!(port.ask("DELETE", "/v1/session", &format!("{}{cookie}{key}", port.own()), b"").status, 200);
    events.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(vms(&format!("{host}{cookie}{key}")), 401);
    // Another supervisor has none of this one's sessions.
    let (cookie, key) = port.log_in();
    kill(port.runtime.pid(), Signal::KILL);
    wait_until("its end", || TcpStream::connect(&port.address).is_err());
    port.serve();
    assert_eq!(port.ask("GET", "/v1/vms", &format!("{host}{cookie}{key}"), b"").status, 401);
    port.log_in();
}

/// A Python that drives the browser, and axe-core.
fn browser() -> Option<(String, String)> {
    let python = std::env::var("CLADE_PAGE_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let axe = std::env::var("CLADE_PAGE_AXE").unwrap_or_default();
    let has = |args: &[&str]| Command::new(args[0]).args(&args[1..]).output().is_ok_and(|done| done.status.success());
    let missing = [
        (!has(&[&python, "-c", "import playwright"])).then(|| format!("{python} has no playwright")),
        (!has(&["chromium", "--version"])).then(|| "there is no chromium".to_owned()),
        (!Path::new(&axe).is_file()).then(|| format!("CLADE_PAGE_AXE={axe:?} is no file")),
    ];
    match missing.into_iter().flatten().next() {
        None => Some((python, axe)),
        Some(reason) => {
            clade_test_support::skip("page", &reason);
            None
        }
    }
}

#[test]
fn a_browser_forks_sees_types_and_is_told() {
    if !kvm() {
        return;
    }
    let Some((python, axe)) = browser() else { return };
    let port = Port::new();
    let guest = port.runtime.dir().join("echo");
    write_echo_guest(&guest);
    let run =
        ["run", "-d", "--kernel", guest.to_str().unwrap(), "--mem", "32M", "--name", "web", "--label", "tier=<b>x"];
    let booted = port.runtime.clade(&run);
    assert_eq!(booted.code, Some(0), "{booted:?}");
    // The guest would spin.
    wait_until("the guest", || port.runtime.clade(&["logs", "web"]).stdout.contains("ready"));
    port.runtime.clade(&["pause", "web", "--json"]).json();
    let mut drive = Command::new(python);
    drive.args(["-c", SCRIPT, &format!("http://{}/", port.address), &axe, &ECHO_PAGES.to_string()]);
    let done = drive.env("CLADE_PAGE_TOKEN", &port.token).output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{text}{}", String::from_utf8_lossy(&done.stderr));
    print!("{text}");
    // The result of the browser's actions, seen another way: one was stopped, and two were made.
    let mut names = port.runtime.names();
    names.sort_unstable();
    assert_eq!(names, ["web", "web-1", "web-2"]);
}
