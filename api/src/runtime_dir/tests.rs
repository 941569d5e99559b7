use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::thread;

use super::claim::LOCK_INTERVAL;
use super::*;

fn temporary() -> (tempfile::TempDir, RuntimeDir) {
    let dir = tempfile::tempdir().unwrap();
    let runtime = RuntimeDir::create(dir.path()).unwrap();
    (dir, runtime)
}

#[test]
fn names_cannot_leave_the_directory() {
    for bad in ["", "../x", "a/b", ".hidden", "-x", "a b", "ä", &"x".repeat(49)] {
        assert!(check_name(bad).is_err(), "{bad:?}");
    }
    for good in ["a", "web-1", "A.b_c", &"x".repeat(48)] {
        assert!(check_name(good).is_ok(), "{good:?}");
    }
}

#[test]
fn a_name_is_taken_once_and_free_again_after() {
    let (path, dir) = temporary();
    let claim = NameClaim::new(&dir, "a").unwrap();
    claim.bind("sock", SocketType::STREAM).unwrap();
    assert!(matches!(NameClaim::new(&dir, "a"), Err(DaemonError::Taken { .. })));
    drop(claim);
    assert_eq!(fs::read_dir(path.path()).unwrap().count(), 0, "nothing is left behind");
    NameClaim::new(&dir, "a").unwrap();
}

#[test]
fn the_name_of_an_ended_vm_is_its_own_its_clearers_or_anothers() {
    let (path, dir) = temporary();
    let dead = std::process::id() + 1;
    let of_a_dead = || NameClaim::of_a_dead(&dir, "a", dead);
    assert!(matches!(of_a_dead(), Ok(None)) && matches!(NameClaim::owner(&dir, "a"), Ok(None)));
    fs::write(path.path().join("a.lock"), format!("{dead}\n")).unwrap();
    assert!(matches!(NameClaim::owner(&dir, "a"), Ok(Some(pid)) if pid == dead));
    let claim = of_a_dead().unwrap().unwrap();
    // This process has it now: for the dead VM's files, or for another VM.
    assert!(matches!(of_a_dead(), Err(DaemonError::Taken { .. })));
    assert!(matches!(NameClaim::owner(&dir, "a"), Ok(Some(pid)) if pid == std::process::id()));
    drop(claim);
    assert!(matches!(of_a_dead(), Ok(None)));
    // The process still has its lock.
    let claim = NameClaim::new(&dir, "a").unwrap();
    fs::write(path.path().join("a.lock"), format!("{dead}\n")).unwrap();
    assert!(matches!(of_a_dead(), Err(DaemonError::Taken { .. })));
    drop(claim);
}

#[test]
fn a_dead_owners_sockets_are_replaced() {
    let (path, dir) = temporary();
    drop(UnixListener::bind(socket_path(path.path(), "a")).unwrap());
    assert!(socket_path(path.path(), "a").exists());
    let claim = NameClaim::new(&dir, "a").unwrap();
    let listener = claim.bind("sock", SocketType::STREAM).unwrap();
    std::os::unix::net::UnixStream::connect(socket_path(path.path(), "a")).unwrap();
    drop(listener);
}

#[test]
fn a_file_that_a_killed_writer_has_left_is_replaced_and_not_followed() {
    let (path, dir) = temporary();
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), path.path().join(".web.vm.new")).unwrap();
    for content in [b"one", b"two"] {
        dir.write("web.vm", content).unwrap();
        assert_eq!(dir.read("web.vm").unwrap().unwrap(), content);
        std::fs::write(path.path().join(".web.vm.new"), b"half").unwrap();
    }
    assert_eq!(std::fs::read(elsewhere.path()).unwrap(), b"");
}

#[test]
fn a_claim_goes_to_another_process_with_its_lock() {
    let (path, dir) = temporary();
    let claim = NameClaim::new(&dir, "a").unwrap();
    let passed = claim.lock().unwrap().try_clone_to_owned().unwrap();
    let theirs = NameClaim::adopt(&dir, "a", passed).unwrap();
    claim.leave();
    assert!(path.path().join("a.lock").exists(), "it is the other's");
    assert!(matches!(NameClaim::new(&dir, "a"), Err(DaemonError::Taken { .. })));
    drop(theirs);
    // Its starter removes its files.
    drop(NameClaim::new(&dir, "a").unwrap());
    assert_eq!(fs::read_dir(path.path()).unwrap().count(), 0);
    // The lock of another name, and a file without a lock.
    let other = NameClaim::new(&dir, "b").unwrap();
    let lock = || other.lock().unwrap().try_clone_to_owned().unwrap();
    assert!(NameClaim::adopt(&dir, "a", lock()).is_err());
    drop(NameClaim::new(&dir, "c").unwrap());
    assert!(NameClaim::adopt(&dir, "../b", lock()).is_err());
    assert!(NameClaim::adopt(&dir, "b", lock()).is_ok());
}

