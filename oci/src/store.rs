//! Pulled images: content by digest, disks by the digest of their image, and names.
//!
//! | path | contents |
//! |---|---|
//! | `blobs/sha256/HEX` | content, checked before it got that name |
//! | `disks/HEX/disk.ext4`, `image.json` | the disk of an image, and its program |
//! | `references.json` | the image of each name |
//! | `partial/` | files being written; emptied by the next writer |
//! | `lock` | locked by a writer |

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use thiserror::Error;

use crate::digest::{Digest, DigestError, DigestReader};
use crate::manifest::{Descriptor, RunConfig};
use crate::reference::canonical_name;
use crate::sparse::SparseWriter;

/// The directory of images, if it is not in the cache.
pub const DIRECTORY_VARIABLE: &str = "CLADE_IMAGE_DIR";
/// The writer's version: other bytes for the same image need another version.
const FORMAT: u32 = 1;

/// An error of the store.
#[derive(Debug, Error)]
pub enum ImageStoreError {
    /// There is no directory for the store.
    #[error("no directory for images: set {DIRECTORY_VARIABLE}, XDG_CACHE_HOME or HOME")]
    NoDirectory,
    /// A file cannot be used.
    #[error("{path} cannot be {what}")]
    File {
        /// The file.
        path: PathBuf,
        /// The operation.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file is not a valid record.
    #[error("{path} is not a valid record of images")]
    Record {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// Content does not match its digest.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// Content ends too early.
    #[error("the content of {digest} cannot be read to its end")]
    Content {
        /// The content's digest.
        digest: Digest,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> ImageStoreError {
    let path = path.to_owned();
    move |source| ImageStoreError::File { path, what, source }
}

/// An image that has been pulled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The digest of its manifest.
    pub digest: Digest,
    /// The version of its writer.
    format: u32,
    /// Its content: manifest, configuration, layers.
    pub blobs: Vec<Descriptor>,
    /// Its program, with defaults.
    pub config: RunConfig,
    /// Size of its disk for the guest.
    pub disk_bytes: u64,
    /// Number of attributes and of other systems' files that were left out.
    pub skipped: u64,
}

/// Names of images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct References(pub(crate) BTreeMap<String, Digest>);

/// A directory of images.
#[derive(Clone, Debug)]
pub struct ImageStore {
    root: PathBuf,
}

/// Held by a writer. Readers need no lock: every file gets its name when it is complete.
#[derive(Debug)]
pub struct StoreLock {
    _file: File,
}

impl ImageStore {
    /// The directory of `CLADE_IMAGE_DIR`, otherwise `clade/images` in the cache. Made if it does
    /// not exist.
    ///
    /// # Errors
    /// When there is no such directory, or it cannot be made.
    pub fn open_default() -> Result<Self, ImageStoreError> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let cache = || set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        let root = set(DIRECTORY_VARIABLE).or_else(|| cache().map(|cache| cache.join("clade/images")));
        Self::open(&root.ok_or(ImageStoreError::NoDirectory)?)
    }

    /// Opens a directory. Made if it does not exist.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(root: &Path) -> Result<Self, ImageStoreError> {
        let root = std::path::absolute(root).map_err(failed(root, "found"))?;
        for dir in ["blobs/sha256", "blobs/sha512", "disks", "partial"] {
            let dir = root.join(dir);
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed(&dir, "made"))?;
        }
        Ok(Self { root })
    }

    /// The store's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Waits until no other writer holds the lock. Removes unfinished files of others.
    ///
    /// # Errors
    /// When the lock cannot be taken.
    pub fn lock(&self) -> Result<StoreLock, ImageStoreError> {
        let path = self.root.join("lock");
        let file = File::create(&path).map_err(failed(&path, "opened"))?;
        file.lock().map_err(failed(&path, "locked"))?;
        let partial = self.partial();
        for entry in fs::read_dir(&partial).map_err(failed(&partial, "listed"))?.flatten() {
            let path = entry.path();
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let removed = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(failed(&path, "removed"))?;
        }
        Ok(StoreLock { _file: file })
    }

