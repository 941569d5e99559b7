//! The messages of `clade serve` to a service manager, and the unit that asks for them.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Stdio;

use rustix::process::Signal;

use crate::tool::{Runtime, kvm};

#[test]
fn a_service_manager_hears_when_the_supervisor_is_ready_and_when_it_ends() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let sockets = tempfile::tempdir().unwrap();
    let path = sockets.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let mut command = runtime.command(&["serve", "--pool", "0"]);
    command.env("NOTIFY_SOCKET", &path).stdout(Stdio::null()).stderr(Stdio::null());
    let process = command.spawn().unwrap();
    runtime.adopt(process);
    let limit = std::time::Duration::from_secs(300);
    let _watchdog = clade_test_support::Watchdog::new(limit, || "the supervisor says nothing".to_owned());
    let hear = || {
        let mut text = [0; 256];
        let length = socket.recv(&mut text).unwrap();
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    assert_eq!(hear(), "READY=1");
    // By then it accepts requests.
    let (status, _) = runtime.http_at(&runtime.dir().join("clade.api"), "GET", "/v1/supervisor", "");
    assert_eq!(status, 200);
    runtime.signal(Signal::TERM);
    assert_eq!(hear(), "STOPPING=1");
    assert_eq!(runtime.ended(), Some(143));
}

#[test]
fn each_setting_of_the_unit_has_its_reason_above_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/systemd/clade.service");
    let text = std::fs::read_to_string(path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let (mut section, mut settings) = ("", Vec::new());
    for (at, line) in lines.iter().enumerate() {
        if line.starts_with('[') {
            section = line;
        } else if let Some((key, value)) = line.split_once('=').filter(|_| !line.starts_with('#')) {
            assert!(lines[at - 1].starts_with("# "), "{line} has no comment");
            assert!(!value.is_empty() && !settings.contains(&(section, key)), "{line}");
            settings.push((section, key));
        } else {
            assert!(line.is_empty() || line.starts_with('#'), "{line}");
        }
    }
    for (key, value) in [("Type", "notify"), ("KillMode", "process"), ("RuntimeDirectoryPreserve", "yes")] {
        assert!(lines.contains(&format!("{key}={value}").as_str()), "{key}: VMs outlive their supervisor");
    }
    let set = lines.iter().find_map(|line| line.strip_prefix("Environment=")).unwrap();
    for dir in ["CLADE_CHECKPOINT_DIR=/var/lib/clade/checkpoints", "CLADE_TEMPLATE_DIR=/var/lib/clade/templates"] {
        assert!(set.split(' ').any(|setting| setting == dir), "a service has no home: {set}");
    }
}
