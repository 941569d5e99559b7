//! Images that are made from others.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::MetadataExt;

use clade_oci::{Image, ImageChanges, ImageLimits, ImageName, PullError, RunConfig};
use serde_json::{Value, json};

use crate::layout::{Rig, Tar, chain};
use crate::whole::ask;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    // Wherever the writer has left off.
    file.seek(std::io::SeekFrom::Start(1)).unwrap();
    file
}

fn changes(layer: Option<&[u8]>) -> ImageChanges {
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    ImageChanges {
        layer: layer.map(file),
        config: RunConfig {
            entrypoint: texts(&["/bin/app"]),
            cmd: texts(&["serve"]),
            env: texts(&["A=2"]),
            working_dir: "/srv".to_owned(),
            user: "app".to_owned(),
            ..RunConfig::default()
        },
        labels: BTreeMap::from([("org.example.note".to_owned(), "new".to_owned())]),
        ports: ["80/tcp".to_owned()].into(),
        instructions: texts(&["RUN make"]),
        created: "2026-01-02T03:04:05Z".to_owned(),
    }
}

fn build(rig: &Rig, base: &Image, changes: ImageChanges, name: &str) -> Result<Image, PullError> {
    let name: ImageName = ImageName::parse(name, None).unwrap();
    let built = rig.store().build(base, changes, &name, ImageLimits::default(), &());
    rig.check_store();
    built
}

/// The document of an image in its store: 0 is the manifest, 1 the configuration.
fn document(rig: &Rig, image: &Image, at: usize) -> Value {
    let path = rig.store().root().join("blobs/sha256").join(image.blobs[at].digest.hex());
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn base(rig: &Rig) -> Image {
    let lower = Tar::default().file("kept", b"kept").file("gone", b"gone").dir("dir/").file("dir/in", b"in").end();
    rig.pull_layers(&[lower]).unwrap()
}

#[test]
fn an_image_is_another_one_with_a_layer_and_other_settings() {
    let rig = Rig::new();
    let base = base(&rig);
    let layer = Tar::default().file("new", b"new").file("dir/.wh.in", b"").file(".wh.gone", b"").end();
    let built = build(&rig, &base, changes(Some(&layer)), "app").unwrap();
    assert_ne!(built.digest, base.digest);
    // The manifest, the configuration, the base image's layer, and the new one.
    assert_eq!((built.blobs.len(), &built.blobs[2]), (4, &base.blobs[2]));
    assert_eq!((&built.config.entrypoint[..], &built.config.user[..]), (&["/bin/app".to_owned()][..], "app"));
    let disk = rig.store().disk(&built.digest);
    let names = |request: &str| ask(&disk, request).unwrap_or_default();
    if let Some(root) = ask(&disk, "ls /") {
        assert!(root.contains("kept") && root.contains("new") && !root.contains("gone"), "{root}");
        assert!(!names("ls /dir").contains(" in") && names("cat /new") == "new", "{root}");
    }
    let config = document(&rig, &built, 1);
    assert_eq!(config["config"]["Labels"], json!({"org.example.note": "new"}));
    assert_eq!(config["config"]["ExposedPorts"], json!({"80/tcp": {}}));
    assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), 2);
    let history = config["history"].as_array().unwrap();
    assert_eq!((history.len(), &history[1]["created_by"]), (3, &json!("RUN make")));
    // As many entries with a layer as there are layers, also for a base image without a history.
    assert_eq!(history.iter().filter(|entry| entry["empty_layer"].is_null()).count(), 2);
    assert_eq!((&config["created"], &config["architecture"]), (&json!("2026-01-02T03:04:05Z"), &json!("amd64")));
    // By its name, however it is spelled, and built upon once more.
    for name in ["app", "app:latest", &built.digest.hex()[..12]] {
        assert_eq!(rig.store().find(name).unwrap(), built, "{name}");
    }
    let other = Tar::default().file("more", b"more").end();
    let more = build(&rig, &built, changes(Some(&other)), "more:2").unwrap();
    assert_eq!(more.blobs.len(), 5);
    // Without its name the image in between goes, and no content of the others.
    rig.store().remove("app", false).unwrap();
    rig.check_store();
    assert!(rig.store().find("app").is_err() && rig.store().image(&built.digest).unwrap().is_none());
    assert_eq!(build(&rig, &more, changes(None), "same").unwrap().blobs.len(), 5);
}

