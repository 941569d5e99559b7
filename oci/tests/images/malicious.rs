//! Malicious layers, manifests and layouts. Every case is refused with an error that names it, or
//! has only permitted effects; and only the store is modified.

use std::fs;
use std::os::unix::fs::symlink;

use clade_oci::{Digest, ImageLimits, PullOptions};
use serde_json::{Value, json};

use crate::layout::{Head, INDEX, LAYER, MANIFEST, Packed, Rig, Tar, chain, gzip, head, plain};

/// Checks that each layer is refused, with an error that contains the words.
fn refused(cases: Vec<(&str, Vec<u8>, &[&str])>) {
    for (what, layer, words) in cases {
        let error = Rig::new().pull_layers(&[layer]).expect_err(what);
        let text = chain(&error);
        assert!(text.len() < 2000 && !text.contains('\n'), "{what}: {text}");
        words.iter().for_each(|word| assert!(text.contains(word), "{what}: no {word:?} in {text}"));
    }
}

fn pax_path(path: &[u8]) -> Vec<u8> {
    Tar::default().pax(&[("path", path)]).file("x", b"y").end()
}

#[test]
fn names_that_lead_out_are_refused() {
    let tar = Tar::default;
    refused(vec![
        ("dots", tar().file("../canary/etc/passwd", b"x").end(), &["../canary/etc/passwd", "out of the image"]),
        ("dots within", tar().file("a/../../x", b"x").end(), &["a/../../x", "out of the image"]),
        ("dots at the end", tar().dir("a/..").end(), &["a/..", "out of the image"]),
        ("dots from the root", tar().file("/../canary", b"x").end(), &["/../canary", "out of the image"]),
        ("dots by pax", pax_path(b"a/../../b"), &["a/../../b", "out of the image"]),
        ("dots by GNU", tar().special(b'L', b"../y\0").file("x", b"").end(), &["../y", "out of the image"]),
        ("hard link out", tar().hard("x", "../canary/etc/passwd").end(), &["../canary", "out of the image"]),
        ("hard link to nothing of the image", tar().hard("x", "/etc/passwd").end(), &["/etc/passwd", "hard link"]),
        ("hard link to nothing", tar().hard("x", "etc/passwd").end(), &["\"x\"", "etc/passwd", "hard link"]),
        ("hard link to a directory", tar().dir("d").hard("x", "d").end(), &["\"x\"", "\"d\"", "hard link"]),
        ("whiteout of dots", tar().file("a/.wh...", b"").end(), &[".wh...", "whiteout"]),
        ("whiteout of a dot", tar().file("a/.wh..", b"").end(), &[".wh..", "whiteout"]),
        ("whiteout of nothing", tar().file(".wh.", b"").end(), &[".wh.", "whiteout"]),
        ("below a whiteout", tar().file(".wh.a/b", b"").end(), &[".wh.a/b", "whiteout"]),
        ("opaque below a whiteout", tar().file(".wh.a/.wh..wh..opq", b"").end(), &[".wh.a", "whiteout"]),
        ("whiteout through dots", tar().file("../.wh.canary", b"").end(), &["../.wh.canary", "out of the image"]),
        ("no name", tar().file("", b"").end(), &["\"\"", "invalid file name"]),
        ("NUL in a name", pax_path(b"a\0b"), &["a\\x00b", "invalid file name"]),
        ("the root as a file", tar().file(".", b"x").end(), &["\".\"", "not a directory"]),
    ]);
}

#[test]
fn symbolic_links_lead_nowhere_but_into_the_image() {
    let rig = Rig::new();
    let canary = rig.path("canary");
    let canary = canary.to_str().unwrap();
    let lower = Tar::default()
        .link("absolute", canary)
        .link("up", "../../../../../../../..")
        .link("host", "/etc")
        .file("real/kept", b"1")
        .link("toreal", "real")
        .end();
    let upper = Tar::default()
        .file("absolute/etc/passwd", b"changed")
        .file("up/passwd", b"changed")
        .file("host/shadow", b"changed")
        .file("toreal/.wh.kept", b"")
        .file("absolute/.wh.link", b"")
        .file("up/.wh..wh..opq", b"")
        .hard("up/second", "absolute/etc/passwd")
        .end();
    // An opaque marker hides nothing behind a link: that stays, and leads to the root of the image.
    let image = rig.pull_layers(&[lower.clone(), upper]).unwrap();
    if let Some(said) = crate::whole::ask(&rig.store().disk(&image.digest), "cat second") {
        assert_eq!(said, "changed");
    }
    let image = rig.pull_layers(&[lower, Tar::default().file("absolute/etc/passwd", b"x").end()]).unwrap();
    assert!(rig.store().disk(&image.digest).is_file());
    let circle = Tar::default().link("a", "b").link("b", "a").file("a/x", b"").end();
    refused(vec![
        ("a circle", circle, &["\"a/x\"", "too many symbolic links"]),
        ("itself", Tar::default().link("a", "a").file("a/x", b"").end(), &["too many symbolic links"]),
        ("through a file", Tar::default().file("a", b"").file("a/x", b"").end(), &["\"a/x\"", "not a directory"]),
        ("an empty target", Tar::default().link("a", "").end(), &["invalid file name"]),
        (
            "a long target",
            Tar::default().pax(&[("linkpath", &[b'x'; 4096])]).link("a", "x").end(),
            &["\"a\"", "target", "4095"],
        ),
    ]);
}

