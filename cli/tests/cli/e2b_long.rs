//! Long tests of E2B's SDKs: a hundred forks, a large file, and the SDKs of earlier years.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use clade_test_support::{Cid, TapName, python_with_e2b};

use crate::cached;
use crate::e2b::{Host, NodeScript};
use crate::e2b_tls::DomainHost;
use crate::tool::kvm;

const SCRIPT: &str = include_str!("e2b_long.py");

/// Runs a part of the script against a host whose template has this much memory.
fn drive(mem: &str, part: &[&str]) {
    if !kvm() {
        return;
    }
    let Some(python) = python_with_e2b() else { return };
    let mut host = Host::new();
    let (claim, tap) = (Cid::take(), TapName::take());
    if !cached::agent_of(mem, &mut host.runtime, &claim, &tap) {
        return;
    }
    host.runtime.clade(&["checkpoint", "web", "base", "--json"]).json();
    host.drive(&host.key("me", "all"), Command::new(python).args(["-c", SCRIPT]).args(part));
    assert_eq!(host.runtime.names(), ["web"]);
}

#[test]
#[ignore = "long"]
fn a_hundred_forks_by_the_sdk() {
    drive("128M", &["forks"]);
}

/// A guest whose kernel is interpreted takes in 0.7 MB a second at best: with `CLADE_E2B_FILE_MIB=1024` this takes over
/// an hour there.
#[test]
#[ignore = "long"]
fn a_large_file_through_the_sdk() {
    let mib = std::env::var("CLADE_E2B_FILE_MIB").unwrap_or_else(|_| "64".to_owned());
    drive("3G", &["file", &mib]);
}

/// `CLADE_E2B_OLDER` names a directory with an environment of Python for each earlier version of the
/// SDK, `python-VERSION`, and a directory of modules for each of JavaScript's, `node-VERSION`.
#[test]
#[ignore = "long"]
fn the_sdks_of_earlier_years_reach_sandboxes_by_a_domain() {
    if !kvm() {
        return;
    }
    let Some(older) = std::env::var_os("CLADE_E2B_OLDER").map(PathBuf::from) else {
        clade_test_support::skip("sdks", "CLADE_E2B_OLDER is not set");
        return;
    };
    let Some(host) = DomainHost::start() else { return };
    let (other, reader) = (host.key("other", "all"), host.key("reader", "read"));
    let entries = fs::read_dir(older).unwrap().map(|entry| entry.unwrap().path());
    let mut dirs: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    dirs.sort_by_key(|dir| std::cmp::Reverse(dir.clone()));
    assert_eq!(dirs.len(), 5, "{dirs:?}");
    for dir in dirs {
        println!("{}", dir.file_name().unwrap().display());
        let python = dir.join("bin/python");
        let arguments = [other.as_ref(), reader.as_ref(), "base".as_ref()];
        let said = if python.exists() {
            host.run(python, &[&["-c".as_ref(), crate::e2b::SCRIPT.as_ref()], &arguments[..]].concat())
        } else {
            let script = NodeScript::new(&dir.join("node_modules"), crate::e2b_tls::NODE_SCRIPT);
            host.run("node", &[&[script.path().as_ref()], &arguments[..]].concat())
        };
        print!("{said}");
    }
}
