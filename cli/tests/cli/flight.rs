//! What is on record of a VM whose process was killed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use rustix::process::Signal;
use serde_json::Value;

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
    let expected = ["booted with 32 MiB and 1 vCPUs", "paused", "image taken: paused "];
    assert_eq!(running.lines().count(), expected.len(), "{running}");
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

    // A process that was broken into writes what it likes.
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
    // Others run on, and are known as before.
    assert_eq!(all.fork(&["web", "--name", "next"]), ["next"]);
    assert_eq!(texts(&ended(&all, "web-1")).len(), 4);
    all.end();
}
