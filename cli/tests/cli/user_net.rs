//! Networks without an interface of the host's: a guest and its forks reach the host by passt, each
//! by its own.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use clade_test_support::{Port, wait_until_within};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::agent::BOOT;
use crate::image::{Images, guest};
use crate::python::{ask, exec, layout, wait_for_python};
use crate::tool::{Answer, kill, kvm, wait_until};

/// An argument of every passt for a VM.
const OF_A_VM: &str = "52:55:0a:00:02:02";

/// Returns the host's outgoing address, which guests reach. None without passt or a route.
fn host() -> Option<IpAddr> {
    let runs = Command::new("passt").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let address = socket.connect("198.51.100.1:9").and_then(|()| socket.local_addr());
    if runs.is_ok() && address.is_ok() {
        return address.ok().map(|address| address.ip());
    }
    clade_test_support::skip("passt", &format!("no passt, or no network: {runs:?}, {address:?}"));
    None
}

/// Returns the processes of VMs' networks, which have written their pids below `dir`.
fn passts(dir: &Path) -> BTreeSet<u32> {
    let dir = dir.display().to_string();
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_one = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        // The name alone would also match commands that look for it.
        let line = String::from_utf8_lossy(&line);
        line.starts_with("passt") && line.contains(OF_A_VM) && line.contains(&dir)
    };
    all.filter(is_one).collect()
}

/// Returns the state of a process: `T` if it is stopped.
fn state(pid: u32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('X')
}

/// Serves connections until it is dropped with the test: answers each client's word with a
/// greeting.
fn greeter(address: IpAddr) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut word = [0; 100];
            let got = client.read(&mut word).unwrap_or(0);
            // The client may have gone.
            let _ = client.write_all(&[b"hello ", &word[..got]].concat());
        }
    });
    port
}

/// A function that connects to an address and a port, sends a word, and returns the answer, or the
/// error's name.
const GREET: &str = r"exec('def greet(word, address, port, patience):\n try:\n  connection = socket.create_connection((address, port), patience)\n  connection.sendall(word.encode())\n  return connection.recv(100).decode()\n except OSError as error:\n  return type(error).__name__\n', globals())";

/// Returns the answer to a guest that connects to a port and sends its name.
fn greeted(images: &Images, vm: &str, address: impl Into<IpAddr>, port: u16, patience: u32) -> String {
    let answer = ask(images, vm, &format!("greet('{vm}', '{}', {port}, {patience})", address.into()));
    answer.as_str().unwrap().to_owned()
}

fn greets(images: &Images, vm: &str, host: IpAddr, port: u16) {
    // A child's link comes up some time after its start.
    wait_until_within(BOOT, &format!("a greeting to {vm}"), || {
        let said = greeted(images, vm, host, port, 30);
        println!("{vm}: {said}");
        said == format!("hello {vm}")
    });
}

fn is_refused(images: &Images, vm: &str, address: impl Into<IpAddr>, port: u16) {
    let said = greeted(images, vm, address, port, 3);
    assert!(["TimeoutError", "ConnectionRefusedError", "timeout", "OSError"].contains(&said.as_str()), "{vm}: {said}");
}

