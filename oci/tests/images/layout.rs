//! Archives byte by byte, OCI layouts made of them, and the files around them.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use clade_oci::{Digest, Image, ImageStore, PullError, PullOptions, Reference};
use serde_json::{Value, json};

pub(crate) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// The header of an entry.
#[derive(Clone, Debug)]
pub(crate) struct Head<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) kind: u8,
    pub(crate) size: u64,
    pub(crate) link: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) device: (u32, u32),
}

pub(crate) fn head(name: &[u8], kind: u8) -> Head<'_> {
    Head { name, kind, size: 0, link: b"", mode: 0o755, uid: 0, device: (0, 0) }
}

impl Head<'_> {
    pub(crate) fn bytes(&self) -> [u8; 512] {
        let mut block = [0; 512];
        let mut put = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
        put(0, &self.name[..self.name.len().min(100)]);
        put(100, format!("{:07o}", self.mode).as_bytes());
        put(108, format!("{:07o}", self.uid).as_bytes());
        put(116, format!("{:07o}", self.uid).as_bytes());
        let mut size = [0; 12];
        if self.size < 1 << 33 {
            size[..11].copy_from_slice(format!("{:011o}", self.size).as_bytes());
        } else {
            size[4..].copy_from_slice(&self.size.to_be_bytes());
            size[0] |= 0x80;
        }
        put(124, &size);
        put(136, format!("{:011o}", 1_700_000_000).as_bytes());
        put(156, &[self.kind]);
        put(157, &self.link[..self.link.len().min(100)]);
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}", self.device.0).as_bytes());
        put(337, format!("{:07o}", self.device.1).as_bytes());
        put(148, b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// An archive being built.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

impl Tar {
    pub(crate) fn add(mut self, head: &Head<'_>, content: &[u8]) -> Self {
        self.0.extend(head.bytes());
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, content: &[u8]) -> Self {
        let head = Head { size: content.len() as u64, ..head(name.as_bytes(), b'0') };
        self.add(&head, content)
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.add(&head(name.as_bytes(), b'5'), b"")
    }

    pub(crate) fn link(self, name: &str, target: &str) -> Self {
        self.add(&Head { link: target.as_bytes(), ..head(name.as_bytes(), b'2') }, b"")
    }

    pub(crate) fn hard(self, name: &str, target: &str) -> Self {
        self.add(&Head { link: target.as_bytes(), ..head(name.as_bytes(), b'1') }, b"")
    }

    /// Records before the next entry.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut bytes = Vec::new();
        for (key, value) in records {
            let rest = 3 + key.len() + value.len();
            let digits = (rest + rest.to_string().len()).to_string().len();
            bytes.extend(format!("{} {key}=", rest + digits).as_bytes());
            bytes.extend(*value);
            bytes.push(b'\n');
        }
        self.special(b'x', &bytes)
    }

    /// A header of a kind other than files.
    pub(crate) fn special(self, kind: u8, content: &[u8]) -> Self {
        let head = Head { size: content.len() as u64, ..head(b"special", kind) };
        self.add(&head, content)
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A layer as it is stored, its type, and the digest of its unpacked content.
#[derive(Clone, Debug)]
pub(crate) struct Packed {
    pub(crate) bytes: Vec<u8>,
    pub(crate) media_type: String,
    pub(crate) diff_id: Digest,
}

pub(crate) fn plain(bytes: Vec<u8>) -> Packed {
    Packed { diff_id: Digest::of(&bytes), bytes, media_type: LAYER.to_owned() }
}

/// A directory with a layout, a store, and files around them that must stay untouched.
#[derive(Debug)]
pub(crate) struct Rig {
    dir: tempfile::TempDir,
    store: ImageStore,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("layout/blobs/sha256")).unwrap();
        fs::write(at("layout/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        fs::create_dir_all(at("canary/etc")).unwrap();
        fs::write(at("canary/etc/passwd"), "canary").unwrap();
        symlink("etc", at("canary/link")).unwrap();
        let store = ImageStore::open(&at("store")).unwrap();
        Self { dir, store }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn store(&self) -> &ImageStore {
        &self.store
    }

    /// Adds content to the layout, and describes it.
    pub(crate) fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.path("layout/blobs/sha256").join(digest.hex()), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    pub(crate) fn index(&self, manifests: &[Value]) {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        fs::write(self.path("layout/index.json"), index.to_string()).unwrap();
    }

    pub(crate) fn config(&self, diff_ids: &[Digest]) -> Value {
        let run = json!({"Env": ["PATH=/bin", "A=b c"], "Entrypoint": ["/bin/sh"], "Cmd": null, "User": "7:8"});
        let config = json!({"architecture": "amd64", "os": "linux", "config": run,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        self.blob(CONFIG, config.to_string().as_bytes())
    }

    /// Adds an image to the layout, and describes its manifest.
    pub(crate) fn image(&self, layers: &[Packed]) -> Value {
        let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.diff_id.clone()).collect();
        let config = self.config(&diff_ids);
        let layers: Vec<Value> = layers.iter().map(|layer| self.blob(&layer.media_type, &layer.bytes)).collect();
        self.manifest(&config, &layers)
    }

    pub(crate) fn manifest(&self, config: &Value, layers: &[Value]) -> Value {
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        let manifest = self.blob(MANIFEST, manifest.to_string().as_bytes());
        self.index(std::slice::from_ref(&manifest));
        manifest
    }

    pub(crate) fn pull(&self, options: &PullOptions) -> Result<Image, PullError> {
        let reference = Reference::Layout { dir: self.path("layout"), tag: None };
        self.store.pull(&reference, options, &())
    }

    /// Pulls an image of these archives, and checks that other files are untouched.
    pub(crate) fn pull_layers(&self, layers: &[Vec<u8>]) -> Result<Image, PullError> {
        self.image(&layers.iter().cloned().map(plain).collect::<Vec<_>>());
        self.pull_alone(&PullOptions::default())
    }

    /// Pulls, and checks that other files are untouched.
    pub(crate) fn pull_alone(&self, options: &PullOptions) -> Result<Image, PullError> {
        let before = self.around();
        let outcome = self.pull(options);
        assert_eq!(self.around(), before, "something outside the store has changed");
        self.check_store();
        outcome
    }

    fn around(&self) -> BTreeMap<PathBuf, String> {
        let mut all = BTreeMap::new();
        for name in ["canary", "layout"] {
            list(&self.path(name), &mut all);
        }
        for entry in fs::read_dir(self.dir.path()).unwrap() {
            all.insert(entry.unwrap().path(), String::new());
        }
        all
    }

    /// Checks that the store has exactly the files of its table, all complete.
    pub(crate) fn check_store(&self) {
        let mut all = BTreeMap::new();
        list(self.store.root(), &mut all);
        for path in all.keys() {
            let own = path.strip_prefix(self.store.root()).unwrap();
            let parts: Vec<&str> = own.to_str().unwrap().split('/').collect();
            match parts[..] {
                ["" | "lock" | "references.json" | "blobs" | "disks" | "partial"] => {}
                ["blobs", "sha256" | "sha512"] => {}
                ["blobs", "sha256", hex] => assert_eq!(Digest::of(&fs::read(path).unwrap()).hex(), hex),
                ["disks", hex] => assert!(format!("sha256:{hex}").parse::<Digest>().is_ok()),
                ["disks", _, "disk.ext4" | "image.json"] => {}
                _ => panic!("{own:?} is not of a store"),
            }
        }
    }
}

fn list(path: &Path, all: &mut BTreeMap<PathBuf, String>) {
    let what = fs::symlink_metadata(path).unwrap();
    let content = match what.is_file() && what.len() < 1 << 20 {
        true => Digest::of(&fs::read(path).unwrap()).to_string(),
        false => what.len().to_string(),
    };
    let owner = format!("{:o} {}:{} {} {}", what.mode(), what.uid(), what.gid(), what.nlink(), what.mtime_nsec());
    all.insert(path.to_owned(), format!("{owner} {content}"));
    if what.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| list(&entry.unwrap().path(), all));
    }
}

/// The text of an error, with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