#[test]
fn what_the_dead_left_is_found_and_what_the_living_have_is_not() {
    let (path, dir) = temporary();
    let alive = NameClaim::new(&dir, "alive").unwrap();
    let _listens = alive.bind("sock", SocketType::STREAM).unwrap();
    let early = NameClaim::new(&dir, "early").unwrap();
    for file in ["dead.sock", "dead.console"] {
        drop(UnixListener::bind(path.path().join(file)).unwrap());
    }
    fs::write(path.path().join("dead.lock"), "123\n").unwrap();
    fs::write(path.path().join("dead.ended"), "{}").unwrap();
    // Their owner was killed while it removed the files.
    for file in ["half.end", "half.lock", "late.lock"] {
        fs::write(path.path().join(file), "4000000123\n").unwrap();
    }
    // These are about to be locked.
    fs::write(path.path().join("new.lock"), "").unwrap();
    fs::write(path.path().join("named.lock"), format!("{}\n", std::process::id())).unwrap();
    let dead = NameClaim::of_the_dead(&dir).unwrap();
    assert_eq!(dead.iter().map(|(claim, pid)| (claim.name.as_str(), *pid)).collect::<Vec<_>>(), [("dead", 123)]);
    drop(dead);
    let mut left: Vec<_> = dir.entries().unwrap();
    left.sort();
    left.retain(|file| file != "." && file != "..");
    assert_eq!(left, ["alive.lock", "alive.sock", "dead.ended", "early.lock", "named.lock", "new.lock"]);
    drop(early);
}

/// A request that stops a VM looks for the pid of the VM's process, while the supervisor looks at the name.
#[test]
fn a_name_that_is_left_as_found_is_still_its_dead_owners() {
    let (path, dir) = temporary();
    drop(UnixListener::bind(path.path().join("dead.sock")).unwrap());
    fs::write(path.path().join("dead.lock"), "4000000123\n").unwrap();
    for (claim, pid) in NameClaim::of_the_dead(&dir).unwrap() {
        assert_eq!(NameClaim::owner(&dir, "dead").unwrap(), Some(std::process::id()));
        claim.leave_as_found(pid);
    }
    assert_eq!(NameClaim::owner(&dir, "dead").unwrap(), Some(4_000_000_123));
    let (claim, pid) = NameClaim::of_the_dead(&dir).unwrap().pop().unwrap();
    assert_eq!((claim.name.as_str(), pid), ("dead", 4_000_000_123));
}

/// A VM's process can write its lock.
#[test]
fn an_owner_replaces_all_that_an_earlier_one_wrote_into_the_lock() {
    let (path, dir) = temporary();
    let mut text = b"12\n".to_vec();
    text.resize(2 << 20, 0xff);
    fs::write(path.path().join("a.lock"), text).unwrap();
    let claim = NameClaim::new(&dir, "a").unwrap();
    assert_eq!(NameClaim::owner(&dir, "a").unwrap(), Some(std::process::id()));
    assert_eq!(fs::metadata(path.path().join("a.lock")).unwrap().len(), 11);
    drop(claim);
    assert_eq!(
        ["12\n\u{ff}", "12 \nx", "x\n12", "", "-1\n"].map(|text| pid_in(text.as_bytes())),
        [Some(12), Some(12), None, None, None]
    );
}

#[test]
fn the_pid_of_an_owner_is_never_half_written() {
    let (_path, dir) = temporary();
    drop(dir.lock("a.lock").unwrap().unwrap());
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for _ in 0..20_000 {
                NameClaim::new(&dir, "a").unwrap().leave_as_found(7);
            }
        });
        let mut seen = BTreeSet::new();
        while !writer.is_finished() {
            seen.insert(NameClaim::owner(&dir, "a").unwrap());
        }
        seen.remove(&Some(7));
        seen.remove(&Some(std::process::id()));
        assert_eq!(seen, BTreeSet::new());
    });
}

#[test]
fn a_directory_has_one_supervisor() {
    let (path, dir) = temporary();
    let (claim, _socket) = SupervisorClaim::new(&dir).unwrap();
    let pid = Some(std::process::id() as i32);
    assert!(matches!(SupervisorClaim::new(&dir), Err(DaemonError::Supervised { pid: found, .. }) if found == pid));
    drop(claim);
    assert_eq!(fs::read_dir(path.path()).unwrap().count(), 0);
    SupervisorClaim::new(&dir).unwrap();
}

#[test]
fn the_lock_of_a_supervisor_that_is_ending_is_waited_for() {
    let (_path, dir) = temporary();
    // Its sockets are closed, and its lock is not yet.
    let lock = dir.lock(SUPERVISOR_LOCK).unwrap().unwrap();
    let (tried, has_tried) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            // Long after the first attempt of the claim below.
            has_tried.recv().unwrap();
            thread::sleep(20 * LOCK_INTERVAL);
            drop(lock);
        });
        tried.send(()).unwrap();
        SupervisorClaim::new(&dir).unwrap();
    });
}