#[test]
fn a_guest_and_its_forks_reach_the_host_without_an_interface() {
    if !kvm() {
        return;
    }
    let (Some(layout), Some(host)) = (layout(), host()) else { return };
    let Some((linux, agent)) = guest() else { return };
    let mut images = Images::new();
    let name = format!("oci:{}:python", layout.display());
    images.clade(&["image", "pull", &name, "--json"]).json();
    // passt writes its pid as another user.
    let temporary = tempfile::Builder::new().permissions(Permissions::from_mode(0o711)).tempdir().unwrap();
    let serve = images.command(&["serve", "--pool", "2"]).env("TMPDIR", temporary.path()).spawn().unwrap();
    images.runtime.adopt(serve);
    wait_until("the supervisor", || images.clade(&["checkpoints"]).code == Some(0));
    let others = || passts(temporary.path());
    // A port in use is named in the error, and no process stays.
    let claim = Port::take();
    let forward = claim.number();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, forward)).unwrap();
    let net = format!("user,forward={forward}:8000");
    let run = || -> Answer {
        let mut command = images.command(&["run", "-d", "--image", &name, "--mem", "256M", "--name", "py", "--fresh"]);
        command.args(["--net", &net]).arg("--kernel").arg(linux.join("vmlinux")).env("CLADE_AGENT", &agent);
        command.output().unwrap().into()
    };
    let busy = run();
    assert!(busy.code == Some(2) && busy.stderr.contains("passt"), "{busy:?}");
    drop(taken);
    wait_until("no passt is left", || others().is_empty());
    let booted = run();
    assert_eq!(booted.code, Some(0), "{booted:?}");
    wait_for_python(&images);
    let resolver = exec(&images, &["py", "--", "/usr/bin/python3", "-c", "print(open('/etc/resolv.conf').read())"]);
    assert!(resolver.stdout.contains("nameserver 10.0.2.3"), "{resolver:?}");

    // Out, and in by the port that was forwarded.
    assert_eq!(ask(&images, "py", GREET), Value::Null);
    let port = greeter(host);
    greets(&images, "py", host, port);
    let listen = "state.setdefault('door', socket.create_server(('0.0.0.0', 8000))) and 1";
    assert_eq!(ask(&images, "py", listen), json!(1));
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, forward)).unwrap();
    client.write_all(b"from the host").unwrap();
    let taken = "(lambda c: [state.setdefault('client', c), c.recv(100).decode()][1])(state['door'].accept()[0])";
    assert_eq!(ask(&images, "py", taken), json!("from the host"));
    // The guest cannot reach listeners on the host's loopback address.
    let own = greeter(Ipv4Addr::LOCALHOST.into());
    for address in [Ipv4Addr::new(10, 0, 2, 2), Ipv4Addr::LOCALHOST] {
        is_refused(&images, "py", address, own);
    }

    // Children have networks of their own, with their own rules.
    let forked = images.clade(&["fork", "py", "--count", "2", "--ready", "--json"]).json();
    let deny = format!("deny:{host}");
    let narrow = ["fork", "py", "--name", "narrow", "--ready", "--egress", &deny, "--json"];
    images.clade(&narrow).json();
    images.clade(&["fork", "py", "--name", "closed", "--ready", "--network", "off", "--json"]).json();
    assert_eq!(others().len(), 5, "one each");
    let children: Vec<String> = serde_json::from_value(forked["children"].clone()).unwrap();
    for vm in &children {
        greets(&images, vm, host, port);
    }
    for vm in ["narrow", "closed"] {
        is_refused(&images, vm, host, port);
    }
    // The passt of a closed child is stopped, and takes nothing from the child's process.
    let stopped = || others().into_iter().filter(|pid| state(*pid) == 'T').count();
    wait_until("it to stop", || stopped() == 1);
    assert_eq!(images.clade(&["network", "closed", "open"]).code, Some(0));
    wait_until("it to go on", || stopped() == 0);
    greets(&images, "closed", host, port);
    // Only the parent has its connection.
    client.write_all(b" again").unwrap();
    assert_eq!(ask(&images, "py", "state['client'].recv(100).decode()"), json!(" again"));
    let ps = images.clade(&["ps", "--json"]).json();
    let nets = |vm: &Value| vm["nets"].as_array().unwrap().iter().map(|net| net["mac"].clone()).collect::<Vec<_>>();
    let macs: BTreeSet<String> = ps.as_array().unwrap().iter().flat_map(nets).map(|mac| mac.to_string()).collect();
    assert_eq!(macs.len(), 5, "{ps}");

    // A restored VM has a network of its host's.
    let saved = images.path("saved").display().to_string();
    images.clade(&["snapshot", &children[0], &saved, "--json"]).json();
    let restored = images.clade(&["restore", "-d", &saved, "--name", "restored"]);
    assert_eq!(restored.code, Some(0), "{restored:?}");
    greets(&images, "restored", host, port);

    // A stopped passt ends with its VM, too.
    assert_eq!(images.clade(&["network", "closed", "closed"]).code, Some(0));
    wait_until("it to stop", || stopped() == 1);

    // A killed network takes no VM with it, and no other's network.
    images.clade(&["stop", "narrow", "closed"]);
    wait_until("theirs to go", || others().len() == 4);
    let left = others();
    images.clade(&["fork", "py", "--name", "last", "--ready", "--json"]).json();
    let of_last: Vec<u32> = others().difference(&left).copied().collect();
    assert_eq!(of_last.len(), 1);
    kill(of_last[0], Signal::KILL);
    wait_until("its end", || !others().contains(&of_last[0]));
    is_refused(&images, "last", host, port);
    assert_eq!(ask(&images, "last", "1 + 1"), json!(2));
    greets(&images, "py", host, port);
    images.clade(&["stop", "--all"]);
    wait_until("no passt is left", || others().is_empty());
}
