//! Bad input is refused with exit code 2 and one line that names it.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use clade_test_support::Cid;

use crate::tool::{Answer, CLADE, Runtime, kvm};

#[test]
fn kernels_that_are_none() {
    if !kvm() {
        return;
    }
    let runtime = Runtime::new();
    let file = |name: &str, contents: &[u8]| {
        let path = runtime.dir().join(name);
        fs::write(&path, contents).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let bare = runtime.dir().join("bare.elf");
    assert_eq!(runtime.clade(&["guest", "bare", "--output", bare.to_str().unwrap()]).code, Some(0));
    let elf = fs::read(&bare).unwrap();
    let kernels = [
        runtime.dir().join("missing").to_str().unwrap().to_owned(),
        runtime.dir().to_str().unwrap().to_owned(),
        file("empty", b""),
        file("text", b"This is not a kernel, whatever its name says.\n"),
        file("magic-only", &elf[..4]),
        file("header-cut", &elf[..40]),
        file("program-headers-cut", &elf[..80]),
        file("half", &elf[..elf.len() / 2]),
        file("gzip-cut", &[0x1f, 0x8b, 8, 0, 0, 0]),
    ];
    for kernel in kernels {
        runtime.clade(&["run", "--kernel", &kernel, "--mem", "32M"]).expect_refusal(&kernel);
    }
    assert_eq!(runtime.files().len(), 8, "no socket and no lock is left behind");
}

#[test]
fn a_kernel_that_may_not_be_read() {
    if !kvm() {
        return;
    }
    let runtime = Runtime::new();
    let kernel = runtime.dir().join("secret");
    fs::write(&kernel, b"secret").unwrap();
    fs::set_permissions(&kernel, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::read(&kernel).is_ok() {
        clade_test_support::skipped("this user may read everything");
        return;
    }
    runtime.clade(&["run", "--kernel", kernel.to_str().unwrap()]).expect_refusal("secret");
}

#[test]
fn values_that_no_vm_can_have() {
    if !kvm() {
        return;
    }
    let runtime = Runtime::new();
    let initrd = runtime.dir().join("initrd");
    fs::write(&initrd, vec![1; 16 << 20]).unwrap();
    let initrd = initrd.to_str().unwrap();
    let missing = runtime.dir().join("no-initrd");
    let missing = missing.to_str().unwrap();
    let long = "x".repeat(5000);
    let long_name = "n".repeat(49);
    let rows: [(&[&str], &str); 20] = [
        (&["--mem", "0"], "0 bytes"),
        (&["--mem", "4097"], "4097"),
        // A number of MiB, in QEMU's notation.
        (&["--mem", "256"], "did you mean 256M?"),
        (&["--mem", "1T"], "1048576 MiB"),
        (&["--mem", "64T", "--overcommit"], "70368744177664"),
        // Pages, but too few for any kernel.
        (&["--mem", "4096"], "0x1000"),
        (&["--cpus", "0"], "0 vCPUs"),
        (&["--cpus", "33"], "33 vCPUs"),
        (&["--cpus", "1000"], "1000 vCPUs"),
        (&["--cpus", "18446744073709551615"], "18446744073709551615"),
        (&["--name", "../up"], "../up"),
        (&["--name", ""], "\"\""),
        (&["--name", "a b"], "a b"),
        (&["--name", ".hidden"], ".hidden"),
        (&["--name", &long_name], &long_name),
        (&["--cmdline", &long], "5000"),
        (&["--mem", "8M", "--initrd", initrd], "16777216"),
        (&["--initrd", missing], "no-initrd"),
        (&["--initrd", "/"], "/"),
        (&["--initrd", "/dev/null"], "/dev/null"),
    ];
    for (args, value) in rows {
        let all = [&["run", "--kernel", "bare", "--detached"], args].concat();
        runtime.clade(&all).expect_refusal(value);
    }
    assert_eq!(runtime.files().len(), 1, "no socket and no lock is left behind");
}

#[test]
fn disks_that_cannot_be() {
    if !kvm() {
        return;
    }
    let runtime = Runtime::new();
    let empty = runtime.dir().join("empty.img");
    fs::write(&empty, b"short").unwrap();
    let empty = empty.to_str().unwrap();
    let run = |disk: &str| runtime.clade(&["run", "--kernel", "bare", "--mem", "32M", "--disk", disk]);
    run("/no/such/disk").expect_refusal("/no/such/disk");
    run("/dev/null").expect_refusal("/dev/null");
    run(empty).expect_refusal(empty);
    for (disk, named) in [("x,rw", "rw"), ("x,queues=99", "99"), ("", "names no file")] {
        let answer = run(disk);
        assert_eq!(answer.code, Some(2));
        assert!(answer.stderr.contains(named), "{}", answer.stderr);
    }
    let image = runtime.dir().join("disk.img");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let journal = runtime.dir().join("disk.img.clade-journal");
    fs::create_dir(&journal).unwrap();
    fs::write(journal.join("journal"), b"what no disk wrote").unwrap();
    run(image.to_str().unwrap()).expect_refusal(journal.join("journal").to_str().unwrap());
    assert!(journal.join("journal").exists() && fs::read(&image).unwrap() == vec![7; 1 << 20]);
}

#[test]
fn devices_that_cannot_be() {
    if !kvm() {
        return;
    }
    let runtime = Runtime::new();
    let file = runtime.dir().join("file");
    fs::write(&file, b"not a socket").unwrap();
    let run = |args: &[&str]| runtime.clade(&[&["run", "--kernel", "bare", "--mem", "32M"], args].concat());
    run(&["--net", "tap=lo"]).expect_refusal("lo");
    run(&["--net", "tap=sixteen-letters-"]).expect_refusal("sixteen-letters-");
    let cid = Cid::take();
    let taken = format!("cid={},socket={}", cid.number(), file.display());
    run(&["--vsock", &taken]).expect_refusal(file.to_str().unwrap());
    let nowhere = format!("cid={},socket=/no/such/directory/s", cid.number());
    run(&["--vsock", &nowhere]).expect_refusal("/no/such/directory/s");
    let many = ["--disk", "x"].repeat(17);
    run(&[&many[..], &["--rng"]].concat()).expect_refusal("18");
    // Refusals by the argument parser: its own texts, with ours in them.
    let rows: [(&[&str], &str); 6] = [
        (&["--net", "mac=02:00:00:00:00:01"], "tap=NAME"),
        (&["--net", "tap=x,mac=01:00:00:00:00:01"], "01:00:00:00:00:01"),
        (&["--net", "tap=x,speed=9"], "speed=9"),
        (&["--vsock", "cid=2,socket=x"], "\"2\""),
        (&["--vsock", "cid=5"], "socket=PATH"),
        (&["--rng", "--no-rng"], "--no-rng"),
    ];
    for (args, named) in rows {
        let answer = run(args);
        assert_eq!(answer.code, Some(2), "{answer:?}");
        assert!(answer.stderr.contains(named), "{named}: {answer:?}");
    }
    assert_eq!(runtime.files().len(), 1, "no socket and no lock is left behind");
}

#[test]
fn vms_and_guests_that_are_not_there() {
    let runtime = Runtime::new();
    for command in ["fork", "reset", "balloon", "console", "pause", "resume", "stop"] {
        runtime.clade(&[command, "nobody"]).expect_refusal("nobody");
        runtime.clade(&[command, "../up"]).expect_refusal("../up");
    }
    runtime.clade(&["guest", "windows"]).expect_refusal("windows");
    runtime.clade(&["guest", "bare", "--output", "/nonexistent/bare.elf"]).expect_refusal("/nonexistent/bare.elf");
    let none = runtime.clade(&["ps", "--json"]);
    assert_eq!(none.json(), serde_json::json!([]));
}

/// The argument parser's own errors: exit code 2, and the value in the text.
#[test]
fn arguments_that_cannot_be_parsed() {
    let runtime = Runtime::new();
    let rows: [(&[&str], &str); 9] = [
        (&["run", "--kernel", "bare", "--cpu-hide", "nonsense"], "nonsense"),
        (&["run", "--kernel", "bare", "--mem", "12Q"], "12Q"),
        (&["run", "--kernel", "bare", "--mem", "99999999999T"], "99999999999T"),
        (&["run", "--kernel", "bare", "--cpus", "two"], "two"),
        (&["run"], "--kernel"),
        (&["fork", "a", "--count", "-1"], "-1"),
        (&["fork", "a", "--count", "99999999999999999999999"], "99999999999999999999999"),
        (&["dance"], "dance"),
        (&["ps", "--yaml"], "--yaml"),
    ];
    for (args, value) in rows {
        let answer = runtime.clade(args);
        assert_eq!(answer.code, Some(2), "{args:?}: {answer:?}");
        assert!(answer.stderr.contains(value), "{args:?}: {answer:?}");
        assert!(!answer.stderr.contains("panicked"), "{answer:?}");
    }
    for args in [["--help"], ["--version"]] {
        assert_eq!(runtime.clade(&args).code, Some(0));
    }
    let similar = runtime.clade(&["run", "--kernel", "bare", "--cpu-hide", "avx512"]).stderr;
    assert!(similar.contains("avx512f"), "it says what was meant: {similar}");
}

#[test]
fn demos_that_cannot_be() {
    if !kvm() {
        return;
    }
    let runtime = Runtime::new();
    let rows: [(&[&str], &str); 4] = [
        (&["demo", "--mem", "4097"], "4097"),
        (&["demo", "--mem", "16M"], "16777216"),
        (&["demo", "--cpus", "33"], "33"),
        (&["demo", "--mem", "1T"], "1048576 MiB"),
    ];
    for (args, value) in rows {
        runtime.clade(args).expect_refusal(value);
    }
    let quirks = runtime.command(&["demo"]).env("CLADE_QUIRKS", "some").output().unwrap();
    Answer::from(quirks).expect_refusal("some");
}

/// Hosts without KVM, in a mount namespace where /dev/kvm is something else.
#[test]
fn hosts_without_kvm() {
    let runtime = Runtime::new();
    let rows = [
        ("mount -t tmpfs none /dev", "/dev/kvm is missing"),
        ("mount --bind /dev/null /dev/kvm", "/dev/kvm speaks KVM API version -1"),
    ];
    for (mount, value) in rows {
        for command in ["demo", "run --kernel bare"] {
            let script = format!("{mount} && exec {CLADE} {command}");
            let possible = Command::new("unshare").args(["-m", "sh", "-c", mount]).stderr(Stdio::null()).status();
            if !possible.is_ok_and(|status| status.success()) {
                clade_test_support::skipped("no mount namespaces for this user");
                return;
            }
            let mut there = Command::new("unshare");
            there.args(["-m", "sh", "-c", &script]).env("CLADE_RUNTIME_DIR", runtime.dir()).stdin(Stdio::null());
            Answer::from(there.output().unwrap()).expect_refusal(value);
        }
    }
}

/// A user who is not permitted to open /dev/kvm.
#[test]
fn a_user_without_permission() {
    const NOBODY: u32 = 65534;
    let runtime = Runtime::new();
    let mode = fs::metadata("/dev/kvm").map(|m| m.permissions().mode());
    if !mode.is_ok_and(|mode| mode & 0o006 == 0) || !rustix::process::geteuid().is_root() {
        clade_test_support::skipped("everyone may open /dev/kvm, it is not there, or this is not root");
        return;
    }
    // That user may have no access to the binary's directory.
    fs::set_permissions(runtime.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = runtime.dir().join("clade");
    crate::tool::copy_program(&copy);
    let mut command = Command::new(copy);
    let output = command.args(["run", "--kernel", "bare"]).uid(NOBODY).gid(NOBODY).current_dir("/").output();
    match output {
        Ok(output) => Answer::from(output).expect_refusal("no permission to open /dev/kvm"),
        Err(error) => clade_test_support::skipped(&format!("no process for another user: {error}")),
    }
}

/// A closed output pipe ends the command by the signal; other closed pipes are errors.
#[test]
fn a_process_that_ends_within_a_request_is_an_error_and_no_signal() {
    let runtime = Runtime::new();
    let listener = UnixListener::bind(runtime.socket("web")).unwrap();
    let bytes = runtime.dir().join("bytes");
    // More than its socket takes before it is read.
    fs::write(&bytes, vec![7; 4 << 20]).unwrap();
    let ends = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 64]).unwrap();
    });
    let answer = runtime.clade(&["memory", "write", "web", "0x1000", "--input", bytes.to_str().unwrap()]);
    ends.join().unwrap();
    assert_eq!(answer.code, Some(1), "{answer:?}");
    assert!(answer.stderr.contains("did not answer"), "{answer:?}");
}
