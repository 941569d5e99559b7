//! The supervisor's metrics, parsed strictly by the text format.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use clade_test_support::wait_for;
use rustix::process::Signal;

use crate::supervisor::Supervised;
use crate::tool::{Runtime, hold, kill, kvm, wait_until};

type Labels = BTreeMap<String, String>;

#[derive(Debug, Default)]
pub(crate) struct Exposition {
    /// The types, by name.
    families: BTreeMap<String, String>,
    samples: Vec<(String, Labels, f64)>,
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Parses `key="value",...}`, and returns the rest. Escapes are `\\`, `\"` and `\n`.
fn labels(mut text: &str) -> (Labels, &str) {
    let mut labels = Labels::new();
    loop {
        let (key, rest) = text.split_once("=\"").expect("a label");
        assert!(is_name(key), "{key}");
        let (mut value, mut chars) = (String::new(), rest.char_indices());
        let end = loop {
            let (at, c) = chars.next().expect("an end of the label");
            match c {
                '"' => break at + 1,
                '\\' => value.push(match chars.next().unwrap().1 {
                    'n' => '\n',
                    c @ ('\\' | '"') => c,
                    c => panic!("an escape {c:?}"),
                }),
                c => value.push(c),
            }
        };
        assert!(labels.insert(key.to_owned(), value).is_none(), "{key} twice");
        text = &rest[end..];
        match text.split_at(1) {
            (",", rest) => text = rest,
            ("}", rest) => return (labels, rest),
            other => panic!("{other:?}"),
        }
    }
}

/// Parses metrics. Every line must be of the format; HELP and TYPE come once, in that order, before
/// all samples of the family, which are adjacent; no sample comes twice; histograms add up.
fn parse(text: &str) -> Exposition {
    assert!(text.ends_with('\n') && !text.contains("\n\n"), "lines");
    let mut out = Exposition::default();
    let (mut helped, mut family, mut seen) = (None::<String>, String::new(), BTreeSet::new());
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').expect("a text");
            assert!(is_name(name) && !text.is_empty() && !out.families.contains_key(name), "{line}");
            helped = Some(name.to_owned());
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a type");
            assert_eq!(helped.take().as_deref(), Some(name), "TYPE follows HELP");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            if kind == "counter" {
                assert!(name.ends_with("_total"), "{line}");
            }
            family = name.to_owned();
            out.families.insert(family.clone(), kind.to_owned());
        } else {
            let end = line.find(['{', ' ']).expect("a name");
            let name = &line[..end];
            assert!(is_name(name), "{line}");
            let (labels, rest) =
                if line[end..].starts_with('{') { labels(&line[end + 1..]) } else { (Labels::new(), &line[end..]) };
            let value: f64 = rest.strip_prefix(' ').expect("a space").parse().expect("a number");
            assert!(value >= 0.0, "{line}");
            let suffix = name.strip_prefix(&family).unwrap_or_else(|| panic!("{line} is not of {family}"));
            let suffixes: &[&str] =
                if out.families[&family] == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(suffixes.contains(&suffix), "{line} in {family}");
            assert!(seen.insert((name.to_owned(), labels.clone())), "twice: {line}");
            out.samples.push((name.to_owned(), labels, value));
        }
    }
    histograms_add_up(&out);
    out
}

fn histograms_add_up(out: &Exposition) {
    for family in out.families.iter().filter(|(_, kind)| *kind == "histogram").map(|(name, _)| name) {
        let mut series: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
        for (name, labels, value) in &out.samples {
            if *name == format!("{family}_bucket") {
                let mut labels = labels.clone();
                let bound = labels.remove("le").unwrap();
                let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().unwrap() };
                series.entry(labels).or_default().push((bound, *value));
            }
        }
        for (labels, buckets) in series {
            assert!(buckets.windows(2).all(|two| two[0].0 < two[1].0 && two[0].1 <= two[1].1), "{family} {labels:?}");
            let count = out.samples.iter().find(|(name, of, _)| *name == format!("{family}_count") && *of == labels);
            assert_eq!(buckets.last(), Some(&(f64::INFINITY, count.unwrap().2)), "{family} {labels:?}");
        }
    }
}

impl Exposition {
    pub(crate) fn value(&self, name: &str, of: &[(&str, &str)]) -> Option<f64> {
        let is_it = |labels: &Labels| of.iter().all(|(key, value)| labels.get(*key).is_some_and(|is| is == value));
        self.samples.iter().find(|(is, labels, _)| is == name && is_it(labels)).map(|(.., value)| *value)
    }
}

/// Returns the metrics of the table in docs/operations.md, with their types.
fn documented() -> BTreeMap<String, String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (_, section) = text.split_once("\n## Metrics\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `clade_"));
    let row = |row: &str| {
        let mut cells = row.split(" | ");
        let name = cells.next().unwrap().trim_end_matches('`');
        (format!("clade_{name}"), cells.next().unwrap().to_owned())
    };
    rows.map(row).collect()
}