    /// The directory of incomplete files.
    pub(crate) fn partial(&self) -> PathBuf {
        self.root.join("partial")
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.algorithm()).join(digest.hex())
    }

    fn disk_dir(&self, digest: &Digest) -> PathBuf {
        let other = if digest.algorithm() == "sha256" { "" } else { "sha512-" };
        self.root.join("disks").join(format!("{other}{}", digest.hex()))
    }

    /// The disk of an image, to be read only: all VMs share it.
    #[must_use]
    pub fn disk(&self, image: &Digest) -> PathBuf {
        self.disk_dir(image).join("disk.ext4")
    }

    /// Whether content is present, with its size.
    pub(crate) fn has_blob(&self, wanted: &Descriptor) -> bool {
        fs::metadata(self.blob_path(&wanted.digest)).is_ok_and(|file| file.is_file() && file.len() == wanted.size)
    }

    /// Stores content, after checking it.
    pub(crate) fn put_blob(
        &self,
        _: &StoreLock,
        wanted: &Descriptor,
        content: impl Read,
    ) -> Result<(), ImageStoreError> {
        let partial = self.partial();
        let file = NamedTempFile::new_in(&partial).map_err(failed(&partial, "written"))?;
        let mut writer = SparseWriter::new(file.as_file(), 0);
        // One more byte shows that the content is too long.
        let mut content = DigestReader::new(content.take(wanted.size.saturating_add(1)), &wanted.digest);
        let mut chunk = vec![0; 128 << 10];
        loop {
            let read = match content.read(&mut chunk) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(ImageStoreError::Content { digest: wanted.digest.clone(), source }),
            };
            writer.write_all(&chunk[..read]).map_err(failed(file.path(), "written"))?;
        }
        writer.finish().map_err(failed(file.path(), "written"))?;
        content.finish(Some(wanted.size))?;
        self.settle(file, &self.blob_path(&wanted.digest))
    }

    /// Gives a file its name, when it is durable.
    fn settle(&self, file: NamedTempFile, path: &Path) -> Result<(), ImageStoreError> {
        file.as_file().sync_all().map_err(failed(path, "written"))?;
        file.persist(path).map_err(|error| failed(path, "written")(error.error))?;
        sync_directory(path.parent().unwrap_or(&self.root))
    }

    /// Opens stored content. Its digest was checked when it was stored; a layer's unpacked digest
    /// is checked when it is read.
    pub(crate) fn open_blob(&self, wanted: &Descriptor) -> Result<File, ImageStoreError> {
        let path = self.blob_path(&wanted.digest);
        File::open(&path).map_err(failed(&path, "opened"))
    }

    /// A short document.
    pub(crate) fn read_blob(&self, wanted: &Descriptor) -> Result<Vec<u8>, ImageStoreError> {
        let file = self.open_blob(wanted)?;
        let mut bytes = Vec::new();
        let mut reader = DigestReader::new(file.take(wanted.size.saturating_add(1)), &wanted.digest);
        let read = reader.read_to_end(&mut bytes);
        read.map_err(|source| ImageStoreError::Content { digest: wanted.digest.clone(), source })?;
        reader.finish(Some(wanted.size))?;
        Ok(bytes)
    }

    /// An image with a complete disk. None without a disk, or with one of another version.
    ///
    /// # Errors
    /// When its record is invalid.
    pub fn image(&self, digest: &Digest) -> Result<Option<Image>, ImageStoreError> {
        let path = self.disk_dir(digest).join("image.json");
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ImageStoreError::File { path, what: "read", source }),
            Ok(bytes) => {
                let image: Image =
                    serde_json::from_slice(&bytes).map_err(|source| ImageStoreError::Record { path, source })?;
                Ok(Some(image).filter(|image| image.format == FORMAT && image.digest == *digest))
            }
        }
    }

    /// All images with disks.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn images(&self) -> Result<Vec<Image>, ImageStoreError> {
        let dir = self.root.join("disks");
        let mut images = Vec::new();
        for entry in fs::read_dir(&dir).map_err(failed(&dir, "listed"))? {
            let name = entry.map_err(failed(&dir, "listed"))?.file_name();
            if let Some(digest) = digest_of_disk(&name.to_string_lossy()) {
                images.extend(self.image(&digest)?);
            }
        }
        images.sort_by(|a, b| a.digest.cmp(&b.digest));
        Ok(images)
    }

    pub(crate) fn new_image(
        digest: Digest,
        blobs: Vec<Descriptor>,
        config: RunConfig,
        disk_bytes: u64,
        skipped: u64,
    ) -> Image {
        Image { digest, format: FORMAT, blobs, config, disk_bytes, skipped }
    }

    /// Stores a disk. `write` writes it into the given file.
    pub(crate) fn put_disk<E: From<ImageStoreError>>(
        &self,
        _: &StoreLock,
        digest: &Digest,
        write: impl FnOnce(&File) -> Result<Image, E>,
    ) -> Result<Image, E> {
        let partial = self.partial();
        let dir = tempfile::tempdir_in(&partial).map_err(failed(&partial, "written"))?;
        let path = dir.path().join("disk.ext4");
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(failed(&path, "made"))?;
        let image = write(&file)?;
        file.set_permissions(fs::Permissions::from_mode(0o444)).map_err(failed(&path, "written"))?;
        file.sync_all().map_err(failed(&path, "written"))?;
        let record = dir.path().join("image.json");
        let bytes = serde_json::to_vec_pretty(&image).unwrap_or_default();
        write_synced(&record, &bytes)?;
        sync_directory(dir.path())?;
        let place = self.disk_dir(digest);
        // A disk of another version, or without a record.
        match fs::remove_dir_all(&place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed(&place, "replaced")(error).into());
            }
            _ => {}
        }
        fs::rename(dir.path(), &place).map_err(failed(&place, "made"))?;
        // The directory was renamed, so there is nothing left to remove.
        drop(dir.keep());
        sync_directory(&self.root.join("disks"))?;
        Ok(image)
    }

    /// Names of images.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn references(&self) -> Result<BTreeMap<String, Digest>, ImageStoreError> {
        let path = self.root.join("references.json");
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(source) => Err(ImageStoreError::File { path, what: "read", source }),
            Ok(bytes) => {
                let References(names) =
                    serde_json::from_slice(&bytes).map_err(|source| ImageStoreError::Record { path, source })?;
                // Earlier versions named Docker Hub by its registry's host. This version's name comes first.
                let mut all = BTreeMap::new();
                for (name, digest) in names {
                    let canonical = canonical_name(&name);
                    if canonical == name {
                        all.insert(name, digest);
                    } else {
                        all.entry(canonical).or_insert(digest);
                    }
                }
                Ok(all)
            }
        }
    }

    pub(crate) fn set_references(&self, _: &StoreLock, names: BTreeMap<String, Digest>) -> Result<(), ImageStoreError> {
        self.replace_document(&References(names), &self.root.join("references.json"))
    }

    /// Replaces the record of an image.
    pub(crate) fn set_record(&self, _: &StoreLock, image: &Image) -> Result<(), ImageStoreError> {
        self.replace_document(image, &self.disk_dir(&image.digest).join("image.json"))
    }

    fn replace_document(&self, document: &impl Serialize, path: &Path) -> Result<(), ImageStoreError> {
        let partial = self.partial();
        let mut file = NamedTempFile::new_in(&partial).map_err(failed(&partial, "written"))?;
        let bytes = serde_json::to_vec_pretty(document).unwrap_or_default();
        file.write_all(&bytes).map_err(failed(file.path(), "written"))?;
        self.settle(file, path)
    }

    /// Removes a disk. Its record goes first, so that a half-removed disk is not an image.
    pub(crate) fn remove_disk(&self, _: &StoreLock, digest: &Digest) -> Result<(), ImageStoreError> {
        let place = self.disk_dir(digest);
        let record = place.join("image.json");
        match fs::remove_file(&record) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&record, "removed")(error)),
            _ => {}
        }
        fs::remove_dir_all(&place).map_err(failed(&place, "removed"))
    }

    /// The paths of the content of all images.
    fn kept_blobs(&self) -> Result<HashSet<PathBuf>, ImageStoreError> {
        let images = self.images()?;
        Ok(images.iter().flat_map(|image| &image.blobs).map(|blob| self.blob_path(&blob.digest)).collect())
    }

    /// Removes those of `blobs` that are of no image.
    pub(crate) fn discard_blobs(&self, _: &StoreLock, blobs: &[Descriptor]) -> Result<(), ImageStoreError> {
        let kept = self.kept_blobs()?;
        for path in blobs.iter().map(|blob| self.blob_path(&blob.digest)).filter(|path| !kept.contains(path)) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&path, "removed")(error)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes disks without a record, which a removal has left, and content of no image. Returns the number
    /// of bytes freed.
    pub(crate) fn sweep_of(&self, lock: &StoreLock) -> Result<u64, ImageStoreError> {
        let (disks, mut bytes) = (self.root.join("disks"), 0);
        for entry in fs::read_dir(&disks).map_err(failed(&disks, "listed"))? {
            let entry = entry.map_err(failed(&disks, "listed"))?;
            let (place, record) = (entry.path(), entry.path().join("image.json"));
            // Nothing else is a disk of this store.
            if digest_of_disk(&entry.file_name().to_string_lossy()).is_none() {
                continue;
            }
            if !record.try_exists().map_err(failed(&record, "found"))? {
                bytes += fs::metadata(place.join("disk.ext4")).map_or(0, |disk| disk.blocks() * 512);
                fs::remove_dir_all(&place).map_err(failed(&place, "removed"))?;
            }
        }
        Ok(bytes + self.sweep_blobs(lock)?)
    }

    /// Removes content of no image. Returns the number of bytes freed.
    fn sweep_blobs(&self, _: &StoreLock) -> Result<u64, ImageStoreError> {
        let kept = self.kept_blobs()?;
        let mut bytes = 0;
        for dir in ["blobs/sha256", "blobs/sha512"].map(|dir| self.root.join(dir)) {
            for entry in fs::read_dir(&dir).map_err(failed(&dir, "listed"))? {
                let path = entry.map_err(failed(&dir, "listed"))?.path();
                if !kept.contains(&path) {
                    bytes += fs::metadata(&path).map_or(0, |file| file.len());
                    fs::remove_file(&path).map_err(failed(&path, "removed"))?;
                }
            }
        }
        Ok(bytes)
    }
}

/// The digest of the image whose disk is in a directory of this name.
fn digest_of_disk(name: &str) -> Option<Digest> {
    let text = name.strip_prefix("sha512-").map_or_else(|| format!("sha256:{name}"), |hex| format!("sha512:{hex}"));
    text.parse().ok()
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), ImageStoreError> {
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(failed(path, "written"))
}

fn sync_directory(path: &Path) -> Result<(), ImageStoreError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(failed(path, "written"))
}
