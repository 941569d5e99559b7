use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{XattrFlags, setxattr};
use tar::EntryType;
use tempfile::TempDir;
use tokio::sync::mpsc;

use super::archive;
use super::files::{Change, Files, LayerError, chain};

/// Longer than a tick of the host's kernel.
const TICK: Duration = Duration::from_millis(50);

/// An entry of a layer: its kind, its link's target, its content, its attributes.
type Entry = (EntryType, String, Vec<u8>, Vec<(String, Vec<u8>)>);

/// Makes a directory of files, and changes it by `change`. Returns the layer's entries.
fn layer(make: impl FnOnce(&Path), change: impl FnOnce(&Path)) -> Result<Vec<(String, Entry)>, LayerError> {
    let dir = TempDir::new().unwrap();
    make(dir.path());
    let before = Files::list(dir.path()).unwrap();
    std::thread::sleep(TICK);
    change(dir.path());
    let changes = Files::list(dir.path())?.changes(dir.path(), &before)?;
    let mut bytes = Vec::new();
    archive::write(dir.path(), &changes, &mut bytes)?;
    let mut archive = tar::Archive::new(&bytes[..]);
    let read = |mut entry: tar::Entry<'_, &[u8]>| {
        let name = entry.path().unwrap().display().to_string();
        let target = entry.link_name().unwrap().map(|target| target.display().to_string()).unwrap_or_default();
        let xattrs = entry.pax_extensions().unwrap().into_iter().flatten().map(Result::unwrap);
        let xattrs = xattrs.map(|pax| (pax.key().unwrap().to_owned(), pax.value_bytes().to_vec())).collect();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        (name, (entry.header().entry_type(), target, content, xattrs))
    };
    Ok(archive.entries().unwrap().map(|entry| read(entry.unwrap())).collect())
}

fn names(entries: &[(String, Entry)]) -> Vec<&str> {
    entries.iter().map(|(name, _)| name.as_str()).collect()
}

fn write(root: &Path, name: &str, content: &str) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn tree(root: &Path) {
    for name in ["etc/a", "etc/b", "lib/x/one", "lib/x/two", "lib/y", "top"] {
        write(root, name, name);
    }
}

#[test]
fn nothing_changed_is_an_empty_layer() {
    let none = layer(tree, |root| drop(fs::read(root.join("etc/a")).unwrap())).unwrap();
    assert!(none.is_empty(), "{none:?}");
}

