//! Secrets that a VM was made with, and children that are made without them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use memchr::memmem;
use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::{Value, json};

use crate::supervisor::Supervised;
use crate::tool::{Runtime, expect_problem, kvm, wait_until};

const TOKEN: &[u8] = b"tk-9f3kd02mvL1qPz7WxYc4";
const KEY: &[u8] = b"correct horse battery staple, 1984";
const PAGE: u64 = 4096;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Puts bytes into a guest's memory.
fn put(all: &Supervised, name: &str, address: u64, bytes: &[u8]) {
    let written = all.runtime.clade(&["memory", "write", name, &address.to_string(), &hex(bytes)]);
    assert_eq!(written.code, Some(0), "{written:?}");
}

/// Returns all of a guest's memory.
fn memory(all: &Supervised, name: &str) -> Vec<u8> {
    let file = all.runtime.dir().join("memory");
    let read = all.runtime.clade(&["memory", "read", name, "0", "32M", "--output", file.to_str().unwrap()]);
    assert_eq!(read.code, Some(0), "{read:?}");
    let memory = fs::read(&file).unwrap();
    fs::remove_file(file).unwrap();
    assert_eq!(memory.len(), 32 << 20);
    memory
}

/// Returns how often `bytes` occur in all of a guest's memory.
fn count(all: &Supervised, name: &str, bytes: &[u8]) -> usize {
    memmem::find_iter(&memory(all, name), bytes).count()
}

/// The same of both secrets.
fn counts(all: &Supervised, name: &str) -> [usize; 2] {
    let memory = memory(all, name);
    [TOKEN, KEY].map(|secret| memmem::find_iter(&memory, secret).count())
}

/// Forks children that are paused. Returns the answer.
fn fork(all: &Supervised, args: &[&str]) -> Value {
    all.runtime.clade(&[&["fork", "--paused", "--json"], args].concat()).json()
}

fn private_kib(all: &Supervised, name: &str) -> u64 {
    let (_, vm) = all.http("GET", &format!("/v1/vms/{name}"), "");
    vm["memory"]["private_kib"].as_u64().unwrap()
}

/// A VM with both secrets in its memory: whole, across a page's edge, and in parts at pages' edges.
fn boot_with_secrets(all: &Supervised) {
    let token = all.runtime.dir().join("token");
    fs::write(&token, [TOKEN, b"\n"].concat()).unwrap();
    let mut run = all.runtime.command(&["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", "web"]);
    run.env("KEY", String::from_utf8(KEY.to_vec()).unwrap());
    let booted = run.args(["--secret", token.to_str().unwrap(), "--secret-env", "KEY"]).output().unwrap();
    assert!(booted.status.success(), "{booted:?}");
    fs::remove_file(token).unwrap();
    all.runtime.clade(&["pause", "web", "--json"]).json();
    for address in [16 << 20, (20 << 20) + 5, (24 << 20) + PAGE - 7] {
        put(all, "web", address, TOKEN);
    }
    put(all, "web", 28 << 20, &[b"KEY=", KEY, b"\0"].concat());
    // A secret that continues in a page elsewhere.
    put(all, "web", (18 << 20) + PAGE - 12, &KEY[..12]);
    put(all, "web", 19 << 20, &KEY[12..]);
}