#[test]
fn absolute_names_are_of_the_image() {
    let rig = Rig::new();
    let layer = Tar::default().dir("/etc").file("/etc/a", b"a").hard("b", "/etc/a").file("//c", b"c").end();
    let image = rig.pull_layers(&[layer, Tar::default().file("/.wh.c", b"").end()]).unwrap();
    let disk = rig.store().disk(&image.digest);
    for (name, content) in [("etc/a", "a"), ("b", "a")] {
        if let Some(said) = crate::whole::ask(&disk, &format!("cat {name}")) {
            assert_eq!(said, content);
        }
    }
    if let Some(said) = crate::whole::ask(&disk, "stat c") {
        assert!(said.is_empty(), "{said}");
    }
}

#[test]
fn attributes_of_other_systems_are_counted_and_left_out() {
    let records: Vec<(String, Vec<u8>)> =
        (0..40_000).map(|number| (format!("SCHILY.xattr.n{number}"), Vec::new())).collect();
    let records: Vec<(&str, &[u8])> = records.iter().map(|(name, value)| (&**name, &**value)).collect();
    let layer = records.chunks(20_000).fold(Tar::default(), Tar::pax).file("x", b"").end();
    let rig = Rig::new();
    let image = rig.pull_layers(&[layer]).unwrap();
    assert_eq!(image.skipped, 40_000);
}

#[test]
fn what_is_twice_or_malformed_is_refused() {
    let tar = Tar::default;
    let mut broken = head(b"x", b'0').bytes();
    broken[0] = b'y';
    let mut letters = head(b"x", b'0').bytes();
    letters[124..135].copy_from_slice(b"0000000009z");
    let huge = Head { size: 1 << 62, ..head(b"x", b'0') };
    refused(vec![
        ("a file twice", tar().file("a", b"1").file("a", b"2").end(), &["\"a\"", "twice"]),
        ("a file over a directory", tar().file("a/b", b"1").file("a", b"2").end(), &["\"a\"", "twice"]),
        ("a directory over a link", tar().link("a", "b").dir("a").end(), &["\"a\"", "twice"]),
        ("the same by another way", tar().file("a/b", b"").file("a//./b", b"").end(), &["twice"]),
        ("a changed header", [&broken[..], &[0; 1024]].concat(), &["checksum"]),
        ("a size of letters", [&letters[..], &[0; 1024]].concat(), &["checksum"]),
        ("a negative size", tar().pax(&[("size", b"-1")]).file("a", b"").end(), &["size", "-1"]),
        ("more content than there is", tar().add(&Head { size: 512, ..head(b"x", b'0') }, b"").0, &["ends within"]),
        ("half a header", tar().file("a", b"").0[..300].to_vec(), &["ends within"]),
        ("a huge size", tar().add(&huge, b"").end(), &["more than 68719476736 bytes"]),
        ("the hugest", tar().pax(&[("size", b"18446744073709551615")]).file("x", b"").end(), &["\"x\"", "size"]),
        ("a size that pax changes", tar().pax(&[("size", b"600")]).file("x", b"y").0, &["ends within", "\"x\""]),
        ("sparse", tar().add(&head(b"x", b'S'), b"").end(), &["\"x\"", "sparse"]),
        ("sparse by pax", tar().pax(&[("GNU.sparse.major", b"1")]).file("x", b"").end(), &["\"x\"", "sparse"]),
        ("an unknown kind", tar().add(&head(b"x", b'V'), b"").end(), &["\"x\"", "'V'"]),
        ("records without length", tar().special(b'x', b"path=x\n").file("x", b"").end(), &["extended header"]),
        ("a record beyond its header", tar().special(b'x', b"99 path=x\n").end(), &["extended header"]),
        ("a record of nothing", tar().special(b'x', b"0 \n").end(), &["extended header"]),
        ("headers without end", (0..20).fold(tar(), |tar, _| tar.special(b'x', b"")).end(), &["extended header"]),
        ("an owner beyond", tar().pax(&[("uid", b"4294967296")]).file("x", b"").end(), &["\"x\"", "owner"]),
        ("a device beyond", tar().add(&Head { device: (4096, 0), ..head(b"x", b'3') }, b"").end(), &["device"]),
    ]);
}

