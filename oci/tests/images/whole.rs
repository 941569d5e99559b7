//! A valid image, checked with e2fsprogs, an independent implementation that reads every structure.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::layout::{Head, Packed, Rig, Tar, gzip, head, plain};
use clade_oci::Digest;

/// The output of a tool. None if it is not installed.
fn tool(name: &str, args: &[&str]) -> Option<(String, Option<i32>)> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let done = Command::new(name).args(args).env("PATH", path).output();
    let Ok(done) = done else {
        clade_test_support::skip("linux", &format!("{name} is not installed"));
        return None;
    };
    Some((String::from_utf8_lossy(&done.stdout).into_owned(), done.status.code()))
}

/// Checks that fsck reports no error.
fn check(disk: &Path) {
    if let Some((said, code)) = tool("e2fsck", &["-fn", disk.to_str().unwrap()]) {
        assert_eq!(code, Some(0), "{said}");
    }
}

pub(crate) fn ask(disk: &Path, request: &str) -> Option<String> {
    tool("debugfs", &["-R", request, disk.to_str().unwrap()]).map(|(said, _)| said)
}

fn lower() -> Vec<u8> {
    let long = "l".repeat(250);
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut tar = Tar::default()
        .add(&Head { mode: 0o700, uid: 5, ..head(b"./", b'5') }, b"")
        .dir("bin/")
        .pax(&[
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.user.note", b"kept"),
            ("SCHILY.xattr.user.a", b""),
            ("SCHILY.xattr.security.selinux", b"left out"),
        ])
        .add(&Head { mode: 0o4755, uid: 70_000, size: 3, ..head(b"bin/sh", b'0') }, b"abc")
        .hard("bin/ash", "bin/sh")
        .link("sbin", "bin")
        .link("far", &"t/".repeat(49))
        .add(&Head { device: (1, 3), ..head(b"null", b'3') }, b"")
        .add(&Head { device: (259, 70_000), ..head(b"disk", b'4') }, b"")
        .add(&head(b"pipe", b'6'), b"")
        .pax(&[("path", format!("long/{long}").as_bytes()), ("mtime", b"4294967296.5")])
        .file("x", b"long name")
        .pax(&[("path", b"\xff\xfe name"), ("linkpath", "/".repeat(80).as_bytes())])
        .link("x", "y")
        .file("gone", b"hidden later")
        .file("dir/below", b"hidden later")
        .file("dir/other/below", b"hidden later")
        .dir("empty")
        .file("replaced/file", b"a directory that a file replaces");
    // A directory of several blocks, and a file of several chunks with a hole.
    for number in 0..300 {
        tar = tar.file(&format!("many/a-name-that-takes-some-room-{number:04}"), number.to_string().as_bytes());
    }
    let mut large = vec![0; 3 << 20];
    large[2 << 20..].fill(7);
    tar.file("large", &large).end()
}

fn upper() -> Vec<u8> {
    Tar::default()
        .file(".wh.gone", b"")
        .file("dir/kept", b"through")
        .file("dir/.wh..wh..opq", b"")
        .file("replaced", b"now a file")
        .file("sbin/tool", b"through a link")
        .file(".wh..wh.plnk", b"of AUFS")
        .dir("empty")
        .end()
}

#[test]
fn an_image_becomes_a_file_system_of_what_it_says() {
    let rig = Rig::new();
    let zstd = zstd::encode_all(&upper()[..], 3).unwrap();
    let layers = [
        Packed {
            bytes: gzip(&lower()),
            media_type: "application/vnd.docker.image.rootfs.diff.tar.gzip".into(),
            diff_id: Digest::of(&lower()),
        },
        Packed {
            bytes: zstd,
            media_type: "application/vnd.oci.image.layer.v1.tar+zstd".into(),
            diff_id: Digest::of(&upper()),
        },
    ];
    rig.image(&layers);
    let image = rig.pull_alone(&Default::default()).unwrap();
    assert_eq!((image.config.entrypoint[0].as_str(), image.config.user.as_str()), ("/bin/sh", "7:8"));
    assert_eq!((image.config.env[1].as_str(), image.config.cmd.len(), image.skipped), ("A=b c", 0, 2));
    let disk = rig.store().disk(&image.digest);
    assert_eq!(fs::metadata(&disk).unwrap().len(), image.disk_bytes);
    check(&disk);
    let Some(sh) = ask(&disk, "stat bin/sh") else { return };
    for word in
        ["Mode:  04755", "User: 70000", "Links: 2", "Size: 3", "user.note (4) = \"kept\"", "security.capability"]
    {
        assert!(sh.contains(word), "{word}: {sh}");
    }
    assert!(!sh.contains("selinux"), "{sh}");
    let stat = |path: &str| ask(&disk, &format!("stat {path}")).unwrap();
    assert!(stat("null").contains("01:03") && stat("disk").contains("Device major/minor number: 259:70000"));
    assert!(stat("pipe").contains("Type: FIFO") && stat("sbin").contains("Fast link dest: \"bin\""));
    assert!(stat("/").contains("Mode:  0700") && stat("/").contains("User:     5"), "{}", stat("/"));
    assert!(stat(&format!("long/{}", "l".repeat(250))).contains("0x00000000:00000001"), "the year 2106");
    let cat = |path: &str| ask(&disk, &format!("cat {path}")).unwrap();
    assert_eq!(
        (cat("bin/ash"), cat("bin/tool"), cat("dir/kept")),
        ("abc".into(), "through a link".into(), "through".into())
    );
    assert_eq!((cat("replaced"), cat("many/a-name-that-takes-some-room-0299")), ("now a file".into(), "299".into()));
    assert!(cat("large").bytes().enumerate().all(|(at, byte)| byte == if at < 2 << 20 { 0 } else { 7 }));
    assert_eq!(cat("large").len(), 3 << 20);
    let names = ask(&disk, "ls -p /").unwrap();
    for gone in ["/gone/", "/.wh", "plnk"] {
        assert!(!names.contains(gone), "{names}");
    }
    assert!(!ask(&disk, "ls -p /dir").unwrap().contains("below"));
    assert!(names.contains("/lost+found/") && names.contains("name/"), "{names}");
}