#[test]
fn a_child_without_secrets_has_none_of_them_anywhere() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("1");
    boot_with_secrets(&all);
    let (_, vm) = all.http("GET", "/v1/vms/web", "");
    assert_eq!(vm["secrets"], json!(["token", "KEY"]), "{vm}");
    assert_eq!(counts(&all, "web"), [3, 1]);
    let forked = fork(&all, &["web", "--name", "clean-{n}", "--count", "2", "--without-secrets"]);
    assert_eq!(forked["erased"], json!({"whole": 4, "parts": 2}), "{forked}");
    assert!(fork(&all, &["web", "--name", "full"])["erased"].is_null());
    for (name, expected) in [("web", [3, 1]), ("full", [3, 1]), ("clean-1", [0, 0]), ("clean-2", [0, 0])] {
        assert_eq!(counts(&all, name), expected, "{name}");
    }
    // Nor the parts, each of which occurs once in the others.
    for part in [&KEY[..12], &KEY[12..]] {
        assert_eq!((count(&all, "full", part), count(&all, "clean-1", part)), (2, 0));
    }
    // It shares as many pages as before.
    let (own, sharing) = (private_kib(&all, "clean-1"), private_kib(&all, "full"));
    assert!(own <= sharing + 16 * PAGE / 1024, "{own} KiB, and {sharing} KiB of one that has them");
    // A reset does not bring them back, and its children have no secrets to lose.
    put(&all, "clean-1", 17 << 20, b"written since");
    all.runtime.clade(&["reset", "clean-1", "--json"]).json();
    assert_eq!((counts(&all, "clean-1"), count(&all, "clean-1", b"written since")), ([0, 0], 0));
    fork(&all, &["clean-1", "--name", "grandchild"]);
    let again = fork(&all, &["clean-1", "--name", "again", "--without-secrets"]);
    assert_eq!(again["erased"], json!({"whole": 0, "parts": 0}), "{again}");
    assert_eq!((counts(&all, "grandchild"), counts(&all, "again")), ([0, 0], [0, 0]));
    // Their names go with them; a child that has secrets can have children without.
    let names = |name: &str| all.http("GET", &format!("/v1/vms/{name}"), "").1["secrets"].clone();
    assert_eq!((names("full"), names("clean-1")), (json!(["token", "KEY"]), Value::Null));
    assert_eq!(all.runtime.clade(&["checkpoint", "full", "held"]).code, Some(0));
    all.stop("web");
    fork(&all, &["full", "--name", "late", "--without-secrets"]);
    fork(&all, &["held", "--name", "of-held", "--without-secrets"]);
    assert_eq!((counts(&all, "late"), counts(&all, "of-held")), ([0, 0], [0, 0]));
    // A new supervisor finds VMs whose processes remember their secrets.
    all.runtime.crash();
    all.serve("0");
    let later = fork(&all, &["full", "--name", "later", "--without-secrets"]);
    assert_eq!((later["erased"]["whole"].as_u64(), counts(&all, "later")), (Some(4), [0, 0]));
    // A snapshot has its memory, and no list of the secrets in it.
    let saved = all.runtime.dir().join("saved");
    all.runtime.clade(&["snapshot", "full", saved.to_str().unwrap(), "--json"]).json();
    let body = json!({"saved": {"dir": saved}, "vms": {"name": "old", "paused": true, "without_secrets": true}});
    let (status, refused) = all.http("POST", "/v1/restore", &body.to_string());
    expect_problem(&refused, status);
    assert!(status == 409 && refused["detail"].as_str().unwrap().contains("a snapshot"), "{refused}");
    fs::remove_dir_all(&saved).unwrap();
    // No file of the directory has any part of them.
    for file in all.runtime.files() {
        let Ok(bytes) = fs::read(all.runtime.dir().join(&file)) else { continue };
        for secret in [TOKEN, KEY] {
            assert!(memmem::find(&bytes, secret).is_none(), "{file}");
        }
    }
    all.end();
}

#[test]
fn a_secret_that_cannot_be_withheld_is_refused_by_its_name() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let file = all.runtime.dir().join("short");
    fs::write(&file, "only 15 bytes!!\n\n").unwrap();
    let run = |more: &[&str]| all.runtime.clade(&[&["run", "-d", "--kernel", "bare", "--mem", "32M"], more].concat());
    let refused = run(&["--secret", file.to_str().unwrap()]);
    refused.expect_refusal("\"short\": a secret of 15 bytes");
    assert!(!refused.stderr.contains("only"), "{refused:?}");
    run(&["--secret", "/nowhere/key"]).expect_refusal("/nowhere/key");
    run(&["--secret-env", "CLADE_NO_SUCH_VARIABLE"]).expect_refusal("CLADE_NO_SUCH_VARIABLE");
    all.boot("web", &[]);
    all.runtime.clade(&["fork", "web", "--without-secrets"]).expect_refusal("\"web\"");
    assert_eq!(all.runtime.names(), ["web"]);
    fs::remove_file(file).unwrap();
    all.end();
}

/// The supervisor compares the list of a VM's process with its record, which has no secret in it.
#[test]
fn records_of_vms_have_a_digest_of_their_secrets() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("1");
    boot_with_secrets(&all);
    let record = |all: &Supervised, name: &str| {
        let text = fs::read_to_string(all.runtime.dir().join(format!("{name}.vm"))).unwrap();
        assert!(!text.contains(str::from_utf8(TOKEN).unwrap()) && !text.contains("horse"), "{text}");
        serde_json::from_str::<Value>(&text).unwrap()["secrets"].clone()
    };
    let own = record(&all, "web");
    assert_eq!(own["held"]["digest"].as_str().map(str::len), Some(64), "{own}");
    fork(&all, &["web", "--name", "with"]);
    fork(&all, &["web", "--name", "without", "--without-secrets"]);
    fork(&all, &["with", "--name", "with-2"]);
    fork(&all, &["without", "--name", "without-2"]);
    fork(&all, &["without", "--name", "without-3", "--without-secrets"]);
    assert_eq!(all.runtime.clade(&["checkpoint", "web", "warm"]).code, Some(0));
    fork(&all, &["warm", "--name", "warm-with"]);
    fork(&all, &["warm", "--name", "warm-without", "--without-secrets"]);
    all.boot("plain", &[]);
    fork(&all, &["plain", "--name", "plain-2"]);
    for (name, wanted) in [
        ("with", own.clone()),
        ("with-2", own.clone()),
        ("warm-with", own),
        ("without", json!("withheld")),
        ("without-2", json!("withheld")),
        ("without-3", json!("withheld")),
        ("warm-without", json!("withheld")),
        ("plain", json!("none")),
        ("plain-2", json!("none")),
    ] {
        assert_eq!(record(&all, name), wanted, "{name}");
    }
}