#[test]
fn what_is_too_long_is_refused() {
    let tar = Tar::default;
    let name = [b'n'; 64 << 10];
    let deep = "d/".repeat(2000);
    let value = [b'v'; 4096];
    refused(vec![
        ("64 KiB by GNU", tar().special(b'L', &name).file("x", b"").end(), &["name", "65536", "4097"]),
        ("64 KiB by pax", pax_path(&name), &["name", "65536", "4096"]),
        ("a link by GNU", tar().special(b'K', &name).link("x", "y").end(), &["link", "65536"]),
        ("a name", pax_path(&[b'n'; 256]), &["name", "255"]),
        (
            "a header",
            tar().add(&Head { size: 1 << 40, ..head(b"x", b'x') }, b"").end(),
            &["extended header", "1048576"],
        ),
        ("levels", pax_path(deep.as_bytes()), &["1024"]),
        ("an attribute", tar().pax(&[("SCHILY.xattr.user.a", &value)]).file("x", b"").end(), &["\"x\"", "attributes"]),
        (
            "the name of an attribute",
            tar().pax(&[(&format!("SCHILY.xattr.user.{}", "n".repeat(300)), b"")]).file("x", b"").end(),
            &["\"x\"", "attributes"],
        ),
    ]);
}

#[test]
fn deep_ways_through_links_end() {
    // Each layer continues at a link to the end of the previous one.
    let deep = "d/".repeat(400);
    let layers: Vec<_> = (0..4)
        .map(|number| {
            let from = if number == 0 { String::new() } else { format!("l{}/", number - 1) };
            let tar = Tar::default().pax(&[("path", format!("{from}{deep}").as_bytes())]).dir("x");
            let target = deep.repeat(number + 1);
            tar.pax(&[("linkpath", target.as_bytes())]).link(&format!("l{number}"), "x").end()
        })
        .collect();
    let text = chain(&Rig::new().pull_layers(&layers).unwrap_err());
    assert!(text.contains("1024"), "{text}");
}

#[test]
fn names_need_not_be_text() {
    let layer = Tar::default().pax(&[("path", b"\xff\x80/\xfe")]).file("x", b"").file("line\nbreak", b"").end();
    Rig::new().pull_layers(&[layer]).unwrap();
    refused(vec![("named in an error", pax_path(b"\xff/../\n"), &["\\xff/../\\n"])]);
}

#[test]
fn whiteouts_and_opaque_directories_hide_what_is_below_alone() {
    let lower = Tar::default().file("a/1", b"").file("b/1", b"").file("c", b"").end();
    let upper = Tar::default()
        .file("a/.wh..wh..opq", b"")
        .file("a/.wh.1", b"")
        .file("a/.wh.nothing", b"")
        .file("nowhere/.wh..wh..opq", b"")
        .file("nowhere/.wh.x", b"")
        .file("c/.wh.x", b"")
        .file(".wh.b", b"")
        .dir("b")
        .file(".wh..wh..opq", b"")
        .file(".wh..wh.aufs", b"")
        .file("a/1", b"new")
        .end();
    let rig = Rig::new();
    rig.pull_layers(&[lower, upper]).unwrap();
}

fn packed(bytes: Vec<u8>, suffix: &str, unpacked: &[u8]) -> Packed {
    Packed { bytes, media_type: format!("{LAYER}{suffix}"), diff_id: Digest::of(unpacked) }
}