#[test]
fn each_kind_of_change_is_in_the_layer_and_nothing_else() {
    let entries = layer(tree, |root| {
        // The same length, and a modification time of before.
        let before = fs::metadata(root.join("etc/a")).unwrap().modified().unwrap();
        write(root, "etc/a", "ETC/A");
        fs::File::options().write(true).open(root.join("etc/a")).unwrap().set_modified(before).unwrap();
        fs::set_permissions(root.join("etc/b"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::rename(root.join("lib/x"), root.join("lib/z")).unwrap();
        fs::remove_file(root.join("lib/y")).unwrap();
        symlink("../etc/a", root.join("lib/link")).unwrap();
        write(root, "new/deep/file", "");
    })
    .unwrap();
    assert_eq!(
        names(&entries),
        [
            "./",
            "etc/a",
            "etc/b",
            "lib",
            "lib/link",
            "lib/z",
            "lib/z/one",
            "lib/z/two",
            "new",
            "new/deep",
            "new/deep/file",
            "lib/.wh.x",
            "lib/.wh.y"
        ]
    );
    let of: BTreeMap<_, _> = entries.into_iter().collect();
    assert_eq!((of["etc/a"].0, &of["etc/a"].2[..]), (EntryType::Regular, &b"ETC/A"[..]));
    assert_eq!((of["lib/link"].0, of["lib/link"].1.as_str()), (EntryType::Symlink, "../etc/a"));
    assert_eq!((of["lib/z"].0, &of["lib/z/two"].2[..]), (EntryType::Directory, &b"lib/x/two"[..]));
}

#[test]
fn a_directory_and_a_file_take_each_others_place() {
    let entries = layer(tree, |root| {
        fs::remove_dir_all(root.join("lib/x")).unwrap();
        write(root, "lib/x", "a file");
        fs::remove_file(root.join("top")).unwrap();
        write(root, "top/in", "");
        // The same name, another directory, without the content of the old one.
        fs::remove_dir_all(root.join("etc")).unwrap();
        write(root, "etc/b", "other");
    })
    .unwrap();
    assert_eq!(names(&entries), ["./", "etc", "etc/b", "lib", "lib/x", "top", "top/in", "etc/.wh.a"]);
}

#[test]
fn names_of_one_file_are_hard_links_and_long_names_are_whole() {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let entries = layer(tree, |root| {
        fs::hard_link(root.join("etc/a"), root.join("etc/c")).unwrap();
        write(root, &long, "long");
    })
    .unwrap();
    assert_eq!(names(&entries)[3..], ["etc", "etc/a", "etc/c"]);
    assert!(names(&entries).contains(&long.as_str()), "{entries:?}");
    let of: BTreeMap<_, _> = entries.into_iter().collect();
    assert_eq!((of["etc/a"].0, &of["etc/a"].2[..]), (EntryType::Regular, &b"etc/a"[..]));
    assert_eq!((of["etc/c"].0, of["etc/c"].1.as_str()), (EntryType::Link, "etc/a"));
}

#[test]
fn attributes_go_along_and_sockets_do_not() {
    let mut has_xattrs = true;
    let entries = layer(tree, |root| {
        let set = setxattr(root.join("etc/a"), "user.note", &[0, 0xff, b'='], XattrFlags::empty());
        has_xattrs = set.is_ok();
        drop(UnixListener::bind(root.join("etc/socket")).unwrap());
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("etc/pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
    })
    .unwrap();
    let of: BTreeMap<_, _> = entries.into_iter().collect();
    assert!(!of.contains_key("etc/socket") && of["etc/pipe"].0 == EntryType::Fifo, "{of:?}");
    if has_xattrs {
        assert_eq!(of["etc/a"].3, [("SCHILY.xattr.user.note".to_owned(), vec![0, 0xff, b'='])]);
    } else {
        clade_test_support::skipped("the file system has no attributes");
    }
}

#[test]
fn a_whiteouts_name_is_refused_and_an_older_one_is_not() {
    let refused = layer(tree, |root| write(root, "etc/.wh.a", "")).unwrap_err();
    assert!(matches!(&refused, LayerError::Whiteout(path) if path.ends_with("etc/.wh.a")), "{refused}");
    let before = |root: &Path| {
        tree(root);
        write(root, "etc/.wh.a", "");
    };
    assert_eq!(names(&layer(before, |root| write(root, "top", "")).unwrap()), ["top"]);
}

/// Returns the names and targets of an archive's entries, without any library's idea of a path.
fn raw(make: impl FnOnce(&Path), change: impl FnOnce(&Path)) -> Vec<(Vec<u8>, Vec<u8>)> {
    let dir = TempDir::new().unwrap();
    make(dir.path());
    let before = Files::list(dir.path()).unwrap();
    std::thread::sleep(TICK);
    change(dir.path());
    let mut bytes = Vec::new();
    archive::write(dir.path(), &Files::list(dir.path()).unwrap().changes(dir.path(), &before).unwrap(), &mut bytes)
        .unwrap();
    let mut archive = tar::Archive::new(&bytes[..]);
    let read = |entry: tar::Entry<'_, &[u8]>| {
        (entry.path_bytes().into_owned(), entry.link_name_bytes().unwrap_or_default().into_owned())
    };
    archive.entries().unwrap().map(|entry| read(entry.unwrap())).collect()
}

#[test]
fn names_and_targets_are_written_as_they_are() {
    let long = [&[0xff; 150][..], b"end"].concat();
    let targets = ["https://host//x/./y/.", "..", &"t/".repeat(90)];
    let found = raw(tree, |root| {
        fs::write(root.join(std::ffi::OsStr::from_bytes(b"\xff\xfe")), "").unwrap();
        fs::write(root.join(std::ffi::OsStr::from_bytes(&long)), "").unwrap();
        for (at, target) in targets.iter().enumerate() {
            symlink(target, root.join(format!("link{at}"))).unwrap();
        }
    });
    let of: BTreeMap<_, _> = found.into_iter().collect();
    assert!(of.contains_key(&b"\xff\xfe"[..]) && of.contains_key(&long), "{of:?}");
    for (at, target) in targets.iter().enumerate() {
        assert_eq!(of[format!("link{at}").as_bytes()], target.as_bytes(), "{target}");
    }
}

#[test]
fn the_root_is_a_file_too() {
    let found = layer(tree, |root| fs::set_permissions(root, fs::Permissions::from_mode(0o711)).unwrap()).unwrap();
    assert_eq!((names(&found), found[0].1.0), (vec!["./"], EntryType::Directory));
}

#[test]
fn a_socket_does_not_leave_the_file_whose_place_it_took() {
    let found = layer(tree, |root| {
        fs::remove_file(root.join("etc/a")).unwrap();
        fs::remove_dir_all(root.join("lib/x")).unwrap();
        drop(UnixListener::bind(root.join("etc/a")).unwrap());
        drop(UnixListener::bind(root.join("lib/x")).unwrap());
    })
    .unwrap();
    assert_eq!(names(&found), ["etc", "lib", "etc/.wh.a", "lib/.wh.x"]);
}

#[test]
fn a_removed_file_whose_name_is_too_long_to_hide_is_refused() {
    let name = "n".repeat(252);
    let before = |root: &Path| write(root, &name, "");
    let refused = layer(before, |root| fs::remove_file(root.join(&name)).unwrap()).unwrap_err();
    assert!(matches!(&refused, LayerError::LongName(path) if path.ends_with(&name)), "{refused}");
    let shorter = &name[1..];
    let before = |root: &Path| write(root, shorter, "");
    let hidden = layer(before, |root| fs::remove_file(root.join(shorter)).unwrap()).unwrap();
    assert_eq!(names(&hidden), ["./".to_owned(), format!(".wh.{shorter}")]);
}

#[test]
fn a_file_that_shrinks_ends_the_archive_with_an_error() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("file"), vec![1; 1 << 20]).unwrap();
    let changes = [Change::Present(b"file".to_vec())];
    // The file is cut when its header has been written.
    struct Cut<'a>(&'a Path);
    impl io::Write for Cut<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            File::options().write(true).open(self.0)?.set_len(10)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    use std::fs::File;
    let path = dir.path().join("file");
    let failed = archive::write(dir.path(), &changes, Cut(&path)).unwrap_err();
    assert!(chain(&failed).contains("shorter"), "{failed}");
    // One that is gone is left out.
    fs::remove_file(&path).unwrap();
    let mut empty = Vec::new();
    archive::write(dir.path(), &changes, &mut empty).unwrap();
    assert_eq!(empty, [0; 1024]);
}

#[test]
fn pieces_are_all_that_was_written_in_order() {
    let (sender, mut receiver) = mpsc::channel(1);
    let wanted: Vec<u8> = (0..600_000u32).map(|at| (at / 7) as u8).collect();
    let all = wanted.clone();
    let writer = std::thread::spawn(move || {
        let mut pieces = archive::Pieces::new(sender);
        for part in all.chunks(70_001) {
            io::Write::write_all(&mut pieces, part).unwrap();
        }
        io::Write::flush(&mut pieces).unwrap();
    });
    let mut found = Vec::new();
    while let Some(piece) = receiver.blocking_recv() {
        found.extend_from_slice(&piece.unwrap());
    }
    writer.join().unwrap();
    assert_eq!(found, wanted);
}
