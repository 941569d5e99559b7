//! Archives of Docker's, a registry that wants a token, and names.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use clade_oci::{Digest, ImageError, PullOptions, Reference, Version};
use serde_json::json;

use crate::layout::{Rig, Tar, chain, gzip};

fn archive(rig: &Rig, tar: Tar) -> Reference {
    let file = rig.path("image.tar");
    fs::write(&file, tar.end()).unwrap();
    Reference::Archive { file }
}

fn saved(config: &str, layers: &[&str]) -> Vec<u8> {
    json!([{"Config": config, "RepoTags": ["a:b"], "Layers": layers}]).to_string().into_bytes()
}

#[test]
fn an_archive_of_docker_is_an_image() {
    let rig = Rig::new();
    let layer = Tar::default().file("a", b"1").end();
    let digest = Digest::of(&layer);
    let config = json!({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["x"]},
        "rootfs": {"type": "layers", "diff_ids": [digest, digest]}})
    .to_string();
    let tar = Tar::default()
        .file("c.json", config.as_bytes())
        .file("one/layer.tar", &layer)
        .link("two/layer.tar", "../one/layer.tar")
        .file("manifest.json", &saved("c.json", &["one/layer.tar", "two/layer.tar"]));
    let reference = archive(&rig, tar.clone());
    let image = rig.store().pull(&reference, &PullOptions::default(), &()).unwrap();
    assert_eq!((image.config.cmd[0].as_str(), image.blobs.len()), ("x", 4));
    assert_eq!(rig.store().find(&reference.to_string()).unwrap(), image);
    let pull = |tar| chain(&rig.store().pull(&archive(&rig, tar), &PullOptions::default(), &()).unwrap_err());
    assert!(pull(Tar::default()).contains("has no \"manifest.json\""));
    let wrong = tar.clone().file("manifest.json", &saved("../../etc/passwd", &[]));
    assert!(pull(wrong).contains("etc/passwd"));
    let circle = Tar::default().link("a", "b").link("b", "a").file("manifest.json", &saved("a", &[]));
    assert!(pull(circle).contains("has no \"a\""));
    let fewer = tar.clone().file("manifest.json", &saved("c.json", &["one/layer.tar"]));
    assert!(pull(fewer).contains("1 layers, and its configuration 2"));
    let other = tar.file("one/layer.tar", b"another").file("manifest.json", &saved("c.json", &["one/layer.tar"; 2]));
    fs::remove_dir_all(rig.store().root().join("blobs/sha256")).unwrap();
    fs::create_dir(rig.store().root().join("blobs/sha256")).unwrap();
    fs::remove_dir_all(rig.store().root().join("disks")).unwrap();
    fs::create_dir(rig.store().root().join("disks")).unwrap();
    assert!(pull(other).contains("has the digest"), "a layer is what its configuration says");
}

