//! The flight records of VMs whose process was killed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use rustix::process::Signal;
use serde_json::Value;

use crate::guest::write_faulting_guest;
use crate::machine::BareVm;
use crate::supervisor::Supervised;
use crate::tool::{kill, kvm, wait_until};

fn texts(record: &Value) -> Vec<String> {
    let events = record["flight"].as_array().unwrap_or_else(|| panic!("no record: {record}"));
    events.iter().map(|event| event["event"].as_str().unwrap().to_owned()).collect()
}

fn ended(all: &Supervised, name: &str) -> Value {
    let mut record = Value::Null;
    wait_until("the record of its end", || {
        let records = all.http("GET", "/v1/ended", "").1;
        let found = records.as_array().unwrap().iter().find(|record| record["name"] == name).cloned();
        record = found.unwrap_or_default();
        !record.is_null()
    });
    record
}

#[test]
fn the_last_that_happened_to_a_vm_outlives_a_kill_and_garbage_costs_its_own_record_alone() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    assert_eq!(all.fork(&["web", "--count", "2"]), ["web-1", "web-2"]);
    for command in ["resume", "reset", "pause"] {
        assert_eq!(all.runtime.clade(&[command, "web-1"]).code, Some(0), "{command}");
    }
    let running = all.runtime.clade(&["logs", "web", "--flight"]).stdout;
    // A kick for the fork's pause is the last exit of the guest, which waits for a command. On a busy host the first
    // pause may come before the guest has begun.
    let expected = ["booted with 32 MiB and 1 vCPUs", "paused", "image taken: paused ", "vCPU 0, "];
    assert_eq!(running.lines().count(), expected.len(), "{running}");
    let ends = [" kick, saved,", " 1 exits, the last: saved,"];
    assert!(ends.iter().any(|end| running.trim_end().ends_with(end)), "{running}");
    for (line, text) in running.lines().zip(expected) {
        assert!(line[13..].starts_with(text) && line.as_bytes()[2] == b':', "{running}");
    }

    kill(all.pid_of("web-1"), Signal::KILL);
    let record = ended(&all, "web-1");
    assert_eq!((&record["stopped"]["signal"], &record["stopped"]["kind"]), (&9.into(), &"process".into()), "{record}");
    let noted = texts(&record);
    let expected = ["started as a child of web, generation 1, paused", "resumed", "reset in ", "paused"];
    assert_eq!(noted.len(), expected.len(), "{noted:?}");
    assert!(noted.iter().zip(expected).all(|(noted, text)| noted.starts_with(text)), "{noted:?}");
    let shown = all.runtime.clade(&["logs", "--flight", "web-1"]).stdout;
    assert!(shown.lines().zip(&noted).all(|(line, text)| line.ends_with(text.as_str())), "{shown}");

    // A compromised process writes arbitrary bytes.
    let pid = all.pid_of("web-2");
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let is_record =
        |path: &std::path::PathBuf| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("clade-flight"));
    let path = descriptors.map(|entry| entry.path()).find(is_record).expect("the file of its record");
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0x9b; 64 * 256], 0).unwrap();
    assert!(file.write_all_at(&[1], 64 * 256).is_err() && file.set_len(1 << 40).is_err(), "its size is sealed");
    kill(pid, Signal::KILL);
    let noted = texts(&ended(&all, "web-2"));
    assert!(noted.len() <= 64 && noted.iter().all(|text| text.len() <= 1024 && !text.contains(char::is_control)));
    // Others run on, and their records are intact.
    assert_eq!(all.fork(&["web", "--name", "next"]), ["next"]);
    assert_eq!(texts(&ended(&all, "web-1")).len(), 4);
    all.end();
}

/// Returns the number of record files that a process has.
fn records_of(pid: u32) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let links = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok());
    links.filter(|to| to.to_string_lossy().contains("clade-flight")).count()
}

#[test]
fn a_supervisor_that_comes_back_has_the_records_of_vms_that_it_finds() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("0");
    all.boot("web", &[]);
    assert_eq!(all.fork(&["web", "--count", "2"]), ["web-1", "web-2"]);
    all.runtime.crash();
    // Noted without a supervisor; one VM does not answer.
    for command in ["resume", "reset", "pause"] {
        assert_eq!(all.runtime.clade(&[command, "web-1"]).code, Some(0), "{command}");
    }
    let (first, silent) = (all.pid_of("web-1"), all.pid_of("web-2"));
    kill(silent, Signal::STOP);
    all.serve("0");
    let supervisor = all.http("GET", "/v1/supervisor", "").1["pid"].as_u64().unwrap() as u32;
    wait_until("the records", || records_of(supervisor) == 2);
    kill(first, Signal::KILL);
    let noted = texts(&ended(&all, "web-1"));
    let expected = ["started as a child of web, generation 1, paused", "resumed", "reset in ", "paused"];
    assert_eq!(noted.len(), expected.len(), "{noted:?}");
    assert!(noted.iter().zip(expected).all(|(noted, text)| noted.starts_with(text)), "{noted:?}");
    // Only the other VM's record is lost.
    kill(silent, Signal::KILL);
    assert_eq!(ended(&all, "web-2")["flight"], Value::Array(Vec::new()));
    assert_eq!(all.fork(&["web", "--name", "next"]), ["next"]);
    // The records of stopped VMs are not kept either.
    for name in ["web", "next"] {
        all.stop(name);
    }
    wait_until("the records to go", || records_of(supervisor) == 0);
    all.end();
}

/// Facts of a VM's end that only a device, or a vCPU, has.
#[test]
fn a_record_has_the_warnings_of_devices_and_where_a_vcpu_was() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (kernel, image) = (dir.path().join("guest"), dir.path().join("disk.img"));
    write_faulting_guest(&kernel);
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let all = Supervised::start("0");
    let booted = ["run", "-d", "--kernel", kernel.to_str().unwrap(), "--mem", "32M", "--name", "faulty"];
    assert_eq!(all.runtime.clade(&booted).code, Some(0));
    let noted = texts(&ended(&all, "faulty"));
    let at = noted.iter().position(|text| text.starts_with("unhandled exit rip=0x"));
    let at = at.unwrap_or_else(|| panic!("no instruction: {noted:?}"));
    assert!(noted[at].contains("vCPU 0 shut down"), "{noted:?}");
    assert!(noted[at + 1].starts_with("vCPU 0, ") && noted[at + 1].ends_with("other,"), "its last exits: {noted:?}");
    assert!(noted[at + 1..].iter().any(|text| text.starts_with("ended: vCPU 0 shut down")), "{noted:?}");

    all.boot("web", &["--disk", image.to_str().unwrap()]);
    let web = BareVm::of(&all.runtime, "web");
    web.open_disk();
    web.misuse_disk();
    let record = || all.runtime.clade(&["logs", "web", "--flight"]).stdout;
    wait_until("the device's warning", || record().contains("a block device needs a reset"));
    let line = record().lines().find(|line| line.contains("needs a reset")).unwrap().to_owned();
    assert!(line.contains("disk.img"), "it names the disk: {line}");
    all.end();
}