#[test]
fn bombs_are_refused_before_they_are_unpacked() {
    let zeros = vec![0; 80 << 20];
    let tar = Tar::default().file("zeros", &zeros).end();
    let zstd = zstd::encode_all(&tar[..], 1).unwrap();
    let small =
        PullOptions { limits: ImageLimits { bytes: 1 << 20, ..ImageLimits::default() }, ..PullOptions::default() };
    for layer in [packed(gzip(&tar), "+gzip", &tar), packed(zstd, "+zstd", &tar)] {
        let rig = Rig::new();
        rig.image(std::slice::from_ref(&layer));
        let text = chain(&rig.pull_alone(&small).unwrap_err());
        assert!(text.contains("more than 1048576 bytes"), "{text}");
        if layer.media_type.ends_with("zstd") {
            let text = chain(&rig.pull_alone(&PullOptions::default()).unwrap_err());
            assert!(text.contains("256 to 1"), "{text}");
        }
    }
    // More empty entries than are allowed.
    assert_eq!(ImageLimits::default().entries, 1_000_000);
    let entry = head(b"d/", b'5').bytes();
    let many = zstd::encode_all(std::io::Cursor::new(entry.repeat(30_000)), 1).unwrap();
    let rig = Rig::new();
    rig.image(&[packed(many.repeat(4), "+zstd", b"is not read to its end")]);
    let limits = ImageLimits { ratio: u64::MAX, entries: 100_000, ..ImageLimits::default() };
    let text = chain(&rig.pull_alone(&PullOptions { limits, ..PullOptions::default() }).unwrap_err());
    assert!(text.contains("more than 100000 entries"), "{text}");
}

#[test]
fn streams_that_break_off_are_refused() {
    let tar = Tar::default().file("a", &[7; 5000]).end();
    let zstd = zstd::encode_all(&tar[..], 1).unwrap();
    for (bytes, suffix) in [(gzip(&tar), "+gzip"), (zstd, "+zstd")] {
        let cut = bytes[..bytes.len() / 2].to_vec();
        for bytes in [cut, b"no such stream".to_vec(), Vec::new()] {
            let rig = Rig::new();
            rig.image(&[packed(bytes, suffix, &tar)]);
            let text = chain(&rig.pull_alone(&PullOptions::default()).unwrap_err());
            assert!(text.contains("layer sha256:"), "{text}");
        }
    }
}

#[test]
fn content_is_what_its_digest_says() {
    let rig = Rig::new();
    let tar = Tar::default().file("a", b"1").end();
    let layer = rig.blob(LAYER, &tar);
    let config = rig.config(&[Digest::of(&tar)]);
    let pull = || chain(&rig.pull_alone(&PullOptions::default()).unwrap_err());
    let mut sizes = Vec::new();
    for size in [0, tar.len() - 1, tar.len() + 1, usize::MAX >> 1] {
        let mut other = layer.clone();
        other["size"] = json!(size);
        rig.manifest(&config, &[other]);
        sizes.push(pull());
    }
    assert!(sizes[..3].iter().all(|text| text.contains("of its descriptor")), "{sizes:?}");
    assert!(sizes[3].contains("more than"), "{sizes:?}");
    let path = rig.path("layout/blobs/sha256").join(Digest::of(&tar).hex());
    rig.manifest(&config, std::slice::from_ref(&layer));
    let mut changed = tar.clone();
    changed[600] ^= 1;
    fs::write(&path, &changed).unwrap();
    assert!(pull().contains(&format!("has the digest {}", Digest::of(&changed))));
    fs::remove_file(&path).unwrap();
    assert!(pull().contains("cannot be read"));
    // A link out of the layout, to the correct content.
    let outside = rig.path("canary/layer");
    fs::write(&outside, &tar).unwrap();
    symlink(&outside, &path).unwrap();
    assert!(pull().contains("cannot be read"));
    fs::remove_file(&path).unwrap();
    fs::write(&path, &tar).unwrap();
    let other = rig.config(&[Digest::of(b"another")]);
    rig.manifest(&other, std::slice::from_ref(&layer));
    assert!(pull().contains("does not match the diff ID in the image's configuration"));
    rig.manifest(&rig.config(&[]), &[layer]);
    assert!(pull().contains("1 layers, and its configuration 0"));
}

#[test]
fn a_refused_image_leaves_no_content() {
    let rig = Rig::new();
    let content = || fs::read_dir(rig.store().root().join("blobs/sha256")).unwrap().count();
    let shared = plain(Tar::default().file("a", b"1").end());
    rig.image(std::slice::from_ref(&shared));
    let kept = rig.pull(&PullOptions::default()).unwrap();
    let before = content();
    rig.image(&[shared.clone(), plain(Tar::default().file("a", b"").file("a", b"").end())]);
    assert!(chain(&rig.pull(&PullOptions::default()).unwrap_err()).contains("twice"));
    // The layer of the other image is there.
    assert_eq!(content(), before);
    // Content of a pull that failed stays for the next one, until it is swept.
    let missing = plain(Tar::default().file("b", b"2").end());
    rig.image(&[shared, missing.clone()]);
    fs::remove_file(rig.path("layout/blobs/sha256").join(Digest::of(&missing.bytes).hex())).unwrap();
    assert!(chain(&rig.pull(&PullOptions::default()).unwrap_err()).contains("cannot be read"));
    assert!(content() > before);
    fs::write(rig.store().root().join("disks/other"), "of somebody else").unwrap();
    let half = rig.store().root().join("disks").join(Digest::of(b"half").hex());
    fs::create_dir(&half).unwrap();
    fs::write(half.join("disk.ext4"), [1; 8192]).unwrap();
    assert!(rig.store().sweep().unwrap() > 8192);
    assert_eq!((content(), half.exists()), (before, false));
    assert_eq!(rig.store().image(&kept.digest).unwrap(), Some(kept));
    assert_eq!(rig.store().sweep().unwrap(), 0);
}