/// A program that starts a supervisor may have secrets in variables, and open files: guests may break into their VMs'
/// processes.
const NONE: [String; 0] = [];

/// Returns the files of a process that a program which it starts would have, too.
fn inherited_by_programs(pid: u32) -> Vec<String> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let number = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().parse::<u32>().unwrap();
    let files = open.filter(|path| number(path) > 2).filter_map(|path| {
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", number(&path))).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        let is_closed = u32::from_str_radix(flags.trim(), 8).unwrap() & OFlags::CLOEXEC.bits() != 0;
        (!is_closed).then(|| format!("{}: {}", path.display(), fs::read_link(&path).unwrap_or_default().display()))
    });
    files.collect()
}

#[test]
fn vms_processes_have_no_variables_and_no_files_of_whoever_started_the_supervisor() {
    if !kvm() {
        return;
    }
    let mut all = Supervised { runtime: Runtime::new() };
    let file = all.runtime.dir().join("held");
    fs::write(&file, "").unwrap();
    let serve = all.runtime.command(&["serve", "--pool", "1"]);
    let mut command = Command::new("sh");
    command.args(["-c", r#"exec 9<"$0"; exec "$@""#]).arg(&file).arg(serve.get_program()).args(serve.get_args());
    command.envs(serve.get_envs().filter_map(|(name, value)| Some((name, value?)))).env("DB_PASSWORD", "canary-7");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    all.runtime.adopt(command.spawn().unwrap());
    all.await_socket();
    let disk = all.runtime.dir().join("disk.img");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    all.boot("web", &["--disk", disk.to_str().unwrap()]);
    all.fork(&["web"]);
    let has = |pid: u32| {
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap();
        let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().map(|entry| fs::read_link(entry.path()));
        let is_held = links.flatten().any(|link| link == file);
        [memmem::find(&environ, b"canary-7").is_some(), is_held]
    };
    let supervisor = all.info("pid") as u32;
    assert_eq!(has(supervisor), [true, true], "of whoever started it");
    // Nor has passt, which the supervisor starts, or a hook.
    assert_eq!(inherited_by_programs(supervisor), NONE, "of whoever started it, and its own");
    let others: Vec<u32> = all.runtime.clades().into_iter().filter(|pid| *pid != supervisor).collect();
    assert!(others.len() >= 3 && others.contains(&all.pid_of("web")), "a zygote and two VMs at least: {others:?}");
    for pid in others {
        assert_eq!(has(pid), [false, false], "process {pid}");
        assert_eq!(inherited_by_programs(pid), NONE, "process {pid}");
    }
    fs::remove_file(file).and_then(|()| fs::remove_file(disk)).unwrap();
    all.end();
}

/// A zygote may be started by other programs than `clade serve`.
#[test]
fn a_zygote_closes_the_files_that_it_was_started_with() {
    let runtime = Runtime::new();
    let file = runtime.dir().join("held");
    fs::write(&file, "").unwrap();
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let zygote = runtime.command(&["zygote", "--confine", "off"]);
    let mut command = Command::new("sh");
    command.args(["-c", r#"exec 9<"$0"; exec "$@""#]).arg(&file).arg(zygote.get_program()).args(zygote.get_args());
    command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = command.spawn().unwrap();
    drop(command);
    let of = |what: &str| format!("/proc/{}/{what}", process.id());
    // The zygote closes them before it takes its socket off standard input and waits for its first message.
    wait_until("the zygote", || fs::read_link(of("fd/0")).is_ok_and(|link| link == Path::new("/dev/null")));
    let held = fs::read_link(of("fd/9")).ok();
    assert!(held.as_ref() != Some(&file) && process.try_wait().unwrap().is_none(), "{held:?}");
    drop(ours);
    process.wait().unwrap();
}
