//! A running Python with state in memory, of an image from a registry: each of its forks goes on
//! with that state, and answers separately.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use clade_test_support::wait_until_within;
use serde_json::{Value, json};

use crate::agent::{BOOT, WAIT};
use crate::image::{Images, guest, resource};
use crate::tool::{Answer, kvm, required, wait_until};

/// Number of children.
const CHILDREN: usize = 10;

/// Returns the image's layout, as `resources/python-image/build.sh` makes it. `CLADE_PYTHON_IMAGE`
/// names an existing one.
pub(crate) fn layout() -> Option<PathBuf> {
    let named = std::env::var("CLADE_PYTHON_IMAGE").ok().filter(|value| !value.is_empty()).map(PathBuf::from);
    let layout = named.or_else(|| resource("python-image/build.sh", &["--path"]));
    if layout.is_none() {
        clade_test_support::skip("python", "resources/python-image/build.sh has not made the image");
    }
    layout
}

pub(crate) fn exec(images: &Images, args: &[&str]) -> Answer {
    images.clade(&[&["exec", "--wait", WAIT], args].concat())
}

/// Waits until the interpreter of `py` has logged that it listens: a request would take its time.
pub(crate) fn wait_for_python(images: &Images) {
    wait_until_within(BOOT, "the interpreter answers", || {
        let logs = images.clade(&["logs", "py"]);
        assert_eq!(logs.code, Some(0), "{logs:?}");
        logs.stdout.contains("python answers")
    });
}

/// Returns the value of an expression in the running interpreter, as JSON.
pub(crate) fn ask(images: &Images, vm: &str, expression: &str) -> Value {
    let answer = exec(images, &[vm, "--", "answer", &format!("json.dumps({expression})")]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    // Python prints a string in quotes, and there are none within.
    let text = answer.stdout.trim_end().trim_matches('\'');
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

/// The same of several VMs at once.
fn ask_all(images: &Images, vms: &[String], expression: impl Fn(&str) -> String + Sync) -> Vec<Value> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = vms.iter().map(|vm| scope.spawn(|| ask(images, vm, &expression(vm)))).collect::<Vec<_>>();
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    })
}

fn files(images: &Images) {
    let (numbers, copy) = (images.path("numbers.json"), images.path("squares.json"));
    fs::write(&numbers, "[3, 4]").unwrap();
    let copied = images.clade(&["cp", "--wait", WAIT, numbers.to_str().unwrap(), "py:/srv/numbers.json"]);
    assert_eq!(copied.code, Some(0), "{copied:?}");
    let expression = "json.dump([n * n for n in json.load(open('/srv/numbers.json'))], open('/srv/squares.json', 'w'))";
    assert_eq!(exec(images, &["py", "--", "answer", expression]).stdout, "None\n");
    let copied = images.clade(&["cp", "--wait", WAIT, "py:/srv/squares.json", copy.to_str().unwrap()]);
    assert_eq!(copied.code, Some(0), "{copied:?}");
    assert_eq!(fs::read_to_string(copy).unwrap(), "[9, 16]");
}

/// What programs of images expect of the kernel that `clade guest` provides.
fn kernel_interfaces(images: &Images) {
    let script = images.path("kernel_interfaces.py");
    fs::write(&script, include_str!("kernel_interfaces.py")).unwrap();
    let copied = images.clade(&["cp", "--wait", WAIT, script.to_str().unwrap(), "py:/srv/kernel_interfaces.py"]);
    assert_eq!(copied.code, Some(0), "{copied:?}");
    let told = exec(images, &["py", "--", "python3", "/srv/kernel_interfaces.py"]);
    let is_there = told.stdout.lines().filter(|line| line.ends_with(": is there")).count();
    assert!(told.code == Some(0) && is_there == 15 && told.stdout.lines().count() == 15, "{told:?}");
}

#[test]
fn ten_forks_of_a_running_python_answer_each_for_itself() {
    if !kvm() {
        return;
    }
    let Some(layout) = layout() else { return };
    let Some((linux, agent)) = guest() else { return };
    let mut images = Images::new();
    let name = images.push(&layout, "python").unwrap_or_else(|| {
        assert!(!required("python"), "python is required, and there is no registry to pull it from");
        format!("oci:{}:python", layout.display())
    });
    let pulled = images.clade(&["image", "pull", &name, "--json"]).json();
    assert_eq!(pulled[0]["config"]["Entrypoint"], json!(["/usr/bin/python3", "/srv/server.py"]), "{pulled}");

    images.runtime.spawn(&["serve", "--pool", "0"]);
    wait_until("the supervisor", || images.clade(&["checkpoints"]).code == Some(0));
    let mut command = images.command(&["run", "-d", "--image", &name, "--mem", "256M", "--name", "py", "--fresh"]);
    command.arg("--kernel").arg(linux.join("vmlinux")).env("CLADE_AGENT", &agent);
    let booted: Answer = command.output().unwrap().into();
    assert_eq!(booted.code, Some(0), "{booted:?}");
    let begun = Instant::now();
    wait_for_python(&images);
    println!("python answers {:.1} s after its VM has begun", begun.elapsed().as_secs_f64());
    let raised = exec(&images, &["py", "--", "answer", "1 / 0"]);
    assert_eq!((raised.code, raised.stderr.as_str()), (Some(1), "ZeroDivisionError: division by zero\n"));
    files(&images);
    kernel_interfaces(&images);

    let about = "[token, count, random.random(), os.urandom(8).hex()]";
    let parent = ask(&images, "py", &format!("[*{about}, state.setdefault('of', 'all')]"));
    let forked = images.clade(&["fork", "py", "--count", &CHILDREN.to_string(), "--ready", "--json"]).json();
    let vms: Vec<String> = serde_json::from_value(forked["children"].clone()).unwrap();
    assert_eq!(vms.len(), CHILDREN);
    let first = ask_all(&images, &vms, |vm| format!("[*{about}, state.setdefault('me', '{vm}') and state]"));
    let (mut random, mut urandom) = (BTreeSet::new(), BTreeSet::new());
    for answer in first.iter().chain([&parent]) {
        assert_eq!(answer[0], parent[0], "drawn before the fork");
        random.insert(answer[2].to_string());
        urandom.insert(answer[3].to_string());
    }
    assert_eq!((random.len(), urandom.len()), (CHILDREN + 1, CHILDREN + 1), "each draws its own: {first:?}");
    for (vm, answer) in vms.iter().zip(&first) {
        let count = answer[1].as_u64().unwrap() - parent[1].as_u64().unwrap();
        // The hook that reseeds it has counted too, and may run twice.
        assert!((2..5).contains(&count), "the counter goes on: {parent} {answer}");
        assert_eq!(answer[4], json!({"of": "all", "me": vm}), "it sees what its parent has set, and no sibling");
    }
    // After all have set their own state.
    assert_eq!(ask(&images, &vms[0], "state['me']"), json!(vms[0]));
    let after = ask(&images, "py", "[token, count, state]");
    assert_eq!(after, json!([parent[0], parent[1].as_u64().unwrap() + 1, {"of": "all"}]), "the parent goes on");
    images.clade(&["stop", "--all"]);
}