#[test]
fn what_is_made_is_this_users_alone_whatever_the_umask() {
    let (path, dir) = temporary();
    let claim = NameClaim::new(&dir, "a").unwrap();
    let _sockets =
        [claim.bind("sock", SocketType::STREAM).unwrap(), claim.bind("console", SocketType::STREAM).unwrap()];
    dir.write("a.ended", b"x").unwrap();
    for file in ["a.sock", "a.console", "a.lock", "a.ended"] {
        let mode = fs::symlink_metadata(path.path().join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
}

#[test]
fn a_directory_that_is_a_link_or_open_to_others_is_refused() {
    let outer = tempfile::tempdir().unwrap();
    let (real, link) = (outer.path().join("real"), outer.path().join("link"));
    fs::create_dir(&real).unwrap();
    symlink(&real, &link).unwrap();
    let refused = RuntimeDir::create(&link).unwrap_err();
    assert!(matches!(&refused, DaemonError::LinkedDir { path } if *path == link), "{refused:?}");
    for mode in [0o777, 0o770, 0o702] {
        fs::set_permissions(&real, fs::Permissions::from_mode(mode)).unwrap();
        let refused = RuntimeDir::create(&real).unwrap_err();
        assert!(matches!(refused, DaemonError::OpenDir { mode: found, .. } if found == mode), "{refused:?}");
    }
    fs::set_permissions(&real, fs::Permissions::from_mode(0o755)).unwrap();
    RuntimeDir::create(&real).unwrap();
    fs::write(outer.path().join("file"), "").unwrap();
    assert!(RuntimeDir::create(&outer.path().join("file")).is_err());
}

#[test]
fn links_and_fifos_in_the_directory_are_not_followed_or_waited_for() {
    let (path, dir) = temporary();
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    symlink(&victim, path.path().join("a.lock")).unwrap();
    assert!(matches!(NameClaim::new(&dir, "a"), Err(DaemonError::Runtime { .. })));
    assert!(!victim.exists(), "nothing is made where the link points");
    fs::write(&victim, "kept").unwrap();
    for file in ["b.sock", "b.ended"] {
        symlink(&victim, path.path().join(file)).unwrap();
    }
    let claim = NameClaim::new(&dir, "b").unwrap();
    claim.bind("sock", SocketType::STREAM).unwrap();
    assert!(dir.read("b.ended").is_err());
    dir.write("b.ended", b"new").unwrap();
    assert_eq!(dir.read("b.ended").unwrap().unwrap(), b"new");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "kept");
    rustix::fs::mkfifoat(&dir.fd, "c.lock", Mode::RWXU).unwrap();
    rustix::fs::mkfifoat(&dir.fd, "c.ended", Mode::RWXU).unwrap();
    assert!(NameClaim::new(&dir, "c").is_err() && dir.read("c.ended").is_err());
}

#[test]
fn a_path_too_long_for_a_socket_is_named_with_its_limit() {
    let outer = tempfile::tempdir().unwrap();
    let long = outer.path().join("d".repeat(100));
    let dir = RuntimeDir::create(&long).unwrap();
    let refused = NameClaim::new(&dir, "a").unwrap_err().to_string();
    let length = console_path(&long, "a").as_os_str().len().to_string();
    assert!(refused.contains(&length) && refused.contains("107"), "{refused}");
}

#[test]
fn a_directory_that_is_swapped_changes_nothing() {
    let outer = tempfile::tempdir().unwrap();
    let (path, moved) = (outer.path().join("run"), outer.path().join("moved"));
    let dir = RuntimeDir::create(&path).unwrap();
    let claim = NameClaim::new(&dir, "a").unwrap();
    fs::rename(&path, &moved).unwrap();
    symlink("/", &path).unwrap();
    claim.bind("sock", SocketType::STREAM).unwrap();
    assert!(moved.join("a.sock").exists());
    drop(claim);
    assert_eq!(fs::read_dir(&moved).unwrap().count(), 0);
}

/// A process that lives on after its VM could write the record of the next one's end.
#[test]
fn the_file_for_the_end_of_a_vm_is_no_earlier_vms() {
    let path = tempfile::tempdir().unwrap();
    let dir = RuntimeDir::create(path.path()).unwrap();
    let claim = NameClaim::new(&dir, "web").unwrap();
    let handed = || claim.hand_over(false).unwrap().1;
    let (first, second) = (handed(), handed());
    rustix::io::write(&first, b"of the first").unwrap();
    let inode = |file| rustix::fs::fstat(file).unwrap().st_ino;
    assert_ne!(inode(&first), inode(&second));
    assert_eq!(std::fs::read(path.path().join("web.end")).unwrap(), b"");
}