/// Forks a paused child with an idempotency key. Returns the answer.
fn keyed_fork(all: &Supervised, vm: &str, key: &str) -> String {
    let mut stream = UnixStream::connect(all.runtime.api()).unwrap();
    let body = r#"{"paused": true}"#;
    let head = format!(
        "POST /v1/vms/{vm}/fork HTTP/1.1\r\nhost: clade\r\nconnection: close\r\nidempotency-key: {key}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// Requests the metrics on many connections at once. Returns the answers.
fn scrapes(all: &Supervised, count: usize) -> Vec<String> {
    let ask = |_| {
        let mut stream = UnixStream::connect(all.runtime.api()).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: clade\r\nconnection: close\r\n\r\n").unwrap();
        stream
    };
    // All requests are sent before the first answer is read.
    let asked: Vec<UnixStream> = (0..count).map(ask).collect();
    let hear = |mut stream: UnixStream| {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    asked.into_iter().map(hear).collect()
}

pub(crate) fn scrape(all: &Supervised) -> Exposition {
    scrape_of(&all.runtime)
}

/// Returns a scrape to which all VMs have answered: on a busy host one may be silent once.
pub(crate) fn full_scrape(all: &Supervised) -> Exposition {
    wait_for("a scrape with all VMs", || {
        Some(scrape(all)).filter(|found| found.value("clade_vms_silent", &[]) == Some(0.0))
    })
}

pub(crate) fn scrape_of(runtime: &Runtime) -> Exposition {
    let mut stream = UnixStream::connect(runtime.api()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: clade\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
    parse(body)
}

#[test]
fn metrics_are_of_the_text_format_and_say_what_was_done() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let empty = scrape(&all);
    assert_eq!(empty.value("clade_vms", &[("state", "running")]), Some(0.0));
    all.boot("web", &[]);
    all.fork(&["web", "--count", "2"]);
    all.runtime.clade(&["checkpoint", "web", "cp", "--json"]).json();
    assert_eq!(all.http("GET", "/v1/vms/nobody", "").0, 404);
    let found = full_scrape(&all);
    assert_eq!(found.value("clade_vms", &[("state", "paused")]), Some(3.0));
    assert_eq!(found.value("clade_checkpoints", &[]), Some(1.0));
    assert_eq!(found.value("clade_supervised_vms", &[]), Some(3.0));
    assert_eq!(found.value("clade_fork_seconds_count", &[]), Some(1.0));
    assert_eq!(found.value("clade_boot_seconds_count", &[]), Some(1.0));
    assert_eq!(found.value("clade_requests_total", &[("status", "404")]), Some(1.0));
    assert!(found.value("clade_requests_total", &[("status", "200")]) >= Some(4.0));
    let kinds = ["absent", "reference", "shared", "exclusive", "pinned"];
    for vm in ["web", "web-1", "web-2"] {
        let of = |kind| found.value("clade_vm_pages", &[("vm", vm), ("clade", "web"), ("kind", kind)]).unwrap();
        assert_eq!(kinds.map(of).iter().sum::<f64>(), 8192.0, "{vm}");
        assert!(found.value("clade_vm_copied_pages_total", &[("vm", vm), ("cause", "guest")]).is_some());
        assert!(found.value("clade_vm_process_bytes", &[("vm", vm), ("kind", "page_tables")]) > Some(0.0));
    }
    assert_eq!(found.families, documented());
    let pauses = |vm| found.value("clade_vm_pause_seconds_count", &[("vm", vm), ("cause", "fork")]);
    assert_eq!((pauses("web"), pauses("web-1")), (Some(2.0), None), "a fork and a checkpoint");
    // A repeated answer counts as an answer, not as a fork.
    for is_replayed in [false, true] {
        let answer = keyed_fork(&all, "web", "again");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(answer.to_lowercase().contains("idempotency-replayed: true"), is_replayed, "{answer}");
    }
    let after = scrape(&all);
    let forks = |of: &Exposition| of.value("clade_fork_seconds_count", &[]).unwrap();
    let answered = |of: &Exposition| of.value("clade_requests_total", &[("status", "200")]).unwrap();
    assert_eq!(forks(&after) - forks(&found), 1.0);
    // Both of them, and the scrape before.
    assert_eq!(answered(&after) - answered(&found), 3.0);
    all.end();
}

#[test]
fn a_vm_that_hangs_is_left_out_and_counted() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.fork(&["web"]);
    let pid = all.pid_of("web-1");
    hold(pid);
    // On a busy machine the other VM may be silent once, too.
    let layers = |found: &Exposition, vm: &str| found.value("clade_vm_layers", &[("vm", vm)]);
    wait_until("a scrape with the VM that answers", || {
        let found = scrape(&all);
        assert_eq!(layers(&found, "web-1"), None);
        assert!(found.value("clade_vms_silent", &[]) >= Some(1.0));
        layers(&found, "web").is_some() && found.value("clade_vms_silent", &[]) == Some(1.0)
    });
    wait_until("the numbers of the VM that answers", || {
        let stats = all.runtime.clade(&["stats", "--json"]).json();
        assert!(stats["silent"].as_array().unwrap().contains(&"web-1".into()), "{stats}");
        stats["vms"][0]["name"] == "web"
    });
    // Each scrape waits for the VM that hangs: at most four are in progress.
    let answers = wait_for("scrapes that are together", || {
        let answers = scrapes(&all, 12);
        answers.iter().any(|text| !text.starts_with("HTTP/1.1 200 ")).then_some(answers)
    });
    kill(pid, Signal::CONT);
    let (done, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|text| text.starts_with("HTTP/1.1 200 "));
    assert!(done.len() >= 4, "{} of {}", done.len(), answers.len());
    for text in refused {
        assert!(text.starts_with("HTTP/1.1 503 ") && text.contains("urn:clade:too-many"), "{text}");
    }
    wait_until("the VM is back", || layers(&scrape(&all), "web-1").is_some());
    all.end();
}
