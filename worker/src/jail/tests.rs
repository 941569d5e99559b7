use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use clade_snapshot::KnownDir;
use serde_json::json;

use super::*;

#[test]
fn a_confinement_is_written_as_it_is_read() {
    for confinement in [Confinement::Auto, Confinement::Require, Confinement::Off] {
        assert_eq!(confinement.to_string().parse::<Confinement>().unwrap(), confinement);
    }
    let refused = "on".parse::<Confinement>().unwrap_err().to_string();
    assert!(refused.contains("\"on\""), "{refused}");
}

#[test]
fn a_layer_that_fails_is_an_error_only_where_it_is_required() {
    let failed = || Err(io::Error::from_raw_os_error(libc::EPERM));
    assert!(Confinement::Auto.judge("Landlock", failed()).is_ok());
    let refused = Confinement::Require.judge("Landlock", failed()).unwrap_err().to_string();
    assert!(refused.contains("Landlock"), "{refused}");
}

/// The lists as written.
fn lists() -> serde_json::Value {
    serde_json::from_str(seccomp::LISTS).unwrap()
}

#[test]
fn each_entry_of_a_list_has_its_reason() {
    seccomp::prepare().unwrap();
    for (name, list) in lists().as_object().unwrap() {
        for entry in list["filter"].as_array().unwrap() {
            let reason = entry["comment"].as_str().unwrap_or_default();
            assert!(!reason.is_empty(), "{name}: {entry}");
        }
    }
}

#[test]
fn no_list_has_a_way_out() {
    // With any of these a compromised process could start another, look into one, or leave the
    // jail.
    let never = [
        "execve",
        "execveat",
        "fork",
        "vfork",
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "pidfd_getfd",
        "pidfd_send_signal",
        "kill",
        "tkill",
        "rt_sigqueueinfo",
        "rt_tgsigqueueinfo",
        "socket",
        "connect",
        "bind",
        "listen",
        "unshare",
        "setns",
        "mount",
        "umount2",
        "pivot_root",
        "chroot",
        "open_tree",
        "move_mount",
        "fsopen",
        "bpf",
        "perf_event_open",
        "keyctl",
        "add_key",
        "request_key",
        "init_module",
        "finit_module",
        "kexec_load",
        "setuid",
        "setgid",
        "setresuid",
        "setgroups",
        "capset",
        "open_by_handle_at",
        "name_to_handle_at",
        "reboot",
        "swapon",
        "acct",
        "quotactl",
        "iopl",
        "ioperm",
        "modify_ldt",
        "personality",
        "vmsplice",
        "landlock_add_rule",
    ];
    let lists = lists();
    let names: BTreeSet<&str> =
        lists["worker"]["filter"].as_array().unwrap().iter().map(|entry| entry["syscall"].as_str().unwrap()).collect();
    let there: Vec<_> = never.iter().filter(|name| names.contains(**name)).collect();
    assert!(there.is_empty(), "{there:?}");
    assert_eq!(lists["worker"]["mismatch_action"], "kill_process");
    // Every worker loses the calls that only the zygote needs.
    let of_zygote = lists["zygote"]["filter"].as_array().unwrap();
    let programs = seccomp::programs().unwrap();
    for kind in ["disks", "snapshot", "locks", "child"] {
        let taken = programs[kind]["filter"].as_array().unwrap();
        assert!(of_zygote.iter().all(|entry| taken.contains(entry)), "{kind}");
        assert_eq!(programs[kind]["match_action"], "kill_process");
    }
    // Rings and processes: only under the conditions of another list.
    assert!(!names.contains("io_uring_setup") || lists["made_before"]["match_action"]["errno"] == libc::EPERM);
    assert!(!names.contains("clone3") || lists["absent"]["match_action"]["errno"] == libc::ENOSYS);
}