#[test]
fn layers_of_dockers_archives_may_be_packed() {
    let rig = Rig::new();
    let layers = [("a", "+gzip"), ("b", "+zstd"), ("c", "")].map(|(name, suffix)| {
        let layer = Tar::default().file(name, name.as_bytes()).end();
        let packed = match suffix {
            "+gzip" => gzip(&layer),
            "+zstd" => zstd::encode_all(&layer[..], 1).unwrap(),
            _ => layer.clone(),
        };
        (format!("blobs/sha256/{}", Digest::of(&packed).hex()), packed, Digest::of(&layer))
    });
    let diff_ids: Vec<_> = layers.iter().map(|(_, _, diff_id)| diff_id).collect();
    let config = json!({"architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let tar = Tar::default().file("c.json", config.to_string().as_bytes());
    let tar = layers.iter().fold(tar, |tar, (name, packed, _)| tar.file(name, packed));
    let names: Vec<&str> = layers.iter().map(|(name, _, _)| &**name).collect();
    let reference = archive(&rig, tar.file("manifest.json", &saved("c.json", &names)));
    let image = rig.store().pull(&reference, &PullOptions::default(), &()).unwrap();
    for name in ["a", "b", "c"] {
        if let Some(said) = crate::whole::ask(&rig.store().disk(&image.digest), &format!("cat {name}")) {
            assert_eq!(said, name);
        }
    }
}

#[test]
fn stores_of_earlier_versions_are_read() {
    let rig = Rig::new();
    let image = rig.pull_layers(&[Tar::default().file("a", b"1").end()]).unwrap();
    // Docker Hub by its registry's host, and a record without all of the configuration.
    let names = json!({"registry-1.docker.io/library/python:3": image.digest, "a.example/b:1": image.digest});
    fs::write(rig.store().root().join("references.json"), names.to_string()).unwrap();
    let names = rig.store().references().unwrap();
    assert_eq!(names.keys().collect::<Vec<_>>(), ["a.example/b:1", "docker.io/library/python:3"]);
    for text in ["registry-1.docker.io/library/python:3", "docker.io/python:3", "index.docker.io/library/python:3"] {
        assert_eq!(rig.store().find(text).unwrap(), image, "{text}");
    }
    let record = rig.store().disk(&image.digest).with_file_name("image.json");
    let mut old: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    old["config"].as_object_mut().unwrap().remove("User").unwrap();
    fs::write(&record, old.to_string()).unwrap();
    assert_ne!(rig.store().image(&image.digest).unwrap().as_ref(), Some(&image));
    assert_eq!(rig.pull(&PullOptions::default()).unwrap(), image);
    assert_eq!(rig.store().image(&image.digest).unwrap(), Some(image));
}

/// A registry with one image, of `layout`'s, which asks for a token.
fn serve(rig: &Rig) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let blobs = rig.path("layout/blobs/sha256");
    let manifest = json!(rig.image(&[crate::layout::plain(Tar::default().file("a", b"1").end())]));
    let manifest = manifest["digest"].as_str().unwrap().to_owned();
    let answer = move |stream: TcpStream| -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let target = lines.next().unwrap_or(Ok(String::new()))?;
        let path = target.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut is_known = false;
        for line in lines {
            let line = line?;
            is_known |= line.eq_ignore_ascii_case("authorization: Bearer secret");
            if line.is_empty() {
                break;
            }
        }
        let path = path.replace("manifests/v1", &format!("manifests/{manifest}"));
        let blob = path.rsplit_once("sha256:").map(|(_, hex)| blobs.join(hex));
        let send = |status: &str, more: &str, body: &[u8]| {
            let head =
                format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{more}\r\n", body.len());
            (&stream).write_all(&[head.as_bytes(), body].concat())
        };
        if path.starts_with("/token?") {
            let is_right = path.contains("scope=repository%3Aa%2Fb%3Apull") && path.contains("service=here");
            return send(if is_right { "200 OK" } else { "400 Bad" }, "", br#"{"access_token": "secret"}"#);
        }
        if !is_known {
            let asks = format!("www-authenticate: Bearer realm=\"http://127.0.0.1:{port}/token\",service=\"here\"\r\n");
            return send("401 Unauthorized", &asks, b"");
        }
        match blob.map(fs::read) {
            Some(Ok(bytes)) if path.starts_with("/v2/a/b/") => send("200 OK", "", &bytes),
            _ => send("404 Not Found", "", b""),
        }
    };
    thread::spawn(move || listener.incoming().flatten().for_each(|stream| drop(answer(stream))));
    port
}

#[test]
fn a_registry_that_asks_for_a_token_is_given_one() {
    let rig = Rig::new();
    let port = serve(&rig);
    let of = |name: &str| format!("127.0.0.1:{port}/{name}").parse::<Reference>().unwrap();
    let image = rig.store().pull(&of("a/b:v1"), &PullOptions::default(), &()).unwrap();
    let again = rig.store().pull(&of(&format!("a/b@{}", image.digest)), &PullOptions::default(), &()).unwrap();
    assert_eq!(image, again);
    let pull = |name: &str| chain(&rig.store().pull(&of(name), &PullOptions::default(), &()).unwrap_err());
    assert!(pull("a/b:v2").contains("answers 404"));
    assert!(pull("c:v1").contains("answers 400"));
    let nobody =
        Reference::Registry { host: "127.0.0.1:1".into(), name: "a".into(), version: Version::Tag("b".into()) };
    let text = chain(&rig.store().pull(&nobody, &PullOptions::default(), &()).unwrap_err());
    assert!(text.contains("http://127.0.0.1:1/v2/a/manifests/b does not answer"), "{text}");
}

/// The digest says what the content is, and the registry may be out of reach.
#[test]
fn a_digest_whose_image_is_present_needs_no_registry() {
    let rig = Rig::new();
    let port = serve(&rig);
    let of = |host: &str, version: Version| Reference::Registry { host: host.into(), name: "a/b".into(), version };
    let pull = |reference: &Reference| rig.store().pull(reference, &PullOptions::default(), &());
    let image = pull(&of(&format!("127.0.0.1:{port}"), Version::Tag("v1".into()))).unwrap();
    // Nobody listens there.
    let there = |version| of("127.0.0.1:1", version);
    let by_digest = there(Version::Digest(image.digest.clone()));
    assert_eq!(pull(&by_digest).unwrap(), image);
    assert_eq!(rig.store().find(&by_digest.to_string()).unwrap(), image);
    pull(&there(Version::Tag("v1".into()))).unwrap_err();
    // An index's digest, of which a pull has chosen the image.
    let index = there(Version::Digest(Digest::of(b"an index")));
    pull(&index).unwrap_err();
    let names = json!({ index.to_string(): image.digest });
    fs::write(rig.store().root().join("references.json"), names.to_string()).unwrap();
    assert_eq!(pull(&index).unwrap(), image);
    fs::remove_dir_all(rig.store().disk(&image.digest).parent().unwrap()).unwrap();
    pull(&index).unwrap_err();
}

#[test]
fn names_go_one_by_one_and_what_is_in_use_stays() {
    let rig = Rig::new();
    let port = serve(&rig);
    let (one, two) = (format!("127.0.0.1:{port}/a/b:v1"), format!("oci:{}", rig.path("layout").display()));
    let pull = |name: &str| rig.store().pull(&name.parse().unwrap(), &PullOptions::default(), &()).unwrap();
    let image = pull(&one);
    assert_eq!(pull(&two), image);
    let hex = &image.digest.hex()[..12];
    assert!(matches!(rig.store().remove(hex, false), Err(ImageError::Named { names, .. }) if names.len() == 2));
    let removed = rig.store().remove(&one, false).unwrap();
    assert_eq!((removed.image, removed.names), (None, vec![one.clone()]));
    assert_eq!(rig.store().find(hex).unwrap(), image);
    let open = fs::File::open(rig.store().disk(&image.digest)).unwrap();
    assert!(matches!(rig.store().remove(&two, false), Err(ImageError::InUse(name)) if name == two));
    assert_eq!(rig.store().find(&two).unwrap(), image);
    drop(open);
    let removed = rig.store().remove(hex, false).unwrap();
    assert_eq!((removed.image, removed.names), (Some(image.digest.clone()), vec![two.clone()]));
    assert!(removed.bytes > 1024 && rig.store().images().unwrap().is_empty());
    assert!(matches!(rig.store().find(&two), Err(ImageError::NotFound(name)) if name == two));
    assert_eq!(pull(&two), image, "all of it comes again");
    pull(&one);
    assert_eq!(rig.store().remove(hex, true).unwrap().names.len(), 2);
}