#[test]
fn documents_that_are_none_are_refused() {
    let rig = Rig::new();
    let pull = || chain(&rig.pull_alone(&PullOptions::default()).unwrap_err());
    let tar = Tar::default().end();
    let (layer, config) = (rig.blob(LAYER, &tar), rig.config(&[Digest::of(&tar)]));
    let of = |manifest: Value| {
        rig.index(&[rig.blob(MANIFEST, manifest.to_string().as_bytes())]);
        pull()
    };
    let text = of(json!({"schemaVersion": 2, "config": config, "layers": [layer], "manifests": []}));
    assert!(text.contains("not supported"), "{text}");
    let text = of(json!({"schemaVersion": 2, "config": config, "layers": vec![layer.clone(); 129]}));
    assert!(text.contains("129 layers; 128"), "{text}");
    let text = of(json!({"schemaVersion": 2, "config": layer, "layers": []}));
    assert!(text.contains("configuration") && text.contains("not supported"), "{text}");
    let mut other = layer.clone();
    other["mediaType"] = json!("application/x-tar");
    assert!(of(json!({"schemaVersion": 2, "config": config, "layers": [other]})).contains("application/x-tar"));
    other["digest"] = json!("sha256:../../../canary/etc/passwd");
    assert!(of(json!({"schemaVersion": 2, "config": config, "layers": [other]})).contains("invalid digest"));
    rig.index(&[rig.blob(MANIFEST, b"{\"layers\": [], \"layers\": []}")]);
    assert!(pull().contains("duplicate field"));
    rig.index(&[rig.blob(MANIFEST, "[".repeat(100_000).as_bytes())]);
    assert!(pull().contains("cannot be understood"));
    rig.index(&[rig.blob(MANIFEST, &vec![b' '; (4 << 20) + 1])]);
    assert!(pull().contains("4194304 are allowed"));
    fs::write(rig.path("layout/index.json"), vec![b' '; 5 << 20]).unwrap();
    assert!(pull().contains("index.json"));
    let arm = json!({"architecture": "arm64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}});
    let arm = rig.blob("application/vnd.oci.image.config.v1+json", arm.to_string().as_bytes());
    rig.manifest(&arm, &[]);
    assert!(pull().contains("linux/arm64"));
}

#[test]
fn indexes_are_followed_to_this_platform_and_not_in_circles() {
    let rig = Rig::new();
    let mut image = rig.image(&[plain(Tar::default().end())]);
    image["platform"] = json!({"architecture": "amd64", "os": "linux"});
    let mut arm = rig.blob(MANIFEST, b"{}");
    arm["platform"] = json!({"architecture": "arm64", "os": "linux", "variant": "v8"});
    let index = |manifests: &[&Value]| {
        rig.blob(INDEX, json!({"schemaVersion": 2, "manifests": manifests}).to_string().as_bytes())
    };
    rig.index(&[index(&[&arm, &image])]);
    let found = rig.pull_alone(&PullOptions::default()).unwrap();
    assert_eq!(json!(found.digest), image["digest"]);
    rig.index(&[index(&[&arm])]);
    assert!(chain(&rig.pull_alone(&PullOptions::default()).unwrap_err()).contains("among linux/arm64"));
    let nested = (0..6).fold(image, |inner, _| index(&[&inner]));
    rig.index(&[nested]);
    assert!(chain(&rig.pull_alone(&PullOptions::default()).unwrap_err()).contains("4 indexes deep"));
    // A cycle cannot have correct digests, and a source that claims them is not trusted.
    let circle = index(&[&json!({"mediaType": INDEX, "digest": Digest::of(b"c"), "size": 1})]);
    let name = circle["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
    let bytes = fs::read(rig.path("layout/blobs/sha256").join(name)).unwrap();
    fs::write(rig.path("layout/blobs/sha256").join(Digest::of(b"c").hex()), bytes).unwrap();
    rig.index(&[circle]);
    assert!(
        chain(&rig.pull_alone(&PullOptions::default()).unwrap_err()).contains("instead of the 1 of its descriptor")
    );
}