#[test]
fn what_serves_a_guest_may_do_less_than_the_worker() {
    let lists = lists();
    let entries = |list: &str| -> Vec<(String, String)> {
        let all = lists[list]["filter"].as_array().unwrap();
        all.iter().map(|entry| (entry["syscall"].to_string(), entry["args"].to_string())).collect()
    };
    assert_eq!(
        (&lists["guest"]["mismatch_action"], &lists["guest"]["match_action"]),
        (&json!("allow"), &json!("kill_process"))
    );
    // Every entry restricts a permitted call: wholly, or with the same arguments.
    let worker = entries("worker");
    for entry in entries("guest") {
        let is_there = worker.iter().any(|(name, args)| *name == entry.0 && (entry.1 == "null" || *args == entry.1));
        assert!(is_there, "{entry:?}");
    }
}

/// Expected result of an attempt from inside the jail.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// It succeeds: a jail in which every call fails would pass all else.
    Done,
    /// The kernel returns this error.
    Refused(i32),
    /// The kernel kills the process.
    Killed,
}

/// The variables with the attempt to make, and with the place of its files.
const ATTEMPT: &str = "CLADE_JAIL_ATTEMPT";
const PLACE: &str = "CLADE_JAIL_PLACE";
/// The variable for confining the process as a zygote first.
const ZYGOTE: &str = "CLADE_JAIL_ZYGOTE";

fn attempts() -> Vec<(&'static str, Fate)> {
    use Fate::{Done, Killed, Refused};
    let (denied, not_permitted) = (Refused(libc::EACCES), Refused(libc::EPERM));
    vec![
        // Calls that a worker needs.
        ("read-granted", Done),
        ("write-image", Done),
        ("name-beside-image", Done),
        ("unnamed-overlay", Done),
        ("saved-file", Done),
        ("memory-file", Done),
        ("own-pagemap", Done),
        ("thread", Done),
        ("signal-itself", Done),
        // Files of others.
        ("read-passwords", denied),
        ("read-beside", denied),
        ("write-granted-for-reading", denied),
        ("name-in-overlays", denied),
        ("open-overlays", denied),
        ("remove-beside", Killed),
        // Writes to a descriptor handed over for reading.
        ("write-handed", denied),
        ("mode-of-handed", Killed),
        ("hide-handed", Killed),
        ("show-handed", Killed),
        ("set-uid-of-handed", Killed),
        ("freeze-handed", Done),
        ("attribute-of-handed", Killed),
        ("unlock-handed", Killed),
        ("cache-of-handed", Killed),
        ("no-cache-of-handed", Killed),
        ("disks-no-cache-of-handed", Killed),
        ("disks-mode-of-its-own", Done),
        ("disks-hide-its-own", Killed),
        ("disks-set-uid-of-its-own", Killed),
        ("disks-set-gid-of-its-own", Killed),
        ("locks-no-cache-of-handed", Killed),
        ("locks-mode-of-handed", Killed),
        ("locks-hide-handed", Killed),
        ("locks-owner-of-handed", Killed),
        ("locks-files", Killed),
        ("exchanged-directory", denied),
        ("snapshot-write-handed", denied),
        ("snapshot-mode-of-handed", Killed),
        ("snapshot-hide-handed", Killed),
        ("snapshot-attribute-of-handed", Killed),
        ("snapshot-owner-of-handed", Killed),
        ("snapshot-files", Done),
        ("parents-memory", denied),
        ("list-root", denied),
        ("raw-kvm", denied),
        // Other processes.
        ("signal-parent", Killed),
        ("kill-parent", Killed),
        ("trace-parent", Killed),
        ("limit-parent", Killed),
        ("slow-parent", Killed),
        ("real-time", not_permitted),
        ("signals-by-descriptor", Killed),
        ("read-parent", Killed),
        ("fork", Killed),
        ("execute", Killed),
        // Calls that only the zygote may make.
        ("fork-as-the-zygote", Killed),
        ("wait", Killed),
        ("descriptor-of-parent", Killed),
        ("new-domain", Killed),
        ("capabilities", Killed),
        // The network, and programs that listen on this host.
        ("unix-socket", Killed),
        ("internet-socket", Killed),
        ("datagrams", Killed),
        ("ring", not_permitted),
        // Ways out.
        ("namespace", Killed),
        ("mount", Killed),
        ("setuid", Killed),
        ("code", Killed),
        ("module", Killed),
        ("keyring", Killed),
        ("core-file", Done),
        // Memory.
        ("memory-for-a-vm", Done),
        ("memory-without-end", Refused(libc::ENOMEM)),
        ("more-memory", Killed),
    ]
}