#[test]
fn the_same_image_makes_the_same_bytes() {
    let disk = || {
        let rig = Rig::new();
        let image = rig.pull_layers(&[lower(), upper()]).unwrap();
        let file = fs::File::open(rig.store().disk(&image.digest)).unwrap();
        let kept = file.metadata().unwrap().blocks() * 512;
        // All data outside holes is at the beginning.
        let mut first = Vec::new();
        file.take(64 << 20).read_to_end(&mut first).unwrap();
        assert!(kept < 32 << 20, "{kept}");
        (image.disk_bytes, Digest::of(&first))
    };
    assert_eq!(disk(), disk());
}

#[test]
fn a_file_may_have_more_extents_than_an_inode_has_room_for() {
    // 516 MiB of zeros, in a layer compressed to less than a MiB.
    let content = vec![0; 516 << 20];
    let tar = Tar::default().file("zeros", &content).file("after", b"end").end();
    drop(content);
    let rig = Rig::new();
    rig.image(&[Packed {
        bytes: zstd::encode_all(&tar[..], 1).unwrap(),
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd".into(),
        diff_id: Digest::of(&tar),
    }]);
    drop(tar);
    let limits = clade_oci::ImageLimits { ratio: u64::MAX, ..Default::default() };
    let image = rig.pull(&clade_oci::PullOptions { limits, ..Default::default() }).unwrap();
    let disk = rig.store().disk(&image.digest);
    check(&disk);
    assert!(fs::metadata(&disk).unwrap().blocks() * 512 < 4 << 20, "zeros stay holes");
    if let Some(said) = ask(&disk, "stat zeros") {
        assert!(said.contains("Size: 541065216") && said.contains("ETB0"), "{said}");
        assert_eq!(ask(&disk, "cat after").unwrap(), "end");
    }
}

#[test]
fn an_empty_image_is_one() {
    let rig = Rig::new();
    let image = rig.pull_layers(&[]).unwrap();
    check(&rig.store().disk(&image.digest));
    let other = rig.pull_layers(&[Tar::default().dir("lost+found").file("lost+found/x", b"own").end()]).unwrap();
    check(&rig.store().disk(&other.digest));
    assert_ne!(image.digest, other.digest);
}

#[test]
fn a_pull_goes_on_where_another_was_killed() {
    let rig = Rig::new();
    rig.image(&[plain(lower()), plain(upper())]);
    let first = rig.pull(&Default::default()).unwrap();
    let (store, disk) = (rig.store(), rig.store().disk(&first.digest));
    // Possible remains of a killed writer: a partial file, truncated content, a disk without a
    // record.
    fs::write(store.root().join("partial/half"), "x").unwrap();
    fs::create_dir(store.root().join("partial/dir")).unwrap();
    let blob = store.root().join("blobs/sha256").join(Digest::of(&upper()).hex());
    fs::write(&blob, &upper()[..100]).unwrap();
    fs::remove_file(disk.with_file_name("image.json")).unwrap();
    fs::remove_file(&disk).unwrap();
    fs::write(&disk, "half").unwrap();
    assert_eq!(store.image(&first.digest).unwrap(), None);
    assert_eq!(rig.pull_alone(&Default::default()).unwrap(), first);
    check(&disk);
    // Content is not fetched again: the layout may be gone.
    fs::remove_file(rig.path("layout/blobs/sha256").join(Digest::of(&lower()).hex())).unwrap();
    assert_eq!(rig.pull(&Default::default()).unwrap(), first);
}
