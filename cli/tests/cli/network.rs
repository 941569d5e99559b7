//! Closed networks: by a fork, for all descendants, until they are opened.

use std::os::fd::OwnedFd;
use std::process::Command;

use clade_test_support::{TapName, write_program};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::Value;

use crate::supervisor::Supervised;
use crate::tool::{Runtime, expect_problem, kvm, stem, taps, wait_until};

/// Returns whether the packets of a VM pass, for each device.
fn networks(all: &Supervised, name: &str) -> Vec<String> {
    let (status, vm) = all.http("GET", &format!("/v1/vms/{name}"), "");
    assert_eq!(status, 200, "{vm}");
    vm["nets"].as_array().unwrap().iter().map(|net| net["network"].as_str().unwrap().to_owned()).collect()
}

fn fork(all: &Supervised, of: &str, body: &str) -> (u16, Value) {
    all.http("POST", &format!("/v1/{of}/fork"), body)
}

#[test]
fn a_closed_network_is_inherited_until_it_is_opened() {
    if !kvm() || !taps() {
        return;
    }
    let all = Supervised::start("0");
    let name = TapName::take();
    let stem = stem(&name);
    let nets = [format!("tap={stem}%d"), format!("tap={stem}%d")];
    all.boot("web", &["--net", &nets[0], "--net", &nets[1]]);
    all.fork(&["web", "--name", "child", "--network", "off"]);
    all.fork(&["child"]);
    all.fork(&["child", "--name", "opened", "--network", "open"]);
    assert_eq!(fork(&all, "vms/web", r#"{"name": "api", "paused": true, "network": "closed"}"#).0, 200);
    assert_eq!(all.runtime.clade(&["checkpoint", "child", "held"]).code, Some(0));
    assert_eq!(all.runtime.clade(&["checkpoint", "web", "free"]).code, Some(0));
    for (of, name, body, networks_are) in [
        ("checkpoints/held", "of-held", "", "closed"),
        ("checkpoints/free", "of-free", "", "open"),
        ("checkpoints/free", "shut", r#", "network": "closed""#, "closed"),
        ("checkpoints/held", "wide", r#", "network": "open""#, "open"),
    ] {
        let body = format!(r#"{{"name": "{name}", "paused": true{body}}}"#);
        assert_eq!(fork(&all, of, &body).0, 200, "{name}");
        assert_eq!(networks(&all, name), [networks_are; 2], "{name}");
    }
    let saved = all.runtime.dir().join("saved");
    let saved = saved.to_str().unwrap();
    all.runtime.clade(&["snapshot", "child", saved, "--json"]).json();
    let restored = all.runtime.clade(&["restore", "-d", "--paused", saved, "--name", "restored"]);
    assert_eq!(restored.code, Some(0), "{restored:?}");
    std::fs::remove_dir_all(saved).unwrap();
    for (name, network) in [
        ("web", "open"),
        ("child", "closed"),
        ("child-1", "closed"),
        ("opened", "open"),
        ("api", "closed"),
        ("restored", "closed"),
    ] {
        assert_eq!(networks(&all, name), [network; 2], "{name}");
    }
    // Only the host opens and closes it, and a reset does not change that.
    let opened = all.runtime.clade(&["network", "child", "open", "--json"]).json();
    assert_eq!(opened["nets"][1]["network"], "open", "{opened}");
    assert_eq!(all.runtime.clade(&["network", "opened", "closed"]).code, Some(0));
    for name in ["child", "opened", "child-1"] {
        all.runtime.clade(&["reset", name, "--json"]).json();
    }
    let now = ["child", "opened", "child-1"].map(|name| networks(&all, name).concat());
    assert_eq!(now, ["openopen", "closedclosed", "closedclosed"]);
    assert_eq!(all.http("POST", "/v1/vms/child/network", r#"{"network": "closed"}"#).1["nets"][0]["network"], "closed");
    // Other values are refused by name.
    let (status, refused) = fork(&all, "vms/web", r#"{"network": "ajar"}"#);
    expect_problem(&refused, status);
    assert!(status == 400 && refused["detail"].as_str().unwrap().contains("ajar"), "{refused}");
    let refused = all.runtime.clade(&["network", "web", "ajar"]);
    assert!(refused.code == Some(2) && refused.stderr.contains("ajar"), "{refused:?}");
    all.boot("lone", &[]);
    let (status, refused) = all.http("POST", "/v1/vms/lone/network", r#"{"network": "closed"}"#);
    expect_problem(&refused, status);
    assert_eq!((status, refused["type"].as_str()), (409, Some("urn:clade:no-device")), "{refused}");
    // A VM without a network device has nothing to close.
    all.fork(&["lone", "--network", "closed"]);
    for name in ["held", "free"] {
        assert_eq!(all.runtime.clade(&["rm", name]).code, Some(0));
    }
    all.end();
}

/// A compromised process of a VM: it writes to the queues of its interfaces, whatever its devices'
/// state is.
struct Queues(Vec<OwnedFd>);

impl Queues {
    fn of(pid: u32) -> Self {
        let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
        let is_queue =
            |path: &std::path::Path| std::fs::read_link(path).is_ok_and(|link| link.ends_with("dev/net/tun"));
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap());
        let queues = fds.filter(|fd| is_queue(&fd.path())).map(|fd| {
            let number = fd.file_name().to_str().unwrap().parse().unwrap();
            pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).unwrap()
        });
        Self(queues.collect())
    }

    /// Returns whether packets that are written to them pass.
    fn pass(&self) -> Vec<bool> {
        // The header of virtio's, and a broadcast of an unused type.
        let mut packet = [0; 12 + 60];
        packet[12..18].fill(0xff);
        packet[18] = 2;
        packet[24..26].copy_from_slice(&[0x88, 0xb5]);
        let passes = |queue: &OwnedFd| match rustix::io::write(queue, &packet) {
            Ok(written) => written == packet.len(),
            Err(error) => {
                assert_eq!(error, Errno::IO, "a queue of an interface that is down");
                false
            }
        };
        self.0.iter().map(passes).collect()
    }
}

/// A hook that takes interfaces up, as every hook does.
fn write_hook(all: &Runtime) -> String {
    let hook = all.dir().join("up-hook");
    write_program(&hook, "#!/bin/sh\n[ $CLADE_EVENT = down ] || ip link set \"$CLADE_TAP\" up\n", 0o755);
    hook.to_str().unwrap().to_owned()
}

fn is_up(interface: &str) -> bool {
    let flags = std::fs::read_to_string(format!("/sys/class/net/{interface}/flags")).unwrap();
    u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).unwrap() & 1 == 1
}

#[test]
fn a_closed_network_is_closed_for_whoever_has_its_queues() {
    if !kvm() || !taps() {
        return;
    }
    let mut all = Supervised { runtime: Runtime::new() };
    let hook = write_hook(&all.runtime);
    let serve = |all: &mut Supervised| {
        all.runtime.spawn(&["serve", "--pool", "2", "--net-hook", &hook]);
        wait_until("the supervisor", || all.runtime.clade(&["checkpoints"]).code == Some(0));
    };
    serve(&mut all);
    let name = TapName::take();
    let net = format!("tap={}%d", stem(&name));
    all.boot("web", &["--net", &net, "--net", &net]);
    let pass = |all: &Supervised, vm: &str| Queues::of(all.pid_of(vm)).pass();
    assert_eq!(pass(&all, "web"), [true; 2]);

    // A child is closed before it runs, and so are its own, by any way of making them.
    all.fork(&["web", "--name", "child", "--network", "closed"]);
    all.fork(&["child", "--name", "grand"]);
    all.fork(&["child", "--count", "2", "--name", "two-{n}"]);
    assert_eq!(all.runtime.clade(&["checkpoint", "child", "held"]).code, Some(0));
    assert_eq!(all.runtime.clade(&["checkpoint", "child", "kept", "--keep"]).code, Some(0));
    let saved = all.runtime.dir().join("saved");
    let saved = saved.to_str().unwrap();
    all.runtime.clade(&["snapshot", "child", saved, "--json"]).json();
    let restore = |name: &str, more: &[&str]| {
        let restored = all.runtime.clade(&[&["restore", "-d", saved, "--name", name], more].concat());
        assert_eq!(restored.code, Some(0), "{restored:?}");
    };
    restore("restored", &[]);
    restore("wide", &["--network", "open"]);
    all.fork(&["held", "--name", "of-held"]);
    all.fork(&["kept", "--name", "of-kept"]);
    all.fork(&["held", "--name", "opened", "--network", "open"]);
    for (vm, state) in [
        ("web", true),
        ("child", false),
        ("grand", false),
        ("two-1", false),
        ("two-2", false),
        ("restored", false),
        ("wide", true),
        ("of-held", false),
        ("of-kept", false),
        ("opened", true),
    ] {
        assert_eq!(pass(&all, vm), [state; 2], "{vm}");
        assert_eq!(networks(&all, vm), [if state { "open" } else { "closed" }; 2], "{vm}");
    }

    // The supervisor opens and closes it, and a request to the VM's own process does not.
    let (status, vm) = all.http("POST", "/v1/vms/grand/network", r#"{"network": "open"}"#);
    assert_eq!((status, &pass(&all, "grand")[..]), (200, &[true; 2][..]), "{vm}");
    assert_eq!(all.runtime.clade(&["network", "grand", "closed"]).code, Some(0));
    assert_eq!(pass(&all, "grand"), [false; 2]);
    let own = all.runtime.socket("grand");
    let (status, vm) = all.runtime.http_at(&own, "POST", "/v1/vms/grand/network", r#"{"network": "open"}"#);
    assert_eq!((status, vm["nets"][0]["network"].as_str()), (200, Some("open")), "{vm}");
    assert_eq!(pass(&all, "grand"), [false; 2]);
    // Neither are children and checkpoints of such a process open.
    all.fork(&["grand", "--name", "great"]);
    assert_eq!((pass(&all, "great"), networks(&all, "great").concat()), (vec![false; 2], "closedclosed".to_owned()));
    let info = all.runtime.clade(&["checkpoint", "grand", "lied", "--json"]).json();
    assert_eq!(info["network"], "closed", "{info}");
    all.runtime.clade(&["snapshot", "grand", &format!("{saved}-lied"), "--json"]).json();
    let restored = all.runtime.clade(&["restore", "-d", &format!("{saved}-lied"), "--name", "lied"]);
    assert_eq!(
        (restored.code, pass(&all, "lied"), networks(&all, "lied").concat()),
        (Some(0), vec![false; 2], "closedclosed".to_owned())
    );

    // A snapshot of an open network is restored open.
    all.runtime.clade(&["snapshot", "web", &format!("{saved}-open"), "--json"]).json();
    let restored = all.runtime.clade(&["restore", "-d", &format!("{saved}-open"), "--name", "again"]);
    assert_eq!((restored.code, pass(&all, "again")), (Some(0), vec![true; 2]));
    assert_eq!(all.runtime.clade(&["network", "again", "closed"]).code, Some(0));
    assert_eq!(pass(&all, "again"), [false; 2]);

    // A supervisor that was killed between its record and the interfaces.
    let process = all.pid_of("child");
    all.runtime.crash();
    let (_, vm) = all.runtime.http_at(&all.runtime.socket("child"), "GET", "/v1/vms/child", "");
    for net in vm["nets"].as_array().unwrap() {
        let up = Command::new("ip").args(["link", "set", net["tap"].as_str().unwrap(), "up"]).status().unwrap();
        assert!(up.success());
    }
    assert_eq!(Queues::of(process).pass(), [true; 2]);
    serve(&mut all);
    assert_eq!(pass(&all, "child"), [false; 2]);
    assert_eq!(all.runtime.clade(&["network", "child", "open"]).code, Some(0));
    assert_eq!(pass(&all, "child"), [true; 2]);
    for checkpoint in ["kept", "held", "lied"] {
        // Those that were not kept ended with their supervisor.
        all.runtime.clade(&["rm", checkpoint]);
    }
    for dir in ["saved", "saved-lied", "saved-open", "clade.checkpoints"] {
        std::fs::remove_dir_all(all.runtime.dir().join(dir)).unwrap();
    }
    std::fs::remove_file(&hook).unwrap();
    all.end();
}

#[test]
fn an_interface_that_outlives_its_closed_vm_is_up_again() {
    if !kvm() || !taps() {
        return;
    }
    let all = Supervised::start("0");
    let name = TapName::take();
    let tap = format!("{}9", stem(&name));
    let ip = |args: &[&str]| assert!(Command::new("ip").args(args).status().unwrap().success(), "{args:?}");
    ip(&["tuntap", "add", "mode", "tap", "vnet_hdr", &tap]);
    let _removed = Interface(&tap);
    ip(&["link", "set", &tap, "up"]);
    all.boot("web", &["--net", &format!("tap={tap}")]);
    assert!(is_up(&tap));
    assert_eq!(all.runtime.clade(&["network", "web", "closed"]).code, Some(0));
    assert!(!is_up(&tap));
    all.stop("web");
    wait_until("the interface", || is_up(&tap));
    // One that was open is left as the operator has it.
    all.boot("next", &["--net", &format!("tap={tap}")]);
    ip(&["link", "set", &tap, "down"]);
    assert_eq!(all.runtime.clade(&["network", "next", "open"]).code, Some(0));
    all.stop("next");
    assert!(!is_up(&tap));
    all.end();
}

/// Removes an interface when it is dropped.
struct Interface<'a>(&'a str);

impl Drop for Interface<'_> {
    fn drop(&mut self) {
        // A test that has failed early has not made the interface.
        let _ = Command::new("ip").args(["link", "del", self.0]).status();
    }
}