/// A system call with up to six arguments. Returns the error's number.
fn system_call(number: libc::c_long, args: &[libc::c_long]) -> Result<(), i32> {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    let [a, b, c, d, e, f] = all;
    // SAFETY: the calls of the attempts below are refused, or touch no memory of this process.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        rc if rc < 0 => Err(io::Error::last_os_error().raw_os_error().unwrap_or(-1)),
        _ => Ok(()),
    }
}

/// The RAM that the process is confined for.
const RAM: u64 = 64 << 20;

/// Maps private memory, and leaves it there.
fn map_private(bytes: u64) -> Result<(), i32> {
    let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let args = [0, bytes as i64, i64::from(read_write), i64::from(private), -1, 0];
    system_call(libc::SYS_mmap, &args)
}

/// Makes one attempt, in a confined process. Returns the error's number.
#[expect(clippy::cast_lossless, reason = "arguments of system calls, whatever type they have")]
fn attempt(which: &str, place: &std::path::Path, parent: u32, handed: &std::fs::File) -> Result<(), i32> {
    use std::fs::{File, OpenOptions, read_dir, remove_file};
    use std::os::unix::fs::OpenOptionsExt;

    let done = |result: io::Result<()>| result.map_err(|error| error.raw_os_error().unwrap_or(-1));
    macro_rules! raw {
        ($number:ident $(, $arg:expr)*) => {
            system_call(libc::$number, &[$($arg as libc::c_long),*])
        };
    }
    match which {
        "read-granted" => done(std::fs::read(place.join("granted")).map(drop)),
        "write-image" => done(OpenOptions::new().write(true).open(place.join("image/disk")).map(drop)),
        // What had the path when it was checked was another.
        "exchanged-directory" => done(File::open(place.join("exchanged/memory")).map(drop)),
        "saved-file" => done(File::open(place.join("saved/memory")).map(drop)),
        "locks-files" => done(std::fs::rename(place.join("image/disk"), place.join("image/other"))),
        "name-beside-image" | "snapshot-files" => done(File::create(place.join("image/journal")).map(drop)),
        "write-handed" | "snapshot-write-handed" => {
            done(OpenOptions::new().write(true).open(format!("/proc/self/fd/{}", handed.as_raw_fd())).map(drop))
        }
        "disks-mode-of-its-own" => raw!(SYS_fchmod, handed.as_raw_fd(), 0o600),
        "hide-handed" | "locks-hide-handed" | "snapshot-hide-handed" => raw!(SYS_fchmod, handed.as_raw_fd(), 0),
        "disks-hide-its-own" => raw!(SYS_fchmod, handed.as_raw_fd(), 0o200),
        "show-handed" => raw!(SYS_fchmod, handed.as_raw_fd(), 0o444),
        "freeze-handed" => raw!(SYS_fchmod, handed.as_raw_fd(), 0o400),
        "set-uid-of-handed" => raw!(SYS_fchmod, handed.as_raw_fd(), 0o4400),
        "disks-set-uid-of-its-own" => raw!(SYS_fchmod, handed.as_raw_fd(), 0o4755),
        "disks-set-gid-of-its-own" => raw!(SYS_fchmod, handed.as_raw_fd(), 0o2755),
        "open-overlays" => done(File::open(place.join("overlays")).map(drop)),
        "snapshot-owner-of-handed" | "locks-owner-of-handed" => raw!(SYS_fchown, handed.as_raw_fd(), 0, 0),
        "mode-of-handed" | "locks-mode-of-handed" | "snapshot-mode-of-handed" => {
            raw!(SYS_fchmod, handed.as_raw_fd(), 0o666)
        }
        "attribute-of-handed" | "snapshot-attribute-of-handed" => {
            raw!(SYS_fsetxattr, handed.as_raw_fd(), c"user.x".as_ptr(), c"x".as_ptr(), 1, 0)
        }
        // As a file without O_DIRECT has its flags: it clears that of one with it.
        "no-cache-of-handed" | "disks-no-cache-of-handed" | "locks-no-cache-of-handed" => {
            raw!(SYS_fcntl, handed.as_raw_fd(), libc::F_SETFL, 0)
        }
        "unlock-handed" => raw!(SYS_flock, handed.as_raw_fd(), libc::LOCK_UN),
        "cache-of-handed" => raw!(SYS_fcntl, handed.as_raw_fd(), libc::F_SETFL, libc::O_DIRECT),
        "limit-parent" => raw!(SYS_prlimit64, parent, libc::RLIMIT_CPU, 0, 0),
        "slow-parent" => raw!(SYS_sched_setattr, parent, 0, 0),
        "real-time" => {
            let attr = libc::sched_attr {
                size: size_of::<libc::sched_attr>() as u32,
                sched_policy: libc::SCHED_FIFO as u32,
                sched_flags: 0,
                sched_nice: 0,
                sched_priority: 1,
                sched_runtime: 0,
                sched_deadline: 0,
                sched_period: 0,
            };
            raw!(SYS_sched_setattr, 0, &raw const attr, 0)
        }
        "signals-by-descriptor" => raw!(SYS_fcntl, handed.as_raw_fd(), libc::F_SETOWN, parent),
        "datagrams" => raw!(SYS_socketpair, libc::AF_UNIX, libc::SOCK_DGRAM, 0, 0),
        "unnamed-overlay" => {
            let flags = libc::O_TMPFILE;
            done(OpenOptions::new().read(true).write(true).custom_flags(flags).open(place.join("overlays")).map(drop))
        }
        "memory-file" => {
            done(rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).map(drop).map_err(Into::into))
        }
        "own-pagemap" => done(File::open("/proc/self/pagemap").map(drop)),
        "thread" => std::thread::spawn(|| ()).join().map_err(|_| -1),
        "signal-itself" => raw!(SYS_tgkill, std::process::id(), rustix::thread::gettid().as_raw_nonzero().get(), 0),
        "read-passwords" => done(File::open("/etc/shadow").map(drop)),
        "read-beside" => done(File::open(place.join("secret")).map(drop)),
        "write-granted-for-reading" => done(OpenOptions::new().write(true).open(place.join("granted")).map(drop)),
        "name-in-overlays" => done(File::create(place.join("overlays/named")).map(drop)),
        "remove-beside" => done(remove_file(place.join("secret"))),
        "parents-memory" => done(File::open(format!("/proc/{parent}/mem")).map(drop)),
        "list-root" => done(read_dir("/").map(drop)),
        "raw-kvm" => done(File::open("/dev/kvm").map(drop)),
        "signal-parent" => raw!(SYS_tgkill, parent, parent, 0),
        "kill-parent" => raw!(SYS_kill, parent, 0),
        "trace-parent" => raw!(SYS_ptrace, libc::PTRACE_SEIZE, parent, 0, 0),
        "read-parent" => raw!(SYS_process_vm_readv, parent, 0, 0, 0, 0, 0),
        "fork" => raw!(SYS_clone, libc::SIGCHLD, 0, 0, 0, 0),
        "fork-as-the-zygote" => {
            raw!(SYS_clone, libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD, 0, 0, 0, 0)
        }
        "wait" => raw!(SYS_wait4, -1, 0, libc::WNOHANG, 0),
        "descriptor-of-parent" => raw!(SYS_pidfd_open, parent, 0),
        "new-domain" => raw!(SYS_landlock_create_ruleset, 0, 0, 1),
        "capabilities" => raw!(SYS_capset, 0, 0),
        "execute" => raw!(SYS_execve, c"/bin/true".as_ptr(), 0, 0),
        "unix-socket" => raw!(SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0),
        "internet-socket" => raw!(SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
        "ring" => raw!(SYS_io_uring_setup, 4, 0),
        "namespace" => raw!(SYS_unshare, libc::CLONE_NEWUSER),
        "mount" => raw!(SYS_mount, 0, 0, 0, 0, 0),
        "setuid" => raw!(SYS_setuid, 0),
        "code" => raw!(SYS_mmap, 0, 4096, libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
        "module" => raw!(SYS_init_module, 0, 0, 0),
        "keyring" => raw!(SYS_keyctl, 0, 0, 0, 0, 0),
        "core-file" => match getrlimit(Resource::Core) {
            Rlimit { current: Some(0), maximum: Some(0) } => Ok(()),
            _ => Err(-1),
        },
        "memory-for-a-vm" => map_private(2 * RAM).map(drop),
        "memory-without-end" => (0..1 << 10).try_for_each(|_| map_private(RAM)),
        "more-memory" => {
            let more = Rlimit { current: None, maximum: None };
            done(setrlimit(Resource::Data, more).map_err(Into::into))
        }
        other => panic!("no attempt {other:?}"),
    }
}

/// Not a test by itself: the next one runs it in a process for each attempt.
#[test]
fn inside() {
    use std::io::Write;
    let (Ok(which), Some(place)) = (std::env::var(ATTEMPT), std::env::var_os(PLACE)) else { return };
    let (place, parent) = (std::path::PathBuf::from(place), std::os::unix::process::parent_id());
    // A layer as another process gives it: this user's, and open for reading.
    let layer = rustix::fs::memfd_create("layer", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::fchmod(&layer, rustix::fs::Mode::RUSR).unwrap();
    let handed = std::fs::File::open(format!("/proc/self/fd/{}", layer.as_raw_fd())).unwrap();
    // A child's worker makes no names. A booted VM's worker does, beside its image.
    let role = match which.split('-').next() {
        Some("disks") => Role::Disks,
        Some("snapshot") => Role::Snapshot,
        Some("locks") => Role::Locks,
        _ if ["write-image", "name-beside-image"].contains(&which.as_str()) => Role::Disks,
        _ => Role::Child,
    };
    let known = |path: &str, inode_of: &str| {
        let found = std::fs::metadata(place.join(inode_of)).unwrap();
        KnownDir { path: place.join(path), id: Some((found.dev(), found.ino())) }
    };
    let grants = Grants {
        read: vec![place.join("granted")],
        dirs: vec![known("saved", "saved"), known("exchanged", "saved")],
        write: vec![place.join("image/disk")],
        overlays: vec![place.join("overlays")],
        beside: if role == Role::Child { Vec::new() } else { vec![place.join("image")] },
        role,
    };
    // As in an environment that grants it. Only a process with CAP_SYS_RESOURCE may raise the limit.
    let _ = setrlimit(Resource::Rtprio, Rlimit { current: Some(99), maximum: Some(99) });
    if std::env::var_os(ZYGOTE).is_some() {
        confine_zygote(Confinement::Require).unwrap();
    }
    confine(Confinement::Require, &grants, RAM, None).unwrap();
    let outcome = attempt(&which, &place, parent, &handed);
    let _ = writeln!(io::stderr(), "outcome {}", outcome.map_or_else(|errno| errno, |()| 0));
}

/// Runs each attempt in a process of its own, as a compromised one would make it.
#[test]
fn a_worker_that_was_broken_into_reaches_nothing_that_is_not_its_own() {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    let dir = tempfile::tempdir().unwrap();
    for name in ["image", "overlays", "saved", "exchanged"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    for name in ["granted", "secret", "image/disk", "saved/memory", "exchanged/memory"] {
        std::fs::write(dir.path().join(name), b"x").unwrap();
    }
    let me = std::env::current_exe().unwrap();
    // As the zygote leaves it, and as a process without one.
    let both = attempts().into_iter().flat_map(|attempt| [(attempt, true), (attempt, false)]);
    for ((which, wanted), of_zygote) in both {
        let run = Command::new(&me)
            .args(["--exact", "jail::tests::inside", "--nocapture", "--test-threads=1"])
            .env(ATTEMPT, which)
            .env(PLACE, dir.path())
            .envs(of_zygote.then_some((ZYGOTE, "1")))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&run.stderr);
        let outcome = said.lines().find_map(|line| line.strip_prefix("outcome ")?.parse::<i32>().ok());
        let fate = match (run.status.signal(), outcome) {
            (Some(libc::SIGSYS), None) => Fate::Killed,
            (None, Some(0)) => Fate::Done,
            (None, Some(errno)) => Fate::Refused(errno),
            other => panic!("{which}: {other:?} {said}"),
        };
        assert_eq!(fate, wanted, "{which}, of a zygote: {of_zygote}");
    }
    assert_eq!(std::fs::read(dir.path().join("secret")).unwrap(), b"x");
}