#[test]
fn a_layer_without_changes_is_none() {
    let rig = Rig::new();
    let base = base(&rig);
    let built = build(&rig, &base, changes(Some(&Tar::default().end())), "app").unwrap();
    assert_eq!(built.blobs.len(), base.blobs.len());
    let config = document(&rig, &built, 1);
    assert_eq!(config["history"].as_array().unwrap().len(), 2);
    // The same changes are the same image.
    assert_eq!(build(&rig, &base, changes(None), "other").unwrap(), built);
}

#[test]
fn members_that_are_not_known_stay_and_others_are_replaced() {
    let rig = Rig::new();
    let config = json!({"architecture": "amd64", "os": "linux", "author": "somebody", "history": [{"comment": "old"}],
        "config": {"Env": ["A=1"], "StopSignal": "SIGINT", "Labels": {"a": "b"}, "ExposedPorts": null},
        "rootfs": {"type": "layers", "diff_ids": []}});
    let config = rig.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    rig.manifest(&config, &[]);
    let base = rig.pull_alone(&Default::default()).unwrap();
    let built = build(&rig, &base, changes(None), "app").unwrap();
    let config = document(&rig, &built, 1);
    assert_eq!((&config["author"], &config["config"]["StopSignal"]), (&json!("somebody"), &json!("SIGINT")));
    assert_eq!(config["config"]["Labels"], json!({"a": "b", "org.example.note": "new"}));
    assert_eq!((&config["config"]["Env"], config["history"].as_array().unwrap().len()), (&json!(["A=2"]), 2));
    assert_eq!(config["config"]["ExposedPorts"], json!({"80/tcp": {}}));
}

#[test]
fn a_bad_layer_is_refused_and_the_name_stays_with_the_older_image() {
    let rig = Rig::new();
    let base = base(&rig);
    let older = build(&rig, &base, changes(Some(&Tar::default().file("a", b"a").end())), "app").unwrap();
    let blobs = || std::fs::read_dir(rig.store().root().join("blobs/sha256")).unwrap().count();
    let before = blobs();
    for (layer, why) in [
        (Tar::default().file("../out", b"x").end(), "../out"),
        (Tar::default().file("a", b"1").file("a", b"2").end(), "twice"),
        (Tar::default().file("a", b"1").end()[..700].to_vec(), "end"),
    ] {
        let error = build(&rig, &base, changes(Some(&layer)), "app").unwrap_err();
        assert!(chain(&error).contains(why), "{why}: {}", chain(&error));
        assert_eq!((rig.store().find("app").unwrap(), blobs()), (older.clone(), before), "nothing is left of it");
    }
    let limits = ImageLimits { bytes: 4, ..ImageLimits::default() };
    let layer = Tar::default().file("a", b"12345").end();
    let name = ImageName::parse("app", None).unwrap();
    let error = rig.store().build(&base, changes(Some(&layer)), &name, limits, &()).unwrap_err();
    assert!(chain(&error).contains("bytes"), "{}", chain(&error));
    assert_eq!(rig.store().find("app").unwrap(), older);
}

#[test]
fn zeros_of_a_layer_take_no_space() {
    let rig = Rig::new();
    let base = base(&rig);
    let layer = Tar::default().file("sparse", &vec![0; 8 << 20]).end();
    let built = build(&rig, &base, changes(Some(&layer)), "app").unwrap();
    let blob = &built.blobs[3];
    let found = std::fs::metadata(rig.store().root().join("blobs/sha256").join(blob.digest.hex())).unwrap();
    assert_eq!((found.len(), blob.size), (layer.len() as u64, layer.len() as u64));
    assert!(found.blocks() * 512 < 1 << 20, "{} blocks", found.blocks());
    if let Some(content) = ask(&rig.store().disk(&built.digest), "stat /sparse") {
        assert!(content.contains("Size: 8388608"), "{content}");
    }
}

#[test]
fn an_image_that_has_gone_is_built_upon_by_none() {
    let rig = Rig::new();
    let base = base(&rig);
    rig.store().remove(&base.digest.to_string(), true).unwrap();
    let error = build(&rig, &base, changes(None), "app").unwrap_err();
    assert!(matches!(error, PullError::Store(_)), "{error}");
    assert!(rig.store().find("app").is_err());
}
